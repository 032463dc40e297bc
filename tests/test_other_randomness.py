"""What is random in a model beside dropout, or differs between train and eval mode: what then happens."""

import copy

import pytest
import torch
from transformers import Trainer, TrainingArguments

from cmp_trainer import CmpTrainer
from cmp_trainer.ablations.drop import CmpDrop
from cmp_trainer.execution.ablated import Ablated
from tests.helpers import training_arguments
from tests.test_architectures import gradients
from tests.tiny_models import AVAILABLE, CONFORMER, SEW_D, SWITCH

SPEC_AUGMENT = {"apply_spec_augment": True, "mask_time_prob": 0.5, "mask_time_length": 2}
RANDOM_MODELS = [
    pytest.param(
        AVAILABLE["bart"], {"encoder_layerdrop": 0.5, "decoder_layerdrop": 0.5, "init_std": 0.5}, id="layer drop, text"
    ),
    pytest.param(AVAILABLE["wav2vec2"], {"layerdrop": 0.5}, id="layer drop, speech"),
    pytest.param(AVAILABLE["beit"], {"drop_path_rate": 0.5}, id="stochastic depth"),
    pytest.param(AVAILABLE["swin"], {"drop_path_rate": 0.5}, id="stochastic depth of windows"),
    pytest.param(AVAILABLE["wav2vec2"], SPEC_AUGMENT, id="SpecAugment"),
    pytest.param(SWITCH, {"router_jitter_noise": 0.5}, id="router noise"),
    pytest.param(SEW_D, {"hidden_dropout": 0.5, "initializer_range": 0.5}, id="dropout of its own"),
]


@pytest.mark.parametrize(("tiny", "settings"), RANDOM_MODELS)
def test_the_full_variant_of_a_model_with_other_randomness_is_not_the_eval_model(tiny, settings):
    model, batch = tiny.build(**settings), tiny.batch()
    with torch.no_grad():
        expected = model.eval()(**batch).logits
        with Ablated([CmpDrop()], [0]):
            full = [model.train()(**batch).logits for _ in range(4)]
    assert any(not torch.allclose(logits, expected, rtol=1e-6, atol=1e-6) for logits in full)


@pytest.mark.parametrize(("tiny", "settings"), RANDOM_MODELS)
def test_other_randomness_is_warned_of_and_trains_reproducibly(tiny, settings, tmp_path, caplog):
    model, batch = tiny.build(**settings), tiny.batch()
    arguments = training_arguments(tmp_path, cmp_num_ablations=2)
    trained = []
    for _ in range(2):
        torch.manual_seed(3)
        trained.append(gradients(CmpTrainer(copy.deepcopy(model), arguments), batch))
    assert "randomness besides dropout" in caplog.text
    assert trained[0].keys() == trained[1].keys()
    for name, gradient in trained[0].items():
        assert gradient.isfinite().all()
        assert torch.equal(gradient, trained[1][name]), name


def test_batch_norm_of_the_full_variant_takes_its_means_from_the_batch():
    batch = CONFORMER.batch()
    with torch.no_grad(), Ablated([CmpDrop()], [0]):
        full = CONFORMER.build().train()(**batch).logits
    with torch.no_grad():
        expected = CONFORMER.build(**CONFORMER.rates_at_zero).train()(**batch).logits
        asleep = CONFORMER.build().eval()(**batch).logits
    torch.testing.assert_close(full, expected, rtol=1e-6, atol=1e-6)
    assert not torch.allclose(full, asleep, atol=1e-6)


def test_running_means_of_batch_norm_see_every_variant_of_a_step(tmp_path):
    plain = Trainer(CONFORMER.build(), training_arguments(tmp_path, TrainingArguments))
    compared = CmpTrainer(CONFORMER.build(), training_arguments(tmp_path, cmp_num_ablations=2))
    for trainer in (plain, compared):
        gradients(trainer, CONFORMER.batch())
    assert batches_seen(plain.model) == {1}
    assert batches_seen(compared.model) == {3}


def batches_seen(model):
    return {int(value) for name, value in model.named_buffers() if name.endswith("num_batches_tracked")}
