"""What is refused or warned of when a trainer is made and on its first step."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import BertForPreTraining, BertForSequenceClassification, LlamaConfig, LlamaForSequenceClassification

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


def test_a_loss_that_the_logits_do_not_tell_is_refused_with_both_numbers(tmp_path):
    torch.manual_seed(0)
    model = AuxiliaryLossBert(tiny_bert().config)
    with pytest.raises(ValueError, match=r"own loss on the first batch is 1\.\d+, the mean .* is 1\.\d+.*per_example"):
        first_step(cmp_trainer(tmp_path, model, cmp_num_ablations=2))


def test_with_the_users_loss_the_models_own_is_not_asked(tmp_path):
    def function(outputs, inputs):
        return F.cross_entropy(outputs.logits, inputs["labels"], reduction="none")

    model = AuxiliaryLossBert(tiny_bert().config)
    assert first_step(cmp_trainer(tmp_path, model, cmp_num_ablations=2, per_example_loss_func=function)) > 0


def test_randomness_beside_dropout_is_warned_of(tmp_path, caplog):
    first_step(cmp_trainer(tmp_path, LayerDropBert(tiny_bert().config), cmp_num_ablations=2))
    assert "layer drop" in caplog.text


def test_outputs_of_no_known_task_ask_for_a_per_example_loss(tmp_path):
    torch.manual_seed(0)
    model = BertForPreTraining(tiny_bert().config)
    ids = torch.randint(5, 40, (4, 8))
    batch = {"input_ids": ids, "labels": ids, "next_sentence_label": torch.tensor([0, 1, 0, 1])}
    trainer = cmp_trainer(tmp_path, model, cmp_num_ablations=2)
    with pytest.raises(ValueError, match="no per-example loss is known for outputs BertForPreTrainingOutput"):
        trainer.compute_loss(model.train(), batch)


@pytest.mark.parametrize("function", [lambda outputs, inputs: outputs.logits.mean(), lambda outputs, inputs: 3.0])
def test_a_users_loss_that_is_not_per_example_is_refused(function, tmp_path):
    with pytest.raises(
        ValueError, match=r"per_example_loss_func returned .*expected a float tensor of shape \(batch,\)"
    ):
        first_step(cmp_trainer(tmp_path, cmp_num_ablations=2, per_example_loss_func=function))


def test_a_users_losses_of_tokens_are_refused(tmp_path):
    def of_tokens(outputs, inputs):
        return outputs.logits[:, :1].expand(-1, 8).reshape(-1)

    with pytest.raises(ValueError, match=r"returned 32 rows for a batch of 4 examples; .* averaged over the tokens"):
        first_step(cmp_trainer(tmp_path, cmp_num_ablations=2, per_example_loss_func=of_tokens))


def test_a_batch_without_labels_is_refused_with_what_it_has(tmp_path):
    batch = {"input_ids": torch.randint(5, 40, (4, 8)), "attention_mask": torch.ones(4, 8)}
    trainer = cmp_trainer(tmp_path, cmp_num_ablations=2)
    with pytest.raises(ValueError, match="the batch has no `labels`, only input_ids, attention_mask"):
        trainer.compute_loss(trainer.model.train(), batch)


def test_whole_numbers_for_several_labels_are_refused(tmp_path):
    model = tiny_bert(problem_type="multi_label_classification")
    batch = {"input_ids": torch.randint(5, 40, (4, 8)), "labels": torch.ones(4, 3, dtype=torch.long)}
    trainer = cmp_trainer(tmp_path, model, cmp_num_ablations=2)
    with pytest.raises(ValueError, match=r"labels are int64 of shape \(4, 3\); expected floats"):
        trainer.compute_loss(model.train(), batch)


def test_a_batch_loss_function_is_refused_in_favour_of_a_per_example_one(tmp_path):
    def batch_loss(outputs, labels, num_items_in_batch=None):
        return F.cross_entropy(outputs.logits, labels)

    assert cmp_trainer(tmp_path, compute_loss_func=batch_loss)
    with pytest.raises(ValueError, match="Pass per_example_loss_func"):
        cmp_trainer(tmp_path, cmp_num_ablations=1, compute_loss_func=batch_loss)


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

    from cmp_trainer.checks import check_setting

    trainer = cmp_trainer(tmp_path, cmp_num_ablations=1)
    trainer.args.__class__ = type("TwoGpuArguments", (TwoGpus, type(trainer.args)), {})
    with pytest.raises(ValueError, match="torchrun --nproc_per_node 2"):
        check_setting(trainer)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.tensor([0, 1, 2, 3]), r"labels from 0 to 3 for a model of 3 classes; expected 0 to 2"),
        (torch.tensor([0, -1, 2, 1]), r"labels from -1 to 2 for a model of 3 classes"),
        (torch.tensor([0.0, 1.0, 2.0, 1.0]), r"labels are float32 of shape \(4,\); expected floats of shape \(4, 3\)"),
    ],
)
def test_labels_out_of_range_or_of_the_wrong_type_are_named(labels, message, tmp_path):
    trainer = cmp_trainer(tmp_path, cmp_num_ablations=1)
    batch = {**batch_of(token_data()), "labels": labels}
    with pytest.raises(ValueError, match=message):
        trainer.compute_loss(trainer.model.train(), batch)


def test_the_first_step_checks_leave_random_state_and_buffers_alone(tmp_path):
    model = tiny_bert()
    model.classifier = nn.Sequential(nn.BatchNorm1d(16, momentum=0.5), model.classifier)
    trainer = cmp_trainer(tmp_path, model, cmp_num_ablations=1)
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    state = torch.get_rng_state()
    assert trainer._check_first_step(model.train(), batch_of(token_data()))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in model.named_buffers())


def test_checks_of_all_processes_end_together(tmp_path, monkeypatch):
    trainer = cmp_trainer(tmp_path, cmp_num_ablations=1)
    monkeypatch.setattr(trainer, "_sum_over_processes", lambda labelled: labelled + 1)  # another process had labels
    unlabelled = {**batch_of(token_data()), "labels": torch.full((4,), -100)}
    trainer.compute_loss(trainer.model.train(), unlabelled)
    assert trainer._first_step_is_checked


def test_checks_wait_for_a_batch_with_labels(tmp_path):
    trainer = cmp_trainer(tmp_path, cmp_num_ablations=1)
    batch = batch_of(token_data())
    trainer.compute_loss(trainer.model.train(), {**batch, "labels": torch.full((4,), -100)})
    assert not trainer._first_step_is_checked
    trainer.compute_loss(trainer.model.train(), batch)
    assert trainer._first_step_is_checked
