"""Every answer of a small fleet's server, from both of its listeners, is what was recorded in `tests/golden/api`.

Times, ids, keys, hashes and prose are left out of the comparison; all else is compared: status, type, keys, values.
"""

import asyncio
import base64
import hashlib
import json
import re
from datetime import UTC, datetime

import msgspec
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from fleet.protocol import operator_api, wire
from fleet.protocol.assignment import COMMANDS, CheckIn, Diagnose, FollowLogs
from fleet.protocol.codes import InstanceState, Outcome
from fleet.protocol.manifest import ConfigKey, Grants, SecretKey
from fleet.protocol.messages import (
    ArchiveNote,
    DeviceResources,
    Enrolled,
    EnrolRequest,
    Health,
    InstanceHealth,
    LogChunk,
    Reading,
    Readings,
    RenewRequest,
    State,
    Token,
    Versions,
)
from fleet.protocol.topics import Topic, Up
from fleet.protocol.trust_api import ConsumerRequest, IssuingRequest, OperatorRequest, Role, SecretRequest, SecretScope
from fleet.server.api import routes
from signing import sealing
from signing.device_statements import DeviceSigner
from tests.eventually import eventually_async

ARTIFACT = b"hello 1.0.0"
OF_HELLO = {"group": "edge", "instance": "hello"}
PROSE = frozenset({"title", "detail", "action", "text", "message", "reason", "problem", "problems"})
# How often something changed or how long it took depends on the machine's pace.
PACE = frozenset(
    {"revision", "accepted", "committed", "assigned", "deployed", "assignment", "sequence", "acked", "seed"}
)
WHILE_IT_WAITS = frozenset({"waits_for", "waits"})  # comes and goes
PATTERNS = [
    (r"-----BEGIN ([A-Z ]+)-----[^-]+-----END [A-Z ]+-----\n?", r"<\1>"),
    (r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?(Z|\+00:00)", "<time>"),
    (r"\b(gate|kiosk|shelf)-[0-9a-f]{8}\b", r"\1-<id>"),
    (r"\b[rs][0-9a-f]{12}\b", "<rollout-id>"),
    (r"(127\.0\.0\.1|localhost):\d+", r"\1:<port>"),
    (r"\b[0-9a-f]{30,}\b", "<hex>"),
    (r"wf1\.[\w-]+", "<enrolment-token>"),
    (r"^[A-Za-z0-9+/_-]{40,}={0,2}$", "<base64>"),  # a signature in one alphabet now and then has letters of both
]


def request_certificate(key):
    builder = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([]))
    return builder.sign(key, hashes.SHA256()).public_bytes(Encoding.PEM).decode()


def calm(value, key=""):
    """A JSON value without what differs from run to run."""
    if key in WHILE_IT_WAITS:
        return "<while it waits>"
    if isinstance(value, dict):
        if "items" in value and "version" in value:  # a device gets more assignments where it is slower than the server
            value = value | {"version": "<number>"}
        return {calm(name): calm(each, name) for name, each in value.items()}
    if isinstance(value, list):
        return [calm(each, key) for each in value]
    if key in PROSE and isinstance(value, str) and (re.search("[a-z]", value) or key == "reason"):
        return "<text>"
    if key in PACE and isinstance(value, int) and value:
        return "<number>"
    return calm_text(value) if isinstance(value, str) else value


def calm_text(value):
    if value.startswith("{"):
        return calm(json.loads(value))  # a document in a string
    for pattern, word in PATTERNS:
        value = re.sub(pattern, word, value)
    return value


def opened(envelope):
    """A DSSE envelope with its payload in plain sight."""
    made = json.loads(envelope)
    made["payload"] = json.loads(base64.b64decode(made["payload"]))
    return made


class Clerk:
    """Asks, and writes down what was answered."""

    def __init__(self, *, table):
        self.rows = {}
        self.left = {f"{route.method.upper()} {route.path}" for route in table}

    def note(self, asked, reply, *, body=None):
        kind = reply.headers.get("content-type", "")
        if body is None:
            body = calm(reply.json()) if kind.endswith("json") else f"<{len(reply.content)} bytes>"
        self.rows[asked] = {"status": reply.status_code, "content-type": kind, "body": body}

    async def ask(self, http, route, body=None, *, note="", headers=None, **places):
        """Ask a route of the table; `places` fill the braces, and what is left of them is the query."""
        method, path = route.split(" ")
        inside = re.findall(r"{(\w+)}", path)
        for name in inside:
            path = path.replace(f"{{{name}}}", str(places.pop(name)))
        content = body if isinstance(body, bytes) else b"" if body is None else msgspec.json.encode(body)
        reply = await http.request(method, path, content=content, params=places, headers=headers)
        self.left.discard(route)
        self.note(f"{route}{' ' + note if note else ''}", reply)
        return reply


