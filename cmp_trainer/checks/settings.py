"""Checks of a setting, when a trainer or a step is made, before anything is run.

Each reason to reject a setting is a small function of its own, `(what is checked) -> message | None`; all messages
that apply are raised together.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from datasets import Dataset
from torch import nn

from cmp_trainer.ablations.crop import CmpCrop
from cmp_trainer.ablations.crop_columns import SEGMENTS
from cmp_trainer.ablations.drop import CmpDrop
from cmp_trainer.ablations.protocol import Ablation
from cmp_trainer.execution.compiled import backends

logger = logging.getLogger(__name__)


_REACHABLE_ATTENTION = (None, "eager", "sdpa")


NOTHING_TO_REMOVE = (
    "--cmp_num_crops asked for crops, but no example of the training had a token to remove: crop_segments is 0 "
    "everywhere, so the cropped variants are the full model. Mark removable text in crop_segments, or leave out "
    "--cmp_num_crops."
)


def raise_together(problems: Sequence[str | None]) -> None:
    """Raise a ValueError with all messages that are not None."""
    found = [problem for problem in problems if problem]
    if found:
        raise ValueError("\n".join(found))


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


def eager_backend(trainer: Any) -> str | None:
    """Why dropout cannot be intercepted, where the Trainer compiles with a backend that runs calls twice."""
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
    return attention_out_of_reach(trainer.model)


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
    eager_backend,
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


def _attention(step: Any) -> str | None:
    return attention_out_of_reach(step.model)


def attention_out_of_reach(model: nn.Module) -> str | None:
    """Why dropout cannot be intercepted, where a fused kernel applies that of attention."""
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
