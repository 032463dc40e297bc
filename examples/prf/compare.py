"""Side by side: several trainings evaluated in one collection, as a table and a plot over the feedback passages.

python examples/prf/compare.py runs/prf/baseline runs/prf/comparative_1 --output docs/images/prf.png
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from itertools import cycle
from pathlib import Path

import numpy as np

from cmp_trainer.scripting import distinct_names, plain_errors

with plain_errors():
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from evaluation import CollectionResult, curve_rows, load_results, markdown_table, reference_row

MEASURE = "nDCG@10"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "folders", nargs="+", type=Path, help="output folders of run_prf.py; the ends of their paths are the labels"
    )
    parser.add_argument("--collection", help="by default the first one of the first folder")
    parser.add_argument(
        "--measure", default=MEASURE, help=f"of spread, significance and robustness; default {MEASURE}"
    )
    parser.add_argument("--output", type=Path, help="the plot, a .png; the table goes to standard output")
    arguments = parser.parse_args()
    names = distinct_names(arguments.folders)
    found = {
        name: load_results(folder / "evaluation.json")[0]
        for name, folder in zip(names, arguments.folders, strict=True)
    }
    collection = arguments.collection or next(iter(next(iter(found.values()))))
    results = {name: of_run[collection] for name, of_run in found.items()}
    print(comparison_table(results, arguments.measure))
    if arguments.output:
        plot_curves(results, arguments.output, title=collection, main=arguments.measure)


def comparison_table(results: Mapping[str, CollectionResult], main: str = MEASURE) -> str:
    """BM25 and the first pass once, then every run at 0, 1, … passages. Raises ValueError for differing queries."""
    first = next(iter(results.values()))
    for name, result in results.items():
        if sorted(result.queries) != sorted(first.queries) or sorted(result.first_pass) != sorted(first.first_pass):
            raise ValueError(f"{name} was evaluated with other queries or measures than {next(iter(results))}")
    rows = [reference_row("BM25", first, first.bm25, main), reference_row("first pass", first, first.first_pass, main)]
    for name, result in results.items():
        rows += curve_rows(name, result, main)
    columns = ["run", "passages", *first.first_pass, f"sd {main}", f"p {main}", "robustness", "robustness of one more"]
    return markdown_table(rows, columns)


def plot_curves(results: Mapping[str, CollectionResult], path: Path, title: str, main: str = MEASURE) -> None:
    """The measure over the number of feedback passages, one line a run; left as means, right as robustness index."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.3), layout="constrained")
    first = next(iter(results.values()))
    left.axhline(np.mean(first.first_pass[main]), color="black", linestyle="--", linewidth=1, label="first pass")
    left.axhline(np.mean(first.bm25[main]), color="gray", linestyle=":", linewidth=1, label="BM25")
    right.axhline(0, color="black", linestyle="--", linewidth=1)
    for (name, result), marker, dashes in zip(results.items(), cycle("osD^v"), cycle(["-", "--", "-.", ":"])):
        rows = curve_rows(name, result, main)
        numbers = [row["passages"] for row in rows]
        line = {"marker": marker, "linestyle": dashes, "markersize": 6, "fillstyle": "none", "label": name}
        left.plot(numbers, [row[main] for row in rows], **line)
        right.plot(numbers, [row["robustness"] for row in rows], **line)
    left.set(xlabel="feedback passages", ylabel=main, title=title)
    right.set(xlabel="feedback passages", ylabel="robustness index against the first pass", title="helped minus hurt")
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=7, fontsize=9, frameon=False)
    for axis in (left, right):
        axis.set_xticks(range(len(first.reformulated)))
        axis.grid(alpha=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    main()
