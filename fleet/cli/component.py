"""`fleet component inspect`: what a component file is, before anybody signs it."""

from pathlib import Path

import click
import msgspec

from fleet.cli import out
from fleet.cli.base import Exit, Fault, Options, command
from fleet.cli.prepare import beside, read_component
from fleet.protocol import author, toml_text
from fleet.protocol import component as reader
from fleet.protocol.manifest import BadManifestError
from fleet.protocol.toml_table import FILE_NAME


@click.group("component")
def component() -> None:
    """Look into a component file."""


@command(
    "inspect",
    examples="fleet component inspect hello.wasm\nfleet component inspect hello.wasm --toml > component.toml",
)
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--toml", is_flag=True, help="Print only the component.toml that grants all its imports")
def inspect(options: Options, *, file: Path, toml: bool) -> Exit:
    """Show what FILE imports and exports, and the manifest it has or would need."""
    data = read_component(file)
    found = beside(file)
    try:
        shape = reader.read(data, file_name=file.name)
        text = None if found is None else found.read_text(encoding="utf-8", errors="replace")
        manifest = author.describe(shape, text, file_name=file.name)
    except reader.NotAComponentError as error:
        raise Fault(str(error)) from None
    except author.NeedsTomlError as error:
        suggestion, problem = error.suggestion, str(error)
        missing = True
    except BadManifestError as error:
        raise Fault(str(error).replace(FILE_NAME, str(found or FILE_NAME), 1)) from None
    else:
        suggestion = toml_text.render(manifest, leave_out_version=author.DEV_VERSION)
        problem, missing = "", False
    if toml:
        click.echo(suggestion.rstrip())
        return Exit.OK
    if options.json:
        facts = msgspec.to_builtins(shape)
        assert isinstance(facts, dict)
        out.show_json({**facts, "problem": problem, "component_toml": suggestion})
        return Exit.OK
    out.facts(
        [
            ("component", f"{file}, {out.size(shape.size_bytes)}"),
            ("imports", "\n".join(shape.imports) or "nothing"),
            ("exports", "\n".join(shape.exports) or "nothing"),
            ("holds", f"{len(shape.modules)} core modules, {shape.components} components"),
            ("made by", "\n".join(shape.producers)),
            ("manifest", str(found) if found else "none beside it"),
            ("problem", problem),
        ]
    )
    click.echo("\nA component.toml that would do:\n" if missing else "\nAs component.toml:\n")
    for line in suggestion.rstrip().splitlines():
        click.echo(f"    {line}".rstrip())
    return Exit.OK


component.add_command(inspect)
