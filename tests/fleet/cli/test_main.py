"""The command as a whole: its help, its exit codes, and that a mistake is one line."""

import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from fleet.cli.base import EXIT_CODES, Command, Fault, explain
from fleet.cli.main import SECTIONS, main

ROOT = Path(__file__).resolve().parents[3]
NAMES = [name for section in SECTIONS.values() for name in section]


def commands() -> list[tuple[str, click.Command]]:
    """Every command and subcommand by its full name."""
    found: list[tuple[str, click.Command]] = []
    for name in NAMES:
        command = main.get_command(click.Context(main), name)
        assert command is not None
        found.append((name, command))
        if isinstance(command, click.Group):
            found += [(f"{name} {inner}", each) for inner, each in command.commands.items()]
    return found


@pytest.mark.parametrize(("name", "command"), commands(), ids=lambda value: value if isinstance(value, str) else "")
def test_every_command_explains_itself_with_an_example(name, command):
    result = CliRunner().invoke(main, [*name.split(), "--help"])
    assert result.exit_code == 0
    assert command.name == name.rsplit(maxsplit=1)[-1]
    if isinstance(command, Command):
        assert f"fleet {name.split()[0]}" in result.output.partition("Examples:")[2]
        assert "--quiet" in result.output


@pytest.mark.parametrize(("name", "command"), commands(), ids=lambda value: value if isinstance(value, str) else "")
def test_options_call_their_values_by_what_they_are(name, command):
    for option in command.params:
        record = option.get_help_record(click.Context(command)) if isinstance(option, click.Option) else None
        shown = record[0] if record and option.metavar != "TEXT" else ""  # a note is a text
        assert not {"TEXT", "INTEGER", "RANGE", "FLOAT", "OUTPUT"}.intersection(shown.split()), f"{name} {shown}"


def test_the_help_lists_every_command_and_exit_code():
    result = CliRunner().invoke(main, ["--help"])
    assert result.exit_code == 0
    for section, entries in SECTIONS.items():
        assert f"{section}:" in result.output
        for name, entry in entries.items():
            assert f"  {name} " in result.output
            assert entry.short in result.output
    for code, meaning in EXIT_CODES:
        assert f"  {int(code)} " in result.output
        assert meaning in result.output


