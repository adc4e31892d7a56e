"""The corpus as blocks: their content, that each comes once per cycle, and that its number is enough to read one."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.toys import make_toy
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from dpkd.core.errors import UserError
from dpkd.distill.batches.collate import collate_corpus
from dpkd.distill.options.train import TrainConfig
from dpkd.distill.rows import corpus as corpus_module
from dpkd.distill.rows.corpus import Corpus
from dpkd.distill.training import train

TEXTS = [f"Document {number}: " + "words and more words, " * (1 + number % 5) + "end." for number in range(40)]
LENGTH = 16
EOS = 0


def not_utf8() -> bytes:
    """A Parquet file whose text is not UTF-8."""
    offsets = pa.py_buffer(np.array([0, 2], np.int32).tobytes())
    text = pa.Array.from_buffers(pa.string(), 1, [None, offsets, pa.py_buffer(b"a\xff")])
    file = pa.BufferOutputStream()
    pq.write_table(pa.table({"text": text}), file)
    return file.getvalue().to_pybytes()


@pytest.fixture(scope="module")
def tokenizer(toy_tokenizer: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(toy_tokenizer)


@pytest.fixture
def corpus_file(write_rows: Callable[..., Path]) -> Path:
    return write_rows([{"text": text, "other": 1} for text in TEXTS], "corpus.jsonl")


@pytest.fixture(params=["held", "too-many-bytes", "too-many-tokens"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The ways to a block: a corpus that is over a limit of memory is streamed."""
    if request.param != "held":
        monkeypatch.setattr(corpus_module, "_MAX_TOKENS_IN_MEMORY", 10 if request.param == "too-many-bytes" else 1000)
        monkeypatch.setattr(corpus_module, "_SHUFFLE_BUFFER", 7)
        monkeypatch.setattr(corpus_module, "_ENCODED_TOGETHER", 3)
    return str(request.param)


