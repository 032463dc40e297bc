"""A study's results to look at: tables as text and markdown, all numbers as csv and json, a plot."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from cmp_trainer.saving.files import written_whole
from cmp_trainer.studies.statistics import ALL_TASKS, Summary
from cmp_trainer.studies.study import Metric

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Rates = Mapping[tuple[str, str], str | None]  # the learning rate of each (task, method)
_MARKERS = "osD^vP*Xph<>8d"


def readable(results: Sequence[Summary], rates: Rates) -> pd.DataFrame:
    """The rows of one metric as they are shown, with a column for each method that they are compared with."""
    against = list(dict.fromkeys(row.against for row in results))
    rows = [row for row in results if row.against == against[0]]
    compared = {(row.task, row.method, row.against): row for row in results}
    shown = pd.DataFrame({"method": [row.method for row in rows]})
    if len({row.task for row in rows}) > 1:
        shown.insert(0, "task", [row.task for row in rows])
    if any(rates.values()) and rows[0].task != ALL_TASKS:
        shown["learning rate"] = [rates.get((row.task, row.method)) or "" for row in rows]
    shown[rows[0].metric] = [_with_spread(row) for row in rows]
    for other in against:
        of_other = [compared.get((row.task, row.method, other)) for row in rows]
        shown[f"difference to {other}; wins"] = [_with_interval(row) for row in of_other]
    shown["runs"] = [row.runs for row in rows]
    if len({row.tasks for row in rows}) > 1:
        shown["tasks"] = [row.tasks for row in rows]
    if any(row.diverged for row in rows):
        shown["diverged"] = [row.diverged for row in rows]
    shown["seconds"] = [f"{row.seconds:,.0f}" for row in rows]
    shown[f"x {against[0]}"] = ["" if math.isnan(row.times) else f"{row.times:.2f}" for row in rows]
    return shown


def overview(results: Sequence[Summary]) -> pd.DataFrame:
    """The means of all metrics, over all tasks if there are several; a star where an interval excludes 0."""
    first, task = results[0].against, results[0].task
    rows = [row for row in results if (row.against, row.task) == (first, task)]
    methods, metrics = list(dict.fromkeys(row.method for row in rows)), list(dict.fromkeys(row.metric for row in rows))
    cells = {(row.method, row.metric): f"{row.mean:.4f}{'*' if row.low > 0 or row.high < 0 else ''}" for row in rows}
    shown = pd.DataFrame({"method": methods})
    for metric in metrics:
        shown[metric] = [cells.get((method, metric), "") for method in methods]
    times = {row.method: row.times for row in rows}
    shown[f"x {first}"] = [f"{times[method]:.2f}" for method in methods]
    return shown


def as_markdown(results: Sequence[Summary], metrics: Sequence[Metric], rates: Rates, notes: Sequence[str] = ()) -> str:
    """All tables, each with a heading, how to read them, and what else has to be known."""
    parts = [
        "Differences are means over pairs of runs with the same seed, the row's method minus the other, with a 95 % "
        "interval and the number of pairs that the method wins. Seconds are the median training time; over all tasks, "
        "the mean of the tasks' medians.",
        *notes,
    ]
    if len(metrics) > 1:
        where, first = " over all tasks" if results[0].task == ALL_TASKS else "", results[0].against
        title = f"## Overview{where} (*: the interval of the difference to {first} excludes 0, for better or worse)"
        parts.append(f"{title}\n\n{as_markdown_table(overview(results))}")
    for metric in metrics:
        direction = "higher" if metric.greater_is_better else "lower"
        for title, rows in _parts(results, metric):
            table = as_markdown_table(readable(rows, rates))
            parts.append(f"## {metric.name}{title} ({direction} is better)\n\n{table}")
    return "\n\n".join(parts) + "\n"


def as_markdown_table(table: pd.DataFrame) -> str:
    """A table of texts.

    pandas' own `to_markdown` needs tabulate, which torch imports at exit where it is installed, and then a run that
    Ctrl-C ends no longer ends by the signal.
    """
    rows = [list(table.columns), ["---"] * len(table.columns), *table.astype(str).to_numpy().tolist()]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def as_text(results: Sequence[Summary], metric: Metric, rates: Rates) -> str:
    """The table of one metric for a terminal, over all tasks where there are several."""
    return readable(_parts(results, metric)[0][1], rates).to_string(index=False)


def write(folder: Path, results: Sequence[Summary], settings: Mapping[str, Any], rates: Rates) -> list[Path]:
    """results.csv and results.json in the study's folder: every number, with the learning rates that were chosen."""
    files = [folder / f"results{suffix}" for suffix in (".csv", ".json")]
    rows = [asdict(row) | {"learning_rate": rates.get((row.task, row.method))} for row in results]
    with written_whole(files[0]) as file:
        pd.DataFrame(rows).to_csv(file, index=False, float_format="%.6g")
    numbers = [{name: None if value != value else value for name, value in row.items()} for row in rows]  # NaN
    with written_whole(files[1]) as file:
        file.write_text(json.dumps({"study": settings, "results": numbers}) + "\n", encoding="utf-8")
    return files


