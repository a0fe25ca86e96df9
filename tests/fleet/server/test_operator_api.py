"""The operators' API over real TLS: who may ask, what is refused and in which words, what bytes come back."""

import asyncio
import hashlib
from datetime import UTC, datetime

import httpx
import msgspec
import pytest

from fleet.protocol import operator_api
from fleet.protocol.assignment import CheckIn, Restart
from fleet.protocol.codes import InstanceState, Phase, RejectCode, RolloutState
from fleet.protocol.manifest import Grants
from fleet.protocol.messages import Health, InstanceHealth
from fleet.protocol.topics import Up
from signing import keys, repository


@pytest.mark.asyncio
async def test_every_route_but_health_and_enrolment_needs_a_token(new_fleet):
    async with new_fleet() as fleet:
        document = (await fleet.operator.http.get("/openapi.json")).json()
        paths = [(m, p) for p, methods in document["paths"].items() for m in methods if p != "/v1/enrol"]
        assert len(paths) > 25
        async with httpx.AsyncClient(verify=fleet.operator_context(), base_url=fleet.made.url, timeout=60) as stranger:
            for method, path in [*paths, ("get", "/metrics"), ("get", "/openapi.json")]:
                for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": "Basic wrong"}):
                    reply = await stranger.request(method, path.replace("{", "").replace("}", ""), headers=headers)
                    assert reply.status_code == 401, (method, path)
                    assert reply.json()["type"] == "unauthorised"
                    known = "unknown here or was revoked" in reply.json()["title"]
                    assert known == ("Bearer wrong" in headers.values())
            assert (await stranger.get("/healthz")).text == "ok\n"


@pytest.mark.asyncio
async def test_a_viewer_may_look_and_not_change(new_fleet):
    async with new_fleet() as fleet:
        fleet.server._store.access.add_operator("eve", "eve-token", role="viewer", now=1.0)
        fleet.operator.http.headers["authorization"] = "Bearer eve-token"
        await fleet.operator.get(operator_api.Status, "/v1/status")
        problem = await fleet.operator.problem("POST", "/v1/enroll-tokens", operator_api.EnrollTokenRequest())
        assert (problem.status, problem.type) == (403, "forbidden")


@pytest.mark.asyncio
async def test_what_is_asked_wrongly_is_answered_with_one_sentence(new_fleet):
    async with new_fleet() as fleet:
        operator = fleet.operator
        await operator.token("edge")
        target = await operator.publish("1.0.0", config={})

        async def deploy(**wish):
            request = operator_api.RolloutRequest(**{"instance": "hello", "target": target, "group": "edge", **wish})
            return await operator.problem("POST", "/v1/rollouts", request)

        for wish, kind in [
            ({"group": "nowhere"}, "unknown-group"),
            ({"group": "", "device": "nobody-00000000"}, "unknown-device"),
            ({"group": "edge", "device": "nobody-00000000"}, "bad-request"),
            ({"target": "components/main/hello/9.9.9.wasm"}, "unknown-target"),
            ({"waves": "1, 2"}, "bad-waves"),
            ({"instance": "Not A Name"}, "bad-name"),
            ({"config": {"colour": "red"}}, "unknown-config"),
            ({"grants": Grants(outbound=("https://example.com:443",))}, "grant-denied"),
            ({"port": 70_000}, "bad-request"),
            ({"timeout_s": 1}, "bad-request"),
        ]:
            problem = await deploy(**wish)
            assert problem.type == kind, problem
            assert problem.title
            assert "\n" not in problem.title + problem.detail + problem.action
        assert "edge" in (await deploy(group="nowhere")).detail
        for method, path, body, kind in [
            ("POST", "/v1/rollouts", b"not json", "bad-request"),
            ("POST", "/v1/rollouts", b'{"instance": "x", "colour": 1}', "bad-request"),
            ("POST", "/v1/rollouts", b'{"instance": 1}', "bad-request"),
            ("POST", "/v1/rollouts", b"x" * (2 << 20), "too-large"),
            ("GET", "/v1/rollouts/99", None, "unknown-rollout"),
            ("POST", "/v1/rollouts/99/abort", None, "unknown-rollout"),
            ("GET", "/v1/devices/nobody-00000000", None, "unknown-device"),
            ("GET", "/v1/rollouts?limit=many", None, "bad-request"),
            ("GET", "/v1/nothing", None, "not-found"),
            ("DELETE", "/v1/status", None, "method-not-allowed"),
            ("GET", "/v1/artifacts/abc", None, "bad-name"),
            ("GET", "/v1/tuf/..%2Fserver.toml", None, "not-found"),
            (
                "POST",
                "/v1/removals",
                msgspec.json.encode(operator_api.RemovalRequest(instance="x", group="edge")),
                "unknown-instance",
            ),
            ("POST", "/v1/undo", b"{}", "nothing-to-undo"),
            ("POST", "/v1/enroll-tokens", b'{"valid_s": 1}', "bad-request"),
        ]:
            problem = await operator.problem(method, path, body)
            assert problem.type == kind, (path, problem)
        unknown_field = await operator.problem("POST", "/v1/rollouts", b'{"instance": "x", "colour": 1}')
        assert "colour" in unknown_field.detail


