"""Fine-tune a model on one GLUE task, with or without comparative loss.

    python examples/glue/run_glue.py examples/glue/cola.yaml
    python examples/glue/run_glue.py examples/glue/cola.yaml --num_train_epochs 1
    python examples/glue/run_glue.py examples/glue/mrpc.yaml --train_file train.jsonl --validation_file dev.jsonl

Local files need the columns of the task (see TASKS); labels are class numbers or class names. MNLI has two
evaluation sets, `--validation_matched_file` and `--validation_mismatched_file`, and two test sets likewise.
--do_predict writes a submission file of the GLUE benchmark into the output folder.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer, DataCollatorWithPadding
from transformers.trainer_utils import EvalPrediction, PredictionOutput

from cmp_trainer import CmpTrainer, CmpTrainingArguments
from cmp_trainer.scripting import (
    DataArguments,
    ModelArguments,
    check_texts,
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
    max_seq_length: int = field(default=128, metadata={"help": "Longer inputs are cut to so many tokens"})
    pad_to_max_length: bool = field(
        default=False, metadata={"help": "Pad to max_seq_length, not to the batch's longest"}
    )
    new_head: bool = field(default=False, metadata={"help": "Replace a head of another number of outputs"})
    validation_matched_file: str | None = field(default=None, metadata={"help": "MNLI, matched genres"})
    validation_mismatched_file: str | None = field(default=None, metadata={"help": "MNLI, other genres"})
    test_matched_file: str | None = field(default=None, metadata={"help": "MNLI, matched genres"})
    test_mismatched_file: str | None = field(default=None, metadata={"help": "MNLI, other genres"})

    def __post_init__(self) -> None:
        if self.task_name not in TASKS:
            raise ValueError(f"--task_name {self.task_name!r} is not one of {', '.join(TASKS)}")


@plain_errors()
def main() -> None:
    model_args, data_args, args = parse_arguments(ModelArguments, GlueArguments, CmpTrainingArguments)
    set_up(args)
    task = TASKS[data_args.task_name]
    splits = load_splits(data_args)
    tokenizer = load_pretrained(AutoTokenizer, model_args.tokenizer_name or model_args.model_name_or_path, model_args)

    def prepare(split: str, max_samples: int | None, labelled: bool = True) -> Dataset:
        columns = [*task.columns, *(["label"] if labelled else [])]
        dataset = take_split(splits, split, columns, max_samples)
        check_texts(dataset, split, task.columns)
        labels = encode_labels(dataset, split, task) if labelled else None
        with args.main_process_first():
            return tokenize(dataset, labels, task, tokenizer, data_args)

    evaluation, prediction = {}, {}
    if args.do_eval:
        evaluation = {name: prepare(split, data_args.max_eval_samples) for name, split in task.validation.items()}
    if args.do_predict:
        prediction = {
            split: prepare(split, data_args.max_predict_samples, labelled=False) for split in task.submissions
        }
    trainer = CmpTrainer(
        model=load_model(model_args, data_args),
        args=args,
        train_dataset=prepare("train", data_args.max_train_samples) if args.do_train else None,
        eval_dataset=evaluation.get("eval"),  # of MNLI the matched genres: they choose the best checkpoint
        processing_class=tokenizer,
        data_collator=DataCollatorWithPadding(tokenizer, pad_to_multiple_of=8 if args.fp16 or args.bf16 else None),
        compute_metrics=metrics_of(data_args.task_name),
    )
    card = {"tasks": "text-classification", "language": "en", **data_args.card()}
    run(
        trainer,
        evaluation,
        prediction,
        write_predictions=submission_writer(Path(str(args.output_dir)), task),
        card=card,
    )


def load_model(model_args: ModelArguments, data_args: GlueArguments) -> Any:
    """The encoder with a head for the task; the head of another task is replaced only on request."""
    name = model_args.model_name_or_path
    classes = dict(enumerate(TASKS[data_args.task_name].classes)) or {0: "similarity"}
    config = load_pretrained(AutoConfig, name, model_args)
    has_head = any(kind.endswith("ForSequenceClassification") for kind in config.architectures or [])
    if has_head and config.num_labels != len(classes) and not data_args.new_head:
        raise ValueError(
            f"{name} has a head of {config.num_labels} outputs, but {data_args.task_name} needs {len(classes)}; "
            "pass --new_head true to start from its encoder with a new head"
        )
    return load_pretrained(
        AutoModelForSequenceClassification,
        name,
        model_args,
        num_labels=len(classes),
        id2label=classes,
        label2id={name: number for number, name in classes.items()},
        ignore_mismatched_sizes=data_args.new_head,
    )


def encode_labels(dataset: Dataset, split: str, task: Task) -> list[int] | list[float]:
    """Class numbers of labels that are numbers or names (scores as they are); what is neither is refused."""
    if not task.classes:
        if dataset.features["label"].dtype not in ("float32", "float64", "int64"):
            raise ValueError(f"labels of {split} are {dataset.features['label'].dtype}; expected scores from 0 to 5")
        known = {label: float(label) for label in dataset.unique("label") if label is not None and 0 <= label <= 5}
    else:
        known = {kind(number): number for number in range(len(task.classes)) for kind in (int, str)}
        known |= {name: number for number, name in enumerate(task.classes)}
    labels = list(dataset["label"])
    unknown = [label for label in labels if label not in known]
    if unknown:
        shown = ", ".join(repr(label) for label in sorted(set(unknown), key=str)[:5])
        expected = " or ".join(f"{n} ({name})" for n, name in enumerate(task.classes)) or "scores from 0 to 5"
        raise ValueError(f"{len(unknown)} of {len(labels)} labels of {split} are not {expected}: {shown}")
    return [known[label] for label in labels]


def tokenize(dataset: Dataset, labels: list | None, task: Task, tokenizer: Any, data_args: GlueArguments) -> Dataset:
    def encode(batch: dict[str, list[str]]) -> Any:
        return tokenizer(
            *(batch[column] for column in task.columns),
            truncation=True,
            max_length=data_args.max_seq_length,
            padding="max_length" if data_args.pad_to_max_length else False,
        )

    encoded = dataset.map(encode, batched=True, remove_columns=dataset.column_names, desc="tokenizing")
    full = sum(sum(mask) == data_args.max_seq_length for mask in encoded["attention_mask"])
    if full:
        logger.info("%d of %d inputs reach %d tokens and are cut there", full, len(dataset), data_args.max_seq_length)
    return encoded if labels is None else encoded.add_column("labels", labels)  # pyright: ignore[reportCallIssue]


def decide(logits: Any, task: Task) -> np.ndarray:
    """(rows, classes) logits to (rows,) class numbers, or (rows, 1) to (rows,) scores."""
    logits = logits[0] if isinstance(logits, tuple) else logits
    return logits.argmax(axis=-1) if task.classes else logits[:, 0]


def readable(predictions: np.ndarray, task: Task) -> list[str]:
    if not task.classes:
        return [f"{min(max(score, 0.0), 5.0):.3f}" for score in predictions]
    return [task.classes[number] if task.writes_names else str(number) for number in predictions]


def submission_writer(folder: Path, task: Task) -> Callable[[str, PredictionOutput], None]:
    """Writes what was predicted for a test split in the form and under the name that the GLUE site expects."""

    def write(split: str, output: PredictionOutput) -> None:
        rows = enumerate(readable(decide(output.predictions, task), task))
        lines = ["index\tprediction", *(f"{index}\t{prediction}" for index, prediction in rows)]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / task.submissions[split]).write_text("\n".join(lines) + "\n", encoding="utf-8")
        logger.info("predictions of %s: %s", split, folder / task.submissions[split])

    return write


def metrics_of(task_name: str) -> Any:
    try:
        metric = evaluate.load(str(Path(__file__).parent / "glue_metric"), task_name, keep_in_memory=True)
    except ImportError as error:
        raise ValueError(f"{error}; all that this script needs: pip install 'cmp-trainer[examples]'") from error

    def compute_metrics(prediction: EvalPrediction) -> dict[str, float]:
        scores = decide(prediction.predictions, TASKS[task_name])
        return metric.compute(predictions=scores, references=prediction.label_ids) or {}

    return compute_metrics


if __name__ == "__main__":
    main()
