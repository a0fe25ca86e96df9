"""Receiver of assignments: verifies each, from any source, and passes accepted ones to the reconciler.

Assignments come over MQTT (`down/desired`), over HTTPS (`/v1/desired`) and in offline bundles, none of which is
trusted. A refusal is reported once, with its code, and running components are not affected. A device whose clock is not
set cannot detect that newer assignments are withheld: it sends the director a nonce, and acts on an assignment only
once it has a freshness statement for that nonce.
"""

import asyncio
import contextlib
import hashlib
import logging
import os
import random
import secrets
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Final, Protocol

import msgspec

from agent.clock import ReferenceClock
from agent.config import Policy, Settings
from agent.identity.enrolment import CertificateRenewal, exclusion, problem_of, wants_renewal
from agent.link import bundle
from agent.link.bundle import BundleSource, BundleVerdict
from agent.link.https import FetchError, spread
from agent.update import state
from agent.update.problems import Problems, ReportSink
from agent.update.reconciler import Reconciler
from agent.update.state import DeviceContext, Violation
from agent.update.store import Database, Store, StoreError
from agent.update.trust import DeviceTrust, find_violations, remembered_assignment
from fleet.protocol import bounds, wire
from fleet.protocol.assignment import Assignment
from fleet.protocol.codes import Phase, RejectCode
from fleet.protocol.messages import AHEAD, DesiredReply, Report
from fleet.protocol.topics import Down
from signing.errors import Rejected
from signing.state import VERSION_MAX
from signing.verifier import Accepted

log = logging.getLogger("agent.update.receiver")

FRESH_S: Final = 20.0
"""Time that an accepted assignment waits for its freshness statement: a hello and its reply over a slow link."""

SAME_S: Final = 30.0
"""Time in which the same envelope over the other channel (MQTT or HTTPS) is not verified again."""

RETRY_S: Final = (5.0, 30.0)
BROKER_SLACK: Final = timedelta(minutes=2)
"""Delay of the broker behind HTTPS after which it is suspected of withholding an assignment."""

REORDERED_S: Final = 120.0
"""Time after a connection, or after HTTPS was faster, in which the broker may honestly deliver what is older: a session
keeps what was published while the device was away."""

AWAY_FIRST_S: Final = 5.0
"""Delay before the first retry after a server did not answer; doubled each time."""

REFUSALS_MAX: Final = 256

ARRIVALS_MAX: Final = 64
"""Maximum number of waiting messages from the broker; further ones are dropped, and HTTPS is polled instead."""

_NOT_THE_DIRECTORS: Final = frozenset(
    {
        RejectCode.UNSIGNED,
        RejectCode.MALFORMED,
        RejectCode.TOO_LARGE,
        RejectCode.UNSUPPORTED_VERSION,
        RejectCode.WRONG_FLEET,
        RejectCode.WRONG_DEVICE,
        RejectCode.ROLLBACK,
        RejectCode.EQUIVOCATION,
    }
)

_NO_BUNDLES: Final = "the device's owner does not allow bundles: see [policy] bundles in agent.toml"


@dataclass(frozen=True, slots=True)
class AssignmentArrived:
    """Assignment received from the broker."""

    envelope: bytes


@dataclass(frozen=True, slots=True)
class FreshnessArrived:
    """Freshness statement received from the broker, for a nonce of this device."""

    envelope: bytes


@dataclass(frozen=True, slots=True)
class PollAnswered:
    """Assignment received over HTTPS, with a freshness statement for the nonce of that request."""

    envelope: bytes
    statement: bytes
    nonce: str


@dataclass(frozen=True, slots=True)
class BundleArrived:
    """Notification that an offline bundle may have been staged."""


Input = AssignmentArrived | FreshnessArrived | PollAnswered | BundleArrived
_NAMES: Final[dict[type[Input], str]] = {
    AssignmentArrived: f"a message on down/{Down.DESIRED}",
    FreshnessArrived: f"a message on down/{Down.FRESH}",
    PollAnswered: "the server's answer to a poll",
    BundleArrived: "a bundle",
}