@pytest.mark.asyncio
async def test_a_removal_by_waves_that_cannot_be_meant_is_refused(new_fleet):
    async with new_fleet() as fleet:
        operator = fleet.operator
        await operator.token("edge")
        await operator.deploy(await operator.publish("1.0.0"), allow_empty=True)
        for waves in ("abc", "50%", "1, 2"):
            removal = operator_api.RemovalRequest(instance="hello", group="edge", waves=waves)
            problem = await operator.problem("POST", "/v1/removals", removal)
            assert (problem.status, problem.type) == (400, "bad-waves")


@pytest.mark.asyncio
async def test_an_artifact_is_kept_only_when_its_hash_is_its_name_and_comes_back_by_range(new_fleet):
    async with new_fleet() as fleet:
        data = bytes(range(256)) * 5000
        sha256 = hashlib.sha256(data).hexdigest()
        http = fleet.operator.http
        problem = await fleet.operator.problem("PUT", f"/v1/artifacts/{sha256}", data[:-1])
        assert problem.type == "hash-mismatch"
        assert (await http.get(f"/v1/artifacts/{sha256}")).status_code == 404
        assert not list((fleet.home / "server" / "artifacts").iterdir())

        first = await http.put(f"/v1/artifacts/{sha256}", content=data)
        again = await http.put(f"/v1/artifacts/{sha256}", content=data)
        assert (first.status_code, again.status_code) == (201, 200)
        whole = await http.get(f"/v1/artifacts/{sha256}")
        assert whole.content == data
        assert whole.headers["etag"] == f'"{sha256}"'
        part = await http.get(f"/v1/artifacts/{sha256}", headers={"range": "bytes=1000-1999"})
        assert (part.status_code, part.content) == (206, data[1000:2000])
        assert part.headers["content-range"] == f"bytes 1000-1999/{len(data)}"
        rest = await http.get(f"/v1/artifacts/{sha256}", headers={"range": "bytes=1279000-", "if-range": f'"{sha256}"'})
        assert rest.content == data[1279000:]
        beyond = await http.get(f"/v1/artifacts/{sha256}", headers={"range": f"bytes={len(data)}-"})
        assert beyond.status_code == 416
        unchanged = await http.get(f"/v1/artifacts/{sha256}", headers={"if-none-match": f'"{sha256}"'})
        assert unchanged.status_code == 304


