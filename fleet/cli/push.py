"""`fleet push`, `publish` and `deploy`; the dry run.

In a dry run the component may not be published yet, so that the server does not know it: requirements are read from the
file, and the devices' properties from their reports.
"""

import contextlib
import difflib
import functools
import hashlib
import secrets
import tempfile
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import click
import msgspec
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn

from fleet.cli import host_check, operator, output
from fleet.cli.base import Exit, Fault, Options, command, config_values, share_worker_option
from fleet.cli.operator import Operator, load_operator, where_option
from fleet.cli.publish import Payload, Prepared, Publication, attach, check_kind, prepare, versioned
from fleet.cli.publish import publish as publish_prepared
from fleet.cli.rollout import amount, finish
from fleet.cli.secret import check_needed
from fleet.cli.trust_store import TrustStore
from fleet.client import Client
from fleet.component import reader, served
from fleet.protocol import bounds, operator_api, outbound
from fleet.protocol.codes import OnBreach
from fleet.protocol.files import create_exclusive
from fleet.protocol.manifest import Grants, Manifest, trigger_name
from fleet.protocol.names import BadNameError, TargetName, check_label
from fleet.protocol.operator_api import DeviceRow, Excluded, GroupPlan, Preflight, RolloutRequest
from fleet.rollout import members
from fleet.rollout.group_plan import stages_of

_EMPTY_GROUP: Final = "the group has no devices; --allow-empty settles it for devices that come later"
_EMPTY_WHERE: Final = "--where takes none of its devices; --allow-empty settles it for devices that come later"
_PROGRESS_FROM_BYTES: Final = 256 * 1024

_FILE: Final = click.argument("file", type=click.Path(path_type=Path))
_MANIFEST: Final = click.option(
    "--manifest",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Read this component.toml  [the one beside FILE, else inferred]",
)
_VERSION: Final = click.option(
    "--version", default="", metavar="VERSION", help="Publish under this version  [the manifest's]"
)
_SBOM: Final = click.option(
    "--sbom",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Bind this bill of materials: CycloneDX or SPDX, as JSON",
)
_PROVENANCE: Final = click.option(
    "--provenance",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Bind this build provenance: SLSA v1, as JSON",
)
_NAME: Final = click.option("--name", default="", metavar="NAME", help="Publish under this name  [the manifest's]")


def _moment(_ctx: click.Context, _param: click.Parameter, text: str | None) -> datetime | None:
    """Read a time in ISO 8601, in UTC unless it names a zone. Raises `click.BadParameter`."""
    if text is None:
        return None
    try:
        at = datetime.fromisoformat(text)
        return (at if at.tzinfo is not None else at.replace(tzinfo=UTC)).astimezone(UTC)
    except (ValueError, OverflowError):
        raise click.BadParameter(f"{text!r} is not a time: write 2026-12-01T02:00, in UTC.") from None


_AS: Final = click.option(
    "--as",
    "instance",
    default="",
    metavar="NAME",
    help="Name of the instance on the devices  [the component's name]",
)
_CONFIG: Final = click.option(
    "--config", multiple=True, metavar="KEY=VALUE", help="Set a configuration value; repeatable"
)
_PORT: Final = click.option(
    "--port",
    metavar="PORT",
    type=click.IntRange(0, 65535),
    help="Give the instance a port of its own; 0 for the shared one",
)

