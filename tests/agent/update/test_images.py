"""Images: made by the real compiler, and never used if anything about them was changed on disk."""

import contextlib
import fcntl
import hashlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from wasmtime import wat2wasm

from agent.host.ipc.framing import CONSTANT_SEALS
from agent.update import images
from agent.update.images import ImageError, ImageStore
from fleet.protocol.codes import RejectCode

DEMO = Path(__file__).parents[3] / "components" / "demo" / "v1.wasm"
MANIFEST = "0" * 64


@pytest.fixture
def artifact(tmp_path):
    data = DEMO.read_bytes()
    path = tmp_path / "v1.wasm"
    path.write_bytes(data)
    return path, hashlib.sha256(data).hexdigest()


def device(tmp_path, key=b"k" * 32, **more):
    return ImageStore(tmp_path / "images", key, memory_bytes=2 << 30, seconds=60, **more)


def quick(tmp_path, monkeypatch, key=b"k" * 32, engine=b"50.0.1", **more):
    """Make an image store whose compiler answers at once, for tests that are not about compiling."""

    async def run(self, arguments, data, seconds):
        if "--describe" in arguments:
            return b'{"engine": "%s"}' % engine, b"", 0
        return b"image of " + data, b"", 0

    made = device(tmp_path, key, **more)
    monkeypatch.setattr(made, "_run", run.__get__(made))
    return made


async def make(made, artifact):
    path, sha256 = artifact
    await made.make(path, sha256=sha256, manifest_sha256=MANIFEST)


async def opened(made, artifact):
    descriptor, sha256 = await made.open(sha256=artifact[1], manifest_sha256=MANIFEST)
    try:
        assert hashlib.sha256(os.pread(descriptor, 1 << 24, 0)).hexdigest() == sha256
        return os.pread(descriptor, 1 << 24, 0), fcntl.fcntl(descriptor, fcntl.F_GET_SEALS)
    finally:
        os.close(descriptor)


@pytest.mark.asyncio
async def test_the_real_compiler_makes_an_image_for_this_device(tmp_path, artifact):
    made = device(tmp_path)
    await make(made, artifact)
    image, seals = await opened(made, artifact)
    assert image.startswith(b"\x7fELF")
    assert seals == CONSTANT_SEALS, "nobody can change it after the check"
    (file,) = (tmp_path / "images").glob("*.cwasm")
    assert file.stat().st_mode & 0o777 == 0o444


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("data", "code"),
    [
        (b"", RejectCode.NOT_A_COMPONENT),
        (os.urandom(300), RejectCode.NOT_A_COMPONENT),
        (b"\0asm\x01\0\0\0", RejectCode.COMPILE_FAILED),
    ],
)
async def test_the_compilers_refusals_have_a_code_and_a_sentence(tmp_path, data, code):
    path = tmp_path / "bad.wasm"
    path.write_bytes(data)
    sha256 = __import__("hashlib").sha256(data).hexdigest()
    with pytest.raises(ImageError) as caught:
        await device(tmp_path).make(path, sha256=sha256, manifest_sha256=MANIFEST)
    assert caught.value.code is code
    assert "ended with" not in caught.value.message, "it says why, in the compiler's own words"


NEWER = """(component
    (import "wasi:http/types@0.3.0" (instance $types (export "request" (type (sub resource)))))
    (alias export $types "request" (type $request))
    (core module $guest (func (export "handle") (param i32)))
    (core instance $made (instantiate $guest))
    (func $handle (param "request" (own $request)) (canon lift (core func $made "handle")))
    (instance $handler (export "handle" (func $handle)))
    (export "wasi:http/handler@0.3.0" (instance $handler)))"""


@pytest.mark.asyncio
async def test_a_component_for_wasi_0_3_is_refused_with_an_alternative(tmp_path):
    """The engine would compile it, but no host could start it."""
    data = bytes(wat2wasm(NEWER))
    path = tmp_path / "newer.wasm"
    path.write_bytes(data)
    with pytest.raises(ImageError) as caught:
        await device(tmp_path).make(path, sha256=hashlib.sha256(data).hexdigest(), manifest_sha256=MANIFEST)
    assert caught.value.code is RejectCode.NOT_A_COMPONENT
    assert "wasi:http/types@0.3.0" in caught.value.message
    assert "wasm32-wasip2" in caught.value.message


