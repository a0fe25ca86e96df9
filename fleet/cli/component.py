"""`fleet component`: inspect a component file before anybody signs it, and compose it as a device does."""

import os
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import click
import msgspec

from fleet.cli import base, host_check, output
from fleet.cli.base import (
    FORCE_OPTION,
    Exit,
    Fault,
    Group,
    Options,
    command,
    keep,
    new_file_option,
    read_file,
    write_file,
)
from fleet.component import component_toml, preview1, project, reader, served, wasi
from fleet.component import compose as composer
from fleet.component.reader import Component
from fleet.component.toml_fields import FILE_NAME
from fleet.protocol import bounds
from fleet.protocol.manifest import BadManifestError, Grants, Manifest, describe_trigger
from fleet.protocol.operator_api import DeviceRow
from fleet.protocol.printable import printable


@click.group("component", cls=Group)
def component() -> None:
    """Make, build, run, test or inspect a component here."""


@command(
    "inspect",
    examples="fleet component inspect hello.wasm\nfleet component inspect hello.wasm --write\n"
    "fleet component inspect hello.wasm --toml | less",
)
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--toml", is_flag=True, help="Print only a component.toml that grants all its imports")
@click.option("--write", is_flag=True, help="Write that component.toml beside FILE, as a whole")
@click.option("--force", is_flag=True, help="With --write: replace a component.toml that says something else")
def inspect(options: Options, *, file: Path, toml: bool, write: bool, force: bool) -> Exit:
    """Show what FILE imports and exports, and the manifest it has or would need.

    Exit code 1: FILE or its manifest has a problem, or imports what no device serves.
    """
    if toml and write:
        raise click.UsageError("--toml prints the manifest, --write writes it: choose one.")
    file, found = of_project(file)
    source = read_component(file)
    if found is not None and _is_output(found):
        # '> component.toml': the shell emptied it before this program began
        output.note(f"note: the shell emptied {found} before it was read; --write keeps what stands there")
        found = None
    shape, manifest, suggestion, problem = _described(file, source.data, found, shown=not (toml or write))
    unserved = tuple(each.name for each in served.unserved(shape, file_name=file.name))
    notes = source.notes + served.notes(shape, Grants() if manifest is None else manifest.grants)
    if manifest is not None and (waits := served.serial(manifest)):
        notes = (*notes, waits)
    if toml:
        click.echo(printable(suggestion.rstrip(), lines=True))
        return Exit.OK
    if write:
        _write_toml(options, found or file.with_name(FILE_NAME), suggestion, force=force)
        return Exit.OK
    code = Exit.FAILED if problem or unserved else Exit.OK
    if options.json:
        facts = msgspec.to_builtins(shape)
        assert isinstance(facts, dict)
        facts |= {"triggers": [] if manifest is None else msgspec.to_builtins(manifest.triggers)}
        output.show_json(
            {**facts, "problem": problem, "unserved": unserved, "notes": notes, "component_toml": suggestion}
        )
        return code
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
        return code
    click.echo("\nA sufficient component.toml:\n" if problem else "\nAs component.toml:\n")
    _show_toml(suggestion)
    return code


class _Described(NamedTuple):
    """Component with its manifest, or the problem of having none and what would do; empty where nothing would."""

    component: Component
    manifest: Manifest | None
    suggestion: str
    problem: str


def _described(file: Path, data: bytes, found: Path | None, *, shown: bool) -> _Described:
    """Read a component and the manifest beside it; `shown` for a component without any that can be shown all the same.

    Raises:
        Fault: no component, or a manifest that is invalid.
    """
    try:
        shape = reader.read(data, file_name=file.name)
        text = None if found is None else found.read_text(encoding="utf-8", errors="replace")
        manifest = component_toml.describe(shape, text, file_name=file.name)
    except reader.NotAComponentError as error:
        raise Fault(str(error)) from None
    except component_toml.NeedsTomlError as error:
        return _Described(shape, None, error.suggestion + component_toml.build_table(text), str(error))
    except BadManifestError as error:
        if not shown or found is not None:
            raise Fault(str(error).replace(FILE_NAME, str(found or FILE_NAME), 1)) from None
        return _Described(shape, None, "", str(error))  # a library, or one to compose
    rendered = component_toml.render(manifest, leave_out_version=component_toml.DEV_VERSION)
    return _Described(shape, manifest, rendered + component_toml.build_table(text), "")


def _is_output(path: Path) -> bool:
    """Tell whether standard output goes to this very file."""
    try:
        return os.path.samestat(path.stat(), os.fstat(sys.stdout.fileno()))
    except (OSError, ValueError):  # a standard output that is closed, or no file
        return False