_DEPLOY: Final = (
    click.option("--group", default="", shell_complete=operator.groups, metavar="NAME", help="Offer it to this group"),
    click.option(
        "--device",
        default="",
        shell_complete=operator.devices,
        metavar="ID",
        help="Pin it to this one device, until 'fleet unpin'",
    ),
    where_option("Of the group, only these devices, as they are when the rollout begins: 'site in (berlin, paris)'"),
    _AS,
    click.option(
        "--waves",
        default="",
        metavar="SIZES",
        help="Size of each wave, as a number or share of the devices  [by the size of the group: '1, 10%, 100%']",
    ),
    click.option(
        "--soak",
        type=click.IntRange(0, bounds.WAIT_MAX_S),
        metavar="SECONDS",
        help="Seconds from the success that meets a wave's gate to the next wave  [0, or as the group's plan says]",
    ),
    click.option(
        "--min-success",
        default="",
        metavar="N|P%",
        help="Devices of each wave that must succeed before the next  [10%, at least 1]",
    ),
    click.option(
        "--failures",
        default="",
        metavar="N|P%",
        help="Devices of each wave that may fail  [0 in wave 1, then 1%]",
    ),
    click.option(
        "--max-lost",
        default="",
        metavar="N|P%",
        help="Devices of each wave that may be lost, silent in their swap, before it pauses  [0 in wave 1, then 5%]",
    ),
    click.option(
        "--on-breach",
        type=click.Choice([str(each) for each in OnBreach]),
        help="When more devices fail: take every device back, or pause  [rollback, or as the group's plan says]",
    ),
    click.option(
        "--at-once",
        type=click.IntRange(0, bounds.NUMBER_MAX),
        metavar="N",
        help="Devices in progress at any time  [no limit]",
    ),
    click.option(
        "--catch-up",
        default="",
        metavar="N|P%",
        help="Devices in progress at any time of those that come after the rollout succeeded  [5%, at least 1]",
    ),
    click.option(
        "--timeout",
        type=click.IntRange(10, bounds.WAIT_MAX_S),
        metavar="SECONDS",
        help="Seconds without progress after which an online device is passed over as stuck  [900]",
    ),
    click.option(
        "--seed",
        type=click.IntRange(0, bounds.NUMBER_MAX),
        metavar="N",
        help="Draw the canaries by this seed  [a new one]",
    ),
    click.option(
        "--at",
        "starts_at",
        callback=_moment,
        metavar="TIME",
        help="Begin at this time (UTC), such as 2026-12-01T02:00",
    ),
    click.option(
        "--supersede", is_flag=True, help="Take the place of an open rollout although the configuration changes"
    ),
    click.option("--allow-empty", is_flag=True, help="Succeed even where the change concerns no device"),
    _CONFIG,
    _PORT,
    share_worker_option,
    click.option("--note", default="", metavar="TEXT", help="Record this line in the history"),
    click.option("--detach", is_flag=True, help="Return at once instead of following the rollout"),
    click.option(
        "--wait",
        type=click.Choice(["decided", "all"]),
        default="decided",
        show_default=True,
        help="Follow until the rollout is decided, or until each device has an outcome, those that catch up too",
    ),
)


def deploy_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options that say where and how to deploy."""
    for option in reversed(_DEPLOY):
        function = option(function)
    return function


def offer_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options that say where and how to deploy what is no instance: a data package."""

    @functools.wraps(function)
    def offered(*args: Any, **given: Any) -> Any:
        return function(*args, instance="", config=(), port=None, share_worker=None, **given)

    wrapped: Callable[..., Any] = offered
    for option in reversed(_DEPLOY):
        if option not in (_AS, _CONFIG, _PORT, share_worker_option):
            wrapped = option(wrapped)
    return wrapped


@command(
    "push",
    examples="fleet push hello.wasm --group edge-eu\n"
    "fleet push hello.wasm --group edge-eu --waves '1, 10%, 100%' --soak 300\n"
    "fleet push hello.wasm --device gate-7-1f2e3d4c --config level=debug\n"
    "fleet push hello.wasm --group edge-eu --dry-run",
)
@_FILE
@deploy_options
@_MANIFEST
@_NAME
@_VERSION
@_SBOM
@_PROVENANCE
@click.option(
    "--dry-run", "dry", is_flag=True, help="Change nothing: show what it needs and which devices would get it"
)
def push(
    options: Options,
    *,
    file: Path,
    manifest: Path | None,
    name: str,
    version: str,
    sbom: Path | None,
    provenance: Path | None,
    dry: bool,
    **how: Any,
) -> Exit:
    """Publish the component FILE and deploy it, in one go.

    Sign it with this namespace's key, upload it, offer it to the devices in waves, and follow until the outcome is
    known, which the exit code reports. Ctrl-C stops following, not the rollout. What is not given is as the plan of the
    group says ('fleet group policy').
    """
    check_where(how)
    prepared = prepare(file, manifest_file=manifest, name=name, version=version)
    prepared = attach(prepared, sbom=sbom, provenance=provenance)
    _check_config(prepared.manifest, config_values(how["config"]))
    who = load_operator(options)
    with who.client() as client:
        check_there(client, how["group"], how["device"])
        if not dry:
            _check_secrets(client, prepared.manifest, how)
        if dry:
            return dry_run(who, client, prepared, rollout_request(prepared.manifest.name, "", how), options)
        published = publish_with_bar(who, client, prepared, options)
        if waits := served.serial(prepared.manifest):
            output.say(options, f"Note: {waits}.")
        return follow(client, published.target, how, options)


