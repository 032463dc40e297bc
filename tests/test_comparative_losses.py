"""Comparative and regularized losses: parity with the published implementation, and what holds for all inputs."""

import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from cmp_trainer.losses.comparative import comparative_loss, regularized_loss, violation_rate

GOLDEN = json.loads((Path(__file__).parent / "golden_losses.json").read_text())
BASELINES = ["zero", "first", "best", 0.7]
RANKINGS = ["pairwise", "listwise"]

finite_losses = arrays(
    "float64",
    array_shapes(min_dims=2, max_dims=2, min_side=2, max_side=6),
    elements=st.floats(0, 100, allow_subnormal=False),
).map(torch.from_numpy)


def assert_equal_to_1e_12(actual, expected):
    torch.testing.assert_close(actual, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-12)


@pytest.mark.parametrize("ranking", RANKINGS)
@pytest.mark.parametrize("case", GOLDEN["comparative"])
def test_comparative_loss_and_gradient_equal_the_published_ones(case, ranking):
    losses = torch.tensor(case["task_losses"], dtype=torch.float64, requires_grad=True)
    loss = comparative_loss(losses, baseline=case["baseline"], temperature=case["temperature"], ranking=ranking)
    loss.sum().backward()
    assert_equal_to_1e_12(loss.detach(), case["expected"][ranking]["loss"])
    assert_equal_to_1e_12(losses.grad, case["expected"][ranking]["grad"])


@pytest.mark.parametrize("case", GOLDEN["regularized"])
def test_regularized_loss_equals_the_published_one(case):
    losses = torch.tensor(case["task_losses"], dtype=torch.float64)
    loss = regularized_loss(losses, primary=case["primary"], weight=case["weight"], ranking=case["ranking"])
    assert_equal_to_1e_12(loss, case["expected"])


def test_golden_file_has_all_168_cases():
    assert len(GOLDEN["comparative"]) + len(GOLDEN["regularized"]) == 168


@pytest.mark.parametrize("baseline", BASELINES)
@given(losses=finite_losses)
def test_pairwise_loss_is_never_negative(losses, baseline):
    assert (comparative_loss(losses, baseline=baseline) >= 0).all()


@given(losses=finite_losses)
def test_pairwise_loss_with_zero_baseline_vanishes_only_where_all_losses_are_zero(losses):
    vanishes = comparative_loss(losses) == 0
    assert torch.equal(vanishes, (losses == 0).all(-1))


@pytest.mark.parametrize("ranking", RANKINGS)
@pytest.mark.parametrize("baseline", BASELINES)
@given(losses=finite_losses, seed=st.integers(0, 2**16))
def test_order_of_the_batch_does_not_matter(losses, seed, baseline, ranking):
    order = torch.randperm(len(losses), generator=torch.Generator().manual_seed(seed))
    loss = comparative_loss(losses, baseline=baseline, ranking=ranking)
    torch.testing.assert_close(comparative_loss(losses[order], baseline=baseline, ranking=ranking), loss[order])


@pytest.mark.parametrize("ranking", RANKINGS)
@pytest.mark.parametrize("baseline", BASELINES)
@given(losses=finite_losses)
def test_an_example_depends_on_its_own_losses_only(losses, baseline, ranking):
    losses = losses.clone().requires_grad_()
    comparative_loss(losses, baseline=baseline, ranking=ranking)[0].backward()
    assert losses.grad is not None
    assert (losses.grad[1:] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@given(losses=finite_losses)
def test_losses_of_16_bit_are_computed_in_float32(losses, dtype):
    narrow = losses.to(dtype)
    for function in (comparative_loss, regularized_loss):
        loss = function(narrow)
        assert loss.dtype == torch.float32
        assert torch.equal(loss, function(narrow.float()))


@pytest.mark.parametrize("ranking", RANKINGS)
@pytest.mark.parametrize("baseline", BASELINES)
@pytest.mark.parametrize("row", [[math.inf, 1.0, 1.0], [1.0, math.inf, 1.0], [math.inf] * 3, [1.0, 1.0, math.inf]])
def test_an_infinite_task_loss_gives_an_infinite_loss_and_touches_no_other_example(row, baseline, ranking):
    loss = comparative_loss(torch.tensor([row, [0.5, 0.6, 0.7]]), baseline=baseline, ranking=ranking)
    assert loss[0] == math.inf
    assert loss[1].isfinite()


@pytest.mark.parametrize("ranking", RANKINGS)
def test_a_nan_task_loss_stays_visible(ranking):
    loss = comparative_loss(torch.tensor([[math.nan, 1.0], [1.0, math.nan], [1.0, 2.0]]), ranking=ranking)
    assert loss.isnan().tolist() == [True, True, False]


@pytest.mark.parametrize("ranking", RANKINGS)
@pytest.mark.parametrize("function", [comparative_loss, regularized_loss])
def test_huge_losses_make_no_nan(function, ranking):
    loss = function(torch.tensor([[3e38, 0.0, 3e38], [0.0, 3e38, 1e38]]), ranking=ranking)
    assert not loss.isnan().any()


@given(losses=finite_losses)
def test_a_margin_asks_for_more_than_order(losses):
    assert (comparative_loss(losses, margin=0.5) >= comparative_loss(losses)).all()


@given(losses=finite_losses, temperature=st.floats(0.5, 4))
def test_temperature_divides_losses_and_numeric_baseline(losses, temperature):
    loss = comparative_loss(losses, baseline=0.7, temperature=temperature)
    torch.testing.assert_close(loss, comparative_loss(losses, baseline=0.7) / temperature)


def test_the_baseline_has_no_gradient():
    losses = torch.tensor([[0.1, 0.9]], dtype=torch.float64, requires_grad=True)  # well ordered
    comparative_loss(losses, baseline="best").sum().backward()
    # Pairs (0, dummy) at a tie and (1, dummy): each pulls down by a third, nothing flows into the dummy.
    torch.testing.assert_close(losses.grad, torch.full((1, 2), 1 / 3, dtype=torch.float64))


@pytest.mark.parametrize(("threshold", "counts"), [(1.1, True), (0.5, False)])
def test_ranking_counts_only_below_the_threshold(threshold, counts):
    losses = torch.tensor([[1.2, 0.4], [0.6, 0.4]])  # primary (mean) 0.8 and 0.5, batch mean 0.65
    gated = regularized_loss(losses, primary="mean", threshold=threshold)
    expected = regularized_loss(losses, primary="mean", weight=1.0 if counts else 0.0)
    torch.testing.assert_close(gated, expected)


def test_violation_rate_counts_pairs_in_the_wrong_order():
    rates = violation_rate(torch.tensor([[3.0, 2.0, 1.0], [1.0, 1.0, 1.0], [1.0, 3.0, 2.0]]))
    torch.testing.assert_close(rates, torch.tensor([1.0, 0.0, 1 / 3]))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"baseline": "worst"}, "baseline 'worst' is unknown"),
        ({"ranking": "triplet"}, "ranking 'triplet' is unknown"),
        ({"temperature": 0.0}, "temperature 0.0 has to be positive"),
        ({"margin": -1.0}, "margin -1.0"),
        ({"margin": 1.0, "ranking": "listwise"}, "listwise ranking, which has none"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        comparative_loss(torch.ones(2, 3), **arguments)


def test_a_single_variant_cannot_be_compared():
    with pytest.raises(ValueError, match="at least one ablation"):
        comparative_loss(torch.ones(4, 1))
