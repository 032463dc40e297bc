"""When a training is cut short: say what is saved, and how to go on from there."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cmp_trainer.errors import is_disk_fault
from cmp_trainer.saving.checkpoints import checkpoints, fault_of

logger = logging.getLogger(__name__)
_HOW = "pass --resume_from_checkpoint true or call train(resume_from_checkpoint=True)"


@contextmanager
def says_what_is_saved(trainer: Any) -> Iterator[None]:
    """Log, before an interruption or a fault of the disk goes on its way, from which checkpoint one can resume."""
    try:
        yield
    except (KeyboardInterrupt, Exception) as error:
        interrupted = isinstance(error, KeyboardInterrupt)
        if (interrupted or is_disk_fault(error)) and trainer.is_world_process_zero():
            cause = "interrupted" if interrupted else "the disk is full or not writable"
            folder, step = Path(str(trainer.args.output_dir)), trainer.state.global_step
            saved = next((path for path in checkpoints(folder) if fault_of(path) is None), None)
            way_on = "No checkpoint was saved." if saved is None else f"To resume from {saved}, {_HOW}."
            logger.warning("Training ended at step %d: %s. %s", step, cause, way_on)
        raise
