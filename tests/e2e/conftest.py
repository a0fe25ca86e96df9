"""Fixtures of the end-to-end tests: a fleet of real processes, one for each module of tests."""

import pytest

from tests.e2e.stage import GROUP, Stage


@pytest.fixture(scope="module")
def stage(tmp_path_factory):
    with Stage(tmp_path_factory.mktemp("fleet")) as made:
        yield made


@pytest.fixture(scope="module")
def device(stage):
    """A device of the group that runs v1."""
    made = stage.do(stage.scene.add_device("berlin", GROUP))
    stage.do(stage.pushed("v1.wasm"))
    return made
