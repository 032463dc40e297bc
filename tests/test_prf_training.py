"""examples/prf: feedback passages as the model reads them, evaluation, and the script from end to end."""

import json
import logging
import math
import os
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import compare
import numpy as np
import pytest
import run_prf
import scipy.sparse as sp
import torch
from arguments import PrfArguments
from collection import load_collection
from demo_collection import write_demo
from encoding import encode_texts
from evaluation import (
    CollectionResult,
    curve_rows,
    load_results,
    measured_depth,
    p_value,
    per_query,
    robustness_index,
    save_results,
)
from experiment import Experiment, check_file_names
from feedback import FeedbackCollator, TrainingQuery, query_inputs, training_queries
from first_pass import SparseIndex, search_run
from reformulators import SparseReformulator
from transformers import AutoModel, AutoTokenizer
from trec_runs import write_run

from cmp_trainer.ablations.crop import CmpCrop

EXAMPLE = Path(run_prf.__file__).parent


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    write_demo(folder)
    return folder


@pytest.fixture(scope="module")
def tokenizer(demo):
    return AutoTokenizer.from_pretrained(demo / "encoder")


def words(tokenizer, *rows: int) -> str:
    return " ".join(tokenizer.convert_ids_to_tokens(list(rows)))


def test_the_input_is_the_query_and_its_passages_each_with_a_separator(tokenizer):
    texts = [words(tokenizer, 10, 11), words(tokenizer, 20, 21, 22), words(tokenizer, 30)]
    found = query_inputs(tokenizer, [texts[0]], [texts[1:]], query_length=128, passage_length=3)
    whole = query_inputs(tokenizer, [texts[0]], [texts[1:]], query_length=128, passage_length=128)
    assert tokenizer(" [SEP] ".join(texts))["input_ids"] == whole[0]["input_ids"]  # as docs/prf.md has it
    assert found == [{"input_ids": [2, 10, 11, 3, 20, 21, 3, 30, 3], "crop_segments": [0, 0, 0, 0, 1, 1, 1, 2, 2]}]


def collator(tokenizer, most: int, num_crops: int) -> FeedbackCollator:
    return FeedbackCollator(tokenizer, lambda rows: [words(tokenizer, 10 + row) for row in rows], most, num_crops)


@pytest.mark.parametrize("num_crops", [0, 1, 2])
@pytest.mark.parametrize("most", [4, 9])
def test_full_and_cropped_variants_have_strictly_fewer_passages_uniformly(tokenizer, num_crops, most):
    query = TrainingQuery(words(tokenizer, 8), feedback=[0, 1, 2, 3], positives=[5])
    collate, crop = collator(tokenizer, most, num_crops), CmpCrop("prefix", {"input_ids": 0})
    batch = collate([query] * 2000)
    crops = crop.batches(batch, num_crops)
    counts = torch.stack([(one["input_ids"] == 3).sum(1) - 1 for one in crops], dim=1)  # (batch, 1 + crops)
    assert (counts.diff(dim=1) < 0).all()
    _, frequencies = counts.unique(dim=0, return_counts=True)
    subsets = {0: 5, 1: 10, 2: 10}[num_crops]  # of {0, …, 4} with 1 + num_crops members
    assert len(frequencies) == subsets
    assert (frequencies / 2000 - 1 / subsets).abs().max() < 0.05


def test_training_reads_a_random_sample_of_the_feedback_in_random_order_anew_each_time(tokenizer):
    query = TrainingQuery(words(tokenizer, 8), feedback=[0, 1, 2, 3], positives=[5])
    batch = collator(tokenizer, 4, 0)([query] * 6000)
    rows = [tuple(token - 10 for token in ids[3::2] if token) for ids in batch["input_ids"].tolist()]
    for number in range(5):
        found = [one for one in rows if len(one) == number]
        assert all(len(set(one)) == number for one in found)  # no passage twice
        possible = math.perm(4, number)
        counts = Counter(found)
        assert len(counts) == possible
        assert max(abs(count / len(found) - 1 / possible) for count in counts.values()) < 0.05


def test_evaluation_reads_the_feedback_in_the_order_of_the_ranking(demo, tmp_path):
    experiment = experiment_of(demo, tmp_path / "first_pass")
    test = experiment.train
    assert test is not None
    run = experiment.first_pass(test, 10)
    texts = [" [SEP] ".join([text, *experiment.texts(run[query][:3])]) for query, text in test.queries.items()]
    vectors = encode_texts(experiment.encoder, experiment.tokenizer, texts, max_length=512)  # as docs/prf.md has it
    wanted = search_run(experiment.index, vectors, list(test.queries), test.passages, 5)
    found = experiment.search(experiment.encoder, test, run, number=3, depth=5)
    assert {query: [one for one, _ in ranked] for query, ranked in found.items()} == {
        query: [one for one, _ in ranked] for query, ranked in wanted.items()
    }


