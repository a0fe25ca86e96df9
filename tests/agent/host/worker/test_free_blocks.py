"""Pages that a forked child writes to, with and without free blocks in its parent."""

import subprocess
import sys

CHILD = """
import os, sys
from agent.host.worker import free_blocks

size, holes, every = map(int, sys.argv[1:4])
kept = [bytes(size) for _ in range(holes * every)]
del kept[::every]
if sys.argv[4] == "filled":
    free_blocks.fill()
pid = os.fork()
if pid == 0:
    mine = [bytes(size) for _ in range(holes // 2)]
    os.write(1, str(len({id(each) // 4096 for each in mine})).encode())
    os._exit(0)
os.waitpid(pid, 0)
"""


def pages(how):
    """Pages on which a child's objects begin, half as many as there are holes, each hole among many objects."""
    command = [sys.executable, "-c", CHILD, "1500", "2000", "5", how]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    return int(done.stdout)


def test_a_childs_objects_stand_together_where_no_block_is_free():
    together, scattered = pages("filled"), pages("holes")
    assert scattered == 1000
    assert together < scattered / 2
