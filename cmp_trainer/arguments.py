"""The arguments of comparative loss, next to those of TrainingArguments.

Invalid values and combinations are rejected here, before anything is loaded, with a message that names the argument,
its value and the fix.
"""

import copy
import math
import sys
from dataclasses import dataclass, field
from itertools import pairwise
from numbers import Real
from typing import Any, Literal, Self, cast, get_args

from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments, Trainer, TrainingArguments

from cmp_trainer.ablations.crop import CmpCrop, CropOrder
from cmp_trainer.ablations.drop import CmpDrop, Growth
from cmp_trainer.ablations.plan import plan
from cmp_trainer.ablations.protocol import Ablation
from cmp_trainer.ablations.skip import CmpSkip, SkipOrder
from cmp_trainer.losses.comparative import ComparativeLoss, NamedBaseline, Primary, Ranking, RegularizedLoss

Objective = Literal["comparative", "regularized"]
ForwardChoice = Literal["auto", "sequential", "stacked"]
_SECRETS = ("hub_token", "push_to_hub_token")  # the second in transformers 4 only


@dataclass
class CmpTrainingArguments(TrainingArguments):
    """TrainingArguments and what comparative loss adds; no default of TrainingArguments is changed.

    Parameters:
        > What is compared

        cmp_num_ablations (`int`, defaults to 0):
            c, how many ablated variants are compared with the full model. 0 is the plain Trainer, bit for bit.
        cmp_num_crops (`int`, defaults to 0):
            How many of the c ablations cut input context (CmpCrop).
        cmp_crop_order (`str`, defaults to `"random"`):
            Which segments a crop keeps: `random` ones, or a `prefix` of them.
        cmp_num_skips (`int`, defaults to 0):
            How many of the c ablations skip layers (CmpSkip). Those that neither crop nor skip drop hidden neurons
            (CmpDrop).
        cmp_skip_layers (`list[int]`, *optional*):
            How many layers the first skip leaves out, the second, …; by default k / (k + 2) of the layers, rounded: a
            third, a half, ….
        cmp_skip_order (`str`, defaults to `"random"`):
            Which layers are skipped: `random` ones but the first, or the `top` ones, which costs least.
        cmp_dropout_schedule (`str`, defaults to `"compound"`):
            How the rate grows with the number k of drops: `compound` 1 - (1 - p)^k, `linear` k * p.
        cmp_dropout_rates (`list[float]`, *optional*):
            Rates for k = 1, 2, … at every dropout site, strictly increasing, in place of p and the schedule.
        cmp_dropout (`float`, *optional*):
            Base rate p at every dropout site in place of the model's own, also where its own is 0.
        cmp_ablated_layers (`int`, *optional*):
            N: drop neurons in the top N layers and the head only; the layers below run once for all variants, without
            dropout. All layers where not given.

        > How it is compared

        cmp_objective (`str`, defaults to `"comparative"`):
            `comparative`, or `regularized`: primary + weight * ranking.
        cmp_baseline (`str`, defaults to `"zero"`):
            Comparative objective: the loss that is appended last, `zero`, `first`, `best`, or a number.
        cmp_ranking (`str`, defaults to `"pairwise"`):
            `pairwise` hinge or `listwise` (ListMLE).
        cmp_temperature (`float`, defaults to 1.0):
            Divides the task losses before they are ranked.
        cmp_margin (`float`, defaults to 0.0):
            Pairwise ranking: by how much a less ablated variant has to be better.
        cmp_primary (`str`, defaults to `"max"`):
            Regularized objective: `max`, `mean`, `full` or `last`.
        cmp_weight (`float`, defaults to 1.0):
            Regularized objective: the factor of the ranking loss.
        cmp_loss_threshold (`float`, *optional*):
            Regularized objective: rank only while the batch mean of the primary loss is at most this.

        > How it is run

        cmp_forward (`str`, defaults to `"auto"`):
            `sequential`, one forward a variant; `stacked`, one forward for all drop variants; `auto`, stacked where
            that was measured to be faster (small batches on the CPU, in one process).
        cmp_low_memory (`bool`, defaults to `False`):
            Exact gradients at the activation memory of one variant, for c more forwards.

        > Evaluation

        cmp_eval_ablations (`bool`, defaults to `False`):
            Evaluation also reports the loss of every variant and the violation rate, for 1 + c more forwards a batch.

    Raises:
        ValueError: an invalid value or combination; names the argument, its value and the fix.
    """

    cmp_num_ablations: int = field(
        default=0, metadata={"help": "How many ablated variants are compared with the full model; 0: plain Trainer."}
    )
    cmp_num_crops: int = field(default=0, metadata={"help": "How many of the ablations cut input context (CmpCrop)."})
    cmp_num_skips: int = field(
        default=0,
        metadata={"help": "How many of the ablations skip layers (CmpSkip); what neither crops nor skips is CmpDrop."},
    )
    cmp_skip_layers: list[int] | None = field(
        default=None,
        metadata={
            "help": "How many layers each skip leaves out, increasing; if unset a third, a half, ... (k/(k+2))."
        },
    )
    cmp_skip_order: SkipOrder = field(
        default="random", metadata={"help": "Which layers are skipped: random ones but the first, or the top ones."}
    )
    cmp_crop_order: CropOrder = field(
        default="random", metadata={"help": "Which segments a crop keeps: random ones, or a prefix of them."}
    )
    cmp_dropout_schedule: Growth = field(
        default="compound",
        metadata={"help": "How the dropout rate grows with the number k of drops: compound 1-(1-p)^k, linear k*p."},
    )
    cmp_dropout_rates: list[float] | None = field(
        default=None,
        metadata={"help": "Explicit dropout rates for k = 1, 2, ..., strictly increasing, for p and the schedule."},
    )
    cmp_dropout: float | None = field(
        default=None, metadata={"help": "Base rate p at every dropout site, also where the model's own is 0."}
    )
    cmp_ablated_layers: int | None = field(
        default=None,
        metadata={
            "help": "Drop neurons in the top N layers only; those below run once for all variants. All if unset."
        },
    )
    cmp_objective: Objective = field(
        default="comparative", metadata={"help": "comparative, or regularized: primary + weight * ranking."}
    )
    cmp_baseline: str = field(
        default="zero", metadata={"help": "The loss that is appended last: zero, first, best, or a number."}
    )
    cmp_ranking: Ranking = field(default="pairwise", metadata={"help": "pairwise hinge or listwise (ListMLE)."})
    cmp_temperature: float = field(default=1.0, metadata={"help": "Divides the task losses before the ranking."})
    cmp_margin: float = field(
        default=0.0, metadata={"help": "By how much a less ablated variant has to be better (pairwise)."}
    )
    cmp_primary: Primary = field(
        default="max", metadata={"help": "Primary loss of the regularized objective: max, mean, full or last."}
    )
    cmp_weight: float = field(default=1.0, metadata={"help": "Weight of the ranking in the regularized objective."})
    cmp_loss_threshold: float | None = field(
        default=None,
        metadata={"help": "Regularized objective: rank only while the batch mean primary loss is at most this."},
    )
    cmp_forward: ForwardChoice = field(
        default="auto",
        metadata={"help": "sequential: one forward a variant; stacked: one for all drop variants; auto: as measured."},
    )
    cmp_low_memory: bool = field(
        default=False, metadata={"help": "Exact gradients at one variant's activation memory, for c more forwards."}
    )
    cmp_eval_ablations: bool = field(
        default=False, metadata={"help": "Evaluation also reports the loss of every variant."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_cmp_arguments()

    def check_cmp_arguments(self) -> None:
        """Reject invalid values and combinations, at parse time and before training.

        Raises:
            ValueError: names the argument, its value and the fix.
        """
        for name, choices in _CHOICES.items():
            _require(
                getattr(self, name) in choices,
                name,
                getattr(self, name),
                f"is not a valid choice; use one of {', '.join(choices)}",
            )
        _check_numbers(self)
        _check_counts(self)
        _check_skips(self)
        _check_dropout(self)
        _check_layers(self)
        _check_objective(self)

    @property
    def cmp_drop(self) -> CmpDrop:
        """CmpDrop as the arguments describe it, also where no ablations are asked for."""
        rates = tuple(self.cmp_dropout_rates) if self.cmp_dropout_rates else None
        return CmpDrop(self.cmp_dropout_schedule, self.cmp_dropout, rates)

    @property
    def cmp_crop(self) -> CmpCrop:
        """CmpCrop as the arguments describe it, also where no crops are asked for."""
        return CmpCrop(order=self.cmp_crop_order)

    @property
    def cmp_skip(self) -> CmpSkip:
        """CmpSkip as the arguments describe it, also where no skips are asked for."""
        return CmpSkip(tuple(self.cmp_skip_layers) if self.cmp_skip_layers else None, self.cmp_skip_order)

    @property
    def cmp_ablations(self) -> list[Ablation]:
        """The ablations that the arguments ask for, from least to most ablated."""
        return plan(
            self.cmp_num_ablations,
            self.cmp_num_crops,
            self.cmp_drop,
            self.cmp_crop,
            num_skips=self.cmp_num_skips,
            skip=self.cmp_skip,
        )

    @property
    def cmp_objective_function(self) -> ComparativeLoss | RegularizedLoss:
        """The objective that the arguments ask for."""
        ranking, temperature, margin = self.cmp_ranking, self.cmp_temperature, self.cmp_margin
        if self.cmp_objective == "regularized":
            return RegularizedLoss(
                self.cmp_primary, self.cmp_weight, self.cmp_loss_threshold, ranking, temperature, margin
            )
        named = self.cmp_baseline in get_args(NamedBaseline)
        baseline = cast(NamedBaseline, self.cmp_baseline) if named else float(self.cmp_baseline)
        return ComparativeLoss(baseline, ranking, temperature, margin)

    @property
    def n_gpu(self) -> int:
        """As in TrainingArguments; raises when a Trainer that does not compare reads it to train with ablations.

        Every Trainer reads it before its first step, from a method. The arguments are not told whose they are, so the
        caller's `self` is what tells a plain Trainer from a CmpTrainer.
        """
        if self.cmp_num_ablations:
            _reject_plain_trainer(self.cmp_num_ablations, sys._getframe(1).f_locals.get("self"))
        return super().n_gpu

    def __getstate__(self) -> dict[str, Any]:
        """Leaves out the Hub token, which must not end up in training_args.bin."""
        return {**vars(self), **{name: None for name in _SECRETS if name in vars(self)}}

    def __copy__(self) -> Self:
        copied = object.__new__(type(self))
        vars(copied).update(vars(self))
        return copied

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        copied = memo[id(self)] = object.__new__(type(self))
        vars(copied).update(copy.deepcopy(vars(self), memo))
        return copied


@dataclass
class CmpSeq2SeqTrainingArguments(CmpTrainingArguments, Seq2SeqTrainingArguments):
    """Seq2SeqTrainingArguments with the arguments of CmpTrainingArguments."""


_CHOICES = {
    "cmp_crop_order": get_args(CropOrder),
    "cmp_skip_order": get_args(SkipOrder),
    "cmp_dropout_schedule": get_args(Growth),
    "cmp_objective": get_args(Objective),
    "cmp_ranking": get_args(Ranking),
    "cmp_primary": get_args(Primary),
    "cmp_forward": get_args(ForwardChoice),
}
_REGULARIZED_ONLY = {"cmp_primary": "max", "cmp_weight": 1.0, "cmp_loss_threshold": None}


def _check_numbers(args: CmpTrainingArguments) -> None:
    """YAML reads 1e-1 as text; a config that is not read by `parse_arguments` brings such text here."""
    for name in ("cmp_temperature", "cmp_margin", "cmp_weight", "cmp_dropout", "cmp_loss_threshold"):
        value, may_be_none = getattr(args, name), name in ("cmp_dropout", "cmp_loss_threshold")
        fix = f"is {type(value).__name__}, not a number" + ("; in YAML write 0.1, not 1e-1" * isinstance(value, str))
        _require(_is_real(value) or (value is None and may_be_none), name, value, fix)
    rates = args.cmp_dropout_rates
    are_numbers = isinstance(rates, list | tuple) and all(_is_real(rate) for rate in rates)
    _require(rates is None or are_numbers, "cmp_dropout_rates", rates, "must be a list of numbers, such as [0.1, 0.2]")


def _check_counts(args: CmpTrainingArguments) -> None:
    ablations, crops = args.cmp_num_ablations, args.cmp_num_crops
    _require(
        isinstance(ablations, int) and ablations >= 0,
        "cmp_num_ablations",
        ablations,
        "must be a non-negative integer",
    )
    _require(isinstance(crops, int) and crops >= 0, "cmp_num_crops", crops, "must be a non-negative integer")
    fix = f"is more than --cmp_num_ablations {ablations}; crops are some of the ablations, so raise that or lower this"
    _require(crops <= ablations, "cmp_num_crops", crops, fix)
    fix = "holds all variants at once, which is what --cmp_low_memory avoids; remove one of the two"
    _require(not (args.cmp_low_memory and args.cmp_forward == "stacked"), "cmp_forward", args.cmp_forward, fix)


def _check_skips(args: CmpTrainingArguments) -> None:
    skips, others, layers = args.cmp_num_skips, args.cmp_num_ablations - args.cmp_num_crops, args.cmp_skip_layers
    _require(isinstance(skips, int) and skips >= 0, "cmp_num_skips", skips, "must be a non-negative integer")
    fix = f"is more than the {others} of --cmp_num_ablations {args.cmp_num_ablations} that are not crops"
    _require(skips <= others, "cmp_num_skips", skips, f"{fix}; raise that or lower this")
    if layers is None:
        return
    whole = isinstance(layers, list | tuple) and all(isinstance(one, int) for one in layers)
    increasing = whole and all(low < high for low, high in pairwise((0, *layers)))
    fix = "must be increasing positive integers, such as 2 3: how many layers each skip leaves out"
    _require(bool(layers) and increasing, "cmp_skip_layers", layers, fix)
    if args.cmp_num_ablations:
        fix = f"are {len(layers)} numbers for --cmp_num_skips {skips}; give one for each skip"
        _require(len(layers) == skips, "cmp_skip_layers", layers, fix)


def _check_dropout(args: CmpTrainingArguments) -> None:
    drops = args.cmp_num_ablations - args.cmp_num_crops - args.cmp_num_skips
    rates, base_rate, growth = args.cmp_dropout_rates, args.cmp_dropout, args.cmp_dropout_schedule
    _require(
        base_rate is None or 0 < base_rate < 1,
        "cmp_dropout",
        base_rate,
        "must be between 0 and 1",
    )
    if base_rate is not None and growth == "linear":
        fix = f"reaches {drops} * {base_rate} >= 1 under the linear schedule; lower it or use compound"
        _require(drops * base_rate < 1, "cmp_dropout", base_rate, fix)
    if rates is None:
        return
    increasing = all(low < high for low, high in zip([0.0, *rates], [*rates, 1.0], strict=True))
    _require(
        bool(rates) and increasing,
        "cmp_dropout_rates",
        rates,
        "must increase strictly between 0 and 1",
    )
    _require(
        base_rate is None, "cmp_dropout_rates", rates, f"replace --cmp_dropout {base_rate}; remove one of the two"
    )
    _require(growth == "compound", "cmp_dropout_rates", rates, f"replace the {growth} schedule; remove one of the two")
    if args.cmp_num_ablations:
        fix = f"are {len(rates)} rates for {drops} drops; give one rate for each drop"
        _require(len(rates) == drops, "cmp_dropout_rates", rates, fix)


def _check_layers(args: CmpTrainingArguments) -> None:
    layers, ablations, name = args.cmp_ablated_layers, args.cmp_num_ablations, "cmp_ablated_layers"
    others = args.cmp_num_crops + args.cmp_num_skips
    is_number = isinstance(layers, int) and not isinstance(layers, bool) and layers > 0
    fix = "must be 1 or more: how many of the top layers are ablated; leave it out to ablate all of them"
    _require(layers is None or is_number, name, layers, fix)
    fix = f"is about drops, and all {ablations} ablations are crops or skips; remove it, or ask for fewer of these"
    _require(layers is None or not ablations or others < ablations, name, layers, fix)


def _check_objective(args: CmpTrainingArguments) -> None:
    temperature, margin, weight, threshold = (
        args.cmp_temperature,
        args.cmp_margin,
        args.cmp_weight,
        args.cmp_loss_threshold,
    )
    named = args.cmp_baseline in get_args(NamedBaseline)
    fix = f"is not a valid baseline; use one of {', '.join(get_args(NamedBaseline))}, or a number"
    _require(named or _is_number(args.cmp_baseline), "cmp_baseline", args.cmp_baseline, fix)
    _require(0 < temperature < math.inf, "cmp_temperature", temperature, "must be a positive number")
    _require(0 <= margin < math.inf, "cmp_margin", margin, "must be 0 or a positive number")
    _require(0 <= weight < math.inf, "cmp_weight", weight, "must be 0 or a positive number")
    _require(threshold is None or _is_number(threshold), "cmp_loss_threshold", threshold, "must be a number")
    fix = "has no effect with the listwise ranking; use --cmp_ranking pairwise"
    _require(not margin or args.cmp_ranking == "pairwise", "cmp_margin", margin, fix)
    if args.cmp_objective == "regularized":
        fix = "has no effect with the regularized objective, which has no baseline; remove it"
        _require(args.cmp_baseline == "zero", "cmp_baseline", args.cmp_baseline, fix)
        return
    for name, default in _REGULARIZED_ONLY.items():
        fix = "has no effect with the comparative objective; add --cmp_objective regularized or remove it"
        _require(getattr(args, name) == default, name, getattr(args, name), fix)


def _reject_plain_trainer(num_ablations: int, reader: Any) -> None:
    """A Trainer that compares counts its comparisons in `num_comparisons`."""
    trains = isinstance(reader, Trainer) and getattr(reader, "is_in_train", False)
    if not trains or hasattr(reader, "num_comparisons"):
        return
    plain = "Seq2SeqTrainer" if isinstance(reader, Seq2SeqTrainer) else "Trainer"
    raise ValueError(
        f"--cmp_num_ablations {num_ablations} asks for comparative loss, but {type(reader).__name__} trains without "
        f"it; use Cmp{plain} in place of {plain}, also as the base of your own class, or set --cmp_num_ablations 0."
    )


def _require(holds: bool, name: str, value: Any, fix: str) -> None:
    if not holds:
        raise ValueError(f"--{name} {value} {fix}.")


def _is_real(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    try:
        return math.isfinite(float(value))
    except (TypeError, ValueError):
        return False
