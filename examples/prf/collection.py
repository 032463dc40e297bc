"""Collections: passages, queries and relevance judgements (qrels).

`load_collection(name)` takes
- a folder in BEIR form: corpus.jsonl (`_id`, `title`, `text`), queries.jsonl (`_id`, `text`) and qrels.tsv; or
  `folder:split` for judgements in qrels/split.tsv, as the BEIR sets have them;
- a name of ir_datasets, which downloads it: `msmarco-passage/dev/small`, `msmarco-passage/trec-dl-2019/judged`,
  `msmarco-passage/trec-dl-2020/judged`, `msmarco-passage/trec-dl-hard`, `beir/scifact/test`, …

Passages live in an Arrow file that is mapped, not read, so 8.8 million of them cost little memory. Ids are single
words of any form, since TREC runs hold them; inside, a passage is known by its row. Numbers as ids, titles or texts
are read as written, and a null title or text as none. What is left out is counted and reported: passages without text,
queries without judgements, judgements of unknown queries. Judgements of unknown passages stay, as trec_eval has it:
such a passage counts as one never found.
"""

from __future__ import annotations

import csv
import functools
import hashlib
import json
import logging
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset, Features, Value
from datasets.exceptions import DatasetGenerationError

from cmp_trainer.errors import nearest

logger = logging.getLogger(__name__)
Qrels = dict[str, dict[str, int]]
PASSAGE_FEATURES = Features({"id": Value("string"), "text": Value("large_string")})
# Passages judged 1 in the passage tracks of TREC Deep Learning are "related", and their binary measures start at 2;
# in the document tracks they start at 1. For the collections whose own measures ir_datasets does not list.
DEEP_LEARNING_LEVELS = {"msmarco-passage-v2/trec-dl-": 2, "msmarco-document-v2/trec-dl-": 1}


class Passages:
    """The passages of a corpus by row, from an Arrow dataset with the columns id and text."""

    def __init__(self, dataset: Dataset) -> None:
        self.dataset = dataset
        self.ids: list[str] = dataset.select_columns("id")[:]["id"]
        self.row_of = {passage: row for row, passage in enumerate(self.ids)}
        if len(self.row_of) != len(self.ids):
            first = next(passage for row, passage in enumerate(self.ids) if self.row_of[passage] != row)
            raise ValueError(
                f"the corpus has {len(self.ids) - len(self.row_of)} repeated ids, e.g. {first}; ids must be unique"
            )

    def __len__(self) -> int:
        return len(self.ids)

    def texts(self, rows: Iterable[int]) -> list[str]:
        return self.dataset[list(rows)]["text"]

    @functools.cached_property
    def fingerprint(self) -> str:
        """Hash of all ids and texts in their order: what an encoding belongs to."""
        digest = hashlib.sha256()
        for start in range(0, len(self), 10_000):
            batch = self.dataset[start : start + 10_000]
            for passage, text in zip(batch["id"], batch["text"], strict=True):
                digest.update(f"{passage}\0{text}\0".encode())
        return digest.hexdigest()[:16]


@dataclass(frozen=True)
class Collection:
    """`queries`: judged queries only. `relevance_level`: the lowest judgement that binary measures count as
    relevant."""

    name: str
    passages: Passages
    queries: dict[str, str]
    qrels: Qrels
    relevance_level: int = 1

    def positives(self) -> dict[str, list[int]]:
        """The corpus rows of each query's relevant passages; an empty list where the corpus has none."""
        row_of, level = self.passages.row_of, self.relevance_level
        return {
            query: [row_of[document] for document, score in found.items() if score >= level and document in row_of]
            for query, found in self.qrels.items()
        }

    def subset(self, query_ids: Iterable[str]) -> Collection:
        """The same corpus with these queries only."""
        chosen = list(query_ids)
        queries = {query: self.queries[query] for query in chosen}
        qrels = {query: self.qrels[query] for query in chosen}
        return Collection(self.name, self.passages, queries, qrels, self.relevance_level)