@command(
    "publish",
    examples="fleet publish hello.wasm\n"
    "fleet publish hello.wasm --version 1.4.0 --json\n"
    "fleet publish hello.wasm --sbom hello.cdx.json --provenance hello.intoto.json",
)
@_FILE
@_MANIFEST
@_NAME
@_VERSION
@_SBOM
@_PROVENANCE
def publish(
    options: Options,
    *,
    file: Path,
    manifest: Path | None,
    name: str,
    version: str,
    sbom: Path | None,
    provenance: Path | None,
) -> None:
    """Sign the component FILE and upload it.

    Nothing runs before it is deployed: the bytes tested on one group go to the next with the same signature. A version
    never changes once it is published.
    """
    prepared = prepare(file, manifest_file=manifest, name=name, version=version)
    prepared = attach(prepared, sbom=sbom, provenance=provenance)
    who = load_operator(options)
    with who.client() as client:
        published = publish_with_bar(who, client, prepared, options)
    show_published(options, published, evidence=list(published.release.evidence))


def show_published(options: Options, published: Publication, **more: object) -> None:
    """Print what was published, and how it is deployed; `more` goes into the JSON beside it."""
    release = published.release
    if options.json:
        output.show_json(
            {
                "target": release.name.path,
                "length": release.length,
                "sha256": release.sha256,
                "manifest_sha256": release.manifest_sha256,
                **more,
                "new": published.new,
            }
        )
    elif options.quiet:
        click.echo(str(release.name))
    else:
        click.echo(f"Deploy it with 'fleet deploy {release.name.name}@{release.name.version} --group GROUP'.")


@command(
    "deploy",
    examples="fleet deploy hello@1.4.0 --group edge-eu\n"
    "fleet deploy acme/hello@1.4.0 --group edge-eu --as hello-blue\n"
    "fleet deploy front@2.0.0 back@2.0.0 --group edge-eu --atomic\n"
    "fleet deploy hello@1.4.0 --group edge-eu --where 'site in (berlin, paris)' --dry-run",
)
@click.argument("targets", metavar="NAME@VERSION...", nargs=-1, required=True)
@deploy_options
@click.option("--atomic", is_flag=True, help="Swap several components as one: each device swaps all of them, or none")
@click.option(
    "--dry-run", "dry", is_flag=True, help="Change nothing: show which devices would get it, and could run it"
)
def deploy(options: Options, *, targets: tuple[str, ...], atomic: bool, dry: bool, **how: Any) -> Exit:
    """Offer a published component to a group or a device, and follow until the outcome is known.

    With --atomic, several components: every device swaps all of them as one, watches them as one, and rolls all back
    when one of them does worse than before.
    """
    check_where(how)
    _check_set(targets, how, atomic=atomic)
    who = load_operator(options)
    first, *others = (who.target(target) for target in targets)
    also = {name.name: name.path for name in others}
    if len({first.name, *also}) < len(targets):
        raise click.UsageError("Name each component of a set once.")
    with who.client() as client:
        if dry:
            request = msgspec.structs.replace(rollout_request(first.name, first.path, how), also=also)
            return _foresee(who, client, [first, *others], request, options)
        return follow(client, first, how, options, also=also)


