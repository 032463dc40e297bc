"""Processes that train together check the same batch.

Where weights are sharded, every forward exchanges them, so all processes have to do equally many forwards, whatever
their own batches look like. So the first batch with a label is sent to all of them, and all check that one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, distributed


def num_processes() -> int:
    """How many processes train together."""
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def agreed_batch(batch: Any, is_usable: bool, device: torch.device) -> Any:
    """The batch of the first process whose own is usable, on this process's device; None where no process has one.

    All processes have to call this.
    """
    if num_processes() == 1:
        return batch if is_usable else None
    usable: list[Any] = [None] * num_processes()
    distributed.all_gather_object(usable, is_usable)
    if not any(usable):
        return None
    source = usable.index(True)
    sent = [_moved(batch, torch.device("cpu")) if distributed.get_rank() == source else None]
    distributed.broadcast_object_list(sent, src=source)
    return _moved(sent[0], device)


def _moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, Mapping) and type(value) is dict:
        return {key: _moved(one, device) for key, one in value.items()}
    if isinstance(value, (list, tuple)) and not hasattr(value, "_fields"):
        return type(value)(_moved(one, device) for one in value)
    return value.to(device) if hasattr(value, "to") else value  # pyright: ignore[reportAttributeAccessIssue]
