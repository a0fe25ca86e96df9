"""`make docs` sees links that lead nowhere: to pages, to anchors, to other files."""

import ast
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


def build(tree: Path) -> subprocess.CompletedProcess[str]:
    """Build a site as `make docs` does, of the pages below another root."""
    place = tree / "tests/house"
    place.mkdir(parents=True)
    for name in ("mkdocs.yml", "docs_hook.py"):
        shutil.copy(HERE / name, place)
    command = (sys.executable, "-m", "mkdocs", "build", "--strict")
    options = ("--config-file", str(place / "mkdocs.yml"), "--site-dir", str(tree / "site"))
    return subprocess.run([*command, *options], capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("link", "named"),
    [
        ("[x](docs/there.md#a-part)", ""),
        ("[x](docs/other.wit)", ""),
        ("[x](docs)", ""),
        ("`[x](nowhere.md)`", ""),
        ("[x](docs/gone.md)", "docs/gone.md"),
        ("[x](docs/there.md#gone)", "docs/there.md#gone"),
        ("[x](#gone)", "#gone"),
        ("[x](docs/gone.wit)", "docs/gone.wit"),
        ("[x](gone/)", "gone/"),
    ],
)
def test_a_link_that_leads_nowhere_is_named(tmp_path: Path, link: str, named: str) -> None:
    (tmp_path / "docs").mkdir()
    (tmp_path / "README.md").write_text(f"# Start\n\n{link}\n")
    (tmp_path / "docs/there.md").write_text("# There\n\n## A part\n\n[back](../README.md#start)\n")
    (tmp_path / "docs/other.wit").touch()
    done = build(tmp_path)
    assert (done.returncode != 0) == bool(named), done.stderr
    assert named in done.stderr


ROOT = HERE.parents[1]
ARCHITECTURE = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "file", sorted(set(re.findall(r"`((?:agent|fleet|signing|tests|deploy)/[\w./]+)`", ARCHITECTURE)))
)
def test_files_of_the_architecture_page_exist(file: str) -> None:
    assert (ROOT / file).exists()


@pytest.mark.parametrize(("title", "hops"), [("Route 1", 7), ("Route 2", 17)])
def test_each_hop_of_a_route_names_a_class_of_its_file(title: str, hops: int) -> None:
    section = ARCHITECTURE.partition(f"## {title}")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| (\d+) \| [^|]+ \| `([^`]+)` \| `(\w+)` \|", section, re.MULTILINE)
    assert [int(number) for number, _, _ in rows] == list(range(1, hops + 1))
    for number, file, name in rows:
        classes = {
            node.name for node in ast.walk(ast.parse((ROOT / file).read_text())) if isinstance(node, ast.ClassDef)
        }
        assert name in classes, f"hop {number}: {file} has no class {name}"
