"""Shares: each example's part of any loss is right, or the loss is rejected with the reason."""

import inspect

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from cmp_trainer import CmpDrop, ComparativeStep, RegularizedLoss
from cmp_trainer.losses.reductions import _LOSSES
from tests.helpers import gradients

FULL_ALONE = RegularizedLoss(primary="full", weight=0.0)


class Small(nn.Module):
    """Vectors (batch, 6) to logits (batch, 3), or (batch, 4, 3) of four positions."""

    def __init__(self, positions=0):
        super().__init__()
        torch.manual_seed(0)
        self.positions = positions
        self.body = nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Dropout(0.3))
        self.norm = nn.LayerNorm(12)
        self.head = nn.Linear(12, 3 * max(positions, 1))

    def forward(self, inputs):
        logits = self.head(self.norm(self.body(inputs)))
        return logits.view(len(inputs), self.positions, 3) if self.positions else logits


def batch(rows=5, positions=0, seed=1):
    draws = torch.Generator().manual_seed(seed)
    labels = torch.randint(3, (rows, positions) if positions else (rows,), generator=draws)
    return {"inputs": torch.randn(rows, 6, generator=draws), "labels": labels}


def losses_seen(loss_fn, given, model=None, **settings):
    """The full model's losses that the objective sees, (batch,), and the loss of the full model alone."""
    model = (model or Small()).train()
    seen = []

    def objective(losses):
        seen.append(losses.detach())
        return losses[..., 0]

    step = ComparativeStep(model, [CmpDrop()], objective, forward="sequential", **settings)
    loss = step(given, loss_fn)
    loss.backward()
    return seen[-1][:, :, 0].sum(1), loss.detach(), gradients(model)


def expected_of(loss_fn, given, model=None):
    model = (model or Small()).eval()
    loss = loss_fn(model, given)
    loss.backward()
    return loss.detach(), gradients(model)


