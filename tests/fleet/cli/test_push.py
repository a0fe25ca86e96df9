"""`fleet push`, `publish`, `deploy`: what is refused before anything is signed, what is signed, what is offered."""

import json
import shutil
from datetime import UTC, datetime
from pathlib import Path

import msgspec
import pytest
from wasmtime import wat2wasm

from fleet.protocol.codes import Outcome, RolloutState
from fleet.protocol.operator_api import RolloutDevice, RolloutView, WaveView
from signing import keys, repository

DEMO = Path(__file__).resolve().parents[3] / "components" / "demo"
CORE_MODULE = b"\0asm\1\0\0\0"


def rollout(state: RolloutState, outcome: Outcome = Outcome.SUCCEEDED, **more: object) -> RolloutView:
    return RolloutView(
        id="r1",
        number=1,
        revision=1,
        state=state,
        instance="hello",
        target="components/main/hello/1.0.0.wasm",
        group="edge-eu",
        waves=(WaveView(text="100%", devices=1, offered=True),),
        devices=(RolloutDevice(device="gate-00000000", wave=1, outcome=outcome, online=True),),
        created_at=datetime(2026, 5, 1, tzinfo=UTC),
        **more,
    )


@pytest.fixture
def done(desk):
    """A desk on which every rollout has succeeded at once."""
    desk.views = [rollout(RolloutState.SUCCEEDED)] * 9
    return desk


def component(directory: Path, name: str = "hello.wasm", source: str = "v1.wasm", toml: str | None = None) -> Path:
    file = directory / name
    shutil.copy(DEMO / source, file)
    if toml is not None:
        (directory / "component.toml").write_text(toml)
    return file


# -- bad input: one line, nothing sent ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "empty"),
        (b"hello, world", "not WebAssembly"),
        (CORE_MODULE, "component"),
        ((DEMO / "v1.wasm").read_bytes()[:900], "damaged"),
        ((DEMO / "v1.wasm").read_bytes()[:5], "copy it again"),
        (b"\x7fELF\2\1\1", "native program"),
        (b"(component)", "wasm-tools parse"),
        (bytes(wat2wasm('(component (import "wasi:http/types@0.3.0" (instance)))')), "built for WASI 0.3"),
    ],
    ids=["empty", "random", "core module", "truncated", "stub", "native", "text", "WASI 0.3"],
)
def test_a_file_that_is_no_component_is_refused_by_name(data, words, tmp_path, fleet, desk):
    file = tmp_path / "bad.wasm"
    file.write_bytes(data)
    result = fleet("push", file, "--group", "edge-eu")
    assert result.exit_code == 2
    assert words in result.stderr
    assert "bad" in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert desk.seen == []


def test_a_file_that_is_not_there(tmp_path, fleet, desk):
    result = fleet("push", tmp_path / "none.wasm", "--group", "edge-eu")
    assert (result.exit_code, desk.seen) == (2, [])
    assert "none.wasm does not exist" in result.stderr


def test_an_import_that_nobody_granted_is_named_and_the_manifest_to_save_works(tmp_path, fleet, done):
    file = component(
        tmp_path, "ticker.wasm", "ticker.wasm", 'trigger = { type = "schedule", every = "2s" }\nversion = "1.0.0"\n'
    )
    result = fleet("push", file, "--group", "edge-eu")
    assert result.exit_code == 2
    assert "wasi:logging/logging" in result.stderr
    assert done.seen == []
    # What it prints can be saved as it stands, and then the push goes through.
    first, _, suggested = result.stdout.partition("\n")
    assert first == f"# save this as {tmp_path / 'component.toml'}"
    (tmp_path / "component.toml").write_text(suggested)
    assert fleet("push", file, "--group", "edge-eu").exit_code == 0


@pytest.mark.parametrize(
    ("toml", "words"),
    [
        ('nmae = "hello"', "nmae"),
        ("name = 7", "name"),
        ("[limits]\nmemory = 16", "limits.memory"),
        ("[grants]\ninterface = []", "grants.interface"),
        ("name = ", "component.toml"),
        ('version = "one"', "version"),
    ],
)
def test_a_manifest_that_is_wrong_names_the_field_and_the_file(toml, words, tmp_path, fleet, desk):
    result = fleet("push", component(tmp_path, toml=toml), "--group", "edge-eu")
    assert (result.exit_code, desk.seen) == (2, [])
    assert words in result.stderr
    assert str(tmp_path / "component.toml") in result.stderr


def test_a_configuration_key_that_the_manifest_does_not_have(tmp_path, fleet, desk):
    result = fleet("push", component(tmp_path), "--group", "edge-eu", "--config", "level=debug")
    assert (result.exit_code, desk.seen) == (2, [])
    assert "no configuration key 'level'" in result.stderr


