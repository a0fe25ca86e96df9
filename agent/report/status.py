"""Status of the device, read from its store without network or running agent: what runs, what changes, and why."""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

import msgspec

from agent.config import Paths
from agent.host.ipc import host_api
from agent.identity.identity import Identity, IdentityError, damaged_files
from agent.update.problems import NOT_STARTED
from agent.update.restore import RunsetError, read_runset
from agent.update.state import Violation
from agent.update.store import (
    BESIDE_BYTES,
    DamagedStoreError,
    Store,
    StoreError,
    holds_something,
    lost_and_not_replaced,
)
from fleet.component.toml_fields import format_size
from fleet.protocol import files
from fleet.protocol.codes import InstanceState, Phase, RejectCode, remediation
from fleet.protocol.files import is_full, is_read_only
from fleet.protocol.messages import InstanceHealth, Report
from signing.state import VerifierState

TIMELINE_ROWS: Final = 20
DOWN: Final = "{} does not run: "
"""Beginning of the problem of a committed instance, by its name, that the host does not run; the reason follows."""
_HOST_S: Final = 5.0
_PAGES_MAX: Final = 1000
_FULL: Final = "{} is on a full file system: nothing can be updated until there is space"


class Running(msgspec.Struct, frozen=True, kw_only=True):
    """Committed instance."""

    instance: str
    target: str
    generation: int
    since: datetime
    assignment: int


class Changing(msgspec.Struct, frozen=True, kw_only=True):
    """Change in progress; `target` is empty for a removal."""

    instance: str
    target: str
    phase: str
    code: str = ""
    message: str = ""


class Failed(msgspec.Struct, frozen=True, kw_only=True):
    """Remembered failure of a change."""

    instance: str
    target: str
    code: RejectCode
    message: str
    at: datetime
    retry_at: datetime | None
    action: str = ""


class StatusReport(msgspec.Struct, frozen=True, kw_only=True):
    """Status of the device, as `status` and `why` print it, also with `--json`."""

    device: str
    fleet: str
    group: str
    accepted: int
    deployed: int
    committed: int
    unsent_reports: int
    running: tuple[Running, ...]
    changing: tuple[Changing, ...]
    failed: tuple[Failed, ...]
    doubts: tuple[Violation, ...] = ()
    problems: tuple[str, ...] = ()
    timeline: tuple[Report, ...] = ()


def unknown(problem: str) -> StatusReport:
    """Return the status of a device of which none can be read: before its enrolment, or with a damaged store."""
    return StatusReport(
        device="",
        fleet="",
        group="",
        accepted=0,
        deployed=0,
        committed=0,
        unsent_reports=0,
        running=(),
        changing=(),
        failed=(),
        problems=(problem,),
    )


def read_device(
    places: Paths,
    who: Identity,
    instance: str = "",
    *,
    rows: int = TIMELINE_ROWS,
    warn: Callable[[str], None] = lambda _fault: None,
) -> StatusReport:
    """Read the status from the device's files, with what the device itself lacks.

    What a damaged database held is read from the run set; `warn` takes how it is damaged.

    Raises:
        StoreError: the database cannot be read for another reason, or the run set neither.
    """
    try:
        store = Store(places.database, read_only=True) if holds_something(places.database) else Store.empty()
        try:
            found = read_status(who, store, instance, rows=rows)
        finally:
            store.close()
        more = found.problems
    except DamagedStoreError as error:
        try:
            found, more = _read_run_set(places, who, instance), (_store_fault(places),)
        except (OSError, RunsetError):
            raise error from None
        warn(str(error))
    except StoreError as error:
        if is_full(places.state, BESIDE_BYTES):
            raise StoreError(f"{error}; {_FULL.format(places.state)}") from error
        raise
    down = _down(places.host_socket, [each.instance for each in found.running], more) if found.running else []
    return msgspec.structs.replace(found, problems=(*_problems(places), *down, *more))


