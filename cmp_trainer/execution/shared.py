"""Shared layers: what lies below the ablated layers runs once for all variants of a step.

With the top N layers ablated, all variants compute the same thing below them. So

    (1) the first forward of a step keeps what each module below the boundary returned;
    (2) in the forwards after it, these modules return that in place of being run;
    (3) the losses of all variants are functions of one lower graph, whose backward runs once.

Below the boundary is all that a forward does before it calls the first of the top N layers: embeddings, lower
layers, and the other stacks of a model (the encoder of an encoder-decoder, the image tower of a language model).
Dropout is off there, in every variant. Whatever is called after that, the head included, is ablated.

Modules are intercepted by the attribute in which torch.compile keeps a compiled call; it is put back when the forward
ends, also when it raises. Nothing else of the model is touched.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

from cmp_trainer.ablations.protocol import Ablation
from cmp_trainer.execution.layers import Stack
from cmp_trainer.execution.random_state import RandomState, generator_state, set_generator_state
from cmp_trainer.losses.shares import CannotCompare

_CALL = "_compiled_call_impl"


class CannotShare(CannotCompare):
    """The layers below the boundary do not run alike in all variants."""


class Boundary:
    """The line below the top layers of a stack.

    Args:
        stack: where the layers are.
        num_layers: how many of them are ablated.
    """

    def __init__(self, stack: Stack, num_layers: int) -> None:
        self.stack, self.num_layers = stack, num_layers
        self.first = len(stack.layers) - num_layers
        """The number of the first layer that is ablated."""
        self.written: set[nn.Module] = set()
        """Modules into whose outputs the model writes afterwards: each variant gets copies."""

    @property
    def modules(self) -> list[nn.Module]:
        """The layers, and all else that is called beside them, each once."""
        return list(dict.fromkeys((*self.stack.layers, *self.stack.beside)))


class Place(NamedTuple):
    """How far a forward has come."""

    records: bool
    below: bool
    layer: int
    shared: int
    crossings: int


class Lower:
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


class NotedShapes(Lower):
    """Runs the modules below the boundary, and notes the first dimension of each tensor that they take and return."""

    def __init__(self) -> None:
        super().__init__()
        self.noted: list[tuple[list[int | None], list[int | None]]] = []

    def call(self, walk: Walk, module: nn.Module, original: Callable, args: tuple, kwargs: dict[str, Any]) -> Any:
        """Runs it and notes the shapes."""
        output = original(*args, **kwargs)
        self.noted.append((_first_dimensions((args, kwargs)), _first_dimensions(output)))
        return output

    def cross(self, walk: Walk) -> None:
        """Nothing is shared."""


class FirstGroup(Lower):
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
        super().__init__()
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

    def cross(self, walk: Walk) -> None:
        """All groups go on together."""

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


class Walk:
    """One forward's way from below the boundary to above it; a context in which the modules are intercepted.

    Args:
        boundary: the boundary.
        lower: shares what is below the boundary with other forwards; None where each runs it for itself.
        devices: those whose generators are shared.
        switch: is told whether the forward is below the boundary whenever that changes.
        place: where to begin, for a part of a forward that is recomputed in backward.
    """

    def __init__(
        self,
        boundary: Boundary,
        lower: Lower | None,
        devices: Iterable[torch.device],
        switch: Callable[[bool], None],
        place: Place | None = None,
    ) -> None:
        self.boundary, self.lower = boundary, lower
        self.devices = list(dict.fromkeys([torch.device("cpu"), *devices]))
        self.is_recomputed = place is not None
        records = lower is not None and not lower.is_recorded
        self.records, self.below, self.layer, self.shared, self.crossings = place or Place(records, True, 0, 0, 0)
        self._switch = switch
        self._has_grad = torch.is_grad_enabled()
        self._is_below(self.below)
        self._is_inside = False  # of a module that is shared as a whole
        self._is_reentrant = False
        self._before: list[tuple[nn.Module, bool, Any]] = []

    @property
    def place(self) -> Place:
        return Place(self.records, self.below, self.layer, self.shared, self.crossings)

    def __enter__(self) -> Walk:
        stack = self.boundary.stack
        calls = dict.fromkeys(stack.beside, self._beside) | dict.fromkeys(stack.layers, self._layer)
        calls |= dict.fromkeys(stack.path, self._on_path) | {stack.path[-1]: self._owner}
        for module, call in calls.items():
            attributes = vars(module)
            self._before.append((module, _CALL in attributes, attributes.get(_CALL)))
            original = attributes.get(_CALL) or module._call_impl
            attributes[_CALL] = partial(call, module, original)
        return self

    def __exit__(self, *error: Any) -> None:
        for module, was_there, before in self._before:
            if was_there:
                vars(module)[_CALL] = before
            else:
                vars(module).pop(_CALL, None)
        self._before = []
        torch.set_grad_enabled(self._has_grad)

    @contextmanager
    def reentrant(self) -> Iterator[None]:
        """What runs in the body is checkpointed reentrantly: without a graph, which is made in backward."""
        before, self._is_reentrant = self._is_reentrant, True
        try:
            yield
        finally:
            self._is_reentrant = before

    # --- calls of modules ---

    def _on_path(self, module: nn.Module, original: Callable, *args: Any, **kwargs: Any) -> Any:
        if not self._is_inside:
            self.layer = 0
            self._is_below(True)
        return original(*args, **kwargs)

    def _owner(self, module: nn.Module, original: Callable, *args: Any, **kwargs: Any) -> Any:
        output = self._on_path(module, original, *args, **kwargs)
        if not self._is_inside and self.below:  # all of the top layers were left out by layer drop
            self._cross()
        return output

    def _layer(self, module: nn.Module, original: Callable, *args: Any, **kwargs: Any) -> Any:
        if self._is_inside or not self.below:
            return original(*args, **kwargs)
        layers = self.boundary.stack.layers
        self.layer = next((n for n in range(self.layer, len(layers)) if layers[n] is module), self.layer) + 1
        if self.layer > self.boundary.first:
            self._cross()
            return original(*args, **kwargs)
        return self._shared(module, original, args, kwargs)

    def _beside(self, module: nn.Module, original: Callable, *args: Any, **kwargs: Any) -> Any:
        if self._is_inside or not self.below:
            return original(*args, **kwargs)
        return self._shared(module, original, args, kwargs)

    def _cross(self) -> None:
        if self.lower is not None:
            self.lower.cross(self)
        self.crossings += 1
        self._is_below(False)

    def _is_below(self, below: bool) -> None:
        self.below = below
        self._switch(below)
        if self.lower is not None and self.lower.keeps_graph and self.records:
            torch.set_grad_enabled(below or self._has_grad)  # also for what the model computes between its modules

    def _shared(self, module: nn.Module, original: Callable, args: tuple, kwargs: dict[str, Any]) -> Any:
        self._is_inside = True
        try:
            if self.lower is None:
                return original(*args, **kwargs)
            if self._is_reentrant:
                raise CannotShare(
                    "reentrant gradient checkpointing hides the graph of the shared layers; use "
                    "gradient_checkpointing_kwargs={'use_reentrant': False}."
                )
            output = self.lower.call(self, module, original, args, kwargs)
            self.shared += 1
            return output
        finally:
            self._is_inside = False


def check_crossed(walk: Walk) -> None:
    """Raises a CannotCompare where a forward never reached the layers that it should ablate."""
    if not walk.crossings:
        raise CannotCompare(
            f"a forward did not call the layers of {walk.boundary.stack.name} one by one, so only the top "
            f"{walk.boundary.num_layers} of them cannot be ablated. Where torch.compile was applied to a part of the "
            "model, apply it to the whole model (torch.compile(model) or --torch_compile), or leave out "
            "--cmp_ablated_layers."
        )


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
