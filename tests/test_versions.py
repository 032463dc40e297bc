"""The floors of setup.cfg are what `make test-oldest` runs with, and the documentation names both ends."""

import configparser
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
NOT_TRIED = {"torch"}  # its floor comes with gigabytes of CUDA; see docs/compatibility.md


def floors() -> dict[str, str]:
    """Library -> oldest version that setup.cfg allows, of what `make test-oldest` installs."""
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    wanted = setup["options"]["install_requires"] + setup["options.extras_require"]["examples"]
    return dict(re.findall(r"^([\w-]+)>=(\S+)$", wanted, flags=re.M))


def pins(name: str) -> dict[str, str]:
    """Library -> version of a file of constraints."""
    return dict(re.findall(r"^([\w-]+)==(\S+)$", (ROOT / name).read_text(), flags=re.M))


def test_the_oldest_libraries_that_are_tried_are_the_oldest_that_setup_allows():
    tried, allowed = pins("constraints-oldest.txt"), floors()
    assert len(allowed) > 5
    assert tried.keys() == allowed.keys()
    assert {name: tried[name] for name in tried.keys() - NOT_TRIED} == {
        name: allowed[name] for name in allowed.keys() - NOT_TRIED
    }


def test_the_documentation_names_the_versions_that_are_tried():
    section = (ROOT / "docs" / "compatibility.md").read_text().partition("## Versions")[2]
    rows = re.findall(r"^\| ([a-z-]+) \| ([\d.]+) \| ([\d.]+) \|$", section, flags=re.M)
    assert {name: new for name, new, _ in rows} == pins("constraints.txt")
    assert {name: old for name, _, old in rows} == pins("constraints-oldest.txt")
