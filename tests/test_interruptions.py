"""A training that is cut short says what is saved and how to resume."""

import os
import signal
import subprocess
import sys

import pytest
from transformers import TrainerCallback

from tests.helpers import cmp_trainer

SAVING = {"cmp_num_ablations": 1, "save_strategy": "steps", "save_steps": 2, "max_steps": 6}
WAY_ON = "pass --resume_from_checkpoint true or call train(resume_from_checkpoint=True)"


class Interrupts(TrainerCallback):
    """Ctrl-C at a step."""

    def __init__(self, step):
        self.step = step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize("ablations", [0, 1])
def test_ctrl_c_says_from_which_checkpoint_to_resume(ablations, tmp_path, caplog):
    trainer = cmp_trainer(tmp_path, callbacks=[Interrupts(5)], **{**SAVING, "cmp_num_ablations": ablations})
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert "Training ended at step 5: interrupted." in caplog.text
    assert f"To resume from {tmp_path / 'checkpoint-4'}, {WAY_ON}." in caplog.text


def test_ctrl_c_before_the_first_save_says_that_nothing_was_saved(tmp_path, caplog):
    with pytest.raises(KeyboardInterrupt):
        cmp_trainer(tmp_path, callbacks=[Interrupts(1)], **SAVING).train()
    assert "Training ended at step 1: interrupted. No checkpoint was saved." in caplog.text


def test_other_errors_are_left_alone(tmp_path, caplog):
    class Fails(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            raise RuntimeError("of someone else")

    with pytest.raises(RuntimeError):
        cmp_trainer(tmp_path, callbacks=[Fails()], **SAVING).train()
    assert "Training ended" not in caplog.text


FULL_DISK = """
import resource, signal
from transformers import TrainerCallback
from tests.helpers import cmp_trainer
from cmp_trainer.scripting import plain_errors

class FillsTheDisk(TrainerCallback):
    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 3:  # from now on no file can grow beyond so many bytes
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))

with plain_errors():
    settings = dict(cmp_num_ablations=1, save_strategy="steps", save_steps=2)
    cmp_trainer({folder!r}, callbacks=[FillsTheDisk()], **settings).train()
"""


@pytest.mark.parametrize(("limit", "file"), [(500, "config.json"), (10_000, "weights"), (30_000, "optimizer.pt")])
def test_a_full_disk_is_one_line_and_says_from_which_checkpoint_to_resume(limit, file, tmp_path):
    command = [sys.executable, "-c", FULL_DISK.format(limit=limit, folder=str(tmp_path))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1, done.stderr[-2000:]
    assert "Traceback" not in done.stderr
    assert f"the disk is full or not writable. To resume from {tmp_path / 'checkpoint-2'}, {WAY_ON}." in done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: ")
    assert done.stderr.splitlines()[-1].endswith("Free some space or pass another --output_dir")
