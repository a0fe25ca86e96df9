"""Parts of all `fleet` commands: options, errors for people, exit codes, lazily loaded groups, typed values, files.

Every `fleet --help` and every completion imports this module, so at load time it imports click and nothing heavier.
"""

import difflib
import functools
import importlib
import os
import re
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from enum import IntEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem


class Exit(IntEnum):
    """Exit codes of every command; the help lists them."""

    OK = 0
    FAILED = 1
    USAGE = 2
    UNREACHABLE = 3
    REFUSED = 4
    NOTHING_AFFECTED = 5
    BUG = 70
    INTERRUPTED = 130


EXIT_CODES: Final = (
    (Exit.OK, "done, or the rollout succeeded"),
    (Exit.FAILED, "tried and failed: a rollout was reverted, aborted or revoked"),
    (Exit.USAGE, "wrong options or bad input: nothing was changed"),
    (Exit.UNREACHABLE, "the server cannot be reached"),
    (Exit.REFUSED, "refused: not there under this name, conflicting or not allowed"),
    (Exit.NOTHING_AFFECTED, "the rollout was refused: it would change nothing on any device"),
    (Exit.INTERRUPTED, "interrupted; a rollout that was being followed goes on"),
)


class Fault(Exception):  # noqa: N818 - an error for people, raised by commands as a sentence
    """Error for people, in one line: what failed; why; what to do next.

    Attributes:
        extra: text to print below on standard output, such as a file to save.
    """

    def __init__(self, what: str, why: str = "", action: str = "", *, code: Exit = Exit.USAGE, extra: str = "") -> None:
        super().__init__("; ".join(part.rstrip(".") for part in (what, why, action) if part))
        self.code, self.extra = code, extra


def confirm(question: str, otherwise: str = "nothing was changed") -> None:
    """Ask before something is done that `--yes` does without a question.

    Raises:
        Fault: the answer is not yes, or the input ended before one; `otherwise` says what became of it.
        click.Abort: interrupted.
    """
    try:
        if click.confirm(question, err=True):
            return
        why = "the question was not answered with yes"
    except click.Abort as error:
        click.echo(err=True)  # the prompt has no line end of its own
        if not isinstance(error.__context__, EOFError):
            raise
        why = "the input ended before the question was answered"
    raise Fault(otherwise, why, "add --yes to do it without the question", code=Exit.INTERRUPTED)


@dataclass(frozen=True, slots=True)
class Options:
    """Common options. `home` is None when neither --home nor WASMFLEET_HOME names one."""

    home: Path | None = None
    json: bool = False
    quiet: bool = False
    debug: bool = False


def _merge(context: click.Context, **given: Any) -> Options:
    """Merge the options before a command's name with those after it, which win."""
    base = context.obj if isinstance(context.obj, Options) else Options()
    return replace(base, **{name: value for name, value in given.items() if value})


HOME: Final = click.Option(
    ["--home"],
    type=click.Path(path_type=Path, file_okay=False),
    help="The fleet's directory  [$WASMFLEET_HOME, else ~/.local/share/wasmfleet]",
)
JSON: Final = click.Option(["--json"], is_flag=True, help="Print JSON for programs")
QUIET: Final = click.Option(["--quiet", "-q"], is_flag=True, help="Print only results and errors")
DEBUG: Final = click.Option(["--debug"], is_flag=True, help="Show the traceback of an error")


_FORCE: Final = "fleet.cli.force"


def _remember_force(ctx: click.Context, _param: click.Parameter, wanted: bool) -> None:  # noqa: FBT001 - click calls it
    ctx.meta[_FORCE] = wanted


def _check_free(ctx: click.Context, _param: click.Parameter, file: Path | None) -> Path | None:
    if file is not None:
        keep(file, force=ctx.meta.get(_FORCE, False))
    return file


