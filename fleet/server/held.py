"""The online keys that this server holds: `<role>.pem`, and after a rotation `<role>-2.pem` and so on.

Which of them counts is what signed metadata says, asked each time, so that a rotation needs no restart: the new key is
made first, then root or targets name it, and from then on it signs.
"""

from collections.abc import Callable, Iterable
from pathlib import Path

from securesystemslib.signer import Key, SecretsHandler, Signature, Signer

from signing import keys
from signing.errors import KeyFileError, SigningError


class HeldKeys:
    """The directory of online keys."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._opened: dict[Path, Signer] = {}

    def signer(self, role: str, trusted: Iterable[Key]) -> Signer:
        """The key among `trusted` that this server holds for a role.

        Raises:
            SigningError: it holds none of them.
        """
        wanted = {key.keyid for key in trusted}
        first = self._directory / f"{role}.pem"
        others = sorted(self._directory.glob(f"{role}-*.pem"))
        for path in others if others and not first.exists() else (first, *others):
            signer = self._open(path)
            if signer.public_key.keyid in wanted:
                return signer
        raise KeyFileError(
            f"the {role} key that is trusted now is not on this server: make one there with fleet keys rotate {role}"
        )

    def _open(self, path: Path) -> Signer:
        if path not in self._opened:
            self._opened[path] = keys.load(path)
        return self._opened[path]


class TrustedSigner(Signer):
    """A signer that is always the key which metadata names now.

    Args:
        choose: finds it; raises `SigningError` when this server holds none.
    """

    def __init__(self, choose: Callable[[], Signer]) -> None:
        self._choose = choose

    @property
    def public_key(self) -> Key:
        """Of the key that counts now."""
        return self._choose().public_key

    @classmethod
    def from_priv_key_uri(
        cls, priv_key_uri: str, public_key: Key, secrets_handler: SecretsHandler | None = None
    ) -> "TrustedSigner":
        """Not how this one is made."""
        del public_key, secrets_handler
        raise SigningError(f"{priv_key_uri} does not name a held key")

    def sign(self, payload: bytes) -> Signature:
        """See `Signer`."""
        return self._choose().sign(payload)
