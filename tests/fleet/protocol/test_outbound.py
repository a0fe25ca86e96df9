"""The `outbound` grant: what may be written, what it means, and what it never means by accident."""

import contextlib
import ipaddress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fleet.protocol import outbound
from fleet.protocol.outbound import BadOutboundError, covered, describe, kind, parse, place


@pytest.mark.parametrize(
    ("written", "normal"),
    [
        ("https://api.example.com:443", "https://api.example.com:443"),
        ("https://API.Example.com", "https://api.example.com:443"),
        ("http://api.example.com/", "http://api.example.com:80"),
        ("http://*.example.com:8080", "http://*.example.com:8080"),
        ("*://db.local:*", "*://db.local:*"),
        ("http://10.0.0.0/8:8000..8010", "http://10.0.0.0/8:8000..8010"),
        ("http://192.168.1.7", "http://192.168.1.7:80"),
        ("https://[FD00::]/8:443", "https://[fd00::]/8:443"),
        ("https://[::1]", "https://[::1]:443"),
        ("https://*", "https://*:443"),
        ("http://localhost:3000", "http://localhost:3000"),
        ("TCP://10.1.0.5:502", "tcp://10.1.0.5:502"),
        ("tcp://10.1.0.0/24:502", "tcp://10.1.0.0/24:502"),
        ("udp://[fd00::1]:123", "udp://[fd00::1]:123"),
        ("tcp://meter.local:*", "tcp://meter.local:*"),
    ],
)
def test_an_entry_reads_back_as_it_is_written_out(written, normal):
    assert str(parse(written)) == normal
    assert parse(normal) == parse(written)


@pytest.mark.parametrize(
    ("written", "said"),
    [
        ("example.com", "expected scheme, host and port"),
        ("ftp://example.com", "the scheme is http, https or \\*"),
        ("*://example.com", "a port has to be named"),
        ("https://example.com:0", "ports are 1 to 65535"),
        ("https://example.com:70000", "ports are 1 to 65535"),
        ("https://example.com:90..80", "ports are 1 to 65535"),
        ("https://example.com:", "a port is missing"),
        ("https://example.com:https", "is no port"),
        ("https://example.com/api", "a path or query is not allowed"),
        ("https://example.com:443/api", "a path or query is not allowed"),
        ("https://user:secret@example.com", "user names and passwords"),
        ("https://a.*.example.com", "before the first dot"),
        ("https://*example.com", "before the first dot"),
        ("https://10.0.0.1/8", "did you mean 10.0.0.0/8"),
        ("https://10.0.0.256", "four numbers"),
        ("http://2130706433", "four numbers"),
        ("http://0x7f000001", "four numbers"),
        ("http://127.1", "four numbers"),
        ("http://0177.0.0.1", "four numbers"),
        ("https://fd00::1", "no host name|is no port"),
        ("https://exämple.com", "xn-- form"),
        ("http://self", "instances ="),
        ("http://meter.internal", "instances ="),
        ("https://", "no host name"),
        ("https://-a.example", "no host name"),
        ("tcp://10.1.0.5", "with the scheme tcp a port has to be named"),
        ("udp://meter.local", "with the scheme udp a port has to be named"),
        ("tls://10.1.0.5:1", "tcp or udp for sockets, not 'tls'"),
    ],
)
def test_what_is_wrong_is_said_in_one_sentence(written, said):
    with pytest.raises(BadOutboundError, match=said) as caught:
        parse(written)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("entry", "scheme", "host", "port", "allowed"),
    [
        ("tcp://10.1.0.5:502", "tcp", "10.1.0.5", 502, True),
        ("tcp://10.1.0.5:502", "tcp", "10.1.0.6", 502, False),
        ("tcp://10.1.0.5:502", "tcp", "10.1.0.5", 503, False),
        ("tcp://10.1.0.5:502", "udp", "10.1.0.5", 502, False),
        ("tcp://10.1.0.5:80", "http", "10.1.0.5", 80, False),
        ("http://10.1.0.5:80", "tcp", "10.1.0.5", 80, False),
        ("*://10.1.0.5:80", "tcp", "10.1.0.5", 80, False),
        ("tcp://10.1.0.0/24:502", "tcp", "10.1.0.9", 502, True),
        ("tcp://*:502", "tcp", "93.184.216.34", 502, True),
        ("tcp://*:502", "tcp", "10.1.0.5", 502, False),
        ("https://api.example.com", "https", "api.example.com", 443, True),
        ("https://api.example.com", "http", "api.example.com", 443, False),
        ("https://api.example.com", "https", "api.example.com", 444, False),
        ("https://api.example.com", "https", "b.api.example.com", 443, False),
        ("https://*.example.com", "https", "a.b.example.com", 443, True),
        ("https://*.example.com", "https", "example.com", 443, False),
        ("https://*.example.com", "https", "evilexample.com", 443, False),
        ("*://a.example:*", "http", "a.example", 1, True),
        ("http://a.example:8000..8010", "http", "a.example", 8009, True),
        ("http://a.example:8000..8010", "http", "a.example", 8010, False),
        ("http://*:80", "http", "any.example", 80, True),
        ("http://*:80", "http", "93.184.216.34", 80, True),
        ("http://*:80", "http", "127.0.0.1", 80, False),
        ("http://*:80", "http", "::ffff:127.0.0.1", 80, False),
        ("http://*:80", "http", "64:ff9b::a00:1", 80, False),
        ("http://*:80", "http", "localhost", 80, False),
        ("http://127.0.0.1:80", "http", "127.0.0.1", 80, True),
        ("http://127.0.0.1:80", "http", "localhost", 80, False),
        ("http://10.0.0.0/8:80", "http", "10.200.0.1", 80, True),
        ("http://169.254.0.0/16:80", "http", "169.254.169.254", 80, False),
        ("http://169.254.169.254:80", "http", "169.254.169.254", 80, True),
    ],
)
def test_an_entry_means_its_place_and_no_other(entry, scheme, host, port, allowed):
    assert parse(entry).allows(scheme, host, port) is allowed


