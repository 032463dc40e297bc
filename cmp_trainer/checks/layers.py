"""Checks on the first batch, when the stack is known: can its layers be skipped, and can variants share them?"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from cmp_trainer.ablations.protocol import Ablation
from cmp_trainer.ablations.skip import SkipLayers
from cmp_trainer.execution.boundary import REENTRANT, CannotShare
from cmp_trainer.execution.forwards import Forwards
from cmp_trainer.execution.layers import NoStack, Stack
from cmp_trainer.execution.processes import num_processes
from cmp_trainer.execution.shared import Lower, lower_parts
from cmp_trainer.losses.shares import Plan

logger = logging.getLogger(__name__)


def check_skips(step: Any, model: nn.Module, stack: Stack) -> None:
    """The layers that the variants skip, now that the stack is known.

    Raises:
        NoStack: the stack has no such layers, or they cannot be left out.
    """
    num_layers, name = len(stack.layers), stack.name
    for number, kind in enumerate(step.kinds):
        if not kind.skips_layers:
            continue
        most = step.variants[-1].levels[number]
        try:
            skipped = [{*kind.skipped_layers(level, num_layers)} for level in range(1 + most)]
        except ValueError as error:
            raise NoStack(f"{name}, the stack of {type(model).__name__}: {error}") from error
        for level, (fewer, more) in enumerate(pairwise(skipped), start=1):
            if len(more) <= len(fewer) or not more <= {*range(num_layers)}:
                raise NoStack(
                    f"{type(kind).__name__} skips the layers {sorted(more)} at level {level}, after {sorted(fewer)}; "
                    f"expected more of them, and of the {num_layers} of {name} (0 to {num_layers - 1})."
                )
        methods = ("batches", "context", "calls")
        others = [one for one in methods if getattr(type(kind), one) is not getattr(Ablation, one)]
        if others:
            raise NoStack(
                f"{type(kind).__name__} skips layers and also overrides {', '.join(others)}, so variants could share "
                "layers that it changes. Make two ablations of it."
            )
        if any(carry is None for carry in stack.carries[1:]):
            raise NoStack(
                f"{type(kind).__name__} cannot skip layers of {name}, the stack of {type(model).__name__}: they "
                "change the shape of what they are given, carry further states, or are spread over several lists."
            )
        draws = {frozenset(kind.skipped_layers(most, num_layers)) for _ in range(8)}
        if num_processes() > 1 and len(draws) > 1 and _is_sharded(step.model):
            raise NoStack(
                "processes that share their weights have to run the same layers, and random ones differ between "
                "them; skip the top ones (--cmp_skip_order top)."
            )


def _is_sharded(model: nn.Module) -> bool:
    """Whether processes hold parts of the weights: under FSDP, or stage 3 of DeepSpeed."""
    modules = list(model.modules())
    by_fsdp = any(hasattr(one, "_get_fsdp_state") or type(one).__name__.startswith("FullySharded") for one in modules)
    return by_fsdp or any(hasattr(parameter, "ds_id") for parameter in model.parameters())


def shares_lower(step: Any, forwards: Forwards, batches: Mapping[tuple, Any]) -> bool:
    """Whether running once what variants have in common gives what running it for each of them gives."""
    if forwards.boundary is None:
        return False
    lowers = lower_parts(step.kinds, [variant.levels for variant in step.variants], forwards.boundary)
    groups = [[one for one in step.variants if lowers.get(one.levels) is lower] for lower in set(lowers.values())]
    if not groups:
        return False  # each variant has an input of its own
    group = max(groups, key=len)
    plan, written = step._plan, forwards.boundary.written
    try:
        for compared in _shares_most(step, forwards):
            separate = _shares_and_gradients(step, compared, plan, batches, (group[0], group[-1]), None)
            while True:
                known, lower = len(written), Lower()
                try:
                    shared = _shares_and_gradients(step, compared, plan, batches, (group[0], group[-1]), lower)
                    break
                except CannotShare:
                    if len(written) == known:
                        raise
            if not _are_alike(separate, shared):
                raise CannotShare("the losses or their gradients differ from those of separate forwards.")
        return True
    except CannotShare as error:
        reason = str(error)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # of the model or the loss, which both did in separate forwards
        reason = f"a forward with shared layers fails ({error})."
    warn_of_separate_layers(reason)
    return False


def _shares_most(step: Any, forwards: Forwards) -> Iterator[Forwards]:
    """Forwards that share what the first batch's draw lets them, and, where layers are skipped, all layers but one."""
    yield forwards
    if any(kind.skips_layers for kind in forwards.kinds) and forwards.boundary is not None:
        last = SkipLayers([len(forwards.boundary.stack.layers) - 1])
        most = step._forwards(forwards.model, forwards.loss_fn, forwards.start)
        most.kinds = [last if kind.skips_layers else kind for kind in forwards.kinds]
        yield most


def _are_alike(some: Sequence[Tensor], others: Sequence[Tensor]) -> bool:
    """Whether shares are equal, and gradients to the tolerance of the largest one."""
    size = max((float(one.abs().max()) for one in some[1:] if one.numel()), default=0.0) or 1.0
    gradients = zip(some[1:], others[1:], strict=True)
    return _same(some[0], others[0]) and all(_same(one / size, other / size) for one, other in gradients)


def warn_of_separate_layers(reason: object) -> None:
    """Say why the layers that variants have in common run for each of them."""
    logger.warning(
        "layers that the variants have in common cannot be shared, so they run once for each variant: slower, with "
        "the same result. Reason: %s",
        reason,
    )


def _shares_and_gradients(
    step: Any, forwards: Forwards, plan: Plan, batches: Mapping[tuple, Any], variants: Sequence[Any], lower: Any
) -> list[Tensor]:
    """The shares of some variants, and the gradients of a randomly weighted sum of them, where these can be asked
    for: sharded weights have none."""
    read = [step._read(forwards, plan, batches, variant, lower).values for variant in variants]
    values = torch.cat(read)
    model = forwards.model
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if any(hasattr(module, "_get_fsdp_state") for module in model.modules()) or not values.requires_grad:
        return [values.detach()]
    weights = torch.arange(1, values.numel() + 1, dtype=values.dtype, device=values.device).sin().view_as(values)
    try:
        found = torch.autograd.grad((values * weights).sum(), parameters, allow_unused=True)
    except RuntimeError as error:
        if "use_reentrant" not in str(error):
            raise
        raise CannotShare(REENTRANT) from error
    return [values.detach(), *(torch.zeros(()) if one is None else one for one in found)]


def _same(one: Tensor, other: Tensor) -> bool:
    precise = one.dtype in (torch.float32, torch.float64) and not torch.is_autocast_enabled(one.device.type)
    tolerance = 1e-4 if precise and one.device.type == "cpu" else 2e-2
    return one.shape == other.shape and torch.allclose(one, other, rtol=tolerance, atol=tolerance)
