"""`fleet data`: publishing a file as a data package, deploying it, listing."""

import json
from pathlib import Path

import pytest

from fleet.component import component_toml
from fleet.protocol import bounds, operator_api
from fleet.protocol.codes import Outcome, RolloutState
from fleet.protocol.manifest import BadManifestError
from fleet.protocol.operator_api import RolloutDevice, RolloutView, WaveView
from signing import repository

TOML = 'name = "reader"\ntrigger = "http"\n'


@pytest.fixture
def model(tmp_path):
    file = tmp_path / "model.bin"
    file.write_bytes(b"weights" * 1000)
    return file


def releases(desk):
    newest = max(
        (name for name in desk.files if name.endswith(".main.json")), key=lambda name: int(name.partition(".")[0])
    )
    return repository.releases(desk.files[newest])


def test_a_file_becomes_a_signed_target_of_kind_data(fleet, desk, model):
    result = fleet("data", "publish", model, "--name", "m", "--json")
    assert result.exit_code == 0, result.stderr
    said = json.loads(result.stdout)
    assert (said["target"], said["length"], said["new"]) == ("main/m@1.0.0", 7000, True)
    (release,) = releases(desk)
    assert release.manifest.is_data
    assert release.sha256 == said["sha256"]
    assert desk.artifacts[release.sha256] == model.read_bytes()


def test_without_a_version_it_is_the_next_whole_number_and_the_same_bytes_are_the_same_version(fleet, desk, model):
    assert fleet("data", "publish", model, "--name", "m", "--version", "2.5").exit_code == 0
    again = fleet("data", "publish", model, "--name", "m", "--quiet")
    assert again.stdout == "main/m@2.5.0\n"
    model.write_bytes(b"other weights")
    assert fleet("data", "publish", model, "--name", "m", "--quiet").stdout == "main/m@3.0.0\n"
    assert [str(each.name) for each in releases(desk)] == ["main/m@2.5.0", "main/m@3.0.0"]


def test_a_dry_run_says_what_it_would_be_and_sends_nothing(fleet, desk, model):
    result = fleet("data", "publish", model, "--dry-run", "--json")
    assert json.loads(result.stdout)["target"] == "main/model@1.0.0"
    assert json.loads(result.stdout)["new"]
    assert {method for method, *_ in desk.seen} == {"GET"}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--name", "No name"), "use 1 to 63"),
        (("--name", "m", "--version", "one"), "SemVer"),
    ],
)
def test_a_bad_name_or_version_is_refused_before_anything_is_sent(options, words, fleet, desk, model):
    result = fleet("data", "publish", model, *options)
    assert (result.exit_code, desk.seen) == (2, [])
    assert words in result.stderr


@pytest.mark.parametrize("length", [0, bounds.DATA_MAX_BYTES + 1], ids=["empty", "too large"])
def test_a_file_of_no_size_that_is_accepted_is_refused(length, fleet, desk, tmp_path):
    file = tmp_path / "model.bin"
    with file.open("wb") as opened:
        opened.truncate(length)
    result = fleet("data", "publish", file, "--name", "m")
    assert (result.exit_code, desk.seen) == (2, [])
    assert "model.bin is no data package" in result.stderr


def test_a_name_is_a_components_or_a_packages_and_not_both(fleet, desk, model):
    assert fleet("data", "publish", model, "--name", "hello").exit_code == 0
    component = Path(__file__).resolve().parents[3] / "components" / "demo" / "v1.wasm"
    result = fleet("publish", component, "--name", "hello", "--version", "1.0.0")
    assert result.exit_code == 2
    assert "hello is a data package" in result.stderr


