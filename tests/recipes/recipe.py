"""A recipe is a trainer of another library with a tiny model. It runs as it is, or with CmpTrainer among its bases."""

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast, set_seed

from cmp_trainer import CmpTrainer, CmpTrainingArguments
from tests.helpers import letter_tokenizer

# The full model's loss alone: training equals that of the plain trainer and a model without dropout.
FULL_ONLY = {"cmp_num_ablations": 2, "cmp_objective": "regularized", "cmp_primary": "full", "cmp_weight": 0.0}
COMPARED = {"cmp_num_ablations": 2}
VARIANT_LOSSES = ("loss_full", "loss_ablated_1", "loss_ablated_2")
ORDERS = {"library-first": False, "plugin-first": True}


@dataclass(frozen=True)
class Recipe:
    """A trainer, the class of its arguments, and what else its constructor takes.

    `parts(dropout, folder)` makes the model, the data and so on anew; `folder` is an empty one for models that can
    only be loaded. `settings` are training arguments.
    """

    trainer: type
    arguments: type
    parts: Callable[[float, Path], dict[str, Any]]
    settings: dict[str, Any] = field(default_factory=dict)

    def plain(self, folder: Path, **settings: Any) -> Any:
        """The library's own trainer, with a model without dropout."""
        return self._make(self.trainer, self.arguments, 0.0, folder / "plain", settings)

    def compared(self, folder: Path, plugin_first: bool = False, **settings: Any) -> Any:
        """The same trainer with CmpTrainer as its second or first base, with a model with dropout 0.1."""
        bases = (CmpTrainer, self.trainer) if plugin_first else (self.trainer, CmpTrainer)
        trainer = type(f"Cmp{self.trainer.__name__}", bases, {})
        return self._make(trainer, combined(self.arguments), 0.1, folder / "compared", settings)

    def _make(self, trainer: type, arguments: type, dropout: float, folder: Path, settings: dict[str, Any]) -> Any:
        folder.mkdir(parents=True, exist_ok=True)
        args = arguments(output_dir=str(folder / "out"), **{**QUIET, **self.settings, **settings})
        return trainer(args=args, **self.parts(dropout, folder))


# Plain gradient descent without clipping: a wrong scale of the loss shows, and rounding is not amplified as in Adam.
QUIET: dict[str, Any] = {
    "max_steps": 3,
    "per_device_train_batch_size": 4,
    "per_device_eval_batch_size": 4,
    "optim": "sgd",
    "learning_rate": 0.1,
    "lr_scheduler_type": "constant",
    "max_grad_norm": 0.0,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": [],
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "disable_tqdm": True,
}


@functools.cache
def combined(arguments: type) -> type:
    """`@dataclass class Args(arguments, CmpTrainingArguments)`, found by its name where it is saved."""
    name = f"Cmp{arguments.__name__}"
    globals()[name] = dataclass(type(name, (arguments, CmpTrainingArguments), {}))
    return globals()[name]


def text_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of letters that adds no token to a text but the last."""
    tokenizer = letter_tokenizer()
    tokenizer.eos_token = "[SEP]"
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="$A")
    return tokenizer


def texts(rows: int, seed: int) -> list[str]:
    """Random texts of two to seven letters; each begins with a space, so that texts can be joined."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(2, 8, (rows,), generator=generator).tolist()
    return ["".join(f" {chr(97 + int(i))}" for i in torch.randint(26, (n,), generator=generator)) for n in lengths]


def weights(trainer: Any) -> dict[str, torch.Tensor]:
    """A copy of what is trained: the parameters of the model, and of a loss that has some."""
    owners = [owner for owner in (trainer.model, getattr(trainer, "loss", None)) if isinstance(owner, torch.nn.Module)]
    return {n: p.detach().clone() for owner in owners for n, p in owner.named_parameters() if p.requires_grad}


def train(*trainers: Any) -> None:
    """Train each from the same random state."""
    for trainer in trainers:
        set_seed(0)
        trainer.train()


