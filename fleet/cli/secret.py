"""`fleet secret`: set, rotate, list and remove secrets of devices.

A value is read from standard input, a file, or typed; it is never an argument, which every process of the machine could
read. With `--seal-here` it leaves this machine only in boxes, each of which a single device can open.
"""

import base64
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

import click
from rich.text import Text

from fleet.cli import base, operator, output
from fleet.cli.base import Exit, Fault, Group, Options, command
from fleet.cli.operator import Operator, connect, load_operator
from fleet.client import Client
from fleet.protocol import bounds
from fleet.protocol.names import BadNameError, check_label, check_secret
from fleet.protocol.trust_api import Box, SealingKeys, SecretReply, SecretRequest, SecretRow, SecretScope
from signing import sealing
from signing.errors import Rejected, SigningError
from signing.sealing import Purpose, proved

_NAME: Final = click.argument("name", metavar="NAME")
_WHERE: Final = (
    click.option(
        "--group", default="", shell_complete=operator.groups, metavar="NAME", help="Act on the devices of this group"
    ),
    click.option("--device", default="", shell_complete=operator.devices, metavar="ID", help="Act on this one device"),
    click.option(
        "--instance", default="", metavar="NAME", help="Instance that uses the secret  [the one there that declares it]"
    ),
)
_VALUE: Final = (
    click.option(
        "--file",
        type=click.Path(path_type=Path, dir_okay=False),
        metavar="FILE",
        help="Read the value from a file  [standard input, or typed]",
    ),
    click.option("--seal-here", is_flag=True, help="Seal on this machine: the server never sees the value"),
    click.option("--ahead", is_flag=True, help="Set it also where no running version declares it yet"),
)


