"""Printing: tables for people, JSON for programs, texts for times, sizes and states.

On a terminal, output has colours and fits its width; elsewhere lines are plain and never cut.
"""

import sys
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from functools import cache
from typing import Final

import click
import msgspec
from rich.cells import cell_len
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from fleet.cli.base import Options
from fleet.protocol.printable import json_text, printable

_PLAIN_WIDTH: Final = 2000

_WHOLE_CHARS: Final = 16
"""Columns with longer cells wrap on a narrow terminal; 16 leaves room for `rolled back` and `namespace/name@1.0`."""

_GAP: Final = 2
_INDENT: Final = 4

_STYLES: Final = {
    "succeeded": "green",
    "running": "green",
    "online": "green",
    "committed": "green",
    "failed": "red",
    "refused": "red",
    "halted": "red",
    "reverted": "red",
    "lost": "yellow",
    "unproven": "yellow",
    "not-affected": "dim",
    "rolled-back": "red",
    "rolling-back": "red",
    "quarantined": "red",
    "revoked": "red",
    "aborted": "yellow",
    "paused": "yellow",
    "backoff": "yellow",
    "waiting": "yellow",
    "deferred": "yellow",
    "offline": "yellow",
    "in-progress": "cyan",
    "probation": "cyan",
    "pending": "dim",
    "skipped": "dim",
    "superseded": "dim",
    "stopped": "dim",
}


@cache
def console() -> Console:
    """Return the console on standard output."""
    if sys.stdout.isatty():
        return Console(highlight=False)
    return Console(highlight=False, width=_PLAIN_WIDTH, force_terminal=False, color_system=None)


def say(options: Options, text: str = "") -> None:
    """Print a message for people; nothing with --quiet or --json."""
    if not options.quiet and not options.json:
        click.echo(text)


def show_json(value: msgspec.Struct | Sequence[object] | dict[str, object]) -> None:
    """Print a value as indented JSON."""
    click.echo(json_text(msgspec.json.format(msgspec.json.encode(value), indent=2).decode()))


def result(options: Options, value: msgspec.Struct | dict[str, object], text: str) -> None:
    """Print the result of a command: `value` as JSON for programs, `text` for people."""
    if options.json:
        show_json(value)
    else:
        say(options, text)


def table(columns: Sequence[str], rows: Iterable[Sequence[str | Text]], *, empty: str) -> None:
    """Print rows under headers, without lines; print `empty` when there are none.

    On a narrow terminal, long cells wrap between words. Short cells and the first column, which people copy, stay
    whole. Columns that do not fit beside the others go below their row.
    """
    cells = [[state(cell) if isinstance(cell, str) else cell for cell in row] for row in rows]
    if not cells:
        click.echo(empty)
        return
    if not console().is_terminal:
        grid = _grid(columns, [None] * len(columns))
        for row in cells:
            _add_row(grid, row)
        show(grid)
        return
    widths = _widths(columns, cells, console().width)
    beside, whole = columns[: len(widths)], len(widths) == len(columns)
    grid = _grid(beside, widths)
    for row in cells:
        _add_row(grid, row[: len(widths)])
        if not whole and (below := _below(columns[len(widths) :], row[len(widths) :])):
            console().print(grid)
            console().print(Padding(below, (0, 0, 0, _INDENT)))
            grid = _grid(beside, widths, header=False)
    if grid.row_count:
        console().print(grid)


def _grid(columns: Sequence[str], widths: Sequence[int | None], *, header: bool = True) -> Table:
    """Return a table with an empty column between each two; rich before 14.3 counts padding behind the last one too."""
    grid = Table(box=None, pad_edge=False, padding=0, header_style="bold", show_header=header)
    for number, (name, width) in enumerate(zip(columns, widths, strict=True)):
        if number:
            grid.add_column(width=_GAP)
        grid.add_column(name, overflow="fold", width=width, no_wrap=width is None)
    return grid


def _add_row(grid: Table, cells: Sequence[Text]) -> None:
    first, *others = cells
    grid.add_row(first, *(part for cell in others for part in ("", cell)))


