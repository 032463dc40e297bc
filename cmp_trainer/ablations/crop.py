"""CmpCrop: ablate input context, by really removing tokens.

Some of an example's input is known not to matter: distractor paragraphs, the tail of the feedback documents. A batch
says so in `crop_segments` (batch, length): 0 for what must stay, 1, 2, … for the removable segments of that example
in their order. Crop m = 1, 2, … keeps k(m) of an example's n removable segments,

    n > k(1) > k(2) > … >= 0   (drawn at random; once at 0 it stays there),

and what crop m + 1 keeps, crop m keeps too. So crop m is an ablation of crop m - 1, and crop 0 is the full input
(section 4.2 of "Cross-Model Comparative Loss for Enhancing Neuronal Utility in Language Understanding", 2024). A
cropped row is what it would have been without the removed text: its tokens closed up, every per-token column with
them, answer positions pointing at the same tokens, the batch trimmed to its longest row.

A trainer makes one `CmpCrop` (`CmpCrop.for_model` finds the padding rules) and calls it on each batch:

    crop = CmpCrop.for_model(model, num_crops=1, processing_class=tokenizer)
    full, once = crop(inputs)          # dicts without crop_segments: 1 + num_crops of them

Users make the column with the functions of crop_segments.py and pad it with `CmpCropCollator`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from inspect import signature
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import DataCollatorWithPadding, PreTrainedTokenizerBase

CropOrder = Literal["random", "prefix"]
SEGMENTS = "crop_segments"
PAD_VALUES = {"attention_mask": 0, "labels": -100, "special_tokens_mask": 1, SEGMENTS: 0}
"""What padding is in columns where it has a meaning; elsewhere it is 0."""
POSITION_COLUMNS = ("start_positions", "end_positions", "cls_index", "mc_token_ids", "entity_position_ids")
"""Columns that hold token positions; they are mapped to where their tokens move."""


@dataclass
class CmpCrop:
    """Makes the cropped variants of a batch.

    Args:
        num_crops: how many crops beside the full input.
        order: `random` keeps any segments; `prefix` keeps the first ones, for segments in order of importance.
        pad_values: padding by column, over `PAD_VALUES`; `input_ids` must be there when batches carry it.
        padding_side: the side of new padding; None takes the side the batch is padded on, right where it has none.
        pad_to_multiple_of: cropped batches are trimmed to a multiple of it (never past the full length).
        per_example: columns that are not per token although their shape is (batch, length, …).

    Raises:
        ValueError: on a batch that cannot be cropped; the message names the example and what to change.

    >>> import torch
    >>> crop = CmpCrop(num_crops=1, order="prefix", pad_values={"input_ids": 0})
    >>> batch = {"input_ids": torch.tensor([[5, 6, 7, 8]]), "attention_mask": torch.ones(1, 4, dtype=torch.long)}
    >>> full, once = crop(batch | {"crop_segments": torch.tensor([[0, 1, 1, 0]]), "end_positions": torch.tensor([3])})
    >>> once["input_ids"].tolist(), once["end_positions"].tolist()
    ([[5, 8]], [1])
    """

    num_crops: int
    order: CropOrder = "random"
    pad_values: Mapping[str, float] = field(default_factory=dict)
    padding_side: Literal["left", "right"] | None = None
    pad_to_multiple_of: int = 1
    per_example: Collection[str] = ()

    @classmethod
    def for_model(
        cls,
        model: torch.nn.Module,
        num_crops: int,
        order: CropOrder = "random",
        processing_class: Any = None,
        data_collator: Any = None,
    ) -> CmpCrop:
        """The crop whose padding suits the model, its tokenizer (where given) and the data collator (where given).

        The padding multiple is the collator's `pad_to_multiple_of` joined with the attention window of models that
        have one (Longformer, LED). `labels` of encoder-decoder models are the decoder's and are never cropped.
        """
        config: Any = getattr(model, "config", None)
        pad_values: dict[str, float] = {}
        pad_token_id = getattr(processing_class, "pad_token_id", None)
        if pad_token_id is None:
            pad_token_id = getattr(config, "pad_token_id", None)
        if pad_token_id is not None:
            pad_values["input_ids"] = pad_token_id
        pad_values["token_type_ids"] = getattr(processing_class, "pad_token_type_id", 0)
        window = getattr(config, "attention_window", None) or 1
        multiple = math.lcm(
            getattr(data_collator, "pad_to_multiple_of", None) or 1,
            max(window) if isinstance(window, Sequence) else window,
        )
        forward = getattr(model, "get_base_model", lambda: model)().forward
        return cls(
            num_crops=num_crops,
            order=order,
            pad_values=pad_values,
            padding_side=getattr(processing_class, "padding_side", None),
            pad_to_multiple_of=multiple,
            per_example=("labels",) if "decoder_input_ids" in signature(forward).parameters else (),
        )

    def __call__(self, inputs: Mapping[str, Any]) -> list[dict[str, Any]]:
        """The batch at 0, 1, …, num_crops crops, each without `crop_segments`; crop 0 holds the very tensors given."""
        full = {name: value for name, value in inputs.items() if name != SEGMENTS}
        if self.num_crops == 0:
            return [full]
        check_croppable(inputs, self.per_example)
        keeps = nested_keeps(inputs[SEGMENTS], self.num_crops, self.order)
        crops = [
            crop_batch(full, keep, self.pad_values, self.padding_side, self.pad_to_multiple_of, self.per_example)
            for keep in keeps[1:]
        ]
        return [full, *crops]


def nested_keeps(crop_segments: Tensor, num_crops: int, order: CropOrder = "random") -> Tensor:
    """Which tokens each crop keeps.

    The numbers k(1) > k(2) > … of kept segments are a uniformly drawn subset of {0, …, n - 1} in descending order; an
    example with n < num_crops segments goes n - 1, …, 1, 0 and stays at 0. Draws come from the default generator of
    the tensor's device, and their number depends on the shape alone, so one example's crops do not depend on what the
    others contain.

    Args:
        crop_segments: (batch, length), 0 for what must stay, any positive numbers for segments, in their order.
        num_crops: how many crops.
        order: `random` or `prefix`: which k segments are kept.

    Returns:
        (1 + num_crops, batch, length) bool. Row 0 is all true; row m + 1 is a subset of row m.

    >>> nested_keeps(torch.tensor([[0, 1, 2]]), 2, "prefix").int().tolist()
    [[[1, 1, 1]], [[1, 1, 0]], [[1, 0, 0]]]
    """
    if order not in ("random", "prefix"):
        raise ValueError(f"The crop order is {order!r}; it must be 'random' or 'prefix'.")
    segments = _consecutive(crop_segments)  # (batch, length), values 0 … n
    num_segments = segments.amax(dim=1, keepdim=True)  # (batch, 1)
    kept_counts = _decreasing_counts(num_segments, num_crops, segments.size(1))  # (batch, num_crops)
    if order == "random":
        ranks = _random_ranks(num_segments, segments.size(1))  # (batch, length): rank of segment 1 + column
        ranks = ranks.gather(1, (segments - 1).clamp(min=0))
    else:
        ranks = segments - 1
    # Row 0 keeps all n segments.
    counts = torch.cat([num_segments, kept_counts], dim=1).T.unsqueeze(2)  # (1 + num_crops, batch, 1)
    return (segments == 0) | (ranks < counts)


def crop_batch(
    inputs: Mapping[str, Any],
    keep: Tensor,
    pad_values: Mapping[str, float] = PAD_VALUES,
    padding_side: Literal["left", "right"] | None = None,
    pad_to_multiple_of: int = 1,
    per_example: Collection[str] = (),
) -> dict[str, Any]:
    """The batch without the tokens that `keep` leaves out.

    A column is per token when its shape is (batch, length, …), unless it belongs to a decoder (`decoder_…`), holds
    floating-point `labels` (multi-label targets) or is named in `per_example`. Columns of `POSITION_COLUMNS` are
    mapped to where their tokens move; positions outside [0, length), which models ignore, are left as they are.
    `position_ids` are renumbered, so that they count as if the removed text had never been there. Everything else
    passes through.

    Args:
        inputs: the batch, with a 2-dimensional `attention_mask`; its padding is trimmed too.
        keep: (batch, length) bool.
        pad_values, padding_side, pad_to_multiple_of, per_example: as in `CmpCrop`.

    Returns:
        The cropped batch, of the longest kept row's length, rounded up to the multiple, at most the length given.
    """
    attended = inputs["attention_mask"].bool()
    kept = keep & attended  # (batch, length)
    batch_size, full_length = kept.shape
    counts = kept.sum(dim=1, keepdim=True)  # (batch, 1)
    length = min(full_length, math.ceil(max(1, int(counts.max())) / pad_to_multiple_of) * pad_to_multiple_of)
    shift = _left_padding(attended, padding_side) * (length - counts)  # (batch, 1): padding before a row's tokens

    # The token that column j takes is the (j - shift)-th kept one; a stable sort puts those first and in order.
    sources = kept.logical_not().int().argsort(dim=1, stable=True)
    columns = torch.arange(length, device=kept.device) - shift  # (batch, length)
    is_padding = (columns < 0) | (columns >= counts)
    sources = sources.gather(1, columns.clamp(0, full_length - 1))
    rows = torch.arange(batch_size, device=kept.device).unsqueeze(1)
    destinations = kept.cumsum(dim=1) - 1 + shift  # (batch, full_length)

    pad_values = {**PAD_VALUES, **pad_values}
    cropped: dict[str, Any] = {}
    for name, value in inputs.items():
        if _is_per_token(name, value, kept.shape, per_example):
            if name == "input_ids" and name not in pad_values:
                raise ValueError("Cropped rows are padded, but there is no padding token: set tokenizer.pad_token.")
            if name == "position_ids":
                value = value - _removed_in_run(value, attended & ~keep)
            value = value[rows, sources]  # (batch, length, …)
            fill = is_padding.view(is_padding.shape + (1,) * (value.dim() - 2))
            value = value.masked_fill(fill, pad_values.get(name, 0))
        elif name in POSITION_COLUMNS and isinstance(value, Tensor):
            value = _moved(value, destinations)
        cropped[name] = value
    return cropped


def check_croppable(inputs: Mapping[str, Any], per_example: Collection[str] = ()) -> None:
    """Raises a ValueError, which names the example, where cropping the batch would go wrong or lose an answer."""
    segments = inputs.get(SEGMENTS)
    if not isinstance(segments, Tensor):
        raise ValueError(
            "Crops are asked for (--cmp_num_crops), but the batch carries no `crop_segments` tensor; it has "
            f"{sorted(inputs)}. Add the column to the data set (cmp_trainer.ablations.segments helps) "
            "and let the data collator keep it: cmp_trainer.ablations.crop.CmpCropCollator pads it for any tokenizer."
        )
    mask = inputs.get("attention_mask")
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        given = "none" if mask is None else f"of shape {tuple(mask.shape)}" if isinstance(mask, Tensor) else type(mask)
        raise ValueError(
            f"Cropped rows are padded, so a batch needs an attention_mask of shape (batch, length); it is {given}. "
            "Have the data collator return one."
        )
    if segments.shape != mask.shape:
        raise ValueError(
            f"crop_segments has the shape {tuple(segments.shape)}, but the batch is {tuple(mask.shape)} by its "
            "attention_mask: one number is needed for each token. cmp_trainer.ablations.crop.CmpCropCollator pads it."
        )
    if segments.is_floating_point() or segments.dtype == torch.bool:
        raise ValueError(
            f"crop_segments holds {segments.dtype}; it must hold integers: 0 for what must stay, 1, 2, … for "
            "removable segments."
        )
    attended = mask.bool()
    removable = (segments > 0) & attended
    errors = {
        "crop_segments has negative numbers; use 0 for what must stay and 1, 2, … for removable segments": (
            segments < 0
        ).any(dim=1),
        "every token is removable, so nothing would be left; set crop_segments to 0 for what must stay": (
            attended.any(dim=1) & ~(attended & ~removable).any(dim=1)
        ),
        "a position column points inside a removable segment, or at padding; an answer must never be cropped away: "
        "set crop_segments to 0 there": _lost_positions(inputs, removable, attended),
        "labels other than -100 lie in a removable segment, so a crop would drop what is to be predicted; set "
        "crop_segments to 0, or labels to -100, there": _lost_labels(inputs, removable, per_example),
    }
    # One host synchronization for all of them.
    wrong = torch.stack(list(errors.values()))  # (checks, batch)
    if wrong.any():
        check, example = wrong.nonzero()[0].tolist()
        found = segments[example].unique().tolist()
        raise ValueError(
            f"Example {example} of the batch cannot be cropped: {list(errors)[check]}. (Its segments: {found}.)"
        )


class CmpCropCollator:
    """Pads `crop_segments` and whatever else runs along the tokens, for any tokenizer.

    A tokenizer pads only the columns it knows. This collator takes out the other columns that have one entry for each
    token (`crop_segments`, `global_attention_mask`, `position_ids`, token `labels`, …), has the rest collated, and
    adds them, padded to the same length on the same side.

    Args:
        tokenizer: whose `padding_side`, and `pad` where no collator is given, are used.
        collator: collates the other columns; it keeps `labels` to itself. None: `DataCollatorWithPadding`.
        pad_values: padding by column, over `PAD_VALUES`.
        padding, pad_to_multiple_of: for `DataCollatorWithPadding`.

    Raises:
        ValueError: where `crop_segments` is missing in some examples (in all it may be: the Trainer removes it where
            no crops are asked for), or not as long as `input_ids`.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        collator: Callable[[list[dict[str, Any]]], Any] | None = None,
        pad_values: Mapping[str, float] | None = None,
        padding: bool | Literal["longest", "max_length"] = True,
        pad_to_multiple_of: int | None = None,
    ):
        self.tokenizer = tokenizer
        self.pad_values = {**PAD_VALUES, **(pad_values or {})}
        self.keeps_labels = collator is not None
        self.collator = collator or DataCollatorWithPadding(
            tokenizer, padding=padding, pad_to_multiple_of=pad_to_multiple_of
        )
        self.pad_to_multiple_of = pad_to_multiple_of or getattr(collator, "pad_to_multiple_of", None)

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        columns = self._extra_columns(features)
        batch = self.collator([{k: v for k, v in one.items() if k not in columns} for one in features])
        length = batch["input_ids"].shape[1]
        for name in columns:
            rows = [self._padded(torch.as_tensor(one[name]), length, name) for one in features]
            batch[name] = torch.stack(rows)
        return dict(batch)

    def _extra_columns(self, features: Sequence[Mapping[str, Any]]) -> list[str]:
        with_segments = [SEGMENTS in one for one in features]
        for index, one in enumerate(features if any(with_segments) else []):
            if not with_segments[index]:
                raise ValueError(
                    f"Example {index} of the batch has no crop_segments, others have; its columns are {sorted(one)}. "
                    "An example with nothing to remove has 0 for each token."
                )
            if len(one[SEGMENTS]) != len(one["input_ids"]):
                raise ValueError(
                    f"Example {index} of the batch has {len(one[SEGMENTS])} crop_segments for "
                    f"{len(one['input_ids'])} input_ids; one is needed for each token."
                )
        # What tokenizer.pad pads by itself.
        known = {"input_ids", "attention_mask", "token_type_ids", "special_tokens_mask"}
        known |= {"labels"} if self.keeps_labels else set()
        return [name for name in features[0] if name not in known and _runs_along_tokens(name, features)]

    def _padded(self, values: Tensor, length: int, name: str) -> Tensor:
        padding = values.new_full((length - len(values), *values.shape[1:]), self.pad_values.get(name, 0))
        return torch.cat([padding, values] if self.tokenizer.padding_side == "left" else [values, padding])


