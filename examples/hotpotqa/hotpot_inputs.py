"""HotpotQA's inputs: markers, question and paragraphs in a row, with what a crop may remove.

    <s> YES NO [question] question </s> ([title] title [text] paragraph)* </s>

YES and NO are answers like any other: a span of one token. Longformer attends globally from YES, NO, the question and
all markers. Distractor paragraphs are the removable segments of CmpCrop. In training the paragraphs are shuffled and
one occurrence of the answer is drawn, anew for each epoch.
"""

from __future__ import annotations

import random
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from inspect import signature
from typing import Any

import torch
from datasets import Dataset
from hotpot_data import NO, QUESTION, TEXT, TITLE, YES, Limits, logger
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase, TrainerCallback

NO_POSITION = 2**20  # past any input: models ignore the loss of such positions
NOT_TEXT, YES_SPAN, NO_SPAN = -1, -2, -3  # in `paragraph`, beside the paragraphs' numbers


@dataclass
class Input:
    """One input and what its tokens are, all lists of the same length.

    Attributes:
        paragraph: number of the paragraph whose text the token is of; NOT_TEXT, YES_SPAN or NO_SPAN otherwise.
        token: which token of that text it is.
    """

    input_ids: list[int] = field(default_factory=list)
    token_type_ids: list[int] = field(default_factory=list)
    global_attention_mask: list[int] = field(default_factory=list)
    crop_segments: list[int] = field(default_factory=list)
    paragraph: list[int] = field(default_factory=list)
    token: list[int] = field(default_factory=list)

    def add(
        self,
        ids: Sequence[int],
        kind: int,
        is_global: bool,
        segment: int = 0,
        paragraph: int = NOT_TEXT,
    ) -> None:
        self.input_ids += ids
        self.token_type_ids += [kind] * len(ids)
        self.global_attention_mask += [int(is_global)] * len(ids)
        self.crop_segments += [segment] * len(ids)
        self.paragraph += [paragraph] * len(ids)
        self.token += range(len(ids))


