"""The random state a forward starts from, captured once and restored before the forward of every variant.

Equal states make the dropout masks of the variants nested and let models with randomness of their own (SpecAugment,
layer drop) draw alike. Captured are Python's, NumPy's and PyTorch's generators, the latter on the CPU and on the
devices in use, no others.
"""

import random
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch


@dataclass(frozen=True)
class RandomState:
    """A snapshot of the generators that a forward on `devices` can draw from."""

    python: Any
    numpy: Any
    cpu: torch.Tensor
    devices: dict[torch.device, torch.Tensor]

    @classmethod
    def capture(cls, devices: Iterable[torch.device] = ()) -> "RandomState":
        """Snapshot now. `devices` may name the CPU, which is always included."""
        accelerators = {device for device in devices if device.type not in ("cpu", "meta")}
        states = {device: generator_state(device) for device in accelerators}
        return cls(random.getstate(), np.random.get_state(), torch.get_rng_state(), states)

    def restore(self) -> None:
        """Put every generator back to where it was."""
        random.setstate(self.python)
        np.random.set_state(self.numpy)
        torch.set_rng_state(self.cpu)
        for device, state in self.devices.items():
            set_generator_state(device, state)


@contextmanager
def preserve_rng_state(devices: Iterable[torch.device] = ()) -> Iterator[RandomState]:
    """Whatever the body draws, the random state afterwards is the one before, also when the body raises."""
    state = RandomState.capture(devices)
    try:
        yield state
    finally:
        state.restore()


@contextmanager
def rng_restart(devices: Iterable[torch.device] = ()) -> Iterator[Callable[[], None]]:
    """Yields a function that goes back to the random state now; also done when the body raises, and then only."""
    state = RandomState.capture(devices)
    try:
        yield state.restore
    except BaseException:
        state.restore()
        raise


def generator_state(device: torch.device) -> torch.Tensor:
    """State of PyTorch's default generator of the device."""
    return torch.get_rng_state() if device.type == "cpu" else _generators(device).get_rng_state(*_index(device))


def set_generator_state(device: torch.device, state: torch.Tensor) -> None:
    """Put PyTorch's default generator of the device to a state that `generator_state` returned."""
    if device.type == "cpu":
        torch.set_rng_state(state)
    else:
        _generators(device).set_rng_state(state, *_index(device))


def seed_generator(device: torch.device, seed: int) -> None:
    """Put PyTorch's default generator of the device to a seed."""
    set_generator_state(device, torch.Generator(device).manual_seed(seed).get_state())


def _generators(device: torch.device) -> Any:
    return torch.get_device_module(device)


def _index(device: torch.device) -> tuple[torch.device, ...]:
    return () if device.type == "mps" else (device,)  # Apple's GPUs have one generator and take no index