@pytest.mark.parametrize(
    ("ceiling", "entry", "within"),
    [
        ("https://*.example.com", "https://api.example.com", True),
        ("https://*.example.com", "https://*.api.example.com", True),
        ("https://*.api.example.com", "https://*.example.com", False),
        ("https://*.example.com", "https://example.com", False),
        ("https://example.com", "https://*.example.com", False),
        ("https://*.example.com:*", "https://api.example.com:8443", True),
        ("https://*.example.com", "https://api.example.com:*", False),
        ("*://a.example:*", "http://a.example:80", True),
        ("https://a.example:443", "*://a.example:443", False),
        ("https://*", "https://*.example.com", True),
        ("https://*.example.com", "https://*", False),
        ("https://*", "https://93.184.216.34", True),
        ("http://*", "http://10.0.0.1", False),
        ("http://*", "http://localhost", False),
        ("http://*", "http://0.0.0.0/0", False),
        ("http://10.0.0.0/8", "http://10.1.0.0/16", True),
        ("http://10.1.0.0/16", "http://10.0.0.0/8", False),
        ("http://169.254.0.0/16", "http://169.254.169.254", False),
        ("http://169.254.169.254", "http://169.254.169.254", True),
        ("http://a.example:80..90", "http://a.example:85", True),
        ("http://[fd00::]/8", "http://10.0.0.0/8", False),
    ],
)
def test_a_ceiling_covers_what_is_within_it(ceiling, entry, within):
    assert covered(entry, [ceiling]) is within


def test_what_cannot_be_read_is_within_its_equal_alone():
    assert covered("what-an-older-fleet-wrote", ["what-an-older-fleet-wrote"])
    assert not covered("what-an-older-fleet-wrote", ["https://*"])
    assert not covered("https://a.example:443", ["what-an-older-fleet-wrote"])


@pytest.mark.parametrize(
    ("authority", "found"),
    [
        ("Example.com", ("example.com", 443)),
        ("example.com:8443", ("example.com", 8443)),
        ("example.com.", ("example.com", 443)),
        ("[::1]:80", ("::1", 80)),
        ("[0:0::1]", ("::1", 443)),
        ("127.0.0.1", ("127.0.0.1", 443)),
    ],
)
def test_a_requests_authority_is_a_place(authority, found):
    assert place("https", authority) == found


@pytest.mark.parametrize(
    "authority",
    [
        *("2130706433", "0x7f000001", "017700000001", "127.1", "0177.0.0.1", "127.0.0.1.", "[::1%eth0]", "[127.0.0.1]"),
        *("user@example.com", "", ":80", "a..b", "ex ample.com", "example.com:0", "example.com:99999", "[::1", "::1"),
        *("example.com:80:80", "example.com:8o", "exämple.com", "a.0x10", "*.example.com", "1.2.3.4.5"),
    ],
)
def test_what_a_resolver_might_take_for_another_place_is_none(authority):
    with pytest.raises(BadOutboundError):
        place("http", authority)


