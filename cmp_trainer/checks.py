"""Every check: of the setting, of the first batch, and that a comparison took place.

A comparison can fail without a trace: variants that are all alike because nothing is dropped, dropout that is run
again in backward at another rate, a full model that is random. Each of these is an error or a warning here, before
time is spent. Each reason to reject a setting is a small function of its own, `(what is checked) -> message | None`;
all messages that apply are raised together.
"""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor, nn
from torch.autograd.variable import Variable

from cmp_trainer.ablations.crop import CmpCrop
from cmp_trainer.ablations.crop_columns import SEGMENTS
from cmp_trainer.ablations.drop import CmpDrop, in_train_mode, intercepted_dropout
from cmp_trainer.ablations.protocol import Ablation
from cmp_trainer.ablations.skip import SkipLayers
from cmp_trainer.execution.boundary import REENTRANT, CannotShare
from cmp_trainer.execution.compiled import backends
from cmp_trainer.execution.forwards import Forwards, own_containers, versions
from cmp_trainer.execution.intercept import Intercept
from cmp_trainer.execution.layers import NoStack, Stack
from cmp_trainer.execution.one_forward import inner_model, is_data_parallel, modules_of
from cmp_trainer.execution.processes import num_processes
from cmp_trainer.execution.random_state import RandomState
from cmp_trainer.execution.shared import Lower, lower_parts
from cmp_trainer.execution.stacked import CannotStack
from cmp_trainer.execution.stacking import Stacking
from cmp_trainer.losses.shares import CannotCompare, Plan, Replan, Shares, read_shares

logger = logging.getLogger(__name__)

_REACHABLE_ATTENTION = (None, "eager", "sdpa")
NOTHING_TO_REMOVE = (
    "--cmp_num_crops asked for crops, but no example of the training had a token to remove: crop_segments is 0 "
    "everywhere, so the cropped variants are the full model. Mark removable text in crop_segments, or leave out "
    "--cmp_num_crops."
)
_SMALL_BUFFER = 2**16  # elements, up to which copying a buffer takes less time than calling for it


def raise_together(problems: Sequence[str | None]) -> None:
    """Raise a ValueError with all messages that are not None."""
    found = [problem for problem in problems if problem]
    if found:
        raise ValueError("\n".join(found))


# --- when a trainer or a step is made ---


def check_trainer(trainer: Any) -> None:
    """Reject a Trainer's setting in which nothing can be compared.

    Raises:
        ValueError: all reasons together.
    """
    raise_together([reason(trainer) for reason in TRAINER_CHECKS])


def _data_parallel(trainer: Any) -> str | None:
    if trainer.args.n_gpu > 1:
        return (
            f"{trainer.args.n_gpu} GPUs in one process means nn.DataParallel, whose threads CmpDrop does not reach. "
            f"Start the script with `torchrun --nproc_per_node {trainer.args.n_gpu} …` or `accelerate launch …`."
        )


def _two_loss_functions(trainer: Any) -> str | None:
    if trainer.compute_loss_func is not None and trainer.per_example_loss_func is not None:
        return "compute_loss_func and per_example_loss_func both define the loss; pass one of them."


def _fused_loss(trainer: Any) -> str | None:
    if trainer.args.use_liger_kernel and trainer.per_example_loss_func is None:
        return (
            "use_liger_kernel fuses the loss into the model, which hides the losses of the examples. Set it to False."
        )


def _compiler_that_replays_calls(trainer: Any) -> str | None:
    if trainer.accelerator.state.dynamo_plugin.backend.value.lower() == "eager":
        return (
            "torch_compile_backend eager runs the captured dropout calls under CmpDrop a second time, which would "
            "raise their rates twice. Use aot_eager or inductor."
        )


def _compiled_checkpointing(trainer: Any) -> str | None:
    if trainer.args.torch_compile and trainer.args.gradient_checkpointing:
        return (
            "torch_compile and gradient_checkpointing together recompute activations inside of the compiled graph, "
            "where the ablation of a forward cannot be entered again. Use one of them."
        )


