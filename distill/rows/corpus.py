"""The corpus D_p of the language-model term: text, packed to blocks of equal length.

Documents are put one after the other, each with EOS behind it, and cut every `length` tokens; nothing keeps attention
from crossing the border of two documents in a block. The tokens left over at the end of the corpus (fewer than a
block) are not used. A corpus that ends starts again.

Which text a block holds is a pure function of (corpus, tokenizer, length, seed, number of the block), so that a resumed
run needs its step alone and the number of ranks changes nothing. There are two ways to get there:

- A local file of at most 2^28 tokens (1 GiB as int32) and 2 GiB is tokenised once, at the start of every process, and
  stays in memory. Each cycle is a new permutation of its blocks; any block costs the same.
- Anything else is streamed: documents pass through a shuffle buffer of 4096, seeded anew in each cycle, and are
  tokenised on the way. Memory stays small, but block n is reached through those before it: a run that is resumed at
  step s first reads and tokenises the text of s steps, and each rank reads the text of all ranks.
"""

from __future__ import annotations

import io
import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING

import numpy as np
import torch

from dpkd.core.errors import UserError
from dpkd.core.progress import say
from dpkd.distill.batches.batch import Batch
from dpkd.distill.rows.documents import DocumentSource, open_documents
from dpkd.teacher_cache.store.order import epoch_order

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_MAX_TOKENS_IN_MEMORY = 2**28
_MAX_BYTES_A_TOKEN = 8  # of a file that is worth trying: text has about 4
_SHUFFLE_BUFFER = 4096  # documents
_ENCODED_TOGETHER = 256  # documents


class Corpus:
    """A corpus as numbered blocks of `length` tokens, without end.

    `location` is a file (`.jsonl` or `.parquet` with a text in `text` of every row; `.txt` in UTF-8, where blank lines
    part the documents) or what the `datasets` library can stream: `NAME`, `NAME:SPLIT` or `NAME:CONFIG:SPLIT` (split
    `train` where none is named; a directory of such files counts as a name). Documents without text are passed over.

    Raises `UserError` when there is no such corpus, a row has no text, or the whole gives less than one block.
    """

    def __init__(self, location: str, tokenizer: PreTrainedTokenizerBase, length: int, seed: int) -> None:
        if tokenizer.eos_token_id is None:
            raise UserError("the tokenizer has no EOS token, which parts the documents of the corpus", where=location)
        source = open_documents(location)
        #: name and content of the corpus
        self.identity: dict[str, str] = source.identity
        self._blocks = _open_blocks(source, tokenizer, length, seed)

    def blocks(self, start: int, count: int) -> np.ndarray:
        """Blocks `start` to `start + count - 1` as int64 ids of shape [count, length]."""
        return self._blocks.read(start, count)

    def batch(self, start: int, count: int) -> Batch:
        """The same blocks as a batch."""
        return collate_corpus(self.blocks(start, count), start)


def collate_corpus(blocks_BS: np.ndarray, start: int = 0) -> Batch:
    """Tensors of whole blocks [B, S]: each a row whose every token but the first is learnt; `start` numbers them."""
    num_rows, length = blocks_BS.shape
    targets = length - 1
    return Batch(
        example_ids=[f"block-{start + place}" for place in range(num_rows)],
        input_ids_BS=torch.from_numpy(blocks_BS.astype(np.int64)),
        attention_mask_BS=torch.ones((num_rows, length), dtype=torch.int64),
        row_T=torch.arange(num_rows).repeat_interleave(targets),
        # the state at position i predicts token i + 1
        predict_T=torch.arange(targets).repeat(num_rows),
        target_T=torch.from_numpy(blocks_BS[:, 1:].reshape(-1).astype(np.int64)),
        num_tokens_B=torch.full((num_rows,), targets),
        unfinished_B=torch.ones(num_rows, dtype=torch.bool),  # a block is cut, it does not end
        num_chosen=num_rows,
        teacher_logprob_T=None,
        entry_ids_TK=None,
        entry_logprobs_TK=None,
        entry_counts_T=None,
        log_tail_T=None,
    )


