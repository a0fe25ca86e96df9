"""Packages of the tree before modules moved and of the current tree, for tests of the upgrade.

Both contain only the product's own files. The bundled libraries are the same for both, and need a package index.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# builds as the tree itself does, without the libraries and without an index
BUILD = """
import sys
from pathlib import Path
from deploy.packages import build

whole = build.install
build.install = lambda place, what, platforms: None if "--require-hashes" in what else whole(place, what, platforms)
print(build.build("wasmfleet-agent", "amd64", Path(sys.argv[1]), Path(sys.argv[2])))
"""


def git(*arguments: str) -> bytes:
    """Ask git, in this checkout; skips the test where there is none, or no history."""
    command = ("git", "-c", "safe.directory=*", *arguments)
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("no git checkout with the history of the move")


def tree_before(directory: Path) -> Path:
    """Unpack the tree that the first commit of .git-blame-ignore-revs, the move, was made on."""
    moves = re.findall(r"^[0-9a-f]{40}$", (ROOT / ".git-blame-ignore-revs").read_text(), re.MULTILINE)
    archive = directory / "before.tar"
    archive.write_bytes(git("archive", f"{moves[0]}^"))
    tree = directory / "before"
    tree.mkdir()
    subprocess.run(["tar", "-xf", str(archive), "-C", str(tree)], check=True)  # tarfile's filters came with 3.11.4
    return tree


def package(tree: Path, out: Path) -> Path:
    """Build the device's package of a tree by the tree's own builder."""
    out.mkdir()
    pip = (sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index")
    subprocess.run([*pip, "--wheel-dir", str(out), str(tree)], check=True)
    wheel = next(out.glob("*.whl"))
    environment = {**os.environ, "PYTHONPATH": str(tree), "SOURCE_DATE_EPOCH": "1700000000"}
    command = (sys.executable, "-P", "-c", BUILD, str(wheel), str(out))
    done = subprocess.run(command, cwd=tree, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return Path(done.stdout.splitlines()[-1])


def unpack(deb: Path, root: Path) -> Path:
    """Unpack a package as dpkg does and return where its Python modules are; files of an earlier one go first."""
    place = root / "usr/lib/wasmfleet/agent"
    if place.exists():
        place.rename(root / "replaced")
    subprocess.run(["dpkg-deb", "--extract", str(deb), str(root)], check=True)
    return next(place.glob("lib/python*/site-packages"))
