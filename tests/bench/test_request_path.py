"""The request bench says what it could not measure, and fails if that was the product."""

import pytest

from tests.bench import request_path, servers
from tests.bench.servers import AbsentError


class Empty:
    """A machine on which nothing can be started."""

    directory = None

    def upstream(self):
        return 1

    def __getattr__(self, name):
        def refuse(*_, **__):
            raise AbsentError(f"{name} is not here")

        return refuse


class Answers:
    """A contestant that breaks in the second round."""

    def __init__(self, wrong="", errors=()):
        self.left, self.wrong, self.errors = 1, wrong, dict(errors)

    def check(self, case, upstream):
        if self.wrong:
            raise AbsentError(self.wrong)

    def sample(self, case, upstream, seconds, scripts):
        if not self.left:
            raise ConnectionError("it ended")
        self.left -= 1
        return servers.measure.Sample(100.0, 1, 1, self.errors, 1.0, None, 0.1, 0.9, 0.0)


def lines_of(table, name):
    return [line for line in table.splitlines() if line.startswith(f"| {name} |")]


def test_each_contestant_that_is_missing_is_a_line_with_its_reason():
    bench = request_path.Bench(Empty(), rounds=1, seconds=1)
    bench.start(request_path.CASES)
    for case in request_path.CASES:
        table = bench.run(case)
        for entry in request_path.ENTRIES:
            assert len(lines_of(table, entry.name)) == (case in entry.cases)
        assert "**not measured**: serve is not here" in table
    assert "not measured" in bench.summary()
    assert len(bench.failed) == sum(
        entry.name in request_path.OURS for entry in request_path.ENTRIES for _ in entry.cases
    )


def test_a_wrong_answer_and_an_end_in_the_middle_are_not_figures():
    case = request_path.SMALL[1]
    stage = Empty()
    stage.serve = lambda *options: Answers("answered 500") if options else Answers()
    stage.product = lambda *_, **__: Answers()
    bench = request_path.Bench(stage, rounds=2, seconds=1)
    bench.start([case])
    table = bench.run(case)
    assert "answered 500" in lines_of(table, request_path.REUSED)[0]
    assert "it ended" in lines_of(table, request_path.OUR_REUSED)[0]
    assert any("it ended" in line for line in bench.failed)


def test_a_request_of_ours_that_got_no_good_answer_fails_the_bench():
    case = request_path.SMALL[1]
    stage = Empty()
    stage.serve = lambda *_: Answers(errors={"status": 1})
    stage.product = lambda *_, **__: Answers(errors={"read": 4})
    bench = request_path.Bench(stage, rounds=1, seconds=1)
    bench.start([case])
    bench.run(case)
    lost = [line for line in bench.failed if "read" in line]
    assert lost
    assert not any("status" in line or "serve" in line for line in bench.failed)


def test_a_command_that_is_missing_is_named_with_its_package():
    with pytest.raises(AbsentError, match="apt-get install the-package"):
        servers.tool("no-such-command-here", "the-package")


def test_every_contestant_is_compared_with_one_that_takes_part_in_its_cases():
    known = {entry.name: entry for entry in request_path.ENTRIES}
    assert len(known) == len(request_path.ENTRIES)
    for entry in request_path.ENTRIES:
        if entry.peer:
            assert all(case in known[entry.peer].cases for case in entry.cases)
