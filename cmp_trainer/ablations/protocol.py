"""What a kind of ablation is: something that can be taken away from a forward, more and more.

An ablation has levels: 0 takes nothing away, 1, 2, … take away more and more, each what the one before it took and
something else. A variant of the model is a level of every kind that is in use, such as one crop and two drops. A kind
says what it does to the batch at a level (`batches`), to the forward (`context`), to calls of PyTorch functions
(`calls`), or which layers it leaves out (`skipped_layers`); what it does not say stays as it is. Nothing here knows a
Trainer.

    class WithoutHeads(Ablation):
        name = "heads"

        @contextmanager
        def context(self, level):
            ...  # e.g. hooks that set the output of some heads to zero
            yield
            ...  # take them back

Random draws: every forward of a step, the full one included, starts from one random state, and `batches`, `context`
and `skipped_layers` are called in it. A kind that draws the same numbers at every level, level 0 included, and uses
more of them at higher levels is nested. These draw from the default generator and do not restore it: where nothing
else in a step draws, the next step would start from the same random state and draw the same numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import nn

Handler = Callable[[Callable, tuple, dict[str, Any]], Any]
"""`(function, args, kwargs) -> result`, in place of a call of a PyTorch function."""


class Ablation:
    """Base of all kinds of ablation; by itself it takes nothing away.

    Attributes:
        name: what variants of this kind are called in logs and curves: `loss_heads_1`, `loss_heads_2`, … Those of the
            built-in kinds are numbered through: `loss_ablated_1`, `loss_ablated_2`, …
        leaves_lower_layers: whether all levels compute the same below the top layers that --cmp_ablated_layers asks
            for, so that these lower layers run once for all of them.
        skips_layers: whether this kind leaves out layers of the model's stack (`skipped_layers`), and nothing else.
    """

    name: str = "ablated"
    leaves_lower_layers: bool = False
    skips_layers: bool = False

    def for_model(self, model: nn.Module, processing_class: Any = None, data_collator: Any = None) -> Ablation:
        """This ablation with what it needs to know of the model, its tokenizer and the data collator."""
        return self

    def batches(self, batch: Any, num_levels: int) -> list[Any]:
        """The batch at levels 0, 1, …, `num_levels`; level 0 is the full batch. Must not change `batch` itself."""
        return [batch] * (1 + num_levels)

    def context(self, level: int) -> AbstractContextManager:
        """Context in which a forward at this level runs; entered again, from the same random state, where a part of
        the forward is recomputed in backward (gradient checkpointing)."""
        return nullcontext()

    def skipped_layers(self, level: int, num_layers: int) -> Collection[int]:
        """Indices (0, 1, …) of the layers of the model's stack that a forward at this level leaves out. Such a layer
        passes its input through and is not computed."""
        return ()

    def calls(self, level: int) -> Mapping[Callable, Handler]:
        """PyTorch functions whose calls inside of a forward at this level are made by a handler instead."""
        return {}
