"""`docs/cli.md`, the reference of the command line, written from the commands themselves.

python -m fleet.cli.page            write the page
python -m fleet.cli.page --check    exit with 1 where it is not what the commands say
"""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import click

from fleet.cli import answers
from fleet.cli.base import EXIT_CODES, Command, write_file
from fleet.cli.main import SECTIONS, main

PAGE: Final = Path(__file__).resolve().parents[2] / "docs" / "cli.md"

_VARIABLES: Final = {
    "WASMFLEET_HOME": "the fleet's directory, as `--home`",
    "FLEET_TOKEN": "the operator's token, in place of `operator/token`; for pipelines",
    "FLEET_SIGNING_KEY": "the text of the key that publishes, in place of the keyring; for pipelines",
    "WASMFLEET_KEY_PASSPHRASE": "passphrase of key files, old and new; asked on the terminal where it is not set",
    "WASMFLEET_TOKEN_PIN": "PIN of a PKCS#11 token; asked on the terminal where it is not set",
    "PYKCS11LIB": "the driver of a PKCS#11 token",
    "NO_COLOR": "no colours, whatever its value",
}

_HEAD: Final = """# Reference of `fleet`

Written by `python -m fleet.cli.page` from the commands; a test compares. [Commands](commands.md) is the overview.

## Exit codes

The same of every command:

| exit code | meaning |
|---|---|
"""

_JSON: Final = """
## JSON

With `--json` a command prints one object on standard output; its keys stand below with each command, a `?` marks those
that may be missing. Names of views are those of the API's description (`/v1/openapi.json`). Components are named as
commands take them (`main/hello@1.0.0`), times are RFC 3339 in UTC with `Z`. `fleet logs` and `fleet messages`
print an object for each line, as it arrives.

An error is one line on standard error, the last one:

    {"error": {"message": "there is no device gate-0", "kind": "refused", "exit_code": 4, "problem": "not-found"}}

`kind` is `failed`, `usage`, `unreachable`, `refused`, `nothing-affected`, `bug` (70) or `interrupted`, one for each
exit code. `problem` is the server's type of problem, where it is the server that refused. `extra` is a text to save,
such as a `component.toml`.

## Options of every command

| option | |
|---|---|
"""


def text() -> str:
    """Return the page."""
    lines = [_HEAD.rstrip("\n"), *(f"| {int(code)} | {meaning} |" for code, meaning in EXIT_CODES), _JSON.rstrip("\n")]
    lines += [_row(option) for option in main.params if isinstance(option, click.Option)]
    lines += ["", "## Environment", "", "| variable | |", "|---|---|"]
    lines += [f"| `{name}` | {words} |" for name, words in _VARIABLES.items()]
    for title, section in SECTIONS.items():
        lines += ["", f"## {title}"]
        for name in section:
            command = main.get_command(click.Context(main), name)
            assert command is not None
            lines += _described(f"fleet {name}", command)
    return "\n".join(lines) + "\n"


def _described(name: str, command: click.Command) -> Iterator[str]:
    """Yield the lines of a command, or of those of a group."""
    if isinstance(command, click.Group):
        yield from ("", _paragraphs(command.help))
        for inner, each in command.commands.items():
            yield from _described(f"{name} {inner}", each)
        return
    yield from ("", f"### `{name}`", "", f"    {name} {_usage(command)}", "", _paragraphs(command.help))
    own = command.own if isinstance(command, Command) else []
    rows = [_row(option) for option in own if not option.hidden]
    if rows:
        yield from ("", "| option | |", "|---|---|", *rows)
    if isinstance(command, Command) and command.examples:
        yield from ("", *(f"    {line.strip()}" for line in command.examples.strip().splitlines()))
    full = name.removeprefix("fleet ")
    for option, shape in answers.shapes(full).items() if full in answers.ANSWERS else ():
        view = "" if isinstance(shape, tuple) else f" (`{shape.__name__}`)"
        keys = ", ".join(f"`{each}`" for each in answers.keys(shape))
        yield from ("", f"JSON{f' with `{option}`' if option else ''}{view}: {keys}.")


def _usage(command: click.Command) -> str:
    """Return what stands behind a command's name; click's own text differs between its versions."""
    words = ["[OPTIONS]"]
    for each in command.params:
        if isinstance(each, click.Argument):
            name = each.metavar or f"{(each.name or '').upper()}{'...' if each.nargs < 0 else ''}"
            words.append(name if each.required or name.startswith("[") else f"[{name}]")
    return " ".join(words)


def _row(option: click.Option) -> str:
    names = ", ".join(sorted(option.opts, key=len))
    if option.secondary_opts:
        names += " / " + ", ".join(option.secondary_opts)
    if not option.is_flag:
        choices = "|".join(map(str, option.type.choices)) if isinstance(option.type, click.Choice) else ""
        names += " " + (option.metavar or choices or option.type.name.upper())
    default = f"  [default: {option.default}]" if option.show_default else ""
    required = "  [required]" if option.required else ""
    words = f"{option.help or ''}{default}{required}"
    return "| `{}` | {} |".format(*(each.replace("|", "\\|") for each in (names, words)))


def _paragraphs(words: str | None) -> str:
    return "\n\n".join(" ".join(part.split()) for part in (words or "").split("\n\n"))


if __name__ == "__main__":
    made = text()
    if "--check" in sys.argv[1:]:
        sys.exit(0 if PAGE.exists() and PAGE.read_text(encoding="utf-8") == made else "docs/cli.md is out of date")
    write_file(PAGE, made)
