"""What has to be done now and then: renew the certificate, make room on the disk, pet the watchdog."""

import asyncio
import contextlib
import logging
import random
from collections.abc import Callable
from datetime import datetime
from typing import Final

import msgspec

from agent import enroll, images, systemd
from agent.config import Places, Settings
from agent.deploy import Deployer
from agent.fetch import FetchError, Https
from agent.identity import Identity
from agent.images import ImageError, Images
from agent.sealed import Sealed
from agent.worker import Worker
from fleet.protocol import caps, wire
from fleet.protocol.enrolment import RenewReply, RenewRequest

log = logging.getLogger("agent.upkeep")

RENEW_CHECK_S: Final = 6 * 3600.0


async def renew(
    places: Places,
    https: Https,
    who: Identity,
    now: Callable[[], datetime],
    *,
    outdated: asyncio.Event,
    renewed: Callable[[], None],
) -> None:
    """Renew the device certificate at two thirds of its life, or when the server says that it is outdated; for ever."""
    while True:
        told = outdated.is_set()
        outdated.clear()
        try:
            if told or now() >= await asyncio.to_thread(enroll.renew_at, places.identity):
                await asyncio.to_thread(renew_now, places, https, who)
                log.info("the device certificate was renewed")
                renewed()
        except (FetchError, enroll.EnrolError, OSError, ValueError, wire.WireError, msgspec.MsgspecError) as error:
            log.warning("the device certificate could not be renewed: %s", error)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(RENEW_CHECK_S * random.uniform(0.8, 1.2)):  # noqa: S311 - jitter, not a secret
                await outdated.wait()


def renew_now(places: Places, https: Https, who: Identity) -> None:
    """Ask for a new certificate for the same key, and put it in place. Raises `FetchError` and `EnrolError`."""
    answer = https.request(
        "POST",
        "/v1/renew",
        body=wire.encode(
            RenewRequest(
                csr_pem=enroll.renewal_request(places.identity, who.device),
                sealing_proof=enroll.sealing_proof(places.identity, who.fleet),
            )
        ),
        headers={"Content-Type": "application/json"},
        max_bytes=caps.API_BODY_MAX_BYTES,
    )
    try:
        reply = msgspec.json.decode(answer, type=RenewReply)
    except wire.JSON_ERRORS as error:
        raise enroll.EnrolError(f"the server's answer to the renewal is not understood: {error}") from error
    enroll.install_certificate(places.identity, reply.certificate_pem)


async def make_room(places: Places, settings: Settings, made: Images, deployer: Deployer, sealed: Sealed) -> int:
    """Evict least recently used artifacts and images beyond the budget; returns bytes freed.

    What is committed, and what is being changed, stays, and so does what a change would go back to.
    """
    standing = deployer.standing
    items = [(each.item, each.manifest) for each in standing.committed.values()]
    keep = {item.sha256 for item, _ in items}
    for flight in standing.flights.values():
        if flight.change.item is not None:
            keep.add(flight.change.item.sha256)
            if flight.change.manifest is not None:
                items.append((flight.change.item, flight.change.manifest))
    wanted = [flight.change.item for flight in standing.flights.values() if flight.change.item is not None]
    await asyncio.to_thread(sealed.evict, [*(item for item, _ in items), *wanted])
    try:
        for item, manifest in items:
            keep.add(await made.name(item.sha256, item.manifest_sha256, fuel=manifest.limits.fuel > 0))
    except ImageError:
        return 0  # no engine, no images
    return await asyncio.to_thread(
        images.evict, places.images, places.artifacts, keep=keep, budget_bytes=settings.disk.budget_bytes
    )


async def watchdog(worker: Worker, status: Callable[[], str]) -> None:
    """Pet systemd's watchdog, where there is one, as long as the loop and the worker get work done."""
    interval = systemd.watchdog_s()
    while interval is not None:
        await worker(lambda: None)
        systemd.notify(WATCHDOG="1", STATUS=status())
        await asyncio.sleep(interval)
