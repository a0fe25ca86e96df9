"""`fleet component`: inspect a component file before anybody signs it, and compose it as a device does."""

from pathlib import Path

import click
import msgspec

from fleet.cli import host_check, output
from fleet.cli.base import FORCE_OPTION, Exit, Fault, Group, Options, command, new_file_option, read_file, write_file
from fleet.component import component_toml, reader, served, wasi
from fleet.component import compose as composer
from fleet.component.toml_fields import FILE_NAME
from fleet.protocol import bounds
from fleet.protocol.manifest import BadManifestError, Grants, describe_trigger
from fleet.protocol.operator_api import DeviceRow
from fleet.protocol.printable import printable


@click.group("component", cls=Group)
def component() -> None:
    """Inspect or check a component file, or put it into its adapter."""


@command(
    "inspect",
    examples="fleet component inspect hello.wasm\nfleet component inspect hello.wasm --toml > component.toml",
)
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--toml", is_flag=True, help="Print only a component.toml that grants all its imports")
def inspect(options: Options, *, file: Path, toml: bool) -> Exit:
    """Show what FILE imports and exports, and the manifest it has or would need."""
    data = read_component(file)
    found = beside(file)
    manifest = None
    try:
        shape = reader.read(data, file_name=file.name)
        text = None if found is None else found.read_text(encoding="utf-8", errors="replace")
        manifest = component_toml.describe(shape, text, file_name=file.name)
    except reader.NotAComponentError as error:
        raise Fault(str(error)) from None
    except component_toml.NeedsTomlError as error:
        suggestion, problem = error.suggestion, str(error)
        missing = True
    except BadManifestError as error:
        if toml or found is not None:
            raise Fault(str(error).replace(FILE_NAME, str(found or FILE_NAME), 1)) from None
        suggestion, problem, missing = "", str(error), True  # a library, or one to compose: shown all the same
    else:
        suggestion = component_toml.render(manifest, leave_out_version=component_toml.DEV_VERSION)
        problem, missing = "", False
    unserved = tuple(each.name for each in served.unserved(shape, file_name=file.name))
    notes = served.notes(shape, Grants() if manifest is None else manifest.grants)
    if manifest is not None and (waits := served.serial(manifest)):
        notes = (*notes, waits)
    if toml:
        click.echo(printable(suggestion.rstrip(), lines=True))
        return Exit.OK
    if options.json:
        facts = msgspec.to_builtins(shape)
        assert isinstance(facts, dict)
        facts |= {"triggers": [] if manifest is None else msgspec.to_builtins(manifest.triggers)}
        output.show_json(
            {**facts, "problem": problem, "unserved": unserved, "notes": notes, "component_toml": suggestion}
        )
        return Exit.OK
    output.facts(
        [
            ("component", f"{file}, {output.size(shape.size_bytes)}"),
            ("imports", shape.imports or "nothing"),
            ("not served", unserved),
            ("exports", shape.exports or "nothing"),
            ("holds", f"{len(shape.modules)} core modules, {shape.components} components"),
            ("made by", shape.producers),
            ("manifest", str(found) if found else "none beside it"),
            ("called by", () if manifest is None else tuple(map(describe_trigger, manifest.triggers))),
            ("problem", problem),
            *(("note", note) for note in notes),
        ]
    )
    if not suggestion:
        return Exit.OK
    click.echo("\nA sufficient component.toml:\n" if missing else "\nAs component.toml:\n")
    _show_toml(suggestion)
    return Exit.OK