def test_a_value_that_the_manifest_does_not_allow_is_not_even_signed(tmp_path, fleet, desk):
    toml = "[config.retries]\ndescription = '1 to 9'\ntype = 'integer'\nmin = 1\nmax = 9\ndefault = '3'"
    result = fleet("push", component(tmp_path, toml=toml), "--group", "edge-eu", "--config", "retries=10")
    assert (result.exit_code, desk.seen) == (2, [])
    assert result.stderr == "error: --config retries=10 is not allowed; it is more than 9; 1 to 9\n"


@pytest.mark.parametrize(
    "option",
    [
        ("--waves", "0"),
        ("--waves", "banana"),
        ("--waves", "1"),
        ("--soak", "-1"),
        ("--failures", "-1"),
        ("--timeout", "0"),
        ("--timeout", "9" * 12),
        ("--soak", "9" * 12),
        ("--seed", "9" * 20),
        ("--at-once", "9" * 20),
        ("--min-success", "200%"),
        ("--max-lost", "x"),
        ("--catch-up", "-1"),
        ("--at", "yesterday"),
        ("--at", "0001-01-01T00:00+23:00"),
    ],
)
def test_a_rollout_that_cannot_be_meant_publishes_nothing(option, tmp_path, fleet, desk):
    result = fleet("push", component(tmp_path), "--group", "edge-eu", *option)
    assert (result.exit_code, desk.seen) == (2, [])
    assert len(result.stderr.splitlines()) == 1
    assert option[0].removeprefix("--").removesuffix("s") in result.stderr
    assert "%Y" not in result.stderr


@pytest.mark.parametrize("at", ["2026-12-01T02:00", "2026-12-01T02:00:00Z", "2026-12-01T03:00+01:00"])
def test_a_rollout_begins_at_a_time_in_utc_or_with_a_zone(at, tmp_path, fleet, done):
    fleet("push", component(tmp_path), "--group", "edge-eu", "--at", at, "--detach")
    assert done.sent("/v1/rollouts")["starts_at"] == "2026-12-01T02:00:00Z"


# -- publishing ---------------------------------------------------------------------------------------------------


def test_a_push_signs_uploads_and_offers_and_its_exit_code_is_the_rollouts(tmp_path, fleet, done):
    file = component(tmp_path, toml='name = "hello"\nversion = "1.0.0"\n')
    result = fleet("push", file, "--group", "edge-eu", "--waves", "1, 100%", "--as", "blue", "--port", "8081")
    assert result.exit_code == 0, result.output
    # the artifact went up before the role that names it, and only then was it offered
    assert [path.split("/")[2] for verb, path, _ in done.seen if verb != "GET"] == ["artifacts", "roles", "rollouts"]
    release = repository.releases(repository.latest(done.files, "main")[1])[0]
    assert str(release.name) == "main/hello@1.0.0"
    assert done.artifacts[release.sha256] == file.read_bytes()
    asked = done.sent("/v1/rollouts")
    assert asked["target"] == "components/main/hello/1.0.0.wasm"
    assert (asked["instance"], asked["group"], asked["waves"], asked["port"]) == ("blue", "edge-eu", "1, 100%", 8081)
    assert "Published main/hello@1.0.0" in result.stdout


def test_the_same_again_publishes_nothing_and_deploys(tmp_path, fleet, done):
    file = component(tmp_path, toml='version = "1.0.0"\n')
    assert fleet("push", file, "--group", "edge-eu").exit_code == 0
    done.seen.clear()
    result = fleet("push", file, "--group", "edge-us")
    assert result.exit_code == 0
    assert "is published already" in result.stdout
    assert (done.paths("PUT"), done.paths("POST")) == ([], ["/v1/rollouts"])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda file: shutil.copy(DEMO / "v2.wasm", file), "other bytes"),
        (
            lambda file: (file.parent / "component.toml").write_text('version = "1.0.0"\ndescription = "x"\n'),
            "another manifest",
        ),
    ],
)
def test_the_same_version_with_other_content_is_refused(change, words, tmp_path, fleet, done):
    file = component(tmp_path, toml='version = "1.0.0"\n')
    assert fleet("publish", file).exit_code == 0
    change(file)
    done.seen.clear()
    result = fleet("publish", file)
    assert result.exit_code == 2
    assert f"main/hello@1.0.0 exists with {words}" in result.stderr
    assert (done.paths("PUT"), done.paths("POST")) == ([], [])


def test_without_a_version_development_counts_up_and_unchanged_bytes_keep_theirs(tmp_path, fleet, done):
    file = component(tmp_path)
    versions = []
    for source in ("v1.wasm", "v1.wasm", "v2.wasm", "v1.wasm"):
        shutil.copy(DEMO / source, file)
        result = fleet("publish", file, "--json")
        versions.append(json.loads(result.stdout)["target"].rpartition("@")[2])
    assert versions == ["0.0.0-dev.1", "0.0.0-dev.1", "0.0.0-dev.2", "0.0.0-dev.3"]


