"""The boundary below the top layers of a model, and a forward's way over it.

Below the boundary is all that a forward does before it calls the first of the top N layers: embeddings, lower
layers, and the other stacks of a model (the encoder of an encoder-decoder, the image tower of a language model).
Dropout is off there, in every variant. Whatever is called after that, the head included, is ablated.

Modules are intercepted by the attribute in which torch.compile keeps a compiled call; it is put back when the forward
ends, also when it raises. Nothing else of the model is touched.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn

from cmp_trainer.execution.layers import Stack
from cmp_trainer.losses.shares import CannotCompare

_CALL = "_compiled_call_impl"
REENTRANT = (
    "reentrant gradient checkpointing hides the graph of the lower layers; pass --gradient_checkpointing_kwargs "
    "'{\"use_reentrant\": false}'."
)


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


class Below:
    """What is done with the modules that are called below a boundary; by itself, they are run.

    Attributes:
        is_recorded: whether a first forward has gone all its way.
        keeps_graph: whether that one keeps the graph below the boundary where it runs without one.
    """

    is_recorded = False
    keeps_graph = False

    def call(self, walk: Walk, module: nn.Module, original: Callable, args: tuple, kwargs: dict[str, Any]) -> Any:
        """A module's call below the boundary."""
        return original(*args, **kwargs)


class Walk:
    """One forward's way from below the boundary to above it; a context in which the modules are intercepted.

    Args:
        boundary: the boundary.
        lower: what is done below the boundary, where that is shared with other forwards.
        devices: those whose generators are shared.
        switch: is told whether the forward is below the boundary whenever that changes.
        place: where to begin, for a part of a forward that is recomputed in backward.
    """

    def __init__(
        self,
        boundary: Boundary,
        lower: Below | None,
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
        """How far the forward has come."""
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

    @contextmanager
    def recomputed(self, place: Place) -> Iterator[None]:
        """What was checkpointed at a place is run again in the body, while the forward is still under way (for a
        gradient that a loss is made of)."""
        now, was_recomputed = self.place, self.is_recomputed
        try:
            self._go_to(place, True)
            yield
        finally:
            self._go_to(now, was_recomputed)

    def _go_to(self, place: Place, is_recomputed: bool) -> None:
        self.records, self.below, self.layer, self.shared, self.crossings = place
        self.is_recomputed = is_recomputed
        self._switch(self.below)

    # --- calls of modules ---

    def _on_path(self, module: nn.Module, original: Callable, *args: Any, **kwargs: Any) -> Any:
        if not self._is_inside:
            self.layer = 0
            self._is_below(True)
        return original(*args, **kwargs)

    def _owner(self, module: nn.Module, original: Callable, *args: Any, **kwargs: Any) -> Any:
        output = self._on_path(module, original, *args, **kwargs)
        was_seen = self.layer or original == module._call_impl  # not compiled as a whole
        if not self._is_inside and self.below and was_seen:  # layer drop left out all of the top layers
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
        self.crossings += 1
        self._is_below(False)

    def _is_below(self, below: bool) -> None:
        self.below = below
        self._switch(below)
        if self.lower is not None and self.lower.keeps_graph and self.records and not self._has_grad:
            torch.set_grad_enabled(below)  # also for what the model computes between its modules

    def _shared(self, module: nn.Module, original: Callable, args: tuple, kwargs: dict[str, Any]) -> Any:
        self._is_inside = True
        try:
            if self.lower is None:
                return original(*args, **kwargs)
            if self._is_reentrant:
                raise CannotShare(REENTRANT)
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
            f"{walk.boundary.num_layers} of them cannot be ablated. Every batch has to run these layers; where "
            "torch.compile was applied to a part of the model, apply it to the whole model (torch.compile(model) or "
            "--torch_compile). Or leave out --cmp_ablated_layers."
        )
