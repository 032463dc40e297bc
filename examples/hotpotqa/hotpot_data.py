"""HotpotQA's questions as tokens: what is done once for each question, whatever its paragraphs' order.

A question comes with ten paragraphs, two of which hold the supporting facts; the others are distractors (Yang et al.
2018, https://doi.org/10.18653/v1/D18-1259). Each paragraph is tokenized on its own, its text with character offsets.
The answer is looked for in the supporting sentences, by characters, and its occurrences are kept as token spans.

All that an answer can be taken from is one text, the question's `context`: "yes", "no" and the paragraphs. Offsets
count its characters, so that answers are read from it as from any other context (cmp_trainer.data.answers).
"""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from datasets import Dataset, Features, Value
from datasets import Sequence as ListOf  # List from datasets 4 on
from transformers import PreTrainedTokenizerBase

from cmp_trainer.data.windows import past_marks

logger = logging.getLogger("cmp_trainer.examples.hotpotqa")

COLUMNS = ["id", "question", "context"]
ANSWER_COLUMNS = ["answer", "supporting_facts"]
YES_AND_NO = "yesno"  # the beginning of each context
YES_CHARACTERS, NO_CHARACTERS = (0, 3), (3, 5)
YES, NO, QUESTION, TITLE, TEXT = "<|yes|>", "<|no|>", "<|question|>", "<|title|>", "<|text|>"
ENCODED_FEATURES = Features(
    {
        **dict.fromkeys(("id", "question", "context", "answer", "kind"), Value("string")),
        "question_ids": ListOf(Value("int32")),
        **dict.fromkeys(("title_ids", "text_ids", "text_starts", "text_ends"), ListOf(ListOf(Value("int32")))),
        "supporting": ListOf(Value("bool")),
        "spans": ListOf(ListOf(ListOf(Value("int32")))),
    }
)


@dataclass(frozen=True)
class Limits:
    """How long inputs and their parts may be, in tokens.

    Args:
        max_length: the whole input.
        max_question_length: the question; longer ones are cut. It takes no more than half of the input.
        max_paragraph_length: one paragraph with its title and markers; longer ones are cut.
    """

    max_length: int
    max_question_length: int = 160
    max_paragraph_length: int = 256


def add_markers(tokenizer: PreTrainedTokenizerBase, model: Any = None) -> None:
    """Gives the tokenizer the five marker tokens, and the model (where given) embeddings for them.

    Raises:
        ValueError: the tokenizer is a slow one, without the offsets that answers are found by.
    """
    if not tokenizer.is_fast:
        raise ValueError(f"{tokenizer.name_or_path} has no fast tokenizer; answers are found by its offsets.")
    tokenizer.add_tokens([YES, NO, QUESTION, TITLE, TEXT], special_tokens=True)
    if model is not None and model.get_input_embeddings().num_embeddings < len(tokenizer):
        model.resize_token_embeddings(len(tokenizer))


def check_questions(dataset: Dataset, split: str) -> None:
    """Reject rows that are not HotpotQA's.

    Raises:
        ValueError: names the first such row, its id and the fault.
    """
    first_row: dict[str, int] = {}
    wanted = [*COLUMNS, *ANSWER_COLUMNS]
    rows: Any = dataset.select_columns([column for column in dataset.column_names if column in wanted])
    for number, row in enumerate(rows, start=1):
        if row["id"] is None:
            raise ValueError(f"{split}, row {number} has no id; answers are kept by id, so give each its own")
        other = first_row.setdefault(str(row["id"]), number)
        fault = _fault(row) if other == number else f"the id of row {other}; give each its own"
        if fault:
            raise ValueError(f"{split}, row {number} (id {row['id']}) has {fault}")


def _fault(row: Mapping[str, Any]) -> str | None:
    """What is wrong with a row; None where nothing is."""
    if not isinstance(row["question"], str) or not row["question"].strip():
        return "no text as question"
    if not isinstance(row.get("answer"), str | int | float | None):
        return f"an answer that is no text: {row['answer']}"
    fault = _fault_of_lists(row["context"], "context", "sentences", list)
    if not fault and row.get("supporting_facts") is not None:
        fault = _fault_of_lists(row["supporting_facts"], "supporting_facts", "sent_id", int)
    if fault:
        return fault
    paragraphs = row["context"]["sentences"]
    if not paragraphs:
        return "no paragraphs"
    for number, paragraph in enumerate(paragraphs, start=1):
        if not all(isinstance(sentence, str) for sentence in paragraph):
            return f"a sentence that is no text in paragraph {number}: {paragraph}"
    return None


def _fault_of_lists(found: Any, column: str, other: str, kind: type) -> str | None:
    """What is wrong with titles and what belongs to each of them, a list each."""
    if not isinstance(found, Mapping) or not all(isinstance(found.get(name), list) for name in ("title", other)):
        return f"{column} of another form; expected lists of title and {other}, as in hotpotqa/hotpot_qa on the Hub"
    titles, others = found["title"], found[other]
    if len(titles) != len(others):
        return f"{len(titles)} entries in the title of {column} and {len(others)} in its {other}; expected as many"
    for number, (title, one) in enumerate(zip(titles, others, strict=True), start=1):
        if not isinstance(title, str):
            return f"no text as title {number} of {column}, but {title!r}"
        if not isinstance(one, kind):
            return f"no {kind.__name__} as {other} {number} of {column}, but {one!r}"
    return None