def largest_difference(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """The largest difference between two sets of weights of the same names."""
    assert one.keys() == other.keys()
    return max((one[name] - other[name]).abs().max().item() for name in one)


def step_logs(trainer: Any) -> list[dict[str, float]]:
    """What was logged of each step."""
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def assert_trains_as_without_dropout(recipe: Recipe, folder: Path, plugin_first: bool, **settings: Any) -> None:
    """With the full model's loss alone, weights and logged losses are the plain trainer's at dropout 0."""
    plain, ours = recipe.plain(folder, **settings), recipe.compared(folder, plugin_first, **FULL_ONLY, **settings)
    before = weights(plain)
    assert largest_difference(before, weights(ours)) == 0
    train(plain, ours)
    assert largest_difference(before, weights(plain)) > 1e-3  # there is something to be equal to
    assert largest_difference(weights(plain), weights(ours)) < 1e-5
    for expected, logged in zip(step_logs(plain), step_logs(ours), strict=True):
        assert abs(logged["loss"] - expected["loss"]) < 1e-4


def assert_orders_of_bases_are_equal(recipe: Recipe, folder: Path) -> None:
    """Whichever base comes first, weights and logs are equal to the bit."""
    one, other = (recipe.compared(folder / name, first, **COMPARED) for name, first in ORDERS.items())
    train(one, other)
    assert largest_difference(weights(one), weights(other)) == 0
    assert step_logs(one) == step_logs(other)


def assert_every_variant_is_logged(recipe: Recipe, folder: Path) -> None:
    """Each step logs finite losses that differ between the variants, and how often they are in the wrong order."""
    trainer = recipe.compared(folder, **COMPARED)
    before = weights(trainer)
    train(trainer)
    assert largest_difference(before, weights(trainer)) > 1e-3
    assert len(step_logs(trainer)) == trainer.args.max_steps
    for logged in step_logs(trainer):
        losses = [logged[name] for name in VARIANT_LOSSES]
        assert torch.tensor(losses).isfinite().all()
        assert len(set(losses)) == len(losses)
        assert 0 <= logged["violation_rate"] <= 1


def assert_only_the_full_variant_leaves_traces(recipe: Recipe, folder: Path) -> None:
    """The first step logs what the plain trainer logs, and the variants' losses beside it."""
    plain, ours = recipe.plain(folder), recipe.compared(folder, **COMPARED)
    assert_first_logs_agree(plain, ours)
    for name in ("num_tokens", "epoch"):  # what does not depend on the weights stays equal
        assert [log.get(name) for log in step_logs(ours)] == [log.get(name) for log in step_logs(plain)]


def assert_first_logs_agree(plain: Any, ours: Any) -> None:
    """Train both; the first step adds the variants' losses to what the plain trainer logs."""
    train(plain, ours)
    expected, logged = step_logs(plain)[0], step_logs(ours)[0]
    assert logged.keys() - expected.keys() == {*VARIANT_LOSSES, "violation_rate"}
    for name in expected.keys() - {"loss", "grad_norm"}:  # these two are the comparative loss's
        assert abs(logged[name] - expected[name]) < 1e-5, name


def assert_evaluation_leaves_no_traces(recipe: Recipe, folder: Path) -> None:
    """Evaluation adds the variants' losses to the plain trainer's report, and the next training logs the same."""
    plain, ours = recipe.plain(folder), recipe.compared(folder, **COMPARED, cmp_eval_ablations=True)
    expected, metrics = (trainer.evaluate(trainer.train_dataset) for trainer in (plain, ours))
    added = {f"eval_{name}" for name in (*VARIANT_LOSSES, "violation_rate")}
    assert added <= metrics.keys()
    assert_same_metrics({name: value for name, value in metrics.items() if name not in added}, expected)
    assert_first_logs_agree(plain, ours)


def assert_a_curve_leaves_no_traces(recipe: Recipe, folder: Path) -> None:
    """A training after an ablation curve logs what the plain trainer logs."""
    plain, ours = recipe.plain(folder), recipe.compared(folder, **COMPARED)
    ours.evaluate_ablations(ours.train_dataset, seeds=(0,))
    assert_first_logs_agree(plain, ours)


def assert_saved_models_load(recipe: Recipe, folder: Path, plugin_first: bool, load: Callable[[str], Any]) -> None:
    """A checkpoint of a compared training is one of the library's."""
    trainer = recipe.compared(folder, plugin_first, **COMPARED, save_strategy="steps", save_steps=3)
    train(trainer)
    loaded = load(str(Path(trainer.args.output_dir, "checkpoint-3")))
    trained = {name: value.detach() for name, value in trainer.model.named_parameters()}
    assert largest_difference({name: value.detach() for name, value in loaded.named_parameters()}, trained) == 0


def assert_same_metrics(metrics: dict[str, float], expected: dict[str, float]) -> None:
    """Equal but for how long the evaluation took."""
    assert metrics.keys() == expected.keys()
    timed = ("_runtime", "_per_second", "_preparation_time")
    for name in expected:
        assert name.endswith(timed) or abs(metrics[name] - expected[name]) < 1e-5, name
