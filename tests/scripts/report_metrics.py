"""Stands in for a training script where only starting and recording runs is tested: reports made-up metrics at once.

Put before a run as its launcher, it is given the run's whole command line. Some methods and seeds fail.
"""

import itertools
import json
import os
import sys
from pathlib import Path

words = sys.argv[1:]
given = dict(itertools.pairwise(words))
seed, rate = int(given["--seed"]), float(given.get("--learning_rate", "1e-4"))
better = float(given.get("--better", "0"))
print(f"seed {seed}")
if given.get("--fails") == str(seed):
    print("out of luck: seed", seed)
    sys.exit(3)
output = Path(given["--output_dir"])
output.mkdir(parents=True)
(output / "command.txt").write_text("\n".join([*words, "", os.environ.get("SLOT", "")]))
metrics = {
    "eval_accuracy": 0.8 + better - abs(rate - 1e-4),
    "test_accuracy": 0.7 + 0.01 * seed + better,
    "test_loss": 0.5 - better,
    "train_runtime": 2.0 if better else 1.0,
    "epoch": 1.0,
}
if given.get("--reports") != "nothing":
    (output / "all_results.json").write_text(json.dumps(metrics))
