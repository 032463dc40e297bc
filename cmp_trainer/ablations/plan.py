"""Which variants of the model one training step compares.

Variant 0 is the full model. Each of the c ablations starts from the variant before it and removes more of ONE kind:
one more cumulative dropout (CmpDrop) or one more cut of the input context (CmpCrop). With both kinds they take turns
as in the published runs: crop, drop, crop, drop, … until one kind is used up, then the rest of the other.

Source: https://doi.org/10.1145/3652599 and its published implementation.
"""

from typing import NamedTuple


class Variant(NamedTuple):
    """One variant: how many cumulative drops and how many crops it has been through."""

    drops: int
    crops: int


def plan_variants(num_ablations: int, num_crops: int = 0) -> list[Variant]:
    """The full model and its `num_ablations` ablations, from least to most ablated.

    Args:
        num_ablations: c, how many ablated variants are compared with the full model.
        num_crops: how many of the c are crops; the others are drops.

    Raises:
        ValueError: a negative number, or more crops than ablations.

    Examples:
        >>> plan_variants(3, num_crops=1)
        [Variant(drops=0, crops=0), Variant(drops=0, crops=1), Variant(drops=1, crops=1), Variant(drops=2, crops=1)]
    """
    if not 0 <= num_crops <= num_ablations:
        raise ValueError(f"{num_crops} crops of {num_ablations} ablations; expected 0 <= crops <= ablations.")
    num_drops = num_ablations - num_crops
    variants = [Variant(drops=0, crops=0)]
    for index in range(num_ablations):
        drops, crops = variants[-1]
        if crops < num_crops and (index % 2 == 0 or drops == num_drops):
            variants.append(Variant(drops, crops + 1))
        else:
            variants.append(Variant(drops + 1, crops))
    return variants


def variant_names(num_ablations: int) -> list[str]:
    """What the variants are called in logs and messages.

    Examples:
        >>> variant_names(2)
        ['full', 'ablated_1', 'ablated_2']
    """
    return ["full", *(f"ablated_{index}" for index in range(1, num_ablations + 1))]
