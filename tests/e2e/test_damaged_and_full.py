"""Device whose database is damaged while its disk is full: it stays in touch with its fleet, and catches up."""

import asyncio
import ctypes
import errno
import os
from datetime import UTC, datetime

import pytest

from tests.e2e.stage import GROUP, Stage

pytestmark = [pytest.mark.e2e, pytest.mark.nightly, pytest.mark.timeout(400)]

NAME = "berlin"


@pytest.fixture
def stage(tmp_path):
    """A fleet whose only device has a disk of its own, in memory."""
    place = tmp_path / "fleet" / "devices" / NAME
    place.mkdir(parents=True)
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mount(b"tmpfs", bytes(place), b"tmpfs", 0, b"size=64m,mode=700"):
        pytest.skip("this user may not mount")
    try:
        with Stage(tmp_path / "fleet") as made:
            yield made
    finally:
        libc.umount2(bytes(place), 2)


def fill(path):
    with path.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(1 << 16))
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
    assert os.statvfs(path).f_bfree == 0


def test_it_is_online_answers_and_catches_up_once_there_is_space(stage):
    async def story():
        here = await stage.scene.add_device(NAME, GROUP)
        await stage.pushed("v1.wasm")
        await stage.stop(here.agent)
        state = stage.state(here)
        for suffix in ("-wal", "-shm"):
            (state / f"store.db{suffix}").unlink(missing_ok=True)
        (state / "store.db").write_bytes(os.urandom(8192))
        filler = stage.scene.directory / "devices" / NAME / "fill"
        fill(filler)
        began = datetime.now(UTC)
        here = await stage.start_agent(here)

        def told():
            device = stage.scene.client.device(here.device)
            health = device.health
            said = [] if health is None or health.at < began else health.problems
            return any("its disk is too full for a new one" in each for each in said) or None

        await stage.until("the fleet is told what is wrong", told)
        await stage.answers(here, "1")
        code, output, errors = await stage.push("v2.wasm", "--detach")
        assert code == 0, output + errors

        await stage.answers(here, "1")
        assert here.agent.process.returncode is None

        filler.unlink()
        await stage.answers(here, "2")
        assert here.agent.process.returncode is None, "the same agent"
        rollout = (await stage.newest_rollout()).id

        def over():
            view = stage.scene.client.rollout(rollout)
            return view if view.ended_at is not None else None

        view = await stage.until("the rollout is over", over)
        assert view.state == "succeeded"
        assert "Traceback" not in here.agent.log.read_text()
        told_again = await asyncio.to_thread(lambda: stage.scene.client.device(here.device).health.problems)
        assert not any("too full" in each for each in told_again)

    stage.do(story())
