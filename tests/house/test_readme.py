"""The pages are held to the programs: commands and options that they name exist, links lead somewhere."""

import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from agent.cli import _parser as agent_parser
from agent.host.cli import _parser as host_parser
from fleet.cli.main import SECTIONS, main

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = (ROOT / "docs/commands.md").read_text(encoding="utf-8")
PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "components").glob("*.md")]
PROGRAMS = ("fleet", "fleet-agent", "fleet-host")
GROUPS = {"rollout", "keys", "sign", "component", "audit", "ca", "operators", "server", "publisher", "image", "sbom"}
NAMES = {name for section in SECTIONS.values() for name in section}


def fleet_help(words: list[str]) -> str:
    """The help of `fleet ...`; raises KeyError for a command that there is not."""
    command: click.Command = main
    context = click.Context(main, info_name="fleet")
    for word in words:
        if not isinstance(command, click.Group):
            break  # an argument
        found = command.get_command(context, word)
        if found is None:
            raise KeyError(word)
        command, context = found, click.Context(found, parent=context, info_name=word)
    return command.get_help(context)


def other_help(program: str, words: list[str]) -> str:
    """The help of `fleet-agent ...` or `fleet-host ...`; raises KeyError for a command that there is not."""
    parser = agent_parser() if program == "fleet-agent" else host_parser()
    if not words:
        return parser.format_help()
    subparsers = next(action for action in parser._actions if action.dest == "command")
    choices = subparsers.choices
    assert isinstance(choices, dict)
    return str(choices[words[0]].format_help())


def help_of(line: str) -> str:
    program, *words = line.split()
    plain: list[str] = []
    for word in words:
        if not re.fullmatch(r"[a-z-]+", word) or word.startswith("-"):
            break
        plain.append(word)
    return fleet_help(plain) if program == "fleet" else other_help(program, plain)


def in_the_tables() -> Iterator[str]:
    """Every command of the tables: `a b`, `c` in one cell are `program a b` and `program c` (or `program a c`)."""
    for cell in re.findall(r"^\| (`fleet.*?) \| ", COMMANDS, re.MULTILINE):
        first, *others = re.findall(r"`([^`]+)`", cell)
        yield first
        program, *words = first.split()
        group = len(words) > 1 and words[0] in GROUPS
        for other in others:
            if other.startswith("-"):
                yield f"{program} {words[0]} {other}"
            elif other.split()[0] in PROGRAMS:
                yield other
            else:
                yield f"{program} {words[0]} {other}" if group else f"{program} {other}"


def in_the_blocks() -> Iterator[str]:
    """Every command of the indented blocks, without comments and redirections."""
    for line in re.findall(r"^    (fleet.*)$", README, re.MULTILINE):
        yield re.split(r"\s+[#<>|]", line)[0]


TABLE = list(in_the_tables())


@pytest.mark.parametrize("line", [*TABLE, *in_the_blocks()])
def test_a_command_of_the_pages_exists_with_its_options(line):
    told = help_of(line)
    for option in re.findall(r"(?<= )--[a-z-]+", line):
        assert option in told, f"{line}: there is no {option}"


def test_the_table_leaves_out_no_command():
    told = {line.split()[1] for line in TABLE if line.startswith("fleet ")}
    assert sorted(NAMES - told) == []


def test_the_table_leaves_out_no_command_of_the_device():
    for program, parser in (("fleet-agent", agent_parser()), ("fleet-host", host_parser())):
        subparsers = next(action for action in parser._actions if action.dest == "command")
        told = {line.split()[1] for line in TABLE if line.startswith(f"{program} ")}
        assert told == set(subparsers.choices or ()), program


def test_the_check_would_see_a_command_that_is_gone():
    with pytest.raises(KeyError):
        help_of("fleet frobnicate FILE")
    with pytest.raises(KeyError):
        help_of("fleet-agent frobnicate")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    text = page.read_text(encoding="utf-8")
    targets = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", re.sub(r"```.*?```|`[^`\n]*`", "", text, flags=re.DOTALL))
    broken = [
        target
        for target in targets
        if not re.match(r"[a-z]+:", target) and not (page.parent / target).resolve().exists()
    ]
    assert broken == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_targets_of_make_exist(page):
    known = set(re.findall(r"^([a-z0-9-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    text = page.read_text(encoding="utf-8")
    named = re.findall(r"(?:`|^    |^\$ )(?:[A-Z]+=\S+ )*make ([a-z0-9-]+)", text, re.MULTILINE)
    assert sorted(set(named) - known) == []


def test_files_that_the_readme_pushes_exist():
    for file in re.findall(r"(?:components|deploy|docs)/[\w./-]*\w/?", README):
        assert (ROOT / file).exists(), file


def test_packages_are_named_by_the_version_of_now():
    version = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
    named = {
        found
        for page in PAGES
        for found in re.findall(r"wasmfleet-agent_(\d[\w.]*)_", page.read_text(encoding="utf-8"))
    }
    assert named == {version}
