"""Files that are complete or absent, also when several runs write to one folder or the disk fills up.

A file is first written under a name that no other writer uses, then moved into place in one step. A reader never sees
half of it, and of two writers the later one wins.
"""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

logger = logging.getLogger(__name__)


@contextmanager
def written_whole(path: str | os.PathLike) -> Iterator[Path]:
    """A temporary path in the folder of `path`, which replaces `path` at the end and is removed if the body raises.

    Its name starts with an underscore, which keeps it out of pushes to the Hub, and ends in the same suffix, from
    which many writers read the format. Missing folders are made.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"_{uuid4().hex}{path.suffix}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def warned_where_unwritable(what: str) -> Iterator[None]:
    """Log an OSError of the body as a warning: `what` is a report, for which no training should end."""
    try:
        yield
    except OSError as error:
        logger.warning("%s could not be written: %s", what, error)