def load_collection(name: str, relevance_level: int | None = None) -> Collection:
    """A collection from a folder or through ir_datasets.

    Args:
        name: a folder, folder:split or a name of ir_datasets.
        relevance_level: instead of the collection's own, which is 1 for folders.

    Raises:
        ValueError: `name` is none of these, or cannot be downloaded; a file has a fault, which is named by its line.
    """
    folder, split = folder_and_split(name)
    if folder is not None:
        return beir_collection(folder, split, relevance_level or 1)
    import ir_datasets

    if name not in ir_datasets.registry:
        raise ValueError(
            f"collection {name!r} is neither a folder (BEIR form, folder or folder:split) nor a name of ir_datasets"
            f"{nearest(name, ir_datasets.registry)}; see https://ir-datasets.com for names"
        )
    source = ir_datasets.load(name)
    qrels: Qrels = {}
    try:
        queries = {query.query_id: query.default_text() for query in source.queries_iter()}
        for judgement in source.qrels_iter():
            qrels.setdefault(judgement.query_id, {})[judgement.doc_id] = judgement.relevance
    except OSError as error:
        raise ValueError(
            f"collection {name!r} could not be downloaded ({error}); without network give a folder in BEIR form"
        ) from error
    passages = downloaded_passages(ir_datasets.docs_parent_id(name))
    return checked_collection(name, passages, queries, qrels, relevance_level or own_relevance_level(name))


def folder_and_split(name: str) -> tuple[Path | None, str]:
    """The folder and split of `folder` or `folder:split`, None if it is neither. A folder's name may have colons."""
    if Path(name).is_dir():
        return Path(name), ""
    folder, colon, split = name.rpartition(":")
    return (Path(folder), split) if colon and Path(folder).is_dir() else (None, "")


def own_relevance_level(name: str) -> int:
    """The lowest judgement that counts as relevant in the binary measures that a collection's makers report.

    It comes from ir_datasets' list of official measures: the level of the reciprocal rank, or else the largest one.

    >>> [own_relevance_level(f"msmarco-{kind}/trec-dl-2020") for kind in ("passage", "document")]
    [2, 1]
    """
    import ir_datasets
    import ir_measures

    named = ir_datasets.load(name).documentation().get("official_measures") or []
    measures = [ir_measures.parse_measure(measure) if isinstance(measure, str) else measure for measure in named]
    levels = {measure.NAME: measure["rel"] for measure in measures if "rel" in measure.SUPPORTED_PARAMS}
    if levels:
        return levels.get("RR", max(levels.values()))
    return next((level for start, level in DEEP_LEARNING_LEVELS.items() if name.startswith(start)), 1)


def beir_collection(folder: Path, split: str, relevance_level: int) -> Collection:
    corpus, queries_path = folder / "corpus.jsonl", folder / "queries.jsonl"
    qrels_path = folder / "qrels" / f"{split}.tsv" if split else folder / "qrels.tsv"
    for path in (corpus, queries_path, qrels_path):
        if not path.is_file():
            raise ValueError(
                f"{path} is missing; the BEIR form has corpus.jsonl, queries.jsonl and qrels.tsv, or "
                "qrels/<split>.tsv with the collection named folder:split"
            )
    queries = read_queries(queries_path)
    name = f"{folder.name}:{split}" if split else folder.name
    return checked_collection(
        name, folder_passages(corpus.resolve()), queries, read_qrels(qrels_path), relevance_level
    )


def checked_collection(
    name: str, passages: Passages, queries: dict[str, str], qrels: Qrels, relevance_level: int = 1
) -> Collection:
    """Reports what does not fit together; raises where nothing is left."""
    unknown = [query for query in qrels if query not in queries]
    report(name, "judged queries are not among the queries; their judgements are left out", unknown)
    judged = {query: judgements for query, judgements in qrels.items() if query in queries}
    report(name, "queries have no judgement and are left out", [query for query in queries if query not in judged])
    missing = [document for found in judged.values() for document in found if document not in passages.row_of]
    report(name, "judgements name passages that the corpus lacks; they count as never found", missing)
    if not judged:
        raise ValueError(f"{name}: no query has a judgement; do the ids of queries and qrels agree?")
    irrelevant = [query for query, found in judged.items() if max(found.values()) < relevance_level]
    report(
        name,
        f"queries have no judgement of {relevance_level} or more and count as having nothing relevant",
        irrelevant,
    )
    ordered = {query: text for query, text in queries.items() if query in judged}
    return Collection(name, passages, ordered, {query: judged[query] for query in ordered}, relevance_level)


def read_queries(path: Path) -> dict[str, str]:
    """Texts by id. Raises ValueError for a query that has no text, or two."""
    queries: dict[str, str] = {}
    for number, query, record in read_jsonl(path, "text"):
        text = as_text(record["text"], path, number, "text")
        if not text.strip():
            raise ValueError(
                f"{path}, line {number}: query {query} has {record['text']!r} for a text; complete or remove it"
            )
        if queries.setdefault(query, text) != text:
            raise ValueError(f"{path}, line {number}: query {query} has two texts; give each query an id of its own")
    return queries


