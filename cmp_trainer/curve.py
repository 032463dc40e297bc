"""`cmp-trainer curve`: ablation curves of saved models on a file of labelled examples, side by side.

    cmp-trainer curve runs/baseline runs/comparative --data validation.jsonl --output cola

prints a table of loss, metrics and examples in violation at 0 … K drops (with --skips N also at 0 … N skipped layers,
and at 0 … all crops where rows carry `crop_segments`) and writes cola.csv (every seed), cola.json and cola.png.
reports/curves.py says what is measured; curve_data.py, how rows become batches and what the metrics are.
"""

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
from transformers.utils import logging as transformers_logging

from cmp_trainer.ablations.crop import SEGMENTS
from cmp_trainer.reports.curves import ablation_curve, as_text, measures, plot_curves
from cmp_trainer.saved_model import SavedModel, check_packages
from cmp_trainer.saving.files import written_whole
from cmp_trainer.scripting import distinct_names, plain_errors


@plain_errors()
def run_curve(options: argparse.Namespace) -> None:
    """Measure every model, print the table, write the files.

    Raises:
        SystemExit: with one line that says what is wrong with models, data or options.
    """
    _check_options(options)
    names = _names(options.models, options.names)
    transformers_logging.set_verbosity_error()
    curves = [_measure(model, name, options) for model, name in zip(options.models, names, strict=True)]
    curve = pd.concat(curves, ignore_index=True)
    print(as_text(curve))
    if options.output is not None:
        _write(curve, options)


def _measure(path: str, name: str, options: argparse.Namespace) -> pd.DataFrame:
    saved = SavedModel.load(path)
    data = saved.read(options)
    crops = 1 if SEGMENTS in data.dataset.column_names else 0  # that there are any makes the trainer keep the column
    arguments = {
        "cmp_num_ablations": max(1, options.drops) + crops,
        "cmp_num_crops": crops,
        "cmp_dropout": options.dropout,
    }
    with tempfile.TemporaryDirectory() as folder:
        trainer = saved.trainer(data, folder, options.batch_size, **arguments)
        return ablation_curve(
            trainer, drops=options.drops, skips=options.skips, seeds=range(options.seeds), model_name=name
        )


def _write(curve: pd.DataFrame, options: argparse.Namespace) -> None:
    output: Path = options.output
    files = [output.with_name(output.name + suffix) for suffix in (".csv", ".json", ".png")]
    unit = None if "pearson" in measures(curve) else "nats"  # losses of a regression are squares
    with written_whole(files[0]) as file:
        curve.to_csv(file, index=False)
    with written_whole(files[1]) as file:
        curve.to_json(file, orient="records", indent=1, double_precision=15)
    with written_whole(files[2]) as file:
        plot_curves(curve, options.metric, unit).savefig(file)
    print(f"written: {', '.join(str(file) for file in files)}")


def _check_options(options: argparse.Namespace) -> None:
    for name in ("seeds", "max_length", "batch_size"):
        if getattr(options, name) < 1:
            raise ValueError(f"--{name} {getattr(options, name)}: expected 1 or more")
    for name in ("drops", "skips"):
        if (getattr(options, name) or 0) < 0:
            raise ValueError(f"--{name} {getattr(options, name)}: expected 0 or more")
    check_packages("cmp-trainer curve")


def _names(models: Sequence[str], given: Sequence[str] | None) -> Sequence[str]:
    if given is not None and len(given) != len(models):
        raise ValueError(f"--names {' '.join(given)}: {len(given)} names for {len(models)} models; give one for each")
    return given or distinct_names(models)
