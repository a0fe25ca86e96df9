"""Gates on a component's own figures: predecessor and successor in real workers, and what probation makes of them."""

import pytest

from agent.host.ipc import host_api
from agent.update.probation import ProbationSample, Terms, Verdict, judge
from fleet.protocol.manifest import Grants, MetricGate
from tests.agent.host import support

GATES = {
    "read_errors": MetricGate(max_increase_percent=20, min_samples=20, wait_ms=60_000),
    "litres": MetricGate(max_increase_percent=10, min_samples=3),
    "size": MetricGate(max_increase_percent=50, min_samples=3),
}
TERMS = Terms(probation_s=30, min_calls=10, gates=GATES)


class Versions:
    """Versions of one instance, one after the other."""

    def __init__(self, host):
        self._host, self._port, self.number = host, support.free_port(), 0

    def next(self):
        self.number += 1
        grants = Grants(interfaces=("wasmfleet:metrics",))
        reply = self._host.start("measures", support.a_run("web", self.number, port=self._port, grants=grants))
        assert isinstance(reply, host_api.Started), reply

    def runs(self, *, reads, errors, litres=100, size=10):
        """Have the version read so often, some of that without success; return its sample."""
        calls = [*["read_errors"] * errors, *["reads"] * (reads - errors - 6)]
        for path in calls:
            self._ask("GET", path)
        for _ in range(3):
            self._ask("POST", "litres", litres)
            self._ask("PUT", "size", size)
        return ProbationSample.of(self._host.health("web"), GATES)

    def _ask(self, method, path, length=0):
        head = f"{method} /{path} HTTP/1.1\r\nhost: x\r\ncontent-length: {length}\r\n\r\n"
        assert support.http(self._port, head.encode() + b"x" * length)[0] == 200


@pytest.fixture
def versions(host):
    found = Versions(host)
    found.next()
    return found


@pytest.mark.parametrize(
    ("runs", "verdict", "said"),
    [
        ({"reads": 20, "errors": 4}, Verdict.COMMIT, ""),
        ({"reads": 20, "errors": 7}, Verdict.ROLL_BACK, "read_errors is 0.35 where the replaced version had 0.2"),
        (
            {"reads": 20, "errors": 4, "litres": 111},
            Verdict.ROLL_BACK,
            "litres is 111 where the replaced version had 100",
        ),
        ({"reads": 20, "errors": 4, "size": 16}, Verdict.ROLL_BACK, "size is 16 where the replaced version had 10"),
        ({"reads": 15, "errors": 9}, Verdict.CONTINUE, ""),
    ],
)
def test_a_successor_is_compared_with_its_predecessor(versions, runs, verdict, said):
    before = versions.runs(reads=30, errors=6)
    assert judge(TERMS, before, None, 30).verdict is Verdict.COMMIT
    versions.next()
    sample = versions.runs(**runs)
    judgement = judge(TERMS, sample, before, 30)
    assert judgement.verdict is verdict
    assert said in judgement.message
    if verdict is Verdict.CONTINUE:
        late = judge(TERMS, sample, before, 90)
        assert (late.verdict, late.undecided) == (Verdict.COMMIT, "read_errors: 15 of 20 calls")
