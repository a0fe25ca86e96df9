"""Signed history of devices: an operator detects a server that changes it."""

import json

import pytest

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(240)]


def verify(stage, *arguments):
    code, output, errors = stage.do(stage.fleet("audit", "verify", *arguments))
    assert code in {0, 1}, output + errors
    return code, output


def test_a_server_that_changes_a_devices_history_is_found_out(stage, device):
    stage.do(stage.pushed("v2.wasm"))
    code, output = verify(stage, "--json")
    assert code == 0, output
    [shown] = json.loads(output)["devices"]
    assert shown["device"] == device.device
    ran = [each["target"].rpartition("@")[2] for each in shown["ran"] if each["phase"] == "committed"]
    assert ran == ["1.0.0", "2.0.0"]
    assert all(each["nonce"] and each["assignment_sha256"] for each in shown["ran"][1:])

    # A report is left out of the middle.
    def leave_out(database):
        database.execute("DELETE FROM reports WHERE sequence = (SELECT max(sequence) - 3 FROM reports)")

    stage.do(stage.restart_server(harm=leave_out))
    code, output = verify(stage)
    assert code == 1
    assert "left out" in output

    # Whoever took the server over shows a key of its own for the device.
    stage.do(
        stage.restart_server(
            harm=lambda database: database.execute(
                "UPDATE certificates SET pem = ?", [(stage.scene.home / "server" / "tls" / "server.pem").read_text()]
            )
        )
    )
    code, output = verify(stage)
    assert code == 1
    assert "another key" in output