def test_an_input_that_is_cut_still_ends_in_a_separator(tokenizer):
    feedback = [words(tokenizer, 20, 21, 22), words(tokenizer, 30, 31)]
    [found] = query_inputs(tokenizer, [words(tokenizer, 10)], [feedback], 128, 128, limit=9)
    assert found == {"input_ids": [2, 10, 3, 20, 21, 22, 3, 30, 3], "crop_segments": [0, 0, 0, 1, 1, 1, 1, 2, 2]}


def test_a_crop_is_a_prefix_of_the_feedback(tokenizer):
    query = TrainingQuery(words(tokenizer, 8), feedback=[0, 1, 2, 3], positives=[5])
    full, once = CmpCrop("prefix", {"input_ids": 0}).batches(collator(tokenizer, 4, 1)([query] * 50), 1)
    for long, short in zip(full["input_ids"].tolist(), once["input_ids"].tolist(), strict=True):
        kept = [token for token in short if token]
        assert long[: len(kept)] == kept


def test_more_crops_than_feedback_passages_are_refused(tokenizer):
    with pytest.raises(ValueError, match="--cmp_num_crops 3 needs 4 different numbers of feedback passages"):
        collator(tokenizer, 2, 3)


def test_queries_without_a_positive_are_skipped_and_counted(caplog):
    queries = {"a": "one", "b": "two", "c": "three"}
    with caplog.at_level(logging.WARNING):
        found = training_queries(queries, {"a": [1], "b": []}, {"a": [4], "b": [5], "c": [6]})
    assert [query.text for query in found.queries] == ["one"]
    assert "2 of 3 training queries have no positive in the corpus and are left out (e.g. b)" in caplog.text
    with pytest.raises(
        ValueError, match="no training query is left: of 3, 3 have no positive in the corpus and 1 have"
    ):
        training_queries(queries, {}, {"a": [4], "b": [5]})


def test_queries_with_fewer_passages_than_crops_are_counted_and_rejected_where_they_are_all(caplog):
    queries, positives = {"a": "one", "b": "two"}, {"a": [1], "b": [2]}
    with caplog.at_level(logging.WARNING):
        assert len(training_queries(queries, positives, {"a": [4], "b": [5, 6]}, num_crops=2)) == 2
    assert "1 of 2 training queries have fewer feedback passages than --cmp_num_crops 2 (e.g. a)" in caplog.text
    with pytest.raises(ValueError, match=r"--cmp_num_crops 3 needs .* at least 3 feedback passages, .* list has 2"):
        training_queries(queries, positives, {"a": [4], "b": [5, 6]}, num_crops=3)


def test_measures_follow_the_relevance_level_and_count_missing_queries_as_zero(demo):
    collection = load_collection(f"{demo}/collection:test")
    first = next(iter(collection.queries))
    passages = list(collection.qrels[first])
    run = {first: [("elsewhere", 2.0), (passages[0], 1.0)]}
    values = per_query(collection, run, depth=100)
    assert list(values) == ["MRR@10", "nDCG@10", "R@100", "MAP@100"]
    assert values["MRR@10"][0] == 0.5 and values["R@100"][0] == 1 / 8
    assert values["MRR@10"][1] == 0.0
    strict = per_query(replace(collection, relevance_level=2), run, depth=100)
    assert list(strict) == ["MRR(rel=2)@10", "nDCG@10", "R(rel=2)@100", "MAP(rel=2)@100"]
    assert strict["MRR(rel=2)@10"][0] == 0.0


def test_recall_and_average_precision_are_named_by_the_depth_that_every_run_has(demo, tmp_path):
    experiment = experiment_of(demo, tmp_path / "first_pass", retrieval_depth=40)
    assert experiment.train is not None
    test = experiment.test_of(experiment.train, None)
    assert list(test.values(test.first_pass))[2:] == ["R@40", "MAP@40"]
    shallow = {query: ranked[:15] for query, ranked in test.first_pass.items()}
    write_run(shallow, tmp_path / "run.trec", "test")
    given = experiment.test_of(experiment.train, str(tmp_path / "run.trec"))
    assert list(given.values(given.first_pass))[2:] == ["R@15", "MAP@15"]
    deeper = given.values(test.first_pass)  # a run of depth 40 beside one of 15 is measured to 15 too
    assert deeper == given.values(given.first_pass)