@pytest.mark.asyncio
async def test_publishing_is_compare_and_swap_and_only_for_the_publishers_key(new_fleet, tmp_path):
    async with new_fleet() as fleet:
        operator = fleet.operator
        base = await operator._newest_role()
        await operator.publish("1.0.0")
        # somebody who began from the same version comes second
        stale = repository.renew(base, signer=operator._key, now=datetime.now(UTC))
        problem = await operator.problem("POST", "/v1/roles/main", stale)
        assert (problem.status, problem.type) == (409, "conflict")
        forged = repository.renew(
            await operator._newest_role(), signer=keys.generate(tmp_path / "other.pem"), now=datetime.now(UTC)
        )
        assert (await operator.problem("POST", "/v1/roles/main", forged)).type == "unsigned"
        assert (await operator.problem("POST", "/v1/roles/other", forged)).type == "refused"
        # the very same again: nothing to do
        same = await operator.send(
            operator_api.RoleReply, "POST", "/v1/roles/main", msgspec.Raw(await operator._newest_role())
        )
        assert same.version == 2


@pytest.mark.asyncio
async def test_two_groups_of_one_priority_must_not_disagree(new_fleet):
    async with new_fleet() as fleet:
        operator = fleet.operator
        device = await fleet.device("a")
        one, two = await operator.publish("1.0.0"), await operator.publish("2.0.0")
        await operator.decided(await operator.deploy(one))
        await operator.send(
            operator_api.GroupRow, "PUT", "/v1/groups/canary", operator_api.GroupRequest(add=(device.id,))
        )
        wish = operator_api.RolloutRequest(instance="hello", target=two, group="canary")
        problem = await operator.problem("POST", "/v1/rollouts", wish)
        assert (problem.type, problem.status) == ("conflict", 409)
        assert "edge" in problem.title
        assert "canary" in problem.title

        await operator.send(operator_api.GroupRow, "PUT", "/v1/groups/canary", operator_api.GroupRequest(priority=10))
        view = await operator.decided(await operator.send(operator_api.RolloutView, "POST", "/v1/rollouts", wish))
        assert view.state is RolloutState.SUCCEEDED
        detail = await operator.get(operator_api.DeviceDetail, f"/v1/devices/{device.id}")
        assert [(each.target, each.source) for each in detail.effective] == [(two, "group canary")]
        # out of the group again: back to what the other one says
        await operator.send(
            operator_api.GroupRow, "PUT", "/v1/groups/canary", operator_api.GroupRequest(remove=(device.id,))
        )
        await device.until(lambda device: device.items["hello"].target == one)


@pytest.mark.asyncio
async def test_a_device_that_is_not_known_is_guessed(new_fleet):
    async with new_fleet() as fleet:
        operator = fleet.operator
        device = await fleet.device("berlin")
        name = device.id.rpartition("-")[0]
        slip = device.id.replace("erl", "erll")
        for path, kind, body in (
            ("", "GET", None),
            ("/timeline", "GET", None),
            ("/labels", "PUT", operator_api.LabelsRequest(labels={"site": "north"})),
        ):
            for given in (name, slip):
                problem = await operator.problem(kind, f"/v1/devices/{given}{path}", body)
                assert (problem.status, problem.type) == (404, "unknown-device")
                assert problem.detail == f"did you mean {device.id}?"
        assert not (await operator.problem("GET", "/v1/devices/unlike", None)).detail
        for group in (operator_api.GroupRequest(add=(name,)), operator_api.GroupRequest(remove=(slip,))):
            assert device.id in (await operator.problem("PUT", "/v1/groups/edge", group)).detail