def read_qrels(path: Path) -> Qrels:
    """Judgements from BEIR's three columns (query, document, score, with a header) or TREC's four (query 0 document
    score). Raises ValueError with the line for anything else, and for a pair judged twice differently."""
    qrels: Qrels = {}
    with open(path, encoding="utf-8-sig", newline="") as file:
        for number, fields in enumerate(csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE), start=1):
            if not fields or (number == 1 and fields[-1] == "score"):
                continue
            fields = fields if len(fields) > 1 else fields[0].split()
            if len(fields) not in (3, 4) or not re.fullmatch(r"[+-]?[0-9]+", fields[-1].strip()):
                raise ValueError(f"{path}, line {number}: {fields} is not query, document, score (a whole number)")
            query, document, score = fields[0], fields[-2], int(fields[-1])
            if qrels.setdefault(query, {}).setdefault(document, score) != score:
                raise ValueError(f"{path}, line {number}: query {query} and document {document} have two judgements")
    return qrels


@functools.lru_cache(maxsize=2)
def folder_passages(path: Path) -> Passages:
    stamp = path.stat()
    # size and time are arguments only so that a changed file is not served from the cache of the old one
    return arrow_passages(folder_records, path=str(path), size=stamp.st_size, time=stamp.st_mtime_ns)


def folder_records(path: str, size: int, time: int) -> Iterator[dict[str, str]]:
    for number, passage, record in read_jsonl(Path(path), "text"):
        parts = (as_text(record.get(field), path, number, field) for field in ("title", "text"))
        yield {"id": passage, "text": " ".join(filter(None, parts))}


@functools.lru_cache(maxsize=2)
def downloaded_passages(name: str) -> Passages:
    return arrow_passages(downloaded_records, name=name)


def downloaded_records(name: str) -> Iterator[dict[str, str]]:
    import ir_datasets

    for document in ir_datasets.load(name).docs_iter():
        yield {"id": document.doc_id, "text": document.default_text()}


def arrow_passages(records, **arguments) -> Passages:
    """The passages as a memory-mapped Arrow file, cached by datasets; those without text are left out and counted."""
    try:
        dataset = Dataset.from_generator(records, features=PASSAGE_FEATURES, gen_kwargs=arguments)
    except DatasetGenerationError as error:
        if isinstance(error.__cause__, ValueError):
            raise ValueError(str(error.__cause__)) from None
        raise
    assert isinstance(dataset, Dataset)
    filled = [row for batch in batches(dataset) for row, text in batch if text.strip()]
    if len(filled) < len(dataset):
        empty = sorted(set(range(len(dataset))) - set(filled))
        report("corpus", "passages have no text and are left out", dataset[empty]["id"])
        dataset = dataset.select(filled)
    return Passages(dataset)


def batches(dataset: Dataset, size: int = 10_000) -> Iterator[Iterator[tuple[int, str]]]:
    for start in range(0, len(dataset), size):
        texts = dataset[start : start + size]["text"]
        yield zip(range(start, start + len(texts)), texts, strict=True)


def read_jsonl(path: Path, field: str) -> Iterator[tuple[int, str, dict[str, Any]]]:
    """Number of the line, id (`_id` or `id`) and record of each line.

    Raises ValueError, with the line, for what is no object with an id and `field`, or has an id no run could hold."""
    with open(path, encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}, line {number}: not JSON ({error})") from None
            found = record.get("_id", record.get("id")) if isinstance(record, dict) else None
            if not isinstance(found, str | int) or isinstance(found, bool) or field not in record:
                raise ValueError(
                    f"{path}, line {number}: expected an object with _id (a word or a whole number) and {field}, "
                    f"got {line[:80].strip()}"
                )
            if str(found).split() != [str(found)]:
                raise ValueError(
                    f"{path}, line {number}: the id {found!r} is empty or has white space, and TREC runs hold single "
                    "words; rename it, in the judgements too"
                )
            yield number, str(found), record


def as_text(value: Any, path: str | Path, number: int, field: str) -> str:
    """A text, a number as written, "" for null and NaN. Raises ValueError, with the line, for anything else."""
    if value is None or value != value:
        return ""
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise ValueError(f"{path}, line {number}: {field} is {str(value)[:80]}, expected a text")
    return str(value)


def report(name: str, finding: str, items: list[str]) -> None:
    if items:
        logger.warning("%s: %d %s (e.g. %s)", name, len(items), finding, ", ".join(list(dict.fromkeys(items))[:3]))
