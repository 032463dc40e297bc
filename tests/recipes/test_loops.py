"""Loops without a Trainer: ComparativeStep gives Lightning, Accelerate and plain PyTorch what CmpTrainer trains."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from datasets import Dataset
from torch import nn
from torch.utils.data import DataLoader
from transformers import TrainerCallback

from cmp_trainer import CmpDrop, CmpTrainer, ComparativeLoss, ComparativeStep, RegularizedLoss
from tests.helpers import batch_of, gradients, tiny_bert, token_data, training_arguments
from tests.recipes.recipe import COMPARED, QUIET, VARIANT_LOSSES, largest_difference

STEPS, ROWS, RATE = 3, 4, QUIET["learning_rate"]
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def new_step(model: nn.Module, objective: Any = None) -> ComparativeStep:
    return ComparativeStep(model, ablations=[CmpDrop(), CmpDrop()], objective=objective or ComparativeLoss())


def batches(data: Dataset) -> DataLoader:
    """The batches in their order."""
    return DataLoader(data.with_format("torch"), batch_size=ROWS)


def with_trainer(model: nn.Module, data: Dataset, folder: Any) -> None:
    """CmpTrainer, with one seed a step."""

    class Seed(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            torch.manual_seed(state.global_step)

    settings = {**QUIET, "max_steps": STEPS, "train_sampling_strategy": "sequential", **COMPARED}
    args = training_arguments(folder, **settings)
    CmpTrainer(model=model, args=args, train_dataset=data, callbacks=[Seed()]).train()


def with_pytorch(model: nn.Module, data: Dataset, _) -> None:
    optimizer, step = torch.optim.SGD(model.parameters(), lr=RATE), new_step(model)
    for seed, batch in enumerate(batches(data)):
        torch.manual_seed(seed)
        step(batch).backward()
        optimizer.step(), optimizer.zero_grad()


def with_accelerate(model: nn.Module, data: Dataset, _) -> None:
    accelerator = Accelerator(cpu=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    prepared, optimizer, loader = accelerator.prepare(model, optimizer, batches(data))
    step = new_step(prepared)
    for seed, batch in enumerate(loader):
        torch.manual_seed(seed)
        accelerator.backward(step(batch))
        optimizer.step(), optimizer.zero_grad()


def with_lightning(model: nn.Module, data: Dataset, folder: Any) -> None:
    lightning = pytest.importorskip("lightning", reason="this recipe needs `pip install lightning`")

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.model, self.comparative_step = model, new_step(model)

        def training_step(self, batch, batch_index):
            torch.manual_seed(batch_index)
            return self.comparative_step(batch)

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=RATE)

    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = lightning.Trainer(
        accelerator="cpu", max_epochs=1, default_root_dir=folder, enable_model_summary=False, **quiet
    )
    trainer.fit(Module(), batches(data))


@pytest.mark.parametrize("loop", [with_pytorch, with_accelerate, with_lightning])
def test_a_loop_trains_the_weights_of_the_trainer(loop: Callable, tmp_path):
    data = token_data(STEPS * ROWS)
    initial, expected, trained = (dict(tiny_bert().state_dict()), tiny_bert(), tiny_bert())
    with_trainer(expected, data, tmp_path / "trainer")
    loop(trained, data, tmp_path / "loop")
    assert largest_difference(initial, expected.state_dict()) > 1e-3
    assert largest_difference(expected.state_dict(), trained.state_dict()) < 1e-6


def test_a_step_gives_the_loss_and_gradients_of_the_trainer(tmp_path):
    model, batch = tiny_bert().train(), batch_of(token_data())
    trainer = CmpTrainer(model=tiny_bert(), args=training_arguments(tmp_path, **COMPARED))
    torch.manual_seed(0)
    loss = new_step(model)(batch)
    loss.backward()
    torch.manual_seed(0)
    expected = trainer.compute_loss(trainer.model.train(), dict(batch))
    expected.backward()
    torch.testing.assert_close(loss, expected)
    assert largest_difference(gradients(model), gradients(trainer.model)) < 1e-6


def test_a_loss_function_is_compared_as_the_models_own_loss():
    def cross_entropy(model, batch):
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        return nn.functional.cross_entropy(model(**inputs).logits, batch["labels"])

    batch, results = batch_of(token_data()), []
    for loss_fn in ((), (cross_entropy,)):
        model = tiny_bert().train()
        torch.manual_seed(0)
        loss = new_step(model)(batch, *loss_fn)
        loss.backward()
        results.append({"loss": loss.detach(), **gradients(model)})
    assert largest_difference(*results) < 1e-6


def test_the_full_loss_alone_is_the_loss_without_dropout():
    model, plain, batch = tiny_bert().train(), tiny_bert(**NO_DROPOUT).train(), batch_of(token_data())
    loss, expected = new_step(model, RegularizedLoss(primary="full", weight=0))(batch), plain(**batch).loss
    loss.backward(), expected.backward()
    torch.testing.assert_close(loss, expected)
    assert largest_difference(gradients(model), gradients(plain)) < 1e-6


def test_a_step_logs_the_loss_of_every_variant_once():
    model, batch = tiny_bert().train(), batch_of(token_data())
    step = new_step(model)
    step(batch)
    logged = step.log()
    assert logged.keys() == {*VARIANT_LOSSES, "violation_rate"}
    assert logged["loss_full"] == pytest.approx(model.eval()(**batch).loss.item(), abs=1e-5)
    assert not step.log()


def test_a_model_left_in_eval_mode_is_an_error():
    """Lightning leaves the mode as it is, and from_pretrained returns models in eval mode, where nothing drops."""
    with pytest.raises(Exception, match=r"eval|train|drop"):
        new_step(tiny_bert().eval())(batch_of(token_data()))
