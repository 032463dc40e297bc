"""Each example's share of a loss, whatever the loss is.

Let L be the scalar that would be minimized. On its way, tensors are reduced to single numbers, R_k = sum of elements
x_k (a mean is the sum of x / n), see reductions.py. With a_k = dL / dR_k, held constant,

    share of example i:   s_i = sum over k, and over the elements e of example i, of a_k * x_ke
    rest:                 L - sum of s_i

so the gradient of (sum of the shares + rest) is that of L by construction, whatever L is. The rest is what belongs to
no example: router losses of mixtures of experts, penalties on weights, learned weights of several losses.

A `Plan` says where the shares of a model's loss are found. planning.py makes it on the first batch; the sign test
guards it on every batch after that.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cmp_trainer.losses.layouts import Layout, Misfit, entries, num_rows, sum_by_rows
from cmp_trainer.losses.reductions import Place, Reduction, Reductions

_INSIDE = ("hidden_state", "attentions", "past_key", "router", "cache")


class CannotCompare(ValueError):
    """The loss has no part that belongs to single examples, or not all of it can be attributed."""


class Replan(Exception):
    """The plan does not fit this batch."""


class Forward(NamedTuple):
    """One run of the loss: the scalar, its reductions, the tensors by row that it passed through, and the number of
    positions (tokens, patches, frames) that its largest linear layer saw."""

    loss: Tensor
    reductions: Reductions
    outputs: list[Tensor]
    activations: list[Tensor]
    positions: int = 0


class Shares(NamedTuple):
    """`values` and `weights`, `(batch, parts)`: each example's share of the loss, and the weight of its own mean in
    it, so that values / weights are the losses of the examples. `rest`: the loss less all shares, a scalar."""

    values: Tensor
    weights: Tensor
    rest: Tensor

    def detach(self) -> Shares:
        """The same numbers without a graph."""
        return Shares(self.values.detach(), self.weights, self.rest.detach())


@dataclass
class Plan:
    """Where the shares of a loss are found.

    Attributes:
        rows_per_example: 2 for losses of pairs, such as a chosen and a rejected answer.
        taken: the layout of every reduction that belongs to the examples.
        loops: lines that are called once for each example; True where a row's calls follow each other.
        places: every (function, line) that was noted.
        anchors: which outputs the sign test looks at; the latest activations by row where there are none.
        crosses: an example's loss depends on other rows too (in-batch negatives); the sign test cannot hold.
        undecided: labels could not be exchanged (a single class in the batch), so this is to be planned again.
        has_rest: part of the loss belongs to no example.
        averages: the weights of all reductions together are 1, so the loss is an average of several; otherwise they
            were added up.
        classes: how many classes each element of the uniform part of the Trainer's label smoothing was summed over.
    """

    rows_per_example: int = 1
    taken: dict[Place, Layout] = field(default_factory=dict)
    loops: dict[tuple[str, str], bool] = field(default_factory=dict)
    places: set[tuple[str, str]] = field(default_factory=set)
    passed: set[Place] = field(default_factory=set)
    anchors: list[int] = field(default_factory=list)
    crosses: bool = False
    undecided: bool = False
    has_rest: bool = False
    averages: bool = False
    classes: dict[Place, int] = field(default_factory=dict)

    def layout(self, place: Place) -> Layout | None:
        """The layout of a reduction, None where it belongs to no example. A line that is called more often than on
        the batch that was planned on is read as its other calls were.

        Raises:
            Replan: nothing is known of this place.
        """
        if place in self.taken:
            return self.taken[place]
        if place in self.passed or place[:2] in self.loops:
            return None
        known = {self.taken.get(other) for other in (*self.taken, *self.passed) if other[:2] == place[:2]}
        if len(known) != 1:
            raise Replan(f"{place.function} at {place.line} is a new reduction of the loss")
        return known.pop()


def read_shares(forward: Forward, plan: Plan, batch: Any, factors: Mapping[Place, float] | None = None) -> Shares:
    """The shares of one run, found where the plan says.

    Args:
        factors: what the shares in some reductions are multiplied by, in place of 1; the rest is that without them.

    Raises:
        Replan: the loss went another way than on the batch that was planned on.
    """
    noted = forward.reductions.noted
    layouts_of = {id(reduction): _layout_or_none(plan, reduction) for reduction in noted}
    for reduction in noted:
        reduction.gate.passes = layouts_of[id(reduction)] is None
    forward.reductions.read(forward.loss)
    rows = (num_rows(batch) or 0) // plan.rows_per_example
    active = [reduction for reduction in noted if reduction.coefficient is not None]
    columns: list[tuple[Tensor, Tensor]] = []
    rest = forward.loss
    try:
        for reduction in active:
            layout = plan.layout(reduction.place)
            if layout is None:
                continue
            values, weights = rows_of(reduction, layout, rows, batch)
            if factors is not None:
                rest = rest - values.sum()
                values, weights = values * factors[reduction.place], weights * factors[reduction.place]
            columns.append((values, weights * plan.classes.get(reduction.place, 1)))
        for where, together in plan.loops.items():
            calls = [reduction for reduction in active if reduction.place[:2] == where]
            columns.append(rows_of_loop(calls, rows, together))
    except Misfit as misfit:
        raise Replan(str(misfit)) from misfit
    if not columns:
        raise Replan("no reduction that was planned for")
    values, weights = _parts(columns, batch, plan.averages)
    return Shares(values, weights.detach(), rest - values.sum() if factors is None else rest)


def _layout_or_none(plan: Plan, reduction: Reduction) -> Layout | None:
    """None also for an unknown reduction: one that the loss depends on raises when it is read."""
    try:
        return plan.layout(reduction.place)
    except Replan:
        return None


def output_tensors(outputs: Any) -> list[Tensor]:
    """The tensors of a model's outputs that a loss may be computed from, without hidden states and caches."""
    if isinstance(outputs, Tensor):
        return [outputs] if outputs.ndim else []
    if isinstance(outputs, Mapping):
        final = {name: value for name, value in outputs.items() if not any(word in str(name) for word in _INSIDE)}
        return [tensor for value in (final or outputs).values() for tensor in output_tensors(value)]
    if isinstance(outputs, (list, tuple)):
        return [value for value in outputs if isinstance(value, Tensor) and value.ndim]
    return []


