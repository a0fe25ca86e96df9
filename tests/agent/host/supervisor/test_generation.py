"""Image hash of a generation that may share a worker."""

import hashlib
import os

import pytest
import support

from agent.host.ipc.framing import constant_memfd
from agent.host.supervisor.generation import Generation

IMAGE = b"an image"


@pytest.mark.parametrize(
    ("said", "name"),
    [("a name by the agent", "a name by the agent"), ("", hashlib.sha256(IMAGE).hexdigest())],
)
def test_an_image_that_the_agent_names_is_not_read(said, name):
    fd = constant_memfd("image", lambda fd: os.write(fd, IMAGE))
    run = support.a_run("web", 1, share_worker=True, image_sha256=said)
    generation = Generation(run, fd)
    assert (generation.image_sha256, generation.image_bytes) == (name, len(IMAGE))
    os.close(fd)