@pytest.mark.asyncio
async def test_a_hanging_compiler_is_killed(tmp_path, artifact, monkeypatch):
    monkeypatch.setenv("WASMFLEET_COMPILER", "sh -c 'exec sleep 60'")
    monkeypatch.setattr(images, "DESCRIBE_MAX_S", 0.2)
    with pytest.raises(ImageError) as caught:
        await make(device(tmp_path), artifact)
    assert caught.value.code is RejectCode.COMPILE_LIMIT


@pytest.mark.asyncio
async def test_a_compiler_killed_by_a_signal_is_a_refusal(tmp_path, artifact, monkeypatch):
    made = quick(tmp_path, monkeypatch)

    async def dies(self, arguments, data, seconds):
        return (b'{"engine": "1"}', b"", 0) if "--describe" in arguments else (b"", b"thread panicked\n", -6)

    monkeypatch.setattr(made, "_run", dies.__get__(made))
    with pytest.raises(ImageError, match="panicked") as caught:
        await make(made, artifact)
    assert caught.value.code in {RejectCode.COMPILE_LIMIT, RejectCode.COMPILE_FAILED}


SHELL = "env --default-signal sh"
"""A shell that signals end, also where the tests run with some of them ignored, as below nohup."""


def compiler_that(tmp_path, monkeypatch, does):
    """Replace the compiler by a shell script that describes an engine, and else reads its input and does this."""
    script = tmp_path / "compiler.sh"
    script.write_text(f'[ "$1" = --describe ] && {{ echo \'{{"engine": "1"}}\'; exit; }}\ncat > /dev/null\n{does}\n')
    monkeypatch.setenv("WASMFLEET_COMPILER", f"{SHELL} {script}")


@pytest.mark.asyncio
@pytest.mark.parametrize("name", ["TERM", "KILL", "INT", "HUP", "QUIT"])
@pytest.mark.parametrize("describing", [False, True], ids=["compiling", "describing"])
async def test_a_compiler_that_is_stopped_says_nothing_of_the_component(
    tmp_path, artifact, monkeypatch, name, describing
):
    if describing:
        monkeypatch.setenv("WASMFLEET_COMPILER", f"{SHELL} -c 'kill -{name} $$'")
    else:
        compiler_that(tmp_path, monkeypatch, f"kill -{name} $$")
    with pytest.raises(ImageError, match=f"SIG{name}") as caught:
        await make(device(tmp_path), artifact)
    assert caught.value.code is RejectCode.INTERRUPTED


@pytest.mark.asyncio
@pytest.mark.parametrize("name", ["XCPU", "ABRT", "SEGV", "SYS"])
async def test_a_compiler_that_crashes_or_hits_its_limit_refuses_the_component(tmp_path, artifact, monkeypatch, name):
    compiler_that(tmp_path, monkeypatch, f"ulimit -c 0; kill -{name} $$")
    with pytest.raises(ImageError, match=f"SIG{name}") as caught:
        await make(device(tmp_path), artifact)
    assert caught.value.code is RejectCode.COMPILE_LIMIT


@pytest.mark.asyncio
async def test_a_compiler_without_end_hits_its_own_limit_of_time(tmp_path, artifact, monkeypatch):
    """The limit of CPU time is told apart from a SIGKILL that another sent."""
    compiler_that(tmp_path, monkeypatch, "while :; do :; done")
    made = ImageStore(tmp_path / "images", b"k" * 32, memory_bytes=2 << 30, seconds=1)
    ended = []
    plain = images._compiler_failed
    monkeypatch.setattr(images, "_compiler_failed", lambda code, *more: ended.append(code) or plain(code, *more))
    run = made._run
    monkeypatch.setattr(made, "_run", lambda arguments, data, seconds: run(arguments, data, 60))
    with pytest.raises(ImageError) as caught:
        await make(made, artifact)
    assert ended == [-signal.SIGXCPU]
    assert caught.value.code is RejectCode.COMPILE_LIMIT


