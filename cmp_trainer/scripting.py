"""What every example script would otherwise repeat: arguments, data, the run.

A training script is particular in its data and its metric; the rest is the same everywhere and stands here in the
order in which a script calls it:

1. `parse_arguments` reads dataclasses from the command line, after a YAML or JSON config if the first argument is one.
2. `set_up` sets seed and verbosity, and refuses to write over the checkpoints of another run.
3. `load_splits` and `take_split` read a dataset of the Hub or local files, check columns and take subsets;
   `load_pretrained` reads a model or tokenizer.
4. `run` trains (and resumes), evaluates, predicts, saves and pushes.

A `main` under `plain_errors` ends with one line instead of a traceback where the input is at fault:

    @plain_errors()
    def main() -> None:
        model_args, data_args, args = parse_arguments(ModelArguments, DataArguments, CmpTrainingArguments)
        set_up(args)
        splits = load_splits(data_args)
        train_dataset = take_split(splits, "train", ["sentence", "label"], data_args.max_train_samples)
        ...
        run(trainer, evaluation={"eval": eval_dataset}, prediction={"test": test_dataset}, write_predictions=write)
"""

from __future__ import annotations

import dataclasses
import json
import logging
import re
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets
import transformers
import yaml
from datasets import Dataset, DatasetDict
from safetensors import SafetensorError
from tqdm.auto import tqdm
from transformers import HfArgumentParser, PreTrainedTokenizerBase, Trainer, TrainingArguments
from transformers.trainer_utils import PredictionOutput

from cmp_trainer.checks.settings import check_launch
from cmp_trainer.data.tables import check_texts as check_texts  # also of this module, which scripts import
from cmp_trainer.data.tables import load_file
from cmp_trainer.data.tables import take_split as take_split
from cmp_trainer.errors import first_line, is_disk_fault, is_from_cmp_trainer, nearest, origin
from cmp_trainer.saving.checkpoints import checkpoint_to_resume, checkpoints, fault_of

logger = logging.getLogger(__name__)

CONFIG_SUFFIXES = (".yaml", ".yml", ".json")

# Of two arguments for the same thing Trainer follows the second, so one from a config must give way to the first.
RIVALS = {"num_train_epochs": "max_steps", "warmup_ratio": "warmup_steps"}

# Which extra of this package brings a module that the core does not need.
EXTRAS = {
    **dict.fromkeys(("evaluate", "sklearn", "scipy", "torchmetrics"), "examples"),
    "matplotlib": "plot",
    **dict.fromkeys(("bm25s", "faiss", "ir_datasets", "ir_measures"), "prf"),
}


@dataclasses.dataclass
class ModelArguments:
    """Which pre-trained model a script starts from."""

    model_name_or_path: str = dataclasses.field(metadata={"help": "Model on the Hub, or the folder of a saved one"})
    tokenizer_name: str | None = dataclasses.field(
        default=None, metadata={"help": "Tokenizer, where it is not the model's"}
    )
    model_revision: str = dataclasses.field(default="main", metadata={"help": "Branch, tag or commit on the Hub"})
    cache_dir: str | None = dataclasses.field(default=None, metadata={"help": "Where downloads from the Hub are kept"})
    trust_remote_code: bool = dataclasses.field(
        default=False,
        metadata={"help": "Run code that comes with the model; only for models whose code you have read"},
    )


@dataclasses.dataclass
class DataArguments:
    """Where a script's data comes from: a dataset on the Hub, or local files.

    Every field named `<split>_file` is the local file of a split, so a script adds a split by adding a field.
    Where any file is given only files are read.
    """

    dataset_name: str | None = dataclasses.field(default=None, metadata={"help": "Dataset on the Hub"})
    dataset_config_name: str | None = dataclasses.field(default=None, metadata={"help": "Its configuration"})
    train_file: str | None = dataclasses.field(default=None, metadata={"help": "csv, tsv, json, jsonl or parquet"})
    validation_file: str | None = dataclasses.field(
        default=None, metadata={"help": "csv, tsv, json, jsonl or parquet"}
    )
    test_file: str | None = dataclasses.field(default=None, metadata={"help": "csv, tsv, json, jsonl or parquet"})
    max_train_samples: int | None = dataclasses.field(default=None, metadata={"help": "Train on the first so many"})
    max_eval_samples: int | None = dataclasses.field(default=None, metadata={"help": "Evaluate on the first so many"})
    max_predict_samples: int | None = dataclasses.field(default=None, metadata={"help": "Predict the first so many"})

    def files(self) -> dict[str, Path]:
        """The local file of every split that has one."""
        given = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {
            name.removesuffix("_file"): Path(file).expanduser()
            for name, file in given.items()
            if name.endswith("_file") and file is not None
        }

    def card(self) -> dict[str, str | None]:
        """What a model card says of the data: the Hub's name, or the files', without folders of this machine."""
        if files := self.files():
            return {"dataset": f"local files ({', '.join(f'{split}: {file.name}' for split, file in files.items())})"}
        return {
            "dataset": " ".join(name for name in (self.dataset_name, self.dataset_config_name) if name),
            "dataset_tags": self.dataset_name,
            "dataset_args": self.dataset_config_name,
        }


