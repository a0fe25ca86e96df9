"""A home made by the real `init`, and a server's desk that speaks the API from that home's own repository."""

import functools
import json
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import click
import httpx
import msgspec
import pytest
from click.testing import CliRunner, Result

from fleet.admin import bootstrap
from fleet.cli import answers, output
from fleet.cli.main import main
from fleet.client import Client
from fleet.protocol import operator_api
from fleet.protocol.operator_api import RolloutView
from signing import events, keys, repository
from signing.errors import ConflictError, Rejected, RepositoryError
from signing.events import Document, Event


class Desk(httpx.BaseTransport):
    """Publishing as the server does it, with the real repository code; rollouts as a script.

    Attributes:
        files: the TUF repository.
        views: what following a rollout sees, one after the other.
        routes: (method, path) -> answer, for everything else; a list gives its answers one after another;
            an exception is raised.
        before_role: called before each role is judged (someone else may publish there).
        seen: every request, with its body.
    """

    def __init__(self, home: Path) -> None:
        self.home = home
        self.now: datetime | None = None
        self.files = {path.name: path.read_bytes() for path in (home / "server/repository").iterdir()}
        self.artifacts: dict[str, bytes] = {}
        self.views: list[RolloutView] = []
        groups = operator_api.Groups(
            groups=(operator_api.GroupRow(name="edge-eu"), operator_api.GroupRow(name="edge-us"))
        )
        self.routes: dict[tuple[str, str], object] = {
            ("GET", "/v1/groups"): groups,
            ("GET", "/v1/groups/edge-eu/policy"): operator_api.GroupPolicy(group="edge-eu"),
        }
        self.before_role: Callable[[], None] = lambda: None
        self.seen: list[tuple[str, str, bytes]] = []

    def handle_request(self, request: httpx.Request) -> httpx.Response:  # noqa: PLR0911 - a table of routes
        body = request.read()
        path = request.url.path
        self.seen.append((request.method, path, body))
        assert request.headers["authorization"] == "Bearer " + (self.home / "operator/token").read_text().strip()
        if (answer := self.routes.get((request.method, path))) is not None:
            return self._answer(answer)
        match request.method, path.split("/")[2:]:
            case "GET", ["tuf" | "artifacts" as kind, name]:
                data = (self.files if kind == "tuf" else self.artifacts).get(name)
                return httpx.Response(404, content=b"{}") if data is None else httpx.Response(200, content=data)
            case "HEAD", ["artifacts", sha256]:
                return httpx.Response(200 if sha256 in self.artifacts else 404)
            case "PUT", ["artifacts", sha256]:
                self.artifacts[sha256] = body
                return self._answer(operator_api.ArtifactReply(sha256=sha256, length=len(body), new=True))
            case "POST", ["roles" | "signing-events", *namespace]:
                return self._publish(namespace, body)
            case ("POST", ["rollouts"] | ["undo"] | ["removals"]) | ("GET", ["rollouts", _]) if self.views:
                return self._answer(self.views.pop(0))
        return self._answer(problem("not-found", f"no {path}", 404))

    def _answer(self, answer: object) -> httpx.Response:
        if isinstance(answer, list):
            answer = answer.pop(0)
        if isinstance(answer, Exception):
            raise answer
        if isinstance(answer, httpx.Response):
            return answer
        status = answer.status if isinstance(answer, operator_api.Problem) else 200
        return httpx.Response(status, content=msgspec.json.encode(answer))

    def _publish(self, namespace: list[str], data: bytes) -> httpx.Response:
        self.before_role()
        try:
            version = self.accept(*namespace, data) if namespace else self.accept_event(data)
        except ConflictError as error:
            return self._answer(problem("conflict", str(error), 409))
        except (Rejected, RepositoryError) as error:
            return self._answer(problem("refused", str(error), 422))
        return self._answer(
            operator_api.RoleReply(namespace="".join(namespace), version=version, snapshot=1, timestamp=1)
        )

    def accept_event(self, data: bytes) -> int:
        self.files |= events.apply(self.files, events.decode(data))
        self.sign_online()
        return 1

    def accept(self, namespace: str, data: bytes) -> int:
        self.files |= events.apply(self.files, Event("", (Document(namespace, data),)))
        self.sign_online()
        return repository.latest(self.files, namespace)[0]

    def sign_online(self) -> None:
        place = self.home / "server/keys"
        self.files |= repository.online(
            self.files,
            snapshot_signer=keys.load(place / "snapshot.pem"),
            timestamp_signer=keys.load(place / "timestamp.pem"),
            now=self.now or datetime.now(UTC),
        )

    def paths(self, method: str) -> list[str]:
        return [path for verb, path, _ in self.seen if verb == method]

    def sent(self, path: str) -> dict[str, object]:
        """The JSON of the newest request to a path."""
        return json.loads([body for _, where, body in self.seen if where == path][-1])


def problem(kind: str, title: str, status: int, detail: str = "", action: str = "") -> operator_api.Problem:
    return operator_api.Problem(type=kind, title=title, status=status, detail=detail, action=action)


@pytest.fixture(autouse=True)
def plain_console():
    """The console looks at standard output once; each test has another one."""
    plain = output.console
    plain.cache_clear()
    yield
    plain.cache_clear()


@pytest.fixture(autouse=True)
def documented_answers(monkeypatch):
    """Every answer in JSON, of whichever test, has the keys that `fleet/cli/answers.py` and the page of it say."""
    plain = output.show_json

    def checked(value) -> None:
        running = click.get_current_context(silent=True)  # none where a test calls a function of a command
        if running is not None:
            name = running.command_path.partition(" ")[2]
            found = msgspec.to_builtins(value)
            assert answers.fits(name, found), (name, sorted(found))
        plain(value)

    monkeypatch.setattr(output, "show_json", checked)


@pytest.fixture
def size() -> str:
    return "dev"


@pytest.fixture
def home(tmp_path, monkeypatch, size) -> Path:
    monkeypatch.delenv("WASMFLEET_HOME", raising=False)
    monkeypatch.setenv("WASMFLEET_KEY_PASSPHRASE", "correct horse" if size == "solo" else "")
    bootstrap.init(tmp_path / "home", fleet="fleet", size=size, passphrase=b"correct horse" if size == "solo" else None)
    return tmp_path / "home"


@pytest.fixture
def desk(home, monkeypatch) -> Desk:
    made = Desk(home)
    monkeypatch.setattr(Client, "__init__", functools.partialmethod(Client.__init__, transport=made))
    return made


@pytest.fixture
def fleet(tmp_path) -> Callable[..., Result]:
    """Run `fleet ...` in this process."""

    def run(*arguments: object, stdin: str | None = None) -> Result:
        words = [str(word) for word in arguments]
        result = CliRunner().invoke(main, ["--home", str(tmp_path / "home"), *words], input=stdin)
        assert "Traceback" not in result.output
        return result

    return run
