"""A forward under ablation: the one place where the random state is restored and the ablations are entered.

Training, evaluation, curves and the recomputation of gradient checkpointing all run their forwards inside of an
`Ablated`. It can be entered again after it was left, also in another thread, and then takes away the same neurons.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

from cmp_trainer.ablations.drop import CmpDrop
from cmp_trainer.ablations.protocol import Ablation, Handler
from cmp_trainer.execution.intercept import Intercept
from cmp_trainer.execution.random_state import RandomState, preserve_rng_state
from cmp_trainer.execution.recompute import recompute_inside

_WITHOUT_DROPOUT = CmpDrop().calls(0)


class Ablated:
    """Context in which a forward runs at a level of every kind of ablation.

    Args:
        kinds: the kinds of ablation.
        levels: the level of each.
        start: the random state the forward starts from; as it is when entered where None.
        calls: further torch functions to intercept (the reductions of a loss).
        others: a handler of all other torch functions.
    """

    def __init__(
        self,
        kinds: Sequence[Ablation],
        levels: Sequence[int],
        start: RandomState | None = None,
        calls: Mapping[Callable, Handler] | None = None,
        others: Handler | None = None,
    ) -> None:
        self.kinds, self.levels, self.start = list(kinds), list(levels), start
        # Dropout belongs to CmpDrop: without it, or at level 0, every variant runs without dropout.
        self.handlers: dict[Callable, Handler] = {**_WITHOUT_DROPOUT, **(calls or {})}
        for kind, level in zip(self.kinds, self.levels, strict=True):
            self.handlers |= kind.calls(level)
        self.others = others
        self._entered: list[ExitStack] = []

    @property
    def is_entered(self) -> bool:
        return bool(self._entered)

    def __enter__(self) -> Ablated:
        with ExitStack() as stack:
            if self.start is not None and not self._entered:
                self.start.restore()
            for kind, level in zip(self.kinds, self.levels, strict=True):
                stack.enter_context(kind.context(level))
            stack.enter_context(recompute_inside(self))
            stack.enter_context(Intercept(self.handlers, self.others))
            self._entered.append(stack.pop_all())
        return self

    def __exit__(self, *error: Any) -> bool | None:
        return self._entered.pop().__exit__(*error)

    def recompute(self, function: Callable, args: tuple, kwargs: dict[str, Any]) -> Any:
        """Call a part of the forward a second time, in backward, where its own random state has been restored."""
        if self._entered:
            return function(*args, **kwargs)
        devices = self.start.devices if self.start is not None else ()
        with ExitStack() as stack:
            with preserve_rng_state(devices) as now:
                stack.enter_context(self)  # `context` draws what it drew at the start of the forward
            now.restore()
            return function(*args, **kwargs)
