"""Every way out of a device, as real processes: dead addresses of a name, and proxies that ask for a password."""

import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from agent.link import dialer
from agent.link.https import HttpsClient
from agent.proxy import Proxy, ProxyError
from tests.agent.enrolment_server import Fleet
from tests.agent.silent_address import silent
from tests.agent.tunnel_proxy import TunnelProxy

NAME = "fleet.invalid"  # nobody resolves it but a proxy, or a file of hosts
SECRET = "p@ss:w/rd?"
ENCODED = "p%40ss%3Aw%2Frd%3F"
WITHIN_S = 110


@pytest.fixture
def fleet(tmp_path):
    made = Fleet(tmp_path / "fleet", host=NAME)
    yield made
    made.close()


@pytest.fixture
def agent(tmp_path):
    """Run a command of `fleet-agent` with a configuration; return its exit code and all that it said."""
    (tmp_path / "agent.toml").write_text("name = 'crane'\n")
    environment = {key: value for key, value in os.environ.items() if not key.lower().endswith("_proxy")}

    def run(*command: str, configuration="", text="", more=None, before=()):
        (tmp_path / "agent.toml").write_text(f"name = 'crane'\n{configuration}")
        done = subprocess.run(
            [
                *before,
                *(sys.executable, "-m", "agent.cli", *command),
                *("--state", tmp_path / "state", "--runtime", tmp_path / "run", "--config", tmp_path / "agent.toml"),
            ],
            cwd=Path(__file__).parents[3],
            env=environment | (more or {}),
            input=text,
            capture_output=True,
            text=True,
            timeout=WITHIN_S,
            check=False,
        )
        return done.returncode, done.stdout + done.stderr

    return run


def proxied(proxy: TunnelProxy, *, host="127.0.0.1", user=f"jo:{ENCODED}") -> str:
    return f"[network]\nproxy = 'http://{user}@{host}:{proxy.port}'\n"


def test_a_device_enrols_through_a_proxy_that_asks_for_a_password(fleet, agent):
    proxy = TunnelProxy(credentials=("jo", SECRET))
    code, said = agent("enroll", configuration=proxied(proxy), text=fleet.token())
    proxy.close()
    assert (code, len(fleet.heard)) == (0, 1), said
    assert set(proxy.asked) == {f"{NAME}:{fleet.server.server_port}"}
    assert SECRET not in said
    assert ENCODED not in said


def test_a_device_enrols_through_the_proxy_of_the_environment(fleet, agent):
    proxy = TunnelProxy(credentials=("jo", SECRET))
    address = f"http://jo:{ENCODED}@127.0.0.1:{proxy.port}"
    code, said = agent("enroll", text=fleet.token(), more={"https_proxy": address})
    proxy.close()
    assert (code, len(fleet.heard)) == (0, 1), said


def test_a_proxy_may_have_an_ipv6_address(fleet, agent):
    proxy = TunnelProxy(host="::1")
    configuration = f"[network]\nproxy = 'http://[::1]:{proxy.port}'\n"
    code, said = agent("enroll", configuration=configuration, text=fleet.token())
    proxy.close()
    assert (code, len(fleet.heard)) == (0, 1), said


@pytest.mark.parametrize("user", ["jo:wrong-secret", "jo:wrong-secret%40"])
def test_a_wrong_password_is_named_as_that_and_printed_nowhere(fleet, agent, user):
    proxy = TunnelProxy(credentials=("jo", SECRET))
    code, said = agent("enroll", configuration=proxied(proxy, user=user), text=fleet.token())
    proxy.close()
    assert code == 1
    assert "does not accept this user and password" in said
    assert "wrong-secret" not in said
    assert fleet.heard == []


def test_a_missing_password_is_asked_for(fleet, agent):
    proxy = TunnelProxy(credentials=("jo", SECRET))
    configuration = f"[network]\nproxy = 'http://127.0.0.1:{proxy.port}'\n"
    code, said = agent("enroll", configuration=configuration, text=fleet.token())
    proxy.close()
    assert code == 1
    assert "asks for a user and password" in said
    assert "network.proxy" in said


@pytest.mark.parametrize(
    ("refusal", "sentence"),
    [
        ("403 Forbidden", "does not allow that destination"),
        ("405 Method Not Allowed", "does not allow tunnels"),
        ("502 Bad Gateway", "cannot reach that destination"),
        ("504 Gateway Timeout", "does not answer the proxy"),
        ("302 Found", "login page"),
        ("garbage", "answered|does not answer as an HTTP proxy"),
    ],
)
def test_each_refusal_of_a_proxy_has_its_meaning(refusal, sentence):
    proxy = TunnelProxy(refusal=refusal)
    with pytest.raises(ProxyError, match=sentence):
        dialer.connect(NAME, 443, timeout_s=60, proxy=Proxy("127.0.0.1", proxy.port))
    proxy.close()


