"""Every way the Trainer trains is open to CmpTrainer: the gradients or weights are those of the plain way."""

import logging
import os
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from torch import nn
from torch.utils import checkpoint
from transformers import (
    EarlyStoppingCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from cmp_trainer import CmpDrop, CmpTrainer
from cmp_trainer.checks import first_batch
from cmp_trainer.execution.ablated import Ablated
from cmp_trainer.losses.comparative import comparative_loss
from tests.helpers import batch_of, cmp_trainer, free_port, gradients, same_weights, tiny_bert, token_data
from tests.scripts import train_distributed as distributed

NEW_NAMES = hasattr(TrainingArguments, "train_sampling_strategy")  # transformers 5

# The full model's loss alone, so that training has to be that of a model without dropout under the plain Trainer.
FULL_ONLY = {"cmp_num_ablations": 2, "cmp_objective": "regularized", "cmp_primary": "full", "cmp_weight": 0.0}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


class Recorder(TrainerCallback):
    """Keeps the gradients of every optimizer step."""

    def __init__(self):
        self.steps = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.steps.append(gradients(model))


def recorded(output_dir, model=None, **changes):
    """Gradients of three steps of comparative loss with two ablations."""
    recorder = Recorder()
    changes = {"max_steps": 3, "cmp_num_ablations": 2, **changes}
    trainer = cmp_trainer(output_dir, model, callbacks=[recorder], **changes)
    trainer.train()
    return recorder.steps


def assert_equals_plain_trainer(output_dir, **changes):
    """The full model's loss alone trains as Trainer trains the model without dropout."""
    steps = {"max_steps": 6, **changes}
    ours = cmp_trainer(output_dir, tiny_bert(), **FULL_ONLY, **steps)  # a trainer sets the seed when it is made
    ours.train()
    plain = cmp_trainer(output_dir, tiny_bert(**NO_DROPOUT), kind=Trainer, **steps)
    plain.train()
    torch.testing.assert_close(dict(ours.model.named_parameters()), dict(plain.model.named_parameters()))


# Gradient checkpointing


def test_gradient_checkpointing_gives_the_same_gradients_to_the_bit(tmp_path):
    settings = {"gradient_checkpointing_kwargs": {"use_reentrant": False}}
    checkpointed = recorded(tmp_path, gradient_checkpointing=True, **settings)
    assert len(checkpointed) == 3
    for ours, plain in zip(checkpointed, recorded(tmp_path), strict=True):
        torch.testing.assert_close(ours, plain, rtol=0, atol=0)


def test_reentrant_checkpointing_gives_the_same_gradients(tmp_path):
    settings = {"use_reentrant": True}
    checkpointed = recorded(tmp_path, gradient_checkpointing=True, gradient_checkpointing_kwargs=settings)
    # Not to the bit: the gradients of the variants are added up in another order.
    torch.testing.assert_close(checkpointed, recorded(tmp_path), rtol=1e-4, atol=1e-7)


@pytest.mark.skipif(not NEW_NAMES, reason="transformers 5 renamed gradient checkpointing")
def test_activation_checkpointing_of_every_other_layer_gives_the_same_gradients(tmp_path):
    settings = {"every_n_layers": 2, "use_reentrant": False}
    checkpointed = recorded(tmp_path, activation_checkpointing=True, activation_checkpointing_kwargs=settings)
    torch.testing.assert_close(checkpointed, recorded(tmp_path), rtol=0, atol=0)


class Stop(Exception):
    """Stops a training from within."""


class StopAtOnce(TrainerCallback):
    def on_step_end(self, *args, **kwargs):
        raise Stop


@pytest.mark.parametrize("fails", [False, True], ids=["training ends", "training raises"])
def test_gradient_checkpointing_leaves_the_model_as_trainer_does(fails, tmp_path):
    callbacks = [StopAtOnce()] if fails else []
    trainer = cmp_trainer(tmp_path, max_steps=1, cmp_num_ablations=1, gradient_checkpointing=True, callbacks=callbacks)
    with pytest.raises(Stop) if fails else nullcontext():
        trainer.train()
    functions = [module._gradient_checkpointing_func for module in trainer.model.bert.encoder.layer]
    assert all("context_fn" not in function.keywords for function in functions)
    assert checkpoint._checkpoint_without_reentrant_generator.__module__ == checkpoint.__name__


# Low memory


@pytest.mark.parametrize(
    "settings",
    [
        {"gradient_checkpointing": True},
        {"bf16": True},
        {"bf16": True, "gradient_checkpointing": True, "gradient_accumulation_steps": 2},
        {"bf16": True, "gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
    ],
    ids=str,
)
def test_low_memory_gives_the_same_gradients_also_with_what_else_saves_memory(settings, tmp_path):
    tolerance = 5e-2 if "bf16" in settings else 1e-6
    low_memory = recorded(tmp_path, cmp_low_memory=True, **settings)
    for ours, plain in zip(low_memory, recorded(tmp_path, **settings), strict=True):
        ours, plain = (torch.cat([gradient.flatten() for gradient in g.values()]) for g in (ours, plain))
        assert (ours - plain).norm() < tolerance * plain.norm()


# Numbers of 16 bit


def autocast_step(dtype, output_dir):
    """Gradients of one step, from one random state, under autocast to `dtype`."""
    trainer = cmp_trainer(output_dir, tiny_bert(), cmp_num_ablations=2)
    batch = batch_of(token_data())
    torch.manual_seed(5)
    with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
        loss = trainer.compute_loss(trainer.model.train(), dict(batch))
    loss.backward()
    assert loss.dtype == torch.float32
    return torch.cat([gradient.flatten() for gradient in gradients(trainer.model).values()])


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.05), (torch.float16, 0.01)], ids=str)
def test_autocast_gives_the_same_gradients_to_the_precision_of_its_type(dtype, tolerance, tmp_path):
    exact, ours = autocast_step(torch.float32, tmp_path), autocast_step(dtype, tmp_path)
    assert (ours - exact).norm() < tolerance * exact.norm()