@pytest.mark.asyncio
async def test_a_groups_name_is_no_wish_to_make_it_and_a_stranger_cannot_be_taken_out(new_fleet):
    async with new_fleet() as fleet:
        operator = fleet.operator
        device = await fleet.device("a")
        for wish in (operator_api.GroupRequest(), operator_api.GroupRequest(remove=(device.id,))):
            problem = await operator.problem("PUT", "/v1/groups/egde", wish)
            assert (problem.status, problem.type) == (404, "unknown-group")
            assert "edge" in problem.detail
        groups = await operator.get(operator_api.Groups, "/v1/groups")
        assert [each.name for each in groups.groups] == ["edge"]
        assert (
            await operator.send(operator_api.GroupRow, "PUT", "/v1/groups/edge", operator_api.GroupRequest())
        ).devices
        taken = operator_api.GroupRequest(remove=(device.id,))
        await operator.send(operator_api.GroupRow, "PUT", "/v1/groups/edge", taken)
        again = await operator.problem("PUT", "/v1/groups/edge", taken)
        assert (again.status, again.type) == (409, "no-member")
        selector = operator_api.GroupRequest(selector={"site": "north"})
        await operator.send(operator_api.GroupRow, "PUT", "/v1/groups/north", selector)
        assert "labels" in (await operator.problem("PUT", "/v1/groups/north", taken)).detail


@pytest.mark.asyncio
async def test_a_device_that_gets_a_label_gets_what_its_group_runs(new_fleet):
    async with new_fleet() as fleet:
        operator = fleet.operator
        device = await fleet.device("a", group="")
        selector = operator_api.GroupRequest(selector={"site": "north"})
        await operator.send(operator_api.GroupRow, "PUT", "/v1/groups/north", selector)
        target = await operator.publish("1.0.0")
        view = await operator.decided(await operator.deploy(target, group="north"))
        assert (view.state, view.reason) == (RolloutState.REFUSED, "the group has no devices")
        view = await operator.decided(await operator.deploy(target, group="north", allow_empty=True))
        assert view.state is RolloutState.SUCCEEDED
        assert not device.items
        path = f"/v1/devices/{device.id}/labels"
        await operator.send(
            operator_api.DeviceDetail, "PUT", path, operator_api.LabelsRequest(labels={"site": "north"})
        )
        await device.until(lambda device: device.items)
        await operator.send(operator_api.DeviceDetail, "PUT", path, operator_api.LabelsRequest(labels={"site": None}))
        await device.until(lambda device: not device.items)
        problem = await operator.problem("POST", "/v1/enroll-tokens", operator_api.EnrollTokenRequest(group="north"))
        assert problem.type == "selector-group"


@pytest.mark.asyncio
async def test_labels_change_together_with_their_entry_in_the_audit_log_or_not_at_all(new_fleet, monkeypatch):
    async with new_fleet() as fleet:
        device = await fleet.enrol("a")
        path, wish = f"/v1/devices/{device.id}/labels", operator_api.LabelsRequest(labels={"site": "north"})

        def full(**_entry):
            raise OSError("no space left on device")

        with monkeypatch.context() as patch:
            patch.setattr(fleet.server._store.access, "audit", full)
            assert (await fleet.operator.problem("PUT", path, wish)).status == 500
        assert fleet.server._store.devices.get(device.id).labels == {}
        await fleet.operator.send(operator_api.DeviceDetail, "PUT", path, wish)
        assert fleet.server._store.devices.get(device.id).labels == {"site": "north"}


@pytest.mark.asyncio
async def test_labels_that_come_while_others_are_being_sent_are_kept(new_fleet):
    async with new_fleet() as fleet:
        operator, device = fleet.operator, await fleet.device("a", group="")
        path = f"/v1/devices/{device.id}/labels"
        sent = asyncio.Event()

        async def slowly():
            yield b'{"labels": {"site": '
            await operator.send(
                operator_api.DeviceDetail, "PUT", path, operator_api.LabelsRequest(labels={"rack": "seven"})
            )
            sent.set()
            yield b'"north"}}'

        reply = await operator.http.put(path, content=slowly())
        assert sent.is_set()
        assert reply.json()["row"]["labels"] == {"rack": "seven", "site": "north"}


