"""Stacked variants: several drop variants of a batch in one forward of more rows.

A small batch keeps a processor busy with overhead, not with arithmetic, and 1 + c small forwards pay it 1 + c times.
Here the batch is repeated for G variants, (G * batch, …), the model runs once, and only the dropout calls treat the
groups apart: each group is dropped at its own rate by PyTorch's own kernel, started from the random state in which
the site was reached. So every group gets the very masks that a forward of its own would give it. On the CPU, where
drawing a mask takes longer than applying it, plain dropout draws once for all groups, to the same masks, where
PyTorch draws by a kernel of its own (on processors of Intel it is MKL that draws).

This asks of the model that rows come first in what it drops and do not depend on each other. Where they do (batch
norm, time-major layers), the losses differ from those of single forwards, which is checked on the first batch.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cmp_trainer.ablations.drop import RECURRENT, CmpDrop, DropoutSchedule, own_rate, with_rate
from cmp_trainer.execution.random_state import generator_state, set_generator_state
from cmp_trainer.losses.task_losses import TaskLosses

_NOT_ROW_BY_ROW = (F.multi_head_attention_forward, torch.native_dropout, *RECURRENT)


class CannotStack(ValueError):
    """The model's dropout calls do not keep the rows of a stacked batch apart."""


class StackedDrop(CmpDrop):
    """CmpDrop for a stacked batch: group g of the rows has been through `group_drops[g]` cumulative drops.

    Args:
        group_drops: cumulative drops of each group, in the order of the groups.
        schedule: how rates grow with the drops.

    Raises:
        CannotStack: inside, at a dropout call whose rows are not those of the batch.
    """

    def __init__(self, group_drops: Sequence[int], schedule: DropoutSchedule | None = None) -> None:
        super().__init__(max(group_drops), schedule)
        self.group_drops = tuple(group_drops)

    def drop(self, func: Callable, position: int, name: str, args: tuple, kwargs: dict) -> Any:
        """Call a dropout function once for each group, from one random state."""
        asked = own_rate(position, name, args, kwargs)
        rates = [self.schedule.rate(asked, drops) for drops in self.group_drops]
        if not any(rates):
            args, kwargs = with_rate(0.0, position, name, args, kwargs)
            return func(*args, **kwargs)
        first = args[0] if args else kwargs["query" if name == "dropout_p" else "input"]
        num_rows, num_groups = first.shape[0], len(rates)
        if func in _NOT_ROW_BY_ROW or num_rows % num_groups:
            raise CannotStack(
                f"{func.__name__} drops a tensor of shape {tuple(first.shape)}, not {num_groups} groups."
            )
        if _draws_once(func, rates, first, args, kwargs):
            return _drop_groups_at_once(first, rates)
        # Split, not sliced: that is one node of the graph, and backward fills no whole tensor for each group.
        group_args = [_groups(value, num_rows, num_groups) for value in args]
        group_kwargs = {key: _groups(value, num_rows, num_groups) for key, value in kwargs.items()}
        device, outputs = first.device, []
        state = generator_state(device)
        for group, rate in enumerate(rates):
            set_generator_state(device, state)
            ours, ours_by_name = with_rate(
                rate,
                position,
                name,
                tuple(values[group] for values in group_args),
                {key: values[group] for key, values in group_kwargs.items()},
            )
            outputs.append(func(*ours, **ours_by_name))
        return torch.cat(outputs)

    def again(self) -> "StackedDrop":
        """An equal context, to be entered where this one has been left."""
        return StackedDrop(self.group_drops, self.schedule)


def stack(inputs: Mapping[str, Any], num_groups: int) -> dict[str, Any]:
    """A batch repeated group after group: tensors `(batch, …)` -> `(num_groups * batch, …)`, the rest as it is."""
    num_rows = _num_rows(inputs)
    return {
        name: torch.cat([value] * num_groups) if isinstance(value, Tensor) and _has_rows(value, num_rows) else value
        for name, value in inputs.items()
    }