def _widths(columns: Sequence[str], cells: Sequence[Sequence[Text]], room: int) -> list[int]:
    """Return the widths of the columns that fit beside each other with no word broken: all, or the first ones."""
    longest, shortest = [], []
    for number, name in enumerate(columns):
        texts = [name, *(row[number].plain for row in cells)]
        longest.append(max(map(cell_len, texts)))
        kept_whole = number == 0 or longest[-1] <= _WHOLE_CHARS
        words = (cell_len(word) for text in texts for word in text.split())
        shortest.append(longest[-1] if kept_whole else max(words, default=0))
    count = len(columns)
    while count > 1 and sum(shortest[:count]) + _GAP * (count - 1) > room:
        count -= 1
    widths = [min(width, room) for width in shortest[:count]]
    left = room - sum(widths) - _GAP * (count - 1)
    for number in sorted(range(count), key=lambda number: longest[number] - widths[number]):
        more = min(longest[number] - widths[number], left)
        widths[number] += max(more, 0)
        left -= max(more, 0)
    return widths


def _below(columns: Sequence[str], cells: Sequence[Text]) -> Text:
    """Return the cells of a row that did not fit, each with the name of its column where it has one."""
    pairs = [(name, cell) for name, cell in zip(columns, cells, strict=True) if cell.plain]
    return Text("  ").join(Text.assemble((f"{name} ", "bold") if name else "", cell) for name, cell in pairs)


def note(text: str) -> None:
    """Print one line on standard error, beside the output for programs too."""
    click.echo(printable(text), err=True)


def facts(pairs: Iterable[tuple[str, str | Text | tuple[str, ...]]]) -> None:
    """Print names and values in two columns, leaving out empty values; a tuple is a value with several lines."""
    grid = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column(overflow="fold")
    for name, value in pairs:
        match value:
            case "" | ():
                continue
            case tuple():
                grid.add_row(name, "\n".join(map(printable, value)))
            case str():
                grid.add_row(name, state(value))
            case _:
                grid.add_row(name, value)
    show(grid)


def show(grid: Table) -> None:
    """Print a table, without spaces at the ends of plain lines."""
    if console().is_terminal:
        console().print(grid)
        return
    with console().capture() as captured:
        console().print(grid)
    click.echo("\n".join(line.rstrip() for line in captured.get().rstrip("\n").split("\n")))


def state(word: str) -> Text:
    """Colour the name of a state; leave other words plain."""
    return Text(
        printable(word),
        style=_STYLES.get("rolled-back" if word.startswith("rolled back") else word.partition(" ")[0], ""),
    )


def some(names: Sequence[str], most: int) -> str:
    """Return the first names, `most` at most, and how many more there are."""
    more = len(names) - most
    return ", ".join(names[:most]) + (f" and {more} more" if more > 0 else "")


def first_line(text: str) -> str:
    """Return the first line of a text such as a trap's backtrace, for a listing."""
    return text.strip().partition("\n")[0].rstrip()


def ago(then: datetime | None, now: datetime | None = None) -> str:
    """Format the time since `then` in one unit: `12 s ago`; `never` for None."""
    if then is None:
        return "never"
    return span(((now or datetime.now(UTC)) - then).total_seconds()) + " ago"


def span(seconds: float) -> str:
    """Format a duration in one unit that people read at a glance."""
    for unit, size in (("d", 86_400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{max(seconds, 0):.0f} s"


def size(count: int) -> str:
    """Format a number of bytes: `3.4 KiB`."""
    value = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024 or unit == "GiB":  # noqa: PLR2004 - the step between the units
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    raise AssertionError("the loop ends at GiB")


def target(path: str) -> str:
    """Format a TUF target path as `namespace/name@version`; `-` for none."""
    parts = path.removesuffix(".wasm").split("/")
    if len(parts) == 4 and parts[0] == "components":  # noqa: PLR2004 - components/<namespace>/<name>/<version>
        return f"{parts[1]}/{parts[2]}@{parts[3]}"
    return path or "-"
