"""`fleet-tuf-conformance`: the device's TUF client behind the command line of the public TUF conformance suite.

    fleet-tuf-conformance --metadata-dir DIR [--metadata-url URL] init ROOT
    fleet-tuf-conformance --metadata-dir DIR --metadata-url URL refresh
    fleet-tuf-conformance --metadata-dir DIR --metadata-url URL --target-name NAME --target-base-url URL
        --target-dir DIR download

`Updater`, `TrustedMetadata`, `VerifierState` and `DirectoryCache` are those of the agent; only the fetching is plain
HTTP. Exit code 0 for success, 1 for a refusal. After a refresh, DIR contains the trusted metadata without version
numbers in the names, and the verifier state in a hidden file.
"""

import argparse
import sys
from datetime import UTC, datetime
from http.client import HTTPException
from pathlib import Path
from typing import Final
from urllib.error import HTTPError
from urllib.parse import quote, urlsplit
from urllib.request import urlopen

from fleet.protocol import bounds, wire
from fleet.protocol.codes import RejectCode
from signing import metadata
from signing.errors import FetchNotFound, Rejected
from signing.updater import DirectoryCache, FileState, Updater

TIMEOUT_S: Final = 30
PINNED: Final = ".pinned-root"

STATE: Final = ".facts"

LOCK: Final = ".lock"


def main(arguments: list[str] | None = None) -> int:
    """Run a command of the suite; return the exit code."""
    options = _parser().parse_args(arguments)
    directory = Path(options.metadata_dir)
    try:
        if options.command == "init":
            _init(directory, Path(options.root))
        else:
            updater = _refresh(directory, options.metadata_url)
            if options.command == "download":
                _download(updater, options.target_name, options.target_base_url, Path(options.target_dir))
    except (Rejected, OSError, *wire.JSON_ERRORS) as error:
        print(f"fleet-tuf-conformance: {error}", file=sys.stderr)  # noqa: T201 - a command
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fleet-tuf-conformance", description="The device's TUF client for conformance tests."
    )
    parser.add_argument("--metadata-dir", required=True)
    parser.add_argument("--metadata-url", default="")
    parser.add_argument("--target-name", default="")
    parser.add_argument("--target-base-url", default="")
    parser.add_argument("--target-dir", default=".")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("init").add_argument("root")
    commands.add_parser("refresh")
    commands.add_parser("download")
    return parser


def _init(directory: Path, root: Path) -> None:
    """Pin a root, as enrolment does."""
    data = root.read_bytes()
    directory.mkdir(parents=True, exist_ok=True)
    (directory / PINNED).write_bytes(data)
    (directory / "root.json").write_bytes(data)
    (directory / STATE).unlink(missing_ok=True)


def _refresh(directory: Path, url: str) -> Updater:
    states = FileState(directory / STATE, lock=directory / LOCK)

    def fetch(name: str, max_bytes: int) -> bytes:
        # A role may have any name: the file names that `TrustedMetadata` requests are already quoted.
        return _get(f"{url.rstrip('/')}/{name}", max_bytes)

    root = (directory / PINNED).read_bytes()
    updater = Updater(pinned_root=root, fetch=fetch, states=states, cache=DirectoryCache(directory))
    updater.refresh(states.load().time(datetime.now(UTC)))
    return updater


def _download(updater: Updater, name: str, base_url: str, directory: Path) -> None:
    """Fetch a target unless it is already there, and keep it only if its length and hashes are the signed ones."""
    found = updater.find(name)
    if found is None or found.revoked or found.target is None:
        raise Rejected(RejectCode.UNKNOWN_TARGET, f"{name!r} is not published")
    target = found.target
    path = directory / quote(name, safe="")
    if path.exists() and metadata.sha256(path.read_bytes()) == target.hashes.get("sha256"):
        return
    head, _, tail = name.rpartition("/")
    prefix = f"{next(iter(target.hashes.values()))}." if updater.trusted.root.consistent_snapshot else ""
    remote = f"{head}/{prefix}{tail}" if head else f"{prefix}{tail}"
    data = _get(f"{base_url.rstrip('/')}/{quote(remote)}", target.length)
    metadata.check_file(target, data, name)
    path.write_bytes(data)


def _get(url: str, max_bytes: int) -> bytes:
    if urlsplit(url).scheme not in {"http", "https"}:
        raise Rejected(RejectCode.UNREACHABLE, f"{url} is not an http or https URL")
    try:
        with urlopen(url, timeout=TIMEOUT_S) as response:  # noqa: S310 - the scheme was checked
            data: bytes = response.read(min(max_bytes, bounds.ARTIFACT_MAX_BYTES) + 1)
    except HTTPError as error:
        if error.code in {403, 404}:
            raise FetchNotFound(url) from error
        raise Rejected(RejectCode.UNREACHABLE, f"{url}: HTTP {error.code}") from error
    except (OSError, HTTPException) as error:
        raise Rejected(RejectCode.UNREACHABLE, f"{url}: {error}") from error
    if len(data) > max_bytes:
        raise Rejected(RejectCode.TOO_LARGE, f"{url} has more than {max_bytes} bytes")
    return data


if __name__ == "__main__":
    sys.exit(main())
