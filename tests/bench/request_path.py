"""Measure requests through the product beside `wasmtime serve` and nginx, and write `docs/benchmarks.md`.

    python -m tests.bench.request_path [--quick] [--ordinary] [--only WORD] [--output FILE]

`make bench` runs it. All contestants are started first and run on one core; the client, wrk, has another. Then, round
by round, each contestant of a case is measured for a few seconds, every second round in the opposite order. Each figure
is the median of its rounds, each ratio that of the pairs (product, peer) of a round. Before it is measured, each one
must give the right answer, twenty times. Exit code 1 if an instance of the product could not be measured.
"""

import argparse
import contextlib
import datetime as dt
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from deploy import wasmtime_cli
from tests.agent.host import support
from tests.bench import measure
from tests.bench.servers import FOREVER, AbsentError, Case, Contestant, Cores, Stage, pick_cores, tool

PAGE = support.ROOT / "docs" / "benchmarks.md"
ROUNDS, SECONDS = 3, 2
KIB = 1024

HELLO = b"hello over wasi:http\n"


def is_hello(body: bytes) -> bool:
    return body in {HELLO, b"hello\n"}


SMALL = [
    Case(f"Small answer, {number} connection{'s' * (number > 1)}", "GET", "/", 0, number, is_hello)
    for number in (1, 4, 32, 256)
]
UP = Case(
    "64 KiB up, unread by the guest, 4 connections", "POST", "/sum", 64 * KIB, 4, lambda body: body in {b"\n", HELLO}
)
BOTH = Case("64 KiB up and back, 4 connections", "POST", "/echo", 64 * KIB, 4, lambda body: body == b"x" * 64 * KIB)
DOWN = Case("64 KiB down, 4 connections", "GET", "/pages/16", 0, 4, lambda body: len(body) == 64 * KIB)
STREAM = Case("1 MiB down, streamed, 4 connections", "GET", "/large/1", 0, 4, lambda body: len(body) == KIB * KIB)
ASKS = Case(
    "Outgoing request, 4 connections", "GET", "/get?127.0.0.1:{upstream}/", 0, 4, lambda body: body.endswith(HELLO)
)
CASES = [*SMALL, UP, DOWN, BOTH, STREAM, ASKS]
BODIES = [UP, DOWN, BOTH, STREAM]


@dataclass(frozen=True)
class Entry:
    """A line of the tables: how to start it, the cases it takes part in, the line that it is compared with."""

    name: str
    start: Callable[[Stage, int], Contestant]
    cases: list[Case]
    peer: str = ""


FRESH, REUSED = "`wasmtime serve`, fresh instance each", "`wasmtime serve`, instance reused"
OUR_FRESH, OUR_REUSED = "fresh, shared ingress", "reused, shared ingress"
NGINX = "nginx before `wasmtime serve`, reused"
AGAIN = ("--max-instance-reuse-count", str(FOREVER))


def probe(name: str, peer: str, cases: list[Case], *, ingress: bool, reused: bool) -> Entry:
    return Entry(
        name,
        lambda stage, upstream: stage.product("probe", ingress=ingress, reused=reused, upstream=upstream),
        cases,
        peer,
    )


def native(name: str, cases: list[Case], *, shared: bool) -> Entry:
    return Entry(name, lambda stage, _: stage.product("hello", ingress=True, shared=shared), cases, REUSED)


# A contestant stands beside its peer, so that both of a pair run within seconds.
ENTRIES = [
    Entry(FRESH, lambda stage, _: stage.serve(), CASES),
    probe(OUR_FRESH, FRESH, CASES, ingress=True, reused=False),
    probe("fresh, port of its own", FRESH, [*SMALL, *BODIES], ingress=False, reused=False),
    Entry(REUSED, lambda stage, _: stage.serve(*AGAIN), CASES),
    probe(OUR_REUSED, REUSED, CASES, ingress=True, reused=True),
    Entry(
        NGINX,
        lambda stage, _: stage.nginx_before_serve(*AGAIN),
        [*SMALL, *BODIES],
        REUSED,
    ),
    probe("reused, port of its own", REUSED, SMALL, ingress=False, reused=True),
    native("native world, shared ingress", SMALL, shared=False),
    native("native world, shared worker, shared ingress", SMALL[1:3], shared=True),
    Entry("floor: nginx answers by itself", lambda stage, _: stage.nginx_alone(), SMALL[:2]),
    Entry("floor: sockets in one Python process", lambda stage, _: stage.bare("one"), [*SMALL[:2], *BODIES]),
    Entry("floor: sockets, two Python processes", lambda stage, _: stage.bare("two"), SMALL[:2]),
    Entry("floor: engine alone, fresh", lambda stage, _: stage.engine(1), SMALL[:1]),
    Entry("floor: engine alone, reused", lambda stage, _: stage.engine(FOREVER), SMALL[:1]),
]
OURS = {entry.name for entry in ENTRIES if entry.peer and not entry.name.startswith("nginx")}