def test_a_run_too_shallow_for_the_measures_is_rejected(demo, tmp_path):
    experiment = experiment_of(demo, tmp_path / "first_pass")
    assert experiment.train is not None
    path = tmp_path / "run.trec"
    write_run({query: [("p0-0-0", 1.0)] for query in experiment.train.queries}, path, "test")
    with pytest.raises(ValueError, match="the depth of the given run is 1, but MRR@10 and nDCG@10 need 10 passages"):
        experiment.test_of(experiment.train, str(path))
    with pytest.raises(ValueError, match="--retrieval_depth is 9, but"):
        measured_depth(1_000, 9)
    assert measured_depth(5, 1_000) == 100  # all of the corpus is retrieved


def test_robustness_is_helped_minus_hurt():
    assert robustness_index([1.0, 1.0, 0.0, 0.5], [0.0, 0.5, 1.0, 0.5]) == 0.25


def test_equal_runs_differ_with_probability_one():
    values = np.array([0.1, 0.2, 0.3])
    assert p_value(values, values.copy()) == 1.0
    assert p_value(values + [0.5, 0.51, 0.49], values) < 0.01


def test_the_table_has_spread_over_folds_and_robustness_of_each_passage():
    def measure(*values: float) -> dict[str, list[float]]:
        return {"nDCG@10": list(values)}

    reformulated = [measure(0, 0, 0, 0), measure(1, 1, 0, 0), measure(1, 0, 1, 1)]
    result = CollectionResult(list("abcd"), [0, 0, 1, 1], measure(0, 0, 0, 1), measure(0, 0, 0, 0), reformulated)
    rows = curve_rows("run", result)
    assert [row["nDCG@10"] for row in rows] == [0.0, 0.5, 0.75]
    assert [row["robustness"] for row in rows] == [-0.25, 0.25, 0.5]
    assert [row.get("robustness of one more") for row in rows] == [None, 0.5, 0.25]
    assert rows[1]["sd nDCG@10"] == pytest.approx(np.std([1.0, 0.0], ddof=1))
    assert "| first pass |  | 0.250 |" in compare.comparison_table({"run": result})


def test_two_folders_of_one_name_are_two_runs_of_a_comparison(tmp_path, monkeypatch, capsys):
    for name, value in (("a", 0.25), ("b", 0.75)):
        values = {"nDCG@10": [value, value]}
        (tmp_path / name / "run").mkdir(parents=True)
        result = CollectionResult(list("qr"), [0, 0], values, values, [values, values])
        save_results({"one": result}, {}, tmp_path / name / "run" / "evaluation.json")
    monkeypatch.setattr(sys, "argv", ["compare.py", *(str(tmp_path / name / "run") for name in "ab")])
    compare.main()
    table = capsys.readouterr().out
    assert "| a/run | 0 | 0.250 |" in table and "| b/run | 0 | 0.750 |" in table


def arguments(config: str, demo, output_dir, **changes: object) -> list[str]:
    """Of run_prf.py on the demo, four steps long."""
    settings = {
        "train_collection": f"{demo}/collection:train", "output_dir": output_dir, "max_steps": 4, "logging_steps": 1,
        "model_name_or_path": demo / ("masked_lm" if config == "demo_sparse.yaml" else "encoder"),
        "first_pass_dir": demo / ("first_pass_sparse" if config == "demo_sparse.yaml" else "first_pass"),
        "feedback_passages": 2, "use_cpu": True,
    }  # fmt: skip
    if config.startswith("demo"):
        settings |= {"demo_dir": demo, "test_collections": f"{demo}/collection:test"}
    given = [part for name, value in (settings | changes).items() for part in (f"--{name}", str(value))]
    return ["run_prf.py", str(EXAMPLE / config), *given]


def script(monkeypatch, config: str, demo, output_dir, **changes: object) -> None:
    monkeypatch.setattr(sys, "argv", arguments(config, demo, output_dir, **changes))
    run_prf.main()


