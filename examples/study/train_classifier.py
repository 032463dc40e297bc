"""Train a classifier on a part of a table, then measure it: on its test rows, under noise, and with parts taken away.

    python examples/study/train_classifier.py --model_name_or_path MODEL --train_file train.jsonl \\
        --test_file test.jsonl --train_rows 500 --seed 1 --output_dir runs/one

An ordinary script for the Trainer, which knows nothing of comparative loss: `cmp-trainer compare` runs it by every
method of the study. Training and validation rows are drawn from the training file by --seed.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from datasets import Dataset
from noise import NOISES
from parts import without_layers, without_units
from torchmetrics.functional.classification import (
    multiclass_accuracy,
    multiclass_calibration_error,
    multiclass_matthews_corrcoef,
)
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    EvalPrediction,
    HfArgumentParser,
    Trainer,
    TrainingArguments,
    set_seed,
)

REMOVED = {"heads": 0.5, "neurons": 0.5, "layers": 1}


@dataclass
class StudyArguments:
    """The model, and which rows of which files are used."""

    model_name_or_path: str = field(
        metadata={"help": "Folder of a saved model, or of a configuration and a tokenizer"}
    )
    train_file: str = field(metadata={"help": "jsonl with the texts and a label"})
    test_file: str = field(metadata={"help": "jsonl, looked at after training only"})
    from_scratch: bool = field(default=False, metadata={"help": "Random weights; only the configuration is read"})
    dropout: float | None = field(default=None, metadata={"help": "The model's dropout rate; by default its own"})
    num_layers: int | None = field(default=None, metadata={"help": "Use only so many of its layers, from the bottom"})
    train_rows: int | None = field(default=None, metadata={"help": "Train on so many rows; by default the rest"})
    validation_rows: int = field(default=500, metadata={"help": "Rows of the training file to validate on"})
    max_seq_length: int = field(default=96, metadata={"help": "Longer inputs are cut to so many tokens"})
    noise: bool = field(default=False, metadata={"help": "Also test on texts with dropped words and typos"})
    removal: bool = field(default=False, metadata={"help": "Also test without some heads, neurons and layers"})


def main(
    make_trainer: Callable[..., Any] = Trainer,
    tokenize: Callable[..., Any] | None = None,
    measure: Callable[[Any, Dataset], dict[str, float]] | None = None,
) -> None:
    """Read the arguments, train, measure, save the metrics and the model.

    Args:
        make_trainer: a Trainer's class, or what makes one from the same arguments.
        tokenize: `(tokenizer, texts, max_length)` -> columns, in place of `tokenizer(*texts)`; `texts` is a list a
            column.
        measure: from the Trainer and the test rows to more metrics.
    """
    study_args, args = HfArgumentParser((StudyArguments, TrainingArguments)).parse_args_into_dataclasses()  # pyright: ignore
    set_seed(args.seed)
    rows = Dataset.from_json(study_args.train_file).shuffle(seed=args.seed)  # pyright: ignore
    test = Dataset.from_json(study_args.test_file)
    held_out = study_args.validation_rows
    train_rows = study_args.train_rows or len(rows) - held_out
    classes = sorted(set(rows["label"]))
    tokenizer = AutoTokenizer.from_pretrained(study_args.model_name_or_path)
    model = load_model(study_args, len(classes))
    encode = partial(encoded, tokenizer, classes, study_args.max_seq_length, tokenize or plain_inputs)
    trainer = make_trainer(
        model,
        args,
        train_dataset=encode(rows.select(range(held_out, held_out + train_rows))),
        eval_dataset=encode(rows.select(range(held_out))).sort("length"),
        processing_class=tokenizer,
        data_collator=DataCollatorWithPadding(tokenizer),
        compute_metrics=metrics_of,
    )
    found = trainer.train().metrics
    trainer.label_smoother = None  # so that losses of evaluations are log losses, however it was trained
    found |= violation_rates(trainer.state.log_history)
    found |= trainer.evaluate()
    found |= trainer.evaluate(encode(test).sort("length"), metric_key_prefix="test")
    if study_args.noise:
        for name, disturb in NOISES.items():
            found |= trainer.evaluate(encode(disturb(test)).sort("length"), metric_key_prefix=f"test-{name}")
    if study_args.removal:
        found |= tested_without_parts(trainer, encode(test).sort("length"))
    if measure is not None:
        found |= measure(trainer, encode(test).sort("length"))
    trainer.save_metrics("all", found, combined=False)
    trainer.save_model()


def encoded(tokenizer: Any, classes: list[Any], max_length: int, tokenize: Callable[..., Any], dataset: Any) -> Any:
    """Inputs, class numbers, and the lengths that `--train_sampling_strategy group_by_length` reads."""
    texts = [dataset[name][:] for name in dataset.column_names if name != "label"]
    inputs = tokenize(tokenizer, texts, max_length)
    labels = [classes.index(label) for label in dataset["label"]]
    return Dataset.from_dict({**inputs, "labels": labels, "length": [len(one) for one in inputs["input_ids"]]})


def plain_inputs(tokenizer: Any, texts: list[list[str]], max_length: int) -> Any:
    """One text a row, or two."""
    return tokenizer(*texts, truncation=True, max_length=max_length)


def load_model(study_args: StudyArguments, num_labels: int) -> Any:
    """Pre-trained weights with a new head, or random weights, with the dropout rate asked for."""
    rate = study_args.dropout
    rates = {} if rate is None else {"hidden_dropout_prob": rate, "attention_probs_dropout_prob": rate}
    depth = {} if study_args.num_layers is None else {"num_hidden_layers": study_args.num_layers}
    config = AutoConfig.from_pretrained(study_args.model_name_or_path, num_labels=num_labels, **rates, **depth)
    if study_args.from_scratch:
        return AutoModelForSequenceClassification.from_config(config)
    return AutoModelForSequenceClassification.from_pretrained(study_args.model_name_or_path, config=config)


def metrics_of(prediction: EvalPrediction) -> dict[str, float]:
    """Accuracy, Matthews correlation, and the expected calibration error in 15 bins."""
    logits, labels = torch.as_tensor(prediction.predictions).float(), torch.as_tensor(prediction.label_ids)
    probabilities, classes = logits.softmax(-1), logits.size(-1)
    found = {
        "accuracy": multiclass_accuracy(probabilities, labels, classes, average="micro"),
        "mcc": multiclass_matthews_corrcoef(probabilities, labels, classes),
        "ece": multiclass_calibration_error(probabilities, labels, classes, n_bins=15, norm="l1"),
    }
    return {name: float(value) for name, value in found.items()}


def violation_rates(log_history: list[dict[str, float]]) -> dict[str, float]:
    """The share of variants in the wrong order in the first and the last log of a comparative training."""
    logged = [log["violation_rate"] for log in log_history if "violation_rate" in log]
    return {"violation_rate_first": logged[0], "violation_rate_last": logged[-1]} if logged else {}


def tested_without_parts(trainer: Any, dataset: Dataset, draws: int = 2) -> dict[str, float]:
    """Loss and accuracy without half the heads or half the inner neurons of each layer, or without one layer.

    Mean over `draws` random choices of what is taken away, the same ones for every model.
    """
    found: dict[str, float] = {}
    for part, amount in REMOVED.items():
        results = []
        for draw in range(draws):
            with without(trainer.model, part, amount, torch.Generator().manual_seed(draw)):
                results.append(trainer.evaluate(dataset, metric_key_prefix="x"))
        for key in ("loss", "accuracy"):
            found[f"test-fewer-{part}_{key}"] = sum(result[f"x_{key}"] for result in results) / draws
    return found


def without(model: Any, part: str, amount: float, generator: torch.Generator) -> AbstractContextManager[None]:
    """In the body, parts of a BERT are taken away: `amount` is a share of each layer, or a number of layers."""
    if part == "layers":
        layers = len(model.base_model.encoder.layer)
        return without_layers(model, torch.randperm(layers, generator=generator)[: int(amount)].tolist())
    return without_units(
        model, part, lambda units: torch.randperm(units, generator=generator)[: round(amount * units)]
    )


if __name__ == "__main__":
    main()