class InputBuilder:
    """Puts encoded questions (hotpot_data.encode_questions) together.

    Args:
        tokenizer: with the markers.
        limits: lengths in tokens.
        model: decides which columns are made (token types, global attention) and how long inputs may be.

    Raises:
        ValueError: the model takes no inputs of that length.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, limits: Limits, model: Any):
        longest = min(tokenizer.model_max_length, getattr(model.config, "max_position_embeddings", sys.maxsize))
        if limits.max_length > longest:
            raise ValueError(
                f"--max_length {limits.max_length}, but the model takes at most {longest} tokens; lower it"
            )
        self.limits = limits
        self.columns = {"token_type_ids", "global_attention_mask"} & set(signature(model.forward).parameters)
        if "token_type_ids" not in tokenizer.model_input_names:
            self.columns -= {"token_type_ids"}
        self.first, self.last = _sequence_edges(tokenizer)
        markers: Any = tokenizer.convert_tokens_to_ids([YES, NO, QUESTION, TITLE, TEXT])
        self.yes, self.no, self.question, self.title, self.text = markers

    def room(self, encoded: dict[str, Any]) -> int:
        """How many tokens are left for paragraphs."""
        return self.limits.max_length - len(encoded["question_ids"]) - 6

    def lengths(self, encoded: dict[str, Any]) -> list[int]:
        """How many tokens each paragraph takes."""
        return [2 + len(a) + len(b) for a, b in zip(encoded["title_ids"], encoded["text_ids"], strict=True)]

    def build(self, encoded: dict[str, Any], order: Sequence[int], longest: int) -> Input:
        """The input with the paragraphs `order`, each cut to `longest` tokens, all together cut to fit."""
        made = Input()
        made.add([self.first], 0, False)
        made.add([self.yes], 0, True, paragraph=YES_SPAN)
        made.add([self.no], 0, True, paragraph=NO_SPAN)
        made.add([self.question, *encoded["question_ids"]], 0, True)
        made.add([self.last], 0, False)
        room, distractors = self.room(encoded), 0
        for number in order:
            distractors += not encoded["supporting"][number]
            segment = 0 if encoded["supporting"][number] else distractors
            allowed = min(longest, room)
            title = encoded["title_ids"][number][: max(0, allowed - 2)]
            text = encoded["text_ids"][number][: max(0, allowed - 2 - len(title))]
            if not text:
                continue
            made.add([self.title], 1, True, segment)
            made.add(title, 1, False, segment)
            made.add([self.text], 1, True, segment)
            made.add(text, 1, False, segment, number)
            room -= 2 + len(title) + len(text)
        made.add([self.last], 1, False)
        return made

    def row(self, made: Input, encoded: dict[str, Any], pick: random.Random | None = None) -> dict[str, Any]:
        """What the model takes, with the positions of one occurrence of the answer: drawn by `pick`, or the first."""
        places = answer_places(made, encoded)
        start, end = (NO_POSITION, NO_POSITION) if not places else pick.choice(places) if pick else places[0]
        row: dict[str, Any] = {"input_ids": made.input_ids, "attention_mask": [1] * len(made.input_ids)}
        row |= {name: getattr(made, name) for name in sorted(self.columns)}
        return row | {"crop_segments": made.crop_segments, "start_positions": start, "end_positions": end}


def answer_places(made: Input, encoded: dict[str, Any]) -> list[tuple[int, int]]:
    """Where in an input the answer stands, as first and last position."""
    if encoded["kind"] in ("yes", "no"):
        position = made.paragraph.index(YES_SPAN if encoded["kind"] == "yes" else NO_SPAN)
        return [(position, position)]
    starts = {number: position for position, number in reversed(list(enumerate(made.paragraph))) if number >= 0}
    kept = Counter(number for number in made.paragraph if number >= 0)
    return [
        (starts[number] + first, starts[number] + last)
        for number, spans in enumerate(encoded["spans"])
        for first, last in spans
        if last < kept[number]
    ]


class TrainingInputs(torch.utils.data.Dataset):
    """Inputs to train on: shuffled paragraphs and a drawn occurrence of the answer, decided by seed, epoch and row.

    Where not all paragraphs fit, distractors give way to supporting paragraphs; where those alone do not fit, they are
    cut evenly. Questions whose answer then cannot be pointed at are left out, and the log says how many.

    Args:
        encoded: hotpot_data.encode_questions.
        builder: how inputs are put together.
        num_paragraphs: how many paragraphs to use; the supporting ones are among them. None: all.
        seed: decides shuffles and draws.
    """

    def __init__(self, encoded: Dataset, builder: InputBuilder, num_paragraphs: int | None = None, seed: int = 0):
        self.encoded, self.builder, self.num_paragraphs, self.seed = encoded, builder, num_paragraphs, seed
        self.epoch = 0
        rows = tqdm(range(len(encoded)), desc="Training inputs", disable=len(encoded) < 1000)
        self.rows = [row for row in rows if self._row(row)["start_positions"] != NO_POSITION]
        if not self.rows:
            raise ValueError(
                "no question of the training data has an answer that fits into the input; raise the limits"
            )
        if len(self.rows) < len(encoded):
            logger.warning(
                "train: %d of %d questions are left out, their answer is not in the input",
                len(encoded) - len(self.rows),
                len(encoded),
            )

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self._row(self.rows[index])

    def _row(self, row: int) -> dict[str, Any]:
        encoded: dict[str, Any] = self.encoded[row]
        pick = random.Random(f"{self.seed} {self.epoch} {row}")
        order = list(range(len(encoded["supporting"])))
        pick.shuffle(order)
        if self.num_paragraphs is not None:
            order = keep_supporting(order, encoded["supporting"], self.num_paragraphs)
        lengths, room = self.builder.lengths(encoded), self.builder.room(encoded)
        needed = [number for number in order if encoded["supporting"][number]]
        while len(order) > len(needed) and sum(lengths[number] for number in order) > room:
            order.remove(next(number for number in reversed(order) if not encoded["supporting"][number]))
        longest = self.builder.limits.max_paragraph_length
        if sum(lengths[number] for number in order) > room:
            longest = room // len(order)
        made = self.builder.build(encoded, order, longest)
        return self.builder.row(made, encoded, pick)


class NewEpochs(TrainerCallback):
    """Tells the training inputs which epoch begins."""

    def __init__(self, inputs: TrainingInputs):
        self.inputs = inputs

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.inputs.set_epoch(int((state.epoch or 0) + 1e-6))


class EvaluationInputs(torch.utils.data.Dataset):
    """Inputs to evaluate on: paragraphs in their own order, cut at the end where they do not fit.

    Args:
        num_paragraphs: how many paragraphs to use; then, and only then, the supporting ones are chosen first.
    """

    def __init__(self, encoded: Dataset, builder: InputBuilder, num_paragraphs: int | None = None):
        self.encoded, self.builder, self.num_paragraphs = encoded, builder, num_paragraphs
        cut = sum(self._is_cut(row) for row in tqdm(range(len(self)), desc="Inputs", disable=len(self) < 1000))
        if cut:
            logger.warning(
                "%d of %d questions have their last paragraphs cut off; raise --max_length", cut, len(encoded)
            )

    def __len__(self) -> int:
        return len(self.encoded)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.builder.row(self.made(index), self.encoded[index])

    def made(self, index: int) -> Input:
        encoded: dict[str, Any] = self.encoded[index]
        return self.builder.build(encoded, self._order(encoded), self.builder.limits.max_paragraph_length)

    def _order(self, encoded: dict[str, Any]) -> list[int]:
        order = list(range(len(encoded["supporting"])))
        if self.num_paragraphs is None:
            return order
        return keep_supporting(order, encoded["supporting"], self.num_paragraphs)

    def _is_cut(self, index: int) -> bool:
        encoded: dict[str, Any] = self.encoded[index]
        lengths = self.builder.lengths(encoded)
        return sum(lengths[number] for number in self._order(encoded)) > self.builder.room(encoded)


def keep_supporting(order: Sequence[int], supporting: Sequence[bool], number: int) -> list[int]:
    """The supporting paragraphs, and as many of the first others as make `number`, in their order.

    >>> keep_supporting([3, 1, 0, 2], [False, False, True, False], 2)
    [3, 2]
    """
    distractors = [one for one in order if not supporting[one]]
    kept = distractors[: max(0, number - (len(order) - len(distractors)))]
    return [one for one in order if supporting[one] or one in kept]


def padding_multiple(model: Any) -> int:
    """What inputs are padded to a multiple of: the attention window of models that have one, otherwise 8."""
    window = getattr(model.config, "attention_window", 8)
    return max(window) if isinstance(window, Sequence) else window


def _sequence_edges(tokenizer: PreTrainedTokenizerBase) -> tuple[int, int]:
    """The tokens that begin an input and end its parts."""
    first: Any = tokenizer.cls_token_id if tokenizer.cls_token_id is not None else tokenizer.bos_token_id
    last: Any = tokenizer.sep_token_id if tokenizer.sep_token_id is not None else tokenizer.eos_token_id
    if first is None or last is None:
        raise ValueError(f"{tokenizer.name_or_path} has no token that begins, or none that ends, a text; use another")
    return first, last
