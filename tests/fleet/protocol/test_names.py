"""What may be called what."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fleet.protocol import names
from fleet.protocol.names import BadNameError, TargetName


@pytest.mark.parametrize("label", ["a", "edge-eu", "0", "x" * 63])
def test_labels(label):
    assert names.check_label(label, "group") == label


@pytest.mark.parametrize("label", ["", "x" * 64, "Edge", "a_b", "a/b", "..", "a b", "ä", "a\n"])
def test_what_is_no_label_says_which_rule(label):
    with pytest.raises(BadNameError, match=r"group .* is not a name: use 1 to 63 of a-z"):
        names.check_label(label, "group")


@pytest.mark.parametrize("version", ["0.0.0", "1.2.3", "1.0.0-rc.1", "0.0.0-dev.7", "1.0.0+build.5"])
def test_versions(version):
    assert TargetName.from_path(TargetName("main", "hello", version).path).version == version


@pytest.mark.parametrize("version", ["", "1", "1.2", "01.2.3", "1.2.3-", "1.2.3-01", "v1.2.3", "1.2.3/../x", "1." * 40])
def test_what_is_no_semver(version):
    with pytest.raises(BadNameError, match="not SemVer"):
        names.check_version(version)


def test_precedence_is_semvers():
    # Semantic Versioning 2.0.0, section 11
    rising = [
        "1.0.0-alpha",
        "1.0.0-alpha.1",
        "1.0.0-alpha.beta",
        "1.0.0-beta",
        "1.0.0-beta.2",
        "1.0.0-beta.11",
        "1.0.0-rc.1",
        "1.0.0",
        "1.0.1",
        "1.1.0",
        "2.0.0",
        "10.0.0",
    ]
    falling = rising[::-1]
    assert sorted(falling, key=names.version_key) == rising


@pytest.mark.parametrize(
    "path",
    [
        "components/main/hello.wasm",
        "other/main/hello/1.0.0.wasm",
        "components/main/hello/1.0.0",
        "components/../hello/1.0.0.wasm",
        "components/main/hello/x/1.0.0.wasm",
    ],
)
def test_what_is_no_target_path(path):
    with pytest.raises(BadNameError):
        TargetName.from_path(path)


def test_people_write_targets_short():
    assert TargetName.parse("hello@1.0.0", namespace="main") == TargetName("main", "hello", "1.0.0")
    assert TargetName.parse("ops/hello@1.0.0", namespace="main").component == "ops/hello"
    with pytest.raises(BadNameError, match="names no version: write NAME@VERSION"):
        TargetName.parse("hello", namespace="main")


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("components/main/hello/1.0.0.wasm is not published", "main/hello@1.0.0 is not published"),
        ("'components/a/b/1.0.0-rc.1+x.wasm', components/c/d/2.0.0.wasm", "'a/b@1.0.0-rc.1+x', c/d@2.0.0"),
        ("components/main/hello.wasm", "components/main/hello.wasm"),
        ("./my-components/x/hello/1.0.0.wasm/y", "./my-components/x/hello/1.0.0.wasm/y"),
        ("a/components/x/hello/1.0.0.wasm", "a/components/x/hello/1.0.0.wasm"),
        ("nothing", "nothing"),
    ],
)
def test_texts_name_targets_as_people_do(text, shown):
    assert names.readable(text) == shown


@given(st.binary(min_size=1, max_size=200))
def test_a_devices_id_names_its_key(key):
    device = names.device_id("kitchen", key)
    assert names.check_device(device) == device
    assert len(names.shard(device)) == 2
