"""Author's project: a directory with `component.toml`, whose `[build]` says how the component is made.

    [build]
    command = ["cargo", "build", "--release", "--target", "wasm32-wasip2"]
    output = "target/wasm32-wasip2/release/hello.wasm"
    watch = ["src"]

`[build]` is the author's own: no device sees it, and it is not signed. New projects are made of templates, which lie
beside this file in an installed package, and in `components/templates` in a source tree.
"""

import re
import shutil
import subprocess
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from fleet.component import toolchains
from fleet.component.toml_fields import FILE_NAME, Table
from fleet.protocol import names
from fleet.protocol.files import create_exclusive
from fleet.protocol.manifest import BadManifestError

TESTS: Final = "tests.toml"
HERE: Final = Path(__file__).resolve().parent
_TEMPLATES: Final = (HERE / "templates", HERE.parents[1] / "components" / "templates")
_WIT: Final = (HERE / "wit", HERE.parents[1] / "components" / "adapter" / "wit" / "deps")
_HTTP_PACKAGES: Final = ("http", "io")
_RELEASE: Final = re.compile(r"@(0\.2\.\d+)")
_OUR_RELEASE: Final = "@0.2.12"

LANGUAGES: Final = ("rust", "python", "js")
TRIGGERS: Final = ("http", "schedule", "service")
_WHAT: Final = {
    "http": "answers HTTP requests",
    "schedule": "runs every ten seconds",
    "service": "runs as long as the device does",
}
_TRIGGER: Final = {"schedule": '{ type = "schedule", every = "10s" }', "service": '{ type = "service" }'}
_FULL_NAME: Final = {"rust": "Rust", "python": "Python", "js": "JavaScript"}
_TOOL: Final = {"rust": "cargo", "python": "componentize-py", "js": "npm"}


class BadProjectError(Exception):
    """The project cannot be made, read or built: a sentence, and what helps.

    Attributes:
        advice: what to do; empty where the sentence says it.
    """

    def __init__(self, why: str, advice: str = "") -> None:
        super().__init__(why)
        self.advice = advice


@dataclass(frozen=True, slots=True)
class Project:
    """Author's project.

    Attributes:
        directory: of `component.toml`.
        command: that makes the component, run in `directory`; empty where the component is there as it is.
        output: the component.
        watched: files and directories from which it is made.
    """

    directory: Path
    command: tuple[str, ...]
    output: Path
    watched: tuple[Path, ...]


def read_build(raw: object) -> tuple[tuple[str, ...], str, tuple[str, ...]]:
    """Read `[build]`: command, output, watch. Raises `BadManifestError`."""
    if not isinstance(raw, dict):
        raise BadManifestError(f"{FILE_NAME}: build: expected a table, not a value")
    table = Table("build", raw)
    command = table.take("command")
    output = table.text("output", "")
    watch = table.texts("watch", _inside)
    table.finish()
    is_line = isinstance(command, list) and all(isinstance(word, str) and "\0" not in word for word in command)
    if not command or not is_line or not output:
        raise BadManifestError(f"{FILE_NAME}: build: give command, a list of texts, and output, the file that it makes")
    if wrong := _inside(output):
        raise BadManifestError(f"{FILE_NAME}: build.output: {output[:80]!r}: {wrong}")
    return tuple(command), output, watch


def _inside(text: str) -> str | None:
    path = Path(text)
    bad = path.is_absolute() or ".." in path.parts or not path.parts
    return "name a place inside of the project's directory" if bad else None


def load(place: Path) -> Project:
    """Read the project in a directory, or take a component file as one that is made already.

    Raises:
        BadProjectError: there is neither.
        BadManifestError: its `[build]` is invalid.
    """
    if place.is_file() and place.name != FILE_NAME:
        return Project(place.parent, (), place, (place,))
    directory = place.parent if place.is_file() else place
    text = _text_of(directory / FILE_NAME)
    try:
        raw = tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadManifestError(f"{FILE_NAME} is not TOML: {error}") from error
    if "build" not in raw:
        raise BadProjectError(
            f"{directory / FILE_NAME} has no [build], so nobody knows how its component is made",
            "give the component's file, or add [build] with command and output",
        )
    command, output, watch = read_build(raw["build"])
    watched = [directory / each for each in watch or (".",)]
    return Project(directory, command, directory / output, (directory / FILE_NAME, *watched))


