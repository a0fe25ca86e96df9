"""What the fuzzers throw bytes at: each parser of what comes from outside, with what must hold whatever the bytes are.

A harness takes bytes and returns. Only the exceptions that a parser documents are caught; anything else that comes out,
a `RecursionError` and a `MemoryError` too, is a finding. Where something was read, writing it and reading it again must
give the same.

The same bodies run under atheris (`make fuzz`) and under Hypothesis (`make test`).
"""

import base64
import contextlib
import io
import json
import lzma
import shutil
import tarfile
import tempfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import msgspec
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from tuf.api.metadata import Root, Snapshot, Targets, Timestamp

from agent.link import bundle as stick
from agent.update.state import Change
from fleet.component import binary, component_toml, compose, reader, toml_fields
from fleet.evidence import provenance, query, sbom
from fleet.evidence.sbom import DocumentError, Package
from fleet.protocol import manifest, messages, names, wire
from fleet.protocol.assignment import Assignment, Command, Fresh
from fleet.protocol.manifest import BadManifestError
from fleet.protocol.messages import BadTokenError, Enrolled, EnrolRequest, Token
from fleet.protocol.names import BadNameError, TargetName
from fleet.protocol.topics import BadTopicError, Topic
from signing import dsse, events, metadata, sealing
from signing.errors import Rejected, RepositoryError
from signing.sealing import Purpose, SealingKey
from signing.state import VerifierState

ROOT: Final = Path(__file__).resolve().parents[2]
ADAPTER: Final = compose.load_adapter()
DEVICE: Final = "gate-00000000"


def envelope(data: bytes) -> None:
    """DSSE envelopes: what is read is what was written, whoever wrote it."""
    try:
        found = dsse.parse(data)
    except Rejected:
        return
    signatures = [{"keyid": key, "sig": _b64(bytes.fromhex(each.signature))} for key, each in found.signatures.items()]
    again = {"payloadType": found.payload_type, "payload": _b64(found.payload), "signatures": signatures}
    assert dsse.parse(json.dumps(again).encode()) == found
    assert found.payload in found.pae


def _b64(data: bytes) -> str:
    return base64.b64encode(data).decode()


MESSAGES: Final[tuple[type[Any], ...]] = (
    *(messages.Hello, messages.State, messages.Health, messages.Report, messages.DesiredReply, messages.Ack),
    *(messages.Poke, Assignment, Fresh, Command, EnrolRequest, Enrolled, SealingKey),
)


def message(data: bytes) -> None:
    """Everything that crosses MQTT and what is inside envelopes; the first byte says which."""
    if not data:
        return
    kind = MESSAGES[data[0] % len(MESSAGES)]
    try:
        found = wire.decode(kind, data[1:])
    except wire.WireError:
        return
    assert wire.decode(kind, wire.encode(found)) == found


def topic(data: bytes) -> None:
    """MQTT topics: one spelling for each."""
    text = data.decode(errors="replace")
    try:
        found = Topic.parse(text)
    except BadTopicError:
        return
    assert str(found) == text


def name(data: bytes) -> None:
    """Names, versions, target paths, sizes, times and cron lines."""
    text = data.decode(errors="replace")
    for read, error in _TEXTS:
        try:
            found = read(text)
        except error:
            continue
        if isinstance(found, TargetName):
            assert TargetName.from_path(found.path) == found


_TEXTS: Final[tuple[tuple[Callable[[str], object], type[Exception]], ...]] = (
    (lambda text: names.check_label(text, "name"), BadNameError),
    (names.check_device, BadNameError),
    (names.check_sha256, BadNameError),
    (names.version_key, BadNameError),
    (TargetName.from_path, BadNameError),
    (lambda text: TargetName.parse(text, namespace="main"), BadNameError),
    (toml_fields.parse_size, toml_fields.BadUnitError),
    (toml_fields.parse_duration, toml_fields.BadUnitError),
    (manifest.check, manifest.BadCronError),
)


