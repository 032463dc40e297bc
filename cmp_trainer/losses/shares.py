"""Each example's share of a loss, whatever the loss is.

Let L be the scalar that would be minimized. On its way, tensors are reduced to single numbers, R_k = sum of elements
x_k (a mean is the sum of x / n), see reductions.py. With a_k = dL / dR_k, held constant,

    share of example i:   s_i = sum over k, and over the elements e of example i, of a_k * x_ke
    rest:                 L - sum of s_i

so the gradient of (sum of the shares + rest) is that of L by construction, whatever L is. The rest is what belongs to
no example: router losses of mixtures of experts, penalties on weights, learned weights of several losses.

Which elements are whose is verified, not guessed, by the **sign test**: weight the shares by random numbers w; then
the gradient of sum w_i s_i at row i of the model's outputs must be w_i times that of sum s_i. It needs no second
forward. A `Plan` says where the shares of a model's loss are found; it is made on the first batch, where the labels
are also exchanged between the examples once (an example's loss moves with its labels, a penalty does not), and the
sign test guards it on every batch after that.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cmp_trainer.losses.layouts import Layout, Misfit, entries, is_label, layouts, num_rows, sum_by_rows
from cmp_trainer.losses.reductions import HALF, Place, Reduction, Reductions

TOLERANCE = 1e-3
"""Largest deviation in the sign test, relative to the largest gradient; half precision gets TOLERANCE_HALF."""
TOLERANCE_HALF = 3e-2
_LATEST = 3  # activations that the sign test looks at where it cannot look at outputs
_SMOOTHING = "trainer_pt_utils.py"  # the uniform part of the Trainer's label smoothing is a loss of labels too
ROUNDS = 8  # reductions inside of reductions are looked into this deep


class CannotCompare(ValueError):
    """The loss has no part that belongs to single examples, or not all of it can be attributed."""


class Replan(Exception):
    """The plan does not fit this batch."""


class Forward(NamedTuple):
    """One run of the loss: the scalar, its reductions, and the tensors by row that it passed through."""

    loss: Tensor
    reductions: Reductions
    outputs: list[Tensor]
    activations: list[Tensor]


class Shares(NamedTuple):
    """`values` and `weights`, `(batch, parts)`: each example's share of the loss, and the weight of its own mean in
    it, so that values / weights are the losses of the examples. `rest`: the loss less all shares, a scalar."""

    values: Tensor
    weights: Tensor
    rest: Tensor


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
            values, weights = _rows_of(reduction, layout, rows, batch)
            if factors is not None:
                rest = rest - values.sum()
                values, weights = values * factors[reduction.place], weights * factors[reduction.place]
            columns.append((values, weights * plan.classes.get(reduction.place, 1)))
        for where, together in plan.loops.items():
            calls = [reduction for reduction in active if reduction.place[:2] == where]
            columns.append(_rows_of_loop(calls, rows, together))
    except Misfit as misfit:
        raise Replan(str(misfit)) from misfit
    if not columns:
        raise Replan("no reduction that was planned for")
    values, weights = _parts(columns, batch, plan.averages)
    return Shares(values, weights.detach(), rest - values.sum() if factors is None else rest)


def _layout_or_none(plan: Plan, reduction: Reduction) -> Layout | None:
    """A new reduction that the loss does not depend on is no matter."""
    try:
        return plan.layout(reduction.place)
    except Replan:
        return None


def deviation(shares: Shares, forward: Forward, plan: Plan) -> Tensor | None:
    """The sign test: how far the shares are from being the rows' own, a scalar on the device; None without a graph."""
    anchors = [forward.outputs[index] for index in plan.anchors if index < len(forward.outputs)]
    if plan.crosses or not shares.values.requires_grad:
        return None
    values = shares.values.sum(1)
    if not anchors:
        inside = _sign_errors_inside(values, forward.activations[::-1], len(values) * plan.rows_per_example)
        errors = list(itertools.islice(inside, _LATEST))
        return torch.stack(errors).min() if errors else None
    errors = [error for error in _sign_errors(values, anchors) if error is not None]
    return torch.stack([error.float() for error in errors]).max() if errors else None


