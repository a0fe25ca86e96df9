"""Enrolled devices that send at random what they like, to a real `fleet serve` and its broker.

Afterwards another device's report is still taken, operators are answered, and memory and descriptors are as before.
`make nightly` plays many more rounds (HOSTILE). Each round is another device, since the one before is
suspended by then.
"""

import asyncio
import contextlib
import copy
import os
import random
import socket
import ssl
import sys
from datetime import UTC, datetime
from pathlib import Path

import httpx
import msgspec
import paho.mqtt.client as mqtt
import pytest
from paho.mqtt.enums import CallbackAPIVersion

from fleet.protocol import names, operator_api
from fleet.protocol.codes import InstanceState
from fleet.protocol.messages import Health, Hello, InstanceHealth, LogChunk, RenewRequest, Report, State
from fleet.protocol.topics import Down, Topic, Up
from fleet.server.broker.broker import find
from tests.eventually import eventually_async

ROUNDS = int(os.environ.get("HOSTILE", "6"))
WARM_ROUNDS = 2 + ROUNDS // 4
"""Memory is compared with the time after these: the broker's heap reaches its height with the largest burst."""

MESSAGES, REQUESTS, CONNECTIONS = 400, 25, 25
SEED = 20251130
NOW = datetime(2025, 6, 1, tzinfo=UTC)
SPARE_DESCRIPTORS = 8
TLS_SESSION_KIB = 3
"""OpenSSL keeps the session of each connection to the broker for five minutes, with the client's certificate."""

NASTY = (
    None, True, -1, 0, 2**53 + 1, 2**63, 2**64, 1e308, -1e308, "", "\x00", "\x1b[2J", "\u202e", "x" * 5000, "9" * 400,
    [], {}, [[]] * 50, {"": ""}, "2025-06-01T00:00:00", "9999-12-31T23:59:59Z", "components/main/hello/1.0.0.wasm",
)  # fmt: skip


def sound(device: str) -> list[tuple[Up, msgspec.Struct]]:
    figure = InstanceHealth(instance="hello", target="", generation=1, state=InstanceState.RUNNING, calls={"ok": 1})
    return [
        (Up.HELLO, Hello(device=device, nonce="0" * 16, boot_id="boot")),
        (Up.STATE, State(device=device, online=True)),
        (Up.HEALTH, Health(device=device, boot_id="boot", at=NOW, instances=(figure,))),
        (Up.REPORT, Report(device=device, boot_id="boot", sequence=1, at=NOW, assignment=1, timings_ms={"idle": 1})),
    ]


def mutated(chance: random.Random, message: msgspec.Struct) -> bytes:
    """Change a message: some field, some bytes, its size, or nothing."""
    tree = msgspec.to_builtins(message)
    for _ in range(chance.randint(0, 3)):
        inner = tree
        while isinstance(inner, dict | list) and inner:
            key = chance.choice(list(inner) if isinstance(inner, dict) else range(len(inner)))
            if chance.random() < 0.5 or not isinstance(inner[key], dict | list):
                inner[key] = copy.deepcopy(chance.choice(NASTY))
                break
            inner = inner[key]
    data = bytearray(msgspec.json.encode(tree))
    for _ in range(chance.choice((0, 0, 0, 1, 8))):
        data[chance.randrange(len(data))] = chance.randrange(256)
    match chance.randrange(12):
        case 0:
            return bytes(data[: chance.randrange(len(data))])
        case 1:
            return bytes(data) + b" " * 70_000
        case 2:
            return b"[" * chance.randrange(60_000)
        case _:
            return bytes(data)


def topic_for(chance: random.Random, device: str, channel: Up) -> str:
    own = str(Topic(device, channel))
    match chance.randrange(10):
        case 0:
            return own.replace(names.shard(device), f"{chance.randrange(256):02x}", 1)
        case 1:
            return own + chance.choice(("/x", "/", "x", "\u202e"))
        case 2:
            return str(Topic(device, chance.choice(list(Down))))
        case 3:
            return str(Topic("other-0a0b0c0d", channel))
        case _:
            return own


def send_messages(device, chance: random.Random) -> None:
    client = mqtt.Client(CallbackAPIVersion.VERSION2, client_id=device.id, clean_session=chance.random() < 0.5)
    client.tls_set_context(device.context())
    client.will_set(topic_for(chance, device.id, Up.STATE), b"x" * chance.randrange(9000), retain=True)
    client.max_queued_messages_set(0)
    host, port = address(device)
    client.connect(host, port, 30)
    client.loop_start()
    client.subscribe([(chance.choice(("#", "fleet/v1/#", "$SYS/#", "+/+/+/+/+/+", f"x/{n}")), 1) for n in range(20)])
    sent = None
    for _ in range(MESSAGES):
        channel, message = chance.choice(sound(device.id))
        data, retain = mutated(chance, message), chance.random() < 0.3
        sent = client.publish(topic_for(chance, device.id, channel), data, qos=chance.choice((0, 1)), retain=retain)
    sent = client.publish(str(Topic(device.id, Up.STATE)), b"{}", qos=1)
    with contextlib.suppress(ValueError, RuntimeError):
        sent.wait_for_publish(60)
    if chance.random() < 0.5:
        client.disconnect()
    client.loop_stop()
    if (connection := client.socket()) is not None:
        connection.close()


def address(device) -> tuple[str, int]:
    url = httpx.URL(device.enrolled.mqtt[0])
    return url.host, url.port or 0


