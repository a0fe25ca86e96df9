"""Options and fixtures for every test."""

import functools
import inspect
import os

import pytest

from tests import rotation

try:
    from hypothesis import HealthCheck, settings
except ModuleNotFoundError:
    pass  # on an emulated board there is pytest alone
else:
    # How long an example takes says how busy the machine is. What decides over a change plays the same examples each
    # time: new ones are looked for by everybody's own runs, and by `make fuzz`.
    settings.register_profile(
        "wasmfleet", deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=bool(os.environ.get("CI"))
    )
    settings.load_profile("wasmfleet")

try:
    from click.testing import CliRunner, Result
except ModuleNotFoundError:
    pass
else:
    if "mix_stderr" in inspect.signature(CliRunner).parameters:  # click 8.1, Debian's: as 8.2 does without being asked
        CliRunner.__init__ = functools.partialmethod(CliRunner.__init__, mix_stderr=False)
        Result.output = property(lambda result: result.stdout + result.stderr)


def pytest_addoption(parser):
    parser.addoption("--record-golden", action="store_true", help="record the golden files anew: make golden")


def pytest_report_header():
    return f"rotated cases: {rotation.VARIABLE}={rotation.choose()}"


@pytest.fixture(scope="session")
def golden(request):
    """Compare with the golden files, or record them."""
    from tests.golden.support import Golden

    return Golden(record=request.config.getoption("--record-golden"))


def pytest_collection_modifyitems(config, items):
    """A test that needs root says so where there is none, whichever way it was chosen; long files begin first."""
    if hasattr(config, "workerinput"):  # a process of pytest-xdist
        from tests.order import place  # not on an emulated board, which has a part of the tests

        items.sort(key=lambda item: place(item.nodeid))
    if os.geteuid() == 0:
        return
    for item in items:
        if item.get_closest_marker("root"):
            item.add_marker(pytest.mark.skip(reason="needs root: make test-root"))
