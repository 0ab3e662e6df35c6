"""What comes from elsewhere only shows on a terminal and in a log: it is no command, no markup, no line of its own."""

from __future__ import annotations

import contextlib
import http.server
import io
import json
import logging
import os
import pty
import re
import subprocess
import sys
import threading
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from rma_core.commands import common, failed, rma, run
from rma_core.commands.pool import _worker
from rma_core.commands.running import _print_status
from rma_core.commands.volunteer import _shown
from rma_core.errors import Refused
from rma_core.models.hardware import Capabilities, HardwareReport
from rma_core.models.worker import RegisterRequest, RegisterResponse
from tests.pools import environment
from tests.pools import rma as rma_command

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

#: Clears the screen, sets the title (both forms of the introducer), colours by markup, and turns the text around.
EVIL = "\x1b[2J\x1b]0;owned\x07\x9b31m[red]\u202eevil[/red] :smile:"
SHOWN = "�[2J�]0;owned��31m[red]�evil[/red] :smile:"


def printed(show: Any, *arguments: Any) -> str:
    """Return what a function prints on a terminal in colour."""
    out = Console(file=io.StringIO(), force_terminal=True, width=500, highlight=False, emoji=False)
    show(out, *arguments)
    file = out.file
    assert isinstance(file, io.StringIO)
    return file.getvalue()


def obeyed(text: str) -> str:
    """Return what a terminal would obey, tables' own bold and colours left out."""
    return "".join(c for c in re.sub(r"\x1b\[[0-9;]*m", "", text) if not c.isprintable() and c != "\n")


def status() -> dict[str, Any]:
    texts = dict.fromkeys(("worker_id", "coordinator", "standing", "standing_reason", "tier_reason", "paused"), EVIL)
    numbers = dict.fromkeys(("tasks_succeeded", "tasks_failed", "current_load"), 0)
    lists: dict[str, Any] = {"attempts": [], "probes": [], "runtimes": [], "left_out": [EVIL]}
    container = {"service": EVIL, "state": EVIL, "runtime": EVIL, "reason": EVIL}
    model = {**container, "state": "healthy", "models": [{"name": EVIL, "state": EVIL}]}
    return {**texts, **numbers, **lists, "connection": "channel", "draining": False, "containers": [container, model]}


def test_the_status_of_the_agent_shows_what_the_coordinator_said_and_obeys_nothing() -> None:
    text = printed(_print_status, status())
    assert text.count(SHOWN) == 16
    assert obeyed(text) == ""


def test_a_worker_is_shown_as_it_calls_itself_and_obeyed_in_nothing() -> None:
    capabilities = {"cpu_cores": 4, "ram": EVIL, "storage": EVIL, "gpu_type": EVIL, "gpu_memory": EVIL}
    one = {
        "worker_id": EVIL, "status": "healthy", "status_reason": EVIL, "tier_reason": EVIL, "draining": False,
        "paused": True, "owner": EVIL,
        "capabilities": capabilities, "containers": [], "placement": {EVIL: EVIL},
        "hardware": {"probes": [{"detector": EVIL, "state": EVIL, "reason": EVIL}]},
        "plugins": [{"name": EVIL, "kind": EVIL, "state": EVIL, "reason": EVIL}],
    }  # fmt: skip
    text = printed(_worker, one)
    assert text.count(SHOWN) == 17
    assert obeyed(text) == ""


class AnsweringInvitation:
    """A coordinator that is hostile in what it says of a machine."""

    url, secret = f"https://{EVIL}", "rmaj_x"

    def client(self, _: object) -> AnsweringInvitation:
        return self

    async def register(self, *_: object, **__: object) -> RegisterResponse:
        return RegisterResponse(
            worker_id=EVIL,
            tier=1,
            tier_reason=EVIL,
            containers=(),
            generation=1,
            heartbeat_interval_s=30,
            access_token="",
            expires_in=60,
            placement={EVIL: EVIL},
        )

    async def aclose(self) -> None:
        """Nothing is open."""


def test_what_join_shows_of_the_pool_is_obeyed_in_nothing() -> None:
    capabilities = Capabilities(cpu_cores=4, ram="8GB", storage="10GB", gpu_type=EVIL, gpu_memory="8GB")
    report = HardwareReport(capabilities=capabilities)
    request = RegisterRequest(capabilities=capabilities)

    def show(out: Console) -> None:
        common.run_async(_shown(out, AnsweringInvitation(), request, report, ()))  # type: ignore[arg-type]

    text = printed(show)
    assert text.count(SHOWN) == 5
    assert obeyed(text) == ""


def test_an_error_of_the_coordinator_is_obeyed_in_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    error = Refused(EVIL, hints=(EVIL,))
    failed(error, as_json=False)
    common.say(EVIL)
    said = capsys.readouterr().err
    assert said.count(SHOWN) == 3
    assert obeyed(said) == ""
    failed(error, as_json=True)
    as_json = capsys.readouterr().out
    assert obeyed(as_json) == ""
    assert json.loads(as_json)["error"] == {"code": "refused", "message": EVIL, "hints": [EVIL]}


@given(st.recursive(st.text() | st.none(), lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner)))
def test_json_is_the_same_data_and_nothing_a_terminal_obeys(value: object) -> None:
    text = common.plain_json(value)
    assert json.loads(text) == value
    assert all(c.isprintable() or c == "\n" for c in text)


class Hostile(http.server.BaseHTTPRequestHandler):
    """A service that answers with what a terminal would obey."""

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers.get("content-length", "0")))
        body = EVIL.encode() + b"\n\xff\n"
        kind = "text/plain"
        if self.path.endswith("json"):
            body, kind = json.dumps({"text": EVIL}, ensure_ascii=False).encode(), "application/json"
        if self.path.endswith("liar"):
            kind = "application/json"
        self.send_response(200)
        self.send_header("content-type", kind)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@pytest.fixture(scope="module")