def tolerance(forward: Forward) -> float:
    """What the sign test may deviate by in the arithmetic of a forward."""
    half = [one.dtype in HALF for one in (*forward.outputs, *forward.activations)]
    half += [reduction.is_half for reduction in forward.reductions.noted]
    return TOLERANCE_HALF if any(half) else TOLERANCE


def make_plan(run: Callable[[Any], Forward], first: Forward, batch: Any) -> Plan:
    """Find where the shares of a loss are.

    Args:
        run: the loss of a batch in the full model, from the random state that `first` started from.
        first: that of `batch`, with activations.
        batch: its labels and rows are exchanged for further runs.

    Raises:
        CannotCompare: nothing of the loss belongs to single examples, or part of it can neither be attributed nor
            belongs to none of them.
    """
    rows = num_rows(batch)
    if rows is None:
        raise CannotCompare(
            f"the batch is a {type(batch).__name__} without tensors, so its examples cannot be told apart. Pass a "
            "mapping or a sequence of tensors whose first dimension is the batch."
        )
    reasons = []
    for rows_per_example in (1, 2):
        if rows % rows_per_example:
            continue
        planner = _Planner(run, first, batch, rows // rows_per_example, rows_per_example)
        try:
            return planner.plan()
        except CannotCompare as reason:
            reasons.append(reason)
    raise reasons[0]


class _Planner:
    """The steps of `make_plan` for one number of examples."""

    def __init__(
        self, run: Callable[[Any], Forward], first: Forward, batch: Any, rows: int, rows_per_example: int
    ) -> None:
        self.run, self.first, self.batch, self.rows = run, first, batch, rows
        self.result = Plan(rows_per_example)
        self.anchors = _reached(first.loss, first.outputs, rows * rows_per_example)
        if not self.anchors:  # chosen and rejected answers may run as one batch of twice the rows
            self.anchors = _reached(first.loss, first.outputs, 2 * rows * rows_per_example)
        self._inside: list[Tensor] = []
        self.moved = self._with_labels_exchanged()
        self.moved_outputs = self._outputs_moved()
        if not self._labels_matter():
            self.moved = None

    def plan(self) -> Plan:
        noted, result = self.first.reductions.noted, self.result
        decided: set[int] = set()
        for reduction in noted:
            reduction.gate.passes = False
        for _ in range(ROUNDS):
            self.first.reductions.read(self.first.loss)
            new = [number for number, one in enumerate(noted) if number not in decided and one.counts]
            for number in new:
                decided.add(number)
                layout = self._layout_of(number)
                noted[number].gate.passes = layout is None
                if layout is not None:
                    result.taken[noted[number].place] = layout
            if not new:
                break
        self._find_loops(decided)
        result.places = {one.place[:2] for one in noted}
        result.passed = {one.place for one in noted} - set(result.taken)
        self._check_whole()
        self._check_straight()
        result.anchors = [
            index
            for index, tensor in enumerate(self.first.outputs)
            if any(tensor is anchor for anchor in self.anchors)
        ]
        return result

    # --- one reduction ---

    def _layout_of(self, number: int) -> Layout | None:
        """How this reduction's elements belong to the examples; None where they do not."""
        reduction = self.first.reductions.noted[number]
        if not self._follows_labels(number):
            return None
        tried = layouts(reduction, self.rows, self.batch)
        if reduction.declared:
            return tried[0]
        for layout in tried:
            values = self._rows(reduction, layout)
            error = None if values is None else self._sign_error(values, reduction)
            if error is not None and error <= tolerance(self.first):
                return layout
        return self._crossing_layout(number, tried)

    def _rows(self, reduction: Reduction, layout: Layout) -> Tensor | None:
        try:
            return _rows_of(reduction, layout, self.rows, self.batch)[0].sum(1)
        except Misfit:
            return None

    def _sign_error(self, values: Tensor, reduction: Reduction | None = None) -> float | None:
        """The largest deviation at the outputs, or at the latest activations where nothing passes by the outputs."""
        if not values.requires_grad:
            return None
        errors = [float(error) for error in _sign_errors(values, self.anchors) if error is not None]
        if errors:
            return max(errors)
        same_size = 0 if reduction is None else reduction.elements.numel()  # made of the elements, by their row
        rows = self.rows * self.result.rows_per_example
        # The earliest one: later ones may have another dimension of that size first.
        inside = _sign_errors_inside(values, self.first.activations, rows, same_size)
        return next((float(error) for error in inside), None)

    def _follows_labels(self, number: int) -> bool:
        """Whether this reduction moves with the labels of the batch; True where that cannot be found out."""
        noted = self.first.reductions.noted
        if self.moved is None or noted[number].declared or _is_smoothing(noted[number].place):
            return True
        others = self.moved.reductions.noted
        if number >= len(others) or others[number].place != noted[number].place:
            return True
        one, other = noted[number].elements, others[number].elements
        if one.shape != other.shape or _differ(one, other, 1e-5):
            # Labels that are an input too (of a decoder) move everything: then only what passes by the outputs.
            return not self.moved_outputs or any(map(_nonzero, _gradients(one.sum(), self.anchors)))
        return self._gradients_move(one.sum(), other.sum(), 1e-3)  # equal values of an untrained head

    def _crossing_layout(self, number: int, tried: Sequence[Layout]) -> Layout | None:
        """A layout by which exchanged rows exchange their elements, for losses in which rows see each other."""
        noted = self.first.reductions.noted
        possible = [layout for layout in tried if layout in (Layout("dim", 0), Layout("inner", 1))]
        if self.rows < 3 or not possible or len(noted[number].dims) < noted[number].elements.ndim:
            return None
        values = self._rows(noted[number], possible[0])
        if values is None or self._sign_error(values, noted[number]) is None:
            return None
        order = torch.randperm(self.rows, generator=torch.Generator().manual_seed(1))
        rows = order if self.result.rows_per_example == 1 else torch.cat([order, order + self.rows])
        exchanged = self.run(_selected(self.batch, rows, self.rows * self.result.rows_per_example))
        others = exchanged.reductions.noted
        if number >= len(others) or others[number].place != noted[number].place:
            return None
        others[number].coefficient = noted[number].coefficient
        theirs = self._rows(others[number], possible[0])
        if theirs is None or _differ(theirs, values[order.to(values.device)], 1e-4):
            return None
        self.result.crosses = True
        return possible[0]

    # --- the whole loss ---

    def _find_loops(self, decided: set[int]) -> None:
        """Lines that were called once for each example, such as a loss in a Python loop over the batch."""
        noted = self.first.reductions.noted
        self.first.reductions.read(self.first.loss)
        left: dict[tuple[str, str], list[Reduction]] = {}
        for number, reduction in enumerate(noted):
            if reduction.counts and reduction.place not in self.result.taken and self._follows_labels(number):
                left.setdefault(reduction.place[:2], []).append(reduction)
        for where, calls in left.items():
            if len(calls) < self.rows or len(calls) % self.rows or self.rows < 2:
                continue
            for together in (True, False):
                values = _rows_of_loop(calls, self.rows, together)[0].sum(1)
                error = self._sign_error(values)
                if error is not None and error <= tolerance(self.first):
                    self.result.loops[where] = together
                    break

    def _check_whole(self) -> None:
        """Something belongs to the examples, and what is left does not pass by the outputs with the labels."""
        try:
            shares = read_shares(self.first, self.result, self.batch)
        except Replan as replan:
            raise CannotCompare(_NOTHING) from replan
        together = read_shares(self.first, replace(self.result, averages=True), self.batch).weights.sum()
        self.result.averages = abs(float(together) - 1) < tolerance(self.first)
        self._find_smoothing()
        loss, rest = self.first.loss.detach(), shares.rest
        self.result.has_rest = bool((rest.detach().abs() > 1e-5 * loss.abs().clamp(min=1e-12)).any())
        self._anchor_inside()
        total, left = (_gradients(value, self.anchors) for value in (self.first.loss, rest))
        if not any(_reaches(a, b) for a, b in zip(left, total, strict=True)):
            return
        if self.moved is None:
            if self.result.undecided:
                return  # asked again when there are labels to exchange
            raise CannotCompare(_REST)
        theirs = read_shares(self.moved, self.result, self._moved_batch).rest
        if self.moved_outputs or self._gradients_move(rest, theirs, 1e-3):
            raise CannotCompare(_REST)

    def _find_smoothing(self) -> None:
        """The Trainer's label smoothing is an average of the loss of the label and that of all classes."""
        found = [
            one for one in self.first.reductions.noted if one.place in self.result.taken and _is_smoothing(one.place)
        ]
        logits = next((one for one in self.anchors if one.ndim > 1), None)
        if len(found) == 2 and logits is not None:
            uniform = min(found, key=lambda one: float(one.factor.abs().mean()))
            self.result.classes[uniform.place] = logits.shape[-1]
            self.result.averages = True

    def _anchor_inside(self) -> None:
        """Where the loss passes by no output, the earliest activation by row serves to look at the rest."""
        if self.anchors or not self.result.has_rest:
            return
        rows = self.rows * self.result.rows_per_example
        for number, one in enumerate(self.first.activations):
            if len(one) == rows and _nonzero(_gradients(self.first.loss, [one])[0]):
                others = self.moved.activations if self.moved is not None else []
                self.anchors = [one]
                self._inside = others[number : number + 1] if len(others) == len(self.first.activations) else []
                return

    def _check_straight(self) -> None:
        """The coefficients do not move with the loss itself, as in the root or the logarithm of a mean."""
        reductions, taken = self.first.reductions, self.result.taken
        reductions.read(self.first.loss, create_graph=True)
        zeros = [one.zero for one in reductions.noted]
        for reduction in reductions.noted:
            coefficient = reduction.coefficient
            if reduction.place not in taken or coefficient is None or not coefficient.requires_grad:
                continue
            for one in reductions.noted:
                one.gate.reading = True
            moves = torch.autograd.grad(coefficient.sum(), zeros, retain_graph=True, allow_unused=True)
            for one in reductions.noted:
                one.gate.reading = False
            if any(map(_nonzero, moves)):
                raise CannotCompare(
                    f"the loss is no weighted sum of the examples' losses: what {reduction.place.function} at "
                    f"{reduction.place.line} counts in it depends on the loss itself (the root or logarithm of a "
                    "mean, or a product of two losses). Use a loss that is a mean or sum over the examples, or pass "
                    "per_example_loss_func(outputs, inputs) -> (batch,)."
                )
        reductions.read(self.first.loss)

    # --- the batch with other labels ---

    def _with_labels_exchanged(self) -> Forward | None:
        self._moved_batch, named = _labels_exchanged(self.batch)
        self.result.undecided = named and self._moved_batch is None
        if self._moved_batch is None:
            return None
        try:
            return self.run(self._moved_batch)
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, ValueError, IndexError, TypeError):
            return None  # labels that fit their own row only: the loss is judged without this test

    def _labels_matter(self) -> bool:
        """Whether the loss is made from the labels at all; a column of them may be left over from another task."""
        if self.moved is None or self.moved_outputs or not self.anchors:
            return True
        if _differ(self.first.loss, self.moved.loss, 1e-6):
            return True
        return self._gradients_move(self.first.loss, self.moved.loss, 1e-5)

    def _gradients_move(self, value: Tensor, moved: Tensor, relative: float) -> bool:
        """Whether a number has another gradient at the outputs when the labels are exchanged."""
        ours, theirs = _gradients(value, self.anchors), _gradients(moved, self._moved_anchors())
        pairs = [(a, b) for a, b in zip(ours, theirs, strict=True) if a is not None and b is not None]
        return any(_differ(a, b, relative) for a, b in pairs)

    def _moved_anchors(self) -> list[Tensor]:
        assert self.moved is not None
        if self._inside:
            return self._inside
        numbers = [n for n, one in enumerate(self.first.outputs) if any(one is anchor for anchor in self.anchors)]
        return [self.moved.outputs[number] for number in numbers if number < len(self.moved.outputs)]

    def _outputs_moved(self) -> bool:
        if self.moved is None:
            return False
        others = self._moved_anchors()
        return len(others) != len(self.anchors) or any(
            one.shape != other.shape or _differ(one, other, 1e-5)
            for one, other in zip(self.anchors, others, strict=False)
        )


