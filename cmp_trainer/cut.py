"""A model with fewer layers: an ordinary Hugging Face model that computes what a variant of CmpSkip computes.

How many layers a model has stands in its configuration under one of many names (`num_hidden_layers`, `n_layer`,
`decoder_layers`), often beside lists with an entry for each layer (`layer_types`). There is no table of names here. Of
the numbers in the configuration that equal the number of layers, the one is taken with which a new model has exactly
the weights that are left and computes what the old one computes with the other layers skipped; lists of that length
are cut alike. A new model numbers its layers anew, so that caches and masks by layer fit.
"""

from __future__ import annotations

import copy
import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from transformers import PretrainedConfig, PreTrainedModel

from cmp_trainer.execution.ablated import without_layers
from cmp_trainer.execution.layers import Stack

_RELATIVE_TOLERANCE = 1e-5  # of the largest output


_MASKED = 1e4  # in models that set outputs to the lowest number there is
_DERIVED = ("stage_names", "out_features", "out_indices")  # of models that can be a backbone: the names of the layers
logger = logging.getLogger(__name__)


class CannotCut(ValueError):
    """The model cannot be built with fewer layers."""


def cut(
    model: PreTrainedModel, stack: Stack, kept: Sequence[int], run: Callable[[PreTrainedModel], Any]
) -> PreTrainedModel:
    """A new model with some of the layers, which shares their weights with the given one.

    Args:
        model: in eval mode.
        stack: where its layers are, from `find_stack`.
        kept: the numbers of the layers that stay, in increasing order.
        run: runs a forward of a model and returns its outputs, with which the new model is compared.

    Raises:
        CannotCut: no number in the configuration makes such a model; says what was tried.
    """
    num_layers = len(stack.layers)
    missing = set(range(num_layers)) - set(kept)
    with torch.no_grad(), without_layers(stack, missing):
        expected = _tensors(run(model))
    repeats_one_layer = len(set(stack.layers)) < num_layers  # that is run many times
    weights = model.state_dict() if repeats_one_layer else _renumbered(model.state_dict(), stack.name, kept)
    tried: dict[str, None] = {}
    for path, name in _layer_counts(model.config, num_layers):
        tried[".".join((*path, name))] = None
        for config in _with_fewer(model.config, path, name, num_layers, kept):
            smaller = _build(model, config, weights)
            if smaller is None:
                continue
            with torch.no_grad():
                found = _tensors(run(smaller))
            if _are_close(found, expected):
                return smaller
    reason = "no number in its configuration equals that of its layers"
    if tried:
        reason = f"with a lower {' or '.join(tried)} it has other weights or other outputs"
    name = f"{len(kept)} of the {num_layers} layers of {stack.name}"
    raise CannotCut(f"{type(model).__name__} cannot be built with {name}: {reason}.")


def _renumbered(weights: Mapping[str, Tensor], name: str, kept: Sequence[int]) -> dict[str, Tensor]:
    """Weights by the name that they have in the smaller model."""
    layer = re.compile(rf"^{re.escape(name)}\.(\d+)\.(.*)$")
    number_of = {old: new for new, old in enumerate(kept)}
    found = {}
    for key, tensor in weights.items():
        match = layer.match(key)
        if match is None:
            found[key] = tensor
        elif int(match[1]) in number_of:
            found[f"{name}.{number_of[int(match[1])]}.{match[2]}"] = tensor
    return found


def _layer_counts(config: PretrainedConfig, num_layers: int) -> Iterator[tuple[tuple[str, ...], str]]:
    """Where the number of layers may stand: the path to a part of the configuration, and the attribute's name; those
    that are named after layers first."""
    found = [(path, name) for path, name, value in _integers(config, ()) if value == num_layers]
    yield from sorted(found, key=lambda one: "layer" not in one[1])


def _integers(config: PretrainedConfig, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], str, int]]:
    for name, value in vars(config).items():
        if isinstance(value, int) and not isinstance(value, bool):
            yield path, name, value
        elif isinstance(value, PretrainedConfig):
            yield from _integers(value, (*path, name))


def _with_fewer(
    config: PretrainedConfig, path: tuple[str, ...], name: str, num_layers: int, kept: Sequence[int]
) -> Iterator[PretrainedConfig]:
    """Configurations with another number of layers: with the entries of the layers that stay in all lists that are as
    long as there are layers, in those of them that are named after layers, and in none."""
    values = vars(_part(config, path))
    lists = [key for key, one in values.items() if isinstance(one, (list, tuple)) and len(one) == num_layers]
    named = [key for key in lists if "layer" in key]
    choices: list[list[str]] = []
    for choice in (lists, named, []):
        if choice not in choices:
            choices.append(choice)
    for choice in choices:
        smaller = copy.deepcopy(config)
        part = _part(smaller, path)
        for key in choice:
            setattr(part, key, type(values[key])(values[key][number] for number in kept))
        setattr(part, name, len(kept))
        yield smaller


def _part(config: PretrainedConfig, path: tuple[str, ...]) -> PretrainedConfig:
    for attribute in path:
        config = getattr(config, attribute)
    return config


def _build(model: PreTrainedModel, config: PretrainedConfig, weights: Mapping[str, Tensor]) -> PreTrainedModel | None:
    """A model of this configuration with these weights; None where they do not fit."""
    try:
        smaller = type(model)(_read_again(config))
    except Exception as error:  # of a configuration that contradicts itself, which each model notices in its own way
        logger.debug("no model of this configuration: %r", error)
        return None
    shapes = {name: tensor.shape for name, tensor in smaller.state_dict().items()}
    if shapes != {name: tensor.shape for name, tensor in weights.items()}:
        return None
    smaller.load_state_dict(weights, assign=True)
    smaller.tie_weights()
    if getattr(model, "generation_config", None) is not None:
        smaller.generation_config = copy.deepcopy(model.generation_config)
    return smaller.to(model.device).eval()  # pyright: ignore[reportArgumentType]


def _read_again(config: PretrainedConfig) -> PretrainedConfig:
    """The configuration as it is read from a file, without what was derived from the old number of layers."""
    values = {name: one for name, one in config.to_dict().items() if name not in _DERIVED}
    read = type(config).from_dict(values)
    read._attn_implementation = config._attn_implementation
    return read


def _tensors(outputs: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def _are_close(found: Sequence[Tensor], expected: Sequence[Tensor]) -> bool:
    return len(found) == len(expected) and all(map(_is_close, found, expected))


def _is_close(one: Tensor, other: Tensor) -> bool:
    """Whether two outputs are equal to rounding; masked values, infinite or as good as that, are masked in both."""
    if one.shape != other.shape:
        return False
    masked = ~(other.abs() < _MASKED)
    one, other = one.masked_fill(masked & ~(one.abs() < _MASKED), 0.0), other.masked_fill(masked, 0.0)
    return not other.numel() or bool((one - other).abs().max() <= _RELATIVE_TOLERANCE * other.abs().max())
