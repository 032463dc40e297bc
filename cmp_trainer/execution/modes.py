"""Train and eval mode, and buffers, put back after a forward that is not a training step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from cmp_trainer.execution.one_forward import modules_of

_SMALL_BUFFER = 2**16  # elements, up to which copying a buffer takes less time than calling for it


@contextmanager
def in_eval_mode(model: nn.Module) -> Iterator[None]:
    """In the body, every module is in eval mode; afterwards each has its own mode again."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def train_mode_except_batch_norm(model: nn.Module) -> Iterator[None]:
    """Train mode for the modules of an eval model, so that they drop; batch norm stays in eval mode. Restored at the
    end, with the buffers that other modules change in train mode (spectral norm)."""
    modules = [module for module in modules_of(model) if not module.training]
    modules = [module for module in modules if not isinstance(module, nn.modules.batchnorm._BatchNorm)]
    _set_training(modules, True)
    try:
        with unchanged_buffers(model):
            yield
    finally:
        _set_training(modules, False)


def _set_training(modules: Sequence[nn.Module], training: bool) -> None:
    """Their own mode. What nn.Module adds to setting an attribute takes ten times as long and is for tensors."""
    for module in modules:
        plain = type(module).__setattr__ is nn.Module.__setattr__
        (object.__setattr__ if plain else setattr)(module, "training", training)


@contextmanager
def unchanged_buffers(model: nn.Module) -> Iterator[None]:
    """Buffers, such as the running means of batch norm, are after the body what they were before, unless they grew.

    Small ones of a device and a dtype are copied and compared as one, since an accelerator is waited for at each
    comparison. Only their values say whether they changed: the versions of tensors do not count what batch norm
    writes, nor what is written into `.data`.
    """
    groups: dict[Any, list[tuple[nn.Module, str, Tensor]]] = {}
    for module in modules_of(model):
        for name, buffer in module._buffers.items():
            if buffer is not None:
                plain = type(buffer) is Tensor and buffer.layout is torch.strided and not buffer.is_quantized
                joins = plain and buffer.numel() <= _SMALL_BUFFER
                key = (buffer.device, buffer.dtype) if joins else (module, name)
                groups.setdefault(key, []).append((module, name, buffer))
    before = [_Buffers(group) for group in groups.values()]
    try:
        yield
    finally:
        with torch.no_grad():
            for one in before:
                one.restore()


class _Buffers:
    """The values that some buffers have now: one of any kind, or several of a device and a dtype."""

    def __init__(self, buffers: Sequence[tuple[nn.Module, str, Tensor]]) -> None:
        self.places = [(module._buffers, name, buffer.shape) for module, name, buffer in buffers]
        with torch.no_grad():
            self.values = _joined([buffer for _, _, buffer in buffers]) if len(buffers) > 1 else buffers[0][2].clone()

    def restore(self) -> None:
        """Write them back to the buffers that changed and did not grow."""
        # The buffers of TorchScript have no `get`.
        now: list[Any] = [kept[name] if name in kept else None for kept, name, _ in self.places]  # noqa: SIM401
        shapes = [shape for _, _, shape in self.places]
        fits = [isinstance(one, Tensor) and one.shape == shape for one, shape in zip(now, shapes, strict=True)]
        if len(now) == 1:
            if fits[0] and not torch.equal(now[0], self.values):
                now[0].copy_(self.values)
        elif any(fits) and not (all(fits) and torch.equal(_joined(now), self.values)):
            pieces = self.values.split([shape.numel() for shape in shapes])
            pairs = [(one, piece.view_as(one)) for one, piece, fit in zip(now, pieces, fits, strict=True) if fit]
            differ = torch.stack([(one != before).any() for one, before in pairs]).tolist()
            for (one, before), differs in zip(pairs, differ, strict=True):
                if differs:
                    one.copy_(before)


def _joined(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in tensors])
