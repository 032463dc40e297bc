"""Low memory: the exact gradient of the comparative loss at the activation memory of one variant.

The loss L ties the task losses l(0) … l(c) together, so its graph would hold the activations of all 1 + c forwards.
By the chain rule its gradient is the sum over the variants of (dL / dl(i)) * (gradient of l(i)), which needs one
variant at a time once the factors are known:

    (1) run the variants without a graph, except the last one, to get all task losses;
    (2) differentiate L by the task losses: one factor for each variant and example;
    (3) for each variant: forward again from the same random state, backward of the losses times their factors.

The second forward repeats the first, dropout masks included, so this is exact for every objective. It costs c more
forwards. A variant whose factors are all zero is not run again, unless other processes wait for it. Of the full
variant, which draws no masks, the examples whose factor is zero are left out where the others have the same losses
without them (with batch norm they have not).

The backwards of (3) are over before the caller has the loss, so what the caller makes of it, such as another scale,
would reach the full variant alone. Its backward checks that it does not.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from cmp_trainer.ablations.plan import Variant
from cmp_trainer.losses.task_losses import TaskLosses

Run = Callable[[Variant, Tensor | None], TaskLosses]


def loss_one_variant_at_a_time(
    run: Run,
    variants: Sequence[Variant],
    reduce: Callable[[TaskLosses], Tensor],
    backward: Callable[[Tensor], None],
    unsynchronized: AbstractContextManager,
    may_skip: bool,
    may_select: bool,
) -> tuple[Tensor, TaskLosses]:
    """Back-propagate all variants but the full one, and return the loss that back-propagates the full one.

    Args:
        run: task losses of one variant, from the step's random state, of all examples or of those of a mask.
        variants: the full model first.
        reduce: task losses `(batch, parts, 1 + c)` to the scalar that is minimized.
        backward: of a scalar, as the Trainer would do it.
        unsynchronized: context in which gradients stay in this process; only the full variant's are exchanged.
        may_skip: whether a variant may be left out when nothing depends on it. Processes that exchange weights or
            gradients in every forward and backward must do equally many.
        may_select: whether examples of the full variant may be left out when nothing depends on them.

    Returns:
        The loss, whose value is that of the objective and whose gradient is the full variant's share, and the task
        losses of all variants.

    Raises:
        ValueError: in the backward of the loss, if it is not scaled as `backward` scaled the other variants.
    """
    scales: list[Tensor] = []

    def backward_of(share: Tensor) -> None:
        share.register_hook(scales.append)
        backward(share)

    with unsynchronized:
        with torch.no_grad():
            values = [run(variant, None) for variant in variants[:-1]]
        last = run(variants[-1], None)
        leaf = torch.stack([*(losses.values for losses in values), last.values.detach()], dim=-1).requires_grad_()
        losses = TaskLosses(leaf, values[0].weights)
        loss = reduce(losses)
        (factors,) = torch.autograd.grad(loss, leaf)
        needed = [not may_skip or bool(factors[..., index].any()) for index in range(len(variants))]
        if needed[-1]:
            backward_of((last.values * factors[..., -1]).sum())
        del last  # its graph, before the next one is built
        for index in range(len(variants) - 2, 0, -1):
            if needed[index]:
                backward_of((run(variants[index], None).values * factors[..., index]).sum())
    loss, losses = loss.detach(), TaskLosses(leaf.detach(), losses.weights)
    if needed[0]:
        share = _some(run, variants[0], factors[..., 0], losses.values[..., 0]) if may_select else None
        share = (run(variants[0], None).values * factors[..., 0]).sum() if share is None else share
        loss = share + (loss - share.detach())
    else:
        loss.requires_grad_()
    loss.register_hook(lambda scale: _check_scale(scale, scales))
    return loss, losses


def select_rows(inputs: Mapping[str, Any], rows: Tensor | None) -> Mapping[str, Any]:
    """The examples of a batch where the `(batch,)` mask is true; all of them without a mask."""
    if rows is None:
        return inputs
    return {
        name: value[rows] if isinstance(value, Tensor) and value.ndim and len(value) == len(rows) else value
        for name, value in inputs.items()
    }


def _some(run: Run, variant: Variant, factors: Tensor, values: Tensor) -> Tensor | None:
    """A variant's losses times factors, of the examples with a factor; None if there are no others or it matters."""
    rows = factors.ne(0).any(-1)
    if rows.all() or not rows.any():
        return None
    alone = run(variant, rows).values
    if not torch.allclose(alone.detach(), values[rows], rtol=3e-5, atol=3e-6):
        return None
    return (alone * factors[rows]).sum()


def _check_scale(scale: Tensor, others: list[Tensor]) -> None:
    if others and not torch.isclose(scale.float(), others[0].float(), rtol=1e-2, atol=0):  # 16 bit scales are round
        raise ValueError(
            f"the backward of the loss began with {scale.item():.6g}, but --cmp_low_memory has back-propagated the "
            f"ablated variants with {others[0].item():.6g} already: the loss was scaled after compute_loss, or a "
            "subclass did not hand num_items_in_batch on to it. Scale the losses in a per_example_loss_func, hand "
            "num_items_in_batch on, or leave out --cmp_low_memory."
        )
