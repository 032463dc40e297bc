"""Router losses of mixtures of experts belong to no example, also where they are made row by row."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForSeq2SeqLM

from cmp_trainer import CmpDrop, ComparativeStep, RegularizedLoss
from cmp_trainer.execution.ablated import Ablated
from tests.helpers import gradients
from tests.tiny_models import AVAILABLE, SWITCH, VOCABULARY, translation_batch

_NLLB = {
    "vocab_size": VOCABULARY,
    "d_model": 16,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_sparse_step": 1,
    "decoder_sparse_step": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24,
    "num_experts": 2,
    "expert_capacity": 64,
    "moe_token_dropout": 0.0,
    "router_z_loss_coef": 0.1,
    "router_aux_loss_coef": 0.1,
    "pad_token_id": 0,
    "decoder_start_token_id": 2,
}


def nllb():
    torch.manual_seed(0)
    return AutoModelForSeq2SeqLM.from_config(AutoConfig.for_model("nllb-moe", **_NLLB)), translation_batch()


def switch():
    return SWITCH.build(router_z_loss_coef=0.1, router_aux_loss_coef=0.1), SWITCH.batch()


def mixtral():
    return AVAILABLE["mixtral"].build(router_aux_loss_coef=0.1), AVAILABLE["mixtral"].batch()


@pytest.mark.parametrize("build", [nllb, switch, mixtral], ids=lambda build: build.__name__)
def test_a_router_loss_is_added_once_and_not_compared(build):
    model, batch = build()
    model.train()
    with_router = {**batch, "output_router_logits": True}
    with Ablated([CmpDrop()], [0]):
        expected = model(**with_router).loss
        task = model(**{**batch, "output_router_logits": False}).loss
    expected.backward()
    expected_gradients = gradients(model)
    assert expected > task + 1e-3
    model.zero_grad()
    step = ComparativeStep(model, [CmpDrop(base_rate=0.1)], RegularizedLoss(primary="full", weight=0.0))
    loss = step(with_router)
    loss.backward()
    torch.testing.assert_close(loss, expected)
    for name, gradient in gradients(model).items():
        unused = torch.zeros_like(gradient)  # experts that only the ablated variant reaches
        torch.testing.assert_close(gradient, expected_gradients.get(name, unused), rtol=1e-4, atol=1e-6)
    assert step.log()["loss_full"] == pytest.approx(float(task.detach()), rel=1e-5)
