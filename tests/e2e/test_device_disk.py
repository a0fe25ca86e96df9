"""Device with a full disk, or with files changed on disk."""

import pytest

from fleet.protocol.codes import Phase, RejectCode

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(240)]


def current(stage, device):
    return next(each for each in stage.scene.devices if each.device == device.device)


def test_an_image_changed_on_disk_is_never_loaded(stage, device):
    # the host is lost, and what it is to load again was changed meanwhile: it is compiled anew from the artifact
    async def story():
        here = current(stage, device)
        began = await stage.latest(here)
        images = list((stage.state(here) / "images").rglob("*.cwasm"))
        for image in images:
            image.chmod(0o600)
            damaged = bytearray(image.read_bytes())
            damaged[len(damaged) // 2] ^= 0xFF
            image.write_bytes(damaged)
        await stage.kill(here.host)
        here = await stage.start_host(here)
        entry = await stage.reported(here, code=RejectCode.IMAGE_DAMAGED, after=began)
        await stage.answers(here, "1")
        return images, entry

    images, entry = stage.do(story())
    assert images
    assert entry.message


def test_a_full_disk_is_a_clean_refusal(stage, device):
    # the owner keeps more free than there is; what runs goes on
    async def story():
        here = current(stage, device)
        config = stage.scene.directory / "devices" / here.name / "agent.toml"
        before = config.read_text()
        config.write_text(f"{before}\n[disk]\nreserve_bytes = {1 << 60}\n")
        await stage.stop(here.agent)
        here = await stage.start_agent(here)
        began = await stage.latest(here)
        code, output, errors = await stage.push("v2.wasm", "--detach")
        assert code == 0, output + errors
        entry = await stage.reported(here, code=RejectCode.NO_SPACE, after=began)
        version = await stage.version(here)
        config.write_text(before)
        await stage.stop(here.agent)
        here = await stage.start_agent(here)
        number = str((await stage.newest_rollout()).number)
        code, output, errors = await stage.fleet("rollout", "show", number, "--json")
        assert code == 0, output + errors
        return entry, version

    entry, version = stage.do(story())
    assert entry.phase is Phase.FAILED
    assert version == "1"
    assert "free" in entry.message
