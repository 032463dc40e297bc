"""examples/glue: the published settings, the metrics, and the script on tiny models from end to end."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import evaluate
import pytest
import torch
import yaml
from datasets import Dataset
from run_glue import TASKS, GlueArguments, labels_of_task, main
from safetensors.torch import load_file
from transformers import BertConfig, BertForSequenceClassification, BertModel, BertTokenizerFast

from cmp_trainer import CmpTrainingArguments
from cmp_trainer.data.classification import TextArguments
from cmp_trainer.scripting import ModelArguments, parse_arguments

ROOT = Path(__file__).parents[1]
GLUE = ROOT / "examples" / "glue"
REAL = Path(os.environ.get("CMP_TRAINER_DATA", ROOT.parent / "shared" / "data")) / "glue"

# task: learning rate, steps (or None for 3 epochs), warm-up (steps or ratio), batch; c and baseline where comparative
PUBLISHED = {
    "cola_baseline": (1e-5, 5336, 320, 16),
    "cola": (1e-5, 5336, 320, 16, 4, "zero"),
    "sst2_baseline": (1e-5, 20935, 1256, 32),
    "sst2": (2e-5, None, 0, 32, 2, "zero"),
    "mrpc_baseline": (1e-5, 2296, 137, 16),
    "mrpc": (2e-5, 2296, 137, 16, 1, "zero"),
    "stsb_baseline": (1e-5, 3598, 214, 16),
    "stsb": (1e-5, 3598, 214, 16, 4, "first"),
    "qqp_baseline": (1e-5, 113272, 28318, 32),
    "qqp": (2e-5, None, 0, 32, 2, "first"),
    "mnli_baseline": (2e-5, None, 0, 32),
    "mnli": (3e-5, None, 0, 32, 3, "first"),
    "qnli_baseline": (2e-5, None, 0.1, 32),
    "qnli": (3e-5, None, 0.1, 32, 4, "zero"),
    "rte_baseline": (1e-5, 2036, 122, 8),
    "rte": (1e-5, 2036, 122, 8, 1, "first"),
}


# -------------------------------------------------------------------------------------------------- settings


@pytest.mark.parametrize("name", PUBLISHED)
def test_configs_hold_the_published_settings(name):
    rate, steps, warmup, batch, *ablations = PUBLISHED[name]
    model, data, text, args = parse_arguments(
        ModelArguments, GlueArguments, TextArguments, CmpTrainingArguments, argv=[str(GLUE / f"{name}.yaml")]
    )
    assert (model.model_name_or_path, text.max_seq_length) == ("bert-base-cased", 128)
    assert (data.dataset_name, data.dataset_config_name) == ("nyu-mll/glue", name.removesuffix("_baseline"))
    assert data.task_name == data.dataset_config_name
    assert (args.learning_rate, args.per_device_train_batch_size) == (rate, batch)
    assert (args.max_steps, args.weight_decay) == ((steps, 0.01) if steps else (-1, 0.0))
    assert steps or args.num_train_epochs == 3
    assert args.get_warmup_steps(1000) == (warmup if steps else warmup * 1000)
    assert (args.cmp_num_ablations, args.cmp_baseline) == (tuple(ablations) or (0, "zero"))
    assert (args.eval_steps, args.save_steps, args.load_best_model_at_end) == (100, 100, True)
    assert args.lr_scheduler_type == "linear"


def test_every_config_is_a_published_one():
    assert {file.stem for file in GLUE.glob("*.yaml")} == set(PUBLISHED)


def test_the_table_of_the_readme_is_that_of_the_configs():
    rows = [line.strip("| ").split(" | ") for line in (GLUE / "README.md").read_text().splitlines() if " | " in line]
    table = {row[0]: row[1:] for row in rows[2:]}
    assert set(table) == set(TASKS)
    for task, (columns, measure, ablations, baseline) in table.items():
        config = yaml.safe_load((GLUE / f"{task}.yaml").read_text())
        assert columns == ", ".join(TASKS[task].columns)
        assert measure.lower().startswith(config["metric_for_best_model"].replace("_", " "))
        assert (int(ablations), baseline) == (config["cmp_num_ablations"], config["cmp_baseline"])


# --------------------------------------------------------------------------------------------------- metrics


def metrics(task: str, predictions: list, references: list) -> dict[str, float]:
    metric = evaluate.load(str(GLUE / "glue_metric"), task, keep_in_memory=True)
    return metric.compute(predictions=predictions, references=references) or {}


def test_accuracy_and_f1_by_hand():
    """2 true positives, 1 false positive, 1 false negative, 1 true negative."""
    found = metrics("mrpc", [1, 1, 1, 0, 0], [1, 1, 0, 1, 0])
    assert found == {"accuracy": pytest.approx(3 / 5), "f1": pytest.approx(2 * 2 / (2 * 2 + 1 + 1))}


def test_matthews_correlation_by_hand():
    found = metrics("cola", [1, 1, 1, 0, 0], [1, 1, 0, 1, 0])
    assert found == {"matthews_correlation": pytest.approx((2 * 1 - 1 * 1) / (3 * 3 * 2 * 2) ** 0.5)}


def test_correlations_by_hand():
    """Ranks agree wholly; the values lie on a parabola."""
    found = metrics("stsb", [0.0, 1.0, 4.0], [0.0, 1.0, 2.0])
    assert found == {"pearson": pytest.approx(4 / (26 / 3 * 2) ** 0.5), "spearman": pytest.approx(1.0)}


def test_an_unknown_task_has_no_metric():
    with pytest.raises(ValueError, match="unknown GLUE task 'wnli'"):
        metrics("wnli", [0], [0])


# ---------------------------------------------------------------------------------------------------- labels


def encode(task: str, labels: list) -> list:
    return labels_of_task(TASKS[task], BertConfig()).encode(Dataset.from_dict({"label": labels}), "train")


@pytest.mark.parametrize(
    ("task", "labels", "encoded"),
    [
        ("cola", ["0", "1"], [0, 1]),
        ("cola", [1, 0], [1, 0]),
        ("cola", ["acceptable", "unacceptable"], [1, 0]),
        ("mnli", ["entailment", "neutral", "contradiction"], [0, 1, 2]),
        ("rte", ["not_entailment", "entailment"], [1, 0]),
        ("stsb", [0.0, 4.5], [0.0, 4.5]),
        ("stsb", [1, 5], [1.0, 5.0]),
    ],
)
def test_labels_are_numbers_or_names(task, labels, encoded):
    assert encode(task, labels) == encoded


@pytest.mark.parametrize(
    ("task", "labels", "message"),
    [
        (
            "cola",
            [0, 2, -1],
            r"2 of 3 labels of train are not 0 \(unacceptable\) .*\): 2, -1 \(first: row 2\)",
        ),
        ("cola", [0, None], "1 of 2 labels .* None"),
        ("cola", [0.5, 1.0], "1 of 2 labels .* 0.5"),
        ("mnli", ["entailment", "entails"], "1 of 2 labels .* 'entails'"),
        ("stsb", [1.0, 5.1], "1 of 2 labels of train are not scores from 0 to 5: 5.1"),
        ("stsb", ["high"], "1 of 1 labels of train are not scores from 0 to 5: 'high'"),
    ],
)
def test_labels_that_are_neither_are_refused_with_their_number(task, labels, message):
    with pytest.raises(ValueError, match=message):
        encode(task, labels)


# ---------------------------------------------------------------------------------------------------- script


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A saved tiny BERT with a tokenizer that knows its words."""
    folder = tmp_path_factory.mktemp("model")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "cat", "dog", "eats", "that", "the", "this"]
    (folder / "vocab.txt").write_text("\n".join(words))
    BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    BertModel(BertConfig(vocab_size=len(words), **sizes)).save_pretrained(folder)
    return folder


