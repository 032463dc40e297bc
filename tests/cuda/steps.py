"""Models, batches and steps on the GPU, for the tests beside this file."""

from contextlib import nullcontext
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn

from cmp_trainer import CmpDrop, ComparativeStep
from tests.helpers import batch_of, gradients, tiny_bert, token_data

DEVICE = torch.device("cuda")
EXECUTIONS: dict[str, dict[str, Any]] = {
    "sequential": {"forward": "sequential"},
    "stacked": {"forward": "stacked"},
    "low memory": {"low_memory": True},
}
every_execution = pytest.mark.parametrize("execution", EXECUTIONS)
every_attention = pytest.mark.parametrize("attention", ["eager", "sdpa"])
all_or_top_layers = pytest.mark.parametrize("layers", [None, 1], ids=["all layers", "top layer"])


class Result(NamedTuple):
    """What one step came to."""

    loss: torch.Tensor
    gradients: dict[str, torch.Tensor]
    step: ComparativeStep


def bert(layers: int | None = None, rate: float = 0.3, **changes: Any) -> nn.Module:
    """A BERT of three layers on the GPU, in train mode: dropout is at `rate` in the top layers and in what comes after
    them, and at 0 below; at `rate` everywhere where `layers` is None."""
    of_all = rate if layers is None else 0.0
    rates = {"hidden_dropout_prob": of_all, "attention_probs_dropout_prob": of_all}
    model = tiny_bert(num_hidden_layers=3, **{**rates, **changes})
    for part in (*model.bert.encoder.layer[3 - (layers or 3) :], model.dropout):
        for module in part.modules():
            if isinstance(module, nn.Dropout) and layers is not None:
                module.p = rate
    return model.to(DEVICE).train()


def batch(rows: range = range(4)) -> dict[str, torch.Tensor]:
    """A batch on the GPU, whose second row ends in padding."""
    found = batch_of(token_data(), rows)
    found["attention_mask"][1, -3:] = 0
    return {name: tensor.to(DEVICE) for name, tensor in found.items()}


def step_of(
    model: nn.Module,
    layers: int | None = None,
    shares: bool = True,
    objective: Any = None,
    autocast: torch.dtype | None = None,
    trained: nn.Module | None = None,
    **settings: Any,
) -> Result:
    """A second step with two drops; its first one makes the checks.

    Args:
        layers: how many of the top layers are ablated; all where None.
        shares: whether the layers below them run once; otherwise they run for each variant.
        autocast: a type of 16 bit.
        trained: what is wrapped around the model.
    """
    inputs = batch()
    step = ComparativeStep(
        model if trained is None else trained, [CmpDrop()] * 2, objective, ablated_layers=layers, **settings
    )
    with nullcontext() if autocast is None else torch.autocast(DEVICE.type, dtype=autocast):
        torch.manual_seed(5)
        step(inputs)
        assert step._shares_lower == (layers is not None)
        if not shares:
            step._shares_lower = False
        model.zero_grad()
        torch.manual_seed(5)
        loss = step(inputs)
    loss.backward()
    return Result(loss.detach(), gradients(model), step)


def assert_same(ours: Result, expected: Result, tolerance: float = 1e-5) -> None:
    """Equal losses; gradients to the tolerance of the largest one."""
    torch.testing.assert_close(ours.loss, expected.loss, rtol=tolerance, atol=tolerance)
    assert ours.gradients.keys() == expected.gradients.keys()
    size = max(gradient.abs().max() for gradient in expected.gradients.values())
    for name, gradient in expected.gradients.items():
        torch.testing.assert_close(ours.gradients[name] / size, gradient / size, rtol=0, atol=tolerance, msg=name)


def weighted(losses: torch.Tensor) -> torch.Tensor:
    """An objective without a kink, at which rounding could turn a gradient."""
    return losses[..., 0] + 2 * losses[..., 1] + 3 * losses[..., 2]


def flat(values: dict[str, torch.Tensor]) -> torch.Tensor:
    """All gradients as one vector."""
    return torch.cat([value.float().flatten() for value in values.values()])
