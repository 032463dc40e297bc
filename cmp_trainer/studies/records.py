"""What is recorded of a study's runs: runs.jsonl, a line for each finished run, and what its Trainer reported."""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

from cmp_trainer.errors import nearest
from cmp_trainer.studies.study import Run, Study

Record = Mapping[str, Any]


def record_key(record: Record) -> tuple[str, str, str | None, int]:
    """As a run's key."""
    return record["task"], record["method"], record["learning_rate"], record["seed"]


def read_records(folder: Path) -> list[dict[str, Any]]:
    """The finished runs of a study; a last line that was cut short is not one."""
    path = folder / "runs.jsonl"
    if not path.exists():
        return []
    records = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(keepends=True), start=1):
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError as error:
            if line.endswith("\n"):
                raise ValueError(f"{path}: line {number} is not a record; remove it ({error.msg})") from error
    return records


def append_record(folder: Path, record: Record) -> None:
    """Add a finished run; what an interruption left of a line is removed first."""
    path = folder / "runs.jsonl"
    folder.mkdir(parents=True, exist_ok=True)
    if path.exists() and not path.read_bytes().endswith(b"\n"):
        path.write_text("".join(json.dumps(one) + "\n" for one in read_records(folder)), encoding="utf-8")
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")


def require_same_arguments(records: Sequence[Record], runs: Sequence[Run], script: str, folder: Path) -> None:
    """Raises a ValueError where a recorded run was made with another script or arguments than the study has now."""
    recorded = {record_key(one): one for one in records}
    for run in runs:
        if run.key not in recorded:
            continue
        before, of_script = recorded[run.key]["arguments"], recorded[run.key].get("script", script)
        if of_script != script:
            raise ValueError(
                f"{folder / 'runs.jsonl'} has a run of {run} with the script {of_script}, not {script}; pass another "
                "--output"
            )
        if before != shlex.join(run.words):
            raise ValueError(
                f"{folder / 'runs.jsonl'} has a run of {run} with other arguments ({_difference(before, run)}); pass "
                "another --output, or remove its line to run it again"
            )


def _difference(before: str, run: Run) -> str:
    old, new = shlex.split(before), list(run.words)
    gone, added = [word for word in old if word not in new], [word for word in new if word not in old]
    return f"then {' '.join(gone) or '(nothing)'}, now {' '.join(added) or '(nothing, or in another order)'}"


def script_digest(path: str) -> str:
    """What tells one version of a script from another: the start of its SHA-256."""
    return sha256(Path(path).read_bytes()).hexdigest()[:12]


def mixed_conditions(records: Sequence[Record], script: str) -> list[str]:
    """What a reader of the results has to know: runs of an earlier script, times that do not compare."""
    notes = []
    earlier = [one for one in records if one.get("script_sha256") not in (None, script_digest(script))]
    if earlier:
        notes.append(f"{len(earlier)} of {len(records)} runs were made by another version of {script}.")
    sharing = {(one.get("jobs"), one.get("threads")) for one in records}
    if len(sharing) > 1:
        shown = ", ".join(f"{jobs} x {threads or 'unknown'}" for jobs, threads in sorted(sharing, key=str))
        notes.append(f"Runs shared the machine in different ways (jobs x threads: {shown}): compare times with care.")
    return notes


def read_metrics(folder: Path) -> dict[str, float | None]:
    """What a run of a Hugging Face script reports: its *_results.json, or else what its Trainer logged.

    Numbers only, None for those that are not finite; of a value that is logged several times, the last one.
    """
    files = [folder / "all_results.json"] if (folder / "all_results.json").exists() else []
    files = files or sorted(folder.glob("*_results.json"))
    found = [json.loads(file.read_text(encoding="utf-8")) for file in files]
    if not found:
        states = sorted(folder.glob("**/trainer_state.json"), key=lambda path: path.stat().st_mtime)
        found = json.loads(states[-1].read_text(encoding="utf-8"))["log_history"] if states else []
    numbers = {name: value for one in found for name, value in one.items() if isinstance(value, int | float)}
    return {name: value if math.isfinite(value) else None for name, value in numbers.items()}


def known_metrics(name: str, metrics: Mapping[str, float | None]) -> str:
    """The end of a message that a metric is missing: what was meant, or all that there are."""
    if not metrics:
        return "; found neither *_results.json nor trainer_state.json in its output folder"
    return nearest(name, metrics) or f"; it has {', '.join(sorted(metrics))}"


def study_record(study: Study) -> dict[str, Any]:
    """A study's settings, as they are written beside its results."""
    return {
        "script": study.script,
        "arguments": shlex.join(study.arguments),
        "tasks": {name: shlex.join(words) for name, words in study.tasks.items()},
        "methods": {method.name: method.arguments for method in study.methods},
        "seeds": study.num_seeds,
        "metrics": [str(metric) for metric in study.metrics],
        "learning_rates": list(study.learning_rates),
        "select": None if study.select is None else str(study.select),
        "select_tasks": list(study.select_tasks),
        "select_seeds": study.select_seeds,
    }
