"""The plan of variants follows the published order of crops and drops."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cmp_trainer.ablations.plan import plan_variants, variant_names


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
    assert plan_variants(num_ablations, num_crops) == expected


@given(data=st.data(), num_ablations=st.integers(0, 9))
def test_each_ablation_removes_more_of_exactly_one_kind(data, num_ablations):
    num_crops = data.draw(st.integers(0, num_ablations))
    variants = plan_variants(num_ablations, num_crops)
    assert variants[-1] == (num_ablations - num_crops, num_crops)
    for before, after in itertools.pairwise(variants):
        assert sorted((after.drops - before.drops, after.crops - before.crops)) == [0, 1]


def test_every_variant_has_a_name():
    assert len(variant_names(3)) == len(plan_variants(3))


@pytest.mark.parametrize(("num_ablations", "num_crops"), [(1, 2), (2, -1)])
def test_impossible_plans_are_refused(num_ablations, num_crops):
    with pytest.raises(ValueError, match="expected 0 <= crops <= ablations"):
        plan_variants(num_ablations, num_crops)
