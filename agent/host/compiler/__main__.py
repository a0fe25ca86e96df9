"""Compiler: a fresh program that reads a component on stdin and writes the image for this device on stdout.

    python -m agent.host.compiler [--fuel] [--sockets] < component.wasm | cat > image.cwasm
    python -m agent.host.compiler --describe [--fuel]      what an image is compiled for, as JSON

The program is niced and has limits on address space and CPU time, so that a component that uses too much memory or
takes the compiler too long is refused while the old version keeps serving. The program may not write to files: the
image leaves through a pipe. Exit status: 0 done; 2 not a component; 3 the compiler refused or failed; 4 a limit was
hit; 5 no engine for this device. A failure prints a JSON line on stderr: `{"code": ..., "message": ...}`. The
caller, `agent.update.images`, judges a signal that ended the program.
"""

import argparse
import json
import os
import resource
import stat
import sys
from typing import Final, NoReturn

from agent.host.sandbox import sandbox
from fleet.protocol.bounds import ARTIFACT_MAX_BYTES, MIB
from fleet.protocol.codes import RejectCode

CPU_S: Final = 120
ADDRESS_SPACE_BYTES: Final = 2048 * MIB
_NICE: Final = 10
_PREAMBLE: Final = b"\0asm"

_EXIT: Final = {
    RejectCode.NOT_A_COMPONENT: 2,
    RejectCode.COMPILE_FAILED: 3,
    RejectCode.COMPILE_LIMIT: 4,
    RejectCode.NO_ENGINE: 5,
    RejectCode.TOO_LARGE: 2,
}


def _fail(code: RejectCode, message: str) -> NoReturn:
    sys.stderr.write(json.dumps({"code": code, "message": message}) + "\n")
    sys.stderr.flush()
    os._exit(_EXIT[code])


def _limit() -> None:
    os.nice(_NICE)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    # SIGXCPU of the soft limit comes before the SIGKILL of the hard one, which would look like one from outside
    for kind, most, more in ((resource.RLIMIT_CPU, CPU_S, 1), (resource.RLIMIT_AS, ADDRESS_SPACE_BYTES, 0)):
        soft, hard = (most + more if each == resource.RLIM_INFINITY else each for each in resource.getrlimit(kind))
        soft = min(most, soft)
        resource.setrlimit(kind, (soft, min(soft + more, hard)))


def main(arguments: list[str] | None = None) -> int:
    """Compile stdin to stdout, or describe the engine; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m agent.host.compiler", description=__doc__.splitlines()[0])
    parser.add_argument("--describe", action="store_true", help="print the engine's description as JSON")
    parser.add_argument("--fuel", action="store_true", help="count instructions, for components with a fuel limit")
    parser.add_argument("--sockets", action="store_true", help="for components whose grants have sockets")
    options = parser.parse_args(arguments)
    try:
        from agent.host.engine import runtime  # noqa: PLC0415 - fails on a device without an engine
    except (ImportError, OSError, RuntimeError) as error:
        _fail(RejectCode.NO_ENGINE, f"there is no WebAssembly engine for this device: {error}")
    if options.describe:
        sys.stdout.write(json.dumps(runtime.describe(fuel=options.fuel)) + "\n")
        return 0
    if stat.S_ISREG(os.fstat(1).st_mode):
        _fail(
            RejectCode.COMPILE_FAILED, "standard output is a file, which the compiler may not write: use a pipe (| cat)"
        )
    runtime.adapter()
    plan = runtime.memory_plan(runtime.reservable_bytes())
    _limit()
    try:
        sandbox.close_all_but({0, 1, 2})
        sandbox.apply(sandbox.compiler_spec())
        artifact = sys.stdin.buffer.read(ARTIFACT_MAX_BYTES + 1)
        if len(artifact) > ARTIFACT_MAX_BYTES:
            _fail(RejectCode.TOO_LARGE, f"the component has more than {ARTIFACT_MAX_BYTES} bytes")
        if not artifact.startswith(_PREAMBLE):
            _fail(RejectCode.NOT_A_COMPONENT, "these bytes are not WebAssembly")
        image = runtime.Engine(fuel=options.fuel, plan=plan).compile(artifact, sockets=options.sockets)
        sys.stdout.buffer.write(image)
        sys.stdout.buffer.flush()
    except runtime.EngineError as error:
        _fail(error.code, str(error))
    except MemoryError:
        _fail(RejectCode.COMPILE_LIMIT, f"compiling the component takes more than {ADDRESS_SPACE_BYTES // MIB} MiB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
