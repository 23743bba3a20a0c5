"""Where a caller's URL may lead."""

import socket
from ipaddress import ip_address, ip_network

import httpx
import pytest
from pydantic import ValidationError

from service.errors import InvalidRequest
from service.settings import Settings
from service.spec.addresses import host_of, literal, may_reach
from service.spec.reward import HttpGrader
from service.validation import parse

NOT_PUBLIC = """
0.0.0.0 0.1.2.3 10.0.0.1 10.255.255.255 100.64.0.1 100.127.255.254 127.0.0.1 127.255.0.1 169.254.169.254 172.16.0.1
172.31.255.255 192.0.0.1 192.0.2.1 192.168.1.1 198.18.0.1 198.51.100.7 203.0.113.7 224.0.0.1 239.255.255.250 240.0.0.1
255.255.255.255 :: ::1 fe80::1 fec0::1 fc00::1 fd12:3456::1 ff02::1 2001:db8::1 100::1 ::127.0.0.1
::ffff:127.0.0.1 ::ffff:10.0.0.1 ::ffff:169.254.169.254 64:ff9b::7f00:1 64:ff9b::a9fe:a9fe 64:ff9b:1::a00:1
2002:7f00:1:: 2002:a00:1:: 2001:0:4136:e378:8000:63bf:f5ff:fffe
"""
PUBLIC = "1.1.1.1 8.8.8.8 93.184.216.34 172.32.0.1 100.128.0.1 2606:4700::1111 ::ffff:8.8.8.8 64:ff9b::808:808"
HERE = """
127.0.0.1 127.1 127.0.1 2130706433 0x7f000001 0x7f.0.0.1 0177.0.0.1 017700000001 0x7F.1 127.0.0.1. localhost LOCALHOST
localhost. a.localhost
"""
NO_HOSTS = """
１２７.0.0.1 127.0.0.１ ｌｏｃａｌｈｏｓｔ １２７．１ ①②⑦.0.0.1 [::1 ::1] [127.0.0.1] [v1.x] [] [::1]x [：：1] [1::2]:x h:80:80
h:0 h:99999 a..b . .a %31%32%37.0.0.1 h\\x -a.example a-.example 999.1.1.1 ex%20ample.org @
"""
NAMES = ["example.org", "1.example.org", "0x7f.example", "999.1.1.1", "1.2.3.4.5", "", "localhost.example.org"]


@pytest.mark.parametrize("text", NOT_PUBLIC.split())
def test_what_is_not_public_is_not_reached_unless_it_is_allowed(text: str) -> None:
    address = ip_address(text)
    assert not may_reach(address, ())
    assert not may_reach(address, (ip_network("10.99.0.0/16"), ip_network("fd99::/16")))
    assert may_reach(address, (ip_network(f"{text}/{address.max_prefixlen}"),))


@pytest.mark.parametrize("text", PUBLIC.split())
def test_what_is_public_is(text: str) -> None:
    assert may_reach(ip_address(text), ())


def test_an_allowed_ipv4_network_is_so_in_its_ipv6_forms() -> None:
    allowed = (ip_network("10.1.0.0/16"),)
    assert may_reach(ip_address("::ffff:10.1.2.3"), allowed)
    assert not may_reach(ip_address("::ffff:10.2.2.3"), allowed)


@pytest.mark.parametrize("host", HERE.split())
def test_every_form_of_this_machine_is_known(host: str) -> None:
    assert str(literal(host)) == "127.0.0.1"


def test_forms_are_those_of_the_resolver() -> None:
    """The negative control: what is read here as an address is what the machine's resolver makes of it."""
    for host in ("127.1", "2130706433", "0x7f.1", "0177.0.0.1", "0251.0376.0251.0376"):
        (found, *_) = socket.getaddrinfo(host, 80, type=socket.SOCK_STREAM)
        assert found[4][0] == str(literal(host))


@pytest.mark.parametrize(
    ("host", "read"),
    [
        ("Example.ORG", "example.org"),
        ("a_b.example", "a_b.example"),
        ("rewards", "rewards"),
        ("example.org.", "example.org."),
        ("exämple.org", "xn--exmple-cua.org"),
        ("127。0．0｡1", "127.0.0.1"),
        ("[::FFFF:127.0.0.1]", "::FFFF:127.0.0.1"),
        ("127.1", "127.1"),
    ],
)
def test_a_host_is_read_as_its_client_does(host: str, read: str) -> None:
    for port in ("", ":8000"):
        assert host_of(f"http://{host}{port}/score?a=b@c") == read == httpx.URL(f"http://{host}/").raw_host.decode()


@pytest.mark.parametrize("host", NO_HOSTS.split())
def test_what_is_no_host_is_refused_when_it_is_sent(host: str) -> None:
    with pytest.raises(ValueError):
        host_of(f"http://{host}/score")
    with pytest.raises(InvalidRequest) as refused:
        parse(HttpGrader, {"kind": "http", "url": f"http://{host}/score"})
    assert refused.value.errors[0].pointer == "/url"


@pytest.mark.parametrize("port", ["８０", "８0", "٨٠", "+80", "8_0", " 80", "-1", "0", "65536", "8０80", "x"])
def test_a_port_is_a_number_in_ascii_digits(port: str) -> None:
    with pytest.raises(ValueError, match="not a URL"):
        host_of(f"http://example.org:{port}/score")
    with pytest.raises(ValueError, match="not a URL"):
        host_of(f"https://[2001:db8::1]:{port}/score")


@pytest.mark.parametrize("scheme", ["http", "https", "HTTP"])
@pytest.mark.parametrize("port", ["", ":", ":80", ":443", ":0080", ":65535"])
def test_every_other_port_is_taken(scheme: str, port: str) -> None:
    assert host_of(f"{scheme}://u:8０@example.org{port}/a:8０?b=:8０") == "example.org"


@pytest.mark.parametrize("host", NAMES)
def test_names_are_looked_up_by_who_connects(host: str) -> None:
    assert literal(host) is None


def test_the_setting_is_a_list_of_networks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RATCHET_GRADER_NETWORKS", "10.1.0.0/16, fd00::/8")
    assert Settings().grader_networks == (ip_network("10.1.0.0/16"), ip_network("fd00::/8"))
    monkeypatch.setenv("RATCHET_GRADER_NETWORKS", "10.1.0.1/16")
    with pytest.raises(ValidationError):
        Settings()
    monkeypatch.setenv("RATCHET_GRADER_NETWORKS", "")
    assert Settings().grader_networks == ()


def test_a_name_is_no_longer_than_a_name() -> None:
    assert host_of(f"http://{'a' * 63}.example/") == f"{'a' * 63}.example"
    for host in (f"{'a' * 64}.example", ".".join(["a" * 60] * 5), "", "ex ample.org"):
        with pytest.raises(ValueError, match="no host"):
            host_of(f"http://{host}/")