@pytest.mark.asyncio
async def test_a_pin_holds_one_device_until_it_is_taken_off(new_fleet):
    async with new_fleet() as fleet:
        operator = fleet.operator
        pinned, other = await fleet.device("a"), await fleet.device("b")
        one, two = await operator.publish("1.0.0"), await operator.publish("2.0.0")
        await operator.decided(await operator.deploy(one))
        wish = operator_api.RolloutRequest(instance="hello", target=two)
        view = await operator.send(operator_api.RolloutView, "PUT", f"/v1/devices/{pinned.id}/pin", wish)
        assert (await operator.decided(view)).state is RolloutState.SUCCEEDED
        assert (pinned.items["hello"].target, other.items["hello"].target) == (two, one)
        row = (await operator.get(operator_api.DeviceDetail, f"/v1/devices/{pinned.id}")).row
        assert row.pins == ("hello",)
        path = f"/v1/devices/{pinned.id}/unpin"
        await operator.send(operator_api.DeviceDetail, "POST", path, operator_api.InstanceRequest(instance="hello"))
        await pinned.until(lambda device: device.items["hello"].target == one)
        problem = await operator.problem("POST", path, operator_api.InstanceRequest(instance="hello"))
        assert problem.type == "not-pinned"


@pytest.mark.asyncio
async def test_a_failed_device_is_tried_again_only_when_an_operator_says_so(new_fleet, behaviours):
    async with new_fleet() as fleet:
        operator = fleet.operator
        good, bad = await fleet.device("a"), await fleet.device("b", behaviour=behaviours["trapping"])
        target = await operator.publish("1.0.0")
        view = await operator.decided(await operator.deploy(target, waves="100%", failures=1))
        assert view.state is RolloutState.SUCCEEDED
        assert view.counts == {"succeeded": 1, "failed": 1}
        detail = await operator.get(operator_api.DeviceDetail, f"/v1/devices/{bad.id}")
        (failure,) = detail.failed
        assert (failure.instance, failure.code, failure.log) == ("hello", "trapped", ("boom",))
        assert failure.action

        bad.behaviour = behaviours["good"]
        path = f"/v1/devices/{bad.id}/retry"
        await operator.send(operator_api.DeviceDetail, "POST", path, operator_api.InstanceRequest(instance="hello"))
        view = await operator.follow(view, lambda view: view.counts == {"succeeded": 2})
        assert bad.items["hello"].attempt == 1
        assert good.items["hello"].attempt == 0
        assert (await operator.get(operator_api.DeviceDetail, f"/v1/devices/{bad.id}")).failed == ()
        problem = await operator.problem("POST", path, operator_api.InstanceRequest(instance="other"))
        assert problem.type == "unknown-instance"


@pytest.mark.asyncio
async def test_there_is_nothing_to_try_again_where_an_instance_runs_or_is_being_tried(new_fleet, behaviours):
    async with new_fleet() as fleet:
        operator, device = fleet.operator, await fleet.device("a")
        one, two = await operator.publish("1.0.0"), await operator.publish("2.0.0")
        await operator.decided(await operator.deploy(one))
        path, wish = f"/v1/devices/{device.id}/retry", operator_api.InstanceRequest(instance="hello")

        async def refused(words):
            await device.until(lambda device: device.acked >= device.sequence)
            problem = await operator.problem("POST", path, wish)
            assert problem.type == "nothing-to-do"
            assert problem.title == f"there is nothing to try again: hello {words}"
            assert "fleet restart" in problem.action
            assert device.accepted[-1].items[0].attempt == 0

        await refused(f"runs well on {device.id}")
        # while it is on probation, neither: the device would have gone back to 1.0.0
        device.behaviour = lambda item: [device.report(item, Phase.PROBATION)]
        await operator.deploy(two)
        await device.until(lambda device: device.items["hello"].target == two)
        await refused(f"is being tried on {device.id} already (probation)")
        # an instance that its host does not run is tried again
        device._say(device.report(device.items["hello"], Phase.COMMITTED), device.accepted[-1])
        figure = InstanceHealth(instance="hello", target=two, generation=2, state=InstanceState.QUARANTINED, restarts=5)
        now, counts = datetime.now(UTC), fleet.server._ingest.counts
        device.publish(Up.HEALTH, Health(device=device.id, boot_id="boot", at=now, instances=(figure,)))
        while not counts["health"]:
            await fleet.server._conductor._watch._event.wait()
        await operator.send(operator_api.DeviceDetail, "POST", path, wish)
        await device.until(lambda device: device.accepted[-1].items[0].attempt == 1)