class Bench:
    """Contestants that were started, and what was measured of them."""

    def __init__(self, stage: Stage, rounds: int, seconds: int) -> None:
        self._stage, self._rounds, self._seconds = stage, rounds, seconds
        self._upstream = stage.upstream()
        self._contestants: dict[str, Contestant] = {}
        self._never: dict[str, str] = {}
        self._samples: dict[tuple[str, str], list[measure.Sample]] = {}
        self.failed: list[str] = []

    def start(self, cases: list[Case]) -> None:
        """Start every contestant of these cases; one that cannot be had is remembered with the reason."""
        for entry in ENTRIES:
            if any(case in entry.cases for case in cases):
                try:
                    self._contestants[entry.name] = entry.start(self._stage, self._upstream)
                except (AbsentError, OSError, AssertionError) as error:
                    self._never[entry.name] = str(error)

    def run(self, case: Case) -> str:
        """Measure a case; return its table."""
        entries = [entry for entry in ENTRIES if case in entry.cases]
        absent = {entry.name: self._never[entry.name] for entry in entries if entry.name in self._never}
        here = [entry.name for entry in entries if entry.name not in absent]
        for name in here:
            self._guard(absent, name, lambda who: who.check(case, self._upstream))
        samples: dict[str, list[measure.Sample]] = {name: [] for name in here}
        for number in range(self._rounds):
            for name in reversed(here) if number % 2 else here:
                if name not in absent:
                    self._guard(absent, name, lambda who, name=name: samples[name].append(self._sample(who, case)))
        measured = {name: found for name, found in samples.items() if name not in absent}
        self._samples |= {(case.title, name): found for name, found in measured.items()}
        self.failed += [f"not measured: {case.title}: {name}: {why}" for name, why in absent.items() if name in OURS]
        self.failed += [
            f"requests without a good answer: {case.title}: {name}: {sample.errors}"
            for name, found in measured.items()
            for sample in found
            if name in OURS and sample.errors
        ]
        rows = [
            measure.row(entry.name, measured[entry.name], measured.get(entry.peer))
            for entry in entries
            if entry.name in measured
        ]
        return measure.table(rows, absent)

    def summary(self) -> str:
        """Return the figures that the design has targets for, as far as their cases were measured."""
        one, four = SMALL[0].title, SMALL[1].title
        lines = [
            self._ratio(
                "reused, shared ingress, 4 connections: rate against `wasmtime serve`", four, OUR_REUSED, REUSED, "0.6"
            ),
            self._ratio("fresh, the same", four, OUR_FRESH, FRESH, "0.35"),
            self._ratio(
                "reused, shared ingress, 4 connections: rate against nginx before `wasmtime serve`",
                four,
                OUR_REUSED,
                NGINX,
                "-",
            ),
            self._front("router's processor time for a request against nginx's, 4 connections", four, "at most 2"),
            self._p50("reused, shared ingress, 1 connection: p50", one, OUR_REUSED, "160 us"),
            self._p50("fresh, the same", one, OUR_FRESH, "450 us"),
        ]
        head = "## Summary\n\n| | measured | target |\n|---|---:|---:|\n"
        return head + "".join(f"| {what} | {found} | {target} |\n" for what, found, target in lines) + "\n"

    def _ratio(self, what: str, title: str, ours: str, theirs: str, target: str) -> tuple[str, str, str]:
        samples = self._samples.get((title, ours)), self._samples.get((title, theirs))
        found = measure.row(ours, *samples).ratio if samples[0] and samples[1] else None
        return what, "not measured" if found is None else f"**{found:.2f}**", target

    def _front(self, what: str, title: str, target: str) -> tuple[str, str, str]:
        ours, theirs = self._samples.get((title, OUR_REUSED)), self._samples.get((title, NGINX))
        found = measure.front_ratio(ours, theirs) if ours and theirs else None
        return what, "not measured" if found is None else f"**{found:.1f}**", target

    def _p50(self, what: str, title: str, name: str, target: str) -> tuple[str, str, str]:
        found = self._samples.get((title, name))
        return what, f"{measure.row(name, found, None).p50_us:.0f} us" if found else "not measured", target

    def _guard(self, absent: dict[str, str], name: str, act: Callable[[Contestant], None]) -> None:
        try:
            act(self._contestants[name])
        except (AbsentError, measure.WrkError, OSError, AssertionError) as error:
            absent[name] = str(error) or repr(error)

    def _sample(self, who: Contestant, case: Case) -> measure.Sample:
        return who.sample(case, self._upstream, self._seconds, self._stage.directory)


def first_line(*command: str | Path) -> str:
    done = subprocess.run(command, check=False, capture_output=True, text=True, cwd=support.ROOT)
    return (done.stdout or done.stderr).strip().partition("\n")[0]


def versions() -> str:
    """Name the contestants' versions; one that is missing is named in each table instead."""
    found = [f"wasmfleet {first_line('git', 'describe', '--always', '--dirty') or 'of unknown revision'}"]
    if (serve := wasmtime_cli.finished()) is not None:
        found.append(f"{wasmtime_cli.version(serve)} (official binary)")
    for name, package, option in (("nginx", "nginx", "-v"), ("wrk", "wrk", "-v")):
        try:
            found.append(" ".join(first_line(tool(name, package), option).split()[:3]).partition(" [")[0])
        except AbsentError as error:
            found.append(str(error))
    return "; ".join(found)


