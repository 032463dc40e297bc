"""Model cards: what they say is true of the run, nothing is empty, and the Hub's metadata holds the results."""

import json
import re

import pytest
from datasets import Dataset
from huggingface_hub import ModelCard
from peft import LoraConfig, get_peft_model
from transformers import Trainer

from cmp_trainer.reports.model_card import CURVE_IMAGE, model_card
from tests.helpers import cmp_trainer, tiny_bert, token_data, training_arguments

ABOUT = {
    "language": "en",
    "license": "apache-2.0",
    "tasks": "text-classification",
    "dataset": "GLUE cola",
    "dataset_tags": "nyu-mll/glue",
    "dataset_args": "cola",
    "finetuned_from": "google-bert/bert-base-cased",
}


def accuracy(prediction):
    right = prediction.predictions.argmax(-1) == prediction.label_ids
    return {"accuracy": float(right.mean()), "questions": len(right), "HasAns_total": len(right)}


@pytest.fixture
def trainer(tmp_path):
    return trained(tmp_path / "small-model", cmp_num_ablations=2)


def trained(folder, **settings):
    trainer = cmp_trainer(folder, compute_metrics=accuracy, max_steps=2, eval_strategy="steps", **settings)
    trainer.train()
    return trainer


def read(trainer, **about):
    """The card that the trainer writes, read back from its folder."""
    trainer.create_model_card(**about)
    return ModelCard.load(f"{trainer.args.output_dir}/README.md")


def test_results_are_in_the_metadata(trainer):
    accuracy_reached = trainer.evaluate()["eval_accuracy"]
    data = read(trainer, **ABOUT).data
    (result,) = data.eval_results
    assert (result.metric_type, result.metric_value) == ("accuracy", accuracy_reached)
    assert (result.task_type, result.dataset_type, result.dataset_config) == (
        "text-classification",
        "nyu-mll/glue",
        "cola",
    )
    assert data.metrics == ["accuracy"]


def test_metadata_names_model_data_and_method(trainer):
    data = read(trainer, **ABOUT, tags="mine").data
    assert set(data.tags) == {"mine", "generated_from_trainer", "cmp-trainer", "comparative-loss"}
    assert data.base_model == "google-bert/bert-base-cased"
    assert (data.library_name, data.datasets, data.license) == ("transformers", ["nyu-mll/glue"], "apache-2.0")
    assert (data.pipeline_tag, data.language) == ("text-classification", "en")


@pytest.mark.parametrize(("about", "measured"), [({}, False), (ABOUT, True)], ids=["bare", "all that can be said"])
def test_no_section_is_empty_and_nothing_is_a_placeholder(about, measured, tmp_path):
    trainer = trained(tmp_path / "small-model", cmp_num_ablations=2, cmp_eval_ablations=measured)
    if measured:
        trainer.evaluate_ablations(seeds=[0])
    text = read(trainer, **about).text.partition("## Citation")[0]
    assert not re.search(r"^(#+ .*)\n+(?=#{1,2} |\Z)", text, flags=re.M)  # a heading with nothing under it
    assert not re.search(r"more information|None|\bnan\b|\{\{|\{%| \n\||\n\n\n", text, flags=re.I)


def test_tables_are_whole(trainer):
    trainer.evaluate_ablations(seeds=[0, 1])
    for table in re.findall(r"(?:^\|.*\|\n)+", read(trainer, **ABOUT).text, flags=re.M):
        rows = table.strip().split("\n")
        assert len(rows) > 2
        assert len({row.count("|") for row in rows}) == 1


def test_the_card_shows_the_settings_of_comparative_loss(tmp_path):
    trainer = cmp_trainer(tmp_path, cmp_num_ablations=3, cmp_baseline="first", cmp_dropout=0.2)
    text = model_card(trainer).text
    assert "3 ablated versions of itself (3 by dropout of hidden neurons)" in text
    assert all(f"| `--{row} |" in text for row in ("cmp_baseline` | first", "cmp_dropout` | 0.2"))
    assert "cmp_temperature" not in text  # left at its default


def test_a_regularized_objective_has_a_primary_loss_and_no_baseline(tmp_path):
    text = model_card(cmp_trainer(tmp_path, cmp_num_ablations=1, cmp_objective="regularized")).text
    assert "| `--cmp_primary` | max |" in text
    assert "cmp_baseline" not in text
    assert "1 ablated version of itself" in text


def test_the_curve_is_shown_where_it_was_measured(trainer, tmp_path):
    assert CURVE_IMAGE not in read(trainer).text
    curve = trainer.evaluate_ablations(seeds=[0, 1])
    text = read(trainer).text
    losses = curve.query("level == 2")["loss"]
    assert f"| drops | 2 | {losses.mean():.4f} ± {losses.std():.4f} |" in text
    assert f"]({CURVE_IMAGE})" in text
    assert (tmp_path / "small-model" / CURVE_IMAGE).is_file()


def test_the_two_measures_of_violation_have_names_and_explanations_of_their_own(tmp_path):
    trainer = trained(tmp_path / "small-model", cmp_num_ablations=2, cmp_eval_ablations=True)
    trainer.evaluate_ablations(seeds=[0])
    text = read(trainer).text
    assert "| violation rate |" in text and "The violation rate is the share of pairs of versions" in text
    assert "| examples in violation |" in text and "Examples in violation are those whose" in text
    without_rate = read(trained(tmp_path / "other", cmp_num_ablations=2)).text
    assert "violation" not in without_rate