def stream_of(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[int]:
    ids: list[int] = []
    for text in texts:
        ids += [*tokenizer(text)["input_ids"], EOS]
    return ids


def test_a_corpus_in_memory_gives_every_block_once_a_cycle(
    tokenizer: PreTrainedTokenizerBase, corpus_file: Path
) -> None:
    ids = stream_of(tokenizer, TEXTS)
    num_blocks = len(ids) // LENGTH
    assert len(ids) % LENGTH  # what is left over is less than a block and is not used
    expected = sorted(ids[start * LENGTH : (start + 1) * LENGTH] for start in range(num_blocks))
    corpus = Corpus(str(corpus_file), tokenizer, LENGTH, seed=3)
    cycles = [corpus.blocks(cycle * num_blocks, num_blocks) for cycle in range(3)]
    for blocks in cycles:
        assert blocks.dtype == np.int64
        assert sorted(blocks.tolist()) == expected
    assert not np.array_equal(cycles[0], cycles[1])
    assert not np.array_equal(cycles[0], Corpus(str(corpus_file), tokenizer, LENGTH, seed=4).blocks(0, num_blocks))


def test_a_streamed_corpus_packs_every_document_once_a_cycle(
    tokenizer: PreTrainedTokenizerBase, corpus_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(corpus_module, "_MAX_TOKENS_IN_MEMORY", 10)
    monkeypatch.setattr(corpus_module, "_SHUFFLE_BUFFER", 7)
    corpus = Corpus(str(corpus_file), tokenizer, LENGTH, seed=3)
    ids = stream_of(tokenizer, TEXTS)
    num_blocks = len(ids) // LENGTH
    orders = []
    for cycle in range(3):
        found = corpus.blocks(cycle * num_blocks, num_blocks).reshape(-1).tolist()
        # the last document of the cycle may be cut; every other one is complete, between two EOS
        documents = [tokenizer.decode(part) for part in split(found)]
        assert Counter(documents) <= Counter(TEXTS)
        assert len(documents) >= len(TEXTS) - 1
        orders.append(documents)
    assert orders[0] != orders[1]
    assert orders[0] != TEXTS[: len(orders[0])]


def split(ids: list[int]) -> list[list[int]]:
    """The documents that end within `ids`."""
    parts: list[list[int]] = [[]]
    for token in ids:
        if token == EOS:
            parts.append([])
        else:
            parts[-1].append(token)
    return parts[:-1]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=25)
@given(asked=st.lists(st.tuples(st.integers(0, 150), st.integers(0, 9)), min_size=1, max_size=6))
def test_a_block_is_the_same_whatever_was_read_before(
    tokenizer: PreTrainedTokenizerBase, corpus_file: Path, way: str, asked: list[tuple[int, int]]
) -> None:
    walked = Corpus(str(corpus_file), tokenizer, LENGTH, seed=1)
    straight = Corpus(str(corpus_file), tokenizer, LENGTH, seed=1).blocks(0, 160)
    for start, count in asked:
        blocks = walked.blocks(start, count)
        assert blocks.shape == (count, LENGTH)
        assert np.array_equal(blocks, straight[start : start + count])


def test_a_file_over_a_limit_is_streamed(
    tokenizer: PreTrainedTokenizerBase, corpus_file: Path, way: str, capsys: pytest.CaptureFixture[str]
) -> None:
    num_tokens, num_bytes = len(stream_of(tokenizer, TEXTS)), corpus_file.stat().st_size
    assert 1000 < num_tokens < num_bytes < 8 * 1000
    corpus = Corpus(str(corpus_file), tokenizer, LENGTH, seed=0)
    assert type(corpus._blocks).__name__ == ("_BlocksInMemory" if way == "held" else "_StreamedBlocks")
    assert ("more than 1000 tokens: it is streamed" in capsys.readouterr().err) == (way == "too-many-tokens")


def test_ranks_share_the_blocks_of_one_reader(tokenizer: PreTrainedTokenizerBase, corpus_file: Path, way: str) -> None:
    whole = Corpus(str(corpus_file), tokenizer, LENGTH, seed=1).blocks(0, 48)
    readers = [Corpus(str(corpus_file), tokenizer, LENGTH, seed=1) for _ in range(3)]
    parts = [readers[rank].blocks((step * 3 + rank) * 4, 4) for step in range(4) for rank in range(3)]
    assert np.array_equal(np.concatenate(parts), whole)


def test_the_same_text_in_every_form_is_the_same_corpus(
    tokenizer: PreTrainedTokenizerBase, corpus_file: Path, tmp_path: Path
) -> None:
    text = tmp_path / "corpus.txt"
    text.write_text("\n\n \n".join(TEXTS) + "\n\n", encoding="utf-8")
    parquet = tmp_path / "corpus.parquet"
    pq.write_table(pa.table({"number": range(len(TEXTS)), "text": TEXTS}), parquet)
    blocks = [Corpus(str(path), tokenizer, LENGTH, seed=3).blocks(0, 30) for path in (corpus_file, text, parquet)]
    assert np.array_equal(blocks[0], blocks[1])
    assert np.array_equal(blocks[0], blocks[2])


def test_lines_of_one_document_stay_together(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    path = tmp_path / "corpus.txt"
    path.write_text("one\ntwo\n\nthree\n", encoding="utf-8")
    ids = stream_of(tokenizer, ["one\ntwo", "three"])
    assert Corpus(str(path), tokenizer, len(ids), seed=0).blocks(0, 1)[0].tolist() == ids


def test_a_directory_is_streamed_as_a_dataset_and_known_by_its_content(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    rows = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS)
    identities = []
    for place in ("a", "b", "c"):
        directory = tmp_path / place / "corpus"
        directory.mkdir(parents=True)
        (directory / "train.jsonl").write_text(rows if place != "c" else rows + '{"text": "one more"}\n')
        corpus = Corpus(str(directory), tokenizer, LENGTH, seed=3)
        identities.append(corpus.identity)
    num_blocks = len(stream_of(tokenizer, [*TEXTS, "one more"])) // LENGTH
    found = [tokenizer.decode(part) for part in split(corpus.blocks(0, num_blocks).reshape(-1).tolist())]
    assert Counter(found) <= Counter([*TEXTS, "one more"])
    assert len(found) >= len(TEXTS)
    assert np.array_equal(corpus.blocks(3, 5), corpus.blocks(0, 8)[3:])
    assert identities[0] == identities[1]
    assert identities[0]["name"] == identities[2]["name"] == "corpus"
    assert identities[0]["sha256"] != identities[2]["sha256"]
    with pytest.raises(UserError, match=r"neither a file nor a dataset .*NAME:CONFIG:SPLIT; the library said: "):
        Corpus(f"{directory}:validation", tokenizer, LENGTH, seed=0)


def test_a_file_is_known_by_its_content(
    tokenizer: PreTrainedTokenizerBase, corpus_file: Path, write_rows: Callable[..., Path]
) -> None:
    before = Corpus(str(corpus_file), tokenizer, LENGTH, seed=0).identity
    assert before["name"] == "corpus.jsonl"
    corpus_file.write_text(corpus_file.read_text() + '{"text": "one more"}\n')
    assert Corpus(str(corpus_file), tokenizer, LENGTH, seed=0).identity["sha256"] != before["sha256"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("absent.jsonl", None, r"the corpus is missing \(in .*absent\.jsonl\)\. Give a file"),
        ("corpus.csv", "text\nword\n", r"the corpus has an unknown suffix: found '\.csv', expected \.jsonl or"),
        ("corpus.jsonl", "", r"the corpus holds no text \(in .*corpus\.jsonl\)"),
        ("corpus.jsonl", '{"text": " "}\n', "the corpus holds no text"),
        ("corpus.txt", "\n \n", "the corpus holds no text"),
        ("corpus.txt", "word\n", r"shorter than one block: found \d tokens, expected at least 16 .*lm_length"),
        ("corpus.jsonl", '{"text": "a"}\n{"words": "b"}\n', "row 2 of the corpus has no text: found keys words"),
        ("corpus.jsonl", '{"text": null}\n', "row 1 of the corpus has no text: found `text` of type NoneType"),
        ("corpus.jsonl", "[1]\n", "row 1 of the corpus has no text: found list, expected text in `text`"),
        ("corpus.jsonl", '{"text": "\\ud800"}\n', "the text of row 1 contains half a surrogate pair"),
        ("corpus.jsonl", '{"text": "a"}\n{"te\n', r"line 2 is not JSON: .* at column \d \(in .*corpus\.jsonl\)"),
        ("corpus.txt", b"\xff\xfe", "line 1 is not UTF-8"),
        ("corpus.parquet", "not parquet", "the file is not Parquet"),
        ("corpus.parquet", not_utf8(), "a text of the file is not UTF-8"),
        ("no/such/dataset", None, "neither a file nor a dataset that the `datasets` library can stream"),
    ],
)
def test_what_cannot_be_a_corpus(
    tokenizer: PreTrainedTokenizerBase,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    content: str | bytes | None,
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    if content is not None:
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=message):
        Corpus(name, tokenizer, LENGTH, seed=0)


def test_a_parquet_without_text_names_its_columns(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    pq.write_table(pa.table({"words": ["a"], "number": [1]}), tmp_path / "corpus.parquet")
    with pytest.raises(UserError, match=r"row 1 of the corpus has no text: found keys words, number"):
        Corpus(str(tmp_path / "corpus.parquet"), tokenizer, LENGTH, seed=0)


def test_a_streamed_corpus_that_is_too_short_is_refused_at_the_start(
    tokenizer: PreTrainedTokenizerBase, corpus_file: Path, way: str
) -> None:
    with pytest.raises(UserError, match=r"shorter than one block: found \d+ tokens, expected at least 100000"):
        Corpus(str(corpus_file), tokenizer, 100_000, seed=0)


def test_a_tokenizer_without_eos_is_refused(toy_tokenizer: Path, corpus_file: Path) -> None:
    bare = AutoTokenizer.from_pretrained(toy_tokenizer)
    bare.eos_token = None
    with pytest.raises(UserError, match="the tokenizer has no EOS token"):
        Corpus(str(corpus_file), bare, LENGTH, seed=0)


def test_every_token_but_the_first_is_a_target() -> None:
    batch = collate_corpus(np.array([[5, 6, 7], [8, 9, 0]]), start=4)
    assert batch.input_ids_BS.tolist() == [[5, 6, 7], [8, 9, 0]]
    assert batch.attention_mask_BS.tolist() == [[1, 1, 1], [1, 1, 1]]
    assert batch.row_T.tolist() == [0, 0, 1, 1]
    assert batch.predict_T.tolist() == [0, 1, 0, 1]
    assert batch.target_T.tolist() == [6, 7, 9, 0]
    assert batch.num_tokens_B.tolist() == [2, 2]
    assert batch.num_chosen == batch.num_rows == 2
    assert batch.example_ids == ["block-4", "block-5"]
    assert batch.teacher_logprob_T is None
    assert batch.entry_ids_TK is None
    assert {batch.input_ids_BS.dtype, batch.target_T.dtype, batch.row_T.dtype} == {torch.int64}


def test_the_targets_give_the_model_s_own_language_model_loss(
    tokenizer: PreTrainedTokenizerBase, corpus_file: Path, toy_student: Path
) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(toy_student)
    batch = collate_corpus(Corpus(str(corpus_file), tokenizer, LENGTH, seed=0).blocks(2, 3), start=2)
    with torch.no_grad():
        output = model(input_ids=batch.input_ids_BS, labels=batch.input_ids_BS)
        logprobs = torch.log_softmax(output.logits[batch.row_T, batch.predict_T].float(), dim=1)
    ours = -logprobs.gather(1, batch.target_T[:, None]).mean()
    assert torch.allclose(ours, output.loss, atol=1e-5)


def test_a_corpus_with_ids_that_the_student_lacks_is_refused(
    tmp_path: Path, toy_tokenizer: Path, toy_data: Path
) -> None:
    """A tokenizer has more tokens than its model has embeddings where some were added without widening the model."""
    wider = AutoTokenizer.from_pretrained(toy_tokenizer)
    wider.add_tokens(["zebra"])
    wider.save_pretrained(tmp_path / "tokenizer")
    student = make_toy(tmp_path / "student", tmp_path / "tokenizer", layers=1, seed=5)
    (tmp_path / "text.txt").write_text("a zebra and words " * 40)
    options = {"data": str(toy_data), "template": "chat", "objective": "sft", "steps": 1, "device": "cpu"}
    options |= {"student": str(student), "lm_data": str(tmp_path / "text.txt"), "lm_length": LENGTH}
    with pytest.raises(UserError, match="the corpus contains token ids that the student has no embedding for"):
        train(TrainConfig(out=tmp_path / "run", **options))
