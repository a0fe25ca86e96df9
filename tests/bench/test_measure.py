"""The request bench's arithmetic: what wrk prints, medians of pairs, tables that name what is missing."""

import pytest

from tests.bench import measure
from tests.bench.measure import Load, Sample, WrkError

OUTPUT = f"""Running 2s test @ http://127.0.0.1:1/
  1 threads and 4 connections
Requests/sec:   9999.00
{measure.MARK} 20000 2000000 0 3 0 100 1 250 900
"""


def a_sample(rate=1000.0, **other):
    fields = {"p50_us": 100, "p99_us": 200, "errors": {}, "server_us": 50.0, "front_us": None}
    return Sample(rate=rate, **{**fields, "client": 0.5, "server": 0.9, "others": 0.0, **other})


def test_the_figures_of_wrk_are_read_with_its_errors():
    assert measure.parse(OUTPUT) == Load(20_000, 2_000_000, {"read": 3, "status": 100, "timeout": 1}, 250, 900)


def test_an_output_without_figures_is_an_error_with_its_end():
    with pytest.raises(WrkError, match="unable to connect"):
        measure.parse("unable to connect to 127.0.0.1:1 Connection refused\n")


def test_answers_of_another_status_are_no_requests():
    found = measure.sample(
        measure.parse(OUTPUT),
        server_ns=1_990_000_000,
        front_ns=199_000_000,
        client_s=0.5,
        busy_ns=2_100_000_000,
        elapsed_ns=2_200_000_000,
    )
    assert found.rate == pytest.approx(9950)
    assert found.server_us == pytest.approx(100)
    assert found.front_us == pytest.approx(10)
    assert found.client == pytest.approx(0.25)
    assert found.server == pytest.approx(0.995)
    assert found.others == pytest.approx(0.11 / 2.2)


def test_a_server_that_answered_nothing_has_a_rate_of_nothing():
    load = Load(0, 2_000_000, {"timeout": 4}, 0, 0)
    found = measure.sample(load, server_ns=0, front_ns=None, client_s=0, busy_ns=0, elapsed_ns=1)
    assert found.rate == 0
    assert measure.ratios([a_sample()], [found]) == []


def test_a_ratio_is_the_median_of_the_pairs_and_not_of_the_sides():
    # The second round was disturbed, on both sides.
    ours = [a_sample(rate) for rate in (500, 100, 600)]
    theirs = [a_sample(rate) for rate in (1000, 200, 900)]
    line = measure.row("ours", ours, theirs)
    assert (line.rate, line.ratio) == (500, 0.5)
    assert (line.low, line.high) == (pytest.approx(0.5), pytest.approx(2 / 3))


def test_pairs_of_rounds_must_be_whole():
    with pytest.raises(ValueError, match="argument 2"):
        measure.ratios([a_sample(), a_sample()], [a_sample()])


def test_processor_time_in_front_is_compared_in_pairs():
    ours, theirs = (
        [a_sample(front_us=60.0), a_sample(front_us=90.0)],
        [a_sample(front_us=20.0), a_sample(front_us=30.0)],
    )
    assert measure.front_ratio(ours, theirs) == pytest.approx(3)
    assert measure.front_ratio(ours, [a_sample(), a_sample()]) is None


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"errors": {"status": 2, "read": 1}}, "errors: 3 read, 6 status"),
        ({"client": 0.95}, "client's core full"),
        ({"others": 0.2}, "other processes used 20% of the core"),
        ({}, ""),
    ],
)
def test_what_a_reader_must_know_stands_beside_the_figures(fields, said):
    line = measure.row("it", [a_sample(**fields)] * 3, None)
    assert said in "; ".join(line.remarks)
    assert bool(line.remarks) == bool(said)


def test_a_contestant_that_did_not_run_has_its_line_and_the_reason():
    ours, peer = [a_sample(1234.0, front_us=20.0)] * 2, [a_sample(2468.0)] * 2
    rows = [measure.row("ours", ours, peer), measure.row("peer", peer, None)]
    text = measure.table(rows, {"nginx": "there is no `nginx` on this machine"})
    lines = text.splitlines()
    assert lines[2] == "| ours | 1,234 | **0.50** | 100 | 200 | 50 | 20 | 90% |  |"
    assert lines[3] == "| peer | 2,468 |  | 100 | 200 | 50 |  | 90% |  |"
    assert lines[4] == "| nginx | - | - | - | - | - | - | - | **not measured**: there is no `nginx` on this machine |"
    assert len({line.count("|") for line in lines}) == 1


def test_the_range_of_ratios_is_shown_where_there_is_one():
    line = measure.row("ours", [a_sample(100.0), a_sample(300.0)], [a_sample(200.0), a_sample(300.0)])
    assert "**0.75** (0.50-1.00)" in measure.table([line], {})


def test_the_script_sends_a_body_only_where_the_case_has_one():
    assert "wrk.body" not in measure.script("GET", 0)
    assert 'wrk.method = "POST"\nwrk.body = string.rep("x", 65536)\n' in measure.script("POST", 65_536)
