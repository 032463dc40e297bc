"""Removing tokens from a batch: every column moves with its tokens.

A cropped row is what it would have been without the removed text. Its tokens are closed up, every per-token column
moves with them, answer positions keep pointing at the same tokens, and the batch is trimmed to its longest row.

                     full                                        crop
    tokens           [CLS] who [SEP] it rained by Ann [SEP]      [CLS] who [SEP] by Ann [SEP]
    keep               1    1    1   0    0    1   1    1
    start_positions  5                                           3
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

PaddingSide = Literal["left", "right"]
SEGMENTS = "crop_segments"
IGNORED = -100
LABEL_COLUMNS = ("labels", "shift_labels")
"""Columns with a label for each token; where both are given, models read `shift_labels`."""
POSITION_COLUMNS = ("start_positions", "end_positions", "cls_index", "mc_token_ids", "entity_position_ids")
"""Columns that hold token positions; a crop maps them to where their tokens move."""
PAD_VALUES = {"attention_mask": 0, "special_tokens_mask": 1, SEGMENTS: 0, **dict.fromkeys(LABEL_COLUMNS, IGNORED)}
"""Padding of the columns where it has a meaning; all other columns are padded with 0."""


def crop_batch(
    inputs: Mapping[str, Any],
    keep: Tensor,
    pad_values: Mapping[str, float] = PAD_VALUES,
    padding_side: PaddingSide | None = None,
    pad_to_multiple_of: int = 1,
    per_example: Collection[str] = (),
    shifts_labels: bool = False,
) -> dict[str, Any]:
    """The batch without the tokens that `keep` excludes.

    A column is per token when its shape is (batch, length, …), unless it belongs to a decoder (`decoder_…`), holds
    floating-point `labels` (multi-label targets) or is named in `per_example`. Columns of `POSITION_COLUMNS` are
    mapped to where their tokens move; positions outside [0, length), which models ignore, are left alone.
    `position_ids` are renumbered as if the removed text had never been there. Everything else is passed through.

    Where the model shifts its labels, column 0 has no column before it that could predict its label. Under left
    padding a row's first token may move into or out of column 0. So that the same labels are predicted as before, a
    label that moves out of column 0 becomes -100, and one that was predicted from padding keeps a padding column
    before it.

    Args:
        inputs: the batch, with a 2-dimensional `attention_mask`; padding is trimmed too.
        keep: (batch, length) bool.
        pad_values, padding_side, pad_to_multiple_of, per_example, shifts_labels: as in `CmpCrop`.

    Returns:
        The cropped batch. Its length is that of the longest row, rounded up to the multiple, but never more than the
        length of the full batch.

    Raises:
        ValueError: if the batch has `input_ids`, but `pad_values` does not say how to pad them.
    """
    keeps, side, multiple = keep.unsqueeze(0), padding_side, pad_to_multiple_of
    return crop_batches(inputs, keeps, pad_values, side, multiple, per_example, shifts_labels)[0]


def crop_batches(
    inputs: Mapping[str, Any],
    keeps: Tensor,
    pad_values: Mapping[str, float] = PAD_VALUES,
    padding_side: PaddingSide | None = None,
    pad_to_multiple_of: int = 1,
    per_example: Collection[str] = (),
    shifts_labels: bool = False,
    read: Callable[[Tensor], list[int]] = Tensor.tolist,
) -> list[dict[str, Any]]:
    """`crop_batch` for each of `keeps` (crops, batch, length); their lengths are one wait for the device.

    Args:
        read: the values of integers `(crops,)` on the device; it is called once, and nothing else is read.
    """
    attended = inputs["attention_mask"].bool()
    lead = _predicted_from_padding(inputs, attended, per_example) if shifts_labels else 0
    kept = keeps & attended
    longest = read((kept.sum(dim=2, keepdim=True) + lead).amax(dim=(1, 2)))
    pad_values = {**PAD_VALUES, **pad_values}
    if "input_ids" in inputs and "input_ids" not in pad_values:
        raise ValueError("Cropped rows are padded, but there is no padding token; set tokenizer.pad_token.")
    pads_left = _pads_left(attended, padding_side)
    crops: list[dict[str, Any]] = []
    for one, length in zip(kept, longest, strict=True):
        moves = _moves(one, pads_left, _rounded(length, pad_to_multiple_of, one.size(1)), lead)
        crops.append(_moved_columns(inputs, moves, attended & ~one, pad_values, per_example, shifts_labels))
    return crops


def _moved_columns(
    inputs: Mapping[str, Any],
    moves: _Moves,
    removed: Tensor,
    pad_values: Mapping[str, float],
    per_example: Collection[str],
    shifts_labels: bool,
) -> dict[str, Any]:
    """The columns of the crop without the tokens that are `removed` (batch, length)."""
    rows = torch.arange(len(removed), device=removed.device).unsqueeze(1)
    cropped: dict[str, Any] = {}
    for name, value in inputs.items():
        if is_per_token(name, value, removed.shape, per_example):
            if name == "position_ids":
                value = value - _removed_in_run(value, removed)
            is_padding = moves.is_padding
            if name == "labels" and shifts_labels:
                is_padding = is_padding | moves.left_column_0
            value = value[rows, moves.sources]  # (batch, new length, …)
            fill = is_padding.view(is_padding.shape + (1,) * (value.dim() - 2))
            value = value.masked_fill(fill, pad_values.get(name, 0))
        elif name in POSITION_COLUMNS and isinstance(value, Tensor):
            value = _moved(value, moves.destinations)
        cropped[name] = value
    return cropped


def is_per_token(name: str, value: Any, shape: torch.Size, per_example: Collection[str] = ()) -> bool:
    """Whether a column has one entry for each token of a batch of this shape (batch, length)."""
    if not isinstance(value, Tensor) or value.shape[:2] != shape or name in per_example:
        return False
    return not name.startswith("decoder_") and not (name == "labels" and value.is_floating_point())


def token_labels(
    inputs: Mapping[str, Any], name: str, shape: torch.Size, per_example: Collection[str] = ()
) -> Tensor | None:
    """(batch, length) bool: which tokens have a label in this column; None if it does not hold labels of tokens."""
    labels: Any = inputs.get(name)
    if not is_per_token(name, labels, shape, per_example):
        return None
    return (labels.reshape(*shape, -1) != IGNORED).any(dim=2)


# --- where tokens move ---


class _Moves(NamedTuple):
    """Where tokens move in a crop."""

    sources: Tensor
    """(batch, new length): the column from which each new column is taken."""
    is_padding: Tensor
    """(batch, new length) bool: new columns that are padding."""
    destinations: Tensor
    """(batch, length): the column to which each kept token moves."""

    @property
    def left_column_0(self) -> Tensor:
        """(batch, new length) bool: tokens that were in column 0 and no longer are."""
        moved = self.sources == 0
        moved[:, 0] = False
        return moved


def _rounded(length: int, multiple: int, full_length: int) -> int:
    """The length of a crop: rounded up to the multiple, but at least 1 and at most the full length."""
    return min(full_length, math.ceil(max(1, length) / multiple) * multiple)


def _moves(kept: Tensor, pads_left: Tensor | int, length: int, lead: Tensor | int) -> _Moves:
    """Closes up the kept tokens (batch, full length) to a new length, with at least `lead` (batch, 1) columns of
    padding before them."""
    full_length = kept.size(1)
    counts = kept.sum(dim=1, keepdim=True)  # (batch, 1)
    padding_before = (pads_left * (length - counts)).clamp(min=lead)  # (batch, 1)

    # Column j takes the (j - padding_before)-th kept token; a stable sort puts the kept ones first and in order.
    by_rank = kept.logical_not().int().argsort(dim=1, stable=True)
    ranks = torch.arange(length, device=kept.device) - padding_before  # (batch, length)
    return _Moves(
        sources=by_rank.gather(1, ranks.clamp(0, full_length - 1)),
        is_padding=(ranks < 0) | (ranks >= counts),
        destinations=kept.cumsum(dim=1) - 1 + padding_before,
    )


def _pads_left(attended: Tensor, padding_side: PaddingSide | None) -> Tensor | int:
    """1 if rows are padded on the left, else 0. Without a given side it is the one on which the batch is padded."""
    if padding_side is not None:
        return int(padding_side == "left")
    return (~attended[:, 0] & attended[:, -1]).any().int()


def _predicted_from_padding(inputs: Mapping[str, Any], attended: Tensor, per_example: Collection[str]) -> Tensor | int:
    """(batch, 1): 1 where a row's first token has a label and a padding column before it, else 0."""
    labelled = token_labels(inputs, "labels", attended.shape, per_example)
    if labelled is None or "shift_labels" in inputs:
        return 0
    first = attended.int().argmax(dim=1, keepdim=True)
    return (labelled.gather(1, first) & (first > 0)).long()


def _moved(positions: Tensor, destinations: Tensor) -> Tensor:
    """Token positions (batch, …) after the crop; models ignore positions outside the row, so these stay."""
    flat = positions.reshape(len(positions), -1)
    length = destinations.size(1)
    moved = destinations.gather(1, flat.long().clamp(0, length - 1)).to(flat.dtype)
    return torch.where((flat >= 0) & (flat < length), moved, flat).view_as(positions)


def _removed_in_run(position_ids: Tensor, removed: Tensor) -> Tensor:
    """(batch, length): how many tokens are removed before each token, within its run of consecutive position ids."""
    before = removed.cumsum(dim=1) - removed.long()
    starts = torch.ones_like(removed)
    starts[:, 1:] = position_ids[:, 1:] != position_ids[:, :-1] + 1
    columns = torch.arange(removed.size(1), device=removed.device).expand_as(before)
    run_start = columns.masked_fill(~starts, 0).cummax(dim=1).values
    return (before - before.gather(1, run_start)).to(position_ids.dtype)