def _write_toml(options: Options, target: Path, suggestion: str, *, force: bool) -> None:
    """Write a manifest as a whole, and say so. Raises `Fault` when there is another one."""
    text = printable(suggestion.rstrip(), lines=True) + "\n"
    if target.exists() and target.read_text(encoding="utf-8", errors="replace") != text:
        keep(target, force=force)
    write_file(target, text)
    output.result(options, {"file": str(target), "component_toml": text}, f"Wrote {target}.")


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
    file, found = of_project(file)
    found = manifest_file or found
    source = read_component(file)
    text = None if found is None else read_file(found, component_toml.TOML_MAX_CHARS * 4).decode("utf-8", "replace")
    try:
        seen = host_check.examine(file, source.data, text, adapted=bool(source.adapted))
    except BadManifestError as error:
        raise Fault(str(error).replace(FILE_NAME, str(found), 1)) from None
    rows = _devices(options, group, device) if group or device else []
    seen = host_check.on_devices(replace(seen, notes=source.notes + seen.notes), rows)
    if options.json:
        output.show_json({"file": str(file), "ok": not seen.problems, **msgspec.to_builtins(seen.view())})
    else:
        _show_check(file, source.data, found, seen, devices=len(rows), quiet=options.quiet)
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
    """Put FILE into its adapter: a guest of wasi:http as devices do, a command of WASI Preview 1 as push does.

    Devices and push do this themselves: push FILE itself, not the result.
    """
    source = read_component(file)
    digest = preview1.ADAPTER_SHA256 if source.adapted else composer.adapter_digest()
    try:
        shape = reader.read(source.data, file_name=file.name)
        if composer.needs_adapter(shape):
            whole = composer.compose(composer.load_adapter(), source.data)
        elif source.adapted:
            whole = source.data
        else:
            raise Fault(f"{file.name} needs no adapter", f"it does not export {wasi.HTTP_HANDLER}", "push it as it is")
    except (reader.NotAComponentError, composer.ComposeError) as error:
        raise Fault(str(error)) from None
    write_file(target, whole)
    names = reader.read(whole).imports
    if options.json:
        output.show_json({"output": str(target), "size_bytes": len(whole), "adapter": digest, "imports": names})
        return Exit.OK
    output.facts(
        [
            ("written", f"{target}, {output.size(len(whole))}"),
            ("adapter", ", ".join(filter(None, (source.adapted, f"sha256 {digest}")))),
            ("imports", names),
        ]
    )
    return Exit.OK


class Source(NamedTuple):
    """File of a component as read.

    Attributes:
        data: the component's bytes; of a command of WASI Preview 1 the adapted component's.
        adapted: with which adapter, for people; empty for a file that is a component itself.
    """

    data: bytes
    adapted: str = ""

    @property
    def notes(self) -> tuple[str, ...]:
        """Sentences for its author."""
        return (f"a command of WASI Preview 1, adapted with {self.adapted}",) if self.adapted else ()


def read_component(file: Path) -> Source:
    """Read a component's bytes, and adapt a command of WASI Preview 1. Raises `Fault`."""
    data = read_file(file, bounds.ARTIFACT_MAX_BYTES)
    if len(data) > bounds.ARTIFACT_MAX_BYTES:
        most = bounds.ARTIFACT_MAX_BYTES // bounds.MIB
        raise Fault(
            f"{file} is too large",
            f"it has {output.size(file.stat().st_size)}, and at most {most} MiB are accepted",
            "build it for size",
        )
    try:
        component = preview1.adapted(data, file_name=file.name)
    except reader.NotAComponentError as error:
        raise Fault(str(error)) from None
    return Source(data) if component is None else Source(component, preview1.ADAPTER)


def of_project(place: Path) -> tuple[Path, Path | None]:
    """Return a component's file and its manifest, None for none: of a project's directory, or as the file lies there.

    Raises:
        Fault: a directory without a project, or whose component is not built.
    """
    if not place.is_dir():
        return place, beside(place)
    try:
        found = project.load(place)
    except (project.BadProjectError, BadManifestError) as error:
        raise Fault(str(error), getattr(error, "advice", "")) from None
    if not found.output.is_file():
        raise Fault(f"{place} is not built: there is no {found.output}", "", "run 'fleet component build'")
    return found.output, place / FILE_NAME


def beside(file: Path) -> Path | None:
    """Find the manifest beside a component; None when there is none."""
    return next((path for name in component_toml.beside(file.name) if (path := file.with_name(name)).is_file()), None)


@command("components", examples="fleet components\nfleet components hello\nfleet components --json")
@click.argument("name", required=False, default="")
@base.table_options
def components(options: Options, *, name: str) -> Exit:
    """List what is published, and how many devices run it; only versions of NAME where one is given.

    A version that was withdrawn is not listed any more.
    """
    from fleet.cli.operator import load_operator  # noqa: PLC0415 - a component's file needs no home

    with load_operator(options).client() as client:
        found = client.components().components
        rows = client.devices().devices
    if name:
        found = tuple(each for each in found if name in {each.name, f"{each.namespace}/{each.name}"})
        if not found:
            raise Fault(f"no version of {name} is published", "'fleet components' lists what is", code=Exit.REFUSED)
    if options.json:
        output.show_json({"components": list(found)})
        return Exit.OK
    runs = Counter(
        target
        for row in rows
        if not row.revoked
        for target in {*(each.target for each in row.instances), *row.data.values()}
    )
    output.table(
        ("COMPONENT", "KIND", "SIZE", "DEVICES", "SHA256"),
        [
            (output.target(each.target), each.kind, output.size(each.length), str(runs[each.target]), each.sha256[:16])
            for each in found
        ],
        empty="Nothing is published yet: 'fleet push FILE --group G' publishes a component.",
        noun="components",
    )
    return Exit.OK


for _each in (inspect, check, compose):
    component.add_command(_each)
