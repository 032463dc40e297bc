"""ComparativeStep: the loss and gradients of CmpTrainer in loops of one's own."""

import gc
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from cmp_trainer import CmpCrop, CmpDrop, ComparativeLoss, ComparativeStep, RegularizedLoss, plan
from cmp_trainer.losses.comparative import comparative_loss
from tests.helpers import batch_of, cmp_trainer, free_port, gradients, tiny_bert, token_data
from tests.scripts import step_in_accelerate


def loss_and_gradients(step, model, batch, *loss_fn):
    torch.manual_seed(5)
    model.zero_grad()
    loss = step(batch, *loss_fn)
    loss.backward()
    return loss.detach(), gradients(model)


@pytest.mark.parametrize("forward", ["sequential", "stacked"])
def test_the_step_has_the_loss_and_gradients_of_the_trainer(forward, tmp_path):
    model, batch = tiny_bert().train(), batch_of(token_data())
    step = ComparativeStep(model, plan(2), ComparativeLoss(baseline="first"), forward=forward)
    ours = loss_and_gradients(step, model, batch)
    trainer = cmp_trainer(tmp_path, model, cmp_num_ablations=2, cmp_baseline="first", cmp_forward=forward)
    torch.manual_seed(5)
    model.zero_grad()
    loss = trainer.compute_loss(model, dict(batch))
    loss.backward()
    torch.testing.assert_close(ours, (loss.detach(), gradients(model)), rtol=0, atol=0)


@pytest.mark.parametrize("layers", [None, 1])
@pytest.mark.parametrize(
    "execution", [{"forward": "sequential"}, {"forward": "stacked"}, {"low_memory": True}], ids=str
)
def test_no_tensor_of_a_step_waits_for_python_to_look_for_cycles(execution, layers):
    model, batch = tiny_bert().train(), batch_of(token_data())
    step = ComparativeStep(model, plan(2), ablated_layers=layers, **execution)
    for _ in range(2):  # the first one makes the checks
        gc.collect()
        gc.disable()
        gc.set_debug(gc.DEBUG_SAVEALL)
        try:
            step(batch).backward()
            model.zero_grad()
            gc.collect()
            # other tests leave fake tensors of torch.compile behind, which may become garbage now
            waiting = [one for one in gc.garbage if type(one) is torch.Tensor]
        finally:
            gc.set_debug(0)
            gc.garbage.clear()
            gc.enable()
        assert not waiting


@pytest.mark.parametrize(
    ("forward", "low_memory", "penalty"),
    [("stacked", False, 0.0), ("sequential", False, 0.0), ("sequential", True, 0.0), ("sequential", False, 0.1)],
)
def test_the_first_step_logs_what_is_compared_and_how(forward, low_memory, penalty, caplog):
    def penalized(model, batch):
        loss = model(**batch).loss
        return loss + penalty * model.classifier.weight.square().sum() if penalty else loss

    penalized.stackable = True
    step = ComparativeStep(tiny_bert().train(), plan(2), forward=forward, low_memory=low_memory)
    with caplog.at_level("INFO", logger="cmp_trainer"):
        for _ in range(2):
            step(batch_of(token_data()), penalized).backward()
    (line,) = [record.getMessage() for record in caplog.records if "comparing" in record.getMessage()]
    how = "in one stacked forward" if forward == "stacked" else "in one forward per variant"
    how += ", without a graph first and then with one (low memory)" if low_memory else ""
    assert f"comparing full, ablated_1, ablated_2 {how}. The loss comes from penalized; " in line
    assert "each example's loss is read from cross_entropy at " in line
    assert line.endswith("added once, from the full model.") == bool(penalty)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("penalty", [False, True])
def test_what_rounding_leaves_of_a_loss_is_no_part_that_belongs_to_no_example(dtype, penalty):
    def loss_fn(model, batch):
        loss = model(**batch).loss
        return loss + model.classifier.weight.square().sum() if penalty else loss

    loss_fn.stackable = True
    model = tiny_bert().train()
    if penalty:
        nn.init.constant_(model.classifier.weight, 0.3)
    step = ComparativeStep(model.to(dtype), plan(2), forward="stacked")
    if not penalty:
        return step(batch_of(token_data()), loss_fn).backward()
    with pytest.raises(ValueError, match="does not work for this model: part of its loss belongs to no example"):
        step(batch_of(token_data()), loss_fn)


