"""`docs/cli.md` is what the commands say of themselves."""

import pytest

from fleet.cli import page
from fleet.cli.answers import ANSWERS
from fleet.cli.base import EXIT_CODES
from tests.fleet.cli.walk import COMMANDS


def test_the_page_is_what_the_commands_say():
    assert page.PAGE.read_text() == page.text(), "write it again: python -m fleet.cli.page"


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_stands_there_with_its_options_and_its_answer(name):
    section = page.text().partition(f"### `fleet {name}`\n")[2].partition("\n#")[0]
    assert f"    fleet {name}" in section
    for option in COMMANDS[name].own:
        assert option.hidden or option.opts[0] in section
    assert ("\nJSON" in section) == (name in ANSWERS)
    assert all(line.strip() in section for line in COMMANDS[name].examples.splitlines())


def test_the_table_of_exit_codes_is_there():
    for code, meaning in EXIT_CODES:
        assert f"| {int(code)} | {meaning} |" in page.text()