def _options(*options: Callable[..., Any]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def add(function: Callable[..., Any]) -> Callable[..., Any]:
        for option in reversed(options):
            function = option(function)
        return function

    return add


@click.group("secret", cls=Group, short_help="Give components passwords and keys that only their devices can read")
def secrets() -> None:
    """Give components passwords and keys that only their devices can read.

    A component declares the names of its secrets in component.toml. A value is stored and sent in sealed boxes, one for
    each device, which that device alone can open. A device that joins later lacks it: set it again.
    """


@command(
    "set",
    examples="fleet secret set db-password --group edge-eu < password.txt\n"
    "pass show edge/db | fleet secret set db-password --group edge-eu --instance report --seal-here\n"
    "fleet secret set tls-key --device gate-7-1f2e3d4c --file key.pem",
)
@_NAME
@_options(*_WHERE, *_VALUE)
def set_(options: Options, *, name: str, **how: Any) -> None:
    """Give devices a secret, or its next version.

    The value is never an argument. Instances that declare it restart with it at once, on probation like every change: a
    device whose component does worse returns to the former value by itself.
    """
    _give(options, name, how, rotate=False)


@command(
    "rotate",
    examples="fleet secret rotate db-password --group edge-eu < new-password.txt\n"
    "fleet secret rotate db-password --group edge-eu --seal-here",
)
@_NAME
@_options(*_WHERE, *_VALUE)
def rotate(options: Options, *, name: str, **how: Any) -> None:
    """Replace an existing secret by its next version; a device never takes an older one again."""
    _give(options, name, how, rotate=True)


def _give(options: Options, name: str, how: dict[str, Any], *, rotate: bool) -> None:
    scope = _scope(name, how)
    who = load_operator(options)
    value = _value(how["file"])
    unproved: dict[str, str] = {}
    wish = SecretRequest(
        instance=scope.instance, group=scope.group, device=scope.device, rotate=rotate, ahead=how["ahead"]
    )
    with who.client() as client:
        if how["seal_here"]:
            keys = client.sealing_keys(name, scope)
            boxes, unproved = _sealed(who, keys, value)
            given = {field: getattr(wish, field) for field in wish.__struct_fields__}
            given |= {"instance": keys.instance, "boxes": boxes, "version": keys.version}
        else:
            given = {field: getattr(wish, field) for field in wish.__struct_fields__} | {"value": value}
        reply = client.set_secret(name, SecretRequest(**given))
    for device, reason in unproved.items():
        output.note(f"{device} is left out, its sealing key is not proved: {reason}; enrol it anew")
    _tell(options, reply, here=how["seal_here"], unproved=unproved)


def _tell(options: Options, reply: SecretReply, *, here: bool, unproved: Mapping[str, str]) -> None:
    if options.json:
        output.show_json(reply)
        return
    count = len(reply.devices)
    where = "here; the server has not seen it" if here else "by the server, which has forgotten it"
    devices = f"{count} device{'' if count == 1 else 's'}"
    output.say(options, f"{reply.instance}/{reply.name} version {reply.version} for {devices}, sealed {where}.")
    for device in (each for each in reply.unsealable if each not in unproved):
        click.echo(
            f"  {device} has no sealing key, so it lacks the secret: enrol it anew, with 'fleet-agent enroll --force'"
        )
    if not count:
        click.echo("  No device is there yet; each one that joins lacks the secret until you set it again.")


def _scope(name: str, how: dict[str, Any]) -> SecretScope:
    if bool(how["group"]) == bool(how["device"]):
        raise click.UsageError("Name either --group or --device.")
    try:
        check_secret(name)
        if how["instance"]:
            check_label(how["instance"], "instance")
    except BadNameError as error:
        raise Fault(str(error)) from None
    return SecretScope(instance=how["instance"], group=how["group"], device=how["device"])


def _value(file: Path | None) -> str:
    """Read the value; one line end after it is not part of it."""
    most = bounds.SECRET_VALUE_MAX_BYTES + 2
    if file is not None:
        with file.open("rb") as source:
            data = source.read(most)
    elif sys.stdin.isatty():
        typed: str = click.prompt("Value", hide_input=True, confirmation_prompt=True, err=True)
        data = typed.encode()
    else:
        data = sys.stdin.buffer.read(most)
    try:
        value = data.decode()
        value = value.removesuffix("\n").removesuffix("\r") if value.count("\n") <= 1 else value
        sealing.check_value(value)
    except UnicodeDecodeError:
        raise Fault(
            "the value is not text in UTF-8", "components read text", "encode bytes, for example in base64"
        ) from None
    except SigningError as error:
        raise Fault(str(error)) from None
    return value


def _sealed(who: Operator, keys: SealingKeys, value: str) -> tuple[tuple[Box, ...], dict[str, str]]:
    """Seal a box for each device whose sealing key is proved by the device key that this machine remembers.

    Returns:
        The boxes; devices without such a proof, which get none, with the reason.

    Raises:
        Fault: no device is left, or the server shows another key of one than before.
    """
    from fleet.cli import trust_store  # noqa: PLC0415 - tuf is not for --help, nor for boxes that the server seals

    if keys.fleet != who.fleet:
        raise Fault(
            f"the server serves the fleet {keys.fleet!r}, this machine belongs to {who.fleet!r}", code=Exit.REFUSED
        )
    with trust_store.remembering_devices(who.trust) as memory:
        boxes: list[Box] = []
        unproved: dict[str, str] = {}
        for entry in keys.devices:
            try:
                key, fingerprint = proved(
                    entry.proof.encode(),
                    certificate=entry.certificate_pem.encode(),
                    fleet=who.fleet,
                    device=entry.device,
                )
            except Rejected as error:  # a device's own word, or a server's lie: it gets no box, and holds up no other
                unproved[entry.device] = error.message
                continue
            trust_store.check_device_key(memory, entry.device, fingerprint)
            purpose = Purpose(
                fleet=who.fleet, device=entry.device, instance=keys.instance, name=keys.name, version=keys.version
            )
            box = sealing.seal(value, recipient=key, purpose=purpose)
            boxes.append(Box(device=entry.device, box=base64.b64encode(box).decode()))
        if unproved and not boxes:
            device, reason = next(iter(unproved.items()))
            raise Fault(
                f"cannot seal for {device}: its sealing key is not proved",
                reason,
                "enrol it anew if it enrolled with an older agent; otherwise do not trust this server",
                code=Exit.REFUSED,
            )
    if not boxes:
        raise Fault("cannot seal the secret", "no device is there yet", "run fleet secret set once one has joined")
    return tuple(boxes), unproved


@command("list", examples="fleet secret list\nfleet secret list --json")
@base.table_options
def list_(options: Options) -> Exit:
    """List who has which version of which secret, and who lacks one. Values are never shown."""
    with connect(options) as client:
        found = client.secrets()
    if options.json:
        output.show_json(found)
        return Exit.OK
    rows: list[tuple[str | Text, ...]] = [
        (
            row.instance,
            row.name,
            str(row.version) if row.version else "-",
            str(len(row.devices)),
            ", ".join(sorted({each.sealed for each in row.devices})) or "-",
            ", ".join(sorted({each.by for each in row.devices})) or "-",
        )
        for row in found.secrets
    ]
    header = ("INSTANCE", "SECRET", "VERSION", "DEVICES", "SEALED BY", "SET BY")
    output.table(header, rows, empty="No device has a secret, and none lacks one.")
    for row in found.secrets:
        _tell_lacking(row)
    return Exit.OK


def _tell_lacking(row: SecretRow) -> None:
    for holding in row.devices:
        if holding.version < row.version:
            click.echo(f"{holding.device} has version {holding.version} of {row.instance}/{row.name}")
    for device in row.lacking:
        lacks = click.style("lacks", fg="yellow")
        click.echo(
            f"{device} {lacks} {row.name}: fleet secret set {row.name} --device {device} --instance {row.instance}"
        )


@command("rm", examples="fleet secret rm db-password --group edge-eu --instance report")
@_NAME
@_options(*_WHERE)
@base.DRY_RUN
def remove(options: Options, *, name: str, dry: bool, **how: Any) -> None:
    """Take a secret from devices; refused while an instance there needs it to start."""
    scope = _scope(name, how)
    with connect(options) as client:
        if dry:
            rows = [row for row in client.secrets().secrets if row.name == name]
            rows = [row for row in rows if scope.instance in {"", row.instance}]
            members = {row.id for row in client.devices().devices if scope.group in row.groups} | {scope.device}
            holders = {each.device for row in rows for each in row.devices} & members
            output.foresee(options, f"take {name} from devices of {scope.group or scope.device}", holders)
            return
        found = client.remove_secret(name, scope)
    output.result(options, found, f"{name} is removed from {scope.group or scope.device}.")


def check_needed(client: Client, *, instance: str, required: tuple[str, ...], group: str, device: str) -> None:
    """Check that some device there has every required secret. Raises `Fault`."""
    if not required:
        return
    rows = {row.name: row for row in client.secrets().secrets if row.instance == instance}
    members = {row.id for row in client.devices().devices if not row.revoked and group in row.groups}
    owners = {device} if device else members
    for name in required:
        row = rows.get(name)
        if owners and not (row is not None and owners & {each.device for each in row.devices}):
            where = f"--device {device}" if device else f"--group {group}"
            raise Fault(
                f"{instance} needs the secret {name}",
                "no device there has it",
                f"give it first: fleet secret set {name} {where} --instance {instance}",
                code=Exit.REFUSED,
            )


for _each in (set_, rotate, list_, remove):
    secrets.add_command(_each)
