"""Answers from start and end logits: the n best spans of each question, over all its windows.

`cmp-trainer curve` and the example scripts read answers here, so the same logits give the same text. The score of a
span is its start logit plus its end logit. A span lies within one segment of its window (SQuAD: the context;
HotpotQA: the text of one paragraph), its end is not before its start, and it has at most `max_answer_length` tokens.
The `n_best` starts and ends of a window are combined (SQuAD's convention), or all of them (`all_spans`). The same
characters found in two windows are one candidate, with the better score. Ties go to the earlier window, then the
earlier start, then the shorter span.

With unanswerable questions (SQuAD v2) the null score is start + end logit of the null position, the lowest over the
question's windows: a question is unanswerable only where every window says so. The answer is empty where
`null odds = null score - best span's score` is above the threshold (Devlin et al. 2019, sections 4.2 and 4.3).

Everything up to the text is done on arrays of many windows at once, in chunks that bound the memory.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from datasets import Dataset
from tqdm.auto import tqdm

CHUNK = 2**18  # elements of the largest arrays at a time


@dataclass(frozen=True)
class AnswerSettings:
    """How answers are read.

    Args:
        n_best: how many spans of a question are kept, and how many starts and ends of a window are combined.
        max_answer_length: the longest answer, in tokens.
        unanswerable: whether a question may have no answer (SQuAD v2).
        null_threshold: null odds above which the answer is empty.
        all_spans: combine a window's starts with all of its ends, and take the `n_best` starts with the best spans.
            The best span is then the best of all.
    """

    n_best: int = 20
    max_answer_length: int = 30
    unanswerable: bool = False
    null_threshold: float = 0.0
    all_spans: bool = False

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


class Tokens(NamedTuple):
    """The tokens of some windows, (windows, length) each: their characters, and the segment that holds them."""

    starts: np.ndarray
    ends: np.ndarray
    segments: np.ndarray

    @property
    def allowed(self) -> np.ndarray:
        """(windows, length) whether a token can be part of an answer."""
        return self.starts >= 0


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
        examples: the questions, with `id` and `context`, the text that answers are taken from.
        windows: their windows, in the order of the logits: `example_index` (the row of the question), `token_starts`
            and `token_ends` (per token its characters of the context, -1 where it has none), `null_position` where
            questions may be unanswerable, and `segments` (per token a number) where there are several in a window.
        start_logits: (windows, length); padding on the right is ignored, whatever its value.
        end_logits: (windows, length).
        settings: how to read.
        progress: whether to show progress bars.

    Raises:
        ValueError: the logits are not of these windows, or hold NaN.
    """
    if start_logits.ndim != 2 or start_logits.shape != end_logits.shape or len(start_logits) != len(windows):
        raise ValueError(_other_windows(start_logits, f"{len(windows)} windows"))
    question = np.asarray(windows["example_index"][:])
    spans = best_spans(question, windows, start_logits, end_logits, settings, progress)
    null = None
    if settings.unanswerable:
        at = np.arange(len(windows)), np.asarray(windows["null_position"][:])
        null = null_logits(question, start_logits[at], end_logits[at], len(examples))
    return _to_text(examples, spans, null, settings, progress)


