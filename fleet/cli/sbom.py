"""`fleet sbom show`: what is in a published component, and who built it, as its publisher signed it."""

from pathlib import Path
from typing import Final

import click

from fleet.cli import out
from fleet.cli.base import Exit, Fault, Options, command
from fleet.cli.evidence import Contents, Shelf
from fleet.cli.home import operator
from fleet.cli.trust import Trust
from fleet.evidence.provenance import Provenance
from fleet.protocol.evidence import PROVENANCE, SBOMS
from fleet.protocol.names import BadNameError, TargetName
from signing.policy import Release

_SHOWN: Final = 20


@click.group("sbom")
def boms() -> None:
    """See what is in a published component, and who built it."""


@command(
    "show",
    examples="fleet sbom show hello@1.4.0\n"
    "fleet sbom show acme/hello@1.4.0 --json\n"
    "fleet sbom show hello@1.4.0 --save hello.cdx.json",
)
@click.argument("target", metavar="NAME@VERSION")
@click.option("--save", type=click.Path(path_type=Path), metavar="FILE", help="Write the SBOM as it was published")
@click.option(
    "--save-provenance", type=click.Path(path_type=Path), metavar="FILE", help="Write the provenance as published"
)
def show(options: Options, *, target: str, save: Path | None, save_provenance: Path | None) -> None:
    """Show the packages in a published component and the provenance bound to it.

    Everything is held against the hashes that the publisher signed. Who signed the provenance itself is not judged.
    """
    who = operator(options)
    try:
        name = TargetName.parse(target, namespace=who.namespace)
    except BadNameError as error:
        raise Fault(str(error)) from None
    with who.client() as client:
        release = Trust(who, client, expired=True).published(name.path)
        if release is None:
            raise Fault(f"{name} is not published", "", "'fleet groups' and 'fleet devices' list what runs")
        shelf = Shelf(client, who.trust / "evidence")
        for path, kinds in ((save, SBOMS), (save_provenance, frozenset({PROVENANCE}))):
            if path is not None:
                _save(shelf, release, kinds, path)
        contents, built = shelf.contents(release), shelf.provenance(release)
    if options.json:
        out.show_json(_as_json(release, contents, built))
    else:
        _tell(options, release, contents, built)


def _save(shelf: Shelf, release: Release, kinds: frozenset[str], path: Path) -> None:
    bound = next((each for each in release.evidence if each.kind in kinds), None)
    if bound is None:
        what = "provenance" if PROVENANCE in kinds else "SBOM"
        raise Fault(f"{release.name} was published without {what}", "", code=Exit.REFUSED)
    data = shelf.fetch(bound.sha256, bound.length)
    try:
        path.write_bytes(data)
    except OSError as error:
        raise Fault(f"cannot write {path}", (error.strerror or str(error)).lower(), "check the path") from None


def _tell(options: Options, release: Release, contents: Contents, built: Provenance | None) -> None:
    packages = contents.packages
    shown = packages or ()
    if not options.quiet and len(shown) > _SHOWN and out.console().is_terminal:
        shown = shown[:_SHOWN]
    more = len(packages or ()) - len(shown)
    out.facts(
        [
            ("component", f"{release.name}, {out.size(release.length)}, sha256 {release.sha256}"),
            ("packages", contents.source if packages is None else f"{len(packages)}, by {contents.source}"),
            ("", "\n".join([*map(str, shown), *([f"and {more} more: --json lists all"] if more else [])])),
            ("built by", "nobody says: published without provenance" if built is None else built.builder),
            ("how", "" if built is None else built.build_type),
            ("from", "" if built is None else "\n".join(built.sources)),
            (
                "envelope",
                "" if built is None else "signed, not verified here" if built.signed else "none: a bare statement",
            ),
        ]
    )


def _as_json(release: Release, contents: Contents, built: Provenance | None) -> dict[str, object]:
    packages = contents.packages
    return {
        "target": release.name.path,
        "sha256": release.sha256,
        "evidence": list(release.evidence),
        "source": contents.source,
        "packages": None
        if packages is None
        else [
            {"name": each.name, "version": each.version, "type": each.type, "namespace": each.namespace}
            for each in packages
        ],
        "provenance": None
        if built is None
        else {
            "builder": built.builder,
            "build_type": built.build_type,
            "sources": list(built.sources),
            "signed": built.signed,
        },
    }


boms.add_command(show)