def _down(host_socket: Path, instances: Iterable[str], known: Iterable[str]) -> list[str]:
    """Ask the host, and return a sentence on each committed instance that does not run; none where it cannot be asked.

    Args:
        host_socket: of the host.
        instances: that are committed.
        known: problems that the agent has recorded; an instance with one of them needs no other.
    """
    states: dict[str, InstanceHealth] = {}
    try:
        with contextlib.closing(host_api.new_socket()) as sock:
            sock.settimeout(_HOST_S)
            sock.connect(str(host_socket))
            for number in range(1, _PAGES_MAX):
                host_api.send(sock, host_api.Status(id=number, after=max(states, default="")))
                answer = host_api.receive_from_host(sock)
                while getattr(answer, "id", None) != number:  # an event
                    answer = host_api.receive_from_host(sock)
                if not isinstance(answer, host_api.HostStats):
                    return []
                states |= {each.instance: each for each in answer.instances}
                if not answer.more:
                    break
    except (FileNotFoundError, ConnectionRefusedError):
        return ["the host does not run, so no instance answers"]
    except (OSError, host_api.IpcError, host_api.UnreadableError):
        return []
    noted = tuple(known)
    return [
        DOWN.format(name) + _why_down(states.get(name))
        for name in instances
        if (name not in states or states[name].state is not InstanceState.RUNNING)
        and not any(each.startswith(NOT_STARTED.format(name)) for each in noted)
    ]


def _why_down(health: InstanceHealth | None) -> str:
    if health is None or health.state is InstanceState.STOPPED:
        return "the host was not asked to start it, or has stopped it"
    if health.state is InstanceState.QUARANTINED:
        return f"it crashed again and again, and the host gave up restarting it: {health.error}"
    return f"the host restarts it after a pause: {health.error}"


def _store_fault(places: Paths) -> str:
    return lost_and_not_replaced(places.database) or (
        f"{places.database} is damaged: the agent makes a new one from runset.json when it starts; instances go on"
    )


def store_fault(places: Paths) -> str:
    """Return a sentence on a database that is damaged; empty for one that can be read, and for none."""
    if not holds_something(places.database):
        return ""
    try:
        with contextlib.closing(Store(places.database, read_only=True)) as store:
            store.checked("")
    except DamagedStoreError:
        return _store_fault(places)
    except StoreError as error:
        return str(error)
    return ""


def _read_run_set(places: Paths, who: Identity, instance: str) -> StatusReport:
    """Read the status of a device whose database is damaged, as far as the second record of what runs goes.

    Raises:
        OSError, RunsetError: it cannot be read either.
    """
    items = read_runset(places.runset, files.read(places.identity / "mac.key"))
    with contextlib.closing(Store.lost(places.database, "damaged")) as store:
        store.fill(items, VerifierState(), sequence=0)
        return read_status(who, store, instance)


def _problems(places: Paths) -> list[str]:
    """Return sentences on what this device itself lacks, whatever the agent has recorded."""
    problems = []
    if reason := host_api.why_not(places.runtime):
        problems.append(f"the host did not start: {reason}")
    if is_read_only(places.state):
        problems.append(f"{places.state} is on a read-only file system: nothing can be updated until it is writable")
    elif is_full(places.state, BESIDE_BYTES):
        problems.append(_FULL.format(places.state))
    if places.runset.exists() and not holds_something(places.database):
        problems.append(f"{places.database} is lost: the agent makes a new one from runset.json when it starts")
    try:
        problems += damaged_files(places.identity)
    except IdentityError as error:
        problems.append(str(error))
    return problems


def read_status(identity: Identity, store: Store, instance: str = "", *, rows: int = TIMELINE_ROWS) -> StatusReport:
    """Read the device's status with `rows` of its history; with an instance's name, only what concerns it."""

    def about(name: str) -> bool:
        return instance in {"", name}

    return StatusReport(
        device=identity.device,
        fleet=identity.fleet,
        group=identity.group,
        accepted=store.counter("accepted"),
        deployed=store.counter("deployed"),
        committed=store.counter("committed"),
        unsent_reports=len(store.unacked(1000)),
        running=tuple(
            Running(
                instance=each.item.instance,
                target=each.item.target,
                generation=each.generation,
                since=each.at,
                assignment=each.assignment,
            )
            for each in store.committed()
            if about(each.item.instance)
        ),
        changing=tuple(
            Changing(
                instance=each.instance,
                target=each.item.target if each.item is not None else "",
                phase=each.phase.value,
                code=each.state.code,
                message=each.state.message,
            )
            for each in store.changes()
            if about(each.instance)
        ),
        failed=tuple(
            Failed(
                instance=each.instance,
                target=each.target,
                code=each.code,
                message=each.message,
                at=each.at,
                retry_at=None if each.retry_at is None else datetime.fromtimestamp(each.retry_at, UTC),
                action=remediation(each.code),
            )
            for each in store.failed()
            if about(each.instance)
        ),
        doubts=tuple(each for each in store.doubts() if about(each.instance)),
        problems=store.problems(),
        timeline=tuple(each for each in store.history() if about(each.instance))[-rows:],
    )