def normalised_manifest(data: bytes) -> None:
    """Manifests as they stand in signed metadata: the digest is of the meaning, not of the spelling."""
    try:
        found = manifest.decode(data)
    except BadManifestError:
        return
    again = manifest.convert(found.plain())
    assert (again, again.digest()) == (found, found.digest())


def author_file(data: bytes) -> None:
    """`component.toml`: what is shown of a manifest reads as that manifest."""
    try:
        found = component_toml.load(data.decode(errors="replace"))
    except BadManifestError:
        return
    assert component_toml.load(component_toml.render(found)) == found
    assert manifest.convert(found.plain()) == found


def token(data: bytes) -> None:
    """Enrolment tokens."""
    try:
        found = Token.decode(data.decode(errors="replace"))
    except BadTokenError:
        return
    assert Token.decode(found.encode()) == found


def wasm_component(data: bytes) -> None:
    """The component reader, what an author file says of it, the composer, and package lists built in."""
    with contextlib.suppress(DocumentError):
        sbom.read_embedded(data)
    try:
        found = reader.read(data)
    except reader.NotAComponentError:
        return
    assert found.size_bytes == len(data)
    with contextlib.suppress(BadManifestError):
        component_toml.describe(found, None, file_name="fuzzed.wasm")
    try:
        whole = compose.compose(ADAPTER, data)
    except compose.ComposeError:
        return
    assert data in whole
    assert reader.read(whole).exported(compose.BRIDGE)


def tuf_metadata(data: bytes) -> None:
    """TUF files, parsed and put into canonical form; the first byte says of which type. Nothing unsigned verifies."""
    if not data:
        return
    kind: Any = (Root, Timestamp, Snapshot, Targets)[data[0] % 4]
    try:
        found = metadata.parse(kind, data[1:], "fuzzed")
        metadata.verify_metadata(_TRUSTED, "targets", found)
    except Rejected:
        return
    raise AssertionError("metadata that nobody signed was verified")


def _trusted() -> Root:
    from securesystemslib.signer import CryptoSigner

    root = Root()
    root.add_key(CryptoSigner.generate_ed25519().public_key, "targets")
    return root


_TRUSTED: Final = _trusted()


def change(data: bytes) -> None:
    """What a device keeps of a change under way: a damaged row is an error of one kind."""
    try:
        found = Change.decode(data)
    except msgspec.DecodeError:
        return
    assert Change.decode(found.encode()) == found


def signing_event(data: bytes) -> None:
    """Signing events, which are mailed."""
    try:
        found = events.decode(data)
    except RepositoryError:
        return
    assert events.decode(found.encode()).documents == found.documents


def memory(data: bytes) -> None:
    """What a verifier remembers: a damaged file is an error, never a wrong memory."""
    try:
        found = VerifierState.decode(data)
    except msgspec.MsgspecError:
        return
    assert VerifierState.decode(found.encode()) == found


_BOX_KEY: Final = X25519PrivateKey.from_private_bytes(bytes(range(32)))
_PURPOSE: Final = Purpose(fleet="fleet", device=DEVICE, instance="hello", name="TOKEN", version=1)


def sealed_box(data: bytes) -> None:
    """Sealed boxes: nothing opens but what was sealed for the very purpose."""
    try:
        found = sealing.open_box(data, key=_BOX_KEY, purpose=_PURPOSE)
    except Rejected:
        return
    assert found == _SECRET, "a box that nobody sealed was opened"


_SECRET: Final = "a secret value"
_BOX: Final = sealing.seal(_SECRET, recipient=sealing.public_key(_BOX_KEY), purpose=_PURPOSE)


