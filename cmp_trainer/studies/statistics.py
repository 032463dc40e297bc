"""What the runs of a study say: means, paired differences with their intervals, wins and costs.

Runs with the same seed are a pair: they draw the same data, order and initial weights, so their difference varies less
than the runs do.

- **One task.** The interval of the mean difference is that of the paired t-test.
- **Several tasks.** The mean over tasks of the mean difference, with a bootstrap in which seeds are drawn anew within
  each task (stratified by task, as in https://arxiv.org/abs/2108.13264). It says what other seeds would give on these
  tasks, and nothing about other tasks.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from cmp_trainer.studies.study import Metric

CONFIDENCE = 0.95
RESAMPLES = 9999


def summarize(runs: pd.DataFrame, metric: Metric, methods: Sequence[str]) -> pd.DataFrame:
    """A row for each task and method, compared with the first method.

    Args:
        runs: a row a run, with columns task, method, seed, seconds and the metric.
        metric: what is compared.
        methods: their order; the first is what the others are compared with.

    Returns:
        Columns task, method, runs, mean, std, difference (to the first method, of the seeds that both have), low and
        high (the interval of that difference), pairs, wins (in how many of them the method is better), seconds
        (median) and times (median over the pairs of the ratio of seconds).
    """
    rows = []
    for task in runs["task"].unique():
        of_task = runs[runs["task"] == task]
        values = of_task.pivot(index="seed", columns="method", values=metric.name)
        seconds = of_task.pivot(index="seed", columns="method", values="seconds")
        for method in methods:
            if method not in values:
                continue
            found = values[method].dropna()
            differences = _differences(values, method, methods[0])
            low, high = interval(differences)
            ratio = (seconds[method] / seconds[methods[0]]).median() if methods[0] in seconds else np.nan
            rows.append(
                {
                    "task": task,
                    "method": method,
                    "runs": len(found),
                    "mean": found.mean(),
                    "std": found.std(),
                    "difference": differences.mean() if len(differences) else np.nan,
                    "low": low,
                    "high": high,
                    "pairs": len(differences),
                    "wins": int((metric.sign * differences > 0).sum()),
                    "seconds": seconds[method].median(),
                    "times": ratio,
                }
            )
    return pd.DataFrame(rows)


def over_tasks(runs: pd.DataFrame, metric: Metric, methods: Sequence[str]) -> pd.DataFrame:
    """A row for each method: the mean over tasks, as in `summarize`; only tasks that have all of its pairs count.

    `times` is the geometric mean over the tasks.
    """
    by_task = summarize(runs, metric, methods)
    rows = []
    for method in methods:
        of_method = by_task[(by_task["method"] == method) & (by_task["pairs"] > 0)]
        samples = [_of_task(runs, metric, task, method, methods[0]) for task in of_method["task"]]
        low, high = stratified_interval(samples)
        rows.append(
            {
                "method": method,
                "tasks": len(of_method),
                "runs": int(of_method["runs"].sum()),
                "mean": of_method["mean"].mean(),
                "difference": of_method["difference"].mean(),
                "low": low,
                "high": high,
                "pairs": int(of_method["pairs"].sum()),
                "wins": int(of_method["wins"].sum()),
                "seconds": of_method["seconds"].mean(),
                "times": float(np.exp(np.log(of_method["times"]).mean())) if len(of_method) else np.nan,
            }
        )
    return pd.DataFrame(rows)


def interval(differences: Sequence[float] | np.ndarray) -> tuple[float, float]:
    """The 95 % interval of the mean of paired differences, by Student's t; NaN for fewer than two of them.

    >>> low, high = interval([0.01, 0.02, 0.03])
    >>> round(low, 4), round(high, 4)
    (-0.0048, 0.0448)
    """
    from scipy import stats

    values = np.asarray(differences, dtype=float)
    if len(values) < 2:
        return np.nan, np.nan
    if np.ptp(values) == 0:
        return float(values[0]), float(values[0])
    found = stats.ttest_1samp(values, 0).confidence_interval(CONFIDENCE)  # pyright: ignore
    return float(found.low), float(found.high)


def stratified_interval(samples: Sequence[np.ndarray]) -> tuple[float, float]:
    """The 95 % bootstrap interval of the mean over tasks of their mean differences.

    Args:
        samples: the paired differences of each task. NaN where a task has fewer than two.
    """
    from scipy import stats

    if not samples or min(map(len, samples)) < 2:
        return np.nan, np.nan
    if all(np.ptp(sample) == 0 for sample in samples):
        mean = float(np.mean([sample[0] for sample in samples]))
        return mean, mean

    def mean_of_means(*drawn: np.ndarray, axis: int = -1) -> np.ndarray:
        return np.mean([one.mean(axis=axis) for one in drawn], axis=0)

    found = stats.bootstrap(
        samples,
        mean_of_means,
        n_resamples=RESAMPLES,
        confidence_level=CONFIDENCE,
        method="percentile",
        rng=np.random.default_rng(0),
    ).confidence_interval
    return float(found.low), float(found.high)


def _of_task(runs: pd.DataFrame, metric: Metric, task: str, method: str, first: str) -> np.ndarray:
    of_task = runs[runs["task"] == task]
    return _differences(of_task.pivot(index="seed", columns="method", values=metric.name), method, first)


def _differences(values: pd.DataFrame, method: str, first: str) -> np.ndarray:
    """Of the seeds that both have."""
    if first not in values or method not in values:
        return np.array([])
    return (values[method] - values[first]).dropna().to_numpy()
