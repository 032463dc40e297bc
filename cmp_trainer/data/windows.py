"""Sliding windows: a question with a context longer than the model's input becomes several inputs.

`cmp-trainer curve` and the example scripts cut contexts here, so both evaluate the same inputs. Each window is
`question, part of the context`; neighbouring windows share `doc_stride` tokens, so an answer no longer than that is
whole in at least one of them. A window that holds the whole answer is labelled with the answer's first and last token,
any other with the null position (the [CLS] token), which also is the label of an unanswerable question.

Character offsets are Python's: code points of the original text. Programs disagree about accents, combining characters
and emoji, so an answer is only trusted if its text stands at its `answer_start`.
"""

import logging
import unicodedata
from collections import Counter
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from datasets import Dataset, Features, Value
from datasets import Sequence as ListOf  # List from datasets 4 on
from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

# A label past every window: the model's loss, and the loss of each example, leave it out.
NO_LABEL = 2**20


@dataclass(frozen=True)
class WindowSettings:
    """The shape of the windows, in tokens.

    Args:
        max_seq_length: the longest input, question and special tokens included.
        doc_stride: what neighbouring windows of one context share.
        max_question_length: a longer question is cut at the last whole word that fits.
    """

    max_seq_length: int = 384
    doc_stride: int = 128
    max_question_length: int = 64

    @classmethod
    def of_length(cls, max_seq_length: int) -> "WindowSettings":
        """The defaults, and for inputs shorter than theirs less: a third to share, a quarter for the question.

        >>> WindowSettings.of_length(512), WindowSettings.of_length(96)  # doctest: +NORMALIZE_WHITESPACE
        (WindowSettings(max_seq_length=512, doc_stride=128, max_question_length=64),
         WindowSettings(max_seq_length=96, doc_stride=32, max_question_length=24))
        """
        stride, question = min(cls.doc_stride, max_seq_length // 3), min(cls.max_question_length, max_seq_length // 4)
        return cls(max_seq_length, stride, question)


@dataclass
class WindowReport:
    """What became of the questions; nothing is left out without being counted here."""

    questions: int = 0
    windows: int = 0
    misaligned_answers: int = 0  # questions none of whose answers stands at its answer_start: no label, no loss
    answers_in_no_window: int = 0  # answers cut by every window: all their windows say "no answer here"
    cut_questions: int = 0
    empty_contexts: int = 0

    def log(self, split: str) -> None:
        """One line for each count that is not zero."""
        counts = {
            name: count for name, count in asdict(self).items() if count and name not in ("questions", "windows")
        }
        logger.info("%s: %d questions in %d windows", split, self.questions, self.windows)
        for name, count in counts.items():
            logger.warning("%s: %d of %d questions: %s", split, count, self.questions, name.replace("_", " "))


def training_windows(
    examples: Dataset, tokenizer: PreTrainedTokenizerBase, settings: WindowSettings, num_proc: int | None = None
) -> tuple[Dataset, WindowReport]:
    """The windows to train on: the model's inputs, `start_positions` and `end_positions`.

    A question none of whose answers stands at its `answer_start` has no label to learn from; it is left out and
    counted as `misaligned_answers`.

    Raises:
        ValueError: the settings leave no room for the context, or no question is left.
    """
    windows, report = evaluation_windows(examples, tokenizer, settings, num_proc)
    labelled = np.flatnonzero(np.asarray(windows["start_positions"][:]) != NO_LABEL)
    if len(labelled) == 0:
        raise ValueError(
            f"None of the {report.questions} questions has an answer that stands at its answer_start. Count it in "
            "characters (code points) of the context as it is in the file"
        )
    if len(labelled) < len(windows):
        windows = windows.select(labelled)
    report.windows = len(windows)
    return windows.remove_columns(["example_index", "null_position", "token_starts", "token_ends"]), report


def evaluation_windows(
    examples: Dataset, tokenizer: PreTrainedTokenizerBase, settings: WindowSettings, num_proc: int | None = None
) -> tuple[Dataset, WindowReport]:
    """The windows of every question, with what is needed to read answers from the logits.

    Beside the model's inputs and labels (those of the first answer that stands at its `answer_start`) each window has
    `example_index` (the row of its question), `null_position`, and per token `token_starts` and `token_ends`, the
    characters of the context it covers (-1 where it covers none).

    Raises:
        ValueError: the tokenizer keeps no offsets, or the settings leave no room for the context.
    """
    _check(tokenizer, settings)
    tokenized = examples.map(
        _windows_of_batch,
        with_indices=True,
        batched=True,
        remove_columns=examples.column_names,
        fn_kwargs={"tokenizer": tokenizer, "settings": settings},
        num_proc=num_proc,
        desc="Windows",
    )
    # casting after the map, not inside it: which inputs a model takes is only known from the tokenizer
    windows = tokenized.cast(_compact_features(tokenized.features))
    report = _count(examples, windows)
    return windows.remove_columns(["question_cut", "has_answer", "answer_whole"]), report


def answer_span(context: str, texts: list[str], starts: list[int]) -> tuple[int, int] | None:
    """The characters (first, past the last) of the first answer that stands where it says, without outer spaces.

    None where no answer does: its offsets were counted in other units, or of another text.

    >>> answer_span("the blue sky", ["blue"], [4])
    (4, 8)
    >>> answer_span("the blue sky", ["red", "sky "], [4, 9]) is None
    True
    """
    for text, start in zip(texts, starts, strict=True):
        stripped = text.strip()
        if stripped and start >= 0 and context[start : start + len(text)] == text:
            first = start + len(text) - len(text.lstrip())
            return first, first + len(stripped)
    return None


def past_marks(ends: np.ndarray, text: str) -> np.ndarray:
    """Where tokens end, moved past the combining marks that follow.

    Tokenizers that strip accents leave the marks at a word's end to no token; without them a predicted "cafe\u0301"
    would be the wrong "cafe". Such are the nonspacing marks (category Mn), which hold vowels in Devanagari and Thai.

    Args:
        ends: (tokens,) the character past each token, -1 for tokens without characters.
        text: what the characters are of.

    >>> past_marks(np.array([-1, 4, 7]), "cafe\u0301 is").tolist()
    [-1, 5, 7]
    """
    if text.isascii():
        return ends
    return np.where(ends >= 0, _next_plain(text)[ends].astype(ends.dtype), ends)


def label_window(
    span: tuple[int, int], token_starts: np.ndarray, token_ends: np.ndarray, extent: tuple[int, int]
) -> tuple[int, int] | None:
    """The first and last token of an answer in one window, or None where the window does not hold all of it.

    Args:
        span: the answer's characters, (first, past the last).
        token_starts: (length,) the first character of each token, -1 outside the context.
        token_ends: (length,) the character past each token, -1 outside the context.
        extent: the characters that the window covers, (first, past the last).
    """
    first, last = span
    if first < extent[0] or last > extent[1]:
        return None
    # a token may start before the answer or end after it (an answer inside a word), and several tokens may share
    # one character (the bytes of an emoji): the answer is every token that has a part of it
    inside = np.flatnonzero((token_ends > first) & (token_starts < last) & (token_starts >= 0))
    return (int(inside[0]), int(inside[-1])) if len(inside) else None


def _windows_of_batch(
    examples: dict[str, list], indices: list[int], tokenizer: PreTrainedTokenizerBase, settings: WindowSettings
) -> dict[str, list]:
    questions, cut = _cut_questions(examples["question"], tokenizer, settings.max_question_length)
    batch = tokenizer(
        questions,
        examples["context"],
        truncation="only_second",
        max_length=settings.max_seq_length,
        stride=settings.doc_stride,
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
        verbose=False,
    )
    rows = batch.pop("overflow_to_sample_mapping")
    offsets = batch.pop("offset_mapping")
    spans = [
        answer_span(context, answers["text"], answers["answer_start"])
        for context, answers in zip(examples["context"], examples["answers"], strict=True)
    ]
    windows: dict[str, list] = {**batch, "example_index": [indices[row] for row in rows]}
    for column in _WINDOW_COLUMNS:
        windows[column] = []
    for number, row in enumerate(rows):
        starts, ends = _context_offsets(offsets[number], batch.sequence_ids(number), examples["context"][row])
        # the outer windows reach to the ends of the context, where characters may have no token (control characters)
        is_first = number == 0 or rows[number - 1] != row
        is_last = number + 1 == len(rows) or rows[number + 1] != row
        extent = (
            0 if is_first else starts[starts >= 0].min(),
            len(examples["context"][row]) if is_last else ends.max(),
        )
        null = _null_position(batch["input_ids"][number], tokenizer)
        has_answer = len(examples["answers"][row]["text"]) > 0
        tokens = label_window(spans[row], starts, ends, extent) if spans[row] is not None else None
        unlabelled = NO_LABEL if has_answer and spans[row] is None else null
        values = (*(tokens or (unlabelled, unlabelled)), null, starts, ends, cut[row], has_answer, tokens is not None)
        for column, value in zip(_WINDOW_COLUMNS, values, strict=True):
            windows[column].append(value)
    return windows


_WINDOW_COLUMNS = (
    "start_positions",
    "end_positions",
    "null_position",
    "token_starts",
    "token_ends",
    "question_cut",
    "has_answer",
    "answer_whole",
)


def _context_offsets(
    offsets: list[tuple[int, int]], sequence_ids: list[int | None], context: str
) -> tuple[np.ndarray, np.ndarray]:
    """Per token the characters of the context it covers, (first, past the last); -1 for every other token."""
    pairs = np.asarray(offsets, dtype=np.int32).reshape(-1, 2)
    in_context = np.array([part == 1 for part in sequence_ids]) & (pairs[:, 1] > pairs[:, 0])
    starts, ends = np.where(in_context, pairs[:, 0], -1), np.where(in_context, pairs[:, 1], -1)
    return starts, past_marks(ends, context)


@lru_cache(maxsize=8)  # the windows of a context, and often its questions, follow one another
def _next_plain(text: str) -> np.ndarray:
    """(characters + 1,) for each place in a text the first one from there on that is no combining mark."""
    is_mark = np.fromiter((unicodedata.category(character) == "Mn" for character in text), bool, len(text))
    plain = np.where(np.append(is_mark, False), len(text), np.arange(len(text) + 1))
    return np.minimum.accumulate(plain[::-1])[::-1]


def _null_position(input_ids: list[int], tokenizer: PreTrainedTokenizerBase) -> int:
    """Where "no answer" is: the [CLS] token; the first token in models that have none."""
    token = tokenizer.cls_token_id
    return input_ids.index(token) if token in input_ids else 0


def _cut_questions(
    questions: list[str], tokenizer: PreTrainedTokenizerBase, max_length: int
) -> tuple[list[str], list[bool]]:
    """Questions of at most `max_length` tokens, cut between words where there is a word to keep."""
    # some SQuAD questions begin with many spaces, which would only count against the length
    questions = [question.strip() for question in questions]
    encoded = tokenizer(questions, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    kept, cut = [], []
    for number, question in enumerate(questions):
        offsets = encoded["offset_mapping"][number]
        too_long = len(offsets) > max_length
        if too_long:
            words = encoded.word_ids(number)
            whole = next((n for n in range(max_length, 0, -1) if words[n] != words[n - 1]), max_length)
            question = question[: offsets[whole - 1][1]]
        kept.append(question)
        cut.append(too_long)
    return kept, cut


def _check(tokenizer: PreTrainedTokenizerBase, settings: WindowSettings) -> None:
    if not tokenizer.is_fast:
        raise ValueError(
            f"{type(tokenizer).__name__} keeps no character offsets, from which answers are read. Use a model whose "
            "tokenizer is a fast one (backed by the tokenizers library)."
        )
    # the tokenizers library only checks this on the first question that is long enough, by a panic
    special = tokenizer.num_special_tokens_to_add(pair=True)
    needed = settings.max_question_length + settings.doc_stride + special + 1
    if settings.max_seq_length < needed:
        raise ValueError(
            f"--max_seq_length {settings.max_seq_length} leaves no room for new context: a question of "
            f"{settings.max_question_length} tokens (--max_question_length), {settings.doc_stride} shared with the "
            f"window before (--doc_stride) and {special} special tokens need at least {needed}"
        )


def _compact_features(features: Features) -> Features:
    """Offsets in 32 bits: SQuAD's own validation set has 10 million of them."""
    return Features({**features, "token_starts": ListOf(Value("int32")), "token_ends": ListOf(Value("int32"))})


def _count(examples: Dataset, windows: Dataset) -> WindowReport:
    index = np.asarray(windows["example_index"][:])
    labelled = np.asarray(windows["start_positions"][:]) != NO_LABEL

    def of_questions(flags: Any) -> np.ndarray:
        """(questions,) whether a flag is set for any window of the question."""
        return np.bincount(index, weights=np.asarray(flags, dtype=float), minlength=len(examples)) > 0

    misaligned = of_questions(~labelled)
    cut_everywhere = of_questions(windows["has_answer"][:]) & ~misaligned & ~of_questions(windows["answer_whole"][:])
    return WindowReport(
        questions=len(examples),
        windows=len(windows),
        misaligned_answers=int(misaligned.sum()),
        answers_in_no_window=int(cut_everywhere.sum()),
        cut_questions=int(of_questions(windows["question_cut"][:]).sum()),
        empty_contexts=Counter(bool(context.strip()) for context in examples["context"][:])[False],
    )
