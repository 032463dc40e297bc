"""A forward's way through the layers of a model: where dropout begins, which layers are skipped, what is shared.

Where only the top N layers are ablated, a boundary lies below them. Below it is all that a forward does before it
calls the first of these layers: embeddings, lower layers, and the other stacks of a model (the encoder of an
encoder-decoder, the image tower of a language model). Dropout is off there, in every variant. Whatever is called after
that, the head included, is ablated. A skipped layer is not computed and passes its input through.

Up to the first layer in which two forwards differ, they can share what modules return (shared.py).

Modules are intercepted by the attribute in which torch.compile keeps a compiled call; it is put back when the forward
ends, also when it raises. Nothing else of the model is touched.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn

from cmp_trainer.ablations.protocol import Ablation
from cmp_trainer.execution.layers import Stack
from cmp_trainer.execution.random_state import seed_generator
from cmp_trainer.losses.shares import CannotCompare

_CALL = "_compiled_call_impl"
REENTRANT = (
    "reentrant gradient checkpointing hides the graph of the lower layers; pass --gradient_checkpointing_kwargs "
    "'{\"use_reentrant\": false}'."
)


class CannotShare(CannotCompare):
    """The layers that variants have in common do not run alike in all of them."""


class Boundary:
    """Where in its stack of layers a model is ablated.

    Args:
        stack: where the layers are.
        num_layers: how many of the top ones are ablated; None where dropout is on in the whole model.
    """

    def __init__(self, stack: Stack, num_layers: int | None = None) -> None:
        self.stack, self.num_layers = stack, num_layers
        self.first = 0 if num_layers is None else len(stack.layers) - num_layers
        """The number of the first layer in which neurons are ablated."""
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
    shares: bool
    layer: int
    shared: int
    crossings: int
    runs: int


class Below:
    """What is done with the modules that variants have in common; by itself, they are run.

    Attributes:
        is_recorded: whether a first forward has gone all its way.
        keeps_graph: whether that one keeps the graph of these modules where it runs without one.
    """

    is_recorded = False
    keeps_graph = False

    def depth(self, boundary: Boundary, levels: Mapping[Ablation, int], skipped: frozenset[int]) -> int:
        """The number of the first layer that a forward at some levels does not share."""
        return boundary.first

    def begin_run(self, walk: Walk) -> int:
        """The number of the shared call that comes first when a forward runs the model once more."""
        return walk.shared

    def call(self, walk: Walk, module: nn.Module, original: Callable, args: tuple, kwargs: dict[str, Any]) -> Any:
        """A module's call that is shared."""
        return original(*args, **kwargs)