@pytest.mark.asyncio
async def test_a_rollout_can_be_paused_resumed_and_aborted(new_fleet, behaviours):
    async with new_fleet() as fleet:
        operator = fleet.operator
        devices = [await fleet.device(name) for name in "ab"]
        one, two = await operator.publish("1.0.0"), await operator.publish("2.0.0")
        await operator.decided(await operator.deploy(one))
        for device in devices:
            device.behaviour = behaviours["silent"]
        view = await operator.deploy(two)
        view = await operator.follow(view, lambda view: view.wave == 1)
        (first,) = [device for device in view.devices if device.wave == 1]
        paused = await operator.send(operator_api.RolloutView, "POST", f"/v1/rollouts/{view.number}/pause")
        assert (paused.state, paused.reason) == (RolloutState.PAUSED, "paused by admin")
        resumed = await operator.send(operator_api.RolloutView, "POST", f"/v1/rollouts/{view.id}/resume")
        assert resumed.state is RolloutState.RUNNING
        canary = next(device for device in devices if device.id == first.device)
        await canary.until(lambda device: device.items["hello"].target == two)
        aborted = await operator.send(operator_api.RolloutView, "POST", f"/v1/rollouts/{view.id}/abort")
        assert aborted.state is RolloutState.ABORTED
        await canary.until(lambda device: device.items["hello"].target == one)
        problem = await operator.problem("POST", f"/v1/rollouts/{view.id}/resume")
        assert problem.type == "rollout-over"


@pytest.mark.asyncio
async def test_a_version_that_falls_while_it_soaks_goes_no_further(new_fleet):
    async with new_fleet() as fleet:
        operator = fleet.operator
        devices = [await fleet.device(name) for name in "ab"]
        one, two = await operator.publish("1.0.0"), await operator.publish("2.0.0")
        await operator.decided(await operator.deploy(one))
        view = await operator.deploy(two, soak_s=600)
        view = await operator.follow(view, lambda view: "soaks" in view.reason)
        (first,) = [device for device in view.devices if device.wave == 1]
        canary = next(device for device in devices if device.id == first.device)
        canary.states_said["hello"] = canary.report(
            canary.items["hello"], Phase.FAILED, code=RejectCode.RESTARTED, message="in quarantine after 5 restarts"
        )
        figure = InstanceHealth(instance="hello", target=two, generation=2, state=InstanceState.QUARANTINED, restarts=5)
        now = datetime.now(UTC)
        canary.publish(Up.HEALTH, Health(device=canary.id, boot_id="boot", at=now, instances=(figure,)))
        view = await operator.decided(view)
        assert view.state is RolloutState.REVERTED
        assert "quarantine after 5 restarts" in view.reason
        await canary.until(lambda device: device.items["hello"].target == one)


@pytest.mark.asyncio
async def test_a_newer_rollout_takes_over_without_a_step_back(new_fleet, behaviours):
    async with new_fleet() as fleet:
        operator = fleet.operator
        device = await fleet.device("a")
        targets = [await operator.publish(f"{number}.0.0") for number in (1, 2, 3)]
        await operator.decided(await operator.deploy(targets[0]))
        device.behaviour = behaviours["silent"]
        second = await operator.deploy(targets[1])
        await device.until(lambda device: device.items["hello"].target == targets[1])
        device.behaviour = behaviours["good"]
        third = await operator.decided(await operator.deploy(targets[2]))
        assert third.state is RolloutState.SUCCEEDED
        old = await operator.get(operator_api.RolloutView, f"/v1/rollouts/{second.id}")
        assert (old.state, old.reason) == (RolloutState.SUPERSEDED, f"rollout {third.number} took over")
        offered = [each.items[0].target for each in device.accepted]
        assert offered == targets


