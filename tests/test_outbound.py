"""Calls to addresses that a client named: which are made, to whom, and what an answer may cost."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import socket
import threading
from typing import TYPE_CHECKING, Any, NamedTuple

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rma_coordinator import outbound
from rma_coordinator.domain.addresses import SPECIAL_V4, attached, is_public, network, unwrapped
from rma_coordinator.domain.webhooks import Unreachable, refusal
from rma_coordinator.outbound import post
from rma_core.http import tls_context
from tests.receivers import DIE, FLOOD, HANG, REDIRECT, Authority, receiving

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from rma_coordinator.domain.webhooks import Reply

#: What these tests may call: a part of loopback, where the receivers are that a client may have.
ALLOWED = (network("127.7.0.0/16"),)
GOOD, BAD = "127.7.0.1", "127.8.0.1"


# -- which addresses ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "127.0.0.1", "127.255.255.255", "0.0.0.0", "0.1.2.3", "10.0.0.1", "172.16.0.1", "172.31.255.255", "192.168.1.1",
        "169.254.169.254", "100.64.0.1", "100.127.255.255", "192.0.0.8", "192.0.2.1", "192.88.99.1", "198.18.0.1",
        "198.19.255.255", "198.51.100.7", "203.0.113.9", "224.0.0.1", "239.255.255.255", "240.0.0.1", "255.255.255.255",
        "::", "::1", "::127.0.0.1", "::ffff:127.0.0.1", "::ffff:10.0.0.1", "::ffff:169.254.169.254", "64:ff9b::7f00:1",
        "64:ff9b::169.254.169.254", "64:ff9b:1::1", "64:ff9b::8.8.8.8", "2002:7f00:1::", "2002:a00:1::1", "2001::1",
        "2001:0:7f00:1::", "2001:2::1", "2001:10::1", "2001:20::1", "2001:db8::1", "3fff::1", "fc00::1", "fd00::1",
        "fe80::1", "fe80::1%eth0", "fec0::1", "ff02::1", "ff0e::1", "100::1", "5f00::1", "4000::1", "1::",
    ],
)  # fmt: skip
def test_no_address_of_our_own_networks_is_public_whatever_its_form(text: str) -> None:
    assert not is_public(text)


@pytest.mark.parametrize(
    "text",
    ["1.1.1.1", "8.8.8.8", "100.63.255.255", "100.128.0.0", "172.15.0.1", "172.32.0.1", "192.0.1.1", "223.255.255.255",
     "2606:4700::1111", "2a00:1450:4001::1", "2400:cb00::1", "2001:4860:4860::8888", "::ffff:8.8.8.8"],
)  # fmt: skip
def test_hosts_of_the_internet_are(text: str) -> None:
    assert is_public(text)


@given(st.ip_addresses(v=4))
def test_a_mapped_address_is_what_it_maps(address: ipaddress.IPv4Address) -> None:
    public = not any(address in one for one in SPECIAL_V4)
    assert is_public(str(address)) == is_public(f"::ffff:{address}") == public
    assert unwrapped(f"::ffff:{address}") == address
    for hidden in (f"::{address}", f"64:ff9b::{address}"):
        assert not is_public(hidden)


@given(st.ip_addresses(v=6))
def test_outside_of_what_is_given_out_no_address_of_ipv6_is_public(address: ipaddress.IPv6Address) -> None:
    if is_public(str(address)) and address.ipv4_mapped is None:
        assert address in ipaddress.ip_network("2000::/3")
        assert address.is_global
        assert not address.is_multicast


@given(st.ip_addresses())
def test_what_python_calls_private_is_never_public(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> None:
    assert not (is_public(str(address)) and address.is_private)


def test_a_network_that_is_allowed_is_and_those_this_machine_is_attached_to_are_not() -> None:
    assert is_public("10.1.2.3", allowed=(network("10.0.0.0/8"),))
    assert is_public("::ffff:10.1.2.3", allowed=(network("10.0.0.0/8"),))
    lan, home = attached("11.0.0.1", "255.255.255.0"), attached("2a00:1:2:3::7%eth0", "ffff:ffff:ffff:ffff::")
    for near in ("11.0.0.1", "11.0.0.200", "::ffff:11.0.0.9", "2a00:1:2:3:ffff::1"):
        assert is_public(near)
        assert not is_public(near, own=[lan, home])
        assert is_public(near, own=[lan, home], allowed=(network(str(unwrapped(near))),))
    for far in ("11.0.1.1", "2a00:1:2:4::1"):
        assert is_public(far, own=[lan, home])
    for mask in (None, "255.255.255.255", "0.0.0.0"):
        assert attached("11.0.0.1", mask) == network("11.0.0.1/32")
    for odd in ("", "x", "1.2.3", "0x7f.1", "2130706433", "1.2.3.4.5", "::g"):
        with pytest.raises(ValueError, match="does not appear to be"):
            is_public(odd)


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("http://a.example/", "https"), ("ftp://a.example/", "https"), ("https:///x", "host"), ("https://", "host"),
        ("a.example", "host"), ("", "host"), ("https://u:p@a.example/", "credentials"),
        ("https://@a.example/", "credentials"),
        ("https://a.example/#x", "fragment"), ("https://a.example:0/", "host"), ("https://a.example:99999/", "URL"),
        ("https://a.example:x/", "URL"), ("https://[::1/", "URL"), ("https://ä.example/", "ASCII"),
        ("https://a.example/\\x", "ASCII"), ("https://a.example/ x", "ASCII"), ("https://a.example/\x00", "ASCII"),
        ("https://a.example/" + "x" * 2048, "2048"), ("javascript:alert(1)", "host"), ("file:///etc/passwd", "host"),
    ],
)  # fmt: skip
def test_an_address_that_nothing_can_be_sent_to_is_refused_with_a_reason(url: str, words: str) -> None:
    assert words in refusal(url)


@pytest.mark.parametrize("url", ["https://a.example", "https://a.example:8443/x;y?z=1", "https://[2a00::1]/"])
def test_an_ordinary_address_is_not(url: str) -> None:
    assert refusal(url) == ""
    assert refusal(url.replace("https", "http"), plain_http=True) == ""


@given(st.text(max_size=60))
def test_whatever_is_taken_for_an_address_is_one(url: str) -> None:
    assert refusal(url) or url.startswith(("https://", "HTTPS://")) or url.lower().startswith("https://")


# -- calls -------------------------------------------------------------------------------------------------------------


class Names:
    """Stands in for DNS: what each name leads to, look-up by look-up; the last answer stays."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.known: dict[str, list[list[str]]] = {}
        self.looked_up: list[str] = []
        #: Names with this in them are answered once it is set.
        self.answers = threading.Event()
        self._real = socket.getaddrinfo
        monkeypatch.setattr(socket, "getaddrinfo", self._look_up)

    def lead(self, name: str, *answers: list[str]) -> None:
        self.known[name] = list(answers)

    def _look_up(self, host: Any, port: Any, *given: Any, **more: Any) -> list[Any]:
        self.looked_up.append(host)
        if host.startswith("slow."):
            self.answers.wait(20)
        if host not in self.known:
            return self._real(host, port, *given, **more)
        answers = self.known[host]
        found = answers.pop(0) if len(answers) > 1 else answers[0]
        if not found:
            raise socket.gaierror(socket.EAI_NONAME, "no such name")
        return [
            (socket.AF_INET6 if ":" in one else socket.AF_INET, socket.SOCK_STREAM, 6, "", (one, port)) for one in found
        ]


