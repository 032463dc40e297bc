"""What the runs of a study say: means, paired differences with their intervals, wins and costs.

Runs with the same seed are a pair: they draw the same data and initial weights, and usually the same order, so their
difference usually varies less than that of runs with different seeds.

- **One task.** The interval of the mean difference is that of the paired t-test.
- **Several tasks.** The mean over tasks of the mean difference. Its variance comes from the seeds within each task,
  with Satterthwaite's degrees of freedom (https://doi.org/10.2307/3002019), which for one task is the paired t-test.
  It says what other seeds would give on these tasks, and nothing about other tasks.

  A bootstrap stratified by task, as in https://arxiv.org/abs/2108.13264, is made for tens of seeds. With normal
  differences of unequal variance on four tasks, its 95 % interval holds the mean in 82 % of studies with 3 seeds, 88 %
  with 5 and 92 % with 10; this one does in 96 %, 95 % and 95 %.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import geometric_mean
from typing import Any

import numpy as np

from cmp_trainer.studies.study import Metric, finite_value

CONFIDENCE = 0.95
ALL_TASKS = "all tasks"


@dataclass(frozen=True)
class Summary:
    """One method on one task, or over all of them, by one metric, compared with another method.

    Attributes:
        runs: how many runs there are.
        diverged: in how many of them the metric is not a finite number; they count in nothing but this and the time.
        tasks: how many tasks the numbers are of.
        mean, std: of these runs; over all tasks the mean of the tasks' means, and no std.
        against: the method that it is compared with.
        difference, low, high: mean paired difference to that method and its 95 % interval; NaN where there are no
            pairs, and no interval of a single one.
        pairs, wins: runs of a seed that both methods have, and in how many of them this one is better.
        seconds: of a training, the median; over all tasks the mean of the medians.
        times: seconds by those of the other method with the same seed, the median; over all tasks the geometric mean.
    """

    task: str
    method: str
    metric: str
    against: str
    runs: int
    diverged: int
    tasks: int
    mean: float
    std: float
    difference: float
    low: float
    high: float
    pairs: int
    wins: int
    seconds: float
    times: float


def summarize(
    records: Sequence[Mapping[str, Any]], metric: Metric, methods: Sequence[str], against: str
) -> list[Summary]:
    """Every method on every task, in this order of methods, compared with one of them.

    With several tasks, the methods over all tasks come first.
    """
    tasks = list(dict.fromkeys(one["task"] for one in records))
    of_tasks, samples = [], {}
    for task in tasks:
        for method in methods:
            runs = _by_seed(records, task, method)
            if runs:
                other = _by_seed(records, task, against)
                samples[task, method] = differences(runs, other, metric.name)
                of_tasks.append(_summary(task, method, metric, against, runs, other, samples[task, method]))
    if len(tasks) == 1:
        return of_tasks
    overall = []
    for method in methods:
        ours = [one for one in of_tasks if one.method == method and one.pairs]
        if ours:
            overall.append(_over_tasks(ours, [samples[one.task, method] for one in ours]))
    return [*overall, *of_tasks]


def differences(runs: Mapping[int, Any], other: Mapping[int, Any], metric: str) -> np.ndarray:
    """Of the seeds that both have, where neither diverged."""
    pairs = [(finite_value(runs[seed], metric), finite_value(other[seed], metric)) for seed in runs if seed in other]
    return np.array([x - y for x, y in pairs if x is not None and y is not None], dtype=float)


def interval(*samples: Sequence[float] | np.ndarray) -> tuple[float, float]:
    """The 95 % interval of the mean over tasks of their mean paired differences.

    Args:
        samples: the paired differences of each task.

    Returns:
        Its ends. NaN where a task has fewer than two differences, and where those of every task are identical and not
        zero, which happens by chance with few rows and seeds.

    >>> low, high = interval([0.01, 0.02, 0.03])
    >>> round(low, 4), round(high, 4)
    (-0.0048, 0.0448)
    """
    from scipy import stats

    values = [np.asarray(sample, dtype=float) for sample in samples]
    if not values or min(map(len, values)) < 2:
        return np.nan, np.nan
    if all(np.ptp(one) < 1e-12 for one in values):
        return (np.nan, np.nan) if any(one.any() for one in values) else (0.0, 0.0)
    variances = np.array([one.var(ddof=1) / len(one) for one in values])  # of the means
    free = np.array([len(one) - 1 for one in values])
    freedom = variances.sum() ** 2 / (variances**2 / free).sum()
    mean, error = np.mean([one.mean() for one in values]), np.sqrt(variances.sum()) / len(values)
    low, high = stats.t.interval(CONFIDENCE, freedom, loc=mean, scale=error)
    return float(low), float(high)


def seconds_of(record: Mapping[str, Any]) -> float:
    """The Trainer's own `train_runtime`, which leaves out imports and loading; the whole run's where there is none."""
    return record["metrics"].get("train_runtime", record["seconds"])


def _by_seed(records: Sequence[Mapping[str, Any]], task: str, method: str) -> dict[int, Mapping[str, Any]]:
    return {one["seed"]: one for one in records if one["task"] == task and one["method"] == method}


def _summary(
    task: str,
    method: str,
    metric: Metric,
    against: str,
    runs: Mapping[int, Mapping[str, Any]],
    other: Mapping[int, Mapping[str, Any]],
    found: np.ndarray,
) -> Summary:
    reported = [finite_value(one, metric.name) for one in runs.values()]
    values = np.array([value for value in reported if value is not None], dtype=float)
    ratios = [seconds_of(runs[seed]) / seconds_of(other[seed]) for seed in runs if seed in other]
    low, high = interval(found)
    return Summary(
        task=task,
        method=method,
        metric=metric.name,
        against=against,
        runs=len(reported),
        diverged=len(reported) - len(values),
        tasks=1,
        mean=float(values.mean()) if len(values) else np.nan,
        std=float(values.std(ddof=1)) if len(values) > 1 else np.nan,
        difference=float(found.mean()) if len(found) else np.nan,
        low=low,
        high=high,
        pairs=len(found),
        wins=int((metric.sign * found > 0).sum()),
        seconds=float(np.median([seconds_of(one) for one in runs.values()])),
        times=float(np.median(ratios)) if ratios else np.nan,
    )


def _over_tasks(ours: Sequence[Summary], samples: Sequence[np.ndarray]) -> Summary:
    low, high = interval(*samples)
    return Summary(
        task=ALL_TASKS,
        method=ours[0].method,
        metric=ours[0].metric,
        against=ours[0].against,
        runs=sum(one.runs for one in ours),
        diverged=sum(one.diverged for one in ours),
        tasks=len(ours),
        mean=float(np.mean([one.mean for one in ours])),
        std=np.nan,
        difference=float(np.mean([one.difference for one in ours])),
        low=low,
        high=high,
        pairs=sum(one.pairs for one in ours),
        wins=sum(one.wins for one in ours),
        seconds=float(np.mean([one.seconds for one in ours])),
        times=geometric_mean([one.times for one in ours]),
    )
