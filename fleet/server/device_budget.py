"""Budget of each device: what it may cost the server, judged before a message is decoded; suspension, clones.

A broker bounds the size of a packet and the memory of a client, and neither its rate nor what a message costs its
reader. A device that goes over its budget is throttled: its messages are dropped unread, reports stay unacknowledged
and come again later, and other devices notice nothing. A device that goes on is suspended: the broker gets a deny line
for what it writes, and lifts it after `SUSPENDED_S`. A suspended device still receives, so that a security stop
reaches it. Each step is an alert: a security event in the audit log and the device's timeline, shown by
`fleet status`, `fleet device` and the metrics.

Two machines with one certificate push each other off the broker, each time with a hello of its own boot. A boot never
comes back, so a hello with a boot id of before is a clone; a device that connects without end is shown too, since a
copied memory image has the same boot id.
"""

import logging
from collections import OrderedDict, deque
from collections.abc import Callable
from datetime import datetime
from typing import Final

from fleet.protocol import bounds
from fleet.protocol.codes import AlertKind
from fleet.protocol.messages import Hello
from fleet.protocol.operator_api import Refusal
from fleet.protocol.topics import Topic, Up
from fleet.server.clock import SMALL
from fleet.server.limits import DEFAULTS, MESSAGE_COST, Rate, ServerLimits
from fleet.store.store import Store

log = logging.getLogger(__name__)


BAD_MESSAGES: Final = Rate(256, 0.1)
"""Decoded in vain. An agent of another version may send one kind that is not understood with each health."""

PATIENCE: Final = Rate(2000, 1)
"""Messages over a budget until the device is suspended; a large message counts for each 8 KiB, a stray topic for 20."""

SUSPENDED_S: Final = 900.0
"""Silence of a suspended device: long enough that no storm is worth it, short enough to heal without an operator."""

SHOWN_S: Final = 3600.0
CLONE_SHOWN_S: Final = 86_400.0
CONNECTS: Final = Rate(30, 1 / 60)
"""Hellos of one device: a flapping network connects again after back-off, two clones at once and without end."""

CERTIFICATES_OF_ONE: Final = Rate(5, 1 / 3600)
"""An agent renews at two thirds of a certificate's life, and tries again each few minutes where that fails."""

DEVICES_MAX: Final = 40_000
_PROBLEMS_MAX: Final = 20
_COST: Final = dict.fromkeys(Up, MESSAGE_COST) | {Up.HELLO: 5 * MESSAGE_COST}
"""A hello makes the server compare, sign and answer; the others are one statement each."""

_STRAY_COST: Final = 20
_PATIENCE_BYTES: Final = 8 * bounds.KIB
_BOOTS_MAX: Final = 8
_NONCES_MAX: Final = 32


class TokenBucket:
    """Token bucket, full at first; times in seconds of a clock that never jumps."""

    __slots__ = ("_at", "_left", "_rate")

    def __init__(self, rate: Rate, now: float) -> None:
        self._rate, self._left, self._at = rate, rate.burst, now

    def left(self, now: float) -> float:
        """Return what is left now."""
        self._left = min(self._rate.burst, self._left + max(0.0, now - self._at) * self._rate.per_s)
        self._at = now
        return self._left

    def take(self, cost: float, now: float) -> bool:
        """Take `cost`; false, and nothing is taken, when less is left."""
        if self.left(now) < cost:
            return False
        self._left -= cost
        return True


class _Account:
    """Budget of one device, and what its hellos said."""

    __slots__ = ("bad", "boots", "connects", "nonces", "patience", "readings", "stored", "traffic", "work")

    def __init__(self, limits: ServerLimits, now: float) -> None:
        self.traffic, self.stored = TokenBucket(limits.traffic, now), TokenBucket(limits.stored, now)
        self.work, self.bad = TokenBucket(limits.work, now), TokenBucket(BAD_MESSAGES, now)
        self.patience, self.connects = TokenBucket(PATIENCE, now), TokenBucket(CONNECTS, now)
        self.readings = TokenBucket(limits.readings, now)
        self.boots: deque[str] = deque(maxlen=_BOOTS_MAX)
        self.nonces: deque[str] = deque(maxlen=_NONCES_MAX)

    def over(self, channel: Up, size: int, now: float) -> str:
        """Charge a message; return which budget it goes over, empty for none."""
        if self.bad.left(now) < 1:
            return "messages that cannot be read"
        if not self.traffic.take(size, now):
            return "bytes"
        if not self.work.take(_COST[channel], now):
            return "messages"
        if channel is Up.REPORT and not self.stored.take(size, now):
            return "bytes of reports"
        if channel is Up.READINGS and not self.readings.take(size, now):
            return "bytes of components' messages"
        return ""


