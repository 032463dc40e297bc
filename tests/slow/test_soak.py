"""Long trainings cost at their end what they cost at their beginning: `make soak` runs it, and prints a table."""

import gc
import statistics
import time
from pathlib import Path

import pandas as pd
import pytest
import torch
from transformers import Trainer, TrainerCallback

from cmp_trainer import CmpTrainer
from cmp_trainer.ablations.crop_collator import CmpCropCollator
from tests.helpers import cmp_trainer, letter_tokenizer, tiny_bert, token_data

STEPS, WINDOW = 3000, 500
KINDS = {
    "plain Trainer": {"kind": Trainer},
    "sequential": {"cmp_num_ablations": 2, "cmp_forward": "sequential"},
    "stacked": {"cmp_num_ablations": 2, "cmp_forward": "stacked"},
    "low memory": {"cmp_num_ablations": 2, "cmp_low_memory": True},
    "cropping": {"cmp_num_ablations": 2, "cmp_num_crops": 1},
}


class Watch(TrainerCallback):
    """Every 500 steps: memory of the process, living objects, hooks of the model, and the median time of a step."""

    def __init__(self, model):
        self.model, self.rows, self.times, self.begun = model, [], [], 0.0

    def on_step_begin(self, args, state, control, **kwargs):
        self.begun = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        self.times.append(time.perf_counter() - self.begun)
        if state.global_step % WINDOW:
            return
        gc.collect()
        resident = int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 2**20
        hooks = sum(
            len(module._forward_hooks) + len(module._forward_pre_hooks) + len(module._backward_hooks)
            for module in self.model.modules()
        )
        self.rows.append(
            {
                "step": state.global_step,
                "MiB": resident,
                "objects": len(gc.get_objects()),
                "hooks": hooks,
                "modes": torch._C._len_torch_function_stack(),
                "ms": 1000 * statistics.median(self.times),
            }
        )
        self.times = []


def with_segments(data):
    return data.map(lambda row: {"crop_segments": [0, 0, 1, 1, 2, 2, 3, 3]})


@pytest.mark.parametrize("name", KINDS)
def test_the_last_steps_cost_what_the_first_do(name, tmp_path, capsys):
    torch.manual_seed(0)
    model, settings, data = tiny_bert(), dict(KINDS[name]), token_data(rows=256)
    settings |= {"max_steps": STEPS, "eval_strategy": "steps", "eval_steps": 100, "logging_steps": 100}
    settings |= {"save_strategy": "steps", "save_steps": 500, "save_total_limit": 2}
    if name == "cropping":
        data, settings["data_collator"] = with_segments(data), CmpCropCollator(letter_tokenizer())
    trainer = cmp_trainer(tmp_path, model, data, **settings)
    assert isinstance(trainer, CmpTrainer) == (name != "plain Trainer")
    watch = Watch(model)
    trainer.add_callback(watch)
    trainer.train()
    found = pd.DataFrame(watch.rows)
    with capsys.disabled():
        print(f"\n{name}\n{found.round(1).to_string(index=False)}")
    second, last = found.iloc[1], found.iloc[-1]
    assert last["MiB"] - second["MiB"] < 20
    assert last["objects"] < 1.01 * second["objects"]
    assert (found["hooks"] == found["hooks"].iloc[0]).all() and not found["modes"].any()
    assert last["ms"] < 1.5 * second["ms"]  # a machine that does other things too