def _foresee(
    who: Operator, client: Client, targets: Sequence[TargetName], request: RolloutRequest, options: Options
) -> Exit:
    """Print what a rollout of published components would do.

    Returns:
        NOTHING_AFFECTED where the server would refuse it; FAILED where no device could run one of them.
    """
    seed = secrets.randbelow(1 << 31) if request.seed is None else request.seed
    waves = "" if request.device else request.waves
    preflight = client.preflight(msgspec.structs.replace(request, seed=seed, waves=waves))
    refused = not any(preflight.waves)
    if not refused:
        drawn = f"the waves are drawn: --seed {seed} draws these"
        preflight = msgspec.structs.replace(preflight, warnings=(*preflight.warnings, drawn))
        preflight = _checked(who, client, targets, preflight)
    if options.json:
        output.show_json(preflight)
    else:
        shown = ", ".join(map(str, targets))
        before = f"in place of {output.target(preflight.previous)}" if preflight.previous else "as a new instance"
        output.facts([("would be", f"{shown}, {before}"), *_check_lines(preflight), *_effect(preflight)])
        click.echo("Nothing was changed.")
    if refused:
        return Exit.NOTHING_AFFECTED
    return Exit.FAILED if preflight.problems else Exit.OK


def _checked(who: Operator, client: Client, targets: Sequence[TargetName], preflight: Preflight) -> Preflight:
    """Add to what the server foresees what this machine's host, or the table, says of the published components."""
    rows = {row.id: row for row in client.devices().devices}
    offered = [rows[device] for wave in preflight.waves for device in wave if device in rows]
    checked_by, problems, warnings = "", [*preflight.problems], [*preflight.warnings]
    for target in targets:
        release = TrustStore(who, client).release(target.path)
        if release is not None and release.manifest.is_data:
            found = [host_check.unfit(row, None, release.manifest) for row in offered]
            warnings += [f"{each.device} could not keep {target}: {each.reason}" for each in found if each is not None]
            continue
        with _published(who, client, target) as prepared:
            if isinstance(prepared, str):
                warnings.append(f"{target} was not checked: {prepared}")
                continue
            seen = host_check.judge(prepared.file, prepared.component, prepared.manifest)
            seen = host_check.on_devices(seen, offered)
        checked_by = seen.checked_by
        problems += [f"{target}: {problem}" for problem in seen.problems]
        warnings += [f"{each.device} could not run {target}: {each.reason}" for each in seen.excluded]
        warnings += [note for note in seen.notes if note not in warnings]
    return msgspec.structs.replace(preflight, checked_by=checked_by, problems=tuple(problems), warnings=tuple(warnings))


@contextlib.contextmanager
def _published(who: Operator, client: Client, target: TargetName) -> Iterator[Prepared | str]:
    """Fetch a published component into a file, for a check; a sentence where that cannot be. Raises `Fault`."""
    release = TrustStore(who, client).release(target.path)
    if release is None:
        yield "this machine does not find it published"
        return
    data = client.artifact(release.sha256)
    if hashlib.sha256(data).hexdigest() != release.sha256:
        raise Fault(f"the server's {target} is not what its publisher signed", code=Exit.REFUSED)
    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory, f"{target.name}.wasm")
        create_exclusive(file, data, mode=0o600)
        try:
            component = reader.read(data, file_name=file.name)
        except reader.NotAComponentError as error:
            yield str(error)
            return
        yield Prepared(file=file, data=data, component=component, manifest=release.manifest, manifest_file=None)


def _check_set(targets: tuple[str, ...], how: dict[str, Any], *, atomic: bool) -> None:
    """Check the options for several targets. Raises `click.UsageError`."""
    if len(targets) == 1:
        return
    if not atomic:
        raise click.UsageError("Name one component, or add --atomic for several that are swapped as one.")
    if how["instance"] or how["config"] or how["port"] is not None:
        raise click.UsageError("--as, --config and --port are for one component: give them in a deploy of its own.")


