"""One command, here as a schedule runs it and under `wasmtime run`, compared answer by answer.

Accepted differences are `DIFFERENCES`, with their reasons in docs/component-toml.md.
"""

import subprocess

import pytest
import serve
import support
from command_cases import CASES

from agent.host.ipc import host_api
from agent.host.worker.watchdog import LINE_MAX_CHARS
from fleet.component import preview1
from fleet.protocol.manifest import Grants, Limits, Schedule
from tests.eventually import eventually
from tests.rotation import rotated

BEGIN = "say begin"
COMPONENT = preview1.adapted(support.wasm("probe1"))


NO_NAME = "a look-up of what is no name, such as `a..b`"  # test_sockets_as_in_wasmtime.py
CUT = "a line of output of more than 1,019 characters"
DIFFERENCES = {CUT: ["arguments: a long one", "directory: many names"], NO_NAME: []}
"""By row of the page's table: the cases."""


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    """Run steps under `wasmtime run`: the lines of its output, its warnings, and its end."""
    component = tmp_path_factory.mktemp("theirs") / "component"  # the name that a device gives: the first argument
    component.write_bytes(COMPONENT)

    def run(steps):
        data = tmp_path_factory.mktemp("data")
        line = [serve.command(), "run", "--dir", f"{data}::/data", "--env", "unit=kelvin", component, BEGIN, *steps]
        done = subprocess.run(line, capture_output=True, check=False, stdin=subprocess.DEVNULL)
        lines = done.stdout.decode().split("\n")
        warnings = [each for each in done.stderr.decode().splitlines() if each.startswith("w: ")]
        return shown(lines[1:] if lines[-1] else lines[1:-1], warnings, "ok" if not done.returncode else "guest-trap")

    return run


@pytest.fixture(scope="module")
def ours(tmp_path_factory):
    """Run steps once, or a few times of which the first counts, in a worker: the same."""
    with support.shared_host(tmp_path_factory.mktemp("compared")) as host:
        yield lambda name, steps: here(host, name, steps)


def here(host, name, steps):
    run = support.a_run(
        name,
        1,
        trigger=Schedule(every_ms=100, args=(BEGIN, *steps)),
        grants=Grants(interfaces=("wasi:cli", "wasi:filesystem")),
        limits=Limits(call_ms=20_000),
        config={"unit": "kelvin"},
    )
    reply = host.start(COMPONENT, run)
    assert isinstance(reply, host_api.Started), reply
    calls = eventually(lambda: host.health(name).calls, f"{name} ends")
    host.ask(host_api.Stop, instance=name)
    kept = (host.state / "logs" / f"{name}.log").read_text(encoding="utf-8")
    said = [line.partition(" ")[2] for line in kept.removesuffix("\n").split("\n")]
    first = said[1:]
    assert said[0] == "info begin"
    if "info begin" in first:
        first = first[: first.index("info begin")]
    lines = [each[5:] for each in first if each.startswith("info ")]
    return shown(lines, [each[5:] for each in first if each.startswith("warn w: ")], *calls)


def shown(lines, warnings, end):
    return [*lines, *warnings, end]


@pytest.mark.parametrize("case", rotated(CASES))
def test_a_command_says_the_same_or_an_accepted_difference(ours, theirs, case):
    there = theirs(CASES[case])
    said = ours(f"case-{list(CASES).index(case)}", CASES[case])
    if case in DIFFERENCES[CUT]:
        assert said != there, "it is listed as a difference"
        there = [line[: LINE_MAX_CHARS - len("info ")] for line in there]
    assert said == there


def documented():
    """The rows of the page's table."""
    page = (support.ROOT / "docs" / "component-toml.md").read_text(encoding="utf-8")
    table = page.partition("| here and under `wasmtime run` |")[2].partition("\n\n")[0]
    return [line.split(" | ")[0].removeprefix("| ") for line in table.splitlines()[2:]]


def test_each_difference_is_documented_with_its_reason():
    assert documented() == list(DIFFERENCES)
    assert {case for cases in DIFFERENCES.values() for case in cases} <= set(CASES)
    assert len(CASES) >= 120
