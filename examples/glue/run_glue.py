"""Fine-tune a model on one GLUE task, with or without comparative loss.

    python examples/glue/run_glue.py examples/glue/cola.yaml
    python examples/glue/run_glue.py examples/glue/cola.yaml --num_train_epochs 1
    python examples/glue/run_glue.py examples/glue/mrpc.yaml --train_file train.jsonl --validation_file dev.jsonl

Here is GLUE's own: the tasks with their columns and classes, MNLI's two evaluation sets, the metrics of each task, and
the submission files that --do_predict writes. What every table of texts and labels needs is in
cmp_trainer/data/classification.py; run_text_classification.py is the script for tables of any other kind.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from transformers import AutoConfig, AutoTokenizer
from transformers.trainer_utils import EvalPrediction, PredictionOutput

from cmp_trainer import CmpTrainer, CmpTrainingArguments
from cmp_trainer.data.classification import (
    Labels,
    TextArguments,
    collator_of,
    encode_texts,
    labels_of_classes,
    load_classifier,
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

with plain_errors():
    import evaluate

logger = logging.getLogger("cmp_trainer.run_glue")


@dataclass(frozen=True)
class Task:
    """A GLUE task: its text columns, class names in order (none: a score), and where each split goes."""

    columns: tuple[str, ...]
    classes: tuple[str, ...]
    submissions: dict[str, str]  # test split -> file name that the GLUE site expects
    writes_names: bool = False  # submissions hold class names instead of numbers
    validation: dict[str, str] = field(default_factory=lambda: {"eval": "validation"})  # prefix of metrics -> split


PAIR = ("sentence1", "sentence2")
ENTAILMENT = ("entailment", "not_entailment")
TASKS = {
    "cola": Task(("sentence",), ("unacceptable", "acceptable"), {"test": "CoLA.tsv"}),
    "sst2": Task(("sentence",), ("negative", "positive"), {"test": "SST-2.tsv"}),
    "mrpc": Task(PAIR, ("not_equivalent", "equivalent"), {"test": "MRPC.tsv"}),
    "stsb": Task(PAIR, (), {"test": "STS-B.tsv"}),
    "qqp": Task(("question1", "question2"), ("not_duplicate", "duplicate"), {"test": "QQP.tsv"}),
    "mnli": Task(
        ("premise", "hypothesis"),
        ("entailment", "neutral", "contradiction"),
        {"test_matched": "MNLI-m.tsv", "test_mismatched": "MNLI-mm.tsv"},
        writes_names=True,
        validation={"eval": "validation_matched", "eval_mismatched": "validation_mismatched"},
    ),
    "qnli": Task(("question", "sentence"), ENTAILMENT, {"test": "QNLI.tsv"}, writes_names=True),
    "rte": Task(PAIR, ENTAILMENT, {"test": "RTE.tsv"}, writes_names=True),
}


@dataclass
class GlueArguments(DataArguments):
    task_name: str = field(default="", metadata={"help": f"One of {', '.join(TASKS)}"})
    validation_matched_file: str | None = field(default=None, metadata={"help": "MNLI, matched genres"})
    validation_mismatched_file: str | None = field(default=None, metadata={"help": "MNLI, other genres"})
    test_matched_file: str | None = field(default=None, metadata={"help": "MNLI, matched genres"})
    test_mismatched_file: str | None = field(default=None, metadata={"help": "MNLI, other genres"})

    def __post_init__(self) -> None:
        if self.task_name not in TASKS:
            raise ValueError(f"--task_name {self.task_name!r} is not one of {', '.join(TASKS)}")


@plain_errors()
def main() -> None:
    model_args, data_args, text_args, args = parse_arguments(
        ModelArguments, GlueArguments, TextArguments, CmpTrainingArguments
    )
    set_up(args)
    task, name = TASKS[data_args.task_name], model_args.model_name_or_path
    splits = load_splits(data_args)
    tokenizer = load_pretrained(AutoTokenizer, model_args.tokenizer_name or name, model_args)
    config = load_pretrained(AutoConfig, name, model_args)
    labels = labels_of_task(task, config, text_args.new_head)
    model = load_classifier(
        partial(load_pretrained, name=name, model_args=model_args),
        config,
        labels,
        text_args.new_head,
    )
    check_length("--max_seq_length", text_args.max_seq_length, tokenizer, model)

    def prepare(split: str, max_samples: int | None, labelled: bool = True) -> Dataset:
        rows = take_split(splits, split, [*task.columns, *(["label"] if labelled else [])], max_samples)
        with args.main_process_first():
            return encode_texts(
                rows,
                split,
                task.columns,
                tokenizer,
                text_args.max_seq_length,
                labels if labelled else None,
                pad_to_max_length=text_args.pad_to_max_length,
            )

    evaluation, prediction = {}, {}
    if args.do_eval:
        evaluation = {name: prepare(split, data_args.max_eval_samples) for name, split in task.validation.items()}
    if args.do_predict:
        prediction = {
            split: prepare(split, data_args.max_predict_samples, labelled=False) for split in task.submissions
        }
    trainer = CmpTrainer(
        model=model,
        args=args,
        train_dataset=prepare("train", data_args.max_train_samples) if args.do_train else None,
        eval_dataset=evaluation.get("eval"),  # of MNLI the matched genres: they choose the best checkpoint
        processing_class=tokenizer,
        data_collator=collator_of(tokenizer, args),
        compute_metrics=metrics_of(data_args.task_name, labels),
    )
    run(
        trainer,
        evaluation,
        prediction,
        write_predictions=submission_writer(Path(str(args.output_dir)), task, labels),
        card={"tasks": "text-classification", "language": "en", **data_args.card()},
    )


def labels_of_task(task: Task, config: Any, new_head: bool = False) -> Labels:
    labels = labels_of_classes(task.classes, config, new_head)
    return labels if task.classes else replace(labels, bounds=(0.0, 5.0))


def in_order_of_task(numbers: np.ndarray, task: Task, labels: Labels) -> np.ndarray:
    """Numbers of the model's classes, (rows,), as those of the task's, whose order may differ; scores as they are."""
    if not task.classes:
        return numbers
    return np.array([task.classes.index(name) if name in task.classes else -1 for name in labels.names])[numbers]


def submission_writer(folder: Path, task: Task, labels: Labels) -> Callable[[str, PredictionOutput], None]:
    """Writes what was predicted for a test split in the form and under the name that the GLUE site expects."""

    def write(split: str, output: PredictionOutput) -> None:
        predictions = in_order_of_task(labels.decide(output.predictions), task, labels)
        rows = enumerate(readable(predictions, task))
        lines = ["index\tprediction", *(f"{index}\t{prediction}" for index, prediction in rows)]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / task.submissions[split]).write_text("\n".join(lines) + "\n", encoding="utf-8")
        logger.info("predictions of %s: %s", split, folder / task.submissions[split])

    return write


def readable(predictions: np.ndarray, task: Task) -> list[str]:
    if not task.classes:
        return [f"{min(max(score, 0.0), 5.0):.3f}" for score in predictions]
    return [task.classes[number] if task.writes_names else str(number) for number in predictions]


def metrics_of(task_name: str, labels: Labels) -> Callable[[EvalPrediction], dict[str, float]]:
    task = TASKS[task_name]
    try:
        metric = evaluate.load(str(Path(__file__).parent / "glue_metric"), task_name, keep_in_memory=True)
    except ImportError as error:
        raise ValueError(f"{error}; all that this script needs: pip install 'cmp-trainer[examples]'") from error

    def compute_metrics(prediction: EvalPrediction) -> dict[str, float]:
        decided = in_order_of_task(labels.decide(prediction.predictions), task, labels)
        right = in_order_of_task(np.asarray(prediction.label_ids), task, labels)
        return metric.compute(predictions=decided, references=right) or {}

    return compute_metrics


if __name__ == "__main__":
    main()
