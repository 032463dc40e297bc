"""Pushing to the Hub: what goes wrong on the way loses nothing here, and is said.

A push can fail after hours of training: the token has expired, the server has a fault, the connection is lost. The
error is raised as it is; before it, the log says where the model is whole and how to push it again. Checkpoints are
pushed in the background (`hub_strategy` every_save, checkpoint, all_checkpoints), where the Trainer drops errors; here
they are logged.
"""

import logging
import re
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import Trainer

from cmp_trainer.errors import causes, first_line

logger = logging.getLogger(__name__)


class ReportsPushes(Trainer):
    """A Trainer whose failed pushes say what happened and what to do."""

    push_in_progress: Any = None

    def init_hf_repo(self, *args: Any, **kwargs: Any) -> None:
        """Trainer's."""
        with _advice("No repository could be made; nothing was trained and nothing is lost.", self):
            super().init_hf_repo(*args, **kwargs)

    def push_to_hub(self, *args: Any, **kwargs: Any) -> Any:
        """Trainer's."""
        with _advice("The push did not come through.", self):
            return super().push_to_hub(*args, **kwargs)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        self._report_background_pushes()
        super()._push_from_checkpoint(checkpoint_folder)

    def _finish_current_push(self) -> None:
        super()._finish_current_push()
        self._report_background_pushes()

    def _report_background_pushes(self) -> None:
        """Log the errors of background pushes that have ended, each once."""
        if self.push_in_progress is None:
            return
        ended = [job for job in self.push_in_progress.jobs if job.done()]
        self.push_in_progress.jobs = [job for job in self.push_in_progress.jobs if job not in ended]
        for error in (job.exception() for job in ended if not job.cancelled()):
            if error is not None:
                logger.error("A checkpoint was not pushed: %s. %s", first_line(error), _what_to_do(error, self))


@contextmanager
def _advice(what: str, trainer: Any) -> Iterator[None]:
    """Log, before an error of the body goes on its way, what it means and what to do."""
    try:
        yield
    except BaseException as error:
        logger.error("%s %s", what, _what_to_do(error, trainer))
        raise


def _what_to_do(error: BaseException, trainer: Any) -> str:
    status = next(filter(None, map(_status, causes(error))), None)
    if status in (401, 403):
        reason = (
            "The Hub does not accept the token: it has expired or may not write. Make one with write permission at "
            "https://huggingface.co/settings/tokens and run `hf auth login`."
        )
    elif status is not None and status >= 500:
        reason = f"The Hub has a fault (HTTP {status}); try again later."
    elif status is None and any("connect" in f"{type(cause).__name__} {cause}".lower() for cause in causes(error)):
        reason = "The Hub could not be reached; try again when there is a connection."
    else:
        reason = "The error below says why."
    folder = Path(trainer.args.output_dir)
    if not any(folder.glob("*.safetensors")) and not any(folder.glob("checkpoint-*")):
        return f"{reason} To train without the Hub, leave out --push_to_hub; trainer.push_to_hub() can push later."
    repository = getattr(trainer, "hub_model_id", None) or trainer.args.hub_model_id or "USER/NAME"
    return (
        f"{reason} Nothing is lost here: {folder} holds what was saved. Push it again with trainer.push_to_hub(), or "
        f"with `hf upload {repository} {shlex.quote(str(folder))} . --exclude '_*' --exclude 'checkpoint-*'`."
    )


def _status(error: BaseException) -> int | None:
    """The HTTP status that an error tells: the client's in its response, xet's in its text."""
    in_text = re.search(r"HTTP status \w+ error \((\d{3})", str(error))
    return getattr(getattr(error, "response", None), "status_code", None) or (int(in_text[1]) if in_text else None)
