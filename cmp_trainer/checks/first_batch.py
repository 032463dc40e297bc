"""Checks of the model and its loss on the first batch with a label.

A comparison can fail without a trace: variants that are all alike because nothing is dropped, dropout that is run
again in backward at another rate, a full model that is random. Each of these is an error or a warning here, before
time is spent.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.variable import Variable

from cmp_trainer.ablations.crop import CmpCrop
from cmp_trainer.ablations.drop import CmpDrop, in_train_mode, intercepted_dropout
from cmp_trainer.ablations.protocol import Ablation
from cmp_trainer.checks.layers import shares_lower
from cmp_trainer.checks.settings import raise_together
from cmp_trainer.checks.training import check_finite
from cmp_trainer.execution.forwards import Forwards, own_containers, versions
from cmp_trainer.execution.intercept import Intercept
from cmp_trainer.execution.modes import in_eval_mode, unchanged_buffers
from cmp_trainer.execution.one_forward import inner_model, is_data_parallel
from cmp_trainer.execution.processes import num_processes
from cmp_trainer.execution.random_state import RandomState
from cmp_trainer.execution.stacked import CannotStack
from cmp_trainer.execution.stacking import Stacking
from cmp_trainer.losses.shares import Replan, Shares, read_shares

logger = logging.getLogger(__name__)


def check_first_batch(step: Any, forwards: Forwards, batches: Mapping[tuple, Any]) -> bool:
    """Plan the shares and run all checks of a first batch; False when it has no label to check with.

    Raises:
        ValueError: all reasons for which this model or loss cannot be compared.
    """
    full = batches[step.variants[0].levels]
    with unchanged_buffers(forwards.model):
        forward, shares = step._full(forwards, full)
        if shares is None:
            return False
        check_finite(forward.loss)
        problems = [_recomputed_reentrantly(step, forward.loss)]
        shares = shares.detach()
        del forward  # and its graph, before the next one is built
        problems += [_nothing_dropped(step, forwards, full), _nothing_ablated(step, forwards, batches)]
        problems += [_dropped_in_backward(step, forwards, batches)]
        raise_together(problems)
        _warn_of_packing(full)
        _warn_of_differences(step, forwards, full, shares)
        if step.low_memory:
            raise_together([_differs_without_graph(step, forwards, full, shares)])
        step._shares_lower = shares_lower(step, forwards, batches)
        step._stacking = _stacking(step, forwards, batches)
    return True


def _recomputed_reentrantly(step: Any, loss: Tensor) -> str | None:
    """Reentrant layers run one backward per forward of a variant, where these wrappers allow one per step."""
    if step.low_memory or not is_data_parallel(step.model):
        return None
    nodes, seen = [loss.grad_fn], set()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        if node.name() == "CheckpointFunctionBackward":
            return (
                "reentrant gradient checkpointing allows one forward per step under DistributedDataParallel and "
                "DeepSpeed, and a comparison has several. Pass --gradient_checkpointing_kwargs "
                "'{\"use_reentrant\": false}', or, without DeepSpeed, --cmp_low_memory."
            )
        seen.add(node)
        nodes += [parent for parent, _ in node.next_functions]


def _nothing_dropped(step: Any, forwards: Forwards, full: Any) -> str | None:
    """No dropout call of the forward has a positive rate and is in train mode."""
    numbers = [number for number, kind in enumerate(step.kinds) if isinstance(kind, CmpDrop)]
    if not numbers:
        return None
    sites: list[tuple[str, float, bool]] = []
    noted = NotedRates(step.kinds[numbers[0]], sites)
    kinds = [noted if number == numbers[0] else kind for number, kind in enumerate(step.kinds)]
    with torch.no_grad():
        forwards.run(full, step.variants[0].levels, only=set(), kinds=kinds)
    drop = step.kinds[numbers[0]]
    if any(training and drop.rate(rate, 1) > 0 for _, rate, training in sites):
        return None
    problem = _why_nothing_drops(sites, drop, step.model)
    if step.settings_may_change and sites:
        logger.warning("%s Nothing will differ between the variants until a callback changes that.", problem)
        step.dropped_nothing = True
        return None
    return problem


def check_drops(step: Any, batch: Any, loss_fn: Callable[..., Tensor]) -> None:
    """Check that a forward makes a dropout call that drops, before an evaluation under ablation.

    Raises:
        ValueError: it makes none; says why.
    """
    with inner_model(step.model) as model:
        forwards = step._forwards(model, loss_fn, RandomState.capture(step.devices(batch)))
        raise_together([_nothing_dropped(step, forwards, batch)])


def _why_nothing_drops(sites: Sequence[tuple[str, float, bool]], drop: CmpDrop, model: nn.Module) -> str:
    settings = {name: value for name, value in _settings(model).items() if "drop" in name and "layer" not in name}
    settings_text = ", ".join(f"{name}={value}" for name, value in settings.items()) or "none"
    if not sites:
        return (
            "the model makes no dropout call, so there is nothing that CmpDrop could ablate, whatever the rate. Sites "
            f"can come from its configuration (dropout settings: {settings_text}), from LoRA's lora_dropout, or from "
            "an nn.Dropout of yours; or ablate input context instead, with --cmp_num_crops."
        )
    calls = ", ".join(f"{count} x {name}" for name, count in Counter(name for name, _, _ in sites).items())
    asleep = [rate for _, rate, training in sites if not training and drop.rate(rate, 1) > 0]
    if asleep:
        return (
            f"the model makes {len(sites)} dropout calls ({calls}), but those with a positive rate are in eval mode "
            f"({len(asleep)} of them), so its ablated variants would equal the full model. Call model.train(), and "
            "leave frozen parts in train mode."
        )
    return (
        f"the model makes {len(sites)} dropout calls ({calls}), all at rate 0, so its ablated variants would equal "
        "the full model. Pass --cmp_dropout 0.1 (or --cmp_dropout_rates) to give them a rate. Dropout settings of its "
        f"configuration: {settings_text}."
    )


def _nothing_ablated(step: Any, forwards: Forwards, batches: Mapping[tuple, Any]) -> str | None:
    """Skipped layers, or an ablation of the user's own, change no example's loss at some level."""
    asked = [number for number, kind in enumerate(step.kinds) if not isinstance(kind, (CmpDrop, CmpCrop))]
    if not asked:
        return None
    with torch.no_grad():
        values = [step._read(forwards, step._plan, batches, variant).values for variant in step.variants]
    for number, (before, variant) in enumerate(zip(step.variants, step.variants[1:], strict=False)):
        kind = next(kind for kind in range(len(step.kinds)) if variant.levels[kind] > before.levels[kind])
        if kind not in asked or not torch.equal(values[number], values[number + 1]):
            continue
        same, name = (
            f"the variants {before.name} and {variant.name} have the same losses",
            type(step.kinds[kind]).__name__,
        )
        if not step.kinds[kind].skips_layers:
            return f"{same}: {name} takes nothing away at level {variant.levels[kind]}."
        logger.warning(
            "%s on the first batch: the layers that %s skips change nothing, because the model's own layer drop has "
            "left them out or because they begin as the identity.",
            same,
            name,
        )


def _dropped_in_backward(step: Any, forwards: Forwards, batches: Mapping[tuple, Any]) -> str | None:
    """A dropout call is made in backward, outside of the ablation of its forward."""
    if not any(isinstance(kind, CmpDrop) for kind in step.kinds) or num_processes() > 1:
        return None
    last = step.variants[-1]
    forward = forwards.run(batches[last.levels], last.levels)
    ablated, dropped = forwards.last, []
    assert ablated is not None

    def note(site: Any, func: Callable, args: tuple, kwargs: dict) -> Any:
        if not ablated.is_entered and in_train_mode(func, args, kwargs) and site.own_rate(args, kwargs) > 0:
            dropped.append(func.__name__)
        return func(*args, **kwargs)

    parameters = [parameter for parameter in forwards.model.parameters() if parameter.requires_grad]
    if not forward.loss.requires_grad or not parameters:
        return None
    try:
        with Intercept(intercepted_dropout(note)):
            # torch.autograd.grad would leave the mode first; the engine takes it along to every node.
            Variable._execution_engine.run_backward(
                (forward.loss,), (torch.ones_like(forward.loss),), False, False, tuple(parameters), True, False
            )
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:
        return None  # reentrant checkpointing allows no grad(); its recomputation is inside of the ablation
    if dropped:
        return (
            f"the backward of the model runs {len(dropped)} dropout calls ({dropped[0]}) again by itself, outside of "
            "torch.utils.checkpoint, where CmpDrop cannot give them the rates of their forward (reversible layers do "
            "this). Set their dropout to 0 or use another implementation of the model."
        )


def _warn_of_packing(full: Any) -> None:
    """Warn where several sequences are packed into a row, which is one example."""
    positions = full.get("position_ids") if isinstance(full, Mapping) else None
    if not isinstance(positions, Tensor) or positions.ndim != 2:
        return
    begins = (positions[:, 1:] == 0) & (positions[:, :-1] > 1)
    if bool(begins.any()):
        logger.warning(
            "a row of the first batch holds several packed sequences (its position_ids start again at 0). Each row is "
            "one example, so the sequences in it are compared as one. To compare each sequence separately, turn off "
            "packing and padding_free."
        )


def _warn_of_differences(step: Any, forwards: Forwards, full: Any, shares: Shares) -> None:
    """Warn where two forwards of the full model differ, or where it differs from the eval model."""
    model, variant = forwards.model, step.variants[0]
    other_start = step._forwards(model, forwards.loss_fn, None)
    first, here = _recorded(step, forwards, full, variant)
    for _ in range(2):  # each from another random state
        second, other = _recorded(step, other_start, full, variant)
        if here is None or other is None:
            return
        if not _close(here.values, other.values):
            logger.warning(
                "two forwards of the full model give different losses: it has randomness besides dropout, first seen "
                "in %s. The variants share its random numbers, but their losses also differ by it.",
                _first_difference(first, second),
            )
            return
    assert here is not None
    with in_eval_mode(model):
        try:
            evaluated, in_eval = _recorded(step, forwards, full, variant)
        except Exception as error:  # a loss that is made otherwise in eval mode
            logger.debug("the model could not be compared with itself in eval mode: %r", error)
            return
    if in_eval is not None and not _close(here.values, in_eval.values):
        logger.warning(
            "the full model in train mode gives other losses than in eval mode, though nothing is dropped; the "
            "difference begins in %s. What is compared is the model in train mode.",
            _first_difference(first, evaluated),
        )


def _differs_without_graph(step: Any, forwards: Forwards, full: Any, shares: Shares) -> str | None:
    """Low memory reads the shares without a graph first."""
    _, alone = _recorded(step, forwards, full, step.variants[0])
    if alone is None or not _close(shares.values, alone.values):
        return (
            "--cmp_low_memory computes the losses without a graph first, and here they differ from those with one, "
            "so its gradients would not be exact. Leave it out."
        )


def _stacking(step: Any, forwards: Forwards, batches: Mapping[tuple, Any]) -> Stacking | None:
    """Stacked forwards where they are wanted and were found to be right.

    Raises:
        ValueError: `stacked` was asked for and is not possible.
    """
    full = batches[step.variants[0].levels]
    stackable = getattr(forwards.loss_fn, "stackable", False)
    skips = any(kind.skips_layers for kind in step.kinds)
    if step.low_memory or not step.prefers_stacked(full):
        return None
    if step.forward == "auto" and (skips or not stackable):
        return None
    try:
        if not stackable:
            raise CannotStack("its loss is computed by a function or a trainer that may look at the whole batch.")
        if forwards.is_compiled:
            raise CannotStack("it is compiled.")
        return Stacking(forwards, batches, step.variants, step._plan, step._shares_lower)
    except CannotStack as error:
        reason = str(error)
    except Exception as error:  # of the model or the loss, which both did without stacking
        if step.forward == "stacked":
            raise
        reason = f"a stacked forward fails ({error})"
    if step.forward == "stacked":
        raise ValueError(f"--cmp_forward stacked does not work for this model: {reason} Use --cmp_forward sequential.")
    logger.info("variants run one after the other, since this model cannot be stacked: %s", reason)
    return None


def writes_into_inputs(forwards: Forwards, full: Any, step: Any) -> bool:
    """Whether the model writes into the tensors of its batch; tried on copies, without a graph."""
    copied = own_containers(full, copy_tensors=True)
    before = versions(copied)
    with torch.no_grad(), unchanged_buffers(forwards.model):
        forwards.run(copied, step.variants[0].levels, only=set())
    return versions(copied) != before


class NotedRates(Ablation):
    """CmpDrop at one level, whose dropout calls are listed: (name, the call's own rate, whether in train mode)."""

    def __init__(self, drop: CmpDrop, sites: list[tuple[str, float, bool]], level: int = 0) -> None:
        self.drop, self.sites, self.level = drop, sites, level

    def calls(self, level: int) -> Mapping[Callable, Any]:
        def note(site: Any, func: Callable, args: tuple, kwargs: dict) -> Any:
            own_rate = site.own_rate(args, kwargs)
            self.sites.append((func.__name__, own_rate, in_train_mode(func, args, kwargs)))
            args, kwargs = site.with_rate(self.drop.rate(own_rate, self.level), args, kwargs)
            return func(*args, **kwargs)

        return intercepted_dropout(note)


def _recorded(step: Any, forwards: Forwards, batch: Any, variant: Any) -> tuple[dict[str, Tensor], Shares | None]:
    """The shares of a forward without a graph, and a number for each module's output."""
    sums: dict[str, Tensor] = {}
    hooks = []
    for name, module in forwards.model.named_modules():

        def note(module: nn.Module, args: Any, output: Any, name: str = name) -> None:
            output = list(output.values()) if isinstance(output, Mapping) else output
            tensors = output if isinstance(output, (tuple, list)) else [output]
            found = [one for one in tensors if isinstance(one, Tensor) and one.is_floating_point()]
            if found and name not in sums:
                sums[name] = found[0].detach().float().abs().sum()

        hooks.append(module.register_forward_hook(note))
    try:
        with torch.no_grad():
            forward = forwards.run(batch, variant.levels, only=step._plan.places)
        return sums, read_shares(forward, step._plan, batch)
    except Replan:  # the loss is made otherwise without a graph
        return sums, None
    finally:
        for hook in hooks:
            hook.remove()


def _first_difference(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> str:
    for name, value in one.items():
        if name in other and not _close(value, other[name]):
            return name or "the model itself"
    return "the loss"


def _close(one: Tensor, other: Tensor) -> bool:
    half = one.dtype in (torch.float16, torch.bfloat16)
    scale = float(one.detach().abs().max()) if one.numel() else 0.0
    return one.shape == other.shape and torch.allclose(one, other, rtol=1e-2 if half else 1e-5, atol=1e-6 * scale)


def _settings(model: nn.Module) -> Mapping[str, Any]:
    config: Any = getattr(model, "config", None)
    return _with_nested(config.to_dict()) if hasattr(config, "to_dict") else {}


def _with_nested(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of nested configurations too, as text_config.attention_dropout."""
    parts = {part: inner for part, inner in settings.items() if isinstance(inner, Mapping)}
    nested = {f"{part}.{name}": value for part, inner in parts.items() for name, value in inner.items()}
    return {**settings, **nested}
