"""HTTPS client against a real server: limits, deadlines, resuming, and the fleet's CA."""

import hashlib
import json
import os
import random
import ssl
import threading
import time
from contextlib import closing
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from agent import disk
from agent.clock import ReferenceClock
from agent.config import Network
from agent.disk import Point, Write
from agent.identity import enrolment
from agent.link import dialer, partial_file
from agent.link import https as https_module
from agent.link.https import CancelledError, FetchError, FixedTls, HttpsClient
from fleet.ca import CertificateAuthority
from fleet.protocol.codes import RejectCode
from tests.agent.slow_link import SlowLink
from tests.agent.tunnel_proxy import TunnelProxy

DATA = os.urandom(300_000)
SHA = hashlib.sha256(DATA).hexdigest()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        self.server.seen.append((self.path, self.headers.get("Range")))
        self.server.answer(self)

    def log_message(self, *_):
        pass

    def send(self, status, body, **headers):
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    def send_file(self, data, *, stop_after=None):
        start = int((self.headers.get("Range") or "bytes=0-").removeprefix("bytes=").rstrip("-"))
        rest = data[start:]
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(rest)))
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        self.end_headers()
        self.wfile.write(rest if stop_after is None else rest[:stop_after])
        if stop_after is not None:
            self.wfile.flush()
            self.close_connection = True


@pytest.fixture(scope="module")
def ca(tmp_path_factory):
    return CertificateAuthority.create(tmp_path_factory.mktemp("ca"), fleet="f", now=datetime.now(UTC))


def serve(ca, directory, *, hosts=("127.0.0.1",), now=None):
    pair = ca.server(hosts, now=now or datetime.now(UTC))
    (directory / "cert.pem").write_bytes(pair.certificate_pem)
    (directory / "key.pem").write_bytes(pair.key_pem)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(directory / "cert.pem", directory / "key.pem")
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    server.daemon_threads = True
    server.handle_error = lambda *_: None
    server.seen = []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server


@pytest.fixture
def server(ca, tmp_path):
    made = serve(ca, tmp_path)
    yield made
    made.shutdown()
    made.server_close()


@pytest.fixture
def https(ca, server):
    return HttpsClient(
        f"https://127.0.0.1:{server.server_port}", FixedTls(https_module.context(ca.pem)), request_s=5, download_s=5
    )


def download(https, into, **more):
    https.download("/a", into, length=len(DATA), sha256=SHA, **more)


def test_a_download_is_complete_and_read_only(https, server, tmp_path):
    server.answer = lambda handler: handler.send_file(DATA)
    download(https, tmp_path / "a.wasm")
    assert (tmp_path / "a.wasm").read_bytes() == DATA
    assert (tmp_path / "a.wasm").stat().st_mode & 0o777 == 0o444
    assert not (tmp_path / "a.wasm.part").exists()


def test_a_download_resumes_where_it_ended(https, server, tmp_path):
    server.answer = lambda handler: handler.send_file(DATA, stop_after=100_000)
    with pytest.raises(FetchError) as caught:
        download(https, tmp_path / "a.wasm")
    assert caught.value.code is RejectCode.UNREACHABLE
    # A restarted agent has a new client.
    server.answer = lambda handler: handler.send_file(DATA)
    download(https, tmp_path / "a.wasm")
    assert server.seen[1][1] == "bytes=100000-"
    assert (tmp_path / "a.wasm").read_bytes() == DATA


def test_a_server_without_resume_support_sends_the_whole_file(https, server, tmp_path):
    (tmp_path / "a.wasm.part").write_bytes(DATA[:5000])
    server.answer = lambda handler: handler.send(200, DATA)
    download(https, tmp_path / "a.wasm")
    assert (tmp_path / "a.wasm").read_bytes() == DATA


def test_a_file_with_another_hash_is_refused_and_removed(https, server, tmp_path):
    server.answer = lambda handler: handler.send_file(DATA[:-1] + b"?")
    with pytest.raises(FetchError) as caught:
        download(https, tmp_path / "a.wasm")
    assert caught.value.code is RejectCode.HASH_MISMATCH
    assert not list(tmp_path.glob("a.wasm*"))


