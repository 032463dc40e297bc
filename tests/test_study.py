"""The study's own script: what it trains on, what it measures, and that it leaves the model as it was."""

import json
import random
import sys
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from transformers import BertConfig, Trainer

from cmp_trainer import cli
from cmp_trainer.compare import Options
from cmp_trainer.run import run_script
from tests.helpers import SMALL, batch_of, letter_tokenizer, tiny_bert, token_data

FOLDER = Path(__file__).parent.parent / "examples" / "study"


@pytest.fixture
def study_modules(monkeypatch):
    """The modules beside the study's script."""
    monkeypatch.syspath_prepend(str(FOLDER))
    yield
    for name in ("noise", "own_ablations", "parts", "train_classifier", "train_with_distractors"):
        sys.modules.pop(name, None)


@pytest.fixture
def files(tmp_path):
    """A tiny model's folder, and rows whose label is their first letter."""
    letter_tokenizer().save_pretrained(tmp_path / "model")
    BertConfig(**SMALL).save_pretrained(tmp_path / "model")
    draw = random.Random(0)
    for split, number in (("train", 40), ("test", 12)):
        texts = [" ".join(draw.choices("abcdefgh", k=6)) for _ in range(number)]
        rows = [json.dumps({"text": text, "label": "low" if text < "d" else "high"}) for text in texts]
        (tmp_path / f"{split}.jsonl").write_text("\n".join(rows) + "\n")
    return tmp_path


def run(files, script="train_classifier.py", *words):
    """Run the script in this process; its metrics."""
    given = {
        "model_name_or_path": files / "model",
        "train_file": files / "train.jsonl",
        "test_file": files / "test.jsonl",
        "output_dir": files / "out",
        "from_scratch": "true",
        "train_rows": 16,
        "validation_rows": 8,
        "max_steps": 2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
    }
    arguments = [word for name, value in given.items() for word in (f"--{name}", str(value))]
    run_script(str(FOLDER / script), [*arguments, "--use_cpu", *words])
    return json.loads((files / "out" / "all_results.json").read_text())


def test_a_run_reports_every_measure_of_the_study(files):
    found = run(files, "train_classifier.py", "--noise", "true", "--removal", "true", "--cmp_num_ablations", "1")
    splits = ["eval", "test", "test-dropped-words", "test-typos"]
    expected = {f"{split}_{name}" for split in splits for name in ("accuracy", "loss", "ece", "mcc")}
    expected |= {
        f"test-fewer-{part}_{name}" for part in ("heads", "neurons", "layers") for name in ("accuracy", "loss")
    }
    assert expected <= found.keys()
    assert 0 <= found["violation_rate_first"] <= 1
    assert found["epoch"] == 1  # 16 rows in batches of 8


def test_losses_of_evaluations_are_log_losses_with_label_smoothing_too(files):
    words = ["train_classifier.py", "--learning_rate", "0", "--label_smoothing_factor"]
    assert run(files, *words, "0.5")["test_loss"] == run(files, *words, "0")["test_loss"]


@pytest.mark.parametrize("part", ["heads", "neurons", "layers"])
def test_an_ablation_of_ones_own_is_trained_with(part, files):
    found = run(files, "train_removable.py", "--ablate", part)
    assert "violation_rate_last" in found


def test_rows_are_drawn_by_the_seed_and_never_for_training_and_validation_both(files, study_modules, monkeypatch):
    seen = []

    class Spy(Trainer):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            seen.append([{tuple(row) for row in self.train_dataset["input_ids"]}, self.eval_dataset["input_ids"]])

    monkeypatch.setattr("transformers.Trainer", Spy)
    for seed in (0, 0, 1):
        run(files, "train_classifier.py", "--seed", str(seed))
    trained, validated = zip(*seen, strict=True)
    assert trained[0] == trained[1] != trained[2]
    assert not any(tuple(row) in rows for rows, held_out in seen for row in held_out)
    assert len(validated[0]) == 8


