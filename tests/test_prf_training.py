"""examples/prf: feedback passages as the model reads them, evaluation, and the script from end to end."""

import logging
import sys
from pathlib import Path

import compare
import numpy as np
import pytest
import run_prf
import torch
from collection import load_collection
from demo_collection import write_demo
from evaluation import CollectionResult, curve_rows, load_results, p_value, per_query, robustness_index
from feedback import FeedbackCollator, TrainingQuery, query_inputs, training_queries
from transformers import AutoModel, AutoTokenizer, BertConfig, BertForMaskedLM

from cmp_trainer.cropping import CmpCrop

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
    assert found == [{"input_ids": [2, 10, 11, 3, 20, 21, 3, 30, 3], "crop_segments": [0, 0, 0, 0, 1, 1, 1, 2, 2]}]


def collator(tokenizer, most: int, num_crops: int) -> FeedbackCollator:
    return FeedbackCollator(tokenizer, lambda rows: [words(tokenizer, 10 + row) for row in rows], most, num_crops)


@pytest.mark.parametrize("num_crops", [0, 1, 2])
def test_full_and_cropped_variants_have_strictly_fewer_passages_uniformly(tokenizer, num_crops):
    query = TrainingQuery(words(tokenizer, 8), feedback=[0, 1, 2, 3], positives=[5])
    collate, crop = collator(tokenizer, 4, num_crops), CmpCrop(num_crops, "prefix", {"input_ids": 0})
    batch = collate([query] * 2000)
    counts = torch.stack([(one["input_ids"] == 3).sum(1) - 1 for one in crop(batch)], dim=1)  # (batch, 1 + crops)
    assert (counts.diff(dim=1) < 0).all()
    _, frequencies = counts.unique(dim=0, return_counts=True)
    subsets = {0: 5, 1: 10, 2: 10}[num_crops]  # of {0, …, 4} with 1 + num_crops members
    assert len(frequencies) == subsets
    assert (frequencies / 2000 - 1 / subsets).abs().max() < 0.05


def test_a_crop_is_a_prefix_of_the_feedback(tokenizer):
    query = TrainingQuery(words(tokenizer, 8), feedback=[0, 1, 2, 3], positives=[5])
    full, once = CmpCrop(1, "prefix", {"input_ids": 0})(collator(tokenizer, 4, 1)([query] * 50))
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
    assert "2 of 3 training queries are skipped: 2 have no positive" in caplog.text
    with pytest.raises(ValueError, match="no training query has a positive passage"):
        training_queries(queries, {}, {})


def test_measures_follow_the_relevance_level_and_count_missing_queries_as_zero(demo):
    collection = load_collection(f"{demo}/collection:test")
    first = next(iter(collection.queries))
    passages = list(collection.qrels[first])
    run = {first: [("elsewhere", 2.0), (passages[0], 1.0)]}
    values = per_query(collection, run)
    assert list(values) == ["MRR@10", "nDCG@10", "R@100", "MAP"]
    assert values["MRR@10"][0] == 0.5 and values["R@100"][0] == 1 / 8
    assert values["MRR@10"][1] == 0.0
    strict = type(collection)("strict", collection.passages, collection.queries, collection.qrels, relevance_level=2)
    assert per_query(strict, run)["MRR@10"][0] == 0.0


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


def script(monkeypatch, config: str, demo, output_dir, **changes: object) -> None:
    """Run run_prf.py on the demo, four steps long."""
    settings = {
        "train_collection": f"{demo}/collection:train", "model_name_or_path": demo / "encoder",
        "first_pass_dir": demo / "first_pass", "output_dir": output_dir, "max_steps": 4, "logging_steps": 1,
        "feedback_passages": 2, "use_cpu": True, **changes,
    }  # fmt: skip
    if config == "demo.yaml":
        settings |= {"demo_dir": demo, "test_collections": f"{demo}/collection:test"}
    arguments = [part for name, value in settings.items() for part in (f"--{name}", str(value))]
    monkeypatch.setattr(sys, "argv", ["run_prf.py", str(EXAMPLE / config), *arguments])
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
    with pytest.raises(ValueError, match="was found with other settings"):
        script(monkeypatch, "demo.yaml", demo, tmp_path / "run", learning_rate=1e-4)


@pytest.mark.parametrize("objective", [{}, {"cmp_objective": "regularized", "cmp_primary": "mean", "cmp_weight": 1}])
def test_folds_test_every_query_once(monkeypatch, demo, tmp_path, objective):
    changes = {"first_pass_dir": tmp_path / "first_pass", **objective}
    script(monkeypatch, "beir_folder.yaml", demo, tmp_path / "run", num_folds=2, max_steps=2, **changes)
    result = load_results(tmp_path / "run" / "evaluation.json")[0]["collection:train"]
    assert sorted(result.queries) == sorted(load_collection(f"{demo}/collection:train").queries)
    assert result.folds == [0] * 64 + [1] * 64
    assert {len(values) for values in result.first_pass.values()} == {128}


def test_a_sparse_reformulator_trains(monkeypatch, demo, tokenizer, tmp_path):
    config = BertConfig.from_pretrained(demo / "encoder", initializer_range=0.5)
    BertForMaskedLM(config).save_pretrained(tmp_path / "mlm")
    tokenizer.save_pretrained(tmp_path / "mlm")
    changes = {"model_name_or_path": tmp_path / "mlm", "first_pass_dir": tmp_path / "first_pass"}
    script(monkeypatch, "demo.yaml", demo, tmp_path / "run", representation="sparse", pool_chunk_size=100, **changes)
    result = load_results(tmp_path / "run" / "evaluation.json")[0]["collection:test"]
    assert len(result.reformulated) == 3


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"cmp_crop_order": "random"}, "--cmp_crop_order random would leave gaps"),
        ({"representation": "both"}, "--representation both is unknown"),
        ({"num_folds": 3}, "--num_folds 3 splits --train_collection"),
        ({"passage_vectors": "here"}, "--passage_vectors are sparse"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(monkeypatch, demo, tmp_path, capsys, changes, message):
    with pytest.raises((ValueError, SystemExit)) as refusal:
        script(monkeypatch, "demo.yaml", demo, tmp_path / "run", **changes)
    assert message in str(refusal.value) + capsys.readouterr().err