class _HeldBlocks:
    """Blocks of tokens in memory; each cycle takes them in another order."""

    def __init__(self, tokens: np.ndarray, length: int, seed: int) -> None:
        self._seed, self._num_blocks = seed, len(tokens) // length
        self._table = tokens[: self._num_blocks * length].reshape(self._num_blocks, length)
        self._cycle, self._order = -1, np.zeros(0, np.int64)

    def read(self, start: int, count: int) -> np.ndarray:
        return self._table[[self._place(number) for number in range(start, start + count)]].astype(np.int64)

    def _place(self, number: int) -> int:
        cycle, place = divmod(number, self._num_blocks)
        if cycle != self._cycle:
            self._cycle, self._order = cycle, epoch_order([self._num_blocks], self._seed, cycle)[:, 1]
        return int(self._order[place])


class _StreamedBlocks:
    """Blocks in the order in which the documents come; what lies before the asked one is read and dropped."""

    def __init__(
        self, source: DocumentSource, encode: Callable[[Iterable[str]], Iterator[np.ndarray]], length: int, seed: int
    ) -> None:
        self._source, self._encode, self._length, self._seed = source, encode, length, seed
        self._walk, self._position = self._from_start(), 0
        # an empty corpus is found now, not at the first step
        self._walk = itertools.chain([next(self._walk)], self._walk)

    def read(self, start: int, count: int) -> np.ndarray:
        if start < self._position:
            self._walk, self._position = self._from_start(), 0
        for _ in range(start - self._position):
            next(self._walk)
        blocks = [next(self._walk) for _ in range(count)]
        self._position = start + count
        return np.array(blocks, np.int64).reshape(count, self._length)

    def _from_start(self) -> Iterator[np.ndarray]:
        for cycle in itertools.count():
            random = np.random.Generator(np.random.PCG64(np.random.SeedSequence([self._seed, cycle])))
            left, found = np.zeros(0, np.int32), False
            for piece in self._encode(_shuffled(self._source.documents(), random)):
                left = np.concatenate([left, piece])
                whole = len(left) // self._length * self._length
                for block in left[:whole].reshape(-1, self._length):
                    found = True
                    yield block
                left = left[whole:]
            if not found:
                raise _too_short(self._source.name, len(left), self._length)


def _open_blocks(
    source: DocumentSource, tokenizer: PreTrainedTokenizerBase, length: int, seed: int
) -> _HeldBlocks | _StreamedBlocks:
    def encode(documents: Iterable[str]) -> Iterator[np.ndarray]:
        return _encoded(documents, tokenizer)

    if source.num_bytes is not None and source.num_bytes <= _MAX_BYTES_A_TOKEN * _MAX_TOKENS_IN_MEMORY:
        held = io.BytesIO()
        for piece in encode(source.documents()):
            held.write(piece.tobytes())
            if held.tell() > 4 * _MAX_TOKENS_IN_MEMORY:
                say(f"{source.name} has more than {_MAX_TOKENS_IN_MEMORY} tokens: it is streamed from now on")
                break
        else:
            tokens = np.frombuffer(held.getbuffer(), np.int32)
            if len(tokens) < length:
                raise _too_short(source.name, len(tokens), length)
            return _HeldBlocks(tokens, length, seed)
    return _StreamedBlocks(source, encode, length, seed)


def _too_short(name: str, num_tokens: int, length: int) -> UserError:
    if num_tokens == 0:
        return UserError("the corpus holds no text", where=name, advice="Give a corpus with at least one document")
    return UserError(
        "the corpus is shorter than one block",
        found=f"{num_tokens} tokens",
        expected=f"at least {length}",
        where=name,
        advice="Give more text, or lower lm_length",
    )


def _encoded(documents: Iterable[str], tokenizer: PreTrainedTokenizerBase) -> Iterator[np.ndarray]:
    """Ids (int32) of some documents at a time, EOS behind each."""
    pending = iter(documents)
    while texts := list(itertools.islice(pending, _ENCODED_TOGETHER)):
        # a document is longer than the model's positions and is cut to blocks: no word of warning is due
        ids = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
        yield np.concatenate([np.array([*document, tokenizer.eos_token_id], np.int32) for document in ids])


def _shuffled(documents: Iterable[str], random: np.random.Generator) -> Iterator[str]:
    """Each document once: a full buffer gives one away at random for every one that comes in."""
    buffer: list[str] = []
    for document in documents:
        if len(buffer) < _SHUFFLE_BUFFER:
            buffer.append(document)
            continue
        place = int(random.integers(len(buffer)))
        yield buffer[place]
        buffer[place] = document
    for place in random.permutation(len(buffer)):
        yield buffer[place]
