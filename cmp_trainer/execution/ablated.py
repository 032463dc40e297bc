"""A forward under ablation: the one place where the random state is restored and the ablations are entered.

Training, evaluation, curves and the recomputation of gradient checkpointing all run their forwards inside of an
`Ablated`. It can be entered again after it was left, also in another thread, and then takes away the same neurons.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch

from cmp_trainer.ablations.drop import CmpDrop
from cmp_trainer.ablations.protocol import Ablation, Handler
from cmp_trainer.ablations.skip import SkipLayers
from cmp_trainer.execution.boundary import Below, Boundary, Place, Walk, check_crossed
from cmp_trainer.execution.intercept import Intercept
from cmp_trainer.execution.layers import Stack
from cmp_trainer.execution.random_state import RandomState, preserve_rng_state
from cmp_trainer.execution.recompute import recompute_inside

_WITHOUT_DROPOUT = CmpDrop().calls(0)
_SEEDS = 2**62


class Ablated:
    """Context in which a forward runs at a level of every kind of ablation.

    Args:
        kinds: the kinds of ablation.
        levels: the level of each.
        start: the random state the forward starts from; as it is when entered where None.
        calls: further torch functions to intercept (the reductions of a loss).
        others: a handler of all other torch functions.
        boundary: where in its stack the model is ablated; None where neurons of the whole model are.
        lower: what is done with the modules that are shared with other forwards, where any are.
    """

    def __init__(
        self,
        kinds: Sequence[Ablation],
        levels: Sequence[int],
        start: RandomState | None = None,
        calls: Mapping[Callable, Handler] | None = None,
        others: Handler | None = None,
        boundary: Boundary | None = None,
        lower: Below | None = None,
    ) -> None:
        self.kinds, self.levels, self.start = list(kinds), list(levels), start
        # Dropout belongs to CmpDrop: without it, or at level 0, every variant runs without dropout.
        self.handlers: dict[Callable, Handler] = {**_WITHOUT_DROPOUT, **(calls or {})}
        for kind, level in zip(self.kinds, self.levels, strict=True):
            self.handlers |= kind.calls(level)
        self.others, self.boundary, self.lower = others, boundary, lower
        self._below = {**self.handlers, **_WITHOUT_DROPOUT}
        self._walk: Walk | None = None
        self._entered: list[ExitStack] = []

    @property
    def is_entered(self) -> bool:
        """Whether a forward, or a part of it that is recomputed, is under way."""
        return bool(self._entered)

    @property
    def place(self) -> Place | None:
        """How far the forward has come; None without a boundary."""
        return None if self._walk is None else self._walk.place

    def __enter__(self) -> Ablated:
        self._enter()
        return self

    def _enter(self, place: Place | None = None) -> None:
        with ExitStack() as stack:
            if self.start is not None and not self._entered:
                self.start.restore()
            skipped: set[int] = set()
            for kind, level in zip(self.kinds, self.levels, strict=True):
                stack.enter_context(kind.context(level))
                if kind.skips_layers and self.boundary is not None:
                    skipped |= {*kind.skipped_layers(level, len(self.boundary.stack.layers))}
            stack.enter_context(recompute_inside(self))
            intercept = Intercept(self.handlers, self.others)
            if self.boundary is not None:
                below, upper = self._below, self.handlers  # `self` would make a cycle, which holds the lower layers

                def switch(is_below: bool) -> None:
                    intercept.handlers = below if is_below else upper

                self._walk = stack.enter_context(self._walk_through(self.boundary, frozenset(skipped), switch, place))
            stack.enter_context(intercept)
            self._entered.append(stack.pop_all())

    def __exit__(self, kind: Any, *error: Any) -> bool | None:
        self._entered.pop().__exit__(kind, *error)
        if kind is None and self._walk is not None and not self._walk.is_recomputed:
            check_crossed(self._walk)
            if self.lower is not None:
                self.lower.is_recorded = True

    def recompute(
        self, function: Callable, args: tuple, kwargs: dict[str, Any], place: Place | None, reentrant: bool
    ) -> Any:
        """Call a checkpointed part of the forward again, in backward, where its own random state has been restored;
        or, where the checkpoint is reentrant, also the first time."""
        if self._entered and (self._walk is None or place is None):
            return function(*args, **kwargs)
        if self._entered and self._walk is not None and place is not None:
            with self._walk.reentrant() if reentrant else self._walk.recomputed(place):
                return function(*args, **kwargs)
        with ExitStack() as stack:
            with preserve_rng_state(self._devices) as now:
                self._enter(place)  # `context` draws what it drew at the start of the forward
                stack.push(self)
            now.restore()
            return function(*args, **kwargs)

    def _walk_through(
        self, boundary: Boundary, skipped: frozenset[int], switch: Callable[[bool], None], place: Place | None
    ) -> Walk:
        levels = dict(zip(self.kinds, self.levels, strict=True))
        depth = 0 if self.lower is None else self.lower.depth(boundary, levels, skipped)
        seed = int(torch.randint(_SEEDS, ())) if any(kind.skips_layers for kind in self.kinds) else None
        return Walk(boundary, self.lower, depth, skipped, seed, self._devices, switch, place)

    @property
    def _devices(self) -> Iterable[torch.device]:
        return self.start.devices if self.start is not None else ()


def without_layers(stack: Stack, layers: Collection[int]) -> Ablated:
    """Context in which a model runs without some layers of its stack, and without dropout.

    Args:
        layers: their numbers, from 0 on.
    """
    return Ablated([SkipLayers(layers)], [1], boundary=Boundary(stack))
