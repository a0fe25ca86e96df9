"""Publish a component's file as a signed target; `fleet withdraw`.

Files of the server are verified before they are signed again: the namespace's role is verified from the root pinned on
this machine, and the new target is added to exactly that role. The server refuses it when somebody else published in
between; then everything is verified and signed again. Component and manifest are compared before any request.
"""

import functools
import hashlib
import mmap
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

import click
import msgspec
from securesystemslib.signer import Signer

from fleet.cli import output
from fleet.cli.base import Exit, Fault, Options, command, confirm, read_file
from fleet.cli.component import of_project, read_component
from fleet.cli.evidence import Attached, attached
from fleet.cli.operator import Operator, load_operator
from fleet.cli.signing_event import save_named
from fleet.cli.trust_store import TrustStore
from fleet.cli.unlock import publishing_key
from fleet.client import Client, ProblemError
from fleet.component import component_toml, reader
from fleet.component.reader import Component
from fleet.component.toml_fields import FILE_NAME
from fleet.protocol import data_packages, names
from fleet.protocol.manifest import MAX_BYTES, BadManifestError, Manifest
from fleet.protocol.names import TargetName
from fleet.protocol.operator_api import WithdrawalView
from signing import events, hash_bins, repository
from signing.errors import RepositoryError
from signing.events import Document, Event
from signing.policy import Release

CONFLICTS_MAX: Final = 5
_CONFLICT: Final = 409
_NAMED_MAX: Final = 20


@functools.lru_cache(maxsize=1)
def _sha256(data: bytes | mmap.mmap) -> str:
    return hashlib.sha256(data).hexdigest()


@dataclass(frozen=True, slots=True, kw_only=True)
class Payload:
    """Component or data package ready to be published.

    Attributes:
        file: its path.
        data: its bytes; those of a data package are mapped from the file.
        manifest: as written or inferred; the version is `component_toml.DEV_VERSION` when none was given.
        attached: evidence to publish with it.
        adapted: with which adapter, where the file is a command of WASI Preview 1.
    """

    file: Path
    data: bytes | mmap.mmap
    manifest: Manifest
    attached: tuple[Attached, ...] = ()
    adapted: str = ""

    @property
    def sha256(self) -> str:
        """Hash of the bytes, in hex."""
        return _sha256(self.data)


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared(Payload):
    """Component ready to be published: read, and every import granted by its manifest.

    Attributes:
        component: description read from its bytes.
        manifest_file: file of its manifest, None for an inferred one.
    """

    component: Component
    manifest_file: Path | None


def prepare(file: Path, *, manifest_file: Path | None = None, name: str = "", version: str = "") -> Prepared:
    """Read a component and its manifest.

    Args:
        file: the component, or the directory of its project.
        manifest_file: its `component.toml`; None for one beside it, or none at all.
        name: replaces the manifest's.
        version: replaces the manifest's.

    Raises:
        Fault: a file cannot be read, is no component, or the manifest is invalid or does not grant an import.
    """
    file, found = of_project(file)
    found = manifest_file or found
    source = read_component(file)
    text = (
        None if found is None else read_file(found, component_toml.TOML_MAX_CHARS * 4).decode("utf-8", errors="replace")
    )
    try:
        shape = reader.read(source.data, file_name=file.name)
        if version:
            names.check_version(version)
        manifest = component_toml.describe(shape, text, file_name=file.name)
        changes = {key: value for key, value in (("name", name), ("version", version)) if value}
        if name:
            names.check_label(name, "component")
    except component_toml.NeedsTomlError as error:
        raise Fault(
            str(error), code=Exit.USAGE, extra=_to_save(file, error.suggestion + component_toml.build_table(text))
        ) from None
    except BadManifestError as error:
        raise Fault(_named(str(error), found)) from None
    except (reader.NotAComponentError, names.BadNameError) as error:
        raise Fault(str(error)) from None
    return Prepared(
        file=file,
        data=source.data,
        component=shape,
        manifest=msgspec.structs.replace(manifest, **changes),
        manifest_file=found,
        adapted=source.adapted,
    )


def attach(prepared: Prepared, *, sbom: Path | None, provenance: Path | None) -> Prepared:
    """Bind a bill of materials and build provenance to a prepared component.

    Raises:
        Fault: a file cannot be read, is of another kind, or describes other bytes.
    """
    files = {path: read_file(path, MAX_BYTES) for path in (sbom, provenance) if path is not None}
    found = attached(
        sbom=None if sbom is None else (sbom.name, files[sbom]),
        provenance=None if provenance is None else (provenance.name, files[provenance]),
        sha256=prepared.sha256,
        component=prepared.file.name + (" as 'fleet component compose' writes it" if prepared.adapted else ""),
    )
    return replace(prepared, attached=found)


