"""Commands of WASI Preview 1, adapted as `fleet push` does, in a real worker; built by toolchains that are here."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import support
from support import Grants, Limits

from agent.host.ipc import host_api
from deploy import debian, toolchain
from fleet.component import preview1
from fleet.protocol.manifest import Schedule
from tests.eventually import eventually

SOURCES = Path(__file__).parent / "preview1"
GRANTS = Grants(interfaces=("wasi:cli", "wasi:filesystem"))
LIMITS = Limits(memory_bytes=128 << 20, call_ms=20_000, start_ms=20_000)


def need(holds, what):
    if not holds:
        pytest.skip(f"{what} is not here")


def build_c(out):
    try:
        import ziglang  # noqa: F401
    except ImportError:
        pytest.skip("ziglang is not installed: pip install ziglang==0.17.1")
    return [sys.executable, "-m", "ziglang", "cc", "--target=wasm32-wasi", "-Os", SOURCES / "main.c", "-o", out]


def build_go(out):
    need(shutil.which("go"), "go")
    return ["go", "build", "-o", out, SOURCES / "main.go"]


def build_rust(out):
    root = debian.cache_dir() / toolchain.SUITE
    need((root / "usr/lib/rustlib/wasm32-wasip1").is_dir() and os.geteuid() == 0, "the root of deploy.toolchain")
    flags = ["--target", "wasm32-wasip1", "-O", "-C", "linker=wasm-ld", "-C", "panic=abort"]
    binds = {SOURCES: "/sources", out.parent: "/scratch"}
    debian.run_inside(root, ["rustc", *flags, "/sources/main.rs", "-o", f"/scratch/{out.name}"], binds=binds, env={})
    return ["true"]


BUILDS = {"c": build_c, "go": build_go, "rust": build_rust}


def run(host, data, name, *args, grants=GRANTS, **more):
    """Start an adapted command by a schedule."""
    component = preview1.adapted(data)
    assert component is not None
    trigger = Schedule(every_ms=100, args=args)
    reply = host.start(component, support.a_run(name, 1, trigger=trigger, grants=grants, limits=LIMITS, **more))
    assert isinstance(reply, host_api.Started), reply


def lines_with(host, name, *wanted):
    def found():
        lines = host.lines_of(name)
        return lines if set(wanted) <= set(lines) else None

    return eventually(found, f"{name} logs {wanted}")


@pytest.mark.parametrize("granted", [True, False])
def test_a_command_has_arguments_variables_and_files_by_grant(host, granted):
    steps = ("args", "environ", "open 3 0 1 0 64 kept", "write 4 x", "warn careful", "clock 0")
    config = {"unit": "kelvin"}
    run(host, support.wasm("probe1"), "told", *steps, grants=GRANTS if granted else Grants(), config=config)
    shown = " ".join(f"[{each}]" for each in ("component", *steps))
    found = ("info ok [unit=kelvin]", "info ok 4", "info ok 1") if granted else ("info ok", "info error 8")
    lines_with(host, "told", f"info ok {shown}", *found, "warn careful", "info ok of this time")


def test_a_file_is_appended_to(host):
    steps = ("open 3 0 1 1 66 kept", "write 4 one", "pwrite 4 0 two", "seek 4 0 0", "read 4 20")
    run(host, support.wasm("probe1"), "appends", *steps)
    lines_with(host, "appends", "info ok 6 onetwo")


@pytest.mark.parametrize(("step", "outcome"), [("exit 0", "ok"), ("exit 3", "guest-trap"), ("trap", "guest-trap")])
def test_an_exit_code_or_a_trap_of_a_command_is_that_of_its_run(host, step, outcome):
    run(host, support.wasm("probe1"), "ends", "say before", step)
    eventually(lambda: host.health("ends").calls.get(outcome, 0) >= 2, f"runs end as {outcome}")
    assert set(host.health("ends").calls) == {outcome}
    lines_with(host, "ends", "info before")


@pytest.mark.timeout(600)
@pytest.mark.parametrize("language", ["c", *(pytest.param(each, marks=pytest.mark.nightly) for each in ("go", "rust"))])
def test_a_program_of_a_toolchain_for_preview_1_runs_unchanged(host, tmp_path, language):
    out = tmp_path / "main.wasm"
    target = {"GOOS": "wasip1", "GOARCH": "wasm"} if language == "go" else {}
    subprocess.run([*map(str, BUILDS[language](out))], check=True, cwd=tmp_path, env={**os.environ, **target})
    run(host, out.read_bytes(), language, "-x", "a b", config={"unit": "kelvin"})
    told = ("info argument -x", "info argument a b", "info unit kelvin", "info lines 2", "info time now")
    lines_with(host, language, *told, "warn a warning")
    assert set(host.health(language).calls) == {"ok"}
    host.ask(host_api.Stop, instance=language)
    run(host, out.read_bytes(), f"{language}-fails", "fail", grants=Grants())
    lines_with(host, f"{language}-fails", "info no file", "info unit none")
    eventually(lambda: host.health(f"{language}-fails").calls.get("guest-trap"), "its exit code is a fault")