# --- drawing which segments stay ---


def _consecutive(crop_segments: Tensor) -> Tensor:
    """Segment numbers (batch, length) as 0, 1, …, n without gaps: truncation may have removed some segments."""
    ordered, indices = crop_segments.sort(dim=1)
    first = torch.cat([ordered[:, :1] > 0, ordered[:, 1:] > ordered[:, :-1]], dim=1)
    return torch.zeros_like(crop_segments).scatter(1, indices, first.cumsum(dim=1).to(crop_segments.dtype)).long()


def _decreasing_counts(num_segments: Tensor, num_crops: int, length: int) -> Tensor:
    """(batch, num_crops): a uniformly drawn subset of {0, …, n - 1}, descending, then zeros."""
    width = max(length, num_crops)
    draws = torch.rand(num_segments.size(0), width, device=num_segments.device)
    possible = torch.arange(width, device=num_segments.device) < num_segments
    best = draws.masked_fill(~possible, -1.0).topk(num_crops, dim=1)
    return best.indices.masked_fill(best.values < 0, 0).sort(dim=1, descending=True).values


def _random_ranks(num_segments: Tensor, length: int) -> Tensor:
    """(batch, length): column j holds the place of segment j + 1 in a random order of the example's n segments."""
    draws = torch.rand(num_segments.size(0), length, device=num_segments.device)
    absent = torch.arange(length, device=num_segments.device) >= num_segments
    return draws.masked_fill(absent, 2.0).argsort(dim=1).argsort(dim=1)