def publish_with_bar(who: Operator, client: Client, prepared: Payload, options: Options) -> Publication:
    """Publish, with a bar on a terminal, and say so. Raises as `fleet.cli.publish.publish`."""
    with _upload_bar(prepared, options) as progress:
        done = publish_prepared(who, client, prepared, progress=progress, say=lambda text: click.echo(text, err=True))
    size = output.size(done.release.length)
    if done.new:
        source = "no component.toml, so no grants"
        if isinstance(prepared, Prepared) and prepared.manifest_file:
            source = prepared.manifest_file.name
        sources = [] if prepared.manifest.is_data else [source]
        adapted = [f"adapted with {prepared.adapted}"] if prepared.adapted else []
        said = ", ".join([size, *sources, *adapted, *(each.said for each in prepared.attached)])
        output.say(options, f"Published {done.target} ({said}).")
    else:
        output.say(options, f"{done.target} is published already, with these bytes ({size}).")
    return done


@contextlib.contextmanager
def _upload_bar(prepared: Payload, options: Options) -> Iterator[Callable[[int], None] | None]:
    """Show a bar on a terminal while a larger component is uploaded."""
    if options.quiet or options.json or len(prepared.data) < _PROGRESS_FROM_BYTES or not output.console().is_terminal:
        yield None
        return
    columns = (TextColumn("Uploading"), BarColumn(bar_width=20), DownloadColumn(binary_units=True))
    with Progress(*columns, console=output.console(), transient=True) as progress:
        task = progress.add_task("", total=len(prepared.data))
        yield lambda count: progress.advance(task, count)


def follow(
    client: Client, target: TargetName, how: dict[str, Any], options: Options, *, also: dict[str, str] | None = None
) -> Exit:
    """Deploy a published target, and follow its rollout as the options say."""
    request = msgspec.structs.replace(rollout_request(target.name, target.path, how), also=also or {})
    view = client.pin(request.device, request) if request.device else client.deploy(request)
    return finish(client, view, options, detach=how["detach"], everybody=how["wait"] == "all")


def rollout_request(component: str, target: str, how: dict[str, Any]) -> operator_api.RolloutRequest:
    """Make the request for a rollout from the options of a command."""
    return operator_api.RolloutRequest(
        instance=how["instance"] or component,
        target=target,
        group=how["group"],
        device=how["device"],
        where=how["where"],
        waves="100%" if how["device"] else how["waves"],
        config=config_values(how["config"]),
        port=how["port"],
        share_worker=how["share_worker"],
        soak_s=how["soak"],
        min_success=how["min_success"],
        failures=how["failures"] or None,
        max_lost=how["max_lost"],
        on_breach=None if how["on_breach"] is None else OnBreach(how["on_breach"]),
        at_once=how["at_once"],
        catch_up=how["catch_up"],
        timeout_s=how["timeout"],
        seed=how["seed"],
        starts_at=how["starts_at"],
        allow_empty=how["allow_empty"],
        supersede=how["supersede"],
        note=how["note"],
    )


def check_where(how: dict[str, Any]) -> None:
    """Check the options before anything is published. Raises `Fault`."""
    if bool(how["group"]) == bool(how["device"]):
        raise click.UsageError("Name either --group or --device.")
    if how["where"] and how["device"]:
        raise click.UsageError("--where chooses among the devices of a group: leave it out with --device.")
    if how["detach"] and how["wait"] == "all":
        raise click.UsageError("Give either --detach or --wait all.")
    try:
        if how["instance"]:
            check_label(how["instance"], "instance")
        if how["waves"]:
            members.parse_waves(how["waves"])
    except (BadNameError, members.BadWavesError) as error:
        raise Fault(str(error)) from None
    for option in ("min_success", "failures", "max_lost", "catch_up"):
        if how[option]:
            amount(f"--{option.replace('_', '-')}", how[option])


def check_there(client: Client, group: str, device: str) -> None:
    """Check before publishing that the group or device exists. Raises `Fault` or `ProblemError`."""
    if device:
        client.device(device)
        return
    known = [row.name for row in client.groups().groups]
    if group not in known:
        near = difflib.get_close_matches(group, known, 1)
        raise Fault(
            f"there is no group {group!r}",
            f"did you mean {near[0]}?" if near else f"there are {', '.join(known) or 'none'}",
            "'fleet groups' lists them, 'fleet enroll-token --group' makes one",
            code=Exit.REFUSED,
        )


