"""Trainings and steps by the Trainer on a GPU: what the other tests show on the CPU holds there, with every execution,
with all layers ablated and the top one alone."""

import pytest
import torch
from transformers import Trainer

from cmp_trainer import CmpTrainer, RegularizedLoss
from tests.cuda.steps import DEVICE
from tests.helpers import batch_of, cmp_trainer, gradients, same_weights, tiny_bert, token_data

EXECUTIONS = {
    "sequential": {"cmp_forward": "sequential"},
    "stacked": {"cmp_forward": "stacked"},
    "low memory": {"cmp_low_memory": True},
}


every_execution = pytest.mark.parametrize("settings", EXECUTIONS.values(), ids=EXECUTIONS)
every_attention = pytest.mark.parametrize("attention", ["eager", "sdpa"])
all_or_top_layers = pytest.mark.parametrize("layers", [None, 1], ids=["all layers", "top layer"])


def step_of(folder, model=None, **settings):
    """Loss and gradients of one step on the GPU, in float32."""
    trainer = cmp_trainer(folder, model or tiny_bert(), use_cpu=False, **settings)
    batch = {name: tensor.to(DEVICE) for name, tensor in batch_of(token_data()).items()}
    torch.manual_seed(7)
    loss = trainer.compute_loss(trainer.model.train(), batch)
    loss.backward()
    return loss.detach(), gradients(trainer.model)


@all_or_top_layers
@every_execution
@every_attention
def test_the_full_model_alone_has_the_gradients_of_a_trainer_without_dropout(settings, attention, layers, tmp_path):
    changes = {"attn_implementation": attention}
    without = tiny_bert(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, **changes)
    expected = step_of(tmp_path, without, cmp_num_ablations=0)
    only_full = RegularizedLoss(primary="full", weight=0)
    settings = {"cmp_num_ablations": 2, "cmp_ablated_layers": layers, "objective": only_full, **settings}
    ours = step_of(tmp_path, tiny_bert(**changes), **settings)
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-6)


@all_or_top_layers
@every_attention
@pytest.mark.parametrize("execution", ["stacked", "low memory"])
def test_every_execution_has_the_gradients_of_the_sequential_one(execution, attention, layers, tmp_path):
    changes = {"cmp_num_ablations": 2, "cmp_ablated_layers": layers}
    found = [
        step_of(tmp_path, tiny_bert(attn_implementation=attention), **changes, **EXECUTIONS[name])
        for name in ("sequential", execution)
    ]
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-6)


@all_or_top_layers
@every_execution
def test_a_resumed_training_ends_at_the_weights_of_an_unbroken_one(settings, layers, tmp_path):
    changes = {"use_cpu": False, "cmp_num_ablations": 2, "cmp_ablated_layers": layers, **settings}
    changes |= {"save_strategy": "steps", "save_steps": 2}
    unbroken = cmp_trainer(tmp_path, **changes)
    unbroken.train()
    resumed = cmp_trainer(tmp_path, **changes)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert same_weights(unbroken.model, resumed.model)


def test_without_ablations_the_weights_are_trainers_to_the_bit(tmp_path):
    models = []
    for kind in (CmpTrainer, Trainer):
        trainer = cmp_trainer(tmp_path, kind=kind, use_cpu=False)
        trainer.train()
        models.append(trainer.model)
    assert same_weights(*models)


@all_or_top_layers
def test_recomputed_layers_drop_what_they_dropped(layers, tmp_path):
    settings = {"cmp_num_ablations": 2, "cmp_forward": "sequential", "cmp_ablated_layers": layers}
    expected, model = step_of(tmp_path, **settings), tiny_bert()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    torch.testing.assert_close(step_of(tmp_path, model, **settings), expected, rtol=1e-4, atol=1e-6)


def test_a_training_that_inductor_compiles_compares_and_learns(tmp_path):
    changes = {"max_steps": 60, "learning_rate": 3e-3, "cmp_num_ablations": 2, "torch_compile": True}
    trainer = cmp_trainer(tmp_path, use_cpu=False, **changes)
    trainer.train()
    losses = [log["loss_full"] for log in trainer.state.log_history if "loss_full" in log]
    assert sum(losses[-3:]) < 0.7 * sum(losses[:3])
