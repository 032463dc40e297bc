"""The loss of a reformulated query: softmax cross entropy of a positive passage against the whole training pool.

    loss(q) = -log( exp(q·t) / (exp(q·t) + sum over pool passages n that are no positive of q of exp(q·n)) )

where t is the positive with the lowest score: once it is ahead of every negative, so are the others. The pool is the
union of the training queries' top passages and their positives (SIGIR 2022, section 4). Its vectors are those of the
first pass and stay fixed, so the gradient goes to the query alone and the sum may run over the pool in chunks: with
`chunk_size` only one chunk of the pool is on the device at a time, in the backward pass too, where it is scored again.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import scipy.sparse as sp
import torch
from encoding import EncodedCorpus, Vectors
from torch.utils.checkpoint import checkpoint

IGNORED = -100


class PoolLoss:
    """`per_example_loss_func` of a reformulator: (outputs, inputs) -> losses (batch,).

    Args:
        vectors: (pool, dimension) of the training pool, dense or sparse.
        device: where queries are scored.
        chunk_size: pool passages on the device at a time; None keeps the whole pool there.

    Raises:
        ValueError: query vectors of another dimension, or a query without a positive.

    >>> loss = PoolLoss(np.eye(3, dtype=np.float32))
    >>> outputs = {"query_vectors": torch.tensor([[2.0, 0.0, 0.0]])}
    >>> loss(outputs, {"labels": torch.tensor([[[0, -100]]])})  # log(e² + 2) - 2
    tensor([0.2395])
    """

    def __init__(self, vectors: Vectors, device: str | torch.device = "cpu", chunk_size: int | None = None) -> None:
        self.vectors = vectors
        self.size, self.dimension = vectors.shape
        self.device = torch.device(device)
        self.chunk_size = chunk_size
        self.resident = ScoredChunk(vectors, self.device) if chunk_size is None else None

    def __call__(self, outputs: Any, inputs: Mapping[str, Any]) -> torch.Tensor:
        queries = outputs["query_vectors"]  # (batch, dimension)
        if queries.shape[-1] != self.dimension:
            raise ValueError(
                f"query vectors have dimension {queries.shape[-1]}, the pool's passages {self.dimension}; "
                "the reformulator must start from the encoder of the passages"
            )
        positives = inputs["labels"].flatten(1)  # (batch, positives) rows of the pool, padded with IGNORED
        given = positives != IGNORED
        if not given.any(1).all():
            raise ValueError("a query of the batch has no positive passage; leave such queries out of training")
        positive_scores = self.positive_scores(queries.float(), positives, given)
        target = positive_scores.masked_fill(~given, float("inf")).amin(dim=1)  # (batch,)
        negatives = self.negative_mass(queries.float(), positives, given)  # (batch,), a logsumexp
        return torch.logaddexp(target, negatives) - target

    def positive_scores(self, queries: torch.Tensor, positives: torch.Tensor, given: torch.Tensor) -> torch.Tensor:
        """(batch, positives); what stands where none is given has no meaning."""
        rows, places = torch.unique(positives[given], return_inverse=True)
        found = self.vectors[rows.cpu().numpy()]
        scores = queries @ dense(found, queries.device).T  # (batch, distinct positives)
        columns = torch.zeros_like(positives).masked_scatter(given, places)
        return scores.gather(1, columns)

    def negative_mass(self, queries: torch.Tensor, positives: torch.Tensor, given: torch.Tensor) -> torch.Tensor:
        """Logarithm of the sum over negatives of exp(score): (batch,). -inf where the pool has no negative."""
        if self.chunk_size is None:
            return self.chunk_mass(queries, positives, given, 0)
        parts = [
            checkpoint(
                self.chunk_mass, queries, positives, given, start, use_reentrant=False, preserve_rng_state=False
            )
            for start in range(0, self.size, self.chunk_size)
        ]
        return torch.stack(parts, dim=1).logsumexp(dim=1)

    def chunk_mass(
        self, queries: torch.Tensor, positives: torch.Tensor, given: torch.Tensor, start: int
    ) -> torch.Tensor:
        chunk = self.resident or ScoredChunk(self.vectors[start : start + (self.chunk_size or 0)], queries.device)
        scores = chunk(queries)  # (batch, chunk)
        inside = given & (positives >= start) & (positives < start + chunk.size)
        masked = torch.zeros_like(scores, dtype=torch.bool)
        queries_of, places = inside.nonzero(as_tuple=True)
        masked[queries_of, positives[queries_of, places] - start] = True
        return scores.masked_fill(masked, float("-inf")).logsumexp(dim=1)


class ScoredChunk:
    """Passage vectors on a device: (batch, dimension) queries -> (batch, passages) inner products."""

    def __init__(self, vectors: Vectors, device: torch.device) -> None:
        self.size = vectors.shape[0]
        self.vectors = dense(vectors, device) if isinstance(vectors, np.ndarray) else sparse(vectors, device)

    def __call__(self, queries: torch.Tensor) -> torch.Tensor:
        if self.vectors.layout == torch.strided:
            return queries @ self.vectors.T
        return torch.sparse.mm(self.vectors, queries.T).T


def training_pool(
    corpus: EncodedCorpus, candidates: dict[str, list[int]], positives: dict[str, list[int]]
) -> tuple[np.ndarray, Vectors]:
    """The pool's corpus rows, ascending, and their vectors: every query's candidates and positives, each once."""
    parts = [rows for found in (candidates, positives) for rows in found.values() if rows]
    rows = np.unique(np.concatenate([np.asarray(part, dtype=np.int64) for part in parts]))
    return rows, corpus.rows(rows)


def dense(vectors: Vectors, device: torch.device) -> torch.Tensor:
    array = vectors if isinstance(vectors, np.ndarray) else vectors.toarray()
    return torch.from_numpy(np.array(array, dtype=np.float32)).to(device)


def sparse(vectors: sp.csr_matrix, device: torch.device) -> torch.Tensor:
    """COO: the layout whose product with a dense matrix has a gradient on every device."""
    entries = vectors.tocoo()
    indices = torch.from_numpy(np.stack([entries.row, entries.col]).astype(np.int64))
    values = torch.from_numpy(entries.data.astype(np.float32))
    return torch.sparse_coo_tensor(indices, values, vectors.shape, device=device, check_invariants=False).coalesce()
