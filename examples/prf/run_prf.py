"""Train and evaluate a query reformulator for pseudo-relevance feedback.

    python examples/prf/run_prf.py examples/prf/demo.yaml        # or demo_sparse.yaml
    python examples/prf/run_prf.py CONFIG.yaml [--argument value …]
    accelerate launch examples/prf/run_prf.py CONFIG.yaml        # encoding and training on several processes

Four steps, each skipped where its result is there: encode the corpus and index it; search the first pass (and BM25);
train with CmpTrainer; search the reformulated queries at 0, 1, … feedback passages and evaluate. With `num_folds` the
training collection is split by query, and trained and tested that often.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import numpy as np
from accelerate import PartialState
from arguments import PrfArguments, check_training, differences, settings_of

from cmp_trainer import CmpTrainingArguments
from cmp_trainer.saving.checkpoints import checkpoints, fault_of
from cmp_trainer.scripting import parse_arguments, plain_errors, run, set_up

with plain_errors():
    from collection import Collection
    from compare import comparison_table, plot_curves
    from demo_collection import write_demo
    from evaluation import CollectionResult, load_results, save_results
    from experiment import Experiment, Test, evaluate, file_name, make_trainer
    from sklearn.model_selection import KFold
    from trec_runs import Run

logger = logging.getLogger(__name__)
FOLD_SEED = 0  # of the split into folds: the same for every training seed


@plain_errors()
def main() -> None:
    data_args, args = parse_arguments(PrfArguments, CmpTrainingArguments)
    check_training(data_args, args)
    if data_args.demo_dir:
        with PartialState().main_process_first():
            write_demo(data_args.demo_dir)
    experiment = Experiment(data_args)
    if data_args.num_folds:
        results = run_folds(experiment, args)
    else:
        results = run_split(experiment, args, experiment.train_with_run(), experiment.tests_with_runs())
    if results and PartialState().is_main_process:
        report(results, Path(str(args.output_dir)), settings_of(data_args, args, experiment.content))
    PartialState().destroy_process_group()  # whose threads may abort a process that ends before them


def run_folds(experiment: Experiment, args: CmpTrainingArguments) -> dict[str, CollectionResult]:
    """Train and test on every fold; a fold interrupted in training goes on from its last checkpoint."""
    collection = experiment.train
    assert collection is not None and experiment.args.num_folds is not None
    level = experiment.args.relevance_level or collection.relevance_level
    whole = experiment.test_of(replace(collection, relevance_level=level), experiment.args.train_run)
    names = np.array(list(collection.queries))
    folds = KFold(experiment.args.num_folds, shuffle=True, random_state=FOLD_SEED).split(names)
    results: dict[str, CollectionResult] = {}
    for fold, (train, test) in enumerate(folds):
        folder = Path(str(args.output_dir)) / f"fold-{fold}"
        fold_args = replace(args, output_dir=str(folder), seed=args.seed + fold)
        begun = any(fault_of(checkpoint) is None for checkpoint in checkpoints(folder))
        fold_args.resume_from_checkpoint = "true" if begun else None
        trained = (collection.subset(names[train]), whole.first_pass)
        tested = replace(whole, collection=whole.collection.subset(names[test]))
        found = run_split(experiment, fold_args, trained, [tested], fold)
        results = {name: results[name].joined(one) if name in results else one for name, one in found.items()}
    return results


def run_split(
    experiment: Experiment,
    args: CmpTrainingArguments,
    train: tuple[Collection, Run] | None,
    tests: list[Test],
    fold: int = 0,
) -> dict[str, CollectionResult]:
    """Train on one collection and test on others; what is already evaluated with these settings is returned."""
    path = Path(str(args.output_dir)) / "evaluation.json"
    settings = settings_of(experiment.args, args, experiment.content)
    if path.exists():
        results, found = load_results(path)
        if found != settings:
            raise ValueError(
                f"{path} was found with other settings or data ({', '.join(differences(found, settings))}); give "
                "another --output_dir, or remove this one"
            )
        logger.warning("%s is there already", path)
        return results
    set_up(args)
    model = experiment.load_encoder(experiment.args.model_name_or_path)
    if args.do_train and train is not None:
        run(make_trainer(experiment, args, *train, model))
    if not (args.do_eval and PartialState().is_main_process):
        return {}
    results = {test.collection.name: evaluate(experiment, model, test, fold, path.parent) for test in tests}
    save_results(results, settings, path)
    return results


def report(results: dict[str, CollectionResult], folder: Path, settings: dict) -> None:
    """Save all results, print their tables and write them beside, with a plot."""
    save_results(results, settings, folder / "evaluation.json")
    for name, result in results.items():
        table = comparison_table({"reformulated": result})
        print(f"\n{name}, {len(result.queries)} queries\n\n{table}")
        (folder / f"{file_name(name)}.md").write_text(table + "\n")
        plot_curves({"reformulated": result}, folder / f"{file_name(name)}.png", title=name)


if __name__ == "__main__":
    main()
