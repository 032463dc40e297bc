"""What is checked once: the setting when a trainer is made, and the model on its first batch.

A comparison can fail without a trace: variants that are all alike because nothing is dropped, per-example losses that
forget a class weight the model has, a full model that is random. Each of these is an error or a warning here, before
time is spent.
"""

import logging
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from cmp_trainer.ablations.drop import DropoutSchedule
from cmp_trainer.reports.loss_log import LossLog

logger = logging.getLogger(__name__)

_REACHABLE_ATTENTION = (None, "eager", "sdpa")


def check_setting(trainer: Any) -> None:
    """Refuse what cannot be compared, by name.

    Raises:
        ValueError: DataParallel, a batch-level loss function, fused losses, sharded sequences, a compiler that runs
            dropout calls twice, or attention kernels that take their dropout rate where CmpDrop does not reach.
    """
    args = trainer.args
    if args.n_gpu > 1:
        raise ValueError(
            f"{args.n_gpu} GPUs in one process means nn.DataParallel, whose threads CmpDrop does not reach. Start the "
            f"script with `torchrun --nproc_per_node {args.n_gpu} …` or `accelerate launch …`."
        )
    if trainer.compute_loss_func is not None:
        raise ValueError(
            "compute_loss_func returns one loss for the batch, which cannot be compared per example. Pass "
            "per_example_loss_func(outputs, inputs) -> (batch,) to the trainer instead."
        )
    if args.use_liger_kernel:
        raise ValueError(
            "use_liger_kernel fuses the loss into the model, which then returns no logits; comparative loss needs the "
            "loss of each example. Leave it out."
        )
    backend = trainer.accelerator.state.dynamo_plugin.backend.value.lower()
    if backend == "eager":
        raise ValueError(
            "torch_compile_backend eager runs the captured calls once more under CmpDrop, which would raise their "
            "dropout rates twice. Use aot_eager or inductor."
        )
    if getattr(args, "cmp_low_memory", False) and trainer.is_deepspeed_enabled:
        raise ValueError(
            "--cmp_low_memory makes several backwards a step, which DeepSpeed does not allow; leave it out."
        )
    optimizer = str(getattr(args.optim, "value", args.optim))
    if getattr(args, "cmp_low_memory", False) and (optimizer in ("lomo", "adalomo") or "layerwise" in optimizer):
        raise ValueError(
            f"--cmp_low_memory makes several backwards a step, and --optim {optimizer} changes the weights in each of "
            "them. Leave one of the two out."
        )
    parallelism = getattr(trainer.accelerator, "parallelism_config", None)
    if parallelism is not None and (parallelism.cp_enabled or getattr(parallelism, "sp_enabled", False)):
        raise ValueError(
            "context or sequence parallelism splits examples over processes; comparative loss needs them whole."
        )
    if trainer.get_tp_size() > 1:
        raise ValueError(
            f"tensor parallelism over {trainer.get_tp_size()} processes is not supported: the loss would be scaled as "
            "if each of them had a batch of its own. Use FSDP or DistributedDataParallel."
        )
    _check_attention(trainer.model)


def check_compared(trainer: Any, seen: LossLog) -> None:
    """After a training step some task losses have been compared.

    Raises:
        ValueError: a subclass computes its loss without the comparison.
    """
    if trainer.num_ablations and not seen:
        raise ValueError(
            f"{type(trainer).__name__}.compute_loss returned a loss without a comparison, though "
            f"--cmp_num_ablations is {trainer.num_ablations}. Let it call super().compute_loss(…), or give the "
            "trainer its loss as per_example_loss_func(outputs, inputs) -> (batch,) and leave compute_loss out."
        )


def _check_attention(model: nn.Module) -> None:
    for module in model.modules():
        implementation = getattr(getattr(module, "config", None), "_attn_implementation", None)
        if implementation not in _REACHABLE_ATTENTION:
            raise ValueError(
                f"{type(module).__name__} uses attn_implementation={implementation!r}, whose kernel takes its dropout "
                'rate where CmpDrop does not reach. Load the model with attn_implementation="sdpa" or "eager".'
            )


