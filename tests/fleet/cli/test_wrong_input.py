"""Whatever is typed at whichever command: one line that says what is wrong, a documented exit code, no traceback."""

import click
import pytest

from fleet.cli.base import EXIT_CODES
from fleet.cli.main import SECTIONS, main

CODES = {int(code) for code, _ in EXIT_CODES}
ODD = ["", "../../etc/passwd", "two\nlines", "-", "x" * 5000, "☃ ünï", "a@b@c", "9" * 40, "{}", "%s%n", "~"]
LONG_RUNNING = {"demo", "serve", "server restore", "publisher run"}
"""They would begin something for real; their options are tried, not their doing."""


def leaves() -> list[tuple[str, click.Command]]:
    found: list[tuple[str, click.Command]] = []
    for name in (name for section in SECTIONS.values() for name in section):
        command = main.get_command(click.Context(main), name)
        inner = command.commands if isinstance(command, click.Group) else {"": command}
        found += [(f"{name} {each}".strip(), made) for each, made in inner.items() if made is not None]
    return found


LEAVES = dict(leaves())


def line(command: click.Command, word: str) -> list[str]:
    """Every argument and every required option of a command, with this word in place of a value."""
    words = []
    for each in command.params:
        if isinstance(each, click.Argument):
            words += [word] * max(each.nargs, 1)
        elif each.required:
            words += [each.opts[0], word]
    return ["--", *words] if not any(w.startswith("-") for w in words) else words


def judge(result, tried: object) -> None:
    assert result.exit_code in CODES, (tried, result.exit_code, result.output)
    assert "Traceback" not in result.output, tried
    if result.exit_code not in {0, 1}:
        # notes and questions may stand before it
        *before, last = result.stderr.strip().splitlines()
        assert last.startswith("error: ") or "error: " in last.partition("]:")[2], (tried, result.stderr)
        assert not [each for each in before if each.startswith("error: ")], tried


@pytest.mark.parametrize("name", LEAVES)
def test_an_unknown_option_is_a_line_and_a_usage_error(name, fleet) -> None:
    result = fleet(*name.split(), "--no-such-option")
    judge(result, name)
    assert result.exit_code == 2
    assert "--no-such-option" in result.stderr


@pytest.mark.parametrize("name", [name for name in LEAVES if name not in LONG_RUNNING])
def test_odd_words_where_there_is_no_fleet(name, fleet, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    for word in ODD:
        judge(fleet(*name.split(), *line(LEAVES[name], word), stdin=""), (name, word))


@pytest.mark.parametrize("name", [name for name in LEAVES if name not in {*LONG_RUNNING, "init"}])
def test_odd_words_where_the_server_knows_nothing(name, fleet, desk, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    for word in ODD:
        judge(fleet(*name.split(), *line(LEAVES[name], word), stdin=""), (name, word))


@pytest.mark.parametrize("name", [name for name in LEAVES if name not in LONG_RUNNING])
def test_odd_values_of_options(name, fleet, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    command = LEAVES[name]
    for option in (each for each in command.params if isinstance(each, click.Option) and not each.is_flag):
        if option.name == "home":
            continue
        for word in ("", "☃", "-1", "9" * 40, "../.."):
            judge(fleet(*name.split(), option.opts[-1], word, *line(command, "x"), stdin=""), (name, option.name, word))
