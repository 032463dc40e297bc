"""Answers from start and end logits: the n best spans of each question, over all its windows.

The score of a span is its start logit plus its end logit. A span is a candidate where both ends are among the
`n_best` tokens of its window's context, the end is not before the start, and it has at most `max_answer_length`
tokens. The same characters found in two windows are one candidate, with the better score. Ties go to the earlier
window, then the earlier start, then the shorter span.

With unanswerable questions (SQuAD v2) the null score is start + end logit of the null position, the lowest over the
question's windows: a question is unanswerable only where every window says so. The answer is empty where
`null odds = null score - best span's score` is above the threshold.

Everything up to the text is done on arrays of all windows at once (in chunks, for memory), after Devlin et al. 2019,
section 4.2 and 4.3.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from datasets import Dataset
from tqdm.auto import tqdm

CHUNK = 512  # windows at a time: (512, 20, 20) scores


@dataclass(frozen=True)
class AnswerSettings:
    """How answers are read.

    Args:
        n_best: how many starts and ends of a window, and how many spans of a question, are kept.
        max_answer_length: the longest answer, in tokens.
        unanswerable: whether a question may have no answer (SQuAD v2).
        null_threshold: null odds above which the answer is empty.
    """

    n_best: int = 20
    max_answer_length: int = 30
    unanswerable: bool = False
    null_threshold: float = 0.0

    def __post_init__(self) -> None:
        for name in ("n_best", "max_answer_length"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} {getattr(self, name)}: expected 1 or more")


@dataclass
class Answers:
    """What was read, by question id.

    Attributes:
        predictions: the answer; empty where there is none.
        spans: the best span, also where the answer is empty because of the threshold.
        nbest: the best spans with probabilities (a softmax over their scores), best first; with unanswerable
            questions the null answer ("") is among them.
        null_odds: null score - best span's score (inf where there is no span); empty without unanswerable questions.
        without_span: how many questions have no candidate at all (an empty context).
    """

    predictions: dict[str, str]
    spans: dict[str, str]
    nbest: dict[str, list[dict[str, Any]]]
    null_odds: dict[str, float]
    without_span: int


class Spans(NamedTuple):
    """Candidate spans as columns: the question, its characters [first, last), their logits."""

    question: np.ndarray
    first: np.ndarray
    last: np.ndarray
    start_logit: np.ndarray
    end_logit: np.ndarray

    def __getitem__(self, rows: Any) -> "Spans":  # pyright: ignore[reportIncompatibleMethodOverride]
        return Spans(*(column[rows] for column in tuple(self)))


def read_answers(
    examples: Dataset,
    windows: Dataset,
    start_logits: np.ndarray,
    end_logits: np.ndarray,
    settings: AnswerSettings,
    progress: bool = True,
) -> Answers:
    """Answers of all questions.

    Args:
        examples: the questions, with `id` and `context`.
        windows: their windows (`squad_windows.evaluation_windows`), in the order of the logits.
        start_logits: (windows, length); padding on the right is ignored, whatever its value.
        end_logits: (windows, length).
        settings: how to read.
        progress: whether to show progress bars.

    Raises:
        ValueError: the logits are not of these windows, or hold NaN.
    """
    token_starts = padded(windows, "token_starts")
    token_ends = padded(windows, "token_ends")
    start_logits, end_logits = _aligned(start_logits, token_starts), _aligned(end_logits, token_starts)
    question = np.asarray(windows["example_index"][:])
    spans = best_spans(question, start_logits, end_logits, token_starts, token_ends, settings, progress)
    null = None
    if settings.unanswerable:
        position = np.asarray(windows["null_position"][:])[:, None]
        null = null_logits(
            question,
            np.take_along_axis(start_logits, position, axis=1)[:, 0],
            np.take_along_axis(end_logits, position, axis=1)[:, 0],
            len(examples),
        )
    return _to_text(examples, spans, null, settings, progress)


def best_spans(
    question: np.ndarray,
    start_logits: np.ndarray,
    end_logits: np.ndarray,
    token_starts: np.ndarray,
    token_ends: np.ndarray,
    settings: AnswerSettings,
    progress: bool = False,
) -> Spans:
    """The `n_best` spans of each question, sorted by question and then from best to worst.

    Args:
        question: (windows,) the row of the question.
        start_logits, end_logits: (windows, length).
        token_starts, token_ends: (windows, length) the characters of each token, -1 outside the context.
        settings: how many, and how long.
        progress: whether to show a progress bar.
    """
    chunks = [slice(n, n + CHUNK) for n in range(0, len(question), CHUNK)]
    found = [
        _candidates(question[c], start_logits[c], end_logits[c], token_starts[c], token_ends[c], settings)
        for c in tqdm(chunks, desc="Spans", disable=not progress)
    ]
    # candidates come in the order of the ties: window, then start, then end
    spans = Spans(*(np.concatenate(column) for column in zip(*found, strict=True)))
    score = spans.start_logit + spans.end_logit
    spans = spans[np.lexsort((-score, spans.question))]  # lexsort is stable
    spans = spans[_first_of_each(spans)]
    rank = np.arange(len(spans.question)) - np.searchsorted(spans.question, spans.question)
    return spans[rank < settings.n_best]


def null_logits(
    question: np.ndarray, start: np.ndarray, end: np.ndarray, num_questions: int
) -> tuple[np.ndarray, np.ndarray]:
    """Start and end logit, (questions,) each, of the null answer of the window that has the lowest null score."""
    order = np.lexsort((start + end, question))
    lowest = order[np.searchsorted(question[order], np.arange(num_questions))]
    return start[lowest], end[lowest]


def padded(windows: Dataset, column: str) -> np.ndarray:
    """A column of lists as one array (rows, longest), with -1 past the end of the shorter ones."""
    lists = windows.with_format("arrow")[:][column].combine_chunks()
    lengths = lists.value_lengths().to_numpy()
    array = np.full((len(lengths), lengths.max(initial=0)), -1, dtype=np.int32)
    array[np.arange(array.shape[1]) < lengths[:, None]] = lists.flatten().to_numpy()
    return array


def _candidates(
    question: np.ndarray,
    start_logits: np.ndarray,
    end_logits: np.ndarray,
    token_starts: np.ndarray,
    token_ends: np.ndarray,
    settings: AnswerSettings,
) -> Spans:
    """All candidates of some windows, ordered by window, start and end."""
    in_context = token_starts >= 0
    starts = _top(start_logits, in_context, settings.n_best)[:, :, None]  # (windows, n, 1)
    ends = _top(end_logits, in_context, settings.n_best)[:, None, :]  # (windows, 1, n)
    length = ends - starts + 1
    # _top fills up with tokens outside the context where a window has fewer than n_best inside
    allowed = np.take_along_axis(in_context, starts[:, :, 0], 1)[:, :, None]
    allowed = allowed & np.take_along_axis(in_context, ends[:, 0, :], 1)[:, None, :]
    window, i, j = np.nonzero(allowed & (length >= 1) & (length <= settings.max_answer_length))
    start, end = starts[window, i, 0], ends[window, 0, j]
    return Spans(
        question[window],
        token_starts[window, start],
        token_ends[window, end],
        start_logits[window, start].astype(np.float64),
        end_logits[window, end].astype(np.float64),
    )


def _top(logits: np.ndarray, allowed: np.ndarray, n: int) -> np.ndarray:
    """(windows, n) positions of the highest allowed logits, in the order of the positions; the earlier one of ties."""
    order = np.argsort(np.where(allowed, -logits, np.inf), axis=1, kind="stable")
    return np.sort(order[:, :n], axis=1)


def _first_of_each(spans: Spans) -> np.ndarray:
    """The rows at which a span of characters of a question occurs for the first time, ascending."""
    width = int(spans.last.max(initial=0)) + 1
    key = (spans.question.astype(np.int64) * width + spans.first) * width + spans.last
    return np.sort(np.unique(key, return_index=True)[1])


def _aligned(logits: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """Logits cut to the longest window: batches are padded to multiples, and to the longest of all batches."""
    if logits.ndim != 2 or len(logits) != len(tokens) or logits.shape[1] < tokens.shape[1]:
        raise ValueError(
            f"the logits have shape {logits.shape}, but there are {tokens.shape[0]} windows of up to "
            f"{tokens.shape[1]} tokens; logits and windows must be of the same data, in the same order."
        )
    logits = logits[:, : tokens.shape[1]]
    if np.isnan(logits[tokens >= 0]).any():
        raise ValueError("the model's logits hold NaN, so no answer can be read from them; has training diverged?")
    return logits


def _to_text(
    examples: Dataset,
    spans: Spans,
    null: tuple[np.ndarray, np.ndarray] | None,
    settings: AnswerSettings,
    progress: bool,
) -> Answers:
    bounds = np.searchsorted(spans.question, np.arange(len(examples) + 1))
    answers = Answers({}, {}, {}, {}, without_span=int((np.diff(bounds) == 0).sum()))
    # [:] because a column of datasets 4 and later reads one row from disk for each that is asked for
    ids, contexts = examples["id"][:], examples["context"][:]
    columns = [column.tolist() for column in tuple(spans)]
    for row in tqdm(range(len(examples)), desc="Answers", disable=not progress):
        key, context = ids[row], contexts[row]
        entries = [
            {"text": context[first:last].strip(), "start_logit": start, "end_logit": end}
            for _, first, last, start, end in zip(*(c[bounds[row] : bounds[row + 1]] for c in columns), strict=True)
        ]
        best = entries[0] if entries else None
        answers.predictions[key] = answers.spans[key] = best["text"] if best else ""
        if null is not None:
            nothing = {"text": "", "start_logit": float(null[0][row]), "end_logit": float(null[1][row])}
            odds = _score(nothing) - _score(best) if best else float("inf")
            answers.null_odds[key] = odds
            if odds > settings.null_threshold:
                answers.predictions[key] = ""
            entries = sorted([*entries, nothing], key=_score, reverse=True)
        answers.nbest[key] = _with_probabilities(entries)
    return answers


def _score(entry: dict[str, Any]) -> float:
    return entry["start_logit"] + entry["end_logit"]


def _with_probabilities(entries: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The entries, best first, with a softmax over their scores."""
    if not entries:
        return []
    scores = np.array([_score(entry) for entry in entries])
    exponentials = np.exp(scores - scores[0])
    probabilities = (exponentials / exponentials.sum()).tolist()
    return [{**entry, "probability": p} for entry, p in zip(entries, probabilities, strict=True)]
