"""Each write that `agent.disk` names: what makes a device write it, and what is to be seen of it afterwards.

`ROWS` has one row for each name. `act` runs in a process of its own, which may be killed at the write; `see` returns
what the product reads of it: a power cut leaves the old or the new.
"""

import asyncio
import contextlib
import hashlib
import io
import json
import os
import signal
import sqlite3
import sys
import tarfile
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace
from typing import Any

import msgspec
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from agent import cli, systemd
from agent.config import Paths
from agent.host.ipc.keyvalue_api import RegisterUser
from agent.host.ipc.write_quota import QuotaStore
from agent.host.keyvalue import open_pairs
from agent.host.supervisor import generation, resources
from agent.host.supervisor.instance_log import InstanceLog, LogFiles
from agent.host.supervisor.resources import CrashCounter, HostResources, UidAllocator
from agent.identity import enrolment, identity
from agent.link.bundle import Bundle, BundleSource, BundleVerdict, stage
from agent.link.https import HttpsClient
from agent.link.partial_file import PartialFile
from agent.report.spool import Bounds, Draft, Spool
from agent.update import effects, images, restore, trust
from agent.update.images import ImageStore
from agent.update.machine import State
from agent.update.secrets import SecretStore
from agent.update.state import Change, Transition
from agent.update.store import Store
from fleet.ca import CertificateAuthority
from fleet.protocol import names
from fleet.protocol.assignment import SecretRef
from fleet.protocol.codes import Phase
from fleet.protocol.manifest import Grants
from fleet.protocol.messages import Report
from signing import sealing
from signing.sealing import Purpose
from signing.state import VerifierState
from signing.updater import DirectoryCache
from tests.agent.enrolled_device import DEVICE, NOW
from tests.agent.running_device import committed_demo

DATA = bytes(range(256)) * 16
SHA256 = hashlib.sha256(DATA).hexdigest()
LOG_BYTES = 2 * 1024 * 1024


def places(directory):
    return Paths(directory / "state", directory / "run")


def options(directory):
    return [
        *("--state", str(directory / "state"), "--runtime", str(directory / "run")),
        *("--config", str(directory / "agent.toml")),
    ]


# The whole agent ------------------------------------------------------------------------------------------------------


def agent(directory):
    """Run the agent until it is ready, and stop it in order."""
    notify = systemd.notify

    def stop_when_ready(**state):
        notify(**state)
        if "READY" in state:
            os.kill(os.getpid(), signal.SIGTERM)

    systemd.notify = stop_when_ready
    return cli.main(["run", *options(directory)])


def command(*words):
    """Run a command of `fleet-agent`, which may find what it likes."""

    def act(directory):
        code = cli.main([*words[:1], *options(directory), *(word.format(directory) for word in words[1:])])
        return 0 if code in {0, 1} else code

    return act


def enrol(*more):
    def act(directory):
        words = ["enroll", *options(directory), "--token-file", str(directory / "token"), "--name", "crane", *more]
        return 0 if "--force" not in more and (directory / "state/identity/enrolled.json").exists() else cli.main(words)

    return act


def joined(directory):
    """Who the device is, with every file that it needs; None before the enrolment."""
    home = directory / "state" / "identity"
    if not (home / "enrolled.json").exists():
        return None
    needed = ("device.key", "sealing.key", "device.pem", "ca.pem", "root.json", "mac.key")
    assert not list(identity.damaged_files(home))
    assert all((home / name).stat().st_size for name in needed)
    return identity.load(home).device


def store_of(directory):
    """What the database contains, through the product's own readers; None where there is none."""
    path = places(directory).database
    if not path.exists():
        return None
    store = Store(path)
    try:
        store._check("")
        return (
            store.committed(), store.changes(), store.failed(), store.facts(), store.envelope(), store.doubts(),
            store.problems(), tuple(store.counter(name) for name in ("accepted", "deployed", "committed")),
            store.unacked(), store.acked(),
        )  # fmt: skip
    finally:
        store.close()


def runs_the_same(directory):
    """What would start after a boot, from the database or the run set."""
    here = places(directory)
    key = here.identity.joinpath("mac.key")
    items = restore.committed(here.database, here.runset, key.read_bytes() if key.exists() else b"")
    return tuple(each.item.instance for each in items)


