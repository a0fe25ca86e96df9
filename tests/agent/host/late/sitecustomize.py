"""Makes a worker's ticker speak too late: at each tick of a call its verdict is on the call before.

Loaded into zygotes by PYTHONPATH.
"""

import sys

if "agent.host.zygote" in sys.orig_argv:
    from agent.host import caller, control

    judge = caller.Ticker._judge

    def late(self, call):
        if call.number > 1:
            call.say(control.Overdue(call=call.number - 1, why="a verdict on the call before"))
        judge(self, call)

    caller.Ticker._judge = late
