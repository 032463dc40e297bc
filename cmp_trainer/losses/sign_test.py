"""The sign test: whether shares are the rows' own, without a second forward.

Weight the shares s_i by random numbers w_i. If each share depends on its own row of the model's outputs alone, the
gradient of sum w_i s_i at row i is w_i times that of sum s_i. Where the loss passes through no output with rows, the
latest activations by row serve.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from cmp_trainer.losses.reductions import HALF
from cmp_trainer.losses.shares import Forward, Plan, Shares

TOLERANCE = 1e-3
"""Largest deviation in the sign test, relative to the largest gradient; half precision gets TOLERANCE_HALF."""
TOLERANCE_HALF = 3e-2
ROUNDING = 1e-5  # of a loss and of the sum of its shares in single precision, relative to the shares
_LATEST = 3  # activations that the sign test looks at where it cannot look at outputs


def deviation(shares: Shares, forward: Forward, plan: Plan) -> Tensor | None:
    """The sign test: how far the shares are from being the rows' own, a scalar on the device; None without a graph."""
    anchors = [forward.outputs[index] for index in plan.anchors if index < len(forward.outputs)]
    if plan.crosses or not shares.values.requires_grad:
        return None
    values = shares.values.sum(1)
    if not anchors:
        inside = sign_errors_inside(values, forward.activations[::-1], len(values) * plan.rows_per_example)
        errors = list(itertools.islice(inside, _LATEST))
        return torch.stack(errors).min() if errors else None
    errors = [error for error in sign_errors(values, anchors) if error is not None]
    return torch.stack([error.float() for error in errors]).max() if errors else None


def tolerance(forward: Forward) -> float:
    """How far the sign test may deviate, given the precision of a forward."""
    half = [one.dtype in HALF for one in (*forward.outputs, *forward.activations)]
    half += [reduction.is_half for reduction in forward.reductions.noted]
    return TOLERANCE_HALF if any(half) else TOLERANCE


def has_rest(shares: Shares, forward: Forward) -> bool:
    """Whether part of the loss belongs to no example."""
    return bool(rest_beyond_rounding(shares, forward) > 1)


def rest_beyond_rounding(shares: Shares, forward: Forward) -> Tensor:
    """The part of the loss that belongs to no example, as a multiple of what rounding leaves of the loss minus its
    shares; a scalar on the device."""
    rounding = ROUNDING if tolerance(forward) == TOLERANCE else TOLERANCE_HALF
    size = torch.maximum(forward.loss.detach().abs(), shares.values.detach().abs().sum())
    return shares.rest.detach().abs() / (rounding * size.clamp(min=1e-12))


def sign_errors(values: Tensor, anchors: Sequence[Tensor]) -> list[Tensor | None]:
    """The deviation at each anchor; None for anchors that the values do not depend on."""
    rows = len(values)
    places = torch.arange(1, rows + 1, device=values.device, dtype=values.dtype)
    weights = (places * 12.9898).sin() * 2 + (places * 7.233).cos()
    whole = gradients(values.sum(), anchors)
    weighted = gradients((values * weights).sum(), anchors)
    return [
        _row_deviation(a, b, weights) if a is not None and b is not None else None
        for a, b in zip(whole, weighted, strict=True)
    ]


def sign_errors_inside(
    values: Tensor, activations: Sequence[Tensor], rows: int, same_size: int = 0
) -> Iterator[Tensor]:
    """The deviation at each activation with `rows` rows that the values depend on, in the order given."""
    for activation in activations:
        if len(activation) == rows and activation.numel() != same_size:
            yield from (error for error in sign_errors(values, [activation]) if error is not None)


def _row_deviation(whole: Tensor, weighted: Tensor, weights: Tensor) -> Tensor | None:
    size = whole.detach().abs().max()
    if size.device.type == "cpu" and not size:
        return None
    times = whole.shape[0] // len(weights)
    deviations = []
    for expanded in (weights.repeat(times), weights.repeat_interleave(times)) if times > 1 else (weights,):
        expected = whole * expanded.to(whole.dtype).view(-1, *[1] * (whole.ndim - 1))
        deviations.append((weighted - expected).abs().max() / size.clamp(min=torch.finfo(size.dtype).tiny))
    return torch.stack(deviations).min()


def gradients(value: Tensor, at: Sequence[Tensor]) -> list[Tensor | None]:
    if not at or not value.requires_grad:
        return [None] * len(at)
    try:
        return list(torch.autograd.grad(value, list(at), retain_graph=True, allow_unused=True))
    except RuntimeError as error:
        if "use_reentrant" not in str(error):
            raise
        return [None] * len(at)  # a reentrant checkpoint lies between, through which no gradient can be asked for