def encode_questions(
    dataset: Dataset, tokenizer: PreTrainedTokenizerBase, limits: Limits, split: str, num_workers: int | None = None
) -> Dataset:
    """Tokens, offsets and answers of all questions; the log says in how many the answer was not found.

    Columns of the result, p running over the paragraphs of a question:
        id, question (text), context (text that answers are taken from), answer (text; "" where unknown), kind: yes,
        no, span or none (not found), question_ids, title_ids (p, tokens), text_ids (p, tokens), text_starts and
        text_ends (p, tokens): the characters of each token in the context, supporting (p,) bool, spans (p,
        occurrences, 2): first and last token of the answer in a paragraph.
    """
    check_questions(dataset, split)
    encoded = dataset.map(
        _encoded_question,
        fn_kwargs={"tokenizer": tokenizer, "limits": limits},
        remove_columns=dataset.column_names,
        features=ENCODED_FEATURES,
        num_proc=num_workers,
        desc=f"Tokens of {split}",
    )
    kinds = Counter(encoded["kind"])
    if kinds["none"] and "answer" in dataset.column_names:
        logger.warning(
            "%s: the answers of %d of %d questions are not found in their supporting sentences",
            split,
            kinds["none"],
            len(encoded),
        )
    logger.info("%s: answers %s", split, dict(kinds))
    return encoded


def _encoded_question(
    example: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, limits: Limits
) -> dict[str, Any]:
    titles, sentences = example["context"]["title"], example["context"]["sentences"]
    paragraphs = ["".join(paragraph) for paragraph in sentences]
    room = limits.max_paragraph_length - 2  # title and text marker
    plain: Mapping[str, Any] = {"add_special_tokens": False, "truncation": True}
    title_ids = tokenizer(titles, max_length=room // 2, **plain)["input_ids"]
    texts = tokenizer(paragraphs, max_length=room, return_offsets_mapping=True, **plain)
    lengths = [min(len(t), room - len(title)) for t, title in zip(texts["input_ids"], title_ids, strict=True)]
    offsets = [
        _offsets(pairs[:length], text)
        for pairs, length, text in zip(texts["offset_mapping"], lengths, paragraphs, strict=True)
    ]

    facts = example.get("supporting_facts") or {"title": [], "sent_id": []}
    answer = "" if example.get("answer") is None else str(example["answer"]).strip()
    kind = answer.lower() if answer.lower() in ("yes", "no") else "span"
    spans: list[list[list[int]]] = [[] for _ in paragraphs]
    if answer and kind == "span":
        found = answer_characters(answer, titles, sentences, facts)
        spans = [token_spans(pairs, places) for pairs, places in zip(offsets, found, strict=True)]
    question_length = min(limits.max_question_length, limits.max_length // 2)
    begins = np.cumsum([len(YES_AND_NO), *map(len, paragraphs)]).tolist()
    return {
        "id": str(example["id"]),
        "question": example["question"],
        "context": YES_AND_NO + "".join(paragraphs),
        "answer": answer,
        "kind": "none" if kind == "span" and not any(spans) else kind,
        "question_ids": tokenizer(example["question"], max_length=question_length, **plain)["input_ids"],
        "title_ids": title_ids,
        "text_ids": [ids[:length] for ids, length in zip(texts["input_ids"], lengths, strict=True)],
        "text_starts": [[begin + start for start, _ in pairs] for begin, pairs in zip(begins, offsets, strict=False)],
        "text_ends": [[begin + end for _, end in pairs] for begin, pairs in zip(begins, offsets, strict=False)],
        "supporting": [title in set(facts["title"]) for title in titles],
        "spans": spans,
    }


def _offsets(pairs: Sequence[tuple[int, int]], text: str) -> list[tuple[int, int]]:
    """The characters of each token, (first, past the last), with the combining marks that follow."""
    ends = past_marks(np.array([end for _, end in pairs], dtype=int), text).tolist()
    return [(start, end) for (start, _), end in zip(pairs, ends, strict=True)]


def answer_characters(
    answer: str, titles: Sequence[str], sentences: Sequence[Sequence[str]], facts: Mapping[str, Sequence[Any]]
) -> list[list[tuple[int, int]]]:
    """For each paragraph, where in it the answer stands in a supporting sentence: whole words, or else any match.

    >>> answer_characters("art", ["A"], [["No party. ", "The art of art."]], {"title": ["A"], "sent_id": [1]})
    [[(14, 17), (21, 24)]]
    """
    facts_by_title = set(zip(facts["title"], facts["sent_id"], strict=True))
    for pattern in (rf"(?<!\w){re.escape(answer)}(?!\w)", re.escape(answer)):
        found = []
        for title, paragraph in zip(titles, sentences, strict=True):
            places, start = [], 0
            for number, sentence in enumerate(paragraph):
                if (title, number) in facts_by_title:
                    places += [(start + m.start(), start + m.end()) for m in re.finditer(pattern, sentence)]
                start += len(sentence)
            found.append(places)
        if any(found):
            return found
    return [[] for _ in titles]


def token_spans(offsets: Sequence[tuple[int, int]], characters: Sequence[tuple[int, int]]) -> list[list[int]]:
    """First and last token of each stretch of characters; stretches that are cut off are left out.

    >>> token_spans([(0, 3), (4, 7), (7, 9)], [(4, 9), (12, 14)])
    [[1, 2]]
    """
    spans = []
    for start, end in characters:
        inside = [token for token, (first, last) in enumerate(offsets) if first < end and last > start]
        if inside and offsets[inside[-1]][1] >= end:
            spans.append([inside[0], inside[-1]])
    return spans
