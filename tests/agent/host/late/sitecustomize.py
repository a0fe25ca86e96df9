"""Make a worker's watchdog late: at each tick, its verdict is about the previous call.

Loaded into zygotes by PYTHONPATH.
"""

import sys

if "agent.host.worker.zygote" in sys.orig_argv:
    from agent.host.ipc import worker_api
    from agent.host.worker import watchdog

    judge = watchdog.CallWatchdog._judge

    def late(self, call):
        if call.number > 1:
            call.say(worker_api.Overdue(call=call.number - 1, why="a verdict on the call before"))
        judge(self, call)

    watchdog.CallWatchdog._judge = late
