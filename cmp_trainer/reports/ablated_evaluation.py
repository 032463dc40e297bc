"""Evaluation under ablation: the Trainer's own evaluation, with the losses of examples noted on the way.

`VariantsInEvaluation` follows an ordinary evaluation and, under --cmp_eval_ablations, notes what every variant's loss
is on its batches. `AblatedEvaluation` is for curves: the evaluation itself runs at one level of ablation, so that
loss and metrics are what the Trainer makes of an ablated model.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from transformers import Trainer
from transformers.trainer_utils import default_compute_objective

from cmp_trainer.ablations.plan import variants_of
from cmp_trainer.chain import ChainLoss, shadowed, without_segments
from cmp_trainer.checks import train_mode_except_batch_norm
from cmp_trainer.execution.random_state import preserve_rng_state
from cmp_trainer.reports.curves import ablation_curve
from cmp_trainer.reports.loss_log import LossLog


class VariantsInEvaluation:
    """An ordinary evaluation, with the losses of all variants beside it where the arguments ask for them."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        self.is_on = bool(trainer.num_ablations and getattr(trainer.args, "cmp_eval_ablations", False))
        self.log: LossLog | None = None

    def prediction_step(self, chain: Callable[..., Any], model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """The Trainer's prediction step on the full input; then the variants' losses are noted."""
        trainer = self.trainer
        loss, logits, labels = chain(model, without_segments(inputs), *args, **kwargs)
        if (
            loss is not None
            and trainer.per_example_loss_func
            and getattr(trainer.args, "predict_with_generate", False)
        ):
            with torch.no_grad(), trainer.compute_loss_context_manager():  # else generation reports the model's own
                prepared = without_segments(trainer._prepare_inputs(inputs))
                loss = type(trainer).compute_loss(trainer, model, prepared).detach()
        if self.is_on and loss is not None:
            self._note(model, trainer._prepare_inputs(inputs))
        return loss, logits, labels

    def metrics(self, prefix: str) -> dict[str, float]:
        """The variants' mean losses and the violation rate, under names that begin with the prefix."""
        return {} if self.log is None else self.log.pop(prefix=prefix)

    def _note(self, model: Any, inputs: Any) -> None:
        """Compare the variants of a batch, with masks that depend on the seed and the batch alone."""
        trainer, step = self.trainer, self.trainer.comparative_step(model)
        devices = step._devices(inputs)
        with preserve_rng_state(devices), train_mode_except_batch_norm(model), trainer.compute_loss_context_manager():
            torch.manual_seed(trainer.args.seed)
            losses = step.losses(inputs, _loss_of(trainer))
        if losses is None:
            return
        rows = losses.weights.shape[0]
        values, weights = trainer.accelerator.gather_for_metrics((losses.values, losses.weights * rows))
        self.log = self.log or LossLog([variant.name for variant in step.variants])
        self.log.add(values, weights)


class AblatedEvaluation:
    """An evaluation of the model at a level of ablation.

    Args:
        trainer: a CmpTrainer.
        levels: the level of every kind.
        most: the most ablated variant of the curve, so that crops of all levels are drawn alike.
        seed: of the masks.
    """

    def __init__(self, trainer: Any, levels: tuple[int, ...], most: tuple[int, ...], seed: int) -> None:
        self.trainer, self.levels, self.most, self.seed = trainer, levels, most, seed
        self._values: list[Tensor] = []
        self._weights: list[Tensor] = []
        self._batches = 0

    def prediction_step(self, chain: Callable[..., Any], model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """The Trainer's prediction step under ablation; the losses of the examples are kept."""
        trainer, step = self.trainer, self.trainer.comparative_step(model)
        inputs = trainer._prepare_inputs(inputs)
        with preserve_rng_state(step._devices(inputs)), train_mode_except_batch_norm(model):
            torch.manual_seed(int(np.random.SeedSequence([self.seed, self._batches]).generate_state(1)[0]))
            batch = without_segments(step.batch_at(inputs, self.levels, self.most))
            with shadowed(trainer, compute_loss=self._loss):
                result = chain(model, batch, *args, **kwargs)
        self._batches += 1
        return result

    def run(self, dataset: Any, prediction_loss_only: bool) -> Any:
        """What the Trainer's own evaluation loop returns, under ablation."""
        trainer = self.trainer
        with shadowed(trainer, evaluation=self):
            dataloader = trainer.get_eval_dataloader(dataset)
            return trainer.evaluation_loop(dataloader, "Ablation", prediction_loss_only or None)

    def metrics(self, prefix: str) -> dict[str, float]:
        """None besides the Trainer's."""
        return {}

    @property
    def losses(self) -> tuple[np.ndarray, np.ndarray]:
        """Losses and weights of the examples, `(examples, parts)` each."""
        if not self._values:
            raise ValueError("no example has a label; an ablation curve is made of losses, so it needs them.")
        return torch.cat(self._values).numpy(), torch.cat(self._weights).numpy()

    def _loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        loss_fn = _loss_of(self.trainer, return_outputs, **kwargs)
        loss, losses = self.trainer.comparative_step(model).measure(inputs, loss_fn, self.levels)
        if losses is not None:
            gathered = self.trainer.accelerator.gather_for_metrics(tuple(losses))
            self._values.append(gathered[0].float().cpu())
            self._weights.append(gathered[1].float().cpu())
        return (loss, loss_fn.outputs) if return_outputs else loss


class EvaluatesVariants(Trainer):
    """The hooks of a Trainer's evaluation: variants beside an ordinary one, and evaluations under ablation.

    Attributes:
        evaluation: the evaluation that is running; None outside of one.
        curve: the latest ablation curve, which the model card shows.
    """

    evaluation: AblatedEvaluation | VariantsInEvaluation | None = None
    curve: pd.DataFrame | None = None

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> Any:
        """Adds the variants' mean losses to the metrics under --cmp_eval_ablations."""
        evaluation = self.evaluation or VariantsInEvaluation(self)
        step = functools.partial(evaluation.prediction_step, type(self).prediction_step.__get__(self))
        arguments = (dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)
        with shadowed(self, prediction_step=step, evaluation=evaluation):
            output = super().evaluation_loop(*arguments)
        return output._replace(metrics={**(output.metrics or {}), **evaluation.metrics(f"{metric_key_prefix}_")})

    def evaluate_ablations(
        self,
        eval_dataset: Any = None,
        *,
        drops: int | None = None,
        crops: int | None = None,
        seeds: Sequence[int] = (0, 1, 2),
        model_name: str | None = None,
    ) -> pd.DataFrame:
        """Loss, metrics and violations at 0, 1, … levels of ablation, which the model card shows from then on.

        Arguments, columns of the result and errors are those of `cmp_trainer.reports.curves.ablation_curve`.
        """
        self.curve = ablation_curve(self, eval_dataset, drops=drops, crops=crops, seeds=seeds, model_name=model_name)
        return self.curve

    def ablated_evaluation(self, level: tuple[int, ...], most: tuple[int, ...], seed: int) -> AblatedEvaluation:
        """An evaluation at a level of ablation, to be run."""
        return AblatedEvaluation(self, level, most, seed)

    def hyperparameter_search(self, hp_space: Any = None, compute_objective: Any = None, *args: Any, **kwargs: Any):
        """Adds: the variants' losses in an evaluation are no part of the default objective."""

        def objective(metrics: dict[str, float]) -> float:
            names = [variant.name for variant in variants_of(self.ablations)[1]] if self.num_ablations else []
            return default_compute_objective(without_variants(metrics, names))

        return super().hyperparameter_search(hp_space, compute_objective or objective, *args, **kwargs)


def without_variants(metrics: Mapping[str, float], names: Sequence[str]) -> dict[str, float]:
    """Metrics of an evaluation without what the variants of these names added."""
    added = (*(f"_loss_{name}" for name in names), "_violation_rate")
    return {name: value for name, value in metrics.items() if not name.endswith(added)}


def _loss_of(trainer: Any, return_outputs: bool = False, **kwargs: Any) -> ChainLoss:
    """The loss of an evaluation, which leaves no traces besides those of the Trainer's own evaluation."""
    return ChainLoss(trainer, type(trainer).compute_loss.__get__(trainer), return_outputs, **kwargs)
