"""Check of a component by this machine's host: read, compile, link and start it, each step as on a device.

    python -m agent.host.compiler.component_check FD < request.json      link and start the image behind FD

`fleet-host check-component` reads a component, has the compiler make an image of it, and starts this module as a
program of its own, which does what a worker does: it maps the image, enters a worker's sandbox and makes an instance,
whose start may trap. No request is sent to it. A component that crashes the engine or uses up a limit is refused, and
says nothing of the next.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Final, NoReturn

import msgspec

from agent.host.ipc import worker_api
from agent.host.sandbox import sandbox
from fleet.component import reader, served
from fleet.protocol import bounds, wire
from fleet.protocol.codes import RejectCode
from fleet.protocol.component_check import LINE_MAX_BYTES, ComponentCheckReply, ComponentCheckRequest, Step
from fleet.protocol.manifest import Grants, Http, Manifest

if TYPE_CHECKING:
    from agent.host.engine.runtime import Engine

_STEP_S: Final = 300
"""For one step; the compiler's own limit of processor time is lower, so this is for a machine under load."""

_WORDS_MAX_BYTES: Final = 64 * 1024
"""Kept of what a step says on standard error: the last lines count."""

_ANY_TRIGGER: Final = "--any-trigger"

Argv = Callable[[str], list[str]]
"""Makes the command line of a module of ours."""


class Refusal(Exception):  # noqa: N818
    """Verdict on a component that a device would not run: the step, the device's code, and the sentence."""

    def __init__(self, step: Step, code: str, problem: str, **more: Any) -> None:
        super().__init__(problem)
        self.step, self.code, self.more = step, code, more


def check(request: ComponentCheckRequest, argv: Argv) -> ComponentCheckReply:
    """Check a component, each step in a process of its own."""
    try:
        image, shape, engine = make_image(request, argv)
        reply = _start(image, request, shape, argv)
        return msgspec.structs.replace(reply, **engine, image_bytes=len(image))
    except Refusal as refusal:
        return ComponentCheckReply(
            file=request.file, ok=False, step=refusal.step, code=refusal.code, problem=str(refusal), **refusal.more
        )


def make_image(request: ComponentCheckRequest, argv: Argv) -> tuple[bytes, reader.Component, dict[str, str]]:
    """Read a component and compile it; return its image, what it is, and `engine` and `machine` of the compiler.

    Raises:
        Refusal: a device would not have compiled it either.
    """
    name = request.name or Path(request.file).name
    engine = _engine(argv)
    data, shape = _read(Path(request.file), name)
    _ask_table(shape, request, name, engine)
    options = compiler_options(request.manifest)
    return _compile(data, argv("agent.host.compiler") + options, engine), shape, engine


def compiler_options(manifest: Manifest | None) -> list[str]:
    """Return what the compiler is told of a component's manifest."""
    if manifest is None:
        return []
    wanted = {"--fuel": bool(manifest.limits.fuel), "--sockets": manifest.grants.sockets}
    return [option for option, holds in wanted.items() if holds]


def _engine(argv: Argv) -> dict[str, str]:
    done = _run([*argv("agent.host.compiler"), "--describe"], b"", Step.COMPILE)
    if done.returncode:
        raise Refusal(Step.COMPILE, *_words(done))
    facts = json.loads(done.stdout)
    return {"engine": facts["engine"], "machine": facts["triple"].removesuffix("-linux")}


def _read(path: Path, name: str) -> tuple[bytes, reader.Component]:
    try:
        with path.open("rb") as file:
            data = file.read(bounds.ARTIFACT_MAX_BYTES + 1)
        return data, reader.read(data, file_name=name)
    except OSError as error:
        raise Refusal(Step.READ, RejectCode.NOT_FOUND, f"cannot read {path}: {error.strerror}") from error
    except reader.NotAComponentError as error:
        code = RejectCode.TOO_LARGE if len(data) > bounds.ARTIFACT_MAX_BYTES else RejectCode.NOT_A_COMPONENT
        raise Refusal(Step.READ, code, str(error)) from error


def _ask_table(shape: reader.Component, request: ComponentCheckRequest, name: str, engine: dict[str, str]) -> None:
    """Refuse what the table knows to be served nowhere: its sentence says more than the linker's."""
    if said := served.problems(shape, request.manifest, file_name=name):
        raise Refusal(Step.LINK, RejectCode.START_FAILED, said[0], **engine)


def _compile(data: bytes, command: list[str], engine: dict[str, str]) -> bytes:
    done = _run(command, data, Step.COMPILE)
    if done.returncode:
        raise Refusal(Step.COMPILE, *_words(done), **engine)
    return done.stdout


def _run(command: list[str], data: bytes, step: Step, fd: int = -1) -> subprocess.CompletedProcess[bytes]:
    """Run a step to its end; of what it says on standard error, the end is kept."""
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, pass_fds=() if fd < 0 else (fd,)) as process:
        assert process.stderr is not None
        said = _End(process.stderr)
        process.stderr = None  # `communicate` would keep all of it
        try:
            out, _ = process.communicate(data, timeout=_STEP_S)
        except subprocess.TimeoutExpired as error:
            process.kill()
            raise Refusal(step, RejectCode.COMPILE_LIMIT, f"the step took more than {_STEP_S} s") from error
        return subprocess.CompletedProcess(command, process.returncode, out, said.text())


class _End(threading.Thread):
    """Reads a stream to its end and keeps the last of it: a component may write without end."""

    def __init__(self, stream: IO[bytes]) -> None:
        super().__init__(daemon=True)
        self._stream = stream
        self._data = b""
        self.start()

    def run(self) -> None:
        """Read until the stream ends."""
        with self._stream:
            while piece := os.read(self._stream.fileno(), _WORDS_MAX_BYTES):
                self._data = (self._data + piece)[-_WORDS_MAX_BYTES:]

    def text(self) -> bytes:
        """Return what is kept, once the stream has ended."""
        self.join()
        return self._data


