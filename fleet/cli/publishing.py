"""From a file to a published target: read, described, signed against verified metadata, uploaded.

Nothing that the server says is signed unseen. The namespace's role is verified from the root pinned on this machine,
the new target is added to exactly that, and the server takes it only if nobody published in between; then all of it is
done again with what is there now.
"""

import contextlib
import hashlib
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

import msgspec
from securesystemslib.signer import Signer

from fleet.cli.base import Exit, Fault
from fleet.cli.home import Operator
from fleet.client import Client, ProblemError
from fleet.protocol import author, caps, component, names
from fleet.protocol.component import Component
from fleet.protocol.manifest import BadManifestError, Manifest
from fleet.protocol.names import TargetName
from fleet.protocol.toml_table import FILE_NAME
from signing import keys, repository
from signing.cache import DirectoryCache
from signing.errors import FetchNotFound, KeyFileError, Rejected, RepositoryError
from signing.facts import Facts
from signing.policy import Release
from signing.workflow import Workflow, profile

CONFLICTS_MAX: Final = 5
PASSPHRASE_VARIABLE: Final = "WASMFLEET_KEY_PASSPHRASE"  # noqa: S105 - the name of a variable
_CONFLICT: Final = 409


@dataclass(frozen=True, slots=True)
class Prepared:
    """A component that may be published: read, and every import granted by its manifest.

    Attributes:
        file: the component's.
        data: its bytes.
        component: what it says of itself.
        manifest: as written or inferred; the version is `author.DEV_VERSION` when none was given.
        manifest_file: where it was written, None for inferred.
    """

    file: Path
    data: bytes
    component: Component
    manifest: Manifest
    manifest_file: Path | None

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
    text = None if found is None else _read(found, author.TOML_MAX_CHARS * 4).decode("utf-8", errors="replace")
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
    return _read(file, caps.ARTIFACT_MAX_BYTES)


def beside(file: Path) -> Path | None:
    """The manifest that lies beside a component, if any."""
    return next((path for name in author.beside(file.name) if (path := file.with_name(name)).is_file()), None)


def _read(file: Path, most: int) -> bytes:
    try:
        with file.open("rb") as stream:
            return stream.read(most + 1)
    except FileNotFoundError:
        raise Fault(f"{file} does not exist", "", "check the path") from None
    except IsADirectoryError:
        raise Fault(f"{file} is a directory", "a component is one file", f"name the .wasm file in {file}") from None
    except OSError as error:
        raise Fault(f"cannot read {file}", (error.strerror or str(error)).lower(), "check its permissions") from None


def _to_save(file: Path, suggestion: str) -> str:
    return f"# save this as {file.with_name(FILE_NAME)}\n{suggestion.rstrip()}\n"


def _named(message: str, found: Path | None) -> str:
    """The message with the path of the manifest that was read in place of its usual name."""
    if found is None or not message.startswith(FILE_NAME):
        return message
    return f"{found}{message.removeprefix(FILE_NAME)}"


class Trust:
    """What this operator believes of the repository: verified from the pinned root, remembered between commands.

    Raises:
        Fault: the root is missing, or what the server shows does not verify.
    """

    def __init__(self, who: Operator, client: Client) -> None:
        self._who = who
        self._client = client
        self._facts_file = who.trust / "facts.json"
        pinned = _read(who.root, caps.ROOT_MAX_BYTES)
        self._workflow = Workflow(root=pinned, fetch=self._fetch, cache=DirectoryCache(who.trust / "cache"))
        self.refresh()

    def refresh(self) -> None:
        """Bring everything up to date with the server."""
        facts = self._load_facts()
        try:
            self._workflow.refresh(facts=facts, now=facts.time(datetime.now(UTC)))
            self._role = self._workflow.role(self._who.namespace)
        except Rejected as error:
            raise Fault(
                "the fleet's repository does not verify",
                error.message,
                "nothing was signed; find out who changed it before anything else",
                code=Exit.REFUSED,
            ) from None
        finally:
            self._store_facts(self._workflow.facts)

    @property
    def development(self) -> bool:
        """Whether the repository was made for development, by its signed root."""
        return profile(self._workflow.loaded()[0]).get("size") == "dev"

    @property
    def role(self) -> bytes:
        """The verified role of this operator's namespace."""
        return self._role

    @property
    def releases(self) -> tuple[Release, ...]:
        """What the namespace has published."""
        return repository.releases(self._role)

    def _fetch(self, name: str, _max_bytes: int) -> bytes:
        data = self._client.tuf(name)
        if data is None:
            raise FetchNotFound(name)
        return data

    def _load_facts(self) -> Facts:
        try:
            return Facts.decode(self._facts_file.read_bytes())
        except FileNotFoundError:
            return Facts()
        except msgspec.MsgspecError as error:
            raise Fault(
                f"{self._facts_file} is damaged",
                str(error),
                "restore it, or delete it if nobody else writes there",
            ) from None

    def _store_facts(self, facts: Facts) -> None:
        fresh = self._facts_file.with_suffix(".new")
        fresh.parent.mkdir(parents=True, exist_ok=True)
        with fresh.open("wb") as file:
            file.write(facts.encode())
            file.flush()
            os.fsync(file.fileno())
        fresh.replace(self._facts_file)


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
        else:
            return Publication(target, release, new=True)
    raise Fault(
        f"could not publish {prepared.manifest.name}",
        f"others published {CONFLICTS_MAX} times in between",
        "try again",
        code=Exit.FAILED,
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
    import click  # noqa: PLC0415 - only here, and only with a terminal

    if not key.is_file() or not sys.stdin.isatty():
        return None
    answer: str = click.prompt(f"Passphrase of {key}", hide_input=True, default="", show_default=False, err=True)
    return answer.encode() or None
