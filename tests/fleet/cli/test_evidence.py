"""`publish --sbom --provenance`, `sbom show`, `affected`: bound under the publisher's signature."""

import hashlib
import json
import lzma
import shutil
from pathlib import Path

import pytest

from fleet.cli import output
from fleet.component import preview1
from fleet.protocol import operator_api
from fleet.protocol.codes import InstanceState
from fleet.protocol.messages import InstanceHealth
from fleet.protocol.names import TargetName

DEMO = Path(__file__).resolve().parents[3] / "components" / "demo"
SERDE = {"type": "library", "name": "serde", "version": "1.0.199", "purl": "pkg:cargo/serde@1.0.199"}
BUILDER = "https://example.com/builder"


@pytest.fixture
def component(tmp_path) -> Path:
    return shutil.copy(DEMO / "v1.wasm", tmp_path / "hello.wasm")


@pytest.fixture
def bill(tmp_path) -> Path:
    return write(tmp_path / "hello.cdx.json", {"bomFormat": "CycloneDX", "specVersion": "1.6", "components": [SERDE]})


@pytest.fixture
def built(tmp_path, component) -> Path:
    return write(tmp_path / "hello.intoto.json", statement(component.read_bytes()))


def write(path: Path, value: object) -> Path:
    path.write_text(json.dumps(value))
    return path


def statement(data: bytes) -> dict[str, object]:
    return {
        "_type": "https://in-toto.io/Statement/v1",
        "subject": [{"name": "hello.wasm", "digest": {"sha256": hashlib.sha256(data).hexdigest()}}],
        "predicateType": "https://slsa.dev/provenance/v1",
        "predicate": {
            "buildDefinition": {"buildType": "https://example.com/build", "externalParameters": {}},
            "runDetails": {"builder": {"id": BUILDER}},
        },
    }


def running(target: str, device: str = "gate-00000000", **more: object) -> operator_api.DeviceRow:
    instance = InstanceHealth(instance="hello", target=target, generation=1, state=InstanceState.RUNNING)
    return operator_api.DeviceRow(id=device, name=device, online=True, instances=(instance,), **more)


def stage(desk, *rows: operator_api.DeviceRow, settled: tuple[operator_api.Settled, ...] = ()) -> None:
    desk.routes[("GET", "/v1/devices")] = operator_api.Devices(devices=rows)
    desk.routes[("GET", "/v1/groups")] = operator_api.Groups(
        groups=(operator_api.GroupRow(name="edge-eu", settled=settled),)
    )
    desk.routes[("GET", "/v1/rollouts")] = operator_api.Rollouts()


def published(fleet, *arguments: object) -> str:
    result = fleet("publish", *arguments, "--json")
    assert result.exit_code == 0, result.output
    return TargetName.parse(json.loads(result.stdout)["target"], namespace="").path


def test_what_is_bound_is_signed_uploaded_and_shown(fleet, desk, component, bill, built, tmp_path) -> None:
    result = fleet("publish", component, "--version", "1.0.0", "--sbom", bill, "--provenance", built)
    assert result.exit_code == 0, result.output
    assert f"SBOM of 1 packages, provenance by {BUILDER}" in result.stdout
    for file in (component, bill, built):
        assert desk.artifacts[hashlib.sha256(file.read_bytes()).hexdigest()] == file.read_bytes()
    role = json.loads(desk.files["2.main.json"])
    (target,) = role["signed"]["targets"].values()
    assert [each["kind"] for each in target["custom"]["evidence"]] == ["cyclonedx", "slsa-provenance"]

    shown = fleet("sbom", "show", "hello@1.0.0", "--save", tmp_path / "again.json")
    assert shown.exit_code == 0, shown.output
    assert "serde 1.0.199 (cargo)" in shown.stdout
    assert BUILDER in shown.stdout
    assert (tmp_path / "again.json").read_bytes() == bill.read_bytes()
    facts = json.loads(fleet("sbom", "show", "hello@1.0.0", "--json").stdout)
    assert facts["packages"] == [{"name": "serde", "version": "1.0.199", "type": "cargo", "namespace": ""}]


def test_a_version_keeps_what_was_bound_to_it(fleet, desk, component, bill, tmp_path) -> None:
    first = published(fleet, component, "--version", "1.0.0", "--sbom", bill)
    # without it nothing is taken back: the same bytes and manifest are published already
    assert published(fleet, component, "--version", "1.0.0") == first
    other = write(tmp_path / "other.json", {"bomFormat": "CycloneDX", "specVersion": "1.5", "components": []})
    refused = fleet("publish", component, "--version", "1.0.0", "--sbom", other)
    assert refused.exit_code == 2
    assert "another SBOM or provenance" in refused.stderr


def test_a_development_version_with_another_sbom_is_the_next_one(fleet, desk, component, bill) -> None:
    first = published(fleet, component)
    second = published(fleet, component, "--sbom", bill)
    assert (first, second) == tuple(f"components/main/hello/0.0.0-dev.{n}.wasm" for n in (1, 2))
    assert published(fleet, component) == second


