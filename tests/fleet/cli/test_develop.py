"""An author's loop on one machine: new, build, test, run with --watch, push's view of a project; no fleet anywhere."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import tomllib
import urllib.request
from pathlib import Path

import pytest
from wasmtime import wat2wasm

from fleet.cli import dev_host
from fleet.cli.answers import ANSWERS
from fleet.cli.base import Fault
from fleet.component import project, toolchains

ROOT = Path(__file__).resolve().parents[3]
DEMO = ROOT / "components/demo"
GUESTS = ROOT / "components/guests"
FLEET = [sys.executable, "-m", "fleet.cli.main"]
TOML = """
name = "hello"
trigger = { type = "http" }

[build]
command = ["cp", "source.wasm", "made.wasm"]
output = "made.wasm"
watch = ["source.wasm"]
"""
GREETS = """
[[request]]
name = "greets"
body = "hello from v1\\n"
answer-headers = { content-type = "text/plain" }

[[request]]
name = "takes a body"
method = "POST"
path = "/echo"
send = "there and back"
contains = "and back"
"""


def run(*arguments, cwd):
    return subprocess.run(
        [*FLEET, *map(str, arguments)], cwd=cwd, capture_output=True, text=True, check=False, timeout=100
    )


@pytest.fixture
def made(tmp_path):
    """A project whose build is a copy: the toolchains are in tests/components."""
    place = tmp_path / "hello"
    place.mkdir()
    shutil.copy(DEMO / "v1.wasm", place / "source.wasm")
    (place / "component.toml").write_text(TOML)
    (place / "tests.toml").write_text(GREETS)
    return place


@pytest.mark.parametrize("language", project.LANGUAGES)
@pytest.mark.parametrize("trigger", project.TRIGGERS)
def test_a_new_project_is_whole(tmp_path, language, trigger):
    done = run("component", "new", "my-part", "--lang", language, "--trigger", trigger, cwd=tmp_path)
    if language == "js" and trigger != "http":
        assert done.returncode == 2
        assert "rust or python" in done.stderr
        assert not (tmp_path / "my-part").exists()
        return
    assert done.returncode == 0, done.stderr
    place = tmp_path / "my-part"
    for file in place.rglob("*"):
        assert file.is_dir() or "{{" not in file.read_text(), file
    found = project.load(place)
    assert all(each.exists() for each in found.watched)
    assert tomllib.loads((place / "component.toml").read_text())["trigger"]["type"] == trigger
    assert {".gitignore", "README.md", "tests.toml"} <= {each.name for each in place.iterdir()}
    again = run("component", "new", "my-part", "--lang", language, cwd=tmp_path)
    assert (again.returncode, "exists already" in again.stderr) == (2, True)


@pytest.mark.parametrize("name", ["Bad", "-x", "9lives", "a_b", "ends-", "ü", ""])
def test_a_name_that_no_toolchain_takes_makes_nothing(tmp_path, name):
    done = run("component", "new", "--lang", "rust", "--", name, cwd=tmp_path)
    assert done.returncode == 2
    assert not any(tmp_path.iterdir())


def test_a_project_is_built_and_tested_from_its_own_directory(made):
    done = run("component", "build", "--json", cwd=made)
    assert json.loads(done.stdout) == {
        "file": "made.wasm",
        "size_bytes": (DEMO / "v1.wasm").stat().st_size,
        "command": ["cp", "source.wasm", "made.wasm"],
    }
    done = run("component", "test", cwd=made)
    assert (done.returncode, done.stdout.splitlines()[-1]) == (0, "2 of 2 passed."), done.stderr


def test_a_wrong_answer_and_one_that_never_comes_fail_the_tests(made):
    (made / "tests.toml").write_text(
        GREETS.replace("v1", "v7") + '[[log]]\ncontains = "never said"\nwithin = "100ms"\n'
    )
    done = run("component", "test", "--json", cwd=made)
    assert done.returncode == 1, done.stderr
    found = {each["name"]: each["problem"] for each in json.loads(done.stdout)["tests"]}
    assert found["greets"] == r"answered 'hello from v1\n', expected 'hello from v7\n'"
    assert found["takes a body"] == ""
    assert found["logs never said"].startswith("no such line within 0.1 s")


def test_what_a_device_would_refuse_is_said_with_its_step(made):
    (made / "source.wasm").write_bytes(wat2wasm((GUESTS / "trap-in-start.wat").read_text()))
    done = run("component", "test", cwd=made)
    assert done.returncode == 1
    assert "a device would refuse it at its start" in done.stderr


@pytest.mark.parametrize(
    ("build", "sentence"),
    [
        ('command = ["no-such-tool-here"]\noutput = "x.wasm"', "no-such-tool-here is not on PATH"),
        ('command = ["false"]\noutput = "x.wasm"', "false failed with exit code 1"),
        ('command = ["true"]\noutput = "x.wasm"', "true made no"),
        ('command = "cp a b"\noutput = "x.wasm"', "build: give command, a list of texts"),
        ('command = ["true"]', "build: give command, a list of texts, and output"),
        ('command = ["true"]\noutput = "../x.wasm"', "build.output: '../x.wasm': name a place inside"),
        ('command = ["true"]\noutput = "/x.wasm"', "inside of the project"),
        ('command = ["true"]\noutput = "x.wasm"\nwatch = ["/etc"]', "inside of the project"),
        ('command = ["true"]\noutput = "x.wasm"\nshell = true', "build.shell: unknown field"),
    ],
)
def test_a_build_that_cannot_be_is_named_by_its_field(made, build, sentence):
    (made / "component.toml").write_text(f'name = "hello"\ntrigger = {{ type = "http" }}\n[build]\n{build}\n')
    done = run("component", "build", cwd=made)
    assert (done.returncode in {1, 2}, sentence in done.stderr) == (True, True), done.stderr


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "has no test"),
        ("[[request]]\npath = 'x'\n", "request[1].path: begin it with a slash"),
        ("[[request]]\nstatus = '200'\n", "request[1].status: expected a whole number"),
        ("[[log]]\n", "log[1].contains"),
        ("[request]\n", "request: write each as a table"),
        ("[[requests]]\n", "requests: unknown"),
        ("[[request]]\nbodys = ''\n", "request[1].bodys: unknown field; did you mean body?"),
        ("[[request", "is not TOML"),
        ("[[request]]\nmethod = 'GET X'\n", "request[1].method: 'GET X' is no method"),
        ("[[request]]\npath = '/a b'\n", "request[1].path: write blanks"),
        ('[[request]]\nheaders = { x = "a\\nb" }\n', "request[1].headers: 'x': HTTP has no such"),
        ("[[request]]\nheaders = { 'x y' = 'b' }\n", "request[1].headers: 'x y': HTTP has no such"),
    ],
)
def test_tests_that_cannot_be_read_are_named_by_their_field(made, text, sentence):
    (made / "tests.toml").write_text(text)
    done = run("component", "test", cwd=made)
    assert (done.returncode, sentence in done.stderr) == (2, True), done.stderr


def test_a_running_component_is_swapped_when_its_source_changes(made):
    command = [*FLEET, "component", "run", "--watch", "--json", "--port", "0"]
    with subprocess.Popen(command, cwd=made, stdout=subprocess.PIPE, text=True) as process:
        events = map(json.loads, process.stdout)

        def until(kind):
            return next(event for event in events if event["type"] == kind)

        serving = until("serving")
        assert not serving["swapped"]
        assert urllib.request.urlopen(serving["url"]).read() == b"hello from v1\n"
        assert until("calls")["calls"] == {"ok": 1}
        shutil.copy(DEMO / "v2.wasm", made / "source.wasm")
        assert until("serving")["swapped"]
        assert urllib.request.urlopen(serving["url"]).read() == b"hello from v2\n"
        (made / "source.wasm").write_bytes(b"\0asm\1\0\0\0")  # what is no component changes nothing
        os.utime(made / "source.wasm", ns=(1, 1))
        shutil.copy(DEMO / "v1.wasm", made / "source.wasm")
        assert until("serving")["swapped"]
        assert urllib.request.urlopen(serving["url"]).read() == b"hello from v1\n"
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 0
        keys = {key.rstrip("?") for key in ANSWERS["component run"]}
        assert set(serving) <= keys


def test_a_busy_component_is_watched_and_a_plain_kill_leaves_nothing(tmp_path):
    """The file named has no build: it goes and comes back, while the component has something to say at each look."""
    part = tmp_path / "part.wasm"
    part.write_bytes(wat2wasm((GUESTS / "task.wat").read_text()))
    (tmp_path / "part.toml").write_text('name = "part"\ntrigger = { type = "schedule", every = "100ms" }\n')
    command = [*FLEET, "component", "run", "part.wasm", "--watch", "--json", "--port", "0"]
    with (
        tempfile.TemporaryDirectory() as scratch,
        subprocess.Popen(  # a socket's path is short
            command,
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"TMPDIR": scratch},
        ) as process,
    ):
        events = map(json.loads, process.stdout)
        next(event for event in events if event["type"] == "calls")
        part.unlink()
        assert "cannot read part.wasm" in next(process.stderr)
        part.write_bytes(wat2wasm((GUESTS / "task-fails.wat").read_text()))
        assert next(event for event in events if event["type"] == "serving")["swapped"]
        process.terminate()
        assert process.wait(60) == 128 + signal.SIGTERM
        assert not list(Path(scratch).iterdir())


def test_a_host_that_does_not_end_takes_its_own_processes_along(monkeypatch):
    monkeypatch.setattr(dev_host, "_END_S", 0)
    with subprocess.Popen(
        ["sh", "-c", "sleep 50 & wait"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True
    ) as process:
        host = dev_host.DevHost(process)
        host.end()
        with pytest.raises(Fault, match="host ended"):  # its output has an end: nobody holds it any more
            host.next(20)


def test_a_port_in_use_is_said_before_the_build(made):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = run("component", "run", "--port", port, cwd=made)
    assert (done.returncode, f"cannot listen on port {port}" in done.stderr) == (2, True), done.stderr
    assert not (made / "made.wasm").exists()


def test_a_program_of_the_project_builds_it_from_anywhere_and_a_directory_named_build_is_watched(made):
    place = made.rename(made.with_name("build"))
    (place / "make.sh").write_text("#!/bin/sh\ncp source.wasm made.wasm\n")
    (place / "make.sh").chmod(0o755)
    (place / "component.toml").write_text('name = "x"\n[build]\ncommand = ["./make.sh"]\noutput = "made.wasm"\n')
    done = run("component", "build", "build", cwd=place.parent)
    assert done.returncode == 0, done.stderr
    assert place / "source.wasm" in project.stamp(project.load(place))


def test_the_next_steps_of_a_new_project_can_be_pasted(tmp_path):
    done = run("component", "new", "part", "--lang", "rust", "--output", "two words", cwd=tmp_path)
    assert "    cd 'two words'\n" in done.stdout


def test_check_inspect_and_push_take_the_directory_of_a_project(made):
    for command in (("check",), ("inspect",)):
        done = run("component", *command, made, cwd=made.parent)
        assert (done.returncode, "is not built" in done.stderr) == (2, True), done.stderr
    assert run("component", "build", cwd=made).returncode == 0
    for command in (("check",), ("inspect",)):
        done = run("component", *command, "hello", cwd=made.parent)
        assert (done.returncode, "hello/made.wasm" in done.stdout, "hello/component.toml" in done.stdout) == (
            0,
            True,
            True,
        )


def test_a_component_gets_the_configuration_that_it_needs(made):
    (made / "component.toml").write_text(TOML + '\n[config.place]\ndescription = "where it is"\n')
    done = run("component", "test", cwd=made)
    assert (done.returncode, "add --config place=VALUE" in done.stderr) == (2, True)
    assert run("component", "test", "--config", "place=hall", cwd=made).returncode == 0
    done = run("component", "test", "--config", "place=hall", "--config", "odd=1", cwd=made)
    assert (done.returncode, "has no config 'odd'" in done.stderr) == (2, True)


def test_every_template_says_how_its_tool_is_had():
    for language in project.LANGUAGES:
        for file in (ROOT / "components/templates" / language).rglob("component.toml"):
            program = re.search(r'^command = \["([^"]+)"', file.read_text(), re.MULTILINE)[1]
            assert program in toolchains.TOOLS


def test_a_manifest_that_is_written_anew_keeps_how_the_component_is_made(made):
    assert run("component", "build", cwd=made).returncode == 0
    (made / "component.toml").write_text(TOML.replace("name =", "# mine\nname ="))
    refused = run("component", "inspect", ".", "--write", cwd=made)
    assert (refused.returncode, "says something else" in refused.stderr or "exists" in refused.stderr) == (2, True)
    done = run("component", "inspect", ".", "--write", "--force", cwd=made)
    assert done.returncode == 0, done.stderr
    assert tomllib.loads((made / "component.toml").read_text())["build"] == tomllib.loads(TOML)["build"]
    assert run("component", "build", cwd=made).returncode == 0


def test_a_secret_that_need_not_be_there_is_not_asked_for(made):
    (made / "source.wasm").write_bytes(wat2wasm((GUESTS / "secret.wat").read_text()))
    (made / "tests.toml").write_text("[[request]]\nstatus = 404\n")
    (made / "component.toml").write_text(TOML + "\n[secrets.token]\nrequired = false\n")
    refused = run("component", "test", cwd=made)
    assert refused.returncode == 2
    suggested = refused.stdout[refused.stdout.index("name =") :]
    assert tomllib.loads(suggested)["build"] == tomllib.loads(TOML)["build"]
    (made / "component.toml").write_text(suggested)
    done = run("component", "test", cwd=made)
    assert (done.returncode, done.stdout.splitlines()[-1]) == (0, "1 of 1 passed."), done.stderr
