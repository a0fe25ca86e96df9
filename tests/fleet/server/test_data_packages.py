"""Data packages on the server: apart from instances by kind and name, with a bound of their own."""

import pytest

from fleet.protocol import bounds, operator_api
from fleet.protocol.manifest import Data


@pytest.mark.asyncio
async def test_data_never_takes_the_place_of_an_instance_and_keeps_its_name(new_fleet):
    async with new_fleet("embedded") as fleet:
        await fleet.operator.token()
        component = await fleet.operator.publish("1.0.0")
        data = await fleet.operator.publish("1.0.0", name="m", trigger=Data())
        await fleet.operator.deploy(component, instance="m", allow_empty=True)
        wrong = [(data, "m", 409, "would be a data package"), (data, "other", 422, "under which it was published: m")]
        for target, instance, status, words in wrong:
            request = operator_api.RolloutRequest(instance=instance, target=target, group="edge", allow_empty=True)
            reply = await fleet.operator.http.post("/v1/rollouts", json=request_json(request))
            assert reply.status_code == status, reply.text
            assert words in reply.text
        rows = (await fleet.operator.get(operator_api.Components, "/v1/components")).components
        assert {row.name: row.kind for row in rows} == {"hello": "component", "m": "data"}


def request_json(request):
    return {"instance": request.instance, "target": request.target, "group": request.group, "allow_empty": True}


@pytest.mark.asyncio
async def test_an_upload_of_data_has_a_bound_of_its_own(new_fleet):
    async with new_fleet("embedded", settings=f"\n[limits]\nartifact_bytes = {bounds.MIB}\n") as fleet:
        large = {"content-length": str(bounds.MIB + 1)}
        for kind, status in (("application/wasm", 413), (operator_api.DATA_MEDIA_TYPE, 422)):
            headers = {**large, "content-type": kind}
            reply = await fleet.operator.http.put(
                f"/v1/artifacts/{'ab' * 32}", content=bytes(bounds.MIB + 1), headers=headers
            )
            assert reply.status_code == status, reply.text  # 422: taken, and of another hash