@pytest.mark.parametrize("shares", [(1.0, 1.0), (0.3, 0.7)], ids=["sum", "average"])
def test_the_logged_loss_of_a_sum_or_an_average_of_two_losses_is_that_loss(shares):
    def loss_fn(model, batch):
        logits = model(**batch).logits
        scores = F.mse_loss(logits, F.one_hot(batch["labels"], 3).float())
        return shares[0] * F.cross_entropy(logits, batch["labels"]) + shares[1] * scores

    model, batch = tiny_bert().train(), batch_of(token_data())
    step = ComparativeStep(model, plan(2))
    step(batch, loss_fn)
    with torch.no_grad():
        expected = loss_fn(model.eval(), batch)
    assert step.log()["loss_full"] == pytest.approx(float(expected), rel=1e-5)


def test_the_random_state_after_a_step_is_where_one_forward_leaves_it():
    model, batch = tiny_bert().train(), batch_of(token_data())
    step = ComparativeStep(model, plan(2))
    loss_and_gradients(step, model, batch)
    after = torch.rand(1)
    torch.manual_seed(5)
    model(**batch)
    assert torch.equal(after, torch.rand(1))


def test_the_devices_of_a_step_are_those_of_its_parameters_now_and_of_its_batch(monkeypatch):
    """A part of the model may be replaced between two steps; and each step asks, so it is not to take long."""
    model, batch = tiny_bert().train(), batch_of(token_data())
    model.again = model.classifier  # a module in two places
    model.again.cycle = model
    step, calls = ComparativeStep(model, plan(2)), []
    for slow in ("named_parameters", "named_modules"):
        monkeypatch.setattr(nn.Module, slow, lambda *args, slow=slow, **kwargs: calls.append(slow) or iter(()))
    assert step.devices(batch) == {torch.device("cpu")}
    both = {torch.device("cpu"), torch.device("meta")}
    model.classifier.weight = nn.Parameter(torch.empty(3, 16, device="meta"))
    assert step.devices(batch) == both
    model.classifier = model.again = nn.Linear(16, 3)
    assert step.devices(batch) == {torch.device("cpu")}
    assert step.devices({"x": torch.ones(2, device="meta")}) == both
    assert not calls


def test_a_plain_loop_learns_and_logs_the_variants():
    model, batch = tiny_bert().train(), batch_of(token_data(), range(8))
    step = ComparativeStep(model, plan(2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    logs = []
    for _ in range(20):
        optimizer.zero_grad()
        step(batch).backward()
        optimizer.step()
        logs.append(step.log())
    assert list(logs[0]) == ["loss_full", "loss_ablated_1", "loss_ablated_2", "violation_rate"]
    assert logs[-1]["loss_full"] < 0.5 * logs[0]["loss_full"]
    assert step.log() == {}


def test_a_loss_function_of_the_loop_is_compared():
    model, batch = tiny_bert().train(), batch_of(token_data())

    def smoothed(model, batch):
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        return F.cross_entropy(logits, batch["labels"], label_smoothing=0.2)

    seen = []
    step = ComparativeStep(model, plan(2), lambda losses: (seen.append(losses), comparative_loss(losses))[1])
    loss, _ = loss_and_gradients(step, model, batch, smoothed)
    (losses,) = seen[-1:]
    assert losses.shape == (4, 1, 3)
    full = F.cross_entropy(model.eval()(**batch).logits, batch["labels"], label_smoothing=0.2, reduction="none")
    torch.testing.assert_close(losses[:, 0, 0].detach(), full.detach())
    torch.testing.assert_close(loss, comparative_loss(losses.detach()).mean())


def test_any_callable_is_an_objective():
    model, batch = tiny_bert().train(), batch_of(token_data())
    last = loss_and_gradients(ComparativeStep(model, plan(2), lambda losses: losses[..., -1]), model, batch)
    expected = loss_and_gradients(
        ComparativeStep(model, plan(2), RegularizedLoss(primary="last", weight=0.0)), model, batch
    )
    torch.testing.assert_close(last, expected)


def test_low_memory_has_the_gradients_of_the_ordinary_step_whatever_scales_the_loss():
    model, batch = tiny_bert().train(), batch_of(token_data())
    found = []
    for low_memory in (False, True):
        step = ComparativeStep(model, plan(3), forward="sequential", low_memory=low_memory)
        torch.manual_seed(5)
        model.zero_grad()
        (3 * step(batch)).backward()
        found.append(gradients(model))
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-8)


def test_tuples_and_tensors_are_batches_too():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.3), nn.Linear(8, 3)).train()
    batch = (torch.randn(6, 4), torch.arange(6) % 3)

    def loss_fn(model, batch):
        inputs, labels = batch
        return F.cross_entropy(model(inputs), labels)

    step = ComparativeStep(model, plan(2))
    loss, _ = loss_and_gradients(step, model, batch, loss_fn)
    assert loss > 0
    assert 0 < step.log()["loss_full"] < 3


