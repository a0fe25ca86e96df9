"""From a prepared component to a published target: signed against verified metadata, and uploaded.

Nothing that the server says is signed unseen. The namespace's role is verified from the root pinned on this machine,
the new target is added to exactly that, and the server takes it only if nobody published in between; then all of it is
done again with what is there now.
"""

import contextlib
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

import click
import msgspec
from securesystemslib.signer import Signer

from fleet.cli.base import Exit, Fault
from fleet.cli.home import Operator
from fleet.cli.prepare import Prepared
from fleet.cli.trust import Trust
from fleet.client import Client, ProblemError
from fleet.protocol import author
from fleet.protocol.manifest import Manifest
from fleet.protocol.names import TargetName
from signing import keys, repository
from signing.errors import KeyFileError, RepositoryError
from signing.policy import Release

CONFLICTS_MAX: Final = 5
PASSPHRASE_VARIABLE: Final = "WASMFLEET_KEY_PASSPHRASE"  # noqa: S105 - the name of a variable
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
    signer = signing_key(who)
    uploaded = False
    for _ in range(CONFLICTS_MAX):
        manifest = versioned(prepared, trust)
        target = TargetName(who.namespace, manifest.name, manifest.version)
        try:
            role = repository.add_target(
                trust.role,
                name=target,
                length=len(prepared.data),
                sha256=prepared.sha256,
                manifest=manifest,
                signer=signer,
                now=datetime.now(UTC),
            )
        except RepositoryError as error:
            raise Fault(str(error)) from None
        release = next(each for each in repository.releases(role) if each.name == target)
        if role == trust.role:
            return Publication(target, release, new=False)
        if not uploaded:
            client.upload(prepared.sha256, prepared.data, progress=progress)
            uploaded = True
        try:
            client.publish_role(who.namespace, role)
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


def _look_again(trust: Trust, release: Release) -> None:
    """Remember what was published: from now on nobody can show this machine a repository without it."""
    trust.refresh()
    if release not in trust.releases:
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
        if same == newest.manifest:
            return same
    return msgspec.structs.replace(manifest, version=f"{prefix}{number + 1}")


def signing_key(who: Operator) -> Signer:
    """The namespace's key; its passphrase comes from the environment or the terminal.

    Raises:
        Fault: missing, readable by others, or a wrong passphrase.
    """
    given = os.environ.get(PASSPHRASE_VARIABLE)
    passphrase = given.encode() if given else None
    try:
        with contextlib.suppress(KeyFileError):
            return keys.load(who.key, passphrase=passphrase)
        return keys.load(who.key, passphrase=passphrase or _ask(who.key))
    except KeyFileError as error:
        raise Fault(str(error), f"only the key of the namespace {who.namespace} can publish in it") from None


def _ask(key: Path) -> bytes | None:
    """A passphrase from the terminal, None when there is none to ask or the file needs none."""
    if not key.is_file() or not sys.stdin.isatty():
        return None
    answer: str = click.prompt(f"Passphrase of {key}", hide_input=True, default="", show_default=False, err=True)
    return answer.encode() or None