def test_bf16_training_equals_float32_training_to_its_precision(tmp_path):
    for ours, exact in zip(recorded(tmp_path, bf16=True), recorded(tmp_path), strict=True):
        ours, exact = (torch.cat([gradient.flatten() for gradient in g.values()]) for g in (ours, exact))
        assert (ours - exact).norm() < 0.1 * exact.norm()


# torch.compile


def test_compiled_training_equals_eager_training_without_a_graph_break_of_ours(tmp_path):
    eager = recorded(tmp_path, tiny_bert(num_hidden_layers=1))
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    model = tiny_bert(num_hidden_layers=1)
    compiled = recorded(tmp_path, model, torch_compile=True, torch_compile_backend="aot_eager")
    assert not counters["graph_break"], dict(counters["graph_break"])
    assert counters["stats"]["unique_graphs"] == 3  # one for the full model and for each ablation
    assert model.base_model._compiled_call_impl is None
    torch.testing.assert_close(compiled, eager, rtol=1e-4, atol=1e-6)


def test_a_backend_that_would_run_dropout_calls_under_cmp_drop_again_is_refused(tmp_path):
    """At two drops a rate of 0.1 became 0.19 when the graph was captured, and 0.34 when it was run."""
    with pytest.raises(ValueError, match="torch_compile_backend eager"):
        cmp_trainer(tmp_path, cmp_num_ablations=2, torch_compile=True, torch_compile_backend="eager")


# PEFT


def lora_bert(base_dropout, lora_dropout):
    from peft import LoraConfig, get_peft_model

    model = tiny_bert(hidden_dropout_prob=base_dropout, attention_probs_dropout_prob=base_dropout)
    config = LoraConfig(task_type="SEQ_CLS", r=2, lora_dropout=lora_dropout, target_modules=["query", "value"])
    torch.manual_seed(1)
    model = get_peft_model(model, config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # zero at first, which would hide the dropout
            nn.init.normal_(parameter.data)
    return model


def by_hand(model, batch, num_ablations):
    """Comparative loss with the drops entered by hand, and its gradients."""
    state, losses = torch.get_rng_state(), []
    labels = batch["labels"]
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    for drops in range(1 + num_ablations):
        torch.set_rng_state(state)
        with Ablated([CmpDrop()], [drops]):
            losses.append(nn.functional.cross_entropy(model(**inputs).logits, labels, reduction="none"))
    model.zero_grad()
    loss = comparative_loss(torch.stack(losses, 1)).mean()
    loss.backward()
    return loss, gradients(model)


@pytest.mark.parametrize("base_dropout", [0.0, 0.1])
def test_the_dropout_of_lora_is_a_site_and_its_gradients_are_those_by_hand(base_dropout, tmp_path):
    model = lora_bert(base_dropout, lora_dropout=0.2)
    trainer = cmp_trainer(tmp_path, model, cmp_num_ablations=2)
    batch = batch_of(token_data())
    torch.manual_seed(5)
    model.train()
    loss = trainer.compute_loss(model, dict(batch))
    model.zero_grad()
    loss.backward()
    ours = gradients(model)
    torch.manual_seed(5)
    expected_loss, expected = by_hand(model, batch, num_ablations=2)
    torch.testing.assert_close(loss, expected_loss)
    torch.testing.assert_close(ours, expected)
    assert all("lora" in name or "classifier" in name for name in ours)


def test_lora_trains_its_own_weights_only(tmp_path):
    model = lora_bert(0.1, 0.1)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    cmp_trainer(tmp_path, model, cmp_num_ablations=1, max_steps=2).train()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) != parameter.requires_grad, name


