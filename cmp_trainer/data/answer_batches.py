"""Batches of questions, some without a label.

`cmp-trainer curve` and the example scripts make their batches here, so both report the same loss. A model's loss
leaves out the labels that stand for nothing (`NO_LABEL`), and is NaN if a batch has no others; a single such batch
would make the loss of the whole evaluation NaN. So a batch without any label carries no positions: it has no loss, and
the Trainer averages over the other batches. The same holds for data that comes without answers.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, distributed
from transformers import DataCollatorWithPadding, PreTrainedTokenizerBase

from cmp_trainer.data.windows import NO_LABEL

POSITIONS = ("start_positions", "end_positions")


class AnswerCollator:
    """Pads inputs on the right, and takes the positions out of a batch in which no example has a label.

    Where several processes evaluate together they stay in: all must have a loss or none, see `loss_of_all`.

    Args:
        tokenizer: pads; its padding side becomes the right, as positions count from the left.
        pad_to_multiple_of: passed to `DataCollatorWithPadding`.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, pad_to_multiple_of: int | None = None) -> None:
        tokenizer.padding_side = "right"
        self.pad_to_multiple_of = pad_to_multiple_of
        self.collator: Callable[[Any], Any] = DataCollatorWithPadding(tokenizer, pad_to_multiple_of=pad_to_multiple_of)
        self.is_alone = not (distributed.is_available() and distributed.is_initialized())

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> Any:
        is_labelled = any(one.get(POSITIONS[0], NO_LABEL) != NO_LABEL for one in features)
        left_out = POSITIONS if self.is_alone and not is_labelled else ()
        return self.collator([{name: one[name] for name in one if name not in left_out} for one in features])


def padding_multiple(max_length: int, multiple: int = 8) -> int | None:
    """What inputs are padded to a multiple of, for speed; None where that could be longer than the longest input.

    >>> padding_multiple(384), padding_multiple(300)
    (8, None)
    """
    return multiple if max_length % multiple == 0 else None


def loss_of_all(loss: Tensor | None, inputs: Mapping[str, Any], accelerator: Any) -> Tensor | None:
    """The loss of a batch, which every process has or none: one without a label takes the mean of the others'.

    A Trainer gathers the losses of all processes, and would wait for one that has none.

    Args:
        loss: of this process's batch; None where it has no positions, NaN where these are no labels.
        inputs: the batch.
        accelerator: the Trainer's.
    """
    if accelerator.num_processes == 1:
        return loss
    is_labelled = loss is not None and bool((inputs[POSITIONS[0]] != NO_LABEL).any())
    own = torch.zeros(2, device=accelerator.device)  # the loss, and whether there is one
    if loss is not None and is_labelled:
        own = torch.stack([loss.detach().float().mean(), torch.ones_like(own[0])])
    total, count = accelerator.reduce(own, "sum")
    if not count:
        return None
    return loss if is_labelled else total / count
