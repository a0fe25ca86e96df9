"""Build provenance: bare, enveloped and bundled statements, and what is said of anything else."""

import base64
import json

import pytest

from fleet.evidence import provenance
from fleet.evidence.sbom import DocumentError

STATEMENT = {
    "_type": "https://in-toto.io/Statement/v1",
    "subject": [{"name": "hello.wasm", "digest": {"sha256": "AB" * 32}}],
    "predicateType": "https://slsa.dev/provenance/v1",
    "predicate": {
        "buildDefinition": {
            "buildType": "https://example.com/build/v1",
            "externalParameters": {},
            "resolvedDependencies": [{"uri": "git+https://example.com/hello@refs/heads/main"}],
        },
        "runDetails": {"builder": {"id": "https://example.com/builder"}},
    },
}


def enveloped(value: object, kind: str = "application/vnd.in-toto+json") -> dict[str, object]:
    payload = base64.b64encode(json.dumps(value).encode()).decode()
    return {"payloadType": kind, "payload": payload, "signatures": [{"sig": "AA=="}]}


def read(value: object) -> provenance.Provenance:
    return provenance.read(json.dumps(value).encode(), file_name="built.json")


@pytest.mark.parametrize(
    ("value", "signed"),
    [
        (STATEMENT, False),
        (enveloped(STATEMENT), True),
        ({"mediaType": "application/vnd.dev.sigstore.bundle.v0.3+json", "dsseEnvelope": enveloped(STATEMENT)}, True),
    ],
    ids=["bare", "DSSE", "bundle"],
)
def test_a_statement_however_it_is_wrapped(value: object, signed: bool) -> None:
    found = read(value)
    assert found.subjects == {"ab" * 32: "hello.wasm"}
    assert (found.builder, found.signed) == ("https://example.com/builder", signed)
    assert found.sources == ("git+https://example.com/hello@refs/heads/main",)


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ({}, "not an in-toto statement"),
        ({"bomFormat": "CycloneDX"}, "give it as --sbom"),
        (STATEMENT | {"_type": "https://in-toto.io/Statement/v0.1"}, "not an in-toto statement"),
        (STATEMENT | {"predicateType": "https://slsa.dev/provenance/v0.2"}, "has the predicate"),
        (STATEMENT | {"subject": []}, "no subject by sha256"),
        (STATEMENT | {"subject": [{"digest": {"sha512": "00"}}]}, "no subject by sha256"),
        (STATEMENT | {"subject": None}, "subject"),
        (STATEMENT | {"predicate": {"buildDefinition": {"buildType": "x"}}}, "runDetails"),
        (enveloped(STATEMENT, "text/plain"), "an envelope of text/plain"),
        ({"payloadType": "application/vnd.in-toto+json", "payload": "*"}, "not base64"),
        ({"payloadType": "application/vnd.in-toto+json", "payload": 7}, "not base64"),
        (enveloped([1]), "not an object"),
    ],
)
def test_what_is_no_provenance_is_named(value: object, words: str) -> None:
    with pytest.raises(DocumentError, match=words) as caught:
        read(value)
    assert "built.json" in str(caught.value)
