"""Shared layers: what lies below the ablated layers runs once for all variants of a step.

With the top N layers ablated, all variants compute the same thing below them. So

    (1) the first forward of a step keeps what each module below the boundary (boundary.py) returned;
    (2) in the forwards after it, these modules return that in place of being run;
    (3) the losses of all variants are functions of one lower graph, whose backward runs once.

A stacked forward runs them on the first group of its rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

from cmp_trainer.ablations.protocol import Ablation
from cmp_trainer.execution.boundary import Below, CannotShare, Walk
from cmp_trainer.execution.random_state import RandomState, generator_state, set_generator_state


class Lower(Below):
    """What the modules below the boundary returned in the first forward of a step.

    Args:
        keeps_graph: keep their graph also where the forward itself runs without one.
    """

    def __init__(self, keeps_graph: bool = False) -> None:
        self.keeps_graph = keeps_graph
        self.returns_leaves = False  # in place of tensors with the lower graph
        self._leaves: dict[int, tuple[Tensor, Tensor]] = {}
        self.forget()

    def forget(self) -> None:
        """The next forward is the first one again."""
        self.is_recorded = False
        self._returned: list[_Returned] = []
        self._states: list[RandomState] = []

    def call(self, walk: Walk, module: nn.Module, original: Callable, args: tuple, kwargs: dict[str, Any]) -> Any:
        """A module's call below the boundary."""
        if not walk.records:
            return self._again(walk, module, args, kwargs)
        if walk.is_recomputed:
            return original(*args, **kwargs)
        before = [generator_state(device) for device in walk.devices]
        output = original(*args, **kwargs)
        after = [generator_state(device) for device in walk.devices]
        has_drawn = any(not torch.equal(one, other) for one, other in zip(before, after, strict=True))
        kept = tree_map(_copy if module in walk.boundary.written else _same, output)  # containers are copied anyway
        versions = [tensor._version for tensor in _tensors(kept)]
        self._returned.append(_Returned(module, kept, versions, after if has_drawn else None))
        return output

    def cross(self, walk: Walk) -> None:
        """All variants go on from one random state."""
        if not walk.records:
            if walk.crossings >= len(self._states):
                raise CannotShare("a variant calls the layers more often than the full model.")
            self._states[walk.crossings].restore()
        elif not walk.is_recomputed:
            self._states.append(RandomState.capture(walk.devices))

    def backward(self) -> tuple[list[Tensor], list[Tensor]]:
        """The tensors that leaves stood for, and the gradients that arrived at the leaves, which are forgotten."""
        pairs = [(tensor, leaf.grad) for tensor, leaf in self._leaves.values() if leaf.grad is not None]
        self._leaves = {}
        return [tensor for tensor, _ in pairs], [gradient for _, gradient in pairs if gradient is not None]

    def _again(self, walk: Walk, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
        if walk.shared >= len(self._returned) or self._returned[walk.shared].module is not module:
            raise CannotShare(f"a variant calls {type(module).__name__} where the full model does not.")
        returned = self._returned[walk.shared]
        if [tensor._version for tensor in _tensors(returned.output)] != returned.versions:
            walk.boundary.written.add(module)
            raise CannotShare(f"the model writes into what {type(module).__name__} returned.")
        if returned.drawn is not None:
            for device, state in zip(walk.devices, returned.drawn, strict=True):
                set_generator_state(device, state)
        output = tree_map(self._leaf if self.returns_leaves else _same, returned.output)
        if module in walk.boundary.written:
            output = tree_map(_copy, output)
        return _seen_by_hooks(module, output, args, kwargs)

    def _leaf(self, value: Any) -> Any:
        if not isinstance(value, Tensor) or not value.requires_grad:
            return value
        if id(value) not in self._leaves:
            self._leaves[id(value)] = value, value.detach().requires_grad_()
        return self._leaves[id(value)][1]


def lower_parts(kinds: Sequence[Ablation], variants: Iterable[tuple[int, ...]]) -> dict[tuple[int, ...], Lower]:
    """By the levels of each variant, what it shares with others: variants share the layers below the boundary where
    they differ only in kinds that leave these alone. A variant that differs from all others shares nothing."""
    groups: dict[tuple, list[tuple[int, ...]]] = {}
    for levels in variants:
        pairs = zip(kinds, levels, strict=True)
        groups.setdefault(tuple(level for kind, level in pairs if not kind.leaves_lower_layers), []).append(levels)
    shared = [(group, Lower()) for group in groups.values() if len(group) > 1]
    return {levels: lower for group, lower in shared for levels in group}


class NotedShapes(Below):
    """Runs the modules below the boundary, and notes the first dimension of each tensor that they take and return."""

    def __init__(self) -> None:
        self.noted: list[tuple[list[int | None], list[int | None]]] = []

    def call(self, walk: Walk, module: nn.Module, original: Callable, args: tuple, kwargs: dict[str, Any]) -> Any:
        """Runs it and notes the shapes."""
        output = original(*args, **kwargs)
        self.noted.append((_first_dimensions((args, kwargs)), _first_dimensions(output)))
        return output


class FirstGroup(Below):
    """The modules below the boundary run on the first group of a stacked batch, `(groups * batch, …)`, whose other
    groups are equal to it there; what they return is repeated for all groups.

    Args:
        num_groups: how often the batch is repeated.
        single, stacked: the shapes in a forward of the batch, and in one of the stacked batch; they show which
            tensors have rows.

    Raises:
        CannotShare: some other number changes with the number of rows.
    """

    def __init__(self, num_groups: int, single: NotedShapes, stacked: NotedShapes) -> None:
        self.num_groups = num_groups
        if len(single.noted) != len(stacked.noted):
            raise CannotShare("a stacked forward calls other modules.")
        self.rows = [
            (self._have_rows(*taken), self._have_rows(*returned))
            for taken, returned in (zip(*both, strict=True) for both in zip(single.noted, stacked.noted, strict=True))
        ]
        self._repeated: dict[int, tuple[Tensor, Tensor]] = {}

    def call(self, walk: Walk, module: nn.Module, original: Callable, args: tuple, kwargs: dict[str, Any]) -> Any:
        """Runs it on the first group."""
        if walk.shared >= len(self.rows):
            raise CannotShare(f"a stacked forward calls {type(module).__name__} where the first one did not.")
        taken, returned = self.rows[walk.shared]
        args, kwargs = self._each(self._first, (args, kwargs), taken)
        return self._each(self._repeat, original(*args, **kwargs), returned)

    def _have_rows(self, single: list[int | None], stacked: list[int | None]) -> list[bool]:
        pairs = list(zip(single, stacked, strict=False))
        if len(single) != len(stacked) or any(
            one != other and (one is None or one * self.num_groups != other) for one, other in pairs
        ):
            raise CannotShare("not all that its lower layers take and return is by row.")
        return [one != other for one, other in pairs]

    def _each(self, change: Callable[[Tensor], Tensor], value: Any, have_rows: list[bool]) -> Any:
        leaves, structure = tree_flatten(value)
        if len(leaves) != len(have_rows):
            raise CannotShare("a stacked forward passes other values to its lower layers than the first one.")
        changed = [change(leaf) if has_rows else leaf for leaf, has_rows in zip(leaves, have_rows, strict=True)]
        return tree_unflatten(changed, structure)

    def _first(self, stacked: Tensor) -> Tensor:
        if id(stacked) in self._repeated:
            return self._repeated[id(stacked)][1]
        return stacked.narrow(0, 0, len(stacked) // self.num_groups)

    def _repeat(self, tensor: Tensor) -> Tensor:
        repeated = torch.cat([tensor] * self.num_groups)
        self._repeated[id(repeated)] = repeated, tensor
        return repeated


class _Returned(NamedTuple):
    module: nn.Module
    output: Any
    versions: list[int]
    drawn: list[Tensor] | None  # the generators' states after a call that drew


def _same(value: Any) -> Any:
    return value


def _first_dimensions(value: Any) -> list[int | None]:
    return [len(leaf) if isinstance(leaf, Tensor) and leaf.ndim else None for leaf in tree_leaves(value)]


def _copy(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value


def _tensors(value: Any) -> Sequence[Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor) and not leaf.is_inference()]


def _seen_by_hooks(module: nn.Module, output: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    """An output that was kept, passed by the module's hooks, from which models collect hidden states; those of FSDP
    gather weights, which are not needed."""
    if not module._forward_hooks or hasattr(module, "_get_fsdp_state"):
        return output
    attributes = vars(module)
    before = attributes.get("forward")
    attributes["forward"] = lambda *args, **kwargs: output
    try:
        module._call_impl(*args, **kwargs)
        return output
    finally:
        if before is None:
            del attributes["forward"]
        else:
            attributes["forward"] = before
