"""Pushing over real HTTP, with huggingface_hub's own client, to the Hub of hub_server.py.

The client's xet uploads are turned off (HF_HUB_DISABLE_XET, its own variable): that server speaks LFS.
"""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
import torch
from huggingface_hub import ModelCard
from huggingface_hub.errors import HfHubHTTPError
from peft import LoraConfig, get_peft_model

from tests.helpers import batch_of, cmp_trainer, letter_tokenizer, same_weights, tiny_bert, token_data
from tests.hub_server import HubServer, card_errors, take_for_the_hub

NAME = "someone/tiny"
ABOUT = {"tasks": "text-classification", "dataset": "Tokens", "dataset_tags": "someone/tokens", "language": "en"}


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A running Hub that this process takes for huggingface.co."""
    with HubServer(tmp_path / "hub") as server:
        take_for_the_hub(server, monkeypatch)
        yield server


def pushing(hub, folder, model=None, **settings):
    """A trainer that pushes, not yet trained."""
    given = {"push_to_hub": True, "hub_model_id": NAME, "hub_token": hub.token, "cmp_num_ablations": 1, "max_steps": 2}
    trainer = cmp_trainer(folder, model, **{**given, **settings})
    trainer.processing_class = letter_tokenizer()
    return trainer


def run_without_cmp_trainer(hub, folder, code):
    """The last line that `code` prints in a fresh process that cannot import cmp_trainer."""
    blocker = "import sys\nsys.modules['cmp_trainer'] = None\n"
    settings = {"HF_ENDPOINT": hub.url, "HF_HOME": str(folder), "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | settings
    done = subprocess.run(
        [sys.executable, "-c", blocker + code],
        env=environment,
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.strip().split("\n")[-1])


def logits_of(trainer, rows=4):
    batch = batch_of(token_data(), range(rows))
    trainer.model.eval()
    with torch.no_grad():
        return trainer.model(batch["input_ids"]).logits


USE = """
import json, torch
from transformers import AutoModelForSequenceClassification, pipeline
model = AutoModelForSequenceClassification.from_pretrained("someone/tiny").eval()
with torch.no_grad():
    logits = model(torch.tensor({ids})).logits.tolist()
