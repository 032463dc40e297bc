"""CmpCropCollator: pads `crop_segments` and all other columns that have one entry for each token.

A tokenizer pads only the columns that it knows. The collator takes out the others (`crop_segments`,
`global_attention_mask`, `position_ids`, token `labels`, …), has the rest collated as usual, and adds them back, padded
to the same length on the same side.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import DataCollatorWithPadding, PreTrainedTokenizerBase

from cmp_trainer.ablations.crop_columns import PAD_VALUES, SEGMENTS


class CmpCropCollator:
    """Collates examples with `crop_segments`, for any tokenizer.

    Args:
        tokenizer: gives the padding side, and pads the columns that it knows if no collator is given.
        collator: collates the columns that the tokenizer knows, and `labels`. None means `DataCollatorWithPadding`,
            with `labels` padded here if they have one entry for each token.
        pad_values: padding by column, in addition to `PAD_VALUES`.
        padding, pad_to_multiple_of: passed to `DataCollatorWithPadding`.

    Raises:
        ValueError: if some examples have `crop_segments` and others do not, or if it is not as long as `input_ids`.
            No example needs to have it: the Trainer removes the column when no crops are requested.
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
                    f"Example {index} of the batch has no crop_segments, but others do; its columns are "
                    f"{sorted(one)}. Give an example with nothing to remove a 0 for each token."
                )
            if len(one[SEGMENTS]) != len(one["input_ids"]):
                raise ValueError(
                    f"Example {index} of the batch has {len(one[SEGMENTS])} crop_segments for "
                    f"{len(one['input_ids'])} input_ids; it needs one for each token."
                )
        # tokenizer.pad pads these columns itself.
        known = {"input_ids", "attention_mask", "token_type_ids", "special_tokens_mask"}
        known |= {"labels"} if self.keeps_labels else set()
        return [name for name in features[0] if name not in known and _is_per_token(name, features)]

    def _padded(self, values: Tensor, length: int, name: str) -> Tensor:
        padding = values.new_full((length - len(values), *values.shape[1:]), self.pad_values.get(name, 0))
        return torch.cat([padding, values] if self.tokenizer.padding_side == "left" else [values, padding])


def _is_per_token(name: str, features: Sequence[Mapping[str, Any]]) -> bool:
    """Whether a column has one entry for each token in every example; multi-label targets are never per token."""
    for one in features:
        value: Any = one.get(name)
        if isinstance(value, str) or not hasattr(value, "__len__") or not hasattr(value, "__getitem__"):
            return False
        if getattr(value, "shape", None) == () or len(value) != len(one["input_ids"]):
            return False
    return not (name == "labels" and torch.as_tensor(features[0][name]).is_floating_point())
