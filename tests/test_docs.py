"""README and docs: their code runs, what they name exists, and the site builds without a broken link."""

import ast
import dataclasses
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from run_glue import GlueArguments
from sybil import Sybil
from sybil.parsers.markdown import PythonCodeBlockParser
from transformers import (
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTModel,
    Wav2Vec2Config,
    Wav2Vec2Model,
)

from cmp_trainer import CmpTrainingArguments, cli
from cmp_trainer.data.classification import TextArguments
from cmp_trainer.reports.model_card import CITATIONS
from cmp_trainer.scripting import ModelArguments, parse_arguments
from tests.helpers import SMALL, letter_tokenizer
from tests.hub_server import HubServer, take_for_the_hub

ROOT = Path(__file__).parent.parent
PAGES = sorted([ROOT / "README.md", *ROOT.glob("docs/*.md")])
# The example of the first is run by the tests of cropping; the second quotes a card, whose model is not on the Hub.
RUN_ELSEWHERE = {"cropping.md", "model_card_example.md"}
PYTHON_PAGES = [page for page in PAGES if "```python" in page.read_text() and page.name not in RUN_ELSEWHERE]
FIELDS = {field.name: field for field in dataclasses.fields(CmpTrainingArguments)}


@pytest.fixture
def hub_of_small_models(tmp_path, monkeypatch):
    """A Hub on which the models that the pages name are tiny ones with random weights."""
    tokenizer = letter_tokenizer()
    t5 = T5Config(vocab_size=40, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2, decoder_start_token_id=0)
    narrow = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    sound = {"conv_dim": (8, 8), "conv_kernel": (10, 8), "conv_stride": (5, 4), "num_conv_pos_embedding_groups": 2}
    models = {
        "google-bert/bert-base-cased": BertModel(BertConfig(**SMALL)),
        "openai-community/gpt2": GPT2LMHeadModel(GPT2Config(vocab_size=40, n_embd=16, n_layer=1, n_head=2)),
        "google-t5/t5-small": T5ForConditionalGeneration(t5),
        "google/vit-base-patch16-224-in21k": ViTModel(ViTConfig(**narrow)),
        "facebook/wav2vec2-base": Wav2Vec2Model(Wav2Vec2Config(**narrow, **sound, num_feat_extract_layers=2)),
    }
    with HubServer(tmp_path / "hub") as server:
        for name, model in models.items():
            model.save_pretrained(tmp_path / name)
            tokenizer.save_pretrained(tmp_path / name)
            server.add(name, tmp_path / name)
        take_for_the_hub(server, monkeypatch)
        monkeypatch.setenv("HF_TOKEN", server.token)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
        yield server


