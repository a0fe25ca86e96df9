"""`fleet component new`, `build`, `run` and `test`: an author's loop on this machine, without a fleet."""

import shlex
import tempfile
import time
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Final, NamedTuple
from urllib.parse import urlsplit

import click
import msgspec

from fleet.cli import dev_host, output
from fleet.cli.base import Exit, Fault, Options, command, config_values, read_file, write_file
from fleet.cli.component import component, of_project, read_component
from fleet.component import component_toml, project, project_tests, reader
from fleet.component.project import BadProjectError, Project
from fleet.component.project_tests import LogTest, RequestTest
from fleet.protocol import bounds, dev
from fleet.protocol.manifest import BadManifestError, Http, Manifest
from fleet.protocol.names import BadNameError
from fleet.protocol.printable import json_text, printable

_PORT: Final = 8080
_LOOK_S: Final = 0.5  # from one look at the watched files to the next
_ANSWER_S: Final = 30.0
_PLACE: Final = click.argument("place", type=click.Path(path_type=Path), default=Path(), metavar="[PLACE]")
_CONFIG: Final = click.option("--config", "pairs", multiple=True, metavar="KEY=VALUE", help="Configure the component")
_SECRET: Final = click.option(
    "--secret", "secrets", multiple=True, metavar="NAME=FILE", help="Give it a secret, read from FILE"
)


@command(
    "new",
    examples="fleet component new hello --lang rust\nfleet component new meter --lang python --trigger schedule\n"
    "cd hello && fleet component build && fleet component run",
)
@click.argument("name")
@click.option("--lang", "language", type=click.Choice(project.LANGUAGES), required=True, help="Language of the project")
@click.option(
    "--trigger", type=click.Choice(project.TRIGGERS), default="http", show_default=True, help="What it is called by"
)
@click.option(
    "--output", "target", type=click.Path(path_type=Path), metavar="DIR", help="Make it in this directory  [NAME]"
)
def new(options: Options, *, name: str, language: str, trigger: str, target: Path | None) -> Exit:
    """Make a small project that builds, tests and runs at once."""
    directory = target or Path(name)
    try:
        files = project.new(directory, name=name, language=language, trigger=trigger)
    except (BadProjectError, BadNameError) as error:
        raise _fault(error) from None
    except OSError as error:
        raise Fault(f"cannot write {directory}", (error.strerror or str(error)).lower()) from None
    output.result(
        options,
        {"directory": str(directory), "files": [str(each) for each in files]},
        f"Made {directory} with {len(files)} files. Next:\n\n"
        f"    cd {shlex.quote(str(directory))}\n"
        f"    fleet component build\n    fleet component test\n    fleet component run",
    )
    return Exit.OK


@command("build", examples="fleet component build\nfleet component build ./hello")
@_PLACE
def build(options: Options, *, place: Path) -> Exit:
    """Build the project in PLACE, by the command in its component.toml.

    PLACE is a project's directory  [the current one].
    """
    found = _project(place)
    if not found.command:
        raise Fault(f"{place} is a component, not a project", "", "give a directory with a component.toml")
    size = _built(options, found)
    output.result(
        options,
        {"file": str(found.output), "size_bytes": size, "command": list(found.command)},
        f"Built {found.output}, {output.size(size)}.",
    )
    return Exit.OK


@command(
    "run",
    examples="fleet component run\nfleet component run --watch --port 9000\n"
    "fleet component run hello.wasm --config greeting=hi --secret token=token.txt",
)
@_PLACE
@click.option(
    "--port",
    type=click.IntRange(0, 65535),
    metavar="PORT",
    default=_PORT,
    show_default=True,
    help="HTTP port on this machine; 0: any",
)
@click.option("--watch", is_flag=True, help="Build and swap whenever a file of the project changes")
@_CONFIG
@_SECRET
def run(options: Options, *, place: Path, port: int, watch: bool, pairs: Sequence[str], secrets: Sequence[str]) -> Exit:
    """Run a component on this machine's host as a device does, until you interrupt it.

    PLACE is a project's directory, which is built first, or a component's file  [the current directory]. The component
    has the grants and limits of its component.toml; its log is printed, and its calls are counted. With --json, each
    event is a line.
    """
    found = _project(place)
    values, hidden = config_values(pairs) or {}, _secret_values(secrets)
    dev_host.check_port(port)
    _built(options, found)
    with tempfile.TemporaryDirectory() as directory, dev_host.started(port) as host:
        scratch = Path(directory)
        host.run(_request(found, scratch, values, hidden))
        seen = project.stamp(found)
        serves = False
        look_s = time.monotonic() + _LOOK_S
        try:
            while True:
                event = host.next(_LOOK_S if watch else None)
                if event is not None:
                    _show(options, event)
                    serves = serves or isinstance(event, dev.Serving)
                    if isinstance(event, dev.Refused) and not serves and not watch:
                        return Exit.FAILED
                if not watch or time.monotonic() < look_s:  # a busy component has events without end
                    continue
                look_s = time.monotonic() + _LOOK_S
                if (now := project.stamp(found)) != seen:
                    seen = now
                    _again(options, host, found, scratch, values, hidden)
        except KeyboardInterrupt:
            return Exit.OK