PARTIAL = {
    "planted": b"x" * 1000,
    "stale blocks after a power cut": DATA[:5000] + bytes(1000),
    "stale blocks, and complete": DATA[:-1000] + bytes(1000),
}


@pytest.mark.parametrize("part", PARTIAL.values(), ids=PARTIAL)
def test_a_partial_file_with_other_bytes_is_fetched_from_its_start(https, server, tmp_path, part):
    (tmp_path / "a.wasm.part").write_bytes(part)
    server.answer = lambda handler: handler.send_file(DATA)
    download(https, tmp_path / "a.wasm")
    assert (tmp_path / "a.wasm").read_bytes() == DATA
    assert server.seen[-1][1] is None, "no range"


def test_a_file_with_another_hash_is_refused_after_a_resume_and_a_fresh_start(https, server, tmp_path):
    (tmp_path / "a.wasm.part").write_bytes(DATA[:5000])
    server.answer = lambda handler: handler.send_file(DATA[:-1] + b"?")
    with pytest.raises(FetchError) as caught:
        download(https, tmp_path / "a.wasm")
    assert caught.value.code is RejectCode.HASH_MISMATCH
    assert [asked for _, asked in server.seen] == ["bytes=5000-", None]
    assert not list(tmp_path.glob("a.wasm*"))


def test_a_download_stops_at_the_signed_length(https, server, tmp_path):
    server.answer = lambda handler: handler.send(200, DATA + b"more")
    with pytest.raises(FetchError) as caught:
        download(https, tmp_path / "a.wasm")
    assert caught.value.code is RejectCode.LENGTH_MISMATCH


def test_a_404_is_not_found(https, server, tmp_path):
    server.answer = lambda handler: handler.send(404, b"no")
    with pytest.raises(FetchError) as caught:
        download(https, tmp_path / "a.wasm")
    assert (caught.value.code, caught.value.status) == (RejectCode.NOT_FOUND, 404)


def test_a_server_error_may_pass(https, server):
    server.answer = lambda handler: handler.send(503, b"later")
    with pytest.raises(FetchError) as caught:
        https.request("GET", "/v1/desired", max_bytes=100)
    assert (caught.value.code, caught.value.status) == (RejectCode.UNREACHABLE, 503)


def mark(path, have, sha256):
    (path / "a.wasm.part.mark").write_text(json.dumps({"bytes": have, "sha256": sha256}))


def test_after_a_power_cut_a_download_goes_on_from_its_checkpoint(https, server, tmp_path):
    """The file has its length, and blocks at its end that were never written."""
    (tmp_path / "a.wasm.part").write_bytes(DATA[:200_000] + bytes(50_000))
    mark(tmp_path, 200_000, hashlib.sha256(DATA[:200_000]).hexdigest())
    server.answer = lambda handler: handler.send_file(DATA)
    download(https, tmp_path / "a.wasm")
    assert [asked for _, asked in server.seen] == ["bytes=200000-"]
    assert (tmp_path / "a.wasm").read_bytes() == DATA
    assert [path.name for path in tmp_path.glob("a.wasm*")] == ["a.wasm"]


CHECKPOINTS = {
    "of other bytes": (200_000, "0" * 64),
    "beyond the file": (290_000, hashlib.sha256(DATA[:290_000]).hexdigest()),
    "of more than there is": (10**12, SHA),
}


@pytest.mark.parametrize(("have", "sha256"), CHECKPOINTS.values(), ids=CHECKPOINTS)
def test_a_checkpoint_that_does_not_hold_starts_from_zero_at_once(https, server, tmp_path, have, sha256):
    (tmp_path / "a.wasm.part").write_bytes(DATA[:250_000])
    mark(tmp_path, have, sha256)
    server.answer = lambda handler: handler.send_file(DATA)
    download(https, tmp_path / "a.wasm")
    assert [asked for _, asked in server.seen] == [None]