@pytest.fixture
async def names(monkeypatch: pytest.MonkeyPatch) -> Names:
    return Names(monkeypatch)


@pytest.fixture
def authority(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Authority:
    made = Authority(tmp_path)
    made.trust(monkeypatch)
    return made


@pytest.fixture
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outbound, "WHOLE_S", 0.5)
    monkeypatch.setattr(outbound, "CONNECT_S", 0.3)


async def call(url: str, **more: Any) -> Reply:
    return await post(url, headers={"X-One": "1"}, body=b"body", context=tls_context(), **{"allowed": ALLOWED, **more})


@contextlib.contextmanager
def refused(words: str = "leads to no public address") -> Iterator[None]:
    with pytest.raises(Unreachable, match=words):
        yield


async def test_tls_and_host_speak_to_the_name_and_the_connection_goes_to_its_address(
    names: Names, authority: Authority
) -> None:
    names.lead("hooks.example", [GOOD])
    async with receiving(204, host=GOOD, tls=authority.context("hooks.example")) as receiver:
        reply = await call(f"https://hooks.example:{receiver.port}/in;v=1?a=b%20c")
    (arrival,) = receiver.arrivals
    assert reply.status == 204
    assert arrival.head == "POST /in;v=1?a=b%20c HTTP/1.1"
    assert (arrival.name, arrival.headers["host"]) == ("hooks.example", f"hooks.example:{receiver.port}")
    assert (arrival.body, arrival.headers["x-one"], arrival.headers["content-length"]) == (b"body", "1", "4")
    assert names.looked_up == ["hooks.example"], "once, so that nothing can be exchanged after the look at it"