def refuse_batch_norm(model: nn.Module) -> None:
    """Its means would be those of all groups, a difference that a single loss may be too close to show.

    Raises:
        CannotStack: a batch norm is in train mode.
    """
    for name, module in model.named_modules():
        if module.training and isinstance(module, nn.modules.batchnorm._BatchNorm):
            raise CannotStack(f"{name} is a batch norm.")


def unstack(losses: TaskLosses, num_groups: int) -> list[TaskLosses]:
    """Task losses of a stacked batch, `(num_groups * batch, parts)`, group by group."""
    return [
        TaskLosses(*pair)
        for pair in zip(losses.values.chunk(num_groups), losses.weights.chunk(num_groups), strict=True)
    ]


def first_group(outputs: Any, num_groups: int) -> Any:
    """The model's outputs for the first group of a stacked batch."""
    if isinstance(outputs, Tensor):
        return outputs[: outputs.shape[0] // num_groups] if outputs.ndim else outputs
    if isinstance(outputs, Mapping):
        parts = {name: first_group(value, num_groups) for name, value in outputs.items()}
        return type(outputs)(parts) if type(outputs) is dict else type(outputs)(**parts)
    if isinstance(outputs, (tuple, list)):
        return type(outputs)(first_group(value, num_groups) for value in outputs)
    return outputs


def _draws_once(func: Callable, rates: Sequence[float], first: Tensor, args: tuple, kwargs: Mapping[str, Any]) -> bool:
    """Whether a call is plain dropout, out of place and in train mode, on the CPU."""
    training = args[2] if len(args) > 2 else kwargs.get("training", kwargs.get("train", True))
    inplace = args[3] if len(args) > 3 else kwargs.get("inplace", False)
    plain = func in (F.dropout, torch.dropout) and training and not inplace
    return plain and first.device.type == "cpu" and max(rates) < 1 and _kernel_draws_doubles()


@functools.cache
def _kernel_draws_doubles() -> bool:
    """Whether dropout here is what `_drop_groups_at_once` computes; on processors of Intel, MKL draws otherwise."""
    start = torch.get_rng_state()
    kept, end = torch.dropout(torch.ones(64), 0.5, True) > 0, torch.get_rng_state()
    torch.set_rng_state(start)
    same = torch.equal(torch.empty(64, dtype=torch.float64).uniform_() < 0.5, kept)
    same = same and torch.equal(torch.get_rng_state(), end)
    torch.set_rng_state(start)
    return same


def _drop_groups_at_once(stacked: Tensor, rates: Sequence[float]) -> Tensor:
    """Dropout of group g of the rows at `rates[g]`.

    PyTorch's own CPU kernel keeps a neuron where a uniform number in double precision is below 1 - rate. So one
    draw of these numbers gives the masks of all groups, and leaves the random state where one call leaves it.
    """
    groups = stacked.split(len(stacked) // len(rates))
    uniform = torch.empty_like(groups[0], dtype=torch.float64).uniform_()
    pairs = zip(groups, rates, strict=True)
    return torch.cat([group * _noise(uniform, rate, group) if rate else group for group, rate in pairs])


def _noise(uniform: Tensor, rate: float, like: Tensor) -> Tensor:
    """0 where a neuron is dropped, 1 / (1 - rate) where it is kept."""
    return torch.lt(uniform, 1 - rate, out=torch.empty_like(like)).div_(1 - rate)


def _groups(value: Any, num_rows: int, num_groups: int) -> Sequence[Any]:
    """An argument of a dropout call for each group: its rows of a tensor with the batch's rows, else the argument."""
    if isinstance(value, Tensor) and _has_rows(value, num_rows):
        return value.split(num_rows // num_groups)
    return [value] * num_groups


def _has_rows(value: Tensor, num_rows: int) -> bool:
    return value.ndim > 0 and value.shape[0] == num_rows


def _num_rows(inputs: Mapping[str, Any]) -> int:
    return next(value.shape[0] for value in inputs.values() if isinstance(value, Tensor) and value.ndim)
