"""Examples of the page on rollouts: each is a command that `fleet` takes."""

import re
import shlex
from pathlib import Path

import click
import pytest

from fleet.cli.main import main as fleet
from fleet.protocol.codes import Outcome, RolloutState

PAGE = (Path(__file__).resolve().parents[3] / "docs" / "rollouts.md").read_text()
EXAMPLES = re.findall(r"^\$ fleet (.+)$", PAGE, re.MULTILINE)


def test_the_page_has_examples():
    assert len(EXAMPLES) > 10


@pytest.mark.parametrize("example", EXAMPLES)
def test_each_example_is_taken(example):
    command, words = fleet, shlex.split(example)
    context = click.Context(fleet, info_name="fleet")
    while isinstance(command, click.Group):
        name, command, words = command.resolve_command(context, words)
        context = click.Context(command, parent=context, info_name=name)
    command.make_context(command.name, words, parent=context.parent)


def test_the_page_names_every_outcome_and_state():
    earlier = {Outcome.REFUSED, Outcome.SKIPPED, RolloutState.HALTED}
    missing = [str(word) for word in (*Outcome, *RolloutState) if word not in earlier and f"`{word}`" not in PAGE]
    assert not missing


def test_every_option_of_the_page_is_one_of_deploy():
    deploy = fleet.get_command(click.Context(fleet), "deploy")
    known = {option for each in deploy.params for option in each.opts}
    named = set(re.findall(r"`(--[a-z-]+)", PAGE))
    assert named <= known