@pytest.mark.parametrize("content", ["", "[]", "\0" * 40, '{"bytes": -1, "sha256": ""}'])
def test_a_damaged_checkpoint_is_none(https, server, tmp_path, content):
    (tmp_path / "a.wasm.part").write_bytes(DATA[:5000])
    (tmp_path / "a.wasm.part.mark").write_text(content)
    server.answer = lambda handler: handler.send_file(DATA)
    download(https, tmp_path / "a.wasm")
    assert (tmp_path / "a.wasm").read_bytes() == DATA


def test_checkpoints_are_made_on_the_way_and_at_the_end_of_an_attempt(https, server, tmp_path, monkeypatch):
    monkeypatch.setattr(partial_file, "STEP_BYTES", 50_000)
    made = []

    def record(what, point, _path, data):
        if (what, point) == (Write.MARK, Point.AFTER):
            made.append(json.loads(data)["bytes"])

    monkeypatch.setattr(disk, "reached", record)
    server.answer = lambda handler: handler.send_file(DATA, stop_after=180_000)
    with pytest.raises(FetchError):
        download(https, tmp_path / "a.wasm")
    assert len(made) >= 3
    assert made[-1] == 180_000
    server.answer = lambda handler: handler.send_file(DATA)
    download(https, tmp_path / "a.wasm")
    assert server.seen[-1][1] == "bytes=180000-"


STATUSES = {
    204: (RejectCode.UNREACHABLE, "no answer to this request"),
    206: (RejectCode.UNREACHABLE, "no answer to this request"),
    301: (RejectCode.UNREACHABLE, "login page"),
    302: (RejectCode.UNREACHABLE, "login page"),
    304: (RejectCode.UNREACHABLE, "login page"),
    307: (RejectCode.UNREACHABLE, "login page"),
    400: (RejectCode.UNREACHABLE, "refuses this request"),
    401: (RejectCode.UNREACHABLE, "asks for a certificate"),
    403: (RejectCode.UNREACHABLE, "refuses this device"),
    404: (RejectCode.NOT_FOUND, "does not have it"),
    405: (RejectCode.UNREACHABLE, "does not know this request"),
    408: (RejectCode.UNREACHABLE, "took too long"),
    410: (RejectCode.NOT_FOUND, "does not have it"),
    413: (RejectCode.UNREACHABLE, "too large"),
    418: (RejectCode.UNREACHABLE, "refuses this request"),
    429: (RejectCode.UNREACHABLE, "asks too often"),
    500: (RejectCode.UNREACHABLE, "problem of its own"),
    502: (RejectCode.UNREACHABLE, "cannot reach it"),
    503: (RejectCode.UNREACHABLE, "starting, stopping or busy"),
    504: (RejectCode.UNREACHABLE, "does not answer"),
    511: (RejectCode.UNREACHABLE, "login page"),
    599: (RejectCode.UNREACHABLE, "problem of its own"),
}


@pytest.mark.parametrize(("status", "told"), STATUSES.items(), ids=[str(status) for status in STATUSES])
def test_each_status_has_its_meaning_and_none_is_a_file(https, server, tmp_path, status, told):
    code, words = told
    body = b"" if status in {204, 304} else b"<html>"
    server.answer = lambda handler: handler.send(status, body, Location="http://login.example/")
    with pytest.raises(FetchError, match=words) as caught:
        https.request("GET", "/v1/desired", max_bytes=100)
    assert caught.value.code is code
    with pytest.raises(FetchError, match="does not resume" if status == 206 else words) as caught:
        download(https, tmp_path / "a.wasm")
    assert caught.value.code is code
    assert not (tmp_path / "a.wasm").exists()


@pytest.mark.parametrize("status", [302, 403, 429, 500, 503, 511])
def test_a_status_on_the_way_costs_no_byte_of_a_partial_file(https, server, tmp_path, status):
    (tmp_path / "a.wasm.part").write_bytes(DATA[:5000])
    server.answer = lambda handler: handler.send(status, b"<html>")
    with pytest.raises(FetchError):
        download(https, tmp_path / "a.wasm")
    assert (tmp_path / "a.wasm.part").read_bytes() == DATA[:5000]
    server.answer = lambda handler: handler.send_file(DATA)
    download(https, tmp_path / "a.wasm")
    assert server.seen[-1][1] == "bytes=5000-"


