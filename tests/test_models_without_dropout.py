"""Models published without dropout: --cmp_dropout gives their sites a rate; without sites they are refused."""

import pytest

from cmp_trainer import CmpTrainer
from tests.helpers import training_arguments
from tests.test_architectures import gradients
from tests.tiny_models import AVAILABLE, CONVNEXT, MAMBA, RESNET

WITH_RATES = ("biogpt", "codegen", "ctrl", "gpt2", "gpt_bigcode", "gpt_neo", "gptj", "openai-gpt", "opt", "xglm")
DECODERS = [name for name, tiny in AVAILABLE.items() if tiny.kind == "text decoder" and name not in WITH_RATES]
UNDROPPED = [*DECODERS, *(name for name in ("eurobert", "modernbert", "vit") if name in AVAILABLE)]
undropped = pytest.mark.parametrize("model_type", UNDROPPED)


@undropped
def test_a_model_without_rates_is_refused_and_told_of_cmp_dropout(model_type, tmp_path):
    tiny = AVAILABLE[model_type]
    for model in tiny.builds(**tiny.rates_at_zero):
        trainer = CmpTrainer(model, training_arguments(tmp_path, cmp_num_ablations=1))
        with pytest.raises(ValueError, match=r"makes \d+ dropout calls .*all at rate 0.*--cmp_dropout 0\.1"):
            gradients(trainer, tiny.batch())


@undropped
def test_cmp_dropout_gives_its_sites_a_rate(model_type, tmp_path):
    tiny = AVAILABLE[model_type]
    for model in tiny.builds(**tiny.rates_at_zero):
        trainer = CmpTrainer(model, training_arguments(tmp_path, cmp_num_ablations=2, cmp_dropout=0.3))
        assert all(gradient.isfinite().all() for gradient in gradients(trainer, tiny.batch()).values())
        logs = trainer.comparative_step().log()
        assert len({logs["loss_full"], logs["loss_ablated_1"], logs["loss_ablated_2"]}) == 3


@pytest.mark.parametrize("tiny", [MAMBA, RESNET, CONVNEXT], ids=lambda tiny: tiny.model_type)
def test_an_architecture_that_calls_no_dropout_is_refused_whatever_the_rate(tiny, tmp_path):
    trainer = CmpTrainer(tiny.build(), training_arguments(tmp_path, cmp_num_ablations=1, cmp_dropout=0.1))
    with pytest.raises(ValueError, match=r"makes no dropout call.*lora_dropout.*--cmp_num_crops"):
        gradients(trainer, tiny.batch())


def test_the_message_shows_the_settings_of_nested_configurations(tmp_path):
    model = AVAILABLE["llava"].build(**AVAILABLE["llava"].rates_at_zero)
    trainer = CmpTrainer(model, training_arguments(tmp_path, cmp_num_ablations=1))
    with pytest.raises(ValueError, match=r"text_config\.attention_dropout=0\.0"):
        gradients(trainer, AVAILABLE["llava"].batch())


@pytest.mark.parametrize("part", ["text_config", "vision_config"])
@pytest.mark.parametrize("implementation", ["flash_attention_2", "flash_attention_3", "flex_attention"])
def test_attention_out_of_reach_is_refused_by_name_also_in_a_part_of_a_model(part, implementation, tmp_path):
    model = AVAILABLE["llava"].build()
    getattr(model.config, part)._attn_implementation_internal = implementation
    with pytest.raises(ValueError, match=f'attn_implementation=\'{implementation}\'.*"sdpa" or "eager"'):
        CmpTrainer(model, training_arguments(tmp_path, cmp_num_ablations=1))


def test_a_model_loaded_with_flex_attention_is_refused(tmp_path):
    model = AVAILABLE["llama"].build("flex_attention")
    with pytest.raises(ValueError, match=r"Llama.* uses attn_implementation='flex_attention'"):
        CmpTrainer(model, training_arguments(tmp_path, cmp_num_ablations=1))
