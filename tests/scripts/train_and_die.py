"""Trains with comparative loss, is killed on the way and resumes: train_and_die.py FOLDER.

One child process for each moment of `MOMENTS` trains in a folder of that name until it is killed. Then their runs are
resumed, a run that is never killed is made, and all their final weights are saved in FOLDER. Data are shuffled and
dropout is random, so that a resumed run ends at the same weights only if all randomness is resumed.
"""

import os
import shutil
import signal
import sys
from pathlib import Path

import torch

from cmp_trainer import CmpTrainer
from tests.helpers import cmp_trainer as make_trainer

MOMENTS = ("in a forward", "in a save", "in a deletion")
SETTINGS = {
    "cmp_num_ablations": 2,
    "max_steps": 12,  # 8 a pass over the data
    "save_strategy": "steps",
    "save_steps": 2,
    "save_total_limit": 1,
    "lr_scheduler_type": "cosine",
}


def kill() -> None:
    """As an operator or a scheduler does it: nothing is cleaned up."""
    os.kill(os.getpid(), signal.SIGKILL)


class Killed(CmpTrainer):
    """Is killed in step 9, or in the save after step 8, or where that deletes an old checkpoint."""

    moment = "never"

    def compute_loss(self, *args, **kwargs):
        loss = super().compute_loss(*args, **kwargs)
        if self.moment == "in a forward" and self.state.global_step == 9:
            kill()
        return loss

    def _save_rng_state(self, output_dir):
        if self.moment == "in a save" and self.state.global_step == 8:
            kill()
        if self.moment == "in a deletion" and self.state.global_step == 8:
            shutil.rmtree = half_deleted
        super()._save_rng_state(output_dir)


def half_deleted(folder, **_):
    """Stands in for shutil.rmtree, and does not live to see its end."""
    Path(folder, "optimizer.pt").unlink()
    kill()


def train(folder: Path, moment: str, resume: bool) -> dict[str, torch.Tensor]:
    Killed.moment = moment
    trainer = make_trainer(folder, kind=Killed, **SETTINGS)
    trainer.train(resume_from_checkpoint=resume)
    return trainer.model.state_dict()


def main() -> None:
    torch.set_num_threads(1)
    root = Path(sys.argv[1])
    for moment in MOMENTS:
        child = os.fork()
        if child == 0:
            train(root / moment, moment, resume=False)
            os._exit(0)  # reached if it was not killed
        _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, status
    weights = {moment: train(root / moment, "never", resume=True) for moment in MOMENTS}
    weights["never"] = train(root / "never", "never", resume=False)
    torch.save(weights, root / "weights.pt")


if __name__ == "__main__":
    main()
