"""Ablations of heads, inner neurons and layers of a BERT: what `train_classifier.py` takes away after training.

They are those of docs/howto_ablations.md. Level k takes away k quarters (at least k) of the heads or inner neurons of
each layer, or k layers, drawn anew for each batch.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from cmp_trainer.ablations import Ablation


class GroupAblation(Ablation):
    """Level k zeroes k quarters of the heads (or of the inner neurons), drawn for each layer and batch."""

    def __init__(self, part: str, model: Any = None) -> None:
        self.part, self.name = part, part
        layers = [] if model is None else list(model.base_model.encoder.layer)
        self.readers = [layer.attention.output.dense if part == "heads" else layer.output.dense for layer in layers]
        self.heads = 0 if model is None else model.config.num_attention_heads

    def for_model(self, model: Any, processing_class: Any = None, data_collator: Any = None) -> "GroupAblation":
        return GroupAblation(self.part, model)

    @contextmanager
    def context(self, level: int) -> Iterator[None]:
        with ExitStack() as stack:
            for reader in self.readers:
                groups = self.heads if self.part == "heads" else reader.in_features
                kept = torch.ones(groups, 1)
                kept[torch.randperm(groups)[: max(level, groups * level // 4)]] = (
                    0  # the same draw at every level, 0 included
                )

                def zeroed(module: Any, args: tuple, kept: torch.Tensor = kept) -> Any:
                    return (args[0].unflatten(-1, (len(kept), -1)) * kept.to(args[0])).flatten(-2)

                stack.callback(reader.register_forward_pre_hook(zeroed).remove)
            yield


class LayerAblation(Ablation):
    """Level k skips k layers, in an order drawn for each batch."""

    name = "layers"

    def __init__(self, model: Any = None) -> None:
        self.layers = [] if model is None else list(model.base_model.encoder.layer)

    def for_model(self, model: Any, processing_class: Any = None, data_collator: Any = None) -> "LayerAblation":
        return LayerAblation(model)

    @contextmanager
    def context(self, level: int) -> Iterator[None]:
        order = torch.randperm(len(self.layers)).tolist()  # the same draw at every level, 0 included
        with ExitStack() as stack:
            for number in order[:level]:
                hook = self.layers[number].register_forward_hook(lambda module, args, output: args[0])
                stack.callback(hook.remove)
            yield


KINDS = {"heads": GroupAblation("heads"), "neurons": GroupAblation("neurons"), "layers": LayerAblation()}