def _words(done: subprocess.CompletedProcess[bytes]) -> tuple[str, str]:
    """Return the code and the sentence of a program that failed: its own, or what its end means."""
    lines = done.stderr.decode(errors="replace").strip().splitlines()
    if done.returncode < 0:
        name = signal.Signals(-done.returncode).name
        limit = done.returncode in {-signal.SIGXCPU, -signal.SIGABRT}
        why = "it takes more time or memory than a component may" if limit else "the engine crashed, or was killed"
        return RejectCode.COMPILE_LIMIT if limit else RejectCode.COMPILE_FAILED, f"{why} ({name})"
    with contextlib.suppress(ValueError, KeyError, TypeError, IndexError):
        said = json.loads(lines[-1])
        return str(said["code"]), str(said["message"])
    return RejectCode.INTERNAL, f"the check itself failed: {lines[-1] if lines else done.returncode}"


def _start(image: bytes, request: ComponentCheckRequest, shape: reader.Component, argv: Argv) -> ComponentCheckReply:
    manifest, more = request.manifest, []
    if manifest is None:
        everything = Grants(interfaces=tuple(dict.fromkeys(map(reader.bare, shape.imports))))
        manifest = Manifest(name="component", version="0.0.0", trigger=Http(), grants=everything)
        more = [_ANY_TRIGGER]
    fd = os.memfd_create("image")
    try:
        with open(fd, "wb", closefd=False) as file:
            file.write(image)
        command = [*argv("agent.host.compiler.component_check"), str(fd), *more]
        given = msgspec.structs.replace(request, manifest=manifest)
        done = _run(command, msgspec.json.encode(given), Step.START, fd)
    finally:
        os.close(fd)
    try:
        return msgspec.json.decode(done.stdout, type=ComponentCheckReply)
    except wire.JSON_ERRORS:
        raise Refusal(Step.START, *_words(done)) from None


def main(fd: int, *, any_trigger: bool) -> NoReturn:
    """Link and start an image; exit at once, as a guest may have left threads behind.

    `any_trigger`: whatever the component exports will do.
    """
    request = msgspec.json.decode(sys.stdin.buffer.read(LINE_MAX_BYTES), type=ComponentCheckRequest)
    out = os.dup(1)  # standard output becomes the guest's
    reply = _linked(request, fd, any_trigger=any_trigger)
    os.write(out, msgspec.json.encode(reply) + b"\n")
    os._exit(0)


def _linked(request: ComponentCheckRequest, fd: int, *, any_trigger: bool) -> ComponentCheckReply:
    from agent.host.engine import runtime  # noqa: PLC0415 - only here: the other processes need no engine

    assert request.manifest is not None, "given by the process that starts this one"
    try:
        exports = _exports(request.manifest, fd, any_trigger=any_trigger)
        return ComponentCheckReply(file=request.file, ok=True, exports=exports)
    except runtime.EngineError as error:
        step, code, problem = Step.LINK, error.code, str(error)
    except runtime.GuestError as error:
        step, code, problem = Step.START, RejectCode.START_FAILED, f"it failed in its start: {error}".splitlines()[0]
    except sandbox.SandboxError as error:
        step, code, problem = Step.START, RejectCode.CONTAINMENT, str(error)
    return ComponentCheckReply(file=request.file, ok=False, step=step, code=code, problem=problem)


def _exports(manifest: Manifest, fd: int, *, any_trigger: bool) -> tuple[str, ...]:
    """Instantiate the guest in a worker's sandbox; return what it exports for a device to call."""
    from agent.host.engine import adapter_abi, guest, host_interface, runtime  # noqa: PLC0415
    from agent.host.interfaces import registry  # noqa: PLC0415

    limits = manifest.limits
    engine = runtime.Engine(fuel=bool(limits.fuel), pooled=True)
    image = engine.load(f"/proc/self/fd/{fd}")
    adapter_abi.catch_stdout()
    body_bytes = limits.request_bytes + limits.response_bytes
    sandbox.apply(
        sandbox.worker_spec(uid=None, memory_bytes=limits.memory_bytes, body_bytes=body_bytes, storage_bytes=0, data="")
    )
    config = dict.fromkeys(manifest.secrets, "") | {key: each.default or "" for key, each in manifest.config.items()}
    _tick(engine, runtime.TICK_MS / 1000)
    served_here = host_interface.Served(registry.INTERFACES)
    started = guest.start(
        image, limits=limits, grants=manifest.grants, config=config, log=lambda _line: None, served=served_here
    )
    # `served.problems` refuses triggers that no device has
    lacking = [] if any_trigger else [worker_api.lacking(each, started.kinds) for each in manifest.triggers]
    found = [f"{each}, which its trigger asks for" for each in lacking if each]
    if manifest.health.check and runtime.HEALTH not in started.kinds:
        found.append(f"it exports no {runtime.HEALTH}, which its manifest asks for")
    if found:
        raise runtime.EngineError(RejectCode.START_FAILED, found[0])
    return tuple(sorted(started.kinds))


def _tick(engine: "Engine", every_s: float) -> None:
    """Let epochs pass while the guest starts, so that `limits.start` ends a guest that does not come back."""

    def run() -> None:
        while True:
            time.sleep(every_s)
            engine.tick()

    threading.Thread(target=run, daemon=True).start()


if __name__ == "__main__":
    main(int(sys.argv[1]), any_trigger=_ANY_TRIGGER in sys.argv)
