"""Trains a tiny token classifier in the settings named on the command line, launched in several processes.

Tokens have labels in unequal numbers, the second process begins with a batch without any, and the last batch is
short, so that each normalization has to be right over the processes, and all have to do equally many forwards. Every
forward starts from the seed of its step: two processes then drop what two accumulated batches of one process drop, and
have to end at the same weights.
"""

import sys
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch.utils.data import SequentialSampler
from transformers import BertConfig, BertForTokenClassification, Trainer, TrainingArguments

from cmp_trainer import CmpTrainer, CmpTrainingArguments

ROWS, BATCH, PROCESSES = 14, 4, 2
ONE_AFTER_THE_OTHER = {"cmp_forward": "sequential"}
REENTRANT = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}
SETTINGS = {
    "sequential": ONE_AFTER_THE_OTHER,
    "stacked": {"cmp_forward": "stacked"},
    "low memory": {"cmp_low_memory": True},
    "gradient checkpointing": {
        **ONE_AFTER_THE_OTHER,
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": False},
    },
    "reentrant checkpointing, low memory": {"cmp_low_memory": True, **REENTRANT},
}
TOP_LAYER = {
    "top layer": {"cmp_ablated_layers": 1, **ONE_AFTER_THE_OTHER},
    "top layer, stacked": {"cmp_ablated_layers": 1, "cmp_forward": "stacked"},
    "top layer, low memory": {"cmp_ablated_layers": 1, "cmp_low_memory": True},
    "top layer, gradient checkpointing": {
        "cmp_ablated_layers": 1,
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": False},
    },
}
SKIP = {"cmp_num_skips": 1, "cmp_skip_layers": [1], "cmp_skip_order": "top"}
SKIPS = {
    "skips": {**SKIP, **ONE_AFTER_THE_OTHER},
    "skips, low memory": {**SKIP, "cmp_low_memory": True},
    "skips, gradient checkpointing": {
        **SKIP,
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": False},
    },
}
# Promise 10: both train the same weights.
FULL_ALONE = {
    "full alone": {"cmp_objective": "regularized", "cmp_primary": "full", "cmp_weight": 0.0},
    "without the plugin": {"plain": True},
}
WITHOUT_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
REJECTED = {"reentrant checkpointing": {**ONE_AFTER_THE_OTHER, **REENTRANT}}
SHARDED = {
    "sharded": {"sharded": True, **ONE_AFTER_THE_OTHER},
    "sharded, low memory": {"sharded": True, "cmp_low_memory": True},
}
SKIPS_SHARDED = {
    "sharded, skips": {"sharded": True, **SKIP, **ONE_AFTER_THE_OTHER},
    "sharded, skips, low memory": {"sharded": True, **SKIP, "cmp_low_memory": True},
}
TOP_LAYER_SHARDED = {
    "sharded, top layer": {"sharded": True, "cmp_ablated_layers": 1, **ONE_AFTER_THE_OTHER},
    "sharded, top layer, low memory": {"sharded": True, "cmp_ablated_layers": 1, "cmp_low_memory": True},
}


class Reseeded:
    """Takes the data in their order and drops the same in all batches of a step."""

    state: Any
    train_dataset: Any

    def _get_train_sampler(self, *args):
        return SequentialSampler(self.train_dataset)

    def training_step(self, *args, **kwargs):
        torch.manual_seed(100 + self.state.global_step)
        return super().training_step(*args, **kwargs)  # pyright: ignore[reportAttributeAccessIssue]


class Compares(Reseeded, CmpTrainer):
    pass


class Plain(Reseeded, Trainer):
    pass


def tokens(rows: int) -> Dataset:
    """Token ids, each labelled by what it is, or not at all; the second batch has no label."""
    draws = torch.Generator().manual_seed(0)
    ids = torch.randint(5, 40, (rows, 6), generator=draws)
    labels = torch.where(torch.rand(ids.shape, generator=draws) < 0.6, ids % 3, -100)
    labels[BATCH : 2 * BATCH] = -100
    return Dataset.from_dict({"input_ids": ids.tolist(), "labels": labels.tolist()})


def tiny_model(**changes: float) -> BertForTokenClassification:
    """With dropout 0.1 everywhere."""
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    torch.manual_seed(0)
    return BertForTokenClassification(
        BertConfig(vocab_size=40, max_position_embeddings=16, num_labels=3, **sizes, **changes)
    )


def sharded_over_processes(model, output_dir: str):
    """The model under FSDP2, which transformers applies when it loads a model."""
    from transformers.distributed import DistributedConfig

    folder = Path(output_dir, "model")
    if torch.distributed.get_rank() == 0:
        model.save_pretrained(folder)
    torch.distributed.barrier()
    plan = {"bert.encoder.layer.*": "free_full_weight"}
    config = DistributedConfig(fsdp_size=PROCESSES, fsdp_plan=plan)
    return type(model).from_pretrained(folder, distributed_config=config)


def train(output_dir: str, data: Dataset, accumulate: int, sharded: bool = False, plain: bool = False, **settings):
    """Two optimizer steps of plain gradient descent, then evaluations."""
    ours = {} if plain else {"cmp_num_ablations": 2, "cmp_eval_ablations": True}
    args = (TrainingArguments if plain else CmpTrainingArguments)(
        **ours,
        output_dir=output_dir,
        max_steps=2,
        per_device_train_batch_size=BATCH,
        per_device_eval_batch_size=BATCH,
        gradient_accumulation_steps=accumulate,
        optim="sgd",
        learning_rate=1.0,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        **settings,
    )
    evaluated = {"whole": tokens(4 * BATCH), "short": tokens(ROWS)}
    model = tiny_model(**(WITHOUT_DROPOUT if plain else {}))
    if sharded:
        model = sharded_over_processes(model, output_dir)
    trainer = (Plain if plain else Compares)(model=model, args=args, train_dataset=data, eval_dataset=evaluated)
    trainer.train()
    metrics = trainer.evaluate()
    weights = {name: whole(parameter) for name, parameter in trainer.model.named_parameters()}
    return {
        "weights": weights,
        "metrics": metrics,
        "logs": [{key: log[key] for key in log if key.startswith("loss")} for log in trainer.state.log_history[:2]],
        "kind": type(trainer.model_wrapped).__name__,
        "shares": not plain and trainer.comparative_step(trainer.model_wrapped)._shares_lower,
    }


def whole(parameter: torch.Tensor) -> torch.Tensor:
    """A parameter, gathered from the processes where it is sharded."""
    return parameter.full_tensor().detach() if hasattr(parameter, "full_tensor") else parameter.detach()


def main() -> None:
    output_dir, *names = sys.argv[1:]
    settings = {**SETTINGS, **SHARDED, **TOP_LAYER, **TOP_LAYER_SHARDED, **SKIPS, **SKIPS_SHARDED, **FULL_ALONE}
    results = {name: train(output_dir, tokens(ROWS), 1, **settings[name]) for name in names}
    for name, rejected in REJECTED.items():
        try:
            train(output_dir, tokens(ROWS), 1, **rejected)
        except ValueError as error:
            results[name] = str(error)
    rank = torch.distributed.get_rank()
    torch.save(results, Path(output_dir, f"rank_{rank}.pt"))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