def offline_bundle(data: bytes) -> None:
    """Bundles from a stick: whatever the tar says, nothing is written outside the directory made for it."""
    with tempfile.TemporaryDirectory() as made:
        place = Path(made)
        before = place / "before"
        before.write_bytes(b"")
        try:
            stick.stage(io.BytesIO(data), place / "bundle", device=DEVICE)
        except stick.BundleError:
            assert not (place / "bundle").exists()
            assert not (place / "bundle.new").exists()
        else:
            written = [path.relative_to(place / "bundle") for path in (place / "bundle").rglob("*") if path.is_file()]
            assert all(names.max_bytes(str(path)) for path in written)
        assert {path.name for path in place.iterdir()} <= {"before", "bundle"}
        shutil.rmtree(place / "bundle", ignore_errors=True)


def bill_of_materials(data: bytes) -> None:
    """SBOMs and provenance, which build tools write."""
    for read in (sbom.read, provenance.read):
        with contextlib.suppress(DocumentError):
            read(data)


def question(data: bytes) -> None:
    """Questions about packages, asked of packages that are named alike with odd versions."""
    text = data.decode(errors="replace")
    try:
        asked = query.parse(text)
    except DocumentError:
        return
    kinds = (
        "",
        "cargo",
        "npm",
        "pypi",
        "golang",
        "deb",
        "rpm",
        "maven",
        "gem",
        "nuget",
        "composer",
        "apk",
        "conan",
        text[:5],
    )
    for kind in kinds:
        for version in ("", "1.0", "v1.2.3-rc.1", "1:2.3-4", text[-8:]):
            asked.matches(Package(asked.package.name, version, kind, asked.package.namespace))


@dataclass(frozen=True)
class Harness:
    """A body and where its inputs begin."""

    body: Callable[[bytes], None]
    seeds: Callable[[], Iterator[bytes]]


def _envelopes() -> Iterator[bytes]:
    yield json.dumps(
        {
            "payloadType": "application/vnd.wasmfleet.assignment.v1+json",
            "payload": "e30=",
            "signatures": [{"keyid": "a", "sig": "AA=="}],
        }
    ).encode()


def _messages() -> Iterator[bytes]:
    stamp = '"2026-05-01T00:00:00Z"'
    bodies = {
        messages.Hello: '{"device":"gate-00000000","nonce":"n","boot_id":"b"}',
        messages.State: '{"online":true,"boot_id":"b"}',
        messages.Health: f'{{"device":"gate-00000000","boot_id":"b","at":{stamp}}}',
        messages.Ack: '{"boot_id":"b","sequence":1}',
        messages.Poke: '{"jitter_ms":1}',
        Assignment: f'{{"fleet":"f","device":"d","version":1,"issued":{stamp},"expires":{stamp},"items":[]}}',
        Fresh: f'{{"fleet":"f","device":"d","nonce":"n","sha256":"00","issued":{stamp},"expires":{stamp}}}',
    }
    for number, kind in enumerate(MESSAGES):
        yield bytes([number]) + bodies.get(kind, "{}").encode()


def _topics() -> Iterator[bytes]:
    for channel in ("down/desired", "up/report"):
        yield f"fleet/v1/{names.shard(DEVICE)}/{DEVICE}/{channel}".encode()
    yield b"fleet/v1/all/poke"


def _names() -> Iterator[bytes]:
    for text in (
        "gate-00000000",
        "1.2.3-rc.1+b",
        "main/hello@1.0.0",
        "components/main/hello/1.0.0.wasm",
        "16MiB",
        "1.5s",
        "*/5 1-3 1,15 * 7",
    ):
        yield text.encode()


def _manifests() -> Iterator[bytes]:
    yield b'{"name":"hello","version":"1.0.0","trigger":{"type":"http"},"grants":{"interfaces":["wasi:clocks"]}}'
    yield b'{"name":"t","version":"1.0.0","trigger":{"type":"schedule","every_ms":9},"config":{"a":{"default":"x"}}}'