@pytest.mark.parametrize("seed", range(3))
def test_a_link_that_breaks_again_and_again_brings_each_byte_once(ca, server, tmp_path, seed):
    """With a new client each time, as after a restart of the agent."""
    chance, sent, codes = random.Random(seed), [], set()

    def answer(handler):
        start = int((handler.headers.get("Range") or "bytes=0-").removeprefix("bytes=").rstrip("-"))
        sent.append(min(chance.randrange(1, 60_000), len(DATA) - start))
        handler.send_file(DATA, stop_after=sent[-1])

    server.answer = answer
    for _ in range(1000):
        client = HttpsClient(f"https://127.0.0.1:{server.server_port}", FixedTls(https_module.context(ca.pem)))
        try:
            download(client, tmp_path / "a.wasm")
            break
        except FetchError as error:
            codes.add(error.code)
    assert codes == {RejectCode.UNREACHABLE}
    assert (tmp_path / "a.wasm").read_bytes() == DATA
    assert sum(sent) == len(DATA)


def small_device(ca, link):
    """A client with a device's limits; a new one each time, as after a restart of the agent."""
    limits = Network()
    return HttpsClient(
        f"https://127.0.0.1:{link.port}",
        FixedTls(https_module.context(ca.pem)),
        request_s=limits.request_s,
        download_s=limits.download_s,
        min_rate_bytes_s=limits.min_rate_bytes_s,
    )


@pytest.mark.nightly
@pytest.mark.parametrize("cut_after", [None, 20_000], ids=["whole", "cut"])
def test_a_radio_link_of_64_kbit_s_brings_everything(ca, server, tmp_path, cut_after):
    """With 300 ms, 5 % of packets lost, and where it is cut, no byte but those on the way comes twice."""
    data, ends = DATA[:60_000], []
    server.answer = lambda handler: handler.send_file(data)
    with closing(SlowLink(server.server_port, cut_after=cut_after)) as link:
        while len(ends) < 20:
            try:
                sha256 = hashlib.sha256(data).hexdigest()
                small_device(ca, link).download("/a", tmp_path / "a.wasm", length=len(data), sha256=sha256)
                break
            except FetchError as error:
                ends.append(error.code)
        link.cut_after = None
        server.answer = lambda handler: handler.send(200, b"ok")
        assert small_device(ca, link).request("GET", "/", max_bytes=10) == b"ok"
    assert (tmp_path / "a.wasm").read_bytes() == data
    assert set(ends) == (set() if cut_after is None else {RejectCode.UNREACHABLE})
    starts = [int(sent.removeprefix("bytes=").rstrip("-")) for _, sent in server.seen if sent]
    assert starts == sorted(set(starts)), "each goes on where the last one ended"
    assert len(starts) == len(ends)


RETRY_AFTER = {"120": 120.0, "0": 0.0, "": 0.0, "soon": 0.0, "-5": 0.0, "9" * 15: 86_400.0, "9" * 5000: 0.0}


@pytest.mark.parametrize(("value", "seconds"), RETRY_AFTER.items(), ids=[key[:20] for key in RETRY_AFTER])
def test_the_servers_window_is_read_and_bounded(https, server, value, seconds):
    server.answer = lambda handler: handler.send(503, b"", Retry_After=value)
    with pytest.raises(FetchError) as caught:
        https.request("GET", "/", max_bytes=10)
    assert caught.value.retry_after_s == seconds


def test_the_servers_window_may_be_a_date(https, server):
    at = datetime.now(UTC) + timedelta(hours=1)
    server.answer = lambda handler: handler.send(503, b"", Retry_After=format_datetime(at, usegmt=True))
    with pytest.raises(FetchError) as caught:
        https.request("GET", "/", max_bytes=10)
    assert 3000 < caught.value.retry_after_s <= 3600


def test_devices_spread_over_the_servers_window():
    delays = [https_module.spread(0.0, 100.0) for _ in range(1000)]
    assert min(delays) >= 100
    assert max(delays) <= 200
    assert max(delays) - min(delays) > 80


