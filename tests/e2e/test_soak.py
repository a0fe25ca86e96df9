"""Soak: a device of real processes through pushes, undos, power cuts, kills and faults of network and disk.

Five minutes, or SOAK=3600; the seed is printed, and SEED=N repeats it. Three promises hold all the time: no state is
without an exit; what runs is down only while it is itself killed and started again; each outcome is reported once.
Where there is a C compiler, the device's processes have a clock of their own (`clock_shim.c`): hours and years off.
"""

import asyncio
import contextlib
import ctypes
import dataclasses
import errno
import json
import os
import shutil
import signal
import struct
import subprocess
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from fleet.demo.environment import AGENT, module
from fleet.demo.load import Load
from fleet.protocol.codes import Phase, RolloutState
from tests import soak
from tests.e2e.relay import Relay
from tests.e2e.stage import GROUP, HELLO, Stage, alive, descendants
from tests.eventually import eventually_async
from tests.soak import SECONDS, SEED, Fault, Round

pytestmark = [pytest.mark.e2e, pytest.mark.nightly, pytest.mark.timeout(SECONDS + 900)]

NAME = "berlin"
DISK_BYTES = 96 << 20
REST_S = 30.0
OVER = frozenset(RolloutState) - {RolloutState.SCHEDULED, RolloutState.RUNNING, RolloutState.PAUSED}
ENDS = (Phase.COMMITTED, Phase.ROLLED_BACK)


@dataclass
class Found:
    """What the soak has seen.

    Attributes:
        wrong: broken promises, each with the round.
    """

    rounds: int = 0
    faults: Counter[str] = field(default_factory=Counter)
    states: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)