class Int8Linear(nn.Module):
    """A frozen linear layer whose weights are bytes and a scale, as in a quantized model."""

    def __init__(self, linear):
        super().__init__()
        scale = linear.weight.detach().abs().amax(1, keepdim=True) / 127
        self.register_buffer("bytes", (linear.weight.detach() / scale).round().to(torch.int8))
        self.register_buffer("scale", scale)
        self.register_buffer("bias", linear.bias.detach())

    def forward(self, inputs):
        return nn.functional.linear(inputs, self.bytes * self.scale, self.bias)


def test_quantized_weights_are_not_touched_and_what_is_trained_has_the_gradients_by_hand(tmp_path):
    model = tiny_bert()
    for layer in model.bert.encoder.layer:
        for part, name in [(layer.intermediate, "dense"), (layer.output, "dense"), (layer.attention.self, "value")]:
            setattr(part, name, Int8Linear(getattr(part, name)))
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    trainer = cmp_trainer(tmp_path, model, cmp_num_ablations=2)
    batch = batch_of(token_data())
    torch.manual_seed(5)
    trainer.compute_loss(model.train(), dict(batch)).backward()
    ours = gradients(model)
    torch.manual_seed(5)
    torch.testing.assert_close(ours, by_hand(model, batch, num_ablations=2)[1])
    trainer.train()
    after = dict(model.named_buffers())
    assert all(
        torch.equal(after[name], buffer) and after[name].dtype == buffer.dtype for name, buffer in before.items()
    )


# Data


def test_dataloader_workers_change_nothing(tmp_path):
    workers = recorded(tmp_path, dataloader_num_workers=2)
    torch.testing.assert_close(workers, recorded(tmp_path), rtol=0, atol=0)


def test_an_iterable_dataset_trains_as_under_trainer(tmp_path):
    assert_equals_plain_trainer(tmp_path, data=token_data().to_iterable_dataset())


def lengths_data():
    """Examples of 3 to 10 tokens."""
    rows = token_data(rows=32, length=10).to_list()
    for index, row in enumerate(rows):
        row.update({name: row[name][: 3 + index % 8] for name in ("input_ids", "attention_mask")})
    return Dataset.from_list(rows)


def pad(rows):
    """Tokens to the longest of the batch."""
    longest = max(len(row["input_ids"]) for row in rows)
    padded = {
        name: torch.tensor([row[name] + [0] * (longest - len(row[name])) for row in rows])
        for name in ("input_ids", "attention_mask")
    }
    return {**padded, "labels": torch.tensor([row["labels"] for row in rows])}


def test_group_by_length_trains_as_under_trainer(tmp_path):
    by_length = {"train_sampling_strategy": "group_by_length"} if NEW_NAMES else {"group_by_length": True}
    assert_equals_plain_trainer(tmp_path, data=lengths_data(), data_collator=pad, **by_length)


@pytest.mark.parametrize("settings", [{}, {"gradient_checkpointing": True}], ids=str)
def test_auto_find_batch_size_ends_where_the_smaller_batch_starts(settings, tmp_path):
    class SmallMemory(CmpTrainer):
        def compute_loss(self, model, inputs, *args, **kwargs):
            if len(inputs["labels"]) > 4:
                raise RuntimeError("CUDA out of memory.")
            return super().compute_loss(model, inputs, *args, **kwargs)

    def train(kind, batch_size, **changes):
        changes.update(per_device_train_batch_size=batch_size, max_steps=2, **settings)
        data = Dataset.from_list([token_data()[0]] * 32)  # equal rows: their order is no matter
        trainer = cmp_trainer(tmp_path, tiny_bert(), data, kind, **FULL_ONLY, **changes)
        trainer.train()
        return trainer

    found = train(SmallMemory, 5, auto_find_batch_size=True)
    assert found._train_batch_size <= 4
    assert same_weights(found.model, train(CmpTrainer, found._train_batch_size).model)
    for layer in found.model.bert.encoder.layer if settings else []:
        assert "context_fn" not in layer._gradient_checkpointing_func.keywords


