"""Build provenance: an in-toto statement (v1) whose predicate is SLSA provenance v1.

The statement comes bare, in a DSSE envelope, or in a Sigstore bundle. The envelope's signature is not verified, since
a fleet has no key to trust for it. The publisher's signature binds exactly these bytes to the component.
"""

import base64
import binascii
from dataclasses import dataclass
from typing import Any, Final

import msgspec

from fleet.evidence import sbom
from fleet.evidence.sbom import DocumentError

STATEMENT: Final = "https://in-toto.io/Statement/v1"
PREDICATE: Final = "https://slsa.dev/provenance/v1"
PAYLOAD_TYPE: Final = "application/vnd.in-toto+json"
SUBJECTS_MAX: Final = 10_000


@dataclass(frozen=True, slots=True)
class Provenance:
    """Claim of a builder about its inputs and outputs.

    Attributes:
        subjects: sha256 in hex of each output, with its name.
        builder: the builder's id, a URI.
        build_type: a URI.
        sources: inputs, as URIs.
        signed: whether it came in a signed envelope, whose signature is not verified.
    """

    subjects: dict[str, str]
    builder: str
    build_type: str
    sources: tuple[str, ...]
    signed: bool


class _Subject(msgspec.Struct):
    digest: dict[str, str]
    name: str = ""


class _Resource(msgspec.Struct):
    uri: str = ""


class _Definition(msgspec.Struct):
    buildType: str  # noqa: N815 - the name in the specification
    resolvedDependencies: list[_Resource] = []  # noqa: N815 - the same


class _Builder(msgspec.Struct):
    id: str


class _Run(msgspec.Struct):
    builder: _Builder


class _Predicate(msgspec.Struct):
    buildDefinition: _Definition  # noqa: N815 - the name in the specification
    runDetails: _Run  # noqa: N815 - the same


def read(data: bytes, *, file_name: str = "the provenance") -> Provenance:
    """Read build provenance.

    Raises:
        DocumentError: another document, another statement or predicate type, or required fields are missing.
    """
    value = sbom.load(data, file_name)
    envelope = value.get("dsseEnvelope", value)
    signed = isinstance(envelope, dict) and "payload" in envelope
    if signed:
        value = _opened(envelope, file_name)
    if "bomFormat" in value or "spdxVersion" in value:
        raise DocumentError(f"{file_name} is an SBOM, not provenance: give it as --sbom")
    if value.get("_type") != STATEMENT:
        raise DocumentError(f"{file_name} is not an in-toto statement: its _type must be {STATEMENT}")
    if value.get("predicateType") != PREDICATE:
        found = str(value.get("predicateType", ""))[:100]
        raise DocumentError(f"{file_name} has the predicate {found or 'none'}: only {PREDICATE} is supported")
    subjects = sbom.convert(value.get("subject"), list[_Subject], f"{file_name}: subject")
    predicate = sbom.convert(value.get("predicate"), _Predicate, f"{file_name}: predicate")
    digests = {each.digest["sha256"].lower(): each.name for each in subjects[:SUBJECTS_MAX] if "sha256" in each.digest}
    if not digests:
        raise DocumentError(f"{file_name} names no subject by sha256: write provenance with the component's sha256")
    sources = (each.uri for each in predicate.buildDefinition.resolvedDependencies)
    return Provenance(
        digests,
        predicate.runDetails.builder.id,
        predicate.buildDefinition.buildType,
        tuple(each for each in sources if each),
        signed,
    )


def _opened(envelope: dict[str, Any], file_name: str) -> dict[str, Any]:
    """Unpack the statement in a DSSE envelope."""
    if envelope.get("payloadType") != PAYLOAD_TYPE:
        found = str(envelope.get("payloadType", ""))[:100]
        raise DocumentError(f"{file_name} is an envelope of {found or 'nothing'}: only {PAYLOAD_TYPE} is supported")
    try:
        payload = base64.b64decode(envelope["payload"], validate=True)
    except (binascii.Error, TypeError, ValueError) as error:
        raise DocumentError(f"{file_name}: the envelope's payload is not base64: {error}") from error
    return sbom.load(payload, f"{file_name}: the content of its envelope")