def test_results_are_those_of_the_best_step_when_it_is_loaded(tmp_path):
    upside_down = {"load_best_model_at_end": True, "metric_for_best_model": "loss", "greater_is_better": True}
    steps = {"save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1, "max_steps": 3}
    trainer = cmp_trainer(tmp_path, cmp_num_ablations=1, learning_rate=0.05, **upside_down, **steps)
    trainer.train()
    losses = [log["eval_loss"] for log in trainer.state.log_history if "eval_loss" in log]
    assert losses[-1] != max(losses)
    assert f"| loss | {max(losses):.4g} |" in model_card(trainer).text
    assert f"| loss | {trainer.evaluate()['eval_loss']:.4g} |" in model_card(trainer).text


def test_a_folder_of_this_machine_is_not_named_as_base_model(tmp_path):
    tiny_bert().save_pretrained(tmp_path / "base")
    model = tiny_bert().from_pretrained(tmp_path / "base")
    card = model_card(cmp_trainer(tmp_path / "run", model, cmp_num_ablations=1))
    assert card.data.base_model is None
    assert str(tmp_path) not in str(card)
    assert "A BertForSequenceClassification, fine-tuned" in card.text


def test_an_adapters_card_keeps_pefts_metadata_and_loads_the_adapter(tmp_path):
    tiny_bert().save_pretrained(tmp_path / "base")
    base = tiny_bert().from_pretrained(tmp_path / "base")
    model = get_peft_model(base, LoraConfig(task_type="SEQ_CLS", lora_dropout=0.1))
    trainer = cmp_trainer(tmp_path / "run", model, cmp_num_ablations=1, max_steps=1)
    trainer.train()
    trainer.save_model()
    card = read(trainer)
    assert card.data.library_name == "peft"
    assert {"lora", "comparative-loss"} <= set(card.data.tags)
    assert "PeftModel.from_pretrained(base" in card.text


def test_the_code_under_how_to_use_runs(trainer, monkeypatch, tmp_path):
    trainer.save_model()
    monkeypatch.chdir(tmp_path)
    code = re.search(r"## How to use\n\n```python\n(.*?)```", read(trainer, tasks="feature").text, flags=re.S)[1]
    assert 'BertForSequenceClassification.from_pretrained("small-model")' in code
    loaded = {}
    exec(code.replace("tokenizer = ", "# "), loaded)
    assert loaded["model"].num_labels == 3


def test_without_ablations_the_card_is_trainers_own(tmp_path):
    trainer = cmp_trainer(tmp_path / "ours")
    plain = cmp_trainer(tmp_path / "plain", kind=Trainer, args=training_arguments(tmp_path / "plain"))
    ours, theirs = read(trainer, model_name="m"), read(plain, model_name="m")
    assert str(ours) == str(theirs)


def written_by(trainer, **about):
    return read(trainer, **about).text


def test_names_from_outside_are_escaped_in_code(trainer):
    trainer.args.hub_model_id = 'me/"quoted"\nimport os'
    code = re.search(r"```python\n(.*?)```", written_by(trainer), flags=re.S)[1]
    (line,) = (line for line in code.splitlines() if line.startswith("model = "))
    compile(code, "card", "exec")
    assert json.dumps('me/"quoted"\nimport os') in line


def test_names_from_outside_are_escaped_in_tables_and_html(tmp_path):
    def odd_names(prediction):
        return {"a|b": 0.5, "<img src=x>": 0.25, "two\nlines": 0.75}

    settings = {"cmp_num_ablations": 1, "max_steps": 2, "eval_strategy": "steps"}
    trainer = cmp_trainer(tmp_path, compute_metrics=odd_names, **settings)
    trainer.train()
    trainer.evaluate_ablations(seeds=[0])
    text = written_by(trainer, dataset="<script>alert(1)</script>", model_name="a <b>name</b>")
    assert "| a\\|b | 0.5 |" in text and "| &lt;img src=x&gt; | 0.25 |" in text and "| two lines | 0.75 |" in text
    text = re.sub(r"```.*?```", "", text, flags=re.S)
    assert "<script>" not in text and "<img" not in text and "<b>" not in text
    for table in re.findall(r"(?:^\|.*\|\n)+", text, flags=re.M):
        assert len({row.replace("\\|", "").count("|") for row in table.strip().split("\n")}) == 1


def test_an_adapter_of_a_local_model_names_no_folder_of_this_machine(tmp_path):
    tiny_bert().save_pretrained(tmp_path / "base")
    base = tiny_bert().from_pretrained(tmp_path / "base")
    model = get_peft_model(base, LoraConfig(task_type="SEQ_CLS", lora_dropout=0.1))
    trainer = cmp_trainer(tmp_path / "run", model, cmp_num_ablations=1, max_steps=1)
    trainer.train()
    trainer.save_model()  # PEFT writes a card that names it
    trainer.create_model_card()
    card = (tmp_path / "run" / "README.md").read_text()
    assert str(tmp_path) not in card
    assert 'from_pretrained("folder/of/the/base/model", num_labels=3)' in card


@pytest.mark.parametrize(("split", "named"), [(None, False), ("validation", True)])
def test_local_files_are_not_said_to_be_a_split_that_nobody_named(split, named, tmp_path):
    file = tmp_path / "validation.jsonl"
    token_data().to_json(file)
    data = Dataset.from_json(str(file), **({"split": split} if split else {}))
    trainer = cmp_trainer(tmp_path / "run", data=data, cmp_num_ablations=1, max_steps=2, eval_strategy="steps")
    trainer.train()
    text = written_by(trainer, dataset="my texts")
    assert "(train)" not in text and ("(validation)" in text) == named


def test_a_card_that_cannot_be_written_is_a_warning(trainer, caplog, monkeypatch):
    def full_disk(self, path, *args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(ModelCard, "save", full_disk)
    trainer.create_model_card()
    assert "README.md could not be written: [Errno 28] No space left on device" in caplog.text
