"""CmpSkip: ablate whole layers, more and more of them.

A skipped layer passes its input through. Level k leaves out n(k) layers of the model's stack, n(1) < n(2) < …; what is
skipped at level k is skipped at level k + 1, and the first layer always runs. What stands above the stack sees the
output of the last layer that ran, so with no other ablation a variant computes what a model built without these layers
computes. `cmp-trainer shrink` writes such a model.

The stack is found by watching one forward (execution/layers.py).
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar, Literal, get_args

import torch

from cmp_trainer.ablations.protocol import Ablation

SkipOrder = Literal["random", "top"]


@dataclass(frozen=True)
class CmpSkip(Ablation):
    """Skipped layers: level k leaves out the first n(k) layers of an order, level 0 is the full model.

    Args:
        layers: n(1), n(2), …, how many layers each level skips. By default k / (k + 2) of them, rounded, and at least
            one more than the level before: a third, a half, three fifths, ….
        order: which layers are skipped: `"random"`, in an order drawn for each batch; or `"top"`, the topmost first,
            with which the variants share one forward up to their last layer.

    Raises:
        ValueError: an unknown order, or numbers of layers that are not increasing positive integers.

    Examples:
        >>> [CmpSkip().count(level, num_layers=6) for level in range(4)]
        [0, 2, 3, 4]
        >>> sorted(CmpSkip(layers=(1, 2), order="top").skipped_layers(2, num_layers=6))
        [4, 5]
    """

    layers: tuple[int, ...] | None = None
    order: SkipOrder = "random"
    skips_layers: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.order not in get_args(SkipOrder):
            raise ValueError(f"CmpSkip: order {self.order!r} is unknown; expected one of {get_args(SkipOrder)}.")
        counts = (0, *(self.layers or ()))
        if self.layers is not None and (len(counts) == 1 or any(more <= fewer for fewer, more in pairwise(counts))):
            raise ValueError(
                f"CmpSkip: layers {tuple(self.layers)} are not increasing positive integers such as (2, 3)."
            )

    def count(self, level: int, num_layers: int) -> int:
        """How many of `num_layers` layers are skipped at a level.

        Raises:
            ValueError: no layer would be left, or there are fewer numbers of layers than levels.
        """
        if self.layers is not None:
            if level > len(self.layers):
                raise ValueError(f"skip {level} needs a number of layers, but there are only {self.layers}.")
            counts = [0, *self.layers]
        else:
            counts = [0]
            for k in range(1, level + 1):
                counts.append(max(counts[-1] + 1, round(num_layers * k / (k + 2))))
        if counts[level] >= num_layers:
            raise ValueError(
                f"{counts[level]} of {num_layers} layers cannot be skipped, since the first one always runs; skip at "
                f"most {num_layers - 1}."
            )
        return counts[level]

    def skipped_layers(self, level: int, num_layers: int) -> Collection[int]:
        """The indices of the layers that are skipped at a level."""
        skipped = self.count(level, num_layers)
        if self.order == "top":
            return range(num_layers - skipped, num_layers)
        order = 1 + torch.randperm(num_layers - 1)  # the same draw at every level, 0 included
        return order[:skipped].tolist()


class SkipLayers(Ablation):
    """Level 1 leaves out the given layers.

    Args:
        layers: their indices, from 0 on.
    """

    skips_layers = True

    def __init__(self, layers: Collection[int]) -> None:
        self.layers = layers

    def skipped_layers(self, level: int, num_layers: int) -> Collection[int]:
        """The layers, from level 1 on."""
        return self.layers if level else ()