async def joined(fleet, name, *, group):
    """A device with a sealing key of its own."""
    key, sealing_key = ec.generate_private_key(ec.SECP256R1()), X25519PrivateKey.generate()
    public = sealing.public_key(sealing_key)
    pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    proof = sealing.prove(DeviceSigner(pem), fleet="test", sealing_key=public).decode()
    return await fleet.enrol(name, group=group, key=key, sealing_key=public, proof=proof)


async def come(fleet, device, behaviour=None):
    device.behaviour = behaviour or device.behaviour
    await device.connect()
    await fleet.online(device)


async def health_of(fleet, device, target):
    """The device says how it is, and the server has heard it."""
    figure = InstanceHealth(
        instance="hello", target=target, generation=2, state=InstanceState.RUNNING, calls={"ok": 5}, workers=1
    )
    at = datetime.now(UTC)
    figures = DeviceResources(uptime_s=60, cpus=4)
    versions = Versions(agent="1", engine="1")
    device.publish(
        Up.HEALTH,
        Health(device=device.id, boot_id="boot", at=at, versions=versions, resources=figures, instances=(figure,)),
    )
    bell = fleet.server._conductor._watch
    await bell.until(lambda: fleet.server._store.devices.get(device.id).health, timeout_s=60)


@pytest.mark.asyncio
async def test_every_answer_is_what_was_recorded(new_fleet, behaviours, golden):
    async with new_fleet("embedded") as fleet:
        clerk = Clerk(table=routes.ROUTES)
        await of_operators(fleet, behaviours, clerk)
        assert not clerk.left, f"routes without a recorded answer: {sorted(clerk.left)}"
        golden.check_json("api/answers.json", clerk.rows)


async def of_operators(fleet, behaviours, clerk):
    operator = fleet.operator

    async def ask(route, body=None, **more):
        return await clerk.ask(operator.http, route, body, **more)

    await ask("GET /v1/status", note="of an empty fleet")
    shelf = await who_is_there(ask)
    one, two = await what_is_published(fleet, ask)
    gate, box = await a_rollout_that_succeeds(fleet, ask, one, away=shelf)
    kiosk = await rollouts_that_do_not(fleet, behaviours, ask, two)
    await one_device_alone(fleet, ask, gate, two)

    follow = operator_api.CommandRequest(verb=FollowLogs(instance="hello", minutes=1))
    await ask("POST /v1/devices/{id}/command", operator_api.CommandRequest(verb=CheckIn()), id=gate.id)
    command = await ask("POST /v1/devices/{id}/command", follow, id=gate.id, note="to follow a log")
    number = command.json()["sequence"]
    await of_devices(clerk, gate, number, box, hashlib.sha256(ARTIFACT).hexdigest())
    await ask("GET /v1/devices/{id}/logs", id=gate.id, command=number)
    await an_archive(fleet, ask, clerk, gate)

    await what_is_known(fleet, ask, clerk, gate, kiosk)
    await whom_to_trust(ask)
    acts = {entry["act"] for entry in (await ask("GET /v1/audit", limit=200)).json()["entries"]}
    metrics = await operator.http.get("/metrics")
    timely = ("# HELP", "wasmfleet_http_request_duration_seconds", "process_")
    lines = [re.sub(r" \S+$", "", line) for line in metrics.text.splitlines() if not line.startswith(timely)]
    clerk.note("GET /metrics", metrics, body=lines)

    await ask("POST /v1/undo", operator_api.UndoRequest(group="edge"))
    await ask("POST /v1/removals", operator_api.RemovalRequest(instance="hello", group="edge"))
    await ask("POST /v1/secrets/{name}/remove", SecretScope(**OF_HELLO), name="db-password")
    entries = (await operator.http.get("/v1/audit", params={"limit": 200})).json()["entries"]
    # what the server adds of these last rollouts comes when it has the time
    acts |= {entry["act"] for entry in entries if not entry["act"].startswith("rollout-")}
    keys = sorted({key for entry in entries for key in entry})
    clerk.rows["GET /v1/audit"]["body"] = {"keys": keys, "acts": sorted(acts)}