def test_whoever_loses_the_race_verifies_and_signs_again(tmp_path, fleet, done, home):
    # Somebody else, with the same key, publishes another component between our look and our upload.
    other = component(tmp_path, "other.wasm")
    mine = component(tmp_path, "mine.wasm")

    def race() -> None:
        done.before_role = lambda: None
        version, role = repository.latest(done.files, "main")
        from fleet.cli.publish import prepare
        from fleet.protocol.names import TargetName

        theirs = prepare(other, version="9.9.9")
        signed = repository.add_target(
            role,
            name=TargetName("main", "other", "9.9.9"),
            length=len(theirs.data),
            sha256=theirs.sha256,
            manifest=theirs.manifest,
            signer=keys.load(home / "operator/keys/main.pem"),
            now=datetime.now(UTC),
        )
        assert done.accept("main", signed) == version + 1

    done.before_role = race
    result = fleet("publish", mine, "--version", "1.0.0")
    assert result.exit_code == 0
    assert "Someone else published in between" in result.stderr
    published = {str(each.name) for each in repository.releases(repository.latest(done.files, "main")[1])}
    assert published == {"main/mine@1.0.0", "main/other@9.9.9"}
    # the bytes went up once
    assert len(done.paths("PUT")) == 1


def test_a_server_that_shows_an_older_repository_gets_no_signature(tmp_path, fleet, done):
    before = dict(done.files)
    assert fleet("publish", component(tmp_path), "--version", "1.0.0").exit_code == 0
    done.files = before
    done.seen.clear()
    result = fleet("publish", component(tmp_path), "--version", "1.0.1")
    assert result.exit_code == 4
    assert "does not verify" in result.stderr
    assert (done.paths("PUT"), done.paths("POST")) == ([], [])


def test_a_key_that_others_can_read_signs_nothing(tmp_path, fleet, done, home):
    (home / "operator/keys/main.pem").chmod(0o644)
    result = fleet("publish", component(tmp_path))
    assert result.exit_code == 2
    assert "chmod 600" in result.stderr
    assert done.paths("PUT") == []


@pytest.mark.parametrize("size", ["solo"])
def test_in_production_a_version_is_asked_for_and_the_key_needs_its_passphrase(
    size, tmp_path, fleet, done, monkeypatch
):
    file = component(tmp_path)
    result = fleet("publish", file)
    assert result.exit_code == 2
    assert "hello.wasm has no version; this fleet is in production; add --version 1.0.0" in result.stderr
    assert fleet("publish", file, "--version", "1.0.0").exit_code == 0
    monkeypatch.setenv("WASMFLEET_KEY_PASSPHRASE", "not the right one")
    result = fleet("publish", file, "--version", "1.0.1")
    assert result.exit_code == 2
    assert "passphrase" in result.stderr


@pytest.mark.parametrize(
    ("group", "words"), [("egde-eu", "did you mean edge-eu?"), ("canary", "there are edge-eu, edge-us")]
)
def test_nothing_is_published_for_a_group_that_does_not_exist(group, words, tmp_path, fleet, done):
    result = fleet("push", component(tmp_path), "--group", group)
    assert result.exit_code == 4
    assert words in result.stderr
    assert (done.paths("PUT"), done.paths("POST")) == ([], [])


# -- deploying -----------------------------------------------------------------------------------------------------


def test_deploy_offers_what_was_published_elsewhere(fleet, done):
    result = fleet("deploy", "acme/hello@1.4.0", "--group", "edge-eu", "--soak", "300", "--config", "a=1", "--detach")
    assert result.exit_code == 0
    asked = done.sent("/v1/rollouts")
    assert asked["target"] == "components/acme/hello/1.4.0.wasm"
    assert (asked["soak_s"], asked["config"], asked["instance"]) == (300, {"a": "1"}, "hello")


def test_deploying_to_a_device_pins_it(fleet, desk):
    desk.routes["PUT", "/v1/devices/gate-00000000/pin"] = rollout(RolloutState.SUCCEEDED)
    assert fleet("deploy", "hello@1.4.0", "--device", "gate-00000000").exit_code == 0
    assert desk.sent("/v1/devices/gate-00000000/pin")["waves"] == "100%"


def test_json_of_a_push_is_the_decided_rollout(tmp_path, fleet, done):
    result = fleet("push", component(tmp_path), "--group", "edge-eu", "--json")
    assert result.exit_code == 0
    assert msgspec.json.decode(result.stdout, type=RolloutView).state is RolloutState.SUCCEEDED
