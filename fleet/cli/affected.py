"""`fleet affected`: list the devices that run a package, by evidence that publishers signed.

The server knows the targets of each device. The packages of a target are in a bill of materials that its publisher
bound to it, or in the component's own bytes; both are accepted only with the hash in verified metadata. Targets
without either are listed as unknown.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Final

import click

from fleet.cli import base, output
from fleet.cli.base import Exit, Fault, Options, command
from fleet.cli.evidence import Contents, Shelf
from fleet.cli.operator import load_operator
from fleet.cli.trust_store import TrustStore
from fleet.client import Client
from fleet.evidence import query
from fleet.evidence.query import Answer, Query
from fleet.evidence.sbom import DocumentError, Package
from fleet.protocol.codes import OPEN_STATES
from fleet.protocol.operator_api import Devices

RUNS: Final = "runs"
ASSIGNED: Final = "assigned"
PUBLISHED: Final = "published"


@dataclass(frozen=True, slots=True, order=True)
class Use:
    """Target in use. `state` is `runs` (as the device reports), `assigned` (to a group or a device) or `published`."""

    target: str
    where: str = "-"
    instance: str = "-"
    state: str = PUBLISHED
    online: bool = False


@dataclass(frozen=True, slots=True)
class Hit:
    """Use of a target that contains the package; each package with the certainty of the match."""

    use: Use
    packages: tuple[tuple[Package, Answer], ...]


@command(
    "affected",
    examples="fleet affected 'serde<1.0.200'\n"
    "fleet affected 'openssl>=3.0,<3.0.15' --json\n"
    "fleet affected pkg:npm/lodash --published\n"
    "fleet affected 'log4j-core<2.17' --strict || mail -s affected admin",
)
@click.argument("question", metavar="PACKAGE[<VERSION]")
@click.option("--published", is_flag=True, help="Include what is published and in use nowhere")
@click.option("--strict", is_flag=True, help="Exit with 1 also when the packages of something in use are unknown")
@base.WIDE_OPTION
def affected(options: Options, *, question: str, published: bool, strict: bool) -> Exit:
    """List the devices that run a package, by name or package URL, with conditions on its version.

    Packages are read from the SBOM published with each component, else from what its toolchain built into it.
    Components with neither are listed as unknown. Exits with 1 when something in use is affected, or may be.
    """
    try:
        asked = query.parse(question)
    except DocumentError as error:
        raise Fault(str(error)) from None
    who = load_operator(options)
    with who.client() as client:
        trust = TrustStore(who, client, expired=True)
        uses = sorted(set(_uses(client, published=published)))
        shelf = Shelf(client, who.trust / "evidence")
        contents = {path: _contents(trust, shelf, path) for path in dict.fromkeys(use.target for use in uses)}
    hits = list(_hits(asked, uses, contents))
    unknown = [use for use in uses if contents[use.target].packages is None]
    if options.json:
        output.show_json(_as_json(asked, hits, unknown, contents))
    else:
        _tell(options, asked, hits, unknown, contents)
    in_use = any(hit.use.state != PUBLISHED for hit in hits)
    return Exit.FAILED if in_use or (strict and unknown) else Exit.OK


def _uses(client: Client, *, published: bool) -> Iterator[Use]:
    """Yield each target that runs, is assigned, or (with `published`) could be deployed."""
    devices = client.devices()
    yield from _running(devices)
    for group in client.groups().groups:
        yield from (Use(each.target, f"group {group.name}", each.instance, ASSIGNED) for each in group.settled)
    for rollout in client.rollouts().rollouts:
        if rollout.state in OPEN_STATES and rollout.target:
            where = f"group {rollout.group}" if rollout.group else rollout.device
            yield Use(rollout.target, where, rollout.instance, ASSIGNED)
    for row in devices.devices:
        if row.pins and not row.revoked:
            pinned = (each for each in client.device(row.id).effective if each.instance in row.pins and each.target)
            yield from (Use(each.target, row.id, each.instance, ASSIGNED, row.online) for each in pinned)
    if published:
        yield from (Use(each.target) for each in client.components().components)


def _running(devices: Devices) -> Iterator[Use]:
    for row in devices.devices:
        if not row.revoked:
            running = (each for each in row.instances if each.target)
            yield from (Use(each.target, row.id, each.instance, RUNS, row.online) for each in running)


def _contents(trust: TrustStore, shelf: Shelf, path: str) -> Contents:
    release = trust.published(path)
    return Contents(None, "nobody has published it") if release is None else shelf.contents(release)


def _hits(asked: Query, uses: Iterable[Use], contents: dict[str, Contents]) -> Iterator[Hit]:
    found: dict[str, tuple[tuple[Package, Answer], ...]] = {}
    for use in uses:
        if use.target not in found:
            answers = ((each, asked.matches(each)) for each in contents[use.target].packages or ())
            found[use.target] = tuple(each for each in answers if each[1] is not Answer.NO)
        if found[use.target]:
            yield Hit(use, found[use.target])


def _tell(options: Options, asked: Query, hits: list[Hit], unknown: list[Use], contents: dict[str, Contents]) -> None:
    output.table(
        ("WHERE", "INSTANCE", "TARGET", "STATE", "PACKAGE"),
        [_row(hit) for hit in hits],
        empty=f"Nothing in use is known to contain {asked.text}.",
    )
    if unknown and not options.quiet:
        click.echo("\nPackages unknown:\n")
        output.table(
            ("WHERE", "INSTANCE", "TARGET", "STATE", "WHY"),
            [(*_place(use), contents[use.target].source) for use in unknown],
            empty="",
        )
        click.echo("\nPublish the next version with 'fleet publish FILE --sbom SBOM.json'.")


def _row(hit: Hit) -> tuple[str, ...]:
    words = (f"{package}{'' if answer is Answer.YES else '?'}" for package, answer in hit.packages)
    return (*_place(hit.use), ", ".join(words))


def _place(use: Use) -> tuple[str, str, str, str]:
    away = use.state == RUNS and not use.online
    return use.where, use.instance, output.target(use.target), f"{use.state}, offline" if away else use.state


def _as_json(asked: Query, hits: list[Hit], unknown: list[Use], contents: dict[str, Contents]) -> dict[str, object]:
    def place(use: Use) -> dict[str, object]:
        return {
            "where": use.where,
            "instance": use.instance,
            "target": use.target,
            "state": use.state,
            "online": use.online,
            "source": contents[use.target].source,
        }

    def named(package: Package, answer: Answer) -> dict[str, object]:
        return {
            "name": package.name,
            "namespace": package.namespace,
            "type": package.type,
            "version": package.version,
            "certain": answer is Answer.YES,
        }

    return {
        "question": asked.text,
        "devices": sorted({hit.use.where for hit in hits if hit.use.state == RUNS}),
        "targets": sorted({hit.use.target for hit in hits}),
        "affected": [place(hit.use) | {"packages": [named(*each) for each in hit.packages]} for hit in hits],
        "unknown": [place(use) for use in unknown],
    }
