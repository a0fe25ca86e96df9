"""A component and its manifest, read from disk and held against each other, before anybody is asked anything."""

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec

from fleet.cli.base import Exit, Fault
from fleet.cli.evidence import Attached, attached
from fleet.protocol import author, caps, component, names
from fleet.protocol.component import Component
from fleet.protocol.evidence import MAX_BYTES
from fleet.protocol.manifest import BadManifestError, Manifest
from fleet.protocol.toml_table import FILE_NAME


@dataclass(frozen=True, slots=True)
class Prepared:
    """A component that may be published: read, and every import granted by its manifest.

    Attributes:
        file: the component's.
        data: its bytes.
        component: what it says of itself.
        manifest: as written or inferred; the version is `author.DEV_VERSION` when none was given.
        manifest_file: where it was written, None for inferred.
        attached: what is to be bound to it and kept beside it.
    """

    file: Path
    data: bytes
    component: Component
    manifest: Manifest
    manifest_file: Path | None
    attached: tuple[Attached, ...] = ()

    @property
    def sha256(self) -> str:
        """Of the bytes, in hex."""
        return hashlib.sha256(self.data).hexdigest()


def prepare(file: Path, *, manifest_file: Path | None = None, name: str = "", version: str = "") -> Prepared:
    """Read a component and its manifest.

    Args:
        file: the component.
        manifest_file: its `component.toml`; None for one beside it, or none at all.
        name: replaces the manifest's.
        version: replaces the manifest's.

    Raises:
        Fault: unreadable, not a component, a bad manifest, or an import that it does not grant.
    """
    data = read_component(file)
    found = manifest_file or beside(file)
    text = None if found is None else read_file(found, author.TOML_MAX_CHARS * 4).decode("utf-8", errors="replace")
    try:
        shape = component.read(data, file_name=file.name)
        if version:
            names.check_version(version)
        manifest = author.describe(shape, text, file_name=file.name)
        changes = {key: value for key, value in (("name", name), ("version", version)) if value}
        if name:
            names.check_label(name, "component")
    except author.NeedsTomlError as error:
        raise Fault(str(error), code=Exit.USAGE, extra=_to_save(file, error.suggestion)) from None
    except BadManifestError as error:
        raise Fault(_named(str(error), found)) from None
    except (component.NotAComponentError, names.BadNameError) as error:
        raise Fault(str(error)) from None
    return Prepared(file, data, shape, msgspec.structs.replace(manifest, **changes), found)


def read_component(file: Path) -> bytes:
    """A component's bytes; raises `Fault`."""
    return read_file(file, caps.ARTIFACT_MAX_BYTES)


def attach(prepared: Prepared, *, sbom: Path | None, provenance: Path | None) -> Prepared:
    """With a bill of materials and build provenance beside it.

    Raises:
        Fault: unreadable, not what it is given as, or about other bytes.
    """
    files = {path: read_file(path, MAX_BYTES) for path in (sbom, provenance) if path is not None}
    found = attached(
        sbom=None if sbom is None else (sbom.name, files[sbom]),
        provenance=None if provenance is None else (provenance.name, files[provenance]),
        sha256=prepared.sha256,
        component=prepared.file.name,
    )
    return replace(prepared, attached=found)


def beside(file: Path) -> Path | None:
    """The manifest that lies beside a component, if any."""
    return next((path for name in author.beside(file.name) if (path := file.with_name(name)).is_file()), None)


def read_file(file: Path, most: int) -> bytes:
    """At most `most` bytes of a file, and one more where it has more; raises `Fault`."""
    try:
        with file.open("rb") as stream:
            return stream.read(most + 1)
    except FileNotFoundError:
        raise Fault(f"{file} does not exist", "", "check the path") from None
    except IsADirectoryError:
        raise Fault(f"{file} is a directory", "one file is wanted", f"name a file in {file}") from None
    except OSError as error:
        raise Fault(f"cannot read {file}", (error.strerror or str(error)).lower(), "check its permissions") from None


def _to_save(file: Path, suggestion: str) -> str:
    return f"# save this as {file.with_name(FILE_NAME)}\n{suggestion.rstrip()}\n"


def _named(message: str, found: Path | None) -> str:
    """The message with the path of the manifest that was read in place of its usual name."""
    if found is None or not message.startswith(FILE_NAME):
        return message
    return f"{found}{message.removeprefix(FILE_NAME)}"