async def an_archive(fleet, ask, clerk, device):
    """An archive about a device, whose agent says first that it knows the command."""
    key = sealing.public_key(sealing.archive_key())
    wanted = operator_api.CommandRequest(verb=Diagnose(recipient=key))
    await ask("POST /v1/devices/{id}/command", wanted, id=device.id, note="that its agent does not know")
    versions = Versions(agent="1", engine="1", commands=COMMANDS)
    device.publish(Up.STATE, State(device=device.id, online=True, boot_id="boot", versions=versions), retain=True)

    async def known():
        detail = await fleet.operator.get(operator_api.DeviceDetail, f"/v1/devices/{device.id}")
        return "diagnose" in detail.row.versions.commands

    await eventually_async(known, "the server knows the agent's commands")
    command = await ask("POST /v1/devices/{id}/command", wanted, id=device.id, note="for an archive")
    asked = {"id": device.id, "command": command.json()["sequence"]}
    await ask("GET /v1/devices/{id}/diagnose", **asked)
    await ask("GET /v1/devices/{id}/diagnose/archive", **asked, note="that has not come")
    with device.http() as http:
        path = f"/v1/diagnose?command={asked['command']}"
        note = wire.encode(ArchiveNote(command=asked["command"]))
        reply = await asyncio.to_thread(lambda: http.post("/v1/diagnose", content=note))
        clerk.note("from a device: POST /v1/diagnose", reply)
        reply = await asyncio.to_thread(lambda: http.put(path, content=b"sealed"))
        clerk.note("from a device: PUT /v1/diagnose", reply)
        reply = await asyncio.to_thread(lambda: http.put(path, content=b"sealed"))
        clerk.note("from a device: PUT /v1/diagnose that nobody asked for", reply)
    await ask("GET /v1/devices/{id}/diagnose", **asked, note="that has come")
    await ask("GET /v1/devices/{id}/diagnose/archive", **asked)


async def who_is_there(ask):
    await ask("PUT /v1/groups/{name}", operator_api.GroupRequest(priority=5), name="edge")
    token = await ask("POST /v1/enroll-tokens", operator_api.EnrollTokenRequest(group="edge"))
    enrolling = EnrolRequest(
        secret=Token.decode(token.json()["token"]).secret,
        name="shelf",
        csr_pem=request_certificate(ec.generate_private_key(ec.SECP256R1())),
        sealing_key="",
        machine="x86_64",
    )
    reply = await ask("POST /v1/enrol", enrolling)
    await ask("POST /v1/enrol", enrolling, note="with a token that was used")
    await ask("PUT /v1/operators/{name}", OperatorRequest(role=Role.VIEWER), name="eve")
    await ask("GET /v1/operators")
    await ask("POST /v1/operators/{name}/remove", name="eve")
    pem = request_certificate(ec.generate_private_key(ec.SECP256R1()))
    await ask("POST /v1/consumers", ConsumerRequest(name="meter", group="edge", topics=("plant/#",), request=pem))
    await ask("GET /v1/consumers")
    await ask("POST /v1/consumers/{name}/revoke", name="meter")
    return wire.decode(Enrolled, reply.content).device


async def what_is_published(fleet, ask):
    needs = {
        "config": {"greeting": ConfigKey(default="hello")},
        "secrets": {"db-password": SecretKey(required=False)},
        "grants": Grants(outbound=("https://example.com:443",)),
    }
    sha256 = hashlib.sha256(ARTIFACT).hexdigest()
    await ask("PUT /v1/artifacts/{sha256}", ARTIFACT, sha256=sha256)
    targets = [await fleet.operator.publish(version, **needs) for version in ("1.0.0", "2.0.0")]
    await ask("PUT /v1/artifacts/{sha256}", ARTIFACT, sha256=sha256, note="again")
    await ask("PUT /v1/artifacts/{sha256}", b"other bytes", sha256=sha256, note="with other bytes")
    await ask("GET /v1/artifacts/{sha256}", sha256=sha256)
    await ask("GET /v1/artifacts/{sha256}", sha256=sha256, headers={"range": "bytes=0-4"}, note="a range")
    for file in ("1.root.json", "1.main.json", "timestamp.json"):
        await ask("GET /v1/tuf/{file}", file=file, note=file)
    await ask("GET /v1/tuf/{file}", file="9.root.json", note="that is not there")
    role = (await fleet.operator.http.get("/v1/tuf/1.main.json")).content
    await ask("POST /v1/roles/{namespace}", role, namespace="main", note="of a version that was")
    await ask("POST /v1/signing-events", b"{}", note="of nothing")
    await ask("GET /v1/components")
    return targets


