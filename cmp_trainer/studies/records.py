"""What is recorded of a study's runs: runs.jsonl, a line for each finished run, and what its Trainer reported."""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

from cmp_trainer.errors import first_line, nearest
from cmp_trainer.saving.files import written_whole
from cmp_trainer.studies.study import Metric, Run, Study, record_key

Record = Mapping[str, Any]


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
        whole = "".join(json.dumps(one) + "\n" for one in read_records(folder))
        with written_whole(path) as file:
            file.write_text(whole, encoding="utf-8")
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


def require_metrics(records: Sequence[Record], metrics: Sequence[Metric]) -> None:
    """Raises a ValueError where a run did not report a metric of the study."""
    for metric in metrics:
        for one in records:
            if metric.name not in one["metrics"]:
                place = ", ".join(str(part) for part in record_key(one)[:3] if part)
                raise ValueError(
                    f"{metric.name} was not reported by {place}, seed {one['seed']}"
                    f"{known_metrics(metric.name, one['metrics'])}"
                )


def _difference(before: str, run: Run) -> str:
    old, new = shlex.split(before), list(run.words)
    gone, added = [word for word in old if word not in new], [word for word in new if word not in old]
    return f"then {' '.join(gone) or '(nothing)'}, now {' '.join(added) or '(nothing, or in another order)'}"


def script_digest(path: str) -> str:
    """What tells one version of a script from another: the start of its SHA-256."""
    return sha256(Path(path).read_bytes()).hexdigest()[:12]


def mixed_conditions(records: Sequence[Record], script: str) -> list[str]:
    """What a reader of the results has to know: runs that differ in the script's version, libraries or machine."""
    notes = []
    earlier = [one for one in records if one.get("script_sha256") != script_digest(script)]
    if earlier:
        notes.append(f"{len(earlier)} of {len(records)} runs were made by another version of {script}.")
    sharing = sorted({f"{one.get('jobs')} x {one.get('threads') or 'unknown'}" for one in records})
    if len(sharing) > 1:
        shown = ", ".join(sharing)
        notes.append(f"Runs shared the machine in different ways (jobs x threads: {shown}): compare times with care.")
    for name in ("versions", "launcher"):
        given = sorted({str(one[name] or "none") for one in records if name in one})
        if len(given) > 1:
            notes.append(f"Runs had different {name.rstrip('s')}s: {'; '.join(given)}.")
    return notes


def read_metrics(folder: Path) -> dict[str, float | None]:
    """What a run of a Hugging Face script reports: what its Trainer logged, and over that its *_results.json.

    Numbers only, None for those that are not finite; of a value that is logged several times, the last one.

    Raises:
        ValueError: a file cannot be read.
    """
    states = sorted(folder.glob("**/trainer_state.json"), key=lambda path: path.stat().st_mtime)
    logged = _read_json(states[-1]).get("log_history", []) if states else []
    files = [*sorted(folder.glob("*_results.json")), folder / "all_results.json"]
    found = [*logged, *(_read_json(file) for file in files if file.exists())]
    numbers = {name: value for one in found for name, value in one.items() if isinstance(value, int | float)}
    return {name: value if math.isfinite(value) else None for name, value in numbers.items()}


def _read_json(file: Path) -> dict[str, Any]:
    """A file's object; an empty one where it holds something else, which is not the Trainer's."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{file} cannot be read: {first_line(error)}") from error
    return found if isinstance(found, dict) else {}


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
        "against": list(study.against),
        "learning_rates": list(study.learning_rates),
        "select": None if study.select is None else str(study.select),
        "select_tasks": list(study.select_tasks),
        "select_seeds": study.select_seeds,
    }
