"""Incoming requests to one component, here and under `wasmtime serve`, compared answer by answer.

Accepted differences are in incoming_differences.txt, under the rows of docs/wasi-http.md that give their reasons: what
is answered here, or each of the answers of which it is chance which one comes.
"""

import pytest
import support
from compared import observe
from incoming_cases import CASES
from serve import serving

from agent.host.ipc import host_api
from fleet.protocol.manifest import Limits
from tests.rotation import rotated

SCRIPT = support.wasm("script")
WHOLE = "nothing before the request is whole"
THERE_BY_CHANCE = {"a client that ends its sending", "a guest that fails within its answer"}


def read_differences():
    """The accepted answers here by row and case."""
    rows, accepted = {}, []
    for line in (support.ROOT / "tests/agent/host/incoming_differences.txt").read_text(encoding="utf-8").splitlines():
        if line.startswith("# "):
            cases = rows.setdefault(line[2:], {})
        elif line.startswith("    "):
            accepted.append(line[4:])
        elif line:
            accepted = cases.setdefault(line, [])
    return rows


DIFFERENCES = read_differences()
ROW_OF = {case: row for row, cases in DIFFERENCES.items() for case in cases}


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    component = tmp_path_factory.mktemp("theirs") / "script.wasm"
    component.write_bytes(SCRIPT)
    with serving(component, "-Scli") as port:
        yield port


@pytest.fixture(scope="module")
def ours(tmp_path_factory):
    with support.shared_host(tmp_path_factory.mktemp("compared")) as host:
        port = support.free_port()
        limits = Limits(request_bytes=2 << 20, response_bytes=2 << 20)
        reply = host.start(SCRIPT, support.a_run("script", 1, port=port, limits=limits))
        assert isinstance(reply, host_api.Started), reply
        yield port


@pytest.mark.parametrize("case", rotated(CASES))
def test_an_answer_is_the_same_or_an_accepted_difference(ours, theirs, case):
    accepted = DIFFERENCES.get(ROW_OF.get(case), {}).get(case)
    withheld = accepted is not None and WHOLE in accepted[0]
    here, there = (
        " | ".join(observe(port, CASES[case], withheld=kept)) for port, kept in ((ours, withheld), (theirs, False))
    )
    if accepted is None:
        assert here == there
        return
    assert here in accepted, f"under wasmtime serve: {there}"
    if ROW_OF[case] not in THERE_BY_CHANCE:
        assert here != there, "it is listed as a difference"


def documented():
    """The rows of the page's table."""
    page = (support.ROOT / "docs" / "wasi-http.md").read_text(encoding="utf-8")
    table = page.partition("| a client's request, or a guest's answer |")[2].partition("\n\n")[0]
    return [line.split(" | ")[0].removeprefix("| ") for line in table.splitlines()[2:]]


def test_each_difference_is_documented_with_its_reason():
    assert documented() == list(DIFFERENCES)
    assert set(ROW_OF) <= set(CASES)