class DeviceBudget:
    """Budgets of all devices. All methods run on the loop.

    Attributes:
        suspended: devices whose messages the broker has to refuse now.
    """

    def __init__(
        self,
        *,
        store: Store,
        clock: Callable[[], datetime],
        monotonic: Callable[[], float],
        silence: Callable[[], None],
        clear: Callable[[str], object],
        limits: ServerLimits = DEFAULTS,
    ) -> None:
        """Prepare budgets.

        Args:
            store: of the fleet.
            clock: the time, UTC.
            monotonic: seconds of a clock that never jumps.
            silence: called when `suspended` has changed, to tell the broker.
            clear: removes what the broker retains under a topic.
            limits: of the server.
        """
        self._limits = limits
        self._store, self._clock, self._monotonic = store, clock, monotonic
        self._silence, self._clear = silence, clear
        self._accounts: OrderedDict[str, _Account] = OrderedDict()
        self._shown: dict[tuple[str, AlertKind], float] = {}
        self.suspended: set[str] = set(store.devices.suspended())

    def admit(self, device: str, channel: Up, size: int) -> bool:
        """Charge a message before it is decoded; false when it is over the device's budget and to be dropped."""
        if device in self.suspended:
            return False
        now = self._monotonic()
        account = self._account(device, now)
        over = account.over(channel, size, now)
        if not over:
            return True
        words = f"it sends more {over} than a device may; what is over is dropped"
        self._alert(device, AlertKind.THROTTLED, words, for_s=SHOWN_S)
        self._strain(device, account, 1 + size // _PATIENCE_BYTES, now)
        return False

    def reject(self, device: str) -> None:
        """Count a message that was decoded in vain."""
        now = self._monotonic()
        self._account(device, now).bad.take(1, now)

    def stray(self, device: str, topic: str) -> None:
        """Count a message on a topic that the protocol does not have, and clear what the broker retains of it.

        Mosquitto's rules cannot compute a device's shard, so a device can write to its channels in any.
        """
        self._clear(topic)
        now = self._monotonic()
        self._strain(device, self._account(device, now), _STRAY_COST, now)

    def greet(self, hello: Hello) -> None:
        """Look at a hello for a second machine with the same certificate."""
        now = self._monotonic()
        account = self._account(hello.device, now)
        if hello.nonce in account.nonces:  # delivered twice by the broker
            return
        account.nonces.append(hello.nonce)
        boot = hello.boot_id
        back = boot in account.boots and account.boots[-1] != boot
        if back:
            account.boots.remove(boot)
        if back or boot not in account.boots:
            account.boots.append(boot)
        if boot and back:
            words = "two machines use its certificate: a boot that another one had replaced came back"
            self._alert(hello.device, AlertKind.CLONED, words, for_s=CLONE_SHOWN_S)
        elif not account.connects.take(1, now):
            words = "it connects without end: two machines may use its certificate, or its network fails"
            self._alert(hello.device, AlertKind.CLONED, words, for_s=CLONE_SHOWN_S)

    def lift(self) -> None:
        """End the suspensions whose time is over; forget alerts that are no longer shown."""
        now = self._clock().timestamp()
        latest = now + SUSPENDED_S + SMALL.total_seconds()  # a later end was dated by a clock that was ahead
        over = [
            each.device
            for each in self._store.devices.alerts()
            if each.kind is AlertKind.SUSPENDED and not now < each.until <= latest
        ]
        with self._store.atomic():
            self._store.devices.forget_alerts(before=now)
            for device in over:
                self._store.devices.forget_alert(device, AlertKind.SUSPENDED)
                self._store.devices.note(device, "security", "its suspension is over: it is heard again", now=now)
                self._store.access.audit(actor="server", act="lift-suspension", subject=device, now=now)
        self._shown = {key: until for key, until in self._shown.items() if until > now}
        if over:
            self.suspended.difference_update(over)
            for device in over:
                self._accounts.pop(device, None)
                self._shown.pop((device, AlertKind.SUSPENDED), None)
            self._silence()

    def clear(self, device: str, *more: Topic) -> None:
        """Clear what the broker retains of a device that it no longer hears, on its own channels and `more`."""
        for topic in (*(Topic(device, channel) for channel in Up), *more):
            self._clear(str(topic))

    def problems(self) -> list[str]:
        """Return the alerts as sentences."""
        now = self._clock().timestamp()
        return [f"{each.device}: {each.text}" for each in self._store.devices.alerts(now=now)][:_PROBLEMS_MAX]

    def _strain(self, device: str, account: _Account, cost: float, now: float) -> None:
        """Take from the patience with a device, and suspend it when nothing is left."""
        if account.patience.take(cost, now) or device in self.suspended or self._store.devices.get(device) is None:
            return
        self.suspended.add(device)
        minutes = int(SUSPENDED_S // 60)
        words = f"it went on sending more than a device may: the broker refuses its messages for {minutes} minutes"
        self._alert(device, AlertKind.SUSPENDED, words, for_s=SUSPENDED_S)
        self._silence()
        self.clear(device)

    def _alert(self, device: str, kind: AlertKind, words: str, *, for_s: float) -> None:
        """Raise an alert, or show it for longer; a security event when it is a new one."""
        now = self._clock().timestamp()
        shown = self._shown.get((device, kind), 0.0)
        if shown > now + for_s / 2:
            return
        self._shown[device, kind] = now + for_s
        if self._store.devices.get(device) is None:
            return
        with self._store.atomic():
            if not self._store.devices.alert(device, kind, words, now=now, until=now + for_s):
                return
            self._store.devices.note(device, "security", words, now=now)
            self._store.access.audit(actor="server", act=f"alert-{kind}", subject=device, detail=words, now=now)
        log.warning("%s: %s", device, words)

    def _account(self, device: str, now: float) -> _Account:
        account = self._accounts.get(device)
        if account is None:
            account = self._accounts[device] = _Account(self._limits, now)
            if len(self._accounts) > DEVICES_MAX:
                self._accounts.popitem(last=False)
        else:
            self._accounts.move_to_end(device)
        return account


class RequestBudget:
    """Limit of a device's requests over HTTPS, and of certificates that are issued, for each device and in all.

    A key of a device's own is enough to renew, and each certificate costs a signature and a row.
    """

    def __init__(self, monotonic: Callable[[], float], limits: ServerLimits = DEFAULTS) -> None:
        self._monotonic, self._requests = monotonic, limits.requests
        self._all = TokenBucket(limits.certificates, monotonic())
        self._devices: OrderedDict[tuple[str, Rate], TokenBucket] = OrderedDict()

    def check_request(self, device: str) -> None:
        """Take one request from the device's budget; raises `Refusal` when none is left."""
        if not self._take(device, self._requests):
            raise Refusal(429, "too-many", f"{device} asks too often", action="wait a minute")

    def check_certificate(self, device: str) -> None:
        """Take one certificate from the budget; raises `Refusal` when none is left."""
        if not self._take(device, CERTIFICATES_OF_ONE):
            raise Refusal(429, "too-many", f"{device} was given too many certificates", action="wait an hour")
        if not self._all.take(1, self._monotonic()):
            raise Refusal(429, "too-many", "too many certificates are asked for at once", action="wait a minute")

    def _take(self, device: str, rate: Rate) -> bool:
        now = self._monotonic()
        bucket = self._devices.get((device, rate))
        if bucket is None:
            bucket = self._devices[device, rate] = TokenBucket(rate, now)
            if len(self._devices) > DEVICES_MAX:
                self._devices.popitem(last=False)
        else:
            self._devices.move_to_end((device, rate))
        return bucket.take(1, now)
