"""What a training step of DPKD costs, against plain SFT and against a teacher in the training loop.

    python benchmarks/training_step.py --cache DIR --round NAME --student DIR --teacher DIR [--steps 50]
    python benchmarks/training_step.py ... --memory

Every variant has its own copy of the student and its own AdamW. They take turns at each step and read the same rows, so
a machine that slows down slows all of them. The variants (`--arms`):

    sft           cross-entropy on the chosen responses, in dpkd
    dpkd-token    the default, all pairs of cached tokens, on the same rows
    dpkd-argmax   the released code's loss from the cache
    forward-kl    KL to the cached distributions
    sft-pairs     cross-entropy on as many tokens as dpkd-sequence scores (chosen and rejected)
    dpkd-sequence Eq. 9 from the cache and its round
    dpkd-shared   the same, reading the prompt of each pair once (share_prompt)
    authors       like the released code: the teacher's forward pass in the step, every row padded to 512, full logits
    live-kd       a plain KD loop: the teacher's forward pass on the batch as it is, KL over the full vocabulary

`--memory` runs every variant in a new process and prints its peak memory. `--growth` prints how the time of a step and
of its loss grows with sequence length, batch size and vocabulary.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

from dpkd.core.models import locate_model
from dpkd.distill.batches.batch import Batch, MicroBatch
from dpkd.distill.batches.collate import collate
from dpkd.distill.batches.order import BatchOrder
from dpkd.distill.batches.shared_prompts import share_prompts
from dpkd.distill.objectives.objective import MEASURE_EVERY, Objective
from dpkd.distill.objectives.student_forward import StudentScorer
from dpkd.distill.options.train import TrainConfig
from dpkd.distill.rows.row import TrainingRow
from dpkd.distill.rows.sources import CacheRows
from dpkd.distill.run.logs import peak_memory_bytes
from dpkd.distill.run.student_state import make_optimizer
from dpkd.teacher_cache.store.reader import TeacherCache

PADDED = 512  # the released code pads every row to this length
Step = Callable[[list[TrainingRow]], int]


def optimizer_of(model: torch.nn.Module) -> torch.optim.Optimizer:
    return make_optimizer(model, TrainConfig(cache="unused", student="unused", out=Path("unused"), learning_rate=1e-5))


def update(model: torch.nn.Module, optimizer: torch.optim.Optimizer, loss: torch.Tensor) -> None:
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()


def ours(arguments: argparse.Namespace, options: dict[str, Any], *, both: bool = False) -> Step:
    """A step of dpkd. With `both`, the rejected responses are training rows too."""
    source = locate_model(arguments.student, "student")
    cache = TeacherCache.open(arguments.cache)
    config = TrainConfig(cache=arguments.cache, student=arguments.student, out=Path("unused"), **options)
    model = source.load("float32").train()
    scorer = StudentScorer(model, num_tokens=len(source.tokenizer), logits_chunk=config.logits_chunk)
    objective, optimizer = Objective(config, cache.vocab_size), optimizer_of(model)

    taken = iter(range(10**9))

    def step(rows: list[TrainingRow]) -> int:
        measure = next(taken) % MEASURE_EVERY == 0  # as a run does
        if both:
            rows = [TrainingRow(row) for pair in rows for row in (pair.chosen, pair.rejected) if row is not None]
        elif not objective.needs_pairs:
            rows = [TrainingRow(row.chosen) for row in rows]
        shared = share_prompts(rows) if config.share_prompt else None
        part = MicroBatch(collate(rows, with_distributions=objective.needs_distributions), shared=shared)
        sums = objective(scorer, part, measure=measure)
        update(model, optimizer, objective.total(sums, objective.counts(part)))
        return part.num_positions

    return step


def with_teacher(arguments: argparse.Namespace, *, padded: bool) -> Step:
    """Full logits of teacher and student in the step: the released code's loss (padded), or KL."""
    student = locate_model(arguments.student, "student").load("float32").train()
    teacher = locate_model(arguments.teacher, "teacher").load("float32").eval()
    optimizer = optimizer_of(student)

    def step(rows: list[TrainingRow]) -> int:
        batch = collate([TrainingRow(row.chosen) for row in rows], with_distributions=False)
        ids, mask = batch.input_ids_BS, batch.attention_mask_BS
        if padded:
            ids, mask = (functional.pad(value, (0, PADDED - value.shape[1])) for value in (ids, mask))
        with torch.no_grad():
            teacher_BSV = teacher(input_ids=ids, attention_mask=mask, use_cache=False).logits
        student_BSV = student(input_ids=ids, attention_mask=mask, use_cache=False).logits
        update(
            student,
            optimizer,
            released_loss(batch, student_BSV, teacher_BSV) if padded else kl(batch, student_BSV, teacher_BSV),
        )
        return batch.num_positions

    return step


