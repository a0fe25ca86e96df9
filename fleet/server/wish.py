"""What an operator wishes for an instance, held against what its publisher signed: configuration, grants, port."""

from typing import Final

import msgspec

from fleet.protocol import caps, outbound, wire
from fleet.protocol.api import RolloutRequest
from fleet.protocol.manifest import Grants
from fleet.rollout.model import Value
from fleet.server.web import Refusal
from signing.policy import Release

_PORT_MAX: Final = 65_535


def value_of(request: RolloutRequest, release: Release, before: Value | None, *, attempt: int) -> Value:
    """The value that a request asks for; what it leaves open stays as it was before.

    Raises:
        Refusal: a key or grant that the manifest does not have, a missing key, or a port that is none.
    """
    assert request.target is not None
    config = dict(before.config if before is not None else ()) if request.config is None else request.config
    _check_config(release, config, explicit=request.config is not None)
    config = {key: value for key, value in config.items() if key in release.manifest.config}
    if request.grants is not None and not request.grants.within(release.manifest.grants):
        raise Refusal(422, "grant-denied", "an operator narrows grants and never widens them: see the manifest")
    if request.port is not None and not 0 <= request.port <= _PORT_MAX:
        raise Refusal(400, "bad-request", f"port {request.port} is none")
    kept = before if before is not None and before.target is not None else None
    port = (kept.port if kept else None) if request.port is None else request.port or None
    grants = _grants(request.grants, kept, release)
    share = (kept.share_lane if kept else False) if request.share_lane is None else request.share_lane
    return Value(request.target, tuple(sorted(config.items())), grants, port, attempt=attempt, share_lane=share)


def _check_config(release: Release, config: dict[str, str], *, explicit: bool) -> None:
    known = release.manifest.config
    for key, value in config.items():
        if explicit and key not in known:
            raise Refusal(
                422,
                "unknown-config",
                f"{release.name} has no configuration key {key!r}",
                f"it knows {', '.join(sorted(known)) or 'none'}",
            )
        if len(value.encode()) > caps.CONFIG_VALUE_MAX_BYTES:
            raise Refusal(413, "too-large", f"the value of {key} is larger than {caps.CONFIG_VALUE_MAX_BYTES} bytes")
    missing = [key for key, declared in known.items() if declared.default is None and key not in config]
    if missing:
        raise Refusal(
            422,
            "missing-config",
            f"{release.name} needs a value for {', '.join(missing)}",
            action="give --config KEY=VALUE",
        )


def _grants(asked: Grants | None, kept: Value | None, release: Release) -> str:
    if asked is not None:
        return wire.canonical(asked).decode()
    if kept is None or not kept.grants:
        return ""
    narrowed, ceiling = msgspec.json.decode(kept.grants, type=Grants), release.manifest.grants
    still = Grants(
        interfaces=tuple(name for name in narrowed.interfaces if ceiling.allows(name)),
        outbound=tuple(name for name in narrowed.outbound if outbound.covered(name, ceiling.outbound)),
        instances=tuple(name for name in narrowed.instances if name in ceiling.instances),
    )
    return wire.canonical(still).decode()


def new_grants(release: Release | None, old: Release | None) -> tuple[str, ...]:
    """What the new version may reach and the old one may not."""
    if release is None:
        return ()
    new, before = release.manifest.grants, old.manifest.grants if old is not None else Grants()
    return (
        *(f"interface {name}" for name in new.interfaces if not before.allows(name)),
        *(
            f"outbound {outbound.describe(name)}"
            for name in new.outbound
            if not outbound.covered(name, before.outbound)
        ),
        *(f"instance {name}" for name in new.instances if name not in before.instances),
    )