class Soak:
    """One device on a stage, behind relays, on a disk of its own where that can be had."""

    def __init__(self, stage: Stage, directory: Path):
        self.stage, self.found = stage, Found()
        self.place = directory / "devices" / NAME
        self.place.mkdir(parents=True)
        self.has_disk = mounted(self.place)
        self.clock = ShiftedClock.made(directory)
        self.relays: list[Relay] = []
        self.watch = None
        self.lost = 0
        self.wanted = "1"
        self.begun: list[str] = []

    @property
    def device(self):
        return next(each for each in self.stage.scene.devices if each.name == NAME)

    async def begin(self):
        """Bring the device to where it runs v1, behind its relays."""
        await self.stage.scene.add_device(NAME, GROUP)
        await self.stage.stop(self.device.agent)
        identity = self.place / "agent" / "identity" / "enrolled.json"
        who = json.loads(identity.read_bytes())
        who["devices_url"] = await self._relayed(who["devices_url"])
        who["mqtt"] = [await self._relayed(each) for each in who["mqtt"]]
        identity.write_text(json.dumps(who))
        await self.stage.stop(self.device.host)
        if self.clock is not None:
            here = self.device
            shifted = {
                name: dataclasses.replace(child, command=(*self.clock.prefix, *child.command))
                for name, child in (("agent", here.agent), ("host", here.host))
            }
            index = self.stage.scene.devices.index(here)
            self.stage.scene.devices[index] = dataclasses.replace(here, **shifted)
        await self.stage.start_host(self.device)
        await self.stage.start_agent(self.device)
        await self.stage.pushed("v1.wasm")
        await self.stage.pushed("v2.wasm")
        self.wanted = "2"

    async def _relayed(self, url):
        parts = urlsplit(url)
        relay = Relay(parts.port)
        await relay.open()
        self.relays.append(relay)
        return url.replace(f":{parts.port}", f":{relay.port}")

    # -- a round ----------------------------------------------------------------------------------------------------

    async def play(self, this: Round):
        self.found.rounds += 1
        await self.change(this.change)
        undo, retry = this.change == soak.PUSH_AND_UNDO, this.change == soak.RETRY
        for fault in this.faults:
            await asyncio.sleep(fault.after_s)  # the moment is the point
            self.found.faults[fault.kind] += 1
            if fault.kind in soak.DOWN:
                self.was_up(this)
            await self.broken(fault)
            if fault.kind in soak.DOWN:
                await self.is_up_again(fault)
            if undo:
                await self.change(soak.UNDO)
                undo = False
        if undo:
            await self.change(soak.UNDO)
        if retry:
            await self.retried()
        await self.settled(this)
        self.was_up(this)

    def was_up(self, this):
        """Note each request that was lost since what answers was last killed and started again."""
        now = self.watch.count()
        if now.lost > self.lost:
            self.found.wrong.append(f"{this}: down, though nothing was killed: {now.losses[-3:]}")
        self.lost = now.lost

    async def is_up_again(self, fault):
        """Wait until what was killed answers; a host to which everything was restored answers from then on."""
        if fault.kind == soak.CUT or (fault.kind == soak.HOST and fault.choice % 2):
            await self.watch.sent(1)  # the one under way
        else:
            answered = self.watch.count().answered
            async with asyncio.timeout(120):
                while self.watch.count().answered == answered:
                    await self.watch.sent(1)
        self.lost = self.watch.count().lost

    async def change(self, what):
        if what == soak.NOTHING:
            return
        if what == soak.UNDO:
            code, *_ = await self.stage.fleet("undo", "--group", GROUP, "--detach")
        else:
            code, *_ = await self.stage.push("v1.wasm" if self.wanted == "2" else "v2.wasm", "--detach")
        if code:  # nothing to take back, as after an undo: said so, and everything stays
            self.found.states[f"{what} refused"] += 1
            return
        self.begun.append((await self.stage.newest_rollout()).id)

    async def retried(self):
        """Have the device try again: refused where nothing has failed, and everything stays."""
        code, *_ = await self.stage.fleet("retry", self.device.device, HELLO)
        self.found.states["retry refused" if code else "retried"] += 1

    async def broken(self, fault: Fault):
        breaks = {
            soak.CUT: self.cut,
            soak.AGENT: self.agent_killed,
            soak.AGENT_STOPPED: self.agent_stopped,
            soak.HOST: self.host_killed,
            soak.HELPER: self.helper_killed,
            soak.SILENT: self.silent,
            soak.REFUSED: self.refused,
            soak.SERVER: self.server_killed,
            soak.FULL: self.full,
            soak.FORWARD: self.jumped,
            soak.BACK: self.jumped,
        }
        await breaks[fault.kind](fault)

    async def cut(self, _fault):
        """Kill every process at once, and start the device as a boot does."""
        everything = [self.device.agent.process.pid, self.device.host.process.pid]
        kill(each for pid in everything for each in (pid, *descendants(pid)))
        await self.device.host.process.wait()
        await self.device.agent.process.wait()
        await self.stage.start_host(self.device)
        await self.stage.start_agent(self.device)

    async def agent_killed(self, _fault):
        await self.stage.kill(self.device.agent)
        await self.stage.start_agent(self.device)

    async def agent_stopped(self, _fault):
        await self.stage.stop(self.device.agent)
        await self.stage.start_agent(self.device)

    async def host_killed(self, fault):
        """Kill the host; what ran is given to the next one by `restore`, as its unit does, or by the agent."""
        await self.stage.kill(self.device.host)
        await self.stage.start_host(self.device, restore=bool(fault.choice % 2))

    async def helper_killed(self, fault):
        there = descendants(self.device.host.process.pid)
        if there:
            pid = there[fault.choice % len(there)]
            kill([pid])
            await eventually_async(lambda: not alive(pid) or None, "the process is gone")

    async def silent(self, fault):
        for relay in self.relays:
            relay.hold()
        await self.mended(fault)

    async def refused(self, fault):
        for relay in self.relays:
            await relay.refuse()
        await self.mended(fault)

    async def server_killed(self, _fault):
        await self.stage.restart_server()

    async def full(self, fault):
        fill(self.place / "fill")
        await asyncio.sleep(fault.lasts_s)
        (self.place / "fill").unlink()

    async def jumped(self, fault):
        """Set the device's clock, and right again."""
        self.clock.set(fault.jump_s)
        await asyncio.sleep(fault.lasts_s)
        self.clock.set(0)

    async def mended(self, fault):
        await asyncio.sleep(fault.lasts_s)
        for relay in self.relays:
            await relay.mend()

    # -- the promises -----------------------------------------------------------------------------------------------

    async def settled(self, this: Round):
        """Wait until everything that began is over, and the device does what its newest assignment says."""
        for rollout in self.begun:
            view = await self.waited(f"{this}: rollout is over", lambda r=rollout: self.over(r))
            self.found.states[view.state] += 1
            await self.reported_once(this, view)
        self.begun.clear()
        where = await self.waited(f"{this}: the device is at rest", self.at_rest)
        self.wanted = where
        async with asyncio.timeout(120):
            await self.stage.answers(self.device, where)

    async def waited(self, what, question):
        def asked():
            with contextlib.suppress(Exception):  # the server may be starting
                return question()

        try:
            return await eventually_async(lambda: asyncio.to_thread(asked), what, within_s=300)
        except Exception as error:
            raise AssertionError(f"{what}: never; SEED={SEED}\n{await self.status()}") from error

    def over(self, rollout):
        view = self.stage.scene.client.rollout(rollout)
        return view if view.state in OVER else None

    def at_rest(self):
        """Version that the device runs, once it is at rest and what it was told last is what it runs."""
        newest = next(each for each in self.stage.scene.client.rollouts(limit=1).rollouts)
        device = next(each for each in self.stage.scene.client.devices().devices if each.name == NAME)
        told = json.loads(self.command("status", "--json"))
        here = next((each for each in told["running"] if each["instance"] == HELLO), None)
        if newest.state not in OVER or not device.online or told["changing"] or told["unsent_reports"] or here is None:
            return None
        return "1" if "/1." in here["target"] else "2"

    def command(self, *words):
        line = self.device.agent.command
        places = line[line.index("--state") :]
        done = subprocess.run(module(AGENT, words[0], *places, *words[1:]), capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    async def status(self):
        return await asyncio.to_thread(lambda: self.command("status") + self.command("why"))

    async def reported_once(self, this, view):
        entries = (await self.stage.scene.ask(lambda c: c.timeline(self.device.device, limit=200))).entries
        ends = [e for e in entries if e.kind == "report" and e.rollout == view.id and e.phase in ENDS]
        # one without durations only says again how the instance stands, as a server that was started again asks
        kinds = Counter((each.phase, each.code) for each in ends if each.timings_ms)
        if any(count > 1 for count in kinds.values()) or (view.state is RolloutState.SUCCEEDED and not ends):
            said = [(each.at.isoformat(), each.phase, each.assignment, each.timings_ms) for each in ends]
            self.found.wrong.append(f"{this}: {view.state}, reported {dict(kinds)}: {said}")

    # -- figures ----------------------------------------------------------------------------------------------------

    async def figures(self):
        """Measure what the device costs at rest: wake-ups a minute, bytes on the wire a minute, bytes on its disk."""
        # as shipped: reports every 15 minutes
        config = self.place / "agent.toml"
        config.write_text(config.read_text().replace("health_s = 5.0\n", ""))
        await self.agent_stopped(None)
        await self.waited("the device is at rest", self.at_rest)
        await asyncio.sleep(REST_S)  # what a start still has to do
        pids = {
            kind: [pid, *descendants(pid)]
            for kind, pid in (("agent", self.device.agent.process.pid), ("host", self.device.host.process.pid))
        }
        before = {kind: [wakeups(pid) for pid in all_] for kind, all_ in pids.items()}
        passed = sum(relay.passed for relay in self.relays)
        await asyncio.sleep(REST_S)  # a measurement takes its time
        per = 60 / REST_S
        told = []
        for kind, all_ in pids.items():
            each = [after - first for after, first in zip(map(wakeups, all_), before[kind], strict=True)]
            told.append(f"{kind}: {per * sum(each):.0f} wake-ups a minute in {len(all_)} processes")
        wire = sum(relay.passed for relay in self.relays) - passed
        told.append(f"{per * wire:.0f} bytes a minute on the wire")
        sizes = {each: size(self.place / each) for each in ("agent", "host")}
        told.append(", ".join(f"{kind}: {found >> 10} KiB on the disk" for kind, found in sizes.items()))
        return told


class ShiftedClock:
    """Clock of a device's processes alone.

    Attributes:
        prefix: of a command line.
    """

    def __init__(self, library, file):
        self._file = file
        self.set(0)
        self.prefix = ("env", f"LD_PRELOAD={library}", f"CLOCK_SHIM={file}")

    @classmethod
    def made(cls, directory):
        """Build the shim; None where there is no C compiler."""
        compiler, library = shutil.which("cc"), directory / "clock_shim.so"
        if compiler is None:
            return None
        source = Path(__file__).with_name("clock_shim.c")
        subprocess.run([compiler, "-O2", "-shared", "-fPIC", "-o", str(library), str(source)], check=True)
        return cls(library, directory / "clock")

    def set(self, away_s):
        """Set the clock so far from the true time, in place: it is mapped."""
        with self._file.open("r+b" if self._file.exists() else "wb") as file:
            file.write(struct.pack("=q", away_s * 10**9))


def wakeups(pid):
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("voluntary_ctxt_switches"):
                return int(line.split()[1])
    return 0


def size(directory):
    return sum(path.lstat().st_blocks * 512 for path in directory.rglob("*"))


def kill(pids):
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def mounted(place):
    """Give a device a disk of its own, in memory; False where this user may not mount."""
    libc = ctypes.CDLL(None, use_errno=True)
    return libc.mount(b"tmpfs", bytes(place), b"tmpfs", 0, f"size={DISK_BYTES},mode=700".encode()) == 0


def fill(path):
    with path.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(1 << 16))
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise


@pytest.fixture
def played(tmp_path):
    with Stage(tmp_path / "fleet") as stage:
        made = Soak(stage, tmp_path / "fleet")
        try:
            yield made
        finally:
            if made.has_disk:
                stage.do(stage.scene.close())
                ctypes.CDLL(None).umount2(bytes(made.place), 2)


def test_a_soak_of_real_processes(played, capsys):
    without = set() if played.has_disk else {soak.FULL}
    without |= set() if played.clock is not None else {soak.FORWARD, soak.BACK}

    async def story():
        await played.begin()
        until = time.monotonic() + SECONDS
        async with Load(
            port=played.device.port, path=f"/{HELLO}/", kept_alive=0, fresh=1, pause_s=0.05
        ) as played.watch:
            await played.watch.sent(1)
            for this in soak.rounds(SEED, without=frozenset(without)):
                if time.monotonic() > until:
                    break
                with capsys.disabled():
                    print(this, flush=True)
                await played.play(this)
        return await played.figures()

    with capsys.disabled():
        print(f"\nSOAK={SECONDS:.0f} SEED={SEED}", flush=True)
    figures = played.stage.do(story())
    found = played.found
    with capsys.disabled():
        print(f"{found.rounds} rounds; faults {dict(found.faults)}; rollouts {dict(found.states)}")
        print("\n".join(figures), flush=True)
    assert not found.wrong, f"SEED={SEED}\n" + "\n".join(found.wrong)
