"""Losses of examples that a user computes: `per_example_loss_func(outputs, inputs) -> (batch,)` or `(batch, parts)`.

For losses whose shares cannot be read (fused kernels), or to say oneself what is compared.
"""

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

PerExampleLoss = Callable[[Any, Mapping[str, Any]], Tensor]


def losses_of_examples(function: PerExampleLoss, outputs: Any, inputs: Mapping[str, Any]) -> Tensor:
    """The user's losses, checked and brought to `(batch, parts)`.

    Raises:
        ValueError: the function returned something else than `(batch,)` or `(batch, parts)` floats.
    """
    losses = function(outputs, inputs)
    sizes = {len(value) for value in inputs.values() if isinstance(value, Tensor) and value.ndim}
    if not isinstance(losses, Tensor) or losses.ndim not in (1, 2) or not losses.is_floating_point():
        given = (
            f"{losses.dtype} of shape {tuple(losses.shape)}" if isinstance(losses, Tensor) else type(losses).__name__
        )
        raise ValueError(
            f"per_example_loss_func returned {given}; expected a float tensor of shape (batch,) or (batch, parts) "
            'that is not averaged over the batch, e.g. cross_entropy(…, reduction="none").'
        )
    if len(sizes) == 1 and 1 not in sizes and len(losses) not in sizes:  # a packed batch is one row of many examples
        raise ValueError(
            f"per_example_loss_func returned {len(losses)} rows for a batch of {sizes.pop()} examples; expected one "
            "row each. Average losses of tokens over the tokens of their example first."
        )
    return losses.unsqueeze(1) if losses.ndim == 1 else losses
