"""What is refused or warned of when a trainer is made and on its first step."""

from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import (
    BertForPreTraining,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
)

from cmp_trainer import CmpDrop, CmpTrainer, CmpTrainingArguments, ComparativeStep
from tests.helpers import SMALL, batch_of, cmp_trainer, tiny_bert, token_data

LLAMA = {**SMALL, "num_key_value_heads": 2, "num_labels": 3, "pad_token_id": 0}


class AuxiliaryLossBert(BertForSequenceClassification):
    """A model whose loss the logits do not tell."""

    def forward(self, *args, **kwargs):
        outputs = super().forward(*args, **kwargs)
        if outputs.loss is not None:
            outputs.loss = outputs.loss + 0.1
        return outputs


class LayerDropBert(BertForSequenceClassification):
    """A model that is random without dropout."""

    def forward(self, *args, **kwargs):
        outputs = super().forward(*args, **kwargs)
        outputs.logits = outputs.logits + torch.rand(3)
        if outputs.loss is not None:
            outputs.loss = F.cross_entropy(outputs.logits, kwargs["labels"])
        return outputs


def first_step(trainer, data=None):
    trainer.model.train()
    return trainer.compute_loss(trainer.model, batch_of(token_data() if data is None else data))


def test_a_model_without_dropout_is_refused_with_the_number_of_its_sites(tmp_path):
    model = tiny_bert(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    with pytest.raises(ValueError, match=r"makes 8 dropout calls .*all at rate 0.*--cmp_dropout 0.1.*hidden_dropout"):
        first_step(cmp_trainer(tmp_path, model, cmp_num_ablations=2))


def test_cmp_dropout_is_the_way_out(tmp_path):
    model = tiny_bert(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    assert first_step(cmp_trainer(tmp_path, model, cmp_num_ablations=2, cmp_dropout=0.1)) > 0


def test_a_model_without_any_dropout_call_is_refused(tmp_path):
    class Bare(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(8, 3)

        def forward(self, input_ids, labels=None, **_):
            logits = self.layer(input_ids.float())
            return (
                {"logits": logits} if labels is None else {"loss": F.cross_entropy(logits, labels), "logits": logits}
            )

    with pytest.raises(ValueError, match="makes no dropout call, so there is nothing that CmpDrop could ablate"):
        first_step(cmp_trainer(tmp_path, Bare(), cmp_num_ablations=1, cmp_dropout=0.1))


def test_a_decoder_without_rates_names_the_argument_that_gives_them(tmp_path):
    model = LlamaForSequenceClassification(LlamaConfig(**LLAMA))
    with pytest.raises(ValueError, match=r"--cmp_dropout 0\.1"):
        first_step(cmp_trainer(tmp_path, model, cmp_num_ablations=1))


def test_what_a_model_adds_to_its_loss_is_added_once(tmp_path):
    torch.manual_seed(0)
    model = AuxiliaryLossBert(tiny_bert().config)
    full_only = {"cmp_objective": "regularized", "cmp_primary": "full", "cmp_weight": 0.0}
    found = first_step(cmp_trainer(tmp_path, model, cmp_num_ablations=2, **full_only))
    torch.testing.assert_close(found, model.eval()(**batch_of(token_data())).loss)


def test_with_the_users_loss_the_models_own_is_not_asked(tmp_path):
    def function(outputs, inputs):
        return F.cross_entropy(outputs.logits, inputs["labels"], reduction="none")

    model = AuxiliaryLossBert(tiny_bert().config)
    assert first_step(cmp_trainer(tmp_path, model, cmp_num_ablations=2, per_example_loss_func=function)) > 0


def test_randomness_besides_dropout_is_warned_of_with_where_it_begins(tmp_path, caplog):
    first_step(cmp_trainer(tmp_path, LayerDropBert(tiny_bert().config), cmp_num_ablations=2))
    assert "randomness besides dropout, first seen in the model itself" in caplog.text


def test_two_losses_of_one_model_add_up_for_each_example(tmp_path):
    torch.manual_seed(0)
    model = BertForPreTraining(tiny_bert().config)
    ids = torch.randint(5, 40, (4, 8))
    batch = {"input_ids": ids, "labels": ids, "next_sentence_label": torch.tensor([0, 1, 0, 1])}
    trainer = cmp_trainer(tmp_path, model, cmp_num_ablations=2)
    trainer.compute_loss(model.train(), batch)
    assert trainer.comparative_step().log()["loss_full"] == pytest.approx(model.eval()(**batch).loss.item(), rel=1e-5)


class FusedLoss(torch.autograd.Function):
    """A cross entropy that shows nothing of its examples."""

    @staticmethod
    def forward(ctx, logits, labels):
        ctx.save_for_backward(logits.softmax(-1), labels)
        return -logits.log_softmax(-1)[torch.arange(len(labels)), labels].mean()

    @staticmethod
    def backward(ctx, gradient):
        probabilities, labels = ctx.saved_tensors
        return gradient * (probabilities - F.one_hot(labels, 3)) / len(labels), None


class FusedBert(BertForSequenceClassification):
    def forward(self, *args, labels=None, **kwargs):
        outputs = super().forward(*args, **kwargs)
        outputs["loss"] = FusedLoss.apply(outputs.logits, labels)
        return outputs


def test_a_fused_loss_is_rejected_with_what_to_do(tmp_path):
    trainer = cmp_trainer(tmp_path, FusedBert(tiny_bert().config), cmp_num_ablations=2)
    with pytest.raises(ValueError, match=r"no part of the loss belongs to single examples.*per_example_loss_func"):
        first_step(trainer)


@pytest.mark.parametrize("function", [lambda outputs, inputs: outputs.logits.mean(), lambda outputs, inputs: 3.0])
def test_a_users_loss_that_is_not_per_example_is_refused(function, tmp_path):
    with pytest.raises(
        ValueError, match=r"per_example_loss_func returned .*expected a float tensor of shape \(batch,\)"
    ):
        first_step(cmp_trainer(tmp_path, cmp_num_ablations=2, per_example_loss_func=function))


def test_a_users_losses_of_tokens_are_refused(tmp_path):
    def of_tokens(outputs, inputs):
        return outputs.logits[:, :1].expand(-1, 8).reshape(-1)

    with pytest.raises(ValueError, match=r"returned 32 rows for a batch of 4 examples; .* of their example first"):
        first_step(cmp_trainer(tmp_path, cmp_num_ablations=2, per_example_loss_func=of_tokens))


def test_a_batch_without_labels_is_rejected_as_trainer_rejects_it(tmp_path):
    batch = {"input_ids": torch.randint(5, 40, (4, 8)), "attention_mask": torch.ones(4, 8)}
    trainer = cmp_trainer(tmp_path, cmp_num_ablations=2)
    with pytest.raises(ValueError, match="did not return a loss from the inputs, only the following keys: logits"):
        trainer.compute_loss(trainer.model.train(), batch)


def test_whole_numbers_for_several_labels_are_rejected_as_the_model_rejects_them(tmp_path):
    model = tiny_bert(problem_type="multi_label_classification")
    batch = {"input_ids": torch.randint(5, 40, (4, 8)), "labels": torch.ones(4, 3, dtype=torch.long)}
    trainer = cmp_trainer(tmp_path, model, cmp_num_ablations=2)
    with pytest.raises(RuntimeError, match="result type Float can't be cast"):
        trainer.compute_loss(model.train(), batch)


def test_a_compute_loss_func_is_compared_and_excludes_a_per_example_one(tmp_path):
    def batch_loss(outputs, labels, num_items_in_batch=None):
        return 2 * F.cross_entropy(outputs.logits, labels)

    full_only = {"cmp_objective": "regularized", "cmp_primary": "full", "cmp_weight": 0.0}
    trainer = cmp_trainer(tmp_path, cmp_num_ablations=1, compute_loss_func=batch_loss, **full_only)
    found = first_step(trainer)
    torch.testing.assert_close(found, 2 * trainer.model.eval()(**batch_of(token_data())).loss)
    for ablations in (0, 1):
        with pytest.raises(ValueError, match="both define the loss"):
            settings = {"compute_loss_func": batch_loss, "per_example_loss_func": lambda outputs, inputs: None}
            cmp_trainer(tmp_path, cmp_num_ablations=ablations, **settings)


@pytest.mark.parametrize("kind", ["context", "sequence", "tensor"])
def test_parallelism_inside_of_examples_or_layers_is_refused(kind, tmp_path, monkeypatch):
    trainer = cmp_trainer(tmp_path, cmp_num_ablations=1)
    enabled = SimpleNamespace(cp_enabled=kind == "context", sp_enabled=kind == "sequence")
    monkeypatch.setattr(type(trainer.accelerator), "parallelism_config", enabled, raising=False)
    monkeypatch.setattr(trainer, "get_tp_size", lambda: 2 if kind == "tensor" else 1)
    with pytest.raises(ValueError, match=f"{kind}.* parallelism"):
        first_step(trainer)


@pytest.mark.parametrize("implementation", ["flash_attention_2", "flex_attention"])
def test_attention_that_takes_its_rate_elsewhere_is_refused_by_name(implementation, tmp_path):
    model = tiny_bert()
    model.config._attn_implementation_internal = implementation
    with pytest.raises(ValueError, match=f"attn_implementation='{implementation}'.*sdpa"):
        cmp_trainer(tmp_path, model, cmp_num_ablations=1)


def test_data_parallel_is_refused_with_the_way_out(tmp_path):
    class TwoGpus:
        """Arguments as they are on a machine with two GPUs in one process."""

        n_gpu = 2

    from cmp_trainer.checks.settings import check_trainer

    trainer = cmp_trainer(tmp_path, cmp_num_ablations=1)
    trainer.args.__class__ = type("TwoGpuArguments", (TwoGpus, type(trainer.args)), {})
    with pytest.raises(ValueError, match="torchrun --nproc_per_node 2"):
        check_trainer(trainer)


@pytest.mark.parametrize("labels", [[0, 1, 2, 3], [0, -1, 2, 1]], ids=str)
def test_labels_out_of_range_are_rejected_as_the_model_rejects_them(labels, tmp_path):
    trainer = cmp_trainer(tmp_path, cmp_num_ablations=1)
    batch = {**batch_of(token_data()), "labels": torch.tensor(labels)}
    with pytest.raises(IndexError, match="is out of bounds"):
        trainer.compute_loss(trainer.model.train(), batch)


def test_the_first_steps_checks_leave_random_state_and_buffers_alone(tmp_path):
    states = []
    for checked in (False, True):
        model = tiny_bert()
        model.classifier = nn.Sequential(nn.BatchNorm1d(16, momentum=0.5), model.classifier)
        trainer = cmp_trainer(tmp_path, model, cmp_num_ablations=1)
        step = trainer.comparative_step(model.train())
        step(batch_of(token_data()))
        if checked:  # the second step of an object that has checked its first is a step without checks
            model.classifier[0].reset_running_stats()
            torch.manual_seed(5)
            step(batch_of(token_data()))
        else:
            model.classifier[0].reset_running_stats()
            step.check_again()
            torch.manual_seed(5)
            step(batch_of(token_data()))
        states.append((torch.get_rng_state(), dict(model.named_buffers())))
    assert torch.equal(states[0][0], states[1][0])
    torch.testing.assert_close(states[0][1], states[1][1])


def test_checks_wait_for_a_batch_with_labels(tmp_path):
    trainer = cmp_trainer(tmp_path, cmp_num_ablations=1)
    batch = batch_of(token_data())
    trainer.compute_loss(trainer.model.train(), {**batch, "labels": torch.full((4,), -100)})
    assert not trainer.comparative_step()._checked
    trainer.compute_loss(trainer.model.train(), batch)
    assert trainer.comparative_step()._checked


def test_packed_sequences_of_a_row_are_said_to_be_one_example(caplog):
    model = LlamaForCausalLM(LlamaConfig(**LLAMA))
    ids = torch.randint(3, 40, (1, 12), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids, "labels": ids, "position_ids": torch.tensor([[0, 1, 2, 3, 4, 5, 0, 1, 2, 3, 4, 5]])}
    step = ComparativeStep(model.train(), [CmpDrop(base_rate=0.1)])
    step(batch)
    assert "several packed sequences" in caplog.text


def test_disable_dropout_of_other_libraries_arguments_is_named(tmp_path):
    @dataclass
    class Arguments(CmpTrainingArguments):
        disable_dropout: bool = True

    args = Arguments(str(tmp_path), cmp_num_ablations=1, use_cpu=True, report_to=[])
    with pytest.raises(ValueError, match="disable_dropout of Arguments sets every dropout rate"):
        CmpTrainer(tiny_bert(), args)
    args.cmp_dropout = 0.1
    CmpTrainer(tiny_bert(), args)
