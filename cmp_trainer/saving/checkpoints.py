"""Resume from complete checkpoints only.

The Trainer writes a checkpoint file by file into its final folder, its own state last, and deletes old checkpoints
(`save_total_limit`) file by file too. A run that is killed in between, or a disk that fills up, leaves a folder that
looks like a checkpoint. Whether it is complete is decided by what is inside that folder alone:

1. the Trainer's state is there and complete. A save into a folder that exists removes it first;
2. no file of tensors is smaller than in `files_and_sizes.json`, a record that each save writes into its checkpoint;
3. archives and safetensors end where they say they end, which holds for checkpoints of a plain Trainer too.

The Trainer resumes without an optimizer, scheduler or random state, so their absence is a warning.
"""

import json
import logging
import os
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from transformers import Trainer
from transformers.trainer import TRAINER_STATE_NAME, TRAINING_ARGS_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

logger = logging.getLogger(__name__)

RECORD = "files_and_sizes.json"
_BINARY = (".safetensors", ".bin", ".pt", ".pth", ".distcp")
_PARTS = {"optimizer": "optimizer", "scheduler": "learning rate scheduler", "rng_state": "random state"}


class RecordsCheckpoints(Trainer):
    """A Trainer that never resumes silently from an incomplete checkpoint, where ablations are asked for."""

    num_ablations: Any = 0

    def train(self, resume_from_checkpoint: str | os.PathLike | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Adds: an incomplete checkpoint is skipped (True) or rejected (a path)."""
        resume_from: Any = resume_from_checkpoint
        if self.num_ablations and resume_from:
            resume_from = checkpoint_to_resume(resume_from, str(self.args.output_dir))
            _warn_of_missing_parts(Path(resume_from))
        return super().train(resume_from, *args, **kwargs)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        if not self.num_ablations:
            return super()._save_checkpoint(model, trial)
        checkpoint = Path(self._get_output_dir(trial), f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}")
        with recorded(checkpoint, self.args.should_save, self.accelerator.wait_for_everyone):
            super()._save_checkpoint(model, trial)


@contextmanager
def recorded(checkpoint: Path, is_writer: bool, wait_for_everyone: Callable[[], None]) -> Iterator[None]:
    """The body saves `checkpoint`, which counts as incomplete until then; one process records its files."""
    if is_writer:
        (checkpoint / TRAINER_STATE_NAME).unlink(missing_ok=True)
        (checkpoint / RECORD).unlink(missing_ok=True)
    yield
    wait_for_everyone()  # each process writes a random state, and some of them weights
    if is_writer:
        try:
            sizes = {str(file.relative_to(checkpoint)): file.stat().st_size for file in _files(checkpoint)}
            (checkpoint / RECORD).write_text(json.dumps(sizes, indent=1))
        except OSError as error:
            logger.warning("could not record the file sizes of %s: %s", checkpoint, error)


def checkpoint_to_resume(resume_from: str | os.PathLike | bool, output_dir: str) -> str:
    """The checkpoint that `resume_from_checkpoint` means: this path, or for True the newest complete one.

    Args:
        resume_from: a checkpoint's path, or True.
        output_dir: the run's folder.

    Raises:
        ValueError: the path is no complete checkpoint, or there is none in `output_dir`. The message says why.
    """
    if not isinstance(resume_from, bool):
        if fault := fault_of(Path(resume_from)):
            raise ValueError(
                f"Can't find a valid checkpoint at {os.fspath(resume_from)}: {fault}. Resume from another checkpoint, "
                "or pass True for the newest complete one."
            )
        return os.fspath(resume_from)
    faults: dict[Path, str] = {}
    for checkpoint in checkpoints(Path(output_dir)):
        fault = fault_of(checkpoint)
        if fault is None:
            for skipped, reason in faults.items():
                logger.warning("%s is incomplete (%s) and is skipped; resuming from %s.", skipped, reason, checkpoint)
            return str(checkpoint)
        faults[checkpoint] = fault
    found = "; ".join(f"{half.name} is incomplete ({reason})" for half, reason in faults.items())
    raise ValueError(
        f"No valid checkpoint found in output directory ({output_dir})"
        + (f": {found}. Remove what is incomplete and start" if found else ". Start a new training")
        + " without resume_from_checkpoint."
    )


def checkpoints(folder: Path) -> list[Path]:
    """The folders named `checkpoint-<step>`, newest first."""
    steps = {path: path.name.removeprefix(f"{PREFIX_CHECKPOINT_DIR}-") for path in folder.glob("checkpoint-*")}
    found = {path: int(step) for path, step in steps.items() if step.isdecimal() and path.is_dir()}
    return sorted(found, key=lambda path: found[path], reverse=True)


def fault_of(checkpoint: Path) -> str | None:
    """Why a training cannot be resumed from this checkpoint; None if it can."""
    if not checkpoint.is_dir():
        return "there is no such folder"
    if not (checkpoint / TRAINER_STATE_NAME).is_file():
        return f"{TRAINER_STATE_NAME}, which is written last, is missing, so the save was interrupted"
    if not isinstance(_content(checkpoint / TRAINER_STATE_NAME), dict):
        return f"{TRAINER_STATE_NAME}, which is written last, is damaged, so the save was interrupted"
    sizes = _recorded_sizes(checkpoint)
    lost = [name for name in sizes if _is_weights(Path(name)) and not (checkpoint / name).is_file()]
    if lost:
        return f"{lost[0]} was deleted"
    for file in _files(checkpoint):
        name = str(file.relative_to(checkpoint))
        if _is_truncated(file, sizes.get(name, 0)):
            return f"{name} is truncated"
    return None


def _files(folder: Path) -> list[Path]:
    return sorted(file for file in folder.rglob("*") if file.is_file() and file.name != RECORD)


def _is_weights(file: Path) -> bool:
    return file.suffix == ".safetensors" or (file.suffix == ".bin" and "model" in file.name)


def _is_truncated(file: Path, recorded_size: int) -> bool:
    """Whether one of the files that a training resumes from ends too early, by its record or by its own format."""
    if file.suffix == ".json":
        return _content(file) is None
    if file.suffix not in _BINARY or file.name == TRAINING_ARGS_NAME:
        return False  # texts may be edited, and the arguments are not read
    if file.stat().st_size < max(recorded_size, 1):
        return True
    if file.suffix == ".safetensors":
        try:
            with safe_open(file, framework="pt"):
                return False
        except SafetensorError:
            return True
    with file.open("rb") as opened:
        is_archive = opened.read(2) == b"PK"
    return is_archive and not zipfile.is_zipfile(file)  # torch.save writes zip, whose directory is at the end


def _recorded_sizes(checkpoint: Path) -> dict[str, int]:
    """Empty where there is no record, or one that was damaged."""
    sizes = _content(checkpoint / RECORD)
    return {name: size for name, size in sizes.items() if isinstance(size, int)} if isinstance(sizes, dict) else {}


def _content(file: Path) -> Any:
    """What a JSON file holds; None where it cannot be read."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _warn_of_missing_parts(checkpoint: Path) -> None:
    names = [path.name for path in checkpoint.iterdir()]
    if any(name.startswith("global_step") for name in names):
        return  # DeepSpeed keeps all parts there
    missing = [what for part, what in _PARTS.items() if not any(name.startswith(part) for name in names)]
    if missing:
        logger.warning("%s has no saved %s; training resumes with a new one.", checkpoint, " and no ".join(missing))