def loaded_by(*arguments: str) -> set[str]:
    """Names of the modules that `fleet ...` has loaded when it ends, without those of the interpreter's own start.

    At its start an interpreter loads its site's hooks, too: Debian's has a `sitecustomize`.
    """
    script = (
        "import sys\n"
        "began = set(sys.modules)\n"
        "from fleet.cli.main import main\n"
        "try: main(sys.argv[1:])\n"
        "except SystemExit: pass\n"
        "print('LOADED', *sorted(set(sys.modules) - began))\n"
    )
    command = [sys.executable, "-c", script, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
    return set(done.stdout.splitlines()[-1].split()[1:])


def test_the_help_is_fast_because_it_imports_next_to_nothing():
    loaded = loaded_by("--help")
    assert {name for name in loaded if name.split(".")[0] in {"agent", "fleet", "signing"}} == {
        "fleet",
        "fleet.cli",
        "fleet.cli.base",
        "fleet.cli.main",
    }
    heavy = {"rich", "httpx", "msgspec", "tuf", "cryptography", "asyncio", "ssl"}
    assert not heavy & loaded
    installed = {top for name in loaded if (top := name.split(".")[0]) not in sys.stdlib_module_names}
    assert {top for top in installed if not top.startswith("_")} <= {"agent", "click", "fleet", "signing"}


HTTP = {"httpx", "ssl"}
TRUST = {"tuf", "securesystemslib", "cryptography"}
QUERY = {"univers"}


@pytest.mark.parametrize(
    ("command", "without"),
    [
        *((f"{name} --help", HTTP | TRUST | QUERY) for name in ("status", "rollout", "component", "bundle", "demo")),
        ("completion bash", HTTP | TRUST | QUERY | {"msgspec", "rich"}),
        ("secret --help", {"tuf"} | QUERY),
        ("operators --help", TRUST | QUERY),
        *((f"{name} --help", QUERY | {"sqlite3", "starlette"}) for name in ("push", "keys", "server")),
    ],
)
def test_a_commands_help_loads_no_library_that_only_its_work_needs(command, without):
    loaded = loaded_by(*command.split())
    assert "fleet.cli.base" in loaded
    assert not (without | {"asyncio"}) & loaded


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["no-such-verb"], "no-such-verb"),
        (["devices", "--no-such-option"], "--no-such-option"),
        (["why"], "DEVICE"),
        (["init"], "--dev"),
        (["init", "--dev", "--solo"], "Choose one of --dev"),
        (["init", "--solo", "--team", "--root", __file__], "Choose one of --dev"),
        (["init", "--dev", "--root", __file__], "--team and --root belong together"),
        (["push", "x.wasm"], "--group or --device"),
        (["push", "x.wasm", "--group", "a", "--device", "b-00000000"], "--group or --device"),
        (["remove", "hello"], "--group or --device"),
        (["deploy", "hello", "--group", "edge-eu"], "names no version"),
        (["deploy", "hello@one", "--group", "edge-eu"], "not SemVer"),
        (["deploy", "hello@1.0.0", "--group", "edge-eu", "--config", "level"], "--config key=value"),
        (["deploy", "hello@1.0.0", "--group", "edge-eu", "--as", "No Name"], "is not a name"),
        (["enroll-token", "--valid", "soon"], "is not a duration"),
        (["enroll-token", "--valid", "9999d"], "'9999d' is too long; the most is 3660d"),
        (["psuh", "hello.wasm"], "No such command 'psuh'. Did you mean 'push'? See "),
        (["push", "hello.wasm", "--grp", "edge-eu"], "'--grp'"),
        (["label", "gate-00000000", "colour"], "is not a label"),
        (["completion", "tcsh"], "tcsh"),
    ],
)
def test_wrong_usage_is_one_line_and_exit_code_2(arguments, words, fleet, home):
    result = fleet(*arguments)
    assert result.exit_code == 2
    lines = result.stderr.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    assert words in lines[0]


@pytest.mark.parametrize("group", [name for name, command in commands() if isinstance(command, click.Group)])
def test_a_group_lists_what_its_commands_do_and_cuts_no_sentence_off(group, fleet):
    assert "..." not in fleet(group, "--help").stdout.partition("Commands:")[2]


def test_no_color_holds_for_errors_too(fleet, monkeypatch, capsys):
    monkeypatch.setattr(click.utils, "should_strip_ansi", lambda _stream=None, color=None: color is False)
    explain(Fault("it broke"))
    assert capsys.readouterr().err.startswith("\x1b[31m")
    monkeypatch.setenv("NO_COLOR", "1")
    explain(Fault("it broke"))
    assert capsys.readouterr().err == "error: it broke\n"


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_prints_a_script(shell, fleet):
    result = fleet("completion", shell)
    assert result.exit_code == 0
    assert "_FLEET_COMPLETE" in result.stdout


def test_an_unforeseen_error_is_a_line_that_asks_for_a_report(capsys):
    assert explain(ZeroDivisionError("division by zero")) == 70
    assert capsys.readouterr().err.startswith("error: ZeroDivisionError: division by zero; this is a bug in wasmfleet")


def test_debug_shows_the_traceback_and_without_it_there_is_none(home, capsys):
    with pytest.raises(SystemExit):
        main(["--home", "/nowhere", "devices"])
    assert "Traceback" not in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["--home", "/nowhere", "devices", "--debug"])
    assert "Traceback" in capsys.readouterr().err


def test_a_fault_is_what_why_and_what_to_do():
    assert str(Fault("it broke.", "it was old", "buy a new one")) == "it broke; it was old; buy a new one"