def test_a_push_publishes_and_follows_an_ordinary_rollout(fleet, desk, model):
    desk.views = [
        RolloutView(
            id="r1",
            number=1,
            revision=1,
            state=RolloutState.SUCCEEDED,
            instance="m",
            target="components/main/m/1.0.0.wasm",
            group="edge-eu",
            waves=(WaveView(text="100%", devices=1, offered=True),),
            devices=(RolloutDevice(device="gate-00000000", wave=1, outcome=Outcome.SUCCEEDED, online=True),),
            created_at="2026-05-01T00:00:00Z",
        )
    ] * 9
    result = fleet("data", "push", model, "--name", "m", "--group", "edge-eu", "--waves", "100%")
    assert result.exit_code == 0, result.stderr
    asked = desk.sent("/v1/rollouts")
    assert (asked["instance"], asked["target"]) == ("m", "components/main/m/1.0.0.wasm")


def test_a_list_shows_data_alone(fleet, desk):
    rows = [
        operator_api.ComponentRow(
            target=f"components/main/{name}/1.0.0.wasm",
            namespace="main",
            name=name,
            version="1.0.0",
            length=7000,
            sha256="ab" * 32,
            kind=kind,
        )
        for name, kind in (("hello", "component"), ("m", "data"))
    ]
    desk.routes["GET", "/v1/components"] = operator_api.Components(components=tuple(rows))
    row = operator_api.DeviceRow(id="gate-00000000", name="gate", data={"m": "components/main/m/1.0.0.wasm"})
    desk.routes["GET", "/v1/devices"] = operator_api.Devices(devices=(row,))
    assert fleet("data", "list").stdout.splitlines()[1].split()[:4] == ["main/m@1.0.0", "6.8", "KiB", "1"]
    assert "hello" not in fleet("data", "list").stdout
    assert [each["name"] for each in json.loads(fleet("data", "list", "--json").stdout)["components"]] == ["m"]
    assert fleet("data", "list", "other").exit_code == 4


# component.toml


def test_component_toml_names_packages_with_path_and_range_and_reads_back_what_it_writes():
    manifest = component_toml.load(
        TOML + '[data.m]\npath = "/data/m"\nversion = ">=2"\n[data.map]\npath = "/maps/eu.bin"\n'
    )
    assert (manifest.data["m"].path, manifest.data["m"].version) == ("/data/m", ">=2")
    assert manifest.data["map"].version == "*"
    assert component_toml.load(component_toml.render(manifest)) == manifest


def test_a_manifest_without_data_has_the_digest_that_it_had():
    assert "data" not in component_toml.load(TOML).plain()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[data.m]\n", "data.m.path"),
        ('[data.m]\npath = "m"\n', "data.m.path"),
        ('[data.m]\npath = "/data/../etc"\n', "data.m.path"),
        ('[data.m]\npath = "/m"\nversion = "two"\n', "data.m.version"),
        ('[data.m]\npath = "/m"\nmode = "rw"\n', "data.m.mode"),
        ('[data.m]\npath = "/data"\n', "a directory of the component is at /data"),
        ('[data.m]\npath = "/x"\n[data.n]\npath = "/x"\n', "another package is at /x"),
        ('[data.m]\npath = "/x"\n[data.n]\npath = "/x/y"\n', "a directory of the component is at /x"),
        ('[data.m]\npath = "/x"\n[grants.directories]\n"/x" = "maps"\n', "a directory of the component is at /x"),
        ('[data.m]\npath = "/x"\n[grants.directories]\n"/x/y" = "maps"\n', "a directory of the component is at /x"),
        ('[data.m]\npath = "/x/y"\n[grants.directories]\n"/x" = "maps"\n', "granted at /x would be hidden"),
        ('[data."M m"]\npath = "/m"\n', "data package 'M m'"),
        ("".join(f'[data.m{n}]\npath = "/m{n}"\n' for n in range(9)), "9 packages, at most 8"),
    ],
)
def test_a_package_that_cannot_be_mounted_is_refused_by_its_field(text, words):
    with pytest.raises(BadManifestError, match=r"component\.toml") as refused:
        component_toml.load(TOML + text)
    assert words in str(refused.value)
