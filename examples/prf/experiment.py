"""One experiment: a first pass, and reformulators that are trained on it and evaluated in it.

The first pass (encoder, encoded corpus, index, runs of the queries as they are) is made once and kept in
`first_pass_dir`; every training, fold and evaluation reads it from there.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import PartialState
from arguments import PrfArguments
from collection import Collection, load_collection, report
from encoding import EncodedCorpus, encode_corpus, encode_texts, import_sparse_vectors, model_fingerprint
from evaluation import CollectionResult, measured_depth, per_query
from feedback import FeedbackCollator, training_queries
from first_pass import DenseIndex, Index, SparseIndex, bm25_run, empty_index, search_run
from pool_loss import PoolLoss, training_pool
from reformulators import DenseReformulator, Reformulator, SparseReformulator
from transformers import AutoConfig, AutoTokenizer
from trec_runs import Run, read_run, write_run

from cmp_trainer import CmpTrainer, CmpTrainingArguments
from cmp_trainer.data.lengths import check_length
from cmp_trainer.scripting import ModelArguments, load_pretrained, plain_load_errors

logger = logging.getLogger(__name__)


class Experiment:
    """The first pass, shared by all trainings: encoder, encoded corpus, index, and the runs of its queries.

    Raises ValueError where collections do not share a corpus, or `first_pass_dir` belongs to other ones."""

    def __init__(self, data_args: PrfArguments) -> None:
        self.args = data_args
        self.folder = Path(data_args.first_pass_dir)
        train, level = data_args.train_collection, data_args.relevance_level
        self.train = load_collection(train, data_args.train_relevance_level) if train else None
        self.tests = [load_collection(name, level) for name in data_args.test_collections]
        loaded = [*([self.train] if self.train else []), *self.tests]
        if not loaded:
            raise ValueError("no collection; give --train_collection or --test_collections")
        self.passages = loaded[0].passages
        if any(one.passages is not self.passages for one in loaded[1:]):
            raise ValueError("the collections have different corpora; train and test in one corpus at a time")
        check_file_names([one.name for one in self.tests])
        encoder = data_args.passage_encoder or data_args.model_name_or_path
        self.tokenizer, self.passage_tokenizer = (
            load_pretrained(AutoTokenizer, name, ModelArguments(name))
            for name in (data_args.model_name_or_path, encoder)
        )
        self.encoder = self.load_encoder(encoder)
        self.check_lengths()
        if data_args.representation == "dense":
            empty_index(
                data_args.index, self.encoder.dimension, len(self.passages)
            )  # rejected before anything is encoded
        self.corpus = self.encoded_corpus()
        with PartialState().main_process_first():
            self.index = self.open_index()

    def load_encoder(self, name: str) -> Reformulator:
        """A reformulator as it is before training, or a trained one where `name` is the folder of one."""
        device: Any = PartialState().device
        kind = DenseReformulator if self.args.representation == "dense" else SparseReformulator
        if is_reformulator(name, kind):
            return load_pretrained(kind, name, ModelArguments(name)).to(device)
        settings = {"normalize": self.args.normalize, "scale": self.args.scale}
        if kind is DenseReformulator:
            settings["pooling"] = self.args.pooling
        else:
            settings |= {
                "log_saturation": self.args.log_saturation, "first_weighted_id": self.args.first_weighted_id
            }  # fmt: skip
        with plain_load_errors(name):
            return kind.from_encoder(name, **settings).to(device)

    def check_lengths(self) -> None:
        """Raises ValueError where the encoder has fewer positions than a text may have tokens."""
        check_length("--total_length", self.args.total_length, self.tokenizer, self.encoder.encoder)
        if not self.args.passage_vectors:
            check_length("--encoding_length", self.args.encoding_length, self.passage_tokenizer, self.encoder.encoder)

    def encoded_corpus(self) -> EncodedCorpus:
        folder, tokenizer = self.folder / "vectors", self.passage_tokenizer
        if self.args.passage_vectors:
            return import_sparse_vectors(
                self.args.passage_vectors, tokenizer, self.passages, folder, self.args.passage_vector_scale
            )
        return encode_corpus(
            self.encoder,
            tokenizer,
            self.passages,
            folder,
            max_length=self.args.encoding_length,
            batch_size=self.args.encoding_batch_size,
            dtype=self.args.encoding_dtype,
            terms=self.args.encoding_terms,
        )

    def open_index(self) -> Index:
        if self.args.representation == "sparse":
            return SparseIndex(self.corpus, self.folder / "postings")
        path = self.folder / f"{self.args.index.replace(',', '-')}.faiss"
        return DenseIndex(self.corpus, path, self.args.index, self.args.index_depth)

    def tests_with_runs(self) -> list[Test]:
        """The test collections, each with its first-pass run."""
        files = self.args.test_runs or [None] * len(self.tests)
        return [self.test_of(test, file) for test, file in zip(self.tests, files, strict=True)]

    def test_of(self, collection: Collection, given: str | None) -> Test:
        first_pass = self.first_pass(collection, self.args.retrieval_depth, given)
        few = [query for query, ranked in first_pass.items() if len(ranked) < self.args.feedback_passages]
        finding = f"queries have fewer than {self.args.feedback_passages} feedback passages and read those they have"
        report(collection.name, finding, few)
        depth = measured_depth(len(self.passages), self.args.retrieval_depth, first_pass if given else None)
        return Test(collection, first_pass, depth)

    def train_with_run(self) -> tuple[Collection, Run] | None:
        """The training collection with its first-pass run, no deeper than training looks."""
        depth = max(self.args.candidates, self.args.feedback_passages)
        return (self.train, self.first_pass(self.train, depth, self.args.train_run)) if self.train else None

    def first_pass(self, collection: Collection, depth: int, given: str | None = None) -> Run:
        """The run of the collection's queries as they are: given, found from before, or searched."""
        if given:
            return self.given_run(collection, given)
        # encoder and corpus are the folder's
        form = f"length-{self.args.query_length}.depth-{depth}.queries-{digest(collection.queries)}"
        path = self.folder / "runs" / f"{file_name(collection.name)}.{form}.trec"
        with PartialState().main_process_first():
            if not path.exists():
                write_run(self.search(self.encoder, collection, depth=depth), path, "first_pass")
        found = read_run(path)
        return {query: found.get(query, []) for query in collection.queries}  # sparse queries may find nothing

    def given_run(self, collection: Collection, path: str) -> Run:
        """A run made elsewhere. Passages that this corpus lacks (or has without text) are left out and counted.

        Raises ValueError where a query is left with none."""
        found, row_of = read_run(path), self.passages.row_of
        unknown = [document for ranked in found.values() for document, _ in ranked if document not in row_of]
        report(path, "retrieved passages are not in the corpus and are left out", unknown)
        known = {query: [one for one in ranked if one[0] in row_of] for query, ranked in found.items()}
        lacking = [query for query in collection.queries if not known.get(query)]
        if lacking:
            raise ValueError(
                f"{path} has no passage of this corpus for {len(lacking)} queries, e.g. {lacking[0]}; complete it"
            )
        return {query: known[query] for query in collection.queries}

    def search(
        self,
        model: Reformulator,
        collection: Collection,
        feedback: Run | None = None,
        number: int = 0,
        depth: int | None = None,
    ) -> Run:
        """The run of the queries as `model` writes them with their first `number` feedback passages."""
        vectors = encode_texts(
            model,
            self.passage_tokenizer if model is self.encoder else self.tokenizer,
            list(collection.queries.values()),
            feedback=[self.texts(feedback[query][:number]) if feedback else [] for query in collection.queries],
            max_length=self.args.query_length,
            feedback_length=self.args.passage_length,
            total_length=self.args.total_length,
            batch_size=self.args.encoding_batch_size,
            form=self.args.representation,
        )
        return search_run(
            self.index, vectors, list(collection.queries), self.passages, depth or self.args.retrieval_depth
        )

    @functools.cached_property
    def content(self) -> dict[str, Any]:
        """What corpus, collections, given runs and encoder hold, in hashes: a result belongs to it."""
        collections = dict(zip(self.args.test_collections, self.tests, strict=True))
        if self.train:
            collections[str(self.args.train_collection)] = self.train
        runs = [self.args.train_run, *self.args.test_runs]
        start = self.load_encoder(self.args.model_name_or_path) if self.args.passage_encoder else self.encoder
        return {
            "passages": self.corpus.card.corpus,
            "passage vectors": self.corpus.card.encoder,
            "queries": {name: digest(one.queries) for name, one in collections.items()},
            "judgements": {name: digest([one.qrels, one.relevance_level]) for name, one in collections.items()},
            "runs": {path: file_digest(path) for path in runs if path},
            "starting model": model_fingerprint(start),
        }

    def texts(self, ranked: list[tuple[str, float]]) -> list[str]:
        return self.passages.texts([self.passages.row_of[document] for document, _ in ranked]) if ranked else []


