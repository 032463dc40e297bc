"""Labelled rows as batches and metrics for `cmp-trainer curve`.

| task | columns | metrics |
| --- | --- | --- |
| text-classification | one or two texts, label | see cmp_trainer/data/classification.py |
| question-answering | question, context, answers {text, answer_start} (SQuAD's form) | exact match, F1, in percent |
| tokenized | input_ids, attention_mask, labels …, and crop_segments where input can be cropped | none |

Questions are read, cut into windows, answered and scored as examples/squad/run_squad.py does it with its defaults, so
both give the same numbers. Each window is an example with a loss of its own; the answer of a question is the best span
of all its windows. Below 384 tokens windows share at most a third of their length, and a question takes at most a
quarter.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from transformers import DataCollatorWithPadding, EvalPrediction

from cmp_trainer.ablations.crop_collator import CmpCropCollator
from cmp_trainer.ablations.crop_columns import SEGMENTS
from cmp_trainer.data.answer_batches import AnswerCollator, padding_multiple
from cmp_trainer.data.answer_metrics import squad_metrics
from cmp_trainer.data.answers import AnswerSettings, read_answers
from cmp_trainer.data.classification import collator_of, encode_texts, find_labels, text_columns
from cmp_trainer.data.lengths import longest_input
from cmp_trainer.data.questions import read_questions, to_questions
from cmp_trainer.data.tables import load_file, require_columns
from cmp_trainer.data.windows import WindowSettings, evaluation_windows

TASKS = ("text-classification", "question-answering", "tokenized")


@dataclass(frozen=True)
class TaskData:
    """What a trainer needs to evaluate a model on rows."""

    dataset: Dataset
    collator: Any
    compute_metrics: Callable[[EvalPrediction], dict[str, float]] | None = None
    metrics: tuple[str, ...] = ()  # what compute_metrics returns


@dataclass(frozen=True)
class Columns:
    """Where texts and labels to classify stand. texts None: all text columns but the label's."""

    texts: Sequence[str] | None = None
    label: str = "label"
    separator: str | None = None


def task_of(config: Any, file: Path) -> str:
    """The task of a model, by its architecture; `tokenized` where the file's rows are token ids.

    Raises:
        ValueError: the architecture is for another task.
    """
    if "input_ids" in _columns_of(file):
        return "tokenized"
    architecture = (getattr(config, "architectures", None) or ["none"])[0]
    by_suffix = {"ForSequenceClassification": TASKS[0], "ForQuestionAnswering": TASKS[1]}
    for suffix, task in by_suffix.items():
        if architecture.endswith(suffix):
            return task
    raise ValueError(
        f"a model of the architecture {architecture} needs rows that are tokenized (input_ids, labels, …); texts are "
        f"understood for models that end in {' or '.join(by_suffix)}"
    )


def rows_of(task: str, file: Path) -> Dataset:
    """The rows of a file: questions in any of SQuAD's forms, or those of a table."""
    return read_questions(file) if task == "question-answering" else load_file(file, "data")


def _columns_of(file: Path) -> list[str]:
    try:
        return load_file(file, "data").column_names
    except ValueError:  # no table; whether it is SQuAD's nested form, the reader of questions knows
        return []


def prepare(
    task: str, rows: Dataset, tokenizer: Any, model: Any, max_length: int, columns: Columns | None = None
) -> TaskData:
    """Tokenize the rows for the task; inputs have at most `max_length` tokens, and no more than the model takes.

    Raises:
        ValueError: columns or labels that do not fit the task; shows what was found.
    """
    max_length = min(max_length, longest_input(tokenizer, model) or max_length)
    if task == "text-classification":
        return _classification(rows, tokenizer, model, columns or Columns(), max_length)
    if task == "question-answering":
        return _question_answering(rows, tokenizer, max_length)
    require_columns(rows, "data", ["input_ids"])
    collator = CmpCropCollator(tokenizer) if SEGMENTS in rows.column_names else DataCollatorWithPadding(tokenizer)
    return TaskData(rows, collator)


def _classification(rows: Dataset, tokenizer: Any, model: Any, options: Columns, max_length: int) -> TaskData:
    columns = text_columns(rows, "data", options.texts, options.label)
    labels = find_labels(
        rows, model.config, split="data", column=options.label, separator=options.separator, trained=False
    )
    dataset = encode_texts(rows, "data", columns, tokenizer, max_length, labels, options.label)
    return TaskData(dataset, collator_of(tokenizer), labels.metrics, labels.metric_names)


def _question_answering(rows: Dataset, tokenizer: Any, max_length: int) -> TaskData:
    """What run_squad evaluates, with its defaults; questions may be unanswerable where any of them is."""
    questions = to_questions(rows, "data")  # changes nothing where rows_of made them
    windows, report = evaluation_windows(questions, tokenizer, WindowSettings.of_length(max_length))
    report.log("data")
    right = [answers["text"] for answers in questions["answers"][:]]
    settings = AnswerSettings(unanswerable=not all(right))

    def compute_metrics(prediction: EvalPrediction) -> dict[str, float]:
        logits: Any = prediction.predictions
        answers = read_answers(questions, windows, np.asarray(logits[0]), np.asarray(logits[1]), settings, False)
        scores = squad_metrics(list(answers.predictions.values()), right)
        return {name: scores[name] for name in ("exact_match", "f1")}

    collator = AnswerCollator(tokenizer, padding_multiple(max_length))
    return TaskData(windows, collator, compute_metrics, ("exact_match", "f1"))
