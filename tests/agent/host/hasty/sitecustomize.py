"""Make a host judge the pace of its clients over a second instead of half a minute.

Loaded into its processes by PYTHONPATH.
"""

import sys

if any(name.startswith("agent.host.") for name in sys.orig_argv) or any("fleet-host" in name for name in sys.orig_argv):
    from agent.host.http import pace, router

    pace.WINDOW_S = 1
    router._SWEEP_S = 0.25