@dataclass(frozen=True)
class Test:
    """What is tested on: `depth` is that of R and MAP (see `measured_depth`)."""

    collection: Collection
    first_pass: Run
    depth: int

    def values(self, run: Run) -> dict[str, list[float]]:
        """Every measure's values, in the order of the queries."""
        return {name: values.tolist() for name, values in per_query(self.collection, run, self.depth).items()}


def make_trainer(
    experiment: Experiment, args: CmpTrainingArguments, train: Collection, first_pass: Run, model: Reformulator
) -> CmpTrainer:
    """A CmpTrainer of these queries, with the loss over their training pool."""
    settings, passages = experiment.args, experiment.passages
    ranked = {query: [passages.row_of[document] for document, _ in first_pass[query]] for query in train.queries}
    positives = train.positives()
    candidates = {query: rows[: settings.candidates] for query, rows in ranked.items()}
    rows, vectors = training_pool(experiment.corpus, candidates, positives)
    in_pool = {query: np.searchsorted(rows, found).tolist() for query, found in positives.items()}
    feedback = {query: found[: settings.feedback_passages] for query, found in ranked.items()}
    queries = training_queries(train.queries, in_pool, feedback, args.cmp_num_crops)
    logger.info("%d training queries, a pool of %d passages", len(queries), len(rows))
    collator = FeedbackCollator(
        experiment.tokenizer,
        passages.texts,
        most=settings.feedback_passages,
        num_crops=args.cmp_num_crops,
        query_length=settings.query_length,
        passage_length=settings.passage_length,
        total_length=settings.total_length,
    )
    return CmpTrainer(
        model=model,
        args=args,
        train_dataset=queries,
        data_collator=collator,
        processing_class=experiment.tokenizer,
        per_example_loss_func=PoolLoss(vectors, args.device, settings.pool_chunk_size),
    )


