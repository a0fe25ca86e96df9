"""Bills of materials: what is read of each format, and what is said of a file that is none."""

import json

import pytest

from fleet.evidence import sbom
from fleet.evidence.sbom import DocumentError, Package

CYCLONEDX = {
    "bomFormat": "CycloneDX",
    "specVersion": "1.6",
    "metadata": {"component": {"type": "application", "name": "hello", "version": "1.0.0"}},
    "components": [
        {"type": "library", "name": "serde", "version": "1.0.199", "purl": "pkg:cargo/serde@1.0.199"},
        {"type": "file", "name": "src/main.rs"},
        {
            "type": "library",
            "name": "outer",
            "group": "org.example",
            "version": "2",
            "components": [{"type": "library", "name": "inner", "version": "3"}],
        },
    ],
}
SPDX = {
    "spdxVersion": "SPDX-2.3",
    "packages": [
        {
            "name": "serde",
            "versionInfo": "1.0.199",
            "externalRefs": [{"referenceType": "purl", "referenceLocator": "pkg:cargo/serde@1.0.199"}],
        },
        {"name": "unversioned", "versionInfo": "NOASSERTION"},
    ],
}
SPDX3 = {
    "@context": "https://spdx.org/rdf/3.0.1/spdx-context.jsonld",
    "@graph": [
        {
            "type": "software_Package",
            "name": "serde",
            "software_packageVersion": "1.0.199",
            "software_packageUrl": "pkg:cargo/serde@1.0.199",
        },
        {"type": "software_File", "name": "main.rs"},
    ],
}
SERDE = Package("serde", "1.0.199", "cargo")


def read(value: object) -> sbom.Sbom:
    return sbom.read(json.dumps(value).encode(), file_name="bill.json")


def test_cyclonedx_with_what_is_nested_in_what() -> None:
    found = read(CYCLONEDX)
    assert (found.kind, found.format) == ("cyclonedx", "CycloneDX 1.6")
    assert found.packages == (
        Package("hello", "1.0.0"),
        Package("inner", "3"),
        Package("outer", "2", "", "org.example"),
        SERDE,
    )


def test_spdx_2_and_3() -> None:
    assert read(SPDX).packages == (SERDE, Package("unversioned", ""))
    assert read(SPDX3).packages == (SERDE,)


def test_what_a_bill_says_it_is_about() -> None:
    hashes = [{"alg": "SHA-1", "content": "00"}, {"alg": "SHA-256", "content": "AB"}]
    about = {"metadata": {"component": {"name": "hello", "hashes": hashes}}}
    assert read(CYCLONEDX | about).described == "ab"


def test_a_package_url_that_cannot_be_read_leaves_the_name() -> None:
    component = {"name": "odd", "version": "1", "purl": "pkg:"}
    assert read(CYCLONEDX | {"metadata": {}, "components": [component]}).packages == (Package("odd", "1"),)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "is empty"),
        (b"<bom/>", "is XML"),
        (b"SPDXVersion: SPDX-2.3", "tag-value"),
        (b"{", "is not JSON"),
        (b"[" * 100_000, "is not JSON"),
        (b"[]", "not an object"),
        (b"{}", "neither CycloneDX"),
        (b'{"predicateType": "https://slsa.dev/provenance/v1"}', "give it as --provenance"),
        (b'{"bomFormat": "CycloneDX", "specVersion": "2.0"}', "only 1.x is supported"),
        (b'{"bomFormat": "CycloneDX", "specVersion": "1.6", "components": 1}', "components"),
        (b'{"spdxVersion": "SPDX-1.0"}', "SPDX-2.2"),
        (b'{"spdxVersion": "SPDX-2.3", "packages": [1]}', "packages"),
        (b" " * (16 << 20) + b"{}", "16 MiB"),
    ],
)
def test_what_is_no_bill_of_materials_is_named(data: bytes, words: str) -> None:
    with pytest.raises(DocumentError, match=words) as caught:
        sbom.read(data, file_name="bill.json")
    assert "bill.json" in str(caught.value)
    assert "\n" not in str(caught.value)
