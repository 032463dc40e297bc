"""One comparative step of any PyTorch model, in any loop.

    batch -> crop -> for each variant: restore the random state, enter the ablations, run the loss, read the shares
          -> objective over the shares + the rest of the full model's loss -> log

The loss is whatever would have been minimized anyway: `model(**batch).loss`, or what a function of your own returns.
Nothing here knows a Trainer; CmpTrainer is built on this.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from cmp_trainer.ablations.crop import CmpCrop, removed_tokens
from cmp_trainer.ablations.plan import Variant, variants_of
from cmp_trainer.ablations.protocol import Ablation
from cmp_trainer.checks.first_batch import check_first_batch, writes_into_inputs
from cmp_trainer.checks.layers import check_skips, warn_of_separate_layers
from cmp_trainer.checks.settings import check_ablations, check_step
from cmp_trainer.checks.training import (
    check_crops_removed,
    check_differed,
    check_finite,
    check_loss_is_visible,
    check_sign_test,
)
from cmp_trainer.execution.ablated import Ablated
from cmp_trainer.execution.boundary import Boundary, CannotShare
from cmp_trainer.execution.compiled import is_compiled
from cmp_trainer.execution.forwards import Forwards, LossFunction, own_containers, versions
from cmp_trainer.execution.layers import find_stack
from cmp_trainer.execution.low_memory import loss_in_backward
from cmp_trainer.execution.modes import unchanged_buffers
from cmp_trainer.execution.one_forward import devices_of, in_one_forward, inner_model, is_wrapper
from cmp_trainer.execution.processes import agreed_batch, num_processes
from cmp_trainer.execution.random_state import RandomState, preserve_rng_state, rng_restart
from cmp_trainer.execution.shared import Lower, lower_parts
from cmp_trainer.execution.stacking import Stacking, numbers, prefer_stacked
from cmp_trainer.losses.comparative import ComparativeLoss, Objective, minimized
from cmp_trainer.losses.layouts import entries, is_label
from cmp_trainer.losses.planning import make_plan
from cmp_trainer.losses.shares import CannotCompare, Forward, Plan, Replan, Shares, read_shares
from cmp_trainer.losses.sign_test import deviation, tolerance
from cmp_trainer.reports.loss_log import LossLog

logger = logging.getLogger(__name__)

ForwardChoice = Literal["auto", "sequential", "stacked"]
_CHECK_EVERY = 64  # steps after which the sign test's result is read from an accelerator, besides at each log


class VariantLosses(NamedTuple):
    """Each example's own mean losses of every variant, `(batch, parts, 1 + c)`, and their weights `(batch, parts)`."""

    values: Tensor
    weights: Tensor


def model_loss(model: nn.Module, batch: Any) -> Tensor:
    """The loss that a model returns, as `loss`, under that key, or as the first of a tuple.

    Raises:
        ValueError: there is none.
    """
    outputs = model(**batch) if isinstance(batch, Mapping) else model(batch)
    if isinstance(outputs, Mapping):
        loss = outputs.get("loss")
    else:
        loss = outputs[0] if isinstance(outputs, tuple) else getattr(outputs, "loss", outputs)
    if not isinstance(loss, Tensor):
        given = ", ".join(outputs) if isinstance(outputs, Mapping) else type(outputs).__name__
        raise ValueError(
            f"the model returned no loss, only {given}. Add labels to the batch, or call step(batch, loss_fn) with "
            "loss_fn(model, batch) -> scalar."
        )
    return loss


model_loss.stackable = True  # pyright: ignore[reportFunctionMemberAccess]  looks at nothing but the model's loss