def test_a_problem_is_told_in_the_servers_words(https, server):
    body = b'{"type": "x", "title": "no such thing", "detail": "really", "action": "look elsewhere", "status": 409}'
    server.answer = lambda handler: handler.send(409, body)
    with pytest.raises(FetchError, match=r"answered 409: no such thing: really \(look elsewhere\)"):
        https.request("GET", "/", max_bytes=1000)


LENGTHS = {"more than announced": (10, b"x" * 20), "less than announced": (20, b"x" * 10)}


@pytest.mark.parametrize(("length", "body"), LENGTHS.values(), ids=LENGTHS)
def test_a_wrong_length_is_no_answer(https, server, length, body):
    def lie(handler):
        handler.send_response(200)
        handler.send_header("Content-Length", str(length))
        handler.end_headers()
        handler.wfile.write(body)
        handler.wfile.flush()
        handler.close_connection = True

    server.answer = lie
    if length > len(body):
        with pytest.raises(FetchError, match="ended early"):
            https.request("GET", "/", max_bytes=100)
    else:
        assert https.request("GET", "/", max_bytes=100) == body[:length]


@pytest.mark.parametrize("where", ["head", "body"])
def test_single_bytes_however_steady_end_at_the_deadline(ca, server, where):
    """One byte every few seconds would otherwise hold a thread of the agent for ever: each comes in time."""
    ended = threading.Event()

    def drip(handler):
        try:
            if where == "body":
                handler.send_response(200)
                handler.send_header("Content-Length", "1000000")
                handler.end_headers()
            else:
                handler.wfile.write(b"HTTP/1.1 200 OK\r\nX: ")
            while True:
                handler.wfile.write(b"x")
                time.sleep(0.05)
        except OSError:
            ended.set()

    server.answer = drip
    hasty = HttpsClient(f"https://127.0.0.1:{server.server_port}", FixedTls(https_module.context(ca.pem)), request_s=1)
    with pytest.raises(FetchError) as caught:
        hasty.request("GET", "/", max_bytes=1 << 20)
    assert caught.value.code is RejectCode.TOO_SLOW
    assert ended.wait(60)


def test_a_closed_client_ends_its_requests_and_serves_later_ones(https, server):
    began, ended = threading.Event(), []

    def hold(handler):
        began.set()
        handler.rfile.read(1)  # until the client is gone

    def ask():
        try:
            https.request("GET", "/", max_bytes=10, within_s=600)
        except FetchError as error:
            ended.append(error)

    server.answer = hold
    asking = threading.Thread(target=ask)
    asking.start()
    assert began.wait(60)
    https.close()
    asking.join(60)
    assert len(ended) == 1
    server.answer = lambda handler: handler.send(200, b"ok")
    assert https.request("GET", "/", max_bytes=10) == b"ok"


def test_a_login_page_in_place_of_tls_is_named_as_that(ca):
    page = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=page.serve_forever, daemon=True).start()
    client = HttpsClient(f"https://127.0.0.1:{page.server_port}", FixedTls(https_module.context(ca.pem)))
    with pytest.raises(FetchError, match="login page of a network"):
        client.request("GET", "/", max_bytes=10)
    page.shutdown()
    page.server_close()


def test_a_response_above_its_limit_is_refused(https, server):
    server.answer = lambda handler: handler.send(200, b"x" * 101)
    with pytest.raises(FetchError) as caught:
        https.request("GET", "/v1/tuf/timestamp.json", max_bytes=100)
    assert caught.value.code is RejectCode.TOO_LARGE


def test_missing_space_is_detected_before_the_download(ca, server, tmp_path):
    wants_all = HttpsClient(
        f"https://127.0.0.1:{server.server_port}", FixedTls(https_module.context(ca.pem)), reserve_bytes=1 << 60
    )
    with pytest.raises(FetchError) as caught:
        download(wants_all, tmp_path / "a.wasm")
    assert caught.value.code is RejectCode.NO_SPACE
    assert server.seen == []