def _check_secrets(client: Client, manifest: Manifest, how: dict[str, Any]) -> None:
    """Check before publishing that some device there has the required secrets. Raises `Fault`."""
    needed = tuple(name for name, key in manifest.secrets.items() if key.required)
    instance = how["instance"] or manifest.name
    check_needed(client, instance=instance, required=needed, group=how["group"], device=how["device"])


def _check_config(manifest: Manifest, config: dict[str, str] | None) -> None:
    for key, value in (config or {}).items():
        if key not in manifest.config:
            known = ", ".join(manifest.config) or "none"
            raise Fault(
                f"{manifest.name} has no configuration key {key!r}",
                f"its manifest declares {known}",
                f"add [config.{key}] to its component.toml",
            )
        if wrong := manifest.config[key].flaw(value):
            raise Fault(
                f"--config {key}={value[:80]} is not allowed", f"it is {wrong}", manifest.config[key].description
            )


def dry_run(who: Operator, client: Client, prepared: Payload, request: RolloutRequest, options: Options) -> Exit:
    """Print the effect of pushing `prepared`; return FAILED when no device could run it.

    Of what is published already a push is a deploy, and the server knows whether that changes anything.
    """
    trust = TrustStore(who, client)
    manifest = versioned(prepared, trust)
    check_kind(manifest, trust)
    target = TargetName(who.namespace, manifest.name, manifest.version)
    known = next((release for release in trust.releases if release.name == target), None)
    if known is not None and (known.sha256, known.manifest) == (prepared.sha256, manifest):
        return _foresee(who, client, [target], msgspec.structs.replace(request, target=target.path), options)
    component = prepared.component if isinstance(prepared, Prepared) else None
    seen = host_check.Examined(checked_by="what devices report", manifest=manifest)
    if component is not None:
        adapted = bytes(prepared.data) if prepared.adapted else None
        seen = host_check.judge(prepared.file, component, manifest, adapted=adapted)
    devices = _offered_devices(client, request)
    previous = _previous(client, devices, request)
    before = next((release for release in trust.releases if release.name.path == previous), None)
    lacking = _lacking(client, devices, manifest, request.instance)
    found = (host_check.unfit(device, component, manifest) or lacking.get(device.id) for device in devices)
    excluded = tuple(entry for entry in found if entry is not None)
    out = {entry.device for entry in excluded}
    fit = [device for device in devices if device.id not in out]
    seed = secrets.randbelow(1 << 31) if request.seed is None else request.seed
    plan = (client.policy(request.group).plan if request.group else None) or GroupPlan()
    drawn = _draw(_stages(plan, request, len(fit)), seed, fit)
    empty = "" if devices or request.allow_empty else _EMPTY_WHERE if request.where else _EMPTY_GROUP
    refused = drawn.refusal or empty
    wanted = members.approvals((stage.approval for stage in drawn.stages), first=plan.approval)
    preflight = Preflight(
        waves=() if refused else drawn.waves,
        excluded=excluded,
        new_grants=new_grants(manifest.grants, None if before is None else before.manifest.grants),
        previous=previous,
        warnings=(
            *((f"it is refused: {refused}",) if refused else wanted),
            *(f"{device.id} is offline and gets it when it reconnects" for device in devices if not device.online),
            f"the waves are drawn: --seed {seed} draws these",
            *host_check.on_devices(seen, fit).notes,
        ),
        checked_by=seen.checked_by,
        problems=seen.problems,
    )
    if options.json:
        output.show_json(preflight)
    else:
        _show_preflight(prepared, manifest, who, preflight)
    if empty and not seen.problems:
        return Exit.NOTHING_AFFECTED
    return Exit.OK if not seen.problems and (any(preflight.waves) or not devices) else Exit.FAILED


def _offered_devices(client: Client, request: RolloutRequest) -> list[DeviceRow]:
    if request.device:
        return [client.device(request.device).row]
    return [row for row in client.devices(request.where).devices if request.group in row.groups]