# --- moving columns ---


def _is_per_token(name: str, value: Any, shape: torch.Size, per_example: Collection[str]) -> bool:
    if not isinstance(value, Tensor) or value.shape[:2] != shape or name in per_example:
        return False
    return not name.startswith("decoder_") and not (name == "labels" and value.is_floating_point())


def _left_padding(attended: Tensor, padding_side: str | None) -> Tensor | int:
    """1 where rows are to be padded on the left: models that read the last column need their tokens there."""
    if padding_side is not None:
        return int(padding_side == "left")
    return (~attended[:, 0] & attended[:, -1]).any().int()


def _moved(positions: Tensor, destinations: Tensor) -> Tensor:
    """Positions (batch, …) as the tokens' new ones; those outside the row are ignored by models and stay."""
    flat = positions.reshape(len(positions), -1)
    length = destinations.size(1)
    moved = destinations.gather(1, flat.long().clamp(0, length - 1)).to(flat.dtype)
    return torch.where((flat >= 0) & (flat < length), moved, flat).view_as(positions)


def _removed_in_run(position_ids: Tensor, removed: Tensor) -> Tensor:
    """(batch, length): how many tokens are removed before each one, in its run of consecutive position ids."""
    before = removed.cumsum(dim=1) - removed.long()
    starts = torch.ones_like(removed)
    starts[:, 1:] = position_ids[:, 1:] != position_ids[:, :-1] + 1
    columns = torch.arange(removed.size(1), device=removed.device).expand_as(before)
    run_start = columns.masked_fill(~starts, 0).cummax(dim=1).values
    return (before - before.gather(1, run_start)).to(position_ids.dtype)


