"""cmp-trainer shrink: models with fewer layers, which load without cmp_trainer and compute what variants compute."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
)

from cmp_trainer import cli
from cmp_trainer.ablations.skip import SkipLayers
from cmp_trainer.execution.ablated import Ablated
from cmp_trainer.execution.boundary import Boundary
from cmp_trainer.execution.layers import find_stack
from tests.helpers import letter_tokenizer, tiny_bert
from tests.tiny_models import AVAILABLE

LAYERS = 5
LABELS = {"num_labels": 2, "id2label": {0: "bad", 1: "good"}, "label2id": {"bad": 0, "good": 1}}
# Names of the number of layers, with what lists of layers these models have beside it.
CAUSAL = {
    "gpt2": {"num_hidden_layers": LAYERS},  # n_layer
    "llama": {"num_hidden_layers": LAYERS},
    "gemma3_text": {
        "num_hidden_layers": LAYERS,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"] + ["full_attention"] * 2,
        "sliding_window": 3,
    },
    "qwen2": {"num_hidden_layers": LAYERS},
}


def save(folder, model):
    model.save_pretrained(folder)
    letter_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture
def bert(tmp_path):
    return save(tmp_path / "model", tiny_bert(0, num_hidden_layers=LAYERS, initializer_range=0.2, **LABELS))


@pytest.fixture
def data(tmp_path):
    rows = [{"sentence": f"{a} {b} c", "label": int(a < b)} for a in "abcd" for b in "abcd"]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return str(tmp_path / "data.jsonl")


def shrink(*arguments):
    cli.main(["shrink", *map(str, arguments)])


def outputs_without(model, layers, batch):
    """The logits of a model in which layers are skipped."""
    stack = find_stack(model, lambda: model(**batch))
    with torch.no_grad(), Ablated([SkipLayers(layers)], [1], boundary=Boundary(stack)):
        return model(**batch).logits


def test_the_top_layers_go_without_data(bert, tmp_path):
    shrink(bert, "--layers", 3, 1, "--output", tmp_path / "small")
    batch, whole = letter_tokenizer()(["a b c", "b b"], padding=True, return_tensors="pt"), tmp_path / "small"
    model = AutoModelForSequenceClassification.from_pretrained(bert)
    for number in (3, 1):
        smaller = AutoModelForSequenceClassification.from_pretrained(whole / f"{number}_layers")
        assert smaller.config.num_hidden_layers == number
        expected = outputs_without(model, range(number, LAYERS), batch)
        torch.testing.assert_close(smaller(**batch).logits, expected, rtol=1e-6, atol=1e-6)
        weights = load_file(whole / f"{number}_layers" / "model.safetensors")
        assert {key.split(".")[3] for key in weights if ".layer." in key} == set(map(str, range(number)))


def test_the_models_load_where_cmp_trainer_is_not_installed(bert, tmp_path):
    shrink(bert, "--layers", 2, "--output", tmp_path / "small")
    code = """
