"""Comparative and regularized losses: parity with the published implementation, and what holds for all inputs."""

import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from cmp_trainer import ComparativeLoss, RegularizedLoss
from cmp_trainer.losses.comparative import (
    comparative_loss,
    minimized,
    primary_loss,
    regularized_loss,
    violation_rate,
)

GOLDEN = json.loads((Path(__file__).parent / "golden_losses.json").read_text())
BASELINES = ["zero", "first", "best", 0.7]
RANKINGS = ["pairwise", "listwise"]
PRIMARIES = ["max", "mean", "full", "last"]

finite_losses = arrays(
    "float64",
    array_shapes(min_dims=2, max_dims=2, min_side=2, max_side=6),
    elements=st.floats(0, 100, allow_subnormal=False),
).map(torch.from_numpy)


def assert_equal_to_1e_12(actual, expected):
    torch.testing.assert_close(actual, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-12)


def mean_objective(objective, losses, parts=1):
    """What is minimized for a mean loss: losses `(batch * parts, 1 + c)` of `parts` equal parts an example."""
    losses = losses.unflatten(0, (-1, parts))  # (batch, parts, 1 + c)
    weights = torch.full(losses.shape[:2], 1 / losses[..., 0].numel(), dtype=losses.dtype)
    return minimized(objective, losses * weights.unsqueeze(-1), weights)


@pytest.mark.parametrize("ranking", RANKINGS)
@pytest.mark.parametrize("case", GOLDEN["comparative"])
def test_comparative_loss_and_gradient_equal_the_published_ones(case, ranking):
    losses = torch.tensor(case["task_losses"], dtype=torch.float64, requires_grad=True)
    loss = comparative_loss(losses, baseline=case["baseline"], temperature=case["temperature"], ranking=ranking)
    loss.sum().backward()
    assert_equal_to_1e_12(loss.detach(), case["expected"][ranking]["loss"])
    assert_equal_to_1e_12(losses.grad, case["expected"][ranking]["grad"])


@pytest.mark.parametrize("ranking", RANKINGS)
@pytest.mark.parametrize("case", GOLDEN["comparative"])
def test_minimizing_the_comparative_objective_equals_the_published_mean_and_gradient(case, ranking):
    losses = torch.tensor(case["task_losses"], dtype=torch.float64, requires_grad=True)
    objective = ComparativeLoss(baseline=case["baseline"], temperature=case["temperature"], ranking=ranking)
    assert_equal_to_1e_12(objective(losses).detach(), case["expected"][ranking]["loss"])
    loss = mean_objective(objective, losses)
    loss.backward()
    expected = case["expected"][ranking]
    assert_equal_to_1e_12(loss.detach(), sum(expected["loss"]) / len(losses))
    assert_equal_to_1e_12(losses.grad * len(losses), expected["grad"])


@pytest.mark.parametrize("case", GOLDEN["regularized"])
def test_regularized_loss_equals_the_published_one(case):
    losses = torch.tensor(case["task_losses"], dtype=torch.float64)
    loss = regularized_loss(losses, primary=case["primary"], weight=case["weight"], ranking=case["ranking"])
    assert_equal_to_1e_12(loss, case["expected"])


@pytest.mark.parametrize("case", GOLDEN["regularized"])
def test_minimizing_the_regularized_objective_equals_the_published_mean(case):
    losses = torch.tensor(case["task_losses"], dtype=torch.float64)
    objective = RegularizedLoss(case["primary"], case["weight"], ranking=case["ranking"])
    assert_equal_to_1e_12(objective(losses), case["expected"])
    assert_equal_to_1e_12(mean_objective(objective, losses), sum(case["expected"]) / len(losses))


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


# Objectives as objects


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"baseline": "first"},
        {"baseline": "best", "margin": 0.3},
        {"baseline": 0.7, "temperature": 2.0},
        {"ranking": "listwise", "temperature": 0.5},
    ],
    ids=str,
)
@given(losses=finite_losses)
def test_the_comparative_objective_is_the_function_of_the_same_settings(losses, settings):
    assert torch.equal(ComparativeLoss(**settings)(losses), comparative_loss(losses, **settings))


@pytest.mark.parametrize(
    "settings",
    [
        {},
        *({"primary": primary, "weight": 0.5} for primary in PRIMARIES),
        {"weight": 0.0},
        {"threshold": 50.0, "margin": 0.3},
        {"ranking": "listwise", "temperature": 2.0},
    ],
    ids=str,
)
@given(losses=finite_losses)
def test_the_regularized_objective_is_the_function_of_the_same_settings(losses, settings):
    objective, expected = RegularizedLoss(**settings), regularized_loss(losses, **settings)
    assert torch.equal(objective(losses), expected)
    torch.testing.assert_close(mean_objective(objective, losses), expected.mean())


def test_objectives_of_equal_settings_are_equal():
    assert ComparativeLoss(baseline="first") == ComparativeLoss("first") != ComparativeLoss()
    assert RegularizedLoss("mean", 0.5) == RegularizedLoss(primary="mean", weight=0.5) != RegularizedLoss("mean")


def test_defaults_of_the_objects_are_those_of_the_functions():
    losses = torch.tensor([[1.0, 0.4, 0.9], [0.2, 0.3, 0.1]])
    assert torch.equal(ComparativeLoss()(losses), comparative_loss(losses))
    assert torch.equal(RegularizedLoss()(losses), regularized_loss(losses))


