"""TRL's trainers: training with the full model's loss alone is plain training, and a comparison leaves no trace."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import GPT2Config, GPT2ForSequenceClassification, GPT2LMHeadModel

from cmp_trainer import CmpTrainingArguments, RegularizedLoss
from tests.recipes.recipe import (
    COMPARED,
    ORDERS,
    Recipe,
    assert_a_curve_leaves_no_traces,
    assert_evaluation_leaves_no_traces,
    assert_every_variant_is_logged,
    assert_only_the_full_variant_leaves_traces,
    assert_orders_of_bases_are_equal,
    assert_same_metrics,
    assert_saved_models_load,
    assert_trains_as_without_dropout,
    combined,
    largest_difference,
    step_logs,
    text_tokenizer,
    texts,
    train,
    weights,
)

trl = pytest.importorskip("trl", reason="the recipes of TRL need `pip install trl`")
peft = pytest.importorskip("peft", reason="the recipes of TRL need `pip install peft`")

ROWS = 24


def tiny_gpt2(kind: Any, dropout: float, seed: int = 0, **changes: Any) -> Any:
    torch.manual_seed(seed)
    rates = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop", "summary_first_dropout"), dropout)
    tokens = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3}
    size = {"vocab_size": 40, "n_positions": 64, "n_embd": 16, "n_layer": 2, "n_head": 2}
    return kind(GPT2Config(**size, **tokens, **rates, **changes))


def lora(dropout: float) -> Any:
    return peft.LoraConfig(r=4, lora_dropout=dropout, target_modules=["c_attn"], fan_in_fan_out=True)


def sft(dropout: float, _) -> dict[str, Any]:
    data = Dataset.from_dict({"text": texts(ROWS, 1)})
    model = tiny_gpt2(GPT2LMHeadModel, dropout)
    return {"model": model, "train_dataset": data, "processing_class": text_tokenizer()}


def reward(dropout: float, _) -> dict[str, Any]:
    data = Dataset.from_dict({"chosen": texts(ROWS, 1), "rejected": texts(ROWS, 2)})
    model = tiny_gpt2(GPT2ForSequenceClassification, dropout, num_labels=1)
    return {"model": model, "train_dataset": data, "processing_class": text_tokenizer()}


def dpo(dropout: float, _) -> dict[str, Any]:
    names = ("prompt", "chosen", "rejected")
    data = Dataset.from_dict({name: texts(ROWS, seed) for seed, name in enumerate(names)})
    model, reference = (tiny_gpt2(GPT2LMHeadModel, dropout, seed) for seed in (0, 1))
    parts = {"model": model, "ref_model": reference.eval(), "processing_class": text_tokenizer()}
    return {**parts, "train_dataset": data}


def with_lora(parts: Any) -> Any:
    def make(dropout: float, folder: Any) -> dict[str, Any]:
        return {**parts(dropout, folder), "peft_config": lora(dropout)}

    return make


def dpo_of_an_adapter(dropout: float, folder: Any) -> dict[str, Any]:
    """The reference is the model itself with the adapter switched off, in train mode."""
    return {**dpo(dropout, folder), "ref_model": None, "peft_config": lora(dropout)}


SFT = (trl.SFTTrainer, trl.SFTConfig)
REWARD = (trl.RewardTrainer, trl.RewardConfig)
DPO = (trl.DPOTrainer, trl.DPOConfig)
KEPT = {"disable_dropout": False}  # TRL switches dropout off for rewards and preferences; then nothing is ablated
RECIPES = {
    "sft": Recipe(*SFT, sft),
    "sft-lora": Recipe(*SFT, with_lora(sft), {"learning_rate": 1.0}),
    "sft-dft": Recipe(*SFT, sft, {"loss_type": "dft", "learning_rate": 1.0}),
    "sft-label-smoothing": Recipe(*SFT, sft, {"label_smoothing_factor": 0.1}),
    "reward": Recipe(*REWARD, reward, KEPT),
    "reward-centred": Recipe(*REWARD, reward, {**KEPT, "center_rewards_coefficient": 0.1}),
    "dpo": Recipe(*DPO, dpo, {**KEPT, "learning_rate": 1.0}),
    "dpo-lora": Recipe(*DPO, dpo_of_an_adapter, {**KEPT, "learning_rate": 10.0}),
}
each_recipe = pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
TRAINERS = ("sft", "reward", "dpo")
each_trainer = pytest.mark.parametrize("recipe", [RECIPES[name] for name in TRAINERS], ids=TRAINERS)
each_order = pytest.mark.parametrize("plugin_first", ORDERS.values(), ids=ORDERS)


@each_order
@each_recipe
def test_the_full_loss_alone_trains_as_without_dropout(recipe, plugin_first, tmp_path):
    assert_trains_as_without_dropout(recipe, tmp_path, plugin_first)


@each_recipe
def test_gradient_accumulation_keeps_the_scale_of_the_loss(recipe, tmp_path):
    assert_trains_as_without_dropout(recipe, tmp_path, plugin_first=False, gradient_accumulation_steps=2)


@each_recipe
def test_the_gradient_checkpointing_of_trl_is_exact(recipe, tmp_path):
    assert_trains_as_without_dropout(recipe, tmp_path, plugin_first=False, gradient_checkpointing=True)


@each_recipe
def test_checkpointed_gradients_of_a_comparison_are_exact(recipe, tmp_path):
    direct, checkpointed = (
        recipe.compared(tmp_path / str(on), **COMPARED, gradient_checkpointing=on) for on in (False, True)
    )
    train(direct, checkpointed)
    assert largest_difference(weights(direct), weights(checkpointed)) < 1e-5


@each_recipe
def test_a_comparison_logs_the_loss_of_every_variant(recipe, tmp_path):
    assert_every_variant_is_logged(recipe, tmp_path)


@each_recipe
def test_only_the_full_variant_leaves_traces(recipe, tmp_path):
    assert_only_the_full_variant_leaves_traces(recipe, tmp_path)


@each_recipe
def test_the_logged_loss_of_the_full_model_is_its_mean_over_what_is_predicted(recipe, tmp_path):
    plain, ours = recipe.plain(tmp_path), recipe.compared(tmp_path, **COMPARED)
    train(plain, ours)
    expected, logged = step_logs(plain)[0], step_logs(ours)[0]
    tokens, rows = expected["num_tokens"], plain.args.train_batch_size
    scale = tokens / (tokens - rows) if recipe.trainer is trl.SFTTrainer else 1.0  # it divides by first tokens too
    assert logged["loss_full"] == pytest.approx(expected["loss"] * scale, abs=1e-4)


@each_recipe
def test_both_orders_of_bases_train_the_same_weights(recipe, tmp_path):
    assert_orders_of_bases_are_equal(recipe, tmp_path)


@each_order
@each_trainer
def test_evaluation_reports_what_the_plain_trainer_reports(recipe, plugin_first, tmp_path):
    plain, ours = recipe.plain(tmp_path), recipe.compared(tmp_path, plugin_first, **COMPARED)
    assert_same_metrics(ours.evaluate(ours.train_dataset), plain.evaluate(plain.train_dataset))


@each_trainer
def test_losses_of_variants_in_evaluation_leave_no_traces(recipe, tmp_path):
    assert_evaluation_leaves_no_traces(recipe, tmp_path)


@each_trainer
def test_a_curve_leaves_no_traces(recipe, tmp_path):
    assert_a_curve_leaves_no_traces(recipe, tmp_path)


@each_order
@pytest.mark.parametrize(
    ("name", "kind"), [("sft", GPT2LMHeadModel), ("reward", GPT2ForSequenceClassification), ("dpo", GPT2LMHeadModel)]
)
def test_checkpoints_are_ordinary_models(name, kind, plugin_first, tmp_path):
    assert_saved_models_load(RECIPES[name], tmp_path, plugin_first, kind.from_pretrained)


@each_order
def test_an_objective_can_be_passed_where_the_plugin_comes_first(plugin_first, tmp_path):
    def parts(dropout: float, folder: Any) -> dict[str, Any]:
        return {**sft(dropout, folder), "objective": RegularizedLoss(primary="full", weight=0)}

    recipe = Recipe(*SFT, parts)
    if plugin_first:
        train(recipe.compared(tmp_path, plugin_first, **COMPARED))
        return
    with pytest.raises(TypeError, match="objective"):  # TRL's constructors take no other keywords
        recipe.compared(tmp_path, plugin_first, **COMPARED)


@pytest.mark.parametrize("name", ["reward", "dpo"])
def test_dropout_switched_off_by_trl_is_an_error_that_names_the_setting(name, tmp_path):
    with pytest.raises(ValueError, match=r"disable_dropout of Cmp.*Config sets every dropout rate"):
        RECIPES[name].compared(tmp_path, **COMPARED, disable_dropout=True)  # the default of both


@pytest.mark.parametrize("name", ["reward", "dpo"])
def test_cmp_dropout_gives_rates_where_trl_switched_dropout_off(name, tmp_path):
    train(RECIPES[name].compared(tmp_path, **COMPARED, disable_dropout=True, cmp_dropout=0.1))


each_config = pytest.mark.parametrize("config", [trl.SFTConfig, trl.RewardConfig, trl.DPOConfig])
CHANGED_DEFAULTS = ("learning_rate", "logging_steps", "bf16", "gradient_checkpointing")


def values(args: Any) -> list[Any]:
    return [getattr(args, name) for name in CHANGED_DEFAULTS]


@each_config
def test_combined_arguments_keep_the_defaults_of_trl(config, tmp_path):
    args = combined(config)(output_dir=str(tmp_path), use_cpu=True, report_to=[], **COMPARED)
    plain = config(output_dir=str(tmp_path), use_cpu=True, report_to=[])
    assert args.cmp_num_ablations == 2
    assert values(args) == values(plain)


@each_config
def test_combined_arguments_are_checked_at_parsing(config, tmp_path):
    with pytest.raises(ValueError, match="cmp_num_crops"):
        combined(config)(output_dir=str(tmp_path), use_cpu=True, report_to=[], **COMPARED, cmp_num_crops=3)


@pytest.mark.xfail(strict=True, reason="dataclasses take every default of TrainingArguments from the first base")
@each_config
def test_arguments_with_the_plugin_first_keep_the_defaults_of_trl_too(config, tmp_path):
    args = dataclass(type("Args", (CmpTrainingArguments, config), {}))(output_dir=str(tmp_path), use_cpu=True)
    plain = config(output_dir=str(tmp_path), use_cpu=True, report_to=[])
    assert values(args) == values(plain)