def released_loss(batch: Batch, student_BSV: torch.Tensor, teacher_BSV: torch.Tensor) -> torch.Tensor:
    """As the released code: log-softmax of all positions, then the mask."""
    log_q_BSV, log_p_BSV = torch.log_softmax(student_BSV, -1), torch.log_softmax(teacher_BSV, -1)
    a_BS, b_BS = log_p_BSV.argmax(-1, keepdim=True), log_q_BSV.detach().argmax(-1, keepdim=True)
    delta_BS = (log_q_BSV.gather(-1, a_BS) - log_q_BSV.gather(-1, b_BS)) - (
        log_p_BSV.gather(-1, a_BS) - log_p_BSV.gather(-1, b_BS)
    )
    return -functional.logsigmoid(0.1 * delta_BS[batch.row_T, batch.predict_T, 0]).mean()


def kl(batch: Batch, student_BSV: torch.Tensor, teacher_BSV: torch.Tensor) -> torch.Tensor:
    at = (batch.row_T, batch.predict_T)
    log_q_TV, log_p_TV = torch.log_softmax(student_BSV[at], -1), torch.log_softmax(teacher_BSV[at], -1)
    return functional.kl_div(log_q_TV, log_p_TV, log_target=True, reduction="batchmean")


ARMS: dict[str, Callable[[argparse.Namespace], Step]] = {
    "sft": lambda a: ours(a, {"objective": "sft"}),
    "dpkd-token": lambda a: ours(a, {"objective": "dpkd", "level": "token"}),
    "dpkd-argmax": lambda a: ours(a, {"objective": "dpkd", "level": "token", "token_pairs": "argmax"}),
    "forward-kl": lambda a: ours(a, {"objective": "forward-kl"}),
    "sft-pairs": lambda a: ours(a, {"objective": "sft"}, both=True),
    "dpkd-sequence": lambda a: ours(a, {"objective": "dpkd", "level": "sequence", "round": a.round}),
    "dpkd-shared": lambda a: ours(
        a, {"objective": "dpkd", "level": "sequence", "round": a.round, "share_prompt": True}
    ),
    "authors": lambda a: with_teacher(a, padded=True),
    "live-kd": lambda a: with_teacher(a, padded=False),
}
#: the baseline of each variant
AGAINST = {
    "dpkd-token": "sft",
    "dpkd-argmax": "sft",
    "forward-kl": "sft",
    "dpkd-sequence": "sft-pairs",
    "dpkd-shared": "dpkd-sequence",
    "authors": "dpkd-token",
    "live-kd": "dpkd-token",
}


def batches(arguments: argparse.Namespace) -> Callable[[int], list[TrainingRow]]:
    cache = TeacherCache.open(arguments.cache)
    rows = CacheRows(cache, cache.shards("teacher"), cache.round(arguments.round))
    order = BatchOrder(rows.group_sizes, 0, arguments.batch_size)
    return lambda step: [rows.row(group, index) for group, index in order.rows_of(step)]


def speed(arguments: argparse.Namespace) -> None:
    rows_of = batches(arguments)
    arms = {name: ARMS[name](arguments) for name in arguments.arms}
    taken: dict[str, list[float]] = {name: [] for name in arms}
    tokens: dict[str, int] = dict.fromkeys(arms, 0)
    for step in range(arguments.steps + 2):
        rows = rows_of(step)
        # the order rotates, so no variant always follows the same one
        names = [*arms][step % len(arms) :] + [*arms][: step % len(arms)]
        for name in names:
            started_s = time.perf_counter()
            tokens[name] += arms[name](rows)
            if step >= 2:
                taken[name].append(time.perf_counter() - started_s)
    print("| variant | s per step (median) | rows/s | against | ratio (median of steps) |\n|---|---:|---:|---|---:|")
    for name, seconds in taken.items():
        median_s = statistics.median(seconds)
        other = AGAINST.get(name)
        ratio = ""
        if other in taken:
            ratio = f"{statistics.median(s / o for s, o in zip(seconds, taken[other], strict=True)):.3f}"
        print(f"| {name} | {median_s:.3f} | {arguments.batch_size / median_s:.2f} | {other or ''} | {ratio} |")


def memory(arguments: argparse.Namespace) -> None:
    """Print the peak resident memory (MiB) of each variant in a new process."""
    print("| variant | peak memory (MiB) |\n|---|---:|")
    for name in arguments.arms:
        command = [sys.executable, __file__, "--cache", arguments.cache, "--round", arguments.round, "--student", arguments.student, "--teacher", arguments.teacher, "--batch-size", str(arguments.batch_size), "--alone", name]  # fmt: skip  # noqa: E501
        found = subprocess.run(command, check=True, capture_output=True, text=True)
        print(f"| {name} | {json.loads(found.stdout.splitlines()[-1])['peak_MiB']} |", flush=True)