def _low_memory_backwards(trainer: Any) -> str | None:
    if not getattr(trainer.args, "cmp_low_memory", False):
        return None
    if trainer.is_deepspeed_enabled:
        return "--cmp_low_memory makes several backwards a step, which DeepSpeed does not allow; leave it out."
    optimizer = str(getattr(trainer.args.optim, "value", trainer.args.optim))
    if optimizer in ("lomo", "adalomo") or "layerwise" in optimizer:
        return (
            f"--cmp_low_memory makes several backwards a step, and --optim {optimizer} changes the weights in each of "
            "them. Leave one of the two out."
        )
    if getattr(trainer.args, "ddp_static_graph", False):
        return (
            "--cmp_low_memory makes several forwards and backwards a step, which --ddp_static_graph rules out. Leave "
            "one of the two out."
        )


def _evaluation_of_shards(trainer: Any) -> str | None:
    """Stage 3 makes other tensors of what a model returns, so that nothing leads from its loss to the examples."""
    plugin = getattr(trainer.accelerator.state, "deepspeed_plugin", None) if trainer.is_deepspeed_enabled else None
    if plugin is not None and plugin.hf_ds_config.is_zero3() and getattr(trainer.args, "cmp_eval_ablations", False):
        return (
            "--cmp_eval_ablations cannot read the losses of the examples under stage 3 of DeepSpeed. Leave it out, or "
            "use stage 2; training is compared under both."
        )


def _parallelism(trainer: Any) -> str | None:
    parallelism = getattr(trainer.accelerator, "parallelism_config", None)
    if parallelism is not None and (parallelism.cp_enabled or getattr(parallelism, "sp_enabled", False)):
        return "context or sequence parallelism splits examples over processes; comparative loss needs them whole."
    if trainer.get_tp_size() > 1:
        return (
            f"tensor parallelism over {trainer.get_tp_size()} processes is not supported: the loss would be scaled as "
            "if each of them had a batch of its own. Use FSDP or DistributedDataParallel."
        )


def _attention_of_trainer(trainer: Any) -> str | None:
    return _attention(trainer.model)


def _dropout_switched_off(trainer: Any) -> str | None:
    """TRL's preference and reward trainers set every rate to 0, as their default."""
    drops = [ablation for ablation in trainer.ablations if isinstance(ablation, CmpDrop)]
    if not getattr(trainer.args, "disable_dropout", False) or all(drop.rate(0.0, 1) > 0 for drop in drops):
        return None
    return (
        f"disable_dropout of {type(trainer.args).__name__} sets every dropout rate of the model to 0, so the ablated "
        "variants would equal the full model. Set disable_dropout=False, or pass --cmp_dropout 0.1."
    )


def _unknown_processes(trainer: Any) -> str | None:
    try:
        check_launch(trainer.args.world_size)
    except ValueError as error:
        return str(error)


TRAINER_CHECKS: tuple[Callable[[Any], str | None], ...] = (
    _data_parallel,
    _two_loss_functions,
    _fused_loss,
    _compiler_that_replays_calls,
    _compiled_checkpointing,
    _low_memory_backwards,
    _evaluation_of_shards,
    _parallelism,
    _attention_of_trainer,
    _dropout_switched_off,
    _unknown_processes,
)


def check_croppable_examples(trainer: Any) -> None:
    """Look through a table of training examples before the first step; other data is judged when training is over.

    Raises:
        ValueError: crops were asked for, and no example has a token to remove. If some have none, that is logged.
    """
    dataset = trainer.train_dataset
    crops = any(isinstance(ablation, CmpCrop) for ablation in trainer.ablations)
    if not crops or not isinstance(dataset, Dataset) or SEGMENTS not in dataset.column_names:
        return
    croppable = count_croppable(dataset)
    if not croppable and len(dataset):
        raise ValueError(NOTHING_TO_REMOVE)
    if croppable < len(dataset):
        logger.warning(
            "%d of %d training examples have no token to remove: their cropped variants are the full input",
            len(dataset) - croppable,
            len(dataset),
        )


