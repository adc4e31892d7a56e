"""What `dpkd eval` measures of a model itself: log-probs of gold responses, divergences from a cache's teacher."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING

from dpkd.core.errors import UserError
from dpkd.core.progress import say
from dpkd.evaluate.answers.perplexity import Pair
from dpkd.evaluate.inputs.models import Candidate
from dpkd.evaluate.options.eval import EvalConfig

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from dpkd.distill.objectives.student_forward import StudentScorer

_LOGITS_CHUNK = 1024


def open_model(candidate: Candidate, config: EvalConfig) -> MeasuredModel:
    """`candidate` to be measured; nothing is loaded yet."""
    return MeasuredModel(candidate, config)


class MeasuredModel:
    """See `dpkd.evaluate.answers.perplexity.OpenedModel`.

    Raises `UserError`, when the weights are first needed, for a model whose logits are not its head's product with its
    hidden states in a way that is known here, or are not numbers.
    """

    def __init__(self, candidate: Candidate, config: EvalConfig) -> None:
        self._candidate, self._config = candidate, config

    def nll(self, pairs: Sequence[Pair]) -> list[float]:
        """-log q of each response after its prompt, summed over the response's tokens (nats)."""
        import torch

        from dpkd.distill.batches.batch import TrainingRow, collate
        from dpkd.distill.objectives.preference import sum_by_row
        from dpkd.distill.objectives.student_forward import read_target
        from dpkd.teacher_cache.store.schema import unscored_row

        batch = collate([TrainingRow(unscored_row(*pair)) for pair in pairs], with_distributions=False).to(self._device)
        with torch.no_grad():
            values = self._scorer(
                batch.input_ids_BS,
                batch.attention_mask_BS,
                batch.row_T,
                batch.predict_T,
                {"target": batch.target_T},
                read_target,
            )
        nll_B = -sum_by_row(values["target"].cpu().double(), batch.row_T.cpu(), batch.num_rows)
        return [float(value) for value in nll_B]

    def to_teacher(self, location: str, num_rows: int) -> dict[str, list[float]] | None:
        """Values of each row of the cache at `location`; None, and the reason said, where they are not defined."""
        from dpkd.distill.student.measures import check_same_prompts, row_measures
        from dpkd.teacher_cache.store.reader import TeacherCache

        cache, name = TeacherCache.open(location), self._candidate.name
        try:
            if cache.top_k == 0:
                raise UserError("the cache keeps no distributions", where=cache.folder)
            check_same_prompts(self._candidate.source, cache)
        except UserError as reason:
            say(f"model {name}: no divergence from the cache's teacher: {reason}")
            return None
        found = row_measures(self._candidate.source, self._model, cache, num_rows, self._device)
        return {name: values_N.tolist() for name, values_N in found.items()}

    @cached_property
    def _device(self) -> torch.device:
        from dpkd.core.devices import choose_device

        return choose_device(self._config.device)

    @cached_property
    def _model(self) -> PreTrainedModel:
        from dpkd.distill.objectives.student_forward import check_head

        model = self._candidate.source.load(self._config.dtype).to(self._device).eval()  # type: ignore[arg-type]
        try:
            check_head(model, self._candidate.name)
        except UserError as error:
            raise UserError(f"{error}. To go without perplexity give --no-perplexity and --cache-rows 0") from None
        return model

    @cached_property
    def _scorer(self) -> StudentScorer:
        from dpkd.distill.objectives.student_forward import StudentScorer

        num_tokens = len(self._candidate.source.tokenizer)
        return StudentScorer(self._model, num_tokens=num_tokens, logits_chunk=_LOGITS_CHUNK)