def test_a_step_in_eval_mode_is_rejected():
    model = tiny_bert().eval()
    with pytest.raises(ValueError, match=r"in eval mode .*Call model\.train\(\)"):
        ComparativeStep(model, plan(2))(batch_of(token_data()))


@pytest.mark.parametrize(
    ("ablations", "message"),
    [([], "no ablations"), ([CmpDrop], r"CmpDrop is a class; pass an object"), ([2], "2 is not an ablation")],
)
def test_what_is_no_ablation_is_rejected(ablations, message):
    with pytest.raises(ValueError, match=message):
        ComparativeStep(tiny_bert(), ablations)


def test_all_problems_of_a_setting_are_reported_together():
    with pytest.raises(ValueError, match=r"forward 'fast' is unknown(.|\n)*give one for each drop"):
        ComparativeStep(tiny_bert(), [CmpDrop(rates=(0.1,))] * 2, forward="fast")


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    """What each of two processes saved; accelerate launches them, and they talk through gloo."""
    folder, root = tmp_path_factory.mktemp("two"), Path(__file__).parent.parent
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes=2"]
    done = subprocess.run(
        [*launcher, f"--main_process_port={free_port()}", step_in_accelerate.__file__, str(folder)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [torch.load(folder / f"rank_{rank}.pt") for rank in range(2)]


@pytest.mark.xdist_group("accelerate")
@pytest.mark.parametrize("setting", step_in_accelerate.SETTINGS)
def test_a_loop_in_two_processes_trains_as_one_that_accumulates(setting, two_processes):
    alone = step_in_accelerate.train(2, **step_in_accelerate.SETTINGS[setting])
    tolerance = {"rtol": 0.05, "atol": 5e-3} if setting == "bf16" else {}
    for result in two_processes:
        torch.testing.assert_close(result[setting], alone, **tolerance)


def whole_in_place(model, backend):
    model.compile(backend=backend)
    return model


def whole(model, backend):
    return torch.compile(model, backend=backend)


def layers(model, backend):
    model.bert.compile(backend=backend)
    return model


@pytest.mark.parametrize("compiled", [whole_in_place, whole, layers], ids=lambda way: way.__name__)
def test_a_backend_that_runs_captured_calls_again_is_rejected(compiled):
    with pytest.raises(ValueError, match="'eager', which runs the captured dropout calls under CmpDrop a second time"):
        ComparativeStep(compiled(tiny_bert().train(), "eager"), plan(2))


def test_a_model_compiled_in_place_with_its_loss_is_rejected_with_the_way_out():
    step = ComparativeStep(whole_in_place(tiny_bert().train(), "aot_eager"), plan(2))
    with pytest.raises(ValueError, match=r"Compile `model\.base_model` in place of the model"):
        step(batch_of(token_data()))


@pytest.mark.parametrize("compiled", [whole, layers], ids=lambda way: way.__name__)
def test_a_compiled_model_has_the_gradients_of_the_plain_one(compiled):
    batch, found = batch_of(token_data()), []
    for way in (lambda model, backend: model, compiled):
        model = tiny_bert().train()
        step = ComparativeStep(way(model, "aot_eager"), plan(2), forward="sequential")
        loss, by_name = loss_and_gradients(step, model, batch)
        found.append((loss, by_name))
    torch.testing.assert_close(*found)


def test_crops_after_drops_are_the_same_at_every_number_of_drops():
    batch = batch_of(token_data())
    batch["crop_segments"] = torch.tensor([[0, 0, 1, 2, 3, 4, 5, 6]] * 4)
    crop, drop = CmpCrop(), CmpDrop()
    step = ComparativeStep(tiny_bert(), [drop, crop, drop, crop])
    batches = step._batches(batch, step.variants)
    for crops in range(3):
        for drops in (1, 2):
            torch.testing.assert_close(batches[drops, crops], batches[0, crops], rtol=0, atol=0)
    assert step.variants[-1].levels == (2, 2)
