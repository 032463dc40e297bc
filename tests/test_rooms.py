"""What each room of the package may know: a batch flows one way, and nothing below the trainer knows of one."""

import ast
from pathlib import Path

import pytest

import cmp_trainer

PACKAGE = Path(cmp_trainer.__file__).parent
MAY_IMPORT = {
    "ablations": {"ablations"},
    "losses": {"losses", "ablations"},
    "execution": {"execution", "losses", "ablations"},
    "data": {"data", "errors"},
}
BELOW_THE_TRAINER = [
    *sorted(path for room in MAY_IMPORT for path in (PACKAGE / room).glob("*.py")),
    PACKAGE / "step.py",
]


def imported(file):
    """`(module, name)` of everything that a file imports."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from ((node.module or "", alias.name) for alias in node.names)


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_a_room_imports_only_what_stands_below_it(room):
    rooms = {
        module.split(".")[1]
        for file in (PACKAGE / room).glob("*.py")
        for module, _ in imported(file)
        if module.startswith("cmp_trainer.")
    }
    assert rooms <= MAY_IMPORT[room]


@pytest.mark.parametrize("file", BELOW_THE_TRAINER, ids=lambda file: file.relative_to(PACKAGE).as_posix())
def test_nothing_below_the_trainer_imports_a_trainer_or_a_callback(file):
    assert not [name for _, name in imported(file) if "Trainer" in name]
    assert not [
        module for module, _ in imported(file) if module.startswith(("cmp_trainer.trainer", "transformers.trainer"))
    ]


def test_only_the_command_line_imports_the_trainer():
    files = [file for file in PACKAGE.rglob("*.py") if ("cmp_trainer.trainer", "CmpTrainer") in set(imported(file))]
    assert {file.relative_to(PACKAGE).as_posix() for file in files} == {"__init__.py", "saved_model.py"}
