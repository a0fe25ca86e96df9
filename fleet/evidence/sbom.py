"""Bills of materials: CycloneDX 1.x and SPDX (2.2, 2.3, 3.0) as JSON, read for the packages that they list."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

from fleet.evidence import document
from fleet.evidence.document import DocumentError
from fleet.evidence.packages import Package, package
from fleet.protocol.evidence import CYCLONEDX, SPDX

PACKAGES_MAX: Final = 200_000
_NOT_PACKAGES: Final = frozenset({"file", "data", "machine-learning-model", "cryptographic-asset"})


@dataclass(frozen=True, slots=True)
class Sbom:
    """A bill of materials.

    Attributes:
        kind: `cyclonedx` or `spdx`.
        format: as people call it, `CycloneDX 1.6`.
        packages: sorted, each once; the described component itself included where it is listed.
        described: the sha256 in hex of what it says it is about; empty where it does not say.
    """

    kind: str
    format: str
    packages: tuple[Package, ...]
    described: str = ""


def read(data: bytes, *, file_name: str = "the SBOM") -> Sbom:
    """Read a bill of materials.

    Raises:
        DocumentError: neither CycloneDX nor SPDX, or of a version that is not known.
    """
    value = document.load(data, file_name)
    if value.get("bomFormat") == "CycloneDX":
        return _cyclonedx(value, file_name)
    if isinstance(value.get("spdxVersion"), str):
        return _spdx(value, file_name)
    if "spdx.org/rdf/3" in str(value.get("@context", "")) and isinstance(value.get("@graph"), list):
        return _spdx3(value)
    if "predicateType" in value or "payloadType" in value or "dsseEnvelope" in value:
        raise DocumentError(f"{file_name} is an attestation, not an SBOM: give it as --provenance")
    raise DocumentError(
        f"{file_name} is neither CycloneDX (no bomFormat) nor SPDX (no spdxVersion): write the SBOM in one of them"
    )


def _cyclonedx(value: dict[str, Any], file_name: str) -> Sbom:
    version = value.get("specVersion")
    if not isinstance(version, str) or not re.fullmatch(r"1\.\d{1,2}", version):
        raise DocumentError(f"{file_name} is CycloneDX of specVersion {str(version)[:20]!r}: 1.x is read")
    metadata = value.get("metadata")
    about = metadata.get("component") if isinstance(metadata, dict) else None
    components = document.convert(value.get("components", []), list[dict[str, Any]], f"{file_name}: components")
    tree = [about, *components] if isinstance(about, dict) else components
    hashes = about.get("hashes") if isinstance(about, dict) else None
    described = next(
        (
            str(each.get("content", ""))
            for each in hashes or ()
            if isinstance(each, dict) and each.get("alg") == "SHA-256"
        ),
        "",
    )
    return Sbom(CYCLONEDX, f"CycloneDX {version}", _unique(_nested(tree), file_name), described.lower())


def _nested(tree: list[Any]) -> Iterator[Package | None]:
    """Every component at any depth: a library may list what is built into it."""
    todo = list(tree)
    while todo:
        each = todo.pop()
        if not isinstance(each, dict):
            continue
        if each.get("type") not in _NOT_PACKAGES:
            yield package(each.get("name"), each.get("version"), each.get("purl"), each.get("group"))
        inner = each.get("components")
        if isinstance(inner, list):
            todo.extend(inner)


def _spdx(value: dict[str, Any], file_name: str) -> Sbom:
    version = value["spdxVersion"]
    if not re.fullmatch(r"SPDX-2\.[23]", version):
        raise DocumentError(f"{file_name} is {version[:20]!r}: SPDX-2.2, SPDX-2.3 and 3.0 are read")
    listed = document.convert(value.get("packages", []), list[dict[str, Any]], f"{file_name}: packages")

    def found() -> Iterator[Package | None]:
        for each in listed:
            refs = each.get("externalRefs")
            purl = next(
                (
                    ref.get("referenceLocator")
                    for ref in (refs if isinstance(refs, list) else ())
                    if isinstance(ref, dict) and ref.get("referenceType") == "purl"
                ),
                None,
            )
            yield package(each.get("name"), each.get("versionInfo"), purl)

    return Sbom(SPDX, version.replace("-", " "), _unique(found(), file_name))


def _spdx3(value: dict[str, Any]) -> Sbom:
    def found() -> Iterator[Package | None]:
        for each in value["@graph"]:
            if isinstance(each, dict) and each.get("type", each.get("@type")) in {"software_Package", "Package"}:
                version = each.get("software_packageVersion", each.get("packageVersion"))
                yield package(each.get("name"), version, each.get("software_packageUrl", each.get("packageUrl")))

    return Sbom(SPDX, "SPDX 3", _unique(found(), "the SBOM"))


def _unique(packages: Iterator[Package | None], file_name: str) -> tuple[Package, ...]:
    found = {each for each in packages if each is not None}
    if len(found) > PACKAGES_MAX:
        raise DocumentError(f"{file_name} lists {len(found)} packages, at most {PACKAGES_MAX} are read")
    return tuple(sorted(found))
