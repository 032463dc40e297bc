"""Where each example's share of a loss is found: the plan, made on the first batch.

The loss is followed from its end: of every reduction that it depends on, the layouts of layouts.py are tried, and the
sign test decides whose elements are whose. The labels are exchanged between the examples once: an example's loss moves
with its labels, a penalty does not. What then remains of the loss may not depend on the outputs through the labels;
where it does, the loss cannot be compared.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from cmp_trainer.losses.layouts import Layout, Misfit, is_label, layouts, num_rows
from cmp_trainer.losses.reductions import Place, Reduction
from cmp_trainer.losses.shares import CannotCompare, Forward, Plan, Replan, read_shares, rows_of, rows_of_loop
from cmp_trainer.losses.sign_test import gradients, has_rest, sign_errors, sign_errors_inside, tolerance

_SMOOTHING = "trainer_pt_utils.py"  # the uniform part of the Trainer's label smoothing is a loss of labels too
ROUNDS = 8  # reductions inside of reductions are looked into this deep

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
        self._check_linear()
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
            values = self._rows(reduction, tried[0])
            error = None if values is None else self._sign_error(values, reduction)
            self.result.crosses |= error is not None and error > tolerance(self.first)
            return tried[0]
        for layout in tried:
            values = self._rows(reduction, layout)
            error = None if values is None else self._sign_error(values, reduction)
            if error is not None and error <= tolerance(self.first):
                return layout
        return self._crossing_layout(number, tried)

    def _rows(self, reduction: Reduction, layout: Layout) -> Tensor | None:
        try:
            return rows_of(reduction, layout, self.rows, self.batch)[0].sum(1)
        except Misfit:
            return None

    def _sign_error(self, values: Tensor, reduction: Reduction | None = None) -> float | None:
        """The largest deviation at the outputs, or inside the model where the values depend on no output."""
        if not values.requires_grad:
            return None
        errors = [float(error) for error in sign_errors(values, self.anchors) if error is not None]
        if errors:
            return max(errors)
        same_size = 0 if reduction is None else reduction.elements.numel()  # made of the elements, by their row
        rows = self.rows * self.result.rows_per_example
        # The earliest one: later ones may have another dimension of that size first.
        inside = sign_errors_inside(values, self.first.activations, rows, same_size)
        return next((float(error) for error in inside), None)

    def _follows_labels(self, number: int) -> bool:
        """Whether this reduction changes when the labels are exchanged; True where that cannot be determined."""
        noted = self.first.reductions.noted
        if self.moved is None or noted[number].declared or _is_smoothing(noted[number].place):
            return True
        others = self.moved.reductions.noted
        if number >= len(others) or others[number].place != noted[number].place:
            return True
        one, other = noted[number].elements, others[number].elements
        if one.shape != other.shape or _differ(one, other, 1e-5):
            # Labels that are an input too (of a decoder) move everything: then only what passes by the outputs.
            return not self.moved_outputs or any(map(_nonzero, gradients(one.sum(), self.anchors)))
        return self._gradients_move(one.sum(), other.sum(), 1e-3)  # equal values of an untrained head

    def _crossing_layout(self, number: int, tried: Sequence[Layout]) -> Layout | None:
        """For losses in which rows see each other: a layout under which exchanging rows exchanges their elements."""
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
                values = rows_of_loop(calls, self.rows, together)[0].sum(1)
                error = self._sign_error(values)
                if error is not None and error <= tolerance(self.first):
                    self.result.loops[where] = together
                    break

    def _check_whole(self) -> None:
        """Reject a loss of which nothing belongs to the examples, or whose rest depends on outputs and labels."""
        try:
            shares = read_shares(self.first, self.result, self.batch)
        except Replan as replan:
            raise CannotCompare(_NOTHING) from replan
        together = read_shares(self.first, replace(self.result, averages=True), self.batch).weights.sum()
        self.result.averages = abs(float(together) - 1) < tolerance(self.first)
        self._find_smoothing()
        rest, self.result.has_rest = shares.rest, has_rest(shares, self.first)
        self._anchor_inside()
        total, left = (gradients(value, self.anchors) for value in (self.first.loss, rest))
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
        """The Trainer's label smoothing averages two losses: that of the label, and the mean over all classes."""
        found = [
            one for one in self.first.reductions.noted if one.place in self.result.taken and _is_smoothing(one.place)
        ]
        logits = next((one for one in self.anchors if one.ndim > 1), None)
        if len(found) == 2 and logits is not None:
            uniform = min(found, key=lambda one: float(one.factor.abs().mean()))
            self.result.classes[uniform.place] = logits.shape[-1]
            self.result.averages = True

    def _anchor_inside(self) -> None:
        """Without an output that the loss depends on, the rest is checked at the earliest activation with rows."""
        if self.anchors or not self.result.has_rest:
            return
        rows = self.rows * self.result.rows_per_example
        for number, one in enumerate(self.first.activations):
            if len(one) == rows and _nonzero(gradients(self.first.loss, [one])[0]):
                others = self.moved.activations if self.moved is not None else []
                self.anchors = [one]
                self._inside = others[number : number + 1] if len(others) == len(self.first.activations) else []
                return

    def _check_linear(self) -> None:
        """Reject coefficients that depend on the loss itself, as in the root or the logarithm of a mean."""
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
                    "the loss is not a weighted sum of the examples' losses: the weight of "
                    f"{reduction.place.function} at {reduction.place.line} depends on the loss itself (the root or "
                    "logarithm of a mean, or a product of two losses). Use a loss that is a mean or sum over the "
                    "examples, or pass per_example_loss_func(outputs, inputs) -> (batch,)."
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
        """Whether the loss uses the labels at all; a column of them may be left over from another task."""
        if self.moved is None or self.moved_outputs or not self.anchors:
            return True
        if _differ(self.first.loss, self.moved.loss, 1e-6):
            return True
        return self._gradients_move(self.first.loss, self.moved.loss, 1e-5)

    def _gradients_move(self, value: Tensor, moved: Tensor, relative: float) -> bool:
        """Whether the gradient of a scalar at the outputs changes when the labels are exchanged."""
        ours, theirs = gradients(value, self.anchors), gradients(moved, self._moved_anchors())
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


def _is_smoothing(place: Place) -> bool:
    return place.line.split(":")[0].endswith(_SMOOTHING)


def _reached(loss: Tensor, tensors: Sequence[Tensor], rows: int) -> list[Tensor]:
    """The tensors with `rows` rows that the loss depends on."""
    found = [tensor for tensor in tensors if tensor.ndim and tensor.requires_grad and len(tensor) == rows]
    pairs = zip(found, gradients(loss, found), strict=True)
    return [tensor for tensor, gradient in pairs if _nonzero(gradient)]


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
