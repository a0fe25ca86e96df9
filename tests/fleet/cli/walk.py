"""Every command of `fleet`, for tests that hold over all of them."""

import click

from fleet.cli.main import SECTIONS, main


def _commands() -> dict[str, click.Command]:
    found: dict[str, click.Command] = {}
    for name in (name for section in SECTIONS.values() for name in section):
        command = main.get_command(click.Context(main), name)
        assert command is not None
        if isinstance(command, click.Group):
            found |= {f"{name} {inner}": each for inner, each in command.commands.items()}
        else:
            found[name] = command
    return found


COMMANDS = _commands()
"""Commands that do something, by their full names; groups are left out."""
