"""Where the time of a comparative step goes that is not the model; two tables on standard output.

    python benchmarks/profile_step.py --threads 2

1. A step of c = 2, one variant after the other: forwards and backward of the model are timed where they begin and
   end (a wrapper of the model's forward; the moment at which a gradient reaches the logits), the rest is what is left.
   The parts of that rest are then timed one by one.
2. The interception of PyTorch's functions, on a model so small that nothing else counts: a forward under CmpDrop,
   under an empty TorchFunctionMode, and under none.
"""

import argparse
import random
import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from bench_steps import make_batch, make_model
from contenders import comparative_trainer
from torch.overrides import TorchFunctionMode
from tqdm import tqdm
from transformers import BertConfig, BertForSequenceClassification

from cmp_trainer.ablations.drop import CmpDrop
from cmp_trainer.execution.ablated import Ablated
from cmp_trainer.execution.forwards import Forwards
from cmp_trainer.execution.random_state import RandomState
from cmp_trainer.losses.comparative import minimized
from cmp_trainer.losses.shares import read_shares
from cmp_trainer.losses.sign_test import deviation
from cmp_trainer.step import model_loss


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="BERT 6 x 384")
    parser.add_argument("--size", default="32x128", help="batch x length")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows, length = map(int, args.size.split("x"))
    step_table(args.model, make_batch(args.model, rows, length), args.rounds)
    interception_table()


def step_table(name: str, batch: dict[str, torch.Tensor], rounds: int) -> None:
    model = make_model(name)
    trainer = comparative_trainer(model, cmp_num_ablations=2, cmp_forward="sequential")
    trainer.compute_loss(model, dict(batch)).backward()  # with the checks of the first step
    clock = ModelClock(model)
    steps = [timed_step(trainer, model, batch, clock) for _ in tqdm(range(rounds), desc="steps")]
    total, forward, backward = (statistics.median(column) for column in zip(*steps, strict=True))
    rest = statistics.median(total - forward - backward for total, forward, backward in steps)
    print(f"\n{name}, batch {tuple(batch['input_ids'].shape)}, c = 2, sequential: median of {rounds} steps\n")
    print("| part of a step | ms | % |\n| --- | --- | --- |")
    shares = {"three forwards of the model": forward, "backward of the model": backward, "all else": rest}
    for part, seconds in shares.items():
        print(f"| {part} | {1000 * seconds:.2f} | {100 * seconds / total:.2f} |")
    clock.remove()
    for part, seconds in parts_of_the_rest(trainer, model, batch).items():
        print(f"| … {part} | {1000 * seconds:.2f} | {100 * seconds / total:.3f} |")


class ModelClock:
    """Adds up the seconds inside of the model's forward, and notes when backward reaches its logits."""

    def __init__(self, model: Any) -> None:
        self.forward, self.reached, self._began = 0.0, 0.0, 0.0
        self._hooks = [model.register_forward_pre_hook(self._begin), model.register_forward_hook(self._end)]

    def _begin(self, *_: Any) -> None:
        self._began = time.perf_counter()

    def _end(self, module: Any, inputs: Any, outputs: Any) -> None:
        self.forward += time.perf_counter() - self._began
        outputs.logits.register_hook(self._note)

    def _note(self, gradient: torch.Tensor) -> None:
        self.reached = self.reached or time.perf_counter()

    def remove(self) -> None:
        for hook in self._hooks:
            hook.remove()


def timed_step(trainer: Any, model: Any, batch: dict[str, torch.Tensor], clock: ModelClock) -> tuple[float, ...]:
    """Seconds of a step, of the model's forwards in it, and of the model's backward in it."""
    model.zero_grad()
    clock.forward = 0.0
    start = time.perf_counter()
    loss = trainer.compute_loss(model, dict(batch))
    clock.reached = 0.0  # the sign test reached the logits too
    loss.backward()
    end = time.perf_counter()
    return end - start, clock.forward, end - clock.reached


def parts_of_the_rest(trainer: Any, model: Any, batch: dict[str, torch.Tensor]) -> dict[str, float]:
    """Seconds of each part in a step of three variants."""
    step = trainer.comparative_step(model)
    state, plan, full = RandomState.capture(), step._plan, step.variants[0].levels
    forward = Forwards(model, model_loss, step.kinds, state).run(batch, full)
    shares = read_shares(forward, plan, batch)
    losses = torch.stack([shares.values] * 3, -1)  # (batch, parts, 3)
    calls: dict[str, tuple[int, Callable[[], Any]]] = {
        "random state: two captures": (2, RandomState.capture),
        "random state: three restores": (3, state.restore),
        "shares of three variants": (3, lambda: read_shares(forward, plan, batch)),
        "sign test": (1, lambda: deviation(shares, forward, plan)),
        "comparative loss": (1, lambda: minimized(step.objective, losses, shares.weights)),
        "sums for the log": (1, lambda: step.losses_log.add(losses, shares.weights)),
    }
    return {part: number * median_seconds(call, 200) for part, (number, call) in calls.items()}


def interception_table() -> None:
    shape: dict[str, Any] = {
        "hidden_size": 32,
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
        "intermediate_size": 32,
    }
    model = BertForSequenceClassification(BertConfig(**shape, vocab_size=100)).train()
    ids = torch.randint(10, 90, (2, 4))
    counter = CountingMode()
    with counter:
        model(input_ids=ids, attention_mask=torch.ones_like(ids))
    contexts: dict[str, Callable[[], AbstractContextManager]] = {
        "none": nullcontext,
        "an empty TorchFunctionMode": EmptyMode,
        "CmpDrop, no drops": lambda: Ablated([CmpDrop()], [0]),
        "CmpDrop, one drop": lambda: Ablated([CmpDrop()], [1]),
    }
    seconds: dict[str, list[float]] = {name: [] for name in contexts}
    names, draw = list(contexts), random.Random(0)
    for _ in range(500):
        draw.shuffle(names)
        for name in names:
            start = time.perf_counter()
            with contexts[name]():
                model(input_ids=ids, attention_mask=torch.ones_like(ids))
            seconds[name].append(time.perf_counter() - start)
    print(f"\nBERT of 4 layers, width 32, batch 2 x 4: a forward calls {counter.calls} functions of PyTorch\n")
    print("| forward under | µs | more than under none, µs |\n| --- | --- | --- |")
    for name, times in seconds.items():
        median, plain = statistics.median(times), statistics.median(seconds["none"])
        print(f"| {name} | {1e6 * median:.0f} | {1e6 * (median - plain):.0f} |")


class EmptyMode(TorchFunctionMode):
    """What any interception costs."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        return func(*args, **kwargs) if kwargs else func(*args)


class CountingMode(TorchFunctionMode):
    """Counts the calls that are intercepted."""

    calls = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.calls += 1
        return func(*args, **(kwargs or {}))


def median_seconds(call: Callable[[], Any], repeats: int) -> float:
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


if __name__ == "__main__":
    main()
