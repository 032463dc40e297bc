"""CmpTrainer: the Trainer with comparative loss. Hooks of the Trainer, and nothing that works without one.

A training step of the Trainer calls `compute_loss`. While a step runs, that call goes to a ComparativeStep, which runs
the whole chain of `compute_loss` once for each variant, whatever subclasses, label smoothing or a loss function of the
user's add to it, and compares what it returns. Everything else, from data loading to saving, is the Trainer's.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Seq2SeqTrainer

from cmp_trainer.ablations.crop import SEGMENTS, CmpCrop
from cmp_trainer.ablations.protocol import Ablation
from cmp_trainer.arguments import CmpTrainingArguments
from cmp_trainer.chain import ChainLoss, accepted_columns, shadowed, without_segments
from cmp_trainer.checks.settings import check_croppable_examples, check_trainer
from cmp_trainer.checks.training import check_reached
from cmp_trainer.losses.comparative import Objective
from cmp_trainer.losses.examples import PerExampleLoss, losses_of_examples
from cmp_trainer.losses.reductions import example_mean
from cmp_trainer.reports.ablated_evaluation import EvaluatesVariants
from cmp_trainer.reports.model_card import write_model_card
from cmp_trainer.reports.training_plot import show_variants_in_progress_bar
from cmp_trainer.saving.checkpoints import RecordsCheckpoints
from cmp_trainer.saving.interruptions import says_what_is_saved
from cmp_trainer.saving.pushing import ReportsPushes
from cmp_trainer.step import ComparativeStep, bare_model

logger = logging.getLogger(__name__)


class CmpTrainer(EvaluatesVariants, RecordsCheckpoints, ReportsPushes):
    """The Trainer with comparative loss, alone or as one base of a trainer of your own, in any order.

    Args:
        ablations: in place of those that the arguments ask for; one for each ablated variant.
        objective: in place of the one that the arguments ask for, `(…, 1 + c) -> (…)`.
        per_example_loss_func: `(outputs, inputs) -> (batch,)` or `(batch, parts)`, the loss of each example, in place
            of the model's own, in training and evaluation. Parts are compared separately and averaged.
        *args, **kwargs: the Trainer's. With plain TrainingArguments and no ablations nothing is ablated.

    Raises:
        ValueError: settings in which examples cannot be compared; all reasons together, with what to do.
    """

    args: CmpTrainingArguments

    def __init__(
        self,
        *args: Any,
        ablations: Sequence[Ablation] | None = None,
        objective: Objective | None = None,
        per_example_loss_func: PerExampleLoss | None = None,
        **kwargs: Any,
    ) -> None:
        self.num_comparisons = 0
        self.per_example_loss_func = per_example_loss_func
        self._given_ablations, self._given_objective = ablations, objective
        self._step: ComparativeStep | None = None
        self._made_of: tuple[Any, ...] = ()
        self.loss_depth, self._is_training_step, self._logs_itself, self._reached = 0, False, False, False
        super().__init__(*args, **kwargs)
        if self.num_ablations:
            show_variants_in_progress_bar(self)
        if self.num_ablations or (self.compute_loss_func and per_example_loss_func):
            check_trainer(self)

    # --- what is compared ---

    @property
    def num_ablations(self) -> int:
        """c; 0 for arguments that know nothing of comparative loss."""
        if self._given_ablations is not None:
            return len(self._given_ablations)
        return getattr(self.args, "cmp_num_ablations", 0)

    @property
    def ablations(self) -> list[Ablation]:
        """The ablations as the arguments say now (a hyperparameter search changes them)."""
        if self._given_ablations is not None:
            return list(self._given_ablations)
        return self.args.cmp_ablations if self.num_ablations else []

    @property
    def ablated_layers(self) -> int | None:
        """How many of the top layers are ablated; None for the whole model."""
        return getattr(self.args, "cmp_ablated_layers", None) if self.num_ablations else None

    def comparative_step(self, model: nn.Module | None = None) -> ComparativeStep:
        """The step that training runs, made anew where the arguments or the model have changed."""
        model = self.model if model is None else model
        assert isinstance(model, nn.Module)
        objective = self._given_objective or getattr(self.args, "cmp_objective_function", None)
        made_of = (self.ablations, objective, self.ablated_layers, id(bare_model(model)))
        if self._step is None or made_of != self._made_of:
            if hasattr(self.args, "check_cmp_arguments"):
                self.args.check_cmp_arguments()  # a hyperparameter search changes them
            check_trainer(self)
            self._step = ComparativeStep(
                model,
                self.ablations,
                objective,
                forward=getattr(self.args, "cmp_forward", "auto"),
                low_memory=getattr(self.args, "cmp_low_memory", False),
                ablated_layers=self.ablated_layers,
                processing_class=self.processing_class,
                data_collator=self.data_collator,
            )
            self._made_of = made_of
        self._step.model = model
        return self._step

    # --- training ---

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Adds: every training step is compared, or ends in an error."""
        if not self.num_ablations and self.hp_search_backend is None:
            logger.warning("comparative loss is off (--cmp_num_ablations 0): training as the plain Trainer does.")
        self._step = None
        check_croppable_examples(self)
        with says_what_is_saved(self), shadowed(self, training_step=self._outermost_training_step):
            output = super().train(*args, **kwargs)
        if self.num_ablations and self._step is not None:
            self._step.check_end()
        return output

    def _inner_training_loop(self, *args: Any, **kwargs: Any) -> Any:
        self._step = None  # training may begin anew, with a smaller batch
        return super()._inner_training_loop(*args, **kwargs)

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """Adds the comparison, and an error where a subclass goes past it."""
        return self._compared(super().training_step, *args, **kwargs)

    def _outermost_training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        return self._compared(type(self).training_step.__get__(self), *args, **kwargs)

    def _compared(self, training_step: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
        """A training step whose compute_loss is compared as a whole, subclasses' parts of it included."""
        if self._is_training_step or not self.num_ablations:
            return training_step(*args, **kwargs)
        self._is_training_step, self._reached = True, False
        chain = type(self).compute_loss.__get__(self)
        try:
            with shadowed(self, compute_loss=functools.partial(self._compare, chain)):
                loss = training_step(*args, **kwargs)
        finally:
            self._is_training_step = False
        check_reached(self, self._reached)
        return loss

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Any,
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs: Any,
    ) -> Any:
        """Adds `per_example_loss_func`; where it is called in train mode outside of a training, the comparison."""
        in_training = model.training and not self.is_in_train and torch.is_grad_enabled()
        if not self.num_ablations or self.loss_depth or self.evaluation is not None or not in_training:
            return self._plain_loss(model, inputs, return_outputs, num_items_in_batch, **kwargs)
        return self._compare(self._plain_loss, model, inputs, return_outputs, num_items_in_batch, **kwargs)

    def _compare(
        self,
        chain: Callable[..., Any],
        model: nn.Module,
        inputs: Any,
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
        **kwargs: Any,
    ) -> Any:
        """The comparative loss over what `chain`, a compute_loss, returns for each variant."""
        self._reached = True
        step = self.comparative_step(model)
        step.settings_may_change = any(
            not type(one).__module__.startswith(("transformers.", "cmp_trainer.")) for one in self._callbacks
        )
        loss_fn = ChainLoss(
            self, chain, return_outputs, leaves_traces=True, num_items_in_batch=num_items_in_batch, **kwargs
        )
        before = step.num_comparisons
        loss = step(inputs, loss_fn)
        self.num_comparisons += step.num_comparisons - before
        return (loss, loss_fn.outputs) if return_outputs else loss

    def _plain_loss(
        self,
        model: nn.Module,
        inputs: Any,
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
        **kwargs: Any,
    ) -> Any:
        """What Trainer computes, or the mean of the user's own losses."""
        inputs = without_segments(inputs)
        if self.per_example_loss_func is None:
            kwargs["num_items_in_batch"] = num_items_in_batch
            return super().compute_loss(model, inputs, return_outputs=return_outputs, **kwargs)
        outputs = model(**accepted_columns(bare_model(model), inputs))
        loss = example_mean(losses_of_examples(self.per_example_loss_func, outputs, inputs))
        in_training = model.training and self.evaluation is None
        if in_training and num_items_in_batch is not None and not self._divides_by_steps:
            loss = loss / self.current_gradient_accumulation_steps  # the Trainer counted labels and will not divide
        return (loss, outputs) if return_outputs else loss

    @property
    def _divides_by_steps(self) -> bool:
        """Whether training_step divides a loss by the accumulation steps although it was given num_items_in_batch."""
        scaled = getattr(self, "loss_is_scaled_for_ga", None)
        return not self.model_accepts_loss_kwargs if scaled is None else not scaled

    @property
    def _callbacks(self) -> list[Any]:
        return self.callback_handler.callbacks

    # --- logs ---

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> Any:
        self._logs_itself = True
        try:
            return super()._maybe_log_save_evaluate(*args, **kwargs)
        finally:
            self._logs_itself = False

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Adds the variants' mean losses since the last log to the Trainer's own logs of the training loss."""
        if self._logs_itself and "loss" in logs:
            self._logs_itself = False
            if self._step is not None:
                logs.update(self._step.log(self._sum_over_processes))
        super().log(logs, *args, **kwargs)

    def _sum_over_processes(self, sums: Tensor) -> Any:
        return self.accelerator.reduce(sums, "sum")

    # --- saving ---

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Adds what comparative loss did to the card of a model that was trained with it."""
        if not self.num_ablations:
            super().create_model_card(*args, **kwargs)
        elif self.is_world_process_zero():
            write_model_card(self, *args, **kwargs)

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        crops = any(isinstance(ablation, CmpCrop) for ablation in self.ablations) if self.num_ablations else False
        if crops and SEGMENTS not in self._signature_columns:
            self._signature_columns = [*self._signature_columns, SEGMENTS]


class CmpSeq2SeqTrainer(CmpTrainer, Seq2SeqTrainer):
    """The Seq2SeqTrainer with comparative loss; see CmpTrainer. Generation in evaluation is unchanged."""
