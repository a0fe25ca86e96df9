"""What cargo-auditable leaves in a component, at any depth, and what a hostile section cannot do."""

import json
import zlib

import pytest

from fleet.component import binary
from fleet.evidence import sbom
from fleet.evidence.sbom import DocumentError, Package

PACKAGES = {
    "packages": [{"name": "serde", "version": "1.0.199", "source": "crates.io"}, {"name": "hello", "version": "0.1.0"}]
}


def section(data: bytes) -> bytes:
    return binary.section(0, binary.name(".dep-v0") + data)


def listed(value: object = PACKAGES) -> bytes:
    return section(zlib.compress(json.dumps(value).encode()))


@pytest.mark.parametrize(
    "data",
    [
        binary.COMPONENT + listed(),
        binary.COMPONENT + binary.section(1, binary.MODULE + listed()),
        binary.COMPONENT + binary.section(4, binary.COMPONENT + binary.section(1, binary.MODULE + listed())),
    ],
    ids=["component", "module", "nested"],
)
def test_a_list_is_found_where_the_linker_left_it(data: bytes) -> None:
    assert sbom.read_embedded(data) == (Package("hello", "0.1.0", "cargo"), Package("serde", "1.0.199", "cargo"))


def test_a_component_that_says_nothing() -> None:
    assert sbom.read_embedded(binary.COMPONENT + binary.section(0, binary.name("producers") + b"\0")) is None


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (section(b"plain"), "not compressed"),
        (section(zlib.compress(b" " * (9 << 20))), "inflates to more"),
        (section(zlib.compress(b"{}")[:-3]), "cut off"),
        (listed([]), "not an object"),
        (listed({"packages": 1}), "packages"),
        (b"\0\xff", "damaged"),
    ],
)
def test_a_section_that_cannot_be_read_is_an_error_and_costs_little(data: bytes, words: str) -> None:
    with pytest.raises(DocumentError, match=words):
        sbom.read_embedded(binary.COMPONENT + data)