_NOTHING = (
    "no part of the loss belongs to single examples: the losses that torch.nn.functional, mean and sum reduce were "
    "followed, and none of them moves with the rows of the model's outputs. Fused losses (Liger kernels, custom "
    "autograd functions) and losses over all pairs of a batch cannot be read. Use an unfused loss, or pass "
    "per_example_loss_func(outputs, inputs) -> (batch,) to the trainer."
)
_REST = (
    "part of the loss depends on the model's outputs and the labels, but cannot be attributed to single examples (a "
    "fused loss, a loss between rows, or a reduction other than those of torch.nn.functional, mean and sum). Use an "
    "unfused loss, or pass per_example_loss_func(outputs, inputs) -> (batch,) to the trainer."
)


def output_tensors(outputs: Any) -> list[Tensor]:
    """The tensors of a model's outputs that a loss may be made of; not what was kept from inside of the model."""
    if isinstance(outputs, Tensor):
        return [outputs] if outputs.ndim else []
    if isinstance(outputs, Mapping):
        final = {name: value for name, value in outputs.items() if not any(word in str(name) for word in _INSIDE)}
        return [tensor for value in (final or outputs).values() for tensor in output_tensors(value)]
    if isinstance(outputs, (list, tuple)):
        return [value for value in outputs if isinstance(value, Tensor) and value.ndim]
    return []


