"""What the other tests show on the CPU holds on a GPU of NVIDIA; skipped where there is none."""

import itertools

import pytest
import torch
from torch.nn import functional as F
from transformers import Trainer

from cmp_trainer import CmpDrop, CmpTrainer, RegularizedLoss
from cmp_trainer.execution.ablated import Ablated
from tests.helpers import batch_of, cmp_trainer, gradients, same_weights, tiny_bert, token_data

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU of NVIDIA")

EXECUTIONS = {
    "sequential": {"cmp_forward": "sequential"},
    "stacked": {"cmp_forward": "stacked"},
    "low memory": {"cmp_low_memory": True},
}


@pytest.fixture(autouse=True)
def float32_without_shortcuts():
    """torch.compile lets the Trainer turn TF32 on for the whole process."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False


def attention(dtype, masked):
    """Attention over an identity returns its own weights."""
    query = torch.zeros(2, 4, 64, 64, device="cuda", dtype=dtype)
    identity = torch.eye(64, device="cuda", dtype=dtype).expand(2, 4, 64, 64)
    mask = torch.ones(2, 1, 1, 64, device="cuda", dtype=torch.bool) if masked else None
    return F.scaled_dot_product_attention(query, query, identity, attn_mask=mask, dropout_p=0.3)


def plain(dtype, masked):
    return F.dropout(torch.ones(64, 257, device="cuda", dtype=dtype), 0.3)


@pytest.mark.parametrize("call", [plain, attention])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_masks_of_more_drops_contain_masks_of_fewer(call, masked, dtype):
    masks = []
    for drops in range(4):
        torch.manual_seed(3)
        with Ablated([CmpDrop()], [drops]):
            masks.append(call(dtype, masked) == 0)
    assert not masks[0].any()
    for fewer, more in itertools.pairwise(masks):
        assert (fewer <= more).all() and fewer.sum() < more.sum()


def step_of(folder, model=None, **settings):
    """Loss and gradients of one step on the GPU, in float32."""
    trainer = cmp_trainer(folder, model or tiny_bert(), use_cpu=False, **settings)
    batch = {name: tensor.cuda() for name, tensor in batch_of(token_data()).items()}
    torch.manual_seed(7)
    loss = trainer.compute_loss(trainer.model.train(), batch)
    loss.backward()
    return loss.detach(), gradients(trainer.model)


@pytest.mark.parametrize("settings", EXECUTIONS.values(), ids=EXECUTIONS)
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_the_full_model_alone_has_the_gradients_of_a_trainer_without_dropout(settings, attention, tmp_path):
    changes = {"attn_implementation": attention}
    without = tiny_bert(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, **changes)
    expected = step_of(tmp_path, without, cmp_num_ablations=0)
    only_full = RegularizedLoss(primary="full", weight=0)
    ours = step_of(tmp_path, tiny_bert(**changes), cmp_num_ablations=2, objective=only_full, **settings)
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("settings", ["stacked", "low memory"])
def test_every_execution_has_the_gradients_of_the_sequential_one(settings, attention, tmp_path):
    found = [
        step_of(tmp_path, tiny_bert(attn_implementation=attention), cmp_num_ablations=2, **EXECUTIONS[name])
        for name in ("sequential", settings)
    ]
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("precision", [{"bf16": True}, {"fp16": True}], ids=str)
@pytest.mark.parametrize("settings", EXECUTIONS.values(), ids=EXECUTIONS)
def test_a_training_in_16_bit_compares_and_learns(precision, settings, tmp_path):
    changes = {"max_steps": 60, "learning_rate": 3e-3, "cmp_num_ablations": 2, **precision, **settings}
    trainer = cmp_trainer(tmp_path, use_cpu=False, **changes)
    trainer.train()
    losses = [log["loss_full"] for log in trainer.state.log_history if "loss_full" in log]
    assert sum(losses[-3:]) < 0.7 * sum(losses[:3])


@pytest.mark.parametrize("settings", EXECUTIONS.values(), ids=EXECUTIONS)
def test_a_resumed_training_ends_at_the_weights_of_an_unbroken_one(settings, tmp_path):
    changes = {"use_cpu": False, "cmp_num_ablations": 2, "save_strategy": "steps", "save_steps": 2, **settings}
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


def test_recomputed_layers_drop_what_they_dropped(tmp_path):
    settings = {"cmp_num_ablations": 2, "cmp_forward": "sequential"}
    expected, model = step_of(tmp_path, **settings), tiny_bert()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    torch.testing.assert_close(step_of(tmp_path, model, **settings), expected, rtol=1e-4, atol=1e-6)


def test_a_training_that_inductor_compiles_compares_and_learns(tmp_path):
    changes = {"max_steps": 60, "learning_rate": 3e-3, "cmp_num_ablations": 2, "torch_compile": True}
    trainer = cmp_trainer(tmp_path, use_cpu=False, **changes)
    trainer.train()
    losses = [log["loss_full"] for log in trainer.state.log_history if "loss_full" in log]
    assert sum(losses[-3:]) < 0.7 * sum(losses[:3])
