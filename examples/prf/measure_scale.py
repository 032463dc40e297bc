"""Rates of this machine for docs/prf.md: CPU seconds of one thread for each step, and what they mean for MS MARCO.

    python examples/prf/measure_scale.py

Vectors are random where only their number and size matter. Rates are of CPU time, so other work on the machine does
not change them much; hours are rate times size on one thread.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"  # before FAISS and torch are loaded

import faiss
import numpy as np
import scipy.sparse as sp
import torch
from first_pass import best_passages
from pool_loss import PoolLoss
from reformulators import DenseReformulator, DenseReformulatorConfig
from transformers import RobertaConfig

PASSAGES, QUERIES, DIMENSION, VOCABULARY = 8_841_823, 6_980, 768, 30_522
TOKENS, TERMS, QUERY_TERMS = 80, 70, 30  # of a passage; weights of a sparse passage and query vector
SAMPLE = 20_000


def main() -> None:
    torch.set_num_threads(1)
    faiss.omp_set_num_threads(1)
    random = np.random.default_rng(0)
    vectors = random.normal(size=(SAMPLE, DIMENSION)).astype(np.float32)
    encoding()
    flat(vectors)
    for factory, per_search in (("HNSW32", 200), ("IVF256,Flat", 200)):
        approximate(vectors, factory, per_search)
    sparse(random)
    loss(vectors)


def encoding() -> None:
    config = RobertaConfig(max_position_embeddings=514, vocab_size=1_000)  # its size costs no time here
    model = DenseReformulator(DenseReformulatorConfig(encoder=config.to_dict(), projection_size=DIMENSION)).eval()
    for name, rows, length in (("encode a passage", 16, TOKENS), ("reformulate a query of 512 tokens", 1, 512)):
        ids = torch.randint(10, 1000, (rows, length))
        with torch.inference_mode():
            seconds = cpu_seconds(lambda ids=ids: model(input_ids=ids)) / rows
        report(name, seconds, PASSAGES if rows == 16 else QUERIES)
    model.train()
    ids = torch.randint(10, 1000, (1, 512))
    seconds = cpu_seconds(lambda: model(input_ids=ids).query_vectors.sum().backward())
    report("train on a query of 512 tokens, forward and backward", seconds, 12 * 502_939)


def flat(vectors: np.ndarray) -> None:
    index = faiss.IndexFlatIP(DIMENSION)
    index.add(vectors)
    seconds = cpu_seconds(lambda: index.search(vectors[:64], 1000)) / 64
    report("search a query, Flat", seconds * PASSAGES / SAMPLE, QUERIES)


def approximate(vectors: np.ndarray, factory: str, searches: int) -> None:
    index: Any = faiss.index_factory(DIMENSION, factory, faiss.METRIC_INNER_PRODUCT)
    sample = vectors[:10_000]
    if not index.is_trained:
        index.train(sample)
        index.nprobe = 16
    seconds = cpu_seconds(lambda: index.add(sample), repeats=1) / len(sample)
    report(f"add a passage, {factory} of {len(sample)}", seconds, PASSAGES)
    seconds = cpu_seconds(lambda: index.search(vectors[-searches:], 1000)) / searches
    report(f"search a query, {factory} of {len(sample)}", seconds, QUERIES)


def sparse(random: np.random.Generator) -> None:
    terms = (random.zipf(1.3, size=(200_000, TERMS)) + random.integers(0, 50, size=(200_000, TERMS))) % VOCABULARY
    rows = np.repeat(np.arange(len(terms)), TERMS)
    passages = sp.csr_matrix((np.ones(rows.size, np.float32), (terms.ravel(), rows)), shape=(VOCABULARY, len(terms)))
    columns = random.choice(terms.ravel(), QUERY_TERMS)
    query = sp.csr_matrix((np.ones(QUERY_TERMS, np.float32), (np.zeros(QUERY_TERMS, int), columns)), (1, VOCABULARY))
    seconds = cpu_seconds(lambda: best_passages(query, passages, 1000))
    report(f"search a query, sparse with {QUERY_TERMS} terms", seconds * PASSAGES / len(terms), QUERIES)


def loss(vectors: np.ndarray) -> None:
    scored = PoolLoss(vectors)
    queries = torch.randn(36, DIMENSION, requires_grad=True)
    labels = torch.zeros(36, 1, 1, dtype=torch.long)
    seconds = cpu_seconds(lambda: scored({"query_vectors": queries}, {"labels": labels}).sum().backward())
    million = 1e6 / SAMPLE / 36
    report("loss of a query over a pool of a million passages", seconds * million, 12 * 502_939)


def cpu_seconds(work: Callable[[], object], repeats: int = 3) -> float:
    """The least CPU time of some runs, after one to warm up where there are several."""
    if repeats > 1:
        work()
    taken = []
    for _ in range(repeats):
        start = time.process_time()
        work()
        taken.append(time.process_time() - start)
    return min(taken)


def report(step: str, seconds: float, size: int) -> None:
    print(f"| {step} | {1000 * seconds:.3g} ms | {size:,} | {seconds * size / 3600:,.3g} h |", flush=True)


if __name__ == "__main__":
    main()