@pytest.mark.asyncio
async def test_the_kernel_that_runs_out_of_memory_is_named(tmp_path, artifact, monkeypatch):
    kills = tmp_path / "vmstat"
    kills.write_text("nr_free_pages 7\noom_kill 3\n")
    monkeypatch.setattr(images, "VMSTAT", kills)
    compiler_that(tmp_path, monkeypatch, f"echo oom_kill 4 > {kills}; kill -KILL $$")
    with pytest.raises(ImageError, match="ran out of memory") as caught:
        await make(device(tmp_path), artifact)
    assert caught.value.code is RejectCode.INTERRUPTED


STOPPED_IN_A_GROUP = """
import asyncio, signal, sys
from pathlib import Path
from agent.update.images import ImageError, ImageStore

async def main():
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    asyncio.get_running_loop().add_signal_handler(signal.SIGINT, stop.set)
    made = ImageStore(Path(sys.argv[1]), b"k" * 32, memory_bytes=2 << 30, seconds=60)
    compiling = asyncio.ensure_future(made.make(Path(sys.argv[2]), sha256=sys.argv[3], manifest_sha256="0" * 64))
    await stop.wait()
    try:
        await compiling
    except ImageError as error:
        print(error.code)

asyncio.run(main())
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_of_the_process_group_is_no_verdict(tmp_path, artifact, monkeypatch, number):
    """As by `timeout`, Ctrl-C, or a service manager that signals every process: agent and compiler both get it."""
    began = tmp_path / "began"
    os.mkfifo(began)
    # status 1, as of an interpreter that SIGINT reaches while it starts
    ends = "import signal, sys; signal.signal(signal.SIGINT, lambda *_: sys.exit(1))"
    (tmp_path / "waits.py").write_text(f"{ends}; print(file=open({str(began)!r}, 'w')); signal.pause()")
    compiler_that(tmp_path, monkeypatch, f"exec {sys.executable} {tmp_path}/waits.py < /dev/null")
    path, sha256 = artifact
    command = [sys.executable, "-c", STOPPED_IN_A_GROUP, str(tmp_path / "images"), str(path), sha256]
    with subprocess.Popen(command, start_new_session=True, stdout=subprocess.PIPE, text=True) as process:
        began.read_text()  # returns once the compiler is at work
        compilers = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        os.killpg(process.pid, number)
        for pid in map(int, compilers):
            with contextlib.suppress(ProcessLookupError):
                if os.getpgid(pid) != process.pid:  # in a group of its own it is stopped by itself
                    os.kill(pid, signal.SIGTERM)
        said, _ = process.communicate(timeout=60)
    assert said.strip() == "interrupted"


@pytest.mark.asyncio
async def test_a_missing_engine_is_reported(tmp_path, artifact, monkeypatch):
    monkeypatch.setenv("WASMFLEET_COMPILER", "false")
    with pytest.raises(ImageError) as caught:
        await make(device(tmp_path), artifact)
    assert caught.value.code is RejectCode.NO_ENGINE


def flip(path, offset=3):
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.unlink()
    path.write_bytes(data)


@pytest.mark.parametrize("what", ["*.cwasm", "*.json"])
@pytest.mark.asyncio
async def test_a_changed_image_is_refused_reported_and_compiled_again(tmp_path, artifact, monkeypatch, what):
    made = quick(tmp_path, monkeypatch)

    await make(made, artifact)
    (file,) = (tmp_path / "images").glob(what)
    flip(file)
    with pytest.raises(ImageError) as caught:
        await opened(made, artifact)
    assert caught.value.code is RejectCode.IMAGE_DAMAGED
    assert made.damaged.get_nowait().artifact == artifact[1]
    assert made.damaged.empty(), "it is said once"
    await make(made, artifact)
    assert (await opened(made, artifact))[0].startswith(b"image of")


@pytest.mark.asyncio
async def test_every_byte_of_an_images_metadata_is_authenticated(tmp_path, artifact, monkeypatch):
    """No byte of the metadata beside an image can be changed to any value."""
    made = quick(tmp_path, monkeypatch)

    await make(made, artifact)
    (note,) = (tmp_path / "images").glob("*.json")
    (image,) = (tmp_path / "images").glob("*.cwasm")
    good, native = note.read_bytes(), image.read_bytes()
    for offset in range(0, len(good), 7):
        for path, data in ((note, good), (image, native)):
            path.unlink(missing_ok=True)
            path.write_bytes(data)
        flip(note, offset)
        with pytest.raises(ImageError):
            await opened(made, artifact)


@pytest.mark.asyncio
async def test_an_image_of_another_device_is_not_accepted(tmp_path, artifact, monkeypatch):
    await make(quick(tmp_path, monkeypatch, key=b"a" * 32), artifact)
    with pytest.raises(ImageError) as caught:
        await opened(quick(tmp_path, monkeypatch, key=b"b" * 32), artifact)
    assert caught.value.code is RejectCode.IMAGE_DAMAGED


@pytest.mark.asyncio
async def test_images_are_specific_to_manifest_and_engine(tmp_path, artifact, monkeypatch):
    made = quick(tmp_path, monkeypatch)
    await make(made, artifact)
    with pytest.raises(ImageError) as caught:
        await made.open(sha256=artifact[1], manifest_sha256="1" * 64)
    assert caught.value.code is RejectCode.NOT_FOUND
    with pytest.raises(ImageError) as caught:
        await opened(quick(tmp_path, monkeypatch, engine=b"51.0.0"), artifact)
    assert caught.value.code is RejectCode.NOT_FOUND


@pytest.mark.asyncio
async def test_a_file_changed_after_the_check_has_no_effect(tmp_path, artifact, monkeypatch):
    made = quick(tmp_path, monkeypatch)

    await make(made, artifact)
    descriptor, _ = await made.open(sha256=artifact[1], manifest_sha256=MANIFEST)
    (file,) = (tmp_path / "images").glob("*.cwasm")
    flip(file)
    assert os.pread(descriptor, 8, 0) == b"image of"
    with pytest.raises(OSError, match="not permitted"):
        os.pwrite(descriptor, b"x", 0)
    os.close(descriptor)


@pytest.mark.asyncio
async def test_an_artifact_changed_on_the_disk_is_not_compiled(tmp_path, artifact, monkeypatch):
    artifact[0].write_bytes(b"other")
    with pytest.raises(ImageError) as caught:
        await make(quick(tmp_path, monkeypatch), artifact)
    assert caught.value.code is RejectCode.HASH_MISMATCH


def test_least_recently_used_files_are_evicted_but_never_running_ones(tmp_path):
    for directory in ("images", "artifacts"):
        (tmp_path / directory).mkdir()
    for age, name in enumerate(["images/new.cwasm", "images/runs.cwasm", "artifacts/old.wasm", "artifacts/older.wasm"]):
        (tmp_path / name).write_bytes(b"x" * 100)
        os.utime(tmp_path / name, (1000 - age, 1000 - age))
    freed = images.evict(tmp_path / "images", tmp_path / "artifacts", keep={"runs"}, budget_bytes=250)
    assert freed == 200
    assert sorted(path.name for path in tmp_path.rglob("*.*wasm")) == ["new.cwasm", "runs.cwasm"]
    images.evict(tmp_path / "images", tmp_path / "artifacts", keep={"runs"}, budget_bytes=0)
    assert [path.name for path in tmp_path.rglob("*.*wasm")] == ["runs.cwasm"]


def test_the_mac_key_is_made_once_and_private(tmp_path):
    path = tmp_path / "mac.key"
    key = images.load_key(path)
    assert len(key) == 32
    assert images.load_key(path) == key
    assert path.stat().st_mode & 0o777 == 0o600


CUT = """
import os, pathlib, secrets, signal, sys
from agent.update.images import load_key
secrets.token_bytes = lambda _: os.kill(os.getpid(), signal.SIGKILL)
load_key(pathlib.Path(sys.argv[1]))
"""


def test_a_power_cut_while_the_mac_key_is_made_leaves_a_device_that_starts(tmp_path):
    path = tmp_path / "mac.key"
    assert subprocess.run([sys.executable, "-c", CUT, str(path)], check=False).returncode == -signal.SIGKILL
    assert len(images.load_key(path)) == 32


@pytest.mark.parametrize("damaged", [b"", b"short", b"\0" * 32], ids=["empty", "short", "zeros"])
def test_a_damaged_mac_key_is_replaced_by_another(tmp_path, damaged):
    path = tmp_path / "mac.key"
    before = images.load_key(path)
    path.write_bytes(damaged)
    key = images.load_key(path)
    assert len(key) == 32
    assert any(key)
    assert key != before
    assert path.stat().st_mode & 0o777 == 0o600
    assert (tmp_path / "mac.key.damaged").read_bytes() == damaged
