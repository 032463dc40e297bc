"""CmpTrainer: the Trainer with comparative loss. This file is the flow of a step:

    arguments -> variants -> (crop, drop, forward, task loss) for each variant -> comparative loss -> log

What each word means is in the file of that name. Everything else, from data loading to saving, is the Trainer's.
"""

import functools
import logging
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from os import PathLike
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn
from transformers import Seq2SeqTrainer
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from cmp_trainer import checks
from cmp_trainer.ablations.crop import SEGMENTS, CmpCrop
from cmp_trainer.ablations.drop import CmpDrop, DropoutSites, dropout_awake, unchanged_buffers
from cmp_trainer.ablations.plan import Variant, plan_variants
from cmp_trainer.arguments import CmpTrainingArguments
from cmp_trainer.execution.forwards import devices_of, run_variants, stacking_pays
from cmp_trainer.execution.low_memory import loss_one_variant_at_a_time, select_rows
from cmp_trainer.execution.random_state import RandomState, same_start, untouched_randomness
from cmp_trainer.execution.recompute import RecomputeUnderCmpDrop
from cmp_trainer.execution.stacked import CannotStack, refuse_batch_norm
from cmp_trainer.losses.comparative import comparative_loss, regularized_loss
from cmp_trainer.losses.task_losses import (
    LABEL_NAMES,
    PerExampleLoss,
    TaskLosses,
    batch_mean,
    shifts_labels,
    task_losses,
    user_losses,
    without_labels,
)
from cmp_trainer.reports.curves import ablation_curve
from cmp_trainer.reports.loss_log import LossLog
from cmp_trainer.reports.model_card import write_model_card
from cmp_trainer.reports.training_plot import show_variants_in_progress_bar
from cmp_trainer.saving.checkpoints import being_written, checkpoint_to_resume
from cmp_trainer.saving.pushing import ReportsPushes

logger = logging.getLogger(__name__)


