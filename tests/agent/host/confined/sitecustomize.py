"""Refuse and report every import after a process has entered its sandbox; loaded by PYTHONPATH.

Where the interpreter's library can still be read from inside (a user without namespaces, a library below /usr/lib), the
import would succeed by luck. Refusing makes every machine behave like one with an empty root.
"""

import os
import sys

MARK = "import after confinement"


class Recorder:
    """First of all finders. Wraps `sandbox.apply` as soon as that module is there."""

    def __init__(self):
        self.confined = False
        self.wrapped = False

    def find_spec(self, name, path=None, target=None):
        sandbox = sys.modules.get("agent.host.sandbox.sandbox")
        if not self.wrapped and hasattr(sandbox, "apply"):
            self.wrapped = True
            enter = sandbox.apply

            def enter_and_watch(plan):
                layers = enter(plan)
                self.confined = True
                os.write(2, f"confined: {plan.filter.__qualname__}\n".encode())
                return layers

            sandbox.apply = enter_and_watch
        if self.confined:
            os.write(2, f"{MARK}: {name}\n".encode())
            raise ModuleNotFoundError(f"no files here: {name}", name=name)


sys.meta_path.insert(0, Recorder())
