"""Nobody who asked for a comparison trains without one: plain Trainers given ablations."""

import copy
import dataclasses

import pytest
import torch
from transformers import Seq2SeqTrainer, Trainer

from cmp_trainer import CmpSeq2SeqTrainingArguments, CmpTrainer, CmpTrainingArguments
from tests.helpers import cmp_trainer, tiny_bert, token_data, training_arguments


class PlainSubclass(Trainer):
    """Computes the loss by itself, as many scripts do."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(**inputs)
        return (outputs.loss, outputs) if return_outputs else outputs.loss


def plain_trainer(output_dir, kind=Trainer, args=None, **changes):
    """A Trainer that does not compare, of a tiny model, whose arguments ask for two ablations."""
    kind_of_args = CmpSeq2SeqTrainingArguments if kind is Seq2SeqTrainer else CmpTrainingArguments
    args = args or training_arguments(output_dir, kind_of_args, **{"cmp_num_ablations": 2, **changes})
    return kind(model=tiny_bert(), args=args, train_dataset=token_data(), eval_dataset=token_data())


@pytest.mark.parametrize(
    ("kind", "instead"),
    [(Trainer, "CmpTrainer"), (Seq2SeqTrainer, "CmpSeq2SeqTrainer"), (PlainSubclass, "CmpTrainer")],
)
def test_a_plain_trainer_given_ablations_is_an_error_before_its_first_step(kind, instead, tmp_path):
    trainer = plain_trainer(tmp_path, kind)
    message = f"--cmp_num_ablations 2 .* {kind.__name__} trains without it; use {instead} in place of {instead[3:]}"
    with pytest.raises(ValueError, match=message):
        trainer.train()
    assert trainer.state.global_step == 0


def test_it_is_an_error_also_with_an_optimizer_and_a_scheduler_passed_in(tmp_path):
    model = tiny_bert()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer)
    args = training_arguments(tmp_path, cmp_num_ablations=1)
    trainer = Trainer(model=model, args=args, train_dataset=token_data(), optimizers=(optimizer, scheduler))
    with pytest.raises(ValueError, match="trains without it"):
        trainer.train()


@pytest.mark.parametrize("copied", [copy.deepcopy, dataclasses.replace, lambda args: args])
def test_arguments_that_a_cmp_trainer_used_are_an_error_in_a_plain_one(copied, tmp_path):
    args = cmp_trainer(tmp_path, cmp_num_ablations=1).args
    with pytest.raises(ValueError, match="trains without it"):
        plain_trainer(tmp_path, args=copied(args)).train()


def test_a_plain_trainer_given_ablations_evaluates(tmp_path):
    trainer = plain_trainer(tmp_path)
    assert trainer.evaluate()["eval_loss"] > 0
    assert len(trainer.predict(token_data()).predictions) == 32


def test_a_plain_trainer_trains_without_ablations(tmp_path):
    assert plain_trainer(tmp_path, cmp_num_ablations=0).train().global_step == 6


def test_a_cmp_trainer_whose_arguments_were_copied_compares(tmp_path):
    class CopiesItsArguments(CmpTrainer):
        def __init__(self, *, args, **kwargs):
            super().__init__(args=dataclasses.replace(copy.deepcopy(args)), **kwargs)

    trainer = cmp_trainer(tmp_path, kind=CopiesItsArguments, cmp_num_ablations=1)
    trainer.train()
    assert "loss_ablated_1" in trainer.state.log_history[0]


def test_arguments_can_be_read_and_written_by_anyone(tmp_path):
    args = training_arguments(tmp_path, cmp_num_ablations=2)
    assert args.train_batch_size == 4
    assert args.n_gpu == 0
    assert args.to_sanitized_dict()["cmp_num_ablations"] == 2
