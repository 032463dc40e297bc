"""The model card: what someone who finds the model on the Hub wants to know.

How to use it, what it reaches, how it was trained (the settings of comparative loss first), what it loses under
ablation where that was measured (`trainer.evaluate_ablations`), and whom to cite. Sections that have nothing to say
are left out. Metadata follows the Hub's model-index, so that results show beside the model.

The text is in model_card_template.md; here is what fills it. Names come from outside, so they are escaped for the
table or the code that they stand in, and paths of this machine are left out.
"""

from __future__ import annotations

import dataclasses
import html
import json
import logging
from collections import Counter
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pandas as pd
import transformers
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from transformers.modelcard import TASK_TAG_TO_NAME_MAPPING, TrainingSummary
from transformers.pipelines import SUPPORTED_TASKS

from cmp_trainer import __version__
from cmp_trainer.ablations.crop import CmpCrop
from cmp_trainer.ablations.drop import CmpDrop
from cmp_trainer.ablations.skip import CmpSkip
from cmp_trainer.losses.comparative import ComparativeLoss, RegularizedLoss
from cmp_trainer.reports.curves import IN_VIOLATION, measures, plot_curves, summarize
from cmp_trainer.saving.files import warned_where_unwritable, written_whole
from cmp_trainer.step import bare_model

logger = logging.getLogger(__name__)

TEMPLATE = Path(__file__).with_name("model_card_template.md")
TAGS = ["cmp-trainer", "comparative-loss"]
CURVE_IMAGE = "ablation_curve.png"
CITATIONS = """\
@article{zhu2024comparative,
  title = {Cross-Model Comparative Loss for Enhancing Neuronal Utility in Language Understanding},
  author = {Zhu, Yunchang and Pang, Liang and Wu, Kangxi and Lan, Yanyan and Shen, Huawei and Cheng, Xueqi},
  journal = {ACM Transactions on Information Systems},
  volume = {42},
  number = {5},
  year = {2024},
  doi = {10.1145/3652599}
}

@inproceedings{zhu2022lol,
  title = {{LoL}: A Comparative Regularization Loss over Query Reformulation Losses for Pseudo-Relevance Feedback},
  author = {Zhu, Yunchang and Pang, Liang and Lan, Yanyan and Shen, Huawei and Cheng, Xueqi},
  booktitle = {International ACM SIGIR Conference on Research and Development in Information Retrieval},
  year = {2022},
  doi = {10.1145/3477495.3532017}
}"""

_ALWAYS_SHOWN = ("cmp_num_ablations", "cmp_objective", "cmp_baseline")
_OF_ABLATIONS = ("cmp_num_ablations", "cmp_num_crops", "cmp_crop_order", "cmp_num_skips", "cmp_skip_", "cmp_dropout")
_OF_OBJECTIVE = ("cmp_objective", "cmp_baseline", "cmp_ranking", "cmp_temperature", "cmp_margin", "cmp_primary")
_OF_OBJECTIVE += ("cmp_weight", "cmp_loss_threshold")
_NOT_MEASURES = ("runtime", "_per_second", "samples", "model_preparation_time", "questions", "_total")  # endings


def write_model_card(trainer: Any, *args: Any, **kwargs: Any) -> None:
    """Write README.md, and the picture of the ablation curve where one was measured, into the output folder.

    Args:
        trainer: a CmpTrainer.
        *args, **kwargs: those of `Trainer.create_model_card`: language, license, tags, model_name, finetuned_from,
            tasks, dataset_tags, dataset, dataset_args.
    """
    folder = Path(trainer.args.output_dir)
    if trainer.curve is not None and find_spec("matplotlib") is not None:
        config = getattr(bare_model(trainer.model), "config", None)
        regression = getattr(config, "problem_type", None) == "regression"
        unit = None if regression or trainer.per_example_loss_func is not None else "nats"
        figure = plot_curves(trainer.curve, loss_unit=unit)
        with warned_where_unwritable(f"the plot {folder / CURVE_IMAGE}"), written_whole(folder / CURVE_IMAGE) as file:
            figure.savefig(file)
    card, path = model_card(trainer, *args, **kwargs), folder / "README.md"
    with warned_where_unwritable(f"the model card {path}"), written_whole(path) as file:
        card.save(file)


