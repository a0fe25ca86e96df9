import pytest
from channel_worker import ChannelWorker, Zygote


@pytest.fixture(scope="module")
def zygote():
    made = Zygote()
    yield made
    made.close()


@pytest.fixture
def worker(zygote):
    """Make workers with a channel; each ends with the test."""
    made = []

    def make(guest="probe", **how):
        made.append(ChannelWorker(how.pop("zygote", zygote), guest, **how))
        return made[-1]

    yield make
    for one in made:
        one.close()
