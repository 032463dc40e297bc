"""A training is resumed from complete checkpoints only, and from all that the Trainer resumes from."""

import dataclasses
import json
import os
import shutil
import signal
from pathlib import Path

import pytest
from transformers import Trainer, TrainerCallback

from cmp_trainer import CmpTrainer, CmpTrainingArguments
from cmp_trainer.saving.checkpoints import RECORD, checkpoint_to_resume, fault_of, recorded
from tests.helpers import cmp_trainer, same_weights

SAVING = {"cmp_num_ablations": 1, "save_strategy": "steps", "save_steps": 2, "max_steps": 6}


class Interruption(Exception):
    """Stands for a kill in the middle of a save."""


def interrupted_run(folder):
    """A run that dies in the save of step 4, after the model was written."""
    trainer = cmp_trainer(folder, **SAVING)
    save = trainer._save_optimizer_and_scheduler

    def fail_at_four(output_dir):
        if trainer.state.global_step == 4:
            raise Interruption
        save(output_dir)

    trainer._save_optimizer_and_scheduler = fail_at_four
    with pytest.raises(Interruption):
        trainer.train()
    return folder


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a run that came to its end, to be copied."""
    folder = tmp_path_factory.mktemp("finished")
    cmp_trainer(folder, **SAVING).train()
    return folder


@pytest.fixture
def run(finished, tmp_path):
    """A copy of that run, to be damaged."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


def resumed(folder, resume_from=True, **changes):
    trainer = cmp_trainer(folder, **{**SAVING, "max_steps": 8, **changes})
    trainer.train(resume_from_checkpoint=resume_from)
    return trainer


def cut(file):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def test_an_interrupted_save_is_skipped_and_both_checkpoints_are_named(tmp_path, caplog):
    interrupted_run(tmp_path)
    assert (tmp_path / "checkpoint-4" / "model.safetensors").is_file()
    assert checkpoint_to_resume(True, str(tmp_path)) == str(tmp_path / "checkpoint-2")
    assert "checkpoint-4 is incomplete (trainer_state.json, which is written last, is missing" in caplog.text
    assert f"is skipped; resuming from {tmp_path / 'checkpoint-2'}." in caplog.text


def test_resuming_after_an_interrupted_save_ends_at_the_weights_of_the_unbroken_run(finished, tmp_path):
    interrupted_run(tmp_path)
    trainer = resumed(tmp_path, max_steps=6)
    whole = cmp_trainer(finished, **SAVING)
    whole._load_from_checkpoint(str(finished / "checkpoint-6"))
    assert same_weights(whole.model, trainer.model)
    assert fault_of(tmp_path / "checkpoint-4") is None  # saved again, to its end


def test_a_save_into_a_folder_that_exists_makes_it_incomplete_until_its_end(run):
    assert fault_of(run / "checkpoint-4") is None
    shutil.rmtree(run / "checkpoint-6")
    interrupted_run(run)
    assert "the save was interrupted" in fault_of(run / "checkpoint-4")


