"""Running the variants of a batch: one forward each, or the drop variants of equal input stacked in one.

Either way every variant starts from the same random state, and the state afterwards is where one forward leaves it.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from cmp_trainer.ablations.drop import CmpDrop, DropoutSchedule
from cmp_trainer.ablations.plan import Variant
from cmp_trainer.execution.random_state import same_start
from cmp_trainer.execution.stacked import StackedDrop, first_group, stack, unstack
from cmp_trainer.losses.task_losses import TaskLosses

Forward = Callable[[Mapping[str, Any], AbstractContextManager], tuple[TaskLosses, Any]]

STACKING_PAYS_UP_TO = 1024
"""Tokens of the batch up to which one stacked forward is faster; measured, see docs/performance.md."""


def run_variants(
    forward: Forward,
    variants: Sequence[Variant],
    batches: Sequence[Mapping[str, Any]],
    schedule: DropoutSchedule,
    devices: set[torch.device],
    stacked: bool,
) -> tuple[TaskLosses, Any]:
    """Task losses of all variants and the outputs of the first.

    Args:
        forward: `(batch, context)` -> task losses `(batch, parts)` and outputs of a forward in that context.
        variants: the full model first.
        batches: the batch at 0, 1, … crops.
        schedule: how dropout rates grow.
        devices: where random numbers are drawn.
        stacked: whether variants of equal crops share a forward.

    Returns:
        Task losses `(batch, parts, 1 + c)` with the weights of the full variant, and its outputs.
    """
    groups = itertools.groupby(variants, key=lambda variant: variant.crops if stacked else variant)
    losses, outputs = [], None
    with same_start(devices) as restart:
        for group in (list(group) for _, group in groups):
            restart()
            group_losses, group_outputs = _run_group(forward, group, batches[group[0].crops], schedule)
            losses += group_losses
            outputs = group_outputs if outputs is None else outputs
    values = torch.stack([loss.values for loss in losses], dim=-1)
    return TaskLosses(values, losses[0].weights), outputs


def stacking_pays(batch: Mapping[str, Any], device: torch.device) -> bool:
    """Whether `--cmp_forward auto` stacks: small batches on the CPU, where it was measured to be faster."""
    sizes = [value.shape[:2].numel() for value in batch.values() if isinstance(value, Tensor) and value.ndim > 1]
    return device.type == "cpu" and max(sizes, default=0) <= STACKING_PAYS_UP_TO


def devices_of(model: nn.Module) -> set[torch.device]:
    """The devices that the model's forward draws random numbers on."""
    return {parameter.device for parameter in model.parameters()}


def _run_group(
    forward: Forward, group: Sequence[Variant], batch: Mapping[str, Any], schedule: DropoutSchedule
) -> tuple[list[TaskLosses], Any]:
    if len(group) == 1:
        losses, outputs = forward(batch, CmpDrop(group[0].drops, schedule))
        return [losses], outputs
    drop = StackedDrop([variant.drops for variant in group], schedule)
    losses, outputs = forward(stack(batch, len(group)), drop)
    return unstack(losses, len(group)), first_group(outputs, len(group))
