"""What is recomputed in backward loses what its forward lost, wherever the recomputation comes from."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils import checkpoint
from torch.utils.checkpoint import create_selective_checkpoint_contexts
from transformers import ReformerConfig, ReformerForSequenceClassification, TrainerCallback

from cmp_trainer import CmpDrop, ComparativeStep
from tests.helpers import batch_of, cmp_trainer, gradients, same_weights, tiny_bert, token_data


class Block(nn.Module):
    """Linear layers and dropout."""

    def __init__(self, depth=2):
        super().__init__()
        layers = [nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Dropout(0.3)) for _ in range(depth)]
        self.layers = nn.Sequential(*layers)

    def forward(self, hidden):
        return self.layers(hidden)


class Checkpointed(nn.Module):
    """A classifier whose blocks are run by a function of the test's."""

    def __init__(self, run):
        super().__init__()
        torch.manual_seed(0)
        self.run = run
        self.blocks = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(8, 3)

    def forward(self, inputs, labels):
        hidden = inputs
        for block in self.blocks:
            hidden = self.run(block, hidden)
        logits = self.head(hidden)
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


def plainly(block, hidden):
    return block(hidden)


def reentrant(block, hidden):
    return checkpoint.checkpoint(block, hidden.requires_grad_(), use_reentrant=True)


def non_reentrant(block, hidden):
    return checkpoint.checkpoint(block, hidden, use_reentrant=False)


def nested(block, hidden):
    def inner(hidden):
        for layer in block.layers:
            hidden = checkpoint.checkpoint(layer, hidden, use_reentrant=False)
        return hidden

    return checkpoint.checkpoint(inner, hidden, use_reentrant=False)


def with_contexts_of_its_own(block, hidden):
    def contexts():
        return create_selective_checkpoint_contexts([torch.ops.aten.mm.default])

    return checkpoint.checkpoint(block, hidden, use_reentrant=False, context_fn=contexts)


def in_segments(block, hidden):
    return checkpoint.checkpoint_sequential(block.layers, 2, hidden, use_reentrant=False)


def step_gradients(run, **settings):
    model = Checkpointed(run).train()
    batch = {"inputs": torch.randn(6, 8, generator=torch.Generator().manual_seed(1)), "labels": torch.arange(6) % 3}
    step = ComparativeStep(model, [CmpDrop(), CmpDrop()], **settings)
    torch.manual_seed(5)
    step(batch).backward()
    return gradients(model)


@pytest.mark.parametrize(
    "run", [reentrant, non_reentrant, nested, with_contexts_of_its_own, in_segments], ids=lambda run: run.__name__
)
@pytest.mark.parametrize("low_memory", [False, True], ids=["", "low memory"])
def test_checkpointed_blocks_have_the_gradients_of_plain_ones(run, low_memory):
    settings = {"low_memory": low_memory, "forward": "sequential"}
    torch.testing.assert_close(step_gradients(run, **settings), step_gradients(plainly, **settings), rtol=0, atol=1e-8)


def test_a_loss_inside_of_a_checkpointed_function_has_the_same_gradients():
    def loss_of(model, batch):
        return checkpoint.checkpoint(lambda: model(**batch)["loss"], use_reentrant=False)

    found = []
    for loss_fn in (None, loss_of):
        model = Checkpointed(plainly).train()
        batch = {"inputs": torch.ones(6, 8).cumsum(0) / 6, "labels": torch.arange(6) % 3}
        step = ComparativeStep(model, [CmpDrop(), CmpDrop()], forward="sequential")
        torch.manual_seed(5)
        step(batch, loss_fn).backward()
        found.append(gradients(model))
    torch.testing.assert_close(*found)


def test_checkpointing_means_what_it_meant_before_after_a_step_that_raised():
    entry_points = checkpoint._checkpoint_without_reentrant_generator, checkpoint.CheckpointFunction.apply

    def fail(block, hidden):
        raise RuntimeError("in a forward")

    with pytest.raises(RuntimeError, match="in a forward"):
        step_gradients(fail)
    assert checkpoint._checkpoint_without_reentrant_generator is entry_points[0]
    assert checkpoint.CheckpointFunction.apply == entry_points[1]
    assert "apply" not in vars(checkpoint.CheckpointFunction)


class SwitchesCheckpointing(TrainerCallback):
    """Gradient checkpointing on after the second step, off after the fourth."""

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step == 2:
            model.gradient_checkpointing_enable({"use_reentrant": state.global_step % 3 == 0})
        if state.global_step == 4:
            model.gradient_checkpointing_disable()


def test_checkpointing_switched_on_and_off_by_a_callback_trains_the_same_weights(tmp_path):
    plain = cmp_trainer(tmp_path, tiny_bert(), cmp_num_ablations=2)
    plain.train()
    switched = cmp_trainer(tmp_path, tiny_bert(), cmp_num_ablations=2, callbacks=[SwitchesCheckpointing()])
    switched.train()
    torch.testing.assert_close(dict(switched.model.named_parameters()), dict(plain.model.named_parameters()))


def test_ablations_switched_on_under_checkpointing_are_exact(tmp_path):
    class FromStepTwo(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            args.cmp_num_ablations = 2

    runs = []
    checkpointed = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}
    for settings in ({}, checkpointed):
        trainer = cmp_trainer(tmp_path, tiny_bert(), cmp_num_ablations=0, callbacks=[FromStepTwo()], **settings)
        trainer.train()
        assert "loss_ablated_2" in trainer.state.log_history[-2]
        runs.append(trainer.model)
    assert same_weights(*runs)


def test_layers_that_run_their_dropout_again_in_backward_by_themselves_are_rejected():
    torch.manual_seed(0)
    settings = {"hidden_size": 16, "num_attention_heads": 2, "attention_head_size": 8, "feed_forward_size": 16}
    config = ReformerConfig(
        **settings,
        vocab_size=40,
        num_labels=3,
        attn_layers=["local", "local"],
        local_attn_chunk_length=4,
        axial_pos_embds=False,
        max_position_embeddings=32,
        hidden_dropout_prob=0.1,
        local_attention_probs_dropout_prob=0.1,
        is_decoder=False,
    )
    model = ReformerForSequenceClassification(config).train()
    step = ComparativeStep(model, [CmpDrop(), CmpDrop()])
    with pytest.raises(ValueError, match=r"the backward of the model runs .* dropout calls"):
        step(batch_of(token_data()))


def test_checkpointed_blocks_run_again_in_backward():
    """The tests above would say nothing otherwise."""
    model = Checkpointed(non_reentrant).train()
    calls = []
    model.blocks[0].layers[0].register_forward_pre_hook(lambda *_: calls.append(1))
    batch = {"inputs": torch.ones(6, 8), "labels": torch.arange(6) % 3}
    step = ComparativeStep(model, [CmpDrop()], forward="sequential")
    step(batch)
    calls.clear()
    step(batch).backward()
    assert len(calls) == 4  # two forwards, and both again in backward
