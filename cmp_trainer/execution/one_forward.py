"""All variants of a step inside of one forward of what is wrapped around the model.

DistributedDataParallel prepares each backward in the forward before it: which parameters were used is found from what
that forward returns, and each parameter may be ready only once. So the 1 + c forwards of a step run inside of one
forward of the wrapper, which returns their loss.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from cmp_trainer.execution.compiled import head_uncompiled


def in_one_forward(model: nn.Module, run: Callable[[nn.Module], Tensor], parts: Sequence[nn.Module] = ()) -> Tensor:
    """`run(module)`, with the module inside of DistributedDataParallel and torch.compile, or `model` itself.

    Args:
        parts: of the model, which are compiled one by one where it is compiled.
    """
    with head_uncompiled(model, parts) as inner:
        if not isinstance(inner, DistributedDataParallel):
            return run(inner)

        def forward() -> Tensor:
            with inner._inside_ddp_forward():
                return run(inner.module)

        inner._run_ddp_forward = forward  # of this object, for this call
        try:
            return inner()
        finally:
            del inner._run_ddp_forward


def is_data_parallel(model: nn.Module) -> bool:
    """Whether DistributedDataParallel is wrapped around the model."""
    with head_uncompiled(model) as inner:
        return isinstance(inner, DistributedDataParallel)


@contextmanager
def inner_model(model: nn.Module, parts: Sequence[nn.Module] = ()) -> Iterator[nn.Module]:
    """The model inside of DistributedDataParallel and torch.compile, or `model` itself; `parts` as above."""
    with head_uncompiled(model, parts) as inner:
        yield inner.module if isinstance(inner, DistributedDataParallel) else inner


def devices_of(model: nn.Module, batch_tensors: list[Tensor]) -> set[torch.device]:
    """The devices that a forward may draw random numbers on: parameters may be off-loaded, the batch is not."""
    return {parameter.device for parameter in model.parameters()} | {tensor.device for tensor in batch_tensors}
