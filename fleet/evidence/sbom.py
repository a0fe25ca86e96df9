"""Packages of a component: from bills of materials, and from lists that a toolchain embeds.

Bills of materials are CycloneDX 1.x and SPDX (2.2, 2.3, 3.0) as JSON. Built-in lists are cargo-auditable's `.dep-v0`
custom sections: zlib-compressed JSON in the component or in any module or component nested in it, covered by the
component's own hash. Packages are named by package URL (purl) where there is one.

Documents are untrusted: sizes are bounded before and after decompression, and every failure is a `DocumentError`.
"""

import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final, TypeVar

import msgspec
from packageurl import PackageURL

from fleet.component import binary
from fleet.protocol import wire
from fleet.protocol.manifest import CYCLONEDX, MAX_BYTES, SPDX

T = TypeVar("T")

_NOTHING = frozenset({"", "NOASSERTION", "NONE", "unknown", "UNKNOWN"})

PACKAGES_MAX: Final = 200_000
_NOT_PACKAGES: Final = frozenset({"file", "data", "machine-learning-model", "cryptographic-asset"})

SECTION: Final = ".dep-v0"
INFLATED_MAX_BYTES: Final = 8 * 1024 * 1024
_DEPTH_MAX: Final = 32

_CUSTOM, _CORE_MODULE, _NESTED = 0, 1, 4


class DocumentError(ValueError):
    """The document is of another kind, or damaged. The message says what is wrong and what to do."""


