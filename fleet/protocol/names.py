"""Names and members of a bundle: built, checked, parsed.

Pure functions over strings. Every name that crosses the wire, a file system or a signature is checked here and
nowhere else, so that other modules need not consider slashes, dots or case.

An offline bundle is a plain tar with everything that a device would fetch over the network. The device trusts nothing
for being in a bundle: metadata, assignments and artifacts are the bytes that the server serves, verified in the same
way.

    bundle.json             version of this layout
    desired/<device>.json   one assignment envelope per device
    tuf/<file>              metadata, named as in the repository
    artifacts/<sha256>      components and data packages
    secrets/<sha256>        sealed boxes, each of which only its own device can open
"""

import functools
import hashlib
import re
from dataclasses import dataclass
from typing import Final

from fleet.protocol import bounds

_LABEL: Final = re.compile(r"[a-z0-9-]{1,63}")
_DEVICE: Final = re.compile(r"[a-z0-9-]{1,54}-[0-9a-f]{8}")
_SEMVER: Final = re.compile(
    r"(0|[1-9]\d*)\.(0|[1-9]\d*)\.(0|[1-9]\d*)"
    r"(?:-((?:0|[1-9]\d*|\d*[a-zA-Z-][0-9a-zA-Z-]*)(?:\.(?:0|[1-9]\d*|\d*[a-zA-Z-][0-9a-zA-Z-]*))*))?"
    r"(?:\+([0-9a-zA-Z-]+(?:\.[0-9a-zA-Z-]+)*))?"
)
_SECRET: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_SHA256: Final = re.compile(r"[0-9a-f]{64}")
MAX_VERSION_CHARS: Final = 64

ARCHES: Final = ("x86_64", "aarch64", "riscv64")
"""CPUs of devices, as devices report them and manifests name them."""


class BadNameError(ValueError):
    """A name that does not follow the rules; the message says which rule, in one sentence."""


def check_label(value: str, what: str) -> str:
    """Return `value` if it is a valid name of a `what` (component, namespace, instance, group, fleet).

    Raises:
        BadNameError: it does not match `[a-z0-9-]{1,63}`.
    """
    if _LABEL.fullmatch(value) is None:
        raise BadNameError(f"{what} {value[:80]!r} is not a name: use 1 to 63 of a-z, 0-9 and '-'")
    return value


def check_device(value: str) -> str:
    """Return `value` if it is a device id, `<name>-<8 hex digits of the key's hash>`.

    Raises:
        BadNameError: it is not.
    """
    if _DEVICE.fullmatch(value) is None:
        raise BadNameError(f"device id {value[:80]!r} is not of the form <name>-<8 hex digits>")
    return value


def is_device(value: str) -> bool:
    """Tell whether `value` is a device id."""
    return _DEVICE.fullmatch(value) is not None


def check_secret(value: str) -> str:
    """Return `value` if it is the name of a secret, which a guest reads like a configuration key.

    Raises:
        BadNameError: it is not.
    """
    if _SECRET.fullmatch(value) is None:
        raise BadNameError(f"secret {value[:80]!r} is not a name: use 1 to 64 of A-Z a-z 0-9 . _ -")
    return value


def check_config_key(value: str) -> str:
    """Return `value` if it is a configuration key.

    Raises:
        BadNameError: it is not.
    """
    if _SECRET.fullmatch(value) is None:
        raise BadNameError(f"{value[:80]!r} is not a key: 1 to 64 of A-Z a-z 0-9 . _ -")
    return value


def check_sha256(value: str) -> str:
    """Return `value` if it is a sha256 in 64 lower-case hex digits.

    Raises:
        BadNameError: it is not.
    """
    if _SHA256.fullmatch(value) is None:
        raise BadNameError(f"{value[:80]!r} is not a sha256 in 64 lower-case hex digits")
    return value


def check_version(value: str) -> str:
    """Return `value` if it is a version by Semantic Versioning 2.0.0.

    Raises:
        BadNameError: it is not, or is longer than 64 characters.
    """
    if len(value) > MAX_VERSION_CHARS or _SEMVER.fullmatch(value) is None:
        raise BadNameError(f"version {value[:80]!r} is not SemVer, such as 1.2.3 or 1.2.3-rc.1")
    return value


VersionKey = tuple[int, int, int, int, tuple[tuple[int, int, str], ...]]


def version_key(value: str) -> VersionKey:
    """Return a key that sorts versions by precedence (Semantic Versioning 2.0.0, section 11).

    Raises:
        BadNameError: `value` is not SemVer.
    """
    match = _SEMVER.fullmatch(check_version(value))
    assert match is not None
    major, minor, patch, pre, _build = match.groups()
    parts = tuple((0, int(part), "") if part.isdigit() else (1, 0, part) for part in (pre.split(".") if pre else []))
    return int(major), int(minor), int(patch), 0 if pre else 1, parts