def _to_save(file: Path, suggestion: str) -> str:
    return f"# save this as {file.with_name(FILE_NAME)}\n{suggestion.rstrip()}\n"


def _named(message: str, found: Path | None) -> str:
    """Name the manifest's actual path in a message."""
    if found is None or not message.startswith(FILE_NAME):
        return message
    return f"{found}{message.removeprefix(FILE_NAME)}"


@dataclass(frozen=True, slots=True)
class Publication:
    """Result of publishing; `new` is false when exactly this was published before."""

    target: TargetName
    release: Release
    new: bool


def publish(
    who: Operator,
    client: Client,
    prepared: Payload,
    *,
    progress: Callable[[int], None] | None = None,
    say: Callable[[str], None],
) -> Publication:
    """Sign a prepared component or data package and upload it, artifact first, role second.

    Args:
        who: the operator, whose key and namespace are used.
        client: a connection to the server.
        prepared: result of `prepare`, or a data package.
        progress: called with the size of each chunk in bytes as it is sent.
        say: called with a message when something takes a second attempt.

    Raises:
        Fault: there is no key, the version exists with other content, or the repository does not verify.
        ClientError: the server is unreachable or refuses.
    """
    trust = TrustStore(who, client)
    signer, ends = publisher(who, trust)
    uploaded = False
    for _ in range(CONFLICTS_MAX):
        if trust.role is None:
            _begin(who, client, trust, signer, ends)
        manifest = versioned(prepared, trust)
        check_kind(manifest, trust)
        target = TargetName(who.namespace, manifest.name, manifest.version)
        holder, base = trust.holder(target.path)
        if trust.is_revoked(target.path):
            raise Fault(f"{target} was revoked", "a revocation is permanent", "publish it under another version")
        try:
            role = repository.add_target(
                base,
                name=target,
                length=len(prepared.data),
                sha256=prepared.sha256,
                manifest=manifest,
                signer=signer,
                now=datetime.now(UTC),
                ends=ends,
                evidence=tuple(each.evidence for each in prepared.attached),
            )
        except RepositoryError as error:
            raise Fault(str(error)) from None
        release = next(each for each in repository.releases(role) if each.name == target)
        if role == base:
            _bring_back(client, prepared, say)
            return Publication(target, release, new=False)
        if not uploaded:
            client.upload(prepared.sha256, prepared.data, progress=progress, is_data=manifest.is_data)
            for each in prepared.attached:
                client.upload(each.evidence.sha256, each.data)
            uploaded = True
        event = Event(who.fleet, (Document(holder, role),), note=f"publishes {target}")
        _need_others(trust, event, target)
        try:
            _send(client, event)
        except ProblemError as error:
            if error.problem.status != _CONFLICT:
                raise
            say("Someone else published in between: verifying and signing again.")
            trust.refresh()
            continue
        _look_again(trust, release)
        return Publication(target, release, new=True)
    raise Fault(
        f"could not publish {prepared.manifest.name}",
        f"others published {CONFLICTS_MAX} times in between",
        "try again",
        code=Exit.FAILED,
    )


def check_kind(manifest: Manifest, trust: TrustStore) -> None:
    """Check that no release of the same name is of the other kind, component or data package. Raises `Fault`."""
    other = next(
        (
            each
            for each in trust.releases
            if each.name.name == manifest.name and each.manifest.is_data != manifest.is_data
        ),
        None,
    )
    if other is not None:
        kind, wanted = ("data package", "component") if other.manifest.is_data else ("component", "data package")
        raise Fault(f"{manifest.name} is a {kind}", f"{other.name} is published", f"give the {wanted} another --name")


def _bring_back(client: Client, prepared: Payload, say: Callable[[str], None]) -> None:
    """Upload published files again that the server has lost, as after a rebuild."""
    is_data = prepared.manifest.is_data
    kept: list[tuple[str, bytes | mmap.mmap]] = [(prepared.sha256, prepared.data)]
    kept += [(each.evidence.sha256, each.data) for each in prepared.attached]
    lost = [(sha256, data) for sha256, data in kept if not client.has_artifact(sha256)]
    for sha256, data in lost:
        client.upload(sha256, data, is_data=is_data)
    if lost:
        say("The server had lost the artifact; it is uploaded again.")