import sys
from pathlib import Path
sys.modules["cmp_trainer"] = None
from transformers import AutoModelForSequenceClassification, AutoTokenizer
model, tokenize = (kind.from_pretrained(sys.argv[1]) for kind in (AutoModelForSequenceClassification, AutoTokenizer))
print(model(**tokenize(["a b"], return_tensors="pt")).logits.shape)
"""
    command = [sys.executable, "-c", code, str(tmp_path / "small" / "2_layers")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "torch.Size([1, 2])" in done.stdout


def test_with_data_the_layers_that_cost_least_go(bert, data, tmp_path, capsys):
    shrink(bert, "--layers", 4, 2, "--data", data, "--output", tmp_path / "small")
    model = AutoModelForSequenceClassification.from_pretrained(bert)
    rows = [json.loads(line) for line in Path(data).read_text().splitlines()]
    batch = letter_tokenizer()([row["sentence"] for row in rows], padding=True, return_tensors="pt")
    labels = torch.tensor([row["label"] for row in rows])

    def loss(without):
        return float(torch.nn.functional.cross_entropy(outputs_without(model, without, batch), labels))

    gone = []
    for number in (4, 3, 2):
        gone.append(min((n for n in range(1, LAYERS) if n not in gone), key=lambda n: loss([*gone, n])))
        if number != 3:
            smaller = AutoModelForSequenceClassification.from_pretrained(tmp_path / "small" / f"{number}_layers")
            expected = outputs_without(model, gone, batch)
            torch.testing.assert_close(smaller(**batch).logits, expected, rtol=1e-5, atol=1e-5)
    table = pd.read_csv(tmp_path / "small" / "layers.csv").set_index("layers")
    assert table.loc[2, "loss"] == pytest.approx(loss(gone), rel=1e-5)
    assert table.loc[5, "loss"] == pytest.approx(loss([]), rel=1e-5)
    assert table.columns[:4].tolist() == ["million_parameters", "seconds_per_1000_rows", "loss", "accuracy"]
    out = capsys.readouterr().out
    assert f"The layers were chosen by their loss on {data}, where loss and metrics were measured too" in out
    card = (tmp_path / "small" / "2_layers" / "README.md").read_text()
    assert "each time the one whose removal gave the lowest loss on data.jsonl" in card
    assert f"{', '.join(map(str, sorted(gone)))} were" in card
    assert (tmp_path / "small" / "layers.png").read_bytes().startswith(b"\x89PNG")


def test_the_card_keeps_license_and_base_model(bert, data, tmp_path):
    whole = tmp_path / "whole"
    shutil.copytree(bert, whole)
    (whole / "README.md").write_text(
        "---\nlicense: mit\nbase_model: someone/model\nlanguage: [en, de]\ntags: [other]\n---\n# Whole\n"
    )
    shrink(whole, "--layers", 2, "--output", tmp_path / "small")
    kept = ModelCard.load(tmp_path / "small" / "2_layers" / "README.md").data
    assert (kept.license, kept.base_model, kept.language) == ("mit", "someone/model", ["en", "de"])
    assert kept.tags == ["cmp-trainer", "fewer-layers"]


def test_a_card_that_cannot_be_read_does_not_stop_it(bert, data, tmp_path, caplog):
    whole = tmp_path / "whole"
    shutil.copytree(bert, whole)
    (whole / "README.md").write_text("---\nlicense: a: b\n---\n# Whole\n")
    shrink(whole, "--layers", 2, "--output", tmp_path / "small")
    assert "its license is not carried over" in caplog.text
    assert (tmp_path / "small" / "2_layers" / "README.md").is_file()


def test_the_top_layers_can_go_and_be_measured(bert, data, tmp_path):
    shrink(bert, "--layers", 2, "--data", data, "--order", "top", "--output", tmp_path / "small")
    shrink(bert, "--layers", 2, "--output", tmp_path / "unmeasured")
    ours, theirs = (load_file(tmp_path / name / "2_layers" / "model.safetensors") for name in ("small", "unmeasured"))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    assert {"loss", "accuracy"} <= set(pd.read_csv(tmp_path / "small" / "layers.csv").columns)
    assert "Loss and metrics below were measured on data.jsonl." in (
        tmp_path / "small" / "2_layers" / "README.md"
    ).read_text().replace("\n", " ")


@pytest.mark.parametrize("model_type", CAUSAL)
def test_a_cut_model_generates_with_its_cache(model_type, tmp_path):
    model = AVAILABLE[model_type].build(**CAUSAL[model_type]).eval()
    model = AutoModelForCausalLM.from_config(model.config).eval()
    save(tmp_path / "model", model)
    shrink(tmp_path / "model", "--layers", 3, "--output", tmp_path / "small")
    smaller = AutoModelForCausalLM.from_pretrained(tmp_path / "small" / "3_layers")
    prompt = {"input_ids": torch.tensor([[5, 6, 7, 8, 9, 5, 6]]), "attention_mask": torch.ones(1, 7).long()}
    texts = [
        smaller.generate(**prompt, max_new_tokens=6, do_sample=False, use_cache=cache).tolist()
        for cache in (True, False)
    ]
    assert texts[0] == texts[1]
    expected = outputs_without(model, (3, 4), prompt)
    torch.testing.assert_close(smaller(**prompt).logits, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("model_type", "names"),
    [("bart", ("encoder_layers", "decoder_layers")), ("t5", ("num_layers", "num_decoder_layers"))],
)
def test_the_decoder_of_an_encoder_decoder_is_cut(model_type, names, tmp_path):
    config = AVAILABLE[model_type].build(**dict.fromkeys(names, 3)).config
    model = AutoModelForSeq2SeqLM.from_config(config)
    save(tmp_path / "model", model)
    shrink(tmp_path / "model", "--layers", 1, "--output", tmp_path / "small")
    smaller = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "small" / "1_layers")
    assert [getattr(smaller.config, name) for name in names] == [3, 1]
    tokens = {"input_ids": torch.tensor([[5, 6, 7]])}
    smaller.generate(**tokens, max_new_tokens=4, min_new_tokens=4)


@pytest.mark.parametrize("model_type", ["vit", "dinov2"])  # the second names its layers
def test_a_model_of_images_is_cut(model_type, tmp_path):
    model = AVAILABLE[model_type].build(num_hidden_layers=3)
    model.save_pretrained(tmp_path / "model")
    shrink(tmp_path / "model", "--layers", 2, "--output", tmp_path / "small")
    smaller = AutoModelForImageClassification.from_pretrained(tmp_path / "small" / "2_layers")
    assert smaller.config.num_hidden_layers == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--layers", 0], r"--layers 0: the model has 5 layers \(bert.encoder.layer\); give 1 to 4"),
        (["--layers", 3, 5], "--layers 5: the model has 5 layers"),
        (["--layers", 3, "--data", "none.csv"], "none.csv"),
        (["--layers", 3, "--task", "question-answering", "--data", "DATA"], "question"),
        (["--layers", 3, "--metric", "bleu", "--data", "DATA"], "--metric bleu is none of this task"),
        (["--layers", 3, "--batch_size", 0], "--batch_size 0: expected 1 or more"),
        (["--layers", 3, "--metric", "f1", "--max_samples", 9], "--metric --max_samples: only used with --data"),
        (["--layers", 3, "--order", "loss"], "--order loss needs rows to measure the loss on; give --data"),
    ],
)
def test_bad_input_is_told_in_one_line(arguments, message, bert, data, tmp_path, capsys):
    arguments = [data if one == "DATA" else one for one in arguments]
    with pytest.raises(SystemExit):
        shrink(bert, *arguments, "--output", tmp_path / "small")
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert re.search(message, line), line
    assert not (tmp_path / "small").exists()


def test_a_folder_that_is_no_model(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    with pytest.raises(SystemExit):
        shrink(tmp_path / "empty", "--layers", 2, "--output", tmp_path / "small")
    assert "could not be loaded" in capsys.readouterr().err


def test_an_interrupted_save_leaves_no_half_model(bert, tmp_path, monkeypatch):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("cmp_trainer.shrink.card", interrupted)
    with pytest.raises(SystemExit) as stop:
        shrink(bert, "--layers", 2, "--output", tmp_path / "small")
    assert stop.value.code == 130
    assert not list((tmp_path / "small").iterdir())


def test_what_is_there_is_not_overwritten(bert, tmp_path, capsys):
    (tmp_path / "small" / "2_layers").mkdir(parents=True)
    (tmp_path / "small" / "2_layers" / "mine.txt").write_text("mine")
    with pytest.raises(SystemExit):
        shrink(bert, "--layers", 2, "--output", tmp_path / "small")
    assert "2_layers exists and is not empty; give another folder" in capsys.readouterr().err
