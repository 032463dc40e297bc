"""Fine-tune a model on any table of texts and labels, with or without comparative loss.

    python run_text_classification.py trec.yaml --train_file train.jsonl --validation_file dev.jsonl
    python run_text_classification.py trec.yaml --train_file a.csv --validation_file b.csv \\
        --text_columns title body --label_column topic

Here is only the order of the steps; what labels mean and how they meet the model's outputs is in
cmp_trainer/data/classification.py, which `cmp-trainer curve` reads through too.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from datasets import Dataset
from transformers import AutoConfig, AutoTokenizer
from transformers.trainer_utils import PredictionOutput

from cmp_trainer import CmpTrainer, CmpTrainingArguments
from cmp_trainer.data.classification import (
    PROBLEM_TYPES,
    Labels,
    TextArguments,
    collator_of,
    encode_texts,
    find_labels,
    is_labelled,
    load_classifier,
    text_columns,
)
from cmp_trainer.data.lengths import check_length
from cmp_trainer.scripting import (
    DataArguments,
    ModelArguments,
    load_pretrained,
    load_splits,
    parse_arguments,
    plain_errors,
    run,
    set_up,
    take_split,
)

logger = logging.getLogger("cmp_trainer.examples.text_classification")


@dataclass
class TableArguments(DataArguments):
    """The columns of a table, and what its labels are."""

    text_columns: list[str] = field(
        default_factory=list,
        metadata={"help": "One or two columns of text; by default all but the label", "nargs": "+"},
    )
    label_column: str = field(
        default="label", metadata={"help": "Class names, class numbers, lists of them, or scores"}
    )
    label_kind: str | None = field(
        default=None, metadata={"help": f"{', '.join(PROBLEM_TYPES)}; by default what the model or the column says"}
    )
    label_separator: str | None = field(
        default=None, metadata={"help": "What stands between several classes in one cell, for multi"}
    )

    def __post_init__(self) -> None:
        if self.label_kind not in (None, *PROBLEM_TYPES):
            raise ValueError(f"--label_kind {self.label_kind}: expected one of {', '.join(PROBLEM_TYPES)}")


@plain_errors()
def main() -> None:
    model_args, data_args, text_args, args = parse_arguments(
        ModelArguments, TableArguments, TextArguments, CmpTrainingArguments
    )
    set_up(args)
    splits = load_splits(data_args)
    name = model_args.model_name_or_path
    tokenizer = load_pretrained(AutoTokenizer, model_args.tokenizer_name or name, model_args)
    config = load_pretrained(AutoConfig, name, model_args)
    # The columns are those of one split: another one may have more texts, which are none of the model's inputs.
    first = "train" if args.do_train else "validation" if args.do_eval else "test"
    rows = take_split(splits, first, [])
    columns = text_columns(rows, first, data_args.text_columns, data_args.label_column)
    labels = labels_of(rows, first, config, data_args, text_args.new_head)
    model = load_classifier(
        partial(load_pretrained, name=name, model_args=model_args),
        config,
        labels,
        text_args.new_head,
    )
    check_length("--max_seq_length", text_args.max_seq_length, tokenizer, model)

    def prepare(split: str, max_samples: int | None) -> Dataset:
        labelled = split != "test" or is_labelled(take_split(splits, split, []), data_args.label_column)
        rows = take_split(splits, split, [*columns, *([data_args.label_column] if labelled else [])], max_samples)
        with args.main_process_first():
            return encode_texts(
                rows,
                split,
                columns,
                tokenizer,
                text_args.max_seq_length,
                labels if labelled else None,
                data_args.label_column,
                text_args.pad_to_max_length,
            )

    evaluation = {"eval": prepare("validation", data_args.max_eval_samples)} if args.do_eval else {}
    trainer = CmpTrainer(
        model=model,
        args=args,
        train_dataset=prepare("train", data_args.max_train_samples) if args.do_train else None,
        eval_dataset=evaluation.get("eval"),
        processing_class=tokenizer,
        data_collator=collator_of(tokenizer, args),
        compute_metrics=labels.metrics,
    )
    run(
        trainer,
        evaluation,
        {"test": prepare("test", data_args.max_predict_samples)} if args.do_predict else None,
        write_predictions=prediction_writer(Path(str(args.output_dir)), labels),
        card={"tasks": "text-classification", **data_args.card()},
    )


def labels_of(rows: Dataset, split: str, config: Any, data_args: TableArguments, new_head: bool) -> Labels:
    """The labels of the split that is trained on, or else evaluated; the log says what they are."""
    labels = find_labels(
        rows if split != "test" or is_labelled(rows, data_args.label_column) else None,
        config,
        split=split,
        column=data_args.label_column,
        kind=data_args.label_kind,
        separator=data_args.label_separator,
        new_head=new_head,
        trained=split == "train",
    )
    logger.info("labels of the kind %s%s", labels.kind, f": {', '.join(labels.names)}" if labels.names else "")
    return labels


def prediction_writer(folder: Path, labels: Labels) -> Callable[[str, PredictionOutput], None]:
    """Writes <split>_predictions.csv: each row's index, class (or classes, or score) and probabilities."""

    def write(split: str, output: PredictionOutput) -> None:
        table = prediction_table(output.predictions, labels)
        folder.mkdir(parents=True, exist_ok=True)
        table.to_csv(folder / f"{split}_predictions.csv", index_label="index", float_format="%.6g")
        logger.info("predictions of %s: %s", split, folder / f"{split}_predictions.csv")

    return write


def prediction_table(logits: Any, labels: Labels) -> pd.DataFrame:
    """`prediction`, and a column `p(class)` for each class."""
    decided = labels.decide(logits)
    if labels.kind == "scores":
        return pd.DataFrame({"prediction": decided})
    scores = torch.as_tensor(logits[0] if isinstance(logits, tuple) else logits).float()
    if labels.kind == "single":
        names, probabilities = [labels.names[number] for number in decided], scores.softmax(-1)
    else:
        separator = labels.separator or ";"
        names = [
            separator.join(name for name, is_in in zip(labels.names, row, strict=True) if is_in) for row in decided
        ]
        probabilities = scores.sigmoid()
    columns = [f"p({name})" for name in labels.names]
    return pd.DataFrame({"prediction": names}).join(pd.DataFrame(probabilities.numpy(), columns=columns))


if __name__ == "__main__":
    main()
