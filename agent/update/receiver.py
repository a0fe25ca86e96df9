"""What this board should run, as far as it can be believed: assignments are judged here, wherever they came from.

They come over MQTT (`down/desired`) and over HTTPS (`/v1/desired`), and both ways are only a postman's. What is refused
is reported once, with its typed code, and what runs goes on. A board whose clock nobody set cannot see that it is kept
from what is new; so it asks the director with a nonce, and does not act on an assignment until that was answered.
"""

import asyncio
import contextlib
import hashlib
import logging
import random
import secrets
from collections.abc import Callable
from datetime import timedelta
from typing import Final

import msgspec

from agent.identity.enrolment import wants_renewal
from agent.link.bundle import BundleSource, BundleVerdict
from agent.link.https import FetchError
from agent.update import state
from agent.update.reconciler import Reconciler
from agent.update.state import DeviceContext, Violation
from agent.update.store import Database, Store, StoreError
from agent.update.trust import DeviceTrust, remembered_assignment
from fleet.protocol import wire
from fleet.protocol.assignment import Assignment
from fleet.protocol.codes import Phase, RejectCode
from fleet.protocol.messages import DesiredReply
from signing.errors import Rejected
from signing.state import VERSION_MAX
from signing.verifier import Accepted

log = logging.getLogger("agent.update.receiver")

FRESH_S: Final = 20.0

SAME_S: Final = 30.0

RETRY_S: Final = (5.0, 30.0)

BROKER_SLACK: Final = timedelta(minutes=2)
"""How long the broker may take to bring what HTTPS has brought."""

AWAY_FIRST_S: Final = 5.0
"""How soon a server that did not answer is asked again, doubled each time."""

REFUSALS_MAX: Final = 256

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


_NO_BUNDLES: Final = "this board's owner allows no bundles: [policy] bundles = true in agent.toml does"


def _outcome(accepted: Accepted | None, refusal: Rejected | StoreError | None) -> BundleVerdict:
    if accepted is not None:
        return BundleVerdict(version=accepted.assignment.version)
    if isinstance(refusal, Rejected):
        return BundleVerdict(code=refusal.code, message=refusal.message)
    return BundleVerdict(code=RejectCode.INTERNAL, message=str(refusal))


