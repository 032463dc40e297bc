"""Controls: what a comparative training is measured against, in any Hugging Face script.

    python -m cmp_trainer.controls --control_no_dropout script.py --learning_rate 1e-4 …

runs the script as `cmp-trainer run` does, with one thing changed about every training in it:

- `--control_no_dropout`: no dropout in training, which is how the full model of a comparison is trained;
- `--control_epochs 3`: three times as many epochs or steps, which is the compute of two ablations;
- `--control_r_drop 1`: R-Drop (https://arxiv.org/abs/2106.14448) with that weight, two forwards with dropout whose
  predictions are pulled together;
- `--control_layer_drop 2`: LayerDrop (https://arxiv.org/abs/1909.11556) with the draws of `CmpSkip`: each forward
  is that of the full model or of one of two levels of skipped layers, drawn at random, without dropout.

`cmp-trainer compare` starts every run through here. A control that could not take place ends in an error.
"""

import argparse
import difflib
import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import Trainer

from cmp_trainer.ablations.skip import CmpSkip
from cmp_trainer.chain import shadowed
from cmp_trainer.checks.settings import attention_out_of_reach, eager_backend, raise_together
from cmp_trainer.execution.ablated import Ablated
from cmp_trainer.execution.processes import num_processes
from cmp_trainer.execution.random_state import RandomState
from cmp_trainer.execution.traces import no_traces
from cmp_trainer.run import leave_process_group, run_script, wrapped_method
from cmp_trainer.scripting import plain_errors
from cmp_trainer.step import ComparativeStep

OPTIONS = ("--control_no_dropout", "--control_epochs", "--control_r_drop", "--control_layer_drop")