def format_status(found: StatusReport) -> Iterable[str]:
    """Format a status as lines for people."""
    return _format_known(found) if found.device else found.problems


def _format_known(found: StatusReport) -> Iterator[str]:
    yield f"{found.device} in the fleet {found.fleet}" + (f", group {found.group}" if found.group else "")
    yield f"  assignment: accepted {found.accepted}, committed {found.committed}"
    if found.unsent_reports:
        yield f"  {found.unsent_reports} reports wait for the server's acknowledgement"
    for problem in found.problems:
        yield f"  {problem}"
    if not found.running:
        yield "  no instance is committed"
    for running in found.running:
        ways = (NOT_STARTED.format(running.instance), DOWN.format(running.instance))
        is_down = any(each.startswith(ways) for each in found.problems)
        what = f"does not run; {running.target} is committed" if is_down else f"runs {running.target}"
        yield f"  {running.instance}: {what} since {_time(running.since)}"
    for doubt in found.doubts:
        yield f"  {doubt.instance}: keeps running, as [policy] on_revoked allows ({doubt.code}): {doubt.message}"
    for change in found.changing:
        what = f"changes to {change.target}" if change.target else "is being removed"
        yield f"  {change.instance}: {what}, {change.phase}" + (f": {change.message}" if change.message else "")
    for failure, times in _newest_failures(found.failed):
        often = f" {times} times, last at {_time(failure.at)}" if times > 1 else ""
        yield f"  {failure.instance}: {failure.target} failed{often} ({failure.code}): {failure.message}"
        if failure.retry_at is not None:
            yield f"      next retry: {_time(failure.retry_at)} or later"
        else:
            yield "      no automatic retry ('fleet retry' tries again)"
        if failure.action:
            yield f"      what to do: {failure.action}"


def _time(at: datetime) -> str:
    return f"{at.astimezone(UTC):%Y-%m-%d %H:%M:%S}Z"


def _newest_failures(failed: Iterable[Failed]) -> list[tuple[Failed, int]]:
    """Return the newest failure of each instance, version and reason, with their number; attempts fail alike."""
    newest: dict[tuple[str, str, str], tuple[Failed, int]] = {}
    for each in sorted(failed, key=lambda each: each.at):
        alike = (each.instance, each.target, each.code.value)
        newest[alike] = (each, 1 + newest[alike][1] if alike in newest else 1)
    return sorted(newest.values(), key=lambda pair: (pair[0].instance, pair[0].at))


def format_timeline(found: StatusReport) -> Iterable[str]:
    """Format the history of changes as lines for people, oldest first."""
    for report in found.timeline:
        line = f"  {_time(report.at)} {report.instance or 'assignment'} {report.phase}"
        if report.phase is Phase.COMMITTED and not report.exercised:
            line += " (too few calls during probation to judge the version)"
        if report.undecided:
            line += f" (undecided: {report.undecided})"
        if report.target:
            line += f" {report.target}"
        if report.code is not None:
            line += f" [{report.code}] {report.message}"
        elif report.phase is Phase.IDLE and report.message:
            line += f" {report.message}"
        yield line
        for text in report.log:
            yield f"      | {text}"


def format_routes(found: host_api.RouteList) -> list[str]:
    """Format what answers where, one line for each route, in the order in which the host looks for them."""
    lines = [f"shared port   http://{found.ingress}" if found.ingress else "shared port   none"]
    if found.tls:
        names = f" for {', '.join(found.names)}" if found.names else ""
        lines.append(f"with TLS      https://{found.tls}{names}")
    rows = [_route_row(each) for each in found.routes]
    widths = [max(len(row[column]) for row in rows) for column in range(2)] if rows else []
    for where, instance, more in rows:
        lines.append(f"{where:<{widths[0]}}  {instance:<{widths[1]}}  {more}")
    return lines if rows else [*lines, "no instance answers on this device"]


def _route_row(route: host_api.RouteView) -> tuple[str, str, str]:
    where = f":{route.port}" if route.port else f"{route.host}{route.path}"
    state = {True: "answers", False: "does not answer at present", None: "no such instance runs behind this port"}
    notes = [state[route.answers]]
    if route.by_name:
        notes.append(f"by its name, also as {route.instance}.ANYTHING")
    elif route.strip and route.path != "/":
        notes.append(f"without {route.path}")
    if route.request_bytes is not None:
        notes.append(f"bodies up to {format_size(route.request_bytes)}")
    if route.head_bytes is not None:
        notes.append(f"heads up to {format_size(route.head_bytes)}")
    return where, route.instance, "; ".join(notes)