def alone(arguments: argparse.Namespace) -> None:
    rows_of, step = batches(arguments), ARMS[arguments.alone](arguments)
    for number in range(4):
        step(rows_of(number))
    print(json.dumps({"peak_MiB": peak_memory_bytes(torch.device("cpu")) // 2**20}))


def growth() -> None:
    """Print the seconds of a step of a one-layer student, and of its head and loss, by length, rows and vocabulary."""
    from transformers import LlamaConfig, LlamaForCausalLM

    print("| rows | response tokens | vocabulary | step (s) | head and loss (s) |\n|---:|---:|---:|---:|---:|")
    base = {"rows": 8, "tokens": 64, "vocabulary": 49152}
    changes = [{}, *({"tokens": n} for n in (128, 256)), *({"rows": n} for n in (16, 32)), *({"vocabulary": n} for n in (98304, 196608, 262144))]  # fmt: skip  # noqa: E501
    for change in changes:
        shape = base | change
        torch.manual_seed(0)
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=shape["vocabulary"],
                hidden_size=64,
                intermediate_size=128,
                num_hidden_layers=1,
                num_attention_heads=2,
                num_key_value_heads=1,
                max_position_embeddings=1024,
                tie_word_embeddings=True,
            )
        )
        scorer = StudentScorer(model, num_tokens=shape["vocabulary"], logits_chunk=1024)
        config = TrainConfig(cache="unused", student="unused", out=Path("unused"))
        objective = Objective(config, shape["vocabulary"])
        part = MicroBatch(random_batch(**shape))
        whole_s, head_s = [], []
        for repeat in range(6):
            started_s = time.perf_counter()
            sums = objective(scorer, part)
            objective.total(sums, objective.counts(part)).backward()
            spent_s = time.perf_counter() - started_s
            hidden_BSD = torch.randn(*part.rows.input_ids_BS.shape, 64, requires_grad=True)
            began_s = time.perf_counter()
            sums = objective(_Head(scorer, hidden_BSD), part)
            objective.total(sums, objective.counts(part)).backward()
            if repeat:
                whole_s.append(spent_s)
                head_s.append(time.perf_counter() - began_s)
        cells = [*shape.values(), *(f"{statistics.median(times):.3f}" for times in (whole_s, head_s))]
        print("| " + " | ".join(map(str, cells)) + " |", flush=True)


class _Head:
    """A scorer for hidden states that are already computed."""

    def __init__(self, scorer: StudentScorer, hidden_BSD: torch.Tensor) -> None:
        self._scorer, self._hidden_BSD = scorer, hidden_BSD

    def __call__(self, *, row_T: Any, predict_T: Any, fields: Any, statistics: Any, **_: Any) -> Any:
        return self._scorer.evaluate(self._hidden_BSD[row_T, predict_T], fields, statistics)


def random_batch(rows: int, tokens: int, vocabulary: int) -> Batch:
    import numpy as np

    from dpkd.teacher_cache.engines.top_k import from_top_k
    from dpkd.teacher_cache.store.rows import CachedRow

    random = np.random.default_rng(0)
    made = []
    for row in range(rows):
        logits = -np.sort(-random.normal(size=(tokens, 64)), axis=1)
        logprobs = (logits - np.log(np.exp(logits).sum(axis=1, keepdims=True)) - 0.1).astype(np.float32)
        ids = random.permuted(np.tile(np.arange(vocabulary // 8), (tokens, 1)), axis=1)[:, :64].astype(np.int32)
        top = from_top_k(ids, logprobs, ids[:, 0], logprobs[:, 0], vocabulary)
        prompt = random.integers(0, vocabulary, 32).astype(np.int32)
        made.append(TrainingRow(CachedRow(str(row), 0, "teacher", "stop", prompt, ids[:, 0], logprobs[:, 0], top)))
    return collate(made, with_distributions=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", help="teacher cache")
    parser.add_argument("--round", default="r0", help="round of the cache [r0]")
    parser.add_argument("--student", help="checkpoint directory")
    parser.add_argument("--teacher", help="checkpoint directory")
    parser.add_argument("--steps", type=int, default=50, help="measured steps after two of warm-up [50]")
    parser.add_argument("--batch-size", type=int, default=8, help="rows per step [8]")
    parser.add_argument("--arms", nargs="+", default=[*ARMS], choices=[*ARMS], help="variants to run [all]")
    parser.add_argument("--memory", action="store_true", help="measure peak memory instead of time")
    parser.add_argument("--growth", action="store_true", help="measure growth; needs no other option")
    parser.add_argument("--alone", choices=[*ARMS], help="run four steps of one variant and print its peak memory")
    given = parser.parse_args()
    if given.growth:
        growth()
    elif given.alone:
        alone(given)
    else:
        (memory if given.memory else speed)(given)


if __name__ == "__main__":
    main()
