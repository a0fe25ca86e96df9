"""The built wheel in a clean environment outside the tree: an editable install hides packaging faults."""

import json
import os
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]


def run(*command: str | Path, cwd: Path, **env: str) -> subprocess.CompletedProcess[str]:
    """Run outside the tree, with nothing of this process's Python environment."""
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "VIRTUAL_ENV"))}
    done = subprocess.run(
        [str(word) for word in command], cwd=cwd, env=clean | env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{command}: {done.stdout}\n{done.stderr}"
    return done


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", out, ROOT, cwd=out)
    return next(out.glob("*.whl"))


@pytest.fixture(scope="module")
def clean(wheel, tmp_path_factory) -> Path:
    """A virtual environment with the wheel and what a whole fleet on one machine needs."""
    home = tmp_path_factory.mktemp("clean")
    venv.create(home / "venv", with_pip=True)
    run(home / "venv/bin/python", "-m", "pip", "install", "--quiet", f"{wheel}[all]", cwd=home)
    return home


def test_it_holds_the_three_packages_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"agent", "fleet", "signing"}
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert not [name for name in names if "__pycache__" in name]


def test_the_three_commands_answer(clean):
    for command in ("fleet", "fleet-agent", "fleet-host"):
        assert run(clean / "venv/bin" / command, "--version", cwd=clean).stdout.strip().endswith("0.2.0")


def test_every_module_is_where_it_should_be(clean):
    listed = run(
        clean / "venv/bin/python",
        "-c",
        "import agent, fleet, signing, json; print(json.dumps([m.__path__[0] for m in (agent, fleet, signing)]))",
        cwd=clean,
    ).stdout
    assert all("site-packages" in path for path in json.loads(listed))


def test_the_whole_main_job_runs_from_the_wheel(clean):
    done = run(clean / "venv/bin/fleet", "demo", "--once", cwd=clean, PATH=f"{clean}/venv/bin:/usr/bin:/bin")
    assert "rolled back" in done.stdout
