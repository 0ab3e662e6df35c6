"""The parser side of the client for services: however an answer is cut, whatever comes instead of one."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rma_core.agent.incoming import MAX_HEAD_BYTES, MAX_HEADERS, MAX_INTERIM, EndpointError, Incoming

OK = b"HTTP/1.1 200 OK\r\n"
NAMES = st.text("abcdefghijklmnopqrstuvwxyz-", min_size=1, max_size=12).map(lambda name: f"x-{name}")
VALUES = st.text(st.characters(exclude_categories=("Cc", "Cs", "Z")), max_size=20)
HEADERS = st.lists(st.tuples(NAMES, VALUES), max_size=6)
PIECES = st.lists(st.binary(min_size=1, max_size=40), max_size=6)


def fed(*pieces: bytes, bodiless: bool = False, closed: bool = False) -> Incoming:
    """Return an answer after these reads; only what is left of a body is there, as with a reader that takes none."""
    incoming = Incoming(bodiless=bodiless)
    for piece in pieces:
        incoming.feed(piece)
    if closed:
        incoming.closed()
    return incoming


def seen(incoming: Incoming) -> tuple[int, list[tuple[str, str]], bytes, bool, bool]:
    return incoming.status, incoming.headers, bytes(incoming.body), incoming.whole, incoming.reusable


def chunked(pieces: list[bytes]) -> bytes:
    return b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces) + b"0\r\n\r\n"


@st.composite
def answers(draw: st.DrawFn) -> tuple[bytes, bool, int, list[tuple[str, str]], bytes]:
    """Return (bytes, whether it ends with the connection, status, headers, body) of a valid answer."""
    interim = draw(st.lists(st.sampled_from([b"100 Continue", b"103 Early Hints\r\nLink: x"]), max_size=3))
    status = draw(st.sampled_from([200, 204, 304, 404, 413, 500, 599]))
    headers, pieces = draw(HEADERS), draw(PIECES)
    kind = "none" if status in (204, 304) else draw(st.sampled_from(["length", "chunked", "closed"]))
    framing, body = {
        "none": ([], b""),
        "length": ([("content-length", str(sum(map(len, pieces))))], b"".join(pieces)),
        "chunked": ([("transfer-encoding", "chunked")], chunked(pieces)),
        "closed": ([], b"".join(pieces)),
    }[kind]
    lines = "".join(f"{name}: {value}\r\n" for name, value in [*headers, *framing])
    head = f"HTTP/1.1 {status} X\r\n{lines}\r\n".encode()
    data = b"".join(b"HTTP/1.1 " + one + b"\r\n\r\n" for one in interim) + head + body
    return data, kind == "closed", status, [*headers, *framing], b"" if kind == "none" else b"".join(pieces)


def cut(data: bytes, places: list[int]) -> list[bytes]:
    marks = sorted({place % (len(data) + 1) for place in places})
    return [data[begin:end] for begin, end in zip([0, *marks], [*marks, len(data)], strict=True) if begin < end]


@given(answers(), st.lists(st.integers(0, 10_000), max_size=12))
def test_an_answer_is_the_same_however_it_is_cut_into_reads(
    answer: tuple[bytes, bool, int, list[tuple[str, str]], bytes], places: list[int]
) -> None:
    data, ends_with_connection, status, headers, body = answer
    incoming = fed(*cut(data, places), closed=ends_with_connection)
    assert seen(incoming) == (status, headers, body, True, not ends_with_connection)
    assert seen(incoming) == seen(fed(*(data[at : at + 1] for at in range(len(data))), closed=ends_with_connection))


@given(answers(), st.lists(st.integers(0, 10_000), max_size=6), st.integers(0, 10_000))
def test_an_answer_that_breaks_off_is_an_error_or_ends_with_the_connection(
    answer: tuple[bytes, bool, int, list[tuple[str, str]], bytes], places: list[int], end: int
) -> None:
    data, ends_with_connection, _, _, body = answer
    part = data[: end % len(data)]
    try:
        incoming = fed(*cut(part, places), closed=True)
    except EndpointError:
        return
    assert ends_with_connection
    assert body.startswith(bytes(incoming.body))


@given(st.lists(st.binary(max_size=200), max_size=8), st.booleans())
def test_arbitrary_bytes_raise_nothing_but_the_clients_own_error(pieces: list[bytes], bodiless: bool) -> None:
    with contextlib.suppress(EndpointError):
        fed(*pieces, bodiless=bodiless, closed=True)


@given(answers(), st.lists(st.tuples(st.integers(0, 10_000), st.binary(max_size=3)), min_size=1, max_size=4))
def test_a_damaged_answer_raises_nothing_but_the_clients_own_error(
    answer: tuple[bytes, bool, int, list[tuple[str, str]], bytes], damages: list[tuple[int, bytes]]
) -> None:
    data = bytearray(answer[0])
    for place, replacement in damages:
        at = place % len(data)
        data[at : at + 1] = replacement or b""
        data = data or bytearray(b"x")
    try:
        incoming = fed(bytes(data), closed=True)
    except EndpointError:
        return
    assert incoming.whole
    assert 200 <= incoming.status <= 599


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (OK + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n", "can't be present"),
        (OK + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\n", "Content-Length"),
        (OK + b"Content-Length: +5\r\n\r\n", "Content-Length"),
        (OK + b"Content-Length: 99999999999999999999999\r\n\r\n", "overflow"),
        (OK + b"Transfer-Encoding: gzip, chunked\r\n\r\n", "transfer coding"),
        (OK + b"Transfer-Encoding: xchunked\r\n\r\n", "transfer coding"),
        (OK + b"Transfer-Encoding: chunked\r\n\r\n" + b"f" * 17 + b"\r\n", "Chunk size"),
        (OK + b"Transfer-Encoding: chunked\r\n\r\n2\r\nabc", "Expected"),
        (OK + b"X : a\r\n\r\n", "header"),
        (OK + b"X: a\r\n b\r\n\r\n", "whitespace"),
        (OK + b"X: a\0b\r\n\r\n", "header"),
        (b"HTTP/1.1 200 OK\n\n", "CR"),
        (b"HTTP/2.0 200 OK\r\nContent-Length: 0\r\n\r\n", "another version"),
        (b"HTTP/1.1 101 X\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\n", "another protocol"),
        (b"HTTP/1.1 099 X\r\nContent-Length: 0\r\n\r\n", "interim"),
        (b"HTTP/1.1 600 X\r\nContent-Length: 0\r\n\r\n", "no status 600"),
        (b"HTTP/1.1 100 Continue\r\n\r\n" * (MAX_INTERIM + 1), "interim answers without end"),
        (b"220 ready for SMTP\r\n", "does not speak HTTP"),
    ],
)
def test_an_answer_whose_meaning_is_in_doubt_is_refused(data: bytes, says: str) -> None:
    with pytest.raises(EndpointError, match=says):
        fed(data)


@pytest.mark.parametrize(
    "pieces",
    [
        [OK + b"X: ", *[b"a" * 8000] * 20],
        [OK + b"X-Long: " + b"a" * MAX_HEAD_BYTES + b"\r\n\r\n"],
        [OK + b"X: y\r\n" * (MAX_HEADERS + 1) + b"\r\n"],
        [OK + b"Transfer-Encoding: chunked\r\n\r\n5;", *[b"a" * 8000] * 20],
        [OK + b"Transfer-Encoding: chunked\r\n\r\n", *[b"0" * 8000] * 20],
        [OK + b"Transfer-Encoding: chunked\r\n\r\n0\r\n", *[b"X: y\r\n" * 1000] * 20],
        [b"\r\n" * 4000] * 20,
    ],
)
def test_heads_chunk_sizes_and_trailers_without_end_are_refused(pieces: list[bytes]) -> None:
    with pytest.raises(EndpointError):
        fed(*pieces)


@pytest.mark.parametrize("head", [b"Content-Length: 7", b"Transfer-Encoding: chunked", b"X: y"])
def test_an_answer_to_head_has_no_body_whatever_it_announces(head: bytes) -> None:
    incoming = fed(OK + head + b"\r\n\r\n", bodiless=True)
    assert (incoming.whole, bytes(incoming.body)) == (True, b"")


@pytest.mark.parametrize("more", [b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n", b"garbage", b"hello"])
@pytest.mark.parametrize("apart", [False, True])
def test_what_comes_behind_a_whole_answer_spoils_the_connection_but_not_the_answer(more: bytes, apart: bool) -> None:
    data = OK + b"Content-Length: 2\r\n\r\nok"
    incoming = fed(data, more) if apart else fed(data + more)
    assert (incoming.whole, bytes(incoming.body), incoming.reusable) == (True, b"ok", False)


def test_trailers_are_read_over_and_do_not_become_headers() -> None:
    incoming = fed(OK + b"Transfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\nX-Late: 1\r\n\r\n")
    assert (incoming.headers, bytes(incoming.body)) == ([("transfer-encoding", "chunked")], b"ok")
    assert (incoming.whole, incoming.reusable) == (True, True)


@pytest.mark.parametrize("head", [b"HTTP/1.0 200 OK\r\n", OK + b"Connection: close\r\n"])
def test_a_connection_that_the_service_will_close_is_not_used_again(head: bytes) -> None:
    incoming = fed(head + b"Content-Length: 2\r\n\r\nok")
    assert (incoming.whole, incoming.reusable) == (True, False)
