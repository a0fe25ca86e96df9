"""Updater: state after failures, and shared state of concurrent commands."""

import threading
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from fleet.protocol.codes import RejectCode
from signing.errors import FetchNotFound, Rejected
from signing.state import VerifierState
from signing.updater import DirectoryCache, FileState, MemoryState, Updater
from tests.signing.verdicts import code_of
from tests.simulator.repository import Repository


def updater(
    repo: Repository, states: FileState | MemoryState, fetch: Callable[[str, int], bytes] | None = None
) -> Updater:
    return Updater(pinned_root=repo.pinned, fetch=fetch or repo.fetch, states=states)


def test_a_damaged_state_file_is_not_an_empty_state(tmp_path: Path) -> None:
    states = FileState(tmp_path / "trust" / "facts.json", lock=tmp_path / "trust" / ".lock")
    assert states.load() == VerifierState()
    repo = Repository()
    updater(repo, states).refresh(repo.now)
    assert states.load().roles["timestamp"].version == 1
    (tmp_path / "trust" / "facts.json").write_bytes(b"{")
    with pytest.raises(msgspec.DecodeError):
        updater(repo, states).refresh(repo.now)


def test_an_unchanged_state_is_not_written_again(tmp_path: Path) -> None:
    repo, path = Repository(), tmp_path / "facts.json"
    states = FileState(path, lock=tmp_path / ".lock")
    keeper = updater(repo, states)
    keeper.refresh(repo.now)
    first = path.stat().st_ino
    keeper.refresh(repo.now)
    keeper.find("components/main/none/1.0.0.wasm")
    keeper.find("components/main/none/1.0.0.wasm")
    second = path.stat().st_ino
    keeper.find("components/main/none/1.0.0.wasm")
    assert second != first, "the namespace's role was remembered"
    assert path.stat().st_ino == second


def test_concurrent_commands_do_not_overwrite_each_others_state(tmp_path: Path) -> None:
    """The first has read the state and waits for the network; the second would write a newer state meanwhile."""
    repo = Repository()
    place, lock = tmp_path / "facts.json", tmp_path / ".lock"
    asked, answer = threading.Event(), threading.Event()
    old = dict(repo.files)

    def slow(name: str, _max_bytes: int) -> bytes:
        asked.set()
        assert answer.wait(60)
        if name not in old:
            raise FetchNotFound(name)
        return old[name]

    commands = [
        threading.Thread(target=updater(repo, FileState(place, lock=lock), fetch).refresh, args=(repo.now,))
        for fetch in (slow, repo.fetch)
    ]
    commands[0].start()
    assert asked.wait(60)
    repo.publish()
    commands[1].start()
    answer.set()
    for command in commands:
        command.join()
    assert FileState(place, lock=lock).load().roles["timestamp"].version == 2


def test_queries_use_the_last_successful_refresh() -> None:
    repo = Repository()
    repo.publish()
    states = MemoryState()
    keeper = updater(repo, states)
    with pytest.raises(Rejected) as verdict:
        keeper.find("components/main/hello/1.0.0.wasm")
    assert code_of(verdict) is RejectCode.UNREACHABLE
    keeper.refresh(repo.now)
    del repo.files["timestamp.json"]
    with pytest.raises(Rejected) as verdict:
        keeper.refresh(repo.now)
    assert code_of(verdict) is RejectCode.NOT_FOUND
    assert keeper.find("components/main/hello/1.0.0.wasm") is not None


def test_a_query_does_not_overwrite_the_state_of_a_process_with_a_newer_root() -> None:
    repo = Repository()
    repo.publish()
    states = MemoryState()
    behind, ahead = updater(repo, states), updater(repo, states)
    behind.refresh(repo.now)
    repo.rotate("timestamp")
    repo.online()
    ahead.refresh(repo.now)
    known = states.load()
    assert known.root == 2
    assert behind.find("components/main/hello/1.0.0.wasm") is not None
    assert states.load() == known


def test_verified_files_and_root_are_cached(tmp_path: Path) -> None:
    repo = Repository()
    repo.rotate("root")
    lost = repo.files.pop("timestamp.json")
    keeper = Updater(pinned_root=repo.pinned, fetch=repo.fetch, states=MemoryState(), cache=DirectoryCache(tmp_path))
    with pytest.raises(Rejected):
        keeper.refresh(repo.now)
    root = repo.files["2.root.json"]
    assert {path.name: path.read_bytes() for path in tmp_path.rglob("*.json")} == {
        "root.json": root,
        "2.root.json": root,
    }
    repo.files["timestamp.json"] = lost
    keeper.refresh(repo.now)
    assert {path.name for path in tmp_path.glob("*.json")} == {
        "root.json",
        "timestamp.json",
        "snapshot.json",
        "targets.json",
    }
