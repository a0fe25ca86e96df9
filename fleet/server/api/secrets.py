"""Handlers for secrets: seal values when they arrive, store boxes, give each device its own.

A value is in memory from the request until the last device's box is sealed: never stored, logged or part of a reply.
The server never sees a value that an operator sealed. Since no value is stored, a device that joins later lacks the
secret until somebody sets it again; the listing names such devices.
"""

import base64
import binascii
import contextlib
from collections.abc import Callable, Sequence
from datetime import datetime
from typing import Final

from starlette.requests import Request
from starlette.responses import Response

from fleet.protocol import names
from fleet.protocol.operator_api import Refusal
from fleet.protocol.trust_api import (
    DeviceKey,
    Holding,
    SealedBox,
    SealingKeys,
    SecretReply,
    SecretRequest,
    SecretRow,
    Secrets,
    SecretScope,
)
from fleet.server.api.http import answer, body, param
from fleet.server.api.query import LABEL, Word
from fleet.server.director import Director, lacks
from fleet.server.rollout_controller import RolloutController
from fleet.server.tuf_repository import TufRepository
from fleet.server.unknown import unknown_device, unknown_group
from fleet.store.rows import DeviceRow
from fleet.store.sqlite import utc
from fleet.store.store import AuditLog, Store
from signing import sealing
from signing.errors import SigningError
from signing.policy import Release
from signing.sealing import Purpose

DEVICES_MAX: Final = 10_000
KEYS_GROUP: Final = Word(name="group", pattern=LABEL, what="the name of a group")
KEYS_DEVICE: Final = Word(name="device", pattern="[a-z0-9-]{1,63}", what="a device's id")
KEYS_INSTANCE: Final = Word(name="instance", pattern=LABEL, what="the name of an instance")