# What follows evaluation


def test_the_best_model_by_the_loss_of_an_ablation_is_loaded_at_the_end(tmp_path):
    trainer = cmp_trainer(
        tmp_path,
        cmp_num_ablations=1,
        cmp_eval_ablations=True,
        learning_rate=0.05,
        eval_strategy="steps",
        eval_steps=2,
        save_strategy="steps",
        save_steps=2,
        load_best_model_at_end=True,
        metric_for_best_model="loss_ablated_1",
        greater_is_better=False,
    )
    trainer.train()
    seen = [log["eval_loss_ablated_1"] for log in trainer.state.log_history if "eval_loss_ablated_1" in log]
    assert len(seen) == 3
    assert trainer.state.best_metric == min(seen)
    assert trainer.evaluate()["eval_loss_ablated_1"] == pytest.approx(min(seen))


def test_early_stopping_follows_the_violation_rate(tmp_path):
    trainer = cmp_trainer(
        tmp_path,
        cmp_num_ablations=1,
        cmp_eval_ablations=True,
        learning_rate=0.0,
        max_steps=20,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="violation_rate",
        greater_is_better=False,
        callbacks=[EarlyStoppingCallback(early_stopping_patience=2)],
    )
    trainer.train()
    assert trainer.state.global_step == 3  # nothing changes after the first evaluation


# Hyperparameter search


def test_hyperparameter_search_tries_arguments_of_comparative_loss(tmp_path, caplog):
    def space(trial):
        return {
            "cmp_num_ablations": trial.suggest_int("cmp_num_ablations", 1, 2),
            "cmp_baseline": trial.suggest_categorical("cmp_baseline", ["zero", "first"]),
            "cmp_dropout": trial.suggest_float("cmp_dropout", 0.1, 0.3),
        }

    trainer = cmp_trainer(tmp_path, model_init=lambda: tiny_bert(), max_steps=2, eval_strategy="epoch")
    with caplog.at_level(logging.WARNING):
        best = trainer.hyperparameter_search(space, n_trials=2, backend="optuna", direction="minimize")
    assert set(best.hyperparameters) == {"cmp_num_ablations", "cmp_baseline", "cmp_dropout"}
    assert "comparative loss is off" not in caplog.text
    assert trainer.num_ablations in (1, 2)
    logs = [log for log in trainer.state.log_history if "loss" in log]
    assert logs and all(f"loss_ablated_{trainer.num_ablations}" in log for log in logs)


def test_a_search_into_a_bad_combination_is_refused(tmp_path):
    trainer = cmp_trainer(tmp_path, model_init=lambda: tiny_bert(), max_steps=1)
    with pytest.raises(ValueError, match=r"--cmp_temperature -1\.0 must be"):
        trainer.hyperparameter_search(
            lambda _: {"cmp_num_ablations": 1, "cmp_temperature": -1.0}, n_trials=1, backend="optuna"
        )


def test_a_search_into_ablations_checks_the_setting(tmp_path):
    trainer = cmp_trainer(
        tmp_path,
        model_init=lambda: tiny_bert(),
        max_steps=1,
        torch_compile=True,
        torch_compile_backend="eager",
    )
    with pytest.raises(ValueError, match="torch_compile_backend eager"):
        trainer.hyperparameter_search(lambda trial: {"cmp_num_ablations": 1}, n_trials=1, backend="optuna")


# NEFTune


def test_neftune_adds_one_noise_to_all_variants(tmp_path):
    """Without drops the variants are alike then, and the first step is that of Trainer."""
    settings = {"neftune_noise_alpha": 5.0, "max_steps": 1}
    noisy = recorded(tmp_path, tiny_bert(), **{**FULL_ONLY, **settings})
    recorder = Recorder()
    trainer = cmp_trainer(tmp_path, tiny_bert(**NO_DROPOUT), kind=Trainer, callbacks=[recorder], **settings)
    trainer.train()
    torch.testing.assert_close(noisy, recorder.steps)

    seen = []
    model = tiny_bert()
    model.bert.embeddings.LayerNorm.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].detach()))
    cmp_trainer(tmp_path, model, cmp_num_ablations=2, **settings).train()
    assert torch.equal(seen[-1], seen[-2]) and torch.equal(seen[-1], seen[-3])


# Subclasses


