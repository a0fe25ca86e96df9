"""Causes that pass: each ends as deferred, and the same assignment succeeds once the cause is gone."""

import errno
import os

import pytest

from agent.host.ipc import host_api
from agent.host.supervisor import generation
from agent.link.https import FetchError
from agent.update import effects, images, reconciler
from agent.update.images import ImageStore
from agent.update.secrets import SecretStore
from fleet.protocol.codes import RETRYABLE, Outcome, Phase, RejectCode, outcome_of
from fleet.protocol.manifest import Grants, Http, Manifest

V1, V2 = (f"components/acme/web/{version}.0.0.wasm" for version in (1, 2))
ERRORS = [errno.ENOSPC, errno.EDQUOT, errno.EMFILE, errno.ENOMEM, errno.EIO, errno.EROFS]


class Cause(list):
    """Cause of failures that lasts until it is gone."""

    is_there = True

    def __init__(self, error):
        self.error = error

    def __bool__(self):
        return self.is_there

    def pop(self, _at=0):
        return self.error

    def before(self, function):
        """Make a function that fails while the cause is there."""

        def fails(*arguments, **more):
            if self:
                raise self.error
            return function(*arguments, **more)

        return fails

    def before_async(self, function):
        async def fails(*arguments, **more):
            if self:
                raise self.error
            return await function(*arguments, **more)

        return fails


@pytest.fixture(autouse=True)
def _without_pauses(monkeypatch):
    for name in ("machine.RETRY_FIRST_S", "machine.RETRY_MAX_S", "state.RETRY_SOON_S", "state.RETRY_FIRST_S"):
        monkeypatch.setattr(f"agent.update.{name}", 0.01)
    monkeypatch.setattr("agent.update.state.RETRY_MAX_S", 0.01)
    monkeypatch.setattr(reconciler, "RETRY_SLACK_S", 0.0)


async def passes(kit, cause, item, *, code=None):
    """Desire an item while the cause is there, and once it is gone; `code`: of the report."""
    await kit.deployer.desire(kit.assignment(2, item))
    await kit.until(lambda: any(each.code is not None for each in kit.reports()))
    found = next(each for each in kit.reports() if each.code is not None)
    await kit.until(lambda: any(each.phase in {"failed", "rolled-back"} for each in kit.reports()))
    ended = next(each for each in kit.reports() if each.phase in {"failed", "rolled-back"})
    assert found.code == ended.code
    assert outcome_of(ended.code, ended.phase) is Outcome.DEFERRED, ended
    assert ended.code in ({code} if code else RETRYABLE)
    assert not ended.tries_ended
    cause.is_there = False
    await kit.until(lambda: kit.host.targets() == {"web": V2})
    await kit.settled()
    assert kit.chain()[-1] == "committed"
    assert kit.store.failed() == ()


async def new_version(kit, **more):
    """A device that runs one version, and a further one that it has nothing of."""
    await kit.run(kit.assignment(1, kit.publish("1.0.0")))
    item = kit.publish("2.0.0", **more)
    (kit.places.artifacts / f"{item.sha256}.wasm").unlink()
    return item


@pytest.mark.parametrize("code", sorted(RETRYABLE))
@pytest.mark.asyncio
async def test_a_download_that_is_refused_for_now(kit, code):
    async with kit.running():
        item = await new_version(kit)
        kit.server.trouble = cause = Cause(FetchError(code, "for now"))
        await passes(kit, cause, item, code=code)


@pytest.mark.parametrize("code", sorted(RETRYABLE - {RejectCode.INTERRUPTED}))  # there, it may be its own doing
@pytest.mark.asyncio
async def test_a_start_that_the_host_refuses_for_now(kit, code):
    async with kit.running():
        item = await new_version(kit)
        kit.host.refuse[V2] = code
        await kit.deployer.desire(kit.assignment(2, item))
        await kit.until(lambda: any(each.code == code for each in kit.reports()))
        ended = next(each for each in kit.reports() if each.code == code)
        assert (outcome_of(ended.code, ended.phase), ended.tries_ended) == (Outcome.DEFERRED, False)
        del kit.host.refuse[V2]
        await kit.until(lambda: kit.host.targets() == {"web": V2})
        await kit.settled()
        assert kit.store.failed() == ()