class Walk:
    """One forward's way through the stack; a context in which the modules are intercepted.

    Args:
        boundary: where the layers are ablated.
        lower: what is done with the modules that are shared with other forwards, where any are.
        depth: the number of the first layer that is not shared.
        skipped: the numbers of the layers that are left out.
        seed: of the layers' random numbers where some may be left out, so that each layer, and what follows the stack,
            draws the same numbers whatever ran before it; None where the layers draw one after the other.
        devices: those whose generators are shared.
        switch: is told whether the forward is below the boundary whenever that changes.
        place: where to begin, for a part of a forward that is recomputed in backward.
    """

    def __init__(
        self,
        boundary: Boundary,
        lower: Below | None,
        depth: int,
        skipped: frozenset[int],
        seed: int | None,
        devices: Iterable[torch.device],
        switch: Callable[[bool], None],
        place: Place | None = None,
    ) -> None:
        self.boundary, self.lower, self.depth, self.skipped, self.seed = boundary, lower, depth, skipped, seed
        self.devices = list(dict.fromkeys([torch.device("cpu"), *devices]))
        self.is_recomputed = place is not None
        self.is_at_layers = False  # whether a layer was called, or all that are ablated were left out
        start = Place(lower is not None and not lower.is_recorded, self._begins_below, lower is not None, 0, 0, 0, 0)
        self._has_grad = torch.is_grad_enabled()
        self._switch = switch
        self._go_to(place or start, self.is_recomputed)
        self._keep_graph(self.shares)
        self._is_inside = False  # of a module that is shared as a whole
        self._is_reentrant = False
        self._before: list[tuple[nn.Module, bool, Any]] = []

    @property
    def place(self) -> Place:
        """How far the forward has come."""
        return Place(self.records, self.below, self.shares, self.layer, self.shared, self.crossings, self.runs)

    @property
    def _begins_below(self) -> bool:
        return self.boundary.num_layers is not None

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
        self.records, self.below, self.shares, self.layer, self.shared, self.crossings, self.runs = place
        self.is_recomputed = is_recomputed
        self._switch(self.below)

    # --- calls of modules ---

    def _on_path(self, module: nn.Module, original: Callable, *args: Any, **kwargs: Any) -> Any:
        if not self._is_inside:
            self.layer = 0
            self._is_below(self._begins_below)
            if self.lower is not None and not self.shares:  # the model is run once more
                self.shares, self.shared = True, self.lower.begin_run(self)
                self._keep_graph(True)
        return original(*args, **kwargs)

    def _owner(self, module: nn.Module, original: Callable, *args: Any, **kwargs: Any) -> Any:
        self.runs += not self._is_inside
        output = self._on_path(module, original, *args, **kwargs)
        was_seen = self.layer or original == module._call_impl  # not compiled as a whole
        if not self._is_inside and was_seen and self.layer < len(self.boundary.stack.layers):
            self._begin(len(self.boundary.stack.layers))  # layer drop left out the top layers
        return output

    def _layer(self, module: nn.Module, original: Callable, *args: Any, **kwargs: Any) -> Any:
        if self._is_inside:
            return original(*args, **kwargs)
        layers = self.boundary.stack.layers
        found = next((n for n in range(self.layer, len(layers)) if layers[n] is module), None)
        number = self.layer if found is None else found
        self.layer = number + 1
        self._begin(number)
        if found in self.skipped:
            output = self._carried(number, args, kwargs)
        else:
            output = self._beside(module, original, *args, **kwargs)
        if self.layer == len(layers):
            self._begin(self.layer)
        return output

    def _carried(self, number: int, args: tuple, kwargs: dict[str, Any]) -> Any:
        carry = self.boundary.stack.carries[number]
        if carry is None:
            name = f"layer {number} of {self.boundary.stack.name}"
            raise CannotCompare(f"{name} cannot be skipped: it changes the shape of what it is given.")
        return carry(args, kwargs)

    def _begin(self, number: int) -> None:
        """A layer begins, or what follows the last one."""
        self._cross(number)
        if self.seed is not None:
            of_run = self.seed + self.runs * (1 + len(self.boundary.stack.layers))
            for device in self.devices:
                seed_generator(device, of_run + number)

    def _beside(self, module: nn.Module, original: Callable, *args: Any, **kwargs: Any) -> Any:
        if self._is_inside or not (self.below or self.shares):
            return original(*args, **kwargs)
        self._is_inside = True
        try:
            return self._shared(module, original, args, kwargs) if self.shares else original(*args, **kwargs)
        finally:
            self._is_inside = False

    def _cross(self, number: int) -> None:
        """Leave what lies below a layer that is about to be called."""
        if number >= self.boundary.first:
            self.is_at_layers = True
            if self.below:
                self._is_below(False)
        if self.shares and number >= self.depth:
            self.shares = False
            self.crossings += 1
            self._keep_graph(False)

    def _is_below(self, below: bool) -> None:
        self.below = below
        self._switch(below)

    def _keep_graph(self, keep: bool) -> None:
        if self.lower is not None and self.lower.keeps_graph and self.records and not self._has_grad:
            torch.set_grad_enabled(keep)  # also for what the model computes between its modules

    def _shared(self, module: nn.Module, original: Callable, args: tuple, kwargs: dict[str, Any]) -> Any:
        if self._is_reentrant:
            raise CannotShare(REENTRANT)
        assert self.lower is not None
        output = self.lower.call(self, module, original, args, kwargs)
        self.shared += 1
        return output


def check_crossed(walk: Walk) -> None:
    """Raises a CannotCompare where a forward never reached the layers that it should ablate or skip."""
    if not walk.is_at_layers:
        number, name = walk.boundary.num_layers, walk.boundary.stack.name
        what = f"the top {number} of them cannot be ablated" if number is not None else "none of them can be skipped"
        fix = "leave out --cmp_ablated_layers" if number is not None else "use ablations that drop or crop"
        raise CannotCompare(
            f"a forward did not call the layers of {name} one by one, so {what}. Every batch has to run these layers; "
            "where torch.compile was applied to a part of the model, apply it to the whole model "
            f"(torch.compile(model) or --torch_compile). Or {fix}."
        )
