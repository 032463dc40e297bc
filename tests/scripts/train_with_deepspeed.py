"""Trains a tiny token classifier under DeepSpeed on the CPU, or under DistributedDataParallel, in several processes.

torchrun --nproc_per_node=2 train_with_deepspeed.py FOLDER STAGE      (stage 0 is DistributedDataParallel)

The data are those of train_distributed.py: unequal numbers of labels, and a process that begins without any.
"""

import os
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.state import AcceleratorState
from transformers import TrainingArguments

from cmp_trainer import CmpTrainingArguments
from tests.scripts import train_distributed as distributed
from tests.scripts.train_distributed import BATCH, ROWS, tiny_model, tokens

SETTINGS: dict[str, dict[str, Any]] = {
    "without the plugin": {"plain": True},
    "sequential": {"cmp_forward": "sequential"},
    "stacked": {"cmp_forward": "stacked"},
    "full alone": distributed.FULL_ALONE["full alone"],
    "gradient checkpointing": {
        "cmp_forward": "sequential",
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": False},
    },
}
ACCUMULATED = {
    f"{name}, accumulated": {**settings, "gradient_accumulation_steps": 2}
    for name, settings in SETTINGS.items()
    if name != "gradient checkpointing"
}
REJECTED = {
    "low memory": {"cmp_low_memory": True},
    "reentrant checkpointing": {
        "cmp_forward": "sequential",
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": True},
    },
}
EVALUATED = {"evaluated": {"cmp_forward": "sequential", "cmp_eval_ablations": True}}


def deepspeed_settings(stage: int) -> dict[str, Any]:
    """Stage 3 shards every parameter, however small, and holds none for longer than its layer needs it."""
    limits = ["param_persistence_threshold", "max_live_parameters", "max_reuse_distance", "prefetch_bucket_size"]
    zero = {"stage": stage, **({f"stage3_{name}": 0 for name in limits} if stage == 3 else {})}
    config = {
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
    AcceleratorState._reset_state(True)
    PartialState(backend="gloo")  # accelerate expects an accelerator under DeepSpeed, and a CPU has to be told
    return {"deepspeed": config, "accelerator_config": {"use_configured_state": True}}


def train(output_dir: str, stage: int, plain: bool = False, **settings: Any) -> dict[str, Any]:
    """Two optimizer steps of plain gradient descent."""
    args = (TrainingArguments if plain else CmpTrainingArguments)(
        **({} if plain else {"cmp_num_ablations": 2}),
        **(deepspeed_settings(stage) if stage else {"use_cpu": True}),
        output_dir=output_dir,
        max_steps=2,
        per_device_train_batch_size=BATCH,
        per_device_eval_batch_size=BATCH,
        optim="sgd",
        learning_rate=1.0,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        **settings,
    )
    model = tiny_model(**(distributed.WITHOUT_DROPOUT if plain else {}))
    kind = distributed.Plain if plain else distributed.Compares
    trainer = kind(model=model, args=args, train_dataset=tokens(ROWS), eval_dataset=tokens(ROWS))
    trainer.train()
    held = sum(parameter.numel() for parameter in model.parameters())
    metrics = trainer.evaluate() if settings.get("cmp_eval_ablations") else {}
    return {
        "weights": whole(model, stage),
        "held": held,
        "logs": [{key: log[key] for key in log if key.startswith("loss")} for log in trainer.state.log_history[:2]],
        "metrics": {name: value for name, value in metrics.items() if "loss" in name},
        "kind": type(trainer.model_wrapped).__name__,
    }


def whole(model: torch.nn.Module, stage: int) -> dict[str, torch.Tensor]:
    """The parameters, gathered from the processes where they are sharded."""
    if stage < 3:
        return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    import deepspeed  # pyright: ignore[reportMissingImports]

    with deepspeed.zero.GatheredParameters(list(model.parameters())):
        return whole(model, 0)


def main() -> None:
    output_dir, stage = sys.argv[1], int(sys.argv[2])
    evaluated = EVALUATED if stage < 3 else {}
    trained = {**SETTINGS, **ACCUMULATED, **evaluated}
    results: dict[str, Any] = {name: train(output_dir, stage, **settings) for name, settings in trained.items()}
    rejected = {**REJECTED, **({} if evaluated else EVALUATED)} if stage else {}
    for name, settings in rejected.items():
        try:
            train(output_dir, stage, **settings)
        except ValueError as error:
            results[name] = str(error)
    rank = torch.distributed.get_rank()
    torch.save(results, Path(output_dir, f"rank_{rank}.pt"))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