def test_an_objective_of_ones_own_is_weighted_as_the_shares_are():
    losses = torch.tensor([[[1.0, 2.0]], [[3.0, 5.0]], [[7.0, 7.0]]])
    weights = torch.tensor([[0.25], [0.75], [0.0]])  # the last example has no label
    found = minimized(lambda losses: losses[..., 1] - losses[..., 0], losses * weights.unsqueeze(-1), weights)
    torch.testing.assert_close(found, torch.tensor(0.25 * 1 + 0.75 * 2))


@pytest.mark.parametrize("objective", [ComparativeLoss("first"), ComparativeLoss(ranking="listwise")], ids=str)
def test_examples_without_a_label_count_nothing_and_make_no_nan(objective):
    losses = torch.tensor([[[0.5, 0.2, 0.9]], [[3.0, 1.0, 2.0]]], requires_grad=True)
    weights = torch.tensor([[1.0], [0.0]])
    found = minimized(objective, losses * weights.unsqueeze(-1), weights)
    found.backward()
    torch.testing.assert_close(found, objective(losses[0, 0]))
    assert losses.grad is not None and losses.grad.isfinite().all()
    assert (losses.grad[1] == 0).all()


# Start and end of an answer: the primary loss is that of the whole example, the parts are ranked separately.

ANSWERS = torch.tensor(
    [  # (batch, start and end, 1 + c)
        [[0.2, 1.0, 0.4], [1.6, 0.1, 0.8]],
        [[0.9, 0.5, 0.7], [0.3, 0.3, 2.3]],
        [[2.0, 2.5, 0.0], [0.0, 0.1, 3.0]],
    ],
    dtype=torch.float64,
)
WHOLE = (ANSWERS[:, 0] + ANSWERS[:, 1]) / 2  # (batch, 1 + c), as a model averages its start and end loss
PRIMARY_OF_WHOLE = {
    "max": WHOLE.amax(-1),
    "mean": WHOLE.mean(-1),
    "full": WHOLE[:, 0],
    "last": WHOLE[:, -1],
}


@pytest.mark.parametrize("primary", PRIMARIES)
def test_the_primary_loss_is_that_of_start_and_end_together(primary):
    found = mean_objective(RegularizedLoss(primary, weight=0.0), ANSWERS.flatten(0, 1), parts=2)
    torch.testing.assert_close(found, PRIMARY_OF_WHOLE[primary].mean())


def test_the_largest_loss_of_an_answer_is_not_the_mean_of_the_largest_of_its_parts():
    found = mean_objective(RegularizedLoss("max", weight=0.0), ANSWERS.flatten(0, 1), parts=2)
    assert found < primary_loss(ANSWERS, "max").mean() - 0.1


@pytest.mark.parametrize("primary", PRIMARIES)
def test_only_the_variant_that_is_primary_is_pulled_down(primary):
    losses = ANSWERS.clone().requires_grad_()
    mean_objective(RegularizedLoss(primary, weight=0.0), losses.flatten(0, 1), parts=2).backward()
    expected = torch.zeros_like(ANSWERS)
    for example, whole in enumerate(WHOLE):
        chosen = {"max": [int(whole.argmax())], "mean": [0, 1, 2], "full": [0], "last": [2]}[primary]
        expected[example, :, chosen] = 1 / (6 * len(chosen))
    torch.testing.assert_close(losses.grad, expected)


@pytest.mark.parametrize("ranking", RANKINGS)
@pytest.mark.parametrize("primary", PRIMARIES)
def test_start_and_end_are_ranked_separately(primary, ranking):
    found = mean_objective(RegularizedLoss(primary, 0.5, ranking=ranking), ANSWERS.flatten(0, 1), parts=2)
    ranked = regularized_loss(ANSWERS, primary="full", weight=1.0, ranking=ranking) - ANSWERS[..., 0]
    torch.testing.assert_close(found, PRIMARY_OF_WHOLE[primary].mean() + 0.5 * ranked.mean())


@pytest.mark.parametrize("baseline", BASELINES)
def test_start_and_end_are_compared_separately(baseline):
    found = mean_objective(ComparativeLoss(baseline), ANSWERS.flatten(0, 1), parts=2)
    torch.testing.assert_close(found, comparative_loss(ANSWERS, baseline=baseline).mean())


@pytest.mark.parametrize("primary", PRIMARIES)
@pytest.mark.parametrize("above", [True, False])
def test_the_threshold_is_held_against_the_mean_primary_loss_of_whole_answers(primary, above):
    threshold = PRIMARY_OF_WHOLE[primary].mean().item() + (-0.01 if above else 0.01)
    found = mean_objective(RegularizedLoss(primary, threshold=threshold), ANSWERS.flatten(0, 1), parts=2)
    expected = mean_objective(RegularizedLoss(primary, weight=0.0 if above else 1.0), ANSWERS.flatten(0, 1), parts=2)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("objective", [ComparativeLoss("best"), RegularizedLoss("max", 0.5)], ids=str)
def test_what_is_minimized_follows_the_weights_of_the_examples(objective):
    weights = torch.tensor([[1.0, 1.0], [3.0, 3.0], [2.0, 2.0]], dtype=torch.float64)
    found = minimized(objective, ANSWERS * weights.unsqueeze(-1), weights)
    alone = [minimized(objective, ANSWERS[row, None], torch.ones(1, 2)) for row in range(3)]
    torch.testing.assert_close(found, alone[0] + 3 * alone[1] + 2 * alone[2])


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
