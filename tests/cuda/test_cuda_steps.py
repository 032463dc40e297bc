"""Steps on a GPU in float32: the full variant is the eval model, a step draws as one forward does, and stacked, low
memory, checkpointed and compiled steps have the gradients of sequential ones. All or the top layers are ablated."""

import gc

import pytest
import torch

from cmp_trainer import CmpDrop, ComparativeStep
from cmp_trainer.execution.random_state import RandomState, generator_state
from cmp_trainer.step import model_loss
from tests.cuda.steps import (
    DEVICE,
    EXECUTIONS,
    all_or_top_layers,
    assert_same,
    batch,
    bert,
    every_attention,
    every_execution,
    step_of,
)


@all_or_top_layers
@every_attention
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_full_variant_is_the_eval_model(dtype, attention, layers):
    model, inputs = bert(attn_implementation=attention).to(dtype), batch()
    step = ComparativeStep(model, [CmpDrop()] * 2, ablated_layers=layers)
    with torch.no_grad():
        expected = model.eval()(**inputs)
        dropped = model.train()(**inputs)
        start = RandomState.capture(step.devices(inputs))
        with step.ablated(inputs, model_loss, (0,), start):
            full = model(**inputs)
    torch.testing.assert_close(full.logits, expected.logits)
    torch.testing.assert_close(full.loss, expected.loss)
    assert not torch.equal(dropped.logits, expected.logits)  # else the claim would be empty


@all_or_top_layers
@every_attention
def test_the_losses_of_the_full_variant_are_those_of_the_eval_model(attention, layers):
    model, inputs = bert(attn_implementation=attention), batch()
    step = ComparativeStep(model, [CmpDrop()] * 2, ablated_layers=layers)
    found = step.losses(inputs).values[:, 0, 0]
    with torch.no_grad():
        logits = model.eval()(**inputs).logits
    expected = torch.nn.functional.cross_entropy(logits, inputs["labels"], reduction="none")
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@all_or_top_layers
@every_attention
@every_execution
def test_the_random_state_after_a_step_is_where_one_forward_leaves_it(execution, attention, layers):
    model, inputs = bert(layers, attn_implementation=attention), batch()
    torch.manual_seed(7)
    before = generator_state(DEVICE)
    model(**inputs)
    expected = generator_state(DEVICE)
    assert not torch.equal(expected, before)
    step = ComparativeStep(model, [CmpDrop()] * 2, ablated_layers=layers, **EXECUTIONS[execution])
    for _ in range(3):  # the first one makes the checks
        torch.manual_seed(7)
        loss = step(inputs)
        assert torch.equal(generator_state(DEVICE), expected)
        loss.backward()
        assert torch.equal(generator_state(DEVICE), expected)


@all_or_top_layers
@every_attention
@pytest.mark.parametrize("execution", ["stacked", "low memory"])
def test_every_execution_of_a_step_has_the_gradients_of_the_sequential_one(execution, attention, layers):
    model = bert(attn_implementation=attention)
    expected = step_of(model, layers, **EXECUTIONS["sequential"])
    assert_same(step_of(model, layers, **EXECUTIONS[execution]), expected)


@pytest.mark.parametrize("checkpointing", [False, True])
@every_attention
@every_execution
def test_layers_that_run_once_for_all_variants_give_the_gradients_of_separate_forwards(
    execution, attention, checkpointing
):
    model = bert(attn_implementation=attention)
    expected = step_of(model, 1, shares=False, **EXECUTIONS["sequential"])
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    assert_same(step_of(model, 1, **EXECUTIONS[execution]), expected)


@pytest.mark.parametrize("layers", [1, 2, 3])
@every_execution
def test_it_is_the_same_model_with_every_rate_below_the_boundary_at_zero(execution, layers):
    expected = step_of(bert(layers), **EXECUTIONS["sequential"])
    assert_same(step_of(bert(), layers, **EXECUTIONS[execution]), expected)


@all_or_top_layers
@every_attention
@every_execution
def test_a_step_with_gradient_checkpointing_has_the_gradients_without_it(execution, attention, layers):
    model = bert(attn_implementation=attention)
    expected = step_of(model, layers, **EXECUTIONS[execution])
    model.gradient_checkpointing_enable({"use_reentrant": False})
    assert_same(step_of(model, layers, **EXECUTIONS[execution]), expected)


@all_or_top_layers
@every_execution
def test_the_memory_of_a_step_is_free_before_python_looks_for_cycles(execution, layers):
    model, inputs = bert(), batch()
    model(**inputs).loss.backward()
    model.zero_grad()
    step = ComparativeStep(model, [CmpDrop()] * 2, ablated_layers=layers, **EXECUTIONS[execution])
    gc.collect()
    gc.disable()
    try:
        before, after = torch.cuda.memory_allocated(), []
        for _ in range(4):  # the first one makes the checks
            step(inputs).backward()
            model.zero_grad()
            after.append(torch.cuda.memory_allocated() - before)
    finally:
        gc.enable()
    assert after[0] < 8 * 1024  # sums for the log, and the like
    assert after[1] == after[3]


@all_or_top_layers
@pytest.mark.parametrize("execution", ["sequential", "low memory"])
def test_a_step_compiled_by_aot_eager_has_the_gradients_of_an_eager_one(execution, layers):
    model = bert()
    expected = step_of(model, layers, **EXECUTIONS["sequential"])
    compiled = torch.compile(model, backend="aot_eager")
    assert_same(step_of(model, layers, trained=compiled, **EXECUTIONS[execution]), expected)


def compiled_by_inductor(layers, execution, shares=True):
    """Inductor draws its own masks, so its steps are compared with each other."""
    torch._dynamo.reset()
    model = bert()
    return step_of(model, layers, shares, trained=torch.compile(model), **EXECUTIONS[execution])


@pytest.mark.parametrize("execution", ["sequential", "low memory"])
def test_layers_that_inductor_compiles_and_that_run_once_give_the_gradients_of_separate_forwards(execution):
    expected = compiled_by_inductor(1, execution, shares=False)
    assert_same(compiled_by_inductor(1, execution), expected)


def test_a_step_of_low_memory_that_inductor_compiles_has_the_gradients_of_the_sequential_one():
    assert_same(compiled_by_inductor(None, "low memory"), compiled_by_inductor(None, "sequential"))
