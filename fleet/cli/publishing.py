"""From a prepared component to a published target: signed against verified metadata, and uploaded.

Nothing that the server says is signed unseen. The namespace's role is verified from the root pinned on this machine,
the new target is added to exactly that, and the server takes it only if nobody published in between; then all of it is
done again with what is there now.
"""

from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

import msgspec
from securesystemslib.signer import Signer

from fleet.cli.base import Exit, Fault
from fleet.cli.ceremony import SUFFIX, save
from fleet.cli.home import Operator
from fleet.cli.prepare import Prepared
from fleet.cli.trust import Trust
from fleet.cli.unlock import publishing_key
from fleet.client import Client, ProblemError
from fleet.protocol import author
from fleet.protocol.manifest import Manifest
from fleet.protocol.names import TargetName
from signing import bins, events, repository
from signing.errors import RepositoryError
from signing.events import Document, Event
from signing.policy import Release

CONFLICTS_MAX: Final = 5
_CONFLICT: Final = 409


@dataclass(frozen=True, slots=True)
class Publication:
    """What came of publishing; `new` is false when exactly this was published before."""

    target: TargetName
    release: Release
    new: bool


def publish(
    who: Operator,
    client: Client,
    prepared: Prepared,
    *,
    progress: Callable[[int], None] | None = None,
    say: Callable[[str], None],
) -> Publication:
    """Sign a prepared component and upload it, artifact first, role second.

    Args:
        who: whose key and namespace.
        client: a connection to the server.
        prepared: from `prepare`.
        progress: told the size of each chunk as it is sent.
        say: told what takes a second try.

    Raises:
        Fault: no key, a version that exists with other content, or a repository that does not verify.
        ClientError: from the server.
    """
    trust = Trust(who, client)
    signer, ends = publisher(who, trust)
    uploaded = False
    for _ in range(CONFLICTS_MAX):
        if trust.role is None:
            _begin(who, client, trust, signer, ends)
        manifest = versioned(prepared, trust)
        target = TargetName(who.namespace, manifest.name, manifest.version)
        holder, base = trust.holder(target.path)
        if trust.is_revoked(target.path):
            raise Fault(f"{target} was revoked", "a revocation is for good", "publish it under another version")
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
            client.upload(prepared.sha256, prepared.data, progress=progress)
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


def _bring_back(client: Client, prepared: Prepared, say: Callable[[str], None]) -> None:
    """What is published and the server has lost, as one that was made anew has, is uploaded again."""
    kept = [(prepared.sha256, prepared.data), *((each.evidence.sha256, each.data) for each in prepared.attached)]
    lost = [(sha256, data) for sha256, data in kept if not client.has_artifact(sha256)]
    for sha256, data in lost:
        client.upload(sha256, data)
    if lost:
        say("The server had lost its bytes; they are there again.")


def publisher(who: Operator, trust: Trust) -> tuple[Signer, datetime | None]:
    """The key that publishes here, and when it ends.

    Raises:
        Fault: there is none, it is not trusted, or its life is over.
    """
    signer = publishing_key(who, (key.keyid for key in trust.publishers.keys))
    ends = trust.ends(signer.public_key.keyid)
    if ends is not None and ends <= datetime.now(UTC):
        raise Fault(
            f"the key {signer.public_key.keyid[:12]} ended on {ends:%Y-%m-%d}",
            "nothing that it signs is valid any more",
            "fleet keys new --ci makes the next one",
        )
    return signer, ends


def _begin(who: Operator, client: Client, trust: Trust, signer: Signer, ends: datetime | None) -> None:
    """The first, empty role of a new namespace."""
    client.publish_role(who.namespace, repository.new_role(signer=signer, now=datetime.now(UTC), ends=ends))
    trust.refresh()


def _send(client: Client, event: Event) -> None:
    """Upload the role that holds the new target: a namespace's own, or a hash bin's."""
    role = event.documents[0]
    if bins.is_bin(role.role):
        client.publish_event(event.encode())
    else:
        client.publish_role(role.role, role.data)


def _need_others(trust: Trust, event: Event, target: TargetName) -> None:
    """Where the namespace wants several people: save what this one signed, for the others; raises `Fault`."""
    lacking = events.missing(trust.heads, event)
    if not lacking:
        return
    path = Path(event.name + SUFFIX)
    save(path, event)
    raise Fault(
        f"{target} is not published yet",
        f"the namespace {target.namespace} wants {lacking[0].count} signatures more; yours is in {path}",
        f"have it signed with 'fleet sign approve {path}', then 'fleet sign publish {path}'",
        code=Exit.FAILED,
    )


def _look_again(trust: Trust, release: Release) -> None:
    """Remember what was published: from now on nobody can show this machine a repository without it."""
    trust.refresh()
    if trust.release(release.name.path) != release:
        raise Fault(
            f"the server took {release.name} and does not show it",
            "its repository is without what it accepted",
            "look at the server's log",
            code=Exit.REFUSED,
        )


def versioned(prepared: Prepared, trust: Trust) -> Manifest:
    """The manifest with a version: its own, or in development the next `0.0.0-dev.N`.

    The newest development version is taken again when nothing has changed since.

    Raises:
        Fault: no version was given, and the fleet is not for development.
    """
    manifest = prepared.manifest
    if manifest.version != author.DEV_VERSION:
        return manifest
    if not trust.development:
        raise Fault(
            f"{prepared.file.name} has no version",
            "this fleet is in production",
            'add --version 1.0.0, or version = "1.0.0" to its component.toml',
        )
    prefix = author.DEV_VERSION.removesuffix("0")
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
