"""Low memory: the exact gradient of the comparative loss at the activation memory of one variant.

The loss L ties the task losses l(0) … l(c) together, so its graph would hold the activations of all 1 + c forwards.
By the chain rule its gradient is the sum over the variants of (dL / dl(i)) * (gradient of l(i)), which needs one
variant at a time once the factors are known:

    (1) run the variants without a graph, except the last one, to get all task losses;
    (2) differentiate L by the task losses: one factor for each variant and example;
    (3) for each variant: forward again from the same random state, backward of the losses times their factors.

The second forward repeats the first, dropout masks included, so this is exact for every objective. It costs c more
forwards. A variant whose factors are all zero is not run again. In a variant without dropout, the examples whose
factor is zero are left out; under dropout they stay, since the masks are those of the whole batch.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from cmp_trainer.task_losses import TaskLosses
from cmp_trainer.variants import Variant

Run = Callable[[Variant, Tensor | None], TaskLosses]


def loss_one_variant_at_a_time(
    run: Run,
    variants: Sequence[Variant],
    reduce: Callable[[TaskLosses], Tensor],
    backward: Callable[[Tensor], None],
    unsynchronized: AbstractContextManager,
    may_skip_full: bool,
) -> tuple[Tensor, TaskLosses]:
    """Back-propagate all variants but the full one, and return the loss that back-propagates the full one.

    Args:
        run: task losses of one variant, from the step's random state, of all examples or of those of a mask.
        variants: the full model first.
        reduce: task losses `(batch, parts, 1 + c)` to the scalar that is minimized.
        backward: of a scalar, as the Trainer would do it.
        unsynchronized: context in which gradients stay in this process; only the full variant's are exchanged.
        may_skip_full: whether the full variant may be left out when nothing depends on it (one process only).

    Returns:
        The loss, whose value is that of the objective and whose gradient is the full variant's share, and the task
        losses of all variants.
    """
    with unsynchronized:
        with torch.no_grad():
            values = [run(variant, None) for variant in variants[:-1]]
        last = run(variants[-1], None)
        leaf = torch.stack([*(losses.values for losses in values), last.values.detach()], dim=-1).requires_grad_()
        losses = TaskLosses(leaf, values[0].weights)
        loss = reduce(losses)
        (factors,) = torch.autograd.grad(loss, leaf)
        if factors[..., -1].any():
            backward((last.values * factors[..., -1]).sum())
        del last  # its graph, before the next one is built
        for index in range(len(variants) - 2, 0, -1):
            if factors[..., index].any():
                backward(_share(run, variants[index], factors[..., index]))
    loss, losses = loss.detach(), TaskLosses(leaf.detach(), losses.weights)
    if may_skip_full and not factors[..., 0].any():
        return loss.requires_grad_(), losses
    share = _share(run, variants[0], factors[..., 0])
    return share + (loss - share.detach()), losses


def select_rows(inputs: Mapping[str, Any], rows: Tensor | None) -> Mapping[str, Any]:
    """The examples of a batch where the `(batch,)` mask is true; all of them without a mask."""
    if rows is None:
        return inputs
    return {
        name: value[rows] if isinstance(value, Tensor) and value.ndim and len(value) == len(rows) else value
        for name, value in inputs.items()
    }


def _share(run: Run, variant: Variant, factors: Tensor) -> Tensor:
    """What the variant contributes: its task losses times their (batch, parts) factors."""
    rows = factors.ne(0).any(-1)
    if variant.drops or rows.all() or not rows.any():
        return (run(variant, None).values * factors).sum()
    return (run(variant, rows).values * factors[rows]).sum()
