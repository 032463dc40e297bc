"""Evaluation under ablation: the Trainer's own evaluation, with the losses of examples noted on the way.

`VariantsInEvaluation` follows an ordinary evaluation and, under --cmp_eval_ablations, notes what every variant's loss
is on its batches. `AblatedEvaluation` is for curves: the evaluation itself runs at one level of ablation, so that
loss and metrics are what the Trainer makes of an ablated model.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import Trainer, set_seed
from transformers.trainer_callback import CallbackHandler
from transformers.trainer_pt_utils import find_batch_size
from transformers.trainer_utils import default_compute_objective

from cmp_trainer.ablations.drop import CmpDrop
from cmp_trainer.ablations.plan import variants_of
from cmp_trainer.ablations.protocol import Ablation
from cmp_trainer.ablations.skip import CmpSkip
from cmp_trainer.chain import ChainLoss, shadowed, without_segments
from cmp_trainer.checks.first_batch import check_drops
from cmp_trainer.checks.settings import check_trainer
from cmp_trainer.execution.modes import train_mode_except_batch_norm
from cmp_trainer.execution.random_state import RandomState, preserve_rng_state
from cmp_trainer.execution.traces import no_traces
from cmp_trainer.reports.curves import ablation_curve
from cmp_trainer.reports.loss_log import LossLog
from cmp_trainer.step import ComparativeStep, VariantLosses

PredictionStep = Callable[..., tuple[Any, Any, Any]]
"""`(model, inputs, prediction_loss_only, ignore_keys) -> (loss, logits, labels)`, the Trainer's or a subclass's."""


class VariantsInEvaluation:
    """An ordinary evaluation, with the losses of all variants beside it where the arguments ask for them."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        self.is_on = bool(trainer.num_ablations and getattr(trainer.args, "cmp_eval_ablations", False))
        self.log: LossLog | None = None

    def prediction_step(self, chain: PredictionStep, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """The Trainer's prediction step on the full input; then the variants' losses are noted."""
        prediction = _predict(self.trainer, chain, model, without_segments(inputs), *args, **kwargs)
        if self.is_on and prediction[0] is not None:
            self._note(model, self.trainer._prepare_inputs(inputs))
        return prediction

    def metrics(self, prefix: str) -> dict[str, float]:
        """The variants' mean losses and the violation rate, under names that begin with the prefix."""
        return {} if self.log is None else self.log.pop(prefix=prefix)

    def _note(self, model: Any, inputs: Any) -> None:
        """Compare the variants of a batch, with masks that depend on the seed and the batch alone."""
        trainer, step = self.trainer, self.trainer.comparative_step(model)
        devices = step.devices(inputs)
        with preserve_rng_state(devices), train_mode_except_batch_norm(model), trainer.compute_loss_context_manager():
            set_seed(trainer.args.seed)
            losses = step.losses(inputs, _loss_of(trainer))
        values, weights = _gathered(trainer.accelerator, losses, inputs, len(step.variants))
        self.log = self.log or LossLog([variant.name for variant in step.variants])
        self.log.add(values, weights)


class AblatedEvaluation:
    """An evaluation of the model at a level of ablation.

    At level 0 of every kind the model is in eval mode, so that this is what `evaluate` does. Above, it is in train
    mode, so that dropout drops, except for batch norm.

    Args:
        trainer: a CmpTrainer.
        step: a step whose kinds of ablation are measured.
        levels: the level of every kind.
        most: the most ablated levels of the curve, so that crops of all levels are drawn alike.
        seed: of the masks.
    """

    def __init__(
        self, trainer: Any, step: ComparativeStep, levels: tuple[int, ...], most: tuple[int, ...], seed: int
    ) -> None:
        self.trainer, self.step, self.levels, self.most, self.seed = trainer, step, levels, most, seed
        self._values: list[Tensor] = []
        self._weights: list[Tensor] = []
        self._batches = 0

    def run(self, dataset: Any, prefix: str = "eval") -> dict[str, float]:
        """What the trainer's `evaluate` returns, under ablation; not logged, and the trainer is left as it was."""
        trainer = self.trainer
        with ExitStack() as stack:
            stack.enter_context(no_traces(trainer))
            stack.enter_context(_silenced(trainer.callback_handler))
            stack.enter_context(shadowed(trainer, evaluation=self))
            stack.enter_context(preserve_rng_state())  # of data loaders
            return trainer.evaluate(eval_dataset=dataset, metric_key_prefix=prefix)

    def prediction_step(self, chain: PredictionStep, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """The Trainer's prediction step under ablation; the losses of the examples take another forward."""
        trainer, step = self.trainer, self.step
        step.model, inputs = model, trainer._prepare_inputs(inputs)
        devices, is_full = step.devices(inputs), not any(self.levels)
        with preserve_rng_state(devices), nullcontext() if is_full else train_mode_except_batch_norm(model):
            set_seed(int(np.random.SeedSequence([self.seed, self._batches]).generate_state(1)[0]))
            batch = without_segments(step.batch_at(inputs, self.levels, self.most))
            start = RandomState.capture(devices)
            with step.ablated(inputs, _loss_of(trainer), self.levels, start):
                prediction = _predict(trainer, chain, model, batch, *args, **kwargs)
            if prediction[0] is not None:
                with torch.no_grad(), trainer.compute_loss_context_manager():
                    self._note(batch, start)
        self._batches += 1
        return prediction

    def metrics(self, prefix: str) -> dict[str, float]:
        """None besides the Trainer's."""
        return {}

    @property
    def losses(self) -> tuple[np.ndarray, np.ndarray]:
        """Losses and weights of the examples, `(examples, parts)` each.

        Raises:
            ValueError: no example has a label.
        """
        if not any(bool(weights.any()) for weights in self._weights):
            raise ValueError("no example has a label; an ablation curve is made of losses, so it needs them.")
        parts = max(weights.shape[1] for weights in self._weights)
        both = ([F.pad(one, (0, parts - one.shape[1])) for one in found] for found in (self._values, self._weights))
        values, weights = (torch.cat(found).numpy() for found in both)
        return values, weights

    def _note(self, batch: Any, start: RandomState) -> None:
        """Keep the losses of the examples of a batch, gathered over the processes."""
        loss_fn, accelerator = _loss_of(self.trainer), self.trainer.accelerator
        kinds = zip(self.step.kinds, self.levels, strict=True)
        if self._batches == 0 and any(level and isinstance(kind, CmpDrop) for kind, level in kinds):
            check_drops(self.step, batch, loss_fn)
        start.restore()
        losses = self.step.measure(batch, loss_fn, self.levels)[1]
        values, weights = _gathered(accelerator, losses, batch)
        self._values.append(values.float().cpu())
        self._weights.append(weights.float().cpu())


@contextmanager
def _silenced(handler: CallbackHandler) -> Iterator[None]:
    """Callbacks are not told of an evaluation in the body, and no progress bar begins that on_evaluate would end."""
    callbacks = handler.callbacks
    handler.callbacks = [one for one in callbacks if not hasattr(one, "prediction_bar")]
    try:
        with shadowed(handler, on_evaluate=lambda args, state, control, metrics: control):
            yield
    finally:
        handler.callbacks = callbacks


def _gathered(accelerator: Any, losses: VariantLosses | None, batch: Any, *variants: int) -> tuple[Tensor, Tensor]:
    """Losses `(batch, parts, *variants)` and weights `(batch, parts)` of the examples of all processes.

    A weight is the share of an example in its batch, so that all batches count alike. Losses are None where nothing
    has a label; others may have some then, and wait. Without any, parts are 0.
    """
    device, rows = accelerator.device, find_batch_size(batch) or 1
    parts = torch.tensor([0 if losses is None else losses.weights.shape[1]], device=device)
    parts = int(accelerator.gather(parts).max())
    if losses is None:
        values, weights = torch.zeros(rows, parts, *variants, device=device), torch.zeros(rows, parts, device=device)
    else:
        values, weights = losses.values.float(), losses.weights.float() * len(losses.weights)
    rows = len(weights)
    totals = accelerator.gather(weights.sum().reshape(1))  # of each process
    values, weights = accelerator.gather_for_metrics((values, weights))
    # Rows that filled up a last batch are gone; those that stay share the weight of their number.
    batches = [
        batch * (total * len(batch) / (rows * batch.sum())).nan_to_num(0, 0) if len(batch) < rows else batch
        for batch, total in zip(weights.split(rows), totals, strict=False)
    ]
    return values, torch.cat(batches)


def _predict(trainer: Any, chain: PredictionStep, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
    """A prediction step, which reports the user's own loss also where text is generated."""
    loss, logits, labels = chain(model, inputs, *args, **kwargs)
    generates = getattr(trainer.args, "predict_with_generate", False)
    if loss is not None and trainer.per_example_loss_func is not None and generates:
        with torch.no_grad(), trainer.compute_loss_context_manager():
            prepared = trainer._prepare_inputs(inputs)
            loss = type(trainer).compute_loss(trainer, model, prepared).detach()
    return loss, logits, labels


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
        step = functools.partial(evaluation.prediction_step, self.prediction_step)
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
        skips: int | None = None,
        seeds: Sequence[int] = (0, 1, 2),
        model_name: str | None = None,
    ) -> pd.DataFrame:
        """Loss, metrics and examples in violation at 0, 1, … levels of ablation; the model card shows them.

        Arguments, columns of the result and errors are those of `cmp_trainer.reports.curves.ablation_curve`.
        """
        self.curve = ablation_curve(
            self, eval_dataset, drops=drops, crops=crops, skips=skips, seeds=seeds, model_name=model_name
        )
        return self.curve

    def measuring_step(self, ablations: Sequence[Ablation]) -> ComparativeStep:
        """A step whose kinds of ablation are measured one by one; that of training is left alone."""
        check_trainer(self)
        assert self.model is not None
        layers = getattr(self.args, "cmp_ablated_layers", None)
        return ComparativeStep(
            self.model,
            ablations,
            ablated_layers=layers if any(ablation.leaves_lower_layers for ablation in ablations) else None,
            processing_class=self.processing_class,
            data_collator=self.data_collator,
        )

    def num_layers(self, dataset: Any) -> int:
        """How many layers the stack has that CmpSkip skips, found with a batch of a data set."""
        assert self.model is not None
        with preserve_rng_state():
            batch = self._prepare_inputs(next(iter(self.get_eval_dataloader(dataset))))
            return self.measuring_step([CmpSkip((1,))]).num_layers(without_segments(batch), _loss_of(self))

    def ablated_evaluation(
        self, step: ComparativeStep, levels: tuple[int, ...], most: tuple[int, ...], seed: int
    ) -> AblatedEvaluation:
        """An evaluation at a level of every kind of the step, to be run."""
        return AblatedEvaluation(self, step, levels, most, seed)

    def hyperparameter_search(self, hp_space: Any = None, compute_objective: Any = None, *args: Any, **kwargs: Any):
        """Adds: the variants' losses in an evaluation are no part of the default objective."""

        def objective(metrics: dict[str, float]) -> float:
            names = [variant.name for variant in variants_of(self.ablations)[1]] if self.num_ablations else []  # pyright: ignore
            return default_compute_objective(without_variants(metrics, names))

        return super().hyperparameter_search(hp_space, compute_objective or objective, *args, **kwargs)


def without_variants(metrics: Mapping[str, float], names: Sequence[str]) -> dict[str, float]:
    """Metrics of an evaluation without what the variants of these names added."""
    added = (*(f"_loss_{name}" for name in names), "_violation_rate")
    return {name: value for name, value in metrics.items() if not name.endswith(added)}


def _loss_of(trainer: Any, return_outputs: bool = False, **kwargs: Any) -> ChainLoss:
    """The loss of an evaluation, which leaves no traces besides those of the Trainer's own evaluation."""
    return ChainLoss(trainer, type(trainer).compute_loss.__get__(trainer), return_outputs, **kwargs)
