"""The agent's control socket: its owner's other programs ask it for its status, or to drain.

One line of JSON in (``{"call": "status"}``), one out (``{"ok": …}`` or ``{"error": {code, message, hints}}``). A Unix
socket in the state folder, 0600; on Windows a port on loopback and a token that only the owner can read. Where the
socket is stands in ``control.json``.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import logging
import os
import secrets
import shutil
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from rma_core.errors import AgentAbsent, RMAError, UsageProblem, ValidationProblem
from rma_core.models.strict import decode, encode

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping

    from rma_core.agent.state import StateFolder

logger = logging.getLogger(__name__)

SOCKET_FILE = "agent.sock"
ADDRESS_FILE = "control.json"
#: Seconds a call may take to be read and answered.
CALL_TIMEOUT_S = 10.0
#: Longest call, and longest answer: a status with a thousand containers.
MAX_CALL_BYTES, MAX_ANSWER_BYTES = 64 * 1024, 8 * 1024 * 1024
#: The kernel takes 108 bytes for a socket's path, macOS 104.
MAX_SOCKET_PATH = 100


class Address(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Where the control socket is: a path, or a port with its token."""

    path: str = ""
    port: int = 0
    token: str = ""


class Call(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What is asked."""

    call: str
    token: str = ""
    arguments: dict[str, Any] = {}


class ControlServer:
    """Serves calls; ``handlers`` by the call's name return plain data or records."""

    def __init__(
        self, folder: StateFolder, handlers: Mapping[str, Callable[[dict[str, Any]], Awaitable[object]]]
    ) -> None:
        self._folder, self._handlers = folder, handlers
        self._server: asyncio.Server | None = None
        self._address = Address()
        self._spare: str = ""

    async def start(self) -> None:
        """Listen, and write down where."""
        if sys.platform == "win32":
            self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0, limit=MAX_CALL_BYTES)
            port = self._server.sockets[0].getsockname()[1]
            self._address = Address(port=port, token=secrets.token_urlsafe(32))
        else:
            path = self._path()
            # The folder is 0700, so nobody can connect between the bind and the chmod.
            self._server = await asyncio.start_unix_server(self._serve, path, limit=MAX_CALL_BYTES)
            os.chmod(path, 0o600)  # noqa: PTH101 - one quick call, before anybody knows the socket
            self._address = Address(path=str(path))
        self._folder.write(ADDRESS_FILE, encode(self._address))

    def _path(self) -> Path:
        path = self._folder.path.absolute() / SOCKET_FILE
        # One that an agent left which was killed: this agent holds the folder's lock.
        path.unlink(missing_ok=True)
        if len(os.fsencode(path)) <= MAX_SOCKET_PATH:
            return path
        self._spare = tempfile.mkdtemp(prefix="rma-")
        return Path(self._spare) / SOCKET_FILE

    async def aclose(self) -> None:
        """Stop listening and leave nothing behind."""
        if self._server is not None:
            self._server.close()
            self._clear_away()

    def _clear_away(self) -> None:
        (self._folder.path / ADDRESS_FILE).unlink(missing_ok=True)
        if self._address.path:
            Path(self._address.path).unlink(missing_ok=True)
        if self._spare:
            shutil.rmtree(self._spare, ignore_errors=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            async with asyncio.timeout(CALL_TIMEOUT_S):
                answer = await self._answer(await reader.readline())
                writer.write(encode(answer) + b"\n")
                await writer.drain()
        except (TimeoutError, OSError, ValueError) as error:
            logger.debug("a control call broke off: %s", error)
        finally:
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()

    async def _answer(self, line: bytes) -> dict[str, object]:
        try:
            call = decode(line, Call, subject="control call")
            if not hmac.compare_digest(call.token, self._address.token):
                raise UsageProblem("this call lacks the agent's control token")
            handler = self._handlers.get(call.call)
            if handler is None:
                raise UsageProblem(f"the agent knows no call {call.call!r}")
            return {"ok": await handler(call.arguments)}
        except RMAError as error:
            return {"error": {"code": error.code, "message": error.message, "hints": error.hints}}


async def ask(home: Path, call: str, **arguments: object) -> Any:  # noqa: ANN401 - each call answers its own plain data
    """Return what the agent that runs with this state folder answers. Raises AgentAbsent when none does."""
    try:
        address = decode((home / ADDRESS_FILE).read_bytes(), Address, subject="control address")
        async with asyncio.timeout(CALL_TIMEOUT_S):
            data = await _exchange(address, Call(call=call, token=address.token, arguments=arguments))
    except (OSError, TimeoutError, ValidationProblem, asyncio.IncompleteReadError):
        raise AgentAbsent(
            f"no agent runs with the state folder {home}", hints=("`rma agent` starts one", "RMA_HOME names its folder")
        ) from None
    answer = decode(data, dict[str, Any], subject="the agent's answer")
    if "error" in answer:
        raise UsageProblem(str(answer["error"].get("message")), hints=answer["error"].get("hints", ()))
    return answer.get("ok")


async def _exchange(address: Address, call: Call) -> bytes:
    if sys.platform == "win32" or address.port:
        reader, writer = await asyncio.open_connection("127.0.0.1", address.port, limit=MAX_ANSWER_BYTES)
    else:
        reader, writer = await asyncio.open_unix_connection(address.path, limit=MAX_ANSWER_BYTES)
    try:
        writer.write(encode(call) + b"\n")
        await writer.drain()
        return await reader.readuntil(b"\n")
    finally:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()
