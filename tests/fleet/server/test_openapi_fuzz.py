"""Each operation of the OpenAPI document, with requests that follow it and requests that do not.

Schemathesis makes the requests from the document itself, the same ones in each run, over real TLS to a server that has
a device, a component and a rollout. Nothing is answered with an error of the server's, and every answer is of a
status, a type and a shape that the document names. What breaks the document's own rules is refused.
"""

import asyncio
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.errors import Unsatisfiable
from schemathesis.checks import not_a_server_error
from schemathesis.generation import GenerationMode
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_schema_conformance,
    status_code_conformance,
)

schemathesis.serializer.alias("application/wasm", "application/octet-stream")

EXAMPLES = 8
"""Requests of each kind for each operation: three kinds, some 50 operations."""

CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
    negative_data_rejection,
]


@dataclass(frozen=True)
class Known:
    """What the server has: names for the parts of a path, by the first of them, and for fields of a body."""

    paths: Mapping[str, Mapping[str, str]]
    fields: Mapping[str, str]


def strategies(operation: Any, known: Known) -> Iterator[Any]:
    """Requests that follow the document, of anything and of what there is, and requests that do not follow it."""

    def meant(case: Any) -> Any:
        if isinstance(case.body, dict):
            case.body.update({name: word for name, word in known.fields.items() if name in case.body})
        return case

    yield operation.as_strategy(generation_mode=GenerationMode.POSITIVE)
    parts = known.paths.get(operation.path.split("/")[2], {})
    places = {each.name: parts[each.name] for each in operation.path_parameters if each.name in parts}
    if places or operation.body:
        yield operation.as_strategy(generation_mode=GenerationMode.POSITIVE, path_parameters=places).map(meant)
    yield operation.as_strategy(generation_mode=GenerationMode.NEGATIVE)


def attack(schema: Any, send: Callable[[Any], None], known: Known) -> list[str]:
    """Send everything; what went wrong, one entry for each kind of request."""
    wrong: list[str] = []
    same = settings(
        max_examples=EXAMPLES,
        derandomize=True,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    for result in schema.get_all_operations():
        operation = result.ok()
        for strategy in strategies(operation, known):
            try:
                same(given(case=strategy)(send))()
            except Unsatisfiable:
                pass  # nothing breaks the rules of this operation, such as one without parameters and body
            except (Exception, BaseExceptionGroup) as error:  # noqa: BLE001 - every operation has its turn
                wrong.append(f"{operation.label}: {error}")
    return wrong


@pytest.mark.asyncio
@pytest.mark.timeout(600)
async def test_every_operation_answers_as_the_document_says(new_fleet):
    async with new_fleet("embedded") as fleet:
        device = await fleet.device("a")
        target = await fleet.operator.publish("1.0.0")
        rollout = await fleet.operator.decided(await fleet.operator.deploy(target))
        document = (await fleet.operator.http.get("/openapi.json")).json()
        # tokens have tests of their own: here every request has one
        del document["security"], document["components"]["securitySchemes"]
        known = Known(
            paths={
                "devices": {"id": device.id},
                "rollouts": {"id": rollout.id},
                "groups": {"name": "edge"},
                "roles": {"namespace": "main"},
            },
            fields={"group": "edge", "device": "", "instance": "hello", "target": target, "waves": "1, 100%"},
        )
        schema = schemathesis.openapi.from_dict(document)
        with requests.Session() as session:
            session.verify = str(fleet.home / "operator" / "ca.pem")
            session.headers["authorization"] = fleet.operator.http.headers["authorization"]

            def send(case: Any) -> None:
                if case.query and str(case.query.get("wait", "")).isdecimal():
                    case.query["wait"] = 0  # a long poll is as long as it says
                response = case.call(base_url=fleet.made.url, session=session, verify=session.verify, timeout=60)
                # a request of more than a mebibyte is refused before anybody looks whether it breaks a rule
                refused = response.status_code == requests.codes.request_entity_too_large
                case.validate_response(response, checks=CHECKS[:-1] if refused else CHECKS)

            wrong = await asyncio.to_thread(attack, schema, send, known)
    assert not wrong, "\n\n".join(wrong)