@contextmanager
def plain_errors() -> Iterator[None]:
    """End the program with one line, not a traceback, for errors that the user can do something about.

    - A ValueError that cmp_trainer, the script or a module beside it raises: its message, exit status 2.
    - A package that is not installed, if the script's imports are in the block too: what to install, exit status 2.
    - A disk that is full or not writable: exit status 1. Ctrl-C: exit status 130, as in a shell. The log says from
      which checkpoint the training can be resumed.

    Everything else, a bug for instance, keeps its traceback.
    """
    try:
        yield
    except (Exception, KeyboardInterrupt) as error:
        told = _in_one_line(error)
        if told is None:
            raise
        message, status = told
        logger.debug("the error came from here", exc_info=True)
        tqdm.write(message, file=sys.stderr)  # on a line of its own, also under a progress bar
        raise SystemExit(status) from error


def _in_one_line(error: BaseException) -> tuple[str, int] | None:
    """The line for an error that is told in one, and the exit status."""
    if isinstance(error, KeyboardInterrupt):
        return "interrupted", 130
    if isinstance(error, ModuleNotFoundError) and (extra := EXTRAS.get(str(error.name).partition(".")[0])):
        return f"error: {error.name} is not installed; pip install 'cmp-trainer[{extra}]'", 2
    if is_disk_fault(error):
        return f"error: {first_line(error)}. Free some space or pass another --output_dir", 1
    module, folder = origin(error)
    script = getattr(sys.modules["__main__"], "__file__", None)
    is_script = module == "__main__" or (script is not None and folder == Path(script).resolve().parent)
    if isinstance(error, ValueError) and (is_script or is_from_cmp_trainer(error)):
        return f"error: {error}", 2
    return None


