"""First-pass retrieval: the passages that feedback comes from, and every reformulated query's search after it.

- `DenseIndex`: FAISS by inner product, any index of its factory (`Flat`, `HNSW32`, `IVF4096,Flat`, `IVF16384,PQ96`).
- `SparseIndex`: an inverted index as a SciPy matrix (vocabulary, passages), so that a query costs its terms' postings.
- `bm25_run`: BM25 by bm25s, the reference that needs no encoder.

An index is built from an encoding once, saved, and memory-mapped when loaded. Its card names encoder and corpus; an
index of other ones is rejected.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import scipy.sparse as sp
from collection import Passages
from encoding import EncodedCorpus, Vectors, check_card
from tqdm.auto import tqdm
from trec_runs import Run, run_from_rows

from cmp_trainer.saving.files import written_whole

SEARCH_BATCH = 256
TRAINING_VECTORS = 1_000_000  # of an IVF or PQ index; FAISS takes at most 256 for each centroid


class DenseIndex:
    """Search in a FAISS index.

    Args:
        corpus: the encoding to index.
        path: the index file. Loaded where it exists, otherwise built and saved there.
        factory: what FAISS's `index_factory` takes.
        depth: how many lists of an IVF index, or candidates of an HNSW one, a search visits; more is more exact.

    Raises:
        ValueError: the index at `path` is of another encoding or factory.
    """

    def __init__(self, corpus: EncodedCorpus, path: Path, factory: str = "Flat", depth: int = 128) -> None:
        card_path = path.with_suffix(".json")
        card = asdict(corpus.card) | {"factory": factory}
        if path.exists():
            check_card(card_path, card)
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            with written_whole(card_path) as file:  # first: an index is never without its card
                file.write_text(json.dumps(card, indent=1) + "\n")
            build_index(corpus, path, factory)
        self.index = faiss.read_index(str(path), faiss.IO_FLAG_MMAP_IFC)
        if self.index.ntotal != len(corpus) or self.index.d != corpus.card.dimension:
            raise ValueError(
                f"{path} holds {self.index.ntotal} vectors of dimension {self.index.d}, the encoding {len(corpus)} of "
                f"{corpus.card.dimension}; remove the file to build it anew"
            )
        set_depth(self.index, depth)

    def search(self, queries: Vectors, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Rows and scores of the best passages, best first: (queries, number) each. Fewer passages than `number` are
        all returned; an approximate index that finds fewer marks the rest with row -1."""
        assert isinstance(queries, np.ndarray)
        number = min(number, self.index.ntotal)
        scores, rows = self.index.search(np.ascontiguousarray(queries, dtype=np.float32), number)
        return rows, scores


