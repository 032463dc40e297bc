"""A trainer for extractive question answering, and an example of a trainer of your own with comparative loss.

Derive it from `CmpTrainer`, alone or beside a subclass of `Trainer`; whatever you override works as it does without
comparative loss. Here that is the evaluation: EM and F1 need all windows of a question together, also of questions
without labels, so neither a batch nor `compute_metrics`, which needs labels, is enough.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from torch.utils.data import DataLoader
from transformers.trainer_utils import EvalLoopOutput

from cmp_trainer import CmpTrainer
from cmp_trainer.data.answer_batches import loss_of_all

Scorer = Callable[[np.ndarray, np.ndarray], dict[str, float]]


class QuestionAnsweringTrainer(CmpTrainer):
    """Evaluates and predicts with the answers that start and end logits stand for.

    Args:
        scorers: for each metric prefix ("eval", "test"; "eval_<name>" where eval_dataset is a dict) a function from
            start and end logits, (windows, length) each and in the order of the dataset, to metrics.

    Everything else is the Trainer's.
    """

    def __init__(self, *args: Any, scorers: Mapping[str, Scorer], **kwargs: Any) -> None:
        # some models also return hidden states; kept for all windows they would fill the memory
        kwargs.setdefault("preprocess_logits_for_metrics", _start_and_end)
        super().__init__(*args, **kwargs)
        self.scorers = dict(scorers)

    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """The Trainer's evaluation loop, whose metrics gain those of the scorer of this prefix."""
        if metric_key_prefix not in self.scorers:
            raise ValueError(
                f"no scorer for metric_key_prefix={metric_key_prefix!r}; there are some for {sorted(self.scorers)}. "
                "Windows are scored against the questions they come from: pass scorers={prefix: scorer}."
            )
        output = super().evaluation_loop(dataloader, description, False, ignore_keys, metric_key_prefix)
        start_logits, end_logits = output.predictions
        scores = self.scorers[metric_key_prefix](np.asarray(start_logits), np.asarray(end_logits))
        metrics = {**(output.metrics or {}), **{f"{metric_key_prefix}_{name}": s for name, s in scores.items()}}
        return output._replace(metrics=metrics)

    def prediction_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> tuple[Any, Any, Any]:
        """The Trainer's, without labels, which no metric needs, and with a loss in every process or in none."""
        loss, logits, _ = super().prediction_step(model, inputs, *args, **kwargs)
        return loss_of_all(loss, inputs, self.accelerator), logits, None


def _start_and_end(logits: tuple, labels: Any) -> tuple:
    return logits[:2]
