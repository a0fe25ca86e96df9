"""Run the demo: play the scenario, report, stay up unless `once`, clean up."""

import asyncio
import contextlib
import shlex
import shutil
import signal
import tempfile
from collections.abc import Coroutine, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from rich.console import Console
from rich.table import Table
from rich.text import Text

from fleet.client import ClientError
from fleet.demo.environment import ChildDiedError, DemoError, Environment, program
from fleet.demo.load import LoadResult
from fleet.demo.scenario import GROUP, INSTANCE, NoFixtureError, Scenario, fixture, play
from fleet.protocol.codes import Phase, RolloutState
from fleet.protocol.printable import printable

if TYPE_CHECKING:
    from fleet.demo.environment import DemoDevice
    from fleet.demo.scenario import Step


_PLAIN_WIDTH: Final = 120
_SERVER_ERROR: Final = 500

OK, FAILED, INTERRUPTED = 0, 1, 130


class ConsoleReporter:
    """Report on a console: live where it is a terminal, plain lines elsewhere."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(highlight=False)
        if not self.console.is_terminal:
            self.console = Console(highlight=False, width=_PLAIN_WIDTH, color_system=None, file=self.console.file)

    def act(self, title: str) -> None:
        """Print the title of a step."""
        self.console.print()
        self.console.print(Text(title, style="bold"))

    @contextlib.contextmanager
    def waiting(self, what: str) -> Iterator[None]:
        """Show on a terminal that something is going on, and remove it afterwards."""
        if self.console.is_terminal:
            with self.console.status(Text(what, style="dim"), spinner="dots"):
                yield
        else:
            yield

    def did(self, command: str, result: str) -> None:
        """Print a command and its result."""
        self.console.print(Text.assemble(("  $ ", "dim"), command))
        self.console.print(Text.assemble("    ", (printable(result), "green")))

    def runs(self, arguments: Sequence[str]) -> None:
        """Print a `fleet` command before its own output."""
        words = [Path(word).name if word.endswith(".wasm") else word for word in arguments]
        self.console.print(Text.assemble(("  $ ", "dim"), f"fleet {shlex.join(words)}"))

    def came_of(self, load: LoadResult | None) -> None:
        """Print what the clients saw meanwhile."""
        if load is None:
            return
        style = "green" if load.lost == 0 else "yellow"
        lost = f"{load.lost:,} lost"
        if load.reasons:
            lost += f" ({', '.join(f'{count} x {reason}' for reason, count in load.reasons.most_common(3))})"
        self.console.print(
            Text.assemble(
                f"  clients: {load.sent:,} requests ({load.posts:,} POSTs) over {load.connections:,} connections, ",
                (lost, style),
            )
        )

    def end(self, scenario: "Scenario", devices: Sequence["DemoDevice"]) -> None:
        """Print the tables and which claims held."""
        self.act("What happened")
        self._table(acts_table(scenario.acts))
        self.console.print()
        self._table(devices_table(scenario, devices))
        self.console.print()
        for claim, held in scenario.checks:
            mark = Text("  yes ", style="green") if held else Text("  NO  ", style="bold red")
            self.console.print(mark + Text(claim))

    def _table(self, grid: Table) -> None:
        """Print a table, without spaces at the ends of plain lines."""
        if self.console.is_terminal:
            self.console.print(grid)
            return
        with self.console.capture() as captured:
            self.console.print(grid)
        for line in captured.get().rstrip("\n").split("\n"):
            self.console.print(Text(line.rstrip()))


def acts_table(acts: Sequence["Step"]) -> Table:
    """Build a table with result, duration and requests of each step."""
    grid = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0), header_style="dim")
    for name in ("  PUSH", "RESULT"):
        grid.add_column(name)
    for name in ("FIRST DEVICE", "BOTH DEVICES", "ANSWERED", "LOST"):
        grid.add_column(name, justify="right")
    for act in acts:
        total = act.total
        good = act.rollout.state is RolloutState.SUCCEEDED
        lost = Text(lost_of(act), style="green" if total.lost == 0 else "yellow")
        grid.add_row(
            f"  {act.name}",
            Text(result_of(act), style="green" if good else "yellow"),
            seconds(act.first_s),
            seconds(act.last_s),
            f"{total.answered:,}" if act.load else "-",
            lost,
        )
    return grid


def result_of(act: "Step") -> str:
    """Describe the result of a step in words."""
    if act.rollout.state is not RolloutState.REVERTED:
        return str(act.rollout.state)
    back = [each for each in act.rollout.devices if each.phase is Phase.ROLLED_BACK]
    if back:
        code = f" ({back[0].code})" if back[0].code is not None else ""
        return f"rolled back{code}, reverted before the 2nd device"
    return "reverted"


def lost_of(act: "Step") -> str:
    """Count the lost requests; say where the pushed version itself trapped on all of them."""
    if not act.load:
        return "-"
    total = act.total
    trapped = sum(count for status, count in total.by_status.items() if status >= _SERVER_ERROR)
    own = act.rollout.state is RolloutState.REVERTED and total.lost == trapped and trapped
    return f"{total.lost:,} by its trap" if own else f"{total.lost:,}"


def devices_table(scenario: "Scenario", devices: Sequence["DemoDevice"]) -> Table:
    """Build a table with the version that each device runs."""
    grid = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0), header_style="dim")
    for name in ("  DEVICE", "GROUP", "RUNS NOW", "INGRESS"):
        grid.add_column(name)
    for device in devices:
        version = scenario.ends.get(device.device, "")
        grid.add_row(f"  {device.device}", device.group, f"hello v{version}" if version else "nothing", device.url())
    return grid


def seconds(value: float | None) -> str:
    """Format a duration from the start of the command; `-` for never."""
    return "-" if value is None else f"{value:.1f} s"


def run(*, directory: Path | None, once: bool, broker: str = "auto") -> int:
    """Play the demo; returns 0 when everything held, 1 when not, 130 when interrupted before its end.

    Args:
        directory: for all files of the demo, kept afterwards; None for a temporary one.
        once: end after the last step instead of staying up.
        broker: as in `fleet init`.
    """
    place = directory.absolute() if directory is not None else Path(tempfile.mkdtemp(prefix="wasmfleet-demo-"))
    return asyncio.run(_run(place, broker, keep=directory is not None, once=once))


async def _run(place: Path, broker: str, *, keep: bool, once: bool) -> int:
    reporter = ConsoleReporter()
    reporter.console.print(Text.assemble(("wasmfleet demo", "bold"), (f"  in {place}", "dim")))
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        loop.add_signal_handler(number, stop.set)
    environment = Environment(place)
    code = FAILED
    try:
        code = await _until_stopped(_whole(environment, reporter, stop, broker, once=once), stop)
    finally:
        with reporter.waiting("Ending every process"):
            await environment.close()
        if not keep and code != FAILED:
            shutil.rmtree(place, ignore_errors=True)
        elif code == FAILED:
            reporter.console.print(f"What every process said is in {place / 'logs'}.", soft_wrap=True, markup=False)
    return code


async def _until_stopped(whole: Coroutine[Any, Any, int], stop: asyncio.Event) -> int:
    """Return the result of `whole`, or INTERRUPTED when `stop` comes first."""
    playing = asyncio.ensure_future(whole)
    stopping = asyncio.create_task(stop.wait())
    await asyncio.wait({playing, stopping}, return_when=asyncio.FIRST_COMPLETED)
    if not playing.done():
        # After the last step `whole` ends by itself on `stop`.
        await asyncio.wait({playing}, timeout=0.5)
    stopping.cancel()
    if playing.done():
        return playing.result()
    playing.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await playing
    return INTERRUPTED


async def _whole(
    environment: Environment, reporter: ConsoleReporter, stop: asyncio.Event, broker: str, *, once: bool
) -> int:
    try:
        scenario = await play(environment, reporter, broker=broker)
    except (DemoError, ChildDiedError, ClientError, NoFixtureError) as error:
        reporter.console.print(
            Text.assemble(("error: ", "bold red"), printable(str(error), lines=True)), soft_wrap=True
        )
        return FAILED
    except TimeoutError:
        reporter.console.print(Text.assemble(("error: ", "bold red"), "the act took too long; see the logs"))
        return FAILED
    reporter.end(scenario, environment.devices)
    code = OK if scenario.held else FAILED
    if not once:
        _next_steps(environment, reporter, scenario)
        await stop.wait()
    return code


def _next_steps(environment: Environment, reporter: ConsoleReporter, scenario: Scenario) -> None:
    """Print commands to try on the running fleet."""
    device = environment.devices[0]
    fleet = program("fleet")
    file = shlex.quote(str(fixture("v2.wasm")))
    reporter.act("The fleet stays up until Ctrl-C. Try, in another terminal:")
    for line in (
        f"export WASMFLEET_HOME={shlex.quote(str(environment.home))}",
        f"curl {device.url(INSTANCE)}",
        f"curl -d 'a body' {device.url(INSTANCE)}echo",
        f"{fleet} devices",
        f"{fleet} why {device.device}",
        f"{fleet} push {file} --group {GROUP} --dry-run",
        f"{fleet} push {file} --device {environment.devices[-1].device}",
        f"{fleet} rollouts",
    ):
        reporter.console.print(f"  {line}", soft_wrap=True, markup=False)
    if not scenario.held:
        reporter.console.print(Text("\nNot everything held: see above.", style="bold red"))