@pytest.mark.parametrize(
    ("option", "value", "words"),
    [
        ("--sbom", "", "bad.json is empty"),
        ("--sbom", "<bom/>", "bad.json is XML"),
        ("--sbom", {"_type": "x", "predicateType": "y"}, "give it as --provenance"),
        (
            "--sbom",
            {
                "bomFormat": "CycloneDX",
                "specVersion": "1.6",
                "metadata": {"component": {"hashes": [{"alg": "SHA-256", "content": "00" * 32}]}},
            },
            "is the SBOM of other bytes",
        ),
        ("--provenance", {"bomFormat": "CycloneDX"}, "give it as --sbom"),
        ("--provenance", statement(b"another build"), "is the provenance of other bytes"),
    ],
)
def test_what_is_not_what_it_is_given_as_stops_before_anything_is_sent(
    option, value, words, fleet, desk, component, tmp_path
) -> None:
    bad = tmp_path / "bad.json"
    bad.write_text(value if isinstance(value, str) else json.dumps(value))
    for verb in (("publish", component), ("push", component, "--group", "edge-eu")):
        result = fleet(*verb, option, bad)
        assert result.exit_code == 2
        assert words in result.stderr
        assert len(result.stderr.splitlines()) == 1
    assert desk.seen == []


def test_a_file_that_is_not_there(fleet, desk, component, tmp_path) -> None:
    result = fleet("publish", component, "--sbom", tmp_path / "none.json")
    assert (result.exit_code, desk.seen) == (2, [])
    assert "none.json does not exist" in result.stderr


def test_devices_that_run_a_package_are_listed_and_what_is_not_known_is_named(fleet, desk, component, bill) -> None:
    told = published(fleet, component, "--version", "1.0.0", "--sbom", bill)
    silent = published(fleet, component, "--version", "1.1.0")
    settled = (operator_api.Settled(instance="hello", target=told, since="2026-05-01T00:00:00Z"),)
    stage(
        desk,
        running(told),
        running(silent, "gate-11111111"),
        running("components/x/y/1.0.0.wasm", "gate-2"),
        settled=settled,
    )

    result = fleet("affected", "serde<1.0.200")
    assert result.exit_code == 1
    hits, _, unknown = result.stdout.partition("Packages unknown")
    assert [line.split()[0] for line in hits.splitlines()[1:] if line] == ["gate-00000000", "group"]
    assert "gate-11111111" in unknown
    assert "no SBOM" in unknown
    assert "nobody has published it" in unknown

    facts = json.loads(fleet("affected", "serde<1.0.200", "--json").stdout)
    assert facts["devices"] == ["gate-00000000"]
    assert facts["targets"] == [output.target(told)]
    assert {each["target"] for each in facts["unknown"]} == {output.target(silent), "x/y@1.0.0"}


def test_the_exit_code_is_for_a_cron_job(fleet, desk, component, bill) -> None:
    told = published(fleet, component, "--version", "1.0.0", "--sbom", bill)
    stage(desk, running(told))
    assert fleet("affected", "serde<1.0.100").exit_code == 0
    assert fleet("affected", "serde<=1.0.199").exit_code == 1
    assert fleet("affected", "left-pad", "--strict").exit_code == 0
    silent = published(fleet, component, "--version", "1.1.0")
    stage(desk, running(silent))
    assert fleet("affected", "left-pad").exit_code == 0
    assert fleet("affected", "left-pad", "--strict").exit_code == 1
    assert fleet("affected", "left<").exit_code == 2


def test_a_device_that_was_shut_out_does_not_count(fleet, desk, component, bill) -> None:
    told = published(fleet, component, "--version", "1.0.0", "--sbom", bill)
    stage(desk, running(told, revoked=True))
    assert fleet("affected", "serde").exit_code == 0


def test_what_is_published_and_runs_nowhere_is_listed_when_asked_for(fleet, desk, component, bill) -> None:
    told = published(fleet, component, "--version", "1.0.0", "--sbom", bill)
    stage(desk)
    sha256 = hashlib.sha256(component.read_bytes()).hexdigest()
    row = operator_api.ComponentRow(
        target=told, namespace="main", name="hello", version="1.0.0", length=1, sha256=sha256
    )
    desk.routes[("GET", "/v1/components")] = operator_api.Components(components=(row,))
    result = fleet("affected", "serde", "--published")
    assert result.exit_code == 0, "nothing in use is affected"
    assert "main/hello@1.0.0" in result.stdout


def test_a_server_cannot_hide_a_package_by_showing_another_bill(fleet, desk, component, bill) -> None:
    told = published(fleet, component, "--version", "1.0.0", "--sbom", bill)
    clean = json.dumps({"bomFormat": "CycloneDX", "specVersion": "1.6", "components": []}).encode()
    desk.artifacts[hashlib.sha256(bill.read_bytes()).hexdigest()] = clean
    stage(desk, running(told))
    result = fleet("affected", "serde", "--strict")
    assert result.exit_code == 1
    assert "the server sent other bytes than were signed" in result.stdout


def test_a_withdrawn_release_that_still_runs_counts(fleet, desk, component, bill) -> None:
    told = published(fleet, component, "--version", "1.0.0", "--sbom", bill)
    stage(desk, running(told))
    desk.routes["GET", "/v1/withdrawal"] = operator_api.WithdrawalView(target=told)
    assert fleet("withdraw", "hello@1.0.0", "--yes").exit_code == 0
    assert fleet("affected", "serde").exit_code == 1


def test_evidence_of_a_command_is_about_the_component_that_compose_writes(tmp_path, fleet, desk):
    module = lzma.decompress((DEMO.with_name("preview1") / "probe1.wasm.xz").read_bytes())
    (job := tmp_path / "job.wasm").write_bytes(module)
    evidence = write(tmp_path / "job.intoto.json", statement(module))
    refused = fleet("publish", job, "--version", "1.0.0", "--provenance", evidence)
    assert refused.exit_code != 0
    assert "job.wasm as 'fleet component compose' writes it is sha256" in " ".join(refused.output.split())
    write(evidence, statement(preview1.adapted(module)))
    done = fleet("publish", job, "--version", "1.0.0", "--provenance", evidence)
    assert done.exit_code == 0, done.output