def send_bytes(device, chance: random.Random, where: tuple[str, int]) -> None:
    """Speak TLS with the device's certificate, or not even that, and then anything."""
    with contextlib.suppress(OSError, ssl.SSLError), socket.create_connection(where, 20) as plain:
        if chance.random() < 0.3:
            plain.sendall(chance.randbytes(chance.randrange(400)))
            return
        with device.context().wrap_socket(plain, server_hostname=where[0]) as secured:
            begin = chance.choice(
                (b"", b"\x10", b"\x10\xff\xff\xff\x7f", b"POST /v1/logs HTTP/1.1\r\n", b"GET / HTTP/1.1\r\n\r\n")
            )
            secured.sendall(begin + chance.randbytes(chance.randrange(2000)))


def send_requests(device, chance: random.Random) -> None:
    chunk = LogChunk(instance="hello", command=1, lines=("a line",))
    paths = ("/v1/tuf/{}", "/v1/artifacts/{}", "/v1/secrets/{}", "/v1/desired?nonce={}", "/v1/logs", "/v1/renew", "/{}")
    with device.http() as http:
        for _ in range(REQUESTS):
            path = chance.choice(paths).format(
                chance.choice(("x" * 3000, "..%2f..", "%00", "²", "0" * 64, "root.json"))
            )
            body = mutated(chance, chance.choice((chunk, RenewRequest(csr_pem="x"))))
            method = chance.choice(("GET", "POST", "PUT", "DELETE", "BREW"))
            with contextlib.suppress(httpx.TransportError):
                reply = http.request(method, path, content=body)
                assert reply.status_code < 500, (method, path, body, reply.text)


async def play(device, chance: random.Random) -> None:
    """One device does everything that it can think of."""
    devices = httpx.URL(device.enrolled.devices_url)
    for _ in range(CONNECTIONS):
        where = chance.choice((address(device), (devices.host, devices.port or 0)))
        await asyncio.to_thread(send_bytes, device, chance, where)
    await asyncio.to_thread(send_messages, device, chance)
    await asyncio.to_thread(send_requests, device, chance)


def memory(pid: int) -> int:
    """Resident memory, KiB."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("VmRSS")))


def child_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/task/{pid}/children").read_text().split()[0])


def descriptors(pid: int) -> int:
    return len(list(Path(f"/proc/{pid}/fd").iterdir()))


@contextlib.asynccontextmanager
async def served(fleet, log: Path):
    """Run `fleet serve` over the fleet's home; yields its process and its broker's, by id."""
    await fleet.stop()
    with log.open("wb") as errors:
        command = (sys.executable, "-m", "fleet.cli.main", "--home", str(fleet.home), "serve")
        process = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE, stderr=errors)
    try:
        assert process.stdout is not None
        assert b"is up" in await asyncio.wait_for(process.stdout.readline(), 60)
        yield process.pid, child_of(process.pid)
    finally:
        process.terminate()
        await process.wait()
        await fleet.start()


@pytest.mark.skipif(find() is None, reason="mosquitto is not installed")
@pytest.mark.timeout(3600)
@pytest.mark.asyncio
async def test_hostile_devices_hurt_nobody_else(new_fleet, tmp_path):
    chance = random.Random(SEED)
    async with new_fleet("mosquitto") as fleet:
        hostile = [await fleet.enrol(f"hostile-{number}", group="hostile") for number in range(WARM_ROUNDS + ROUNDS)]
        witness = await fleet.enrol("witness")
        async with served(fleet, tmp_path / "serve.log") as (server, broker):
            await witness.connect()

            async def heard() -> None:
                witness.sequence += 1
                report = Report(device=witness.id, boot_id="b", sequence=witness.sequence, at=NOW, assignment=0)
                witness.publish(Up.REPORT, report)
                await witness.until(lambda device: device.acked == witness.sequence)

            dropped = []

            async def round_of(device) -> None:
                """One device does what it likes, is revoked, and leaves nothing behind."""
                await play(device, chance)
                await heard()
                detail = await fleet.operator.get(operator_api.DeviceDetail, f"/v1/devices/{device.id}")
                dropped.append(detail.dropped)
                await fleet.operator.send(operator_api.DeviceDetail, "POST", f"/v1/devices/{device.id}/revoke")

            for device in hostile[:WARM_ROUNDS]:
                await round_of(device)
            before = {pid: (memory(pid), descriptors(pid)) for pid in (server, broker)}
            for device in hostile[WARM_ROUNDS:]:
                await round_of(device)
            sessions_kib = ROUNDS * (CONNECTIONS + 1) * TLS_SESSION_KIB
            for pid, (kib, open_before) in before.items():
                most = kib * 1.2 + (sessions_kib if pid == broker else 0)
                await eventually_async(
                    lambda pid=pid, most=most: memory(pid) <= most, f"{pid} is back within 20 % of {kib} KiB"
                )
                most = open_before + SPARE_DESCRIPTORS
                await eventually_async(
                    lambda pid=pid, most=most: descriptors(pid) <= most, f"{pid} has closed its files"
                )
            status = await fleet.operator.get(operator_api.Status, "/v1/status")
            assert status.broker_connected
            detail = await fleet.operator.get(operator_api.DeviceDetail, f"/v1/devices/{witness.id}")
            assert (detail.alerts, detail.dropped) == ((), 0)
            assert all(dropped), "each hostile device was heard, and what cannot be read was dropped"
            await witness.disconnect(politely=True)
        log = (tmp_path / "serve.log").read_text()
        assert "Traceback" not in log, log[-4000:]
        assert all(line.isprintable() for line in log.split("\n"))
