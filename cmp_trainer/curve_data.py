"""Labelled rows as batches and metrics for `cmp-trainer curve`.

| task | columns | metrics |
| --- | --- | --- |
| text-classification | one or two texts, label | see cmp_trainer/data/classification.py |
| question-answering | question, context, answers {text, answer_start} (SQuAD's form) | exact match, F1, in percent |
| tokenized | input_ids, attention_mask, labels …, and crop_segments where input can be cropped | none |

Long contexts of question answering are cut into overlapping windows; each window is an example with a loss of its own,
the answer of a question is the best span of all its windows.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from transformers import DataCollatorWithPadding, EvalPrediction

from cmp_trainer.ablations.crop_collator import CmpCropCollator
from cmp_trainer.ablations.crop_columns import SEGMENTS
from cmp_trainer.data.classification import collator_of, find_labels, text_columns, tokenize
from cmp_trainer.data.lengths import longest_input
from cmp_trainer.data.tables import check_texts, load_file

TASKS = ("text-classification", "question-answering", "tokenized")
STRIDE, LONGEST_ANSWER = 128, 30


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
    return load_file(file, "data")


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
    _require_columns(rows, ["input_ids"], task)
    collator = CmpCropCollator(tokenizer) if SEGMENTS in rows.column_names else DataCollatorWithPadding(tokenizer)
    return TaskData(rows, collator)


def _classification(rows: Dataset, tokenizer: Any, model: Any, options: Columns, max_length: int) -> TaskData:
    columns = text_columns(rows, "data", options.texts, options.label)
    check_texts(rows, "data", columns)
    labels = find_labels(
        rows, model.config, split="data", column=options.label, separator=options.separator, trained=False
    )
    encoded = labels.encode(rows, "data", options.label)
    dataset = tokenize(rows, columns, encoded, tokenizer, max_length)
    return TaskData(dataset, collator_of(tokenizer), labels.metrics, labels.metric_names)


def _question_answering(rows: Dataset, tokenizer: Any, max_length: int) -> TaskData:
    _require_columns(rows, ["question", "context", "answers"], "question-answering")
    check_texts(rows, "data", ["question", "context"])
    questions, contexts = list(rows["question"]), list(rows["context"])
    encoded = tokenizer(
        questions,
        contexts,
        truncation="only_second",
        max_length=max_length,
        stride=min(STRIDE, max_length // 4),
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
    )
    samples, offsets = encoded.pop("overflow_to_sample_mapping"), encoded.pop("offset_mapping")
    # (start, end) in the context of each token; None outside of it
    spans = [
        [offset if part == 1 else None for offset, part in zip(window, encoded.sequence_ids(row), strict=True)]
        for row, window in enumerate(offsets)
    ]
    answers = list(rows["answers"])
    positions = [_answer_positions(window, answers[sample]) for window, sample in zip(spans, samples, strict=True)]
    dataset = Dataset.from_dict(
        {**encoded, "start_positions": [p[0] for p in positions], "end_positions": [p[1] for p in positions]}
    )

    def compute_metrics(prediction: EvalPrediction) -> dict[str, float]:
        logits: Any = prediction.predictions
        starts, ends = logits[:2]
        best: dict[int, tuple[float, str]] = {}
        for sample, window, start, end in zip(samples, spans, starts, ends, strict=True):
            score, text = _best_span(window, start, end, contexts[sample])
            best[sample] = max(best.get(sample, (-np.inf, "")), (score, text))
        return _squad_scores([best[sample][1] for sample in range(len(rows))], answers)

    return TaskData(dataset, DataCollatorWithPadding(tokenizer), compute_metrics, ("exact_match", "f1"))


def _answer_positions(window: Sequence[tuple[int, int] | None], answers: Mapping[str, Any]) -> tuple[int, int]:
    """First and last token of the first answer; (0, 0) where the window does not hold it whole."""
    if not answers["text"]:
        return 0, 0
    begin = answers["answer_start"][0]
    end = begin + len(answers["text"][0])
    inside = [token for token, span in enumerate(window) if span and span[0] < end and span[1] > begin]
    tokens = [token for token, span in enumerate(window) if span]
    whole = inside and window[tokens[0]][0] <= begin and window[tokens[-1]][1] >= end  # pyright: ignore[reportOptionalSubscript]
    return (inside[0], inside[-1]) if whole else (0, 0)


def _best_span(
    window: Sequence[tuple[int, int] | None], start: np.ndarray, end: np.ndarray, context: str
) -> tuple[float, str]:
    """Score and text of the best span of context tokens, at most LONGEST_ANSWER long."""
    tokens = np.array([token for token, span in enumerate(window) if span])
    scores = start[tokens][:, None] + end[tokens][None, :]  # (context tokens, context tokens)
    allowed = np.triu(np.ones_like(scores, dtype=bool)) & ~np.triu(np.ones_like(scores, dtype=bool), LONGEST_ANSWER)
    first, last = np.unravel_index(np.where(allowed, scores, -np.inf).argmax(), scores.shape)
    begin, stop = window[tokens[first]], window[tokens[last]]
    assert begin is not None and stop is not None
    return float(scores[first, last]), context[begin[0] : stop[1]]


def _squad_scores(predictions: Sequence[str], answers: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    from torchmetrics.functional.text import squad

    predicted = [{"id": str(number), "prediction_text": text} for number, text in enumerate(predictions)]
    targets = [
        {"id": str(number), "answers": {"text": list(one["text"]) or [""], "answer_start": [0]}}
        for number, one in enumerate(answers)
    ]
    return {name: float(value) for name, value in squad(predicted, targets).items()}


def _require_columns(rows: Dataset, columns: Sequence[str], task: str) -> None:
    missing = [name for name in columns if name not in rows.column_names]
    if missing:
        raise ValueError(f"{task} needs the column {missing[0]!r}; the data has {', '.join(rows.column_names)}")