def rows_of(reduction: Reduction, layout: Layout, rows: int, batch: Any) -> tuple[Tensor, Tensor]:
    """Shares and weights of the rows in one reduction, `(rows, parts)`."""
    elements, factor = reduction.elements, reduction.factor
    elements = elements.to(factor.dtype)
    if layout.kind == "declared":
        values = elements.reshape(len(elements), -1)
        return values * factor.reshape(-1)[0], torch.ones_like(values) * factor.reshape(-1)[0].abs()
    counted = reduction.counted
    if counted is None:
        one_each = elements.numel() == rows
        counted = torch.ones_like(elements) if one_each else (elements.detach() != 0)
    counted = counted.to(factor.dtype).expand_as(elements)
    if factor.numel() == 1:  # sum first, scale after
        factor = factor.reshape(())
        values, weights = sum_by_rows(elements, layout, rows, batch), sum_by_rows(counted, layout, rows, batch)
        return (values * factor).unsqueeze(1), (weights * factor.abs()).unsqueeze(1)
    values = sum_by_rows(elements * factor, layout, rows, batch)
    weights = sum_by_rows(counted * factor.abs().expand_as(elements), layout, rows, batch)
    return values.unsqueeze(1), weights.unsqueeze(1)


def rows_of_loop(calls: Sequence[Reduction], rows: int, together: bool) -> tuple[Tensor, Tensor]:
    """Shares and weights of the rows where each row has calls of its own."""
    if not calls or len(calls) % rows:
        raise Misfit(f"{len(calls)} calls for {rows} rows")
    values = torch.stack([(one.elements.to(one.factor.dtype) * one.factor).sum() for one in calls])
    weights = torch.stack([(torch.ones_like(one.elements) * one.factor.abs()).sum() for one in calls])
    shape, dim = ((rows, -1), 1) if together else ((-1, rows), 0)
    return tuple(one.reshape(shape).sum(dim).unsqueeze(1) for one in (values, weights))  # pyright: ignore


def _parts(columns: Sequence[tuple[Tensor, Tensor]], batch: Any, averages: bool) -> tuple[Tensor, Tensor]:
    """Each example has one part, the sum over its reductions; start and end of an answer are separate parts."""
    names = dict(entries(batch))
    if len(columns) == 1 or ("start_positions" in names and "end_positions" in names):
        return torch.cat([values for values, _ in columns], 1), torch.cat([weights for _, weights in columns], 1)
    values = torch.stack([column for column, _ in columns]).sum(0)
    weights = torch.stack([column for _, column in columns])  # (reductions, rows, 1)
    if averages:
        return values, weights.sum(0)
    totals = weights.sum((1, 2), keepdim=True)
    shared = (weights / totals.masked_fill(totals == 0, 1)).sum(0) / (totals > 0).sum().clamp(min=1)
    return values, shared * totals.max()  # as many labels as the reduction counts that counts most