def _again(
    options: Options,
    host: dev_host.DevHost,
    found: Project,
    scratch: Path,
    values: dict[str, str],
    hidden: dict[str, str],
) -> None:
    """Build and swap after a change; what fails is said, and the version before goes on."""
    try:
        _built(options, found)
        host.run(_request(found, scratch, values, hidden))
    except Fault as error:
        output.note(f"error: {error}\nthe version before goes on")


@command("test", examples="fleet component test\nfleet component test ./hello --tests more-tests.toml")
@_PLACE
@click.option(
    "--tests",
    "tests_file",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="Read the tests from this file  [tests.toml beside component.toml]",
)
@_CONFIG
@_SECRET
def test(
    options: Options, *, place: Path, tests_file: Path | None, pairs: Sequence[str], secrets: Sequence[str]
) -> Exit:
    """Build a component and send it the requests of its tests.toml, on this machine's host.

    Exit code 0: every answer was the expected one; 1: one was not, or a device would refuse the component.
    """
    found = _project(place)
    file = tests_file or found.directory / project.TESTS
    try:
        tests = project_tests.load(file)
    except project_tests.BadTestsError as error:
        raise Fault(str(error)) from None
    values, hidden = config_values(pairs) or {}, _secret_values(secrets)
    _built(options, found)
    with tempfile.TemporaryDirectory() as directory:
        request = _request(found, Path(directory), values, hidden)
        results = _tested(options, file, request, tests)
    failed = sum(1 for each in results if each.problem)
    if options.json:
        output.show_json({"file": str(file), "ok": not failed, "tests": [each._asdict() for each in results]})
    else:
        for each in results:
            click.echo(printable(f"{'FAILED' if each.problem else 'ok':<7} {each.name}"))
            if each.problem:
                click.echo(printable(f"        {each.problem}"))
        output.say(options, f"{len(results) - failed} of {len(results)} passed.")
    return Exit.FAILED if failed else Exit.OK


def _tested(
    options: Options, file: Path, request: dev.DevRequest, tests: Sequence[RequestTest | LogTest]
) -> list["_Result"]:
    if any(isinstance(each, RequestTest) for each in tests) and not request.manifest.triggers_of(Http):
        raise Fault(f"{file} has requests", f"{request.manifest.name} is not called by http", "write [[log]] instead")
    with dev_host.started(0) as host:
        return _Tester(options, host).run(request, tests)


class _Result(NamedTuple):
    name: str
    problem: str


class _Tester:
    """Runs tests on a host, and remembers what the component has logged."""

    def __init__(self, options: Options, host: dev_host.DevHost) -> None:
        self._options, self._host = options, host
        self._logged: list[str] = []
        self._faults: list[str] = []

    def run(self, request: dev.DevRequest, tests: Sequence[RequestTest | LogTest]) -> list[_Result]:
        """Return the result of each test. Raises `Fault`: a device would refuse the component."""
        began_s = time.monotonic()
        self._host.run(request)
        while not isinstance(event := self._host.next(), dev.Serving):
            if isinstance(event, dev.Refused):
                raise Fault(
                    f"a device would refuse it at its {event.step}", event.problem, code=Exit.FAILED, extra=_log(event)
                )
            self._take(event)
        return [
            _Result(each.name, self._ask(event.url, each))
            if isinstance(each, RequestTest)
            else _Result(each.name, self._wait(each, began_s))
            for each in tests
        ]

    def _take(self, event: dev.Event | None) -> None:
        match event:
            case dev.Compiling():
                if not self._options.json:
                    _show(self._options, event)
            case dev.Logged(line=line):
                self._logged.append(line)
            case dev.Fault(code=code, message=message):
                self._faults.append(f"{code}: {message}".splitlines()[0])

    @staticmethod
    def _ask(url: str, test: RequestTest) -> str:
        from http.client import HTTPConnection, HTTPException  # noqa: PLC0415 - the other commands start faster without

        place = urlsplit(url)
        client = HTTPConnection(place.netloc, timeout=_ANSWER_S)
        try:
            client.request(test.method, place.path.rstrip("/") + test.path, test.send or None, test.headers)
            answer = client.getresponse()
            headers = {name.lower(): value for name, value in answer.getheaders()}
            return project_tests.judge(test, answer.status, headers, answer.read())
        except (OSError, HTTPException) as error:
            return f"no answer: {error or type(error).__name__}"
        finally:
            client.close()

    def _wait(self, test: LogTest, began_s: float) -> str:
        while not any(test.contains in line for line in self._logged):
            left_s = began_s + test.within_ms / 1000 - time.monotonic()
            if left_s <= 0:
                said = [*self._logged[-3:], *self._faults[-1:]]
                return f"no such line within {test.within_ms / 1000:g} s; its last ones: {said or 'none'}"
            self._take(self._host.next(left_s))
        return ""