# Parts of it, on real files ------------------------------------------------------------------------------------------


def with_store(work):
    """Let `work` use the device's database."""

    def act(directory):
        store = Store(places(directory).database)
        work(store)
        store.close()

    return act


def report():
    return Report(device=DEVICE, boot_id="b", sequence=0, at=NOW, assignment=2)


def step(store):
    if store.changes():
        return
    committed, _ = committed_demo("other", generation=9)
    change = Change(instance="other", assignment=2, state=State(phase=Phase.FETCHING), item=committed.item)
    store.apply(Transition(change=change, committed=committed, report=report()))


def acknowledged(store):
    store.acknowledge(store.save(report=report()))


class Client(HttpsClient):
    """HTTPS client to which the server sends what is asked for, from wherever it is asked for."""

    def _continue(self, _path, partial, have, _length, _progress, _cancelled):
        with partial.open(have) as file:
            file.write(DATA[have:])
        return have


def download(directory):
    """Download an artifact, from where an earlier attempt was cut short."""
    into = places(directory).artifacts / f"{SHA256}.wasm"
    if not into.exists():
        Client("https://127.0.0.1:1", None).download("/v1/artifacts/x", into, length=len(DATA), sha256=SHA256)


def dropped(directory):
    """Give up a download that is longer than signed."""
    part = places(directory).artifacts / f"{SHA256}.wasm.part"
    if not part.exists():
        part.write_bytes(DATA)
        part.with_name(part.name + ".mark").write_bytes(b"{}")
    PartialFile(part).remove()


def artifact(directory):
    into = places(directory).artifacts / f"{SHA256}.wasm"
    return into.exists() and hashlib.sha256(into.read_bytes()).hexdigest()


def artifact_if_sound(directory):
    return effects._sound(places(directory).artifacts / f"{SHA256}.wasm", len(DATA), SHA256)


def lost_artifact(directory):
    """Fetch an artifact again whose file was lost, as the restorer does."""

    class Source:
        def download(self, _path, into, **_more):
            into.write_bytes(DATA)

    of = SimpleNamespace(artifacts=places(directory).artifacts)
    restorer = restore.HostRestorer(host=None, db=None, materials=of, source=Source(), problems=None, sink=None)
    committed, _ = committed_demo()
    artifact = of.artifacts / f"{SHA256}.wasm"
    asyncio.run(restorer._fetch(committed.item, SHA256, len(DATA), artifact))


def damaged_artifact(directory):
    path = places(directory).artifacts / f"{SHA256}.wasm"
    path.write_bytes(b"damaged")


def image_store(directory):
    return ImageStore(places(directory).images, b"k" * 32, memory_bytes=1 << 30, seconds=60)


def compiler(directory):
    """Stand in for the compiler: the image of anything is its bytes in capitals."""
    script = directory / "compiler.py"
    script.write_text(
        "import sys\n"
        "if '--describe' in sys.argv: print('{\"engine\": \"1\"}')\n"
        "else: sys.stdout.buffer.write(sys.stdin.buffer.read().upper())\n"
    )
    os.environ["WASMFLEET_COMPILER"] = f"{sys.executable} -S {script}"


def compiled(directory):
    compiler(directory)
    path = places(directory).artifacts / f"{SHA256}.wasm"
    path.write_bytes(DATA)
    asyncio.run(image_store(directory).make(path, sha256=SHA256, manifest_sha256="m"))


def image(directory):
    """Content of the image, through its MAC; None for none that may be used."""

    async def read():
        try:
            found = await image_store(directory).open(sha256=SHA256, manifest_sha256="m")
        except images.ImageError:
            return None
        try:
            return os.pread(found.descriptor, 1 << 20, 0)
        finally:
            os.close(found.descriptor)

    compiler(directory)
    return asyncio.run(read())


def damage_image(directory):
    compiled(directory)
    (path,) = places(directory).images.glob("*.cwasm")
    path.chmod(0o600)
    path.write_bytes(DATA)


def evicted(directory):
    here = places(directory)
    images.evict(here.images, here.artifacts, keep=set(), budget_bytes=0)


def files_in(name):
    return lambda directory: sorted(path.name for path in (directory / name).rglob("[!.]*") if path.is_file())


