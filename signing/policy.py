"""Policy for one item of an assignment: may this device run it?

Pure: what publishers signed and what the device remembers go in. Whatever the director assigns, these rules hold: bytes
and manifest come from a publisher; grants stay within the manifest, the namespace's ceiling and the device owner's
policy; a security epoch never falls.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from tuf.api.metadata import TargetFile

from fleet.protocol import bounds, manifest, names, outbound
from fleet.protocol.assignment import Item
from fleet.protocol.codes import RejectCode
from fleet.protocol.manifest import Evidence, Grants, Manifest, describe_trigger
from fleet.protocol.names import TargetName
from signing.errors import Rejected
from signing.state import VerifierState


@dataclass(frozen=True, kw_only=True)
class Release:
    """Published component: its artifact and manifest, as a publisher signed them.

    Attributes:
        name: of the target.
        manifest: the publisher's.
        length: of the artifact in bytes.
        sha256: of the artifact in hex.
        evidence: documents that the publisher bound to the release (SBOMs, provenance); not part of the policy.
    """

    name: TargetName
    manifest: Manifest
    length: int
    sha256: str
    evidence: tuple[Evidence, ...] = ()

    @cached_property
    def manifest_sha256(self) -> str:
        """Digest by which assignments, image keys and reports refer to the manifest."""
        return self.manifest.digest()


@dataclass(frozen=True, slots=True, kw_only=True)
class Resolved:
    """Item that this device may fetch and run.

    Attributes:
        item: as assigned.
        release: as the publisher signed it.
        grants: effective grants: the manifest's, narrowed by the operator.
    """

    item: Item
    release: Release
    grants: Grants

    @property
    def manifest(self) -> Manifest:
        """The publisher's manifest."""
        return self.release.manifest

    @property
    def length(self) -> int:
        """Length of the artifact in bytes."""
        return self.release.length

    @property
    def sha256(self) -> str:
        """Hash of the artifact (sha256, hex)."""
        return self.release.sha256


def release_of(path: str, target: TargetFile) -> Release:
    """Read a target from signed metadata.

    Raises:
        Rejected: MALFORMED: the name, hash, manifest or evidence does not fit the schema; TOO_LARGE.
    """
    try:
        name = TargetName.from_path(path)
        sha256 = names.check_sha256(str(target.hashes.get("sha256", "")))
        custom: Any = target.custom
        described = manifest.convert(custom["manifest"] if isinstance(custom, dict) else None)
        bound = manifest.convert_evidence(custom.get("evidence"))
    except (names.BadNameError, manifest.BadManifestError, manifest.BadEvidenceError, KeyError) as error:
        raise Rejected(RejectCode.MALFORMED, f"target {path[:200]!r}: {error}") from error
    if (described.name, described.version) != (name.name, name.version):
        raise Rejected(RejectCode.MALFORMED, f"{name} carries the manifest of {described.name}@{described.version}")
    most = bounds.DATA_MAX_BYTES if described.is_data else bounds.ARTIFACT_MAX_BYTES
    if not 0 < target.length <= most:
        raise Rejected(RejectCode.TOO_LARGE, f"{name} has {target.length} bytes, not 1 to {most}")
    return Release(name=name, manifest=described, length=target.length, sha256=sha256, evidence=bound)


def check_same(item: Item, release: Release) -> None:
    """Refuse an item that describes the target differently from its publisher.

    Raises:
        Rejected: TARGET_MISMATCH.
    """
    rows = (
        ("length", item.length, release.length),
        ("sha256", item.sha256, release.sha256),
        ("manifest", item.manifest_sha256, release.manifest_sha256),
    )
    for what, asked, signed in rows:
        if asked != signed:
            raise Rejected(
                RejectCode.TARGET_MISMATCH, f"{release.name}: the assignment's {what} {asked} is not the publisher's"
            )


def check_allowed(
    item: Item, release: Release, *, state: VerifierState, ceilings: Iterable[Grants], local: Grants | None, arch: str
) -> Grants:
    """Refuse what this device must not run, and return the grants that the instance gets.

    Args:
        item: as assigned.
        release: as the publisher signed it; `check_same` has compared it with the item.
        state: source of the committed security epochs and versions of secrets.
        ceilings: of the namespaces that delegate to the target.
        local: the device owner's policy, None for no limit.
        arch: the device's CPU (`x86_64`, `aarch64`, `riscv64`); empty to skip the check.

    Raises:
        Rejected: WRONG_ARCH, SECURITY_EPOCH, GRANT_DENIED, TOO_LARGE; MALFORMED: configuration that the manifest does
            not allow; and as `check_secrets`.
    """
    asked = release.manifest
    if asked.arch and arch and arch not in asked.arch:
        raise Rejected(
            RejectCode.WRONG_ARCH, f"{release.name} is for {', '.join(asked.arch)}, but this device is {arch}"
        )
    remembered = state.epochs.get(release.name.component, 0)
    if asked.security_epoch < remembered:
        raise Rejected(
            RejectCode.SECURITY_EPOCH,
            f"{release.name} has security epoch {asked.security_epoch}, but this device has committed {remembered}",
        )
    unknown = sorted(set(item.config) - set(asked.config))
    if unknown:
        raise Rejected(RejectCode.MALFORMED, f"{release.name} has no configuration key {unknown[0]!r}")
    for key, value in item.config.items():
        if wrong := asked.config[key].flaw(value):
            raise Rejected(RejectCode.MALFORMED, f"{release.name}: {key}={value[:80]!r} is {wrong}")
    if any(len(value.encode()) > bounds.CONFIG_VALUE_MAX_BYTES for value in item.config.values()):
        raise Rejected(
            RejectCode.TOO_LARGE,
            f"{release.name}: a configuration value is too long",
        )
    check_secrets(item, release, state)
    grants = asked.grants if item.grants is None else item.grants
    limits = [("manifest", asked.grants), *(("namespace ceiling", ceiling) for ceiling in ceilings)]
    if local is not None:
        limits.append(("device's policy", local))
    for whose, limit in limits:
        _check_within(release, grants, whose, limit)
    return grants


