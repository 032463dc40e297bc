"""Ablations of heads, inner neurons and layers of a BERT: what `train_classifier.py` takes away after training.

They are those of docs/howto_ablations.md. Level k takes away k quarters (at least k) of the heads or inner neurons of
each layer, or k layers, drawn anew for each batch.
"""

from contextlib import AbstractContextManager
from typing import Any

import torch
from parts import without_units

from cmp_trainer.ablations import Ablation


class UnitAblation(Ablation):
    """Level k takes away k quarters of the heads (or of the inner neurons), drawn for each layer and batch."""

    def __init__(self, part: str, model: Any = None) -> None:
        self.part, self.name, self.model = part, part, model

    def for_model(self, model: Any, processing_class: Any = None, data_collator: Any = None) -> "UnitAblation":
        return UnitAblation(self.part, model)

    def context(self, level: int) -> AbstractContextManager[None]:
        def taken(units: int) -> torch.Tensor:
            return torch.randperm(units)[: max(level, units * level // 4)]  # the same draw at every level, 0 included

        return without_units(self.model, self.part, taken)


class LayerAblation(Ablation):
    """Level k skips k layers, in an order drawn for each batch."""

    name = "layers"
    skips_layers = True

    def skipped_layers(self, level: int, num_layers: int) -> list[int]:
        return torch.randperm(num_layers)[:level].tolist()  # the same draw at every level, 0 included


KINDS = {"heads": UnitAblation("heads"), "neurons": UnitAblation("neurons"), "layers": LayerAblation()}
