"""All variants of a step inside of one forward of what is wrapped around the model.

DistributedDataParallel prepares each backward in the forward before it: which parameters were used is found from what
that forward returns, and each parameter may be ready only once. So the 1 + c forwards of a step run inside of one
forward of the wrapper, which returns their loss. DeepSpeed's engine takes every derivative of what its forward returns
for the backward of the step, and the shares of a variant's loss are such derivatives; so the same holds for it.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from cmp_trainer.execution.compiled import head_uncompiled


def in_one_forward(model: nn.Module, run: Callable[[nn.Module], Tensor], parts: Sequence[nn.Module] = ()) -> Tensor:
    """`run(module)`, with the module inside of what is wrapped around it and of torch.compile, or `model` itself.

    Args:
        parts: of the model, which are compiled one by one where it is compiled.
    """
    with head_uncompiled(model, parts) as inner:
        if _is_deepspeed(inner):
            return _in_engine(inner, run)
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


def _in_engine(engine: nn.Module, run: Callable[[nn.Module], Tensor]) -> Tensor:
    """`run(module)` inside of one forward of DeepSpeed's engine, in place of the module's own."""
    module, attributes = engine.module, engine.__dict__
    before = {name: value for name, value in attributes.items() if name == "module"}

    def restore() -> None:
        attributes.pop("module", None)
        attributes.update(before)

    def forward() -> Tensor:
        restore()
        return run(module)  # pyright: ignore[reportArgumentType]

    attributes["module"] = forward  # of this object, for this call
    try:
        return engine()
    finally:
        restore()


def _is_deepspeed(model: nn.Module) -> bool:
    deepspeed = sys.modules.get("deepspeed")  # where it is not imported there is no engine
    return deepspeed is not None and isinstance(model, deepspeed.DeepSpeedEngine)


def is_wrapper(model: nn.Module) -> bool:
    """Whether it is DistributedDataParallel or DeepSpeed's engine, with the model as its `module`."""
    return isinstance(model, DistributedDataParallel) or _is_deepspeed(model)


def is_data_parallel(model: nn.Module) -> bool:
    """Whether DistributedDataParallel or DeepSpeed is wrapped around the model."""
    with head_uncompiled(model) as inner:
        return is_wrapper(inner)


@contextmanager
def inner_model(model: nn.Module, parts: Sequence[nn.Module] = ()) -> Iterator[nn.Module]:
    """The model inside of what is wrapped around it and of torch.compile, or `model` itself; `parts` as above."""
    with head_uncompiled(model, parts) as inner:
        yield inner.module if is_wrapper(inner) else inner  # pyright: ignore[reportReturnType]


def devices_of(model: nn.Module, batch_tensors: list[Tensor]) -> set[torch.device]:
    """The devices that a forward may draw random numbers on: parameters may be off-loaded, the batch is not.

    Each step asks anew, as parameters may have been moved or replaced since, a part of them only, and nothing tells of
    it; a device that is missed would draw other masks for each variant.
    """
    devices = {tensor.device for tensor in batch_tensors}
    for module in modules_of(model):
        devices.update([one.device for one in module._parameters.values() if one is not None])
    return devices


def modules_of(model: nn.Module) -> list[nn.Module]:
    """The modules of `model.modules()` in another order, without the names that these are found with: twice as fast,
    for what asks for them in each step or batch."""
    found, seen = [model], {model}
    for module in found:  # which grows
        for child in module._modules.values():
            if child is not None and child not in seen:
                seen.add(child)
                found.append(child)
    return found