@pytest.mark.asyncio
async def test_configuration_and_grants_stay_over_versions_and_never_widen(new_fleet, manifest_with_key):
    async with new_fleet() as fleet:
        operator = fleet.operator
        device = await fleet.device("a")
        grants = Grants(interfaces=("wasi:clocks", "wasi:random"))
        one = await operator.publish("1.0.0", grants=grants, **manifest_with_key)
        missing = operator_api.RolloutRequest(instance="hello", target=one, group="edge")
        problem = await operator.problem("POST", "/v1/rollouts", missing)
        assert problem.type == "missing-config"
        assert "place" in problem.title
        narrowed = Grants(interfaces=("wasi:clocks",))
        view = await operator.deploy(one, config={"place": "attic"}, grants=narrowed, port=8081, share_worker=True)
        assert (await operator.decided(view)).state is RolloutState.SUCCEEDED
        two = await operator.publish("2.0.0", grants=grants, **manifest_with_key)
        assert (await operator.decided(await operator.deploy(two))).state is RolloutState.SUCCEEDED
        item = device.items["hello"]
        assert (item.target, item.config, item.grants, item.port) == (two, {"place": "attic"}, narrowed, 8081)
        assert item.share_worker, "what the operator allowed stays allowed"
        plan = await operator.send(operator_api.Preflight, "POST", "/v1/preflight", operator_api.RolloutRequest(
            instance="hello", target=await operator.publish(
                "3.0.0", grants=Grants(interfaces=("wasi:clocks", "wasi:cli")), **manifest_with_key),
            group="edge"))  # fmt: skip
        assert plan.new_grants == ("interface wasi:cli",)
        assert plan.waves[0] == (device.id,)
        assert plan.previous == two


@pytest.mark.asyncio
async def test_a_device_with_another_cpu_is_left_out_and_said_so(new_fleet):
    async with new_fleet() as fleet:
        operator = fleet.operator
        device = await fleet.device("a")
        target = await operator.publish("1.0.0", arch=("riscv64",))
        wish = operator_api.RolloutRequest(instance="hello", target=target, group="edge")
        plan = await operator.send(operator_api.Preflight, "POST", "/v1/preflight", wish)
        assert plan.excluded[0].device == device.id
        assert "x86_64" in plan.excluded[0].reason
        # the change concerns no device: the rollout is refused, and nothing is settled
        view = await operator.decided(await operator.deploy(target))
        assert (view.state, view.counts) == (RolloutState.REFUSED, {"not-affected": 1})
        assert "x86_64" in view.devices[0].reason
        assert "it concerns no device" in view.reason
        (group,) = (await operator.get(operator_api.Groups, "/v1/groups")).groups
        assert not group.settled
        assert not device.accepted
        empty = await operator.decided(await operator.deploy(target, allow_empty=True))
        assert empty.state is RolloutState.SUCCEEDED


@pytest.mark.asyncio
async def test_commands_are_signed_and_counted(new_fleet):
    async with new_fleet() as fleet:
        device = await fleet.device("a")
        operator = fleet.operator
        await operator.decided(await operator.deploy(await operator.publish("1.0.0")))
        path = f"/v1/devices/{device.id}/command"
        for verb in (CheckIn(), Restart(instance="hello")):
            await fleet.operator.send(operator_api.CommandReply, "POST", path, operator_api.CommandRequest(verb=verb))
        await device.until(lambda device: len(device.commands) == 2)
        first, second = [command.sequence for command in device.commands]
        assert second == first + 1
        assert first > 1_700_000_000, "the seconds of the clock: a restored database does not begin again"
        assert device.commands[1].verb == Restart(instance="hello")


