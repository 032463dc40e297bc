"""The command line: `cmp-trainer run script.py …` and `cmp-trainer curve MODEL … --data FILE`.

Where a launcher wants a module, `python -m cmp_trainer.cli …` does the same.
Each command is a parser and a function; what a command needs is imported when it runs.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command that the arguments name; those of this process when None."""
    parsed = make_parser().parse_args(arguments)
    parsed.command(parsed)


def make_parser() -> argparse.ArgumentParser:
    """The parser of all commands; `command` of what it parses is the function that runs."""
    parser = argparse.ArgumentParser(prog="cmp-trainer", description="Comparative loss for the Hugging Face Trainer.")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    _add_run(commands)
    _add_curve(commands)
    return parser


def _add_run(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "run",
        help="run a Hugging Face script with comparative loss",
        description="Run a Hugging Face training script as it is, with Trainer and TrainingArguments replaced, so "
        "that its command line understands --cmp_num_ablations and the other arguments of comparative loss.",
        epilog="On several devices: accelerate launch -m cmp_trainer.cli run script.py …, or torchrun likewise.",
    )
    parser.add_argument("script", type=_script, help="path of the script")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="the script's own command line")
    parser.set_defaults(command=_run)


def _script(path: str) -> str:
    if not Path(path).is_file():
        raise argparse.ArgumentTypeError(
            f"{path} is no file; expected the path of a script, and after it its arguments"
        )
    return path


def _run(parsed: argparse.Namespace) -> None:
    from torch import distributed

    from cmp_trainer.run import run_script

    run_script(parsed.script, parsed.arguments)
    if distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()  # its threads may abort a process that ends before them


def _add_curve(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "curve",
        help="measure saved models at 0 … K ablations",
        description="Loss, metrics and examples in violation of saved models at 0 … K cumulative drops, and at 0 … "
        "all crops where rows carry crop_segments: a table, and with --output files and a plot.",
    )
    parser.add_argument("models", nargs="+", metavar="MODEL", help="folder of a saved model, or its name on the Hub")
    parser.add_argument("--data", "--data_file", required=True, help="labelled rows: csv, tsv, json, jsonl or parquet")
    parser.add_argument(
        "--task",
        choices=("text-classification", "question-answering", "tokenized"),
        help="by default what the first model was made for",
    )
    parser.add_argument("--columns", nargs="+", help="text columns to classify; by default all text columns but label")
    parser.add_argument("--names", nargs="+", help="what the models are called; by default their folders' names")
    parser.add_argument("--drops", type=int, default=3, help="K, the most cumulative drops (default: %(default)s)")
    parser.add_argument(
        "--dropout", "--cmp_dropout", type=float, help="rate at every dropout site in place of the models' own"
    )
    parser.add_argument("--seeds", type=int, default=3, help="number of mask seeds (default: %(default)s)")
    parser.add_argument("--metric", help="the metric that is drawn; by default the first")
    parser.add_argument("--max_samples", type=int, help="only the first so many rows")
    parser.add_argument("--max_length", type=int, default=384, help="longest input in tokens (default: %(default)s)")
    parser.add_argument("--batch_size", type=int, default=32, help="rows of a forward (default: %(default)s)")
    parser.add_argument("--output", type=Path, help="also write OUTPUT.csv, OUTPUT.json and OUTPUT.png")
    parser.set_defaults(command=_curve)


def _curve(parsed: argparse.Namespace) -> None:
    from cmp_trainer.curve import run_curve

    run_curve(parsed)


if __name__ == "__main__":
    main()
