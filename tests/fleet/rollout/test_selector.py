"""Selectors: what they take, how they are written back, and where exactly one cannot be read."""

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fleet.rollout.selector import DEPTH_MAX, MAX_CHARS, NAMES, BadSelectorError, Device, Kind, parse

MIB = 1024 * 1024
HERE = Device(
    {"site": "berlin", "ring": "canary", "os": "mine"},
    {
        "id": "gate-7-1f2e3d4c", "arch": "riscv64", "memory": 512 * MIB, "cpus": 4, "online": True, "healthy": False,
        "runs": ("hello", "hello@1.4.0", "acme/hello", "acme/hello@1.4.0"), "group": ("edge", "lab"),
        "agent": "0.2.0", "kernel": "6.12.47-rc1+deb13", "os": "Debian 12",
    },
)  # fmt: skip
BARE = Device({}, {})


@pytest.mark.parametrize(
    "text",
    [
        "arch=riscv64 and memory>=512MiB and site in (berlin, paris)",
        "arch = riscv64, site=berlin , ring=canary",
        "arch == 'riscv64'",
        "memory<=0.5GiB AND memory < 600MB",
        "memory=536870912",
        "memory>=512",
        "cpus>3 and cpus<=4",
        "not (site=paris or site=oslo)",
        "site=paris or site=berlin and ring=canary",
        "site not in (paris,oslo)",
        "floor != 3",
        "floor not in (3)",
        "not floor",
        "online and not healthy",
        "online=true and healthy != yes",
        "runs=hello and runs=acme/hello@1.4.0 and runs!=hello@1.5.0",
        "runs in (hello@1.5.0, hello@1.4.0) and group=lab",
        "agent<0.10.0 and agent>=0.2 and agent!=0.2",
        "kernel > 6.9 and kernel < 6.12.47",
        'os="Debian 12" and label.os=mine',
        "((((site=berlin))))",
        "site",
    ],
)
def test_a_device_is_taken(text):
    assert parse(text).takes(HERE)


@pytest.mark.parametrize(
    "text",
    [
        "arch=riscv64 and memory>512MiB",
        "site=paris and ring=canary or site=oslo",
        "site=Berlin",
        "not (site=berlin or site=oslo)",
        "runs=hello@1.5.0",
        "runs != hello",
        "floor = 3",
        "kernel=rolling",
        "disk < 1GiB",
        "disk >= 0",
        "engine >= 0",
        "engine",
        "online = false",
    ],
)
def test_a_device_is_not_taken(text):
    assert not parse(text).takes(HERE)


@pytest.mark.parametrize("name", NAMES)
def test_of_a_value_that_is_not_known_only_the_opposites_are_true(name):
    value = {Kind.FLAG: "true", Kind.NUMBER: "4", Kind.SIZE: "1GiB", Kind.ARCH: "riscv64"}.get(NAMES[name].kind, "1")
    assert not parse(name).takes(BARE)
    assert not parse(f"{name} = {value}").takes(BARE)
    assert not parse(f"{name} in ({value})").takes(BARE)
    assert parse(f"{name} != {value} and {name} not in ({value}) and not {name}={value}").takes(BARE)
    with contextlib.suppress(BadSelectorError):
        assert not parse(f"{name} >= {value} or {name} < {value}").takes(BARE)


