"""Query parameters of every route, read from the route table: each wrong value is refused by its name."""

import pytest

from fleet.server.api.query import Number, Word
from fleet.server.api.routes import ROUTES

PARAMETERS = [(route, each) for route in ROUTES for each in route.query]
NO_NUMBERS = ("²", "٣", "-1", "+1", " 1", "1_0", "1e3", "0x1", "1.0", "", "9" * 18, "9" * 19, "9" * 5000)


def path_of(route):
    path = route.path.replace("{id}", "a-00000000").replace("{name}", "a")
    assert "{" not in path
    return path


@pytest.mark.asyncio
async def test_a_number_that_is_none_or_too_large_is_refused_by_its_name_on_every_route(new_fleet):
    numbers = [(route, each) for route, each in PARAMETERS if isinstance(each, Number)]
    assert len(numbers) >= 9
    async with new_fleet("embedded") as fleet:
        device = await fleet.enrol("a")
        target = await fleet.operator.publish("1.0.0")
        rollout = await fleet.operator.deploy(target)
        for route, each in numbers:
            there = rollout.id if route.path.startswith("/v1/rollouts") else device.id
            path = route.path.replace("{id}", there)
            for text in (*NO_NUMBERS, str(each.most + 1)):
                reply = await fleet.operator.http.get(path, params={each.name: text})
                assert (reply.status_code, reply.json()["type"]) == (400, "bad-request"), (path, each.name, text)
                assert each.name in reply.json()["title"]


@pytest.mark.asyncio
async def test_a_word_of_another_shape_is_refused_by_its_name(new_fleet):
    words = [(route, each) for route, each in PARAMETERS if isinstance(each, Word)]
    assert words
    async with new_fleet("embedded") as fleet:
        device = await fleet.enrol("a")
        for route, each in words:
            path = route.path.replace("{id}", device.id).replace("{name}", "a")
            for text in ("a\nb", "x" * 300):
                reply = await fleet.operator.http.get(path, params={each.name: text})
                assert (reply.status_code, reply.json()["type"]) == (400, "bad-request"), (path, each.name, text)
                assert each.name in reply.json()["title"]


@pytest.mark.asyncio
async def test_a_parameter_that_a_route_does_not_have_is_refused(new_fleet):
    async with new_fleet("embedded") as fleet:
        for path, words in [
            ("/v1/audit?limt=5", "limt"),
            ("/v1/status?limit=5", "limit"),
            ("/v1/audit?limit=5&limit=6", "limit"),
        ]:
            reply = await fleet.operator.http.get(path)
            assert reply.status_code == 400, path
            assert words in reply.json()["title"]
        # for machines that add parameters of their own
        assert (await fleet.operator.http.get("/metrics?x=1")).status_code == 200


@pytest.mark.asyncio
async def test_a_number_beyond_64_bits_in_any_body_is_refused_by_its_name(new_fleet):
    """Every field of every body that is a number, as the document names them."""
    async with new_fleet("embedded") as fleet:
        document = (await fleet.operator.http.get("/openapi.json")).json()
        schemas, asked = document["components"]["schemas"], 0
        for path, methods in document["paths"].items():
            for method, operation in methods.items():
                content = operation.get("requestBody", {"content": {}})["content"].get("application/json", {})
                name = content.get("schema", {}).get("$ref", "").rpartition("/")[2]
                for field, schema in schemas.get(name, {}).get("properties", {}).items():
                    kinds = [schema, *schema.get("anyOf", [])]
                    if not any(kind.get("type") == "integer" for kind in kinds):
                        continue
                    there = path.replace("{id}", "a-00000000").replace("{name}", "a").replace("{serial}", "1")
                    for number in ("9223372036854775808", "-9223372036854775809", "1" + "0" * 400):
                        reply = await fleet.operator.http.request(method, there, content=f'{{"{field}": {number}}}')
                        # the device of a path that there is none of is looked for first
                        assert reply.status_code in {400, 404}, (path, field, number, reply.text)
                        asked += reply.status_code == 400
                        assert (
                            reply.status_code == 404 or f"$.{field}" in reply.json()["detail"] or number.endswith("00")
                        )
        assert asked >= 15