async def a_rollout_that_succeeds(fleet, ask, target, *, away):
    gate = await joined(fleet, "gate", group="edge")
    await come(fleet, gate)
    await ask("PUT /v1/secrets/{name}", SecretRequest(**OF_HELLO, value="correct horse"), name="db-password")
    await ask("GET /v1/secrets")
    await ask("GET /v1/secrets/{name}/keys", name="db-password", **OF_HELLO)
    wish = operator_api.RolloutRequest(
        instance="hello", target=target, group="edge", waves="100%", config={"greeting": "hi"}
    )
    await ask("POST /v1/preflight", wish)
    view = msgspec.json.decode((await ask("POST /v1/rollouts", wish)).content, type=operator_api.RolloutView)
    await ask("POST /v1/rollouts", operator_api.RolloutRequest(instance="hello", group="nowhere"), note="to no group")
    await fleet.operator.decided(view)
    await ask("GET /v1/rollouts/{id}", id=view.id, note="that succeeded, with one device away")
    await ask("GET /v1/withdrawal", target=target)
    await ask("POST /v1/devices/{id}/revoke", id=away)
    box = gate.accepted[-1].items[0].secrets[0].sha256
    await ask("GET /v1/devices/{id}/secrets/{sha256}", id=gate.id, sha256=box)
    await health_of(fleet, gate, target)
    return gate, box


async def rollouts_that_do_not(fleet, behaviours, ask, target):
    operator = fleet.operator
    kiosk = await joined(fleet, "kiosk", group="lab")
    await come(fleet, kiosk, behaviours["trapping"])
    halted = await operator.deploy(target, group="lab", waves="100%")
    await operator.decided(halted)
    await ask("GET /v1/rollouts/{id}", id=halted.id, note="that halted")
    # the assignment that takes it back is there: the next one would otherwise replace it unseen
    await kiosk.until(lambda each: each.accepted and not each.accepted[-1].items)
    await kiosk.until(lambda each: not each.items and each.acked == each.sequence)
    await ask(
        "POST /v1/devices/{id}/retry",
        operator_api.InstanceRequest(instance="hello"),
        id=kiosk.id,
        note="of nothing",
    )
    await ask("POST /v1/reconcile", operator_api.ReconcileRequest(mode="adopt"))

    kiosk.behaviour = behaviours["silent"]
    waiting = await operator.deploy(target, group="lab", waves="100%")
    await kiosk.until(lambda each: each.items)
    await ask("POST /v1/rollouts/{id}/pause", id=waiting.number)
    await ask("POST /v1/rollouts/{id}/resume", id=waiting.number)
    await ask("POST /v1/rollouts/{id}/approve", id=waiting.number)
    await ask("POST /v1/rollouts/{id}/retry", id=waiting.number)
    await ask("POST /v1/rollouts/{id}/cancel-device", operator_api.CancelRequest(device="nobody"), id=waiting.number)
    await ask("POST /v1/freeze", operator_api.FreezeRequest(group="edge", reason="trade fair"))
    await ask("GET /v1/freezes")
    stages = (operator_api.PlanStage(size="1", approval=True), operator_api.PlanStage())
    plan = operator_api.GroupPolicyRequest(plan=operator_api.GroupPlan(stages=stages))
    await ask("PUT /v1/groups/{name}/policy", plan, name="edge")
    await ask("GET /v1/groups/{name}/policy", name="edge")
    await ask("PUT /v1/groups/{name}/policy", operator_api.GroupPolicyRequest(), name="edge")
    await ask("POST /v1/unfreeze", operator_api.UnfreezeRequest(group="edge"))
    await ask("POST /v1/rollouts/{id}/abort", id=waiting.id)
    await kiosk.until(lambda each: not each.items and each.acked == each.sequence)
    # the rollout's own word: what the device says of itself does not tell that it has been counted
    await operator.follow(waiting, lambda view: view.counts.get(Outcome.REVERTED))
    await ask("GET /v1/rollouts")
    return kiosk