def count_croppable(dataset: Dataset) -> int:
    """How many rows have a removable segment."""
    found = 0
    table: Any
    for table in dataset.select_columns([SEGMENTS]).with_format("arrow").iter(1000):
        rows = table[SEGMENTS].combine_chunks()
        numbers = np.repeat(np.arange(len(rows)), rows.value_lengths().fill_null(0).to_numpy())
        found += len(np.unique(numbers[rows.flatten().to_numpy(zero_copy_only=False) > 0]))
    return found


def check_launch(known: int) -> None:
    """Raises ValueError where more processes were launched than the `known` ones, which share the work and its files.

    accelerate takes a CPU for one of several only where it is told to use it: by `--use_cpu`, or by
    `PartialState(cpu=True)` in a script of your own.
    """
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if launched > known:
        raise ValueError(
            f"{launched} processes were launched, but this one knows of {known} and would do all the work of the "
            "others again; on a machine without GPUs give --use_cpu true (in a script of your own, begin with "
            "PartialState(cpu=True))"
        )


def check_ablations(ablations: Sequence[Any]) -> None:
    """The ablations of a step are objects of the protocol.

    Raises:
        ValueError: none were given, or something else than ablations.
    """
    if not ablations:
        raise ValueError("no ablations were given, so there is nothing to compare; pass [CmpDrop()], for instance.")
    for ablation in ablations:
        if isinstance(ablation, type):
            raise ValueError(f"{ablation.__name__} is a class; pass an object of it, {ablation.__name__}().")
        if not isinstance(ablation, Ablation):
            raise ValueError(
                f"{ablation!r} is not an ablation; expected CmpDrop, CmpCrop or a subclass of "
                "cmp_trainer.ablations.Ablation."
            )


def check_step(step: Any) -> None:
    """Reject a step's setting in which nothing can be compared.

    Raises:
        ValueError: all reasons together.
    """
    raise_together([reason(step) for reason in STEP_CHECKS])


def _replicas(step: Any) -> str | None:
    if isinstance(step.model, nn.DataParallel):
        return (
            "nn.DataParallel runs forwards in threads that CmpDrop does not reach. Use DistributedDataParallel, one "
            "process for each GPU."
        )


def _forward_choice(step: Any) -> str | None:
    if step.forward not in ("auto", "sequential", "stacked"):
        return f"forward {step.forward!r} is unknown; expected auto, sequential or stacked."
    if step.forward == "stacked" and step.low_memory:
        return "forward 'stacked' holds all variants at once, which is what low_memory avoids; use one of the two."


def _objective(step: Any) -> str | None:
    if isinstance(step.objective, type) or not callable(step.objective):
        name = getattr(step.objective, "__name__", repr(step.objective))
        return f"the objective {name} is not a function of losses; pass an object such as ComparativeLoss()."


def _rates(step: Any) -> str | None:
    for number, kind in enumerate(step.kinds):
        most = step.variants[-1].levels[number]
        if isinstance(kind, CmpDrop) and kind.rates is not None and len(kind.rates) < most:
            return f"CmpDrop has the {len(kind.rates)} rates {kind.rates} for {most} drops; give one for each drop."


def _layers(step: Any) -> str | None:
    layers = step.ablated_layers
    if layers is None:
        return None
    if not isinstance(layers, int) or isinstance(layers, bool) or layers < 1:
        return (
            f"--cmp_ablated_layers {layers} is not the number of layers to ablate, 1 or more; leave it out to ablate "
            "all of them."
        )
    if not any(kind.leaves_lower_layers for kind in step.kinds):
        names = ", ".join(type(kind).__name__ for kind in step.kinds)
        return (
            f"--cmp_ablated_layers {layers} has no effect on {names}; leave it out, or add CmpDrop, or set "
            "leaves_lower_layers on an ablation of your own that leaves the lower layers as they are."
        )