def hostile() -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hostile) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def ask(url: str, service: str, home: Path, *more: str, terminal: bool) -> bytes:
    """Run `rma infer` with its output to a terminal or to a pipe; return that."""
    command = rma_command("infer", service, "a text", "--coordinator", url, "--key", "rmac_x", *more)
    if not terminal:
        return subprocess.run(command, env=environment(home), capture_output=True, timeout=60, check=True).stdout
    leader, follower = pty.openpty()
    said = bytearray()
    process = subprocess.Popen(command, env=environment(home), stdout=follower, stdin=subprocess.DEVNULL)
    os.close(follower)
    with contextlib.suppress(OSError):  # how Linux says that the other end was closed
        while data := os.read(leader, 4096):
            said.extend(data)
    os.close(leader)
    assert process.wait(60) == 0
    return bytes(said)


@pytest.mark.parametrize("service", ["text", "liar"])
def test_an_answer_is_exact_in_a_pipe_and_harmless_on_a_terminal(hostile: str, tmp_path: Path, service: str) -> None:
    exact = EVIL.encode() + b"\n\xff\n"
    # What calls itself JSON gets a line end.
    assert ask(hostile, service, tmp_path, terminal=False) == exact + (b"\n" if service == "liar" else b"")
    assert ask(hostile, service, tmp_path, terminal=True).decode() == f"{SHOWN}\r\n�\r\n"


def test_an_answer_in_json_is_the_same_data_on_a_terminal(hostile: str, tmp_path: Path) -> None:
    for more, terminal in (((), True), (("--json",), False)):
        shown = ask(hostile, "json", tmp_path, *more, terminal=terminal).decode().replace("\r\n", "\n")
        assert obeyed(shown) == ""
        assert json.loads(shown) == {"text": EVIL}
    assert json.loads(ask(hostile, "json", tmp_path, terminal=False)) == {"text": EVIL}


# -- the log -------------------------------------------------------------------------------------------------------

FORMAT = common.OneLine("%(levelname)s %(message)s")


def record(message: str, *, error: BaseException | None = None) -> logging.LogRecord:
    info = (type(error), error, error.__traceback__) if error else None
    return logging.LogRecord("x", logging.INFO, "x.py", 1, message, (), info)


@given(st.text(max_size=6000))
def test_a_record_of_the_log_is_one_printable_line_of_bounded_length(message: str) -> None:
    line = FORMAT.format(record(message))
    assert line.isprintable()
    assert line.startswith("INFO ")
    assert len(line) <= common.LOG_LINE


def test_a_traceback_keeps_its_lines_and_cannot_pass_for_a_record() -> None:
    try:
        raise ValueError("first\n12:00:00 INFO enrolled\x1b[2J" + "x" * 9000)
    except ValueError as error:
        lines = FORMAT.format(record("it\nfailed", error=error)).split("\n")
    assert lines[0] == r"INFO it\nfailed"
    assert lines[1] == "  Traceback (most recent call last):"
    assert lines[-1].startswith(r"  12:00:00 INFO enrolled\x1b[2Jxxx")
    assert all(line.isprintable() and len(line) <= common.LOG_LINE for line in lines)
    assert all(line.startswith("  ") for line in lines[1:])


def test_the_commands_log_with_that_format() -> None:
    words = "import logging; from rma_core.commands import common; common.set_up_logging('info'); "
    words += r"logging.getLogger('x').warning('a\nb\x1b[2J')"
    done = subprocess.run([sys.executable, "-c", words], capture_output=True, text=True, timeout=60, check=True)
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d WARNING a\\nb\\x1b\[2J\n", done.stderr)


# -- options -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["status", "drain"])
def test_without_a_running_agent_a_command_fails_and_was_not_used_wrongly(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    assert run([command, "--home", str(tmp_path), "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["error"]["code"] == "no_agent"


@pytest.mark.parametrize("command", ["join", "agent", "leave", "drain", "status", "up", "coordinator"])
def test_every_command_of_a_machine_gives_its_errors_as_json(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    monkeypatch.setenv("RMA_LOG_LEVEL", "loud")
    arguments = ["http://127.0.0.1:9", "rmaj_x"] if command == "join" else []
    assert run([command, *arguments, "--home", str(tmp_path), "--json"]) == 2
    error = json.loads(capsys.readouterr().out)["error"]
    assert error["code"] == "setting"
    assert "RMA_LOG_LEVEL" in error["message"]


def test_the_options_of_up_come_from_the_environment_too(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("LAN", "1"), ("LAN_PORT", "9443"), ("LAN_HOST", "pool.lan"), ("NO_AGENT", "yes")):
        monkeypatch.setenv(f"RMA_{name}", value)
    monkeypatch.setenv("RMA_VERBOSE", "true")
    up = rma.get_command(None, "up")  # type: ignore[arg-type]  # it asks nothing of the context
    assert up is not None
    given = up.make_context("up", []).params
    names = ("lan", "lan_port", "lan_host", "no_agent", "verbose")
    assert [given[name] for name in names] == [True, 9443, "pool.lan", True, True]


def test_plain_http_for_admin_commands_can_be_accepted_in_the_environment(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["workers", "--home", str(tmp_path), "--coordinator", "http://no.such.host.invalid", "--key", "rmaa_x"]
    assert run(command) == 2
    assert "in the clear" in capsys.readouterr().err
    monkeypatch.setenv("RMA_INSECURE_HTTP", "1")
    assert run(command) == 7
