"""Devices join and stay: tokens, certificates over real TLS, renewal, and being shut out."""

import asyncio
import contextlib
import hashlib
import ssl
from datetime import UTC, datetime, timedelta

import httpx
import msgspec
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding

from fleet import ca
from fleet.ca import BadRequestError, CertificateAuthority
from fleet.protocol import operator_api, wire
from fleet.protocol.messages import DesiredReply, EnrolRequest, RenewRequest, Token
from fleet.server.service import Server
from signing import dsse
from signing.verifier import Challenge, accept_freshness


async def try_enrol(fleet, secret, *, name="device", key=None, csr=None):
    pem = csr or certificate_request(key or ec.generate_private_key(ec.SECP256R1()))
    async with httpx.AsyncClient(verify=fleet.operator_context(), base_url=fleet.made.url, timeout=60) as http:
        request = EnrolRequest(secret=secret, name=name, csr_pem=pem, sealing_key="")
        return await http.post("/v1/enrol", content=wire.encode(request))


@pytest.mark.asyncio
async def test_what_the_token_pins_is_what_the_server_shows(new_fleet):
    async with new_fleet() as fleet:
        token = Token.decode(await fleet.operator.token())
        device = await fleet.enrol("a")
        authority = x509.load_pem_x509_certificate(device.enrolled.ca_pem.encode())
        assert hashlib.sha256(authority.public_bytes(Encoding.DER)).hexdigest() == token.ca_sha256
        assert hashlib.sha256(device.enrolled.root.encode()).hexdigest() == token.root_sha256
        assert token.url == fleet.made.url
        leaf = x509.load_pem_x509_certificate(device.enrolled.certificate_pem.encode())
        (name,) = leaf.subject.get_attributes_for_oid(x509.NameOID.COMMON_NAME)
        assert name.value == device.id
        assert device.id.startswith("a-")
        assert not device.enrolled.production


@pytest.mark.asyncio
async def test_a_token_is_good_for_one_device_and_one_key(new_fleet):
    async with new_fleet() as fleet:
        secret = Token.decode(await fleet.operator.token()).secret
        key = ec.generate_private_key(ec.SECP256R1())
        first = await try_enrol(fleet, secret, key=key)
        assert first.status_code == 201
        # the answer was lost on the way: the same device may ask again
        again = await try_enrol(fleet, secret, key=key)
        assert again.status_code == 201
        assert again.json()["device"] == first.json()["device"]
        # a second device may not
        other = await try_enrol(fleet, secret)
        assert (other.status_code, other.json()["type"]) == (403, "token-used")
        assert "fleet enroll-token" in other.json()["action"]
        # nor may a copied image with the same key and a token of its own
        fresh = Token.decode(await fleet.operator.token()).secret
        clone = await try_enrol(fleet, fresh, key=key)
        assert (clone.status_code, clone.json()["type"]) == (409, "device-exists")
        # and its token is still good for a device with a key of its own
        assert (await try_enrol(fleet, fresh)).status_code == 201


@pytest.mark.asyncio
async def test_bad_enrolments_are_refused_with_a_sentence(new_fleet):
    async with new_fleet() as fleet:
        secret = Token.decode(await fleet.operator.token()).secret
        rows = [
            (await try_enrol(fleet, "guess"), 403, "token-unknown"),
            (await try_enrol(fleet, secret, name="No Name"), 400, "bad-name"),
            (await try_enrol(fleet, secret, csr="nonsense"), 400, "bad-request"),
            (await try_enrol(fleet, secret, key=rsa.generate_private_key(65537, 2048)), 400, "bad-request"),
        ]
        for reply, status, kind in rows:
            assert (reply.status_code, reply.json()["type"]) == (status, kind)
        async with httpx.AsyncClient(verify=fleet.operator_context(), base_url=fleet.made.url, timeout=60) as http:
            assert (await http.post("/v1/enrol", content=b"{}")).json()["type"] == "bad-request"
        # none of this has spent the token
        assert (await try_enrol(fleet, secret)).status_code == 201


class Ahead(Server):
    """A server whose clock the story sets ahead."""

    ahead = timedelta()


@pytest.mark.asyncio
async def test_an_expired_token_is_refused(new_fleet):
    Ahead.ahead = timedelta()
    async with with_clock(new_fleet) as fleet:
        secret = Token.decode(await fleet.operator.token()).secret
        Ahead.ahead = timedelta(hours=2)
        reply = await try_enrol(fleet, secret)
        assert (reply.status_code, reply.json()["type"]) == (403, "token-expired")


