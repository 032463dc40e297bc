"""A study: tasks x methods x learning rates x seeds, each a run of one script with its own arguments.

Learning rates are a second axis beside the seeds. One is chosen for each method by a metric of a validation split, and
only the runs at that rate are reported, by a metric of another split.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from cmp_trainer.studies.methods import Method, require_distinct

LOWER_IS_BETTER = ("loss", "nll", "error", "ece", "perplexity", "ppl", "wer", "cer", "mse", "rmse", "mae", "runtime")
SET_FOR_EACH_RUN = {
    "--seed": "every run has its own; say how many with --seeds",
    "--output_dir": "every run has its own, in --output",
}


@dataclass(frozen=True)
class Metric:
    """A number that runs report, such as `eval_accuracy`, and whether more of it is better.

    Lower is better where the last part of the name is a loss or an error (`LOWER_IS_BETTER`), else higher, unless
    `:lower` or `:higher` says so.
    """

    name: str
    greater_is_better: bool

    @classmethod
    def parse(cls, text: str) -> Metric:
        """From `NAME`, `NAME:lower` or `NAME:higher`."""
        name, separator, direction = text.partition(":")
        if separator and direction not in ("lower", "higher"):
            raise ValueError(f"--metric {text}: after the colon expected lower or higher, whichever is better")
        last = name.rpartition("_")[2].lower()
        return cls(name, direction == "higher" if separator else last not in LOWER_IS_BETTER)

    def __str__(self) -> str:
        return f"{self.name}:{'higher' if self.greater_is_better else 'lower'}"

    @property
    def split(self) -> str:
        """The split that it is measured on: `eval` of `eval_accuracy`."""
        return self.name.partition("_")[0]

    @property
    def sign(self) -> int:
        """1 or -1: what a difference is multiplied with, so that more is better."""
        return 1 if self.greater_is_better else -1


def record_key(record: Mapping[str, Any]) -> tuple[str, str, str | None, int]:
    """As a run's key."""
    return record["task"], record["method"], record["learning_rate"], record["seed"]


def finite_value(record: Mapping[str, Any], name: str) -> float | None:
    """A metric of a record; None where the run diverged: this metric or any loss is not a finite number."""
    metrics = record["metrics"]
    diverged = any(value is None for other, value in metrics.items() if other.endswith("loss"))
    return None if diverged else metrics[name]


@dataclass(frozen=True)
class Run:
    """One run of the script; the learning rate is that of the script's own arguments where None."""

    task: str
    method: str
    learning_rate: str | None
    seed: int
    words: tuple[str, ...] = field(compare=False)

    @property
    def key(self) -> tuple[str, str, str | None, int]:
        """What tells it from the other runs of its study, as in its record."""
        return self.task, self.method, self.learning_rate, self.seed

    def __str__(self) -> str:
        rate = f"learning rate {self.learning_rate}" if self.learning_rate else ""
        return ", ".join(part for part in (self.task, self.method, rate, f"seed {self.seed}") if part)


