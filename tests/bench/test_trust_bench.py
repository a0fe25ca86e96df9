"""What trust costs a board, counted: run with `make bench`."""

import resource
import time

import pytest

from tests.simulator.repository import Board, Repository

SIZES = (10, 1_000, 5_000)


@pytest.mark.bench
@pytest.mark.parametrize("targets", SIZES)
def test_refresh_and_assignment_by_number_of_targets(targets: int) -> None:
    repo = Repository()
    item = repo.publish("1.0.0", name="hello")

    def fill(role: object) -> None:
        known = role.targets[item.target]  # type: ignore[attr-defined]
        for number in range(targets - 1):
            role.targets[f"components/main/filler-{number}/1.0.0.wasm"] = known  # type: ignore[attr-defined]

    repo.rewrite("main", fill)
    repo.online()
    board = Board(repo)
    envelope = repo.assign(item)

    started = time.perf_counter()
    board.run(envelope)
    first = time.perf_counter()
    repo.fetched.clear()
    board.run(envelope)
    again = time.perf_counter()

    size = len(repo.files[f"{repo.signed('main').version}.main.json"])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    print(
        f"\n{targets:>7} targets: {size / 1024:8.0f} KiB of metadata, first {1000 * (first - started):7.1f} ms, "
        f"nothing new {1000 * (again - first):7.1f} ms and {len(repo.fetched)} files, peak {peak} MiB"
    )
    assert len(repo.fetched) == 2
