"""The corpus D_p of the language-model term: text, packed into blocks of equal length.

Documents are joined, each followed by EOS, and cut every `length` tokens. Attention may cross the border of two
documents in a block. The tokens after the last whole block are not used. After its end the corpus starts again.

The text of a block is a pure function of (corpus, tokenizer, length, seed, number of the block), so that resuming
needs the step alone and the number of ranks changes nothing. There are two ways to read it:

- A local file of at most 2^28 tokens (1 GiB as int32) and 2 GiB is tokenised once, when a process starts, and stays in
  memory. Each cycle is a new permutation of its blocks; every block costs the same.
- Anything else is streamed: documents pass through a shuffle buffer of 4096, seeded anew in each cycle, and are then
  tokenised. This needs little memory, but block n is reached through all blocks before it: a run that resumes at step
  s first reads and tokenises the text of s steps, and each rank reads the text of all ranks.
"""

from __future__ import annotations

import functools
import io
import itertools
from collections.abc import Callable, Iterable, Iterator

import numpy as np
from transformers import PreTrainedTokenizerBase

from dpkd.core.errors import UserError
from dpkd.core.progress import say
from dpkd.core.prompts.control_tokens import ControlTokens
from dpkd.distill.rows.documents import DocumentSource, open_documents
from dpkd.teacher_cache.store.order import epoch_order

_MAX_TOKENS_IN_MEMORY = 2**28
_MAX_BYTES_A_TOKEN = 8  # larger files are streamed at once: text has about 4 bytes a token
_SHUFFLE_BUFFER = 4096  # documents
_ENCODED_TOGETHER = 256  # documents


class Corpus:
    """A corpus as an endless sequence of numbered blocks of `length` tokens.

    `location` is a file (`.jsonl` or `.parquet` whose rows have text in `text`; `.txt` in UTF-8, with blank lines
    between documents) or a dataset that the `datasets` library can stream: `NAME`, `NAME:SPLIT` or
    `NAME:CONFIG:SPLIT` (split `train` by default; NAME may be a directory of such files). Empty documents are skipped.

    Raises `UserError` when there is no such corpus, when a row has no text, or when all text gives less than one block.
    """

    def __init__(self, location: str, tokenizer: PreTrainedTokenizerBase, length: int, seed: int) -> None:
        if tokenizer.eos_token_id is None:
            raise UserError("the tokenizer has no EOS token, which separates the corpus's documents", where=location)
        source = open_documents(location)
        #: name and content hash of the corpus
        self.identity: dict[str, str] = source.identity
        self._blocks = _open_blocks(source, tokenizer, length, seed)

    def blocks(self, start: int, count: int) -> np.ndarray:
        """Blocks `start` to `start + count - 1` as int64 ids of shape [count, length]."""
        return self._blocks.read(start, count)


class _BlocksInMemory:
    """Blocks of `tokens`; each cycle takes them in another order."""

    def __init__(self, tokens: np.ndarray, length: int, seed: int) -> None:
        self._seed, self._num_blocks = seed, len(tokens) // length
        self._table = tokens[: self._num_blocks * length].reshape(self._num_blocks, length)
        self._cycle, self._order = -1, np.zeros(0, np.int64)

    def read(self, start: int, count: int) -> np.ndarray:
        return self._table[[self._index(number) for number in range(start, start + count)]].astype(np.int64)

    def _index(self, number: int) -> int:
        cycle, index = divmod(number, self._num_blocks)
        if cycle != self._cycle:
            self._cycle, self._order = cycle, epoch_order([self._num_blocks], self._seed, cycle)[:, 1]
        return int(self._order[index])


class _StreamedBlocks:
    """Blocks in the order of the shuffled documents; blocks before the requested one are read and dropped."""

    def __init__(
        self, source: DocumentSource, encode: Callable[[Iterable[str]], Iterator[np.ndarray]], length: int, seed: int
    ) -> None:
        self._source, self._encode, self._length, self._seed = source, encode, length, seed
        self._stream, self._position = self._from_start(), 0
        # read one block, so that an empty corpus is an error before the first step
        self._stream = itertools.chain([next(self._stream)], self._stream)

    def read(self, start: int, count: int) -> np.ndarray:
        if start < self._position:
            self._stream, self._position = self._from_start(), 0
        for _ in range(start - self._position):
            next(self._stream)
        blocks = [next(self._stream) for _ in range(count)]
        self._position = start + count
        return np.array(blocks, np.int64).reshape(count, self._length)

    def _from_start(self) -> Iterator[np.ndarray]:
        for cycle in itertools.count():
            random = np.random.Generator(np.random.PCG64(np.random.SeedSequence([self._seed, cycle])))
            left, is_empty = np.zeros(0, np.int32), True
            for ids in self._encode(_shuffled(self._source.documents(), random)):
                left = np.concatenate([left, ids])
                whole = len(left) // self._length * self._length
                for block in left[:whole].reshape(-1, self._length):
                    is_empty = False
                    yield block
                left = left[whole:]
            if is_empty:
                raise _too_short(self._source.name, len(left), self._length)


def _open_blocks(
    source: DocumentSource, tokenizer: PreTrainedTokenizerBase, length: int, seed: int
) -> _BlocksInMemory | _StreamedBlocks:
    encode = functools.partial(_encoded, tokenizer)
    if source.num_bytes is not None and source.num_bytes <= _MAX_BYTES_A_TOKEN * _MAX_TOKENS_IN_MEMORY:
        buffer = io.BytesIO()
        for ids in encode(source.documents()):
            buffer.write(ids.tobytes())
            if buffer.tell() > 4 * _MAX_TOKENS_IN_MEMORY:
                say(f"{source.name} has more than {_MAX_TOKENS_IN_MEMORY} tokens: it is streamed from now on")
                break
        else:
            tokens = np.frombuffer(buffer.getbuffer(), np.int32)
            if len(tokens) < length:
                raise _too_short(source.name, len(tokens), length)
            return _BlocksInMemory(tokens, length, seed)
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


def _encoded(tokenizer: PreTrainedTokenizerBase, documents: Iterable[str]) -> Iterator[np.ndarray]:
    """Ids (int32) of the documents, a few hundred at a time, each followed by EOS; control tokens in them are text."""
    control = ControlTokens(tokenizer)
    pending = iter(documents)
    while texts := list(itertools.islice(pending, _ENCODED_TOGETHER)):
        ids = control.encode(texts)
        yield np.concatenate([np.array([*document, tokenizer.eos_token_id], np.int32) for document in ids])


def _shuffled(documents: Iterable[str], random: np.random.Generator) -> Iterator[str]:
    """Each document once: a full buffer yields one at random for every document that arrives."""
    buffer: list[str] = []
    for document in documents:
        if len(buffer) < _SHUFFLE_BUFFER:
            buffer.append(document)
            continue
        index = int(random.integers(len(buffer)))
        yield buffer[index]
        buffer[index] = document
    for index in random.permutation(len(buffer)):
        yield buffer[index]