def plot(results: Sequence[Summary], metric: Metric) -> Figure:
    """The metric against training time, one point a method; a panel for all tasks together and one for each.

    Bars are the intervals of the difference to the method that the others are compared with (the first of several),
    drawn around a method's mean: where a bar crosses the grey line, there may be no difference.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    rows = [row for row in results if row.metric == metric.name]
    first = rows[0].against
    rows = [row for row in rows if row.against == first]
    tasks, methods = list(dict.fromkeys(row.task for row in rows)), list(dict.fromkeys(row.method for row in rows))
    columns = min(4, len(tasks))
    lines = -(-len(tasks) // columns)
    size = (max(6.4, 3.4 * columns), 3.2 * lines + 0.4 + 0.25 * len(methods) / min(5, 2 * columns))
    figure = Figure(figsize=size, dpi=110, layout="constrained")
    grid = list(figure.subplots(lines, columns, squeeze=False).flat)
    handles: dict[str, Any] = {}
    for axes, task in zip(grid, tasks, strict=False):
        for row in rows:
            if row.task == task and row.pairs:
                if row.method == first:
                    axes.axhline(row.mean, color="0.6", linewidth=1, zorder=0)
                style = _style(methods.index(row.method))
                handles[row.method] = axes.errorbar(row.times, row.mean, yerr=_bar(row), **style)
        axes.set_title(task, fontsize=10)
        axes.set_xlabel(f"training time / {first}'s")
        axes.set_ylabel(metric.name.replace("_", " "))
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.grid(color="0.93")
        axes.spines[["top", "right"]].set_visible(False)
    for axes in grid[len(tasks) :]:
        axes.set_visible(False)
    columns = min(5, 2 * columns)
    figure.legend(list(handles.values()), list(handles), loc="outside lower center", ncols=columns, frameon=False)
    return figure


def _parts(results: Sequence[Summary], metric: Metric) -> list[tuple[str, list[Summary]]]:
    """The tables of a metric: over all tasks, if there are several, and by task."""
    rows = [row for row in results if row.metric == metric.name]
    overall, of_tasks = [row for row in rows if row.task == ALL_TASKS], [row for row in rows if row.task != ALL_TASKS]
    return [(" over all tasks", overall), (" by task", of_tasks)] if overall else [("", of_tasks)]


def _bar(row: Summary) -> list[list[float]] | None:
    if row.method == row.against or math.isnan(row.low):
        return None
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


def _with_spread(row: Summary) -> str:
    if math.isnan(row.mean):
        return "all diverged"
    return f"{row.mean:.4f}" + ("" if math.isnan(row.std) else f" ± {row.std:.4f}")


def _with_interval(row: Summary | None) -> str:
    if row is None or row.method == row.against or math.isnan(row.difference):
        return ""
    ends = "" if math.isnan(row.low) else f" ({row.low:+.4f} to {row.high:+.4f})"
    return f"{row.difference:+.4f}{ends}; {row.wins} of {row.pairs}"
