"""examples/prf: the loss over the training pool, against the formula written out, and its chunks."""

import doctest

import evaluation
import numpy as np
import pool_loss
import pytest
import scipy.sparse as sp
import torch
from pool_loss import PoolLoss

POOL, DIMENSION = 23, 6
LABELS = torch.tensor([[[3, -100, -100]], [[0, 22, 7]], [[9, 10, -100]]])  # (batch, 1, positives)


def pool() -> np.ndarray:
    values = np.random.default_rng(0).normal(size=(POOL, DIMENSION)).astype(np.float32)
    return np.where(values > -0.5, values, 0.0).astype(np.float32)


def queries() -> torch.Tensor:
    return torch.randn(3, DIMENSION, generator=torch.Generator().manual_seed(1)).requires_grad_()


def written_out(vectors: np.ndarray, query: torch.Tensor, positives: list[int]) -> torch.Tensor:
    scores = torch.from_numpy(vectors) @ query
    target = scores[positives].min()
    negatives = [scores[row] for row in range(POOL) if row not in positives]
    return -torch.log(target.exp() / (target.exp() + torch.stack(negatives).exp().sum()))


FORMS = {"dense": pool, "sparse": lambda: sp.csr_matrix(pool())}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("chunk_size", [None, 1, 5, 23, 100])
def test_the_loss_is_the_formula_for_every_chunk_size(form, chunk_size):
    given, expected = queries(), queries()
    losses = PoolLoss(FORMS[form](), chunk_size=chunk_size)({"query_vectors": given}, {"labels": LABELS})
    positives = [[3], [0, 22, 7], [9, 10]]
    wanted = torch.stack([written_out(pool(), expected[row], positives[row]) for row in range(3)])
    torch.testing.assert_close(losses, wanted)
    weights = torch.tensor([1.0, -2.0, 3.0])
    (losses * weights).sum().backward()
    (wanted * weights).sum().backward()
    torch.testing.assert_close(given.grad, expected.grad)


def test_other_positives_of_a_query_do_not_count_against_it():
    vectors = np.eye(3, dtype=np.float32)
    query = {"query_vectors": torch.tensor([[5.0, 1.0, 0.0]])}
    alone = PoolLoss(vectors)(query, {"labels": torch.tensor([[[1, -100]]])})
    both = PoolLoss(vectors)(query, {"labels": torch.tensor([[[0, 1]]])})
    assert alone.item() > 4.0  # the passage scored 5 is a negative
    assert both.item() == pytest.approx(np.log1p(np.exp(-1.0)))  # only the passage scored 0 is


def test_a_pool_of_positives_alone_costs_nothing():
    losses = PoolLoss(np.eye(2, dtype=np.float32))(
        {"query_vectors": torch.ones(1, 2)}, {"labels": torch.tensor([[[0, 1]]])}
    )
    assert losses.tolist() == [0.0]


def test_scores_beyond_the_range_of_exp_are_finite():
    given = torch.tensor([[1e4, -1e4]], requires_grad=True)
    losses = PoolLoss(np.eye(2, dtype=np.float32))({"query_vectors": given}, {"labels": torch.tensor([[[1]]])})
    losses.sum().backward()
    assert losses.item() == pytest.approx(2e4)
    assert given.grad is not None and given.grad.isfinite().all()


def test_what_cannot_be_scored_is_refused():
    loss = PoolLoss(pool())
    with pytest.raises(ValueError, match="dimension 4, the pool's passages 6"):
        loss({"query_vectors": torch.zeros(1, 4)}, {"labels": LABELS[:1]})
    with pytest.raises(ValueError, match="no positive passage"):
        loss({"query_vectors": torch.zeros(1, 6)}, {"labels": torch.full((1, 1, 2), -100)})


@pytest.mark.parametrize("module", [pool_loss, evaluation])
def test_the_examples_in_docstrings_are_true(module):
    found = doctest.testmod(module)
    assert found.attempted and not found.failed
