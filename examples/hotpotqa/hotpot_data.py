"""HotpotQA's questions as tokens: what is done once for each question, whatever its paragraphs' order.

A question comes with ten paragraphs, two of which hold the supporting facts; the others are distractors (Yang et al.
2018, https://doi.org/10.18653/v1/D18-1259). Each paragraph is tokenized on its own, its text with character offsets.
The answer is looked for in the supporting sentences, by characters, and its occurrences are kept as token spans.
"""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

logger = logging.getLogger("cmp_trainer.examples.hotpotqa")

COLUMNS = ["id", "question", "context"]
ANSWER_COLUMNS = ["answer", "supporting_facts"]
YES, NO, QUESTION, TITLE, TEXT = "<|yes|>", "<|no|>", "<|question|>", "<|title|>", "<|text|>"


@dataclass(frozen=True)
class Limits:
    """How long inputs and their parts may be, in tokens.

    Args:
        max_length: the whole input.
        max_question_length: the question; longer ones are cut.
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
    """Refuses rows that are not HotpotQA's, naming the first one.

    Raises:
        ValueError: an id that is missing or stands for two questions, a question without text, titles and paragraphs
            that do not match, or supporting facts of another form.
    """
    first_row: dict[Any, int] = {}
    wanted = [*COLUMNS, "supporting_facts"]
    for row, example in enumerate(dataset.select_columns([c for c in dataset.column_names if c in wanted])):
        assert isinstance(example, dict)
        if example["id"] is None or first_row.setdefault(example["id"], row) != row:
            found = "no id" if example["id"] is None else f"the id {example['id']!r} of row {first_row[example['id']]}"
            raise ValueError(f"{split}, row {row} has {found}; answers are kept by id, so give each its own")
        facts = example.get("supporting_facts")
        if facts is not None and (not isinstance(facts, Mapping) or not {"title", "sent_id"} <= set(facts)):
            raise ValueError(
                f"{split}, row {row}: supporting_facts is {type(facts).__name__}; expected title and sent_id, as in "
                "hotpotqa/hotpot_qa on the Hub"
            )
        context = example["context"]
        if not isinstance(context, Mapping) or not {"title", "sentences"} <= set(context):
            raise ValueError(
                f"{split}, row {row}: context is {type(context).__name__}; expected title and sentences, as in "
                "hotpotqa/hotpot_qa on the Hub"
            )
        if not (example["question"] or "").strip():
            raise ValueError(f"{split}, row {row} (id {example['id']}) has an empty question; remove it")
        titles, paragraphs = context["title"], context["sentences"]
        if len(titles) != len(paragraphs) or not titles:
            raise ValueError(
                f"{split}, row {row} (id {example['id']}) has {len(titles)} titles for {len(paragraphs)} paragraphs; "
                "expected as many, and at least one"
            )


def encode_questions(
    dataset: Dataset, tokenizer: PreTrainedTokenizerBase, limits: Limits, split: str, num_workers: int | None = None
) -> Dataset:
    """Tokens, offsets and answers of all questions; the log says in how many the answer was not found.

    Columns of the result, p running over the paragraphs of a question:
        id, question (text), paragraphs (p,) (text), answer (text; "" where unknown), kind: yes, no, span or none (not
        found), question_ids, title_ids (p, tokens), text_ids (p, tokens), text_starts and text_ends (p, tokens): the
        characters of each token, supporting (p,) bool, spans (p, occurrences, 2): first and last token of the answer.
    """
    check_questions(dataset, split)
    encoded = dataset.map(
        _encode,
        fn_kwargs={"tokenizer": tokenizer, "limits": limits},
        remove_columns=dataset.column_names,
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


def _encode(example: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, limits: Limits) -> dict[str, Any]:
    titles = [title or "" for title in example["context"]["title"]]
    sentences = [[one or "" for one in paragraph] for paragraph in example["context"]["sentences"]]
    paragraphs = ["".join(paragraph) for paragraph in sentences]
    room = limits.max_paragraph_length - 2  # title and text marker
    plain: Mapping[str, Any] = {"add_special_tokens": False, "truncation": True}
    title_ids = tokenizer(titles, max_length=room // 2, **plain)["input_ids"]
    texts = tokenizer(paragraphs, max_length=room, return_offsets_mapping=True, **plain)
    lengths = [min(len(t), room - len(title)) for t, title in zip(texts["input_ids"], title_ids, strict=True)]
    offsets = [pairs[:length] for pairs, length in zip(texts["offset_mapping"], lengths, strict=True)]

    facts = example.get("supporting_facts") or {"title": [], "sent_id": []}
    answer = (example.get("answer") or "").strip()
    kind = answer.lower() if answer.lower() in ("yes", "no") else "span"
    spans: list[list[list[int]]] = [[] for _ in paragraphs]
    if answer and kind == "span":
        found = answer_characters(answer, titles, sentences, facts)
        spans = [token_spans(pairs, places) for pairs, places in zip(offsets, found, strict=True)]
    return {
        "id": example["id"],
        "question": example["question"],
        "paragraphs": paragraphs,
        "answer": answer,
        "kind": "none" if kind == "span" and not any(spans) else kind,
        "question_ids": tokenizer(example["question"], max_length=limits.max_question_length, **plain)["input_ids"],
        "title_ids": title_ids,
        "text_ids": [ids[:length] for ids, length in zip(texts["input_ids"], lengths, strict=True)],
        "text_starts": [[start for start, _ in pairs] for pairs in offsets],
        "text_ends": [[end for _, end in pairs] for pairs in offsets],
        "supporting": [title in set(facts["title"]) for title in titles],
        "spans": spans,
    }


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