def best_spans(
    question: np.ndarray,
    windows: Dataset,
    start_logits: np.ndarray,
    end_logits: np.ndarray,
    settings: AnswerSettings,
    progress: bool = False,
) -> Spans:
    """The `n_best` spans of each question, sorted by question and then from best to worst.

    Args:
        question: (windows,) the row of the question.
        windows, start_logits, end_logits, settings: as in `read_answers`.
        progress: whether to show a progress bar.
    """
    per_window = max(start_logits.shape[1], settings.n_best * settings.max_answer_length)
    size = max(1, CHUNK // max(1, per_window))
    chunks = [slice(begin, begin + size) for begin in range(0, len(question), size)]
    found = []
    for chunk in tqdm(chunks, desc="Spans", disable=not progress):
        tokens = _tokens(windows, chunk)
        logits = _aligned(start_logits[chunk], tokens), _aligned(end_logits[chunk], tokens)
        found.append(_candidates(question[chunk], tokens, *logits, settings))
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


def padded(lists: Any) -> np.ndarray:
    """An arrow column of lists as one array (rows, longest), with -1 past the end of the shorter ones."""
    lists = lists.combine_chunks()
    lengths = lists.value_lengths().to_numpy()
    array = np.full((len(lengths), lengths.max(initial=0)), -1, dtype=np.int32)
    array[np.arange(array.shape[1]) < lengths[:, None]] = lists.flatten().to_numpy()
    return array


def _tokens(windows: Dataset, chunk: slice) -> Tokens:
    table: Any = windows.with_format("arrow")[chunk]
    starts, ends = padded(table["token_starts"]), padded(table["token_ends"])
    has_segments = "segments" in windows.column_names
    return Tokens(starts, ends, padded(table["segments"]) if has_segments else np.zeros_like(starts))


def _candidates(
    question: np.ndarray, tokens: Tokens, start_logits: np.ndarray, end_logits: np.ndarray, settings: AnswerSettings
) -> Spans:
    """The candidates of some windows, ordered by window, start and end."""
    may_end, rank = tokens.allowed, start_logits
    if settings.all_spans:
        rank = start_logits + _best_ends(tokens, end_logits, settings.max_answer_length)
    else:
        may_end = np.zeros_like(tokens.allowed)
        np.put_along_axis(may_end, _top(end_logits, tokens.allowed, settings.n_best), True, axis=1)
        may_end &= tokens.allowed
    starts = _top(rank, tokens.allowed, settings.n_best)[:, :, None]  # (windows, n, 1)
    rows = np.arange(len(question))[:, None, None]
    ends = starts + np.arange(settings.max_answer_length)  # (windows, n, max_answer_length)
    is_inside, ends = ends < may_end.shape[1], np.minimum(ends, may_end.shape[1] - 1)
    # _top fills up with tokens that are not allowed where a window has fewer than n_best
    is_span = is_inside & tokens.allowed[rows, starts] & may_end[rows, ends]
    is_span &= tokens.segments[rows, starts] == tokens.segments[rows, ends]
    window, i, j = np.nonzero(is_span)
    start, end = starts[window, i, 0], ends[window, i, j]
    return Spans(
        question[window],
        tokens.starts[window, start],
        tokens.ends[window, end],
        start_logits[window, start].astype(np.float64),
        end_logits[window, end].astype(np.float64),
    )


def _best_ends(tokens: Tokens, end_logits: np.ndarray, max_answer_length: int) -> np.ndarray:
    """(windows, length) the highest end logit of the spans that start at a token."""
    best = np.full(end_logits.shape, -np.inf)
    length = end_logits.shape[1]
    for reach in range(min(max_answer_length, length)):
        starts, ends = np.s_[:, : length - reach], np.s_[:, reach:]
        within = tokens.allowed[ends] & (tokens.segments[starts] == tokens.segments[ends])
        np.maximum(best[starts], end_logits[ends], out=best[starts], where=within)
    return best


def _top(logits: np.ndarray, allowed: np.ndarray, n: int) -> np.ndarray:
    """(windows, n) positions of the highest allowed logits, in the order of the positions; the earlier one of ties."""
    if n == 1:
        return np.where(allowed, logits, -np.inf).argmax(axis=1)[:, None]
    order = np.argsort(np.where(allowed, -logits, np.inf), axis=1, kind="stable")
    return np.sort(order[:, :n], axis=1)


def _first_of_each(spans: Spans) -> np.ndarray:
    """The rows at which a span of characters of a question occurs for the first time, ascending."""
    width = int(spans.last.max(initial=0)) + 1
    key = (spans.question.astype(np.int64) * width + spans.first) * width + spans.last
    return np.sort(np.unique(key, return_index=True)[1])


def _aligned(logits: np.ndarray, tokens: Tokens) -> np.ndarray:
    """Logits cut to the longest window: batches are padded to multiples, and to the longest of all batches."""
    length = tokens.starts.shape[1]
    if logits.shape[1] < length:
        raise ValueError(_other_windows(logits, f"windows of up to {length} tokens"))
    logits = logits[:, :length]
    if np.isnan(logits[tokens.allowed]).any():
        raise ValueError("the model's logits hold NaN, so no answer can be read from them; has training diverged?")
    return logits


def _other_windows(logits: np.ndarray, expected: str) -> str:
    return (
        f"the logits have the shape {logits.shape}, but there are {expected}; logits and windows must be of the same "
        "data, in the same order"
    )


def _to_text(
    examples: Dataset,
    spans: Spans,
    null: tuple[np.ndarray, np.ndarray] | None,
    settings: AnswerSettings,
    progress: bool,
) -> Answers:
    answers = Answers({}, {}, {}, {}, without_span=0)
    # [:] because a column of datasets 4 and later reads one row from disk for each that is asked for
    ids, contexts = examples["id"][:], examples["context"][:]
    rows = tqdm(_spans_of_each(spans, len(examples)), desc="Answers", total=len(examples), disable=not progress)
    for row, found in enumerate(rows):
        key, context = ids[row], contexts[row]
        entries = [
            {"text": context[first:last].strip(), "start_logit": start, "end_logit": end}
            for first, last, start, end in found
        ]
        best = entries[0] if entries else None
        answers.without_span += best is None
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


def _spans_of_each(spans: Spans, num_questions: int) -> Iterator[list[tuple[int, int, float, float]]]:
    """(first, last, start logit, end logit) of the spans of each question, best first."""
    bounds = np.searchsorted(spans.question, np.arange(num_questions + 1)).tolist()
    columns = [column.tolist() for column in tuple(spans)[1:]]
    for begin, end in pairwise(bounds):
        yield list(zip(*(column[begin:end] for column in columns), strict=True))


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
