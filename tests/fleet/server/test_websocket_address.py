"""Address of the broker over WebSocket, which an operator offers to networks that let through HTTPS only."""

import pytest

from fleet.server.config import HomeError, ServerConfig

PLAIN = 'fleet = "f"\nsize = "solo"\nhost = "h.example"\noperators = "[::]:1"\ndevices = "[::]:2"\nmqtt = "[::]:8883"\n'


def config(tmp_path, more=""):
    path = tmp_path / "server.toml"
    path.write_text(PLAIN + more)
    return ServerConfig.load(path)


@pytest.mark.parametrize("broker", ["", 'broker = "mqtts://b.example:8884"\n'])
def test_devices_are_given_the_address_after_the_plain_one(tmp_path, broker):
    found = config(tmp_path, broker + 'mqtt_websocket = "wss://h.example/mqtt"\n')
    assert found.mqtt_urls[1:] == ("wss://h.example/mqtt",)
    assert found.mqtt_urls[0].startswith("mqtts://")
    assert 'mqtt_websocket = "wss://h.example/mqtt"' in found.dump()


def test_by_default_there_is_none(tmp_path):
    found = config(tmp_path)
    assert found.mqtt_urls == ("mqtts://h.example:8883",)
    assert "websocket" not in found.dump()


@pytest.mark.parametrize("value", ["ws://h/mqtt", "h:443", "wss://", "wss://h:port/", "wss://[h/", "wss://u:p@h/", "x"])
def test_what_is_no_such_address_is_refused(tmp_path, value):
    with pytest.raises(HomeError, match="mqtt_websocket"):
        config(tmp_path, f'mqtt_websocket = "{value}"\n')
