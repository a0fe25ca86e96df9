"""A manifest's form is signed and hashed: what is added to it must not change what was signed before."""

import re

import msgspec
import pytest

from fleet.protocol import manifest
from fleet.protocol.manifest import BadManifestError, Grants, Http, Limits, Manifest, SecretKey

HELLO = Manifest(name="hello", version="1.0.0", trigger=manifest.Http())
EVERYTHING = Manifest(
    name="hello",
    version="1.0.0",
    trigger=manifest.Schedule(every_ms=1000),
    grants=Grants(interfaces=("wasi:clocks",), outbound=("https://api.example.com:443",)),
    config={"greeting": manifest.ConfigKey(default="hello")},
    secrets={"key": SecretKey()},
    arch=("aarch64",),
)


@pytest.mark.parametrize(
    ("made", "digest"),
    [
        (HELLO, "fdb5d77880eb78725a7082968a0d284557bd55d37856414f24754c57ada18d80"),
        (EVERYTHING, "8601888a2566735e3f8188cbf470d4e0d91dc95847221ae5fa72d5ea531c2e41"),
    ],
)
def test_the_digest_of_a_manifest_is_for_good(made: Manifest, digest: str):
    """Fails for a new field that is not in `LATER`, and for a default that was changed: devices would refuse both."""
    assert made.digest() == digest


@pytest.mark.parametrize(
    ("later", "used"),
    [
        ("limits.fuel", {"limits": Limits(fuel=7)}),
        ("grants.instances", {"grants": Grants(instances=("sibling",))}),
        ("arch", {"arch": ("aarch64",)}),
        ("secrets", {"secrets": {"key": SecretKey()}}),
    ],
)
def test_a_later_field_is_left_out_where_it_is_not_used(monkeypatch, later, used):
    within, _, name = later.rpartition(".")
    monkeypatch.setattr(manifest, "LATER", (later,))

    def place(made: Manifest):
        plain = made.plain()
        return plain[within] if within else plain

    assert name not in place(HELLO)
    assert manifest.convert(HELLO.plain()) == HELLO
    using = msgspec.structs.replace(HELLO, **used)
    assert name in place(using)
    assert manifest.convert(using.plain()) == using
    assert using.digest() != HELLO.digest()


def test_a_device_of_before_reads_what_does_not_use_a_later_field_and_refuses_what_does():
    """The form of before: the same without `secrets`."""
    before = msgspec.defstruct(
        "Manifest",
        [
            (each.name, each.type, field_default(each))
            for each in msgspec.structs.fields(Manifest)
            if each.name not in manifest.LATER
        ],
        frozen=True,
        forbid_unknown_fields=True,
        kw_only=True,
    )
    assert msgspec.convert(HELLO.plain(), before).name == "hello"
    with pytest.raises(msgspec.ValidationError, match="unknown field `secrets`"):
        msgspec.convert(EVERYTHING.plain(), before)


def field_default(field: msgspec.structs.FieldInfo) -> object:
    if field.default_factory is not msgspec.NODEFAULT:
        return msgspec.field(default_factory=field.default_factory)
    return msgspec.field(default=field.default)


def test_a_later_field_written_out_at_its_default_hashes_the_same():
    wordy = manifest.convert(HELLO.plain() | {"secrets": {}})
    assert wordy == HELLO
    assert wordy.digest() == HELLO.digest()
    with pytest.raises(BadManifestError, match="unknown field"):
        manifest.convert(HELLO.plain() | {"of_tomorrow": 1})


def test_a_device_of_before_reads_a_manifest_with_one_trigger():
    assert "more_triggers" not in HELLO.plain()
    several = msgspec.structs.replace(HELLO, more_triggers=(manifest.Schedule(every_ms=1000),))
    assert list(several.plain()["more_triggers"]) == [{"type": "schedule", "every_ms": 1000, "cron": None}]
    assert several.digest() == "07c775ec9e4d963b9216612dc8c4e215aa7f21abb63dd0a4d4d2cca331f02f04"
    assert manifest.convert(several.plain()) == several


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ([{"type": "http"}], "there twice"),
        ([{"type": "service"}], "a service runs without end"),
        ([{"type": "schedule", "every_ms": number} for number in range(100, 108)], "9 triggers, at most 8"),
    ],
)
def test_signed_triggers_that_do_not_go_together_are_no_manifest(more, words):
    with pytest.raises(BadManifestError, match=f"triggers: .*{words}"):
        manifest.convert(HELLO.plain() | {"more_triggers": more})


