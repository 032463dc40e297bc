"""What is compared is the loss that a model or a trainer really has: each case was met in a script of somebody's."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import (
    BartConfig,
    BartForCausalLM,
    BertConfig,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertLMHeadModel,
    BertModel,
    EncoderDecoderModel,
    GPT2Config,
    GPT2LMHeadModel,
    ModernBertConfig,
    ModernBertForMaskedLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from cmp_trainer import CmpDrop, CmpTrainer, ComparativeLoss, ComparativeStep, RegularizedLoss, plan
from cmp_trainer.execution.ablated import Ablated
from tests.helpers import SMALL, batch_of, cmp_trainer, gradients, tiny_bert, token_data, training_arguments

FULL_ALONE = RegularizedLoss(primary="full", weight=0.0)
FULL_ALONE_ARGUMENTS = {"cmp_objective": "regularized", "cmp_primary": "full", "cmp_weight": 0.0}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
GPT2 = {"vocab_size": 40, "n_embd": 16, "n_layer": 2, "n_head": 2, "bos_token_id": 1, "eos_token_id": 2}
BART = {"vocab_size": 40, "d_model": 16, "decoder_layers": 2, "decoder_attention_heads": 2, "decoder_ffn_dim": 24}


def assert_trains_on_its_own_loss(model, batch):
    """The full model's loss alone is the model's own without dropout, with its gradients; and a comparison runs."""
    model.train()
    with Ablated([CmpDrop()], [0]):
        expected = own_loss(model(**batch) if isinstance(batch, dict) else model(*batch))
    expected.backward()
    expected_gradients = gradients(model)
    model.zero_grad()
    found = ComparativeStep(model, [CmpDrop(base_rate=0.1)] * 2, FULL_ALONE)(batch)
    found.backward()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, expected_gradients[name], rtol=1e-4, atol=1e-6)
    step = ComparativeStep(model, [CmpDrop(base_rate=0.3)] * 2)
    step(batch).backward()
    logs = step.log()
    assert len({logs["loss_full"], logs["loss_ablated_1"], logs["loss_ablated_2"]}) == 3


def own_loss(outputs):
    if isinstance(outputs, tuple):
        return outputs[0]
    return outputs["loss"]


def words(rows=6, length=8, low=5):
    return torch.randint(low, 40, (rows, length), generator=torch.Generator().manual_seed(3))


# Models of the user's own


class Margin(BertForSequenceClassification):
    """Its head uses the labels for more than the loss."""

    def forward(self, input_ids=None, attention_mask=None, labels=None):
        logits = super().forward(input_ids, attention_mask).logits
        loss = None
        if labels is not None:
            logits = logits - 2 * F.one_hot(labels, logits.shape[1])
            loss = F.cross_entropy(5 * logits, labels)
        return {"loss": loss, "logits": logits}


class LabelsRequired(BertForSequenceClassification):
    def forward(self, input_ids, labels):
        return super().forward(input_ids, labels=labels)


class LogitsWithoutLabels(BertForSequenceClassification):
    """A tensor without labels, a tuple with them; three classes and three rows."""

    def forward(self, input_ids, labels=None):
        logits = super().forward(input_ids).logits
        return logits if labels is None else (F.cross_entropy(logits, labels), logits)


class Annealed(BertForSequenceClassification):
    """A penalty on its weights that grows from 0 with every forward that has a graph."""

    penalty = 0.0

    def forward(self, input_ids=None, labels=None, **kwargs):
        outputs = super().forward(input_ids, labels=labels)
        outputs.loss = outputs.loss + self.penalty * self.classifier.weight.square().sum()
        return outputs


@pytest.mark.parametrize("kind", [Margin, LabelsRequired, LogitsWithoutLabels])
def test_a_model_of_ones_own_trains_on_its_own_loss(kind):
    torch.manual_seed(0)
    model = kind(BertConfig(**SMALL, num_labels=3))
    assert_trains_on_its_own_loss(model, {"input_ids": words(3), "labels": torch.tensor([0, 1, 2])})


def test_class_weights_count_also_after_a_first_batch_of_one_class(tmp_path):
    class Weighted(BertForSequenceClassification):
        def forward(self, input_ids=None, labels=None, **kwargs):
            logits = super().forward(input_ids).logits
            return {"loss": F.cross_entropy(logits, labels, weight=torch.tensor([1.0, 9.0, 1.0])), "logits": logits}

    torch.manual_seed(0)
    model = Weighted(BertConfig(**SMALL, num_labels=3)).train()
    step = ComparativeStep(model, [CmpDrop()] * 2, FULL_ALONE)
    for labels in ([0] * 6, [0, 1, 2, 0, 1, 0], [1] * 6, [2, 1, 0, 0, 0, 0]):
        batch = {"input_ids": words(), "labels": torch.tensor(labels)}
        with Ablated([CmpDrop()], [0]):
            torch.testing.assert_close(step(batch), model(**batch)["loss"])


def test_a_penalty_that_grows_from_zero_is_added_once_in_every_step():
    torch.manual_seed(0)
    model = Annealed(BertConfig(**SMALL, num_labels=3)).train()
    batch = {"input_ids": words(), "labels": torch.arange(6) % 3}
    step = ComparativeStep(model, [CmpDrop()] * 2)
    start = torch.get_rng_state()
    without = step(batch)
    for penalty in (0.01, 0.1, 0.5):  # the first stays stacked, the others run one forward a variant
        model.penalty = penalty
        torch.set_rng_state(start)
        added = step(batch) - without
        expected = penalty * model.classifier.weight.square().sum()
        torch.testing.assert_close(added, expected, rtol=1e-2, atol=1e-6)


# Models of transformers and PEFT


def test_masked_words_alone_can_have_logits():
    torch.manual_seed(0)
    sizes = {name: value for name, value in SMALL.items() if name != "max_position_embeddings"}
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2}
    config = ModernBertConfig(**sizes, **ids, sparse_prediction=True, mlp_dropout=0.1, embedding_dropout=0.1)
    config._attn_implementation = "eager"
    labels = words().masked_fill(torch.rand(6, 8, generator=torch.Generator().manual_seed(0)) < 0.6, -100)
    batch = {"input_ids": words(), "attention_mask": torch.ones(6, 8, dtype=torch.long), "labels": labels}
    assert_trains_on_its_own_loss(ModernBertForMaskedLM(config), batch)


def test_a_decoder_may_start_with_the_padding_token():
    torch.manual_seed(0)
    encoder = BertModel(BertConfig(**SMALL))
    decoder = BertLMHeadModel(BertConfig(**SMALL, is_decoder=True, add_cross_attention=True))
    model = EncoderDecoderModel(encoder=encoder, decoder=decoder)
    model.config.decoder_start_token_id = model.config.pad_token_id = 0
    labels = words()
    labels[1, 5:] = -100
    assert_trains_on_its_own_loss(model, {"input_ids": words(), "labels": labels})


class ShiftsItself(GPT2LMHeadModel):
    """A causal model whose data are shifted already."""

    def forward(self, input_ids=None, labels=None, **kwargs):
        outputs = super().forward(input_ids)
        outputs.loss = F.cross_entropy(outputs.logits.flatten(0, 1), labels.flatten())
        return outputs


@pytest.mark.parametrize(
    "build",
    [lambda: BartForCausalLM(BartConfig(**BART)), lambda: ShiftsItself(GPT2Config(**GPT2))],
    ids=["bart", "own"],
)
def test_causal_models_shift_their_labels_or_do_not(build):
    torch.manual_seed(0)
    assert_trains_on_its_own_loss(build(), {"input_ids": words(), "labels": words().roll(-1, 1)})


def with_adapter(**settings):
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    kind = getattr(peft, settings.pop("kind"))
    return peft.get_peft_model(GPT2LMHeadModel(GPT2Config(**GPT2)), kind(task_type="CAUSAL_LM", **settings))


@pytest.mark.parametrize(
    "settings",
    [
        {"kind": "PromptTuningConfig", "num_virtual_tokens": 4},
        {"kind": "PromptEncoderConfig", "num_virtual_tokens": 4, "encoder_hidden_size": 8},
    ],
    ids=["prompt tuning", "p-tuning"],
)
def test_virtual_tokens_make_logits_longer_than_labels(settings):
    model = with_adapter(**settings)
    batch = {"input_ids": words(), "attention_mask": torch.ones(6, 8, dtype=torch.long), "labels": words()}
    assert_trains_on_its_own_loss(model, batch)


@pytest.mark.parametrize("by_hand", [False, True], ids=["own loss", "per_example_loss_func"])
def test_the_orthogonality_term_of_adalora_is_added_once(by_hand, tmp_path):
    model = with_adapter(
        kind="AdaLoraConfig", init_r=4, target_r=2, tinit=1, tfinal=1, total_step=10, target_modules=["c_attn"]
    )
    batch = {"input_ids": words(), "attention_mask": torch.ones(6, 8, dtype=torch.long), "labels": words()}
    model.train()
    with Ablated([CmpDrop()], [0]):
        outputs = model(**batch)
        language = model.get_base_model()(**batch).loss
    assert outputs.loss > language + 1e-4
    if not by_hand:
        assert_trains_on_its_own_loss(model, batch)
        return
    settings = {"cmp_num_ablations": 1, **FULL_ALONE_ARGUMENTS, "remove_unused_columns": False}

    def by_example(outputs, inputs):
        logits, labels = outputs.logits[:, :-1], inputs["labels"][:, 1:]
        return F.cross_entropy(logits.transpose(1, 2), labels, reduction="none").mean(1)

    trainer = cmp_trainer(tmp_path, model, per_example_loss_func=by_example, **settings)
    # Who gives the losses of the examples has said what the loss is.
    torch.testing.assert_close(trainer.compute_loss(model, batch), language, rtol=1e-5, atol=1e-6)


def test_outputs_may_be_tuples():
    torch.manual_seed(0)
    positions = {"start_positions": torch.arange(6), "end_positions": torch.arange(6) + 1}
    for settings in ({}, {"return_dict": False}):
        model = BertForQuestionAnswering(BertConfig(**SMALL, **settings))
        assert_trains_on_its_own_loss(model, {"input_ids": words(), **positions})


# Subclasses of Trainer


class ReadsLoss(Trainer):
    reads = staticmethod(lambda outputs: outputs.loss)

    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **kwargs)
        loss = loss + 0.5 * self.reads(outputs)
        return (loss, outputs) if return_outputs else loss


class ReadsLossKey(ReadsLoss):
    reads = staticmethod(lambda outputs: outputs["loss"])


class ReadsLogits(ReadsLoss):
    reads = staticmethod(lambda outputs: outputs[1].square().mean())


class ReadsAttribute(Trainer):
    """Adds a loss that the last forward left on the model."""

    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **kwargs)
        loss = loss + 0.1 * model.left.square().mean()
        return (loss, outputs) if return_outputs else loss


class LeavesPooled(BertForSequenceClassification):
    def forward(self, input_ids=None, attention_mask=None, labels=None):
        outputs = super().forward(input_ids, attention_mask, labels=labels)
        self.left = outputs.logits
        return outputs


@pytest.mark.parametrize("plugin_first", [True, False], ids=["plugin first", "plugin last"])
@pytest.mark.parametrize("kind", [ReadsLoss, ReadsLossKey, ReadsLogits, ReadsAttribute])
def test_a_subclass_finds_what_the_trainer_hands_out(kind, plugin_first, tmp_path):
    bases = (CmpTrainer, kind) if plugin_first else (kind, CmpTrainer)
    found = []
    for type_, settings, arguments in (
        (kind, NO_DROPOUT, training_arguments(tmp_path, TrainingArguments)),
        (type("Cmp", bases, {}), {}, training_arguments(tmp_path, cmp_num_ablations=2, **FULL_ALONE_ARGUMENTS)),
    ):
        torch.manual_seed(0)
        model = LeavesPooled(BertConfig(**{**SMALL, "num_labels": 3, **settings}))
        trainer = type_(model, arguments, train_dataset=token_data())
        trainer.train()
        found.append(dict(model.named_parameters()))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)


class Logs(TrainerCallback):
    def __init__(self):
        self.trainer = None

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 1:
            self.trainer.log({"loss": 7.0, "seen": 1.0})


class LogsInComputeLoss(CmpTrainer):
    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        result = super().compute_loss(model, inputs, return_outputs=return_outputs, **kwargs)
        if self.state.global_step == 1:
            self.log({"loss": 5.0, "own": 1.0})
        return result


def test_logs_of_others_are_left_alone(tmp_path):
    added = {"loss_full", "loss_ablated_1", "violation_rate"}
    logs = Logs()
    settings = {"cmp_num_ablations": 1, "max_steps": 4, "logging_steps": 2}
    trainer = cmp_trainer(tmp_path, kind=LogsInComputeLoss, callbacks=[logs], **settings)
    logs.trainer = trainer
    trainer.train()
    history = trainer.state.log_history
    assert [log for log in history if "seen" in log] == [{"loss": 7.0, "seen": 1.0, "epoch": 0.125, "step": 1}]
    assert [log["loss"] for log in history if "own" in log] == [5.0]
    ours = [log for log in history if added <= log.keys()]
    assert [log["step"] for log in ours] == [2, 4]
    plain = cmp_trainer(tmp_path, **settings)
    plain.train()
    # The averages of the variants are those of a training in which nobody else logs.
    expected = [log for log in plain.state.log_history if added <= log.keys()]
    assert [[log[name] for name in sorted(added)] for log in ours] == [
        [log[name] for name in sorted(added)] for log in expected
    ]


@pytest.mark.parametrize("scaled", [True, False])
def test_a_loss_that_is_not_scaled_for_accumulation_is_divided_once(scaled, tmp_path):
    if not hasattr(Trainer, "loss_is_scaled_for_ga"):
        pytest.skip("transformers 5 asks the trainer whether its loss is scaled")

    class Plain(Trainer):
        @property
        def loss_is_scaled_for_ga(self):
            return scaled

        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            loss, outputs = super().compute_loss(model, inputs, return_outputs=True)
            return (loss, outputs) if return_outputs else loss

    settings = {"gradient_accumulation_steps": 4, "per_device_train_batch_size": 2, "optim": "sgd", "max_steps": 2}
    found = []
    for kind, arguments, changes in (
        (Plain, training_arguments(tmp_path, TrainingArguments, **settings), NO_DROPOUT),
        (
            type("CmpPlain", (CmpTrainer, Plain), {}),
            training_arguments(tmp_path, cmp_num_ablations=2, **FULL_ALONE_ARGUMENTS, **settings),
            {},
        ),
    ):
        model = tiny_bert(**changes)
        kind(model, arguments, train_dataset=token_data()).train()
        found.append(dict(model.named_parameters()))
    torch.testing.assert_close(*found)


def test_a_column_for_the_users_loss_does_not_reach_a_model_that_does_not_take_it(tmp_path):
    class Strict(nn.Module):
        def __init__(self):
            super().__init__()
            self.bert = tiny_bert()

        def forward(self, input_ids, attention_mask, labels=None):
            return self.bert(input_ids, attention_mask, labels=labels)

    data = token_data().add_column("importance", [1.0 + (row % 2) for row in range(32)])
    seen = []

    def weighted(outputs, inputs):
        seen.append(inputs["importance"])
        return inputs["importance"] * F.cross_entropy(outputs.logits, inputs["labels"], reduction="none")

    settings = {"cmp_num_ablations": 1, "remove_unused_columns": False, "max_steps": 2}
    trainer = cmp_trainer(tmp_path, Strict(), data, per_example_loss_func=weighted, **settings)
    trainer.train()
    assert trainer.num_comparisons == 2 and set(seen[0].tolist()) <= {1.0, 2.0}
    assert "eval_loss" in trainer.evaluate()


@pytest.mark.parametrize("ablations", [0, 2])
def test_two_losses_of_the_users_are_rejected_together(ablations, tmp_path):
    with pytest.raises(ValueError, match="compute_loss_func") as rejected:
        cmp_trainer(
            tmp_path,
            cmp_num_ablations=ablations,
            compute_loss_func=lambda outputs, labels, num_items_in_batch=None: outputs.logits.sum(),
            per_example_loss_func=lambda outputs, inputs: outputs.logits.sum(1),
        )
    assert "per_example_loss_func" in str(rejected.value)


def test_a_compute_loss_func_is_honoured_without_ablations(tmp_path):
    trainer = cmp_trainer(
        tmp_path, compute_loss_func=lambda outputs, labels, num_items_in_batch=None: outputs.logits.sum() * 0 + 3
    )
    assert trainer.compute_loss(trainer.model, batch_of(token_data())).item() == 3


# Memory


def test_batch_norm_with_two_rows_and_a_baseline_under_low_memory():
    torch.manual_seed(0)

    class Normed(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.2), nn.Linear(8, 3))

        def forward(self, inputs, labels):
            logits = self.layers(inputs)
            return {"loss": F.cross_entropy(logits, labels), "logits": logits}

    found = []
    batch = {"inputs": torch.randn(2, 4), "labels": torch.tensor([0, 2])}
    for low_memory in (False, True):
        torch.manual_seed(0)
        model = Normed().train()
        step = ComparativeStep(
            model, plan(2), ComparativeLoss(baseline="first"), forward="sequential", low_memory=low_memory
        )
        torch.manual_seed(1)
        step(batch).backward()
        found.append(gradients(model))
    torch.testing.assert_close(*found)
