"""Log of an instance on the disk: over restarts of everything, within its bound, and without secrets."""

import os
import re

import support

from agent.host.ipc import host_api
from agent.host.supervisor import instance_log
from agent.host.supervisor.instance_log import LogFiles
from fleet.protocol import bounds
from tests.eventually import eventually

LINE = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ \S.*")


def kept(host, instance="web"):
    return (host.state / "logs" / f"{instance}.log").read_text().splitlines()


def test_what_went_wrong_is_on_the_disk_after_a_kill_of_the_host(tmp_path):
    host = support.Host(tmp_path)
    try:
        host.start("trap", support.a_run("web", 1))
        assert support.http(host.port, "GET /web/ HTTP/1.1\r\nhost: x\r\n\r\n")[0] == 500
        host.event(lambda event: isinstance(event, host_api.Trapped))
        host.process.kill()
        host.process.wait()
        before = kept(host)
        assert any("host: wasm trap" in line for line in before)
        assert all(LINE.fullmatch(line) for line in before)
    finally:
        host.close()
    host = support.Host(tmp_path)
    try:
        host.start("trap", support.a_run("web", 1))
        support.http(host.port, "GET /web/ HTTP/1.1\r\nhost: x\r\n\r\n")
        host.ask(host_api.Stop, instance="web")
        for name in ("web", "../logs/web", "../web"):
            lines = host.ask(host_api.Logs, instance=name, excerpt=True).lines
            assert lines[: len(before)] == tuple(before), "from before the kill, of an instance that has stopped"
        host.start("trap", support.a_run("web", 2))
        support.http(host.port, "GET /web/ HTTP/1.1\r\nhost: x\r\n\r\n")
        after = eventually(lambda: len(kept(host)) > len(before) and kept(host), "it goes on")
        assert after[: len(before)] == before
    finally:
        host.close()
    # whatever a stop of the host or of an instance leaves
    assert (tmp_path / "state" / "logs" / "web.log").stat().st_mode & 0o777 == 0o600


def test_a_log_has_its_newest_lines_within_two_files(tmp_path, monkeypatch):
    monkeypatch.setattr(instance_log, "FILE_MAX_BYTES", 4096)
    files = LogFiles(tmp_path / "logs")
    log = instance_log.InstanceLog(files.open("web"))
    for number in range(500):
        log.note(f"line {number} of a component")
    log.note("host: the last")
    paths = sorted((tmp_path / "logs").iterdir())
    assert [path.name for path in paths] == ["web.log", "web.log.1"]
    assert all(path.stat().st_size <= 4096 + instance_log._PENDING_MAX_BYTES for path in paths)
    assert [path.read_text().endswith("host: the last\n") for path in paths].count(True) == 1
    again = instance_log.InstanceLog(LogFiles(tmp_path / "logs").open("web"))
    again.note("host: and on")
    assert [path.read_text().endswith("host: and on\n") for path in paths].count(True) == 1
    assert "host: the last\n" in "".join(path.read_text() for path in paths), "the older one is begun anew"
    assert files.written_bytes > 500 * 20


def test_logs_of_instances_that_are_gone_are_kept_within_a_bound(tmp_path, monkeypatch):
    monkeypatch.setattr(instance_log, "_ALL_MAX_BYTES", 1000)
    files = LogFiles(tmp_path / "logs")
    for name in ("first", "second", "third"):
        file = files.open(name)
        file.add("x" * 400, urgent=True)
    assert len(list((tmp_path / "logs").iterdir())) == 3, "they run"
    again = LogFiles(tmp_path / "logs")
    again.open("third")
    assert sum(path.stat().st_size for path in (tmp_path / "logs").iterdir()) <= 1000


def test_an_instance_that_starts_keeps_its_own_log(tmp_path, monkeypatch):
    monkeypatch.setattr(instance_log, "_ALL_MAX_BYTES", 1000)
    files = LogFiles(tmp_path / "logs")
    for name in ("oldest", "second", "third"):
        files.open(name).add("x" * 400, urgent=True)
    oldest = tmp_path / "logs" / "oldest.log"
    os.utime(oldest, (1, 1))
    LogFiles(tmp_path / "logs").open("oldest")
    assert oldest.exists()


def test_a_disk_that_cannot_be_written_costs_lines_and_nothing_else(tmp_path):
    (tmp_path / "logs").write_text("no directory")
    log = instance_log.InstanceLog(LogFiles(tmp_path / "logs").open("web"))
    log.note("host: one")
    log.flush()
    assert log.lines() == ("host: one",)


def test_a_link_in_the_place_of_a_log_is_not_followed(tmp_path):
    (tmp_path / "logs").mkdir()
    (tmp_path / "other").write_text("")
    (tmp_path / "logs" / "web.log").symlink_to(tmp_path / "other")
    LogFiles(tmp_path / "logs").open("web").add("a line", urgent=True)
    assert (tmp_path / "other").read_text() == ""


def test_an_excerpt_has_the_newest_whole_lines_of_both_files(tmp_path, monkeypatch):
    monkeypatch.setattr(instance_log, "FILE_MAX_BYTES", 30_000)
    files = LogFiles(tmp_path / "logs")
    log = instance_log.InstanceLog(files.open("web"))
    for number in range(3000):
        log.note(f"line {number} of a component")
    log.flush()
    lines = files.excerpt("web")
    numbers = [int(line.split()[2]) for line in lines]
    assert numbers == list(range(numbers[0], 3000))
    size = sum(len(line) + 1 for line in lines)
    assert size <= bounds.EXCERPT_MAX_BYTES
    assert size > 30_000 - 100, "as much as there is"
    assert files.excerpt("other") == ()
    (tmp_path / "logs" / "link.log").symlink_to("/etc/passwd")
    assert files.excerpt("link") == ()