def machine() -> str:
    known = dict(
        line.partition(":")[::2]
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        if ":" in line
    )
    values = {name.strip(): value.strip() for name, value in known.items()}
    model = values.get("model name") or values.get("Model") or platform.machine()
    virtual = ", a virtual machine" if "hypervisor" in values.get("flags", "").split() else ""
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    return (
        f"{model} ({platform.machine()}), {os.cpu_count()} cores{virtual}, {memory:.0f} GiB; "
        f"Linux {platform.release()}, Python {platform.python_version()}"
    )


def preface(stage: Stage, cores: Cores, options: argparse.Namespace, load: float) -> str:
    priority = (
        "real-time priority (`chrt --rr 10`)" if cores.priority else "**ordinary priority**: real-time was refused"
    )
    rounds, seconds = (1, 1) if options.quick else (ROUNDS, SECONDS)
    layers = stage.welcome.containment if stage.welcome else {}
    held = ", ".join(name for name, holds in layers.items() if holds) or "none"
    pairs = "**one pair only (`QUICK=1`): a trial, not a result**" if options.quick else f"{rounds} pairs"
    return f"""# Benchmarks

<!-- Made by `make bench`; do not edit. -->

Requests through a device's host, beside `wasmtime serve` with the same file (`components/adapter/probe.wasm`) and nginx
as proxy, in one run. `make bench` writes this page.

| | |
|---|---|
| date | {dt.datetime.now(dt.UTC):%Y-%m-%d %H:%M} UTC |
| machine | {machine()} |
| versions | {versions()}; the host's engine: wasmtime {stage.welcome.engine if stage.welcome else "none"} |
| processes | each server with all its processes on one core, the client (wrk, one thread) on another, {priority} |
| host | as {stage.welcome.runs_as if stage.welcome else "nothing"}; isolation: {held} |
| samples | {seconds} s each, {pairs} |
| load average of the machine before the run | {load:.1f} |

- **requests/s**: median of the rounds; answers other than 200 do not count.
- **of its peer**: median of the ratios of pairs, each pair out of one round. Fresh instances are compared with fresh
  ones of `wasmtime serve`, everything else with its reused ones.
- **processor us**: time of all the server's processes for one answer; **of it in front**: the router's or nginx's part.
- **of its core**: how much of the core the server used. With more than one connection the rest is waiting.
- **floor**: sockets without HTTP, the same over two processes, nginx without a peer, or the engine called in a loop
  without sockets, by a process of its own for each sample.
- A remark names errors, a client that was the limit, and work of other processes on the server's core: at real-time
  priority they get only what the server leaves, and the kernel's twentieth.

"""


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measure requests beside wasmtime serve and nginx.")
    parser.add_argument("--quick", action="store_true", help="one pair of one second each, to try it out")
    parser.add_argument("--ordinary", action="store_true", help="leave the priority of processes as it is")
    parser.add_argument(
        "--only", default="", metavar="WORD", help="only cases whose title has this word; writes no page"
    )
    parser.add_argument(
        "--output", type=Path, default=PAGE, metavar="FILE", help="the page (default: docs/benchmarks.md)"
    )
    return parser.parse_args()


def main() -> int:
    chosen = options()
    cases = [case for case in CASES if chosen.only.lower() in case.title.lower()]
    began = time.monotonic()
    try:
        cores = pick_cores(realtime=not chosen.ordinary)
    except AbsentError as error:
        print(f"no benchmark: {error}", file=sys.stderr)
        return 1
    if cores.priority:
        # Counters must be read as soon as wrk ends, also on a busy machine; children start at their own priority.
        os.sched_setaffinity(0, {cores.client})
        with contextlib.suppress(PermissionError):  # the user's limit may be the others' priority
            os.sched_setscheduler(0, os.SCHED_RR | os.SCHED_RESET_ON_FORK, os.sched_param(20))
    with tempfile.TemporaryDirectory(prefix="wasmfleet-bench-") as directory:
        Path(directory).chmod(0o755)  # workers are other users
        stage = Stage(cores, Path(directory))
        try:
            load = os.getloadavg()[0]
            bench = Bench(stage, *((1, 1) if chosen.quick else (ROUNDS, SECONDS)))
            bench.start(cases)
            parts = []
            for case in cases:
                parts.append(f"## {case.title}\n\n{bench.run(case)}\n")
                print(parts[-1], flush=True)
            print(bench.summary(), flush=True)
            page = [preface(stage, cores, chosen, load), bench.summary(), *parts]
        finally:
            stage.close()
    if not chosen.only:
        chosen.output.write_text("".join(page).rstrip("\n") + "\n", encoding="utf-8")
    for line in bench.failed:
        print(line, file=sys.stderr)
    print(f"{time.monotonic() - began:.0f} s", file=sys.stderr)
    return 1 if bench.failed else 0


if __name__ == "__main__":
    sys.exit(main())