@contextlib.asynccontextmanager
async def with_clock(new_fleet):
    """A fleet whose server's clock can be set ahead."""
    async with new_fleet() as fleet:
        await fleet.stop()
        fleet.server = Ahead(fleet.home, clock=lambda: datetime.now(UTC) + Ahead.ahead)
        await fleet.server.start()
        await fleet.server._bus.wait_connected()
        yield fleet


@pytest.mark.asyncio
async def test_the_verified_certificate_reaches_the_application(new_fleet):
    """Guards the one place that looks into uvicorn."""

    async with new_fleet() as fleet:
        first, second = await fleet.enrol("a"), await fleet.enrol("b")
        seen = {}
        real = fleet.server._devices._enrolment.authenticate

        def spy(certificate, **more):
            row = real(certificate, **more)
            seen[row.id] = certificate
            return row

        fleet.server._devices._enrolment.authenticate = spy
        for device in (first, second):
            with device.http() as http:
                reply = await asyncio.to_thread(http.get, "/v1/tuf/timestamp.json")
                assert reply.status_code == 200
        assert set(seen) == {first.id, second.id}


@pytest.mark.asyncio
async def test_the_devices_listener_talks_to_nobody_without_a_certificate_of_the_fleet(new_fleet, tmp_path):
    async with new_fleet() as fleet:
        device = await fleet.enrol("a")
        stranger = CertificateAuthority.create(tmp_path, fleet="other", now=datetime.now(UTC))
        forged = stranger.device(device.key.public_key(), device.id, now=datetime.now(UTC))
        pem = tmp_path / "forged.pem"
        secret = device._files[0].read_text().removeprefix(device.enrolled.certificate_pem)
        pem.write_text(forged.pem + secret)
        with_foreign = fleet.operator_context()
        with_foreign.load_cert_chain(pem)
        for context in (fleet.operator_context(), with_foreign):
            async with httpx.AsyncClient(verify=context, base_url=device.enrolled.devices_url, timeout=60) as http:
                with pytest.raises((httpx.ReadError, httpx.ConnectError, httpx.RemoteProtocolError, ssl.SSLError)):
                    await http.get("/v1/tuf/timestamp.json")
        # and the operators' routes are not on it
        with device.http() as http:
            assert (await asyncio.to_thread(http.get, "/v1/status")).status_code == 404


@pytest.mark.asyncio
async def test_devices_fetch_their_own_desired_state_without_the_broker(new_fleet):
    async with new_fleet() as fleet:
        operator = fleet.operator
        away, other = await fleet.enrol("a"), await fleet.device("b")
        with away.http() as http:
            assert (await asyncio.to_thread(http.get, "/v1/desired")).status_code == 404
            target = await operator.publish("1.0.0")
            # the rollout waits for both: the offer to the one that is away stands
            view = await operator.deploy(target, waves="100%", min_success="2")
            await operator.follow(view, lambda view: view.counts == {"succeeded": 1, "waiting": 1})
            reply = await asyncio.to_thread(http.get, "/v1/desired")
            await away._accept(reply.content)
            assert away.items["hello"].target == target
            artifact = await asyncio.to_thread(http.get, f"/v1/artifacts/{away.items['hello'].sha256}")
            assert artifact.content == b"hello 1.0.0"
        with other.http() as http:
            assert (await asyncio.to_thread(http.get, "/v1/desired")).content != reply.content

        # a device whose clock nobody set asks with a nonce, and the director's word for it comes along
        nonce = "0123456789abcdef"
        with away.http() as http:
            vouched = await asyncio.to_thread(http.get, "/v1/desired", params={"nonce": nonce})
            assert (await asyncio.to_thread(http.get, "/v1/desired", params={"nonce": "../x"})).status_code == 400
        both = wire.decode(DesiredReply, vouched.content)
        assert both.assignment.encode() == reply.content
        statement, _ = accept_freshness(
            away.updater.trusted,
            both.fresh.encode(),
            fleet=away.enrolled.fleet,
            device=away.id,
            challenge=Challenge(nonce=nonce, sha256=dsse.parse(reply.content).sha256),
            state=away.states.load(),
            now=datetime.now(UTC),
        )
        assert statement.nonce == nonce