async def one_device_alone(fleet, ask, gate, target):
    before = gate.items["hello"].target
    wish = operator_api.RolloutRequest(instance="hello", target=target)
    reply = await ask("PUT /v1/devices/{id}/pin", wish, id=gate.id)
    await fleet.operator.decided(msgspec.json.decode(reply.content, type=operator_api.RolloutView))
    await ask("GET /v1/devices/{id}", id=gate.id, note="with a pin")
    await ask("POST /v1/devices/{id}/unpin", operator_api.InstanceRequest(instance="hello"), id=gate.id)
    await gate.until(lambda each: each.items["hello"].target == before and each.acked == each.sequence)
    await ask("PUT /v1/devices/{id}/labels", operator_api.LabelsRequest(labels={"site": "north"}), id=gate.id)
    for keys, note in (
        ({"greeting": "ahoy"}, ""),
        ({"greeting": None}, "that are removed"),
        ({"tone": "x"}, "unknown"),
    ):
        wish = operator_api.KeysRequest(instance="hello", keys=keys)
        await ask("PUT /v1/devices/{id}/keys", wish, id=gate.id, note=note)
        wanted = keys.get("greeting") or "hi"
        await gate.until(lambda each, wanted=wanted: each.items["hello"].config.get("greeting") == wanted)
        await gate.until(lambda each: each.acked == each.sequence)


async def what_is_known(fleet, ask, clerk, gate, kiosk):
    for route in ("GET /v1/status", "GET /v1/devices", "GET /v1/groups"):
        await ask(route)
    await ask("GET /v1/devices/{id}", id=kiosk.id)
    await ask("GET /v1/devices/{id}", id="nobody-00000000", note="that there is not")
    reading = Reading(position=1, instance="hello", sequence=1, at=datetime.now(UTC), topic="plant/a", data=b"21.5")
    batch = Readings(device=kiosk.id, epoch="e", readings=(reading,))
    fleet.server._ingest.on_message(str(Topic(kiosk.id, Up.READINGS)), wire.encode(batch))
    fleet.server._ingest.flush()
    await ask("GET /v1/messages", group="lab", topic="plant/#")
    await ask("GET /v1/devices/{id}/timeline", id=kiosk.id)
    await ask("GET /v1/devices/{id}/reports", id=kiosk.id)
    reply = await ask("GET /v1/devices/{id}/timeline", id=gate.id, note="kinds of entries")
    kinds = sorted({entry["kind"] for entry in reply.json()["entries"]})
    clerk.note("GET /v1/devices/{id}/timeline kinds of entries", reply, body=kinds)
    reply = await ask("GET /v1/devices/{id}/desired", id=gate.id)
    clerk.note("GET /v1/devices/{id}/desired", reply, body=calm(opened(reply.content)))


async def whom_to_trust(ask):
    await ask("GET /v1/online")
    await ask("POST /v1/online", b"{}", note="of nothing")
    await ask("POST /v1/online/discard", note="of nothing")
    await ask("GET /v1/ca")
    await ask("PUT /v1/ca/issuing", IssuingRequest(issuing_pem="none"), note="of nothing")
    await ask("POST /v1/ca/issuers/{serial}/revoke", serial="1f", note="of nothing")


async def of_devices(clerk, device, command, box, artifact):
    """The listener for devices, as this device sees it."""

    async def ask(method, path, body=None, **query):
        def request():
            with device.http() as http:
                content = b"" if body is None else msgspec.json.encode(body)
                return http.request(method, path, content=content, params=query)

        return await asyncio.to_thread(request)

    def note(asked, reply, **more):
        clerk.note(f"from a device: {asked}", reply, **more)

    note("GET /v1/tuf/{file}", await ask("GET", "/v1/tuf/timestamp.json"))
    note("GET /v1/artifacts/{sha256}", await ask("GET", f"/v1/artifacts/{artifact}"))
    note("GET /v1/secrets/{sha256}", await ask("GET", f"/v1/secrets/{box}"))
    reply = await ask("GET", "/v1/desired")
    note("GET /v1/desired", reply, body=calm(opened(reply.content)))
    reply = await ask("GET", "/v1/desired", nonce="0123456789abcdef")
    body = {**reply.json(), **{key: opened(reply.json()[key]) for key in ("assignment", "fresh")}}
    note("GET /v1/desired with a nonce", reply, body=calm(body))
    note("GET /v1/desired with a bad nonce", await ask("GET", "/v1/desired", nonce="?"))
    chunk = LogChunk(instance="hello", command=command, lines=("one", "two"), ended=True)
    note("POST /v1/logs", await ask("POST", "/v1/logs", chunk))
    stray = LogChunk(instance="hello", command=command + 5)
    note("POST /v1/logs that nobody asked for", await ask("POST", "/v1/logs", stray))
    renew = RenewRequest(csr_pem=request_certificate(device.key))
    note("POST /v1/renew", await ask("POST", "/v1/renew", renew))
