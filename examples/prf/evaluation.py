"""Evaluation of reformulated queries: effectiveness, significance and robustness.

- Effectiveness by ir-measures: MRR@10, nDCG@10, and R and MAP at the depth that all runs of the evaluation have, at
  most 1,000 (100 where the corpus is small). Binary measures count judgements from the collection's relevance level
  upwards; a level above 1 is in their names, `MRR(rel=2)@10`.
- Significance: a two-sided paired t-test over queries against the first pass (`scipy.stats.ttest_rel`).
- Robustness index: (queries helped - queries hurt) / queries, against the first pass, and against the same model with
  one feedback passage fewer, which asks what comparative loss is for: does one more passage ever hurt?
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import ir_measures
import numpy as np
from collection import Collection
from ir_measures import AP, RR, R, nDCG
from numpy.typing import ArrayLike
from scipy.stats import ttest_rel
from trec_runs import Run

from cmp_trainer.saving.files import written_whole

FIRST = 10  # passages that MRR and nDCG look at
SMALL_CORPUS = 100_000
TIE = 1e-9  # scores are sums of rounded numbers


def measured_depth(num_passages: int, retrieval_depth: int, given: Run | None = None) -> int:
    """The depth of R and MAP: 1,000, or 100 where the corpus is small, unless a run is less deep.

    Args:
        num_passages: in the corpus; a run that holds all of them is deep enough.
        retrieval_depth: how many passages are retrieved in evaluation.
        given: a first pass that was retrieved elsewhere, perhaps to another depth.

    Raises:
        ValueError: a depth below 10, which MRR@10 and nDCG@10 need.

    >>> measured_depth(8_841_823, 1000), measured_depth(8_841_823, 200), measured_depth(1_400, 1000)
    (1000, 200, 100)
    """
    reached = retrieval_depth
    if given is not None:
        reached = min(reached, max(map(len, given.values())))
    if reached < min(FIRST, num_passages):
        origin = "--retrieval_depth" if reached == retrieval_depth else "the depth of the given run"
        raise ValueError(f"{origin} is {reached}, but MRR@10 and nDCG@10 need {FIRST} passages; retrieve more")
    most = 100 if num_passages < SMALL_CORPUS else 1000
    return most if reached >= num_passages else min(most, reached)


def measures_of(relevance_level: int, depth: int) -> dict[str, ir_measures.measures.Measure]:
    """The measures by the names that tables use.

    >>> list(measures_of(1, 1000)), list(measures_of(2, 100))[0]
    (['MRR@10', 'nDCG@10', 'R@1000', 'MAP@1000'], 'MRR(rel=2)@10')
    """
    level = "" if relevance_level == 1 else f"(rel={relevance_level})"
    return {
        f"MRR{level}@{FIRST}": RR(rel=relevance_level) @ FIRST,
        f"nDCG@{FIRST}": nDCG @ FIRST,
        f"R{level}@{depth}": R(rel=relevance_level) @ depth,
        f"MAP{level}@{depth}": AP(rel=relevance_level) @ depth,
    }


def per_query(collection: Collection, run: Run, depth: int) -> dict[str, np.ndarray]:
    """Every measure's values, in the order of the collection's queries. A query without results counts 0."""
    measures = measures_of(collection.relevance_level, depth)
    names = {measure: name for name, measure in measures.items()}
    place = {query: index for index, query in enumerate(collection.queries)}
    values = {name: np.zeros(len(place)) for name in measures}
    scored = {query: dict(ranked) for query, ranked in run.items() if query in place}
    for found in ir_measures.iter_calc(list(names), collection.qrels, scored):
        values[names[found.measure]][place[found.query_id]] = found.value
    return values


def p_value(values: np.ndarray, reference: np.ndarray) -> float:
    """Of a two-sided paired t-test; 1 where no query differs."""
    if values.shape != reference.shape:
        raise ValueError(f"a paired test needs the same queries: {values.shape} values, {reference.shape} to compare")
    if np.allclose(values, reference, atol=TIE, rtol=0):
        return 1.0
    return float(ttest_rel(values, reference).pvalue)


def robustness_index(values: ArrayLike, reference: ArrayLike) -> float:
    """Share of queries helped minus share hurt.

    >>> robustness_index(np.array([0.5, 0.2, 0.9, 1.0]), np.array([0.1, 0.3, 0.5, 1.0]))
    0.25
    """
    difference = np.asarray(values) - np.asarray(reference)
    return float(((difference > TIE).sum() - (difference < -TIE).sum()) / len(difference))


def curve_rows(name: str, result: CollectionResult, main: str = "nDCG@10") -> list[dict[str, object]]:
    """One row for each number of feedback passages 0, 1, …: means over all queries, the p of each against the first
    pass, the spread over folds of the measure `main`, and the robustness indices by it."""
    rows = []
    for number, values in enumerate(result.reformulated):
        row: dict[str, object] = {"run": name, "passages": number}
        for measure, scores in values.items():
            row[measure] = float(np.mean(scores))
            row[f"p {measure}"] = p_value(np.array(scores), np.array(result.first_pass[measure]))
        row |= spread(result, values, main)
        row["robustness"] = robustness_index(values[main], result.first_pass[main])
        if number:
            row["robustness of one more"] = robustness_index(values[main], result.reformulated[number - 1][main])
        rows.append(row)
    return rows


def reference_row(
    name: str, result: CollectionResult, values: Mapping[str, list[float]], main: str
) -> dict[str, object]:
    """The row of a run without feedback: BM25 or the first pass."""
    means: dict[str, object] = {measure: float(np.mean(scores)) for measure, scores in values.items()}
    return {"run": name, **means, **spread(result, values, main)}


def spread(result: CollectionResult, values: Mapping[str, list[float]], main: str) -> dict[str, object]:
    """The standard deviation of the folds' means; nothing where there is one fold."""
    means = result.fold_means(values[main])
    return {f"sd {main}": float(means.std(ddof=1))} if len(means) > 1 else {}


