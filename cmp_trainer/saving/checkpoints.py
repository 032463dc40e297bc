"""Which checkpoints are whole: a half-written or half-deleted one is never resumed from silently.

The Trainer writes a checkpoint file by file into its final folder, its own state last, and deletes old checkpoints
(`save_total_limit`) file by file too. A run that is killed in between leaves a folder that looks like a checkpoint.
A checkpoint was written to its end if its last file is there and complete; a save into a folder that exists takes
that file away first. Nothing of it was deleted if it has the files that a list beside the folders, replaced in one
move, names for it.
"""

import json
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import Trainer
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

logger = logging.getLogger(__name__)


FILE_LIST = "_files_of_checkpoints.json"
"""The underscore keeps the list out of pushes to the Hub, which run in the background while it changes."""


@contextmanager
def being_written(checkpoint: Path, is_writer: bool) -> Iterator[None]:
    """`checkpoint` counts as half-written until the Trainer has written its state; one process keeps the list."""
    if is_writer:
        (checkpoint / TRAINER_STATE_NAME).unlink(missing_ok=True)
        _list_files(checkpoint.parent)
    yield
    if is_writer:
        _list_files(checkpoint.parent)


class WholeCheckpoints(Trainer):
    """A Trainer that never resumes silently from an incomplete checkpoint."""

    def train(self, resume_from_checkpoint: str | os.PathLike | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Adds: an incomplete checkpoint is skipped (True) or rejected (a path)."""
        return super().train(checkpoint_to_resume(resume_from_checkpoint, self.args.output_dir), *args, **kwargs)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        checkpoint = Path(self._get_output_dir(trial), f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}")
        with being_written(checkpoint, is_writer=self.args.should_save):
            super()._save_checkpoint(model, trial)

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        self.accelerator.wait_for_everyone()  # so that the state, which comes next, is the last file of all processes


def is_whole(checkpoint: Path) -> bool:
    """Whether the save of this checkpoint came to its end and nothing of it was deleted since."""
    files = _listed(checkpoint.parent).get(checkpoint.name, [])
    return _is_json(checkpoint / TRAINER_STATE_NAME) and set(files) <= set(_files(checkpoint))


def checkpoint_to_resume(resume_from: str | os.PathLike | bool | None, output_dir: str | None) -> str | None:
    """The checkpoint that `resume_from_checkpoint` means, refused or passed over where it is half-written.

    Args:
        resume_from: a checkpoint's path; True for the newest whole one of `output_dir`; None or False for none.
        output_dir: the run's folder.

    Raises:
        ValueError: the path is no whole checkpoint, or there is none in `output_dir`.
    """
    if not resume_from:
        return None
    if isinstance(resume_from, (str, os.PathLike)):
        if not is_whole(Path(resume_from)):
            raise ValueError(
                f"{resume_from} is not a whole checkpoint: its save was interrupted, files of it were deleted, or "
                "it is no checkpoint of a Trainer. Resume from an earlier one, or pass True for the newest whole one."
            )
        return os.fspath(resume_from)
    found = _checkpoints(Path(output_dir or "."))
    whole = next((checkpoint for checkpoint in found if is_whole(checkpoint)), None)
    if whole is None:
        names = ", ".join(checkpoint.name for checkpoint in found) or "none"
        raise ValueError(
            f"no whole checkpoint in {output_dir} (found: {names}); start without resume_from_checkpoint."
        )
    for half in found[: found.index(whole)]:
        logger.warning(
            "%s is not whole (its save or deletion was interrupted) and is passed over; resuming from %s.", half, whole
        )
    return str(whole)


def _listed(folder: Path) -> dict[str, list[str]]:
    """The files of each whole checkpoint of a run's folder."""
    file = folder / FILE_LIST
    return json.loads(file.read_text()) if file.is_file() else {}


def _list_files(folder: Path) -> None:
    """Bring the list up to date: whole checkpoints are put on it, others taken off."""
    folder.mkdir(parents=True, exist_ok=True)
    whole = {checkpoint.name: _files(checkpoint) for checkpoint in _checkpoints(folder) if is_whole(checkpoint)}
    draft = folder / f"{FILE_LIST}.draft"
    draft.write_text(json.dumps(whole, indent=1))
    os.replace(draft, folder / FILE_LIST)


def _is_json(file: Path) -> bool:
    try:
        json.loads(file.read_text())
    except (OSError, ValueError):
        return False
    return True


def _files(checkpoint: Path) -> list[str]:
    return sorted(str(file.relative_to(checkpoint)) for file in checkpoint.rglob("*") if file.is_file())


def _checkpoints(folder: Path) -> list[Path]:
    """Newest first."""
    return sorted(folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*"), key=_step, reverse=True)


def _step(checkpoint: Path) -> int:
    suffix = checkpoint.name.rpartition("-")[2]
    return int(suffix) if suffix.isdigit() else -1
