"""HotpotQA's inputs: markers, question and paragraphs in a row, with what a crop may remove.

    <s> YES NO [question] question </s> ([title] title [text] paragraph)* </s>

YES and NO are answers like any other: a span of one token. Longformer attends globally from YES, NO, the question and
all markers. Distractor paragraphs are the removable segments of CmpCrop. In training the paragraphs are shuffled and
one occurrence of the answer is drawn, anew for each epoch.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from inspect import signature
from typing import Any

import torch
from datasets import Dataset, Features, Value
from datasets import Sequence as ListOf  # List from datasets 4 on
from hotpot_data import NO, NO_CHARACTERS, QUESTION, TEXT, TITLE, YES, YES_CHARACTERS, Limits, logger
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase, TrainerCallback

from cmp_trainer.ablations.crop_collator import CmpCropCollator
from cmp_trainer.data.answer_batches import AnswerCollator, padding_multiple
from cmp_trainer.data.windows import NO_LABEL

NOT_TEXT, YES_SPAN, NO_SPAN = -1, -2, -3  # in `segments`, beside the paragraphs' numbers
TOKEN_FEATURES = Features(
    {
        "example_index": Value("int64"),
        "token_starts": ListOf(Value("int32")),
        "token_ends": ListOf(Value("int32")),
        "segments": ListOf(Value("int32")),
    }
)


@dataclass
class Input:
    """One input and what its tokens are, all lists of the same length.

    Attributes:
        segments: number of the paragraph whose text the token is of; NOT_TEXT, YES_SPAN or NO_SPAN otherwise.
        token_starts, token_ends: the token's characters in the question's context; -1 where an answer cannot be.
    """

    input_ids: list[int] = field(default_factory=list)
    token_type_ids: list[int] = field(default_factory=list)
    global_attention_mask: list[int] = field(default_factory=list)
    crop_segments: list[int] = field(default_factory=list)
    segments: list[int] = field(default_factory=list)
    token_starts: list[int] = field(default_factory=list)
    token_ends: list[int] = field(default_factory=list)

    def add(
        self,
        ids: Sequence[int],
        kind: int,
        is_global: bool,
        removable: int = 0,
        segment: int = NOT_TEXT,
        characters: Sequence[Sequence[int]] | None = None,
    ) -> None:
        starts, ends = characters or ([-1] * len(ids), [-1] * len(ids))
        self.input_ids += ids
        self.token_type_ids += [kind] * len(ids)
        self.global_attention_mask += [int(is_global)] * len(ids)
        self.crop_segments += [removable] * len(ids)
        self.segments += [segment] * len(ids)
        self.token_starts += starts
        self.token_ends += ends


class InputBuilder:
    """Puts encoded questions (hotpot_data.encode_questions) together.

    Args:
        tokenizer: with the markers.
        limits: lengths in tokens.
        model: decides which columns are made (token types, global attention).
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, limits: Limits, model: Any):
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
        for marker, segment, (start, end) in (
            (self.yes, YES_SPAN, YES_CHARACTERS),
            (self.no, NO_SPAN, NO_CHARACTERS),
        ):
            made.add([marker], 0, True, segment=segment, characters=([start], [end]))
        made.add([self.question, *encoded["question_ids"]], 0, True)
        made.add([self.last], 0, False)
        room, distractors = self.room(encoded), 0
        for number in order:
            distractors += not encoded["supporting"][number]
            removable = 0 if encoded["supporting"][number] else distractors
            allowed = min(longest, room)
            title = encoded["title_ids"][number][: max(0, allowed - 2)]
            left = max(0, allowed - 2 - len(title))
            columns = ("text_ids", "text_starts", "text_ends")
            text, *characters = (encoded[column][number][:left] for column in columns)
            if not text:
                continue
            made.add([self.title], 1, True, removable)
            made.add(title, 1, False, removable)
            made.add([self.text], 1, True, removable)
            made.add(text, 1, False, removable, number, characters)
            room -= 2 + len(title) + len(text)
        made.add([self.last], 1, False)
        return made

    def row(self, made: Input, encoded: dict[str, Any], pick: random.Random | None = None) -> dict[str, Any]:
        """What the model takes, with the positions of one occurrence of the answer: drawn by `pick`, or the first."""
        places = answer_places(made, encoded)
        start, end = (NO_LABEL, NO_LABEL) if not places else pick.choice(places) if pick else places[0]
        row: dict[str, Any] = {"input_ids": made.input_ids, "attention_mask": [1] * len(made.input_ids)}
        row |= {name: getattr(made, name) for name in sorted(self.columns)}
        return row | {"crop_segments": made.crop_segments, "start_positions": start, "end_positions": end}