class CmpTrainerMixin(ReportsPushes):
    """Comparative loss for any subclass of Trainer: `class MyCmpTrainer(CmpTrainerMixin, MyTrainer)`.

    Args:
        per_example_loss_func: `(outputs, inputs) -> (batch,)` or `(batch, parts)`, the loss of each example, for
            models and tasks whose losses are not known. It then is the loss of training and evaluation, with and
            without ablations. Parts are compared apart and averaged.
        *args, **kwargs: the Trainer's. With plain TrainingArguments nothing is ablated.

    Raises:
        ValueError: a setting in which examples cannot be compared; names it and what to do.
    """

    args: CmpTrainingArguments

    def __init__(self, *args: Any, per_example_loss_func: PerExampleLoss | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.per_example_loss_func = per_example_loss_func
        self._train_losses, self._eval_losses = LossLog(), LossLog()
        self._first_step_is_checked, self._can_stack = False, False
        self._bare: tuple[Any, Any] = (None, None)
        self.ablations: pd.DataFrame | None = None
        self._recompute = RecomputeUnderCmpDrop()
        self.add_callback(self._recompute)
        show_variants_in_progress_bar(self)
        if self.num_ablations:
            checks.check_setting(self)

    @property
    def num_ablations(self) -> int:
        """c; 0 for arguments that know nothing of comparative loss."""
        return getattr(self.args, "cmp_num_ablations", 0)

    @property
    def variants(self) -> list[Variant]:
        """The full model and its ablations, as the arguments say now (a hyperparameter search changes them)."""
        return plan_variants(self.num_ablations, getattr(self.args, "cmp_num_crops", 0))

    def train(self, resume_from_checkpoint: str | PathLike | bool | None = None, *args: Any, **kwargs: Any):
        """Trainer's; a half-written checkpoint is passed over (True) or refused (a path)."""
        if not self.num_ablations and self.hp_search_backend is None:
            logger.warning("comparative loss is off (--cmp_num_ablations 0): training as the plain Trainer does.")
        self._first_step_is_checked = False
        resume_from_checkpoint = checkpoint_to_resume(resume_from_checkpoint, self.args.output_dir)
        try:
            return super().train(resume_from_checkpoint, *args, **kwargs)
        finally:
            self._recompute.undo()

    def _inner_training_loop(self, *args: Any, **kwargs: Any) -> Any:
        self._train_losses = LossLog()  # an earlier training, or a try with a larger batch, may have left losses
        return super()._inner_training_loop(*args, **kwargs)

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """Trainer's; an error if a subclass's compute_loss went past the comparison."""
        loss = super().training_step(*args, **kwargs)
        checks.check_compared(self, self._train_losses)
        return loss

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The comparative loss of the batch in training; in evaluation the plain task loss of the full model."""
        if not (model.training and self.num_ablations):
            return self._plain_loss(model, inputs, return_outputs, num_items_in_batch)
        if not self._first_step_is_checked:
            self._first_step_is_checked = self._check_first_step(model, inputs)
        with same_start(devices_of(model)):  # where an error leaves the random state, crops included
            if self.args.cmp_low_memory and torch.is_grad_enabled() and not return_outputs:
                loss, losses = self._low_memory_loss(model, inputs, num_items_in_batch)
                outputs = None
            else:
                losses, outputs = self._compare(model, inputs, self._stacks(model, inputs))
                loss = self._reduce(self._objective(losses), losses.weights, num_items_in_batch)
        self._train_losses.add(*losses)
        return (loss, outputs) if return_outputs else loss

    def _compare(self, model: nn.Module, inputs: Mapping[str, Any], stacked: bool) -> tuple[TaskLosses, Any]:
        """Task losses of all variants, (batch, parts, 1 + c), the weights of the full one, and its outputs."""
        variants = self.variants
        batches = self._crop(inputs, num_crops=variants[-1].crops)
        forward = functools.partial(self._forward, model)
        return run_variants(forward, variants, batches, self.args.cmp_schedule, devices_of(model), stacked)

    def _forward(
        self, model: nn.Module, batch: Mapping[str, Any], context: AbstractContextManager
    ) -> tuple[TaskLosses, Any]:
        """Task losses and outputs of one forward."""
        with context:
            outputs = model(**self._model_inputs(batch))
        return self._task_losses(outputs, batch), outputs

    def _stacks(self, model: nn.Module, inputs: Mapping[str, Any]) -> bool:
        """Whether the drop variants of this batch share a forward."""
        choice, can = self.args.cmp_forward, self._can_stack
        return can and (choice == "stacked" or stacking_pays(inputs, next(model.parameters()).device))

    def _low_memory_loss(
        self, model: nn.Module, inputs: Mapping[str, Any], num_items: Any
    ) -> tuple[Tensor, TaskLosses]:
        """The loss whose backward is the full variant's; the backwards of the others are done on the way."""
        batches = self._crop(inputs, num_crops=self.variants[-1].crops)
        divisor = 1 if num_items is not None else self.current_gradient_accumulation_steps  # as in training_step
        devices, ends = devices_of(model), {}
        with same_start(devices) as restart:

            def run(variant: Variant, rows: Tensor | None) -> TaskLosses:
                restart()
                batch = select_rows(batches[variant.crops], rows)
                losses, _ = self._forward(model, batch, CmpDrop(variant.drops, self.args.cmp_schedule))
                ends[variant] = RandomState.capture(devices)
                return losses

            alone = self.accelerator.num_processes == 1
            result = loss_one_variant_at_a_time(
                run,
                self.variants,
                reduce=lambda losses: self._reduce(self._objective(losses), losses.weights, num_items),
                backward=lambda share: self.accelerator.backward(share / divisor),
                unsynchronized=self.accelerator.no_sync(model),
                may_skip=alone,
                may_select=alone and self.per_example_loss_func is None,  # which may look at the whole batch
            )
        ends[self.variants[-1]].restore()  # the full variant, the last to run, draws no masks
        return result

    def _objective(self, losses: TaskLosses) -> Tensor:
        """(batch, parts, 1 + c) task losses -> (batch, parts) losses to minimize."""
        args = self.args
        ranking: dict[str, Any] = {
            "ranking": args.cmp_ranking,
            "temperature": args.cmp_temperature,
            "margin": args.cmp_margin,
        }
        if args.cmp_objective == "comparative":
            return comparative_loss(losses.values, baseline=args.cmp_baseline_value, **ranking)
        return regularized_loss(
            losses.values,
            primary=args.cmp_primary,
            weight=args.cmp_weight,
            threshold=args.cmp_loss_threshold,
            example_weights=losses.weights,
            **ranking,
        )

    def _reduce(self, values: Tensor, weights: Tensor, num_items: Tensor | int | None) -> Tensor:
        """The Trainer's normalization of a micro-batch, gradient accumulation and processes included."""
        if num_items is None:
            return batch_mean(values, weights)
        if self.per_example_loss_func is not None:
            # The Trainer counted labels, the user's losses count examples, and the Trainer will not divide any more.
            return batch_mean(values, weights) / self.current_gradient_accumulation_steps
        loss = batch_mean(values, weights, num_items)
        return loss * self.accelerator.num_processes if self.args.average_tokens_across_devices else loss

    def _plain_loss(self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool, num_items: Any) -> Any:
        """What Trainer computes, or the mean of the user's own losses."""
        inputs = {name: value for name, value in inputs.items() if name != SEGMENTS}
        if self.per_example_loss_func is None:
            return super().compute_loss(model, inputs, return_outputs=return_outputs, num_items_in_batch=num_items)
        outputs = model(**inputs)
        losses = self._task_losses(outputs, inputs)
        loss = self._reduce(*losses, num_items if model.training else None)
        return (loss, outputs) if return_outputs else loss

    def _task_losses(self, outputs: Any, inputs: Mapping[str, Any]) -> TaskLosses:
        if self.per_example_loss_func is not None:
            return user_losses(self.per_example_loss_func, outputs, inputs)
        model = self._bare_model
        return task_losses(
            outputs,
            inputs,
            problem_type=getattr(getattr(model, "config", None), "problem_type", None),
            shifts_labels=shifts_labels(model),
            label_smoothing=self.label_smoother.epsilon if self.label_smoother is not None else 0.0,
        )

    def _model_inputs(self, inputs: Mapping[str, Any]) -> Mapping[str, Any]:
        return inputs if self.per_example_loss_func is not None else without_labels(self._bare_model, inputs)

    def _crop(self, inputs: Mapping[str, Any], num_crops: int) -> list[dict[str, Any]]:
        """The batch at 0, 1, … crops, without crop_segments."""
        crop = CmpCrop.for_model(
            self._bare_model,
            num_crops,
            getattr(self.args, "cmp_crop_order", "random"),
            self.processing_class,
            self.data_collator,
        )
        return crop(inputs)

    @property
    def _bare_model(self) -> nn.Module:
        """The user's model inside of what training wraps around it; looked for once, as it costs a walk of modules."""
        wrapped, bare = self._bare
        if wrapped is not self.model:
            wrapped, bare = self.model, self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
            bare = bare.get_base_model() if hasattr(bare, "get_base_model") else bare
            self._bare = wrapped, bare
        return bare

    def _check_first_step(self, model: nn.Module, inputs: dict[str, Any]) -> bool:
        """Run the checks on this batch; False when it has no label to check with."""
        self.args.check_cmp_arguments()  # again, as a hyperparameter search changes arguments
        checks.check_setting(self)
        full = self._crop(inputs, num_crops=0)[0]
        eager = torch.compiler.set_stance("force_eager")  # a compiled model is not to be compiled for the checks
        with torch.no_grad(), eager, untouched_randomness(devices_of(model)) as start, unchanged_buffers(model):
            recorder = DropoutSites(0)
            losses, _ = self._forward(model, full, recorder)
            with CmpDrop(0):
                own_loss, outputs = self._plain_loss(model, full, True, None)
            again = self._task_losses(outputs, full)
            if self.variants[-1].drops:
                checks.check_dropout_sites(recorder.sites, self.args.cmp_schedule, self._bare_model)
            start.restore()
            self._can_stack = self._stacking_agrees(model, inputs, start)
        labelled = losses.weights.any()
        if labelled:
            if self.per_example_loss_func is None:
                checks.check_own_loss(own_loss, batch_mean(*again), next(model.parameters()).dtype)
            checks.check_repeatable(losses.values, again.values)
        return bool(self._sum_over_processes(labelled.int()))  # all processes go on, or check again, together

    def _stacking_agrees(self, model: nn.Module, inputs: Mapping[str, Any], start: RandomState) -> bool:
        """Whether a stacked forward gives the losses of single ones; an error if it was asked for and does not."""
        choice, parameter = self.args.cmp_forward, next(model.parameters())
        on_cpu, precise = parameter.device.type == "cpu", parameter.dtype in (torch.float32, torch.float64)
        # Processes have to do equally many forwards, also where the batch of one is small and that of another is not.
        may_pay = on_cpu and not self.args.torch_compile and self.accelerator.num_processes == 1
        if choice == "sequential" or (choice == "auto" and not may_pay):
            return False
        rounds = not (on_cpu and precise and self.accelerator.mixed_precision == "no")
        single, _ = self._compare(model, inputs, stacked=False)
        start.restore()
        try:
            refuse_batch_norm(model)
            stacked, _ = self._compare(model, inputs, stacked=True)
        except CannotStack as error:
            return checks.check_stacking(single.values, None, choice, str(error))
        except Exception as error:  # of the model, its outputs or the user's losses, which all did without stacking
            if choice == "stacked":
                raise
            logger.info("variants run one after the other, stacked the model cannot: %s", error)
            return False
        return checks.check_stacking(single.values, stacked.values, choice, rounds=rounds)

    def prediction_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Trainer's, on the full input; with --cmp_eval_ablations the variants' losses are noted too."""
        full = {name: value for name, value in inputs.items() if name != SEGMENTS}
        prediction = super().prediction_step(model, full, *args, **kwargs)
        if self.num_ablations and self.args.cmp_eval_ablations and self._has_labels(inputs):
            self._note_eval_variants(model, self._prepare_inputs(inputs))
        return prediction

    def _has_labels(self, inputs: Mapping[str, Any]) -> bool:
        if self.per_example_loss_func is not None:
            return all(inputs.get(name) is not None for name in self.label_names)
        return any(inputs.get(name) is not None for name in LABEL_NAMES)

    def _note_eval_variants(self, model: nn.Module, inputs: dict[str, Any]) -> None:
        """Compare the variants of an evaluation batch, with masks that depend on the seed and the batch alone."""
        no_trace = untouched_randomness(devices_of(model))
        with torch.no_grad(), no_trace, dropout_awake(model), self.compute_loss_context_manager():
            torch.manual_seed(self.args.seed)
            losses, _ = self._compare(model, inputs, stacked=False)
        self._eval_losses.add(*self.accelerator.gather_for_metrics(tuple(losses)))

    def evaluate_ablations(
        self,
        eval_dataset: Any = None,
        *,
        drops: int | None = None,
        crops: int | None = None,
        seeds: Sequence[int] = (0, 1, 2),
        model_name: str | None = None,
    ) -> pd.DataFrame:
        """Loss, metrics and violations at 0, 1, … drops and crops, which the model card shows from then on.

        Arguments, columns of the result and errors are those of `cmp_trainer.reports.curves.ablation_curve`.
        """
        self.ablations = ablation_curve(
            self, eval_dataset, drops=drops, crops=crops, seeds=seeds, model_name=model_name
        )
        return self.ablations

    def evaluation_loop(self, dataloader: Any, description: str, *args: Any, **kwargs: Any) -> Any:
        """Trainer's, with the variants' mean losses among the metrics under --cmp_eval_ablations."""
        self._eval_losses = LossLog()  # an evaluation that raised may have left losses
        output = super().evaluation_loop(dataloader, description, *args, **kwargs)
        prefix = kwargs.get("metric_key_prefix", "eval")
        variant_losses = self._eval_losses.pop(prefix=f"{prefix}_")
        return output._replace(metrics={**(output.metrics or {}), **variant_losses})

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Trainer's, with the variants' mean losses since the last log next to the training loss."""
        if "loss" in logs:
            logs.update(self._train_losses.pop(self._sum_over_processes))
        super().log(logs, *args, **kwargs)

    def _sum_over_processes(self, sums: Tensor) -> Any:
        return self.accelerator.reduce(sums, "sum")

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Trainer's; of a model trained with ablations the card of model_card.py."""
        if not self.num_ablations:
            super().create_model_card(*args, **kwargs)
        elif self.is_world_process_zero():
            write_model_card(self, *args, **kwargs)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        checkpoint = Path(self._get_output_dir(trial), f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}")
        with being_written(checkpoint, is_writer=self.args.should_save):
            super()._save_checkpoint(model, trial)

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        self.accelerator.wait_for_everyone()  # so that the state, which comes next, is the last file of all processes

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        if self.variants[-1].crops and SEGMENTS not in self._signature_columns:
            self._signature_columns = [*self._signature_columns, SEGMENTS]


class CmpTrainer(CmpTrainerMixin):
    """The Trainer with comparative loss; see CmpTrainerMixin."""


class CmpSeq2SeqTrainer(CmpTrainer, Seq2SeqTrainer):
    """The Seq2SeqTrainer with comparative loss; see CmpTrainerMixin. Generation in evaluation is unchanged."""