def secret_store(directory):
    here = places(directory)
    return SecretStore(here.secrets, here.identity / "sealing.key", identity.load(here.identity))


def boxed(directory):
    """Fetch a secret. Each box is another one, as its key is: it is made once for a device."""
    kept = directory / "box"
    if not kept.exists():
        who = identity.load(directory / "state/identity")
        key = sealing.load((directory / "state/identity/sealing.key").read_bytes())
        purpose = Purpose(fleet=who.fleet, device=who.device, instance="web", name="key", version=1)
        kept.write_bytes(sealing.seal("hush", recipient=sealing.public_key(key), purpose=purpose))
    box = kept.read_bytes()
    ref = SecretRef(name="key", sha256=hashlib.sha256(box).hexdigest(), version=1)
    committed, _ = committed_demo()
    item = msgspec.structs.replace(committed.item, secrets=(ref,))
    secret_store(directory).fetch(item, SimpleNamespace(request=lambda *_, **__: box))


def run_set(directory):
    committed, _ = committed_demo("other")
    restore.write_runset(places(directory).runset, (committed,), VerifierState(), b"k" * 32)


def cached(directory):
    cache = DirectoryCache(places(directory).trust, write=trust._write_metadata)
    cache.store("timestamp.json", DATA)


def renewed(directory):
    home = directory / "state" / "identity"
    (directory / "other").mkdir(exist_ok=True)
    ca = CertificateAuthority.create(directory / "other", fleet="f", now=NOW)
    key = load_pem_private_key((home / "device.key").read_bytes(), password=None)
    enrolment.install_certificate(home, ca.device(key.public_key(), DEVICE, now=NOW).pem)


def certificate(directory):
    """Return the certificate's last day: it belongs to the device's key, whichever it is."""
    return enrolment.renew_at(directory / "state" / "identity") > datetime.now(UTC) - timedelta(days=1)


def known(directory):
    who = identity.load(directory / "state" / "identity")
    return who.production, who.evidence


def erased(name, text):
    def act(directory):
        path = directory / name
        if path.exists():
            assert identity.erase(identity.Found(text, path, str(path)))

    return act


def boot_file(name, text):
    def prepare(directory):
        (directory / name).write_text(text)

    return prepare


def text_of(name):
    def see(directory):
        path = directory / name
        return path.read_bytes().strip(b"\0") if path.exists() else b""

    return see


def spool_of(directory):
    return Spool.open(places(directory).readings, Bounds())


def message(number):
    return Draft(instance="web", topic="t", data=DATA, session="s", number=number)


def kept(*numbers):
    """Keep messages, each in a segment of its own, as after a start of the agent."""

    def act(directory):
        for number in numbers:
            spool_of(directory).append([message(number)], now=NOW)

    return act


def acknowledged_reading(directory):
    spool_of(directory).acknowledge(1)


def begun_again(directory):
    spool_of(directory)


def readings(directory):
    found = spool_of(directory).read(0, most=9, most_bytes=1 << 20)
    assert all(each.data == DATA and each.sequence == each.position for each in found)
    return tuple(each.position for each in found if each.position != 1)


# A bundle -------------------------------------------------------------------------------------------------------------


def staged(directory):
    files = {"bundle.json": b'{"v":1}', f"desired/{DEVICE}.json": b"{}", "tuf/timestamp.json": DATA}
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w", format=tarfile.USTAR_FORMAT) as file:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            file.addfile(member, io.BytesIO(data))
    made.seek(0)
    stage(made, places(directory).bundle, device=DEVICE)


def half_staged(directory):
    """A bundle of which a power cut has left half, and one before it."""
    staged(directory)
    unpacked = places(directory).bundle.with_name("bundle.new") / "tuf"
    unpacked.mkdir(parents=True)
    (unpacked / "1.root.json").write_bytes(b"half")


def bundle(directory):
    """Return the assignment and the metadata that the agent would find."""
    found = Bundle(places(directory).bundle)
    return found.exists(), found.envelope()


def decided(directory):
    Bundle(places(directory).bundle).done(BundleVerdict(version=3))


def verdict(directory):
    path = places(directory).bundle / "outcome.json"
    told = msgspec.json.decode(path.read_bytes(), type=BundleVerdict).version if path.exists() else 0
    return told, Bundle(places(directory).bundle).envelope()


