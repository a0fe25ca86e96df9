"""Configuration keys of single devices, set by operators over those of the group that supplies the version.

A device's own key applies at once, in whatever version the device should run, and survives pause, abort and undo. It
waits, undelivered, while nothing on the device declares it.
"""

from collections.abc import Callable, Mapping
from datetime import datetime
from typing import Final

from fleet.protocol import bounds, names, wire
from fleet.protocol.operator_api import KeysRequest, Refusal
from fleet.server.director import Director, bad_value
from fleet.server.rollout_controller import RolloutController
from fleet.server.tuf_repository import TufRepository
from fleet.store.rows import DeviceRow
from fleet.store.store import Store

_SHOWN_CHARS: Final = 80


class DeviceKeys:
    """Changes of the devices' own configuration keys."""

    def __init__(
        self,
        *,
        store: Store,
        repository: TufRepository,
        director: Director,
        controller: RolloutController,
        clock: Callable[[], datetime],
    ) -> None:
        self._store, self._repository, self._director = store, repository, director
        self._controller, self._clock = controller, clock

    def change(self, device: DeviceRow, request: KeysRequest, *, by: str) -> None:
        """Set and remove keys of one instance, all of them or none.

        Raises:
            Refusal: no such instance or key, a key that the version does not declare, or too much.
        """
        names.check_label(request.instance, "instance")
        before = self._store.rollouts.own_keys(device.id)
        own = before.get(request.instance, {})
        given = {key: value for key, value in request.keys.items() if value is not None}
        self._check(device, request.instance, given)
        missing = [key for key, value in request.keys.items() if value is None and key not in own]
        if missing:
            raise Refusal(
                404,
                "unknown-config",
                f"{device.id} has no key {missing[0][:_SHOWN_CHARS]!r} of its own for {request.instance}",
                f"it has {', '.join(sorted(own)) or 'none'}",
                f"fleet device {device.id} --effective shows them",
            )
        kept = {key: value for key, value in own.items() if key not in request.keys}
        if given:
            _check_size({**before, request.instance: {**kept, **given}})
        now = self._clock().timestamp()
        words = ", ".join(
            f"{key} removed" if value is None else f"{key}={value[:_SHOWN_CHARS]}"
            for key, value in sorted(request.keys.items())
        )
        with self._store.atomic():
            for key, value in request.keys.items():
                self._store.rollouts.set_own_key(device.id, request.instance, key, value)
            self._store.access.audit(
                actor=by, act="device-keys", subject=device.id, detail=f"{request.instance}: {words}", now=now
            )
            self._store.devices.note(device.id, "keys", f"{by} changed {request.instance}: {words}", now=now)
        self._controller.touch([device.id])

    def _check(self, device: DeviceRow, instance: str, given: Mapping[str, str]) -> None:
        """Refuse what the version that the device should run does not take; a device without one may have any key."""
        for key, value in given.items():
            names.check_config_key(key)
            if len(value.encode()) > bounds.CONFIG_VALUE_MAX_BYTES:
                raise Refusal(
                    413, "too-large", f"the value of {key} is larger than {bounds.CONFIG_VALUE_MAX_BYTES} bytes"
                )
        held = self._director.effective(device).get(instance)
        release = None if held is None or held.value.target is None else self._repository.release(held.value.target)
        if release is None:
            return
        known = release.manifest.config
        for key, value in given.items():
            if wrong := bad_value(release, key, value):
                raise Refusal(422, "bad-config", wrong, known[key].description)
            if key not in known:
                raise Refusal(
                    422,
                    "unknown-config",
                    f"{release.name} has no configuration key {key!r}",
                    f"it knows {', '.join(sorted(known)) or 'none'}",
                )


def _check_size(keys: Mapping[str, Mapping[str, str]]) -> None:
    """Refuse more than one assignment holds beside its other content. Raises `Refusal`.

    Keys count as an assignment writes them: in JSON a control character takes six bytes.
    """
    size = len(wire.canonical(keys))
    if size > bounds.DEVICE_KEYS_MAX_BYTES:
        raise Refusal(
            413,
            "too-large",
            f"the keys of one device have {size} bytes, at most {bounds.DEVICE_KEYS_MAX_BYTES} are kept",
        )
