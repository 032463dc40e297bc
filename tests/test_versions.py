"""What setup.cfg declares is what is imported, its floors are what is tried, and the documentation names both ends."""

import ast
import configparser
import re
import sys
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

from cmp_trainer.scripting import EXTRAS

ROOT = Path(__file__).parents[1]
INSTALLED_AS = {"faiss": "faiss-cpu"}  # where it is not installed
# Trainer needs the first, model cards are filled in by the second and name the version of the third.
NOT_IMPORTED = {"accelerate", "jinja2", "tokenizers"}


def setup() -> configparser.ConfigParser:
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg")
    return parser


def floors() -> dict[str, str]:
    """Library -> oldest version that setup.cfg allows, of what `make test-oldest` installs."""
    wanted = setup()["options"]["install_requires"] + setup()["options.extras_require"]["examples"]
    return dict(re.findall(r"^([\w-]+)>=(\S+)$", wanted, flags=re.M))


def pins(name: str) -> dict[str, str]:
    """Library -> version of a file of constraints."""
    return dict(re.findall(r"^([\w-]+)==(\S+)$", (ROOT / name).read_text(), flags=re.M))


def tried_oldest() -> dict[str, str]:
    """What `make test-floor` runs with: the constraints, and the oldest torch."""
    torch = re.search(r"VENV\)-floor/.*torch==([\d.]+)", (ROOT / "Makefile").read_text(), flags=re.S)
    assert torch is not None
    return {**pins("constraints-oldest.txt"), "torch": torch[1]}


def declared(*extras: str) -> set[str]:
    """The libraries that are installed with these extras, and with the extras that those name."""
    options = setup()["options.extras_require"]
    lines = setup()["options"]["install_requires"].splitlines()
    for extra in extras:
        lines += options[extra].splitlines()
        for named in re.findall(r"cmp-trainer\[(.*)\]", options[extra]):
            lines += [line for other in named.split(",") for line in options[other].splitlines()]
    names = [re.match(r"[\w-]+", line) for line in lines if "cmp-trainer[" not in line]
    return {name[0].lower().replace("_", "-") for name in names if name}


def imported(folder: str) -> set[str]:
    """The libraries, by the names they are installed by, that the files of a folder import anywhere."""
    files = list((ROOT / folder).rglob("*.py"))
    own = {"cmp_trainer", *sys.stdlib_module_names, *(file.stem for file in files)}
    modules = set()
    for file in files:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                modules |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                modules.add(str(node.module).partition(".")[0])
    installed = packages_distributions()
    names = {module: installed.get(module, [INSTALLED_AS.get(module, module)])[0] for module in modules - own}
    return {name.lower().replace("_", "-") for name in names.values()}


def test_the_package_imports_what_it_declares_and_nothing_else():
    assert imported("cmp_trainer") | NOT_IMPORTED == declared("plot")


@pytest.mark.parametrize(
    ("folder", "extras"),
    [("demo", ["plot"]), ("glue", ["examples"]), ("squad", ["examples"]), ("hotpotqa", ["examples", "plot"])]
    + [("prf", ["prf"])],
)
def test_an_example_imports_what_its_extra_brings(folder, extras):
    assert imported(f"examples/{folder}") <= declared(*extras)


@pytest.mark.parametrize(("module", "extra"), EXTRAS.items())
def test_the_extra_that_is_named_for_a_missing_package_brings_it(module, extra):
    (name,) = set(packages_distributions().get(module, [INSTALLED_AS.get(module, module)]))
    assert name.lower().replace("_", "-") in declared(extra)


def test_the_oldest_libraries_that_are_tried_are_the_oldest_that_setup_allows():
    assert len(floors()) > 5
    assert tried_oldest() == floors()


def test_the_documentation_names_the_versions_that_are_tried():
    section = (ROOT / "docs" / "compatibility.md").read_text().partition("## Versions")[2]
    rows = re.findall(r"^\| ([a-z-]+) \| ([\d.]+) \| ([\d.]+) \|$", section, flags=re.M)
    assert {name: new for name, new, _ in rows} == pins("constraints.txt")
    assert {name: old for name, _, old in rows} == tried_oldest()