def _project(place: Path) -> Project:
    if not place.exists():
        raise Fault(f"there is no {place}")
    try:
        return project.load(place)
    except (BadProjectError, BadManifestError) as error:
        raise _fault(error) from None


def _fault(error: Exception) -> Fault:
    return Fault(str(error), getattr(error, "advice", ""))


def _built(options: Options, found: Project) -> int:
    """Build, saying with what; return the component's size."""
    if found.command:
        output.say(options, f"Building: {' '.join(found.command)}")
    try:
        return project.build(found, quiet=options.quiet or options.json)
    except BadProjectError as error:
        raise Fault(str(error), error.advice, code=Exit.FAILED) from None


def _request(found: Project, scratch: Path, values: dict[str, str], secrets: dict[str, str]) -> dev.DevRequest:
    """Read component and manifest as a push does; a module of Preview 1 is adapted into `scratch`."""
    file, manifest_file = of_project(found.directory if found.command else found.output)
    source = read_component(file)
    if source.adapted:
        file = scratch / file.name
        write_file(file, source.data)
    text = None
    if manifest_file is not None:
        text = read_file(manifest_file, component_toml.TOML_MAX_CHARS * 4).decode("utf-8", errors="replace")
    try:
        shape = reader.read(source.data, file_name=file.name)
        manifest = component_toml.describe(shape, text, file_name=file.name)
    except component_toml.NeedsTomlError as error:
        raise Fault(str(error), extra=error.suggestion + component_toml.build_table(text)) from None
    except (BadManifestError, reader.NotAComponentError) as error:
        raise Fault(str(error)) from None
    _check_given(manifest, values, secrets)
    return dev.DevRequest(file=str(file.resolve()), manifest=manifest, config=values, secrets=secrets)


def _check_given(manifest: Manifest, values: dict[str, str], secrets: dict[str, str]) -> None:
    for given, known, option in ((values, set(manifest.config), "config"), (secrets, set(manifest.secrets), "secret")):
        if unknown := sorted(set(given) - known):
            raise Fault(
                f"the component has no {option} {unknown[0]!r}",
                f"its component.toml names {', '.join(sorted(known)) or 'none'}",
            )
    missing = sorted(
        [f"--config {key}=VALUE" for key, each in manifest.config.items() if each.default is None and key not in values]
        + [f"--secret {key}=FILE" for key, each in manifest.secrets.items() if each.required and key not in secrets]
    )
    if missing:
        raise Fault("the component needs values that are not given", "", f"add {' '.join(missing)}")


def _secret_values(pairs: Sequence[str]) -> dict[str, str]:
    values = {}
    for pair in pairs:
        name, equals, file = pair.partition("=")
        if not equals or not name or not file:
            raise Fault(f"--secret {pair!r} is not NAME=FILE")
        data = read_file(Path(file), bounds.SECRET_VALUE_MAX_BYTES)
        if len(data) > bounds.SECRET_VALUE_MAX_BYTES:
            raise Fault(
                f"{file} is too large for a secret", f"at most {bounds.SECRET_VALUE_MAX_BYTES} bytes are accepted"
            )
        try:
            values[name] = data.decode()
        except UnicodeDecodeError:
            raise Fault(f"{file} is not UTF-8", "a secret is text") from None
    return values


def _show(options: Options, event: dev.Event) -> None:
    if options.json:
        click.echo(json_text(msgspec.json.encode(event).decode()))
        return
    match event:
        case dev.Compiling(elapsed_s=elapsed_s):
            so_far = f", {elapsed_s} s so far" if elapsed_s else f" {output.size(event.size_bytes)}"
            output.say(options, f"Compiling{so_far}.")
        case dev.Serving(url=url, swapped=swapped):
            took = f"compiled in {event.compile_ms / 1000:.1f} s, started in {event.start_ms} ms"
            output.say(options, f"{'Swapped' if swapped else 'Running'}: {took}.")
            if url and not swapped:
                output.say(options, f"Serving {url} (Ctrl-C ends it)")
        case dev.Refused(step=step, problem=problem):
            output.note(f"error: a device would refuse it at its {step}: {printable(problem)}\n{_log(event)}".rstrip())
        case dev.Logged(line=line):
            click.echo(printable(f"{_now()}  {line}"))
        case dev.Called(calls=calls, p99_us=p99_us):
            counted = ", ".join(f"{count} {outcome}" for outcome, count in sorted(calls.items()))
            output.say(options, f"{_now()}  calls: {counted} (p99 {p99_us / 1000:.1f} ms)")
        case dev.Fault(code=code, message=message):
            output.note(f"{code}: {printable(message, lines=True)}")
        case dev.HostSaid(line=line):
            output.note(f"host: {printable(line)}")


def _now() -> str:
    return f"{datetime.now().astimezone():%H:%M:%S}"


def _log(event: dev.Refused) -> str:
    return printable("\n".join(f"    {line}" for line in event.log), lines=True)


for _each in (new, build, run, test):
    component.add_command(_each)