def load(data: bytes, what: str) -> dict[str, Any]:
    """Parse the JSON object in `data`.

    Args:
        data: the whole file.
        what: name of the document in messages.

    Raises:
        DocumentError: empty, too large, not JSON, or no object.
    """
    if not data.strip():
        raise DocumentError(f"{what} is empty: did the tool that writes it fail?")
    if len(data) > MAX_BYTES:
        raise DocumentError(f"{what} has {len(data)} bytes, at most {MAX_BYTES >> 20} MiB are kept")
    head = data.lstrip()[:64]
    if head.startswith(b"<"):
        raise DocumentError(f"{what} is XML: have the tool write JSON")
    if head.startswith((b"SPDXVersion:", b"SPDXID:")):
        raise DocumentError(f"{what} is SPDX in tag-value form: have the tool write JSON")
    try:
        value = msgspec.json.decode(data)
    except wire.JSON_ERRORS as error:
        raise DocumentError(f"{what} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise DocumentError(f"{what} is JSON, but not an object")
    return value


def convert(value: object, kind: type[T], what: str) -> T:
    """Convert a part of a document to `kind`. Raises `DocumentError`, which names the field."""
    try:
        return msgspec.convert(value, kind)
    except (msgspec.ValidationError, RecursionError) as error:
        raise DocumentError(f"{what}: {error}") from error


@dataclass(frozen=True, slots=True, order=True)
class Package:
    """Package in a component.

    Attributes:
        name: without its namespace.
        version: as written; empty where the list does not say.
        type: the purl's type (`cargo`, `npm`, `pypi`, `golang`, `deb`), empty where there is no purl.
        namespace: the purl's, such as `@scope` or `github.com/owner`; empty for none.
    """

    name: str
    version: str
    type: str = ""
    namespace: str = ""

    def __str__(self) -> str:
        full = f"{self.namespace}/{self.name}" if self.namespace else self.name
        return f"{full} {self.version}".rstrip() + (f" ({self.type})" if self.type else "")


def package(name: object, version: object, purl: object = None, group: object = None) -> Package | None:
    """Read a package from the fields of a list; None where they name none. A malformed purl is ignored."""
    if isinstance(purl, str) and purl:
        try:
            found = from_purl(purl)
        except DocumentError:
            pass
        else:
            return found if found.version else Package(found.name, text(version), found.type, found.namespace)
    if not text(name):
        return None
    return Package(text(name), text(version), "", text(group))


def from_purl(purl: str) -> Package:
    """Parse a package URL, such as `pkg:cargo/serde@1.0.200`. Raises `DocumentError`."""
    try:
        found = PackageURL.from_string(purl)
    except (ValueError, TypeError) as error:
        raise DocumentError(f"{purl[:100]!r} is not a package URL: {error}") from error
    return Package(found.name, text(found.version), found.type, found.namespace or "")


def text(value: object) -> str:
    """Return a field as text; empty where it is missing or says that nothing is known."""
    found = value.strip() if isinstance(value, str) else ""
    return "" if found in _NOTHING else found


def folded(name: str, kind: str) -> str:
    """Fold a name as its ecosystem compares it: no case; `-`, `_` and `.` alike for pypi, `-` and `_` for cargo."""
    name = name.casefold()
    if kind == "pypi":
        return re.sub(r"[-_.]+", "-", name)
    return name.replace("_", "-") if kind in {"cargo", ""} else name


@dataclass(frozen=True, slots=True)
class Sbom:
    """Bill of materials.

    Attributes:
        kind: `cyclonedx` or `spdx`.
        format: name and version, `CycloneDX 1.6`.
        packages: sorted, each once, with the described component itself where it is listed.
        described: sha256 in hex of the described file; empty where there is none.
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
    value = load(data, file_name)
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
        raise DocumentError(f"{file_name} is CycloneDX of specVersion {str(version)[:20]!r}: only 1.x is supported")
    metadata = value.get("metadata")
    about = metadata.get("component") if isinstance(metadata, dict) else None
    components = convert(value.get("components", []), list[dict[str, Any]], f"{file_name}: components")
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
    """Yield components at any depth: a library may list its own dependencies."""
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
        raise DocumentError(f"{file_name} is {version[:20]!r}: only SPDX-2.2, SPDX-2.3 and 3.0 are supported")
    listed = convert(value.get("packages", []), list[dict[str, Any]], f"{file_name}: packages")

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


class _Crate(msgspec.Struct):
    name: str
    version: str


def read_embedded(data: bytes) -> tuple[Package, ...] | None:
    """Read the packages in a component's embedded lists; None where it has no list.

    Raises:
        DocumentError: a section that cannot be read.
    """
    try:
        sections = _sections(data)
    except binary.DamagedError as error:
        raise DocumentError(f"a damaged component: {error}") from error
    if not sections:
        return None
    return tuple(sorted({crate for section in sections for crate in _crates(section)}))


def _crates(section: bytes) -> list[Package]:
    try:
        inflate = zlib.decompressobj()
        text = inflate.decompress(section, INFLATED_MAX_BYTES)
    except zlib.error as error:
        raise DocumentError(f"its section {SECTION} is not compressed by zlib: {error}") from error
    if not inflate.eof:
        raise DocumentError(f"its section {SECTION} is cut off, or inflates to more than {INFLATED_MAX_BYTES} bytes")
    value = load(text, f"its section {SECTION}")
    crates = convert(value.get("packages"), list[_Crate], f"its section {SECTION}: packages")
    return [Package(crate.name, crate.version, "cargo") for crate in crates]


def _sections(data: bytes) -> list[bytes]:
    """Return the contents of all `.dep-v0` sections, at any depth."""
    found = []
    budget = binary.Budget()
    todo = [(0, len(data), 0)]
    seen = 0
    while todo:
        start, end, depth = todo.pop()
        module = data[start : start + binary.PREAMBLE_BYTES] == binary.MODULE
        for section in binary.sections(data, start, end):
            seen += 1
            if seen > binary.SECTIONS_MAX or depth > _DEPTH_MAX:
                raise binary.DamagedError("too many sections, or nested too deep")
            if section.id == _CUSTOM:
                cursor = section.cursor(data, budget)
                if cursor.name() == SECTION:
                    found.append(data[cursor.at : section.end])
            elif not module and section.id in {_CORE_MODULE, _NESTED}:
                todo.append((section.start, section.end, depth + 1))
    return found
