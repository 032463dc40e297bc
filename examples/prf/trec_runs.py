"""TREC run files: one line `query Q0 document rank score tag` for each retrieved document.

In memory a run is `{query: [(document, score), …]}`, best first. Evaluation tools order by score and ignore the rank,
so a file whose ranks and scores disagree has no single meaning and is rejected, as are duplicate ranks or documents.
Lines out of order are sorted, and that is reported.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable
from pathlib import Path

from cmp_trainer.saving.files import written_whole

logger = logging.getLogger(__name__)
Run = dict[str, list[tuple[str, float]]]


def read_run(path: str | Path) -> Run:
    """Read a TREC run file. Raises ValueError where there is none, and with the line for what has not one meaning."""
    if not Path(path).is_file():
        raise ValueError(f"the run {path} does not exist")
    entries: dict[str, list[tuple[int, str, float]]] = {}
    disordered = 0
    with open(path, encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            query, document, rank, score = parse_line(line, path, number)
            ranked = entries.setdefault(query, [])
            disordered += bool(ranked) and ranked[-1][0] > rank
            ranked.append((rank, document, score))
    if disordered:
        logger.warning("%s: %d lines are out of rank order; sorted by rank", path, disordered)
    return {query: in_rank_order(ranked, query, path) for query, ranked in entries.items()}


def write_run(run: Run, path: str | Path, tag: str) -> None:
    """Write a run with ranks from 1. Scores keep nine digits: enough to tell single-precision numbers apart."""
    check_words(tag)
    with written_whole(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        for query, ranked in run.items():
            for rank, (document, score) in enumerate(ranked, start=1):
                check_words(query, document)
                file.write(f"{query} Q0 {document} {rank} {score:.9g} {tag}\n")


def parse_line(line: str, path: str | Path, number: int) -> tuple[str, str, int, float]:
    fields = line.split()
    if len(fields) != 6:
        raise ValueError(
            f"{path}, line {number}: {len(fields)} fields, expected 6 (query Q0 document rank score tag): "
            f"{line.strip()!r}"
        )
    try:
        rank, score = int(fields[3]), float(fields[4])
    except ValueError:
        raise ValueError(
            f"{path}, line {number}: rank {fields[3]!r} and score {fields[4]!r} must be numbers (rank a whole one)"
        ) from None
    if not math.isfinite(score):
        raise ValueError(f"{path}, line {number}: the score is {fields[4]}, by which nothing can be ranked")
    return fields[0], fields[2], rank, score


def in_rank_order(ranked: list[tuple[int, str, float]], query: str, path: str | Path) -> list[tuple[str, float]]:
    """Sorted by rank; raises where ranks or documents repeat or a lower rank has a higher score."""
    ranked = sorted(ranked, key=lambda entry: entry[0])
    documents = set()
    for position, (rank, document, score) in enumerate(ranked):
        if position and ranked[position - 1][0] == rank:
            raise ValueError(
                f"{path}: query {query} has rank {rank} twice; write the run anew with one rank a document"
            )
        if position and ranked[position - 1][2] < score:
            raise ValueError(
                f"{path}: query {query}, rank {rank} has score {score}, above that of the rank before it: "
                "ranks and scores disagree, and evaluation goes by the scores; sort the run by score"
            )
        if document in documents:
            raise ValueError(f"{path}: query {query} retrieves document {document} twice; keep its best rank only")
        documents.add(document)
    return [(document, score) for _, document, score in ranked]


def check_words(*names: str) -> None:
    for name in names:
        if not name or any(character.isspace() for character in name):
            raise ValueError(f"{name!r} is empty or has white space: a TREC run holds single words; rename it")


def run_from_rows(
    query_ids: Iterable[str], rows: Iterable[Iterable[int]], scores: Iterable[Iterable[float]], ids: list[str]
) -> Run:
    """A run from search results: for each query its rows in the corpus and their scores, best first."""
    return {
        query: [(ids[row], float(score)) for row, score in zip(found, values, strict=True)]
        for query, found, values in zip(query_ids, rows, scores, strict=True)
    }