def _tomls() -> Iterator[bytes]:
    for file in sorted((ROOT / "components/demo").glob("*.toml")):
        yield file.read_bytes()
    yield b'name = "a"\n[trigger]\ntype = "http"\n[config.level]\ndefault = "1"\n[limits]\nmemory = "1MiB"\n'


def _tokens() -> Iterator[bytes]:
    moment = "2026-05-01T00:00:00Z"
    fields = {
        "url": "https://h:1",
        "fleet": "f",
        "ca_sha256": "00",
        "root_sha256": "00",
        "secret": "s",
        "floor": moment,
        "expires": moment,
    }
    yield msgspec.convert(fields, Token).encode().encode()


def _components() -> Iterator[bytes]:
    for file in sorted((ROOT / "components/demo").glob("*.wasm")):
        yield file.read_bytes()
    crates = zlib.compress(b'{"packages":[{"name":"a","version":"1.0.0"}]}')
    yield binary.COMPONENT + binary.section(1, binary.MODULE + binary.section(0, binary.name(".dep-v0") + crates))
    yield lzma.decompress((ROOT / "components/adapter/probe.wasm.xz").read_bytes())


def _metadata() -> Iterator[bytes]:
    for number, kind in enumerate((Root, Timestamp, Snapshot, Targets)):
        yield bytes([number]) + metadata.Metadata(kind()).to_bytes()


def _events() -> Iterator[bytes]:
    yield events.Event("fleet", (events.Document("main", b"{}"),), note="n").encode()


def _facts() -> Iterator[bytes]:
    yield VerifierState().encode()


def _changes() -> Iterator[bytes]:
    yield b'{"state":{"phase":"fetching"}}'
    yield b'{"state":{"phase":null}}'


def _boxes() -> Iterator[bytes]:
    yield _BOX


def _tars() -> Iterator[bytes]:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for path, data in ((names.HEAD, b'{"v":1}'), (names.desired(DEVICE), b"{}"), ("tuf/timestamp.json", b"{}")):
            member = tarfile.TarInfo(path)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    yield file.getvalue()[:4096]


def _bills() -> Iterator[bytes]:
    yield b'{"bomFormat":"CycloneDX","specVersion":"1.6","components":[{"name":"a","purl":"pkg:cargo/a@1"}]}'
    yield b'{"spdxVersion":"SPDX-2.3","packages":[{"name":"a","externalRefs":[{"referenceType":"purl"}]}]}'
    yield b'{"@context":"https://spdx.org/rdf/3.0.1/c","@graph":[{"type":"software_Package","name":"a"}]}'
    yield (
        b'{"_type":"https://in-toto.io/Statement/v1","predicateType":"https://slsa.dev/provenance/v1",'
        b'"subject":[{"digest":{"sha256":"00"}}],'
        b'"predicate":{"buildDefinition":{"buildType":"b"},"runDetails":{"builder":{"id":"i"}}}}'
    )
    yield b'{"payloadType":"application/vnd.in-toto+json","payload":"e30=","signatures":[]}'


def _questions() -> Iterator[bytes]:
    for text in ("serde<1.0.200", "pkg:npm/%40scope/name@1?a=b#c", "openssl>=3.0,<3.0.15"):
        yield text.encode()


HARNESSES: Final = {
    "envelope": Harness(envelope, _envelopes),
    "message": Harness(message, _messages),
    "topic": Harness(topic, _topics),
    "name": Harness(name, _names),
    "manifest": Harness(normalised_manifest, _manifests),
    "author": Harness(author_file, _tomls),
    "token": Harness(token, _tokens),
    "component": Harness(wasm_component, _components),
    "metadata": Harness(tuf_metadata, _metadata),
    "change": Harness(change, _changes),
    "event": Harness(signing_event, _events),
    "memory": Harness(memory, _facts),
    "box": Harness(sealed_box, _boxes),
    "bundle": Harness(offline_bundle, _tars),
    "bill": Harness(bill_of_materials, _bills),
    "question": Harness(question, _questions),
}