_INSIDE = ("hidden_state", "attentions", "past_key", "router", "cache")


def _is_smoothing(place: Place) -> bool:
    return place.line.split(":")[0].endswith(_SMOOTHING)


def _rows_of(reduction: Reduction, layout: Layout, rows: int, batch: Any) -> tuple[Tensor, Tensor]:
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


def _rows_of_loop(calls: Sequence[Reduction], rows: int, together: bool) -> tuple[Tensor, Tensor]:
    """Shares and weights of the rows where each row has calls of its own."""
    if not calls or len(calls) % rows:
        raise Misfit(f"{len(calls)} calls for {rows} rows")
    values = torch.stack([(one.elements.to(one.factor.dtype) * one.factor).sum() for one in calls])
    weights = torch.stack([(torch.ones_like(one.elements) * one.factor.abs()).sum() for one in calls])
    shape, dim = ((rows, -1), 1) if together else ((-1, rows), 0)
    return tuple(one.reshape(shape).sum(dim).unsqueeze(1) for one in (values, weights))  # pyright: ignore


def _parts(columns: Sequence[tuple[Tensor, Tensor]], batch: Any, averages: bool) -> tuple[Tensor, Tensor]:
    """One part an example, the sum of its reductions; start and end of an answer are parts of their own."""
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


