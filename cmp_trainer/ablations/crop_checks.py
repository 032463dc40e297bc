"""What a crop must not lose: answers, labels, and the last token of a row.

The loss of a crop can be compared with that of the full input only if both are losses of the same question. So an
answer position or a label in text that may be removed is an error, and the message names the example.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from cmp_trainer.ablations.crop_columns import LABEL_COLUMNS, POSITION_COLUMNS, SEGMENTS, token_labels


def check_croppable(inputs: Mapping[str, Any], per_example: Collection[str] = (), shifts_labels: bool = False) -> None:
    """Checks that every crop of the batch keeps its answers, its labels and at least one token a row.

    Args:
        inputs: the batch, with `crop_segments`.
        per_example, shifts_labels: as in `CmpCrop`.

    Raises:
        ValueError: if a column is missing or malformed, or if an example would lose something; the message names the
            first such example and the fix.
    """
    check = CropCheck(inputs, per_example, shifts_labels)
    check.read(check.segments.new_zeros(0))


class CropCheck:
    """The checks of `check_croppable`, with a result that is read later, together with other numbers.

    Raises:
        ValueError: on construction, if a column is missing or malformed; from `read`, if an example would lose
            something.
    """

    def __init__(
        self, inputs: Mapping[str, Any], per_example: Collection[str] = (), shifts_labels: bool = False
    ) -> None:
        self.segments, attended = _checked_columns(inputs)
        errors = _errors(inputs, self.segments, attended, per_example, shifts_labels)
        self._messages = list(errors)
        self._wrong = torch.stack(list(errors.values()))  # (checks, batch)

    def read(self, numbers: Tensor) -> list[int]:
        """The values of integers `(n,)`; they and the result of the checks are one wait for the device."""
        found, *values = torch.cat([self._wrong.any().view(1).to(numbers.dtype), numbers]).tolist()
        if found:
            check, example = self._wrong.nonzero()[0].tolist()
            segments = self.segments[example].unique().tolist()
            raise ValueError(
                f"Example {example} of the batch cannot be cropped: {self._messages[check]}. (Its segments: "
                f"{segments}.)"
            )
        return values


def _errors(
    inputs: Mapping[str, Any], segments: Tensor, attended: Tensor, per_example: Collection[str], shifts_labels: bool
) -> dict[str, Tensor]:
    """What may be wrong, and (batch,) bool: with which examples it is."""
    removable = (segments > 0) & attended
    return {
        "crop_segments is negative somewhere; use 0 for tokens that must stay and 1, 2, … for removable segments": (
            segments < 0
        ).any(dim=1),
        "every token is removable, so nothing would be left; set crop_segments to 0 for the tokens that must stay": (
            attended.any(dim=1) & ~(attended & ~removable).any(dim=1)
        ),
        "an answer or another position lies in a removable segment or on padding, and answers must never be cropped "
        "away; set crop_segments to 0 there": _loses_positions(inputs, removable, attended),
        "labels other than -100 lie in a removable segment or on padding, so a crop would lose them; set "
        "crop_segments to 0, or the labels to -100, there": _loses_labels(inputs, removable | ~attended, per_example),
        "the label of the first token that stays is predicted from the removable tokens before it, so a crop would "
        "lose it; set crop_segments to 0 for a token before it, or this label to -100": (
            _loses_first_label(inputs, removable, attended, per_example, shifts_labels)
        ),
    }


def _checked_columns(inputs: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """`crop_segments` and which tokens are attended to (bool), both (batch, length)."""
    segments = inputs.get(SEGMENTS)
    if not isinstance(segments, Tensor):
        raise ValueError(
            "Crops were requested (--cmp_num_crops), but the batch carries no `crop_segments` tensor; its columns are "
            f"{sorted(inputs)}. Add the column to the dataset (with the functions of cmp_trainer.ablations.segments) "
            "and use a data collator that pads it: cmp_trainer.ablations.crop_collator.CmpCropCollator does so for "
            "any tokenizer."
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
            f"crop_segments has shape {tuple(segments.shape)}, but the batch is {tuple(mask.shape)} by its "
            "attention_mask. It needs one number for each token; "
            "cmp_trainer.ablations.crop_collator.CmpCropCollator pads it."
        )
    if segments.is_floating_point() or segments.dtype == torch.bool:
        raise ValueError(
            f"crop_segments must hold integers, got {segments.dtype}; use 0 for tokens that must stay and 1, 2, … for "
            "removable segments."
        )
    return segments, mask.bool()


def _loses_positions(inputs: Mapping[str, Any], removable: Tensor, attended: Tensor) -> Tensor:
    """(batch,) bool: a position column points at a token that may be removed, or at padding."""
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
        # The tokens between start and end must stay, too.
        flat_starts, flat_ends = (p.reshape(len(removable), -1).long() for p in (starts, ends))
        before = removable.cumsum(dim=1)
        within = before.gather(1, flat_ends.clamp(0, length - 1)) - before.gather(1, flat_starts.clamp(0, length - 1))
        used = (flat_starts >= 0) & (flat_ends >= flat_starts) & (flat_ends < length)
        lost = lost | ((within > 0) & used).any(dim=1)
    return lost


def _loses_labels(inputs: Mapping[str, Any], unusable: Tensor, per_example: Collection[str]) -> Tensor:
    """(batch,) bool: a token that is removable or padding has a label."""
    lost = torch.zeros_like(unusable[:, 0])
    for name in LABEL_COLUMNS:
        labelled = token_labels(inputs, name, unusable.shape, per_example)
        if labelled is not None:
            lost = lost | (labelled & unusable).any(dim=1)
    return lost


def _loses_first_label(
    inputs: Mapping[str, Any], removable: Tensor, attended: Tensor, per_example: Collection[str], shifts_labels: bool
) -> Tensor:
    """(batch,) bool: the first token that stays has a label, and every token before it is removable.

    Position i predicts the label of position i + 1, so nothing predicts the label of a row's first token. In mid-row
    a crop only changes from which token a label is predicted. `shift_labels` hold the label where it is predicted.
    """
    labelled = token_labels(inputs, "labels", removable.shape, per_example)
    if not shifts_labels or labelled is None or "shift_labels" in inputs:
        return torch.zeros_like(removable[:, 0])
    first = (attended & ~removable).int().argmax(dim=1, keepdim=True)
    removable_before = (removable.cumsum(dim=1) - removable.int()).gather(1, first) > 0
    return (labelled.gather(1, first) & removable_before).squeeze(1)
