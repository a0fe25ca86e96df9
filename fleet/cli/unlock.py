"""Private keys of an operator: keyring, passphrases from the environment or the terminal."""

import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Final

import click
from securesystemslib.signer import Signer

from fleet.cli.base import Fault
from fleet.cli.operator import Operator
from signing import keys
from signing.errors import KeyFileError
from signing.keyring import Entry, Keyring, open_file

PASSPHRASE_VARIABLE: Final = "WASMFLEET_KEY_PASSPHRASE"  # noqa: S105 - the name of a variable
PIN_VARIABLE: Final = "WASMFLEET_TOKEN_PIN"
KEY_VARIABLE: Final = "FLEET_SIGNING_KEY"


def keyring(who: Operator) -> Keyring:
    """Open this person's keyring."""
    return Keyring(who.directory / "keys")


def ask(what: str) -> bytes | None:
    """Ask for the passphrase of a key file or the PIN of a token; None when there is no terminal."""
    given = os.environ.get(PIN_VARIABLE if what.startswith("the token") else PASSPHRASE_VARIABLE)
    if given:
        return given.encode()
    if not sys.stdin.isatty():
        return None
    answer: str = click.prompt(f"Passphrase of {what}", hide_input=True, default="", show_default=False, err=True)
    return answer.encode() or None


def new_passphrase(what: str) -> bytes:
    """Get a passphrase for new keys from the environment, or have it typed twice.

    Raises:
        Fault: there is no terminal to ask on.
    """
    given = os.environ.get(PASSPHRASE_VARIABLE)
    if given:
        return given.encode()
    if not sys.stdin.isatty():
        raise Fault(f"{what} needs a passphrase", "there is no terminal to ask on", f"set {PASSPHRASE_VARIABLE}")
    answer: str = click.prompt(f"Passphrase for {what}", hide_input=True, confirmation_prompt=True, err=True)
    return answer.encode()


def free_key_file(directory: Path, role: str) -> Path:
    """Find a free name for another key of `role` in a server's key directory, from `<role>-2.pem` on."""
    number = 2
    while (path := directory / f"{role}-{number}.pem").exists():
        number += 1
    return path


def open_key(ring: Keyring, entry: Entry) -> Signer:
    """Open a private key of the operator. Raises `Fault`."""
    try:
        return ring.open(entry, ask)
    except KeyFileError as error:
        raise Fault(str(error)) from None


def publishing_key(who: Operator, trusted: Iterable[str]) -> Signer:
    """Open the key that publishes in this operator's namespace.

    From $FLEET_SIGNING_KEY where it is set (a pipeline), else the first key of the keyring that the namespace trusts,
    else `keys/<namespace>.pem`.

    Args:
        who: the operator, whose keyring and namespace are used.
        trusted: ids of the namespace's keys, as verified.

    Raises:
        Fault: there is no key, the namespace does not trust it, or its passphrase is wrong.
    """
    known = set(trusted)
    why = f"only a key of the namespace {who.namespace} can publish in it"
    try:
        given = os.environ.get(KEY_VARIABLE)
        if given:
            signer: Signer = _given_key(given.encode())
        else:
            ring = keyring(who)
            entry = next((each for each in ring.entries() if each.ours and each.key.keyid in known), None)
            signer = ring.open(entry, ask) if entry is not None else open_file(who.key, ask)
    except KeyFileError as error:
        raise Fault(str(error), why) from None
    if signer.public_key.keyid not in known:
        raise Fault(
            f"the key {signer.public_key.keyid[:12]} is not trusted with the namespace {who.namespace}",
            "it was replaced, or never added",
            "see the trusted keys with fleet keys list",
        )
    return signer


def _given_key(data: bytes) -> Signer:
    try:
        return keys.parse(data, what=f"${KEY_VARIABLE}")
    except keys.EncryptedError:
        secret = os.environ.get(PASSPHRASE_VARIABLE)
        if not secret:
            raise
        return keys.parse(data, what=f"${KEY_VARIABLE}", passphrase=secret.encode())
