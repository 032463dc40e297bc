"""Shared layers: what variants have in common runs once for all of them.

With the top N layers ablated, all variants compute the same thing below them; where layers are skipped, below the
first one that one variant skips and the other does not. So

    (1) the first forward of a step keeps what each module that may be shared returned;
    (2) in the forwards after it, these modules return that in place of being run, up to the first layer that differs;
    (3) the losses of all variants are functions of one graph, whose shared part is run backward once.

A stacked forward runs the shared modules on the first group of its rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

from cmp_trainer.ablations.protocol import Ablation
from cmp_trainer.execution.boundary import Below, Boundary, CannotShare, Walk
from cmp_trainer.execution.random_state import generator_state, set_generator_state


class Lower(Below):
    """What the shared modules returned in the first forward of a step."""

    def __init__(self) -> None:
        self.returns_leaves = False  # in place of tensors with the lower graph
        self._leaves: dict[int, tuple[Tensor, Tensor]] = {}
        self.forget()

    def forget(self) -> None:
        """The next forward is the first one again."""
        self.is_recorded = False
        self._returned: list[_Returned] = []
        self._begins: list[int] = []  # further runs of the model: the number of the first module that returned in them

    def depth(self, boundary: Boundary, levels: Mapping[Ablation, int], skipped: frozenset[int]) -> int:
        """The number of the first layer that a forward at some levels does not share: where neurons are ablated
        otherwise, or a layer is skipped in one of the two. The first forward keeps all layers that may be shared."""
        if not self.is_recorded:
            self._levels, self._skipped = levels, skipped
        skips = any(kind.skips_layers for kind in levels) and not self.keeps_graph
        alike = all(kind.skips_layers or level == self._levels[kind] for kind, level in levels.items())
        ablated = len(boundary.stack.layers) if skips and alike else boundary.first
        return min(ablated, *(skipped ^ self._skipped), ablated)

    def begin_run(self, walk: Walk) -> int:
        """The number of the shared call that comes first when a forward runs the model once more."""
        if walk.records and not walk.is_recomputed:
            self._begins.append(len(self._returned))
        return self._begins[walk.crossings - 1] if walk.crossings <= len(self._begins) else len(self._returned)

    def call(self, walk: Walk, module: nn.Module, original: Callable, args: tuple, kwargs: dict[str, Any]) -> Any:
        """A shared module's call."""
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
        # After the boundary was crossed, inputs of a second run of the model may depend on the first one's outputs.
        taken = [tensor.detach() for tensor in _tensors((args, kwargs))] if walk.crossings else None
        self._returned.append(_Returned(module, kept, versions, after if has_drawn else None, taken))
        return output

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
        if returned.taken is not None and not _all_equal(returned.taken, _tensors((args, kwargs))):
            raise CannotShare(f"{type(module).__name__} is called on other inputs than in the full model.")
        output = tree_map(self._leaf if self.returns_leaves else _same, returned.output)
        if module in walk.boundary.written:
            output = tree_map(_copy, output)
        _show_to_hooks(module, output, args, kwargs)
        if returned.drawn is not None:
            for device, state in zip(walk.devices, returned.drawn, strict=True):
                set_generator_state(device, state)
        return output

    def _leaf(self, value: Any) -> Any:
        if not isinstance(value, Tensor) or not value.requires_grad:
            return value
        if id(value) not in self._leaves:
            self._leaves[id(value)] = value, value.detach().requires_grad_()
        return self._leaves[id(value)][1]


def lower_parts(
    kinds: Sequence[Ablation], variants: Iterable[tuple[int, ...]], boundary: Boundary
) -> dict[tuple[int, ...], Lower]:
    """By the levels of each variant, what it shares with others: variants share layers where they differ only in kinds
    that skip layers, or that leave those below a boundary alone. A variant that differs from all others shares
    nothing."""
    groups: dict[tuple, list[tuple[int, ...]]] = {}
    for levels in variants:
        pairs = zip(kinds, levels, strict=True)
        leaves = boundary.num_layers is not None
        own = (level for kind, level in pairs if not (kind.skips_layers or (leaves and kind.leaves_lower_layers)))
        groups.setdefault(tuple(own), []).append(levels)
    shared = [(group, Lower()) for group in groups.values() if len(group) > 1]
    return {levels: lower for group, lower in shared for levels in group}


class NotedShapes(Below):
    """Runs the modules below the boundary, and notes the first dimension of each tensor that they take and return.

    Args:
        rows: how many rows the batch has.
    """

    def __init__(self, rows: int) -> None:
        self.rows = rows
        self.noted: list[tuple[nn.Module, list[int | None], list[int | None]]] = []

    def call(self, walk: Walk, module: nn.Module, original: Callable, args: tuple, kwargs: dict[str, Any]) -> Any:
        """Runs it and notes the shapes."""
        output = original(*args, **kwargs)
        self.noted.append((module, _first_dimensions((args, kwargs)), _first_dimensions(output)))
        return output


