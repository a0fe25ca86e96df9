"""Simulate a guest that escaped WebAssembly: loaded into zygotes by PYTHONPATH, answers requests with native code.

A request's target says what to try; the answer is JSON: attempt -> what came of it, an errno's name or "done".
"""

import os
import sys

if "agent.host.cli" in sys.orig_argv and "WASMFLEET_TEST_CHIPS" in os.environ:  # for the supervisor, not for workers
    import runpy

    runpy.run_path(os.path.join(os.path.dirname(__file__), "..", "chips", "sitecustomize.py"))  # noqa: PTH118, PTH120

if "agent.host.worker.zygote" in sys.orig_argv:
    import contextlib
    import ctypes
    import errno
    import fcntl
    import gc
    import json
    import mmap
    import pathlib
    import socket
    import stat

    from agent.host.ipc import metrics_page, stats_page
    from agent.host.worker import runner

    libc = ctypes.CDLL(None, use_errno=True)
    libc.syscall.restype = ctypes.c_long
    GENERIC = {  # of every architecture that Linux has come to since 2011
        "socket": 198,
        "clone": 220,
        "execve": 221,
        "kill": 129,
        "ptrace": 117,
        "vm_read": 270,
        "unshare": 97,
        "mount": 40,
    }
    NUMBERS = {
        "x86_64": {
            "socket": 41,
            "clone": 56,
            "fork": 57,
            "execve": 59,
            "kill": 62,
            "ptrace": 101,
            "vm_read": 310,
            "unshare": 272,
            "mount": 165,
        },
        "aarch64": GENERIC,
        "riscv64": GENERIC,
    }[os.uname().machine]
    NUMBERS |= {
        "pidfd_open": 434,
        "clone3": 435,
        "accept4": {"x86_64": 288}.get(os.uname().machine, 242),
        "io_uring_setup": 425,
        "bpf": {"x86_64": 321}.get(os.uname().machine, 280),
    }

    def call(name, *arguments):
        number = NUMBERS.get(name)
        if number is None:
            return "ENOSYS"
        result = libc.syscall(
            ctypes.c_long(number), *[ctypes.c_long(a) if isinstance(a, int) else a for a in arguments]
        )
        if result == 0 and name in {"clone", "fork"}:
            os._exit(0)
        return "done" if result >= 0 else errno.errorcode[ctypes.get_errno()]

    def attempt(function, *arguments):
        try:
            function(*arguments)
        except OSError as error:
            return errno.errorcode.get(error.errno, str(error))
        except Exception as error:  # noqa: BLE001 - whatever it is, it was not done
            return type(error).__name__
        return "done"

    def descriptors():
        kinds = {}
        for fd in range(1024):
            try:
                mode = os.fstat(fd).st_mode
            except OSError:
                continue
            kinds[fd] = (
                "socket" if stat.S_ISSOCK(mode) else "device" if stat.S_ISCHR(mode) else "file" if mode else "none"
            )
        return kinds

    def overwrite_the_image():
        for fd in range(3, 64):
            try:
                if os.fstat(fd).st_size > 8192:
                    os.pwrite(fd, b"evil", 0)
                    return "done"
            except OSError:
                continue
        return "EPERM"

    def forge_metrics(caller):
        """Write all over the page of the component's own figures, and try to make it smaller under its reader."""
        (fd,) = (fd for fd in range(3, 1024) if size_of(fd) == metrics_page.SIZE)
        result = attempt(os.ftruncate, fd, 0)
        caller._parts["wasmfleet:metrics"]._page._map[:] = b"\xff" * metrics_page.SIZE
        return {"truncate": result}

    def size_of(fd):
        with contextlib.suppress(OSError):
            return os.fstat(fd).st_size
        return -1

    def pages():
        found = []
        for fd in range(3, 1024):
            with contextlib.suppress(OSError):
                if os.fstat(fd).st_size == stats_page.SIZE:
                    found.append(fd)
        return found

    def truncate_the_page():
        return next(attempt(os.ftruncate, fd, 0) for fd in pages())

    def try_everything(facts):
        host, key, other = facts["host"], facts["key"], facts["other"]
        unix = ctypes.create_string_buffer(b"\x01\x00" + facts["sock"].encode() + b"\0" * 8)
        results = {
            "read a key": attempt(os.open, key, os.O_RDONLY),
            "read another's data": attempt(os.open, other, os.O_RDONLY),
            "list /": attempt(os.listdir, "/proc"),
            "write a file": attempt(os.open, "/tmp/escaped", os.O_WRONLY | os.O_CREAT),
            "read the host's memory by /proc": attempt(os.open, f"/proc/{host}/mem", os.O_RDONLY),
            "an internet socket": call("socket", 2, 1, 0),
            "a netlink socket": call("socket", 16, 3, 0),
            "a unix socket": call("socket", 1, 5, 0),
            "accept a connection": call("accept4", 0, None, None, 0),
            "fork": call("fork"),
            "clone": call("clone", 17, 0, 0, 0, 0),
            "clone3": call("clone3", 0, 0),
            "execute": call("execve", b"/bin/true", None, None),
            "trace the host": call("ptrace", 16, host, 0, 0),
            "read the host's memory": call("vm_read", host, None, 0, None, 0, 0),
            "signal the host": call("kill", host, 0),
            "signal everyone": call("kill", -1, 0),
            "signal a sibling": call("kill", facts["sibling"], 0),
            "a handle of the host": call("pidfd_open", host, 0),
            "new namespaces": call("unshare", 0x10000000),
            "mount": call("mount", b"none", b"/", b"tmpfs", 0, None),
            "io_uring": call("io_uring_setup", 1, ctypes.create_string_buffer(256)),
            "bpf": call("bpf", 0, None, 0),
            "executable memory": attempt(mmap.mmap, -1, 4096, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, 7),
            "overwrite the image": overwrite_the_image(),
            "truncate the page of figures": truncate_the_page(),
        }
        del unix
        return results

    def asked(caller, **ask):
        """The egress's reply to a question of the worker's own, and the descriptors that come along."""
        egress = caller._outgoing._loop._ask_sock
        egress.setblocking(True)
        egress.send(json.dumps({"type": "connect", "id": 7, "timeout_ms": 5000, **ask}).encode())
        reply, fds, _, _ = socket.recv_fds(egress, 4096, 4)
        return json.loads(reply), [socket.socket(fileno=fd) for fd in fds]

    def change_data(facts):
        """Read the instance's data package, and try everything else with it and around it."""
        place, own = facts["inside"], os.open(facts["inside"], os.O_RDONLY)
        text = os.pread(own, 100, 0).decode()
        unmount = {"x86_64": 166}.get(os.uname().machine, 39)
        results = {
            "write to it": attempt(os.open, place, os.O_RDWR),
            "cut it off": attempt(os.truncate, place, 0),
            "write to what is open": attempt(os.pwrite, own, b"x", 0),
            "change its mode": attempt(os.fchmod, own, 0o777),
            "run it": attempt(os.execv, place, [place]),
            "map it to run": attempt(mmap.mmap, own, 4, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_EXEC),
            "remove it": attempt(os.unlink, place),
            "put another beside it": attempt(os.open, f"{place}-2", os.O_WRONLY | os.O_CREAT),
            "read that of another": attempt(os.open, facts["another"], os.O_RDONLY),
            "open it where it is kept": attempt(os.open, facts["outside"], os.O_RDONLY),
            "unmount it": "done" if libc.syscall(unmount, place.encode(), 2) == 0 else "EPERM",
            "mount it anew": call("mount", b"none", place.encode(), 0, 32 | 4096, 0),
        }
        return {"text": text, "tried": results}

    def lead_elsewhere(caller, facts):
        """Try to get beyond the grants by what the egress hands over: for TCP, for UDP, and by asking alone."""
        (host, tcp, udp), other = facts["granted"], tuple(facts["other"])
        _, (stream,) = asked(caller, scheme="tcp", authority=f"{host}:{tcp}")
        disconnect = ctypes.create_string_buffer(16)
        results = {
            "connect a TCP socket to another": attempt(stream.connect, other),
            "disconnect it": "EPERM" if libc.connect(stream.fileno(), disconnect, 16) else "done",
            "bind it": attempt(stream.bind, ("127.0.0.1", 0)),
            "listen on it": attempt(stream.listen),
        }
        _, (datagrams,) = asked(caller, scheme="udp", authority=f"{host}:{udp}")
        results |= {
            "send a datagram to another": attempt(datagrams.sendto, b"escaped", other),
            "send a message to another": attempt(datagrams.sendmsg, [b"escaped"], [], 0, other),
            "connect it to another": attempt(datagrams.connect, other),
            "ask for another by TCP": asked(caller, scheme="tcp", authority="{}:{}".format(*other))[0]["error"],
            "ask for another by UDP": asked(caller, scheme="udp", authority="{}:{}".format(*other))[0]["error"],
            "ask for the same by HTTP": asked(caller, scheme="http", authority=f"{host}:{tcp}")[0]["error"],
            "say it was a name": asked(caller, scheme="tcp", authority="{}:{}".format(*other), name="granted.example")[
                0
            ]["error"],
        }
        return {"tried": results, "families": [stream.family.name, datagrams.family.name]}

    def read_elsewhere(caller, facts):
        """Try to get more of the device's directory than to read what is in it."""
        (place,) = caller._readable.values()
        handle = os.open(place, os.O_RDONLY)
        tried = {
            "write a file that is there": attempt(os.open, f"{place}/site.json", os.O_WRONLY),
            "truncate it": attempt(os.open, f"{place}/site.json", os.O_RDONLY | os.O_TRUNC),
            "make a file": attempt(os.open, f"{place}/new", os.O_WRONLY | os.O_CREAT),
            "make a directory": attempt(os.mkdir, f"{place}/made"),
            "make a link": attempt(os.symlink, "/etc", f"{place}/link"),
            "remove a file": attempt(os.unlink, f"{place}/site.json"),
            "rename a file": attempt(os.rename, f"{place}/site.json", f"{place}/other"),
            "link it elsewhere": attempt(os.link, f"{place}/site.json", f"{place}/hard"),
            "follow a link out": attempt(os.open, f"{place}/out", os.O_RDONLY),
            "go up by a handle": attempt(lambda: os.open("../secret", os.O_RDONLY, dir_fd=handle)),
            "go up by a path": attempt(os.open, f"{place}/../secret", os.O_RDONLY),
            "read beside it": attempt(os.open, facts["secret"], os.O_RDONLY),
            "read what another reads": attempt(os.open, facts["other"], os.O_RDONLY),
            "mount it anew": call("mount", b"none", place.encode(), None, 32, None),
        }
        return {"tried": tried, "read": pathlib.Path(f"{place}/site.json").read_text(), "descriptors": descriptors()}

    def misuse_hardware(caller):
        """Try to make more of a line and of a serial port than the grants, and to reach the nodes behind them."""
        (line,) = caller._parts["wasi:gpio"].fds
        (port,) = caller._parts["wasmfleet:serial"]._fds
        calls = {
            "make the line an output": (line, 0xC110B40D),
            "request a line": (line, 0xC250B407),
            "look at the chip": (line, 0x8044B401),
            "change the speed": (port, 0x5402),
            "change the speed with the rest": (port, 0x5404),
            "change the line discipline": (port, 0x5423),
            "type into the port": (port, 0x5412),
            "make it its terminal": (port, 0x540E),
            "let others open it": (port, 0x540D),
            "change RS-485": (port, 0x542F),
            "send a break": (port, 0x5409),
            "move its control lines": (port, 0x5418),
        }
        tried = {what: attempt(fcntl.ioctl, fd, number, bytearray(600)) for what, (fd, number) in calls.items()}
        for node in ("/dev/gpiochip0", "/dev/ttyS0", "/dev/mem", "/dev/tty"):
            tried[f"open {node}"] = attempt(os.open, node, os.O_RDWR)
        tried["open the port again"] = attempt(os.open, f"/proc/self/fd/{port}", os.O_RDWR)
        allowed = {
            "read the line": attempt(fcntl.ioctl, line, 0xC010B40E, bytearray(16)),
            "set the line": attempt(fcntl.ioctl, line, 0xC010B40F, bytearray(16)),
            "drop input": attempt(fcntl.ioctl, port, 0x540B, 0),
        }
        return {"tried": tried, "allowed": allowed, "descriptors": descriptors()}

    def attack(caller, target, body):
        if target == b"/directories":
            return 200, b"", json.dumps(read_elsewhere(caller, json.loads(body))).encode()
        if target == b"/hardware":
            return 200, b"", json.dumps(misuse_hardware(caller)).encode()
        if target == b"/sockets":
            return 200, b"", json.dumps(lead_elsewhere(caller, json.loads(body))).encode()
        if target == b"/metrics":
            return 200, b"", json.dumps(forge_metrics(caller)).encode()
        if target == b"/data":
            return 200, b"", json.dumps(change_data(json.loads(body))).encode()
        if target == b"/hang":
            # Every figure that this process can write says that no call is in flight, while one never ends.
            while True:
                caller._page.rest()
        answer = {
            "tried": try_everything(json.loads(body)),
            "descriptors": descriptors(),
            "pages": len(pages()),
            "uid": os.getuid(),
            "environment": dict(os.environ),
            "known": [
                each._config["token"]
                for each in gc.get_objects()
                if isinstance(each, runner.GuestRunner) and "token" in each._config
            ],
        }
        return 200, b"", json.dumps(answer).encode()

    def handle(self, head, body, way):
        return attack(self, bytes(head[1]), bytes(body))

    def answer(self, method, target, headers, body, control):
        return attack(self, bytes(target), bytes(body))

    runner.GuestRunner.handle = handle  # of a slot in a shared worker
    runner.GuestRunner.answer = answer  # of a worker of its own