def _text_of(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise BadProjectError(
            f"{file.parent} has no {FILE_NAME}",
            "'fleet component new NAME --lang rust' makes a project; or give a component's file",
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise BadProjectError(f"cannot read {file}: {error}") from error


def build(project: Project, *, quiet: bool = False) -> int:
    """Run the project's command, whose words go where this process's own go; return the component's size.

    `quiet`: without what it writes to standard output.

    Raises:
        BadProjectError: a tool is missing, it failed, or it made no component.
    """
    if not project.command:
        return _size(project.output)
    program = _program(project)
    if program is None:
        raise BadProjectError(f"{project.command[0]} is not on PATH", toolchains.install(project.command[0]))
    line = " ".join(project.command)
    output = subprocess.DEVNULL if quiet else None
    try:
        done = subprocess.run(
            [program, *project.command[1:]], cwd=project.directory, check=False, stdout=output, stdin=subprocess.DEVNULL
        )
    except OSError as error:
        raise BadProjectError(f"cannot run {line}: {error.strerror}") from error
    if done.returncode:
        how = f"a signal ({-done.returncode})" if done.returncode < 0 else f"exit code {done.returncode}"
        raise BadProjectError(f"{line} failed with {how}", "its own words stand above")
    if not project.output.is_file():
        raise BadProjectError(f"{line} made no {project.output}", "build.output must name the file that it writes")
    return _size(project.output)


def _program(project: Project) -> str | None:
    """Find the command's program; one with a slash lies in the project, where the command runs."""
    name = project.command[0]
    return shutil.which(project.directory.resolve() / name if "/" in name else name)


def _size(file: Path) -> int:
    try:
        return file.stat().st_size
    except OSError as error:  # gone meanwhile
        raise BadProjectError(f"cannot read {file}: {(error.strerror or str(error)).lower()}") from error


def _written_at(file: Path) -> int | None:
    try:
        return file.stat().st_mtime_ns
    except OSError:
        return None


def stamp(project: Project) -> dict[Path, int]:
    """Return when each watched file was written: it differs after a change that wants a new build."""
    found: dict[Path, int] = {}
    for place in project.watched:
        for file in _files(place):
            at = _written_at(file)
            if at is not None and file != project.output:
                found[file] = at
    if not project.command:
        found[project.output] = _written_at(project.output) or 0
    return found


_SKIPPED: Final = frozenset({"target", "node_modules", "__pycache__", ".git", "dist", "build"})


def _files(place: Path) -> Iterator[Path]:
    if place.is_file():
        yield place
    elif place.is_dir():
        for each in _children(place):
            if not each.name.startswith(".") and not each.is_symlink() and each.name not in _SKIPPED:
                yield from _files(each)


def _children(directory: Path) -> list[Path]:
    try:
        return sorted(directory.iterdir())
    except OSError:  # gone meanwhile, or not ours to read
        return []


def new(directory: Path, *, name: str, language: str, trigger: str) -> tuple[Path, ...]:
    """Make a project of a template; return its files.

    Raises:
        BadProjectError: there is something already, or no such template.
        BadNameError: no name of a component.
    """
    names.check_label(name, "name")
    if not name[0].isalpha() or name.endswith("-"):
        raise BadProjectError(f"{name!r} is no name of a package everywhere", "begin it with a letter")
    if trigger != "http" and language == "js":
        raise BadProjectError(
            "there is no template for a schedule or a service in JavaScript: jco makes servers",
            "choose --lang rust or python, or --trigger http",
        )
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise BadProjectError(f"{directory} exists already, and is not empty", "choose another name, or --output DIR")
    world = "http" if trigger == "http" else "run"
    templates = _first(_TEMPLATES)
    values = _values(name, language, trigger)
    made = {
        _target(file.relative_to(source)): file.read_text(encoding="utf-8")
        for source in (templates / language / world, templates / language / trigger)  # the second has what differs
        for file in sorted(source.rglob("*"))
        if file.is_file()
    }
    made[Path("README.md")] = (templates / "README.md").read_text(encoding="utf-8")
    made[Path(TESTS)] = (templates / f"{world}-tests.toml").read_text(encoding="utf-8")
    if (wit := made.get(Path("wit/world.wit"))) is not None:
        made |= _vendored(world, wit)
    for path, text in made.items():
        place = directory / path
        place.parent.mkdir(parents=True, exist_ok=True)
        create_exclusive(place, _filled(text, values), mode=0o644)
    return tuple(sorted(made))


def _values(name: str, language: str, trigger: str) -> dict[str, str]:
    return {
        "name": name,
        "crate": name.replace("-", "_"),
        "what": _WHAT[trigger],
        "language": _FULL_NAME[language],
        "tools": f"with {_TOOL[language]}",
        "trigger": _TRIGGER.get(trigger, ""),
        **{tool: known.version for tool, known in toolchains.TOOLS.items()},
    }


def _filled(text: str, values: dict[str, str]) -> str:
    for key, value in values.items():
        text = text.replace(f"{{{{{key}}}}}", value)
    return text


def _target(path: Path) -> Path:
    """Return the place of a template's file in the project."""
    if path.name == "gitignore":
        return path.with_name(".gitignore")
    return Path("wit") / path if path.suffix == ".wit" else path


def _vendored(world: str, text: str) -> dict[Path, str]:
    """Return the WIT that a world names, in the release that it names: each toolchain knows its own."""
    release = _RELEASE.search(text)
    assert release is not None, "a template names a release of WASI"
    if world == "run":
        return {Path("wit/deps/cli/run.wit"): f"package wasi:cli@{release[1]};\n\n{_RUN}"}
    deps, found = _first(_WIT), {}
    for package in _HTTP_PACKAGES:
        for file in sorted((deps / package).glob("*.wit")):
            text = file.read_text(encoding="utf-8").replace(_OUR_RELEASE, f"@{release[1]}")
            found[Path("wit/deps") / package / file.name] = text
    return found


_RUN: Final = "interface run {\n    run: func() -> result;\n}\n"


def _first(places: tuple[Path, ...]) -> Path:
    for place in places:
        if place.is_dir():
            return place
    raise BadProjectError(f"the templates are missing: {places[0]}", "install wasmfleet anew")