class FirstGroup(Below):
    """The modules below the boundary run on the first group of a stacked batch, `(groups * batch, …)`, whose other
    groups are equal to it there; what they return is repeated for all groups.

    Args:
        rows, num_groups: of the stacked batch.
        single, stacked: the shapes in a forward of a batch, and in one of a stacked batch; they show which tensors
            have rows, and how many for each row of the batch.

    Raises:
        CannotShare: some other number changes with the number of rows. When it runs: a batch that is passed in
            another way than those.
    """

    def __init__(self, rows: int, num_groups: int, single: NotedShapes, stacked: NotedShapes) -> None:
        self.rows, self.num_groups = rows, num_groups
        if [module for module, *_ in single.noted] != [module for module, *_ in stacked.noted]:
            raise CannotShare("a stacked forward calls other modules.")
        self.calls = [
            (module, *(_sizes(one, other, single.rows, stacked.rows) for one, other in zip(here, there, strict=True)))
            for (module, *here), (_, *there) in zip(single.noted, stacked.noted, strict=True)
        ]
        self._repeated: dict[int, tuple[Tensor, Tensor, int]] = {}

    def call(self, walk: Walk, module: nn.Module, original: Callable, args: tuple, kwargs: dict[str, Any]) -> Any:
        """Runs it on the first group."""
        if walk.shared >= len(self.calls) or self.calls[walk.shared][0] is not module:
            raise CannotShare(f"it calls {type(module).__name__} where the first batch did not.")
        _, taken, returned = self.calls[walk.shared]
        args, kwargs = self._each(self._first, (args, kwargs), taken, self.rows)
        return self._each(self._repeat, original(*args, **kwargs), returned, self.rows // self.num_groups)

    def _each(self, change: Callable[[Tensor], Tensor], value: Any, noted: list[_Size], rows: int) -> Any:
        """Change the tensors that have rows, which are those of the first batch."""
        leaves, structure = tree_flatten(value)
        sizes, by_row = _first_dimensions(value), {size.rows_each * rows for size in noted if size.rows_each}
        if len(sizes) != len(noted) or not all(
            size.is_alike(one, rows, by_row) for one, size in zip(sizes, noted, strict=True)
        ):
            raise CannotShare("its lower layers take or return other shapes than on the first batch.")
        changed = [change(leaf) if size.rows_each else leaf for leaf, size in zip(leaves, noted, strict=True)]
        return tree_unflatten(changed, structure)

    def _first(self, stacked: Tensor) -> Tensor:
        repeated, tensor, version = self._repeated.get(id(stacked), (None, stacked, 0))
        if repeated is not None and repeated._version == version:
            return tensor
        return stacked.narrow(0, 0, len(stacked) // self.num_groups)

    def _repeat(self, tensor: Tensor) -> Tensor:
        repeated = torch.cat([tensor] * self.num_groups)
        self._repeated[id(repeated)] = repeated, tensor, repeated._version
        return repeated


class _Size(NamedTuple):
    """The first dimension of a value on the first batch: how many rows it has for one of the batch, 0 where it has
    none; and its size, None where it is no tensor."""

    rows_each: float
    size: int | None

    def is_alike(self, size: int | None, rows: int, by_row: set[float]) -> bool:
        """Whether a size on another batch has rows where this one does; `by_row` are the sizes of what has rows."""
        if self.rows_each:
            return size == self.rows_each * rows
        return size == self.size or (size is not None and self.size is not None and size not in by_row)


def _sizes(single: list[int | None], stacked: list[int | None], rows: int, all_rows: int) -> list[_Size]:
    """From the first dimensions in a forward of a batch, and in one of a stacked batch.

    Raises:
        CannotShare: some other number changes with the number of rows.
    """
    if len(single) != len(stacked):
        raise CannotShare("not all that its lower layers take and return is by row.")
    sizes = []
    for one, other in zip(single, stacked, strict=True):
        if one == other:
            sizes.append(_Size(0, one))
        elif one is not None and other is not None and one * all_rows == other * rows:
            sizes.append(_Size(one / rows, one))
        else:
            raise CannotShare("not all that its lower layers take and return is by row.")
    return sizes


class _Returned(NamedTuple):
    module: nn.Module
    output: Any
    versions: list[int]
    drawn: list[Tensor] | None  # the states of PyTorch's generators after a call that drew
    taken: list[Tensor] | None  # its inputs, where they may not be those of all variants


def _same(value: Any) -> Any:
    return value


def _first_dimensions(value: Any) -> list[int | None]:
    return [len(leaf) if isinstance(leaf, Tensor) and leaf.ndim else None for leaf in tree_leaves(value)]


def _all_equal(some: Sequence[Tensor], others: Sequence[Tensor]) -> bool:
    pairs = list(zip(some, others, strict=False))
    return len(some) == len(others) and all(
        one.shape == other.shape and torch.equal(one, other) for one, other in pairs
    )


def _copy(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value


def _tensors(value: Any) -> Sequence[Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor) and not leaf.is_inference()]


def _show_to_hooks(module: nn.Module, output: Any, args: tuple, kwargs: dict[str, Any]) -> None:
    """Call the module's hooks with an output that was kept: models collect hidden states in them. What they return is
    in that output already. Those of FSDP gather weights, which are not needed."""
    if not module._forward_hooks or hasattr(module, "_get_fsdp_state"):
        return
    attributes = vars(module)
    before = attributes.get("forward")
    attributes["forward"] = lambda *args, **kwargs: output
    try:
        module._call_impl(*args, **kwargs)
    finally:
        if before is None:
            del attributes["forward"]
        else:
            attributes["forward"] = before