@dataclass(frozen=True)
class Study:
    """What is run, and what is read from it.

    Args:
        script: path of a Hugging Face training script.
        arguments: what every run is given; `{seed}`, `{task}` and `{method}` in it are replaced.
        methods: how it is trained.
        tasks: further arguments of each task by its name; one task without a name where there are no others.
        num_seeds: seeds 0, 1, … are passed as `--seed`.
        metrics: what is reported; the first is the one that is printed.
        against: the methods that the others are compared with; the first one where empty.
        learning_rates: the rates to choose from; none leaves it to the arguments.
        select: the metric by which a rate is chosen.
        select_seeds: how many seeds a rate is chosen with; the first ones.
        select_tasks: the tasks a rate is chosen on, one rate a method for all tasks; where empty, every task has its
            own.

    Raises:
        ValueError: settings that cannot be run, or that select on the split they report.
    """

    script: str
    arguments: Sequence[str]
    methods: Sequence[Method]
    tasks: Mapping[str, Sequence[str]]
    num_seeds: int
    metrics: Sequence[Metric]
    against: Sequence[str] = ()
    learning_rates: Sequence[str] = ()
    select: Metric | None = None
    select_seeds: int = 1
    select_tasks: Sequence[str] = ()

    def __post_init__(self) -> None:
        if not self.metrics:
            raise ValueError("--metric is missing; name what the script reports, such as eval_accuracy")
        if self.num_seeds < 1:
            raise ValueError(f"--seeds {self.num_seeds}: expected 1 or more")
        require_distinct("--method", [method.name for method in self.methods])
        self._check_methods()
        self._check_arguments()
        self._check_tasks()
        require_distinct("--metric", [metric.name for metric in self.metrics])
        self._check_selection()

    def _check_methods(self) -> None:
        require_distinct("--against", self.against)
        names = [method.name for method in self.methods]
        for name in self.against:
            if name not in names:
                raise ValueError(f"--against {name} is not one of the methods: {', '.join(names)}")
        of_tasks = [word for words in self.tasks.values() for word in words]
        not_compared = [one.name for one in self.methods if not _asks_for_ablations(one.words)]
        if _asks_for_ablations([*self.arguments, *of_tasks]) and not_compared:
            raise ValueError(
                f"--cmp_num_ablations is given to every run, so {not_compared[0]} would be comparative too; "
                "give it to the methods that it belongs to, --method 'ours=--cmp_num_ablations 2'"
            )

    def _check_arguments(self) -> None:
        taken = dict(SET_FOR_EACH_RUN)
        if self.learning_rates:
            taken["--learning_rate"] = "it is chosen from --learning_rates"
        of_methods = [word for method in self.methods for word in method.words]
        of_tasks = [word for words in self.tasks.values() for word in words]
        for word in (*self.arguments, *of_tasks, *of_methods):
            name = word.partition("=")[0].replace("-", "_").replace("__", "--", 1)
            if name in taken:
                raise ValueError(f"{word.partition('=')[0]} cannot be an argument of a study: {taken[name]}")
            if word == "--":
                raise ValueError("-- cannot be among the arguments of a study; leave it out")

    def _check_tasks(self) -> None:
        seen: dict[tuple[str, ...], str] = {}
        for task, given in self.tasks.items():
            if len(self.tasks) == 1 and task and not given:
                raise ValueError(
                    f"--task {task} has no arguments; pass NAME=ARGS, or -- --task {task} if it is for the script"
                )
            words = tuple(self._words(task, self.methods[0], None, 0))
            if words in seen:
                raise ValueError(
                    f"--task {task} has the same arguments as {seen[words]}; give each its own, NAME=ARGS"
                )
            seen[words] = task

    def _check_selection(self) -> None:
        require_distinct("--learning_rates", self.learning_rates)
        require_distinct("--select_tasks", self.select_tasks)
        by_value: dict[float, str] = {}
        for rate in self.learning_rates:
            if not _is_number(rate):
                raise ValueError(f"--learning_rates {rate}: expected numbers")
            same = by_value.setdefault(float(rate), rate)
            if same != rate:
                raise ValueError(f"--learning_rates {same} and {rate} are the same number")
        if bool(self.learning_rates) != bool(self.select):
            given, missing = ("--select", "--learning_rates") if self.select else ("--learning_rates", "--select")
            raise ValueError(f"{given} needs {missing}: a learning rate is chosen by a metric of a validation split")
        if self.select is None:
            if self.select_tasks:
                raise ValueError("--select_tasks needs --select and --learning_rates")
            return
        same = [metric.name for metric in self.metrics if metric.split == self.select.split]
        if same:
            raise ValueError(
                f"--metric {same[0]} and --select {self.select.name} are measured on the same split, so the "
                "result would be biased; report a metric of another split, such as test_accuracy"
            )
        if not 1 <= self.select_seeds <= self.num_seeds:
            raise ValueError(f"--select_seeds {self.select_seeds}: expected 1 to --seeds {self.num_seeds}")
        unknown = [task for task in self.select_tasks if task not in self.tasks]
        if unknown:
            raise ValueError(f"--select_tasks {unknown[0]} is not one of the tasks: {', '.join(self.tasks)}")
        for task in self.tasks:
            words = self._words(task, self.methods[0], None, 0)
            files = {name: value for name, value in pairwise(words) if name.endswith("_file")}
            if "--test_file" in files and files["--test_file"] == files.get("--validation_file"):
                raise ValueError(f"--test_file and --validation_file are both {files['--test_file']}; use two files")

    @property
    def reported_metrics(self) -> list[Metric]:
        """What every run has to report: the metrics, and the one that selects."""
        return [*self.metrics, *([self.select] if self.select else [])]

    def pairs(self) -> list[tuple[str, str]]:
        """Every (task, method)."""
        return [(task, method.name) for task in self.tasks for method in self.methods]

    def selection_runs(self) -> list[Run]:
        """What a learning rate is chosen from; seed by seed, so that a study that is cut short is balanced."""
        return [
            self._run(task, method, rate, seed)
            for seed in range(self.select_seeds if self.learning_rates else 0)
            for task in self.select_tasks or self.tasks
            for method in self.methods
            for rate in self.learning_rates
        ]

    def reported_runs(self, rates: Mapping[tuple[str, str], str | None]) -> list[Run]:
        """The runs at the learning rate of each (task, method); those without one are left out."""
        return [
            self._run(task, method, rates[task, method.name], seed)
            for seed in range(self.num_seeds)
            for task in self.tasks
            for method in self.methods
            if (task, method.name) in rates
        ]

    def choose_rates(self, finished: Iterable[Mapping[str, Any]]) -> dict[tuple[str, str], str | None]:
        """The learning rate of each (task, method): the one with the best mean of the selecting metric.

        None is chosen where a run is missing, or where runs diverged at every rate.

        Args:
            finished: records of runs, all of which report the metric.
        """
        if self.select is None:
            return dict.fromkeys(self.pairs())
        values = {record_key(one): finite_value(one, self.select.name) for one in finished}
        rates: dict[tuple[str, str], str | None] = {}
        for task in self.tasks:
            for method in self.methods:
                keys = {rate: self._chosen_from(task, method, rate) for rate in self.learning_rates}
                if all(key in values for of_rate in keys.values() for key in of_rate):
                    scores = {rate: self._mean_score([values[key] for key in keys[rate]]) for rate in keys}
                    best = max(scores, key=scores.__getitem__)
                    if math.isfinite(scores[best]):
                        rates[task, method.name] = best
        return rates

    def _chosen_from(self, task: str, method: Method, rate: str) -> list[tuple[str, str, str | None, int]]:
        return [
            (on, method.name, rate, seed) for on in self.select_tasks or [task] for seed in range(self.select_seeds)
        ]

    def _mean_score(self, values: Sequence[float | None]) -> float:
        finite = [value for value in values if value is not None]
        assert self.select is not None
        return self.select.sign * sum(finite) / len(finite) if len(finite) == len(values) else -math.inf

    def at_edge(self, rates: Mapping[tuple[str, str], str | None]) -> list[tuple[str, str]]:
        """The (task, method) whose rate is the lowest or the highest of three or more: beyond may lie a better one."""
        if len(self.learning_rates) < 3:
            return []
        ordered = sorted(self.learning_rates, key=float)
        return [key for key, rate in rates.items() if rate in (ordered[0], ordered[-1])]

    def _run(self, task: str, method: Method, rate: str | None, seed: int) -> Run:
        return Run(task, method.name, rate, seed, tuple(self._words(task, method, rate, seed)))

    def _words(self, task: str, method: Method, rate: str | None, seed: int) -> list[str]:
        words = [*self.arguments, *self.tasks[task], *method.words]
        words += ["--learning_rate", rate] if rate else []
        for name, value in {"seed": str(seed), "task": task, "method": method.name}.items():
            words = [word.replace(f"{{{name}}}", value) for word in words]
        return [*words, "--seed", str(seed)]


def _asks_for_ablations(words: Sequence[str]) -> bool:
    return any(word.partition("=")[0] == "--cmp_num_ablations" for word in words)


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def make_tasks(asked: Sequence[str] | Mapping[str, str | None] | None) -> dict[str, list[str]]:
    """Arguments by task, from `NAME=ARGUMENTS` or a mapping; one task without a name where there are none."""
    if not asked:
        return {"": []}
    if isinstance(asked, Mapping):
        pairs = [(str(name), str(arguments or "")) for name, arguments in asked.items()]
    else:
        pairs = [(name.strip(), arguments) for name, _, arguments in (one.partition("=") for one in asked)]
    require_distinct("--task", [name for name, _ in pairs])
    return {name: shlex.split(arguments) for name, arguments in pairs}
