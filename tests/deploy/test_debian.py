"""Commands inside a Debian root reach the shell as they were meant, whatever the names of directories are."""

import os
import subprocess
from pathlib import Path

import pytest

from deploy import debian

# Stand-ins: the first drops its own options, the others write down what they were given, an argument to a line.
UNSHARE = """#!/bin/sh
while [ "${1#--}" != "$1" ]; do shift; done
exec "$@"
"""
WRITES = """#!/bin/sh
printf '%s\\n' "${0##*/}" "$@" >>"$LOG"
"""


@pytest.fixture
def given(tmp_path, monkeypatch):
    """What mount and chroot are given, in order."""
    commands, log = tmp_path / "bin", tmp_path / "log"
    commands.mkdir()
    for name, text in {"unshare": UNSHARE, "mount": WRITES, "chroot": WRITES}.items():
        (commands / name).write_text(text)
        (commands / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{commands}:{os.environ['PATH']}")
    monkeypatch.setenv("LOG", str(log))
    return log


@pytest.mark.parametrize("name", ["plain", "with a space", "a'quote", "$(touch stray)", "a;b"])
def test_names_of_directories_are_no_words_of_the_shell(tmp_path, given, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    root, outside = tmp_path / name / "root", tmp_path / name / "outside"
    command = debian.enter(root, ["say", "two words"], binds={outside: f"/{name}"}, env={"WORD": "$HOME"})
    subprocess.run(command, check=True)
    lines = given.read_text().splitlines()
    mounts = [("/dev", "/dev"), ("/proc", "/proc"), (str(outside), f"/{name}")]
    expected = [word for source, inside in mounts for word in ("mount", "--rbind", source, f"{root}{inside}")]
    assert lines[: len(expected)] == expected
    assert lines[len(expected) :][:4] == ["chroot", str(root), "env", "-i"]
    assert lines[-3:] == ["WORD=$HOME", "say", "two words"]
    assert (root / name).is_dir()
    assert not Path("stray").exists()