@pytest.mark.parametrize("part", ["heads", "neurons", "layers"])
def test_parts_are_taken_away_and_given_back(part, study_modules):
    from train_classifier import REMOVED, without

    model, batch = tiny_bert().eval(), batch_of(token_data())
    whole = model(**batch).logits
    with without(model, part, REMOVED[part], torch.Generator().manual_seed(0)):
        fewer = model(**batch).logits
    assert not torch.allclose(whole, fewer)
    assert torch.equal(model(**batch).logits, whole)


def test_a_model_without_any_layer_is_its_embeddings(study_modules):
    from train_classifier import without

    model, batch = tiny_bert().eval(), batch_of(token_data())
    with without(model, "layers", 2, torch.Generator().manual_seed(0)):
        hidden = model.bert(batch["input_ids"]).last_hidden_state
    torch.testing.assert_close(hidden, model.bert.embeddings(batch["input_ids"]))


def test_calibration_error_is_the_gap_between_confidence_and_accuracy(study_modules):
    """All rows at confidence 0.9 and three of four right: |0.75 - 0.9|."""
    from train_classifier import metrics_of
    from transformers import EvalPrediction

    logits = torch.log(torch.tensor([[0.9, 0.1]] * 4)).numpy()
    found = metrics_of(EvalPrediction(logits, torch.tensor([0, 0, 0, 1]).numpy()))
    assert found["accuracy"] == 0.75
    assert found["ece"] == pytest.approx(0.15, abs=1e-5)


def test_noise_is_the_same_for_every_model_and_touches_texts_only(study_modules):
    from noise import NOISES

    rows = Dataset.from_dict({"text": ["one two three four five six seven"] * 8, "label": ["a"] * 8})
    for disturb in NOISES.values():
        assert disturb(rows)["text"][:] == disturb(rows)["text"][:] != rows["text"][:]
        assert disturb(rows)["label"][:] == rows["label"][:]


@pytest.mark.parametrize("file", sorted(FOLDER.glob("*.yaml")), ids=lambda file: file.stem)
def test_configs_describe_studies_whose_arguments_exist(file, study_modules):
    import train_classifier
    from transformers import HfArgumentParser, TrainingArguments

    from cmp_trainer.controls import make_parser
    from cmp_trainer.run import split_arguments

    options = Options.read(cli._parsed_compare(["compare", "--study", str(file)]))
    study = options.study()
    assert options.output == f"examples/study/results/{file.stem}"
    if not study.script.endswith("train_classifier.py"):
        return
    parser = HfArgumentParser((train_classifier.StudyArguments, TrainingArguments))
    for run in study.selection_runs()[:60]:
        _, rest = make_parser().parse_known_args(run.words)
        _, own = split_arguments(rest)
        parser.parse_args_into_dataclasses([*own, "--output_dir", "x"])  # raises for what it does not know


def test_distractors_are_the_segments_after_the_text(study_modules):
    from train_with_distractors import with_distractors

    tokenizer, sentences = letter_tokenizer(), ["x y", "z", "w w w", "v"]
    inputs = with_distractors(sentences, 3, tokenizer, [["a b", "c"]], 32)
    for ids, types, segments in zip(
        inputs["input_ids"], inputs["token_type_ids"], inputs["crop_segments"], strict=True
    ):
        assert len(ids) == len(types) == len(segments)
        words = tokenizer.convert_ids_to_tokens(ids)
        kept = [word for word, segment in zip(words, segments, strict=True) if segment == 0]
        assert kept[-2:] == ["[SEP]", "[SEP]"]
        assert set(kept) <= {"[CLS]", "[SEP]", "a", "b", "c"}
        for segment in (1, 2, 3):
            of_segment = [word for word, one in zip(words, segments, strict=True) if one == segment]
            assert " ".join(of_segment) in sentences
    assert with_distractors(sentences, 3, tokenizer, [["a b", "c"]], 32) == inputs
    short = with_distractors(sentences, 3, tokenizer, [["a b"]], 6)
    assert all(len(one[0]) == 6 for one in short.values())
    assert tokenizer.convert_ids_to_tokens(short["input_ids"][0])[-1] == "[SEP]"
