import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

import support


@pytest.fixture
def host(tmp_path):
    """A running host; whatever it started is gone afterwards."""
    with_host = support.Host(tmp_path)
    yield with_host
    with_host.close()