def publisher(who: Operator, trust: TrustStore) -> tuple[Signer, datetime | None]:
    """Open the key that publishes here, and return it with its end of validity.

    Raises:
        Fault: there is no key, or it is not trusted or has expired.
    """
    signer = publishing_key(who, (key.keyid for key in trust.publishers.keys))
    ends = trust.ends(signer.public_key.keyid)
    if ends is not None and ends <= datetime.now(UTC):
        raise Fault(
            f"the key {signer.public_key.keyid[:12]} ended on {ends:%Y-%m-%d}",
            "its signatures are no longer valid",
            "make the next one with fleet keys new --ci",
        )
    return signer, ends


def _begin(who: Operator, client: Client, trust: TrustStore, signer: Signer, ends: datetime | None) -> None:
    """Publish the first, empty role of a new namespace."""
    client.publish_role(who.namespace, repository.new_role(signer=signer, now=datetime.now(UTC), ends=ends))
    trust.refresh()


def _send(client: Client, event: Event) -> None:
    """Upload the role that holds the new target: a namespace's own, or a hash bin's."""
    role = event.documents[0]
    if hash_bins.is_bin(role.role):
        client.publish_event(event.encode())
    else:
        client.publish_role(role.role, role.data)


def _need_others(trust: TrustStore, event: Event, target: TargetName) -> None:
    """Save what this person signed when the namespace requires several people. Raises `Fault` then."""
    lacking = events.missing(trust.heads, event)
    if not lacking:
        return
    path = save_named(event)
    raise Fault(
        f"{target} is not published yet",
        f"the namespace {target.namespace} requires {lacking[0].count} more signatures; yours is in {path}",
        f"have it signed with 'fleet sign approve {path}', then 'fleet sign publish {path}'",
        code=Exit.FAILED,
    )


def _look_again(trust: TrustStore, release: Release) -> None:
    """Refresh the verified state, so that this machine refuses a repository without the new target."""
    trust.refresh()
    if trust.release(release.name.path) != release:
        raise Fault(
            f"the server accepted {release.name}, but does not serve it",
            "its repository lacks the new target",
            "read the server's log",
            code=Exit.REFUSED,
        )


def versioned(prepared: Payload, trust: TrustStore) -> Manifest:
    """Return the manifest with a version: its own, of data the next whole number, or in development `0.0.0-dev.N`.

    The newest such version is reused when nothing has changed since.

    Raises:
        Fault: no version was given, and the fleet is not for development.
    """
    manifest = prepared.manifest
    if manifest.version != component_toml.DEV_VERSION:
        return manifest
    if manifest.is_data:
        return _next_of_data(prepared, trust)
    if not trust.development:
        raise Fault(
            f"{prepared.file.name} has no version",
            "this fleet is in production",
            'add --version 1.0.0, or version = "1.0.0" to its component.toml',
        )
    prefix = component_toml.DEV_VERSION.removesuffix("0")
    newest, number = None, 0
    for release in trust.releases:
        text = release.name.version.removeprefix(prefix)
        if release.name.name == manifest.name and release.name.version.startswith(prefix) and text.isdigit():
            newest, number = release, max(number, int(text))
    if newest is not None and newest.sha256 == prepared.sha256:
        same = msgspec.structs.replace(manifest, version=newest.name.version)
        bound = tuple(each.evidence for each in prepared.attached)
        if same == newest.manifest and bound in {(), newest.evidence}:
            return same
    return msgspec.structs.replace(manifest, version=f"{prefix}{number + 1}")


def _next_of_data(prepared: Payload, trust: TrustStore) -> Manifest:
    manifest = prepared.manifest
    releases = [each for each in trust.releases if each.name.name == manifest.name]
    newest = max(releases, key=lambda each: names.version_key(each.name.version), default=None)
    if newest is not None and newest.sha256 == prepared.sha256:
        same = msgspec.structs.replace(manifest, version=newest.name.version)
        if same == newest.manifest:
            return same
    known = [each.name.version for each in releases]
    return msgspec.structs.replace(manifest, version=data_packages.next_version(known))