label = pipeline("text-classification", "someone/tiny", tokenizer="someone/tiny")("a b c")[0]["label"]
print(json.dumps([logits, label]))
"""


def test_a_pushed_model_works_where_cmp_trainer_is_not_installed(hub, tmp_path):
    trainer = pushing(hub, tmp_path / "run")
    trainer.train()
    trainer.push_to_hub(**ABOUT)
    ids = batch_of(token_data())["input_ids"].tolist()
    logits, label = run_without_cmp_trainer(hub, tmp_path, USE.format(ids=ids))
    torch.testing.assert_close(torch.tensor(logits), logits_of(trainer), rtol=0, atol=0)
    assert label.startswith("LABEL_")


def test_what_lands_is_what_from_pretrained_reads_and_the_card(hub, tmp_path):
    trainer = pushing(hub, tmp_path / "run", compute_metrics=lambda _: {"accuracy": 0.5}, eval_strategy="epoch")
    trainer.train()
    trainer.evaluate()
    trainer.evaluate_ablations(seeds=[0])
    trainer.push_to_hub(**ABOUT)
    files = hub.files(NAME)
    expected = {"README.md", "ablation_curve.png", "config.json", "model.safetensors", "tokenizer.json"}
    assert expected <= set(files)
    assert not any(b"cmp_trainer" in content for name, content in files.items() if name.endswith(".json"))
    card = ModelCard(files["README.md"].decode())
    assert card.data.eval_results[0].metric_value == 0.5
    assert not card_errors(str(card))
    assert files["ablation_curve.png"].startswith(b"\x89PNG")


@pytest.mark.parametrize("strategy", ["end", "every_save", "checkpoint"])
def test_each_strategy_pushes_when_it_says(strategy, hub, tmp_path):
    trainer = pushing(
        hub, tmp_path / "run", hub_strategy=strategy, save_strategy="steps", save_steps=1, hub_always_push=True
    )
    trainer.train()
    during = [message for message in hub.messages(NAME) if message.startswith("Training in progress")]
    trainer.push_to_hub()
    assert hub.messages(NAME)[-1] == "End of training"
    assert bool(during) == (strategy != "end")
    checkpoint = {path for path in hub.files(NAME) if path.startswith("last-checkpoint/")}
    assert ({"last-checkpoint/optimizer.pt", "last-checkpoint/trainer_state.json"} <= checkpoint) == (
        strategy == "checkpoint"
    )


def test_training_goes_on_from_a_pushed_checkpoint(hub, tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 2, "hub_strategy": "checkpoint"}
    whole = cmp_trainer(tmp_path / "whole", cmp_num_ablations=1, max_steps=4)
    whole.train()
    pushed = pushing(hub, tmp_path / "first", max_steps=4, **settings)
    pushed.train()
    first_push = next(
        sha for sha, commit in hub.state(NAME)["commits"].items() if "step 2, checkpoint" in commit["message"]
    )
    for path, entry in hub.tree(NAME, first_push).items():
        if path.startswith("last-checkpoint/"):
            file = tmp_path / "second" / path.replace("last-checkpoint", "checkpoint-2")
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(hub.content(entry["oid"]))
    resumed = cmp_trainer(tmp_path / "second", tiny_bert(seed=1), cmp_num_ablations=1, max_steps=4)
    resumed.train(resume_from_checkpoint=True)
    assert same_weights(resumed.model, whole.model)


def test_a_private_repository_shows_nothing_without_the_token(hub, tmp_path):
    trainer = pushing(hub, tmp_path / "run", hub_private_repo=True)
    trainer.push_to_hub()
    assert hub.state(NAME)["private"]
    with pytest.raises(HfHubHTTPError, match="Repository Not Found"):
        huggingface_hub.HfApi(endpoint=hub.url, token=False).model_info(NAME)
    assert huggingface_hub.HfApi(endpoint=hub.url, token=hub.token).model_info(NAME).private


ADAPTER = """
import json, torch
from peft import PeftModel
from transformers import AutoModelForSequenceClassification
base = AutoModelForSequenceClassification.from_pretrained("someone/base", num_labels=3)
model = PeftModel.from_pretrained(base, "someone/tiny").eval()
with torch.no_grad():
    print(json.dumps(model(torch.tensor({ids})).logits.tolist()))
