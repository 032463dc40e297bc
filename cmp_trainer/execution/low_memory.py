"""Low memory: the exact gradient of the objective at the activation memory of one variant.

The objective ties the shares of all variants together, so its graph would hold the activations of all 1 + c forwards.
By the chain rule its gradient is the sum over the variants of (its derivative by their shares) * (gradient of the
shares), which needs one variant at a time once the derivatives are known:

    (1) run all variants without a graph of the model, for their shares;
    (2) differentiate the objective by the shares;
    (3) when the backward of the loss arrives: for each variant, forward again from the same random state, and
        backward of its shares times their derivatives times the gradient that arrived.

The second forward repeats the first, dropout masks included, so this is exact for every objective, at the price of c
more forwards: the graph of the last variant is kept from the first time. Because (3) runs inside of the loss's own
backward, whatever scales the loss afterwards (a loss scaler, gradient accumulation, a subclass) reaches every variant.

Layers that the variants share (shared.py) keep their graph from (1); only what lies above them is repeated. There, the
gradients of all variants are collected at the boundary, and the lower layers' backward runs once, at the end.
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor

from cmp_trainer.execution.random_state import preserve_rng_state
from cmp_trainer.execution.shared import Lower


def loss_in_backward(
    value: Tensor, terms: Sequence[Callable[[], Tensor]], devices: set[torch.device], lower: Lower | None = None
) -> Tensor:
    """A loss of this value whose gradient is that of the sum of the terms, which run in its backward one by one.

    Args:
        value: a scalar.
        terms: each makes a forward and back-propagates nothing by itself; returns a scalar with a graph.
        devices: whose random states are the same after the backward as before it.
        lower: what the terms share; its backward runs once, with that of the last term.
    """
    loss = value.detach().clone().requires_grad_()
    autocast = _autocast_now({device.type for device in devices} | {"cpu"})

    def backward(gradient: Tensor) -> None:
        with preserve_rng_state(devices), torch.enable_grad():
            for number, term in enumerate(terms, start=1):
                is_last = number == len(terms)
                if lower is not None:
                    lower.returns_leaves = not is_last
                with autocast():
                    scalar = term()
                shared, arrived = lower.backward() if lower is not None and is_last else ([], [])
                torch.autograd.backward([scalar * gradient.to(scalar.dtype), *shared], [None, *arrived])

    loss.register_hook(backward)
    return loss


def _autocast_now(device_types: set[str]) -> Callable:
    """A context manager that casts as the caller's context does now."""
    settings = [(kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind)) for kind in device_types]

    @contextmanager
    def again():
        with ExitStack() as stack:
            for kind, dtype, enabled in settings:
                stack.enter_context(torch.autocast(kind, dtype=dtype, enabled=enabled))
            yield

    return again
