"""Heads, inner neurons and layers of a BERT, taken away in a forward."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch


@contextmanager
def without_units(model: Any, part: str, taken: Callable[[int], torch.Tensor]) -> Iterator[None]:
    """In the body, heads or inner neurons of each layer give zeros.

    Args:
        model: a BERT with any head.
        part: "heads" or "neurons".
        taken: from how many a layer has to the indices of those that are taken away; asked for layer by layer.
    """
    with ExitStack() as stack:
        for layer in model.base_model.encoder.layer:
            reader = layer.attention.output.dense if part == "heads" else layer.output.dense
            units = model.config.num_attention_heads if part == "heads" else reader.in_features
            kept = torch.ones(units, 1)
            kept[taken(units)] = 0

            def zeroed(module: Any, args: tuple, kept: torch.Tensor = kept) -> Any:
                return (args[0].unflatten(-1, (len(kept), -1)) * kept.to(args[0])).flatten(-2)

            stack.callback(reader.register_forward_pre_hook(zeroed).remove)
        yield


@contextmanager
def without_layers(model: Any, numbers: list[int]) -> Iterator[None]:
    """In the body, these layers pass their input through."""
    layers = model.base_model.encoder.layer
    with ExitStack() as stack:
        for number in numbers:
            hook = layers[number].register_forward_hook(lambda module, args, output: args[0])
            stack.callback(hook.remove)
        yield
