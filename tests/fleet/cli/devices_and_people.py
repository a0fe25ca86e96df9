"""Device that judges with the real verifier, what it runs, and people of a fleet at machines of their own."""

import shutil
from datetime import UTC, datetime, timedelta
from pathlib import Path

from click.testing import CliRunner, Result

from fleet.cli.main import main
from fleet.protocol.assignment import Assignment, Item
from signing import director, keys
from signing.errors import FetchNotFound
from signing.updater import MemoryState, Updater
from signing.verifier import accept_assignment, published, resolve

DEMO = Path(__file__).resolve().parents[3] / "components" / "demo"
DEVICE = "gate-0a1b2c3d"


class Device:
    """Accepts assignments and resolves what they name, as an agent does."""

    def __init__(self, desk, *, production: bool = False) -> None:
        self.desk, self.states, self.version = desk, MemoryState(), 0
        root = desk.files["1.root.json"]
        self.updater = Updater(pinned_root=root, fetch=self._fetch, states=self.states, production=production)

    def _fetch(self, name: str, _max_bytes: int) -> bytes:
        if name not in self.desk.files:
            raise FetchNotFound(name)
        return self.desk.files[name]

    def runs(self, version: str) -> bool:
        now = datetime.now(UTC)
        trusted = self.updater.refresh(now)
        path = f"components/main/hello/{version}.wasm"
        release = published(self.updater.find(path), path)
        self.version += 1
        assignment = Assignment(
            fleet="fleet",
            device=DEVICE,
            version=self.version,
            issued=now,
            expires=now + timedelta(days=1),
            items=(
                Item(
                    instance="hello",
                    target=release.name.path,
                    length=release.length,
                    sha256=release.sha256,
                    manifest_sha256=release.manifest_sha256,
                ),
            ),
        )
        envelope = director.sign_assignment(assignment, keys.load(self.desk.home / "server/keys/director.pem"))
        state = self.states.load()
        accepted = accept_assignment(trusted, envelope, fleet="fleet", device=DEVICE, state=state, now=now)
        self.states.save(accepted.state)
        [item] = accepted.assignment.items
        return bool(resolve(self.updater.find(item.target), item, state=accepted.state))


def hello(work: Path) -> Path:
    return Path(shutil.copy(DEMO / "v1.wasm", work / "hello.wasm"))


def person(home: Path, place: Path, name: str):
    """Another machine of the same fleet, with a keyring of its own and one key in it."""
    shutil.copytree(home / "operator", place / "operator", ignore=shutil.ignore_patterns("keys"))
    (place / "operator/keys").mkdir()

    def run(*words: object, stdin: str | None = None) -> Result:
        result = CliRunner().invoke(main, ["--home", str(place), *map(str, words)], input=stdin)
        assert "Traceback" not in result.output
        return result

    assert run("keys", "new", name).exit_code == 0
    return run
