"""Cut the power of an agent at a named write or effect; loaded into it by PYTHONPATH.

The file that `WASMFLEET_TEST_CUT` names says where, as `NAME HOW`, once; see `tests/agent/power_cut.py`.
"""

import sys

if "agent.cli" in sys.orig_argv and "run" in sys.orig_argv:
    import os
    from pathlib import Path

    from agent import disk
    from tests.agent.power_cut import Cut

    plan = Path(os.environ["WASMFLEET_TEST_CUT"])
    cuts = []

    def reached(what, point, path, data):
        if not cuts and plan.exists():
            cuts.append(Cut(*plan.read_text().split()))
            plan.unlink()
        for cut in cuts:
            cut(what, point, path, data)

    disk.reached = reached
