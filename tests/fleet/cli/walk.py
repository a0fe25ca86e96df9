"""Every command of `fleet`, for tests that hold over all of them."""

import click

from fleet.cli.main import SECTIONS, main


def _commands() -> dict[str, click.Command]:
    found: dict[str, click.Command] = {}
    for name in (name for section in SECTIONS.values() for name in section):
        command = main.get_command(click.Context(main), name)
        assert command is not None
        found |= _below(name, command)
    return found


def _below(name: str, command: click.Command) -> dict[str, click.Command]:
    if not isinstance(command, click.Group):
        return {name: command}
    return {
        full: each
        for inner in command.commands
        for full, each in _below(f"{name} {inner}", command.commands[inner]).items()
    }


COMMANDS = _commands()
"""Commands that do something, by their full names; groups are left out."""