def answer_places(made: Input, encoded: dict[str, Any]) -> list[tuple[int, int]]:
    """Where in an input the answer stands, as first and last position."""
    if encoded["kind"] in ("yes", "no"):
        position = made.segments.index(YES_SPAN if encoded["kind"] == "yes" else NO_SPAN)
        return [(position, position)]
    starts = {number: position for position, number in reversed(list(enumerate(made.segments))) if number >= 0}
    kept = Counter(number for number in made.segments if number >= 0)
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
        self.rows, self.not_croppable = [], 0  # the rows with an answer, and how many of them have no distractor
        for row in rows:
            made = self._row(row)
            if made["start_positions"] != NO_LABEL:
                self.rows.append(row)
                self.not_croppable += not any(made["crop_segments"])
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

    def check_crops(self, num_crops: int) -> None:
        """Say how many questions have no paragraph that a crop could remove.

        Raises:
            ValueError: crops were asked for, and no question has any.
        """
        if num_crops and self.not_croppable == len(self):
            raise ValueError(
                f"--cmp_num_crops {num_crops}, but no training question has a paragraph to remove: all paragraphs "
                "of its input are supporting. Pass contexts with distractors, raise --num_paragraphs or --max_length, "
                "or leave out --cmp_num_crops"
            )
        if num_crops and self.not_croppable:
            logger.warning(
                "train: %d of %d questions have no paragraph to remove: their cropped variants are the full input",
                self.not_croppable,
                len(self),
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
        encoded: dict[str, Any] = self.encoded[index]
        return self.builder.row(_evaluated(encoded, self.builder, self.num_paragraphs), encoded)

    def tokens(self) -> Dataset:
        """What the tokens of each input are, as `cmp_trainer.data.answers.read_answers` takes it."""
        return self.encoded.map(
            _tokens_of,
            with_indices=True,
            fn_kwargs={"builder": self.builder, "num_paragraphs": self.num_paragraphs},
            remove_columns=self.encoded.column_names,
            features=TOKEN_FEATURES,
            desc="Tokens of answers",
        )

    def _is_cut(self, index: int) -> bool:
        encoded: dict[str, Any] = self.encoded[index]
        lengths = self.builder.lengths(encoded)
        order = _evaluated_order(encoded, self.num_paragraphs)
        return sum(lengths[number] for number in order) > self.builder.room(encoded)


def _evaluated(encoded: dict[str, Any], builder: InputBuilder, num_paragraphs: int | None) -> Input:
    order = _evaluated_order(encoded, num_paragraphs)
    return builder.build(encoded, order, builder.limits.max_paragraph_length)


def _evaluated_order(encoded: dict[str, Any], num_paragraphs: int | None) -> list[int]:
    order = list(range(len(encoded["supporting"])))
    return order if num_paragraphs is None else keep_supporting(order, encoded["supporting"], num_paragraphs)


def _tokens_of(
    encoded: dict[str, Any], index: int, builder: InputBuilder, num_paragraphs: int | None
) -> dict[str, Any]:
    made = _evaluated(encoded, builder, num_paragraphs)
    names = ("token_starts", "token_ends", "segments")
    return {"example_index": index, **{name: getattr(made, name) for name in names}}


def keep_supporting(order: Sequence[int], supporting: Sequence[bool], number: int) -> list[int]:
    """The supporting paragraphs, and as many of the first others as make `number`, in their order.

    >>> keep_supporting([3, 1, 0, 2], [False, False, True, False], 2)
    [3, 2]
    """
    distractors = [one for one in order if not supporting[one]]
    kept = distractors[: max(0, number - (len(order) - len(distractors)))]
    return [one for one in order if supporting[one] or one in kept]


def collator_of(tokenizer: PreTrainedTokenizerBase, model: Any, max_length: int) -> CmpCropCollator:
    """Pads to a multiple of the attention window in models that have one, which pad their inputs to it anyway."""
    window = getattr(model.config, "attention_window", None)
    if window is None:
        multiple = padding_multiple(max_length)
    else:
        multiple = max(window) if isinstance(window, Sequence) else window
    return CmpCropCollator(tokenizer, AnswerCollator(tokenizer, multiple))


def _sequence_edges(tokenizer: PreTrainedTokenizerBase) -> tuple[int, int]:
    """The tokens that begin an input and end its parts."""
    first: Any = tokenizer.cls_token_id if tokenizer.cls_token_id is not None else tokenizer.bos_token_id
    last: Any = tokenizer.sep_token_id if tokenizer.sep_token_id is not None else tokenizer.eos_token_id
    if first is None or last is None:
        raise ValueError(f"{tokenizer.name_or_path} has no token that begins, or none that ends, a text; use another")
    return first, last