def _sign_errors(values: Tensor, anchors: Sequence[Tensor]) -> list[Tensor | None]:
    """Deviation of each anchor's gradient from the shares' own rows; None for anchors that are not reached."""
    rows = len(values)
    places = torch.arange(1, rows + 1, device=values.device, dtype=values.dtype)
    weights = (places * 12.9898).sin() * 2 + (places * 7.233).cos()
    whole = _gradients(values.sum(), anchors)
    weighted = _gradients((values * weights).sum(), anchors)
    return [
        _row_deviation(a, b, weights) if a is not None and b is not None else None
        for a, b in zip(whole, weighted, strict=True)
    ]


def _sign_errors_inside(
    values: Tensor, activations: Sequence[Tensor], rows: int, same_size: int = 0
) -> Iterator[Tensor]:
    """The sign test at the activations by row that the values pass through, in the order given."""
    for activation in activations:
        if len(activation) == rows and activation.numel() != same_size:
            yield from (error for error in _sign_errors(values, [activation]) if error is not None)


def _reached(loss: Tensor, tensors: Sequence[Tensor], rows: int) -> list[Tensor]:
    """The tensors of so many rows that the loss passes through."""
    found = [tensor for tensor in tensors if tensor.ndim and tensor.requires_grad and len(tensor) == rows]
    pairs = zip(found, _gradients(loss, found), strict=True)
    return [tensor for tensor, gradient in pairs if _nonzero(gradient)]


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


