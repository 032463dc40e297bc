"""Stacked variants: several drop variants of a batch in one forward of more rows.

A small batch keeps a processor busy with overhead, not with arithmetic, and 1 + c small forwards pay it 1 + c times.
Here the batch is repeated for G variants, (G * batch, …), the model runs once, and only the dropout calls treat the
groups separately: each group is dropped at its own rate by PyTorch's own kernel, started from the random state in
which the site was reached. So every group gets the very masks that a forward of its own would give it. On the CPU,
where drawing a mask takes longer than applying it, plain dropout draws once for all groups, to the same masks, where
PyTorch draws by a kernel of its own (on Intel processors it is MKL that draws).

This asks of the model that rows come first in what it drops and do not depend on each other. Both are checked on the
first batch: what every dropout call returns for each group, and each group's losses, have to equal those of a forward
of its own. A mean over stacked rows is divided by G times as much as one over a batch; the first batch shows for which
reductions that is so.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cmp_trainer.ablations.drop import RECURRENT, CmpDrop, Site, any_rate, intercepted_dropout
from cmp_trainer.ablations.protocol import Ablation, Handler
from cmp_trainer.execution.random_state import generator_state, set_generator_state

_IN_PLACE = (torch.dropout_, torch.feature_dropout_, torch.alpha_dropout_, torch.feature_alpha_dropout_)
_NOT_ROW_BY_ROW = (F.multi_head_attention_forward, torch.native_dropout, *RECURRENT)


class CannotStack(ValueError):
    """The model's dropout calls do not keep the rows of a stacked batch apart."""


class StackedDrop(Ablation):
    """CmpDrop for a stacked batch: group g of the rows is at level `levels[g]`.

    Args:
        drop: the ablation that is stacked.
        levels: cumulative drops of each group, in the order of the groups.

    Raises:
        CannotStack: inside, at a dropout call whose rows are not those of the batch.
    """

    def __init__(self, drop: CmpDrop, levels: Sequence[int]) -> None:
        self.drop, self.levels = drop, tuple(levels)

    def calls(self, level: int) -> Mapping[Callable, Handler]:
        """Dropout functions that are called once for each group, from one random state."""
        return intercepted_dropout(self._drop)

    def _drop(self, site: Site, func: Callable, args: tuple, kwargs: dict) -> Any:
        asked = site.own_rate(args, kwargs)
        rates = [self.drop.rate(asked, level) for level in self.levels]
        if not any(rates):
            args, kwargs = site.with_rate(0.0, args, kwargs)
            return func(*args, **kwargs)
        first = args[0] if args else kwargs["query" if site.name == "dropout_p" else "input"]
        num_groups = len(rates)
        if func in _NOT_ROW_BY_ROW or first.ndim == 0 or first.shape[0] % num_groups:
            raise CannotStack(
                f"{func.__name__} drops a tensor of shape {tuple(first.shape)}, not {num_groups} groups."
            )
        inplace = args[3] if len(args) > 3 else kwargs.get("inplace", False)
        if func in _IN_PLACE or (inplace and func is not F.scaled_dot_product_attention):
            raise CannotStack(f"{func.__name__} drops in place.")
        if _draws_once(func, rates, first, args, kwargs):
            return _drop_groups_at_once(first, rates)
        # Split, not sliced: that is one node of the graph, and backward fills no whole tensor for each group.
        group_args = [_groups(value, first, num_groups) for value in args]
        group_kwargs = {key: _groups(value, first, num_groups) for key, value in kwargs.items()}
        outputs, state = [], generator_state(first.device)
        for group, rate in enumerate(rates):
            set_generator_state(first.device, state)
            ours, ours_by_name = site.with_rate(
                rate,
                tuple(values[group] for values in group_args),
                {key: values[group] for key, values in group_kwargs.items()},
            )
            with any_rate(func, rate, ours, ours_by_name):
                outputs.append(func(*ours, **ours_by_name))
        return torch.cat(outputs)


class NotedSites(Ablation):
    """An ablation of which every dropout call's result is kept, without a graph, in `results`."""

    def __init__(self, noted: Ablation, level: int = 0) -> None:
        self.noted, self.level, self.results = noted, level, []

    def calls(self, level: int) -> Mapping[Callable, Handler]:
        """Those of the noted ablation."""
        return {func: functools.partial(self._note, call) for func, call in self.noted.calls(self.level).items()}

    def _note(self, call: Handler, func: Callable, args: tuple, kwargs: dict) -> Any:
        result = call(func, args, kwargs)
        self.results.append((result[0] if isinstance(result, tuple) else result).detach().clone())
        return result


def row_names(batch: Any, rows: int) -> set[str]:
    """The columns of a batch that have so many rows."""
    return {name for name, value in batch.items() if isinstance(value, Tensor) and value.ndim and len(value) == rows}


def stack(batch: Mapping[str, Any], names: set[str], num_groups: int) -> dict[str, Any]:
    """A batch whose columns of these names are repeated group after group: `(batch, …)` -> `(groups * batch, …)`."""
    return {name: torch.cat([value] * num_groups) if name in names else value for name, value in dict(batch).items()}


def check_no_batch_norm(model: nn.Module) -> None:
    """Its means would be those of all groups, a difference that a single loss may be too close to show.

    Raises:
        CannotStack: a batch norm is in train mode.
    """
    for name, module in model.named_modules():
        if module.training and isinstance(module, nn.modules.batchnorm._BatchNorm):
            raise CannotStack(f"{name} is a batch norm.")


def _draws_once(func: Callable, rates: Sequence[float], first: Tensor, args: tuple, kwargs: Mapping[str, Any]) -> bool:
    """Whether a call is plain dropout in train mode, on the CPU."""
    training = args[2] if len(args) > 2 else kwargs.get("training", kwargs.get("train", True))
    plain = func in (F.dropout, torch.dropout) and training
    return plain and first.device.type == "cpu" and max(rates) < 1 and _kernel_draws_doubles()


@functools.cache
def _kernel_draws_doubles() -> bool:
    """Whether dropout here is what `_drop_groups_at_once` computes; on Intel processors, MKL draws otherwise."""
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


def _groups(value: Any, first: Tensor, num_groups: int) -> Sequence[Any]:
    """An argument of a dropout call for each group: its rows of a tensor like the dropped one, else the argument."""
    if isinstance(value, Tensor) and value.ndim == first.ndim and value.shape[0] == first.shape[0]:
        return value.split(len(first) // num_groups)
    return [value] * num_groups