def model_card(trainer: Any, *args: Any, **kwargs: Any) -> ModelCard:
    """The card of the trainer's model, not yet written. Arguments as in `write_model_card`."""
    summary = TrainingSummary.from_trainer(trainer, *args, **kwargs)
    evaluation = _evaluation(trainer)
    base_model = summary.finetuned_from if _is_repository(summary.finetuned_from) else None
    adapter = _peft_config(trainer)
    data = ModelCardData(
        language=summary.language,
        license=summary.license,
        library_name="peft" if adapter is not None else "transformers",
        base_model=base_model,
        tags=[*_listed(summary.tags), *_tags_in(Path(trainer.args.output_dir, "README.md")), *TAGS],
        datasets=[tag for tag in _listed(summary.dataset_tags) if _is_repository(tag)] or None,
        metrics=[name for name in evaluation if "loss" not in name and name != "violation_rate"] or None,
        pipeline_tag=next(iter(_listed(summary.tasks)), None),
        model_name=summary.model_name,
        eval_results=_model_index(trainer, summary, evaluation) or None,
    )
    return ModelCard.from_template(
        data,
        template_str=TEMPLATE.read_text(encoding="utf-8"),
        model_name=_escaped(summary.model_name),
        origin=_origin(trainer, base_model),
        datasets=_escaped(" and ".join(_listed(summary.dataset))),
        library="PEFT" if adapter is not None else "Transformers",
        usage=_usage(trainer, summary, adapter),
        results={_escaped(name.replace("_", " ")): _number(value) for name, value in evaluation.items()},
        evaluated_on=_escaped(_evaluated_on(trainer, summary)),
        progress=_progress(summary),
        hyperparameters=_hyperparameters(trainer, summary),
        versions=", ".join(_versions(adapter)),
        citations=CITATIONS,
        **_comparison(trainer),
        **_curve(trainer.curve),
    )


def _progress(summary: TrainingSummary) -> list[dict[str, str]]:
    """The evaluations during training, a row each."""
    rows: list[Any] = summary.eval_lines or []
    return [{_escaped(name): _number(value) for name, value in row.items()} for row in rows]


def _comparison(trainer: Any) -> dict[str, Any]:
    """The settings of comparative loss, as a table and in words."""
    counts = Counter(map(_taken_away, trainer.ablations))
    return {
        "num_ablations": trainer.num_ablations,
        "ablations": _escaped(", ".join(f"{count} by {what}" for what, count in counts.items())),
        "objective": _objective(trainer.comparative_step().objective),
        "cmp_arguments": _arguments(trainer),
    }


def _taken_away(ablation: Any) -> str:
    if isinstance(ablation, CmpDrop):
        return "dropout of hidden neurons"
    if isinstance(ablation, CmpSkip):
        return "skipping layers"
    return "cutting input context" if isinstance(ablation, CmpCrop) else f"ablation of {ablation.name}"


def _objective(objective: Any) -> str:
    if isinstance(objective, ComparativeLoss) and objective.ranking == "pairwise":
        return (
            "the mean over all pairs i < j of max(0, l(i) − l(j)) was minimized, with a last l(c+1) that is the "
            "baseline."
        )
    if isinstance(objective, (ComparativeLoss, RegularizedLoss)):
        kind = "comparative" if isinstance(objective, ComparativeLoss) else "regularized"
        return f"the {kind} objective with {objective.ranking} ranking was minimized."
    name = getattr(objective, "__name__", type(objective).__name__).replace("`", "")
    return f"the objective `{name}` was minimized."