KEYS = {
    "integer": manifest.ConfigKey(type="integer", min=-2, max=10),
    "number": manifest.ConfigKey(type="number", min=0, max=1),
    "boolean": manifest.ConfigKey(type="boolean"),
    "text": manifest.ConfigKey(min=2, max=3),
    "enum": manifest.ConfigKey(type="integer", enum=("1", "5")),
    "pattern": manifest.ConfigKey(pattern="[a-z]{2}[0-9]+", max=5),
    "any": manifest.ConfigKey(),
}


@pytest.mark.parametrize(
    ("key", "allowed", "refused"),
    [
        ("integer", ["-2", "0", "10"], ["-3", "11", "", "1.0", "01", "+1", " 1", "1\n", "1e1", "٣", "0x1", "9" * 17]),
        ("number", ["0", "1", "0.5", "1.000"], ["1.01", "-0.1", ".5", "1.", "nan", "inf", "1e-1", "1,5", "0.5\n"]),
        ("boolean", ["true", "false"], ["True", "1", "", "yes", "true\n"]),
        ("text", ["ab", "äöü"], ["a", "abcd", ""]),
        ("enum", ["1", "5"], ["2", "01", ""]),
        ("pattern", ["ab1", "zz123"], ["ab", "ab1\n", "ab1234", "", "AB1"]),
        ("any", ["", "x", "1\n2"], []),
    ],
)
def test_a_value_is_one_of_its_key_or_told_why_not(key, allowed, refused):
    assert [KEYS[key].flaw(each) for each in allowed] == [""] * len(allowed)
    assert all(KEYS[key].flaw(each) for each in refused)


def test_a_pattern_that_cannot_be_meant_is_no_manifest():
    for declared, words in (
        ({"pattern": "(a"}, "pattern: column 1: this ( is never closed"),
        ({"pattern": "a", "type": "integer"}, "pattern is for texts"),
        ({"pattern": "a", "default": "b"}, "default: 'b' is not of the pattern a"),
        ({"pattern": "a", "enum": ["a", "b"]}, "enum: 'b' is not of the pattern a"),
    ):
        with pytest.raises(BadManifestError, match=re.escape(words)):
            manifest.convert(HELLO.plain() | {"config": {"x": declared}})


def test_a_whole_number_is_one_that_every_reader_takes():
    assert manifest.ConfigKey(type="integer").flaw(str(2**53)) == ""
    assert manifest.ConfigKey(type="integer").flaw(str(2**53 + 1)) == "beyond 2^53"


def test_a_typed_key_is_signed_with_its_type_and_an_untyped_one_as_before():
    typed = msgspec.structs.replace(HELLO, config={"every": KEYS["integer"], "plain": manifest.ConfigKey(default="x")})
    assert typed.plain()["config"] == {
        "every": {"description": "", "default": None, "type": "integer", "min": -2, "max": 10},
        "plain": {"description": "", "default": "x"},
    }
    assert manifest.convert(typed.plain()) == typed
    assert typed.digest() == "4328242a962ba647233c3f1b4add49e085db8c47fa719856ecdb6edeea2f4d3b"


@pytest.mark.parametrize(
    "key", [{"type": "float"}, {"type": "integer", "default": "x"}, {"min": 2, "max": 1}, {"min": 2**60}, {"min": 0.5}]
)
def test_a_signed_key_that_contradicts_itself_is_no_manifest(key):
    with pytest.raises(BadManifestError, match=r"manifest: .*config"):
        manifest.convert(HELLO.plain() | {"config": {"x": key}})


@pytest.mark.parametrize("publish", [["a/#/b"], ["$SYS/#"], [""], ["a\0"], ["x" * 300], [f"t/{n}" for n in range(17)]])
def test_filters_that_are_none_or_too_many_are_refused(publish):
    value = {**Manifest(name="a", version="1.0.0", trigger=Http()).plain()}
    value["grants"] = {**value["grants"], "publish": publish}
    with pytest.raises(BadManifestError):
        manifest.convert(value)