def check(loss_fn, given, expected_losses, make_model=Small):
    """Losses of the examples, and promise 10."""
    losses, loss, found = losses_seen(loss_fn, given, make_model())
    own_loss, own = expected_of(loss_fn, given, make_model())
    torch.testing.assert_close(loss, own_loss, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found, own, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(losses, expected_losses(make_model().eval()).detach(), rtol=1e-4, atol=1e-5)


def each(model, given):
    return F.cross_entropy(model(given["inputs"]), given["labels"], reduction="none")


def plain(model, given):
    return F.cross_entropy(model(given["inputs"]), given["labels"])


def mean_of(model, given):
    return each(model, given).mean()


def sum_over_count(model, given):
    return each(model, given).sum() / len(given["labels"])


def stacked_loop(model, given):
    logits = model(given["inputs"])
    return torch.stack(
        [F.cross_entropy(one, label) for one, label in zip(logits, given["labels"], strict=True)]
    ).mean()


def columns_first(model, given):
    squares = (model(given["inputs"]) - F.one_hot(given["labels"], 3)).square()
    return squares.mean(0).sum()


@pytest.mark.parametrize("loss_fn", [plain, mean_of, sum_over_count, stacked_loop], ids=lambda one: one.__name__)
def test_a_mean_is_read_however_it_is_written(loss_fn):
    check(loss_fn, batch(), lambda model: each(model, batch()))


def test_a_mean_over_the_rows_first_is_read():
    def expected(model):
        return (model(batch()["inputs"]) - F.one_hot(batch()["labels"], 3)).square().mean(1)

    check(columns_first, batch(), lambda model: 3 * expected(model) / 3)


@pytest.mark.parametrize("name", sorted(func.__name__ for func in _LOSSES if "label" not in func.__name__))
def test_reductions_of_every_loss_function_keep_the_loss(name):
    function = getattr(F, name)
    names = list(inspect.signature(function).parameters)
    if name in ("ctc_loss", "linear_cross_entropy", "multi_margin_loss", "nll_loss", "cross_entropy"):
        pytest.skip("other shapes; tested elsewhere")
    given = batch()

    def loss_fn(model, given):
        logits = model(given["inputs"])
        target = F.one_hot(given["labels"], 3).float()
        if name == "gaussian_nll_loss":
            return function(logits, target, torch.ones_like(target))
        if name == "margin_ranking_loss":
            return function(logits, logits.flip(1), target * 2 - 1)
        if name == "cosine_embedding_loss":
            return function(logits, target, torch.ones(len(logits)))
        if name.startswith("triplet"):
            return function(logits, target, 1 - target)
        if name in ("hinge_embedding_loss", "soft_margin_loss"):
            return function(logits, target * 2 - 1)
        if name == "binary_cross_entropy":
            return function(logits.sigmoid(), target)
        return function(logits, target)

    assert "reduction" in names
    _, loss, found = losses_seen(loss_fn, given)
    own_loss, own = expected_of(loss_fn, given)
    torch.testing.assert_close(loss, own_loss)
    torch.testing.assert_close(found, own, rtol=1e-4, atol=1e-6)


def test_class_weights_and_ignored_labels_are_those_of_the_loss():
    weight = torch.tensor([1.0, 4.0, 2.0])
    given = batch()
    given["labels"][2] = -100

    def weighted(model, given):
        return F.cross_entropy(model(given["inputs"]), given["labels"], weight=weight)

    def expected(model):
        losses = F.cross_entropy(model(given["inputs"]), given["labels"], reduction="none")
        return losses

    check(weighted, given, expected)


# What a first sketch got wrong without a word.


@pytest.mark.parametrize("penalty", ["norm", "bias", "ones"])
def test_a_penalty_on_weights_of_equal_value_belongs_to_no_example(penalty):
    def make():
        model = Small()
        nn.init.zeros_(model.head.bias)
        model.matrix = nn.Parameter(torch.ones(5, 3))
        return model

    def loss_fn(model, given):
        weights = {"norm": model.norm.weight, "bias": model.head.bias, "ones": model.matrix}[penalty]
        return plain(model, given) + 0.5 * (weights.square()).mean()

    check(loss_fn, batch(), lambda model: each(model, batch()), make)


def test_a_penalty_on_activations_by_row_is_added_once_and_not_compared():
    def loss_fn(model, given):
        hidden = model.norm(model.body(given["inputs"]))
        return F.cross_entropy(model(given["inputs"]), given["labels"]) + 0.1 * hidden.square().mean()

    check(loss_fn, batch(), lambda model: each(model, batch()))


@pytest.mark.parametrize("positions", [4, 5])
def test_time_major_losses_belong_to_their_rows_also_with_a_zero_head(positions):
    def make():
        model = Small(positions)
        nn.init.zeros_(model.head.weight)
        return model

    given = batch(5, positions)

    def loss_fn(model, given):
        logits, labels = model(given["inputs"]).transpose(0, 1), given["labels"].T
        return F.cross_entropy(logits.reshape(-1, 3), labels.reshape(-1))

    def expected(model):
        losses = F.cross_entropy(model(given["inputs"]).transpose(1, 2), given["labels"], reduction="none")
        return losses.mean(1)

    check(loss_fn, given, expected, make)


def test_picked_elements_with_equal_counts_at_first_and_unequal_ones_later():
    model = Small(4).train()
    seen = []

    def objective(losses):
        seen.append(losses.detach())
        return losses[..., 0]

    def loss_fn(model, given):
        keep = given["labels"] != -100
        return F.cross_entropy(model(given["inputs"])[keep], given["labels"][keep])

    step = ComparativeStep(model, [CmpDrop()], objective, forward="sequential")
    for ignored in ([(0, 0), (1, 1), (2, 2)], [(0, 0), (0, 1), (0, 2)]):
        given = batch(3, 4)
        for row, column in ignored:
            given["labels"][row, column] = -100
        step(given, loss_fn)
        losses = F.cross_entropy(model.eval()(given["inputs"]).transpose(1, 2), given["labels"], reduction="none")
        expected = losses.sum(1) / (given["labels"] != -100).sum(1)
        torch.testing.assert_close(seen[-1][:, 0, 0], expected.detach())
        model.train()


def rejected(loss_fn, given=None, make_model=Small):
    step = ComparativeStep(make_model().train(), [CmpDrop()], FULL_ALONE, forward="sequential")
    with pytest.raises(ValueError) as caught:
        step(given or batch(), loss_fn)
    return str(caught.value)


def test_elements_sorted_by_something_else_are_rejected_or_right():
    given = batch(5, 4)
    order = torch.tensor([3, 0, 4, 1, 2])

    def loss_fn(model, given):
        logits, labels = model(given["inputs"])[order], given["labels"][order]
        return F.cross_entropy(logits.reshape(-1, 3), labels.reshape(-1))

    assert "single examples" in rejected(loss_fn, given, lambda: Small(4))


def test_a_loss_between_neighbouring_rows_is_rejected():
    def loss_fn(model, given):
        logits = model(given["inputs"])
        return (logits - logits.roll(1, 0)).square().mean()

    assert "single examples" in rejected(loss_fn)


class Fused(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, labels):
        ctx.save_for_backward(logits, labels)
        return -logits.log_softmax(-1)[torch.arange(len(labels)), labels].mean()

    @staticmethod
    def backward(ctx, gradient):
        logits, labels = ctx.saved_tensors
        return gradient * (logits.softmax(-1) - F.one_hot(labels, 3)) / len(labels), None


def test_a_fused_loss_beside_a_small_penalty_that_is_seen_is_rejected():
    def loss_fn(model, given):
        logits = model(given["inputs"])
        return Fused.apply(logits, given["labels"]) + 1e-3 * logits.square().mean()

    assert "per_example_loss_func" in rejected(loss_fn)


@pytest.mark.parametrize("curve", [torch.sqrt, torch.log, lambda loss: loss * loss], ids=["root", "log", "square"])
def test_a_loss_that_is_no_weighted_sum_of_the_examples_is_rejected(curve):
    assert "not a weighted sum" in rejected(lambda model, given: curve(plain(model, given)))


def test_the_product_of_two_reductions_is_rejected():
    assert "not a weighted sum" in rejected(lambda model, given: plain(model, given) * each(model, given).mean())


def test_losses_weighted_by_their_own_share_are_counted_once():
    def loss_fn(model, given):
        losses = each(model, given)
        return (losses / losses.sum() * losses).sum()

    _, loss, found = losses_seen(loss_fn, batch())
    own_loss, own = expected_of(loss_fn, batch())
    torch.testing.assert_close(loss, own_loss)
    torch.testing.assert_close(found, own)


def test_a_batch_of_one_row_is_one_example():
    check(plain, batch(1), lambda model: each(model, batch(1)))


def test_losses_without_a_graph_are_those_with_one():
    model, given = Small().train(), batch()
    step = ComparativeStep(model, [CmpDrop()], forward="sequential")
    for _ in range(2):
        found = step.losses(given, plain).values[:, 0, 0]
        torch.testing.assert_close(found, each(model.eval(), given))
        model.train()
        step(given, plain)


def test_a_mean_of_many_small_elements_in_half_precision_is_not_lost():
    class Wide(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.drop = nn.Parameter(torch.ones(300_000, dtype=torch.float16)), nn.Dropout(0.1)

        def forward(self, inputs):
            return self.drop(inputs * self.weight)

    given = {"inputs": torch.full((2, 300_000), 1e-2, dtype=torch.float16)}
    losses, loss, _ = losses_seen(lambda model, given: model(given["inputs"]).square().mean(), given, Wide())
    torch.testing.assert_close(loss.float(), torch.tensor(1e-4), rtol=2e-2, atol=0)
    torch.testing.assert_close(losses.float(), torch.full((2,), 1e-4), rtol=2e-2, atol=0)


def test_pairs_of_rows_are_one_example_each():
    def loss_fn(model, given):
        chosen, rejected_ones = model(given["inputs"])[:, 0].chunk(2)
        return -F.logsigmoid(chosen - rejected_ones).mean()

    given = {"inputs": batch(6)["inputs"]}

    def expected(model):
        chosen, rejected_ones = model(given["inputs"])[:, 0].chunk(2)
        return -F.logsigmoid(chosen - rejected_ones)

    check(loss_fn, given, expected)


def test_learned_weights_of_several_losses_are_kept():
    def make():
        model = Small()
        model.scale = nn.Parameter(torch.tensor([0.3, -0.2]))
        return model

    def loss_fn(model, given):
        squares = (model(given["inputs"]) - F.one_hot(given["labels"], 3)).square().mean()
        return (-model.scale[0]).exp() * plain(model, given) + (-model.scale[1]).exp() * squares + model.scale.sum()

    _, loss, found = losses_seen(loss_fn, batch(), make())
    own_loss, own = expected_of(loss_fn, batch(), make())
    torch.testing.assert_close(loss, own_loss)
    torch.testing.assert_close(found, own, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("left_over", [{}, {"labels": torch.tensor([0, 1, 2, 0, 1, 2])}], ids=["", "unused labels"])
def test_in_batch_negatives_are_compared_and_that_is_said(left_over, caplog):
    def loss_fn(model, given):
        anchors, positives = model(given["inputs"]), model(given["inputs"] * 1.1)
        return F.cross_entropy(anchors @ positives.T, torch.arange(len(anchors)))

    given = {"inputs": batch()["inputs"], **left_over}
    _, loss, found = losses_seen(loss_fn, given)
    own_loss, own = expected_of(loss_fn, given)
    torch.testing.assert_close(loss, own_loss)
    torch.testing.assert_close(found, own, rtol=1e-4, atol=1e-6)
    assert "also depends on other rows of the batch" in caplog.text