@pytest.mark.asyncio
async def test_a_restart_of_what_does_not_run_there_is_refused(new_fleet):
    async with new_fleet() as fleet:
        device = await fleet.device("a")
        content = msgspec.json.encode(operator_api.CommandRequest(verb=Restart(instance="nosuch")))
        reply = await fleet.operator.http.request("POST", f"/v1/devices/{device.id}/command", content=content)
        assert reply.status_code == 404
        assert msgspec.json.decode(reply.content, type=operator_api.Problem).type == "unknown-instance"


@pytest.mark.asyncio
async def test_a_priority_that_no_database_holds_is_refused(new_fleet):
    async with new_fleet() as fleet:
        reply = await fleet.operator.http.request(
            "PUT", "/v1/groups/edge", content=b'{"priority": 99999999999999999999}'
        )
        assert reply.status_code == 400


@pytest.mark.asyncio
async def test_everything_that_is_done_is_written_down(new_fleet):
    async with new_fleet() as fleet:
        operator = fleet.operator
        device = await fleet.device("a")
        target = await operator.publish("1.0.0")
        view = await operator.decided(await operator.deploy(target))
        acts = [(entry.actor, entry.act) for entry in (await operator.get(operator_api.Audit, "/v1/audit")).entries]
        for act in [
            ("init", "create-fleet"), ("admin", "make-token"), (device.id, "enrol"), ("admin", "upload"),
            ("admin", "publish-role"), ("admin", "deploy"), ("server", "rollout-succeeded"),
        ]:  # fmt: skip
            assert act in acts
        timeline = await operator.get(operator_api.Timeline, f"/v1/devices/{device.id}/timeline")
        texts = [entry.text for entry in timeline.entries]
        assert texts[0] == "hello: main/hello@1.0.0 is committed"
        assert [entry.kind for entry in timeline.entries][-1] == "enrolled"
        assert timeline.entries[0].rollout == view.id
        metrics = (await operator.http.get("/metrics")).text
        assert "wasmfleet_devices_online 1" in metrics
        assert 'wasmfleet_rollouts{state="succeeded"} 1' in metrics


@pytest.mark.asyncio
async def test_a_long_poll_returns_with_the_next_revision_or_when_its_time_is_over(new_fleet):
    async with new_fleet() as fleet:
        operator = fleet.operator
        await fleet.enrol("away")
        target = await operator.publish("1.0.0")
        view = await operator.deploy(target)
        view = await operator.follow(view, lambda view: view.reason)
        assert view.state is RolloutState.RUNNING
        assert "away" in view.reason
        waiting = asyncio.create_task(
            operator.get(operator_api.RolloutView, f"/v1/rollouts/{view.id}", wait=30, since=view.revision)
        )
        await asyncio.sleep(0)
        await operator.send(operator_api.RolloutView, "POST", f"/v1/rollouts/{view.id}/pause")
        newer = await asyncio.wait_for(waiting, 60)
        assert newer.revision > view.revision
        same = await operator.get(operator_api.RolloutView, f"/v1/rollouts/{view.id}", wait=0, since=newer.revision)
        assert same.revision == newer.revision


@pytest.mark.parametrize(
    "struct",
    [
        operator_api.Status,
        operator_api.DeviceDetail,
        operator_api.RolloutView,
        operator_api.RolloutRequest,
        operator_api.Problem,
    ],
)
@pytest.mark.asyncio
async def test_the_openapi_document_describes_each_struct(new_fleet, struct):
    async with new_fleet() as fleet:
        document = (await fleet.operator.http.get("/openapi.json")).json()
        assert document["openapi"].startswith("3.1")
        schema = document["components"]["schemas"][struct.__name__]
        assert set(schema["properties"]) == set(struct.__struct_encode_fields__)