def keep(file: Path, *, force: bool) -> None:
    """Refuse to replace a file without `--force`; devices and pipes such as /dev/stdout are written into.

    Raises:
        Fault: the file exists.
    """
    open_already = file.absolute().parts[1:2] in {("dev",), ("proc",)}  # /dev/stdout: the caller's redirection
    dangling = file.is_symlink() and not file.exists()
    if not force and not open_already and (file.is_file() or dangling):
        raise Fault(f"{file} exists", "it is replaced only on demand", "name another file, or add --force")


def new_file_option(*names: str, **how: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Make an option that names a file to write; one that exists is refused before anything is done.

    FORCE_OPTION goes with it, once for each command.
    """
    return click.option(*names, type=click.Path(path_type=Path, dir_okay=False), callback=_check_free, **how)


FORCE_OPTION: Final = click.option(
    "--force",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_remember_force,
    help="Replace the file if it exists",
)

DRY_RUN: Final = click.option("--dry-run", "dry", is_flag=True, help="Change nothing: show what it would do")

WIDE: Final = "fleet.cli.wide"
COLUMNS: Final = "fleet.cli.columns"


def _remember(key: str) -> Callable[[click.Context, click.Parameter, Any], None]:
    def remember(ctx: click.Context, _param: click.Parameter, value: Any) -> None:
        ctx.meta[key] = value

    return remember


WIDE_OPTION: Final = click.option(
    "--wide",
    is_flag=True,
    expose_value=False,
    callback=_remember(WIDE),
    help="Print each row in one line, however narrow the terminal is",
)


def table_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command that prints one table `--wide` and `--columns`, which `output.table` reads."""
    chosen = click.option(
        "--columns",
        metavar="NAME,NAME",
        expose_value=False,
        callback=_remember(COLUMNS),
        help="Print only these columns, in this order",
    )
    return WIDE_OPTION(chosen(function))


SIGN_YES: Final = click.option("--yes", is_flag=True, help="Sign without asking")


def save_event_option(function: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command `--out FILE` as `to`, and `--force`."""
    words = "Save the signing event in this file; publish nothing"
    return new_file_option("--out", "to", metavar="FILE", help=words)(FORCE_OPTION(function))


def share_worker_option(function: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command `--share-worker/--own-worker` as `share_worker`; the spelling before 0.2.0 is hidden."""

    @functools.wraps(function)
    def merged(*args: Any, share_worker: bool | None, share_lane: bool | None, **rest: Any) -> Any:
        return function(*args, share_worker=share_lane if share_worker is None else share_worker, **rest)

    earlier = click.option("--share-lane/--own-lane", default=None, hidden=True)
    present = click.option(
        "--share-worker/--own-worker",
        default=None,
        help="Allow or forbid a worker shared with other instances of its publisher  [as before; at first its own]",
    )
    return present(earlier(merged))


class Command(click.Command):
    """Command with the common options, also after its name, and examples at the end of its help."""

    def __init__(self, *args: Any, examples: str = "", json: bool = True, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.examples = examples
        self.common = [HOME, *([JSON] if json else []), QUIET, DEBUG]
        self.own = [param for param in self.params if isinstance(param, click.Option)]
        self.params += self.common

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Read the arguments; refuse both words of a pair such as `--share-worker/--own-worker`."""
        given = {*args[: args.index("--") if "--" in args else None]}
        for option in self.own:
            for yes, no in zip(option.opts, option.secondary_opts, strict=False):
                if {yes, no} <= given:
                    raise click.UsageError(f"{yes} and {no} contradict each other: give one of them.", ctx)
        return super().parse_args(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        """Hand the common options to the callback as one value, before its own."""
        given = {option.name: ctx.params.pop(option.name, None) for option in self.common if option.name}
        ctx.obj = _merge(ctx, **given)
        return super().invoke(ctx)

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the command's own options, then the common ones."""
        own = [record for option in self.own if (record := option.get_help_record(ctx)) is not None]
        if own:
            with formatter.section("Options"):
                formatter.write_dl(own)
        common = [record for option in self.common if (record := option.get_help_record(ctx)) is not None]
        with formatter.section("Common options"):
            formatter.write_dl([*common, ("--help", "Show this message and exit")])

    def format_epilog(self, _ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the examples without wrapping."""
        write_examples(formatter, self.examples)


def write_examples(formatter: click.HelpFormatter, examples: str) -> None:
    """Write a section of command lines without wrapping them."""
    if examples:
        with formatter.section("Examples"):
            for line in examples.strip().splitlines():
                formatter.write(f"{'':>{formatter.current_indent}}{line.strip()}\n")


def command(name: str, *, examples: str = "", json: bool = True) -> Callable[[Callable[..., Any]], Command]:
    """Make a function with `Options` as its first parameter a command; its docstring is the help."""

    def make(function: Callable[..., Any]) -> Command:
        made = click.command(name, cls=Command, examples=examples, json=json)(click.pass_obj(function))
        assert isinstance(made, Command)
        return made

    return make


@dataclass(frozen=True, slots=True)
class Entry:
    """Place and one-line help of a command, known without importing it."""

    where: str
    short: str


Sections = Mapping[str, Mapping[str, Entry]]

_SENTENCE_MAX_CHARS: Final = 1000
"""Above every first sentence of a command's help: none is cut off in the list of its group."""


class Group(click.Group):
    """Group that lists the first sentence of each command's help, on further lines where one is too short for it."""

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the names and first sentences; click would cut them off at the end of the line."""
        rows = [
            (name, loaded.get_short_help_str(_SENTENCE_MAX_CHARS))
            for name in self.list_commands(ctx)
            if (loaded := self.get_command(ctx, name)) is not None and not loaded.hidden
        ]
        with formatter.section("Commands"):
            formatter.write_dl(rows)


class ShortGroup(Group):
    """Group in which arguments that name no command go to the one named `short`: `fleet rollout 7` shows rollout 7."""

    def __init__(self, *args: Any, short: str, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.short = short

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Put the name of the command in front where an option comes first."""
        option = bool(args) and args[0].startswith("-") and args[0] not in self.get_help_option_names(ctx)
        return super().parse_args(ctx, [self.short, *args] if option else args)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Take an argument that is no command as one of the command that is left out."""
        named = not args or args[0].startswith("-") or args[0] in self.commands
        return super().resolve_command(ctx, args if named else [self.short, *args])

    def shell_complete(self, ctx: click.Context, incomplete: str) -> "list[CompletionItem]":
        """Offer what the command that is left out takes first, beside the commands."""
        argument = next(each for each in self.commands[self.short].params if isinstance(each, click.Argument))
        return [*argument.shell_complete(ctx, incomplete), *super().shell_complete(ctx, incomplete)]


class LazyGroup(click.Group):
    """Group whose commands are listed in sections and imported only when called."""

    def __init__(self, *args: Any, sections: Sections, examples: str = "", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.sections = sections
        self.entries = {name: entry for section in sections.values() for name, entry in section.items()}
        self.examples = examples

    def list_commands(self, _ctx: click.Context) -> list[str]:
        """Return the names in the order of the sections."""
        return list(self.entries)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import a command."""
        del ctx
        entry = self.entries.get(cmd_name)
        if entry is None:
            return None
        module, _, name = entry.where.partition(":")
        loaded = getattr(importlib.import_module(module), name)
        assert isinstance(loaded, click.Command)
        return loaded

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find a command; for an unknown one, name those like it, which click cannot see before they are imported."""
        name = args[0]
        if not ctx.resilient_parsing and not name.startswith("-") and name not in self.entries:
            similar = difflib.get_close_matches(name, self.entries)
            guess = f" Did you mean {' or '.join(map(repr, similar))}?" if similar else ""
            raise click.UsageError(f"No such command {name!r}.{guess}", ctx)
        return super().resolve_command(ctx, args)

    def format_commands(self, _ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the sections without importing any command."""
        width = max(len(name) for name in self.entries)
        for title, section in self.sections.items():
            with formatter.section(title):
                formatter.write_dl([(name.ljust(width), entry.short) for name, entry in section.items()])

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the examples; on the outermost group, the exit codes too."""
        write_examples(formatter, self.examples)
        if ctx.parent is None:
            with formatter.section("Exit codes"):
                formatter.write_dl([(str(int(code)), meaning) for code, meaning in EXIT_CODES])

    def main(self, *args: Any, **kwargs: Any) -> Any:
        """Run, and turn every exception into one line and an exit code."""
        kwargs["standalone_mode"] = False
        kwargs.setdefault("color", _color())
        argv = kwargs.get("args") or (args[0] if args else None) or sys.argv[1:]
        debug, as_json = "--debug" in argv, "--json" in argv
        try:
            result = super().main(*args, **kwargs)
        except Exception as error:  # noqa: BLE001 - the one place where an error becomes a line
            if debug:
                traceback.print_exc()
            sys.exit(explain(error, as_json=as_json))
        sys.exit(result if isinstance(result, int) else 0)


def explain(error: Exception, *, as_json: bool = False) -> int:
    """Print one line for `error` on standard error and return the exit code that belongs to it.

    Args:
        error: as raised by a command.
        as_json: print the line as `{"error": {...}}`, for programs: its keys are in docs/cli.md.
    """
    extra = ""
    match error:
        case Fault():
            line, code, extra = str(error), error.code, error.extra
            if extra and not as_json:
                click.echo(extra)
        case click.exceptions.Abort():
            line, code = "interrupted", Exit.INTERRUPTED
        case click.UsageError() if type(error).__name__ == "NoArgsIsHelpError":  # click 8.1 has no such class
            click.echo(error.format_message())
            return Exit.USAGE
        case click.NoSuchOption(possibilities=near):
            # click 8.1 writes it without quotes and in one sentence
            hint = f" Did you mean '{near[0]}'?" if near else ""
            path = error.ctx.command_path if error.ctx is not None else "fleet"
            line, code = f"No such option '{error.option_name}'.{hint} See '{path} --help'", Exit.USAGE
        case click.UsageError():
            path = error.ctx.command_path if error.ctx is not None else "fleet"
            words = _one_line(error.format_message())
            line, code = f"{words}{' See' if words.endswith('?') else '; see'} '{path} --help'", Exit.USAGE
        case click.ClickException():
            line, code = _one_line(error.format_message()), Exit(error.exit_code)
        case _:
            line, code = _by_library(error)
    if as_json:
        click.echo(_error_json(_one_line(line), code, error, extra), err=True)
    else:
        click.echo(click.style("error:", fg="red", bold=True) + f" {_one_line(line)}", err=True, color=_color())
    return code


def _error_json(line: str, code: int, error: Exception, extra: str) -> str:
    """Return an error as one line of JSON."""
    import json  # noqa: PLC0415 - keeps the start fast

    from fleet.protocol.printable import json_text  # noqa: PLC0415 - keeps the start fast

    kind = Exit(code).name.lower().replace("_", "-") if code in set(Exit) else "failed"
    found: dict[str, object] = {"message": line, "kind": kind, "exit_code": int(code)}
    if problem := getattr(getattr(error, "problem", None), "type", ""):
        found["problem"] = problem
    if extra:
        found["extra"] = extra
    return json_text(json.dumps({"error": found}, ensure_ascii=False))


def _color() -> bool | None:
    """Return False under NO_COLOR (https://no-color.org); None lets click decide by the terminal."""
    return False if os.environ.get("NO_COLOR") else None


def _by_library(error: Exception) -> tuple[str, Exit]:
    """Give the line and code for an error of this project's own modules, imported only now that one was raised."""
    from fleet.client import ClientError, ProblemError, RequestError, UnreachableError  # noqa: PLC0415 - keeps the start fast
    from fleet.protocol.names import readable  # noqa: PLC0415 - keeps the start fast
    from signing.errors import KeyFileError, SigningError  # noqa: PLC0415 - keeps the start fast

    codes = (
        (UnreachableError, Exit.UNREACHABLE),
        (ProblemError, Exit.REFUSED),
        (RequestError, Exit.USAGE),
        (ClientError, Exit.FAILED),
        (KeyFileError, Exit.USAGE),
        (SigningError, Exit.REFUSED),
    )
    for kind, code in codes:
        if isinstance(error, kind):
            return readable(str(error)), code
    if isinstance(error, OSError) and error.strerror:
        name = f"{error.filename}: " if error.filename else ""
        return f"{name}{reason(error)}; check the path and its permissions", Exit.USAGE
    words = f"{type(error).__name__}: {error}; this is a bug in wasmfleet; run again with --debug and report it"
    return words, Exit.BUG


def _one_line(text: str) -> str:
    """Remove line breaks, what is not printable, and a final full stop."""
    from fleet.protocol.printable import printable  # noqa: PLC0415 - keeps the start fast

    return printable(" ".join(text.split())).rstrip(".")


def check_choice(value: str, known: Sequence[str], what: str) -> str:
    """Return `value` if it is one of `known`. Raises `Fault` with the nearest names."""
    if value in known:
        return value
    raise Fault(f"unknown {what} {value!r}", f"there are {', '.join(known) or 'none'}")


def config_values(pairs: Sequence[str]) -> dict[str, str] | None:
    """Read configuration from `--config key=value`; None when there is none, so that the instance keeps its own.

    Raises:
        Fault: no '=', an empty key, or a key given twice.
    """
    values: dict[str, str] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key:
            raise Fault(f"--config {pair!r} is not a setting", "it has no '='", "write --config key=value")
        if key in values:
            raise Fault(f"--config {key} is given twice", "one value can apply", "give it once")
        values[key] = value
    return values or None


def label_values(words: Sequence[str]) -> dict[str, str | None]:
    """Read labels from `key=value`, or `key-` to remove one (None); raises `Fault`."""
    values: dict[str, str | None] = {}
    for word in words:
        key, equals, value = word.partition("=")
        if equals and key and value:
            values[key] = value
        elif not equals and word.endswith("-") and len(word) > 1:
            values[word[:-1]] = None
        else:
            raise Fault(
                f"{word!r} is not a label", "a label has a name and a value", "write name=value, or name- to remove it"
            )
    return values


def days(text: str) -> timedelta:
    """Read a time in days, such as `30d`; raises `Fault`."""
    found = re.fullmatch(r"([1-9][0-9]{0,3})d?", text.strip())
    if found is None:
        raise Fault(f"{text!r} is not a number of days", "1 to 9999 days are possible", "write 30d")
    return timedelta(days=int(found[1]))


def write_file(file: Path, data: bytes | str, action: str = "check the path") -> None:
    """Replace a file that a person named, as a whole; write into a device or pipe such as /dev/stdout.

    Args:
        file: path; for a symbolic link, the file that it points to is replaced.
        data: its content; text is written as UTF-8.
        action: what to do when it cannot be written.

    Raises:
        Fault: it cannot be written.
    """
    from fleet.protocol.files import move_into_place, temporary_name  # noqa: PLC0415 - keeps the start fast

    data = data.encode() if isinstance(data, str) else data
    try:
        if file.exists() and not file.is_file():
            file.write_bytes(data)
            return
        target = file.resolve()
        beside = temporary_name(target)
        try:
            beside.write_bytes(data)
            move_into_place(beside, target)
        except BaseException:
            beside.unlink(missing_ok=True)
            raise
    except OSError as error:
        raise Fault(f"cannot write {file}", reason(error), action) from None


def reason(error: OSError) -> str:
    """Return the system's reason for an error as part of a sentence: `no space left on device`."""
    return (error.strerror or str(error)).lower()


def read_file(file: Path, most: int) -> bytes:
    """Read at most `most` bytes of a file, plus one where the file is longer; raises `Fault`."""
    try:
        with file.open("rb") as stream:
            return stream.read(most + 1)
    except FileNotFoundError:
        raise Fault(f"{file} does not exist", "", "check the path") from None
    except IsADirectoryError:
        raise Fault(f"{file} is a directory", "the command needs a file", "name a file in it") from None
    except OSError as error:
        raise Fault(f"cannot read {file}", reason(error), "check its permissions") from None
