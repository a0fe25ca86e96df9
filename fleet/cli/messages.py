"""`fleet messages`: what components publish, as their devices bring it."""

import base64
import functools
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Final

import click
import msgspec

from fleet.cli import operator
from fleet.cli.base import Fault, Options, command
from fleet.cli.operator import connect
from fleet.component import toml_fields
from fleet.protocol import message_topics, operator_api
from fleet.protocol.printable import json_text, printable

_LOOK_S: Final = 15
_NEWEST: Final = 100
_SHOWN_BYTES: Final = 32
_MS_PER_S: Final = 1000


@command(
    "messages",
    examples="fleet messages --group edge-eu\n"
    "fleet messages --device gate-7-1f2e3d4c --topic 'plant/+/temperature' --since 2h\n"
    "fleet messages --group edge-eu --follow --json",
)
@click.option("--group", shell_complete=operator.groups, metavar="NAME", help="Of the devices of this group")
@click.option("--device", shell_complete=operator.devices, metavar="ID", help="Of this device")
@click.option("--instance", metavar="NAME", help="Of this instance")
@click.option("--topic", metavar="FILTER", help="On topics that fit: + is one level, # at the end all below")
@click.option("--since", metavar="WHEN", help="That came since then: 30m, 2h, 7d, or a time such as 2026-11-30T12:00Z")
@click.option("--follow", is_flag=True, help="Keep printing messages as they come, until Ctrl-C")
def messages(
    options: Options,
    *,
    group: str | None,
    device: str | None,
    instance: str | None,
    topic: str | None,
    since: str | None,
    follow: bool,
) -> None:
    """Show messages that components published and their devices have brought, oldest first.

    Without --since, begin with the newest 100. A device keeps them while it is offline, and brings them in order. Each
    carries the sequence of its instance: a gap means that the device had no more room. With --json each message is an
    object on a line of its own, its data as base64. The server keeps them for a time and up to a size (server.toml,
    [limits]).
    """
    try:
        wanted = message_topics.check_filter(topic) if topic else ""
    except message_topics.BadMessageTopicError as error:
        raise Fault(f"--topic {topic!r} is no filter", str(error)) from error
    query: dict[str, str | int] = {"group": group or "", "device": device or "", "instance": instance or ""}
    query |= {"topic": wanted, **({"since": _seconds(since)} if since else {"limit": _NEWEST})}
    with connect(options) as client:
        found = client.messages({**query, **({"after": 0} if since else {})})
        _show(options, found)
        query.pop("limit", None)
        while found.more or follow:
            wait_s = 0 if found.more else _LOOK_S
            ask = functools.partial(client.messages, {**query, "after": found.next}, wait_s=wait_s)
            found = operator.patiently(ask)
            _show(options, found)


def _seconds(text: str) -> int:
    """Return a time in seconds since 1970: a duration before now, or a time. Raises `Fault`."""
    try:
        return max(0, int(time.time() - toml_fields.parse_duration(text) / _MS_PER_S))
    except toml_fields.BadUnitError:
        pass
    try:
        at = datetime.fromisoformat(text)
        return max(0, int((at if at.tzinfo is not None else at.replace(tzinfo=UTC)).timestamp()))
    except ValueError:
        raise Fault(f"--since {text!r} is no time", "write 30m, 2h, 7d, or 2026-11-30T12:00Z") from None


def _show(options: Options, found: operator_api.Messages) -> None:
    for each in found.messages:
        if options.json:
            click.echo(json_text(msgspec.json.encode(each).decode()))
        else:
            click.echo("  ".join(_columns(each)))


def _columns(message: operator_api.MessageView) -> Iterator[str]:
    yield f"{message.at:%Y-%m-%d %H:%M:%S}"
    yield f"{message.device}/{message.instance}"
    yield printable(message.topic)
    yield _content(message.data)


def _content(data: bytes) -> str:
    """Return what a message says: its text, or the begin of its bytes."""
    try:
        text = data.decode()
    except UnicodeDecodeError:
        more = "..." if len(data) > _SHOWN_BYTES else ""
        return f"({len(data)} bytes, base64) {base64.b64encode(data[:_SHOWN_BYTES]).decode()}{more}"
    return printable(text)
