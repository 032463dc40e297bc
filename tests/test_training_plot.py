"""Watching a run: trackers, the progress bar and the picture show the losses of the variants."""

import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from cmp_trainer.reports.training_plot import TrainingPlot, VariantsInProgressBar, plot_training
from tests.helpers import cmp_trainer, tiny_bert, token_data

VARIANTS = ["loss_full", "loss_ablated_1", "loss_ablated_2"]


def test_tensorboard_has_the_variants_beside_the_training_loss(tmp_path):
    trainer = cmp_trainer(tmp_path, cmp_num_ablations=2, report_to=["tensorboard"])
    trainer.train()
    (events,) = tmp_path.rglob("events.out.tfevents*")
    scalars = EventAccumulator(str(events)).Reload()
    expected = {f"train/{name}" for name in ["loss", *VARIANTS, "violation_rate"]}
    assert expected <= set(scalars.Tags()["scalars"])
    logged = [log["loss_ablated_2"] for log in trainer.state.log_history if "loss_ablated_2" in log]
    assert [event.value for event in scalars.Scalars("train/loss_ablated_2")] == pytest.approx(logged)


def test_evaluation_is_a_group_of_its_own(tmp_path):
    settings = {"report_to": ["tensorboard"], "eval_strategy": "steps", "eval_steps": 3, "cmp_eval_ablations": True}
    cmp_trainer(tmp_path, cmp_num_ablations=2, **settings).train()
    (events,) = tmp_path.rglob("events.out.tfevents*")
    scalars = EventAccumulator(str(events)).Reload().Tags()["scalars"]
    assert {f"eval/{name}" for name in ["loss", *VARIANTS, "violation_rate"]} <= set(scalars)


def test_the_progress_bar_shows_each_variant(tmp_path, capsys):
    cmp_trainer(tmp_path, cmp_num_ablations=2, disable_tqdm=False).train()
    shown = capsys.readouterr().err
    assert all(f"{name}=" in shown for name in ("full", "ablated_1", "ablated_2", "violation_rate"))


def test_without_a_progress_bar_none_is_added(tmp_path):
    handler = cmp_trainer(tmp_path, cmp_num_ablations=1).callback_handler
    assert not any(isinstance(callback, VariantsInProgressBar) for callback in handler.callbacks)


def test_the_picture_is_there_while_the_run_goes_on_and_holds_all_of_it_at_the_end(tmp_path):
    plot = TrainingPlot(min_seconds=0)
    trainer = cmp_trainer(tmp_path, cmp_num_ablations=2, callbacks=[plot], eval_strategy="steps", eval_steps=2)
    trainer.train()
    assert imread(tmp_path / "training_plot.png").shape[:2] == (340, 900)
    assert not list(tmp_path.glob("_*"))
    losses, violations = plot_training(trainer.state.log_history).axes
    assert [text.get_text() for text in losses.get_legend().get_texts()] == [
        "full",
        "ablated 1",
        "ablated 2",
        "evaluation",
    ]
    assert list(losses.lines[0].get_xdata()) == [2, 4, 6]
    assert (losses.get_ylabel(), violations.get_ylabel()) == ("task loss (nats)", "pairs in violation (share)")


def test_losses_of_a_regression_are_not_counted_in_nats(tmp_path, monkeypatch):
    units = []
    monkeypatch.setattr(
        "cmp_trainer.reports.training_plot.plot_training", lambda log, unit: units.append(unit) or Figure()
    )
    data = token_data()
    scores = data.remove_columns("labels").add_column("labels", [float(label) for label in data["labels"]])
    for model, rows in ((tiny_bert(num_labels=1), scores), (tiny_bert(), data)):
        cmp_trainer(tmp_path, model, rows, max_steps=1, cmp_num_ablations=1, callbacks=[TrainingPlot()]).train()
    assert list(dict.fromkeys(units)) == [None, "nats"]
    assert plot_training([], loss_unit=None).axes[0].get_ylabel() == "task loss"


def test_a_picture_is_not_redrawn_before_its_time(tmp_path):
    plot = TrainingPlot(tmp_path / "plot.png", min_seconds=3600)
    trainer = cmp_trainer(tmp_path, cmp_num_ablations=1)
    plot.on_log(trainer.args, trainer.state, trainer.control)
    first = (tmp_path / "plot.png").stat().st_mtime_ns
    plot.on_log(trainer.args, trainer.state, trainer.control)
    assert (tmp_path / "plot.png").stat().st_mtime_ns == first
    plot.on_train_end(trainer.args, trainer.state, trainer.control)
    assert (tmp_path / "plot.png").stat().st_mtime_ns > first


def test_plain_training_has_a_picture_too(tmp_path):
    trainer = cmp_trainer(tmp_path, callbacks=[TrainingPlot()])
    trainer.train()
    assert plot_training(trainer.state.log_history).axes[0].lines


def test_a_plot_that_cannot_be_written_is_a_warning_and_training_goes_on(tmp_path, caplog, monkeypatch):
    def full_disk(self, *args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Figure, "savefig", full_disk)
    trainer = cmp_trainer(tmp_path, cmp_num_ablations=1, callbacks=[TrainingPlot(min_seconds=0)])
    assert trainer.train().global_step == 6
    assert "training_plot.png could not be written: [Errno 28] No space left on device" in caplog.text