@pytest.mark.parametrize(
    "directories",
    [
        {"maps": "maps"},
        {"/": "maps"},
        {"/maps/": "maps"},
        {"/../etc": "maps"},
        {"/a/.hidden": "maps"},
        {"/data": "maps"},
        {"/data/maps": "maps"},
        {"/a/b/c/d/e": "maps"},
        {"/maps\n": "maps"},
        {"/maps": "Maps"},
        {"/maps": "../maps"},
        {"/maps": ""},
        {f"/m{number}": "maps" for number in range(9)},
    ],
)
def test_directories_that_are_none_or_too_many_are_refused(directories):
    value = {**Manifest(name="a", version="1.0.0", trigger=Http()).plain()}
    value["grants"] = {**value["grants"], "directories": directories}
    with pytest.raises(BadManifestError):
        manifest.convert(value)


def test_directories_are_left_out_where_there_are_none_and_bound_by_a_ceiling_whatever_their_place():
    plain = Manifest(name="a", version="1.0.0", trigger=Http(), grants=Grants(directories={})).plain()
    assert "directories" not in plain["grants"]
    grants = Grants(directories={"/maps": "maps"})
    assert grants.within(Grants(directories={"/other": "maps", "/more": "more"}))
    assert not grants.within(Grants(directories={"/maps": "more"}))
    assert not grants.within(Grants())
    assert grants.named_beyond(Grants()) == ("directory maps",)


@pytest.mark.parametrize(
    "buckets",
    [
        {"Plant": []},
        {"": []},
        {"../x": []},
        {"default": ["shared"]},
        {"plant": ["public"]},
        {f"b{number}": [] for number in range(9)},
    ],
)
def test_buckets_that_are_none_or_too_many_are_refused(buckets):
    value = {**Manifest(name="a", version="1.0.0", trigger=Http()).plain()}
    value["grants"] = {**value["grants"], "buckets": buckets}
    with pytest.raises(BadManifestError):
        manifest.convert(value)


def test_buckets_are_left_out_where_there_are_none_and_bound_by_name_and_right():
    plain = Manifest(name="a", version="1.0.0", trigger=Http(), grants=Grants(buckets={})).plain()
    assert "buckets" not in plain["grants"]
    grants = Grants(buckets={"plant": ("durable", "shared"), "default": ("durable",)})
    assert grants.within(grants)
    assert not grants.within(Grants(buckets={"plant": ("shared",), "default": ("durable",)}))
    assert grants.named_beyond(Grants()) == ("durable bucket default", "durable and shared bucket plant")


def test_topics_are_left_out_where_there_are_none_and_bound_by_a_ceiling():
    plain = Manifest(name="a", version="1.0.0", trigger=Http(), grants=Grants(publish=())).plain()
    assert "publish" not in plain["grants"]
    grants = Grants(publish=("plant/+/t",))
    assert grants.within(Grants(publish=("plant/#",)))
    assert not grants.within(Grants(publish=("plant/a/t",)))
    local, receives = Grants(publish_local=("plant/a",)), Grants(subscribe=("plant/a",))
    assert local.within(Grants(publish=("plant/#",))), "who may tell the operator may tell the device"
    assert not grants.within(Grants(publish_local=("plant/#",)))
    assert not receives.within(Grants(publish=("plant/#",), publish_local=("plant/#",)))
    assert receives.within(Grants(subscribe=("+/a",)))
    assert Grants(publish=("a", "b"), subscribe=("a",)).messages_within(Grants(publish=("b",))) == {
        "publish": ("b",),
        "publish_local": (),
        "subscribe": (),
    }
    for name in ("publish_local", "subscribe"):
        assert name not in msgspec.to_builtins(Grants(**{name: ()}))
        with pytest.raises(ValueError, match="last level"):
            Grants(**{name: ("a/#/b",)})
        with pytest.raises(ValueError, match=f"{name} has more than 16 filters"):
            Grants(**{name: tuple(map(str, range(17)))})
    assert not grants.within(Grants())