def test_the_demo_runs_and_its_model_is_an_ordinary_one(monkeypatch, demo, tmp_path, capsys):
    script(monkeypatch, "demo.yaml", demo, tmp_path / "run")
    result = load_results(tmp_path / "run" / "evaluation.json")[0]["collection:test"]
    assert len(result.queries) == 64 and len(result.reformulated) == 3
    assert np.mean(result.first_pass["nDCG@10"]) > 0.5
    assert "| reformulated | 2 |" in capsys.readouterr().out
    assert (tmp_path / "run" / "collection-test.png").stat().st_size > 10_000
    trained = dict(AutoModel.from_pretrained(tmp_path / "run").encoder.named_parameters())
    start = AutoModel.from_pretrained(demo / "encoder").named_parameters()
    assert any(not torch.equal(trained[name], weight) for name, weight in start if name in trained)


def test_what_is_evaluated_is_kept_and_other_settings_are_refused(monkeypatch, demo, tmp_path, capsys):
    script(monkeypatch, "demo.yaml", demo, tmp_path / "run")
    written = (tmp_path / "run" / "model.safetensors").stat().st_mtime_ns
    script(monkeypatch, "demo.yaml", demo, tmp_path / "run")
    assert (tmp_path / "run" / "model.safetensors").stat().st_mtime_ns == written
    with pytest.raises(ValueError, match=r"was found with other settings or data \(training.learning_rate\)"):
        script(monkeypatch, "demo.yaml", demo, tmp_path / "run", learning_rate=1e-4)


@pytest.mark.parametrize(
    "file, change, names",
    [
        ("qrels/test.tsv", lambda text: text.replace("q0-0-0\tp0-0-0\t1", "q0-0-0\tp0-0-0\t0"), "content.judgements"),
        ("run.trec", lambda text: text.replace(" first_pass\n", " again\n"), "content.runs"),
    ],
)
def test_a_result_is_not_taken_for_one_of_changed_files(monkeypatch, demo, tmp_path, file, change, names):
    shutil.copytree(demo / "collection", tmp_path / "collection")
    experiment = experiment_of(demo, tmp_path / "run_made_elsewhere")
    test = load_collection(f"{demo}/collection:test")
    write_run(experiment.first_pass(test, 100), tmp_path / "collection" / "run.trec", "first_pass")
    changes = {
        "train_collection": f"{tmp_path}/collection:train", "test_collections": f"{tmp_path}/collection:test",
        "test_runs": tmp_path / "collection" / "run.trec", "first_pass_dir": tmp_path / "first_pass", "max_steps": 1,
    }  # fmt: skip
    script(monkeypatch, "demo.yaml", demo, tmp_path / "run", **changes)
    path = tmp_path / "collection" / file
    assert path.read_text() != change(path.read_text())
    path.write_text(change(path.read_text()))
    with pytest.raises(ValueError, match=rf"was found with other settings or data \({names}\)"):
        script(monkeypatch, "demo.yaml", demo, tmp_path / "run", **changes)


def test_folds_are_measured_from_the_level_asked_for(monkeypatch, demo, tmp_path):
    changes = {"first_pass_dir": tmp_path / "first_pass", "relevance_level": 2}
    script(monkeypatch, "beir_folder.yaml", demo, tmp_path / "run", num_folds=2, max_steps=1, **changes)
    result = load_results(tmp_path / "run" / "evaluation.json")[0]["collection:train"]
    assert not any(result.first_pass["MRR(rel=2)@10"]) and any(result.first_pass["nDCG@10"])  # all are judged 1


@pytest.mark.parametrize("objective", [{}, {"cmp_objective": "regularized", "cmp_primary": "mean", "cmp_weight": 1}])
def test_folds_test_every_query_once(monkeypatch, demo, tmp_path, objective):
    changes = {"first_pass_dir": tmp_path / "first_pass", **objective}
    script(monkeypatch, "beir_folder.yaml", demo, tmp_path / "run", num_folds=2, max_steps=2, **changes)
    result = load_results(tmp_path / "run" / "evaluation.json")[0]["collection:train"]
    assert sorted(result.queries) == sorted(load_collection(f"{demo}/collection:train").queries)
    assert result.folds == [0] * 64 + [1] * 64
    assert {len(values) for values in result.first_pass.values()} == {128}


@pytest.mark.parametrize("pool_chunk_size", [{}, {"pool_chunk_size": 100}])
def test_the_sparse_demo_encodes_trains_and_evaluates(monkeypatch, demo, tmp_path, pool_chunk_size):
    script(monkeypatch, "demo_sparse.yaml", demo, tmp_path / "run", **pool_chunk_size)
    result = load_results(tmp_path / "run" / "evaluation.json")[0]["collection:test"]
    assert len(result.queries) == 64 and len(result.reformulated) == 3
    assert np.mean(result.first_pass["nDCG@10"]) > 0.5
    card = json.loads((demo / "first_pass_sparse" / "postings" / "index.json").read_text())
    assert (card["form"], card["passages"], card["terms"]) == ("sparse", 512, 64)
    start = SparseReformulator.from_encoder(str(demo / "masked_lm")).state_dict()
    trained = SparseReformulator.from_pretrained(tmp_path / "run").state_dict()
    assert any(not torch.equal(trained[name], weight) for name, weight in start.items())