def _attention(where: Any) -> str | None:
    model = where if isinstance(where, nn.Module) else where.model
    for module in model.modules():
        implementation = getattr(getattr(module, "config", None), "_attn_implementation", None)
        if implementation not in _REACHABLE_ATTENTION:
            return (
                f"{type(module).__name__} uses attn_implementation={implementation!r}, whose kernel applies dropout "
                'where CmpDrop cannot intercept it. Load the model with attn_implementation="sdpa" or "eager".'
            )


def _backend_that_replays_calls(step: Any) -> str | None:
    found = [name for name in backends(step.model) if "eager" in name and not name.startswith("aot")]
    if found:
        return (
            f"the model is compiled with the backend {found[0]!r}, which runs the captured dropout calls under "
            "CmpDrop a second time and so would raise their rates twice. Compile with aot_eager or inductor."
        )


STEP_CHECKS: tuple[Callable[[Any], str | None], ...] = (
    _replicas,
    _forward_choice,
    _objective,
    _rates,
    _layers,
    _attention,
    _backend_that_replays_calls,
)


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


# --- on the first batch ---


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
        step._shares_lower = _shares_lower(step, forwards, batches)
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
    noted = _NotedRates(step.kinds[numbers[0]], sites)
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
    with _in_eval_mode(model):
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


def _shares_lower(step: Any, forwards: Forwards, batches: Mapping[tuple, Any]) -> bool:
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


def check_finite(loss: Tensor) -> None:
    """Raises a ValueError where the first loss is NaN or infinite."""
    if not bool(loss.detach().isfinite()):
        raise ValueError(
            f"the loss of the first batch is {loss.item()}, already without any ablation. Look for NaN or infinite "
            "inputs, labels out of range, or overflow in half precision."
        )


def check_loss_is_visible(read: Callable[[], Any]) -> None:
    """Raises a CannotCompare where a compiled model hides its loss."""
    try:
        read()
    except Replan:
        raise CannotCompare(
            "the loss is computed inside of a compiled graph, which hides the losses of the examples. Compile "
            "`model.base_model` in place of the model, use the Trainer's torch_compile or torch.compile(model), which "
            "leave the loss outside, or compute it in loss_fn(model, batch)."
        ) from None


def check_sign_test(deviation: float) -> None:
    """Raises a CannotCompare where the sign test failed; `deviation` is relative to its tolerance."""
    if deviation > 1:
        raise CannotCompare(
            "the shares of the loss stopped following the rows of the batch: what belongs to an example is computed "
            "in another order than on the first batch. Keep the order of the rows in the loss, or pass "
            "per_example_loss_func(outputs, inputs) -> (batch,)."
        )


def check_reached(trainer: Any, reached: bool) -> None:
    """Raises a ValueError where a training step computed its loss without the comparison."""
    if not reached:
        raise ValueError(
            f"{type(trainer).__name__}.training_step computed its loss without a comparison, though "
            f"{trainer.num_ablations} ablations were asked for. Let it get its loss from self.compute_loss(model, "
            "inputs), or leave training_step to the Trainer."
        )


# --- when a training is over ---


def check_differed(dropped_nothing: bool, differed: bool) -> None:
    """Raises a ValueError where no dropout rate was positive on the first batch and no variant ever differed."""
    if dropped_nothing and not differed:
        raise ValueError(
            "the losses of the variants never differed: every dropout rate was 0 when training began, and no callback "
            "changed that. Pass --cmp_dropout 0.1 (or --cmp_dropout_rates), or give the model a dropout rate."
        )


def check_crops_removed(removed: Tensor | None) -> None:
    """Raises a ValueError where crops were asked for and removed nothing in the whole training."""
    if removed is not None and not bool(removed > 0):
        raise ValueError(NOTHING_TO_REMOVE)


# --- helpers ---


class _NotedRates(Ablation):
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


