"""Whether chosen and rejected should share the prompt's hidden states: tried here, not in the product.

    python benchmarks/shared_prompt.py --cache DIR --round NAME --student DIR [--steps 12] [--batch-size 4]

Arms: `apart` runs prompt + chosen and prompt + rejected as two sequences, as the product does; `shared` packs prompt,
chosen and rejected into one, with a mask that hides the chosen response from the rejected one and positions that start
again after the prompt. Both give the same log-probs (checked at the first step); forward and backward pass, no update.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence

import torch
import training_step
from torch import Tensor, nn

from dpkd.distill.batches import TrainingRow, collate
from dpkd.teacher_cache.models import locate_model

LogProbs = Callable[[nn.Module, Sequence[TrainingRow]], Tensor]


def head_logprobs(model: nn.Module, states_TD: Tensor, target_T: Tensor) -> Tensor:
    logits_TV = model.get_output_embeddings()(states_TD).float()
    return torch.log_softmax(logits_TV, -1).gather(1, target_T[:, None])[:, 0]


def apart(model: nn.Module, rows: Sequence[TrainingRow]) -> Tensor:
    batch = collate(rows, with_distributions=False)
    hidden_BSD = model.get_decoder()(
        input_ids=batch.input_ids_BS, attention_mask=batch.attention_mask_BS, use_cache=False
    )[0]
    return head_logprobs(model, hidden_BSD[batch.row_T, batch.predict_T], batch.target_T)


def shared(model: nn.Module, rows: Sequence[TrainingRow]) -> Tensor:
    triples = [
        (row.chosen.prompt_ids, row.chosen.response_ids, row.rejected.response_ids) for row in rows if row.rejected
    ]
    longest = max(sum(map(len, parts)) for parts in triples)
    ids_BS = torch.zeros(len(triples), longest, dtype=torch.long)
    positions_BS = torch.zeros_like(ids_BS)
    seen_BSS = torch.eye(longest, dtype=torch.bool).repeat(len(triples), 1, 1)  # padding sees itself alone
    where: tuple[list[tuple[int, int, int]], ...] = ([], [])
    for place, parts in enumerate(triples):
        prompt, chosen, _ = (len(part) for part in parts)
        length = sum(map(len, parts))
        ids_BS[place, :length] = torch.cat([torch.tensor(part) for part in parts])
        steps = torch.arange(length)
        positions_BS[place, :length] = torch.where(steps < prompt + chosen, steps, steps - chosen)
        seen = steps[:, None] >= steps[None]
        seen[prompt + chosen :, prompt : prompt + chosen] = False
        seen_BSS[place, :length, :length] = seen
        # the first token of either response is predicted from the prompt's last
        where[0].extend((place, prompt - 1 + step, prompt + step) for step in range(chosen))
        where[1].extend(
            (place, prompt - 1 if step == prompt + chosen else step - 1, step)
            for step in range(prompt + chosen, length)
        )
    row_T, predict_T, target_T = torch.tensor([*where[0], *where[1]]).unbind(1)
    hidden_BSD = model.get_decoder()(
        input_ids=ids_BS, attention_mask=seen_BSS[:, None], position_ids=positions_BS, use_cache=False
    )[0]
    return head_logprobs(model, hidden_BSD[row_T, predict_T], ids_BS[row_T, target_T])


ARMS: dict[str, LogProbs] = {"apart": apart, "shared": shared}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("cache", "round", "student"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--batch-size", type=int, default=4)
    given = parser.parse_args()
    rows_of = training_step.batches(given)
    model = locate_model(given.student, "student").load("float32").train()
    seconds: dict[str, list[float]] = {name: [] for name in ARMS}
    tokens: list[tuple[int, int]] = []
    for step in range(given.steps + 1):
        rows = rows_of(step)
        tokens.append(
            (sum(len(row.chosen.prompt_ids) for row in rows), collate(rows, with_distributions=False).num_positions)
        )
        found = {}
        for name in list(ARMS)[:: 1 if step % 2 else -1]:
            started_s = time.perf_counter()
            found[name] = ARMS[name](model, rows)
            found[name].mean().backward()
            if step:
                seconds[name].append(time.perf_counter() - started_s)
            model.zero_grad()
        torch.testing.assert_close(found["apart"], found["shared"], atol=2e-4, rtol=1e-4)
    prompts, responses = (sum(values) for values in zip(*tokens, strict=True))
    ratio = statistics.median(s / a for s, a in zip(seconds["shared"], seconds["apart"], strict=True))
    print(f"prompt tokens {prompts}, response tokens of both {responses}")
    print(
        ", ".join(f"{name} {statistics.median(times):.3f} s" for name, times in seconds.items()), f"ratio {ratio:.3f}"
    )


if __name__ == "__main__":
    main()
