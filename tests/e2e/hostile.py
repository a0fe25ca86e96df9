"""Attacker who controls the server: can use its MQTT connection and change its files."""

import asyncio
import sqlite3
import ssl

import paho.mqtt.client as mqtt

from fleet.ca import SERVER_CN
from fleet.demo.environment import DemoDevice
from fleet.protocol.topics import Down, Topic
from tests.e2e.stage import Stage


async def say(stage: Stage, device: DemoDevice, payload: bytes) -> None:
    """Put bytes on a device's retained topic for its desired state, with the server's own certificate."""
    await asyncio.to_thread(_say, stage, device, payload)


def _say(stage: Stage, device: DemoDevice, payload: bytes) -> None:
    server = stage.scene.home / "server"
    context = ssl.create_default_context(cafile=str(server / "ca" / "ca.pem"))
    context.load_cert_chain(server / "tls" / "mqtt.pem", server / "tls" / "mqtt.key")
    client = mqtt.Client(mqtt.CallbackAPIVersion.VERSION2, client_id=SERVER_CN, protocol=mqtt.MQTTv311)
    client.tls_set_context(context)
    host, _, port = stage.scene.client.status().mqtt[0].rpartition("/")[2].rpartition(":")
    client.connect(host, int(port))
    client.loop_start()
    try:
        client.publish(str(Topic(device.device, Down.DESIRED)), payload, qos=1, retain=True).wait_for_publish(
            timeout=20
        )
    finally:
        client.disconnect()
        client.loop_stop()


def envelope(stage: Stage, device: DemoDevice) -> bytes:
    """The assignment of a device as the server has it now."""
    with sqlite3.connect(f"file:{stage.scene.home / 'server' / 'fleet.db'}?mode=ro", uri=True) as database:
        (data,) = database.execute(
            "SELECT envelope FROM assignments WHERE device = ? ORDER BY version DESC LIMIT 1", [device.device]
        ).fetchone()
    return bytes(data)