def test_a_saved_reformulator_keeps_its_settings_as_encoder_of_the_passages(monkeypatch, demo, tokenizer, tmp_path):
    SparseReformulator.from_encoder(str(demo / "masked_lm"), scale=1.0, log_saturation=True).save_pretrained(
        tmp_path / "passages"
    )
    tokenizer.save_pretrained(tmp_path / "passages")
    changes = {"passage_encoder": tmp_path / "passages", "first_pass_dir": tmp_path / "first_pass"}
    script(monkeypatch, "demo_sparse.yaml", demo, tmp_path / "run", max_steps=1, encoding_terms=4, **changes)
    vectors = sp.load_npz(tmp_path / "first_pass" / "vectors" / "block-00000.npz")
    assert vectors.shape[0] == 512 and vectors.max() < 1.0  # demo_sparse.yaml scales by 4.47
    config = SparseReformulator.from_pretrained(tmp_path / "run").config
    assert (config.scale, config.log_saturation) == (4.47, False)


def experiment_of(demo, folder, **changes: object) -> Experiment:
    settings = {"model_name_or_path": str(demo / "encoder"), "first_pass_dir": str(folder), "pooling": "mean"}
    return Experiment(PrfArguments(train_collection=f"{demo}/collection:train", **{**settings, **changes}))


def test_passages_of_a_given_run_that_the_corpus_lacks_are_left_out_and_counted(demo, tmp_path, caplog):
    experiment, path = experiment_of(demo, tmp_path / "first_pass"), tmp_path / "run.trec"
    assert experiment.train is not None
    run = {query: [("lost", 2.0), ("p0-0-0", 1.0)] for query in experiment.train.queries}
    write_run(run, path, "test")
    found = experiment.first_pass(experiment.train, 10, str(path))
    assert set(map(tuple, found.values())) == {(("p0-0-0", 1.0),)}
    assert "128 retrieved passages are not in the corpus and are left out (e.g. lost)" in caplog.text
    write_run(run | {"q0-0-1": [("lost", 2.0)]}, path, "test")
    with pytest.raises(ValueError, match=r"no passage of this corpus for 1 queries, e.g. q0-0-1"):
        experiment.first_pass(experiment.train, 10, str(path))


def test_a_first_pass_of_other_queries_is_not_taken_for_theirs(demo, tmp_path):
    experiment = experiment_of(demo, tmp_path / "first_pass")
    assert experiment.train is not None
    first = experiment.first_pass(experiment.train, 3)
    assert experiment.first_pass(experiment.train, 3) == first
    texts = list(experiment.train.queries.values())
    turned = dict(zip(experiment.train.queries, texts[1:] + texts[:1], strict=True))
    assert experiment.first_pass(replace(experiment.train, queries=turned), 3) != first


def test_a_query_that_finds_nothing_has_an_empty_run(demo, tmp_path):
    settings = {"representation": "sparse", "model_name_or_path": str(demo / "masked_lm"), "encoding_terms": 1}
    experiment = experiment_of(demo, tmp_path / "first_pass", **settings)
    assert experiment.train is not None and isinstance(experiment.index, SparseIndex)
    experiment.index.postings = experiment.index.postings * 0  # no term of any query is in any passage
    experiment.index.postings.eliminate_zeros()
    assert set(map(len, experiment.first_pass(experiment.train, 3).values())) == {0}


def test_an_encoder_that_is_not_there_is_refused_with_the_way_out(demo, tmp_path):
    with pytest.raises(ValueError, match=r"'no/where' could not be loaded .* the folder of a saved model"):
        experiment_of(demo, tmp_path / "first_pass", model_name_or_path="no/where")


def test_results_of_collections_with_similar_names_are_all_kept(tmp_path):
    values = {"nDCG@10": [0.5, 1.0]}
    result = CollectionResult(["a", "b"], [0, 0], values, values, [values, values])
    run_prf.report({"corpus.v1:train": result, "corpus.v1:test": result}, tmp_path, {})
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {f"corpus.v1-{split}.{end}" for split in ("train", "test") for end in ("md", "png")} | {
        "evaluation.json"
    }


