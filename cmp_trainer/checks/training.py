"""Checks from the first loss to the end of a training: that a comparison takes place and its losses are right."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from cmp_trainer.checks.settings import NOTHING_TO_REMOVE
from cmp_trainer.losses.shares import CannotCompare, Replan


def check_finite(loss: Tensor) -> None:
    """Raises a ValueError where the first loss is NaN or infinite."""
    if not bool(loss.detach().isfinite()):
        raise ValueError(
            f"the loss of the first batch is {loss.item()}, already without any ablation. Look for NaN or infinite "
            "inputs, labels out of range, or overflow in half precision."
        )


def check_loss_is_visible(read: Callable[[], Any]) -> None:
    """Raises a CannotCompare where a compiled model hides its loss."""
    try:
        read()
    except Replan:
        raise CannotCompare(
            "the loss is computed inside of a compiled graph, which hides the losses of the examples. Compile "
            "`model.base_model` in place of the model, use the Trainer's torch_compile or torch.compile(model), which "
            "leave the loss outside, or compute it in loss_fn(model, batch)."
        ) from None


def check_sign_test(deviation: float) -> None:
    """Raises a CannotCompare where the sign test failed; `deviation` is relative to its tolerance."""
    if deviation > 1:
        raise CannotCompare(
            "the shares of the loss stopped following the rows of the batch: what belongs to an example is computed "
            "in another order than on the first batch. Keep the order of the rows in the loss, or pass "
            "per_example_loss_func(outputs, inputs) -> (batch,)."
        )


def check_reached(trainer: Any, reached: bool) -> None:
    """Raises a ValueError where a training step computed its loss without the comparison."""
    if not reached:
        raise ValueError(
            f"{type(trainer).__name__}.training_step computed its loss without a comparison, though "
            f"{trainer.num_ablations} ablations were asked for. Let it get its loss from self.compute_loss(model, "
            "inputs), or leave training_step to the Trainer."
        )


def check_differed(dropped_nothing: bool, differed: bool) -> None:
    """Raises a ValueError where no dropout rate was positive on the first batch and no variant ever differed."""
    if dropped_nothing and not differed:
        raise ValueError(
            "the losses of the variants never differed: every dropout rate was 0 when training began, and no callback "
            "changed that. Pass --cmp_dropout 0.1 (or --cmp_dropout_rates), or give the model a dropout rate."
        )


def check_crops_removed(removed: Tensor | None) -> None:
    """Raises a ValueError where crops were asked for and removed nothing in the whole training."""
    if removed is not None and not bool(removed > 0):
        raise ValueError(NOTHING_TO_REMOVE)