@command(
    "withdraw",
    examples="fleet withdraw hello@1.4.0\nfleet withdraw hello@1.4.0 --dry-run\nfleet withdraw hello@1.4.0 --yes",
)
@click.argument("target", metavar="NAME@VERSION")
@click.option("--yes", is_flag=True, help="Revoke without asking")
@click.option("--dry-run", "dry", is_flag=True, help="Revoke nothing: show which devices it concerns, and what follows")
def withdraw(options: Options, *, target: str, yes: bool, dry: bool) -> None:
    """Revoke a published release, with this namespace's key and for good.

    Every device that runs it stops it, nothing can deploy it again, and its version is never published again. Devices
    go to the newest settled version with the same data schema, at or above its security epoch; where there is none they
    run nothing, and keep the data. To go to another version first, deploy that.
    """
    who = load_operator(options)
    name = who.target(target)
    if name.namespace != who.namespace:
        raise Fault(f"{name} is not of the namespace {who.namespace}", "only its own publisher can revoke it")
    with who.client() as client:
        trust = TrustStore(who, client)
        _check_published(trust, name)
        effect = client.withdrawal(name.path)
        if not dry and not yes:
            click.echo("\n".join(_consequences(effect)), err=True)
            confirm(f"Revoke {name} for good?")
        new = not dry and _revoke(who, client, trust, name)
    if options.json:
        running = sorted({each.device for each in effect.devices if each.runs})
        done = {"target": name.path, "revoked": not dry or trust.is_revoked(name.path), "new": new, "running": running}
        output.show_json({**done, "devices": effect.devices, "rollouts": effect.rollouts})
        return
    if dry or yes:
        output.say(options, "\n".join(_consequences(effect)))
    said = f"{name} is revoked." if new else f"{name} was revoked before."
    output.say(options, "Nothing was changed." if dry else said)


def _consequences(effect: WithdrawalView) -> list[str]:
    """Say which devices a withdrawal concerns and what becomes of them, by count and name."""
    running = {each.device for each in effect.devices if each.runs}
    waiting = {each.device for each in effect.devices} - running
    runs = _counted(len(running), "device runs it", "devices run it") if running else "no device runs it"
    more = f"; {_counted(len(waiting), 'more is', 'more are')} to run it" if waiting else ""
    lines = [f"By what devices report, {runs}{more}."]
    following: dict[str, dict[str, None]] = {}
    for each in effect.devices:  # a device may have several instances of it
        following.setdefault(each.next, {})[each.device] = None
    for path, devices in sorted(following.items(), key=lambda item: bool(item[0])):
        goes = _counted(len(devices), "goes to", "go to") + f" {output.target(path)}"
        stops = _counted(
            len(devices),
            "runs nothing in its place, and keeps its data",
            "run nothing in its place, and keep their data",
        )
        lines.append(f"  {goes if path else stops}: {output.some(list(devices), _NAMED_MAX)}")
    away = sorted({each.device for each in effect.devices if not each.online})
    if away:
        when = _counted(
            len(away), "is offline, and follows when it is back", "are offline, and follow when they are back"
        )
        lines.append(f"  {when}: {output.some(away, _NAMED_MAX)}")
    if effect.rollouts:
        word = "rollout" if len(effect.rollouts) == 1 else "rollouts"
        lines.append(f"  {word} {', '.join(map(str, effect.rollouts))}: revoked")
    return lines


def _counted(count: int, one: str, many: str) -> str:
    return f"{count} {one if count == 1 else many}"


def _check_published(trust: TrustStore, name: TargetName) -> None:
    """Check that there is a release to revoke, or that was revoked before. Raises `Fault`."""
    if trust.role is None:
        raise Fault(f"{name} is not published", "the namespace is empty", code=Exit.REFUSED)
    if not trust.is_revoked(name.path) and trust.release(name.path) is None:
        raise Fault(f"{name} is not published", "there is nothing to revoke", code=Exit.REFUSED)


def _revoke(who: Operator, client: Client, trust: TrustStore, name: TargetName) -> bool:
    """Sign and publish the revocation; return False when it was revoked before."""
    signer, ends = publisher(who, trust)
    for _ in range(CONFLICTS_MAX):
        _check_published(trust, name)
        role = trust.role
        assert role is not None, "a release is published in a role"
        try:
            new = repository.revoke(role, name=name, signer=signer, now=datetime.now(UTC), ends=ends)
        except RepositoryError as error:
            raise Fault(str(error), code=Exit.REFUSED) from None
        if new == role:
            return False
        shown = _publish_revocation(client, who.namespace, new)
        trust.refresh()
        if shown and trust.release(name.path) is not None:
            raise Fault(f"the server accepted the revocation of {name}, but does not serve it", code=Exit.REFUSED)
        if shown:
            return True
    raise Fault(f"could not revoke {name}", "others published in between", "try again", code=Exit.FAILED)


def _publish_revocation(client: Client, namespace: str, role: bytes) -> bool:
    """Upload the role; return False when somebody else published in between."""
    try:
        client.publish_role(namespace, role)
    except ProblemError as error:
        if error.problem.status != _CONFLICT:
            raise
        return False
    return True
