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

from fleet.cli.base import COLUMNS, WIDE, Fault, Options
from fleet.protocol.printable import json_text, printable

_PLAIN_WIDTH: Final = 2000

_WHOLE_CHARS: Final = 16
"""Columns with longer cells wrap on a narrow terminal; 16 leaves room for `rolled back` and `namespace/name@1.0`."""

_GAP: Final = 2
_NAMED_MAX: Final = 20
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


def show_json(value: msgspec.Struct | dict[str, object]) -> None:
    """Print a command's answer as one indented JSON object, with components by the names that commands take."""
    plain = _named(msgspec.to_builtins(value, builtin_types=(datetime,)))
    click.echo(json_text(msgspec.json.format(msgspec.json.encode(plain), indent=2).decode()))


_TARGETS: Final = frozenset({"target", "targets", "running", "previous", "next", "has", "wants", "also"})
"""Fields of answers that hold a target's path, several, or one for each instance."""

_FREE: Final = frozenset({"config", "labels"})
"""Fields whose keys and values are somebody's own."""


def _named(value: object) -> object:
    """Return an answer with the names of targets in place of their paths in the repository."""
    match value:
        case dict():
            return {key: _field(key, each) for key, each in value.items()}
        case list() | tuple():
            return [_named(each) for each in value]
        case datetime():
            return value.astimezone(UTC)
        case _:
            return value


def _field(key: str, value: object) -> object:
    if key in _FREE:
        return value
    return _name(value) if key in _TARGETS else _named(value)


def _name(value: object) -> object:
    match value:
        case str():
            return target(value) if value else value
        case dict():
            return {key: _name(each) for key, each in value.items()}
        case list() | tuple():
            return [_name(each) for each in value]
        case _:
            return _named(value)


def result(options: Options, value: msgspec.Struct | dict[str, object], text: str) -> None:
    """Print the result of a command: `value` as JSON for programs, `text` for people."""
    if options.json:
        show_json(value)
    else:
        say(options, text)


def foresee(options: Options, would: str, devices: Iterable[str] = ()) -> None:
    """Print what a command would do without --dry-run, and to which devices."""
    concerned = sorted(devices)
    named = f": {some(concerned, _NAMED_MAX)}" if concerned else ""
    result(
        options, {"dry_run": True, "would": would, "devices": concerned}, f"Would {would}{named}.\nNothing was changed."
    )


def table(columns: Sequence[str], rows: Iterable[Sequence[str | Text]], *, empty: str, noun: str = "rows") -> None:
    """Print rows under headers, without lines; print `empty` when there are none.

    On a narrow terminal, long cells wrap between words. Short cells and the first column, which people copy, stay
    whole. Columns that do not fit beside the others go below their row. A table of more lines than the screen ends with
    its count. `--columns` chooses columns, and with `--wide` each row is one line (`base.table_options`).

    Args:
        columns: headers.
        rows: cells of each row.
        empty: printed for a table without rows.
        noun: what the rows are, for the count.

    Raises:
        Fault: --columns names one that the table does not have.
    """
    asked = click.get_current_context(silent=True)
    meta = {} if asked is None else asked.meta
    order = _order(columns, meta.get(COLUMNS) or "")
    cells = [[state(cell) if isinstance(cell, str) else cell for cell in map(row.__getitem__, order)] for row in rows]
    columns = [columns[number] for number in order]
    if not cells:
        click.echo(empty)
        return
    lines = _print_table(columns, cells, wide=bool(meta.get(WIDE)))
    if console().is_terminal and lines > console().height:
        console().print(f"{len(cells)} {noun}", style="dim")


def _order(columns: Sequence[str], chosen: str) -> Sequence[int]:
    """Return the numbers of the columns to print. Raises `Fault`."""
    names = [name.strip().partition(" (")[0].lower().replace(" ", "-") for name in columns]
    if not chosen:
        return range(len(columns))
    wanted = [each.strip().lower() for each in chosen.split(",")]
    for each in wanted:
        if each not in names:
            raise Fault(f"there is no column {each!r}", f"the columns are {', '.join(names)}", "write --columns a,b")
    return [names.index(each) for each in wanted]


def _print_table(columns: Sequence[str], cells: Sequence[Sequence[Text]], *, wide: bool) -> int:
    """Print rows, and return the number of lines that they take on a terminal."""
    if wide or not console().is_terminal:
        grid = _grid(columns, [None] * len(columns))
        for row in cells:
            _add_row(grid, row)
        if wide:
            console().width = _PLAIN_WIDTH
        show(grid)
        return len(cells) + 1
    return _print_folded(columns, cells)


def _print_folded(columns: Sequence[str], cells: Sequence[Sequence[Text]]) -> int:
    """Print rows within the terminal's width, and return the number of lines."""
    with console().capture() as captured:
        _fold(columns, cells)
    text = captured.get()
    console().file.write(text)
    return text.count("\n")


def _fold(columns: Sequence[str], cells: Sequence[Sequence[Text]]) -> None:
    widths = _widths(columns, cells, console().width)
    beside, whole = columns[: len(widths)], len(widths) == len(columns)
    room = console().width - _INDENT
    grid = _grid(beside, widths)
    for row in cells:
        _add_row(grid, row[: len(widths)])
        if not whole and (below := _below(columns[len(widths) :], row[len(widths) :], room)):
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


def _below(columns: Sequence[str], cells: Sequence[Text], room: int) -> Text:
    """Return the cells of a row that did not fit, each with the name of its column where it has one.

    Several stand in one line of `room` characters where they fit, and none begins in one line and ends in the next but
    for one that is longer than a line.
    """
    lines: list[Text] = []
    for name, cell in zip(columns, cells, strict=True):
        pair = Text.assemble((f"{name} ", "bold") if name else "", cell)
        if not cell.plain:
            continue
        if lines and lines[-1].cell_len + _GAP + pair.cell_len <= room:
            lines[-1] = Text.assemble(lines[-1], " " * _GAP, pair)
        else:
            lines.append(pair)
    return Text("\n").join(lines)


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


def local(then: datetime) -> str:
    """Format a time in the time zone of this machine, with its offset: `2026-11-30 18:00:00 +01:00`."""
    return then.astimezone().isoformat(" ", "seconds").replace("+", " +").replace("+00:00", "UTC")


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