@pytest.mark.parametrize(
    ("text", "column", "words"),
    [
        ("", 1, "expected a name such as site or arch, 'not' or '(', found the end"),
        ("   ", 4, "found the end"),
        ("arch=riscv64 and memory>=", 26, "expected a size such as 512MiB or 2GB, found the end"),
        ("arch=riscv64 and", 17, "expected a name"),
        ("arch=riscv64 and or site=berlin", 18, "found 'or'"),
        ("arch riscv64", 6, "expected =, !=, <, <=, >, >=, 'in', 'not in', 'and', 'or' or the end, found 'riscv64'"),
        ("site in berlin", 9, "expected '(' and values, such as (berlin, paris), found 'berlin'"),
        ("site in (berlin paris)", 17, "expected ',' or ')', found 'paris'"),
        ("site in ()", 10, "expected a value, found ')'"),
        ("site in (berlin,)", 17, "expected a value, found ')'"),
        ("(site=berlin", 13, "expected 'and', 'or' or ')', found the end"),
        ("site=berlin)", 12, "expected 'and', 'or' or the end, found ')'"),
        ("site='berlin", 6, "the quote does not end"),
        ("site=!berlin", 6, "'!' has no meaning here"),
        ("memory>=lots", 9, "expected a size such as 512MiB or 2GB, found 'lots'"),
        ("memory>=1PiB", 9, "expected a size"),
        ("memory>=-1", 9, "expected a size"),
        ("arch=arm64", 6, "expected x86_64, aarch64 or riscv64, found 'arm64'"),
        ("arch != amd64", 9, "expected x86_64, aarch64 or riscv64"),
        ("not arch in (riscv64, riscv)", 23, "expected x86_64, aarch64 or riscv64"),
        ("cpus=four", 6, "expected a number such as 4"),
        ("online=maybe", 8, "expected true or false, found 'maybe'"),
        ("site>=berlin", 5, "site is a label: >= compares cpus, memory, disk, agent, host, engine, kernel"),
        ("memroy>=512MiB", 7, "did you mean memory?"),
        ("online>true", 7, "online is a flag: > compares"),
        ("runs<hello", 5, "runs is a list: < compares"),
        ("os>=12", 3, "os is a text: >= compares"),
        ("agent>=newest", 8, "expected a version such as 0.2.0, found 'newest'"),
        ("Site=berlin", 1, "label 'Site' is not a name"),
        ("label.=berlin", 1, "is not a name"),
        ("site=and", 6, "expected a value, found 'and'"),
        ("and=site", 1, "found 'and'"),
        ("site=berlin,oslo", 13, "expected a comparison after the comma, found oslo; of several values write 'in"),
        ("site=berlin site=oslo", 13, "expected 'and', 'or' or the end, found 'site'"),
        ("not", 4, "expected a name"),
        ("site not berlin", 6, "'not in'"),
        ("site=" + "b" * MAX_CHARS, MAX_CHARS + 1, f"at most {MAX_CHARS} characters"),
        ("not " * (DEPTH_MAX + 1) + "site", 4 * DEPTH_MAX + 1, "nested more than"),
        ("(" * (DEPTH_MAX + 1) + "site", DEPTH_MAX + 1, "nested more than"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_named_with_its_column(text, column, words):
    with pytest.raises(BadSelectorError) as raised:
        parse(text)
    assert (raised.value.column, words in raised.value.problem) == (column, True), raised.value


@pytest.mark.parametrize("name", [name for name, fact in NAMES.items() if fact.passing])
def test_what_may_change_does_not_last(name):
    value = {Kind.FLAG: "true"}.get(NAMES[name].kind, "1")
    parse(f"site=berlin and {name}={value}")
    with pytest.raises(BadSelectorError, match=f"column 18: {name} may change: here labels count, and id, name, arch"):
        parse(f"site=berlin and ({name}={value})", lasting=True)
    assert parse(f"label.{name}={value}", lasting=True).names == frozenset()


# -- properties --------------------------------------------------------------------------------------------------------

LABELS = st.sampled_from(["site", "ring", "floor", "os", "in"])
VALUES = st.one_of(
    st.sampled_from(["berlin", "paris", "not", "In", 'a "b"', "a\\", "x y", "(", ""]), st.text(max_size=5)
)
QUOTED = VALUES.map(lambda value: '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"')
COMPARED = st.one_of(
    st.builds(lambda name, sign, value: f"label.{name} {sign} {value}", LABELS, st.sampled_from(["=", "!="]), QUOTED),
    st.builds(lambda name, word, values: f"label.{name} {word} ({','.join(values)})", LABELS,
              st.sampled_from(["in", "not  in"]), st.lists(QUOTED, min_size=1, max_size=3)),
    st.builds(lambda sign, value: f"memory {sign} {value}", st.sampled_from(["=", "!=", "<", "<=", ">", ">="]),
              st.sampled_from(["1KiB", "2kb", "0", "3"])),
    st.builds(lambda name: f"label.{name}", LABELS), st.just("online"),
)  # fmt: skip
TEXTS = st.recursive(
    COMPARED,
    lambda inner: st.one_of(
        inner.map(lambda text: f"not ({text})"),
        st.lists(inner, min_size=2, max_size=3).map(lambda texts: "(" + ") and (".join(texts) + ")"),
        st.lists(inner, min_size=2, max_size=3).map(" or ".join),
    ),
    max_leaves=6,
)
DEVICES = st.builds(
    Device,
    st.dictionaries(LABELS, VALUES),
    st.fixed_dictionaries({}, optional={"memory": st.sampled_from([0, 3, 1024, 2000]), "online": st.booleans()}),
)


@given(TEXTS, DEVICES)
def test_a_selector_means_the_same_when_it_is_written_back(text, device):
    refused = ""
    try:
        selector = parse(text)
        again = parse(str(selector))
    except BadSelectorError as error:
        refused = error.problem
    else:
        assert str(again) == str(selector)
        assert again.takes(device) == selector.takes(device)
    assert not refused or refused.startswith(("nested more than", "a selector has at most")), refused


@pytest.mark.parametrize("text", ["label.in = x", "label.not", "not label.or", "label.and in (x, in2)", "label.online"])
def test_a_label_that_has_the_name_of_something_else_is_written_back(text):
    assert str(parse(text)) == text
    assert parse(str(parse(text))) == parse(text)


@given(TEXTS, TEXTS, DEVICES)
def test_words_join_selectors_as_logic_says(one, other, device):
    with contextlib.suppress(BadSelectorError):
        first, second = parse(one).takes(device), parse(other).takes(device)
        assert parse(f"({one}) and ({other})").takes(device) == (first and second)
        assert parse(f"({one}) or ({other})").takes(device) == (first or second)
        assert parse(f"not ({one})").takes(device) == (not first)


@given(st.text(max_size=60) | st.text(alphabet="site=and or()in,'\"<>! 1MiB", max_size=60))
def test_any_text_is_read_or_refused_within_itself(text):
    column = 1
    try:
        parse(text)
    except BadSelectorError as error:
        column = error.column
    assert 1 <= column <= len(text) + 1
