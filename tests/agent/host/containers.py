"""Situations of a host in a container: root with fewer rights than on a device, as a prefix of its command line."""

import sys

from agent.host.sandbox import sandbox

FORBID = """
import errno, os, sys, pyseccomp
rules = pyseccomp.SyscallFilter(pyseccomp.ALLOW)
for name in ("unshare", "mount", "umount2", "pivot_root", "setns"):
    rules.add_rule(pyseccomp.ERRNO(errno.EPERM), name)
rules.load()
os.execv(sys.argv[1], sys.argv[1:])
"""
"""Filter of system calls as Docker's and Podman's without CAP_SYS_ADMIN."""

NO_NAMESPACES = (sys.executable, "-c", FORBID)
KEPT = ["chown", "dac_override", "fowner", "fsetid", "kill", "setgid", "setuid", "setpcap", "net_bind_service"]
"""Capabilities that Docker leaves, beside a few that nothing here needs."""

DOCKER = ("setpriv", f"--bounding-set=-all,{','.join(f'+{name}' for name in KEPT)}", *NO_NAMESPACES)

MAPPED = """
import ctypes, os, sys
ready, (child, parent) = os.pipe(), os.pipe()
pid = os.getpid()
if os.fork() == 0:  # outside of the namespace
    os.read(ready[0], 1)
    for name in ("uid_map", "gid_map"):
        with open(f"/proc/{pid}/{name}", "w") as file:
            file.write("0 0 65536")
    os.write(parent, b"x")
    os._exit(0)
assert ctypes.CDLL(None).unshare(0x10000000) == 0
os.write(ready[1], b"x")
os.read(child, 1)
os.wait()
os.setgid(0), os.setuid(0)
os.execv(sys.argv[1], sys.argv[1:])
"""
"""Root in a user namespace of 65,536 users."""
PREFIXES = {
    # one user is mapped: Podman and Docker without subordinate users, `unshare -r`
    "rootless": ("unshare", "--user", "--map-root-user"),
    # 65,536 users are mapped, with none of the host's range: LXC, Podman
    "lxc": (sys.executable, "-c", MAPPED),
    "rootless, filtered": ("unshare", "--user", "--map-root-user", *NO_NAMESPACES),
    "docker": DOCKER,
    "docker --cap-drop=all": ("setpriv", "--bounding-set=-all", *NO_NAMESPACES),
    "docker --cap-drop=sys_admin alone": ("setpriv", "--bounding-set=-sys_admin"),
}
ROOT, USER, BARE = sandbox.WAYS
ALL = frozenset(sandbox.LAYERS)
NAMESPACES = frozenset({"network", "mount"})
FOUND = {
    "rootless": (USER, ALL),
    "lxc": (USER, ALL),
    "rootless, filtered": (BARE, ALL - NAMESPACES - {"user"}),
    "docker": (ROOT, ALL - NAMESPACES),
    "docker --cap-drop=all": (BARE, ALL - NAMESPACES - {"user"}),
    # a user namespace gives a worker what root lacks
    "docker --cap-drop=sys_admin alone": (USER, ALL),
}
"""By situation: the way in which a host runs there, and the isolation layers of its workers."""
