"""How things are printed: tables for people, JSON for programs, and words for times, sizes and states.

A terminal gets colours and its own width; anything else gets plain lines that are never cut.
"""

import sys
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from functools import cache
from typing import Final

import click
import msgspec
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fleet.cli.base import Options

_PLAIN_WIDTH: Final = 2000

_STYLES: Final = {
    "succeeded": "green",
    "running": "green",
    "online": "green",
    "committed": "green",
    "failed": "red",
    "refused": "red",
    "halted": "red",
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
    """The console on standard output."""
    if sys.stdout.isatty():
        return Console(highlight=False)
    return Console(highlight=False, width=_PLAIN_WIDTH, force_terminal=False, color_system=None)


def say(options: Options, text: str = "") -> None:
    """Tell a person something that no program wants: nothing with --quiet or --json."""
    if not options.quiet and not options.json:
        click.echo(text)


def show_json(value: msgspec.Struct | Sequence[object] | dict[str, object]) -> None:
    """Print a value as indented JSON."""
    click.echo(msgspec.json.format(msgspec.json.encode(value), indent=2).decode())


def table(columns: Sequence[str], rows: Iterable[Sequence[str | Text]], *, empty: str) -> None:
    """Print rows under headers, without lines; `empty` is said when there are none."""
    grid = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for name in columns:
        grid.add_column(name, overflow="ellipsis", no_wrap=True)
    count = 0
    for row in rows:
        grid.add_row(*(state(cell) if isinstance(cell, str) else cell for cell in row))
        count += 1
    if count:
        show(grid)
    else:
        click.echo(empty)


def facts(pairs: Iterable[tuple[str, str | Text]]) -> None:
    """Print names and values in two columns, leaving out empty values."""
    grid = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column(overflow="fold")
    for name, value in pairs:
        if str(value):
            grid.add_row(name, state(value) if isinstance(value, str) else value)
    show(grid)


def show(grid: Table) -> None:
    """Print a table: plain lines carry no spaces at their ends."""
    if console().is_terminal:
        console().print(grid)
        return
    with console().capture() as captured:
        console().print(grid)
    click.echo("\n".join(line.rstrip() for line in captured.get().rstrip("\n").split("\n")))


def state(word: str) -> Text:
    """A word in the colour of what it says; other words as they are."""
    return Text(
        word, style=_STYLES.get("rolled-back" if word.startswith("rolled back") else word.partition(" ")[0], "")
    )


def first_line(text: str) -> str:
    """What a listing has room for of a text that may have several lines, such as a trap's backtrace."""
    return text.strip().partition("\n")[0].rstrip()


def ago(then: datetime | None, now: datetime | None = None) -> str:
    """How long ago, in one unit: `12 s ago`; `never` for None."""
    if then is None:
        return "never"
    return span(((now or datetime.now(UTC)) - then).total_seconds()) + " ago"


def span(seconds: float) -> str:
    """A duration in one unit that people read at a glance."""
    for unit, size in (("d", 86_400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{max(seconds, 0):.0f} s"


def size(count: int) -> str:
    """A number of bytes, as `3.4 KiB`."""
    value = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024 or unit == "GiB":  # noqa: PLR2004 - the step between the units
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    raise AssertionError("the loop ends at GiB")


def target(path: str) -> str:
    """A TUF target path as people write it, `namespace/name@version`; `-` for none."""
    parts = path.removesuffix(".wasm").split("/")
    if len(parts) == 4 and parts[0] == "components":  # noqa: PLR2004 - components/<namespace>/<name>/<version>
        return f"{parts[1]}/{parts[2]}@{parts[3]}"
    return path or "-"
