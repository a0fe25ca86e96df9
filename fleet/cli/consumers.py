"""`fleet consumers`: systems of the operator that read components' messages from the broker."""

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final

import click

from fleet.cli import base, operator, output
from fleet.cli.base import Exit, Fault, Group, Options, command, reason
from fleet.cli.operator import load_operator
from fleet.protocol import files, message_topics
from fleet.protocol.trust_api import ConsumerRequest, Consumers, ConsumerView

_SOON: Final = timedelta(days=30)


@click.group("consumers", cls=Group, short_help="Let systems of yours read components' messages from the broker")
def consumers() -> None:
    """Let systems of yours read components' messages from the broker, over MQTT with TLS.

    Each has a certificate of its own, reads the topics that it is granted of one group, and writes none. A program that
    asks over HTTPS instead needs no certificate: GET /v1/messages.
    """


@command("list", examples="fleet consumers list\nfleet consumers list --json")
@base.table_options
def list_(options: Options) -> None:
    """List the consumers, what they may read, and when their certificates end."""
    with load_operator(options).client() as client:
        found = client.consumers()
    if options.json:
        output.show_json(found)
        return
    rows = [(each.name, each.group, ", ".join(each.topics), _ends(each)) for each in found.consumers]
    output.table(("CONSUMER", "GROUP", "TOPICS", "ENDS"), rows, empty="none")


@command(
    "add",
    examples="fleet consumers add historian --group edge-eu --topic 'plant/#' -o historian\n"
    "fleet consumers add alarms --group edge-eu --topic 'alarms/+' --topic 'plant/+/temperature' -o alarms",
)
@click.argument("name")
@click.option(
    "--group", required=True, shell_complete=operator.groups, metavar="NAME", help="Of the devices of this group"
)
@click.option(
    "--topic",
    "filters",
    multiple=True,
    required=True,
    metavar="FILTER",
    help="On topics that fit: + is one level, # at the end all below; several times for several",
)
@click.option(
    "-o",
    "--output",
    "directory",
    required=True,
    type=click.Path(path_type=Path, file_okay=False),
    metavar="DIR",
    help="Write key.pem, certificate.pem and ca.pem into this new directory",
)
def add(options: Options, *, name: str, group: str, filters: tuple[str, ...], directory: Path) -> None:
    """Let the consumer NAME read messages, and write its key and certificate.

    The key is made here and stays here. The certificate ends after a year: revoke the consumer and add it again.
    """
    for each in filters:
        try:
            message_topics.check_filter(each)
        except message_topics.BadMessageTopicError as error:
            raise Fault(f"--topic {each!r} is no filter", str(error)) from error
    if directory.exists():
        raise Fault(f"{directory} exists", "a key is never overwritten", "choose another -o")
    key, request = _request(name)
    with load_operator(options).client() as client:
        reply = client.add_consumer(ConsumerRequest(name=name, group=group, topics=filters, request=request))
    try:
        directory.mkdir(mode=0o700, parents=True)
        files.create_exclusive(directory / "key.pem", key, mode=0o600)
        files.create_exclusive(directory / "certificate.pem", reply.certificate, mode=0o644)
        files.create_exclusive(directory / "ca.pem", reply.ca, mode=0o644)
    except OSError as error:
        again = f"fleet consumers revoke {name}, and add it again"
        raise Fault(f"cannot write {directory}", reason(error), again) from None
    if options.json:
        output.show_json(
            {
                "name": reply.name,
                "group": reply.group,
                "directory": str(directory),
                "user": reply.user,
                "brokers": reply.brokers,
                "subscriptions": reply.subscriptions,
                "ends": reply.ends,
            }
        )
        return
    output.say(options, f"{name} reads at {', '.join(reply.brokers)} with the files in {directory},")
    output.say(options, f"until {reply.ends:%Y-%m-%d}, and subscribes to:\n")
    for each in reply.subscriptions:
        click.echo(each)


@command("revoke", examples="fleet consumers revoke historian")
@click.argument("name")
def revoke(options: Options, *, name: str) -> None:
    """Revoke the consumer NAME: its connection ends, and it reads nothing any more."""
    with load_operator(options).client() as client:
        _check_known(name, client.consumers())
        left = client.revoke_consumer(name)
    output.result(options, left, f"{name} is revoked, and reads nothing any more.")


def _request(name: str) -> tuple[str, str]:
    """Make a key, and a request for its certificate, both PEM."""
    from cryptography import x509  # noqa: PLC0415 - keeps the start fast
    from cryptography.hazmat.primitives import hashes, serialization  # noqa: PLC0415
    from cryptography.hazmat.primitives.asymmetric import ec  # noqa: PLC0415

    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
    request = x509.CertificateSigningRequestBuilder().subject_name(subject).sign(key, hashes.SHA256())
    pem = serialization.Encoding.PEM
    private = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    return private.decode(), request.public_bytes(pem).decode()


def _check_known(name: str, found: Consumers) -> None:
    known = [each.name for each in found.consumers]
    if name not in known:
        raise Fault(f"there is no consumer {name!r}", f"there are {', '.join(known) or 'none'}", code=Exit.REFUSED)


def _ends(consumer: ConsumerView) -> str:
    soon = " (soon: revoke it, and add it again)" * (consumer.ends - datetime.now(UTC) < _SOON)
    return f"{consumer.ends:%Y-%m-%d}{soon}"


consumers.add_command(list_)
consumers.add_command(add)
consumers.add_command(revoke)
