"""What holds for every test."""

import os

import pytest


def pytest_collection_modifyitems(items):
    """A test that needs root says so where there is none, whichever way it was chosen."""
    if os.geteuid() == 0:
        return
    for item in items:
        if item.get_closest_marker("root"):
            item.add_marker(pytest.mark.skip(reason="needs root: make test-root"))