def write_task(folder: Path, task: str, rows: int = 24) -> list[str]:
    """Local files of every split of a task, as arguments. The label follows from the first word."""
    subjects = ["the cat", "a dog", "this"]
    classes = TASKS[task].classes
    options = []
    for split in ["train", *TASKS[task].validation.values(), *TASKS[task].submissions]:
        lines = []
        for row in range(rows):
            texts = dict.fromkeys(TASKS[task].columns, f"{subjects[row % 3]} eats that")
            label = classes[row % 3 % len(classes)] if classes else float(row % 3)
            lines.append(json.dumps(texts | ({} if split.startswith("test") else {"label": label})))
        (folder / f"{split}.jsonl").write_text("\n".join(lines))
        options += [f"--{split}_file", str(folder / f"{split}.jsonl")]
    return options


def command(config: str, model: Path, folder: Path, *options: str) -> list[str]:
    quick = "--max_steps 6 --warmup_steps 0 --eval_steps 3 --save_steps 3 --logging_steps 1 --report_to none"
    quick += " --per_device_train_batch_size 4 --max_seq_length 16 --use_cpu --disable_tqdm true"
    where = ["--model_name_or_path", str(model), "--output_dir", str(folder / "out")]
    return [str(GLUE / f"{config}.yaml"), *quick.split(), *where, *options]


@pytest.fixture
def glue(monkeypatch, model, tmp_path):
    """Run the script as from the command line, in this process."""

    def call(config: str, *options: str) -> Path:
        arguments = command(config, model, tmp_path, *options)
        monkeypatch.setattr(sys, "argv", ["run_glue.py", *arguments])
        main()
        return Path(arguments[max(at for at, word in enumerate(arguments) if word == "--output_dir") + 1])

    return call


