"""When variants are stacked: whether it was found to be right on the first batch, and whether it is faster.

See stacked.py for what a stacked forward is.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from cmp_trainer.ablations.crop import CmpCrop
from cmp_trainer.ablations.drop import CmpDrop
from cmp_trainer.ablations.plan import Variant
from cmp_trainer.ablations.protocol import Ablation
from cmp_trainer.execution.boundary import CannotShare
from cmp_trainer.execution.forwards import Forwards
from cmp_trainer.execution.processes import num_processes
from cmp_trainer.execution.shared import FirstGroup, NotedShapes
from cmp_trainer.execution.stacked import CannotStack, NotedSites, StackedDrop, check_no_batch_norm, row_names, stack
from cmp_trainer.losses.layouts import Layout, entries, num_rows
from cmp_trainer.losses.reductions import Place
from cmp_trainer.losses.shares import Plan, Replan, Shares, read_shares
from cmp_trainer.losses.sign_test import deviation, rest_beyond_rounding, tolerance

logger = logging.getLogger(__name__)

STACKING_PAYS_UP_TO = {"cpu": 1024, "cuda": 4096}
"""Positions (of tokens, patches or frames) in a batch up to which one stacked forward was measured to be faster, see
docs/performance.md; elsewhere it was not measured."""


def prefer_stacked(batch: Any, choice: str, positions_each: float = 1.0) -> bool:
    """Whether a batch is stacked, given that it can be: `auto` stacks small batches, in one process.

    Args:
        positions_each: how many positions the layers see for each of `numbers(batch)`.
    """
    devices = {value.device.type for _, value in entries(batch) if isinstance(value, Tensor) and value.ndim > 1}
    most = min((STACKING_PAYS_UP_TO.get(device, 0) for device in devices), default=STACKING_PAYS_UP_TO["cpu"])
    small = numbers(batch) * positions_each <= most
    return choice == "stacked" or (choice == "auto" and small and num_processes() == 1)


def numbers(batch: Any) -> int:
    """The size of the largest input of a batch: its tokens, or the numbers of an input that is not tokens."""
    tensors = [value for _, value in entries(batch) if isinstance(value, Tensor) and value.ndim > 1]
    sizes = [tensor.numel() if tensor.is_floating_point() else tensor.shape[:2].numel() for tensor in tensors]
    return max(sizes, default=0)


class Stacking:
    """Stacked forwards of a model for which they were found to be right.

    Args:
        forwards, batches, variants: those of the first batch.
        plan: where the shares of the loss are.
        shares_lower: whether layers below the boundary run once for all variants.

    Raises:
        CannotStack: the model or its loss does not keep the rows of a stacked batch apart; says where.
    """

    def __init__(
        self,
        forwards: Forwards,
        batches: Mapping[tuple, Any],
        variants: Sequence[Variant],
        plan: Plan,
        shares_lower: bool = False,
    ) -> None:
        self.plan = plan
        self._shapes: dict[int, NotedShapes] | None = {} if shares_lower else None  # by the number of groups
        self.drop_kind = _drop_kind(forwards.kinds, plan)
        full = batches[variants[0].levels]
        if not isinstance(full, Mapping):
            raise CannotStack(f"the batch is a {type(full).__name__}, not a mapping.")
        check_no_batch_norm(forwards.model)
        self.names = row_names(full, num_rows(full) or 0)
        self.factors: dict[Place, float] = {}
        self._has_warned = False
        self.has_rest = False  # a part of the loss that belongs to no row appeared after the first batch
        self._compare_with_single_forwards(forwards, batches, variants)

    def run(
        self, forwards: Forwards, batches: Mapping[tuple, Any], variants: Sequence[Variant]
    ) -> list[Shares] | None:
        """The shares of all variants, the full one first; None where this batch does not fit the plan."""
        if self.has_rest:
            return None
        shares: list[Shares] = []
        names = self.names & row_names(batches[variants[0].levels], num_rows(batches[variants[0].levels]) or 0)
        for group in self._groups(variants):
            batch, drop = batches[group[0].levels], self._drop_of(forwards, group)
            kinds = [drop if number == self.drop_kind else kind for number, kind in enumerate(forwards.kinds)]
            stacked = stack(batch, names, len(group))
            try:
                forward = forwards.run(stacked, group[0].levels, kinds=kinds, lower=self._lower(stacked, len(group)))
                found = read_shares(forward, self.plan, stacked, self.factors if len(group) > 1 else None)
            except CannotShare as error:
                if not self._has_warned:
                    self._has_warned = True
                    logger.warning(
                        "a batch could not be stacked, so its variants run one after the other (said once): %s", error
                    )
                return None
            except (Replan, KeyError):
                return None
            rest, off = rest_beyond_rounding(found, forward), deviation(found, forward, self.plan)
            off = torch.zeros_like(rest) if off is None else off.to(rest) / tolerance(forward)
            rest, off = torch.stack([rest, off]).tolist()  # the one time that a stacked step waits for its device
            if off > 1:
                return None
            if rest > 1:
                self.has_rest = True
                logger.warning(
                    "the loss now has a part that belongs to no example. From here on the variants run one after the "
                    "other instead of in one stacked forward."
                )
                return None
            pairs = zip(found.values.chunk(len(group)), found.weights.chunk(len(group)), strict=True)
            shares += [Shares(values, weights, found.rest) for values, weights in pairs]
        return shares

    def _groups(self, variants: Sequence[Variant]) -> list[list[Variant]]:
        """Variants of the same input, which share a forward."""

        def key(variant: Variant) -> tuple:
            return tuple(level for kind, level in enumerate(variant.levels) if kind != self.drop_kind)

        return [list(group) for _, group in itertools.groupby(variants, key=key)]

    def _drop_of(self, forwards: Forwards, group: Sequence[Variant]) -> Ablation:
        drop = forwards.kinds[self.drop_kind]
        assert isinstance(drop, CmpDrop)
        return StackedDrop(drop, [variant.levels[self.drop_kind] for variant in group]) if len(group) > 1 else drop

    def _compare_with_single_forwards(
        self, forwards: Forwards, batches: Mapping[tuple, Any], variants: Sequence[Variant]
    ) -> None:
        """Compare dropout calls, losses and gradients of the first group with those of a forward per variant."""
        group = max(self._groups(variants), key=len)
        if len(group) < 2:
            raise CannotStack("no two variants have the same input.")
        batch, drop = batches[group[0].levels], forwards.kinds[self.drop_kind]
        rows = num_rows(batch) or 0
        self._note_shapes(forwards, batch, {len(one) for one in self._groups(variants)}, group[0])
        singles, sites = [], []
        for variant in group:
            noted = NotedSites(drop, variant.levels[self.drop_kind])
            singles.append(forwards.run(batch, variant.levels, kinds=self._with(forwards, noted)))
            sites.append(noted.results)
        noted = NotedSites(self._drop_of(forwards, group))
        stacked_batch = stack(batch, self.names, len(group))
        kinds = self._with(forwards, noted)
        try:
            lower = self._lower(stacked_batch, len(group))
            stacked = forwards.run(stacked_batch, group[0].levels, kinds=kinds, lower=lower)
        except CannotShare as error:
            raise CannotStack(str(error)) from error
        precise = tolerance(stacked) <= 1e-3 and stacked.loss.device.type == "cpu"
        rtol, atol = (1e-4, 1e-6) if precise else (1e-2, 1e-3)
        for number, result in enumerate(noted.results):
            each = [one[number] for one in sites if number < len(one)]
            if len(each) < len(group) or torch.cat(each).shape != result.shape:
                raise CannotStack(f"dropout call {number + 1} of the forward does not drop rows of the batch.")
            if not torch.allclose(torch.cat(each), result, rtol=rtol, atol=atol):
                raise CannotStack(f"dropout call {number + 1} of the forward mixes the rows of the batch.")
        read = [read_shares(one, self.plan, batch) for one in singles]
        self.factors = self._factors(singles[0], stacked, len(group))
        try:
            found = read_shares(stacked, self.plan, stacked_batch, self.factors)
        except (Replan, KeyError) as error:
            raise CannotStack("its loss is made in another way.") from error
        expected = torch.cat([one.values for one in read])
        size = float(expected.detach().abs().max())
        if len(found.values) != rows * len(group) // self.plan.rows_per_example:
            raise CannotStack("its loss does not have the stacked rows.")
        difference = (found.values - expected).abs().max()
        if not torch.allclose(found.values, expected, rtol=3 * rtol, atol=size * rtol):
            raise CannotStack(f"its losses differ by up to {difference:.3g}.")
        _compare_gradients(forwards.model, found.values, expected, rtol)

    def _note_shapes(self, forwards: Forwards, batch: Any, sizes: set[int], variant: Variant) -> None:
        """Note what the modules below the boundary take and return, in a single and in stacked forwards."""
        if self._shapes is None:
            return
        for size in sorted({1, *sizes}):
            stacked = stack(batch, self.names, size) if size > 1 else batch
            self._shapes[size] = NotedShapes((num_rows(batch) or 0) * size)
            with torch.no_grad():
                forwards.run(stacked, variant.levels, only=set(), lower=self._shapes[size])

    def _lower(self, stacked: Any, groups: int) -> FirstGroup | None:
        if self._shapes is None or groups == 1:
            return None
        return FirstGroup(num_rows(stacked) or 0, groups, self._shapes[1], self._shapes[groups])

    def _with(self, forwards: Forwards, drop: Ablation) -> list[Ablation]:
        return [drop if number == self.drop_kind else kind for number, kind in enumerate(forwards.kinds)]

    def _factors(self, single: Any, stacked: Any, groups: int) -> dict[Place, float]:
        """1 for sums, the number of groups for means, for each reduction of the loss."""
        alone = {one.place: one for one in single.reductions.noted if one.coefficient is not None}
        for one in stacked.reductions.noted:
            one.gate.passes = one.place not in self.plan.taken
        stacked.reductions.read(stacked.loss)
        factors = {}
        for one in stacked.reductions.noted:
            if one.coefficient is None or one.place not in self.plan.taken:
                continue
            if one.place not in alone:
                raise CannotStack("its loss is made in another way.")
            ratio = float(alone[one.place].factor.abs().mean() / one.factor.abs().mean().clamp(min=1e-30))
            nearest = min((1.0, float(groups)), key=lambda factor: abs(factor - ratio))
            if abs(nearest - ratio) > 1e-2 * nearest:
                raise CannotStack(f"its loss counts stacked rows {ratio:.3g} times.")
            factors[one.place] = nearest
        return factors


def _drop_kind(kinds: Sequence[Ablation], plan: Plan) -> int:
    drops = [number for number, kind in enumerate(kinds) if type(kind) is CmpDrop]
    if len(drops) != 1 or any(type(kind) not in (CmpDrop, CmpCrop) for kind in kinds):
        raise CannotStack("only variants of one CmpDrop, with or without crops, can be stacked.")
    by_row = all(
        layout in (Layout("dim", 0), Layout("inner", 1), Layout("declared")) for layout in plan.taken.values()
    )
    reasons = {
        "part of its loss belongs to no example.": plan.has_rest,
        "an example's loss depends on other rows too.": plan.crosses,
        "all labels of the first batch are the same, so it is not known yet what they change.": plan.undecided,
        "its loss does not follow the rows one by one.": plan.loops or plan.rows_per_example > 1 or not by_row,
    }
    for reason, holds in reasons.items():
        if holds:
            raise CannotStack(reason)
    return drops[0]


def _compare_gradients(model: torch.nn.Module, found: Tensor, expected: Tensor, rtol: float) -> None:
    """Compare the gradients of randomly weighted shares: equal losses can hide a difference."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    weights = torch.arange(1, found.numel() + 1, dtype=found.dtype, device=found.device).sin().view_as(found)

    def gradients(values: Tensor, weights: Tensor, keep: bool = False) -> Sequence[Tensor | None]:
        return torch.autograd.grad((values * weights).sum(), parameters, allow_unused=True, retain_graph=keep)

    rounds = rtol > 1e-3
    ours, theirs = gradients(found, weights), gradients(expected, weights, keep=rounds)
    # What rounding leaves is in proportion to the gradients before those of different signs cancel each other.
    sizes = gradients(expected, weights.abs()) if rounds else theirs
    size = max((float(one.abs().max()) for one in sizes if one is not None and one.numel()), default=0.0)
    for one, other in zip(ours, theirs, strict=True):
        if (one is None) != (other is None):
            raise CannotStack("its gradients differ.")
        if one is None or other is None:
            continue
        # In 16 bit of the size of the largest one: some gradients are only rounding, as those of key biases are.
        own = float(other.abs().max()) * 10
        if not torch.allclose(one, other, rtol=10 * rtol, atol=(size if rounds else own) * rtol + 1e-8):
            raise CannotStack(f"its gradients differ by up to {(one - other).abs().max():.3g}.")