@contextmanager
def _in_eval_mode(model: nn.Module) -> Iterator[None]:
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def train_mode_except_batch_norm(model: nn.Module) -> Iterator[None]:
    """Train mode for the modules of an eval model, so that they drop; batch norm stays in eval mode. Restored at the
    end, with the buffers that other modules change in train mode (spectral norm)."""
    modules = [module for module in modules_of(model) if not module.training]
    modules = [module for module in modules if not isinstance(module, nn.modules.batchnorm._BatchNorm)]
    _set_training(modules, True)
    try:
        with unchanged_buffers(model):
            yield
    finally:
        _set_training(modules, False)


def _set_training(modules: Sequence[nn.Module], training: bool) -> None:
    """Their own mode. What nn.Module adds to setting an attribute takes ten times as long and is for tensors."""
    for module in modules:
        plain = type(module).__setattr__ is nn.Module.__setattr__
        (object.__setattr__ if plain else setattr)(module, "training", training)


@contextmanager
def unchanged_buffers(model: nn.Module) -> Iterator[None]:
    """Buffers, such as the running means of batch norm, are after the body what they were before, unless they grew.

    Small ones of a device and a dtype are copied and compared as one, since an accelerator is waited for at each
    comparison. Only their values say whether they changed: the versions of tensors do not count what batch norm
    writes, nor what is written into `.data`.
    """
    groups: dict[Any, list[tuple[nn.Module, str, Tensor]]] = {}
    for module in modules_of(model):
        for name, buffer in module._buffers.items():
            if buffer is not None:
                plain = type(buffer) is Tensor and buffer.layout is torch.strided and not buffer.is_quantized
                joins = plain and buffer.numel() <= _SMALL_BUFFER
                key = (buffer.device, buffer.dtype) if joins else (module, name)
                groups.setdefault(key, []).append((module, name, buffer))
    before = [_Buffers(group) for group in groups.values()]
    try:
        yield
    finally:
        with torch.no_grad():
            for one in before:
                one.restore()


class _Buffers:
    """The values that some buffers have now: one of any kind, or several of a device and a dtype."""

    def __init__(self, buffers: Sequence[tuple[nn.Module, str, Tensor]]) -> None:
        self.places = [(module._buffers, name, buffer.shape) for module, name, buffer in buffers]
        with torch.no_grad():
            self.values = _joined([buffer for _, _, buffer in buffers]) if len(buffers) > 1 else buffers[0][2].clone()

    def restore(self) -> None:
        """Write them back to the buffers that changed and did not grow."""
        # The buffers of TorchScript have no `get`.
        now: list[Any] = [kept[name] if name in kept else None for kept, name, _ in self.places]  # noqa: SIM401
        shapes = [shape for _, _, shape in self.places]
        fits = [isinstance(one, Tensor) and one.shape == shape for one, shape in zip(now, shapes, strict=True)]
        if len(now) == 1:
            if fits[0] and not torch.equal(now[0], self.values):
                now[0].copy_(self.values)
        elif any(fits) and not (all(fits) and torch.equal(_joined(now), self.values)):
            pieces = self.values.split([shape.numel() for shape in shapes])
            pairs = [(one, piece.view_as(one)) for one, piece, fit in zip(now, pieces, fits, strict=True) if fit]
            differ = torch.stack([(one != before).any() for one, before in pairs]).tolist()
            for (one, before), differs in zip(pairs, differ, strict=True):
                if differs:
                    one.copy_(before)


def _joined(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in tensors])


def _settings(model: nn.Module) -> Mapping[str, Any]:
    config: Any = getattr(model, "config", None)
    return _with_nested(config.to_dict()) if hasattr(config, "to_dict") else {}


def _with_nested(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of nested configurations too, as text_config.attention_dropout."""
    parts = {part: inner for part, inner in settings.items() if isinstance(inner, Mapping)}
    nested = {f"{part}.{name}": value for part, inner in parts.items() for name, value in inner.items()}
    return {**settings, **nested}