def parse_arguments(*dataclass_types: Any, argv: Sequence[str] | None = None) -> tuple[Any, ...]:
    """One instance of each dataclass, from a config file and the command line.

    If the first argument ends in .yaml, .yml or .json it is a config with the arguments' names as keys; arguments
    after it override it. Relative paths of files to read in a config (keys that end in `_file`, and `name_or_path`
    keys that start with `./` or `../`) start at the config's folder, so that a config runs from anywhere; output_dir
    and everything on the command line start at the working directory. --num_train_epochs on the command line also
    replaces a config's max_steps, which Trainer would otherwise follow.

    Raises:
        ValueError: An unknown name (with the nearest known ones), a value of the wrong type, or a combination that
            the dataclasses themselves refuse.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    # Abbreviations would make a misspelt argument mean another one.
    parser = _Parser(dataclass_types, allow_abbrev=False)
    fields = {field.name: field for kind in dataclass_types for field in dataclasses.fields(kind) if field.init}
    if arguments and arguments[0].endswith(CONFIG_SUFFIXES):
        arguments = _config_arguments(Path(arguments[0]), fields, arguments[1:]) + arguments[1:]
    if "warmup_ratio" not in fields and "warmup_steps" in fields:
        # From transformers 5 on, warmup_steps below 1 is the ratio and warmup_ratio is gone.
        arguments = [re.sub("^--warmup[_-]ratio", "--warmup_steps", argument) for argument in arguments]
    try:
        *parsed, unknown = parser.parse_args_into_dataclasses(
            arguments, return_remaining_strings=True, look_for_args_file=False
        )
    except ValueError as error:
        raise ValueError(str(error)) from error
    if unknown:
        name = unknown[0].split("=")[0]
        near = nearest(name.lstrip("-").replace("-", "_"), fields, "--")
        raise ValueError(f"unknown argument {name}{near}; --help lists all of them")
    return tuple(parsed)


def set_up(args: TrainingArguments) -> None:
    """Set verbosity and seed before anything is loaded, and check what the run is asked to do.

    Raises:
        ValueError: Nothing to do, an output_dir that cannot be written, no complete checkpoint to resume from,
            checkpoints of another run in output_dir, or processes that do not know of each other and would all write
            there.
    """
    check_launch(args.world_size)
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s", datefmt="%H:%M:%S")
    level = args.get_process_log_level()
    by_default = args.log_level == "passive" and args.should_log
    logging.getLogger("cmp_trainer").setLevel(logging.INFO if by_default else level)
    datasets.utils.logging.set_verbosity(max(level, logging.WARNING))
    transformers.utils.logging.set_verbosity(level)
    transformers.set_seed(args.seed)

    if not (args.do_train or args.do_eval or args.do_predict):
        raise ValueError("nothing to do; pass --do_train, --do_eval or --do_predict")
    resume, folder = _resume_from(args), Path(str(args.output_dir))
    _require_writable(folder)
    if args.do_train and resume:
        args.resume_from_checkpoint = checkpoint_to_resume(resume, str(folder))
    elif args.do_train and (held := checkpoints(folder)):
        complete = any(fault_of(checkpoint) is None for checkpoint in held)
        way_on = "--resume_from_checkpoint true to go on from there, or " if complete else "(none of them complete) "
        names = ", ".join(checkpoint.name for checkpoint in reversed(held))
        raise ValueError(f"{folder} already holds {names}; pass {way_on}another --output_dir")


def _require_writable(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(f"--output_dir {folder} cannot be written: {error.strerror}; give another folder") from error


def load_splits(data_args: DataArguments) -> dict[str, Dataset]:
    """The splits of a dataset by name: the local files where any are given, otherwise the dataset on the Hub.

    Raises:
        ValueError: No source; a file that is missing, empty or not of the form that its ending says; a dataset that
            does not exist or cannot be reached.
    """
    if files := data_args.files():
        logger.info("reading local files: %s", ", ".join(f"{split} from {file}" for split, file in files.items()))
        return {split: load_file(file, split) for split, file in files.items()}
    options = " ".join(f"--{field.name}" for field in dataclasses.fields(data_args) if field.name.endswith("_file"))
    if data_args.dataset_name is None:
        raise ValueError(f"no data; pass --dataset_name (a dataset on the Hub) or local files ({options})")
    try:
        splits = datasets.load_dataset(data_args.dataset_name, data_args.dataset_config_name)
    except (OSError, ValueError) as error:  # not found, no access, no network; no such configuration
        raise ValueError(
            f"--dataset_name {data_args.card()['dataset']} could not be loaded "
            f"({first_line(error)}). Without network, or with data of your own, pass local files: {options}"
        ) from error
    assert isinstance(splits, DatasetDict)
    return {str(split): dataset for split, dataset in splits.items()}


def load_pretrained(auto_class: Any, name: str, model_args: ModelArguments, **kwargs: Any) -> Any:
    """`auto_class.from_pretrained(name)` with revision, cache and trust taken from the model arguments.

    Raises:
        ValueError: The model or tokenizer cannot be found, reached or read; says what to do.
    """
    with plain_load_errors(name, "Tokenizer" in auto_class.__name__):
        loaded = auto_class.from_pretrained(
            name,
            revision=model_args.model_revision,
            cache_dir=model_args.cache_dir,
            trust_remote_code=model_args.trust_remote_code,
            **kwargs,
        )
        # Where a folder holds a model alone, transformers makes up a tokenizer of special tokens.
        if isinstance(loaded, PreTrainedTokenizerBase) and set(loaded.get_vocab()) <= set(loaded.all_special_tokens):
            raise ValueError("there is no tokenizer")
    return loaded


@contextmanager
def plain_load_errors(name: str, is_tokenizer: bool = False) -> Iterator[None]:
    """Turn any error of loading the model or tokenizer `name` into a ValueError that says what to do."""
    try:
        yield
    except (OSError, ValueError, RuntimeError, ImportError, SafetensorError, EOFError) as error:  # not there; damaged
        if not Path(name).is_dir():
            advice = "Without a network connection, pass the folder of a saved model"
        elif is_tokenizer:
            advice = "Save the model's tokenizer in this folder too: tokenizer.save_pretrained(folder)"
        else:
            advice = "If some of its files are missing or truncated, save or copy the model again"
        raise ValueError(f"{name!r} could not be loaded ({first_line(error)}). {advice}") from error


def run(
    trainer: Trainer,
    evaluation: Mapping[str, Any] | None = None,
    prediction: Mapping[str, Any] | None = None,
    write_predictions: Callable[[str, PredictionOutput], None] | None = None,
    card: Mapping[str, Any] | None = None,
) -> dict[str, float]:
    """Train, evaluate and predict as the arguments say; save model, state and metrics; write or push the card.

    Args:
        evaluation: The datasets of --do_eval by the prefix of their metrics, `{"eval": dataset}`.
        prediction: The datasets of --do_predict by a name that `write_predictions` is called with.
        write_predictions: Called on the main process with that name and what `trainer.predict` returned.
        card: Arguments of `Trainer.create_model_card`.

    Returns:
        All metrics by name.
    """
    args, metrics = trainer.args, {}
    if args.do_train:
        result = trainer.train(resume_from_checkpoint=_resume_from(args))
        trainer.save_model()
        trainer.save_state()
        metrics |= _report(trainer, "train", result.metrics, trainer.train_dataset)
    if args.do_eval:
        for prefix, dataset in (evaluation or {}).items():
            result = trainer.evaluate(dataset, metric_key_prefix=prefix)
            metrics |= _report(trainer, prefix, result, dataset)
    if args.do_predict:
        for name, dataset in (prediction or {}).items():
            output = trainer.predict(dataset, metric_key_prefix=name)
            metrics |= _report(trainer, name, output.metrics or {}, dataset)
            if write_predictions is not None and trainer.is_world_process_zero():
                write_predictions(name, output)
    if args.push_to_hub:
        trainer.push_to_hub(**dict(card or {}))
    elif args.do_train:
        trainer.create_model_card(**dict(card or {}))
    return metrics


def distinct_names(paths: Sequence[str | Path]) -> list[str]:
    """What folders are called in a table: their last parts, as many as tell them apart.

    Raises:
        ValueError: The same path twice.

    >>> distinct_names(["runs/a/best", "runs/b/best", "hub/model"])
    ['a/best', 'b/best', 'hub/model']
    >>> distinct_names(["runs/baseline", "runs/comparative"])
    ['baseline', 'comparative']
    """
    parts = [Path(path).resolve().parts if Path(path).exists() else Path(path).parts for path in paths]
    for depth in range(1, max(map(len, parts)) + 1):
        names = ["/".join(one[-depth:]) for one in parts]
        if len(set(names)) == len(names):
            return names
    repeated = next(str(path) for path, one in zip(paths, parts, strict=True) if parts.count(one) > 1)
    raise ValueError(f"{repeated} is given twice; give each folder once")


class _Parser(HfArgumentParser):
    """Raises instead of printing the two hundred arguments of a Trainer above the one line that matters."""

    def error(self, message: str) -> Any:
        raise ValueError(message)


def _config_arguments(path: Path, fields: Mapping[str, dataclasses.Field], overrides: Sequence[str]) -> list[str]:
    """A config as command-line arguments, so that both are read by the same rules (`1e-5` is a number in both)."""
    given = {override.split("=")[0].lstrip("-").replace("-", "_") for override in overrides}
    overridden = {RIVALS[name] for name in given if name in RIVALS} - given
    arguments = []
    for key, value in _read_config(path).items():
        if key not in fields and not (key == "warmup_ratio" and "warmup_steps" in fields):
            raise ValueError(f"{path}: unknown key {key!r}{nearest(key, fields)}")
        if key in overridden:
            logger.warning("%s: %s gives way to the command line", path, key)
        elif value is None:
            if fields[key].default is not None:
                raise ValueError(f"{path}: {key} is null, but it needs a value; leave the key out for its default")
        elif isinstance(value, list):
            arguments += [f"--{key}", *value]
        else:
            arguments.append(f"--{key}={_from_folder(path.parent, key, value)}")
    return arguments


def _read_config(path: Path) -> dict[str, str | list[str] | None]:
    """Keys and values as text. YAML would otherwise read `no` as false and `1e-5` as text, JSON as they stand."""
    if not path.is_file():
        raise ValueError(f"the config {path} does not exist")
    text = path.read_text(encoding="utf-8")
    try:
        values = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
        texts = values if path.suffix == ".json" else yaml.load(text, yaml.BaseLoader)
    except (ValueError, yaml.YAMLError) as error:
        raise ValueError(f"the config {path} cannot be read: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"the config {path} must hold names and values, `learning_rate: 1e-5`, one a line")

    def as_text(value: Any) -> str:
        return value if isinstance(value, str) else json.dumps(value)

    config: dict[str, str | list[str] | None] = {}
    for (key, value), raw in zip(values.items(), texts.values(), strict=True):
        if value is None:
            config[str(key)] = None
        elif isinstance(value, list):
            config[str(key)] = [as_text(item) for item in raw]
        else:
            config[str(key)] = as_text(value if isinstance(value, dict) else raw)
    return config


def _from_folder(folder: Path, key: str, value: str) -> str:
    is_path = key.endswith("_file") or (key.endswith("name_or_path") and value.startswith(("./", "../")))
    return str(folder / Path(value).expanduser()) if is_path else value


def _resume_from(args: TrainingArguments) -> bool | str | None:
    """`--resume_from_checkpoint true` arrives as text: the last checkpoint (True), none, or a checkpoint's folder."""
    text = str(args.resume_from_checkpoint or "")
    return {"": None, "false": None, "true": True}.get(text.lower(), text)


def _report(trainer: Trainer, name: str, metrics: Mapping[str, float], dataset: Any) -> dict[str, float]:
    counted = {**metrics, f"{name}_samples": len(dataset)}
    trainer.log_metrics(name, counted)
    trainer.save_metrics(name, counted)
    return counted
