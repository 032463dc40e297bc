"""Queries with their feedback passages, as the reformulator reads them.

`[CLS] query [SEP] passage 1 [SEP] … passage k [SEP]`, each text cut to its own limit and the whole to the encoder's.
With c crops, a training query has 1 + c different numbers of feedback passages, drawn without replacement from
0, …, n, where n is the length of its list (at most 5), largest first. The full variant reads a random sample of the
list in random order, as many passages as the largest number; every crop reads a prefix of that sample. All of it is
drawn anew each time (`--shuffle_psgs` of the published code, LoL, SIGIR 2022). The collator draws the sample, and
`CmpCrop` in prefix order draws the smaller numbers, by the segments that the collator marks. Evaluation keeps the
ranking's order.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainingQuery:
    """`feedback`: corpus rows, best first. `positives`: rows of the training pool, not of the corpus."""

    text: str
    feedback: list[int]
    positives: list[int]


class TrainingQueries(Dataset):
    """The queries to train on; those without a positive must be left out before (see `training_queries`)."""

    def __init__(self, queries: list[TrainingQuery]) -> None:
        self.queries = queries

    def __len__(self) -> int:
        return len(self.queries)

    def __getitem__(self, index: int) -> TrainingQuery:
        return self.queries[index]


@dataclass
class FeedbackCollator:
    """Training queries -> input_ids, attention_mask, crop_segments (batch, length) and labels (batch, 1, positives).

    `labels` are pool rows padded with -100; their middle axis keeps them from looking like one label for each token.

    Args:
        texts: gives the texts of corpus rows.
        most: the largest number of feedback passages.
        num_crops: how many smaller numbers of passages are drawn below the one drawn here.
    """

    tokenizer: PreTrainedTokenizerBase
    texts: Callable[[Sequence[int]], list[str]]
    most: int = 5
    num_crops: int = 0
    query_length: int = 128
    passage_length: int = 128
    total_length: int | None = 512

    def __post_init__(self) -> None:
        if self.num_crops > self.most:
            raise ValueError(
                f"--cmp_num_crops {self.num_crops} needs {self.num_crops + 1} different numbers of feedback passages, "
                f"but --feedback_passages {self.most} allows {self.most + 1}; lower the one or raise the other"
            )

    def __call__(self, examples: Sequence[TrainingQuery]) -> dict[str, torch.Tensor]:
        # From torch's random state. A batch is fetched ahead of its step, so a training that is resumed inside of an
        # epoch draws other numbers than an unbroken one.
        feedback = [self.texts(self.sample(example.feedback[: self.most])) for example in examples]
        queries = [example.text for example in examples]
        inputs = query_inputs(
            self.tokenizer, queries, feedback, self.query_length, self.passage_length, self.total_length
        )
        segments = [torch.tensor(one.pop("crop_segments")) for one in inputs]
        labels = [torch.tensor(example.positives) for example in examples]
        batch = dict(self.tokenizer.pad(inputs, return_tensors="pt", padding_side="right"))
        return {
            **batch,
            "crop_segments": torch.nn.utils.rnn.pad_sequence(segments, batch_first=True),
            "labels": torch.nn.utils.rnn.pad_sequence(labels, batch_first=True, padding_value=-100).unsqueeze(1),
        }

    def sample(self, rows: Sequence[int]) -> list[int]:
        """A random sample in random order, of the largest of 1 + `num_crops` different numbers from 0 to all."""
        number = int(torch.randperm(len(rows) + 1)[: 1 + self.num_crops].max())
        return [rows[place] for place in torch.randperm(len(rows))[:number].tolist()]


def query_inputs(
    tokenizer: PreTrainedTokenizerBase,
    queries: Sequence[str],
    feedback: Sequence[Sequence[str]],
    query_length: int,
    passage_length: int,
    limit: int | None = None,
) -> list[dict[str, Any]]:
    """`input_ids` and `crop_segments` (0 for the query, i for feedback passage i with its [SEP]) of each query.

    The lengths count text tokens and the special ones beside them; `limit` is for the whole, which ends in [SEP] also
    where it is cut. Raises ValueError for a
    tokenizer without the special tokens that part the texts."""
    first, separator = special_ids(tokenizer)
    query_ids = token_ids(tokenizer, queries, query_length - 2)
    passage_ids = iter(token_ids(tokenizer, [text for texts in feedback for text in texts], passage_length - 1))
    inputs = []
    for query, texts in zip(query_ids, feedback, strict=True):
        ids, segments = [first, *query, separator], [0] * (len(query) + 2)
        for number in range(1, len(texts) + 1):
            passage = [*next(passage_ids), separator]
            ids += passage
            segments += [number] * len(passage)
        if limit is not None and len(ids) > limit:
            ids = [*ids[: limit - 1], separator]
        inputs.append({"input_ids": ids, "crop_segments": segments[:limit]})
    return inputs


def training_queries(
    queries: dict[str, str], positives: dict[str, list[int]], feedback: dict[str, list[int]], num_crops: int = 0
) -> TrainingQueries:
    """Queries with a positive and feedback. What is left out, and what has too little feedback to compare, is counted.

    Raises ValueError where no query is left, or none has a passage for each of `num_crops` crops."""
    without = {
        "have no positive in the corpus": [query for query in queries if not positives.get(query)],
        "have no feedback passage": [query for query in queries if not feedback.get(query)],
    }
    for reason, found in without.items():
        if found:
            logger.warning(
                "%d of %d training queries %s and are left out (e.g. %s)", len(found), len(queries), reason, found[0]
            )
    left_out = {query for found in without.values() for query in found}
    usable = [query for query in queries if query not in left_out]
    if not usable:
        raise ValueError(
            f"no training query is left: of {len(queries)}, "
            + " and ".join(f"{len(found)} {reason}" for reason, found in without.items())
            + "; do the ids of queries, qrels, run and corpus agree?"
        )
    check_feedback(usable, feedback, num_crops)
    return TrainingQueries([TrainingQuery(queries[query], feedback[query], positives[query]) for query in usable])


def check_feedback(queries: Sequence[str], feedback: dict[str, list[int]], num_crops: int) -> None:
    """Warns of queries with fewer passages than crops, whose last variants all read none.

    Raises ValueError where all queries are like that."""
    short = [query for query in queries if len(feedback[query]) < num_crops]
    if len(short) == len(queries):
        raise ValueError(
            f"--cmp_num_crops {num_crops} needs queries with at least {num_crops} feedback passages, but the longest "
            f"list has {max(len(feedback[query]) for query in queries)}; lower --cmp_num_crops or give a deeper run"
        )
    if short:
        logger.warning(
            "%d of %d training queries have fewer feedback passages than --cmp_num_crops %d (e.g. %s): their last "
            "variants are equal and add nothing to the comparison", len(short), len(queries), num_crops, short[0],
        )  # fmt: skip


def special_ids(tokenizer: PreTrainedTokenizerBase) -> tuple[int, int]:
    if tokenizer.cls_token_id is None or tokenizer.sep_token_id is None or tokenizer.pad_token_id is None:
        raise ValueError(
            f"the tokenizer {type(tokenizer).__name__} lacks a cls, sep or pad token; reformulators read "
            "[CLS] query [SEP] passage [SEP] …, so take an encoder that has them (BERT, RoBERTa, …)"
        )
    first: Any = tokenizer.cls_token_id
    separator: Any = tokenizer.sep_token_id
    return first, separator


def token_ids(tokenizer: PreTrainedTokenizerBase, texts: list[str] | Sequence[str], length: int) -> list[list[int]]:
    if not texts:
        return []
    return tokenizer(list(texts), add_special_tokens=False, truncation=True, max_length=length)["input_ids"]
