"""What the site does not keep but makes: the page of the arguments, from the dataclass that parses them, and formulas.

mkdocs calls the functions that begin with `on_`. Pages that mkdocs.yml does not place join the navigation at its end.
Formulas, $$ … $$, become MathML, which browsers draw by themselves.
"""

import dataclasses
import inspect
import re
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

from cmp_trainer import CmpTrainingArguments

INTRODUCTION = """# Arguments

Fields of `CmpTrainingArguments`, and as `--name` on the command line of a script that uses it or is started with
`cmp-trainer run`. All arguments of `TrainingArguments` are there too, with their own defaults.
`CmpSeq2SeqTrainingArguments` adds the same to `Seq2SeqTrainingArguments`. Invalid values and combinations are rejected
at parse time, with a message that names the argument, its value and the fix. The formulas and the baselines are in
[concepts](concepts.md), what the forwards cost in [speed and memory](performance.md).
"""

_ARGUMENT = re.compile(r"(cmp_\w+) \((.*)\):$")


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Put pages into the navigation that mkdocs.yml does not place: results, and more."""
    placed = set(re.findall(r"[\w/]+\.md", str(config.nav)))
    pages = sorted(page.name for page in Path(config.docs_dir).glob("*.md") if page.name not in placed)
    groups = {"Results": [], "More": []}
    for page in pages:
        groups["Results" if page.startswith("results") else "More"].append(page)
    config.nav = [*(config.nav or []), *({title: pages} for title, pages in groups.items() if pages)]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the page of the arguments."""
    files.append(File.generated(config, "arguments.md", content=arguments_page()))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Formulas as MathML."""
    return re.sub(
        r"\$\$(.+?)\$\$", lambda match: convert(match[1].strip(), display="block"), markdown, flags=re.DOTALL
    )


def arguments_page() -> str:
    """Markdown: the groups of the docstring as headings, the fields with type, default and description."""
    fields = {field.name: field for field in dataclasses.fields(CmpTrainingArguments)}
    lines = [INTRODUCTION]
    body = inspect.cleandoc(CmpTrainingArguments.__doc__ or "").partition("Parameters:")[2].partition("\nRaises:")[0]
    for line in (line.strip() for line in body.splitlines()):
        match = _ARGUMENT.match(line)
        if line.startswith("> "):
            lines.append(f"\n## {line[2:]}\n")
        elif match:
            lines.append(
                f"\n### `--{match[1]}`\n\n*{_type(fields[match[1]])}, default: {_default(fields[match[1]])}*\n"
            )
        elif line:
            lines.append(line)
    return "\n".join(lines) + "\n"


def _type(field: dataclasses.Field) -> str:
    kind: Any = field.type
    choices = getattr(kind, "__args__", ())
    if choices and all(isinstance(choice, str) for choice in choices):
        return "one of " + ", ".join(f"`{choice}`" for choice in choices)
    name = kind.__name__ if isinstance(kind, type) and not choices else str(kind)
    return f"`{name.removesuffix(' | None')}`"


def _default(field: dataclasses.Field) -> str:
    return "none" if field.default is None else f"`{field.default}`"