class ComparativeStep:
    """A training step's loss with comparative loss: `step(batch).backward()`.

    Args:
        model: any module in train mode, also wrapped by DistributedDataParallel, torch.compile, PEFT or accelerate.
        ablations: one for each ablated variant, from least to most ablated; each goes one level further in its kind.
            `cmp_trainer.plan(num_ablations=2)` makes them.
        objective: `(…, 1 + c) -> (…)` over the examples' own mean losses: ComparativeLoss, RegularizedLoss, or any
            callable.
        forward: `sequential`, one forward a variant; `stacked`, one forward for all drop variants; `auto`, stacked
            where that was measured to be faster and was found to be right.
        low_memory: exact gradients at the activation memory of one variant, for c more forwards.
        ablated_layers: N, only the top N layers of the model and its head are ablated, and the layers below them run
            once for all variants; the whole model where None.
        processing_class, data_collator: the tokenizer and the data collator, which crops take their padding from.

    Raises:
        ValueError: a setting in which nothing can be compared; in the first step, a model or a loss of which that is
            found out. The message says what was found and what to do.

    Examples:
        >>> from torch import nn
        >>> from cmp_trainer import CmpDrop, ComparativeLoss, ComparativeStep
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.2), nn.Linear(8, 3))
        >>> step = ComparativeStep(model, [CmpDrop(), CmpDrop()], ComparativeLoss(baseline="first"))
        >>> def loss_fn(model, batch):
        ...     return nn.functional.cross_entropy(model(batch["x"]), batch["labels"])
        >>> loss = step({"x": torch.randn(6, 4), "labels": torch.tensor([0, 1, 2, 0, 1, 2])}, loss_fn)
        >>> loss.backward()
        >>> list(step.log())
        ['loss_full', 'loss_ablated_1', 'loss_ablated_2', 'violation_rate']
    """

    def __init__(
        self,
        model: nn.Module,
        ablations: Iterable[Ablation],
        objective: Objective | None = None,
        *,
        forward: ForwardChoice = "auto",
        low_memory: bool = False,
        ablated_layers: int | None = None,
        processing_class: Any = None,
        data_collator: Any = None,
    ) -> None:
        self.model = model
        self.objective: Objective = ComparativeLoss() if objective is None else objective
        self.forward, self.low_memory, self.ablated_layers = forward, low_memory, ablated_layers
        bare = bare_model(model)
        bound: dict[Any, Ablation] = {}
        given = list(ablations)
        check_ablations(given)
        for ablation in given:
            bound.setdefault(ablation, ablation.for_model(bare, processing_class, data_collator))
        self.kinds, self.variants = variants_of([bound[ablation] for ablation in given])
        check_step(self)
        self.losses_log = LossLog([variant.name for variant in self.variants])
        self.settings_may_change = False  # whether callbacks may change dropout rates later on
        self.dropped_nothing = False  # whether no dropout rate was positive on the first batch
        self.num_comparisons = 0
        self._plans: dict[bool, Plan] = {}
        self._stacking: Stacking | None = None
        self._boundary: Boundary | None = None
        self._shares_lower = False
        self._positions_each = 1.0
        self._checked = self._copies = self._is_compiled = False
        self._batches_seen = self._next_replan = 0
        self._deviation: Tensor | None = None
        self._removed: Tensor | None = None

    def __call__(self, batch: Any, loss_fn: LossFunction | None = None) -> Tensor:
        """The loss to minimize: that of the comparison, and the rest of the full model's loss.

        Args:
            batch: a mapping or sequence of tensors, whose first dimension is the batch.
            loss_fn: `(model, batch) -> scalar`; `model(**batch).loss` by default. It is called once for each variant,
                for the full one first.

        Raises:
            ValueError: the loss cannot be compared; says why.
        """
        loss_fn = loss_fn or model_loss
        self._find_boundary(batch, loss_fn)
        run = partial(self._step, batch, loss_fn)
        if self.low_memory and torch.is_grad_enabled():
            with inner_model(self.model, self._parts) as model:
                return run(model)
        return in_one_forward(self.model, run, self._parts)

    def log(self, reduce: Callable[[Tensor], Tensor] | None = None) -> dict[str, float]:
        """Mean losses of the variants and the violation rate since the last call; empty when nothing was compared.

        Args:
            reduce: sums a tensor over the processes.
        """
        self._check_deviation()
        device = next((parameter.device for parameter in self.model.parameters()), torch.device("cpu"))
        return self.losses_log.pop(reduce, device=device)

    def losses(self, batch: Any, loss_fn: LossFunction | None = None, variants: Sequence[Variant] | None = None):
        """VariantLosses of a batch without a gradient, of all variants by default; the random state is unchanged."""
        loss_fn, devices = loss_fn or model_loss, self.devices(batch)
        variants = self.variants if variants is None else variants
        self._find_boundary(batch, loss_fn)
        with preserve_rng_state(devices), torch.no_grad(), inner_model(self.model, self._parts) as model:
            batches = self._batches(batch, variants)
            forwards = self._forwards(model, loss_fn, RandomState.capture(devices))
            plan = self._plan_of(forwards, batch, variants[0], batches)
            if plan is None:
                return None
            shares = [self._read(forwards, plan, batches, variant) for variant in variants]
        weights = shares[0].weights
        values = torch.stack([one.values for one in shares], -1) / weights.masked_fill(weights == 0, 1).unsqueeze(-1)
        return VariantLosses(values, weights)

    def num_layers(self, batch: Any, loss_fn: LossFunction | None = None) -> int:
        """How many layers the stack has whose layers are skipped, or of which the top ones are ablated."""
        self._find_boundary(batch, loss_fn or model_loss)
        if self._boundary is None:
            raise ValueError("no layers are skipped, and the whole model is ablated, so no stack is looked for.")
        return len(self._boundary.stack.layers)

    def batch_at(self, batch: Any, levels: tuple[int, ...], most: tuple[int, ...]) -> Any:
        """A batch at a level of every kind, drawn as if up to the level `most` were asked for."""
        return self._batches(batch, [Variant("", most)])[levels]

    def measure(self, batch: Any, loss_fn: LossFunction, levels: tuple[int, ...]) -> tuple[Tensor, Any]:
        """The loss of a batch at a level of every kind, and VariantLosses `(batch, parts)` of its examples, None where
        nothing has a label. Runs from the random state that it finds; without a gradient."""
        full = self.variants[0]  # planned without an ablation
        self._find_boundary(batch, loss_fn)
        with torch.no_grad(), inner_model(self.model, self._parts) as model:
            forwards = self._forwards(model, loss_fn, RandomState.capture(self.devices(batch)))
            plan = self._plan_of(forwards, batch, full, {full.levels: batch})
            forward = forwards.run(batch, levels, only=set() if plan is None else plan.places)
            if plan is None:
                return forward.loss, None
            shares = read_shares(forward, plan, batch)
        weights = shares.weights
        return forward.loss.detach(), VariantLosses(shares.values / weights.masked_fill(weights == 0, 1), weights)

    def ablated(self, batch: Any, loss_fn: LossFunction, levels: tuple[int, ...], start: RandomState) -> Ablated:
        """Context in which a forward of this batch runs at a level of every kind."""
        self._find_boundary(batch, loss_fn)
        return Ablated(self.kinds, levels, start, boundary=self._boundary)

    def prefers_stacked(self, batch: Any) -> bool:
        """Whether this batch is stacked, given that it can be."""
        return prefer_stacked(batch, self.forward, self._positions_each)

    def check_again(self) -> None:
        """Check the next batch like the first one, after a change to something that the checks depend on."""
        self._checked, self._stacking, self._boundary, self._plans = False, None, None, {}
        self._shares_lower = False

    def check_end(self) -> None:
        """Check what can only be seen at the end of a training.

        Raises:
            ValueError: crops never removed anything.
        """
        self._check_deviation()
        check_crops_removed(self._removed)
        if self.dropped_nothing:
            self.losses_log.pop()
            check_differed(self.dropped_nothing, self.losses_log.differed)

    # --- a step ---

    def _step(self, batch: Any, loss_fn: LossFunction, model: nn.Module) -> Tensor:
        devices = self.devices(batch)
        with rng_restart(devices):  # where an error leaves the random state, crops included
            batches = self._batches(batch, self.variants)
            forwards = self._forwards(model, loss_fn, RandomState.capture(devices))
            if not self._checked:
                self._check_first(forwards, batches)
            if hasattr(loss_fn, "begin"):
                loss_fn.begin()  # what was run so far were checks
            try:
                end = self._run(forwards, batches, devices)
            except CannotShare as error:
                if num_processes() > 1:  # which do equally many forwards
                    raise CannotShare(f"{error} That is new in this batch; use one process.") from error
                warn_of_separate_layers(error)
                self._shares_lower = False
                end = self._run(forwards, batches, devices)
        self._batches_seen += 1
        self._note_removed(batches)
        return end

    def _run(self, forwards: Forwards, batches: Mapping[tuple, Any], devices: set[torch.device]) -> Tensor:
        full = batches[self.variants[0].levels]
        if self.low_memory and torch.is_grad_enabled():
            return self._low_memory(forwards, batches, devices)
        if not torch.is_grad_enabled():
            raise ValueError("a comparative step needs gradients; step.losses(batch) measures without them.")
        wants_outputs = getattr(forwards.loss_fn, "return_outputs", False)
        if self._stacking is not None and not wants_outputs and self.prefers_stacked(full):
            stacked = self._stacking.run(forwards, batches, self.variants)
            if stacked is not None:
                return self._minimized(stacked)
        before, lowers = versions(full), self._lowers()
        forward, shares = self._full(forwards, full, lowers.get(self.variants[0].levels))
        if not self._copies and versions(full) != before:
            raise CannotCompare(
                "the model writes into the tensors of its batch, which it did not do on the first batch, so the "
                "ablated variants would see other inputs. Make it work on copies."
            )
        if shares is None:
            return forward.loss  # nothing in this batch has a label
        read = partial(self._read, forwards, self._plan, batches)
        every = [shares, *(read(variant, lowers.get(variant.levels)) for variant in self.variants[1:])]
        return self._minimized(every)

    def _minimized(self, shares: Sequence[Shares]) -> Tensor:
        values, weights = torch.stack([one.values for one in shares], -1), shares[0].weights  # (batch, parts, 1 + c)
        self._note(values, weights)
        return minimized(self.objective, values, weights) + shares[0].rest

    def _note(self, values: Tensor, weights: Tensor) -> None:
        losses = values.detach() / weights.masked_fill(weights == 0, 1).unsqueeze(-1)
        self.losses_log.add(losses, weights)
        self.num_comparisons += 1

    def _low_memory(self, forwards: Forwards, batches: Mapping[tuple, Any], devices: set[torch.device]) -> Tensor:
        full, *others, last = self.variants
        lowers = self._lowers()
        lower = lowers.get(full.levels)
        if lower is not None:
            lower.keeps_graph = True
        # Forwards without a graph run uncompiled, and inductor draws other masks: a compiled model makes a graph here
        # too, and lets go of it before the next forward.
        with torch.set_grad_enabled(forwards.is_compiled):
            plan, first = self._full_without_graph(forwards, batches[full.levels], lower)
        if plan is None or first is None:  # nothing in this batch has a label
            return in_one_forward(
                self.model,
                lambda model: (
                    self._forwards(model, forwards.loss_fn, forwards.start).run(batches[full.levels], full.levels).loss
                ),
                self._parts,
            )
        with torch.set_grad_enabled(forwards.is_compiled):
            shares, first = [first.detach()], None
            for one in others:
                shares.append(self._read(forwards, plan, batches, one, lowers.get(one.levels)).detach())
        # Of what variants share, only the full model's keeps its graph.
        with_graph = {levels: one for levels, one in lowers.items() if one is lower}
        if lower is not None:
            lower.returns_leaves = True
        kept = self._read(forwards, plan, batches, last, with_graph.get(last.levels))  # the graph of one may stay
        leaf = torch.stack([one.values for one in (*shares, kept)], -1).detach().requires_grad_()
        value = minimized(self.objective, leaf, shares[0].weights)
        (factors,) = torch.autograd.grad(value, leaf)  # (batch, parts, 1 + c)
        self._note(leaf, shares[0].weights)
        wrapped = self.model

        def term(index: int, model: nn.Module) -> Tensor:
            ours, variant = self._forwards(model, forwards.loss_fn, forwards.start), self.variants[index]
            shares = self._read(ours, plan, batches, variant, with_graph.get(variant.levels))
            scalar = (shares.values * factors[..., index]).sum()
            return scalar + shares.rest if index == 0 else scalar

        def inner_term(index: int) -> Tensor:
            with inner_model(wrapped, self._parts) as model:
                return term(index, model)

        # Where processes share their weights, all have to do equally many forwards.
        counts = factors.flatten(0, -2).ne(0).any(0).tolist() if num_processes() == 1 else [True] * len(self.variants)
        terms = [lambda: (kept.values * factors[..., -1]).sum()] if counts[-1] else []
        terms += [partial(inner_term, index) for index in range(len(others), 0, -1) if counts[index]]
        terms.append(lambda: in_one_forward(wrapped, partial(term, 0), self._parts))
        return loss_in_backward(value.detach() + shares[0].rest, terms, devices, lower)

    def _full_without_graph(
        self, forwards: Forwards, batch: Any, lower: Lower | None
    ) -> tuple[Plan | None, Shares | None]:
        """The plan and the full model's shares, planned anew with a graph where the plan does not fit."""
        levels, plan = self.variants[0].levels, self._plans.get(True)
        if plan is not None:
            try:
                return plan, read_shares(forwards.run(batch, levels, only=plan.places, lower=lower), plan, batch)
            except Replan:
                pass
        with torch.enable_grad():
            _, shares = self._full(forwards, batch, lower)
        return self._plans.get(True), shares

    # --- shares ---

    @property
    def _plan(self) -> Plan:
        return self._plans[True]

    def _lowers(self) -> dict[tuple[int, ...], Lower]:
        """By the levels of each variant, the layers that it shares with others."""
        if self._boundary is None or not self._shares_lower:
            return {}
        return lower_parts(self.kinds, [one.levels for one in self.variants], self._boundary)

    def _full(self, forwards: Forwards, batch: Any, lower: Lower | None = None) -> tuple[Forward, Shares | None]:
        """The full model's loss and shares, planned anew where the plan does not fit this batch."""
        levels, plan = self.variants[0].levels, self._plans.get(True)
        again = plan is not None and plan.undecided and self._batches_seen >= self._next_replan
        again = again and num_processes() == 1  # processes do equally many forwards
        if plan is not None and not again:
            forward = forwards.run(batch, levels, watch=not plan.anchors and not plan.crosses, lower=lower)
            try:
                shares = read_shares(forward, plan, batch)
                if self._passes(shares, forward, plan):
                    return forward, shares
            except Replan:
                pass
            if _is_unlabelled(batch):
                return forward, None
        self._next_replan = 2 * self._batches_seen + 1
        if lower is not None:
            lower.forget()
        forward = forwards.run(batch, levels, watch=True, lower=lower)
        plan = self._find_plan(forwards, forward, batch)
        if plan is None:
            return forward, None
        self._plans[True] = plan
        self._positions_each = forward.positions / max(1, numbers(batch)) or 1.0
        if forwards.is_compiled:
            check_loss_is_visible(lambda: read_shares(forwards.run(batch, levels), plan, batch))
        return forward, read_shares(forward, plan, batch)

    def _find_plan(self, forwards: Forwards, forward: Forward, batch: Any) -> Plan | None:
        """A plan made on this batch; None where none of it has a label."""
        if _is_unlabelled(batch):
            return None
        check_finite(forward.loss)
        levels = self.variants[0].levels
        with preserve_rng_state(self.devices(batch)):
            try:
                plan = make_plan(lambda other: forwards.run(other, levels, watch=True), forward, batch)
            except CannotCompare:
                if not forward.loss.detach().any():
                    return None
                raise
        if plan.crosses:
            logger.warning(
                "an example's loss also depends on other rows of the batch (in-batch negatives, for instance). What "
                "is compared is each example's own term of the loss."
            )
        return plan

    def _plan_of(self, forwards: Forwards, batch: Any, full: Variant, batches: Mapping[tuple, Any]) -> Plan | None:
        """The plan for evaluation, made with a graph where there is none yet."""
        model = forwards.model
        if model.training in self._plans:
            return self._plans[model.training]
        with torch.enable_grad():
            forward = forwards.run(batches[full.levels], full.levels, watch=True)
            plan = self._find_plan(forwards, forward, batches[full.levels])
        if plan is not None:
            self._plans[model.training] = plan
        return plan

    def _read(
        self,
        forwards: Forwards,
        plan: Plan,
        batches: Mapping[tuple, Any],
        variant: Variant,
        lower: Lower | None = None,
    ) -> Shares:
        only = None if torch.is_grad_enabled() else plan.places
        forward = forwards.run(batches[variant.levels], variant.levels, only=only, lower=lower)
        try:
            return read_shares(forward, plan, batches[variant.levels])
        except Replan as replan:
            raise CannotCompare(
                f"the loss of the variant {variant.name} is not made as the full model's: {replan}. A loss that takes "
                "another path under ablation cannot be compared."
            ) from replan

    def _passes(self, shares: Shares, forward: Forward, plan: Plan) -> bool:
        """The sign test of this batch; on an accelerator its result is read later, so that nothing waits for it."""
        found = deviation(shares, forward, plan)
        if found is None:
            return True
        if found.device.type == "cpu":
            return not found > tolerance(forward)
        found = found / tolerance(forward)
        self._deviation = found if self._deviation is None else torch.maximum(self._deviation, found)
        if self._batches_seen % _CHECK_EVERY == _CHECK_EVERY - 1:
            self._check_deviation()
        return True

    def _check_deviation(self) -> None:
        if self._deviation is not None:
            found, self._deviation = float(self._deviation), None
            check_sign_test(found)

    # --- what a step starts from ---

    @property
    def _parts(self) -> Sequence[nn.Module]:
        """What is compiled one by one where torch.compile wraps the model, so that the boundary between is seen."""
        return () if self._boundary is None else self._boundary.modules

    def _find_boundary(self, batch: Any, loss_fn: LossFunction) -> None:
        """Find the stack of layers, where layers are skipped or the top ones alone are ablated."""
        skips = any(kind.skips_layers for kind in self.kinds)
        if self._boundary is not None or not (skips or self.ablated_layers is not None):
            return
        full = self.variants[0]
        devices = self.devices(batch)
        with preserve_rng_state(devices), inner_model(self.model) as model, unchanged_buffers(model):
            batch = own_containers(self._batches(batch, [full])[full.levels], copy_tensors=True)
            forwards = self._forwards(model, loss_fn, None)
            stack = find_stack(model, lambda: forwards.run(batch, full.levels, only=set()), self.ablated_layers)
            check_skips(self, model, stack)
        self._boundary = Boundary(stack, self.ablated_layers)

    def _forwards(self, model: nn.Module, loss_fn: LossFunction, start: RandomState | None) -> Forwards:
        if not self._checked:
            self._is_compiled = is_compiled(model)
        return Forwards(model, loss_fn, self.kinds, start, self._copies, self._is_compiled, self._boundary)

    def devices(self, batch: Any) -> set[torch.device]:
        """The devices that a forward of this batch may draw random numbers on."""
        return devices_of(self.model, [value for _, value in entries(batch) if isinstance(value, Tensor)])

    def _batches(self, batch: Any, variants: Sequence[Variant]) -> dict[tuple[int, ...], Any]:
        """The batch of every variant, by its levels."""
        found: dict[tuple[int, ...], Any] = {(): batch}
        for number, kind in enumerate(self.kinds):
            most = max(variant.levels[number] for variant in variants)
            before = {id(one): one for one in found.values()}
            start = RandomState.capture(self.devices(batch)) if len(before) > 1 else None
            after: dict[int, list[Any]] = {}
            for one in before.values():
                if after and start is not None:
                    start.restore()  # the same draws for the batches of all levels of the kinds before
                after[id(one)] = kind.batches(one, most)
            found = {
                (*levels, level): one
                for levels, earlier in found.items()
                for level, one in enumerate(after[id(earlier)])
            }
        return found

    def _note_removed(self, batches: Mapping[tuple[int, ...], Any]) -> None:
        if any(isinstance(kind, CmpCrop) for kind in self.kinds):
            removed = removed_tokens(batches[self.variants[0].levels], batches[self.variants[-1].levels])
            self._removed = removed if self._removed is None else self._removed + removed

    def _check_first(self, forwards: Forwards, batches: dict[tuple[int, ...], Any]) -> None:
        """Run the checks on this batch, or that of another process; they wait for one with a label."""
        full = batches[self.variants[0].levels]
        device = next((value.device for _, value in entries(full) if isinstance(value, Tensor)), torch.device("cpu"))
        batches = agreed_batch(batches, not _is_unlabelled(full), device)
        if batches is None:
            return
        self._copies = forwards.copies = writes_into_inputs(forwards, batches[self.variants[0].levels], self)
        with preserve_rng_state(forwards.start.devices if forwards.start is not None else ()):
            found = check_first_batch(self, forwards, batches)
        if found:
            self._checked = True
            logger.info("comparative loss: %s", self._description(forwards.loss_fn))

    def _description(self, loss_fn: LossFunction) -> str:
        """What is compared, and how, in one line."""
        calls = {place[:2] for place in self._plan.taken} | set(self._plan.loops)
        places = sorted(f"{function} at {'/'.join(Path(line).parts[-2:])}" for function, line in calls)
        how = "in one stacked forward" if self._stacking is not None else "in one forward per variant"
        how += ", without a graph first and then with one (low memory)" if self.low_memory else ""
        if self._boundary is not None:
            stack = self._boundary.stack
            where = f"the {len(stack.layers)} layers of {stack.name}"
            once = "once" if self._shares_lower else "for each variant"
            if self.ablated_layers is not None:
                how += f"; neurons of the top {self.ablated_layers} of {where} are ablated, those below run {once}"
            if any(kind.skips_layers for kind in self.kinds):
                how += f"; some of {where} are skipped, what variants have in common runs {once}"
        rest = " The part of it that belongs to no example is added once, from the full model."
        return (
            f"comparing {', '.join(variant.name for variant in self.variants)} {how}. The loss comes from "
            f"{getattr(loss_fn, '__name__', type(loss_fn).__name__)}; each example's loss is read from "
            f"{', '.join(places)}.{rest if self._plan.has_rest else ''}"
        )


def bare_model(model: nn.Module) -> nn.Module:
    """The user's model inside of what training wraps around it."""
    model = getattr(model, "_orig_mod", model)
    model = getattr(model.module, "_orig_mod", model.module) if is_wrapper(model) else model  # pyright: ignore
    return model.get_base_model() if hasattr(model, "get_base_model") else model  # pyright: ignore


def _is_unlabelled(batch: Any) -> bool:
    """Whether every label of the batch is ignored."""
    labels = [
        value for name, value in entries(batch) if is_label(name) and isinstance(value, Tensor) and value.numel()
    ]
    return bool(labels) and all(not value.is_floating_point() and bool((value == -100).all()) for value in labels)