def markdown_table(rows: Iterable[Mapping[str, object]], columns: Sequence[str]) -> str:
    """Rows as a Markdown table; numbers with three digits, what a row lacks as an empty cell."""
    lines = ["| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
    for row in rows:
        cells = [row.get(column, "") for column in columns]
        lines.append(
            "| " + " | ".join(f"{cell:.3f}" if isinstance(cell, float) else str(cell) for cell in cells) + " |"
        )
    return "\n".join(lines)


@dataclass
class CollectionResult:
    """Every query's values by measure, for the first pass, BM25 and the reformulated queries at 0, 1, … passages."""

    queries: list[str]
    folds: list[int]
    first_pass: dict[str, list[float]]
    bm25: dict[str, list[float]]
    reformulated: list[dict[str, list[float]]]

    def joined(self, other: CollectionResult) -> CollectionResult:
        """The queries of both, as the folds of one evaluation."""

        def chain(mine: dict[str, list[float]], theirs: dict[str, list[float]]) -> dict[str, list[float]]:
            return {measure: mine[measure] + theirs[measure] for measure in mine}

        return CollectionResult(
            self.queries + other.queries,
            self.folds + other.folds,
            chain(self.first_pass, other.first_pass),
            chain(self.bm25, other.bm25),
            [chain(mine, theirs) for mine, theirs in zip(self.reformulated, other.reformulated, strict=True)],
        )

    def fold_means(self, values: Sequence[float]) -> np.ndarray:
        """The mean over the queries of each fold: (folds,)."""
        folds, array = np.asarray(self.folds), np.asarray(values)
        return np.array([array[folds == fold].mean() for fold in np.unique(folds)])


def save_results(results: Mapping[str, CollectionResult], settings: Mapping[str, object], path: Path) -> None:
    content = {"settings": settings, "collections": {name: asdict(result) for name, result in results.items()}}
    with written_whole(path) as file:
        file.write_text(json.dumps(content) + "\n")


def load_results(path: Path) -> tuple[dict[str, CollectionResult], dict[str, object]]:
    """Results by collection, and the settings they were found with."""
    content = json.loads(path.read_text())
    results = {name: CollectionResult(**result) for name, result in content["collections"].items()}
    return results, content["settings"]