async def test_a_certificate_that_is_not_the_names_own_gets_nothing(names: Names, authority: Authority) -> None:
    names.lead("hooks.example", [GOOD])
    async with receiving(host=GOOD, tls=authority.context("other.example")) as receiver:
        with refused("CERTIFICATE_VERIFY_FAILED"):
            await call(f"https://hooks.example:{receiver.port}/")
    assert receiver.arrivals == []


async def test_a_stranger_who_signed_it_himself_gets_nothing(
    tmp_path: Path, names: Names, authority: Authority
) -> None:
    (tmp_path / "b").mkdir()
    names.lead("hooks.example", [GOOD])
    async with receiving(host=GOOD, tls=Authority(tmp_path / "b").context("hooks.example")) as receiver:
        with refused("CERTIFICATE_VERIFY_FAILED"):
            await call(f"https://hooks.example:{receiver.port}/")
    assert receiver.arrivals == []


async def test_a_name_that_leads_elsewhere_the_next_time_is_not_followed_there(
    names: Names, authority: Authority
) -> None:
    tls = authority.context("hooks.example")
    async with receiving(500, host=GOOD, tls=tls) as receiver:
        async with receiving(host=BAD, port=receiver.port) as inside:
            names.lead("hooks.example", [GOOD], [BAD])
            url = f"https://hooks.example:{receiver.port}/"
            assert (await call(url)).status == 500
            with refused():
                await call(url)
        assert (receiver.connections, inside.connections) == (1, 0)


@pytest.mark.parametrize("answers", [[GOOD, BAD], [BAD, GOOD], [BAD], [GOOD, "::1"], [GOOD, "fe80::1"], []])
async def test_a_name_with_one_bad_address_is_not_called_at_all(
    names: Names, authority: Authority, answers: list[str]
) -> None:
    async with receiving(host=GOOD, tls=authority.context("hooks.example")) as receiver:
        names.lead("hooks.example", answers)
        with refused() as _:
            await call(f"https://hooks.example:{receiver.port}/")
        assert receiver.connections == 0


@pytest.mark.parametrize(
    "host",
    ["127.0.0.1", "127.1", "0x7f.1", "2130706433", "0", "localhost", "[::1]", "[::ffff:127.0.0.1]", "[::ffff:7f00:1]",
     "[::]", "[::127.0.0.1]", "[64:ff9b::127.0.0.1]", "[2002:7f00:1::]", "[fe80::1%25lo]", "169.254.169.254"],
)  # fmt: skip
async def test_no_spelling_of_this_machine_is_called(host: str) -> None:
    async with receiving(host="127.0.0.1") as receiver:
        with pytest.raises(Unreachable):
            await call(f"http://{host}:{receiver.port}/", allowed=())
        assert receiver.connections == 0


class Interface(NamedTuple):
    """What psutil says of one address."""

    address: str
    netmask: str | None
    family: int = socket.AF_INET


async def test_nobody_on_this_machines_own_networks_is_called(names: Names, monkeypatch: pytest.MonkeyPatch) -> None:
    found = {"eth9": [Interface("11.22.33.1", "255.255.255.0")]}
    monkeypatch.setattr(psutil, "net_if_addrs", lambda: found)
    names.lead("hooks.example", ["11.22.33.44"])
    with refused():
        await call("https://hooks.example/")


