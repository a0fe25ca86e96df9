"""Bills of materials and build provenance bound to a component; `fleet sbom show`.

Before publishing, files are read and compared with the component. Later they are fetched and compared with the hashes
that the publisher signed.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import click

from fleet.cli import output
from fleet.cli.base import FORCE_OPTION, Exit, Fault, Group, Options, command, new_file_option, write_file
from fleet.cli.operator import load_operator
from fleet.cli.trust_store import TrustStore
from fleet.client import Client, ProblemError
from fleet.evidence import provenance, sbom
from fleet.evidence.provenance import Provenance
from fleet.evidence.sbom import DocumentError, Package
from fleet.protocol import files
from fleet.protocol.manifest import PROVENANCE, SBOMS, Evidence
from signing.policy import Release

_NOT_FOUND: Final = 404

_SHOWN: Final = 20


@dataclass(frozen=True, slots=True)
class Attached:
    """File bound to a component: its signed description, its bytes, and a summary in a few words."""

    evidence: Evidence
    data: bytes
    said: str


def attached(
    *, sbom: tuple[str, bytes] | None, provenance: tuple[str, bytes] | None, sha256: str, component: str
) -> tuple[Attached, ...]:
    """Check files given as a bill of materials and as provenance of a component.

    Args:
        sbom: file name and bytes.
        provenance: file name and bytes.
        sha256: of the component, in hex.
        component: its file name.

    Raises:
        Fault: a file is of another kind, or describes other bytes.
    """
    try:
        found = []
        if sbom is not None:
            found.append(_bill(*sbom, sha256, component))
        if provenance is not None:
            found.append(_built(*provenance, sha256, component))
    except DocumentError as error:
        raise Fault(str(error)) from None
    return tuple(found)


def _bill(name: str, data: bytes, sha256: str, component: str) -> Attached:
    bill = sbom.read(data, file_name=name)
    if bill.described and bill.described != sha256:
        raise Fault(
            f"{name} is the SBOM of other bytes",
            f"it describes sha256 {bill.described[:12]}, and {component} is {sha256[:12]}",
            "write it again for this build",
        )
    return Attached(_evidence(bill.kind, data), data, f"SBOM of {len(bill.packages)} packages")


def _built(name: str, data: bytes, sha256: str, component: str) -> Attached:
    built = provenance.read(data, file_name=name)
    if sha256 not in built.subjects:
        named = ", ".join(f"{what or 'a file'} ({digest[:12]})" for digest, what in list(built.subjects.items())[:3])
        raise Fault(
            f"{name} is the provenance of other bytes",
            f"it is about {named}, and {component} is sha256 {sha256[:12]}",
            "publish exactly the file that was built",
        )
    return Attached(_evidence(PROVENANCE, data), data, f"provenance by {built.builder}")


def _evidence(kind: str, data: bytes) -> Evidence:
    return Evidence(kind=kind, sha256=hashlib.sha256(data).hexdigest(), length=len(data))


@dataclass(frozen=True, slots=True)
class Contents:
    """Packages of a release.

    Attributes:
        packages: None where there is no list of them.
        source: origin of the list: `CycloneDX 1.6`, `built in (.dep-v0)`; else the reason why there is none.
    """

    packages: tuple[Package, ...] | None
    source: str


class Shelf:
    """Evidence of releases, fetched once and accepted only with the signed length and hash.

    Args:
        client: a connection to the server.
        directory: cache of files, named by their hash.
    """

    def __init__(self, client: Client, directory: Path) -> None:
        self._client, self._directory = client, directory
        self._contents: dict[str, Contents] = {}

    def contents(self, release: Release) -> Contents:
        """List the packages of a release, from its bill of materials, else from what its toolchain built into it."""
        known = self._contents.get(release.name.path)
        if known is None:
            known = self._contents[release.name.path] = self._read(release)
        return known

    def _read(self, release: Release) -> Contents:
        bound = next((each for each in release.evidence if each.kind in SBOMS), None)
        try:
            if bound is not None:
                bill = sbom.read(self.fetch(bound.sha256, bound.length))
                return Contents(bill.packages, bill.format)
            crates = sbom.read_embedded(self.fetch(release.sha256, release.length))
        except (DocumentError, Fault) as error:
            return Contents(None, str(error))
        return Contents(None, "no SBOM") if crates is None else Contents(crates, f"built in ({sbom.SECTION})")

    def provenance(self, release: Release) -> Provenance | None:
        """Read a release's provenance that its publisher bound; None when there is none. Raises `Fault`."""
        bound = next((each for each in release.evidence if each.kind == PROVENANCE), None)
        if bound is None:
            return None
        try:
            return provenance.read(self.fetch(bound.sha256, bound.length))
        except DocumentError as error:
            raise Fault(str(error), code=Exit.REFUSED) from None

    def fetch(self, sha256: str, length: int) -> bytes:
        """Fetch a file by its signed hash and length. Raises `Fault` when the server has lost or changed it."""
        kept = self._directory / sha256
        try:
            data = kept.read_bytes()
        except FileNotFoundError:
            pass
        else:
            if hashlib.sha256(data).hexdigest() == sha256:
                return data
        try:
            fetched = self._client.artifact(sha256)
        except ProblemError as error:
            if error.problem.status != _NOT_FOUND:
                raise
            raise Fault(
                "the server has lost a published file", f"it has no artifact {sha256[:12]}", code=Exit.REFUSED
            ) from None
        if len(fetched) != length or hashlib.sha256(fetched).hexdigest() != sha256:
            raise Fault(
                "the server sent other bytes than were signed",
                f"artifact {sha256[:12]} has {len(fetched)} bytes with another hash",
                "find out who changed them",
                code=Exit.REFUSED,
            )
        self._directory.mkdir(parents=True, exist_ok=True)
        files.atomic_write(kept, fetched, mode=0o644)
        return fetched