def test_check_goes_through_the_proxy_and_prints_no_password(fleet, agent):
    proxy = TunnelProxy(credentials=("jo", SECRET))
    code, said = agent("enroll", configuration=proxied(proxy), text=fleet.token())
    assert code == 0, said
    _, said = agent("check", "--json", configuration=proxied(proxy))
    found = {each["name"]: each for each in json.loads(said)}
    assert found["proxy"]["ok"], said
    assert found["TLS"]["ok"], said
    assert SECRET not in said
    assert ENCODED not in said
    _, said = agent("check", configuration=proxied(proxy, user="jo:wrong-secret"))
    proxy.close()
    assert "FAIL proxy" in said
    assert "wrong-secret" not in said


@pytest.mark.parametrize(
    "value", ["socks5://jo:hush@h:1", "http://jo:hush@h:port", "http://jo:hu/sh@h", "https://jo:hush@h", "http://[hush"]
)
def test_a_proxy_that_cannot_be_is_refused_without_its_password(agent, value):
    code, said = agent("status", configuration=f"[network]\nproxy = '{value}'\n")
    assert code == 1
    assert "network.proxy" in said
    assert "line 3" in said
    assert "hush" not in said


def test_an_ipv6_destination_has_brackets_for_a_proxy():
    proxy = TunnelProxy(refusal="403 Forbidden")
    with pytest.raises(ProxyError):
        dialer.connect("2001:db8::1", 8743, timeout_s=60, proxy=Proxy("127.0.0.1", proxy.port))
    proxy.close()
    assert proxy.asked == ["[2001:db8::1]:8743"]


@pytest.mark.parametrize("exempt", ["::1", "[::1]", "other, ::1"])
def test_the_environment_exempts_an_ipv6_address_from_its_proxy(monkeypatch, exempt):
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:1")
    monkeypatch.setenv("no_proxy", exempt)
    assert dialer.proxy_for("::1", "") is None
    assert dialer.proxy_for("::2", "") is not None


def test_the_environment_exempts_every_address_with_an_asterisk(monkeypatch):
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:1")
    monkeypatch.setenv("no_proxy", "*")
    assert [dialer.proxy_for(host, "") for host in ("fleet.example", "192.0.2.1", "2001:db8::1")] == [None] * 3


def test_a_proxy_of_the_environment_that_is_no_text_is_a_sentence(monkeypatch):
    monkeypatch.setenv("https_proxy", os.fsdecode(b"http://jo:hush\xff@127.0.0.1:1"))
    monkeypatch.delenv("no_proxy", raising=False)
    with pytest.raises(ProxyError, match="cannot be read") as refused:
        dialer.proxy_for("fleet.example", "")
    assert "hush" not in str(refused.value)


def test_a_proxy_does_not_show_its_password():
    proxy = Proxy.parse("http://jo:hush@[::1]:3128")
    assert (str(proxy), "hush" in repr(proxy)) == ("[::1]:3128", False)
    assert Proxy.parse("proxy") == Proxy("proxy", 3128)


@pytest.fixture
def hosts(tmp_path):
    """Return what to put before a command so that it resolves `NAME` to addresses, in a namespace of its own."""

    def resolving(*addresses: str) -> tuple[str, ...]:
        file = tmp_path / "hosts"
        file.write_text("".join(f"{address} {NAME}\n" for address in addresses))
        own = ("unshare", "--map-root-user", "--mount") if os.geteuid() else ("unshare", "--mount")
        script = f'mount --bind {shlex.quote(str(file))} /etc/hosts && exec "$@"'
        before = (*own, "sh", "-c", script, "sh")
        if shutil.which("unshare") is None or subprocess.run([*before, "true"], check=False).returncode:
            pytest.skip("this machine gives no mount namespace")
        return before

    return resolving


DEAD = {"a dead AAAA and a good A": ("::1",), "two dead addresses": ("::1", "127.0.0.2")}


@pytest.mark.parametrize("dead", DEAD.values(), ids=DEAD)
def test_enrolment_and_check_reach_a_server_behind_dead_addresses(fleet, agent, hosts, dead):
    port = fleet.server.server_port
    before = hosts(*dead, "127.0.0.1")
    with silent(dead[0], port), silent(dead[-1], port if len(dead) > 1 else 0):
        code, said = agent("enroll", text=fleet.token(), before=before)
        assert (code, len(fleet.heard)) == (0, 1), said
        _, said = agent("check", "--json", before=before)
    found = {each["name"]: each for each in json.loads(said)}
    assert found["TLS"]["ok"], said
    for address in (*dead, "127.0.0.1"):
        assert address in found["DNS"]["text"]
        assert address in found["TCP"]["text"]
    assert f"127.0.0.1:{port} answers" in found["TCP"]["text"]
    assert f"[::1]:{port}: no answer" in found["TCP"]["text"]


def test_a_server_of_which_no_address_answers_is_reported_with_each(fleet, agent, hosts):
    before = hosts("::1", "127.0.0.2")
    code, said = agent("enroll", text=fleet.token(), before=before)
    assert code == 1
    assert "::1: Connection refused" in said
    assert "127.0.0.2: Connection refused" in said


def test_a_client_keeps_no_password_in_sight():
    client = HttpsClient("https://h", None, proxy="http://jo:hush@h:1")
    assert "hush" not in repr(client)
