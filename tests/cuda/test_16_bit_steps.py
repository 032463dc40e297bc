"""Steps on a GPU under autocast to bfloat16 and float16, the latter with a gradient scaler, in every execution: what
scales and casts reaches all variants, and the full model alone has the gradients of a training without dropout."""

from contextlib import contextmanager, nullcontext

import pytest
import torch

from cmp_trainer import CmpDrop, ComparativeStep, RegularizedLoss
from tests.cuda.steps import (
    DEVICE,
    EXECUTIONS,
    all_or_top_layers,
    batch,
    bert,
    every_execution,
    flat,
    step_of,
    weighted,
)
from tests.helpers import cmp_trainer, gradients

SCALE = 2.0**10
# Of the norm of a gradient; numbers of 16 bit have 8 and 11 digits.
TOLERANCE = {torch.bfloat16: 3e-2, torch.float16: 1e-2}
every_type = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)


def bert_16(**changes):
    """A BERT whose gradients are not as small as the smallest numbers of float16."""
    return bert(**{"rate": 0.1, "initializer_range": 0.2, **changes})


@contextmanager
def refusal_of_stacking_skips():
    """Where rounding hides whether rows are kept apart, stacked forwards are refused."""
    try:
        yield
    except ValueError as error:
        if "--cmp_forward stacked does not work" not in str(error):
            raise
        pytest.skip(str(error))


def assert_near(ours, expected, tolerance):
    assert ours.keys() == expected.keys()
    assert all(gradient.isfinite().all() for gradient in ours.values())
    assert (flat(ours) - flat(expected)).norm() < tolerance * flat(expected).norm()


@all_or_top_layers
@every_execution
@every_type
def test_the_full_model_alone_has_the_gradients_of_a_training_without_dropout_in_16_bit(dtype, execution, layers):
    without = bert_16(rate=0.0)
    with torch.autocast(DEVICE.type, dtype=dtype):
        loss = without(**batch()).loss
    loss.backward()
    only_full = RegularizedLoss(primary="full", weight=0)
    with refusal_of_stacking_skips():
        ours = step_of(bert_16(), layers, objective=only_full, autocast=dtype, **EXECUTIONS[execution])
    assert ours.loss.dtype == torch.float32
    torch.testing.assert_close(ours.loss, loss.detach().float(), rtol=TOLERANCE[dtype], atol=0)
    assert_near(ours.gradients, gradients(without), TOLERANCE[dtype])


@all_or_top_layers
@pytest.mark.parametrize("execution", ["stacked", "low memory"])
@every_type
def test_every_execution_in_16_bit_has_the_gradients_of_the_sequential_one(dtype, execution, layers):
    settings = {"objective": weighted, "autocast": dtype}
    expected = step_of(bert_16(), layers, **settings, **EXECUTIONS["sequential"])
    with refusal_of_stacking_skips():
        ours = step_of(bert_16(), layers, **settings, **EXECUTIONS[execution])
    assert_near(ours.gradients, expected.gradients, TOLERANCE[dtype])


@every_execution
@every_type
def test_layers_that_run_once_in_16_bit_give_the_gradients_of_separate_forwards(dtype, execution):
    settings = {"objective": weighted, "autocast": dtype}
    expected = step_of(bert_16(), 1, shares=False, **settings, **EXECUTIONS["sequential"])
    with refusal_of_stacking_skips():
        ours = step_of(bert_16(), 1, **settings, **EXECUTIONS[execution])
    assert_near(ours.gradients, expected.gradients, TOLERANCE[dtype])


def unscaled_gradients(layers, execution, scaler):
    """Gradients of a third step in float16, taken back to their size by the scaler where there is one."""
    model, inputs = bert_16(), batch()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    step = ComparativeStep(model, [CmpDrop()] * 2, weighted, ablated_layers=layers, **EXECUTIONS[execution])
    for _ in range(3):
        optimizer.zero_grad()
        torch.manual_seed(5)
        with refusal_of_stacking_skips(), torch.autocast(DEVICE.type, dtype=torch.float16):
            loss = step(inputs)
        (loss if scaler is None else scaler.scale(loss)).backward()
    scaled = gradients(model)
    if scaler is not None:
        scaler.unscale_(optimizer)
    return scaled, gradients(model)


@all_or_top_layers
@every_execution
def test_gradients_that_a_scaler_scaled_and_unscaled_are_those_without_it(execution, layers):
    _, expected = unscaled_gradients(layers, execution, None)
    scaled, ours = unscaled_gradients(layers, execution, torch.amp.GradScaler(DEVICE.type, init_scale=SCALE))
    assert_near(ours, expected, TOLERANCE[torch.float16])
    assert float(flat(scaled).norm()) == pytest.approx(
        SCALE * float(flat(expected).norm()), rel=TOLERANCE[torch.float16]
    )


@all_or_top_layers
@every_execution
def test_a_loop_with_a_gradient_scaler_learns(execution, layers):
    model, inputs = bert_16(), batch(range(16))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    scaler = torch.amp.GradScaler(DEVICE.type, init_scale=SCALE)
    step = ComparativeStep(model, [CmpDrop()] * 2, ablated_layers=layers, **EXECUTIONS[execution])
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        with refusal_of_stacking_skips(), torch.autocast(DEVICE.type, dtype=torch.float16):
            loss = step(inputs)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        losses.append(step.log()["loss_full"])
    assert sum(losses[-6:]) < 0.7 * sum(losses[:6])


@pytest.mark.parametrize("precision", [{"bf16": True}, {"fp16": True}], ids=str)
@all_or_top_layers
@every_execution
def test_a_training_in_16_bit_compares_and_learns(precision, execution, layers, tmp_path):
    settings = {f"cmp_{name}": value for name, value in EXECUTIONS[execution].items()}
    changes = {"max_steps": 60, "learning_rate": 3e-3, "cmp_num_ablations": 2, **precision, **settings}
    trainer = cmp_trainer(tmp_path, use_cpu=False, cmp_ablated_layers=layers, **changes)
    with refusal_of_stacking_skips() if layers else nullcontext():
        trainer.train()
    losses = [log["loss_full"] for log in trainer.state.log_history if "loss_full" in log]
    assert sum(losses[-3:]) < 0.7 * sum(losses[:3])