def check_dropout_sites(sites: list[tuple[str, float]], schedule: DropoutSchedule, model: nn.Module) -> None:
    """Some dropout call of the forward has to have a positive rate, or every variant is the full model.

    Args:
        sites: the dropout calls of one forward, (function name, own rate).
        schedule: how rates grow.
        model: its configuration's dropout settings are shown in the message.

    Raises:
        ValueError: says which sites there are and how to give them a rate.
    """
    if any(schedule.rate(own_rate, drops=1) > 0 for _, own_rate in sites):
        return
    settings = {name: value for name, value in _settings(model).items() if "drop" in name and "layer" not in name}
    settings_text = ", ".join(f"{name}={value}" for name, value in settings.items()) or "none"
    if sites:
        calls = ", ".join(f"{count} x {name}" for name, count in Counter(name for name, _ in sites).items())
        raise ValueError(
            f"the model makes {len(sites)} dropout calls ({calls}), all at rate 0, so its ablated variants would "
            "equal the full model. Pass --cmp_dropout 0.1 (or --cmp_dropout_rates) to give them a rate. Dropout "
            f"settings of its configuration: {settings_text}."
        )
    raise ValueError(
        "the model makes no dropout call, so there is nothing that CmpDrop could ablate, whatever the rate. Sites can "
        f"come from its configuration (dropout settings: {settings_text}), from LoRA's lora_dropout, or from an "
        "nn.Dropout of yours; or ablate input context instead, with --cmp_num_crops."
    )


def check_own_loss(own_loss: Tensor, mean: Tensor, dtype: torch.dtype = torch.float32) -> None:
    """The per-example losses have to be the parts of the loss that the Trainer would train with.

    Args:
        own_loss: the model's loss of a batch.
        mean: that of the per-example losses of the same outputs.
        dtype: of the model, whose arithmetic the two may differ by. In float32 a difference is that of two orders of
            summation: router losses of mixtures of experts, a thousandth of the loss, have to be seen.

    Raises:
        ValueError: shows both numbers.
    """
    is_half = torch.finfo(own_loss.dtype).bits == 16 or torch.finfo(dtype).bits == 16
    own, ours = own_loss.double().item(), mean.double().item()
    if not abs(own - ours) <= (2e-2 * max(abs(own), 1e-2) if is_half else 3e-5 * max(abs(own), 1)):
        raise ValueError(
            f"the model's own loss on the first batch is {own:.6g}, the mean of the per-example task losses is "
            f"{ours:.6g}. The model adds something that they do not know (an auxiliary loss, class weights, another "
            "reduction), and it would be lost. Pass the trainer a per_example_loss_func(outputs, inputs) -> (batch,) "
            "that computes the loss of each example."
        )


def check_repeatable(first: Tensor, second: Tensor) -> None:
    """Warn if two forwards of the full model differ: it then has randomness that is not dropout."""
    if not torch.allclose(first, second, rtol=1e-5, atol=1e-6):
        logger.warning(
            "two forwards of the full model give different task losses: it has randomness beside dropout. Usual "
            "causes are layer drop (config.layerdrop, encoder_layerdrop), stochastic depth (drop_path_rate) and "
            "SpecAugment (apply_spec_augment, mask_time_prob); set them to 0 for a clean comparison."
        )


def check_stacking(
    single: Tensor, stacked: Tensor | None, choice: str, reason: str = "", rounds: bool = False
) -> bool:
    """Whether variants may be stacked: their losses have to be those of single forwards.

    Args:
        single: task losses of one forward a variant.
        stacked: task losses of one forward for all, or None where the model cannot be stacked, for `reason`.
        choice: the argument cmp_forward; only `stacked` insists.
        rounds: the model computes in 16 bit, or on a device that may round products (TF32). Else the two differ by an
            order of summation: a mask of the wrong rows may move the losses of a new head by less than a thousandth.

    Raises:
        ValueError: --cmp_forward stacked was asked for and is not possible.
    """
    rtol, atol = (1e-3, 1e-4) if rounds else (3e-5, 3e-6)
    if stacked is not None and torch.allclose(single, stacked, rtol=rtol, atol=atol):
        return True
    if choice == "stacked":
        difference = "" if stacked is None else f"its losses differ by up to {(single - stacked).abs().max():.3g}."
        raise ValueError(
            f"--cmp_forward stacked does not work for this model: {reason or difference} Its rows depend on each "
            "other (batch norm) or do not come first (time-major layers). Use --cmp_forward sequential."
        )
    return False


def _settings(model: nn.Module) -> Mapping[str, Any]:
    config: Any = getattr(model, "config", None)
    return _with_nested(config.to_dict()) if hasattr(config, "to_dict") else {}


def _with_nested(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of nested configurations too, as text_config.attention_dropout."""
    parts = {part: inner for part, inner in settings.items() if isinstance(inner, Mapping)}
    nested = {f"{part}.{name}": value for part, inner in parts.items() for name, value in inner.items()}
    return {**settings, **nested}