class AssignmentReceiver:
    """Judges assignments and hands them to the deployer."""

    def __init__(
        self,
        *,
        board: DeviceContext,
        trust: DeviceTrust,
        https: BundleSource,
        store: Store,
        worker: Database,
        deployer: Reconciler,
        clock_set: Callable[[], bool],
        ask_fresh: Callable[[str], bool],
        on_report: Callable[[], None],
        doubts: Callable[[], tuple[Violation, ...]],
        strict: bool,
        bundles: bool = False,
        on_outdated: Callable[[], None] = lambda: None,
        on_bus: Callable[[], bool] = lambda: False,
    ) -> None:
        """A judge.

        `clock_set` says whether somebody sets the clock, `ask_fresh` sends a nonce (false where there is no
        connection), `on_report` tells of a new report, `doubts` holds what is committed against what is known by now
        (called on the worker), `on_outdated` hears that the server wants another certificate of this board, `on_bus`
        says whether the broker is connected. With
        `strict`, an assignment that nobody vouches for in time is not acted on; with `bundles`, one that came in a
        bundle is.
        """
        self._board = board
        self._trust = trust
        self._https = https
        self._store = store
        self._worker = worker
        self._deployer = deployer
        self._clock_set = clock_set
        self._ask_fresh = ask_fresh
        self._on_report = on_report
        self._doubts = doubts
        self._on_outdated = on_outdated
        self._on_bus = on_bus
        self._strict = strict
        self._bundles = bundles
        self._due = asyncio.Event()
        self._nonce = ""
        self._vouched: asyncio.Future[None] | None = None
        self._judging = asyncio.Lock()
        self._judged = (b"", 0.0)
        self._refusals: set[tuple[str, str]] = set()
        self.problems: dict[str, str] = {}

    def new_nonce(self) -> str:
        """A nonce for the next hello; only the newest is answered."""
        self._nonce = self._store.nonce = secrets.token_hex(16)
        return self._nonce

    def refresh(self) -> None:
        """Ask for the desired state over HTTPS now."""
        self._due.set()

    def refresh_later(self, seconds: float) -> None:
        """Ask for it after a while."""
        asyncio.get_running_loop().call_later(seconds, self._due.set)

    async def resume(self) -> None:
        """What was accepted before is carried on with, network or none."""
        await self._hold()
        envelope = await self._worker(self._store.envelope)
        assignment = None if envelope is None else remembered_assignment(envelope)
        if assignment is not None:
            await self._deployer.desire(assignment)

    async def run(self, interval_s: Callable[[], float]) -> None:
        """Ask over HTTPS at the start, when told to, and each `interval_s()` seconds; sooner where nobody answered."""
        backoff_s = AWAY_FIRST_S
        while True:
            self._due.clear()
            reached = await self._ask()
            backoff_s = AWAY_FIRST_S if reached else backoff_s * 2
            seconds = interval_s() if reached else min(interval_s(), backoff_s)
            with contextlib.suppress(TimeoutError):
                jitter = random.uniform(0.5, 1.5)  # noqa: S311 - jitter, not a secret
                async with asyncio.timeout(seconds * jitter):
                    await self._due.wait()

    async def judge_bundle(self) -> None:
        """Judge the assignment of an offline bundle that was laid out; nobody vouches that it is current."""
        envelope = await self._worker(self._https.bundle.envelope)
        if envelope is None:
            return
        async with self._judging:
            accepted, refusal = None, None
            try:
                if not self._bundles:
                    raise Rejected(RejectCode.FREEZE, _NO_BUNDLES)  # noqa: TRY301 - refused like everything else
                accepted = await self._worker(self._trust.accept, envelope, bundle=True)
            except (Rejected, StoreError) as error:
                refusal = error
                log.error("the bundle was refused: %s", error)  # noqa: TRY400 - said in the message
            await self._hold()
            if accepted is not None:
                version = accepted.assignment.version
                ended = await self._worker(self._trust.ended)
                past = "" if ended is None else f" whose metadata ended on {ended:%Y-%m-%d %H:%M} UTC"
                text = f"assignment {version} came in a bundle{past}: nobody vouched that it is current"
                log.warning("%s", text)
                report = state.about(self._board, assignment=version, phase=Phase.IDLE, message=text)
                with contextlib.suppress(StoreError):
                    await self._worker(self._store.save, report=report)
                self._on_report()
                await self._deployer.desire(accepted.assignment)
            with contextlib.suppress(OSError):  # it is judged again at the next start then
                await self._worker(self._https.bundle.done, _outcome(accepted, refusal))

    async def _ask(self) -> bool:
        """Ask once; false when nobody answered."""
        nonce = secrets.token_hex(16)
        path = f"/v1/desired?nonce={nonce}"
        try:
            answer = await asyncio.to_thread(self._https.request, "GET", path, max_bytes=DesiredReply.MAX_BYTES)
            reply = wire.decode(DesiredReply, answer)
        except FetchError as error:
            if wants_renewal(error):
                self._on_outdated()
            if error.code is not RejectCode.NOT_FOUND:
                log.info("the desired state cannot be fetched: %s", error.message)
            return error.status != 0
        except wire.WireError as error:
            log.warning("the desired state cannot be read: %s", error)
        else:
            envelope = reply.assignment.encode()
            before = await self._worker(self._store.envelope)
            await self.judge(envelope, statement=reply.fresh.encode(), nonce=nonce)
            if envelope != before and envelope == await self._worker(self._store.envelope):
                self._doubt_broker(envelope)
                await self._note_problems()
        return True

    def _doubt_broker(self, envelope: bytes) -> None:
        """What is signed and current came over HTTPS first: did the broker, which is connected, keep it back?"""
        found = remembered_assignment(envelope)
        if found is None or not self._on_bus() or self._trust.now() - found.issued < BROKER_SLACK:
            return
        text = (
            f"the broker kept assignment {found.version} of {found.issued:%Y-%m-%d %H:%M} UTC from this board: "
            "HTTPS brought it"
        )
        if "broker" not in self.problems:
            log.warning("%s", text)
        self.problems["broker"] = text

    async def heard(self, envelope: bytes) -> None:
        """The broker brought an assignment: whatever becomes of it, it is not silent."""
        self.problems.pop("broker", None)
        await self.judge(envelope)

    async def judge(self, envelope: bytes, *, statement: bytes = b"", nonce: str = "") -> None:
        """Judge an assignment, persist it, and have it carried out; a refusal is reported once.

        A freshness statement for `nonce` may have come along with it.
        """
        async with self._judging:
            now = asyncio.get_running_loop().time()
            if envelope == self._judged[0] and now - self._judged[1] < SAME_S:
                return  # the same by another way
            accepted = await self._accept(envelope)
            await self._hold()
            if accepted is not None and await self._may_act(accepted, statement, nonce):
                log.info("assignment %d accepted", accepted.assignment.version)
                self._judged = (envelope, now)
                await self._deployer.desire(accepted.assignment)
            await self._note_problems()

    async def _accept(self, envelope: bytes) -> Accepted | None:
        try:
            accepted = await self._worker(self._trust.accept, envelope)
        except Rejected as error:
            await self._refused(envelope, error)
            return None
        except StoreError as error:
            # What cannot be remembered is not accepted: what runs goes on, and it is asked for again.
            self.problems["assignment"] = str(error)
            log.error("%s", error)  # noqa: TRY400 - said in the message
            self.refresh_later(random.uniform(*RETRY_S))  # noqa: S311
            return None
        self.problems.pop("assignment", None)
        return accepted

    async def _may_act(self, accepted: Accepted, statement: bytes, nonce: str) -> bool:
        """Whether an accepted assignment is acted on now: somebody must vouch for it where no clock is set."""
        version = accepted.assignment.version
        if statement and await self._is_fresh(statement, nonce, accepted.sha256):
            return True
        if self._clock_set() or await self._vouch():
            return True
        text = f"assignment {version}: nobody vouched that it is current, and this board's clock is not set"
        self.problems["fresh"] = text
        log.warning("%s", text)
        if self._strict:
            self.refresh_later(random.uniform(*RETRY_S))  # noqa: S311
        return not self._strict

    async def _hold(self) -> None:
        """Hold what runs against what is known by now; nothing waits for a new assignment to be stopped."""
        try:
            await self._deployer.hold(await self._worker(self._doubts))
        except StoreError as error:
            log.error("what runs cannot be held against revocations: %s", error)  # noqa: TRY400 - said in the message

    async def _note_problems(self) -> None:
        """What keeps this board from its newest assignment, for `fleet-agent why`."""
        with contextlib.suppress(StoreError):
            await self._worker(self._store.set_problems, list(self.problems.values()))

    async def _vouch(self) -> bool:
        """Have the director say, for a new nonce, that the accepted assignment is the current one."""
        self._vouched = asyncio.get_running_loop().create_future()
        try:
            if not self._ask_fresh(self.new_nonce()):
                return False
            async with asyncio.timeout(FRESH_S):
                await self._vouched
        except TimeoutError:
            return False
        finally:
            self._vouched = None
        self.problems.pop("fresh", None)
        return True

    async def fresh(self, envelope: bytes) -> None:
        """The director's answer to a nonce."""
        facts = await self._worker(self._store.facts)
        if facts.assignment is None or not await self._is_fresh(envelope, self._nonce, facts.assignment.sha256):
            return
        if self._vouched is not None and not self._vouched.done():
            self._vouched.set_result(None)

    async def _is_fresh(self, envelope: bytes, nonce: str, sha256: str) -> bool:
        try:
            await self._worker(self._trust.fresh, envelope, nonce=nonce, sha256=sha256)
        except Rejected as error:
            # An answer to an older nonce of this board's own is nothing unusual.
            log.log(logging.DEBUG if error.code is RejectCode.REPLAY else logging.INFO, "not fresh: %s", error)
            if error.code is RejectCode.FREEZE:
                # Either a newer one is on its way, or somebody keeps it from this board: asking over HTTPS tells.
                self.problems["fresh"] = f"this board may be kept from its newest assignment: {error.message}"
                self.refresh_later(random.uniform(1, 3))  # noqa: S311
            return False
        self.problems.pop("fresh", None)
        return True

    async def _meant(self, claimed: Assignment | None, code: RejectCode) -> int:
        """The version that was refused; of what the director did not sign, nobody's word counts."""
        if claimed is None or code in _NOT_THE_DIRECTORS:
            return await self._worker(self._store.counter, "accepted")
        return claimed.version

    async def _refused(self, envelope: bytes, error: Rejected) -> None:
        if error.code in {RejectCode.UNREACHABLE, RejectCode.TOO_SLOW}:
            log.warning("the assignment cannot be judged now: %s", error.message)
            self.problems["assignment"] = f"the fleet's metadata cannot be fetched: {error.message}"
            self.refresh_later(random.uniform(*RETRY_S))  # noqa: S311
            return
        self.problems["assignment"] = (
            f"nothing is updated until it is renewed, and what runs goes on: {error.message}"
            if error.code is RejectCode.EXPIRED
            else f"an assignment was refused ({error.code}): {error.message}"
        )
        key = (hashlib.sha256(envelope).hexdigest(), error.code.value)
        if key in self._refusals or len(self._refusals) >= REFUSALS_MAX:
            return
        self._refusals.add(key)
        claimed = remembered_assignment(envelope)
        report = state.about(
            self._board,
            assignment=await self._meant(claimed, error.code),
            phase=Phase.FAILED,
            code=error.code,
            message=error.message,
        )
        report = msgspec.structs.replace(
            report,
            refused=claimed.version if claimed is not None and 0 < claimed.version <= VERSION_MAX else 0,
            refused_sha256=hashlib.sha256(envelope).hexdigest(),
        )
        state.tell(report)
        with contextlib.suppress(StoreError):
            await self._worker(self._store.save, report=report)
        self._on_report()