@pytest.mark.parametrize("plugin_first", [True, False])
def test_a_trainer_of_ones_own_is_compared_in_either_order_of_bases(plugin_first, tmp_path):
    class Post(Trainer):
        """Overrides what QuestionAnsweringTrainer-like subclasses override."""

        def evaluate(self, *args, **kwargs):
            metrics = super().evaluate(*args, **kwargs)
            return {**metrics, "eval_post": 1.0}

        def training_step(self, *args, **kwargs):
            self.steps_seen = getattr(self, "steps_seen", 0) + 1
            return super().training_step(*args, **kwargs)

    bases = (CmpTrainer, Post) if plugin_first else (Post, CmpTrainer)
    trainer = cmp_trainer(
        tmp_path, kind=type("CmpPost", bases, {}), cmp_num_ablations=1, cmp_eval_ablations=True, max_steps=2
    )
    trainer.train()
    assert trainer.steps_seen == 2
    assert {"eval_post", "eval_loss_ablated_1"} <= trainer.evaluate().keys()
    assert "loss_ablated_1" in trainer.state.log_history[0]


class ByItself(Trainer):
    """Computes its loss by itself, collects metrics and logs."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.collected, self.seen = {"losses": []}, 0

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])
        losses = nn.functional.cross_entropy(outputs.logits, inputs["labels"], reduction="none")
        loss = ((1 - (-losses).exp()) ** 2 * losses).mean()  # focal loss
        self.collected["losses"].append(loss.item())
        self.seen += len(inputs["labels"])
        self.log({"loss": loss.item(), "focal": 1.0})
        return (loss, outputs) if return_outputs else loss


@pytest.mark.parametrize("plugin_first", [True, False])
def test_a_loss_computed_by_hand_is_compared_and_leaves_the_traces_of_one_run(plugin_first, tmp_path):
    bases = (CmpTrainer, ByItself) if plugin_first else (ByItself, CmpTrainer)
    ours = cmp_trainer(tmp_path, tiny_bert(), kind=type("CmpByItself", bases, {}), max_steps=3, **FULL_ONLY)
    plain = cmp_trainer(tmp_path, tiny_bert(**NO_DROPOUT), kind=ByItself, max_steps=3)
    for trainer in (ours, plain):
        trainer.train()
    torch.testing.assert_close(dict(ours.model.named_parameters()), dict(plain.model.named_parameters()))
    assert ours.collected["losses"] == pytest.approx(plain.collected["losses"], rel=1e-5)
    assert ours.seen == plain.seen
    added = {"loss_full", "loss_ablated_1", "loss_ablated_2", "violation_rate"}
    for our_log, plain_log in zip(ours.state.log_history, plain.state.log_history, strict=True):
        assert our_log.keys() - added == plain_log.keys()
        assert ("focal" in our_log) != (added <= our_log.keys()) or "train_runtime" in our_log


@pytest.mark.parametrize("plugin_first", [True, False])
def test_a_training_step_that_never_asks_for_the_loss_is_an_error_at_that_step(plugin_first, tmp_path):
    class OwnStep(Trainer):
        def training_step(self, model, inputs, num_items_in_batch=None):
            loss = model(**inputs).loss
            loss.backward()
            return loss.detach()

    bases = (CmpTrainer, OwnStep) if plugin_first else (OwnStep, CmpTrainer)
    trainer = cmp_trainer(tmp_path, kind=type("CmpOwnStep", bases, {}), cmp_num_ablations=1, max_steps=2)
    with pytest.raises(ValueError, match=r"CmpOwnStep\.training_step computed its loss without a comparison"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_a_training_step_of_ones_own_that_asks_for_the_loss_is_compared(tmp_path):
    class OwnStep(CmpTrainer):
        def training_step(self, model, inputs, num_items_in_batch=None):
            loss = self.compute_loss(model.train(), inputs)
            loss.backward()
            return loss.detach()

    trainer = cmp_trainer(tmp_path, kind=OwnStep, cmp_num_ablations=1, max_steps=2)
    trainer.train()
    assert trainer.num_comparisons == 2


def test_a_plain_trainer_with_ablations_in_its_arguments_is_an_error(tmp_path):
    trainer = cmp_trainer(tmp_path, kind=Trainer, cmp_num_ablations=2)
    with pytest.raises(ValueError, match="use CmpTrainer in place of Trainer"):
        trainer.train()
    assert trainer.state.global_step == 0


# Several processes

SCRIPT = Path(distributed.__file__)


KINDS = dict.fromkeys((*distributed.SETTINGS, *distributed.TOP_LAYER, *distributed.SKIPS), "DistributedDataParallel")
if NEW_NAMES:
    sharded = (*distributed.SHARDED, *distributed.TOP_LAYER_SHARDED, *distributed.SKIPS_SHARDED)
    KINDS.update(dict.fromkeys(sharded, "FSDPBertForTokenClassification"))


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    """What each of two processes saved; accelerate launches them, and they talk through gloo."""
    folder = tmp_path_factory.mktemp("two")
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes=2"]
    done = subprocess.run(
        [*launcher, f"--main_process_port={free_port()}", str(SCRIPT), str(folder), *KINDS, *distributed.FULL_ALONE],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [torch.load(folder / f"rank_{rank}.pt") for rank in range(2)]


def in_one_process(folder, **settings):
    """The same batches accumulated in one process. Two processes fill up the short batch from the first rows."""
    rows = distributed.tokens(distributed.ROWS).to_list()
    data = Dataset.from_list(rows + rows[: -len(rows) % (2 * distributed.BATCH)])
    return distributed.train(str(folder), data, accumulate=2, cmp_forward="sequential", **settings)


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    return in_one_process(tmp_path_factory.mktemp("one"))


@pytest.fixture(scope="module")
def one_process_of_separate_forwards(tmp_path_factory):
    """The top layer ablated, with the lower one run for each variant."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(first_batch, "shares_lower", lambda *args: False)
        return in_one_process(tmp_path_factory.mktemp("separate"), cmp_ablated_layers=1)