"""


def test_a_pushed_adapter_works_on_its_base_where_cmp_trainer_is_not_installed(hub, tmp_path):
    base = tiny_bert()
    base.push_to_hub("someone/base", token=hub.token)
    base = type(base).from_pretrained("someone/base", token=hub.token, cache_dir=tmp_path / "cache")
    model = get_peft_model(base, LoraConfig(task_type="SEQ_CLS", lora_dropout=0.1, modules_to_save=["classifier"]))
    trainer = pushing(hub, tmp_path / "run", model)
    trainer.train()
    trainer.push_to_hub()
    files = hub.files(NAME)
    assert "adapter_model.safetensors" in files and "model.safetensors" not in files
    card = ModelCard(files["README.md"].decode())
    assert (card.data.library_name, card.data.base_model) == ("peft", "someone/base")
    ids = batch_of(token_data())["input_ids"].tolist()
    logits = run_without_cmp_trainer(hub, tmp_path, ADAPTER.format(ids=ids))
    torch.testing.assert_close(torch.tensor(logits), logits_of(trainer), rtol=0, atol=1e-6)


def test_everything_can_be_downloaded_with_the_hubs_client(hub, tmp_path):
    pushing(hub, tmp_path / "run").push_to_hub()
    folder = huggingface_hub.HfApi(endpoint=hub.url).snapshot_download(NAME, local_dir=tmp_path / "copy")
    assert {path.name for path in (tmp_path / "copy").iterdir() if path.is_file()} == set(hub.files(NAME))
    assert same_weights(tiny_bert().from_pretrained(folder), tiny_bert())


# Faults: (how, where the server fails, what the log tells the user)
FAULTS = {
    "500 in the middle of an upload": (500, ("PUT", "/lfs/"), "The Hub has a fault (HTTP 500)"),
    "500 at the commit": (500, ("POST", "/commit/"), "The Hub has a fault (HTTP 500)"),
    "connection lost": ("drop", ("POST", "/commit/"), "The Hub could not be reached"),
}


@pytest.mark.parametrize(("how", "where", "said"), FAULTS.values(), ids=FAULTS)
def test_a_fault_loses_nothing_and_says_what_to_do(how, where, said, hub, tmp_path, caplog):
    trainer = pushing(hub, tmp_path / "run")
    trainer.train()
    hub.fail(*where, how)
    with pytest.raises(Exception):  # noqa: B017
        trainer.push_to_hub()
    assert said in caplog.text
    assert "Nothing is lost here" in caplog.text
    assert f"hf upload {NAME} {tmp_path / 'run'}" in caplog.text
    assert same_weights(tiny_bert().from_pretrained(tmp_path / "run"), trainer.model)
    hub.faults.clear()
    trainer.push_to_hub()
    assert "model.safetensors" in hub.files(NAME)


def test_the_command_that_is_advised_pushes_the_model_and_nothing_else(hub, tmp_path, caplog):
    trainer = pushing(hub, tmp_path / "my run", save_strategy="steps", save_steps=1)
    trainer.train()
    hub.fail("POST", "/commit/", 500)
    with pytest.raises(HfHubHTTPError):
        trainer.push_to_hub()
    hub.faults.clear()
    program, *words = shlex.split(re.search(r"with `(hf upload .*)`", caplog.text)[1])
    settings = {"HF_ENDPOINT": hub.url, "HF_TOKEN": hub.token, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
    command = [str(Path(sys.executable).with_name(program)), *words]
    done = subprocess.run(command, env={**os.environ, **settings}, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert {"model.safetensors", "README.md", "config.json"} <= set(hub.files(NAME))
    assert not any(name.startswith(("checkpoint-", "_")) for name in hub.files(NAME))


def test_a_token_that_xet_refuses_is_named_too(hub, tmp_path, caplog, monkeypatch):
    trainer = pushing(hub, tmp_path / "run")
    trainer.train()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", False)
    hub.fail("GET", "xet-write-token", 403)
    with pytest.raises(Exception):  # noqa: B017
        trainer.push_to_hub()
    assert "The Hub does not accept the token" in caplog.text


def test_an_expired_token_is_named_and_the_next_push_goes_through(hub, tmp_path, caplog):
    trainer = pushing(hub, tmp_path / "run")
    trainer.train()
    hub.token = "hf_renewed"
    with pytest.raises(HfHubHTTPError, match="401"):
        trainer.push_to_hub()
    assert "The Hub does not accept the token: it has expired" in caplog.text
    assert "hf auth login" in caplog.text
    trainer.push_to_hub(token="hf_renewed")
    assert "model.safetensors" in hub.files(NAME)


def test_a_refused_token_is_named_before_anything_is_trained(hub, tmp_path, caplog):
    with pytest.raises(HfHubHTTPError, match="401"):
        pushing(hub, tmp_path / "run", hub_token="hf_wrong")
    assert "nothing was trained and nothing is lost" in caplog.text
    assert "leave out --push_to_hub" in caplog.text


def test_a_short_fault_is_bridged_by_the_client(hub, tmp_path):
    trainer = pushing(hub, tmp_path / "run")
    hub.fail("PUT", "/lfs/", 503, times=1)
    trainer.push_to_hub()
    assert "model.safetensors" in hub.files(NAME)


def test_a_failed_background_push_does_not_stop_training_and_is_reported_once(hub, tmp_path, caplog):
    # One save, so that no second one writes over the files while the first is still being pushed.
    settings = {"hub_strategy": "every_save", "save_strategy": "steps", "save_steps": 2, "hub_always_push": True}
    trainer = pushing(hub, tmp_path / "run", **settings)
    hub.fail("POST", "/commit/", 500, times=1)
    trainer.train()
    assert trainer.state.global_step == 2
    trainer.push_to_hub()
    assert caplog.text.count("A checkpoint was not pushed") == 1
    assert hub.messages(NAME)[-1] == "End of training"


def test_a_card_the_hub_refuses_is_refused_by_this_hub_too():
    card = "---\ntags: one\nbase_model: ../folder/x y\nmodel-index:\n- name: m\n  results:\n  - task: {}\n---\n"
    assert len(card_errors(card)) == 6
    assert not card_errors("no metadata")
