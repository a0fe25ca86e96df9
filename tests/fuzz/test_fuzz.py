"""Every parser of what comes from outside, under Hypothesis: seeds changed at random, inputs once found, and bombs."""

import tracemalloc
import zlib
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from fleet.component import binary
from tests.fuzz.harnesses import HARNESSES

FOUND = Path(__file__).parent / "found"
EXAMPLES = 100
PEAK_BYTES = 96 * 1024 * 1024

# What costs its sender little and a careless reader much.
BOMBS = {
    "deep lists": b"[" * 200_000,
    "deep objects": b'{"a":' * 100_000,
    "deep lists after a type": b"\0" + b"[" * 200_000,
    "deep in a field": b'{"payload":' + b"[" * 100_000,
    "deep toml": b"a = " + b"[" * 100_000,
    "dotted toml": b".".join([b"a"] * 20_000) + b" = 1",
    "a long number": b"9" * 200_000,
    "a long number in an object": b'{"v":' + b"9" * 100_000 + b"}",
    "many versions": b"1." * 100_000,
    "many quotes": b'"' * 100_000,
    "many conditions": b"a" + b"<1," * 50_000 + b"<1",
    "a wild count": binary.COMPONENT + binary.section(10, b"\xff\xff\xff\xff\x0f"),
    "a wild size": binary.COMPONENT + b"\x01\xff\xff\xff\xff\x0f",
    "many sections": binary.COMPONENT + binary.section(0, b"\x01a") * 120_000,
    "deep components": b"".join(binary.COMPONENT + b"\x04\xff\xff\x7f" for _ in range(2_000)),
    "a package list that inflates": binary.COMPONENT
    + binary.section(0, binary.name(".dep-v0") + zlib.compress(b" " * (64 << 20))),
    "not text": bytes(range(256)) * 100,
}


def changed(seed: bytes) -> st.SearchStrategy[bytes]:
    """A seed with pieces of it replaced, doubled or left out."""

    def apply(edits: list[tuple[int, int, bytes]]) -> bytes:
        data = seed
        for at, length, put in edits:
            start = at % (len(data) + 1)
            data = data[:start] + put + data[start + length :]
        return data

    pieces = st.one_of(
        st.binary(max_size=4),
        st.sampled_from(
            [b"null", b"[]", b"{}", b"-1", b'""', b"1e400", b"\\u0000", b"\xff", b"\xed\xa0\x80", b"9" * 30]
        ),
    )
    edit = st.tuples(st.integers(0, 1 << 16), st.integers(0, 8), pieces)
    return st.lists(edit, max_size=4).map(apply)


@pytest.mark.parametrize("name", HARNESSES)
def test_only_documented_errors_come_out(name: str) -> None:
    harness = HARNESSES[name]
    seeds = [*harness.seeds()]
    for seed in seeds:
        harness.body(seed)

    @settings(
        max_examples=EXAMPLES,
        derandomize=True,
        database=None,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )
    @given(st.one_of(st.binary(max_size=200), *(changed(seed) for seed in seeds)))
    def throw(data: bytes) -> None:
        harness.body(data)

    throw()


@pytest.mark.parametrize("bomb", BOMBS)
def test_no_bomb_costs_more_than_a_bounded_amount_of_memory(bomb: str) -> None:
    for name, harness in HARNESSES.items():
        tracemalloc.start()
        try:
            harness.body(BOMBS[bomb])
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert peak < PEAK_BYTES, f"{name} took {peak >> 20} MiB for {len(BOMBS[bomb]) >> 10} KiB"


@pytest.mark.parametrize("file", sorted(FOUND.glob("*/*")), ids=lambda path: f"{path.parent.name}-{path.name}")
def test_what_was_found_once_stays_mended(file: Path) -> None:
    HARNESSES[file.parent.name].body(file.read_bytes())
