"""Trust errors, grouped by whose fault they are.

- SigningError
    - Rejected: the peer's data is unsigned, outdated, for someone else, too large...; reports carry the code
    - KeyFileError: the operator's key file or passphrase
    - RepositoryError: the operator's request does not fit the repository as it is
        - ConflictError: someone else published in between: fetch, check, sign again
- FetchNotFound: not a trust error: the repository has no file of that name
"""

from fleet.protocol.codes import RejectCode


class SigningError(Exception):
    """Base of all errors of this package; the message is a sentence for people."""


class Rejected(SigningError):  # noqa: N818 - a verdict, and the word that operators read
    """Refusal of the peer's data.

    Attributes:
        code: reason, from the closed vocabulary that reports use.
    """

    def __init__(self, code: RejectCode, message: str) -> None:
        super().__init__(f"{code}: {message}")
        self.code = code
        self.message = message


class KeyFileError(SigningError):
    """Key file that cannot be read, written, or opened with the given passphrase."""


class RepositoryError(SigningError):
    """The operator's request does not fit the repository."""


class ConflictError(RepositoryError):
    """Compare-and-swap lost: the role was published by someone else in between."""


class FetchNotFound(Exception):  # noqa: N818 - a fact about a file, expected at the end of every walk of roots
    """The repository has no file of that name (HTTP 404). Raised by `Fetch` functions."""
