"""The demo from its first process to its last: play, report, stay up if asked to, clean up."""

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
from fleet.protocol.codes import RolloutState

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
        """Begin a new act."""
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
        """Print a command that was carried out, and its result."""
        self.console.print(Text.assemble(("  $ ", "dim"), command))
        self.console.print(Text.assemble("    ", (result, "green")))

    def runs(self, arguments: Sequence[str]) -> None:
        """Print the `fleet` command that is about to print for itself."""
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

    def end(self, story: "Scenario", boards: Sequence["DemoDevice"]) -> None:
        """Print the tables, and which claims held."""
        self.act("What happened")
        self._table(acts_table(story.acts))
        self.console.print()
        self._table(devices_table(story, boards))
        self.console.print()
        for claim, held in story.checks:
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
    """Build a row for each push: how it ended, how long it took, what its clients saw."""
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
    """Describe in words how a push ended."""
    if act.rollout.state is not RolloutState.HALTED:
        return str(act.rollout.state)
    back = [board for board in act.rollout.devices if board.phase is not None and board.phase.value == "rolled-back"]
    if back:
        code = f" ({back[0].code})" if back[0].code is not None else ""
        return f"rolled back{code}, halted before the 2nd device"
    return "halted"


def lost_of(act: "Step") -> str:
    """Count the requests lost; name those on which the pushed version itself trapped."""
    if not act.load:
        return "-"
    total = act.total
    trapped = sum(count for status, count in total.by_status.items() if status >= _SERVER_ERROR)
    own = act.rollout.state is RolloutState.HALTED and total.lost == trapped and trapped
    return f"{total.lost:,} by its trap" if own else f"{total.lost:,}"


def devices_table(story: "Scenario", boards: Sequence["DemoDevice"]) -> Table:
    """Build a row for each device: what answers there now."""
    grid = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0), header_style="dim")
    for name in ("  DEVICE", "GROUP", "RUNS NOW", "INGRESS"):
        grid.add_column(name)
    for board in boards:
        version = story.ends.get(board.device, "")
        grid.add_row(f"  {board.device}", board.group, f"hello v{version}" if version else "nothing", board.url())
    return grid


def seconds(value: float | None) -> str:
    """Format a duration from the start of the command; `-` for never."""
    return "-" if value is None else f"{value:.1f} s"


def run(*, directory: Path | None, once: bool, broker: str = "auto") -> int:
    """Play the demo; returns 0 when everything held, 1 when not, 130 when interrupted before its end.

    Args:
        directory: for everything it makes, which then stays; None for a temporary one.
        once: end after the last act instead of staying up.
        broker: as in `fleet init`.
    """
    place = directory.absolute() if directory is not None else Path(tempfile.mkdtemp(prefix="wasmfleet-demo-"))
    return asyncio.run(_run(place, broker, keep=directory is not None, once=once))


async def _run(place: Path, broker: str, *, keep: bool, once: bool) -> int:
    teller = ConsoleReporter()
    teller.console.print(Text.assemble(("wasmfleet demo", "bold"), (f"  in {place}", "dim")))
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        loop.add_signal_handler(number, stop.set)
    scene = Environment(place)
    code = FAILED
    try:
        code = await _until_stopped(_whole(scene, teller, stop, broker, once=once), stop)
    finally:
        with teller.waiting("Ending every process"):
            await scene.close()
        if not keep and code != FAILED:
            shutil.rmtree(place, ignore_errors=True)
        elif code == FAILED:
            teller.console.print(f"What every process said is in {place / 'logs'}.", soft_wrap=True, markup=False)
    return code


async def _until_stopped(whole: Coroutine[Any, Any, int], stop: asyncio.Event) -> int:
    """Return the result of `whole`, or INTERRUPTED when `stop` comes first."""
    playing = asyncio.ensure_future(whole)
    stopping = asyncio.create_task(stop.wait())
    await asyncio.wait({playing, stopping}, return_when=asyncio.FIRST_COMPLETED)
    if not playing.done():
        # After the last act it ends by itself when it is told to stop.
        await asyncio.wait({playing}, timeout=0.5)
    stopping.cancel()
    if playing.done():
        return playing.result()
    playing.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await playing
    return INTERRUPTED


async def _whole(scene: Environment, teller: ConsoleReporter, stop: asyncio.Event, broker: str, *, once: bool) -> int:
    try:
        story = await play(scene, teller, broker=broker)
    except (DemoError, ChildDiedError, ClientError, NoFixtureError) as error:
        teller.console.print(Text.assemble(("error: ", "bold red"), str(error)), soft_wrap=True)
        return FAILED
    except TimeoutError:
        teller.console.print(Text.assemble(("error: ", "bold red"), "the act took too long; see the logs"))
        return FAILED
    teller.end(story, scene.devices)
    code = OK if story.held else FAILED
    if not once:
        _next_steps(scene, teller, story)
        await stop.wait()
    return code


def _next_steps(scene: Environment, teller: ConsoleReporter, story: Scenario) -> None:
    """Print what a person may try on the fleet that is still up."""
    board = scene.devices[0]
    fleet = program("fleet")
    file = shlex.quote(str(fixture("v2.wasm")))
    teller.act("The fleet stays up until Ctrl-C. Try, in another terminal:")
    for line in (
        f"export WASMFLEET_HOME={shlex.quote(str(scene.home))}",
        f"curl {board.url(INSTANCE)}",
        f"curl -d 'a body' {board.url(INSTANCE)}echo",
        f"{fleet} devices",
        f"{fleet} why {board.device}",
        f"{fleet} push {file} --group {GROUP} --dry-run",
        f"{fleet} push {file} --device {scene.devices[-1].device}",
        f"{fleet} rollouts",
    ):
        teller.console.print(f"  {line}", soft_wrap=True, markup=False)
    if not story.held:
        teller.console.print(Text("\nNot everything held: see above.", style="bold red"))
