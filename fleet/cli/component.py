"""`fleet component`: inspect a component file before anybody signs it, and compose it as a device does."""

from pathlib import Path

import click
import msgspec

from fleet.cli import output
from fleet.cli.base import Exit, Fault, Group, Options, command, read_file, write_file
from fleet.component import component_toml, reader, wasi
from fleet.component import compose as composer
from fleet.component.toml_fields import FILE_NAME
from fleet.protocol import bounds
from fleet.protocol.manifest import BadManifestError
from fleet.protocol.printable import printable


@click.group("component", cls=Group)
def component() -> None:
    """Inspect a component file, or put it into its adapter."""


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
    if toml:
        click.echo(printable(suggestion.rstrip(), lines=True))
        return Exit.OK
    if options.json:
        facts = msgspec.to_builtins(shape)
        assert isinstance(facts, dict)
        output.show_json({**facts, "problem": problem, "component_toml": suggestion})
        return Exit.OK
    output.facts(
        [
            ("component", f"{file}, {output.size(shape.size_bytes)}"),
            ("imports", shape.imports or "nothing"),
            ("exports", shape.exports or "nothing"),
            ("holds", f"{len(shape.modules)} core modules, {shape.components} components"),
            ("made by", shape.producers),
            ("manifest", str(found) if found else "none beside it"),
            ("problem", problem),
        ]
    )
    if not suggestion:
        return Exit.OK
    click.echo("\nA sufficient component.toml:\n" if missing else "\nAs component.toml:\n")
    for line in suggestion.rstrip().splitlines():
        click.echo(printable(f"    {line}".rstrip()))
    return Exit.OK


@command("compose", examples="fleet component compose server.wasm -o whole.wasm && wasm-tools validate whole.wasm")
@click.argument("file", type=click.Path(path_type=Path))
@click.option(
    "-o",
    "--output",
    "target",
    type=click.Path(path_type=Path),
    required=True,
    metavar="FILE",
    help="Write the composed component to this file",
)
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


for _each in (inspect, compose):
    component.add_command(_each)
