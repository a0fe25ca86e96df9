"""Every text and list of every request of the operator API has an upper bound, and enrolment a small body."""

import json

import httpx
import msgspec
import pytest
from starlette.requests import Request

from fleet.protocol import bounds
from fleet.protocol.assignment import FollowLogs
from fleet.protocol.messages import EnrolRequest
from fleet.protocol.operator_api import Body, CommandRequest, Refusal
from fleet.server.api.operators import RolloutHandlers
from fleet.server.api.routes import ROUTES

BODIES = sorted({each.request for each in ROUTES if isinstance(each.request, type)}, key=lambda kind: kind.__name__)
# of what is signed later: checked when it is signed, with the manifest's own rules
ELSEWHERE = {"Grants", "Hardware", "GpioLine", "SerialPort", "CheckIn", "Restart", "FollowLogs"}


def unbounded(schema, where):
    """The parts of a JSON schema that may be of any length."""
    kind = schema.get("type")
    if kind == "string" and not schema.keys() & {"maxLength", "enum", "pattern", "format", "const"}:
        yield where
    if kind == "array":
        if "maxItems" not in schema:
            yield where
        yield from unbounded(schema.get("items", {}), f"{where}[]")
    if kind == "object" and "additionalProperties" in schema and isinstance(schema["additionalProperties"], dict):
        if "maxProperties" not in schema:
            yield where
        yield from unbounded(schema["additionalProperties"], f"{where}{{}}")
    for name, field in schema.get("properties", {}).items():
        yield from unbounded(field, f"{where}.{name}")
    for each in schema.get("anyOf", []):
        yield from unbounded(each, where)


@pytest.mark.parametrize("kind", [kind for kind in BODIES if issubclass(kind, Body)], ids=lambda kind: kind.__name__)
def test_no_text_or_list_of_a_request_is_without_a_bound(kind):
    (_,), schemas = msgspec.json.schema_components([kind])
    found = [
        where for name, schema in schemas.items() if name not in ELSEWHERE for where in unbounded(schema, f"{name}")
    ]
    assert not found


@pytest.mark.asyncio
async def test_what_is_too_long_is_refused_by_its_field(new_fleet):
    async with new_fleet("embedded") as fleet:
        for path, field, value in [
            ("/v1/rollouts", "note", "x" * 2001),
            ("/v1/rollouts", "waves", "1, " * 100),
            ("/v1/rollouts", "config", {str(number): "x" for number in range(65)}),
            ("/v1/undo", "group", "x" * 257),
        ]:
            request = {"instance": "hello"} if path == "/v1/rollouts" else {}
            reply = await fleet.operator.http.post(path, content=json.dumps({**request, field: value}))
            assert reply.status_code == 400
            assert f"$.{field}" in reply.json()["detail"], reply.text
        device = await fleet.device("a")
        verb = FollowLogs(instance="hello", minutes=bounds.LOGS_MINUTES_MAX + 1)
        await fleet.operator.decided(await fleet.operator.deploy(await fleet.operator.publish("1.0.0")))
        path = f"/v1/devices/{device.id}/command"
        problem = await fleet.operator.problem("POST", path, CommandRequest(verb=verb))
        assert (problem.status, problem.type) == (400, "bad-request")
        assert "minutes" in problem.title


@pytest.mark.asyncio
async def test_no_request_is_read_beyond_its_bound():
    came = 0

    async def endless():
        nonlocal came
        came += bounds.MIB
        assert came <= 3 * bounds.API_BODY_MAX_BYTES, "the request is read without end"
        return {"type": "http.request", "body": bytes(bounds.MIB), "more_body": True}

    handlers = RolloutHandlers(store=None, planner=None, views=None, changes=None)
    with pytest.raises(Refusal) as refused:
        await handlers.abort(Request({"type": "http", "path_params": {"id": "7"}}, endless), "me")
    assert refused.value.problem.status == 413


@pytest.mark.asyncio
async def test_whoever_has_no_token_sends_little(new_fleet):
    assert EnrolRequest.MAX_BYTES == bounds.ENROL_MAX_BYTES < bounds.API_BODY_MAX_BYTES
    async with new_fleet("embedded") as fleet, httpx.AsyncClient(verify=fleet.operator_context()) as stranger:
        reply = await stranger.post(f"{fleet.made.url}/v1/enrol", content=b"{" + b" " * bounds.ENROL_MAX_BYTES)
        assert (reply.status_code, reply.json()["type"]) == (413, "too-large")