@pytest.mark.parametrize(
    ("config", "results", "submissions"),
    [
        ("cola", {"eval_matthews_correlation"}, {"CoLA.tsv": {"0", "1"}}),
        ("stsb_baseline", {"eval_pearson", "eval_spearman"}, {"STS-B.tsv": None}),
        (
            "mnli",
            {"eval_accuracy", "eval_mismatched_accuracy"},
            {name: {"entailment", "neutral", "contradiction"} for name in ("MNLI-m.tsv", "MNLI-mm.tsv")},
        ),
        ("qnli_baseline", {"eval_accuracy"}, {"QNLI.tsv": {"entailment", "not_entailment"}}),
    ],
)
def test_a_task_is_trained_evaluated_and_predicted_from_local_files(glue, tmp_path, config, results, submissions):
    task = config.removesuffix("_baseline")
    folder = glue(config, *write_task(tmp_path, task), "--do_predict")
    assert results <= set(json.loads((folder / "all_results.json").read_text()))
    assert BertForSequenceClassification.from_pretrained(folder).config.num_labels == max(len(TASKS[task].classes), 1)
    for name, allowed in submissions.items():
        header, *lines = (folder / name).read_text().splitlines()
        indices, predictions = zip(*(line.split("\t") for line in lines), strict=True)
        assert (header, indices) == ("index\tprediction", tuple(map(str, range(24))))
        assert set(predictions) <= allowed if allowed else all(0 <= float(score) <= 5 for score in predictions)


def test_a_head_of_another_task_is_replaced_only_on_request(glue, tmp_path, capsys):
    """As when RTE starts from a model of MNLI."""
    mnli = glue("mnli", *write_task(tmp_path, "mnli"), "--output_dir", str(tmp_path / "mnli"))
    options = [*write_task(tmp_path, "rte"), "--model_name_or_path", str(mnli), "--output_dir", str(tmp_path / "rte")]
    with pytest.raises(SystemExit):
        glue("rte", *options)
    message = "has a head for the classes entailment, neutral, contradiction, not for the classes"
    assert message in capsys.readouterr().err
    rte = glue("rte", *options, "--new_head", "true")
    assert BertForSequenceClassification.from_pretrained(rte).config.num_labels == 2


def test_comparative_runs_log_the_loss_of_every_variant_and_baselines_do_not(glue, tmp_path):
    files = write_task(tmp_path, "mrpc")
    logs = {}
    for config in ("mrpc", "mrpc_baseline"):
        state = json.loads(
            (glue(config, *files, "--output_dir", str(tmp_path / config)) / "trainer_state.json").read_text()
        )
        logs[config] = {key for log in state["log_history"] for key in log}
    assert {"loss_full", "loss_ablated_1", "violation_rate"} <= logs["mrpc"] - logs["mrpc_baseline"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("--train_file", "/no/where.csv"), "--train_file /no/where.csv does not exist"),
        (("--max_train_samples", "0"), "0 samples of train"),
        (("--task_name", "mrpc"), "has no column 'sentence1'; found: sentence, label"),
        (("--task_name", "wnli"), "--task_name 'wnli' is not one of cola"),
        (("--model_name_or_path", "no-one/nothing"), "'no-one/nothing' could not be loaded"),
        (("--cmp_num_crops", "9"), "--cmp_num_crops 9 is more than"),
        (("--resume_from_checkpoint", "true"), "No valid checkpoint found in output directory"),
    ],
)
def test_mistakes_end_the_script_with_one_line(glue, tmp_path, capsys, change, message):
    with pytest.raises(SystemExit) as end:
        glue("cola", *write_task(tmp_path, "cola"), *change)
    assert end.value.code == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("error: ") and message in last


def test_a_killed_run_resumes_to_the_weights_of_an_uninterrupted_one(glue, model, tmp_path):
    long = "--load_best_model_at_end false --max_steps 30 --save_steps 5 --eval_strategy no --cmp_num_ablations 1"
    options = [*write_task(tmp_path, "cola"), *long.split()]
    whole = glue("cola", *options, "--output_dir", str(tmp_path / "whole"))
    arguments = command("cola", model, tmp_path, *options)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([sys.executable, str(GLUE / "run_glue.py"), *arguments], env=environment, cwd=tmp_path)
    deadline = time.time() + 300
    while not (tmp_path / "out" / "checkpoint-10").exists() and process.poll() is None and time.time() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "the run ended before it could be killed"
    resumed = glue("cola", *options, "--resume_from_checkpoint", "true")
    weights = [load_file(folder / "model.safetensors") for folder in (whole, resumed)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


@pytest.mark.skipif(not REAL.is_dir(), reason=f"no real data in {REAL}")
@pytest.mark.parametrize(("task", "splits"), [("cola", "train validation"), ("mrpc", "train validation test")])
def test_real_files_go_through_the_script(glue, task, splits):
    files = [part for split in splits.split() for part in (f"--{split}_file", str(REAL / task / f"{split}.jsonl"))]
    few = ["--max_train_samples", "32", "--max_eval_samples", "16", "--max_predict_samples", "16"]
    folder = glue(task, *files, *few, *(["--do_predict"] if "test" in splits else []))
    assert json.loads((folder / "all_results.json").read_text())["eval_samples"] == 16