@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "config.json"])
@pytest.mark.parametrize("kept", ["half", "nothing"])
@pytest.mark.parametrize("has_record", [True, False])
def test_a_truncated_file_is_noticed_and_the_checkpoint_before_is_taken(file, kept, has_record, run, caplog):
    damaged = run / "checkpoint-6" / file
    damaged.write_bytes(damaged.read_bytes()[: damaged.stat().st_size // 2 if kept == "half" else 0])
    if not has_record:  # as a plain Trainer saves
        (run / "checkpoint-6" / RECORD).unlink()
    assert checkpoint_to_resume(True, str(run)) == str(run / "checkpoint-4")
    assert f"checkpoint-6 is incomplete ({file} is truncated) and is skipped; resuming from" in caplog.text


def test_a_file_whose_end_cannot_be_told_is_truncated_where_its_record_says_more(run):
    checkpoint, none = run / "checkpoint-6", lambda: None
    state = (checkpoint / "trainer_state.json").read_text()
    with recorded(checkpoint, True, none):
        (checkpoint / "trainer_state.json").write_text(state)
        (checkpoint / "__0_0.distcp").write_bytes(b"a shard of FSDP")
    assert fault_of(checkpoint) is None
    (checkpoint / "__0_0.distcp").write_bytes(b"a shard of FSD")
    assert fault_of(checkpoint) == "__0_0.distcp is truncated"


def test_a_checkpoint_whose_weights_were_deleted_is_skipped(run):
    (run / "checkpoint-6" / "model.safetensors").unlink()
    assert fault_of(run / "checkpoint-6") == "model.safetensors was deleted"
    assert checkpoint_to_resume(True, str(run)) == str(run / "checkpoint-4")


@pytest.mark.parametrize("state", [b"", b'{"global_step": 6', b"\xff\xfe", b"[]"])
def test_a_damaged_state_is_no_end_of_a_save(state, run):
    (run / "checkpoint-6" / "trainer_state.json").write_bytes(state)
    assert "trainer_state.json, which is written last, is damaged" in fault_of(run / "checkpoint-6")


@pytest.mark.parametrize("lost", [["optimizer.pt"], ["scheduler.pt"], ["rng_state.pth"]], ids=lambda files: files[0])
def test_what_the_trainer_resumes_without_is_only_warned_of(lost, run, caplog):
    for file in lost:
        (run / "checkpoint-6" / file).unlink()
    assert resumed(run).state.global_step == 8
    what = {"optimizer.pt": "optimizer", "scheduler.pt": "learning rate scheduler", "rng_state.pth": "random state"}
    assert f"checkpoint-6 has no saved {what[lost[0]]}; training resumes with a new one." in caplog.text


def test_a_checkpoint_of_the_model_only_is_resumed(tmp_path, caplog):
    cmp_trainer(tmp_path, **SAVING, save_only_model=True).train()
    assert resumed(tmp_path).state.global_step == 8
    assert "has no saved optimizer and no learning rate scheduler and no random state" in caplog.text


def test_sharded_weights_are_resumed_and_a_lost_shard_is_noticed(run):
    checkpoint = run / "checkpoint-6"
    model = cmp_trainer(run, **SAVING).model
    (checkpoint / "model.safetensors").unlink()
    (checkpoint / RECORD).unlink()
    model.save_pretrained(checkpoint, max_shard_size="5KB")
    shards = sorted(checkpoint.glob("model-*.safetensors"))
    assert len(shards) > 1
    assert resumed(run, cmp_num_ablations=1).state.global_step == 8
    cut(shards[-1])
    assert fault_of(checkpoint) == f"{shards[-1].name} is truncated"


def test_texts_in_a_checkpoint_may_be_edited(run):
    (run / "checkpoint-6" / "config.json").write_text(
        json.dumps(json.loads((run / "checkpoint-6" / "config.json").read_text()))
    )
    (run / "checkpoint-6" / "notes.md").write_text("")
    assert fault_of(run / "checkpoint-6") is None


@pytest.mark.parametrize("name", ["checkpoint-old-100", "checkpoint-run2-step-9", "checkpoint-", "checkpoint-best"])
def test_folders_with_other_names_are_not_resumed_from(name, run):
    shutil.copytree(run / "checkpoint-2", run / name)
    (run / "checkpoint-99").write_text("a file")
    assert checkpoint_to_resume(True, str(run)) == str(run / "checkpoint-6")


@pytest.mark.parametrize(
    "record", [b"", b'{"model.saf', b"null", b"\xff\xfe\x00", b"[1, 2]", b'{"optimizer.pt": null}']
)
def test_a_damaged_record_is_ignored_and_written_anew(record, run):
    (run / "checkpoint-6" / RECORD).write_bytes(record)
    assert resumed(run, run / "checkpoint-6").state.global_step == 8
    shutil.copy(run / "checkpoint-8" / RECORD, run / "kept.json")
    (run / "checkpoint-8" / RECORD).write_bytes(record)
    shutil.rmtree(run / "checkpoint-2")
    resumed(run, run / "checkpoint-6")
    assert (run / "checkpoint-8" / RECORD).read_text() == (run / "kept.json").read_text()


def test_nothing_is_written_beside_the_checkpoints(run):
    assert sorted(path.name for path in run.iterdir()) == ["checkpoint-2", "checkpoint-4", "checkpoint-6"]


def test_the_record_names_every_file_with_its_size(run):
    checkpoint = run / "checkpoint-6"
    sizes = {path.name: path.stat().st_size for path in checkpoint.iterdir() if path.name != RECORD}
    assert json.loads((checkpoint / RECORD).read_text()) == sizes


def test_a_save_reads_no_other_checkpoint(run, monkeypatch):
    for other in ("checkpoint-2", "checkpoint-4"):
        shutil.rmtree(run / other)
        (run / other).mkdir(mode=0o000)
    read, read_text = [], Path.read_text

    def noted(self, *args, **kwargs):
        read.append(self)
        return read_text(self, *args, **kwargs)

    monkeypatch.setattr(Path, "read_text", noted)
    cmp_trainer(run, **SAVING).train()
    assert not [path for path in read if "checkpoint" in str(path)]


def test_without_ablations_a_run_writes_and_resumes_what_a_plain_one_does(tmp_path):
    plain, ours = (
        cmp_trainer(tmp_path / kind.__name__, kind=kind, **{**SAVING, "cmp_num_ablations": 0})
        for kind in (Trainer, CmpTrainer)
    )
    plain.train()
    ours.train()
    files = [
        sorted(str(path.relative_to(one.args.output_dir)) for path in Path(one.args.output_dir).rglob("*"))
        for one in (plain, ours)
    ]
    assert files[0] == files[1]
    cut(Path(ours.args.output_dir, "checkpoint-6", "trainer_state.json"))
    with pytest.raises(json.JSONDecodeError):  # Trainer's own error
        resumed(ours.args.output_dir, cmp_num_ablations=0)


def test_checkpoints_of_a_plain_trainer_are_resumed_from(tmp_path):
    cmp_trainer(tmp_path, kind=Trainer, **{**SAVING, "cmp_num_ablations": 0}).train()
    assert resumed(tmp_path).state.global_step == 8
    assert (tmp_path / "checkpoint-8" / RECORD).is_file() and not (tmp_path / "checkpoint-6" / RECORD).exists()


def test_a_checkpoint_copied_elsewhere_is_complete(run, tmp_path):
    copied = Path(shutil.copytree(run / "checkpoint-6", tmp_path / "copies" / "best"))
    assert checkpoint_to_resume(copied, str(run)) == str(copied)


def test_an_incomplete_checkpoint_is_rejected_by_path_with_the_trainers_own_words(tmp_path):
    interrupted_run(tmp_path)
    with pytest.raises(ValueError, match=r"Can't find a valid checkpoint at .*checkpoint-4: trainer_state.json"):
        resumed(tmp_path, str(tmp_path / "checkpoint-4"))
    with pytest.raises(ValueError, match=r"Can't find a valid checkpoint at .*nowhere: there is no such folder"):
        resumed(tmp_path, tmp_path / "nowhere")


def test_no_complete_checkpoint_is_said_with_what_was_found_and_what_to_do(tmp_path):
    message = r"No valid checkpoint found in output directory \(.*Start a new training without"
    with pytest.raises(ValueError, match=message):
        resumed(tmp_path / "nowhere")
    (tmp_path / "checkpoint-9").mkdir()
    with pytest.raises(ValueError, match=r"checkpoint-9 is incomplete .* Remove what is incomplete and start without"):
        resumed(tmp_path)


@pytest.mark.parametrize("nothing", [None, False])
def test_not_resuming_is_left_alone(nothing, run):
    assert resumed(run, nothing, max_steps=2).state.global_step == 2


def test_a_record_that_cannot_be_written_is_a_warning(tmp_path, caplog, monkeypatch):
    write_text = Path.write_text

    def full_disk(self, *args, **kwargs):
        if self.name == RECORD:
            raise OSError(28, "No space left on device")
        return write_text(self, *args, **kwargs)

    monkeypatch.setattr(Path, "write_text", full_disk)
    cmp_trainer(tmp_path, **SAVING).train()
    assert "could not record the file sizes of" in caplog.text
    assert "[Errno 28] No space left on device" in caplog.text
    assert fault_of(tmp_path / "checkpoint-6") is None


HAS_JIT_CHECKPOINTS = "enable_jit_checkpoint" in {field.name for field in dataclasses.fields(CmpTrainingArguments)}


@pytest.mark.skipif(not HAS_JIT_CHECKPOINTS, reason="this transformers saves no checkpoint on SIGTERM")
@pytest.mark.parametrize("ablations", [0, 1])
def test_a_checkpoint_saved_on_sigterm_is_resumed(ablations, tmp_path):
    settings = {**SAVING, "cmp_num_ablations": ablations, "save_strategy": "no", "enable_jit_checkpoint": True}
    trainer = cmp_trainer(tmp_path, **{**settings, "max_steps": 100_000})
    (manager,) = (one.jit_manager for one in trainer.callback_handler.callbacks if hasattr(one, "jit_manager"))
    manager.kill_wait = 0

    class Terminates(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 2:
                os.kill(os.getpid(), signal.SIGTERM)

    trainer.add_callback(Terminates())
    trainer.train()
    steps = trainer.state.global_step
    assert 2 <= steps < 100_000
    (checkpoint,) = tmp_path.glob("checkpoint-*")
    again = cmp_trainer(tmp_path, **{**settings, "max_steps": steps + 2})
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == steps + 2
    assert fault_of(checkpoint) is None


def test_two_runs_that_save_into_one_folder_at_once_do_not_disturb_each_other(run):
    checkpoint, none = run / "checkpoint-6", lambda: None
    state = (checkpoint / "trainer_state.json").read_text()
    with recorded(checkpoint, True, none), recorded(checkpoint, True, none):
        (checkpoint / "trainer_state.json").write_text(state)
    assert fault_of(checkpoint) is None