def _gradients(value: Tensor, at: Sequence[Tensor]) -> list[Tensor | None]:
    if not at or not value.requires_grad:
        return [None] * len(at)
    try:
        return list(torch.autograd.grad(value, list(at), retain_graph=True, allow_unused=True))
    except RuntimeError as error:
        if "use_reentrant" not in str(error):
            raise
        return [None] * len(at)  # a reentrant checkpoint lies between, through which no gradient can be asked for


def _has_rows(tensor: Tensor, rows: int) -> bool:
    return tensor.ndim > 0 and tensor.requires_grad and rows > 0 and len(tensor) > 0 and len(tensor) % rows == 0


def _nonzero(gradient: Tensor | None) -> bool:
    return gradient is not None and bool((gradient != 0).any())


def _differ(one: Tensor, other: Tensor, relative: float) -> bool:
    one, other = one.detach().float(), other.detach().float()
    return one.shape != other.shape or bool(((one - other).abs() > relative * one.abs().max() + 1e-12).any())


def _reaches(part: Tensor | None, whole: Tensor | None) -> bool:
    if part is None or whole is None:
        return False
    return bool(part.abs().max() > 1e-3 * whole.abs().max())


def _labels_exchanged(batch: Any) -> tuple[Any, bool]:
    """The batch in which every row has the next one's labels, None where that changes nothing; and whether it has
    columns of labels."""
    if isinstance(batch, Mapping):
        labels = {name: value for name, value in batch.items() if is_label(str(name)) and value is not None}
        moved = {name: _rolled(value) for name, value in labels.items()}
        changed = {name: value for name, value in moved.items() if value is not None}
        return ({**batch, **changed} if changed else None), bool(labels)
    if isinstance(batch, (tuple, list)) and len(batch) > 1:
        last = _rolled(batch[-1])
        return (type(batch)([*batch[:-1], last]) if last is not None else None), True
    return None, False


def _rolled(value: Any) -> Any:
    if isinstance(value, Tensor) and value.ndim and len(value) > 1:
        rolled = value.roll(1, 0)
        return None if torch.equal(rolled, value) else rolled
    if isinstance(value, (list, tuple)) and len(value) > 1:
        return [*value[1:], value[0]]
    return None


def _selected(batch: Any, order: Tensor, rows: int) -> Any:
    """The batch with its rows in another order."""
    if isinstance(batch, Tensor):
        return batch[order.to(batch.device)] if batch.ndim and len(batch) == rows else batch
    if isinstance(batch, Mapping):
        return {name: _selected(value, order, rows) for name, value in batch.items()}
    if isinstance(batch, (list, tuple)):
        if len(batch) == rows and not any(isinstance(one, Tensor) and one.ndim and len(one) == rows for one in batch):
            return type(batch)([batch[number] for number in order.tolist()])
        return type(batch)([_selected(value, order, rows) for value in batch])
    return batch
