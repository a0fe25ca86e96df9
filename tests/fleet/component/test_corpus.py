"""What is said of every component in the packages of `deploy.corpus`, beside what was said when somebody last read it.

corpus.txt holds a row for each file: the sentence of `fleet component inspect`, and that of `fleet-host
check-component` which devices of this kind would say. `--record-golden` writes it anew: read the difference.
"""

import resource
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
from click.testing import CliRunner
from wasmtime import WasmtimeError, wat2wasm

from deploy import corpus, debian
from fleet.cli.main import main
from fleet.component import binary
from fleet.protocol.component_check import ComponentCheckReply, ComponentCheckRequest

pytestmark = [pytest.mark.nightly, pytest.mark.timeout(3600)]

TABLE = Path(__file__).with_name("corpus.txt")
NAME = "thing.wasm"
MEMORY_MAX_KIB = 1 << 20


def encoded(name, data):
    """A file as a person has it; None for text that is no component."""
    if not name.endswith(".wat"):
        return data
    try:
        data = bytes(wat2wasm(data.decode()))
    except (WasmtimeError, UnicodeDecodeError):
        return None
    return data if data.startswith(binary.COMPONENT) else None


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The files by `package:path`."""
    place, found = tmp_path_factory.mktemp("corpus"), {}
    try:
        for name, data in corpus.files():
            if (component := encoded(name, data)) is not None:
                found[name] = place / str(len(found)) / NAME
                found[name].parent.mkdir()
                found[name].write_bytes(component)
    except debian.BuildError as error:
        pytest.skip(str(error))
    return found


def inspected(path):
    result = CliRunner().invoke(main, ["component", "inspect", str(path), "--json"])
    assert result.exception is None or isinstance(result.exception, SystemExit), path
    assert result.exit_code in {0, 1, 2}, result.output
    if result.exit_code not in {0, 1}:  # 1: a problem of a component that can be read
        return f"error: {msgspec.json.decode(result.stderr)['error']['message']}"
    facts = msgspec.json.decode(result.stdout)
    said = [facts["problem"] or "it can be pushed"]
    if facts["unserved"]:
        said.append(f"not served: {', '.join(facts['unserved'])}")
    return "; ".join([*said, *facts["notes"]])


def checked(paths):
    """What the host says of each: one process, a line each."""
    lines = [msgspec.json.encode(ComponentCheckRequest(file=str(path), name=NAME)) for path in paths]
    command = [sys.executable, "-m", "agent.host.cli", "check-component"]
    done = subprocess.run(command, input=b"\n".join(lines) + b"\n", capture_output=True, check=False)
    assert b"Traceback" not in done.stderr, done.stderr.decode()
    for line in done.stdout.splitlines():
        reply = msgspec.json.decode(line, type=ComponentCheckReply)
        yield "it starts" if reply.ok else f"{reply.step}: {reply.problem}"


def test_of_every_component_of_the_toolchains_something_true_is_said(files, request):
    rows = []
    for (name, path), check in zip(files.items(), checked(files.values()), strict=True):
        words = inspected(path)
        for said in (words, check):
            assert said, name
            assert "\n" not in said, name
            assert "Error(" not in said, name
        rows.append(f"{name}\n    inspect: {words}\n    check: {check}\n")
    assert len(rows) > 250
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss < MEMORY_MAX_KIB
    if request.config.getoption("--record-golden"):
        TABLE.write_text("".join(rows), encoding="utf-8")
    assert TABLE.read_text(encoding="utf-8") == "".join(rows)


def test_every_package_has_something_in_the_table():
    recorded = {line.partition(":")[0] for line in TABLE.read_text(encoding="utf-8").splitlines() if line[0] != " "}
    assert recorded == set(corpus.CRATES | corpus.NPM | corpus.PYPI)
