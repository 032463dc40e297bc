"""CmpCrop: ablate input context, by really removing tokens.

Some of an example's input is known not to matter: distractor paragraphs, the tail of the feedback documents. A batch
says so in `crop_segments` (batch, length): 0 for tokens that must stay, 1, 2, … for the removable segments of that
example, in their order. Crop m = 1, 2, … keeps k(m) of an example's n removable segments,

    n > k(1) > k(2) > … >= 0   (drawn at random; once 0, it stays 0),

and keeps nothing that crop m - 1 has removed. So crop m is an ablation of crop m - 1, and crop 0 is the full input
(section 4.2 of "Cross-Model Comparative Loss for Enhancing Neuronal Utility in Language Understanding", 2024).

Users make the column with the functions of segments.py and pad it with `CmpCropCollator`. How columns move with their
tokens is in crop_columns.py, and what a crop must not lose in crop_checks.py.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from inspect import signature
from typing import Any, Literal

import torch
from torch import Tensor
from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
)

from cmp_trainer.ablations.crop_checks import CropCheck
from cmp_trainer.ablations.crop_columns import SEGMENTS, PaddingSide, crop_batches
from cmp_trainer.ablations.protocol import Ablation

CropOrder = Literal["random", "prefix"]


@dataclass(frozen=True)
class CmpCrop(Ablation):
    """Ablation whose level m is the batch after m crops.

    `for_model` finds from the model, the tokenizer and the data collator what is None here. Without it, None means:
    only the columns in `PAD_VALUES` have a padding of their own, there is no padding multiple, every column that looks
    per token is, and labels are not shifted.

    Args:
        order: `random` keeps any segments; `prefix` keeps the first ones, for segments in order of importance.
        pad_values: padding by column, in addition to `PAD_VALUES`; needed for `input_ids`.
        padding_side: the side on which crops are padded. None means the side on which the batch is padded, or right
            if it has no padding.
        pad_to_multiple_of: the length of a crop is rounded up to a multiple of it (but never past the full length).
        per_example: columns that are not per token although their shape is (batch, length, …).
        shifts_labels: whether position i of the model's output predicts label i + 1, as in causal language models.

    Raises:
        ValueError: on construction, if `order` is unknown; from `batches`, if a batch cannot be cropped. The message
            names the example and the fix.

    >>> import torch
    >>> crop = CmpCrop(order="prefix", pad_values={"input_ids": 0})
    >>> batch = {"input_ids": torch.tensor([[5, 6, 7, 8]]), "attention_mask": torch.ones(1, 4, dtype=torch.long)}
    >>> batch |= {"crop_segments": torch.tensor([[0, 1, 1, 0]]), "end_positions": torch.tensor([3])}
    >>> full, once = crop.batches(batch, num_levels=1)
    >>> once["input_ids"].tolist(), once["end_positions"].tolist()
    ([[5, 8]], [1])
    >>> removed_tokens(full, once)
    tensor(2)
    """

    order: CropOrder = "random"
    pad_values: Mapping[str, float] | None = field(default=None, hash=False)
    padding_side: PaddingSide | None = None
    pad_to_multiple_of: int | None = None
    per_example: Collection[str] | None = field(default=None, hash=False)
    shifts_labels: bool | None = None

    def __post_init__(self) -> None:
        _check_order(self.order)

    def for_model(self, model: torch.nn.Module, processing_class: Any = None, data_collator: Any = None) -> CmpCrop:
        """A copy that fits the model, its tokenizer (if given) and the data collator (if given).

        Settings that were given win; `pad_values` and `per_example` are added to what is found. The padding multiple
        is the least common multiple of the collator's `pad_to_multiple_of` and the attention window of models that
        have one (Longformer, LED). `labels` of encoder-decoder models belong to the decoder and are never cropped.
        """
        model = getattr(model, "get_base_model", lambda: model)()  # PEFT wraps the model
        config: Any = getattr(model, "config", None)
        side = getattr(processing_class, "padding_side", None)
        multiple, shifts = self.pad_to_multiple_of, self.shifts_labels
        return replace(
            self,
            pad_values={**_pad_values(config, processing_class), **(self.pad_values or {})},
            padding_side=side if self.padding_side is None else self.padding_side,
            pad_to_multiple_of=_padding_multiple(config, data_collator) if multiple is None else multiple,
            per_example=tuple(dict.fromkeys([*_per_example(model), *(self.per_example or ())])),
            shifts_labels=shifts_labels(model) if shifts is None else shifts,
        )

    def batches(self, batch: Mapping[str, Any], num_levels: int) -> list[dict[str, Any]]:
        """The batch after 0, 1, …, `num_levels` crops, each without `crop_segments`; level 0 has the same tensors."""
        full = {name: value for name, value in batch.items() if name != SEGMENTS}
        if num_levels == 0:
            return [full]
        per_example, shifts = self.per_example or (), bool(self.shifts_labels)
        check = CropCheck(batch, per_example, shifts)
        keeps = nested_keeps(batch[SEGMENTS], num_levels, self.order)[1:]
        pad_values, multiple = self.pad_values or {}, self.pad_to_multiple_of or 1
        crops = crop_batches(
            full, keeps, pad_values, self.padding_side, multiple, per_example, shifts, read=check.read
        )
        return [full, *crops]


def removed_tokens(full_batch: Mapping[str, Any], cropped_batch: Mapping[str, Any]) -> Tensor:
    """How many tokens a crop removed from a batch: a scalar that stays on the device, so nothing waits for it."""
    return full_batch["attention_mask"].sum() - cropped_batch["attention_mask"].sum()


def nested_keeps(crop_segments: Tensor, num_crops: int, order: CropOrder = "random") -> Tensor:
    """Which tokens each crop keeps.

    The numbers k(1) > k(2) > … of kept segments are a uniformly drawn subset of {0, …, n - 1} in descending order; an
    example with n < num_crops segments goes n - 1, …, 1, 0 and stays at 0. Draws come from the default generator of
    the tensor's device. How many there are depends on the shape alone, so an example's crops do not depend on the
    contents of the others.

    Args:
        crop_segments: (batch, length), 0 for tokens that must stay, any positive numbers for segments, in their order.
        num_crops: the number of crops.
        order: which k segments are kept, `random` or `prefix`.

    Returns:
        (1 + num_crops, batch, length) bool. Row 0 is all true; row m + 1 is a subset of row m.

    >>> nested_keeps(torch.tensor([[0, 1, 2]]), 2, "prefix").int().tolist()
    [[[1, 1, 1]], [[1, 1, 0]], [[1, 0, 0]]]
    """
    _check_order(order)
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


def shifts_labels(model: torch.nn.Module) -> bool:
    """Whether position i of the model's output predicts label i + 1.

    Causal language models shift their labels like this. Encoder-decoder models do not, nor does a decoder taken from
    one (BartForCausalLM).
    """
    config: Any = getattr(model, "config", None)
    names = {kind.__name__ for kind in type(model).__mro__}  # FSDP trains a subclass of the model's class
    model_type: Any = getattr(config, "model_type", None)
    whole = MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES.get(model_type)
    if getattr(config, "is_encoder_decoder", False) or (whole is not None and whole not in names):
        return False
    by_loss = LOSS_MAPPING.get(getattr(model, "loss_type", None) or "") is ForCausalLMLoss
    return by_loss or not names.isdisjoint(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())


# --- what fits a model ---


def _pad_values(config: Any, processing_class: Any) -> dict[str, float]:
    found: dict[str, float] = {"token_type_ids": getattr(processing_class, "pad_token_type_id", 0)}
    pad_token_id = getattr(processing_class, "pad_token_id", None)
    if pad_token_id is None:
        pad_token_id = getattr(config, "pad_token_id", None)
    if pad_token_id is not None:
        found["input_ids"] = pad_token_id
    return found


def _padding_multiple(config: Any, data_collator: Any) -> int:
    window = getattr(config, "attention_window", None) or 1
    window = max(window) if isinstance(window, Sequence) else window
    return math.lcm(getattr(data_collator, "pad_to_multiple_of", None) or 1, window)


def _per_example(model: torch.nn.Module) -> tuple[str, ...]:
    return ("labels",) if "decoder_input_ids" in signature(model.forward).parameters else ()


# --- drawing which segments stay ---


def _check_order(order: str) -> None:
    if order not in ("random", "prefix"):
        raise ValueError(f"The crop order must be 'random' or 'prefix', got {order!r}.")


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