def _previous(client: Client, devices: Sequence[DeviceRow], request: RolloutRequest) -> str:
    if request.device:
        running = [instance for device in devices for instance in device.instances]
        return next((each.target for each in running if each.instance == request.instance), "")
    for group in client.groups().groups:
        if group.name == request.group:
            return next((each.target for each in group.settled if each.instance == request.instance), "")
    return ""


def _lacking(client: Client, devices: Sequence[DeviceRow], manifest: Manifest, instance: str) -> dict[str, Excluded]:
    """Find the devices that lack a secret which the component requires."""
    needed = [name for name, key in manifest.secrets.items() if key.required]
    if not needed:
        return {}
    rows = {row.name: row for row in client.secrets().secrets if row.instance == instance}
    found: dict[str, Excluded] = {}
    for name in needed:
        have = {each.device for each in rows[name].devices} if name in rows else set()
        for device in devices:
            if device.id not in have:
                remedy = f"fleet secret set {name} --device {device.id} --instance {instance}"
                found[device.id] = Excluded(device=device.id, reason=f"it lacks the secret {name}: {remedy}")
    return found


def new_grants(wanted: Grants, before: Grants | None) -> tuple[str, ...]:
    """List the grants of this version that the one before does not have."""
    known = before or Grants()
    return (
        *(f"interface {name}" for name in wanted.interfaces if not known.allows(name)),
        *(
            f"outbound {outbound.describe(each)}"
            for each in wanted.outbound
            if not outbound.covered(each, known.outbound)
        ),
        *(f"instance {name}" for name in wanted.instances if name not in known.instances),
        *wanted.messages_beyond(known),
        *wanted.named_beyond(known),
        *wanted.devices.beyond(known.devices),
    )


def _stages(plan: GroupPlan, request: RolloutRequest, devices: int) -> tuple[members.Stage, ...]:
    """Return the stages that the server would draw: as asked, else the plan's, else by the number of devices."""
    if plan.stages and not request.waves:
        return stages_of(plan)
    try:
        return members.parse_waves(request.waves or members.default_waves(devices))
    except members.BadWavesError as error:
        raise Fault(str(error)) from None


def _draw(stages: Sequence[members.Stage], seed: int, devices: Sequence[DeviceRow]) -> members.Draw:
    """Draw the waves as the server would with this seed."""
    candidates = [members.Candidate(row.id, row.online, row.labels) for row in devices]
    return members.draw(candidates, stages, seed=seed)


def _show_preflight(prepared: Payload, manifest: Manifest, who: Operator, preflight: Preflight) -> None:
    new = "as new data" if manifest.is_data else "as a new instance"
    now = f"in place of {output.target(preflight.previous)}" if preflight.previous else new
    rows = [("data", f"{prepared.file.name}, {output.size(len(prepared.data))}")]
    if isinstance(prepared, Prepared):
        shape, kind = prepared.component, ", ".join(dict.fromkeys(map(trigger_name, manifest.triggers)))
        size = output.size(shape.size_bytes)
        rows = [
            ("component", f"{prepared.file.name}, {size}, called by {kind} ({manifest.world})"),
            ("imports", ", ".join(shape.imports) or "nothing"),
            ("manifest", str(prepared.manifest_file or "none: inferred, no grants")),
            *((("adapted with", prepared.adapted),) if prepared.adapted else ()),
        ]
    rows += [
        *_check_lines(preflight),
        ("would be", f"{who.namespace}/{manifest.name}@{manifest.version}, {now}"),
    ]
    output.facts(rows + _effect(preflight))
    click.echo("Nothing was changed.")


def _check_lines(preflight: Preflight) -> list[tuple[str, str]]:
    """Return the lines of a dry run about the component itself."""
    return [("checked by", preflight.checked_by), *(("problem", problem) for problem in preflight.problems)]


def _effect(preflight: Preflight) -> list[tuple[str, str]]:
    """Return the lines of a dry run about grants and devices."""
    rows = [("new grant", grant) for grant in preflight.new_grants]
    rows += [(f"wave {number}", ", ".join(wave) or "nobody") for number, wave in enumerate(preflight.waves, 1)]
    rows += [("excluded", f"{each.device}: {each.reason}") for each in preflight.excluded]
    return rows + [("note", warning) for warning in preflight.warnings]
