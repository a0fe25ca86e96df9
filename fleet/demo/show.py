"""How the demo is told: a transcript of real commands, and a table at the end."""

import contextlib
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

from rich.console import Console
from rich.table import Table
from rich.text import Text

from fleet.demo.load import LoadResult
from fleet.protocol.api import RolloutState

if TYPE_CHECKING:
    from fleet.demo.scene import Board
    from fleet.demo.story import Act, Story

_PLAIN_WIDTH: Final = 120
_SERVER_ERROR: Final = 500


class Teller:
    """Tells the story on a console: live where it is a terminal, plain lines elsewhere."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(highlight=False)
        if not self.console.is_terminal:
            self.console = Console(highlight=False, width=_PLAIN_WIDTH, color_system=None, file=self.console.file)

    def act(self, title: str) -> None:
        """A new act begins."""
        self.console.print()
        self.console.print(Text(title, style="bold"))

    @contextlib.contextmanager
    def waiting(self, what: str) -> Iterator[None]:
        """Show that something is going on; nothing of it stays."""
        if self.console.is_terminal:
            with self.console.status(Text(what, style="dim"), spinner="dots"):
                yield
        else:
            yield

    def did(self, command: str, result: str) -> None:
        """A command was carried out."""
        self.console.print(Text.assemble(("  $ ", "dim"), command))
        self.console.print(Text.assemble("    ", (result, "green")))

    def runs(self, arguments: Sequence[str]) -> None:
        """A `fleet` command is about to print for itself."""
        words = [Path(word).name if word.endswith(".wasm") else word for word in arguments]
        self.console.print(Text.assemble(("  $ ", "dim"), f"fleet {shlex.join(words)}"))

    def came_of(self, load: LoadResult | None) -> None:
        """What the clients saw meanwhile."""
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

    def end(self, story: "Story", boards: Sequence["Board"]) -> None:
        """The tables, and which claims held."""
        self.act("What happened")
        self._table(acts_table(story.acts))
        self.console.print()
        self._table(boards_table(story, boards))
        self.console.print()
        for claim, held in story.checks:
            mark = Text("  yes ", style="green") if held else Text("  NO  ", style="bold red")
            self.console.print(mark + Text(claim))

    def _table(self, grid: Table) -> None:
        """Plain lines carry no spaces at their ends."""
        if self.console.is_terminal:
            self.console.print(grid)
            return
        with self.console.capture() as captured:
            self.console.print(grid)
        for line in captured.get().rstrip("\n").split("\n"):
            self.console.print(Text(line.rstrip()))


def acts_table(acts: Sequence["Act"]) -> Table:
    """A row for each push: how it ended, how long it took, what its clients saw."""
    grid = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0), header_style="dim")
    for name in ("  PUSH", "RESULT"):
        grid.add_column(name)
    for name in ("FIRST BOARD", "BOTH BOARDS", "ANSWERED", "LOST"):
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


def result_of(act: "Act") -> str:
    """How a push ended, in words."""
    if act.rollout.state is not RolloutState.HALTED:
        return str(act.rollout.state)
    back = [board for board in act.rollout.boards if board.phase is not None and board.phase.value == "rolled-back"]
    if back:
        code = f" ({back[0].code})" if back[0].code is not None else ""
        return f"rolled back{code}, halted before the 2nd board"
    return "halted"


def lost_of(act: "Act") -> str:
    """The requests lost; those that the pushed version itself trapped on are named so."""
    if not act.load:
        return "-"
    total = act.total
    trapped = sum(count for status, count in total.by_status.items() if status >= _SERVER_ERROR)
    own = act.rollout.state is RolloutState.HALTED and total.lost == trapped and trapped
    return f"{total.lost:,} by its trap" if own else f"{total.lost:,}"


def boards_table(story: "Story", boards: Sequence["Board"]) -> Table:
    """A row for each board: what answers there now."""
    grid = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0), header_style="dim")
    for name in ("  BOARD", "GROUP", "RUNS NOW", "INGRESS"):
        grid.add_column(name)
    for board in boards:
        version = story.ends.get(board.device, "")
        grid.add_row(f"  {board.device}", board.group, f"hello v{version}" if version else "nothing", board.url())
    return grid


def seconds(value: float | None) -> str:
    """A duration from the start of the command, `-` for never."""
    return "-" if value is None else f"{value:.1f} s"
