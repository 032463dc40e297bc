"""A trainer's chain of compute_loss as the loss function of a step.

Subclasses, label smoothing, a compute_loss_func: what a Trainer minimizes is what its outermost `compute_loss`
returns. That chain is run once for each variant, and only one run of the full variant leaves traces on the trainer.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

from torch import Tensor, nn

from cmp_trainer.ablations.crop import SEGMENTS
from cmp_trainer.execution.traces import no_traces


class ChainLoss:
    """`loss_fn(model, batch)` of a step.

    Args:
        trainer: a CmpTrainer.
        chain: its compute_loss, a bound method.
        return_outputs: whether the outputs are wanted too; they are in `outputs` then.
        leaves_traces: whether the first run after `begin` leaves traces on the trainer.
        **kwargs: further arguments of the chain.
    """

    def __init__(
        self,
        trainer: Any,
        chain: Callable[..., Any],
        return_outputs: bool = False,
        leaves_traces: bool = False,
        **kwargs: Any,
    ) -> None:
        self.trainer, self.chain, self.kwargs, self.return_outputs = trainer, chain, kwargs, return_outputs
        self.outputs: Any = None
        self._leaves_traces, self._is_first = leaves_traces, False
        # Code of others may look at the whole batch, or keep what it finds.
        owners = [kind.__module__ for kind in self._owners]
        self.stackable = owners == ["cmp_trainer.trainer", "transformers.trainer"]

    @property
    def _owners(self) -> list[type]:
        """The classes whose compute_loss makes up the chain."""
        return [kind for kind in type(self.trainer).__mro__ if "compute_loss" in vars(kind)]

    @property
    def __name__(self) -> str:
        return f"{type(self.trainer).__name__}.compute_loss (of {', '.join(one.__name__ for one in self._owners)})"

    def begin(self) -> None:
        """The step itself begins here; the runs before it were checks."""
        self._is_first = True

    def __call__(self, model: nn.Module, batch: Any) -> Tensor:
        is_first, self._is_first = self._is_first, False
        self.trainer.loss_depth += 1
        try:
            with nullcontext() if is_first and self._leaves_traces else no_traces(self.trainer):
                result = self.chain(model, batch, return_outputs=self.return_outputs, **self.kwargs)
        finally:
            self.trainer.loss_depth -= 1
        loss, outputs = result if isinstance(result, tuple) else (result, None)
        if is_first or not self._leaves_traces:
            self.outputs = outputs
        return loss


@contextmanager
def shadowed(trainer: Any, **methods: Any) -> Iterator[None]:
    """In the body, methods of this one object are replaced, whichever of its classes defines them."""
    before = {name: vars(trainer)[name] for name in methods if name in vars(trainer)}
    vars(trainer).update(methods)
    try:
        yield
    finally:
        for name in methods:
            vars(trainer).pop(name, None)
        vars(trainer).update(before)


def without_segments(inputs: Any) -> Any:
    """The batch without `crop_segments`, which only crops read."""
    if isinstance(inputs, Mapping) and SEGMENTS in inputs:
        return {name: value for name, value in inputs.items() if name != SEGMENTS}
    return inputs


def accepted_columns(model: nn.Module, inputs: Mapping[str, Any]) -> Mapping[str, Any]:
    """The columns that the model's forward takes; the others are for the user's loss."""
    parameters = inspect.signature(model.forward).parameters
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        return inputs
    return {name: value for name, value in inputs.items() if name in parameters}