@pytest.mark.asyncio
async def test_an_expired_certificate_may_renew_and_nothing_else(new_fleet):
    Ahead.ahead = timedelta()
    async with with_clock(new_fleet) as fleet:
        device = await fleet.enrol("a")
        Ahead.ahead = ca.DEVICE_LIFE + timedelta(days=1)
        with device.http() as http:
            refused = await asyncio.to_thread(http.get, "/v1/tuf/timestamp.json")
            assert (refused.status_code, refused.json()["type"]) == (403, "certificate-expired")
            other = msgspec.json.encode(
                RenewRequest(csr_pem=certificate_request(ec.generate_private_key(ec.SECP256R1())))
            )
            foreign = await asyncio.to_thread(http.post, "/v1/renew", content=other)
            assert (foreign.status_code, foreign.json()["type"]) == (403, "other-key")
            own = msgspec.json.encode(RenewRequest(csr_pem=certificate_request(device.key)))
            renewed = await asyncio.to_thread(http.post, "/v1/renew", content=own)
            assert renewed.status_code == 200
        leaf = x509.load_pem_x509_certificate(renewed.json()["certificate_pem"].encode())
        assert leaf.not_valid_after_utc > datetime.now(UTC) + Ahead.ahead


def certificate_request(key):
    builder = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([]))
    return builder.sign(key, hashes.SHA256()).public_bytes(Encoding.PEM).decode()


@pytest.mark.asyncio
async def test_a_device_that_was_shut_out_is_heard_no_more(new_fleet, broker):
    async with new_fleet(broker) as fleet:
        device = await fleet.device("a")
        detail = await fleet.operator.send(operator_api.DeviceDetail, "POST", f"/v1/devices/{device.id}/revoke")
        assert detail.row.revoked
        with device.http() as http:
            reply = await asyncio.to_thread(http.get, "/v1/tuf/timestamp.json")
            assert (reply.status_code, reply.json()["type"]) == (403, "revoked")
            own = msgspec.json.encode(RenewRequest(csr_pem=certificate_request(device.key)))
            assert (await asyncio.to_thread(http.post, "/v1/renew", content=own)).json()["type"] == "revoked"
        status = await fleet.operator.get(operator_api.Status, "/v1/status")
        assert status.devices == 0
        (group,) = (await fleet.operator.get(operator_api.Groups, "/v1/groups")).groups
        assert group.devices == 0


def test_a_certificate_request_must_be_signed_by_its_own_key(tmp_path):
    pem = certificate_request(ec.generate_private_key(ec.SECP256R1()))
    assert ca.read_request(pem)
    lines = pem.splitlines()
    broken = "\n".join([*lines[:-2], lines[-2][::-1], lines[-1]])
    with pytest.raises(BadRequestError):
        ca.read_request(broken)
    with pytest.raises(BadRequestError, match="too large"):
        ca.read_request("x" * 20_000)


def test_a_certificate_stands_up_to_strict_verification(tmp_path):
    now = datetime.now(UTC)
    authority = CertificateAuthority.create(tmp_path, fleet="f", now=now)
    pair = authority.server(["device.example", "10.1.2.3"], now=now)
    leaf = x509.load_pem_x509_certificate(pair.certificate_pem)
    names = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["device.example", "localhost"]
    assert [str(ip) for ip in names.get_values_for_type(x509.IPAddress)] == ["10.1.2.3", "127.0.0.1", "::1"]
    (tmp_path / "leaf.pem").write_bytes(pair.certificate_pem + pair.key_pem)
    server, client = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), ssl.create_default_context(cafile=tmp_path / "ca.pem")
    server.load_cert_chain(tmp_path / "leaf.pem")
    client.verify_flags |= ssl.VERIFY_X509_STRICT
    ends = [ssl.MemoryBIO() for _ in range(4)]
    ours = client.wrap_bio(ends[0], ends[1], server_hostname="10.1.2.3")
    theirs = server.wrap_bio(ends[2], ends[3], server_side=True)
    done = set()
    for _ in range(10):
        for name, end, out, peer in (("client", ours, ends[1], ends[2]), ("server", theirs, ends[3], ends[0])):
            try:
                end.do_handshake()
                done.add(name)
            except ssl.SSLWantReadError:
                pass
            peer.write(out.read())
    assert done == {"client", "server"}
    assert not ca.due(pair.certificate_pem, now=now)
    assert ca.due(pair.certificate_pem, now=now + ca.SERVER_LIFE * 0.7)
