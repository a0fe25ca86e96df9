"""Kill a process of the host in a named phase of a swap; loaded into the supervisor by PYTHONPATH.

The file that `WASMFLEET_TEST_KILL` names says when and whom, as `INSTANCE PHASE VICTIM`, once: right after the message
of the supervisor's that begins that phase was sent to a worker of that instance, or to the router.
"""

import sys

if "agent.host.cli" in sys.orig_argv:
    import os
    import signal
    from pathlib import Path

    from agent.host.supervisor.helpers import RouterHandle
    from agent.host.supervisor.worker_handle import ControlSocket

    plan = Path(os.environ["WASMFLEET_TEST_KILL"])
    lanes = {}
    send = ControlSocket.send

    def parent(pid):
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])

    def router():
        for path in Path("/proc").glob("[0-9]*"):
            try:
                command = (path / "cmdline").read_bytes()
                if parent(path.name) == os.getpid() and b"agent.host.cli" in command:
                    return int(path.name)
            except OSError:
                continue
        raise LookupError("no router")

    def victim(who, instance):
        match who:
            case "old":
                return lanes[f"{instance}/1"].pid
            case "new":
                return lanes[f"{instance}/2"].pid
            case "zygote":
                return parent(lanes[f"{instance}/2"].pid)
            case "router":
                return router()
        return os.getpid()

    def send_and_kill(control, message, *fds):
        send(control, message, *fds)
        lanes[control.owner.name] = control.owner
        kill_after(message)

    def tell_and_kill(handle, message, *fds):
        tell(handle, message, *fds)
        kill_after(message)

    def kill_after(message):
        if plan.exists():
            instance, phase, who = plan.read_text().split()
            if type(message).__name__ == phase and f"{instance}/2" in lanes:
                plan.unlink()
                os.kill(victim(who, instance), signal.SIGKILL)

    tell = RouterHandle._tell
    ControlSocket.send, RouterHandle._tell = send_and_kill, tell_and_kill
