"""Gradient checkpointing under CmpDrop: the recomputation has to drop what the forward dropped.

A checkpointed layer runs its forward a second time in backward, when the variant's CmpDrop has long been left. PyTorch
restores the random state there by itself; what restores the rates is a `context_fn`, asked for at each checkpointed
forward, that enters the CmpDrop of that forward again. Only non-reentrant checkpointing knows `context_fn`.

The function lives on the model's modules, where transformers keeps the checkpointing function, and not in
TrainingArguments, which must stay serializable. It is put there when training begins and taken back when it ends.
"""

import functools
import logging
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch.overrides import _get_current_function_mode_stack
from transformers import TrainerCallback

from cmp_trainer.ablations.drop import CmpDrop

logger = logging.getLogger(__name__)


def recompute_contexts() -> tuple[AbstractContextManager, AbstractContextManager]:
    """`context_fn` of `torch.utils.checkpoint`: nothing for the forward, its own CmpDrop for the recomputation."""
    active = [mode for mode in _get_current_function_mode_stack() if isinstance(mode, CmpDrop)]
    if not active:
        return nullcontext(), nullcontext()
    return nullcontext(), active[-1].again()


class RecomputeUnderCmpDrop(TrainerCallback):
    """Gives the checkpointed modules of the model `recompute_contexts` for the time of a training."""

    def __init__(self) -> None:
        self._original: list[tuple[Any, Any]] = []

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        """Called after the Trainer switched gradient checkpointing on."""
        self.undo()  # training may begin anew, with a smaller batch, where it ran out of memory
        if model is None or not getattr(args, "cmp_num_ablations", 0):
            return
        self._original = [
            (module, module._gradient_checkpointing_func)
            for module in model.modules()
            if getattr(module, "gradient_checkpointing", False) and hasattr(module, "_gradient_checkpointing_func")
        ]
        if any(_is_reentrant(function) for _, function in self._original):
            logger.warning(
                "gradient checkpointing was asked for in its reentrant form, which cannot replay dropout rates; the "
                'non-reentrant form is used. Pass gradient_checkpointing_kwargs={"use_reentrant": False} to say so.'
            )
        for module, function in self._original:
            module._gradient_checkpointing_func = functools.partial(
                function, use_reentrant=False, context_fn=recompute_contexts
            )

    def undo(self) -> None:
        """Leave the model as the Trainer made it."""
        for module, function in self._original:
            module._gradient_checkpointing_func = function
        self._original = []


def _is_reentrant(function: Any) -> bool:
    return bool(getattr(function, "keywords", {}).get("use_reentrant", False))