def evaluate(experiment: Experiment, model: Reformulator, test: Test, fold: int, folder: Path) -> CollectionResult:
    """Search the reformulated queries at 0, 1, … feedback passages over the whole corpus; the runs are written."""
    collection, depth = test.collection, experiment.args.retrieval_depth
    bm25 = bm25_run(collection.passages, collection.queries, experiment.folder / "bm25", depth)
    reformulated = []
    for number in range(experiment.args.feedback_passages + 1):
        found = experiment.search(model, collection, test.first_pass, number)
        write_run(found, folder / "runs" / f"{file_name(collection.name)}.{number}.trec", f"feedback-{number}")
        reformulated.append(test.values(found))
    folds = [fold] * len(collection.queries)
    return CollectionResult(
        list(collection.queries), folds, test.values(test.first_pass), test.values(bm25), reformulated
    )


def is_reformulator(name: str, kind: Any) -> bool:
    return isinstance(load_pretrained(AutoConfig, name, ModelArguments(name)), kind.config_class)


def digest(content: object) -> str:
    """Hash of queries, judgements or other values: a result of other ones is not taken for one of these."""
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:8]


def file_digest(path: str) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:8]


def check_file_names(collections: Sequence[str]) -> None:
    """Raises ValueError where the results of two collections would be written to one file."""
    counts = Counter(map(file_name, collections))
    if same := [name for name in collections if counts[file_name(name)] > 1]:
        raise ValueError(f"the results of {' and '.join(same)} would have the same file names; rename one of them")


def file_name(collection: str) -> str:
    return collection.replace("/", "-").replace(":", "-")
