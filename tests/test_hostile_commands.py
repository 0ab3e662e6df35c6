"""Every command of `rma` with what goes wrong (options, files, networks, coordinators): one sentence, its exit code."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import threading
import time
from typing import TYPE_CHECKING, Any

import pytest

from rma_core import http
from rma_core.commands import Commands, rma, run
from tests.pools import environment
from tests.pools import rma as rma_command
from tests.ports import free_port

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    import click

#: What CONTRACT lists.
EXITS = frozenset({0, 1, 2, 4, 5, 6, 7, 75})
KEY = "rmaa_" + "0" * 36
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nConnection: close\r\n"


def ok(body: bytes) -> bytes:
    return HEAD + b"Content-Length: %d\r\n\r\n" % len(body) + body


def status(code: int, body: bytes, kind: bytes = b"text/html") -> bytes:
    head = b"HTTP/1.1 %d X\r\nContent-Type: %b\r\nConnection: close\r\n" % (code, kind)
    return head + b"Content-Length: %d\r\n\r\n" % len(body) + body


PAGE = b"<html><body><h1>It works!</h1></body></html>"
#: What a coordinator, or what only stands at its address, may answer to anything.
ANSWERS: dict[str, bytes] = {
    "nothing": b"",
    "no HTTP": b"SSH-2.0-OpenSSH_9.6\r\n",
    "zeros": b"\0" * 500,
    "half a head": b"HTTP/1.1 200 OK\r\nContent-Le",
    "half a body": HEAD + b'Content-Length: 500\r\n\r\n{"workers": [',
    "broken chunks": HEAD + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n",
    "not the encoding it says": HEAD + b"Content-Encoding: gzip\r\nContent-Length: 4\r\n\r\nabcd",
    "a page": status(200, PAGE),
    "a page as JSON": ok(PAGE),
    "empty": ok(b""),
    "null": ok(b"null"),
    "a list": ok(b"[1, 2]"),
    "a number": ok(b"1e999"),
    "an empty object": ok(b"{}"),
    "invalid UTF-8": ok(b'{"workers": "\xff\xfe"}'),
    "deep": ok(b"[" * 100_000),
    "numbers for lists": ok(
        json.dumps(
            dict.fromkeys(("workers", "tasks", "services", "keys", "tokens", "policies", "next", "status"), 5)
        ).encode()
    ),
    "nulls for lists": ok(
        json.dumps(dict.fromkeys(("workers", "tasks", "services", "keys", "tokens", "policies", "status"))).encode()
    ),
    "lists of the wrong": ok(
        json.dumps({n: [1, None, {}] for n in ("workers", "tasks", "services", "keys", "tokens", "policies")}).encode()
    ),
    "a list without end": ok(json.dumps({"workers": [], "tasks": [], "next": "again"}).encode()),
    "an address elsewhere": ok(b'{"task_id": "task-1", "status": "succeeded", "result_url": "http://example.org/x"}'),
    "a redirect": b"HTTP/1.1 302 X\r\nLocation: http://example.org/\r\nContent-Length: 0\r\nConnection: close\r\n\r\n",
    "an error page": status(500, PAGE),
    "a proxy's error": status(502, b"Bad gateway\0"),
    "a problem of the wrong form": status(400, b'{"detail": {"a": 1}, "hints": 5}', b"application/problem+json"),
    "a deep problem": status(409, b"[" * 100_000, b"application/problem+json"),
    "who are you": status(401, b""),
    "not for you": status(403, PAGE),
    "not here": status(404, PAGE),
    "later": b"HTTP/1.1 503 X\r\nRetry-After: nan\r\nContent-Length: 0\r\nConnection: close\r\n\r\n",
    "a status that is none": b"HTTP/1.1 999 X\r\nContent-Length: 0\r\nConnection: close\r\n\r\n",
    "a huge head": b"HTTP/1.1 200 OK\r\nX-Y: " + b"y" * 300_000 + b"\r\n\r\n",
}
#: Commands that ask a coordinator.
ASKING: tuple[tuple[str, ...], ...] = (
    ("workers",),
    ("workers", "worker-00000000"),
    ("tasks",),
    ("services",),
    ("keys",),
    ("keys", "create"),
    ("keys", "revoke", "00000000"),
    ("tokens",),
    ("tokens", "create"),
    ("tokens", "revoke", "00000000"),
    ("policies",),
    ("policies", "preview", "threshold"),
    ("policies", "rescan"),
    ("backup",),
    ("infer", "notes", "a text"),
    ("infer", "notes", "a text", "--detach"),
    ("result", "task-1", "--no-wait"),
    ("cancel", "task-1"),
)


class Hostile:
    """Something at an address that answers everything with the same bytes."""

    def __init__(self) -> None:
        self.answer: Callable[[socket.socket], None] | bytes = b""
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        while True:
            try:
                one, _ = self._socket.accept()
            except OSError:
                return
            with one, contextlib.suppress(OSError):
                one.settimeout(5)
                asked = b""
                while b"\r\n\r\n" not in asked and (data := one.recv(65536)):
                    asked += data
                if callable(self.answer):
                    self.answer(one)
                else:
                    one.sendall(self.answer)
                one.shutdown(socket.SHUT_WR)
                while one.recv(65536):
                    pass

    def close(self) -> None:
        self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        self._thread.join(10)


@pytest.fixture
def hostile() -> Iterator[Hostile]:
    made = Hostile()
    yield made
    made.close()


@pytest.fixture(autouse=True)
def _alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of this machine's own pool, and a folder to work in."""
    for name in [name for name in os.environ if name.startswith("RMA_") or name == "COORDINATOR_URL"]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("RMA_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)


def said(capsysbinary: pytest.CaptureFixture[bytes], *arguments: str) -> tuple[int, str, str]:
    """Run a command line here; return its exit code and what it wrote. A traceback would fail the test by itself."""
    code = run(list(arguments))
    out, err = (found.decode(errors="surrogateescape") for found in capsysbinary.readouterr())
    assert "Traceback" not in out + err
    return code, out, err


def check(code: int, out: str, err: str, *, as_json: bool, arguments: Sequence[str]) -> dict[str, Any]:
    """Assert that a failure is told as CONTRACT says; return the error."""
    assert code in EXITS - {0}, (arguments, code, out, err)
    if not as_json:
        assert "error: " in err or "Error: " in err or "Usage: " in err, (arguments, err)
        assert len(err) < 3000
        return {}
    found = json.loads(out)["error"]
    assert set(found) == {"code", "message", "hints"}
    assert found["message"]
    assert found["code"] != "bug", (arguments, found)
    return dict(found)


@pytest.mark.parametrize("name", ANSWERS)
def test_what_stands_at_the_address_may_answer_anything(
    hostile: Hostile, capsysbinary: pytest.CaptureFixture[bytes], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr("rma_core.commands.common.MAX_PAGES", 3)
    hostile.answer = ANSWERS[name]
    good = name in (
        "an empty object",
        "a list",
        "a page",
        "a page as JSON",
        "empty",
        "null",
        "a number",
        "invalid UTF-8",
        "a list without end",
    )
    for command in ASKING:
        arguments = [*command, "--coordinator", hostile.url, "--key", KEY]
        for as_json in (False, True):
            code, out, err = said(capsysbinary, *arguments, *(["--json"] if as_json else []))
            if code == 0:
                # Only a service's own answer, or data that is shown as it is, may be anything.
                assert as_json or good or command[0] in ("infer", "services", "tokens", "keys", "cancel", "result"), (
                    arguments,
                    out,
                )
                continue
            check(code, out, err, as_json=as_json, arguments=arguments)


@pytest.mark.parametrize(
    ("name", "code"),
    [("who are you", 4), ("not for you", 5), ("not here", 6), ("nothing", 7), ("later", 75), ("a page", 1)],
)
def test_exit_codes_are_those_of_the_contract(
    hostile: Hostile, capsysbinary: pytest.CaptureFixture[bytes], name: str, code: int
) -> None:
    hostile.answer = ANSWERS[name]
    found = said(capsysbinary, "workers", "--coordinator", hostile.url, "--key", KEY, "--json")
    assert found[0] == code, found


def endless(one: socket.socket) -> None:
    one.sendall(HEAD + b"Transfer-Encoding: chunked\r\n\r\n")
    while True:
        one.sendall(b"10000\r\n" + b" " * 65536 + b"\r\n")


def dripping(one: socket.socket) -> None:
    one.sendall(HEAD + b"Content-Length: 100000\r\n\r\n")
    for _ in range(500):
        one.sendall(b" ")
        time.sleep(0.02)


@pytest.mark.parametrize(("behave", "words"), [(endless, "longer than"), (dripping, "not whole within")])
def test_an_answer_without_end_is_given_up(
    hostile: Hostile,
    capsysbinary: pytest.CaptureFixture[bytes],
    monkeypatch: pytest.MonkeyPatch,
    behave: Callable[[socket.socket], None],
    words: str,
) -> None:
    monkeypatch.setattr(http.read_sync, "__kwdefaults__", {"limit_bytes": 1 << 20, "within_s": 0.5})
    hostile.answer = behave
    code, out, err = said(capsysbinary, "workers", "--coordinator", hostile.url, "--key", KEY, "--json")
    assert words in check(code, out, err, as_json=True, arguments=["workers"])["message"]


def test_nobody_at_the_address_is_said_by_every_command(capsysbinary: pytest.CaptureFixture[bytes]) -> None:
    url = f"http://127.0.0.1:{free_port()}"
    for command in ASKING:
        code, out, err = said(capsysbinary, *command, "--coordinator", url, "--key", KEY, "--json")
        assert (code, check(code, out, err, as_json=True, arguments=command)["code"]) == (7, "unreachable"), command
    code, out, err = said(capsysbinary, "workers", "--coordinator", "https://pool.invalid", "--key", KEY, "--json")
    assert code == 7


@pytest.mark.parametrize(
    "url",
    ["", " ", "x", "http://", "http://[::1", "http://127.0.0.1:99999", "http://127.0.0.1:x", "ftp://a", "//a",
     "http://a b/", "http://\0", "http://\udcff", "https://user:pw@h/", "http://example.org", "http://127.0.0.1:0",
     "http://" + "h" * 5000],
)  # fmt: skip
def test_an_address_that_is_none_is_a_mistake_in_the_call(capsysbinary: pytest.CaptureFixture[bytes], url: str) -> None:
    for command in (("workers",), ("infer", "notes", "x")):
        code, out, err = said(capsysbinary, *command, "--coordinator", url, "--key", KEY, "--json")
        check(code, out, err, as_json=True, arguments=[url])
        assert code in (2, 7), (url, out)
    code, out, err = said(capsysbinary, "join", url, "rmaj_x", "--yes", "--json")
    check(code, out, err, as_json=True, arguments=["join", url])


@pytest.mark.parametrize("key", ["", " ", "x y", "k\n", "\0", "schlüssel", "\udcff", "k" * 100_000])
def test_a_key_that_is_none_is_said(hostile: Hostile, capsysbinary: pytest.CaptureFixture[bytes], key: str) -> None:
    hostile.answer = ANSWERS["who are you"]
    code, out, err = said(capsysbinary, "workers", "--coordinator", hostile.url, "--key", key, "--json")
    check(code, out, err, as_json=True, arguments=["workers"])
    assert code == 4


def commands() -> Iterator[tuple[tuple[str, ...], click.Command]]:
    """Every command with its words."""
    import click

    def below(words: tuple[str, ...], command: click.Command) -> Iterator[tuple[tuple[str, ...], click.Command]]:
        yield words, command
        if isinstance(command, click.Group) and not isinstance(command, Commands):
            for name, inner in command.commands.items():
                yield from below((*words, name), inner)

    for name in rma.list_commands(click.Context(rma)):
        command = rma.get_command(click.Context(rma), name)
        assert command is not None
        yield from below((name,), command)


ALL = dict(commands())


@pytest.mark.parametrize("words", ALL, ids=[" ".join(words) for words in ALL])
def test_options_that_do_not_exist_or_do_not_fit_are_mistakes_in_the_call(
    capsysbinary: pytest.CaptureFixture[bytes], words: tuple[str, ...]
) -> None:
    import click

    wrong: list[list[str]] = [["--no-such-option"], ["-\udcff"]]
    for option in ALL[words].params:
        if not isinstance(option, click.Option) or option.is_flag or option.hidden:
            continue
        name = option.opts[-1]
        wrong.append([name])
        if isinstance(option.type, (click.types.IntParamType, click.types.FloatParamType)):
            wrong += [[name, value] for value in ("x", "-1", "nan", "1e999", "9" * 400, "")]
    for arguments in wrong:
        for as_json in (["--json"], []):
            # Last, so that an option without its value does not take what follows for it.
            code, out, err = said(capsysbinary, *words, *as_json, *arguments)
            check(code, out, err, as_json=bool(as_json), arguments=[*words, *arguments])
            assert code in (2, 4), (words, arguments, code, out, err)


FILES: tuple[tuple[str, ...], ...] = (
    ("detect", "--replay", "{}"),
    ("policies", "preview", "threshold", "--report", "{}"),
    ("infer", "notes", "{}", "--coordinator", "http://127.0.0.1:9", "--key", KEY),
    ("coordinator", "--port", "0", "--tls-cert", "{}", "--tls-key", "{}"),
    ("coordinator", "--catalog", "{}"),
    ("coordinator", "--port", "0", "--store", "sqlite:{}"),
    ("detect", "--home", "{}"),
    ("plugins", "--home", "{}"),
    ("status", "--home", "{}"),
    ("leave", "--yes", "--home", "{}"),
    ("agent", "--home", "{}"),
)


@pytest.fixture
def odd_files(tmp_path: Path) -> list[str]:
    """Names of files that are not what anyone wants."""
    (tmp_path / "binary.json").write_bytes(bytes(range(256)) * 50)
    (tmp_path / "empty.json").write_bytes(b"")
    (tmp_path / "deep.json").write_bytes(b"[" * 100_000)
    (tmp_path / "list.json").write_bytes(b"[1, null, [], {}]")
    (tmp_path / "nan.json").write_bytes(b'{"capabilities": {"cpu_cores": NaN, "ram": 1e999}}')
    (tmp_path / "folder.json").mkdir()
    (tmp_path / "loop.json").symlink_to(tmp_path / "loop.json")
    names = ["binary.json", "empty.json", "deep.json", "list.json", "nan.json", "folder.json", "loop.json"]
    return [*(str(tmp_path / name) for name in names), "/nonexistent/x.json", "/dev/full", "a\udcffb.json", "n" * 5000]


@pytest.mark.parametrize("command", FILES, ids=[" ".join(c).replace("{}", "FILE")[:40] for c in FILES])
def test_files_that_are_missing_unreadable_or_nonsense_are_said(
    odd_files: list[str], capsysbinary: pytest.CaptureFixture[bytes], command: tuple[str, ...]
) -> None:
    for name in odd_files:
        if command[0] == "infer" and name.endswith(("binary.json", "empty.json", "deep.json", "list.json", "nan.json")):
            continue
        if name == "/dev/full" and command[0] in ("infer", "coordinator"):
            continue
        if command[0] == "coordinator" and name.endswith(("folder.json", "empty.json", "x.json")):
            # An empty catalog, a store that begins, a folder that root may make: nothing is wrong with them.
            continue
        if command[1] == "--home" and name.endswith("folder.json"):
            continue
        arguments = [part.replace("{}", name) for part in command]
        code, out, err = said(capsysbinary, *arguments, "--json")
        if code == 0:
            assert command[0] in ("detect", "plugins"), (arguments, out)
            continue
        check(code, out, err, as_json=True, arguments=arguments)


def test_what_cannot_be_written_is_said(capsysbinary: pytest.CaptureFixture[bytes], tmp_path: Path) -> None:
    fake = tmp_path / "devices.json"
    code, out, err = said(capsysbinary, "detect", "--record", str(fake))
    assert code == 0, err
    for name in ("/nonexistent/x/y.json", str(tmp_path), "/dev/full"):
        code, out, err = said(capsysbinary, "detect", "--record", name, "--json")
        found = check(code, out, err, as_json=True, arguments=["detect", "--record", name])
        assert name in found["message"], found


@pytest.mark.parametrize(
    "content", [b"", b"\xff\xfe", b"[", b"[plugins", b"log_level = 5", b'heartbeat_interval_s = "x"']
)
def test_a_settings_file_that_is_nonsense_is_said(
    capsysbinary: pytest.CaptureFixture[bytes], tmp_path: Path, content: bytes
) -> None:
    home = tmp_path / "home"
    home.mkdir()
    (home / "rma.toml").write_bytes(content)
    for command in (("detect",), ("status",), ("plugins",), ("coordinator", "--port", "99999")):
        code, out, err = said(capsysbinary, *command, "--json")
        if code:
            check(code, out, err, as_json=True, arguments=command)
    (home / "client.json").write_bytes(b'{"url": "http://127.0.0.1:9", "key": "k", "certificate": "nonsense"}')
    code, out, err = said(capsysbinary, "workers", "--json")
    check(code, out, err, as_json=True, arguments=["workers"])


def test_processes_say_the_same_and_no_more(tmp_path: Path, hostile: Hostile) -> None:
    hostile.answer = ANSWERS["a page"]
    for arguments, code in (
        (["workers", "--coordinator", hostile.url, "--key", KEY], 1),
        (["workers", "--coordinator", "http://127.0.0.1:9", "--key", KEY], 7),
        (["workers"], 2),
        (["no-such-command"], 2),
        (["detect", "--replay", "/nonexistent"], 2),
    ):
        for more in ([], ["--json"]):
            done = subprocess.run(
                rma_command(*arguments, *more), env=environment(tmp_path / "home"), capture_output=True, timeout=60,
                text=True, check=False, stdin=subprocess.DEVNULL,
            )  # fmt: skip
            assert done.returncode in (code, 1), (arguments, done)
            assert "Traceback" not in done.stdout + done.stderr
            if more:
                assert json.loads(done.stdout)["error"]["message"]


def test_a_bug_is_one_sentence_and_a_traceback_only_for_who_asks(
    capsysbinary: pytest.CaptureFixture[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr("rma_core.commands.machine.settings_of", broken)
    code, out, _ = said(capsysbinary, "detect", "--json")
    assert (code, json.loads(out)["error"]["code"]) == (1, "bug")
    monkeypatch.setenv("RMA_LOG_LEVEL", "debug")
    with pytest.raises(RuntimeError, match="a bug"):
        run(["detect"])