def with_artifact(directory):
    staged(directory)
    path = places(directory).bundle / names.artifact(SHA256)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(DATA)


def from_bundle(directory):
    """Take an artifact from the bundle, or where it was taken from there already, from the network."""
    into = places(directory).artifacts / f"{SHA256}.wasm"
    network = SimpleNamespace(download=lambda *_, **__: download(directory))
    BundleSource(network, places(directory).bundle).download(
        f"/v1/artifacts/{SHA256}", into, length=len(DATA), sha256=SHA256
    )


# The host -------------------------------------------------------------------------------------------------------------


def host_state(directory):
    path = directory / "host"
    path.mkdir(exist_ok=True)
    return path


def uids(directory):
    resources.can_assign_users = lambda: True
    UidAllocator(host_state(directory) / "uids.json").allocate("web")


def json_in(name):
    def see(directory):
        path = host_state(directory) / name
        return json.loads(path.read_bytes()) if path.exists() else None

    return see


def crashed(directory):
    CrashCounter(host_state(directory) / "crashes.json").remember("web", "target", 2)


def opened(directory):
    sockets = directory / "in"
    HostResources.open(state=host_state(directory), sockets=sockets, address="127.0.0.1")


def wrote(directory):
    QuotaStore(host_state(directory) / "written.json").add("web", 2 << 20)


def quota(directory):
    return QuotaStore(host_state(directory) / "written.json").bytes_today("web")


def logged(directory):
    log = InstanceLog(LogFiles(host_state(directory) / "logs").open("web"))
    log.note("host: a line")


def lines(directory):
    """Lines of the log that are whole; a torn one at its end is no line."""
    path = host_state(directory) / "logs" / "web.log"
    text = path.read_bytes() if path.exists() else b""
    return sum(line.endswith(b"host: a line\n") for line in text.splitlines(keepends=True)) > 0


def old_logs(directory):
    place = host_state(directory) / "logs"
    place.mkdir(exist_ok=True)
    with (place / "gone.log").open("wb") as file:
        file.truncate(65 << 20)


def run_of(schema):
    committed, _ = committed_demo()
    manifest = msgspec.structs.replace(
        committed.manifest, data_schema=schema, grants=Grants(interfaces=("wasi:filesystem/types@0.2.0",))
    )
    return SimpleNamespace(
        instance="web", manifest=manifest, data="", grants=SimpleNamespace(interfaces=manifest.grants.interfaces)
    )


def data(directory):
    asyncio.run(generation.data_directory(run_of(1), None, host_state(directory) / "data", None))


def filled(directory):
    data(directory)
    for number in range(8):
        (host_state(directory) / "data" / "web" / "1" / f"file{number}").write_bytes(DATA)


def of_another_schema(directory):
    """Copy the data for another schema, as a swap to it does."""
    parent = host_state(directory) / "data"
    old = SimpleNamespace(data=str(parent / "web" / "1"), run=run_of(1))
    asyncio.run(generation.data_directory(run_of(2), None, parent, old))


def copies(directory):
    """Return what a version of the other schema would find: nothing, or all of it."""
    place = host_state(directory) / "data" / "web" / "2"
    return sorted(path.name for path in place.iterdir() if path.stat().st_size == len(DATA)) if place.exists() else None


def forgotten(directory):
    place = host_state(directory) / "data" / "web" / "1"
    place.mkdir(exist_ok=True)
    asyncio.run(generation.forget_other_schemas(str(place.with_name("2"))))


def pairs_of(directory, schema=1):
    about = RegisterUser(
        instance="web", schema=schema, before=1, storage_bytes=1 << 20, daily_written_bytes=1 << 20, place=1
    )
    (host_state(directory) / "keyvalue").mkdir(exist_ok=True)
    return open_pairs(host_state(directory) / "keyvalue", about)


def paired(directory):
    """Set a pair and commit it."""
    pairs = pairs_of(directory)
    pairs.set("default", b"a", b"one", 1 << 20)
    pairs.close()


def damaged_pairs(directory):
    """A database of pairs that is none any more."""
    paired(directory)
    (host_state(directory) / "keyvalue" / "web" / "1.db").write_bytes(b"\xff" * 8192)