@command(
    "check",
    examples="fleet component check hello.wasm\nfleet component check hello.wasm --group edge-eu\n"
    "fleet component check hello.wasm --json",
)
@click.argument("file", type=click.Path(path_type=Path))
@click.option(
    "--manifest",
    "manifest_file",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Read this component.toml  [the one beside FILE, else inferred]",
)
@click.option("--group", default="", metavar="NAME", help="Judge it for the devices of this group too")
@click.option("--device", default="", metavar="ID", help="Judge it for this device too")
def check(options: Options, *, file: Path, manifest_file: Path | None, group: str, device: str) -> Exit:
    """Say whether devices can run FILE, before anybody signs it.

    The host of this machine compiles, links and starts it where wasmfleet[agent] is installed; otherwise the table of
    interfaces that devices serve is asked. With --group or --device, devices of any architecture are judged by what
    they reported: engine, interfaces, memory. Exit code 0: it can run; 1: it cannot; 2: FILE or its component.toml
    cannot be read, or the group has no devices; 4: there is no such group or device.
    """
    if group and device:
        raise click.UsageError("Name either --group or --device.")
    data = read_component(file)
    found = manifest_file or beside(file)
    text = None if found is None else read_file(found, component_toml.TOML_MAX_CHARS * 4).decode("utf-8", "replace")
    try:
        seen = host_check.examine(file, data, text)
    except BadManifestError as error:
        raise Fault(str(error).replace(FILE_NAME, str(found), 1)) from None
    rows = _devices(options, group, device) if group or device else []
    seen = host_check.on_devices(seen, rows)
    if options.json:
        output.show_json({"file": str(file), "ok": not seen.problems, **msgspec.to_builtins(seen.view())})
    else:
        _show_check(file, data, found, seen, devices=len(rows), quiet=options.quiet)
    return Exit.FAILED if seen.problems else Exit.OK


def _show_check(
    file: Path, data: bytes, found: Path | None, seen: host_check.Examined, *, devices: int, quiet: bool
) -> None:
    where = f" on {devices - len(seen.excluded)} of {devices} devices" if devices else ""
    output.facts(
        [
            ("component", f"{file}, {output.size(len(data))}"),
            ("manifest", str(found) if found else "none beside it"),
            ("checked by", seen.checked_by),
            *(("problem", each) for each in seen.problems),
            *(("excluded", f"{each.device}: {each.reason}") for each in seen.excluded),
            *(("note", note) for note in seen.notes),
            ("verdict", "it cannot run" if seen.problems else f"it can run{where}"),
        ]
    )
    if seen.suggestion and not quiet:
        click.echo("\nA sufficient component.toml:\n")
        _show_toml(seen.suggestion)


def _show_toml(suggestion: str) -> None:
    for line in suggestion.rstrip().splitlines():
        click.echo(printable(f"    {line}".rstrip()))


def _devices(options: Options, group: str, device: str) -> list[DeviceRow]:
    """Fetch what the devices reported; they need the server and an operator."""
    from fleet.cli.operator import load_operator  # noqa: PLC0415 - without --group no home is needed

    with load_operator(options).client() as client:
        if device:
            return [client.device(device).row]
        rows = [row for row in client.devices().devices if group in row.groups]
        if not rows:
            client.policy(group)  # the server refuses a name that no group has
            raise Fault(f"the group {group!r} has no devices", "", "leave --group out, or name another one")
        return rows


@command("compose", examples="fleet component compose server.wasm -o whole.wasm && wasm-tools validate whole.wasm")
@click.argument("file", type=click.Path(path_type=Path))
@new_file_option(
    "-o", "--output", "target", required=True, metavar="FILE", help="Write the composed component to this file"
)
@FORCE_OPTION
def compose(options: Options, *, file: Path, target: Path) -> Exit:
    """Put FILE, a guest of wasi:http, into the adapter that devices run it in.

    Devices do this themselves when they compile: push FILE itself, not the result.
    """
    data = read_component(file)
    try:
        shape = reader.read(data, file_name=file.name)
        if not composer.needs_adapter(shape):
            raise Fault(f"{file.name} needs no adapter", f"it does not export {wasi.HTTP_HANDLER}", "push it as it is")
        whole = composer.compose(composer.load_adapter(), data)
    except (reader.NotAComponentError, composer.ComposeError) as error:
        raise Fault(str(error)) from None
    write_file(target, whole)
    names = reader.read(whole).imports
    if options.json:
        output.show_json(
            {"output": str(target), "size_bytes": len(whole), "adapter": composer.adapter_digest(), "imports": names}
        )
        return Exit.OK
    output.facts(
        [
            ("written", f"{target}, {output.size(len(whole))}"),
            ("adapter", f"sha256 {composer.adapter_digest()}"),
            ("imports", names),
        ]
    )
    return Exit.OK


def read_component(file: Path) -> bytes:
    """Read a component's bytes. Raises `Fault`."""
    return read_file(file, bounds.ARTIFACT_MAX_BYTES)


def beside(file: Path) -> Path | None:
    """Find the manifest beside a component; None when there is none."""
    return next((path for name in component_toml.beside(file.name) if (path := file.with_name(name)).is_file()), None)


for _each in (inspect, check, compose):
    component.add_command(_each)
