"""`fleet push --dry-run`: what a push would do, without publishing anything.

The component may not be published yet, so the server cannot judge it; what it needs is read from the file, and what
the boards are from their own reports.
"""

from collections.abc import Sequence

import click

from fleet.cli import out
from fleet.cli.base import Exit, Fault, Options
from fleet.cli.home import Operator
from fleet.cli.prepare import Prepared
from fleet.cli.publishing import versioned
from fleet.cli.trust import Trust
from fleet.client import Client
from fleet.protocol import outbound
from fleet.protocol.api import DeviceRow, Excluded, Preflight, RolloutRequest
from fleet.protocol.manifest import Grants, Manifest
from fleet.rollout import waves


def dry_run(who: Operator, client: Client, prepared: Prepared, request: RolloutRequest, options: Options) -> Exit:
    """Print what pushing `prepared` would do; FAILED when no board could run it."""
    trust = Trust(who, client)
    manifest = versioned(prepared, trust)
    devices = client.devices().devices
    boards = _boards(client, devices, request)
    previous = _previous(client, boards, request)
    before = next((release for release in trust.releases if release.name.path == previous), None)
    lacking = _lacking(client, boards, manifest, request.instance)
    excluded = tuple(
        entry for board in boards if (entry := unfit(board, manifest) or lacking.get(board.id)) is not None
    )
    flight = Preflight(
        waves=_waves(request.waves, [board for board in boards if board.id not in {each.device for each in excluded}]),
        excluded=excluded,
        new_grants=new_grants(manifest.grants, None if before is None else before.manifest.grants),
        previous=previous,
        warnings=tuple(f"{board.id} is offline and gets it when it is back" for board in boards if not board.online),
    )
    if options.json:
        out.show_json(flight)
    else:
        _show(prepared, manifest, who, flight)
    return Exit.OK if any(flight.waves) or not boards else Exit.FAILED


def _boards(client: Client, devices: Sequence[DeviceRow], request: RolloutRequest) -> list[DeviceRow]:
    if request.device:
        return [client.device(request.device).row]
    return [row for row in devices if request.group in row.groups]


def _previous(client: Client, boards: Sequence[DeviceRow], request: RolloutRequest) -> str:
    if request.device:
        running = [instance for board in boards for instance in board.instances]
        return next((each.target for each in running if each.instance == request.instance), "")
    for group in client.groups().groups:
        if group.name == request.group:
            return next((each.target for each in group.settled if each.instance == request.instance), "")
    return ""


def unfit(board: DeviceRow, manifest: Manifest) -> Excluded | None:
    """Why a board could not run it, None when it could as far as anyone knows."""
    if board.revoked:
        return Excluded(device=board.id, reason="it is revoked")
    if manifest.arch and board.machine and board.machine not in manifest.arch:
        return Excluded(
            device=board.id, reason=f"it is {board.machine}, the component is for {', '.join(manifest.arch)}"
        )
    if board.versions.host and not board.versions.engine:
        return Excluded(device=board.id, reason="it has no engine")
    return None


def _lacking(client: Client, boards: Sequence[DeviceRow], manifest: Manifest, instance: str) -> dict[str, Excluded]:
    """The boards that have not every secret which the component requires."""
    needed = [name for name, key in manifest.secrets.items() if key.required]
    if not needed:
        return {}
    rows = {row.name: row for row in client.secrets().secrets if row.instance == instance}
    found: dict[str, Excluded] = {}
    for name in needed:
        have = {each.device for each in rows[name].boards} if name in rows else set()
        for board in boards:
            if board.id not in have:
                remedy = f"fleet secret set {name} --device {board.id} --instance {instance}"
                found[board.id] = Excluded(device=board.id, reason=f"it lacks the secret {name}: {remedy}")
    return found


def new_grants(wanted: Grants, before: Grants | None) -> tuple[str, ...]:
    """What this version may reach and the one before may not."""
    known = before or Grants()
    return (
        *(f"interface {name}" for name in wanted.interfaces if not known.allows(name)),
        *(
            f"outbound {outbound.describe(each)}"
            for each in wanted.outbound
            if not outbound.covered(each, known.outbound)
        ),
        *(f"instance {name}" for name in wanted.instances if name not in known.instances),
    )


def _waves(text: str, boards: Sequence[DeviceRow]) -> tuple[tuple[str, ...], ...]:
    try:
        parsed = waves.parse(text)
    except waves.BadWavesError as error:
        raise Fault(str(error)) from None
    order = waves.order({board.id: board.online for board in boards})
    reached = waves.sizes(parsed, len(order))
    return tuple(order[start:end] for start, end in zip((0, *reached), reached, strict=False))


def _show(prepared: Prepared, manifest: Manifest, who: Operator, flight: Preflight) -> None:
    shape = prepared.component
    kind = type(manifest.trigger).__name__.lower()
    now = f"in place of {out.target(flight.previous)}" if flight.previous else "where nothing runs under that name yet"
    rows = [
        ("component", f"{prepared.file.name}, {out.size(shape.size_bytes)}, called by {kind} ({manifest.world})"),
        ("imports", ", ".join(shape.imports) or "nothing"),
        ("manifest", str(prepared.manifest_file or "none: inferred, no grants")),
        ("would be", f"{who.namespace}/{manifest.name}@{manifest.version}, {now}"),
    ]
    rows += [("new grant", grant) for grant in flight.new_grants]
    rows += [(f"wave {number}", ", ".join(wave) or "nobody") for number, wave in enumerate(flight.waves, 1)]
    rows += [("excluded", f"{each.device}: {each.reason}") for each in flight.excluded]
    rows += [("note", warning) for warning in flight.warnings]
    out.facts(rows)
    click.echo("Nothing was changed.")