def _arguments(trainer: Any) -> dict[str, Any]:
    """The arguments of comparative loss, without those that objects replaced."""
    args = trainer.args
    shown = {
        field.name: getattr(args, field.name)
        for field in dataclasses.fields(args)
        if field.name.startswith("cmp_")
        and (field.name in _ALWAYS_SHOWN or getattr(args, field.name) != field.default)
    }
    if shown and args.cmp_objective == "regularized":
        del shown["cmp_baseline"]
        shown = {**shown, "cmp_primary": args.cmp_primary, "cmp_weight": args.cmp_weight}
    replaced = _OF_ABLATIONS if trainer._given_ablations is not None else ()
    replaced += _OF_OBJECTIVE if trainer._given_objective is not None else ()
    return {name: _escaped(value) for name, value in shown.items() if not name.startswith(replaced)}


def _hyperparameters(trainer: Any, summary: TrainingSummary) -> dict[str, Any]:
    args, named = trainer.args, dict(summary.hyperparameters or {})
    named["optimizer"] = getattr(args.optim, "value", args.optim) + (
        f" ({args.optim_args})" if args.optim_args else ""
    )
    return {name.replace("_", " "): _escaped(value) for name, value in named.items()}


def _curve(curve: pd.DataFrame | None) -> dict[str, Any]:
    """The ablation curve as rows of text; nothing where none was measured."""
    if curve is None:
        return {"curve": None}
    columns = measures(curve)
    shown = ["loss", *(name for name in columns if name not in ("loss", IN_VIOLATION)), IN_VIOLATION]
    summary = summarize(curve)
    rows = []
    for key, row in summary.iterrows():
        _, ablation, level = key  # pyright: ignore[reportGeneralTypeIssues]
        cells = []
        for name in shown:
            values: Any = row[name]
            mean, spread = values["mean"], values["std"]
            cells.append(f"{mean:.4f}" + (f" ± {spread:.4f}" if spread > 0 else ""))
        rows.append([_escaped(ablation), level, *cells])
    return {
        "curve": rows,
        "curve_columns": [_escaped(name.replace("_", " ")) for name in shown],
        "curve_image": CURVE_IMAGE if find_spec("matplotlib") is not None else None,
        "curve_examples": curve["examples"].max(),
        "curve_seeds": ", ".join(str(seed) for seed in curve["seed"].unique()),
        "curve_is_repeated": curve["seed"].nunique() > 1,
    }


def _evaluation(trainer: Any) -> dict[str, float]:
    """The latest evaluation of the model at hand, without the `eval_` prefix and without timings.

    With `load_best_model_at_end` that is the evaluation of the best step, unless one was made after training.
    """
    history = trainer.state.log_history
    evaluations = [number for number, log in enumerate(history) if "eval_loss" in log]
    trained = max((number for number, log in enumerate(history) if "train_runtime" in log), default=-1)
    best = getattr(trainer.state, "best_global_step", None)
    if trainer.args.load_best_model_at_end and best and not any(number > trained for number in evaluations):
        evaluations = [number for number in evaluations if history[number]["step"] == best]
    if not evaluations:
        return {}
    log = history[evaluations[-1]]
    values = {name.removeprefix("eval_"): value for name, value in log.items() if name.startswith("eval_")}
    return {name: value for name, value in values.items() if not name.endswith(_NOT_MEASURES)}


def _model_index(trainer: Any, summary: TrainingSummary, evaluation: dict[str, float]) -> list[EvalResult]:
    """Results in the form of the Hub's model-index, which wants a task and a dataset for each."""
    task, tag = (next(iter(_listed(given)), None) for given in (summary.tasks, summary.dataset_tags))
    metrics = {name: value for name, value in evaluation.items() if "loss" not in name and name != "violation_rate"}
    if task is None or tag is None:
        if metrics:
            missing = "tasks" if task is None else "dataset_tags"
            logger.info("results are in the card's text but not in its metadata: no `%s` were given.", missing)
        return []
    return [
        EvalResult(
            task_type=task,
            task_name=TASK_TAG_TO_NAME_MAPPING.get(task),
            dataset_type=tag,
            dataset_name=next(iter(_listed(summary.dataset)), tag),
            dataset_config=next(iter(_listed(summary.dataset_args)), None),
            dataset_split=_split(trainer),
            metric_type=name,
            metric_name=name.replace("_", " "),
            metric_value=value,
        )
        for name, value in metrics.items()
    ]