def test_a_transfer_below_the_minimum_rate_is_aborted(ca, server, tmp_path, monkeypatch):
    monkeypatch.setattr(https_module, "RATE_WINDOW_S", 0.2)

    def drip(handler):
        handler.send_response(200)
        handler.send_header("Content-Length", str(len(DATA)))
        handler.end_headers()
        for byte in DATA:
            try:
                handler.wfile.write(bytes([byte]))
            except OSError:
                return
            time.sleep(0.05)

    server.answer = drip
    fussy = HttpsClient(
        f"https://127.0.0.1:{server.server_port}", FixedTls(https_module.context(ca.pem)), min_rate_bytes_s=10_000
    )
    with pytest.raises(FetchError) as caught:
        download(fussy, tmp_path / "a.wasm")
    assert caught.value.code is RejectCode.TOO_SLOW
    assert (tmp_path / "a.wasm.part").stat().st_size > 0


def test_the_total_deadline_applies_to_an_active_server(ca, server):
    def tease(handler):
        handler.send_response(200)
        handler.send_header("Content-Length", "1000000")
        handler.end_headers()
        try:
            while True:
                handler.wfile.write(b"x")
                time.sleep(0.02)
        except OSError:
            pass

    server.answer = tease
    hasty = HttpsClient(
        f"https://127.0.0.1:{server.server_port}", FixedTls(https_module.context(ca.pem)), request_s=0.3
    )
    with pytest.raises(FetchError) as caught:
        hasty.request("GET", "/", max_bytes=1 << 20)
    assert caught.value.code is RejectCode.TOO_SLOW


def test_a_cancelled_download_stops(https, server, tmp_path):
    server.answer = lambda handler: handler.send_file(DATA)
    cancelled = threading.Event()
    cancelled.set()
    with pytest.raises(CancelledError):
        download(https, tmp_path / "a.wasm", cancelled=cancelled)


def test_another_ca_is_not_trusted(server, tmp_path_factory):
    other = CertificateAuthority.create(tmp_path_factory.mktemp("other"), fleet="f", now=datetime.now(UTC))
    stranger = HttpsClient(f"https://127.0.0.1:{server.server_port}", FixedTls(https_module.context(other.pem)))
    with pytest.raises(FetchError) as caught:
        stranger.request("GET", "/", max_bytes=10)
    assert caught.value.code is RejectCode.UNREACHABLE
    assert "TLS" in caught.value.message
    assert server.seen == []


def test_an_unreachable_server_is_reported_with_one_sentence(ca, free_port):
    nobody = HttpsClient(f"https://127.0.0.1:{free_port}", FixedTls(https_module.context(ca.pem)))
    with pytest.raises(FetchError) as caught:
        nobody.request("GET", "/", max_bytes=10)
    assert "refused" in caught.value.message.lower()


def without_a_clock(ca, floor):
    """Make TLS settings of a device whose clock is in 1970 and whose floor is `floor`."""
    return FixedTls(https_module.context(ca.pem, clock_behind=True), floor)


@pytest.mark.parametrize(("days_after_its_end", "accepted"), [(-10, True), (10, False)])
def test_without_a_clock_certificates_are_checked_against_the_floor(ca, tmp_path, days_after_its_end, accepted):
    # The server's certificate is in the clock's future, and in the second row expired at the floor.
    issued = datetime.now(UTC) + timedelta(days=400)
    server = serve(ca, tmp_path, now=issued)
    server.answer = lambda handler: handler.send(200, b"ok")
    floor = issued + timedelta(days=90 + days_after_its_end)
    https = HttpsClient(f"https://127.0.0.1:{server.server_port}", without_a_clock(ca, floor))
    try:
        if accepted:
            assert https.request("GET", "/", max_bytes=10) == b"ok"
        else:
            with pytest.raises(FetchError, match="TLS: the server's certificate expired on"):
                https.request("GET", "/", max_bytes=10)
            assert server.seen == []
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture
def device(ca, tmp_path):
    """Make key and certificate of a device, as enrolment does."""
    key = ec.generate_private_key(ec.SECP256R1())
    (tmp_path / "device.key").write_bytes(enrolment._private_pem(key))
    (tmp_path / "ca.pem").write_text(ca.pem)
    (tmp_path / "device.pem").write_text(ca.device(key.public_key(), "b-01234567", now=datetime.now(UTC)).pem)
    return key


