"""ingress.toml and the routes that follow from it: by host, by path, to one instance at `/`, with limits and fields."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.host.http import ingress_config
from agent.host.http.ingress_config import IngressError
from agent.host.http.parser import RequestHead
from agent.host.http.routing import Forwarding, Peer, RouteTable, guest_head, plain_address
from agent.host.ipc.helper_api import ForwardedPolicy

RULES = """
[[routes]]
host = "meter.example.com"
instance = "meter"

[[routes]]
host = "meter.example.com"
path = "/api/v2"
instance = "api"
strip = true

[[routes]]
host = "*.example.com"
instance = "star"

[[routes]]
host = "*.deep.example.com"
instance = "deep"

[[routes]]
path = "/status"
instance = "status"

[[routes]]
path = "/status/deep/"
instance = "deep"

[[routes]]
path = "/"
instance = "home"
request = "10KiB"
head = "1KiB"
"""


def table(text, *up, down=()):
    routes = RouteTable()
    routes.configure(ingress_config.read(text).rules)
    routes.up = dict.fromkeys(up, True) | dict.fromkeys(down, False)
    return routes


ALL = ("meter", "api", "star", "deep", "status", "home", "named")


@pytest.mark.parametrize(
    ("host", "target", "instance", "arrives", "prefix"),
    [
        ("meter.example.com", "/", "meter", "/", ""),
        ("METER.example.com.:8443", "/x?y=/api/v2", "meter", "/x?y=/api/v2", ""),
        ("meter.example.com", "/api/v2", "api", "/", "/api/v2"),
        ("meter.example.com", "/api/v2?q", "api", "/?q", "/api/v2"),
        ("meter.example.com", "/api/v2/x", "api", "/x", "/api/v2"),
        ("meter.example.com", "/api/v20", "meter", "/api/v20", ""),
        ("meter.example.com", "/API/v2", "meter", "/API/v2", ""),
        ("meter.example.com", "/named/x", "meter", "/named/x", ""),
        ("meter.example.com", "http://meter.example.com/api/v2/x", "api", "/x", "/api/v2"),
        ("other.example.com", "/status", "star", "/status", ""),
        ("a.b.example.com", "/", "star", "/", ""),
        ("a.deep.example.com", "/", "deep", "/", ""),
        ("deep.example.com", "/", "star", "/", ""),
        ("example.com", "/", "home", "/", ""),
        ("10.0.0.7:8080", "/status", "status", "/status", ""),
        ("10.0.0.7", "/status/deep", "deep", "/status/deep", ""),
        ("10.0.0.7", "/status/deeper", "status", "/status/deeper", ""),
        ("10.0.0.7", "/named/x?y", "named", "/x?y", "/named"),
        ("named.board", "/x", "named", "/x", ""),
        ("10.0.0.7", "/anything/else", "home", "/anything/else", ""),
        ("", "/", "home", "/", ""),
        ("[::1]:8080", "/", "home", "/", ""),
    ],
)
def test_where_a_request_goes(host, target, instance, arrives, prefix):
    found = table(RULES, *ALL).find(host.encode(), target.encode())
    assert (found.instance, found.target, found.prefix) == (instance, arrives.encode(), prefix.encode())


def test_a_host_that_no_name_can_be_has_no_rules():
    """Each of its labels would be a key to look up: 64 KiB of them in one request kept the router busy."""
    routes = table(RULES, *ALL)
    assert routes.find(b"a." * 100 + b"example.com", b"/").instance == "star"
    assert routes.find(b"a." * 130 + b"example.com", b"/").instance == "home"


def test_a_host_with_rules_serves_nothing_else():
    rules = '[[routes]]\nhost = "a.example"\npath = "/x"\ninstance = "meter"\n[[routes]]\ninstance = "home"\n'
    routes = table(rules, *ALL)
    assert routes.find(b"a.example", b"/named/").status == 404
    assert routes.find(b"a.example", b"/").status == 404
    assert routes.find(b"b.example", b"/").instance == "home"


def test_names_can_be_switched_off():
    routes = table('by_name = false\n[[routes]]\npath = "/x"\ninstance = "meter"\n', *ALL)
    assert routes.find(b"h", b"/x").instance == "meter"
    assert routes.find(b"h", b"/named/").status == 404
    assert routes.find(b"named.board", b"/").status == 404
    assert "named" not in routes.find(b"h", b"/y").why


def test_a_rule_whose_instance_does_not_run_or_answer_is_503():
    assert table(RULES).find(b"meter.example.com", b"/").status == 503
    assert table(RULES, down=["meter"]).find(b"meter.example.com", b"/").status == 503


def head(*fields, method=b"GET", target=b"/", length=None):
    return RequestHead(method=method, target=target, fields=list(fields), host=b"h", length=length)


def test_limits_of_a_route():
    routes = table(RULES, *ALL)
    assert routes.route(head(length=10 * 1024)).instance == "home"
    assert routes.route(head(length=10 * 1024 + 1)).status == 413
    assert routes.route(head(length=10 * 1024)).request_max == 10 * 1024
    assert routes.route(head((b"a", b"x" * 900))).instance == "home"
    assert routes.route(head((b"a", b"x" * 1024))).status == 431
    assert routes.route(head((b"a", b"x" * 1024), target=b"/named/")).instance == "named"
    assert routes.route(head(target=b"/status", length=1 << 40)).instance == "status"


CLIENT = Peer("192.0.2.7", b"https")
PROXY = Peer("10.1.2.3")
SAID = [(b"x-forwarded-for", b"1.2.3.4"), (b"x-forwarded-proto", b"gopher"), (b"x-real-ip", b"5.6.7.8")]
MORE = [(b"forwarded", b"for=1.2.3.4"), (b"x_forwarded_for", b"1.1.1.1"), (b"accept", b"*/*")]


def told(policy, peer, *fields):
    request = head(*(fields or (*SAID, *MORE)))
    lines = guest_head(request, table(RULES, *ALL).route(request), Forwarding(policy), peer).decode().split("\r\n")
    return [line for line in lines[1:] if line]


def test_what_a_client_says_of_itself_is_replaced_by_what_the_host_knows():
    assert told(ForwardedPolicy(mode="set"), CLIENT) == [
        "accept: */*",
        "x-forwarded-for: 192.0.2.7",
        "x-forwarded-proto: https",
        "x-forwarded-host: h",
    ]


def test_what_a_trusted_proxy_says_is_kept_and_added_to():
    policy = ForwardedPolicy(mode="set", trust=("10.0.0.0/8", "::1/128"))
    found = told(policy, PROXY)
    assert "x-forwarded-for: 1.2.3.4, 10.1.2.3" in found
    assert "x-forwarded-proto: gopher" in found
    assert "forwarded: for=1.2.3.4" in found
    assert "x_forwarded_for: 1.1.1.1" not in found
    assert sum(line.startswith("x-forwarded-for:") for line in found) == 1
    assert "x-forwarded-for: 192.0.2.7" in told(policy, CLIENT)
    assert "x-forwarded-proto: http" in told(policy, PROXY, (b"accept", b"*/*"))
    assert (
        told(policy, Peer("::1"), (b"x-forwarded-for", b"a"), (b"x-forwarded-for", b"b"))[0]
        == "x-forwarded-for: a, b, ::1"
    )


def test_other_policies():
    said = [f"{name.decode()}: {value.decode()}" for name, value in (*SAID, *MORE)]
    assert told(ForwardedPolicy(mode="pass"), CLIENT) == said
    assert told(ForwardedPolicy(mode="drop", trust=("0.0.0.0/0",)), CLIENT) == ["accept: */*"]


@given(st.lists(st.sampled_from([*SAID, *MORE]), max_size=90))
def test_no_client_chooses_its_address(fields):
    found = told(ForwardedPolicy(mode="set", trust=("10.0.0.0/8",)), CLIENT, (b"accept", b"*/*"), *fields)
    names = [line.partition(":")[0].replace("_", "-") for line in found]
    assert names.count("x-forwarded-for") == names.count("x-forwarded-proto") == 1
    assert "x-forwarded-for: 192.0.2.7" in found
    assert {"forwarded", "x-real-ip"}.isdisjoint(names)


@pytest.mark.parametrize(
    ("text", "shown"),
    [("::ffff:192.0.2.7", "192.0.2.7"), ("fe80::1%eth0", "fe80::1"), ("::1", "::1"), ("10.0.0.1", "10.0.0.1")],
)
def test_addresses_are_written_as_people_write_them(text, shown):
    assert plain_address(text) == shown


CERTIFICATE = '[[tls.certificates]]\ncertificate = "c"\nkey = "k"\n'


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("routes = 3", "routes"),
        ("[[routes]]\n", "instance"),
        ('[[routes]]\ninstance = "A B"\n', "routes[0].instance"),
        ('[[routes]]\ninstance = "a"\nhost = "*"\n', "routes[0].host"),
        ('[[routes]]\ninstance = "a"\nhost = "a.*.b"\n', "routes[0].host"),
        ('[[routes]]\ninstance = "a"\npath = "api"\n', "routes[0].path"),
        ('[[routes]]\ninstance = "a"\npath = "/a b"\n', "routes[0].path"),
        ('[[routes]]\ninstance = "a"\npath = "/a?b"\n', "routes[0].path"),
        ('[[routes]]\ninstance = "a"\nrequest = "much"\n', "routes[0].request"),
        ('[[routes]]\ninstance = "a"\nhead = "1MiB"\n', "routes[0].head"),
        ('[[routes]]\ninstance = "a"\nlimits = 1\n', "limits"),
        ('[[routes]]\ninstance = "a"\n[[routes]]\ninstance = "b"\npath = "/"\n', "routed twice"),
        ('[forwarded]\nmode = "append"\n', "forwarded.mode"),
        ('[forwarded]\ntrust = ["10.0.0.1/8"]\n', "forwarded.trust"),
        ('[forwarded]\ntrust = ["proxy.example"]\n', "forwarded.trust"),
        ('[tls]\nlisten = "0.0.0.0:8443"\n', "certificates"),
        ('[tls]\nlisten = "0.0.0.0:8443"\ncertificates = []\n', "certificates"),
        (f'[tls]\nlisten = "8443"\n{CERTIFICATE}', "tls.listen"),
        (f'[tls]\nlisten = "0.0.0.0:70000"\n{CERTIFICATE}', "tls.listen"),
        (f'[tls]\nlisten = "0.0.0.0:8443"\n{CERTIFICATE}{CERTIFICATE}', "tls.certificates[1].names"),
        (f'[tls]\nlisten = "0.0.0.0:8443"\n{CERTIFICATE}names = ["a b"]\n', "tls.certificates[0].names"),
        ("a" * (ingress_config.FILE_MAX_CHARS + 1), "characters"),
        ("x = " + "[" * 5000, "ingress.toml"),
        ("x = " + "9" * 5000, "ingress.toml"),
    ],
)
def test_a_file_that_is_not_valid_names_the_key(text, said):
    with pytest.raises(IngressError) as caught:
        ingress_config.read(text)
    assert said in str(caught.value)
    assert str(caught.value).startswith("ingress.toml")
    assert "\n" not in str(caught.value)[:200]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("by_nam = true\n", "ingress.toml: unknown key 'by_nam' (line 1)"),
        ('[[routes]]\ninstance = "a"\n[[routes]]\n', "ingress.toml: routes[1]: the key 'instance' is missing (line 3)"),
        ('[[routes]]\ninstance = "a"\nlimits = 1\n', "ingress.toml: unknown key 'routes[0].limits' (line 3)"),
        ('[tls]\nlisten = "0.0.0.0:8443"\n', "ingress.toml: tls: the key 'certificates' is missing (line 1)"),
        ("\n[forwarded]\nmode = 3\n", "ingress.toml: forwarded.mode: Expected `str`, got `int` (line 3)"),
        (
            f'[tls]\nlisten = "0.0.0.0:8443"\n{CERTIFICATE}names = ["a b"]\n',
            "ingress.toml: tls.certificates[0].names: 'a b' is not a host name (line 6)",
        ),
        ("x = [", "ingress.toml is not TOML: Invalid value (at end of document)"),
    ],
)
def test_a_mistake_is_told_in_words_and_with_its_line(text, said):
    with pytest.raises(IngressError) as caught:
        ingress_config.read(text)
    assert str(caught.value) == said


def test_an_empty_file_changes_the_forwarded_fields_alone():
    found = ingress_config.read("")
    assert (found.tls, found.rules.rules, found.rules.by_name, found.rules.forwarded.mode) == (None, (), True, "set")