def test_collections_whose_files_would_have_the_same_name_are_rejected():
    with pytest.raises(ValueError, match="corpus/a:test and corpus-a:test would have the same file names; rename one"):
        check_file_names(["corpus/a:test", "corpus/b:test", "corpus-a:test"])


def test_a_fold_goes_on_from_its_last_complete_checkpoint(monkeypatch, demo, tmp_path, caplog):
    changes = {"first_pass_dir": tmp_path / "first_pass", "save_strategy": "steps", "save_steps": 1, "num_folds": 2}
    script(monkeypatch, "beir_folder.yaml", demo, tmp_path / "run", max_steps=2, **changes)
    for file in ("evaluation.json", "fold-0/evaluation.json", "fold-0/checkpoint-2/trainer_state.json"):
        (tmp_path / "run" / file).unlink()
    script(monkeypatch, "beir_folder.yaml", demo, tmp_path / "run", max_steps=2, **changes)
    assert "checkpoint-2 is incomplete" in caplog.text
    assert len(load_results(tmp_path / "run" / "evaluation.json")[0]["collection:train"].queries) == 128


def test_processes_that_do_not_know_of_each_other_are_refused(monkeypatch, demo, tmp_path, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises((ValueError, SystemExit)) as refusal:
        script(monkeypatch, "demo.yaml", demo, tmp_path / "run", use_cpu=False)
    assert "2 processes were launched, but this one knows of 1" in str(refusal.value) + capsys.readouterr().err


@pytest.mark.parametrize("config", ["demo.yaml", "demo_sparse.yaml"])
def test_two_processes_encode_train_and_evaluate(monkeypatch, demo, tmp_path, config):
    changes = {"first_pass_dir": tmp_path / "first_pass"}
    name, *given = arguments(config, demo, tmp_path / "run", **changes)
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone"]
    done = subprocess.run(
        [*launch, str(EXAMPLE / name), *given],
        env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=500,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("| reformulated | 2 |") == 1
    state = json.loads((tmp_path / "run" / "trainer_state.json").read_text())
    assert (state["global_step"], state["epoch"]) == (4, 0.5)  # of 128 queries: 4 steps with 8 on each process
    result = load_results(tmp_path / "run" / "evaluation.json")[0]["collection:test"]
    assert len(result.queries) == 64 and len(result.reformulated) == 3
    script(monkeypatch, config, demo, tmp_path / "alone", first_pass_dir=tmp_path / "first_pass_alone")
    alone = load_results(tmp_path / "alone" / "evaluation.json")[0]["collection:test"]
    assert result.first_pass == alone.first_pass and result.bm25 == alone.bm25


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"cmp_crop_order": "random"}, "--cmp_crop_order random would leave gaps"),
        ({"representation": "both"}, "--representation both is unknown"),
        ({"num_folds": 3}, "--num_folds 3 splits --train_collection"),
        ({"passage_vectors": "here"}, "--passage_vectors are sparse"),
        ({"encoding_dtype": "half"}, "--encoding_dtype half is unknown; give float32 or float16"),
        ({"encoding_terms": 5}, "are for --representation sparse"),
        ({"first_weighted_id": 5}, "are for --representation sparse"),
        ({"retrieval_depth": 1}, "--retrieval_depth 1 is less than --feedback_passages 2"),
        ({"query_length": 2}, "--query_length 2: expected 3 or more"),
        ({"total_length": 40}, "--total_length 40 has no room for a passage (32 tokens) after a query (16)"),
        ({"candidates": 0}, "--candidates 0: expected 1 or more"),
        ({"total_length": 513}, "--total_length 513 is more than the model takes; pass at most 512"),
        ({"encoding_length": 1000}, "--encoding_length 1000 is more than the model takes; pass at most 512"),
        (
            {"index": "IVF1024,Flat"},
            "--index IVF1024,Flat has 1,024 clusters to train, more than the corpus has passages",
        ),
        ({"representation": "sparse", "encoding_terms": 0}, "--encoding_terms 0 is how many weights"),
        ({"representation": "sparse", "encoding_dtype": "float16"}, "--encoding_dtype float16 is for dense vectors"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(monkeypatch, demo, tmp_path, capsys, changes, message):
    with pytest.raises((ValueError, SystemExit)) as refusal:
        script(monkeypatch, "demo.yaml", demo, tmp_path / "run", **changes)
    assert message in str(refusal.value) + capsys.readouterr().err
