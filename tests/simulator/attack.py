"""Attacks as stories: each changes an honest fleet and ends with the assignment that the device is given."""

from collections.abc import Callable
from typing import Any

import msgspec
import pytest

from fleet.protocol.assignment import ASSIGNMENT_TYPE, Assignment, Item
from fleet.protocol.codes import RejectCode
from fleet.protocol.manifest import Grants
from signing import dsse
from signing.errors import Rejected
from signing.state import VerifierState
from signing.trusted_metadata import TrustedMetadata
from tests.simulator.repository import Device, Repository
from tests.simulator.script import check_grown, record, replay

CLOCKS = Grants(interfaces=("wasi:clocks",))
NETWORK = Grants(outbound=("https://evil.example:443",))


class Scene:
    """Honest fleet: a published component, a device that runs it, and the assignment's envelope."""

    def __init__(self) -> None:
        self.repo = Repository(("main", "other"), ceilings={"main": CLOCKS})
        self.item = self.repo.publish("1.0.0", grants=CLOCKS)
        self.device = Device(self.repo)
        self.envelope = self.repo.assign(self.item)
        self.device.run(self.envelope)

    def assign(self, **fields: Any) -> bytes:
        return self.repo.assign(self.item, **fields)

    def altered(self, **fields: Any) -> bytes:
        """Sign, as the director, an assignment whose item differs from what the publisher signed."""
        return self.repo.assign(msgspec.structs.replace(self.item, **fields))


def by_director(scene: Scene, *items: Item, **fields: Any) -> bytes:
    """Sign an assignment with the director's key, without the checks of our own signing code."""
    payload = msgspec.json.encode(scene.repo.assignment(*items, **fields))
    return dsse.sign(ASSIGNMENT_TYPE, payload, [scene.repo.keys["director"]])


Story = Callable[[Scene], bytes]
Enlist = Callable[[str, RejectCode], Callable[[Story], Story]]


def stories() -> tuple[list[tuple[str, RejectCode, Story]], Enlist]:
    """Return a new list of stories (name, expected code, story), and the decorator that fills it."""
    told: list[tuple[str, RejectCode, Story]] = []

    def attack(name: str, code: RejectCode) -> Callable[[Story], Story]:
        def enlist(story: Story) -> Story:
            told.append((name, code, story))
            return story

        return enlist

    return told, attack


def refuses(code: RejectCode, story: Story) -> None:
    """Play a story: the device refuses with this code, and keeps everything that protects it from rollbacks."""
    scene = Scene()
    envelope = story(scene)
    before = scene.device.state

    with pytest.raises(Rejected) as verdict:
        scene.device.run(envelope)

    assert verdict.value.code is code, verdict.value
    after = scene.device.state
    assert after.root >= before.root
    assert after.epochs == before.epochs
    assert after.floor >= before.floor
    _replay(scene, before, envelope, verdict.value)


def _replay(scene: Scene, before: VerifierState, envelope: bytes, verdict: Rejected) -> None:
    """Replay the attack file by file: the code is the same, and no state is lost if it stops after any file."""
    repo, now = scene.repo, before.time(scene.repo.now)
    try:
        paths = [item.target for item in msgspec.json.decode(dsse.parse(envelope).payload, type=Assignment).items]
    except (Rejected, msgspec.DecodeError):
        paths = []

    def begin() -> TrustedMetadata:
        return TrustedMetadata(pinned_root=repo.pinned, state=before, now=now)

    pairs, refusal = record(repo, begin(), paths)
    if refusal is not None:
        assert refusal.code is verdict.code, refusal
    for cut in range(len(pairs) + 1):
        check_grown(before, replay(pairs[:cut], begin(), paths))
