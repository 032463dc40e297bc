"""`cmp-trainer compare`: run a script by several methods and seeds, and say which is better and at what cost.

    cmp-trainer compare run_glue.py mrpc.yaml --method plain --method comparative-2 --seeds 5 --metric eval_accuracy \\
        --output study

studies/ has its parts: methods, the study, how its runs are started and recorded, statistics, and the report.
"""

import argparse
import shlex
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml

from cmp_trainer.errors import first_line, nearest
from cmp_trainer.saving.files import written_whole
from cmp_trainer.scripting import plain_errors
from cmp_trainer.studies import report
from cmp_trainer.studies.methods import make_methods
from cmp_trainer.studies.running import (
    Runner,
    known_metrics,
    read_records,
    record_key,
    require_same_arguments,
    slug,
    study_record,
)
from cmp_trainer.studies.statistics import summarize
from cmp_trainer.studies.study import Metric, Study, make_tasks


@plain_errors()
def run_compare(options: argparse.Namespace) -> None:
    """Run what the study lacks, print its table, write its files.

    Raises:
        SystemExit: with one line that says what is wrong with the options; or with 1 where a run failed.
    """
    _require_packages()
    settings = _settings(options)
    study, folder = _study(settings), Path(settings["output"] or "")
    if not settings["output"]:
        raise ValueError("--output is missing; name a folder for the study")
    runner = _runner(study, folder, settings)
    failed = 0 if options.report else run_study(study, runner)
    _report(study, folder)
    if failed:
        failures = "1 run" if failed == 1 else f"{failed} runs"
        print(f"{failures} failed and not in the table; run the same command again to retry", file=sys.stderr)
        raise SystemExit(1)


def run_study(study: Study, runner: Runner) -> int:
    """Run what is not recorded yet, first what learning rates are chosen from; the number of failures."""
    folder = runner.folder
    selection = study.selection_runs()
    require_same_arguments(read_records(folder), selection, study.script, folder)
    failed = runner.run_all(selection, "learning rates") if selection else {}
    runs = study.reported_runs(study.choose_rates(read_records(folder)))
    require_same_arguments(read_records(folder), runs, study.script, folder)
    failed |= runner.run_all([run for run in runs if run not in failed], "runs")
    return len(failed)


def _report(study: Study, folder: Path) -> None:
    records = read_records(folder)
    rates = study.choose_rates(records)
    runs = study.reported_runs(rates)
    require_same_arguments(records, [*study.selection_runs(), *runs], study.script, folder)
    reported = {run.key for run in runs}
    finished = [one for one in records if record_key(one) in reported]
    methods, metrics = [method.name for method in study.methods], list(study.metrics)
    if not finished:
        print("no run has finished, so there is nothing to compare", file=sys.stderr)
        raise SystemExit(1)
    for metric in metrics:
        lacking = next((one for one in finished if metric.name not in one["metrics"]), None)
        if lacking is not None:
            raise ValueError(
                f"--metric {metric.name} was not reported by {lacking['method']}, seed {lacking['seed']}"
                f"{known_metrics(metric.name, lacking['metrics'])}"
            )
    results = [row for metric in metrics for row in summarize(finished, metric, methods)]
    markdown = report.as_markdown(results, metrics, methods[0], rates)
    files = report.write(folder, results, study_record(study), markdown)
    for metric in metrics:
        files.append(folder / f"{slug(metric.name)}.png")
        with written_whole(files[-1]) as file:
            report.plot(results, metric, methods[0]).savefig(file)
    print(report.as_text(results, metrics[0], methods[0], rates))
    print(f"written: {', '.join(str(file) for file in files)}")


DEFAULTS: dict[str, Any] = {
    "script": None,
    "arguments": [],
    "method": None,
    "task": None,
    "seeds": 5,
    "metric": [],
    "learning_rates": [],
    "select": None,
    "select_seeds": 1,
    "select_tasks": [],
    "output": None,
    "jobs": 1,
    "launcher": "",
    "discard": False,
}


def _settings(options: argparse.Namespace) -> dict[str, Any]:
    """The options of the command line, over those of the study's file, over the defaults."""
    settings = DEFAULTS | (_read_study(options.study) if options.study else {})
    given = {
        name: value
        for name, value in vars(options).items()
        if name in DEFAULTS and value is not None and value is not False
    }
    words = list(options.words)
    if words and settings["script"] is None:
        given["script"] = words.pop(0)
    settings |= given
    if settings["script"] is None:
        raise ValueError("expected a script: cmp-trainer compare script.py …, or --study FILE that names one")
    settings["arguments"] = [*_words(settings["arguments"]), *words]
    return settings


def _read_study(path: str) -> dict[str, Any]:
    if not Path(path).is_file():
        raise ValueError(f"--study {path} does not exist")
    text = Path(path).read_text(encoding="utf-8")
    try:
        values, found = yaml.safe_load(text), yaml.load(text, yaml.BaseLoader)  # as text, `1e-5` as it stands
    except yaml.YAMLError as error:
        raise ValueError(f"--study {path} cannot be read: {first_line(error)}") from error
    if not isinstance(found, dict):
        raise ValueError(f"--study {path} must hold names and values, `seeds: 5`, one a line")
    for name in found:
        if name not in DEFAULTS:
            raise ValueError(f"{path}: unknown key {name!r}{nearest(name, DEFAULTS)}")
    for name in ("seeds", "select_seeds", "jobs"):
        if name in found:
            found[name] = int(found[name])
    found["discard"] = str(found.get("discard", "false")).lower() == "true"
    for name in ("metric", "learning_rates", "select_tasks"):
        found[name] = found[name].split() if isinstance(found.get(name), str) else found.get(name, [])
    for name in ("method", "task"):
        if isinstance(found.get(name), str):
            found[name] = [found[name]]
        if isinstance(found.get(name), dict):
            found[name] = {str(key): value for key, value in values[name].items()}  # `plain:` alone is None
    return found


def _study(settings: dict[str, Any]) -> Study:
    return Study(
        script=settings["script"],
        arguments=settings["arguments"],
        methods=make_methods(settings["method"]),
        tasks=make_tasks(settings["task"]),
        num_seeds=settings["seeds"],
        metrics=[Metric.parse(one) for one in settings["metric"]],
        learning_rates=settings["learning_rates"],
        select=Metric.parse(settings["select"]) if settings["select"] else None,
        select_seeds=settings["select_seeds"],
        select_tasks=settings["select_tasks"],
    )


def _runner(study: Study, folder: Path, settings: dict[str, Any]) -> Runner:
    if settings["jobs"] < 1:
        raise ValueError(f"--jobs {settings['jobs']}: expected 1 or more")
    if not Path(study.script).is_file():
        raise ValueError(f"{study.script} is not a file; give the path of a Python script, then its arguments")
    for option, names in (("--method", [one.name for one in study.methods]), ("--task", list(study.tasks))):
        slugs = [slug(name) for name in names]
        if len(set(slugs)) < len(slugs):
            raise ValueError(f"{option}: these names make the same folder, rename one: {', '.join(names)}")
    required = [metric.name for metric in study.metrics] + ([study.select.name] if study.select else [])
    return Runner(study.script, folder, required, settings["jobs"], settings["launcher"], settings["discard"])


def _require_packages() -> None:
    missing = [name for name in ("scipy", "matplotlib") if find_spec(name) is None]
    if missing:
        raise ValueError(f"a comparison needs {', '.join(missing)}: pip install 'cmp-trainer[plot]'")


def _words(arguments: Any) -> list[str]:
    return shlex.split(arguments) if isinstance(arguments, str) else [str(one) for one in arguments]