class SecretHandlers:
    """Handlers for secrets."""

    def __init__(
        self,
        *,
        store: Store,
        repository: TufRepository,
        director: Director,
        controller: RolloutController,
        audit: AuditLog,
        clock: Callable[[], datetime],
    ) -> None:
        self._store, self._repository, self._director = store, repository, director
        self._controller, self._audit, self._clock = controller, audit, clock

    # -- routes ------------------------------------------------------------------------------------------------------

    async def list(self, _request: Request, _by: str) -> Response:
        """GET /v1/secrets."""
        return answer(self.listing())

    async def keys(self, request: Request, _by: str) -> Response:
        """GET /v1/secrets/{name}/keys?group=&device=&instance=."""
        name = names.check_secret(param(request, "name"))
        devices = self._devices_of(KEYS_GROUP.of(request), KEYS_DEVICE.of(request))
        instance = self._instance(KEYS_INSTANCE.of(request), name, devices)
        return answer(
            SealingKeys(
                fleet=self._director.fleet,
                name=name,
                instance=instance,
                version=self._store.boxes.next_version(instance, name),
                devices=tuple(self._key(device) for device in devices),
            )
        )

    async def set(self, request: Request, by: str) -> Response:
        """PUT /v1/secrets/{name}."""
        name = names.check_secret(param(request, "name"))
        return answer(self.keep(name, await body(request, SecretRequest), by=by), 201)

    async def remove(self, request: Request, by: str) -> Response:
        """POST /v1/secrets/{name}/remove."""
        name = names.check_secret(param(request, "name"))
        wish = await body(request, SecretScope)
        devices = self._devices_of(wish.group, wish.device)
        instance = self._instance(wish.instance, name, devices)
        for device in devices:
            release = self._runs(device, instance)
            if release is not None and (key := release.manifest.secrets.get(name)) is not None and key.required:
                raise Refusal(
                    409,
                    "needed",
                    f"{instance} on {device.id} runs {release.name}, which does not start without {name}",
                    action=f"set another value, or remove the instance first: fleet remove {instance}",
                )
        with self._store.atomic():
            had = [device.id for device in devices if self._store.boxes.remove(device.id, instance, name)]
            if not had:
                raise Refusal(404, "unknown-secret", f"no device there has a secret {name} of {instance}")
            self._audit.record(by, "remove-secret", f"{instance}/{name}", wish.group or wish.device)
        self._controller.touch(had)
        return answer(self.listing())

    async def box(self, request: Request, _by: str) -> Response:
        """GET /v1/devices/{id}/secrets/{sha256}: the box of one device, for a bundle."""
        return box_of(self._store, param(request, "id"), param(request, "sha256"))

    # -- storing secrets ---------------------------------------------------------------------------------------------

    def keep(self, name: str, wish: SecretRequest, *, by: str) -> SecretReply:
        """Seal a value, or take boxes that were sealed already, as the next version.

        Raises:
            Refusal: the request is invalid; nothing is stored.
        """
        if bool(wish.value) == bool(wish.boxes):
            raise Refusal(400, "bad-request", "give either a value or boxes that are sealed")
        devices = self._devices_of(wish.group, wish.device)
        instance = self._instance(wish.instance, name, devices)
        self._check_declared(instance, name, devices, ahead=wish.ahead)
        version = self._store.boxes.next_version(instance, name)
        if wish.rotate and version == 1:
            raise Refusal(
                404, "unknown-secret", f"there is no secret {name} of {instance} yet", action=f"fleet secret set {name}"
            )
        if wish.boxes and wish.version != version:
            raise Refusal(
                409, "conflict", f"version {version} of {name} is next, not {wish.version}", action="seal it again"
            )
        sealed = (
            self._taken(wish, devices) if wish.boxes else self._sealed(name, wish.value, instance, version, devices)
        )
        if devices and not sealed:
            raise Refusal(
                409, "no-sealing-key", "no device there has a sealing key", action="enrol them anew: fleet-agent enroll"
            )
        now = self._clock().timestamp()
        with self._store.atomic():
            self._store.boxes.put(instance=instance, name=name, version=version, boxes=sealed, by=by, now=now)
            self._audit.record(
                by, "set-secret", f"{instance}/{name}", f"version {version} on {wish.group or wish.device}"
            )
        done = {each.device for each in sealed}
        self._controller.touch(sorted(done))
        return SecretReply(
            name=name,
            instance=instance,
            version=version,
            devices=tuple(sorted(done)),
            unsealable=tuple(device.id for device in devices if device.id not in done),
        )

    def _sealed(
        self, name: str, value: str, instance: str, version: int, devices: Sequence[DeviceRow]
    ) -> Sequence[SealedBox]:
        try:
            sealing.check_value(value)
        except SigningError as error:
            raise Refusal(400, "bad-secret", str(error)) from None
        found: list[SealedBox] = []
        for device in devices:
            purpose = Purpose(
                fleet=self._director.fleet, device=device.id, instance=instance, name=name, version=version
            )
            with contextlib.suppress(SigningError):  # the other devices get their boxes although this one has no key
                box = sealing.seal(value, recipient=device.sealing_key, purpose=purpose)
                found.append(SealedBox(device=device.id, box=box, sealed="server"))
        return found

    def _taken(self, wish: SecretRequest, devices: Sequence[DeviceRow]) -> Sequence[SealedBox]:
        """Check boxes from an operator's machine, which the server cannot open."""
        known = {device.id for device in devices}
        found: list[SealedBox] = []
        for each in wish.boxes:
            if each.device not in known or any(each.device == other.device for other in found):
                raise Refusal(400, "bad-request", f"{each.device} is not among these devices, or there twice")
            try:
                box = base64.b64decode(each.box, validate=True)
            except (binascii.Error, ValueError):
                raise Refusal(400, "bad-request", f"the box for {each.device} is not base64") from None
            sealing.check_box(box)
            found.append(SealedBox(device=each.device, box=box, sealed="operator"))
        return found

    def listing(self) -> Secrets:
        """Return every secret that some device has or lacks."""
        rows: dict[tuple[str, str], list[Holding]] = {}
        for box in self._store.boxes.all():
            holding = Holding(
                device=box.device, version=box.version, at=utc(box.at).isoformat(), by=box.by, sealed=box.sealed
            )
            rows.setdefault((box.instance, box.name), []).append(holding)
        lacking: dict[tuple[str, str], list[str]] = {}
        for device in self._store.devices.all():
            if device.revoked:
                continue
            have = self._store.boxes.newest(device.id)
            for instance in self._director.effective(device):
                for name in lacks(self._runs(device, instance), instance, have):
                    lacking.setdefault((instance, name), []).append(device.id)
        return Secrets(
            secrets=tuple(
                SecretRow(
                    instance=instance,
                    name=name,
                    version=max((each.version for each in rows.get((instance, name), ())), default=0),
                    devices=tuple(rows.get((instance, name), ())),
                    lacking=tuple(lacking.get((instance, name), ())),
                )
                for instance, name in sorted(rows.keys() | lacking.keys())
            )
        )

    # -- who and what ------------------------------------------------------------------------------------------------

    def _devices_of(self, group: str, device: str) -> Sequence[DeviceRow]:
        """Return the members of a group, by labels that operators set and no claim of a device, or one device."""
        if bool(group) == bool(device):
            raise Refusal(400, "bad-request", "name either a group or a device")
        if device:
            row = self._store.devices.get(device)
            if row is None or row.revoked:
                raise unknown_device(self._store, device)
            return [row]
        found = self._store.devices.group(group)
        if found is None:
            raise unknown_group(self._store, group, action="correct the name")
        members = self._store.devices.members(found)
        if len(members) > DEVICES_MAX:
            raise Refusal(413, "too-large", f"{group} has {len(members)} devices, at most {DEVICES_MAX} at once")
        return self._store.devices.some(members)

    def _runs(self, device: DeviceRow, instance: str) -> Release | None:
        held = self._director.effective(device).get(instance)
        if held is None or held.value.target is None:
            return None
        return self._repository.release(held.value.target)

    def _instance(self, instance: str, name: str, devices: Sequence[DeviceRow]) -> str:
        if instance:
            return names.check_label(instance, "instance")
        declared = {
            each
            for device in devices
            for each in self._director.effective(device)
            if (release := self._runs(device, each)) is not None and name in release.manifest.secrets
        }
        if len(declared) == 1:
            return declared.pop()
        which = f"{', '.join(sorted(declared))} declare one" if declared else "no instance there declares one"
        raise Refusal(400, "which-instance", f"whose secret is {name}? {which}", action="say it: --instance NAME")

    def _check_declared(self, instance: str, name: str, devices: Sequence[DeviceRow], *, ahead: bool) -> None:
        releases = [release for device in devices if (release := self._runs(device, instance)) is not None]
        if ahead or not releases or any(name in release.manifest.secrets for release in releases):
            return
        known = ", ".join(sorted({key for release in releases for key in release.manifest.secrets})) or "none"
        raise Refusal(
            422,
            "unknown-secret",
            f"{releases[0].name} declares no secret {name!r}",
            f"it declares {known}",
            "correct the name, or say --ahead for a version that is still to come",
        )

    def _key(self, device: DeviceRow) -> DeviceKey:
        certificate = self._store.access.newest_certificate(device.id)
        return DeviceKey(
            device=device.id,
            proof=self._store.devices.sealing_proof(device.id),
            certificate_pem="" if certificate is None else certificate.pem,
        )


def box_of(store: Store, device: str, sha256: str) -> Response:
    """Serve a device's own box.

    Raises:
        Refusal: the device has no such box.
        BadNameError: the name is no sha256.
    """
    found = store.boxes.box(device, names.check_sha256(sha256))
    if found is None:
        raise Refusal(404, "not-found", "this device has no such box")
    return Response(found, media_type="application/octet-stream", headers={"cache-control": "no-store"})