@pytest.fixture(scope="module")
def one_process_that_skips(tmp_path_factory):
    """The top layer skipped in the last variant, with nothing shared."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(first_batch, "shares_lower", lambda *args: False)
        return in_one_process(tmp_path_factory.mktemp("skips"), **distributed.SKIP)


@pytest.mark.xdist_group("two processes")
@pytest.mark.parametrize("setting", KINDS)
def test_two_processes_train_as_one_process_with_two_batches(
    setting, two_processes, one_process, one_process_of_separate_forwards, one_process_that_skips
):
    top = "top layer" in setting or "skips" in setting
    expected = one_process_of_separate_forwards if top else one_process
    expected = one_process_that_skips if "skips" in setting else expected
    assert not expected["shares"]
    for result in two_processes:
        assert result[setting]["kind"] == KINDS[setting]
        assert result[setting]["shares"] == top
        torch.testing.assert_close(result[setting]["weights"], expected["weights"])
        for name in ("eval_whole_loss_full", "eval_whole_loss_ablated_2"):
            assert not top or result[setting]["metrics"][name] == pytest.approx(expected["metrics"][name])


def test_ablating_the_top_layer_alone_trains_other_weights(one_process, one_process_of_separate_forwards):
    ours, theirs = one_process_of_separate_forwards["weights"], one_process["weights"]
    assert any(not torch.allclose(ours[name], theirs[name], atol=1e-4) for name in ours)


@pytest.mark.xdist_group("two processes")
def test_the_full_loss_alone_trains_in_two_processes_as_without_the_plugin(two_processes):
    for result in two_processes:
        ours, plain = (result[name]["weights"] for name in ("full alone", "without the plugin"))
        torch.testing.assert_close(ours, plain)
        assert not all(torch.equal(ours[name], weight) for name, weight in distributed.tiny_model().named_parameters())


@pytest.mark.xdist_group("two processes")
def test_reentrant_checkpointing_in_two_processes_is_refused_on_the_first_batch(two_processes):
    for result in two_processes:
        assert "--gradient_checkpointing_kwargs '{\"use_reentrant\": false}'" in result["reentrant checkpointing"]


@pytest.mark.xdist_group("two processes")
def test_logs_of_two_processes_are_means_over_both(two_processes, one_process):
    for ours, expected in zip(two_processes[0]["sequential"]["logs"], one_process["logs"], strict=True):
        assert {"loss", "loss_full", "loss_ablated_1", "loss_ablated_2"} <= ours.keys()
        assert ours == pytest.approx(expected)


@pytest.mark.xdist_group("two processes")
@pytest.mark.parametrize(
    "name", ["whole_loss_full", "whole_loss_ablated_2", "whole_violation_rate", "short_loss_full"]
)
def test_evaluation_in_two_processes_counts_every_example_once(name, two_processes, one_process):
    for result in two_processes:
        assert result["sequential"]["metrics"][f"eval_{name}"] == pytest.approx(one_process["metrics"][f"eval_{name}"])