@dataclass
class Controls:
    """Changes to every training, and how often they were applied.

    Args:
        no_dropout: whether dropout is off.
        epochs: the factor of the number of epochs, of steps where they are given, and of warm-up steps.
        r_drop: the weight of R-Drop's divergence; None without R-Drop.
        layer_drop: how many levels of skipped layers are drawn from, beside the full model; 0 without LayerDrop.
    """

    no_dropout: bool = False
    epochs: float = 1.0
    r_drop: float | None = None
    layer_drop: int = 0
    steps: int = field(default=0, init=False)
    trainings: int = field(default=0, init=False)
    _steps: dict[Any, ComparativeStep] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        if self.epochs <= 0:
            raise ValueError(f"--control_epochs {self.epochs:g}: must be a positive number")
        if self.r_drop is not None and self.r_drop < 0:
            raise ValueError(f"--control_r_drop {self.r_drop:g}: must be 0 or a positive number")
        if self.no_dropout and self.r_drop is not None:
            raise ValueError("--control_r_drop compares two draws of dropout; remove --control_no_dropout")
        if self.layer_drop < 0:
            raise ValueError(f"--control_layer_drop {self.layer_drop}: must be 0 or a positive integer")
        if self.layer_drop and self.r_drop is not None:
            raise ValueError("--control_layer_drop trains without dropout; remove --control_r_drop")

    @property
    def changes_loss(self) -> bool:
        """Whether each step is another one; more epochs are not."""
        return self.no_dropout or self.r_drop is not None or self.layer_drop > 0

    @contextmanager
    def applied(self) -> Iterator[None]:
        """In the body, every training of a Trainer is run with the controls.

        Raises:
            ValueError: the body ends and no training took place, or not with the controls.
        """
        with ExitStack() as stack:
            stack.enter_context(wrapped_method(Trainer, "train", self._train))
            stack.enter_context(wrapped_method(Trainer, "training_step", self._training_step))
            yield
        if (self.changes_loss or self.epochs != 1) and not self.trainings:
            raise ValueError("a control was asked for, but it has no effect: the script never called Trainer.train")
        if self.changes_loss and not self.steps:
            raise ValueError("a control was asked for, but no training step of a Trainer was taken")

    def _train(self, train: Callable[..., Any], trainer: Any, *args: Any, **kwargs: Any) -> Any:
        self.trainings += 1
        self._check(trainer)
        names = ("num_train_epochs", "max_steps", "warmup_steps")
        before = {name: getattr(trainer.args, name) for name in names}
        try:
            for name, value in before.items():
                # max_steps -1 is none; warmup_steps below 1 is a ratio
                if name == "num_train_epochs" or value >= 1:
                    longer = value * self.epochs
                    setattr(trainer.args, name, longer if name == "num_train_epochs" else round(longer))
            return train(trainer, *args, **kwargs)
        finally:
            for name, value in before.items():
                setattr(trainer.args, name, value)

    def _check(self, trainer: Any) -> None:
        ablations = getattr(trainer, "num_ablations", 0)
        if ablations and self.changes_loss:
            raise ValueError(
                f"--cmp_num_ablations {ablations} takes the place of dropout; remove --control_no_dropout, "
                "--control_r_drop and --control_layer_drop, or the ablations"
            )
        if trainer.args.n_gpu > 1 and self.changes_loss:
            raise ValueError(
                "controls do not reach the threads of nn.DataParallel, which the Trainer uses on "
                f"{trainer.args.n_gpu} GPUs; pass compare a --launcher, 'torchrun --nproc_per_node 2' or "
                "'env CUDA_VISIBLE_DEVICES={slot}'"
            )
        if self.layer_drop and num_processes() > 1:
            raise ValueError("--control_layer_drop leaves layers without gradients; train in one process")
        if self.layer_drop and trainer.args.torch_compile:
            raise ValueError("--control_layer_drop does not work with --torch_compile; leave one of them out")
        if self.no_dropout or self.layer_drop:
            raise_together([attention_out_of_reach(trainer.model), eager_backend(trainer)])
        made_by_trainer = getattr(trainer, "_created_lr_scheduler", False)  # in an earlier training
        if self.epochs != 1 and trainer.lr_scheduler is not None and not made_by_trainer:
            raise ValueError(
                "--control_epochs with a scheduler that the script makes itself: its schedule would end too early; "
                "let the Trainer make it"
            )
        accumulated = trainer.args.gradient_accumulation_steps
        if self.r_drop is not None and accumulated > 1:
            raise ValueError(
                f"--control_r_drop with --gradient_accumulation_steps {accumulated}: models scale their losses "
                "differently there, so the divergence would get the wrong weight; set --gradient_accumulation_steps 1"
            )

    def _training_step(self, step: Callable[..., Any], trainer: Any, *args: Any, **kwargs: Any) -> Any:
        compute_loss = trainer.compute_loss
        if self.layer_drop:
            changed = functools.partial(self._with_layer_drop, trainer, compute_loss)
        elif self.no_dropout:
            changed = functools.partial(_without_dropout, compute_loss)
        elif self.r_drop is not None:
            changed = functools.partial(_r_drop, compute_loss, self.r_drop)
        else:
            return step(trainer, *args, **kwargs)
        self.steps += 1
        with shadowed(trainer, compute_loss=changed):
            return step(trainer, *args, **kwargs)

    def _with_layer_drop(
        self,
        trainer: Any,
        compute_loss: Callable[..., Any],
        model: Any,
        inputs: dict[str, Any],
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        if model not in self._steps:
            self._steps[model] = ComparativeStep(model, [CmpSkip()] * self.layer_drop)
        step = self._steps[model]
        level = int(torch.randint(self.layer_drop + 1, ()))

        def loss_fn(model: Any, inputs: dict[str, Any]) -> Any:
            return compute_loss(model, inputs, **{**kwargs, "return_outputs": False})

        with no_traces(trainer):  # the first time it runs a forward, to find and check the layers
            ablated = step.ablated(inputs, loss_fn, (level,), RandomState.capture(step.devices(inputs)))
        with ablated:
            return compute_loss(model, inputs, *args, **kwargs)


def _without_dropout(compute_loss: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    with Ablated((), ()):
        return compute_loss(*args, **kwargs)


def _r_drop(
    compute_loss: Callable[..., Any],
    weight: float,
    model: Any,
    inputs: dict[str, Any],
    return_outputs: bool = False,
    num_items_in_batch: Any = None,
) -> Any:
    """The mean loss of two draws of dropout, run as one doubled batch, plus `weight` times their divergence."""
    rows = next((len(value) for value in inputs.values() if isinstance(value, Tensor) and value.ndim), 0)
    doubled = {
        name: torch.cat([value, value]) if isinstance(value, Tensor) and value.ndim and len(value) == rows else value
        for name, value in inputs.items()
    }
    items = None if num_items_in_batch is None else 2 * num_items_in_batch
    loss, outputs = compute_loss(model, doubled, return_outputs=True, num_items_in_batch=items)
    loss = loss + weight * symmetric_divergence(outputs, rows)
    return (loss, outputs) if return_outputs else loss


def symmetric_divergence(outputs: Any, rows: int) -> Tensor:
    """Half the sum of both Kullback-Leibler divergences between the first and the second `rows` predictions.

    Mean over the rows; for answers the mean over their start and end.

    Raises:
        ValueError: outputs that are neither class logits `(2 * rows, classes)` nor logits of starts and ends.
    """
    names = ("logits",) if getattr(outputs, "logits", None) is not None else ("start_logits", "end_logits")
    given = [getattr(outputs, name, None) for name in names]
    logits = [one for one in given if isinstance(one, Tensor) and one.ndim == 2 and len(one) == 2 * rows]
    if len(logits) < len(names) or any(one.size(1) < 2 for one in logits):
        raise ValueError(
            "R-Drop compares the class logits (batch, classes) of a classifier, or the logits of starts and ends; "
            f"this model gives {', '.join(outputs) if hasattr(outputs, 'keys') else type(outputs).__name__}"
        )
    found = []
    for one in logits:
        first, second = one.float().log_softmax(-1).chunk(2)
        there = F.kl_div(first, second, log_target=True, reduction="batchmean")
        found.append((there + F.kl_div(second, first, log_target=True, reduction="batchmean")) / 2)
    return torch.stack(found).mean()


def make_parser() -> argparse.ArgumentParser:
    """The parser of the controls alone."""
    parser = argparse.ArgumentParser(prog="python -m cmp_trainer.controls", add_help=False, allow_abbrev=False)
    parser.add_argument("--control_no_dropout", action="store_true", help="no dropout in training")
    parser.add_argument(
        "--control_epochs", type=float, default=1.0, help="multiply the number of epochs or steps by this factor"
    )
    parser.add_argument("--control_r_drop", type=float, help="R-Drop with this weight")
    parser.add_argument(
        "--control_layer_drop", type=int, default=0, help="LayerDrop with so many levels of skipped layers"
    )
    return parser


@plain_errors()
def main(arguments: Sequence[str] | None = None) -> None:
    """Run `[--control_…] script.py [arguments…]`; the controls may stand anywhere."""
    parser = make_parser()
    given, rest = parser.parse_known_args(arguments)
    controls = Controls(given.control_no_dropout, given.control_epochs, given.control_r_drop, given.control_layer_drop)
    if not rest:
        raise ValueError("expected the path of a script")
    for word in rest:
        meant = difflib.get_close_matches(word, OPTIONS, n=1, cutoff=0.85)  # so that --control_net is the script's
        if meant:
            raise ValueError(f"{word} is not one of the controls (did you mean {meant[0]}?)")
    exit_request = None
    with controls.applied():
        try:
            run_script(rest[0], rest[1:])
        except SystemExit as stop:
            if stop.code not in (None, 0):
                raise
            exit_request = stop
    leave_process_group()
    if exit_request is not None:
        raise exit_request


if __name__ == "__main__":
    main()
