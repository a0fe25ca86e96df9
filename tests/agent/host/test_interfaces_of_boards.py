"""What tests/boards asks of each interface on a board, on this machine first."""

import subprocess
import sys

import pytest

from agent.host.ipc import host_api
from fleet.component import component_toml, preview1, reader
from tests.agent.host import support
from tests.boards import interfaces
from tests.eventually import eventually


@pytest.mark.nightly
def test_each_interface_answers_what_a_board_is_asked(tmp_path):
    with support.shared_host(tmp_path) as host:
        for name, guest in interfaces.guests(host.port).items():
            component = preview1.adapted(guest.data) or guest.data
            manifest = component_toml.describe(reader.read(component), guest.manifest)
            run = support.a_run(
                name, 1, trigger=manifest.trigger, grants=manifest.grants, limits=support.Limits(call_ms=20_000)
            )
            started = host.start(component, run)
            assert isinstance(started, host_api.Started), started
        asked = subprocess.Popen(
            [sys.executable, "-c", interfaces.ASKS, str(host.port)], stdout=subprocess.PIPE, text=True
        )
        took = host.ask(host_api.TakeMessages, session="", done=0, refused={}, wait_s=60)
        host.ask(host_api.TakeMessages, session=took.session, done=took.messages[-1].number, refused={}, wait_s=0)
        said, _ = asked.communicate(timeout=60)
        assert said.splitlines() == interfaces.SAID
        assert [each.data for each in took.messages] == [b"21.5"]
        (kept,) = eventually(lambda: list(host.state.rglob(interfaces.KEPT)), "the command has written")
        eventually(lambda: kept.read_bytes().startswith(b"lineline"), "it has appended")