@dataclass(frozen=True, slots=True)
class _Unvouched:
    """Accepted assignment that waits for its freshness statement until `until` (loop time)."""

    accepted: Accepted
    envelope: bytes
    until: float


class Presence(Protocol):
    """Connection to the fleet, as far as freshness is concerned (`agent.session.Presence`)."""

    @property
    def connected(self) -> bool:
        """True while messages reach the fleet."""

    @property
    def broker_connected(self) -> bool:
        """True while they go through the broker."""

    async def hello(self, nonce: str) -> bool:
        """Ask for a freshness statement; return False without a connection."""


def _verdict(accepted: Accepted | None, refusal: Rejected | StoreError | None) -> BundleVerdict:
    if accepted is not None:
        return BundleVerdict(version=accepted.assignment.version)
    if isinstance(refusal, Rejected):
        return BundleVerdict(code=refusal.code, message=refusal.message)
    return BundleVerdict(code=RejectCode.INTERNAL, message=str(refusal))


def _violations(store: Store, trust: DeviceTrust, policy: Policy) -> tuple[Violation, ...]:
    return find_violations(trust, policy, store.committed())


def _use_nonce(store: Store, nonce: str) -> None:
    store.nonce = nonce  # part of each report from now on


class AssignmentReceiver:
    """Receiver of assignments; verifies them one after another."""

    name = "assignments"

    def __init__(
        self,
        *,
        device: DeviceContext,
        settings: Settings,
        clock: ReferenceClock,
        trust: DeviceTrust,
        source: BundleSource,
        db: Database,
        reconciler: Reconciler,
        presence: Presence,
        renewal: CertificateRenewal,
        problems: Problems,
        sink: ReportSink,
    ) -> None:
        """Prepare a receiver; `run` handles the inputs of `post`, and polls over HTTPS.

        Args:
            device: this device.
            settings: configuration; in production mode, an assignment without a freshness statement is not acted on.
            clock: reference time; if it is trustworthy, no freshness statement is needed.
            trust: verifier, called on the database thread.
            source: HTTPS and the bundle.
            db: the store.
            reconciler: receives accepted assignments and violations.
            presence: sends nonces.
            renewal: notified when the server requires another certificate.
            problems: lists what prevents this device from following its newest assignment.
            sink: notified of each report.
        """
        self._device = device
        self._settings = settings
        self._clock = clock
        self._trust = trust
        self._source = source
        self._db = db
        self._reconciler = reconciler
        self._presence = presence
        self._renewal = renewal
        self._problems = problems
        self._sink = sink
        self.inbox: asyncio.Queue[Input] = asyncio.Queue()
        self._due = asyncio.Event()
        self._asked_s = 0.0
        self._reordered_until = 0.0
        self._accepted_at_start = 0
        self._brought: dict[bool, int] = {}  # newest version that the broker (True) or HTTPS messages (False) brought
        self._nonce = ""
        self._unvouched: _Unvouched | None = None
        self._acted_on = (b"", 0.0)
        self._refusals: set[tuple[str, str]] = set()

    def post(self, item: Input) -> None:
        """Put an input into the inbox without waiting; beyond ARRIVALS_MAX, the broker's messages are dropped."""
        if isinstance(item, AssignmentArrived | FreshnessArrived) and self.inbox.qsize() >= ARRIVALS_MAX:
            log.warning("dropped a message from the broker: %d are already waiting", ARRIVALS_MAX)
            self.refresh_later(random.uniform(*RETRY_S))  # noqa: S311 - jitter, not a secret
            return
        self.inbox.put_nowait(item)

    def refresh(self) -> None:
        """Poll over HTTPS now."""
        self._due.set()

    def refresh_later(self, seconds: float) -> None:
        """Poll over HTTPS after `seconds`."""
        asyncio.get_running_loop().call_later(seconds, self._due.set)

    def check_in(self) -> None:
        """Poll over HTTPS now, and report the state of each instance."""
        self.refresh()
        self._reconciler.report_states()

    async def new_nonce(self) -> str:
        """Return a nonce for the next hello; only the newest is valid."""
        self._nonce = secrets.token_hex(16)
        self._may_be_reordered()
        if not self._presence.broker_connected:  # the server keeps nothing for a device that is away
            self._brought[False] = await self._db(Store.counter, "accepted")
        await self._db(_use_nonce, self._nonce)
        return self._nonce

    async def run(self) -> None:
        """Resume the accepted assignment, then verify inputs and poll, forever."""
        await self.resume()
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._poll_regularly())
            tasks.create_task(self._poll_after_renewals())
            tasks.create_task(self.work())

    async def resume(self) -> None:
        """Resume the assignment that was accepted before this start; needs no network."""
        await self._look_for_violations()
        self._accepted_at_start = await self._db(Store.counter, "accepted")
        envelope = await self._db(Store.envelope)
        assignment = None if envelope is None else remembered_assignment(envelope)
        if assignment is not None:
            await self._reconciler.desire(assignment)

    @property
    def awaits_freshness(self) -> bool:
        """True while an accepted assignment waits for its freshness statement."""
        return self._unvouched is not None

    async def work(self) -> None:
        """Handle the inbox, forever."""
        while True:
            item = await self._next()
            if item is None:
                await self._nobody_vouched()
                continue
            try:
                await self._handle(item)
            except Exception as error:
                # An input that comes once comes at each start: retained by a broker, at the server, or on the disk.
                if isinstance(error, StoreError):  # the disk is full, most likely, as is said elsewhere
                    log.warning("dropped %s: %s", _NAMES[type(item)], error)
                else:
                    log.exception("dropped %s", _NAMES[type(item)])
                if isinstance(item, BundleArrived):  # whoever applied it waits for a verdict
                    verdict = BundleVerdict(code=RejectCode.INTERNAL, message=f"internal error: {type(error).__name__}")
                    with contextlib.suppress(OSError):
                        await self._db.run(self._source.bundle.done, verdict)
            finally:
                self.inbox.task_done()

    async def _next(self) -> Input | None:
        """Return the next input; None once the waiting assignment has waited long enough."""
        try:
            async with asyncio.timeout_at(None if self._unvouched is None else self._unvouched.until):
                return await self.inbox.get()
        except TimeoutError:
            return None

    async def _handle(self, item: Input) -> None:
        match item:
            case AssignmentArrived(envelope):
                self._problems.clear("broker")  # even if the message is refused, the broker is not silent
                by_broker = self._presence.broker_connected
                if await self._is_late(envelope, by_broker=by_broker):
                    return
                await self._judge(envelope)
                if envelope == await self._db(Store.envelope):
                    self._brought[by_broker] = await self._db(Store.counter, "accepted")
            case FreshnessArrived(envelope):
                await self._judge_freshness(envelope)
            case PollAnswered(envelope, statement, nonce):
                before = await self._db(Store.envelope)
                await self._judge(envelope, statement=statement, nonce=nonce)
                if envelope != before and envelope == await self._db(Store.envelope):
                    self._may_be_reordered()
                    self._suspect_broker(envelope)
            case BundleArrived():
                await self._judge_bundle()

    def _may_be_reordered(self) -> None:
        """Expect messages for a while that are older than what came another way."""
        self._reordered_until = asyncio.get_running_loop().time() + REORDERED_S

    async def _is_late(self, envelope: bytes, *, by_broker: bool) -> bool:
        """Tell whether an assignment of the director's is older than the accepted one only since that came another way.

        Each way keeps its order: one behind a newer one of the same way is refused and reported, as is one that comes
        later. The broker also keeps what HTTPS brought in its absence.
        """
        claimed = remembered_assignment(envelope)
        if claimed is None or asyncio.get_running_loop().time() >= self._reordered_until:
            return False
        if claimed.version < self._brought.get(by_broker, self._accepted_at_start):
            return False
        if claimed.version >= await self._db(Store.counter, "accepted"):
            return False
        try:
            await self._db.run(self._trust.accept, envelope)
        except Rejected as error:
            late = error.code is RejectCode.ROLLBACK  # the last check: signature, fleet and device are right
        except StoreError:
            return False
        else:
            return False
        if late:
            self._brought[by_broker] = claimed.version
            log.info("assignment %d came after a newer one, by another way", claimed.version)
        return late

    # HTTPS

    async def _poll_regularly(self) -> None:
        """Poll at the start, on request, and at intervals; sooner after a poll without an answer."""
        backoff_s = AWAY_FIRST_S
        while True:
            self._due.clear()
            reached = await self.poll()
            backoff_s = AWAY_FIRST_S if reached else backoff_s * 2
            regular_s = self._settings.recheck_s if self._presence.connected else self._settings.refresh_s
            seconds = regular_s if reached else min(regular_s, backoff_s)
            jitter = random.uniform(0.5, 1.5)  # noqa: S311 - jitter, not a secret
            asked_s, self._asked_s = self._asked_s, 0.0
            if asked_s:
                await asyncio.sleep(spread(0.0, asked_s))  # whoever calls: the server is busy
                continue
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(seconds * jitter):
                    await self._due.wait()

    async def _poll_after_renewals(self) -> None:
        """Poll at once with a renewed certificate, as the server may have refused the old one."""
        while True:
            await self._renewal.renewed.wait()
            self._renewal.renewed.clear()
            self.refresh()

    async def poll(self) -> bool:
        """Fetch the assignment over HTTPS into the inbox; return False if the server did not answer."""
        nonce = secrets.token_hex(16)
        path = f"/v1/desired?nonce={nonce}"
        try:
            answer = await asyncio.to_thread(self._source.request, "GET", path, max_bytes=DesiredReply.MAX_BYTES)
            reply = wire.decode(DesiredReply, answer)
        except FetchError as error:
            if wants_renewal(error):
                self._renewal.request()
            if reason := exclusion(error):
                if self._problems.text("server") != reason:
                    log.error("%s", reason)  # noqa: TRY400 - the reason is the server's word
                self._problems.set("server", reason)
                self._sink.changed()
            elif error.status:
                self._problems.clear("server")
            self._asked_s = min(error.retry_after_s, self._settings.recheck_s)
            if problem_of(error) == AHEAD:
                await self._show_assignment()
            elif error.code is not RejectCode.NOT_FOUND and not reason:
                log.info("cannot fetch the assignment: %s", error.message)
            return error.status != 0
        except wire.WireError as error:
            log.warning("cannot read the server's reply: %s", error)
        else:
            self._problems.clear("server")
            self.post(PollAnswered(reply.assignment.encode(), reply.fresh.encode(), nonce))
        return True

    async def _show_assignment(self) -> None:
        """Show the server, which was made anew from a backup, the assignment that its director signed later."""
        envelope = await self._db(Store.envelope)
        if envelope is None:
            return
        try:
            await asyncio.to_thread(
                self._source.request,
                "POST",
                "/v1/assignment",
                max_bytes=bounds.KIB,
                body=envelope,
                headers={"Content-Type": "application/json"},
            )
        except FetchError as error:
            log.warning("cannot show the server the assignment: %s", error.message)

    def _suspect_broker(self, envelope: bytes) -> None:
        """Report a problem if the connected broker should have delivered an assignment long before HTTPS did."""
        found = remembered_assignment(envelope)
        if found is None or not self._presence.broker_connected or self._clock.now() - found.issued < BROKER_SLACK:
            return
        text = (
            f"the broker withheld assignment {found.version} of {found.issued:%Y-%m-%d %H:%M} UTC from this device: "
            "HTTPS brought it"
        )
        if not self._problems.text("broker"):
            log.warning("%s", text)
        self._problems.set("broker", text)

    # Verification

    async def _judge(self, envelope: bytes, *, statement: bytes = b"", nonce: str = "") -> None:
        """Verify an assignment, persist it, and act on it once it is known to be current; report a refusal once.

        Args:
            envelope: as received.
            statement: freshness statement received with it; empty for none.
            nonce: the nonce that the statement must answer.
        """
        now = asyncio.get_running_loop().time()
        if envelope == self._acted_on[0] and now - self._acted_on[1] < SAME_S:
            return
        if self._unvouched is not None and envelope == self._unvouched.envelope and not statement:
            return  # receiving it again does not make it wait longer
        accepted = await self._accept(envelope)
        await self._look_for_violations()
        if accepted is None:
            return
        self._unvouched = None  # replaced by this assignment
        if (statement and await self._is_fresh(statement, nonce, accepted.sha256)) or self._clock.is_trustworthy():
            await self._act(accepted, envelope)
        elif await self._presence.hello(await self.new_nonce()):
            self._unvouched = _Unvouched(accepted, envelope, asyncio.get_running_loop().time() + FRESH_S)
        else:
            await self._not_vouched_for(accepted, envelope)

    async def _accept(self, envelope: bytes) -> Accepted | None:
        try:
            accepted = await self._db.run(self._trust.accept, envelope)
        except Rejected as error:
            await self._refused(envelope, error)
            return None
        except StoreError as error:
            # An assignment that cannot be stored is not accepted: components keep running, and HTTPS is polled again.
            if str(error) != self._problems.text("assignment"):
                self._problems.set("assignment", str(error))
                log.error("%s", error)  # noqa: TRY400 - the message contains the error
            self.refresh_later(random.uniform(*RETRY_S))  # noqa: S311 - jitter, not a secret
            return None
        self._problems.clear("assignment")
        return accepted

    async def _act(self, accepted: Accepted, envelope: bytes) -> None:
        log.info("assignment %d accepted", accepted.assignment.version)
        self._acted_on = (envelope, asyncio.get_running_loop().time())
        await self._reconciler.desire(accepted.assignment)

    async def _look_for_violations(self) -> None:
        """Check running components against the current metadata, without waiting for a new assignment."""
        try:
            await self._reconciler.hold(await self._db(_violations, self._trust, self._settings.policy))
        except StoreError as error:
            log.error("cannot check running components for revocations: %s", error)  # noqa: TRY400 - the message contains the error

    # Freshness

    async def _judge_freshness(self, envelope: bytes) -> None:
        try:
            facts = await self._db(Store.facts)
        except StoreError as error:
            log.error("cannot tell whether the assignment is fresh: %s", error)  # noqa: TRY400 - the message contains the error
            return
        if facts.assignment is None or not await self._is_fresh(envelope, self._nonce, facts.assignment.sha256):
            return
        waiting = self._unvouched
        if waiting is not None and waiting.accepted.sha256 == facts.assignment.sha256:
            self._unvouched = None
            await self._act(waiting.accepted, waiting.envelope)

    async def _is_fresh(self, envelope: bytes, nonce: str, sha256: str) -> bool:
        try:
            await self._db.run(self._trust.fresh, envelope, nonce=nonce, sha256=sha256)
        except Rejected as error:
            # A reply to an earlier nonce of this device is normal.
            log.log(logging.DEBUG if error.code is RejectCode.REPLAY else logging.INFO, "not fresh: %s", error)
            if error.code is RejectCode.FREEZE:
                # Either a newer assignment is on its way, or it is withheld from this device: poll HTTPS to find out.
                text = f"the newest assignment may be withheld from this device: {error.message}"
                self._problems.set("fresh", text)
                self.refresh_later(random.uniform(1, 3))  # noqa: S311 - jitter, not a secret
            return False
        self._problems.clear("fresh")
        return True

    async def _nobody_vouched(self) -> None:
        waiting, self._unvouched = self._unvouched, None
        if waiting is not None:
            await self._not_vouched_for(waiting.accepted, waiting.envelope)

    async def _not_vouched_for(self, accepted: Accepted, envelope: bytes) -> None:
        version = accepted.assignment.version
        text = f"assignment {version}: it is not proved to be current, and this device's clock is not set"
        self._problems.set("fresh", text)
        log.warning("%s", text)
        if self._settings.production:
            self.refresh_later(random.uniform(*RETRY_S))  # noqa: S311 - jitter, not a secret
        else:
            await self._act(accepted, envelope)

    # Bundles

    async def _judge_bundle(self) -> None:
        """Verify the assignment of a staged offline bundle, without proof that it is current."""
        envelope = await self._db.run(self._source.bundle.envelope)
        if envelope is None:
            return
        accepted, refusal = None, None
        try:
            if not self._settings.policy.bundles:
                raise Rejected(RejectCode.FREEZE, _NO_BUNDLES)  # noqa: TRY301 - handled like other refusals
            accepted = await self._db.run(self._trust.accept, envelope, bundle=True)
        except (Rejected, StoreError) as error:
            refusal = error
            log.error("the bundle was refused: %s", error)  # noqa: TRY400 - the message contains the error
        await self._look_for_violations()
        if accepted is not None:
            version = accepted.assignment.version
            ended = await self._db.run(self._trust.ended)
            past = "" if ended is None else f" whose metadata ended on {ended:%Y-%m-%d %H:%M} UTC"
            text = f"assignment {version} came in a bundle{past}: it is not proved to be current"
            log.warning("%s", text)
            await self._report(state.about(self._device, assignment=version, phase=Phase.IDLE, message=text))
            await self._reconciler.desire(accepted.assignment)
        with contextlib.suppress(OSError):  # the bundle is then verified again at the next start
            await self._db.run(self._source.bundle.done, _verdict(accepted, refusal))

    # Reports

    async def _refused(self, envelope: bytes, error: Rejected) -> None:
        if error.code in {RejectCode.UNREACHABLE, RejectCode.TOO_SLOW}:
            log.warning("the assignment cannot be verified now: %s", error.message)
            self._problems.set("assignment", f"the fleet's metadata cannot be fetched: {error.message}")
            self.refresh_later(random.uniform(*RETRY_S))  # noqa: S311 - jitter, not a secret
            return
        self._problems.set(
            "assignment",
            f"no updates until the metadata is renewed; running components are not affected: {error.message}"
            if error.code is RejectCode.EXPIRED
            else f"an assignment was refused ({error.code}): {error.message}",
        )
        sha256 = hashlib.sha256(envelope).hexdigest()
        key = (sha256, error.code.value)
        if key in self._refusals or len(self._refusals) >= REFUSALS_MAX:
            return
        self._refusals.add(key)
        claimed = remembered_assignment(envelope)
        report = state.about(
            self._device,
            assignment=await self._version_meant(claimed, error.code),
            phase=Phase.FAILED,
            code=error.code,
            message=error.message,
        )
        report = msgspec.structs.replace(
            report,
            refused=claimed.version if claimed is not None and 0 < claimed.version <= VERSION_MAX else 0,
            refused_sha256=sha256,
        )
        state.log_report(report)
        await self._report(report)

    async def _version_meant(self, claimed: Assignment | None, code: RejectCode) -> int:
        """Return the version that was refused; 0 if the director did not sign it."""
        if claimed is None or code in _NOT_THE_DIRECTORS:
            return await self._db(Store.counter, "accepted")
        return claimed.version

    async def _report(self, report: Report) -> None:
        with contextlib.suppress(StoreError):
            await self._db(Store.save, report=report)
        self._sink.saved(report)


class BundleListener:
    """Listener for offline bundles: one applied before the agent started, and those of `fleet-agent apply`."""

    name = "bundles"

    def __init__(self, wake: Path, receiver: AssignmentReceiver) -> None:
        """Prepare a listener; `wake` is the path of the FIFO through which `fleet-agent apply` wakes the agent."""
        self._wake = wake
        self._receiver = receiver

    async def run(self) -> None:
        """Have the receiver verify bundles, forever."""
        self._receiver.post(BundleArrived())
        try:
            descriptor = bundle.listen(self._wake)
        except OSError as error:
            log.warning("cannot listen for bundles: %s", error)
            return
        loop = asyncio.get_running_loop()
        try:
            loop.add_reader(descriptor, self._woken, descriptor)
            await loop.create_future()
        finally:
            loop.remove_reader(descriptor)
            os.close(descriptor)

    def _woken(self, descriptor: int) -> None:
        with contextlib.suppress(BlockingIOError):
            os.read(descriptor, 4096)
        self._receiver.post(BundleArrived())
