"""Labelled rows as batches and metrics for `cmp-trainer curve`.

| task | columns | metrics |
| --- | --- | --- |
| text-classification | one or two texts, label (number or class name) | accuracy, Matthews, F1 (two classes) |
| regression (a model with one label) | the same, label a number | Pearson and Spearman correlation |
| question-answering | question, context, answers {text, answer_start} (SQuAD's form) | exact match, F1, in percent |
| tokenized | input_ids, attention_mask, labels …, and crop_segments where input can be cropped | none |

Long contexts of question answering are cut into overlapping windows; each window is an example with a loss of its own,
the answer of a question is the best span of all its windows.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from datasets import Dataset
from transformers import DataCollatorWithPadding, EvalPrediction

from cmp_trainer.ablations.crop_collator import CmpCropCollator
from cmp_trainer.ablations.crop_columns import SEGMENTS
from cmp_trainer.scripting import check_texts

TASKS = ("text-classification", "question-answering", "tokenized")
STRIDE, LONGEST_ANSWER = 128, 30


@dataclass(frozen=True)
class TaskData:
    """What a trainer needs to evaluate a model on rows."""

    dataset: Dataset
    collator: Any
    compute_metrics: Callable[[EvalPrediction], dict[str, float]] | None = None
    metrics: tuple[str, ...] = ()  # what compute_metrics returns


def task_of(config: Any, rows: Dataset) -> str:
    """The task of a model, by its architecture; `tokenized` where the rows are token ids.

    Raises:
        ValueError: the architecture is for another task.
    """
    if "input_ids" in rows.column_names:
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


def prepare(
    task: str, rows: Dataset, tokenizer: Any, config: Any, columns: Sequence[str] | None, max_length: int
) -> TaskData:
    """Tokenize the rows for the task.

    Raises:
        ValueError: columns or labels that do not fit the task; shows what was found.
    """
    max_length = _longest(max_length, tokenizer.model_max_length, getattr(config, "max_position_embeddings", None))
    if task == "text-classification":
        return _classification(rows, tokenizer, config, columns, max_length)
    if task == "question-answering":
        return _question_answering(rows, tokenizer, max_length)
    _require_columns(rows, ["input_ids"], task)
    collator = CmpCropCollator(tokenizer) if SEGMENTS in rows.column_names else DataCollatorWithPadding(tokenizer)
    return TaskData(rows, collator)


def _longest(asked: int, *limits: int | None) -> int:
    """The smallest of the lengths; models without a longest input (XLNet, T5) give None or a negative number."""
    return min(asked, *(limit for limit in limits if limit is not None and limit > 0))


def _classification(
    rows: Dataset, tokenizer: Any, config: Any, columns: Sequence[str] | None, max_length: int
) -> TaskData:
    strings = [
        name for name, kind in rows.features.items() if getattr(kind, "dtype", "") in ("string", "large_string")
    ]
    texts = columns or [name for name in strings if name != "label"]
    _require_columns(rows, [*texts, "label"], "text-classification")
    if not 1 <= len(texts) <= 2:
        found = ", ".join(rows.column_names)
        raise ValueError(
            f"text-classification takes one or two text columns, not {len(texts)}; name them with --columns (found: "
            f"{found})"
        )
    check_texts(rows, "data", texts)
    labels = [_label(value, config) for value in rows["label"]]
    encoded = tokenizer(*(list(rows[name]) for name in texts), truncation=True, max_length=max_length)
    dataset, collator = Dataset.from_dict({**encoded, "labels": labels}), DataCollatorWithPadding(tokenizer)
    if config.num_labels == 1:
        return TaskData(dataset, collator, _correlations, ("pearson", "spearman"))
    metrics = ("accuracy", "matthews_correlation", *(["f1"] if config.num_labels == 2 else []))
    return TaskData(dataset, collator, _classification_metrics, metrics)


def _label(value: Any, config: Any) -> int | float:
    if config.num_labels == 1:
        return float(value)
    number = config.label2id.get(str(value), value)  # a csv holds names such as "1" as numbers
    if isinstance(number, str) and number.isdigit():
        number = int(number)
    if not isinstance(number, int) or not 0 <= number < config.num_labels:
        expected = ", ".join(f"{index} ({name})" for index, name in config.id2label.items())
        raise ValueError(f"label {value!r} is none of the model's: {expected}")
    return number


def _classification_metrics(prediction: EvalPrediction) -> dict[str, float]:
    from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

    decided, labels = np.asarray(prediction.predictions).argmax(-1), prediction.label_ids
    metrics = {"accuracy": accuracy_score(labels, decided), "matthews_correlation": matthews_corrcoef(labels, decided)}
    two_classes = np.asarray(prediction.predictions).shape[-1] == 2
    return {**metrics, "f1": f1_score(labels, decided)} if two_classes else metrics


def _correlations(prediction: EvalPrediction) -> dict[str, float]:
    from scipy.stats import pearsonr, spearmanr

    scores, labels = np.asarray(prediction.predictions).squeeze(-1), prediction.label_ids
    coefficients: dict[str, Any] = {"pearson": pearsonr(scores, labels)[0], "spearman": spearmanr(scores, labels)[0]}
    return {name: float(value) for name, value in coefficients.items()}


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