@click.group("sbom", cls=Group)
def boms() -> None:
    """Show what a published component contains, and who built it."""


@command(
    "show",
    examples="fleet sbom show hello@1.4.0\n"
    "fleet sbom show acme/hello@1.4.0 --json\n"
    "fleet sbom show hello@1.4.0 --save hello.cdx.json",
)
@click.argument("target", metavar="NAME@VERSION")
@new_file_option("--save", metavar="FILE", help="Write the published SBOM to this file")
@new_file_option("--save-provenance", metavar="FILE", help="Write the published provenance to this file")
@FORCE_OPTION
def show(options: Options, *, target: str, save: Path | None, save_provenance: Path | None) -> None:
    """Show the packages in a published component and the provenance bound to it.

    Everything is checked against the hashes that the publisher signed. The signature of the provenance itself is not
    verified.
    """
    who = load_operator(options)
    name = who.target(target)
    with who.client() as client:
        release = TrustStore(who, client, expired=True).published(name.path)
        if release is None:
            raise Fault(f"{name} is not published", "", "'fleet components' lists what is", code=Exit.REFUSED)
        shelf = Shelf(client, who.trust / "evidence")
        for path, kinds in ((save, SBOMS), (save_provenance, frozenset({PROVENANCE}))):
            if path is not None:
                _save(shelf, release, kinds, path)
        contents, built = shelf.contents(release), shelf.provenance(release)
    if options.json:
        output.show_json(_as_json(release, contents, built))
    else:
        _tell(options, release, contents, built)


def _save(shelf: Shelf, release: Release, kinds: frozenset[str], path: Path) -> None:
    bound = next((each for each in release.evidence if each.kind in kinds), None)
    if bound is None:
        what = "provenance" if PROVENANCE in kinds else "SBOM"
        raise Fault(f"{release.name} was published without {what}", "", code=Exit.REFUSED)
    data = shelf.fetch(bound.sha256, bound.length)
    write_file(path, data)


def _tell(options: Options, release: Release, contents: Contents, built: Provenance | None) -> None:
    packages = contents.packages
    shown = packages or ()
    if not options.quiet and len(shown) > _SHOWN and output.console().is_terminal:
        shown = shown[:_SHOWN]
    more = len(packages or ()) - len(shown)
    output.facts(
        [
            ("component", f"{release.name}, {output.size(release.length)}, sha256 {release.sha256}"),
            ("packages", contents.source if packages is None else f"{len(packages)}, by {contents.source}"),
            ("", (*map(str, shown), *([f"and {more} more: --json lists all"] if more else []))),
            ("built by", "unknown: published without provenance" if built is None else built.builder),
            ("how", "" if built is None else built.build_type),
            ("from", "" if built is None else built.sources),
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
