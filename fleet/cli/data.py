"""`fleet data`: publish data packages, files that components read, and deploy them."""

import mmap
from collections import Counter
from pathlib import Path
from typing import Any

import click

from fleet.cli import base, output
from fleet.cli.base import Exit, Fault, Group, Options, command
from fleet.cli.operator import load_operator
from fleet.cli.publish import Payload, check_kind, versioned
from fleet.cli.push import (
    check_there,
    check_where,
    dry_run,
    follow,
    offer_options,
    publish_with_bar,
    rollout_request,
    show_published,
)
from fleet.cli.trust_store import TrustStore
from fleet.component import component_toml
from fleet.protocol import bounds, data_packages
from fleet.protocol.manifest import BadManifestError, Data, Manifest
from fleet.protocol.names import BadNameError, TargetName, check_label

_FILE = click.argument("file", type=click.Path(path_type=Path, dir_okay=False))
_NAME = click.option(
    "--name", default="", metavar="NAME", help="Publish under this name, by which components read it  [the file's]"
)
_VERSION = click.option(
    "--version", default="", metavar="VERSION", help="Publish under this version: 3 is 3.0.0  [the next whole number]"
)


@click.group("data", cls=Group, short_help="Publish data packages, which components read, and deploy them")
def data() -> None:
    """Publish data packages, which components read, and deploy them.

    A data package is one signed file, such as a model or a map: devices keep it apart from every component, and mount
    it read-only into the instances whose component.toml names it ([data.NAME]). It has versions and rollouts of its
    own. 'fleet deploy', 'undo', 'remove' and 'withdraw' take its name as they take a component's.
    """


@command(
    "publish",
    examples="fleet data publish model.bin --name m\n"
    "fleet data publish model.bin --name m --version 2.1.0 --json\n"
    "fleet data publish model.bin --name m --dry-run",
)
@_FILE
@_NAME
@_VERSION
@click.option("--dry-run", "dry", is_flag=True, help="Publish nothing: show the name, version and size it would have")
def publish(options: Options, *, file: Path, name: str, version: str, dry: bool) -> None:
    """Sign the file FILE as a data package and upload it.

    No device has it before it is deployed. A version never changes once it is published; without --version it is the
    next whole number, or the newest where that has these bytes.
    """
    payload = _payload(file, name, version)
    who = load_operator(options)
    with who.client() as client:
        if dry:
            trust = TrustStore(who, client)
            manifest = versioned(payload, trust)
            check_kind(manifest, trust)
            target = TargetName(who.namespace, manifest.name, manifest.version)
            known = trust.release(target.path)
            new = known is None or (known.sha256, known.manifest) != (payload.sha256, manifest)
            size = len(payload.data)
            if options.json:
                plain = {"dry_run": True, "target": target.path, "length": size, "sha256": payload.sha256, "new": new}
                output.show_json(plain)
            else:
                said = "would be published" if new else "is published already, with these bytes"
                output.say(options, f"{target} {said} ({output.size(size)}). Nothing was changed.")
            return
        published = publish_with_bar(who, client, payload, options)
    show_published(options, published)


@command(
    "push",
    examples="fleet data push model.bin --name m --group edge-eu\n"
    "fleet data push model.bin --name m --group edge-eu --waves '1, 10%, 100%' --soak 300\n"
    "fleet data push model.bin --name m --group edge-eu --dry-run",
)
@_FILE
@offer_options
@_NAME
@_VERSION
@click.option("--dry-run", "dry", is_flag=True, help="Change nothing: show which devices would get it")
def push(options: Options, *, file: Path, name: str, version: str, dry: bool, **how: Any) -> Exit:
    """Publish the file FILE as a data package and deploy it, in one go.

    Each device keeps it, restarts the instances that read it, watches them, and goes back to the former version of the
    data where one of them does worse. The rollout is one like any other: waves, gates, 'fleet undo'.
    """
    check_where(how)
    payload = _payload(file, name, version)
    who = load_operator(options)
    with who.client() as client:
        check_there(client, how["group"], how["device"])
        if dry:
            return dry_run(who, client, payload, rollout_request(payload.manifest.name, "", how), options)
        published = publish_with_bar(who, client, payload, options)
        return follow(client, published.target, how, options)


@command("list", examples="fleet data list\nfleet data list m\nfleet data list --json")
@click.argument("name", required=False, default="")
@base.table_options
def list_(options: Options, *, name: str) -> Exit:
    """List the data packages that are published, and how many devices keep each; only NAME where it is given."""
    with load_operator(options).client() as client:
        found = tuple(each for each in client.components().components if each.kind == "data")
        rows = client.devices().devices
    if name:
        found = tuple(each for each in found if name in {each.name, f"{each.namespace}/{each.name}"})
        if not found:
            raise Fault(f"no version of {name} is published", "'fleet data list' lists what is", code=Exit.REFUSED)
    if options.json:
        output.show_json({"components": list(found)})
        return Exit.OK
    kept = Counter(target for row in rows if not row.revoked for target in set(row.data.values()))
    output.table(
        ("DATA", "SIZE", "DEVICES", "SHA256"),
        [
            (output.target(each.target), output.size(each.length), str(kept[each.target]), each.sha256[:16])
            for each in found
        ],
        empty="No data is published yet: 'fleet data publish FILE --name NAME' publishes a file.",
        noun="data packages",
    )
    return Exit.OK


def _payload(file: Path, name: str, version: str) -> Payload:
    """Map a file, and make the manifest of its data package. Raises `Fault`."""
    try:
        manifest = Manifest(
            name=check_label(name, "data package") if name else component_toml.name_of(file.stem),
            version=data_packages.full_version(version) if version else component_toml.DEV_VERSION,
            trigger=Data(),
        )
    except (BadNameError, BadManifestError) as error:
        hint = "" if name else "name it with --name"
        raise Fault(str(error), "", hint) from None
    try:
        with file.open("rb") as opened:
            size = opened.seek(0, 2)
            if not 0 < size <= bounds.DATA_MAX_BYTES:
                most = output.size(bounds.DATA_MAX_BYTES)
                raise Fault(f"{file} is no data package", f"it has {output.size(size)}, and 1 byte to {most} may be")
            mapped = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as error:
        raise Fault(f"cannot read {file}", base.reason(error) if isinstance(error, OSError) else str(error)) from None
    return Payload(file=file, data=mapped, manifest=manifest)


for each in (publish, push, list_):
    data.add_command(each)
