"""Which variants of the model one training step compares.

Variant 0 is the full model. Each of the c ablations starts from the variant before it and removes more of ONE kind:
one more cumulative dropout (CmpDrop), one more cut of the input context (CmpCrop), more layers left out (CmpSkip), or
whatever an ablation of one's own takes away. A variant is a level of every kind.

Source: https://doi.org/10.1145/3652599 and its published implementation.
"""

from collections.abc import Sequence
from typing import NamedTuple

from cmp_trainer.ablations.crop import CmpCrop
from cmp_trainer.ablations.drop import CmpDrop
from cmp_trainer.ablations.protocol import Ablation
from cmp_trainer.ablations.skip import CmpSkip


class Variant(NamedTuple):
    """One variant: its name in logs, and its level of every kind."""

    name: str
    levels: tuple[int, ...]


def plan(
    num_ablations: int,
    num_crops: int = 0,
    drop: Ablation | None = None,
    crop: Ablation | None = None,
    *,
    num_skips: int = 0,
    skip: Ablation | None = None,
) -> list[Ablation]:
    """The ablations of a run, in the published order: crop, drop, crop, drop, … until one kind is used up, then the
    rest of the other. Skips take their turn after the drops.

    Args:
        num_ablations: c, how many ablated variants are compared with the full model.
        num_crops, num_skips: how many of the c are crops, and how many skip layers; the others are drops.
        drop, crop, skip: what they are; `CmpDrop()`, `CmpCrop()` and `CmpSkip()` by default.

    Raises:
        ValueError: a negative number, or more crops and skips than ablations.

    Examples:
        >>> [type(ablation).__name__ for ablation in plan(3, num_crops=1)]
        ['CmpCrop', 'CmpDrop', 'CmpDrop']
        >>> [type(ablation).__name__ for ablation in plan(4, num_skips=2)]
        ['CmpDrop', 'CmpSkip', 'CmpDrop', 'CmpSkip']
    """
    if min(num_crops, num_skips, num_ablations - num_crops - num_skips) < 0:
        raise ValueError(
            f"{num_crops} crops and {num_skips} skips of {num_ablations} ablations; expected 0 or more of each, "
            "together at most as many as ablations."
        )
    kinds = (crop or CmpCrop(), drop or CmpDrop(), skip or CmpSkip())
    numbers = (num_crops, num_ablations - num_crops - num_skips, num_skips)
    turns = [(turn, kind) for kind, number in zip(kinds, numbers, strict=True) for turn in range(number)]
    return [ablation for _, ablation in sorted(turns, key=lambda one: one[0])]


def variants_of(ablations: Sequence[Ablation]) -> tuple[list[Ablation], list[Variant]]:
    """The distinct kinds among the ablations, and the full model and its variants, from least to most ablated.

    Raises:
        ValueError: two variants would have the same name.

    Examples:
        >>> kinds, variants = variants_of(plan(3, num_crops=1))
        >>> [(variant.name, variant.levels) for variant in variants]
        [('full', (0, 0)), ('ablated_1', (1, 0)), ('ablated_2', (1, 1)), ('ablated_3', (1, 2))]
    """
    kinds: list[Ablation] = []
    for ablation in ablations:
        if ablation not in kinds:
            kinds.append(ablation)
    levels = [0] * len(kinds)
    variants = [Variant("full", tuple(levels))]
    for number, ablation in enumerate(ablations, start=1):
        kind = kinds.index(ablation)
        levels[kind] += 1
        number = number if ablation.name == Ablation.name else levels[kind]
        variants.append(Variant(f"{ablation.name}_{number}", tuple(levels)))
    names = [kind.name for kind in kinds if kind.name != Ablation.name]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(
                f"{names.count(name)} ablations are named {name!r}; pass one object several times for more levels of "
                "it, or give different ablations different names."
            )
    return kinds, variants