def of_another_pair(directory):
    pairs_of(directory, schema=2).close()


def pair(schema):
    """Return what a version of this schema would read; None where there is no database yet."""

    def see(directory):
        if not (host_state(directory) / "keyvalue" / "web" / f"{schema}.db").exists():
            return None
        pairs = pairs_of(directory, schema)
        try:
            found = pairs.get("default", b"a")
            return None if found is None else found[0]
        finally:
            pairs.close()

    return see


def pair_if_sound(directory):
    """As `pair`, without opening the database as the store does: None where it is damaged, too."""
    try:
        with contextlib.closing(sqlite3.connect(host_state(directory) / "keyvalue" / "web" / "1.db")) as db:
            return next((row[0] for row in db.execute("SELECT value FROM pairs WHERE key = ?", (b"a",))), None)
    except sqlite3.DatabaseError:
        return None


# The table ------------------------------------------------------------------------------------------------------------


def nothing(_directory):
    return None


@dataclass(frozen=True)
class Row:
    """A named write.

    Attributes:
        act: makes the product write it, in a process that may be killed; and goes on from there in another one.
        see: what the product makes of the disk.
        prepare: what is there before.
        enrolled: there is a device on the disk.
        between: what may be seen beside old and new, and what `act` goes on from.
        alone: nothing more must be written before the new is seen.
    """

    act: Any
    see: Any = nothing
    prepare: Any = nothing
    enrolled: bool = True
    between: tuple[Any, ...] = ()
    alone: bool = True


def gone(*paths):
    def prepare(directory):
        for name in paths:
            with contextlib.suppress(FileNotFoundError):
                (directory / "state" / name).unlink()

    return prepare


def content(name, data):
    def prepare(directory):
        path = directory / "state" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)

    return prepare


def many(*steps):
    def prepare(directory):
        for each in steps:
            each(directory)

    return prepare


NO_STORE = gone("store.db", "store.db-wal", "store.db-shm")
TOKEN = identity.NAME

