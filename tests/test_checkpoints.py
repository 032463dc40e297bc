"""A half-written checkpoint is never resumed from silently."""

import shutil
from pathlib import Path

import pytest
from transformers import Trainer

from cmp_trainer.saving.checkpoints import checkpoint_to_resume, is_whole
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


def test_the_newest_whole_checkpoint_is_taken_and_the_half_one_named(tmp_path, caplog):
    interrupted_run(tmp_path)
    assert (tmp_path / "checkpoint-4" / "model.safetensors").is_file()
    assert checkpoint_to_resume(True, str(tmp_path)) == str(tmp_path / "checkpoint-2")
    assert "checkpoint-4 is not whole (its save or deletion was interrupted) and is passed over" in caplog.text


def test_resuming_after_an_interrupted_save_ends_at_the_weights_of_the_whole_run(tmp_path):
    whole = cmp_trainer(tmp_path / "whole", **SAVING)
    whole.train()
    resumed = cmp_trainer(interrupted_run(tmp_path / "resumed"), **SAVING)
    resumed.train(resume_from_checkpoint=True)
    assert same_weights(whole.model, resumed.model)
    assert is_whole(tmp_path / "resumed" / "checkpoint-4")  # written again, to its end


def test_a_checkpoint_is_named_by_a_path_object_too(tmp_path):
    cmp_trainer(tmp_path, **SAVING).train()
    assert checkpoint_to_resume(tmp_path / "checkpoint-2", str(tmp_path)) == str(tmp_path / "checkpoint-2")


def test_a_half_written_checkpoint_is_refused_by_path(tmp_path):
    interrupted_run(tmp_path)
    with pytest.raises(ValueError, match="checkpoint-4 is not a whole checkpoint: its save was interrupted"):
        cmp_trainer(tmp_path, **SAVING).train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))


def test_a_checkpoint_that_is_written_over_is_half_until_it_is_whole(tmp_path):
    cmp_trainer(tmp_path, **SAVING).train()
    assert is_whole(tmp_path / "checkpoint-4")
    shutil.rmtree(tmp_path / "checkpoint-6")
    interrupted_run(tmp_path)
    assert not is_whole(tmp_path / "checkpoint-4")


@pytest.mark.parametrize("lost", ["optimizer.pt", "model.safetensors", "trainer_state.json"])
def test_a_half_deleted_checkpoint_is_passed_over(lost, tmp_path):
    cmp_trainer(tmp_path, **SAVING).train()
    (tmp_path / "checkpoint-6" / lost).unlink()
    assert checkpoint_to_resume(True, str(tmp_path)) == str(tmp_path / "checkpoint-4")


def test_a_half_written_last_file_is_no_end_of_a_save(tmp_path):
    cmp_trainer(tmp_path, **SAVING).train()
    state = tmp_path / "checkpoint-6" / "trainer_state.json"
    state.write_text(state.read_text()[:-20])
    assert not is_whole(tmp_path / "checkpoint-6")


def test_checkpoints_of_a_plain_trainer_are_resumed_from(tmp_path):
    cmp_trainer(tmp_path, kind=Trainer, **{**SAVING, "cmp_num_ablations": 0}).train()
    assert checkpoint_to_resume(True, str(tmp_path)) == str(tmp_path / "checkpoint-6")
    resumed = cmp_trainer(tmp_path, **{**SAVING, "max_steps": 8})
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 8
    assert is_whole(tmp_path / "checkpoint-2") and is_whole(tmp_path / "checkpoint-8")


def test_a_checkpoint_copied_elsewhere_is_whole(tmp_path):
    cmp_trainer(tmp_path / "run", **SAVING).train()
    assert is_whole(Path(shutil.copytree(tmp_path / "run" / "checkpoint-6", tmp_path / "copies" / "best")))


def test_no_whole_checkpoint_is_said_with_what_was_found(tmp_path):
    (tmp_path / "checkpoint-9").mkdir()
    with pytest.raises(ValueError, match=r"no whole checkpoint in .* \(found: checkpoint-9\)"):
        checkpoint_to_resume(True, str(tmp_path))


@pytest.mark.parametrize("nothing", [None, False, ""])
def test_not_resuming_is_left_alone(nothing, tmp_path):
    assert checkpoint_to_resume(nothing, str(tmp_path)) is None