@pytest.mark.parametrize("connected", [True, False])
@pytest.mark.asyncio
async def test_a_host_with_the_engine_from_before_an_upgrade(kit, connected):
    async with kit.running():
        item = await new_version(kit)
        kit.host.engine = "49.0.0"
        kit.host.kill()
        kit.host.start()
        if connected:
            await kit.until(lambda: kit.link.welcome.engine == "49.0.0")
        await kit.deployer.desire(kit.assignment(2, item))
        await kit.until(lambda: any(each.code == RejectCode.HOST_GONE for each in kit.reports()))
        said = next(each for each in kit.reports() if each.code == RejectCode.HOST_GONE)
        assert "fleet-host still runs wasmtime 49.0.0, and wasmtime 50.0.1 is installed" in said.message
        assert not kit.host.running.get("web") or kit.host.targets() == {"web": V1}
        kit.host.engine = "50.0.1"
        kit.host.kill()
        kit.host.start()
        await kit.until(lambda: kit.host.targets() == {"web": V2})
        await kit.settled()
        assert kit.store.failed() == ()


@pytest.mark.parametrize("number", ERRORS, ids=errno.errorcode.get)
@pytest.mark.parametrize(
    ("place", "name"),
    [
        (SecretStore, "fetch"),  # boxes written
        (effects, "_read"),  # the artifact read, to verify it
        (ImageStore, "_run"),  # the compiler started
        (ImageStore, "_write"),  # the image written
        (images, "_seal"),  # the image read, into memory
        (effects, "start"),  # secrets in memory
    ],
    ids=lambda each: each if isinstance(each, str) else "",
)
@pytest.mark.asyncio
async def test_an_error_of_the_device_is_never_the_components(kit, monkeypatch, place, name, number):
    async with kit.running():
        item = await new_version(kit)
        cause = Cause(OSError(number, os.strerror(number)))
        if name == "_run":
            place = kit.images_kind
            monkeypatch.setattr(place, "open", cause.before_async(place.open))
        wrap = cause.before_async if name in {"_run", "start"} else cause.before
        monkeypatch.setattr(place, name, wrap(getattr(place, name)))
        await passes(kit, cause, item)


@pytest.mark.parametrize(
    "damage", [lambda path: path.write_bytes(b"other"), lambda path: path.unlink()], ids=["changed", "lost"]
)
@pytest.mark.parametrize("name", ["verify", "compile", "swap"])
@pytest.mark.asyncio
async def test_files_that_the_device_damages_or_loses_on_the_way(kit, monkeypatch, name, damage):
    async with kit.running():
        item = await new_version(kit)
        cause, plain = Cause(None), getattr(kit.carrier, name)

        async def damaged(*arguments):
            if cause:
                damage(kit.places.artifacts / f"{item.sha256}.wasm")
                for image in kit.places.images.glob("*"):
                    image.unlink()
            return await plain(*arguments)

        monkeypatch.setattr(kit.carrier, name, damaged)
        await passes(kit, cause, item, code=RejectCode.INTERNAL)


@pytest.mark.asyncio
async def test_a_new_attempt_after_a_full_disk_runs_once_there_is_space(kit, monkeypatch):
    monkeypatch.setattr("agent.update.state.RETRY_SOON_S", 3600)
    monkeypatch.setattr("agent.update.state.RETRY_MAX_S", 3600)
    async with kit.running():
        item = await new_version(kit)
        kit.server.trouble = cause = Cause(FetchError(RejectCode.NO_SPACE, "full"))
        await kit.run(kit.assignment(2, item))
        assert (kit.reports()[-1].phase, kit.reports()[-1].code) == (Phase.FAILED, RejectCode.NO_SPACE)
        cause.is_there = False
        await kit.run(kit.assignment(3, kit.publish("2.0.0", attempt=1)))
        assert kit.host.targets() == {"web": V2}
        assert kit.chain()[-1] == "committed"


@pytest.mark.parametrize("number", ERRORS, ids=errno.errorcode.get)
@pytest.mark.asyncio
async def test_a_data_directory_that_cannot_be_made(tmp_path, monkeypatch, number):
    def refuses(*_, **__):
        raise OSError(number, os.strerror(number))

    grants = Grants(interfaces=("wasi:filesystem",))
    version = Manifest(name="web", version="1.0.0", trigger=Http(), grants=grants)
    run = host_api.Run(
        instance="web",
        generation=1,
        target=V1,
        manifest=version,
        grants=grants,
        limits=version.limits,
    )
    monkeypatch.setattr(generation.Path, "mkdir", refuses)
    with pytest.raises(generation.StartError) as raised:
        await generation.data_directory(run, None, tmp_path, None)
    full = number in {errno.ENOSPC, errno.EDQUOT}
    assert raised.value.code is (RejectCode.NO_SPACE if full else RejectCode.INTERNAL)
