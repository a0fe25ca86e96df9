"""What the shell offers for a group, a board or a rollout: asked of the server, silently nothing where it is away."""

import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import click
from click.shell_completion import CompletionItem

from fleet.cli.base import Fault, Options

if TYPE_CHECKING:
    from fleet.client import Client


def groups(context: click.Context, _parameter: click.Parameter, begun: str) -> list[CompletionItem]:
    """Names of groups."""
    return _offer(context, begun, lambda client: ((row.name, f"{row.boards} boards") for row in client.groups().groups))


def devices(context: click.Context, _parameter: click.Parameter, begun: str) -> list[CompletionItem]:
    """Ids of boards."""
    return _offer(
        context,
        begun,
        lambda client: ((row.id, "online" if row.online else "offline") for row in client.devices().devices),
    )


def rollouts(context: click.Context, _parameter: click.Parameter, begun: str) -> list[CompletionItem]:
    """Numbers of rollouts."""
    return _offer(
        context,
        begun,
        lambda client: ((str(row.number), f"{row.instance}: {row.state}") for row in client.rollouts().rollouts),
    )


def _offer(
    context: click.Context, begun: str, ask: "Callable[[Client], Iterable[tuple[str, str]]]"
) -> list[CompletionItem]:
    from fleet.cli.home import connect  # noqa: PLC0415 - heavy, and only when the shell asks
    from fleet.client import ClientError  # noqa: PLC0415 - the same

    home = context.find_root().params.get("home") or os.environ.get("WASMFLEET_HOME")
    try:
        with connect(Options(home=Path(home) if home else None)) as client:
            return [CompletionItem(name, help=text) for name, text in ask(client) if name.startswith(begun)]
    except (Fault, ClientError, OSError):
        return []
