"""The forwards of one step: a batch, levels of ablation, and the loss with its reductions.

`Forwards.run` is the one way in which a loss is computed under ablation, by training, evaluation and checks. The
batch is handed over as it came, in containers of its own, so that a loss may take things out of it; tensors that the
model writes into are copied first.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from cmp_trainer.ablations.protocol import Ablation
from cmp_trainer.execution.ablated import Ablated
from cmp_trainer.execution.boundary import Below, Boundary
from cmp_trainer.execution.random_state import RandomState
from cmp_trainer.losses.layouts import entries
from cmp_trainer.losses.reductions import Reductions
from cmp_trainer.losses.shares import Forward, output_tensors

LossFunction = Callable[[nn.Module, Any], Tensor]
"""`(model, batch) -> scalar`, the loss that would be minimized without a comparison."""

_KEPT_ACTIVATIONS = 400
_LINEAR = (torch.nn.functional.linear, torch.addmm)  # the latter is GPT-2's


class Forwards:
    """Forwards that all start from one random state.

    Args:
        model: the model, not wrapped in DistributedDataParallel.
        loss_fn: `(model, batch) -> scalar`.
        kinds: the kinds of ablation.
        start: the random state; None where each goes on from the random state it finds.
        copies: whether the model writes into its inputs, so that each forward gets copies.
        is_compiled: whether torch.compile runs the model or a part of it.
        boundary: where the ablated layers begin; None where the whole model is ablated.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: LossFunction,
        kinds: Sequence[Ablation],
        start: RandomState | None,
        copies: bool = False,
        is_compiled: bool = False,
        boundary: Boundary | None = None,
    ) -> None:
        self.model, self.loss_fn, self.kinds, self.start, self.copies = model, loss_fn, kinds, start, copies
        self.is_compiled, self.boundary = is_compiled, boundary
        self.last: Ablated | None = None  # the context of the latest forward

    def run(
        self,
        batch: Any,
        levels: Sequence[int],
        *,
        only: set[tuple[str, str]] | None = None,
        watch: bool = False,
        kinds: Sequence[Ablation] | None = None,
        lower: Below | None = None,
    ) -> Forward:
        """The loss of a batch at a level of every kind.

        Args:
            only: places of the reductions to note; without a graph they have to be given.
            watch: also keep the latest activations by row, for planning.
            kinds: in place of those of this object.
            lower: what is done below the boundary, where that is shared with other forwards.
        """
        reductions, activations = Reductions(only), _Activations()
        with_graph = torch.is_grad_enabled()
        others = (activations.keep if watch else None) if with_graph else reductions.follow
        self.last = ablated = Ablated(
            kinds or self.kinds, levels, self.start, reductions.handlers, others, self.boundary, lower
        )
        outputs: list[Tensor] = []
        checking = watch or not with_graph
        with outputs_noted(self.model, outputs), eager_where_compiled(self.is_compiled, checking), ablated:
            loss = self.loss_fn(self.model, own_containers(batch, copy_tensors=self.copies))
        if not with_graph:
            # torch 2.6 gives a weight that autocast cast without a graph to the next forward, which needs one.
            torch.clear_autocast_cache()
        check_scalar(loss)
        outputs = [one for one in outputs if one.requires_grad]
        return Forward(loss, reductions, outputs, activations.kept, activations.positions)


@contextmanager
def eager_where_compiled(is_compiled: bool, checking: bool) -> Iterator[None]:
    """A compiled model is not compiled once more for runs in which every call has to be seen."""
    with torch.compiler.set_stance("force_eager") if is_compiled and checking else nullcontext():
        yield


@contextmanager
def outputs_noted(model: nn.Module, outputs: list[Tensor]) -> Iterator[None]:
    """The tensors that the model returns in the body, in every call of it."""
    handle = model.register_forward_hook(
        lambda module, args, output: outputs.extend(output_tensors(output)),
        prepend=True,  # before the hook with which DeepSpeed makes other tensors of them
    )
    try:
        yield
    finally:
        handle.remove()


def own_containers(batch: Any, copy_tensors: bool = False) -> Any:
    """The batch in dictionaries and lists of its own, with the same tensors, or copies of them."""
    if isinstance(batch, Tensor):
        return batch.clone() if copy_tensors else batch
    if isinstance(batch, dict) or (isinstance(batch, Mapping) and hasattr(batch, "data")):
        copied: Any = copy.copy(batch)
        for name, value in batch.items():
            copied[name] = own_containers(value, copy_tensors)
        return copied
    if isinstance(batch, (list, tuple)) and not hasattr(batch, "_fields"):
        return type(batch)(own_containers(value, copy_tensors) for value in batch)
    return batch


def versions(batch: Any) -> list[int]:
    """How often each tensor of a batch was written into."""
    tensors = [value for _, value in entries(batch) if isinstance(value, Tensor) and not value.is_inference()]
    return [tensor._version for tensor in tensors]


def check_scalar(loss: Any) -> None:
    """Raises a ValueError where a loss function returned no scalar."""
    if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.is_floating_point():
        given = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else repr(loss)[:200]
        raise ValueError(f"the loss is {given}; expected a scalar tensor, as `model(**batch).loss` is.")


class _Activations:
    """The latest tensors with a graph and more than one dimension, and how many positions a linear layer sees."""

    def __init__(self) -> None:
        self.kept: list[Tensor] = []
        self.positions = 0

    def keep(self, func: Callable, args: tuple, kwargs: dict[str, Any]) -> Any:
        result = func(*args, **kwargs)
        if isinstance(result, Tensor) and result.ndim > 1 and result.requires_grad:
            self.kept.append(result)
            del self.kept[:-_KEPT_ACTIVATIONS]
            if func in _LINEAR:
                self.positions = max(self.positions, result.numel() // max(1, result.shape[-1]))
        return result
