"""The plan of variants follows the published order of crops and drops."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cmp_trainer.ablations.crop import CmpCrop
from cmp_trainer.ablations.drop import CmpDrop
from cmp_trainer.ablations.plan import plan, variants_of
from cmp_trainer.ablations.protocol import Ablation


def plan_variants(num_ablations, num_crops=0):
    """(drops, crops) of every variant, and their names."""
    kinds, variants = variants_of(plan(num_ablations, num_crops))
    numbers = {type(kind): number for number, kind in enumerate(kinds)}

    def level(variant, kind):
        return variant.levels[numbers[kind]] if kind in numbers else 0

    return [(level(variant, CmpDrop), level(variant, CmpCrop)) for variant in variants], [v.name for v in variants]


@pytest.mark.parametrize(
    ("num_ablations", "num_crops", "expected"),
    [
        (0, 0, [(0, 0)]),
        (2, 0, [(0, 0), (1, 0), (2, 0)]),
        (2, 2, [(0, 0), (0, 1), (0, 2)]),
        (2, 1, [(0, 0), (0, 1), (1, 1)]),
        (4, 2, [(0, 0), (0, 1), (1, 1), (1, 2), (2, 2)]),
        (4, 1, [(0, 0), (0, 1), (1, 1), (2, 1), (3, 1)]),
        (4, 3, [(0, 0), (0, 1), (1, 1), (1, 2), (1, 3)]),
    ],
)
def test_crops_and_drops_take_turns_beginning_with_a_crop(num_ablations, num_crops, expected):
    assert plan_variants(num_ablations, num_crops)[0] == expected


@given(data=st.data(), num_ablations=st.integers(0, 9))
def test_each_ablation_removes_more_of_exactly_one_kind(data, num_ablations):
    num_crops = data.draw(st.integers(0, num_ablations))
    variants, _ = plan_variants(num_ablations, num_crops)
    assert variants[-1] == (num_ablations - num_crops, num_crops)
    for before, after in itertools.pairwise(variants):
        assert sorted((after[0] - before[0], after[1] - before[1])) == [0, 1]


def test_every_variant_has_a_name():
    assert plan_variants(3, 1)[1] == ["full", "ablated_1", "ablated_2", "ablated_3"]


def test_an_ablation_of_ones_own_is_called_by_its_name_and_level():
    class Heads(Ablation):
        name = "heads"

    heads = Heads()
    _, variants = variants_of([heads, CmpDrop(), heads])
    assert [(variant.name, variant.levels) for variant in variants] == [
        ("full", (0, 0)),
        ("heads_1", (1, 0)),
        ("ablated_2", (1, 1)),
        ("heads_2", (2, 1)),
    ]


def test_equal_ablations_are_one_kind_and_others_are_not():
    kinds, variants = variants_of([CmpDrop(), CmpDrop(), CmpDrop(base_rate=0.5)])
    assert kinds == [CmpDrop(), CmpDrop(base_rate=0.5)]
    assert variants[-1].levels == (2, 1)


@pytest.mark.parametrize(("num_ablations", "num_crops"), [(1, 2), (2, -1)])
def test_impossible_plans_are_refused(num_ablations, num_crops):
    with pytest.raises(ValueError, match="together at most as many as ablations"):
        plan_variants(num_ablations, num_crops)