@pytest.mark.parametrize("page", PYTHON_PAGES, ids=lambda page: page.stem)
def test_code_of_a_page_runs(page, hub_of_small_models, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    for example in Sybil([PythonCodeBlockParser()]).parse(page).examples():
        example.evaluate()


def test_pages_with_code_were_found():
    assert {"quickstart", "concepts", "howto_tasks", "howto_push"} <= {page.stem for page in PYTHON_PAGES}


def command_lines(program):
    """The words after a program's name, wherever a shell block begins a line with it."""
    blocks = [block for page in PAGES for block in re.findall(r"```bash\n(.*?)```", page.read_text(), flags=re.S)]
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    return [shlex.split(line, comments=True)[1:] for line in lines if line.startswith(f"{program} ")]


def test_commands_of_cmp_trainer_are_understood(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("your_script.py").touch()
    commands = [cli.parse(words) for words in command_lines("cmp-trainer")]
    assert len(commands) >= 6
    for run in (command for command in commands if "script" in command):
        (args,) = parse_arguments(CmpTrainingArguments, argv=run.arguments)
        assert args.cmp_num_ablations == 2


def test_files_and_arguments_of_example_commands_exist():
    commands = [words for words in command_lines("python") if words[0].startswith(("examples/", "benchmarks/"))]
    assert len(commands) > 5
    for words in commands:
        assert all((ROOT / word).is_file() for word in words if word.startswith(("examples/", "benchmarks/")))
        if words[0] == "examples/glue/run_glue.py":
            kinds = (ModelArguments, GlueArguments, TextArguments, CmpTrainingArguments)
            parse_arguments(*kinds, argv=[str(ROOT / words[1]), *words[2:]])


def test_targets_of_make_exist():
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.M)
    named = {words[0] for words in command_lines("make")}
    named |= {name for page in PAGES for name in re.findall(r"`make ([a-z-]+)`", page.read_text())}
    assert {"demo", "test", "bench"} <= named <= set(targets)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_argument_that_a_page_names_exists(page):
    assert set(re.findall(r"--(cmp_\w+)", page.read_text())) <= set(FIELDS)


def test_every_test_that_a_page_names_exists():
    named = {name for page in PAGES for name in re.findall(r"((?:cuda/)?test_\w+\.py)::(\w+)", page.read_text())}
    missing = [f"{file}::{test}" for file, test in named if test not in functions(ROOT / "tests" / file)]
    assert len(named) > 50
    assert not missing


def functions(file):
    """The names that a module defines functions by."""
    return {node.name for node in ast.parse(file.read_text()).body if isinstance(node, ast.FunctionDef)}


def test_every_case_of_the_compatibility_page_names_its_test_or_says_that_it_was_not_tried():
    blocks = (ROOT / "docs" / "compatibility.md").read_text().split("\n\n")
    tables = [block.splitlines() for block in blocks if block.startswith("|") and "| test |" in block.splitlines()[0]]
    rows = [row for _, _, *rows in tables for row in rows]
    assert len(rows) > 40
    assert not [row for row in rows if "::" not in row and "the same |" not in row and "not tried" not in row]


def test_the_readme_cites_as_model_cards_do():
    assert CITATIONS in (ROOT / "README.md").read_text()


def test_messages_of_the_trouble_page_are_messages_of_the_code():
    messages = " ".join(text for file in (ROOT / "cmp_trainer").rglob("*.py") for text in texts(file))
    titles = re.findall(r"^### `(.*)`$", (ROOT / "docs" / "faq.md").read_text(), flags=re.M)
    missing = [title for title in titles if not all(part.strip() in messages for part in title.split("…"))]
    assert len(titles) > 10
    assert not missing


def texts(file):
    """The string constants of a module, those of an f-string put together."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.JoinedStr):
            yield "".join(part.value if isinstance(part, ast.Constant) else "…" for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    pytest.importorskip("mkdocs", reason="the site is built where the docs extra is installed")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert built.returncode == 0, built.stdout + built.stderr
    return folder


def test_the_site_builds_without_a_broken_link_or_reference(site):
    assert (site / "index.html").is_file()


def test_the_page_of_arguments_shows_every_field_with_its_default(site):
    page = (site / "arguments" / "index.html").read_text()
    for name, field in FIELDS.items():
        if name.startswith("cmp_"):
            assert f"--{name}</code>" in page
            default = "none" if field.default is None else f"<code>{field.default}</code>"
            section = page.partition(f"--{name}</code>")[2][:600]
            assert f"default: {default}" in section


@pytest.mark.parametrize("name", [name for name in FIELDS if name.startswith("cmp_")])
def test_the_docstring_of_the_arguments_has_the_fields_default(name):
    default = FIELDS[name].default
    said = re.search(rf"{name} \(`.*`, (.*)\):", CmpTrainingArguments.__doc__)[1]
    expected = "*optional*" if default is None else f"defaults to {default!r}".replace("'", '"')
    assert said.replace("`", "") == expected


def test_formulas_are_drawn_without_other_servers(site):
    page = (site / "concepts" / "index.html").read_text()
    assert "<math" in page and "$$" not in page
    loaded = re.findall(r'<(?:script|link)[^>]*(?:src|href)="(https?://[^"]+)"', page)
    assert not loaded