def test_the_tls_context_is_reloaded_after_a_renewal(ca, device, tmp_path):
    now = datetime.now(UTC)
    tls = https_module.DeviceTls(tmp_path, ReferenceClock(datetime(2020, 1, 1, tzinfo=UTC)))
    first = tls.for_connection()
    assert first.floor is None
    assert tls.for_connection().context is first.context
    enrolment.install_certificate(tmp_path, ca.device(device.public_key(), "b-01234567", now=now).pem)
    assert tls.for_connection().context is not first.context
    # A certificate for another key is refused.
    other = ec.generate_private_key(ec.SECP256R1())
    with pytest.raises(enrolment.EnrolError, match="another key"):
        enrolment.install_certificate(tmp_path, ca.device(other.public_key(), "b-01234567", now=now).pem)


@pytest.mark.parametrize("content", [b"", b"\0" * 100, None], ids=["empty", "zeros", "missing"])
def test_a_damaged_file_of_the_identity_fails_the_request_and_nothing_else(device, tmp_path, content):
    path = tmp_path / "ca.pem"
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    client = HttpsClient("https://127.0.0.1:1", https_module.DeviceTls(tmp_path, ReferenceClock(datetime.now(UTC))))
    with pytest.raises(FetchError):
        client.request("GET", "/v1/desired", max_bytes=1)


class ClockThatIsSet(ReferenceClock):
    """Clock that is behind at the first query, and is set right afterwards."""

    asked = 0

    @property
    def behind(self):
        self.asked += 1
        return self.asked == 1


@pytest.mark.parametrize("ended_days_ago", [10, 400])
def test_setting_the_clock_during_a_handshake_accepts_no_expired_certificate(ca, device, tmp_path, ended_days_ago):
    """Each connection decides once: either OpenSSL checks the certificate's end, or `check_not_after` does."""
    now = datetime.now(UTC)
    server = serve(ca, tmp_path, now=now - timedelta(days=90 + ended_days_ago))
    server.answer = lambda handler: handler.send(200, b"ok")
    tls = https_module.DeviceTls(tmp_path, ClockThatIsSet(now))
    https = HttpsClient(f"https://127.0.0.1:{server.server_port}", tls)
    try:
        with pytest.raises(FetchError, match="TLS: the server's certificate expired on"):
            https.request("GET", "/", max_bytes=10)
        with pytest.raises(FetchError, match="expired"):
            https.request("GET", "/", max_bytes=10)
        assert server.seen == []
    finally:
        server.shutdown()
        server.server_close()


def test_a_certificate_is_renewed_at_two_thirds(ca, tmp_path):
    now = datetime.now(UTC).replace(microsecond=0)
    key = ec.generate_private_key(ec.SECP256R1())
    (tmp_path / "device.pem").write_text(ca.device(key.public_key(), "b-01234567", now=now).pem)
    assert timedelta(days=55) < enrolment.renew_at(tmp_path) - now < timedelta(days=65)


def test_requests_are_tunnelled_through_a_proxy(ca, server, tmp_path, monkeypatch):
    server.answer = lambda handler: handler.send_file(DATA)
    proxy = TunnelProxy()
    where = f"https://127.0.0.1:{server.server_port}"
    configured = HttpsClient(where, FixedTls(https_module.context(ca.pem)), proxy=f"http://127.0.0.1:{proxy.port}")
    download(configured, tmp_path / "a.wasm")
    assert (tmp_path / "a.wasm").read_bytes() == DATA
    assert proxy.asked == [f"127.0.0.1:{server.server_port}"]
    # The environment's proxy applies too, unless it excludes this host.
    monkeypatch.setenv("https_proxy", f"http://127.0.0.1:{proxy.port}")
    monkeypatch.setenv("no_proxy", "")
    assert dialer.proxy_for("127.0.0.1", "") is not None
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    assert dialer.proxy_for("127.0.0.1", "") is None
    proxy.close()