class SparseIndex:
    """Search in an inverted index: postings (vocabulary, passages), mapped from three `.npy` files.

    Raises:
        ValueError: the index in `folder` is of another encoding.
    """

    def __init__(self, corpus: EncodedCorpus, folder: Path) -> None:
        card = asdict(corpus.card)
        card_path = folder / "index.json"
        if card_path.exists():
            check_card(card_path, card)
        else:
            build_postings(corpus, folder)
            with written_whole(card_path) as file:
                file.write_text(json.dumps(card, indent=1) + "\n")
        data, indices, indptr = (
            np.load(folder / f"{part}.npy", mmap_mode="r") for part in ("data", "indices", "indptr")
        )
        shape = (corpus.card.dimension, len(corpus))
        self.postings: Any = sp.csr_matrix((data, indices, indptr), shape=shape, copy=False)

    def search(self, queries: Vectors, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Rows and scores of the best passages, best first, of equal ones the first row: (queries, number) each, with
        row -1 where a query shares a term with fewer passages. One query at a time, so that the scores in memory are
        those of one."""
        queries = sp.csr_matrix(queries)
        number = min(number, self.postings.shape[1])
        rows = np.full((queries.shape[0], number), -1, dtype=np.int64)
        scores = np.zeros((queries.shape[0], number), dtype=np.float32)
        for place in range(queries.shape[0]):
            best, values = best_passages(queries[place], self.postings, number)
            rows[place, : len(best)], scores[place, : len(best)] = best, values
        return rows, scores


Index = DenseIndex | SparseIndex


def best_passages(query: Any, postings: Any, number: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows and scores of the best passages for a query (1, vocabulary). Only those that can be among them are sorted,
    for a query meets a good part of a large corpus."""
    found = (query @ postings).tocsr()  # (1, passages)
    rows, scores = found.indices, found.data
    if len(scores) > number:
        possible = scores >= np.partition(scores, -number)[-number]
        rows, scores = rows[possible], scores[possible]
    best = np.lexsort((rows, -scores))[:number]
    return rows[best], scores[best]


def search_run(index: Index, queries: Vectors, query_ids: Sequence[str], passages: Passages, number: int) -> Run:
    """The run of these query vectors, with a progress bar over batches of queries."""
    run: Run = {}
    for start in tqdm(range(0, len(query_ids), SEARCH_BATCH), desc="search", unit="batch", leave=False):
        rows, scores = index.search(queries[start : start + SEARCH_BATCH], number)
        for query, found, values in zip(query_ids[start : start + SEARCH_BATCH], rows, scores, strict=True):
            exists = found >= 0
            run |= run_from_rows([query], [found[exists]], [values[exists]], passages.ids)
    return run


def bm25_run(passages: Passages, queries: dict[str, str], folder: Path, number: int) -> Run:
    """BM25 with bm25s' own settings (Lucene's variant, k1 1.5, b 0.75, English stop words). The index is kept."""
    import bm25s

    if (folder / "corpus.txt").exists():
        if (folder / "corpus.txt").read_text() != passages.fingerprint:
            raise ValueError(f"{folder} is the BM25 index of another corpus; give another folder or remove it")
        retriever = bm25s.BM25.load(folder, mmap=True)
    else:
        retriever = bm25s.BM25()
        retriever.index(bm25s.tokenize(passages.dataset["text"][:], stopwords="en"))
        retriever.save(folder)
        (folder / "corpus.txt").write_text(passages.fingerprint)
    tokens = bm25s.tokenize(list(queries.values()), stopwords="en", show_progress=False)
    rows, scores = retriever.retrieve(tokens, k=min(number, len(passages)), show_progress=False)
    matching = [values > 0 for values in scores]  # without a common term there is no match
    found = [one[keep] for one, keep in zip(rows, matching, strict=True)]
    return run_from_rows(queries, found, [one[keep] for one, keep in zip(scores, matching, strict=True)], passages.ids)


def build_index(corpus: EncodedCorpus, path: Path, factory: str) -> None:
    index = empty_index(factory, corpus.card.dimension, len(corpus))
    with plain_index_errors(factory, corpus.card.dimension):
        if not index.is_trained:
            sample = np.random.default_rng(0).permutation(len(corpus))[:TRAINING_VECTORS]
            index.train(np.ascontiguousarray(corpus.rows(np.sort(sample)), dtype=np.float32))
        for block in tqdm(corpus.blocks(), desc=f"indexing ({factory})", unit="block"):
            index.add(np.ascontiguousarray(block, dtype=np.float32))
        with written_whole(path) as file:
            faiss.write_index(index, str(file))


def empty_index(factory: str, dimension: int, num_passages: int) -> faiss.Index:
    """The index that a factory string describes, untrained. Call it before a corpus is encoded for it.

    Raises ValueError where FAISS does not know it, or its clusters are more than the passages."""
    with plain_index_errors(factory, dimension):
        index = faiss.index_factory(dimension, factory, faiss.METRIC_INNER_PRODUCT)
    needed = most_clusters(index)
    if needed > num_passages:
        raise ValueError(
            f"--index {factory} has {needed:,} clusters to train, more than the corpus has passages "
            f"({num_passages:,}); give fewer, or Flat, which is exact"
        )
    return index


def most_clusters(index: faiss.Index) -> int:
    """The largest number of clusters that a part of the index is trained to: FAISS needs as many vectors.

    Parts are lists (IVF), codebooks (PQ and its relatives) and the indexes inside of others.

    >>> most_clusters(faiss.index_factory(64, "OPQ8_32,IVF16,PQ8x4"))
    256
    """
    part: Any = faiss.downcast_index(index)  # borrows from `index`, which must live as long
    names = ("index", "base_index", "refine_index", "storage", "quantizer")
    counts = [most_clusters(getattr(part, name)) for name in names if getattr(part, name, None) is not None]
    counts.append(getattr(part, "nlist", 1))
    if hasattr(part, "pq"):
        counts.append(part.pq.ksub)
    if hasattr(part, "aq"):
        counts.append(2 ** int(faiss.vector_to_array(part.aq.nbits).max()))
    if isinstance(part, faiss.IndexPreTransform):
        chain: Any = part.chain
        steps = [faiss.downcast_VectorTransform(chain.at(place)) for place in range(chain.size())]
        counts += [256 for step in steps if isinstance(step, faiss.OPQMatrix)]  # the PQ that OPQ trains for itself
    return max(counts)


@contextmanager
def plain_index_errors(factory: str, dimension: int) -> Iterator[None]:
    """FAISS's errors without its source lines."""
    try:
        yield
    except RuntimeError as error:
        raise ValueError(
            f"--index {factory} is no index that FAISS can make of {dimension} dimensions by inner product "
            f"({str(error).rpartition(': ')[2]}); give Flat, HNSW32, IVF4096,Flat or the like"
        ) from None


def build_postings(corpus: EncodedCorpus, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    postings: Any = sp.hstack([block.T.tocsr() for block in corpus.blocks()], format="csr")
    postings.sort_indices()
    for part in ("data", "indices", "indptr"):
        with written_whole(folder / f"{part}.npy") as file:
            np.save(file, getattr(postings, part))


def set_depth(index: faiss.Index, depth: int) -> None:
    """The depth of the IVF or HNSW index, which may lie inside of another (`OPQ16,IVF64,PQ8`)."""
    lists = faiss.try_extract_index_ivf(index)
    if lists is not None:
        lists.nprobe = min(depth, lists.nlist)
        return
    while isinstance(index, faiss.IndexPreTransform | faiss.IndexRefine):
        inside = index.index if isinstance(index, faiss.IndexPreTransform) else index.base_index
        index = faiss.downcast_index(inside)
    if isinstance(index, faiss.IndexHNSW):
        index.hnsw.efSearch = depth
