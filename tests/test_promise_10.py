"""What is compared is what would have been minimized: with the full model's loss alone, every model trains as without
the plugin when its dropout is off."""

import pytest
import torch
from torch.nn import functional as F
from transformers import Trainer, TrainingArguments

from cmp_trainer import CmpDrop, CmpTrainer, ComparativeStep, RegularizedLoss
from cmp_trainer.execution.ablated import Ablated
from tests.helpers import batch_of, gradients, tiny_bert, token_data, training_arguments
from tests.test_tasks import TASKS, cmp_arguments, one_update, plain_arguments
from tests.tiny_models import AVAILABLE, PROPHETNET, SWITCH

FULL_ALONE = RegularizedLoss(primary="full", weight=0.0)
FULL_ALONE_ARGUMENTS = {"cmp_objective": "regularized", "cmp_primary": "full", "cmp_weight": 0.0}
MODELS = {**AVAILABLE, "prophetnet": PROPHETNET, "switch_transformers": SWITCH}


def same(found, expected):
    """Loss and gradients; parameters that only ablated variants use have gradients of zero."""
    torch.testing.assert_close(found[0], expected[0], rtol=1e-5, atol=1e-6)
    for name, gradient in found[1].items():
        torch.testing.assert_close(gradient, expected[1].get(name, torch.zeros_like(gradient)), rtol=1e-4, atol=1e-6)
    assert expected[1].keys() <= found[1].keys()


@pytest.mark.parametrize("name", MODELS)
def test_every_architecture_keeps_its_own_loss_and_gradients(name):
    model, batch = MODELS[name].build().train(), MODELS[name].batch()
    step = ComparativeStep(model, [CmpDrop(base_rate=0.1)] * 2, FULL_ALONE)
    loss = step(batch)
    loss.backward()
    found = loss.detach(), gradients(model)
    model.zero_grad()
    with Ablated([CmpDrop()], [0]):
        expected = model(**batch).loss
    expected.backward()
    same(found, (expected.detach(), gradients(model)))
    assert step.num_comparisons == 1


@pytest.mark.parametrize("name", MODELS)
def test_exchanged_rows_exchange_their_losses(name):
    model, batch = MODELS[name].build().train(), MODELS[name].batch()
    order = torch.tensor([1, 0])
    exchanged = {key: value[order] if torch.is_tensor(value) else value for key, value in batch.items()}
    step = ComparativeStep(model, [CmpDrop(base_rate=0.1)], forward="sequential")
    losses, others = (step.losses(one).values[:, :, 0] for one in (batch, exchanged))
    torch.testing.assert_close(losses[order], others, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
def test_every_task_trains_as_under_trainer(task, accumulation, tmp_path):
    settings = {"gradient_accumulation_steps": accumulation, "per_device_train_batch_size": 2}
    ours = cmp_arguments(tmp_path, **settings, **FULL_ALONE_ARGUMENTS)
    loss, found = one_update(CmpTrainer, task.model(), task.examples, ours)
    plain = plain_arguments(tmp_path, **settings)
    expected_loss, expected = one_update(Trainer, task.model_without_dropout(), task.examples, plain)
    same((torch.tensor(loss), found), (torch.tensor(expected_loss), expected))


class Focal(Trainer):
    """Computes its loss by itself."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(**{name: value for name, value in inputs.items() if name != "labels"})
        losses = F.cross_entropy(outputs.logits, inputs["labels"], reduction="none")
        loss = ((1 - (-losses).exp()) ** 2 * losses).mean()
        return (loss, outputs) if return_outputs else loss


class Penalized(Trainer):
    """Adds a penalty on activations that the forward left on the model, and one on weights."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        loss = loss + 0.1 * outputs["logits"].square().mean() + 0.01 * model.classifier.weight.square().sum()
        return (loss, outputs) if return_outputs else loss


class ClassWeights(Trainer):
    """Weighs a rare class."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(**{name: value for name, value in inputs.items() if name != "labels"})
        loss = F.cross_entropy(outputs.logits, inputs["labels"], weight=torch.tensor([1.0, 5.0, 2.0]))
        return (loss, outputs) if return_outputs else loss


WAYS = {
    "": {},
    "label smoothing": {"label_smoothing_factor": 0.1},
    "bf16": {"bf16": True},
    "checkpointing": {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
    "compiled": {"torch_compile": True, "torch_compile_backend": "aot_eager"},
    "low memory": {"cmp_low_memory": True},
}


@pytest.mark.parametrize("settings", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize("plugin_first", [True, False], ids=["plugin first", "plugin last"])
@pytest.mark.parametrize("kind", [Trainer, Focal, Penalized, ClassWeights])
def test_every_trainer_trains_as_without_the_plugin(kind, plugin_first, settings, tmp_path):
    bases = (CmpTrainer,) if kind is Trainer else (CmpTrainer, kind) if plugin_first else (kind, CmpTrainer)
    found = []
    no_dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    of_trainer = {name: value for name, value in settings.items() if not name.startswith("cmp_")}
    plain = training_arguments(tmp_path, TrainingArguments, **of_trainer)
    ours = training_arguments(tmp_path, cmp_num_ablations=2, **FULL_ALONE_ARGUMENTS, **settings)
    for trainer in (kind(tiny_bert(**no_dropout), plain), type("Cmp", bases, {})(tiny_bert(), ours)):
        trainer.create_optimizer()
        trainer.current_gradient_accumulation_steps = 2
        model = trainer.model
        if settings.get("gradient_checkpointing"):
            model.gradient_checkpointing_enable(settings["gradient_checkpointing_kwargs"])
        loss = trainer.training_step(trainer.accelerator.prepare(model), batch_of(token_data()), torch.tensor(8))
        found.append((loss, gradients(model)))
    if settings.get("bf16"):
        torch.testing.assert_close(found[0][0], found[1][0], rtol=2e-2, atol=0)
        return
    same(found[1], found[0])


@pytest.mark.parametrize("ablations", [0, 2])
def test_a_compute_loss_func_is_what_is_minimized(ablations, tmp_path):
    def doubled(outputs, labels, num_items_in_batch=None):
        return 2 * F.cross_entropy(outputs.logits, labels)

    settings = FULL_ALONE_ARGUMENTS if ablations else {}
    args = training_arguments(tmp_path, cmp_num_ablations=ablations, **settings)
    trainer = CmpTrainer(tiny_bert(), args, compute_loss_func=doubled)
    loss = trainer.compute_loss(trainer.model.train(), batch_of(token_data()))
    if ablations:
        torch.testing.assert_close(loss, 2 * trainer.model.eval()(**batch_of(token_data())).loss)
    else:
        assert loss.requires_grad