@pytest.mark.parametrize(
    ("address", "word"),
    [
        ("93.184.216.34", ""),
        ("2606:2800:220:1::1", ""),
        ("127.8.9.1", "loopback"),
        ("::1", "loopback"),
        ("::ffff:127.0.0.1", "loopback"),
        ("64:ff9b::7f00:1", "loopback"),
        ("0.0.0.0", "unspecified"),
        ("10.1.2.3", "private"),
        ("172.31.0.1", "private"),
        ("192.168.0.1", "private"),
        ("::ffff:10.0.0.1", "private"),
        ("64:ff9b::c0a8:1", "private"),
        ("fd12::1", "private"),
        ("100.64.0.1", "reserved"),
        ("169.254.1.1", "link-local"),
        ("fe80::1", "link-local"),
        ("169.254.169.254", "metadata"),
        ("::ffff:169.254.169.254", "metadata"),
        ("fd00:ec2::254", "metadata"),
        ("224.0.0.1", "multicast"),
        ("ff02::1", "multicast"),
        ("255.255.255.255", "private"),
        ("240.0.0.1", "private"),
        ("2002:7f00:1::", "special"),
        ("::127.0.0.1", "special"),
    ],
)
def test_addresses_that_are_not_public_are_told_apart(address, word):
    found = kind(ipaddress.ip_address(address))
    assert (found == "") is (word == "")
    if word in {"loopback", "metadata", "link-local", "multicast"}:
        assert found == word


@given(st.ip_addresses())
def test_a_public_looking_name_never_names_an_address(address):
    for entry in ("https://*:443", "https://*.example.com:443", "https://a.example:443"):
        assert not parse(entry).names("https", address, 443)


@given(st.text(max_size=60) | st.text("abc.*:/[]0123456789@-", max_size=30).map("http://{}".format))
def test_any_text_is_an_entry_or_refused(text):
    with contextlib.suppress(BadOutboundError):
        assert parse(str(parse(text))) == parse(text)


ENTRIES = st.builds(
    "{}://{}:{}".format,
    st.sampled_from(["http", "https", "*"]),
    st.sampled_from(
        ["*", "*.a.example", "a.example", "b.a.example", "localhost", "10.0.0.0/8", "10.1.0.0/16", "127.0.0.1", "[::1]"]
    ),
    st.sampled_from(["80", "443", "*", "80..90"]),
)
PLACES = st.sampled_from(
    ["a.example", "b.a.example", "x.b.a.example", "localhost", "10.1.2.3", "127.0.0.1", "::1", "1.1.1.1"]
)


@given(ENTRIES, ENTRIES, PLACES, st.sampled_from(["http", "https"]), st.sampled_from([80, 85, 443]))
def test_what_is_covered_allows_nothing_that_the_ceiling_does_not(above, below, host, scheme, port):
    if parse(above).covers(parse(below)) and parse(below).allows(scheme, host, port):
        assert parse(above).allows(scheme, host, port)


def test_an_entry_is_described_by_what_it_lets_out():
    assert describe("https://api.example.com:443") == "https://api.example.com:443"
    assert describe("http://*:80") == "http://*:80 (any public host, not encrypted)"
    assert describe("https://*.example.com:443") == "https://*.example.com:443 (any name below example.com)"
    assert "a loopback address" in describe("https://127.0.0.1:443")
    assert "16777216 addresses" in describe("https://10.0.0.0/8:443")
    assert describe("nonsense") == "nonsense"
    assert outbound.PORTS["https"] == 443


@pytest.mark.parametrize(
    ("ceiling", "entry", "within"),
    [
        ("tcp://10.1.0.0/24:502", "tcp://10.1.0.5:502", True),
        ("tcp://*.example.com:*", "tcp://db.example.com:5432", True),
        ("udp://10.1.0.5:502", "tcp://10.1.0.5:502", False),
        ("*://*:*", "tcp://db.example.com:5432", False),
        ("*://10.0.0.0/8:*", "udp://10.1.0.5:502", False),
        ("http://10.1.0.5:502", "tcp://10.1.0.5:502", False),
    ],
)
def test_sockets_are_within_entries_of_their_own_kind_alone(ceiling, entry, within):
    assert covered(entry, [ceiling]) == within