async def test_the_next_address_of_a_name_is_tried_when_one_does_not_answer(names: Names, authority: Authority) -> None:
    names.lead("hooks.example", ["127.7.0.9", GOOD])
    async with receiving(host=GOOD, tls=authority.context("hooks.example")) as receiver:
        assert (await call(f"https://hooks.example:{receiver.port}/")).status == 200


async def test_ipv6_is_called_like_the_rest(authority: Authority) -> None:
    async with receiving(host="::1", tls=authority.context("::1")) as receiver:
        reply = await call(f"https://[::1]:{receiver.port}/", allowed=(network("::1"),))
        assert reply.status == 200
        assert receiver.arrivals[0].headers["host"] == f"[::1]:{receiver.port}"


async def test_a_redirect_is_an_answer_and_not_followed(names: Names) -> None:
    async with (
        receiving(host=BAD) as inside,
        receiving(REDIRECT, host=GOOD, where=f"http://{BAD}:{inside.port}/") as receiver,
    ):
        names.lead("hooks.example", [GOOD])
        assert (await call(f"http://hooks.example:{receiver.port}/")).status == 307
        assert inside.connections == 0


async def test_a_proxy_of_the_environment_is_not_used(monkeypatch: pytest.MonkeyPatch, names: Names) -> None:
    names.lead("hooks.example", [GOOD])
    async with receiving(host=GOOD) as receiver, receiving(host=BAD) as proxy:
        for name in ("HTTP_PROXY", "http_proxy", "HTTPS_PROXY", "ALL_PROXY", "all_proxy"):
            monkeypatch.setenv(name, f"http://{BAD}:{proxy.port}")
        assert (await call(f"http://hooks.example:{receiver.port}/")).status == 200
        assert proxy.connections == 0


@pytest.mark.usefixtures("hurried")
@pytest.mark.parametrize(
    ("what", "words"), [(HANG, "did not answer within"), (DIE, "broke off"), (FLOOD, "broke off|did not answer")]
)
async def test_a_receiver_that_hangs_dies_or_never_ends_costs_its_time_and_no_more(
    names: Names, what: str, words: str
) -> None:
    names.lead("hooks.example", [GOOD])
    async with receiving(what, host=GOOD) as receiver:
        with refused(words):
            await call(f"http://hooks.example:{receiver.port}/")
        assert len(receiver.arrivals) == 1


@pytest.mark.usefixtures("hurried")
async def test_a_handshake_that_never_ends_costs_its_time_and_no_more(names: Names) -> None:
    names.lead("hooks.example", [GOOD])
    # It waits for a request in plain text.
    async with receiving(host=GOOD) as receiver:
        with refused("no connection|did not answer"):
            await call(f"https://hooks.example:{receiver.port}/")
        assert (receiver.connections, receiver.arrivals) == (1, [])


@pytest.mark.usefixtures("hurried")
async def test_a_name_that_is_never_answered_holds_up_neither_others_nor_files_nor_more_threads(
    names: Names, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outbound, "_looking", threading.BoundedSemaphore(2))
    names.lead("slow.example", [GOOD])
    names.lead("hooks.example", [GOOD])
    async with receiving(host=GOOD) as receiver:
        good, slow = (f"http://{name}.example:{receiver.port}/" for name in ("hooks", "slow"))
        with refused("did not answer"):
            await call(slow)
        assert (await call(good)).status == 200
        assert await asyncio.to_thread(lambda: "a file") == "a file"
        with refused("did not answer"):
            await call(slow)
        before = threading.active_count()
        for _ in range(5):
            with refused("too many names"):
                await call(good)
        assert threading.active_count() == before
        names.answers.set()
        while outbound._looking._value < 2:  # noqa: ASYNC110 - threads tell nobody
            await asyncio.sleep(0.01)
        assert (await call(slow)).status == 200


async def test_nobody_there_is_no_connection(names: Names) -> None:
    names.lead("hooks.example", [GOOD])
    async with receiving(host=GOOD) as receiver:
        port = receiver.port
    with refused("no connection"):
        await call(f"http://hooks.example:{port}/")


async def test_a_socket_of_this_machine_is_no_address() -> None:
    with refused("is no address"):
        await outbound.Guarded(()).connect_unix_socket("/run/docker.sock")
