"""All variants of a step inside of one forward of what is wrapped around the model.

DistributedDataParallel prepares each backward in the forward before it: which parameters were used is found from what
that forward returns, and each parameter may be ready only once. So the 1 + c forwards of a step run inside of one
forward of the wrapper, which returns their loss.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel


def in_one_forward(model: nn.Module, run: Callable[[nn.Module], Tensor]) -> Tensor:
    """`run(module)`, with `module` the model inside of DistributedDataParallel, or `model` itself."""
    if not isinstance(model, DistributedDataParallel):
        return run(model)

    def forward() -> Tensor:
        with model._inside_ddp_forward():
            return run(model.module)

    model._run_ddp_forward = forward  # of this object, for this call
    try:
        return model()
    finally:
        del model._run_ddp_forward


def inner_model(model: nn.Module) -> nn.Module:
    """The model inside of DistributedDataParallel, or `model` itself."""
    return model.module if isinstance(model, DistributedDataParallel) else model


def devices_of(model: nn.Module, batch_tensors: list[Tensor]) -> set[torch.device]:
    """The devices that a forward may draw random numbers on: parameters may be off-loaded, the batch is not."""
    return {parameter.device for parameter in model.parameters()} | {tensor.device for tensor in batch_tensors}
