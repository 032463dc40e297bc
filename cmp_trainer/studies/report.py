"""A study's results to look at: tables as text and markdown, all numbers as csv and json, a plot."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from cmp_trainer.saving.files import written_whole
from cmp_trainer.studies.statistics import over_tasks, summarize
from cmp_trainer.studies.study import Metric

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_MARKERS = "osD^vP*Xph<>8d"


def frame_of(records: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """A row a run: task, method, seed, learning_rate, seconds of training, and its metrics.

    Seconds are the Trainer's own (`train_runtime`), which leave out imports and loading; the run's where it has none.
    """
    keys = ("task", "method", "seed", "learning_rate")
    return pd.DataFrame(
        {
            **{key: one[key] for key in keys},
            **one["metrics"],
            "seconds": one["metrics"].get("train_runtime", one["seconds"]),
        }
        for one in records
    )


def tables(runs: pd.DataFrame, metrics: Sequence[Metric], methods: Sequence[str]) -> dict[str, pd.DataFrame]:
    """The summary by task of all metrics, and over all tasks where there are several, with a column `metric`."""
    of_tasks = [summarize(runs, metric, methods).assign(metric=metric.name) for metric in metrics]
    found = {"tasks": pd.concat(of_tasks, ignore_index=True)}
    if runs["task"].nunique() > 1:
        overall = [over_tasks(runs, metric, methods).assign(metric=metric.name) for metric in metrics]
        found["overall"] = pd.concat(overall, ignore_index=True)
    return found


def readable(table: pd.DataFrame, metric: Metric, first: str, with_rates: Mapping[Any, str | None]) -> pd.DataFrame:
    """The rows of one metric as they are shown."""
    rows = table[table["metric"] == metric.name]
    shown = pd.DataFrame({"method": rows["method"]})
    if "task" in rows and (rows["task"] != "").any():
        shown.insert(0, "task", rows["task"])
    if "task" in rows and any(with_rates.values()):
        shown["learning rate"] = [with_rates.get((row.task, row.method)) or "" for row in rows.itertuples()]
    spread = rows["std"] if "std" in rows else [np.nan] * len(rows)
    shown[metric.name] = [_number(mean, std) for mean, std in zip(rows["mean"], spread, strict=True)]
    shown[f"difference to {first}"] = [
        "" if row.method == first else _with_interval(row.difference, row.low, row.high) for row in rows.itertuples()
    ]
    shown["better"] = ["" if row.method == first else f"{row.wins} of {row.pairs}" for row in rows.itertuples()]
    shown["runs"] = rows["runs"]
    shown["seconds"] = [f"{value:,.0f}" for value in rows["seconds"]]
    shown[f"x {first}"] = [f"{value:.2f}" if value == value else "" for value in rows["times"]]
    return shown


def as_markdown(
    found: Mapping[str, pd.DataFrame], metrics: Sequence[Metric], first: str, rates: Mapping[Any, str | None]
) -> str:
    """All tables with a heading and how to read them."""
    parts = [
        f"Differences are to {first}, over pairs of runs with the same seed, with a 95 % interval; `better` counts "
        "the pairs in which a method is better. Seconds are the median of a training."
    ]
    for metric in metrics:
        which = "higher" if metric.greater_is_better else "lower"
        for name, title in (("overall", "over all tasks"), ("tasks", "by task")):
            if name in found:
                heading = f"## {metric.name} {title}" if "overall" in found else f"## {metric.name}"
                table = readable(found[name], metric, first, rates)
                parts.append(
                    f"{heading} ({which} is better)\n\n{table.to_markdown(index=False, disable_numparse=True)}"
                )
    return "\n\n".join(parts) + "\n"


def as_text(found: Mapping[str, pd.DataFrame], metric: Metric, first: str, rates: Mapping[Any, str | None]) -> str:
    """The main table, for a terminal."""
    name = "overall" if "overall" in found else "tasks"
    return readable(found[name], metric, first, rates).to_string(index=False)


def write(folder: Path, found: Mapping[str, pd.DataFrame], settings: Mapping[str, Any], markdown: str) -> list[Path]:
    """results.csv, results.json and results.md in the study's folder."""
    table = pd.concat([found["tasks"], found["overall"].assign(task="all")]) if "overall" in found else found["tasks"]
    files = [folder / f"results{suffix}" for suffix in (".csv", ".json", ".md")]
    with written_whole(files[0]) as file:
        table.to_csv(file, index=False, float_format="%.6g")
    rows = json.loads(table.to_json(orient="records", double_precision=8))
    with written_whole(files[1]) as file:
        file.write_text(json.dumps({"study": settings, "results": rows}, indent=1) + "\n", encoding="utf-8")
    with written_whole(files[2]) as file:
        file.write_text(markdown, encoding="utf-8")
    return files


def plot(found: Mapping[str, pd.DataFrame], metric: Metric, first: str) -> Figure:
    """The metric against training time, one point a method, its interval as a bar; a panel a task, or all together.

    With several tasks the first panel is the mean over all of them. Bars are the intervals of the difference to the
    first method, drawn around each method's mean.

    Raises:
        ImportError: matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plots need matplotlib: pip install 'cmp-trainer[plot]'") from error
    of_tasks = found["tasks"][found["tasks"]["metric"] == metric.name]
    panels = [(str(task), rows) for task, rows in of_tasks.groupby("task", sort=False)]
    if "overall" in found:
        overall = found["overall"]
        panels.insert(0, ("all tasks", overall[overall["metric"] == metric.name]))
    methods = list(of_tasks["method"].unique())
    columns = min(4, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(max(6.4, 3.4 * columns), 3.2 * rows + 1.2), dpi=110, layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes, (title, table) in zip(grid.flat, panels, strict=False):
        for row in table.itertuples():
            bars = None if row.method == first or np.isnan(row.low) else _bars(row)
            axes.errorbar(row.times, row.mean, yerr=bars, label=row.method, **_style(methods.index(row.method)))
        level = table.loc[table["method"] == first, "mean"]
        if len(level):
            axes.axhline(level.iloc[0], color="0.8", linewidth=1, zorder=0)
        axes.set_title(title, fontsize=10)
        axes.set_xlabel(f"training time / {first}'s")
        axes.set_ylabel(metric.name.replace("_", " "))
        axes.grid(color="0.93")
        axes.spines[["top", "right"]].set_visible(False)
    for axes in list(grid.flat)[len(panels) :]:
        axes.set_visible(False)
    handles: dict[str, Any] = {}
    for axes in grid.flat:
        lines, labels = axes.get_legend_handles_labels()
        handles |= dict(zip(labels, lines, strict=True))
    figure.legend(
        list(handles.values()), list(handles), loc="outside lower center", ncols=min(5, 2 * columns), frameon=False
    )
    return figure


def _bars(row: Any) -> list[list[float]]:
    return [[row.difference - row.low], [row.high - row.difference]]


def _style(number: int) -> dict[str, Any]:
    from matplotlib import colormaps

    return {
        "fmt": _MARKERS[number % len(_MARKERS)],
        "color": colormaps["tab20"](2 * number % 20 + (number >= 10)),
        "markersize": 6,
        "capsize": 2,
        "elinewidth": 1,
    }


def _number(mean: float, std: float) -> str:
    return "" if np.isnan(mean) else f"{mean:.4f}" + ("" if np.isnan(std) else f" ± {std:.4f}")


def _with_interval(difference: float, low: float, high: float) -> str:
    if np.isnan(difference):
        return ""
    return f"{difference:+.4f}" + ("" if np.isnan(low) else f" ({low:+.4f} to {high:+.4f})")
