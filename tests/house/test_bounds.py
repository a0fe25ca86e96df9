"""The constraint file of `make test-bounds`: each library of pyproject.toml, at its lowest version."""

import tomllib

import pytest
from packaging.requirements import Requirement

from deploy.dependency_bounds import PYTHONS, ROOT, BoundsError, _lowest, interpreter, lowest

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_every_library_has_its_lower_bound_in_the_lowest_set():
    pinned = {line.partition("==")[0]: line.partition("==")[2] for line in lowest()}
    groups = [PROJECT["dependencies"], *(PROJECT["optional-dependencies"][each] for each in ("agent", "cli", "server"))]
    named = [Requirement(line) for group in groups for line in group if not line.startswith("wasmfleet[")]
    assert pinned.keys() == {each.name for each in named}
    for each in named:
        assert each.specifier.contains(pinned[each.name]), each


def test_a_library_without_a_lower_bound_is_named():
    with pytest.raises(BoundsError, match="starlette"):
        _lowest(Requirement("starlette<2"))


def test_the_first_python_that_is_tried_is_the_oldest_that_the_project_supports():
    assert PROJECT["requires-python"] == f">={PYTHONS[0]}"
    assert interpreter("2.0") is None