ROWS = {
    "NEW_IDENTITY": Row(enrol(), joined, enrolled=False),
    "NEW_KEY": Row(enrol(), joined, enrolled=False),
    "NEW_FILE": Row(enrol(), joined, enrolled=False),
    "TOKEN_SPENT": Row(enrol(), joined, enrolled=False),
    "IDENTITY": Row(enrol(), joined, enrolled=False),
    "IDENTITY_DROPPED": Row(enrol("--force"), joined, between=(None,)),
    "STATE_DROPPED": Row(enrol("--force"), joined, between=(None,)),
    "CERTIFICATE": Row(renewed, certificate),
    "PRODUCTION": Row(lambda d: identity.note_production(d / "state/identity"), known),
    "MACHINE": Row(lambda d: identity.note_machine(d / "state/identity", {"serial": "1"}), known),
    "BOOT_TOKEN": Row(erased(TOKEN, "t"), text_of(TOKEN), boot_file(TOKEN, "t")),
    "BOOT_COMMAND": Row(
        erased("cmdline.txt", "t"), text_of("cmdline.txt"), boot_file("cmdline.txt", f"quiet {TOKEN}=t ro\n")
    ),
    "MAC_KEY": Row(agent, runs_the_same, gone("identity/mac.key")),
    "MAC_KEY_DAMAGED": Row(agent, runs_the_same, content("identity/mac.key", b"")),
    "LOCK": Row(agent, runs_the_same, gone("agent.lock", "lock")),
    "STARTED": Row(agent, runs_the_same),
    "ENDED": Row(agent, runs_the_same),
    "AGENT_LOG": Row(agent, runs_the_same),
    "AGENT_LOG_TURNED": Row(agent, runs_the_same, content("log/agent.log", b"x" * LOG_BYTES)),
    "WAKE": Row(agent, runs_the_same, gone("wake")),
    "CHECK": Row(command("check"), runs_the_same),
    "ARCHIVE": Row(command("diagnose", "-o", "{}/archive.tar.gz"), runs_the_same),
    "METRICS": Row(command("metrics", "--textfile", "{}/wasmfleet.prom"), runs_the_same),
    "LEFTOVERS": Row(agent, runs_the_same, content(".new-00000000-x", b"x")),
    "STORE_SCHEMA": Row(agent, runs_the_same, NO_STORE),
    "STORE_FILLED": Row(agent, runs_the_same, NO_STORE),
    "STORE_DAMAGED": Row(agent, runs_the_same, many(NO_STORE, content("store.db", bytes(8192)))),
    "STORE_STEP": Row(with_store(step), store_of),
    "STORE_SAVED": Row(with_store(lambda store: store.save(facts=VerifierState(root=7))), store_of),
    "STORE_ACCEPTED": Row(with_store(lambda store: store.accept(b"e", 5, VerifierState(root=8))), store_of),
    "STORE_META": Row(with_store(lambda store: store.set_problems(["a problem"])), store_of),
    "STORE_COUNTER": Row(with_store(lambda store: store.set_counter("deployed", 5)), store_of),
    "STORE_ACKED": Row(with_store(lambda store: store.acknowledge(1)), store_of),
    "STORE_UNACKED": Row(
        with_store(lambda store: store.unacknowledge(0)), store_of, with_store(lambda store: store.acknowledge(1))
    ),
    "READINGS": Row(kept(2), readings, kept(1)),
    "READINGS_REMOVED": Row(acknowledged_reading, readings, kept(1, 2)),
    "READINGS_DAMAGED": Row(
        begun_again,
        files_in("state/readings"),
        many(kept(1), content("readings/0000000000000002.seg", bytes(9))),
    ),
    "RUNSET": Row(run_set, lambda d: restore.read_runset(places(d).runset, b"k" * 32)[0].item.instance),
    "PART": Row(download, artifact),
    "PART_DROPPED": Row(dropped),
    "MARK": Row(download, artifact, alone=False),
    "MARK_DROPPED": Row(download, artifact),
    "ARTIFACT": Row(download, artifact),
    "ARTIFACT_AGAIN": Row(lost_artifact, artifact),
    "ARTIFACT_DAMAGED": Row(artifact_if_sound, files_in("state/artifacts"), damaged_artifact),
    "IMAGE": Row(compiled, image, alone=False),
    "IMAGE_NOTE": Row(compiled, image),
    "IMAGE_DAMAGED": Row(lambda d: image(d) and None, files_in("state/images"), damage_image),
    "EVICTED": Row(evicted, files_in("state/images"), compiled),
    "BOX": Row(boxed, files_in("state/secrets")),
    "BOX_EVICTED": Row(lambda d: secret_store(d).evict(()), files_in("state/secrets"), boxed),
    "TRUST": Row(cached, lambda d: DirectoryCache(places(d).trust).load("timestamp.json")),
    "BUNDLE_FILE": Row(staged, bundle),
    "BUNDLE_DROPPED": Row(staged, bundle, half_staged),
    "BUNDLE": Row(staged, bundle),
    "BUNDLE_VERDICT": Row(decided, verdict, staged, between=((3, b"{}"),), alone=False),
    "BUNDLE_DONE": Row(decided, verdict, staged, between=((3, b"{}"),)),
    "BUNDLE_ARTIFACT": Row(from_bundle, artifact, with_artifact),
    "DIRECTORY": Row(agent, runs_the_same),
    "UIDS": Row(uids, json_in("uids.json")),
    "UIDS_DAMAGED": Row(uids, lambda d: None, lambda d: (host_state(d) / "uids.json").write_bytes(b"\0")),
    "CRASHES": Row(crashed, json_in("crashes.json")),
    "CRASHES_RENAMED": Row(opened, nothing, lambda d: (host_state(d) / "deaths.json").write_bytes(b"{}")),
    "QUOTA": Row(wrote, lambda d: quota(d) > 0),
    "INSTANCE_LOG": Row(logged, lines),
    "INSTANCE_LOG_EVICTED": Row(logged, lines, old_logs),
    "DATA": Row(data),
    "DATA_COPIED": Row(of_another_schema, copies, filled),
    "DATA_REMOVED": Row(forgotten, lambda d: None, filled),
    "KEYVALUE": Row(paired, pair(1)),
    "KEYVALUE_SAVED": Row(paired, pair(1)),
    "KEYVALUE_COPIED": Row(of_another_pair, pair(2), paired),
    "KEYVALUE_DAMAGED": Row(paired, pair_if_sound, damaged_pairs),
}