def check_secrets(item: Item, release: Release, state: VerifierState) -> None:
    """Refuse secrets that are undeclared, missing, or older than those this device has committed.

    Raises:
        Rejected: MALFORMED, SECRET_MISSING, ROLLBACK.
    """
    declared, given = release.manifest.secrets, {ref.name: ref for ref in item.secrets}
    unknown = sorted(given.keys() - declared.keys())
    if unknown:
        raise Rejected(RejectCode.MALFORMED, f"{release.name} declares no secret {unknown[0][:80]!r}")
    if len(given) != len(item.secrets) or len(given) > bounds.SECRETS_MAX:
        raise Rejected(RejectCode.MALFORMED, f"{item.instance}: a secret is named twice, or there are too many")
    missing = sorted(name for name, key in declared.items() if key.required and name not in given)
    if missing:
        raise Rejected(RejectCode.SECRET_MISSING, f"{release.name} needs the secret {', '.join(missing)}")
    for name, ref in given.items():
        try:
            names.check_sha256(ref.sha256)
        except names.BadNameError as error:
            raise Rejected(RejectCode.MALFORMED, f"secret {name}: {error}") from error
        known = state.secrets.get(f"{item.instance}/{name}", 0)
        if ref.version < known:
            raise Rejected(
                RejectCode.ROLLBACK,
                f"secret {name} of {item.instance} has version {ref.version}, not {known} or higher: set it again",
            )


def check_ceiling(release: Release, ceilings: Iterable[Grants]) -> None:
    """Refuse to publish a release that asks for more than its namespace's ceiling.

    Raises:
        Rejected: GRANT_DENIED.
    """
    for limit in ceilings:
        _check_within(release, release.manifest.grants, "namespace ceiling", limit)


def _check_within(release: Release, grants: Grants, whose: str, limit: Grants) -> None:
    if not grants.within(limit):
        beyond = ", ".join(_beyond(grants, limit))
        raise Rejected(RejectCode.GRANT_DENIED, f"{release.name}: the {whose} does not allow {beyond}")


def _beyond(grants: Grants, limit: Grants) -> list[str]:
    return [
        *(each for each in grants.interfaces if not limit.allows(each)),
        *(each for each in grants.outbound if not outbound.covered(each, limit.outbound)),
        *(each for each in grants.instances if each not in limit.instances),
        *grants.messages_beyond(limit),
        *grants.named_beyond(limit),
        *grants.devices.beyond(limit.devices),
    ]


def describe(release: Release, *, before: Release | None = None) -> str:
    """Describe a release for the person who signs or runs it, with the grants that it newly asks for.

    Args:
        release: the new release.
        before: the release that it replaces; None for none.
    """
    grants = release.manifest.grants
    old = Grants() if before is None else before.manifest.grants
    wanted = _describe_grants(grants)
    lines = [
        f"{release.name}, {release.length} bytes, sha256 {release.sha256}",
        f"  called by   {' and '.join(map(describe_trigger, release.manifest.triggers))}",
        f"  may reach   {', '.join(wanted) or 'nothing'}",
    ]
    newly = _describe_grants(grants, beyond=old)
    if newly:
        lines.append(f"  new grants  {', '.join(newly)}")
    epoch = release.manifest.security_epoch
    if epoch > (0 if before is None else before.manifest.security_epoch):
        lines.append(f"  raises the security epoch to {epoch}: devices that commit it cannot go back")
    return "\n".join(lines)


def _describe_grants(grants: Grants, *, beyond: Grants | None = None) -> list[str]:
    """Describe each grant; with `beyond`, only those that it does not contain."""
    had = beyond or Grants()
    return [
        *(each for each in grants.interfaces if each not in had.interfaces),
        *(outbound.describe(each) for each in grants.outbound if not outbound.covered(each, had.outbound)),
        *(f"{each}.internal" for each in grants.instances if each not in had.instances),
        *grants.messages_beyond(had),
        *grants.named_beyond(had),
        *grants.devices.beyond(had.devices),
    ]