_PATH: Final = re.compile(
    r"(?<![\w./-])components/([a-z0-9-]{1,63})/([a-z0-9-]{1,63})/([0-9A-Za-z.+-]{1,100}?)\.wasm(?![\w/])"
)


def readable(text: str) -> str:
    """Return a text in which targets' paths are written as `namespace/name@version`, as people write them."""
    return _PATH.sub(r"\1/\2@\3", text)


@dataclass(frozen=True, slots=True, order=True)
class TargetName:
    """A target's name: `components/<namespace>/<name>/<version>.wasm` in TUF, `namespace/name@version` to people."""

    namespace: str
    name: str
    version: str

    def __post_init__(self) -> None:
        check_label(self.namespace, "namespace")
        check_label(self.name, "component")
        check_version(self.version)

    @property
    def path(self) -> str:
        """TUF target path."""
        return f"components/{self.namespace}/{self.name}/{self.version}.wasm"

    @property
    def component(self) -> str:
        """Component without version, `namespace/name`: the scope of versions and security epochs."""
        return f"{self.namespace}/{self.name}"

    def __str__(self) -> str:
        return f"{self.namespace}/{self.name}@{self.version}"

    @classmethod
    def from_path(cls, path: str) -> "TargetName":
        """Parse a TUF target path. Raises `BadNameError`."""
        parts = path.split("/")
        if len(parts) != 4 or parts[0] != "components" or not parts[3].endswith(".wasm"):  # noqa: PLR2004
            raise BadNameError(f"target path {path[:200]!r} is not components/<namespace>/<name>/<version>.wasm")
        return cls(parts[1], parts[2], parts[3].removesuffix(".wasm"))

    @classmethod
    def parse(cls, text: str, *, namespace: str) -> "TargetName":
        """Parse `name@version` or `namespace/name@version` as people write it. Raises `BadNameError`."""
        head, at, version = text.partition("@")
        if not at:
            raise BadNameError(f"{text!r} names no version: write NAME@VERSION, such as {text}@1.0.0")
        space, slash, name = head.partition("/")
        return cls(space, name, version) if slash else cls(namespace, head, version)


@functools.lru_cache(maxsize=16_384)
def shard(device: str) -> str:
    """Return the first two hex digits of sha256(device id), by which server processes divide the fleet."""
    return hashlib.sha256(device.encode()).hexdigest()[:2]


def fingerprint_of(device: str) -> str:
    """Return the end of a device id: the first 8 hex digits of the sha256 of its public key."""
    return check_device(device).rpartition("-")[2]


def device_id(name: str, public_key_der: bytes) -> str:
    """Return the id of a device: its name and the first 8 hex digits of the sha256 of its public key.

    Args:
        name: what the owner calls the device (its host name by default).
        public_key_der: the key as SubjectPublicKeyInfo, DER (RFC 5280, section 4.1.2.7).
    """
    return check_device(f"{name}-{hashlib.sha256(public_key_der).hexdigest()[:8]}")


HEAD: Final = "bundle.json"
VERSION: Final = 1
MEMBERS_MAX: Final = 20_000
_NAME: Final = re.compile(
    r"bundle\.json"
    r"|desired/[a-z0-9][a-z0-9-]{0,80}\.json"
    r"|tuf/(?:timestamp|[1-9][0-9]{0,15}\.[a-z0-9-]{1,80}(?:\.bins-[0-9a-f]{1,3})?)\.json"
    r"|(?:artifacts|secrets)/[0-9a-f]{64}"
)


def desired(device: str) -> str:
    """Return the member with a device's assignment."""
    return f"desired/{device}.json"


def metadata(file: str) -> str:
    """Return the member with a metadata file."""
    return f"tuf/{file}"


def artifact(sha256: str) -> str:
    """Return the member with a component or a data package."""
    return f"artifacts/{sha256}"


def secret(sha256: str) -> str:
    """Return the member with a sealed secret."""
    return f"secrets/{sha256}"


def max_bytes(name: str) -> int:
    """Return the largest size of a member in bytes; 0 for a name that no bundle has."""
    if not _NAME.fullmatch(name):
        return 0
    match name.partition("/")[0]:
        case "artifacts":
            return bounds.DATA_MAX_BYTES
        case "tuf":
            return bounds.TARGETS_MAX_BYTES
        case "secrets":
            return bounds.SECRET_BOX_MAX_BYTES
        case "desired":
            return bounds.DESIRED_MAX_BYTES
        case _:
            return bounds.KIB
