"""The command line: `cmp-trainer run`, `curve`, `compare` and `shrink`.

Where a launcher wants a module, `python -m cmp_trainer.cli …` does the same.
Each command is a parser and a function; what a command needs is imported when it runs.
"""

import argparse
import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

from cmp_trainer.errors import is_from_cmp_trainer

logger = logging.getLogger(__name__)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command that the arguments name; those of this process when None."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    parsed = parse(words)
    parsed.command(parsed)


def parse(words: list[str]) -> argparse.Namespace:
    """The command that the words name, with its options; `command` is the function that runs it."""
    if words[:1] == ["run"]:
        return _parsed_run(words)
    return _parsed_compare(words) if words[:1] == ["compare"] else make_parser().parse_args(words)


def make_parser() -> argparse.ArgumentParser:
    """The parser of all commands; `command` of what it parses is the function that runs."""
    parser = _Parser(prog="cmp-trainer", description="Comparative loss for the Hugging Face Trainer.")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    _add_run(commands)
    _add_curve(commands)
    _add_compare(commands)
    _add_shrink(commands)
    return parser


class _Parser(argparse.ArgumentParser):
    """Errors in one line, without the usage above them."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


def _add_run(commands: argparse._SubParsersAction) -> None:
    from cmp_trainer.run import cmp_parser

    parser = commands.add_parser(
        "run",
        help="run a Hugging Face script with comparative loss",
        usage="cmp-trainer run [-h] script.py [--cmp_num_ablations 2 …] [the script's own arguments …]",
        description="Run a Hugging Face training script as it is, with Trainer and TrainingArguments replaced. The "
        "arguments of comparative loss, listed below, may stand anywhere on its command line. The script does not see "
        "them, and they override what it or its config sets. A run that asks for ablations and compares nothing ends "
        "with an error.",
        epilog="On several devices: accelerate launch -m cmp_trainer.cli run script.py …, or torchrun likewise.",
        parents=[cmp_parser()],
        formatter_class=_OneSpelling,
        allow_abbrev=False,
    )
    parser.add_argument("script", help="path of the script")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="the script's own command line")
    parser.set_defaults(command=_run)


class _OneSpelling(argparse.HelpFormatter):
    """Shows `--cmp_margin X` and not also `--cmp-margin X`, which HfArgumentParser accepts too."""

    def _format_action_invocation(self, action: argparse.Action) -> str:
        invocation = super()._format_action_invocation(action)
        return invocation.partition(", --cmp-")[0] if invocation.startswith("--cmp_") else invocation


def _parsed_run(words: list[str]) -> argparse.Namespace:
    from cmp_trainer.run import require_known, until_dashes

    words, of_script = until_dashes(words)  # argparse would drop the first `--`
    with _errors_in_one_line():
        require_known(words)
    parsed = make_parser().parse_args(words)
    parsed.arguments += of_script
    return parsed


@contextmanager
def _errors_in_one_line() -> Iterator[None]:
    """Exit with 2 where the command line is at fault, with 1 where cmp_trainer rejects what the script does."""
    from cmp_trainer.run import NothingComparedError, UsageError

    try:
        yield
    except (ValueError, NothingComparedError) as error:
        if not isinstance(error, (UsageError, NothingComparedError)) and not is_from_cmp_trainer(error):
            raise
        logger.debug("the error came from here", exc_info=True)
        print(f"cmp-trainer run: error: {error}", file=sys.stderr)
        raise SystemExit(2 if isinstance(error, UsageError) else 1) from None


def _run(parsed: argparse.Namespace) -> None:
    from cmp_trainer.run import leave_process_group, run_script

    given = {name: value for name, value in vars(parsed).items() if name.startswith("cmp_")}
    try:
        with _errors_in_one_line():
            run_script(parsed.script, parsed.arguments, given)
    except SystemExit as stop:
        if stop.code in (None, 0):
            leave_process_group()
        raise
    leave_process_group()


def _add_curve(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "curve",
        help="measure saved models at 0 … K ablations",
        description="Loss, metrics and examples in violation of saved models at 0 … K cumulative drops, and at 0 … "
        "all crops where rows carry crop_segments: a table, and with --output files and a plot.",
    )
    parser.add_argument("models", nargs="+", metavar="MODEL", help="folder of a saved model, or its name on the Hub")
    _add_data(parser, required=True)
    parser.add_argument("--names", nargs="+", help="what the models are called; by default their folders' names")
    parser.add_argument("--drops", type=int, default=3, help="K, the most cumulative drops (default: %(default)s)")
    parser.add_argument("--skips", type=int, help="also skip 1 to SKIPS random layers")
    parser.add_argument(
        "--dropout", "--cmp_dropout", type=float, help="rate at every dropout site in place of the models' own"
    )
    parser.add_argument("--seeds", type=int, default=3, help="number of mask seeds (default: %(default)s)")
    parser.add_argument("--output", type=Path, help="also write OUTPUT.csv, OUTPUT.json and OUTPUT.png")
    parser.set_defaults(command=_curve)


def _add_data(parser: argparse.ArgumentParser, required: bool) -> None:
    """Labelled rows to evaluate a saved model on."""
    add = parser.add_argument
    add("--data", "--data_file", required=required, help="labelled rows: csv, tsv, json, jsonl or parquet")
    add(
        "--task",
        choices=("text-classification", "question-answering", "tokenized"),
        help="by default what the first model was made for",
    )
    add("--columns", nargs="+", help="text columns to classify; by default all text columns but label")
    add("--label_column", default="label", help="column of the labels (default: %(default)s)")
    add("--label_separator", help="what stands between several classes in one cell")
    add("--metric", help="the metric that is drawn; by default the first")
    add("--max_samples", type=int, help="use only the first MAX_SAMPLES rows")
    add("--max_length", type=int, default=384, help="longest input in tokens (default: %(default)s)")
    add("--batch_size", type=int, default=32, help="rows of a forward (default: %(default)s)")


def _curve(parsed: argparse.Namespace) -> None:
    from cmp_trainer.curve import run_curve

    run_curve(parsed)


def _add_shrink(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "shrink",
        help="cut a saved model to fewer layers",
        description="Write copies of a saved model with fewer layers, which load without cmp_trainer, and report "
        "their size, speed, loss and metrics.",
    )
    parser.add_argument("model", metavar="MODEL", help="folder of a saved model, or its name on the Hub")
    add = parser.add_argument
    add("--layers", type=int, nargs="+", required=True, help="how many stay; several numbers make several models")
    add("--output", type=Path, required=True, help="where the models go, each in a folder of its own")
    add(
        "--order",
        choices=("loss", "top"),
        help="which layers go: those whose removal costs the least loss on --data, or the top ones. Default: loss "
        "with --data, top without",
    )
    _add_data(parser, required=False)
    parser.set_defaults(command=_shrink)


def _shrink(parsed: argparse.Namespace) -> None:
    from cmp_trainer.shrink import run_shrink

    run_shrink(parsed)


def _add_compare(commands: argparse._SubParsersAction) -> None:
    from cmp_trainer.studies.methods import BUILT_IN, DEFAULT

    parser = commands.add_parser(
        "compare",
        help="run a script with several methods and seeds, and compare",
        usage="cmp-trainer compare script.py [the script's own arguments …] --metric NAME --output FOLDER [options]",
        description="Run a Hugging Face script with every method and seed, each run in its own process, and write "
        "tables and a plot for each metric that compare the methods' results and training times. Finished runs are "
        "skipped, so repeat the command to resume an interrupted study.",
        epilog="In the arguments, {seed}, {task} and {method} are replaced; --seed and --output_dir are added. "
        "Arguments after -- are passed to the script.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--study", metavar="FILE", help="YAML file with these options as keys, and with script and arguments")
    add(
        "--method",
        action="append",
        metavar="NAME[=ARGS]",
        help="a built-in method, `all` of them, or a name and its arguments; repeat it. "
        f"Default: {', '.join(DEFAULT)}. Built in: {', '.join(BUILT_IN)}",
    )
    add("--against", nargs="+", metavar="NAME", help="methods that the others are compared with; default: the first")
    add("--task", action="append", metavar="NAME=ARGS", help="a task and its arguments; repeat it for several")
    add("--seeds", type=int, metavar="N", help="seeds 0 to N - 1 (default: 5)")
    add(
        "--metric",
        nargs="+",
        action="extend",
        metavar="NAME",
        help="what runs report; lower is better for losses and errors, else higher; add :lower or :higher to set it",
    )
    add("--learning_rates", nargs="+", metavar="RATE", help="rates to choose from, for each method")
    add("--select", metavar="NAME", help="validation metric by which a learning rate is chosen")
    add("--select_seeds", type=int, metavar="N", help="choose it with the first N seeds (default: 1)")
    add("--select_tasks", nargs="+", metavar="TASK", help="choose one rate for all tasks on these; default: for each")
    add("--output", metavar="FOLDER", help="where records, logs and results go")
    add("--jobs", type=int, metavar="N", help="runs side by side, with the threads divided (default: 1)")
    add("--launcher", metavar="COMMAND", help="command before each run, such as srun or 'accelerate launch'")
    instead = parser.add_mutually_exclusive_group().add_argument
    instead("--dry_run", action="store_true", help="run nothing; print the command lines that would be run")
    instead("--report", action="store_true", help="run nothing; report what has finished so far")
    add(
        "--discard",
        action="store_true",
        default=None,
        help="delete a run's folder when its metrics are recorded",
    )
    parser.set_defaults(command=_compare)


def _parsed_compare(words: list[str]) -> argparse.Namespace:
    from cmp_trainer.run import until_dashes

    words, of_script = until_dashes(words)
    parsed, unknown = make_parser().parse_known_args(words)
    parsed.words = [*unknown, *of_script[1:]]
    return parsed


def _compare(parsed: argparse.Namespace) -> None:
    from cmp_trainer.compare import run_compare

    run_compare(parsed)


if __name__ == "__main__":
    main()
