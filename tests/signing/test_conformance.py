"""Client for the public TUF conformance suite: real HTTP, a process for each command."""

import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import quote, unquote

import pytest
from tuf.api.metadata import Metadata, TargetFile, Targets

from signing import repository
from tests.simulator.repository import Repository, promise_role, promise_snapshot


class Served:
    """Simulated repository and artifacts on a loopback port, and a client's directories."""

    def __init__(self, directory: Path) -> None:
        self.repo = Repository()
        # The command uses the real clock.
        self.repo.now = datetime.now(UTC)
        for role in ("targets", "main"):
            self.repo.rewrite(role, lambda signed: setattr(signed, "expires", self.repo.now + timedelta(days=30)))
        self.repo.online()
        self.artifacts: dict[str, bytes] = {}
        self.asked: list[str] = []
        self.metadata, self.targets = directory / "metadata", directory / "targets"
        self.targets.mkdir()
        served = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                kind, _, name = self.path.removeprefix("/").partition("/")
                # Metadata files are published under their quoted names; a target's path is quoted for the URL.
                name = name if kind == "metadata" else unquote(name)
                served.asked.append(name)
                data = (served.repo.files if kind == "metadata" else served.artifacts).get(name)
                self.send_response(404 if data is None else 200)
                self.end_headers()
                self.wfile.write(data or b"")

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def client(self, *arguments: str, prefix: tuple[str, ...] = ()) -> int:
        command = [*prefix, sys.executable, "-m", "signing.conformance", "--metadata-dir", str(self.metadata)]
        url = ["--metadata-url", f"{self.url}/metadata/"]
        return subprocess.run([*command, *url, *arguments], check=False, capture_output=True).returncode

    def init(self) -> int:
        root = self.targets.parent / "initial.json"
        root.write_bytes(self.repo.pinned)
        return self.client("init", str(root))

    def download(self, name: str) -> int:
        base = f"{self.url}/artifacts/"
        return self.client(
            "--target-name", name, "--target-base-url", base, "--target-dir", str(self.targets), "download"
        )

    def versions(self) -> dict[str, int]:
        return {path.stem: Metadata.from_file(str(path)).signed.version for path in self.metadata.glob("*.json")}


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    it = Served(tmp_path)
    thread = threading.Thread(target=it.server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield it
    it.server.shutdown()
    thread.join()
    it.server.server_close()


def test_a_refresh_stores_metadata_without_version_numbers(served: Served) -> None:
    assert served.init() == 0
    assert served.versions() == {"root": 1}
    served.repo.rotate("timestamp")
    served.repo.online()
    assert served.client("refresh") == 0
    assert served.versions() == {"root": 2, "timestamp": 3, "snapshot": 2, "targets": 2}


def test_a_rollback_is_refused_by_the_next_process(served: Served) -> None:
    served.init()
    old = served.repo.files["timestamp.json"]
    served.repo.online()
    assert served.client("refresh") == 0
    before = served.versions()
    served.repo.files["timestamp.json"] = old
    # A power cut tears the cache as well: the separate state still detects the rollback.
    (served.metadata / "timestamp.json").unlink()
    assert served.client("refresh") == 1
    assert served.versions() | {"timestamp": before["timestamp"]} == before


def test_a_target_is_stored_only_as_signed(served: Served) -> None:
    served.init()
    item = served.repo.publish()
    name = item.target.replace("1.0.0.wasm", f"{item.sha256}.1.0.0.wasm")
    served.artifacts[name] = b"x" * item.length
    assert served.download(item.target) == 1
    assert list(served.targets.iterdir()) == []

    served.artifacts[name] = b"main/hello/1.0.0/"
    assert served.download(item.target) == 0
    assert [path.read_bytes() for path in served.targets.iterdir()] == [b"main/hello/1.0.0/"]
    del served.artifacts[name]
    assert served.download(item.target) == 0, "what is there already is not fetched again"
    assert served.download("components/main/none/1.0.0.wasm") == 1


@pytest.mark.parametrize("role", ["?", "#", "/role", "../role"])
def test_a_role_named_like_a_path_is_a_separate_file(served: Served, role: str) -> None:
    served.init()
    repo = served.repo
    delegate = repository.delegate
    repo.rewrite("targets", lambda top: delegate(top, role, [repo.keys["main"].public_key], paths=["*"]))
    file: Metadata[Targets] = Metadata(Targets(expires=repo.now + timedelta(days=30)))
    file.sign(repo.keys["main"])
    quoted = f"1.{quote(role, safe='')}.json"
    repo.files[quoted] = file.to_bytes()
    repo.online()
    data, version = repo.files[quoted], repo.signed("snapshot").version + 1
    repo.rewrite("snapshot", lambda signed: promise_role(signed, role, data, 1))
    snapshot = repo.files[f"{version}.snapshot.json"]
    repo.rewrite("timestamp", lambda signed: promise_snapshot(signed, snapshot, version))
    assert served.download("none") == 1
    assert quoted in served.asked, "asked for by the name it is published under, quoted once"
    assert len(list(served.metadata.glob("*.json"))) == 5
    assert [path.name for path in served.metadata.parent.glob("*.json")] == ["initial.json"], "and nowhere else"


def test_a_target_whose_name_needs_quoting_is_fetched_quoted(served: Served) -> None:
    served.init()
    content = b"some bytes"
    target = TargetFile.from_data("a b?/c#d", content, ["sha256"])
    served.repo.rewrite("targets", lambda top: top.targets.update({target.path: target}))
    served.repo.online()
    served.artifacts[f"a b?/{target.hashes['sha256']}.c#d"] = content
    assert served.download(target.path) == 0
    assert [path.read_bytes() for path in served.targets.iterdir()] == [content]


def test_an_expired_repository_is_refused_when_the_clock_has_moved(served: Served) -> None:
    faketime = shutil.which("faketime")
    if faketime is None:
        pytest.skip("faketime is not installed")
    served.init()
    assert served.client("refresh") == 0
    assert served.client("refresh", prefix=(faketime, "+3 days")) == 1