def _usage(trainer: Any, summary: TrainingSummary, adapter: Any) -> str:
    """Code that loads the model."""
    name = _literal(getattr(trainer, "hub_model_id", None) or trainer.args.hub_model_id or summary.model_name)
    model: Any = bare_model(trainer.model)
    kind, task = type(model).__name__, next(iter(_listed(summary.tasks)), None)
    if adapter is not None:
        base = adapter.base_model_name_or_path
        base = _literal(base if _is_repository(base) else "folder/of/the/base/model")
        labels = f", num_labels={model.config.num_labels}" if "Classification" in kind else ""
        return (
            f"from peft import PeftModel\nfrom transformers import {kind}\n\n"
            f"base = {kind}.from_pretrained({base}{labels})\nmodel = PeftModel.from_pretrained(base, {name})"
        )
    if task in SUPPORTED_TASKS:
        return f'from transformers import pipeline\n\nmodel = pipeline("{task}", model={name})'
    kind = kind if hasattr(transformers, kind) else "AutoModel"
    return (
        f"from transformers import AutoTokenizer, {kind}\n\ntokenizer = AutoTokenizer.from_pretrained({name})\n"
        f"model = {kind}.from_pretrained({name})"
    )


def _origin(trainer: Any, base_model: str | None) -> str:
    if base_model is not None:
        return f"[{base_model}](https://huggingface.co/{base_model}), fine-tuned"
    model: Any = bare_model(trainer.model)
    from_scratch = not getattr(getattr(model, "config", None), "_name_or_path", "")
    return f"A {type(model).__name__}, {'trained from scratch' if from_scratch else 'fine-tuned'}"


def _evaluated_on(trainer: Any, summary: TrainingSummary) -> str:
    names, split = " and ".join(_listed(summary.dataset)), _split(trainer)
    data = trainer.eval_dataset
    size = f"{len(data)} examples" if hasattr(data, "__len__") and not isinstance(data, dict) else ""
    return ", ".join(part for part in (names and f"{names}{f' ({split})' if split else ''}", size) if part)


def _split(trainer: Any) -> str | None:
    """The split that was evaluated on. Local files are called "train" where nobody gave them another name."""
    split, info = getattr(trainer.eval_dataset, "split", None), getattr(trainer.eval_dataset, "info", None)
    from_files = info is not None and info.builder_name is not None and info.builder_name == info.dataset_name
    return None if split is None or (from_files and str(split) == "train") else str(split)


def _peft_config(trainer: Any) -> Any:
    """The configuration of the adapter that was trained; None for a full model."""
    model = trainer.accelerator.unwrap_model(trainer.model, keep_torch_compile=False)
    return model.active_peft_config if hasattr(model, "active_peft_config") else None


def _tags_in(card: Path) -> list[str]:
    """Tags of a card that is there already, such as the one PEFT writes on saving."""
    tags = _listed(ModelCard.load(card).data.get("tags")) if card.is_file() else []
    return [tag for tag in tags if not tag.startswith("base_model:") or _is_repository(tag.rpartition(":")[2])]


def _versions(adapter: Any) -> list[str]:
    libraries = ["transformers", "torch", "datasets", "tokenizers", *(["peft"] if adapter else [])]
    return [f"cmp-trainer {__version__}", *(f"{name} {metadata.version(name)}" for name in libraries)]


def _is_repository(name: Any) -> bool:
    """Whether this can be an id on the Hub (a path of this machine, for instance, cannot)."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return bool(name) and not Path(name).exists()


def _listed(value: Any) -> list[Any]:
    values = [value] if value is None or isinstance(value, str) else value
    return [one for one in values if one is not None]


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else _escaped(value)


def _escaped(value: Any) -> str:
    """A value as text on one line of Markdown: no HTML, and no end of a table's cell."""
    return html.escape(" ".join(str(value).split()), quote=False).replace("|", "\\|")


def _literal(name: Any) -> str:
    """A name as a string in Python code."""
    return json.dumps(str(name), ensure_ascii=False)