# --- finding what a crop would lose ---


def _lost_positions(inputs: Mapping[str, Any], removable: Tensor, attended: Tensor) -> Tensor:
    """(batch,) bool: a position column names a token that a crop could remove, or padding."""
    lost = torch.zeros_like(removable[:, 0])
    length = removable.size(1)
    unusable = removable | ~attended
    for name in POSITION_COLUMNS:
        if isinstance(inputs.get(name), Tensor):
            flat = inputs[name].reshape(len(removable), -1).long()
            at = unusable.gather(1, flat.clamp(0, length - 1))
            lost = lost | (at & (flat >= 0) & (flat < length)).any(dim=1)
    starts, ends = inputs.get("start_positions"), inputs.get("end_positions")
    if isinstance(starts, Tensor) and isinstance(ends, Tensor) and starts.shape == ends.shape:
        # Nothing between start and end may go either.
        flat_starts, flat_ends = (p.reshape(len(removable), -1).long() for p in (starts, ends))
        before = removable.cumsum(dim=1)
        within = before.gather(1, flat_ends.clamp(0, length - 1)) - before.gather(1, flat_starts.clamp(0, length - 1))
        used = (flat_starts >= 0) & (flat_ends >= flat_starts) & (flat_ends < length)
        lost = lost | ((within > 0) & used).any(dim=1)
    return lost


def _lost_labels(inputs: Mapping[str, Any], removable: Tensor, per_example: Collection[str]) -> Tensor:
    labels = inputs.get("labels")
    if not isinstance(labels, Tensor) or not _is_per_token("labels", labels, removable.shape, per_example):
        return torch.zeros_like(removable[:, 0])
    labels = labels.reshape(*removable.shape, -1).amax(dim=2)
    return ((labels != -100) & removable).any(dim=1)


# --- padding the columns ---


def _runs_along_tokens(name: str, features: Sequence[Mapping[str, Any]]) -> bool:
    """Whether a column has one entry for each token in every example; multi-label targets never have."""
    for one in features:
        value: Any = one.get(name)
        if isinstance(value, str) or not hasattr(value, "__len__") or not hasattr(value, "__getitem__"):
            return False
        if getattr(value, "shape", None) == () or len(value) != len(one["input_ids"]):
            return False
    return not (name == "labels" and torch.as_tensor(features[0][name]).is_floating_point())
