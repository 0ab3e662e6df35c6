"""The engine's life as its parent sees it: checked, loading, ready, cold, loading again; ended, and why."""

from __future__ import annotations

import asyncio
import collections
import contextlib
import json
import logging
import os
import secrets
import signal
import socket
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from rma_llama_cpp import model_file
from rma_llama_cpp.settings import Unusable
from rma_service import machine

if TYPE_CHECKING:
    from rma_llama_cpp.settings import Settings

logger = logging.getLogger(__name__)

#: The engine's socket, in the working folder: a path below it could be too long for one.
SOCKET = "engine.sock"
#: The longest line of the engine's that is looked at.
LINE_BYTES = 8192
#: Lines and characters of its last errors that are kept.
LAST_LINES, LAST_CHARACTERS = 8, 300
#: Seconds for llama.cpp to say which devices there are.
DRIVER_S = 60.0
#: Seconds until a killed engine is gone.
REAP_S = 5.0
#: What llama.cpp says in front of the reason why a model cannot be loaded.
_REASON = "error loading model: "
#: Lines of llama.cpp's that are passed on once requests are served: no line about one of them.
_LEVEL = " E "


class Engine:
    """The process that holds the model; `state` is ``checking``, ``loading``, ``ready`` or ``cold``."""

    def __init__(self, settings: Settings) -> None:
        """Start nothing yet; the working folder should be one that only this user can enter."""
        self.settings = settings
        self.key = secrets.token_urlsafe(24)
        self.state = "checking"
        self.checked: float | None = None
        self.size_bytes = 0
        self.process: asyncio.subprocess.Process | None = None
        #: Set while requests can be passed on.
        self.ready = asyncio.Event()
        #: Whether it has been ready, or cold, once: from then on requests are worth holding until it is ready again.
        self.settled = False
        self._wanted = asyncio.Event()
        if settings.load:
            self._wanted.set()
        self._checked = False
        #: Whether its process was ended because nobody wants the model for now.
        self._dropped = False
        self._port = 0
        self._reason = ""
        self._errors: collections.deque[str] = collections.deque(maxlen=LAST_LINES)

    async def run(self) -> str:
        """Load the model whenever it is wanted, until the engine ends by itself; returns why. Raises Unusable."""
        gpu = await self._has_gpu()
        while True:
            # A file that cannot be a model is told at once, wanted or not.
            self.size_bytes = await asyncio.to_thread(model_file.check, self.settings.file)
            if not self._wanted.is_set():
                self._become("cold")
                await self._wanted.wait()
            await self._check_digest()
            if not self._wanted.is_set():
                continue
            why = await self._serve(gpu=gpu)
            if not self._dropped:
                return why
            self._dropped = False

    async def _check_digest(self) -> None:
        if self.settings.sha256 and not self._checked:
            self._become("checking")
            await asyncio.to_thread(model_file.check_digest, self.settings.file, self.settings.sha256, self._progress)
            self._checked = True

    async def _serve(self, *, gpu: bool) -> str:
        """Load the model and keep it until its process ends; returns why it did. Raises Unusable."""
        if not gpu:
            model_file.check_room(self.settings.file, self.size_bytes)
        self._become("loading")
        self._reason = ""
        self._errors.clear()
        self.process = await self._start(gpu=gpu)
        errors = asyncio.create_task(self._follow(self.process), name="what the engine says")
        try:
            if not self._wanted.is_set():
                await self.unload()
            await self._until_ready(self.process)
            code = await self.process.wait()
            await asyncio.wait((errors,), timeout=REAP_S)
        finally:
            self.ready.clear()
            await self.stop()
            errors.cancel()
        if self.state != "ready" and not self._dropped:
            raise Unusable(f"{self.settings.file} cannot be loaded: {self._why(code)}")
        return f"llama.cpp has ended: {self._why(code)}"

    def load(self) -> None:
        """See that the model is loaded, or is being loaded."""
        self._wanted.set()
        if self.state == "cold":
            self.state = "loading"

    async def unload(self) -> None:
        """Give the model's memory back: its process ends; the next `load` starts another."""
        self._wanted.clear()
        self.ready.clear()
        self._dropped = self.process is not None and self.process.returncode is None
        if self._dropped:
            self._become("cold")
        await self.stop()

    async def stop(self) -> None:
        """Kill the engine, which keeps nothing that could be lost, and wait until it is gone."""
        if self.process is not None:
            with contextlib.suppress(ProcessLookupError):
                self.process.kill()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(REAP_S):
                    await self.process.wait()

    async def connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """Open a connection to the engine. Raises OSError."""
        if self._port:
            return await asyncio.open_connection("127.0.0.1", self._port)
        return await asyncio.open_unix_connection(SOCKET)

    def progress(self) -> float | None:
        """Return the share of the file that was checked, or is in memory while it loads; None where nobody knows."""
        if self.state == "checking":
            return self.checked
        if self.state == "loading" and self.process is not None and self.size_bytes:
            with contextlib.suppress(OSError, ValueError, IndexError):
                pages = int(Path(f"/proc/{self.process.pid}/statm").read_text(encoding="ascii").split()[1])
                return min(0.99, pages * os.sysconf("SC_PAGE_SIZE") / self.size_bytes)
        return None

    def _progress(self, share: float) -> None:
        self.checked = share

    def _become(self, state: str) -> None:
        self.state = state
        self.settled = self.settled or state in ("ready", "cold")
        if state == "ready":
            self.ready.set()
        logger.info("%s: %s", self.settings.model, state)

    async def _has_gpu(self) -> bool:
        """Ask in a process of its own: drivers take memory, and may take the process with them."""
        ask = "import xllamacpp, rma_llama_cpp.engine as e; print(e.gpu(xllamacpp))"
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-I", "-c", ask, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
        )
        try:
            async with asyncio.timeout(DRIVER_S):
                said, errors = await process.communicate()
        except TimeoutError:
            raise Unusable("llama.cpp did not say in time which devices there are: a driver hangs") from None
        finally:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
        if process.returncode != 0:
            raise Unusable(f"llama.cpp cannot be used here: {_cause(errors)}")
        return said.strip() == b"True"

    async def _start(self, *, gpu: bool) -> asyncio.subprocess.Process:
        settings = self.settings
        unix = hasattr(socket, "AF_UNIX") and sys.platform != "win32"
        # One that was killed has left it, and llama.cpp takes no name that is there.
        Path(SOCKET).unlink(missing_ok=True)  # noqa: ASYNC240 - one quick call
        told = {
            "file": str(settings.file), "model": settings.model, "host": SOCKET if unix else "127.0.0.1",
            "key": self.key, "slots": settings.slots, "context": settings.context, "threads": machine.cpus(),
            "embeddings": settings.embeddings, "kv_type": settings.kv_type, "gpu": gpu,
        }  # fmt: skip
        pipe = asyncio.subprocess.PIPE
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-I", "-m", "rma_llama_cpp.engine", stdin=pipe, stdout=pipe, stderr=pipe, limit=LINE_BYTES
        )
        if process.stdin is not None:
            process.stdin.write(json.dumps(told).encode() + b"\n")
        return process

    async def _until_ready(self, process: asyncio.subprocess.Process) -> None:
        """Wait for the engine's address, or its end; how long that may take is for who starts the service to say."""
        if process.stdout is None:
            return
        line = await process.stdout.readline()
        if line:
            address = str(json.loads(line)["address"])
            self._port = 0 if address.startswith("unix:") else int(address.rpartition(":")[2])
            self._become("ready")

    async def _follow(self, process: asyncio.subprocess.Process) -> None:
        """Read what llama.cpp writes: all of it while it loads, errors of its own afterwards."""
        reader = process.stderr
        while reader is not None and not reader.at_eof():
            try:
                line = (await reader.readline()).decode(errors="replace").strip()
            except ValueError:  # a line longer than any of llama.cpp's own
                continue
            if _LEVEL in line[:20] or not line[:1].isdigit():
                self._errors.append(line[:LAST_CHARACTERS])
                self._reason = self._reason or line.partition(_REASON)[2][:LAST_CHARACTERS]
            if line and (self.state != "ready" or _LEVEL in line[:20]):
                logger.info("llama.cpp: %s", line[:LAST_CHARACTERS])

    def _why(self, code: int) -> str:
        """Return llama.cpp's own reason, else how its process ended."""
        if self._reason and self.state != "ready":
            return self._reason.removeprefix("llama_model_loader: ")
        how = f"exit {code}"
        if code < 0:
            with contextlib.suppress(ValueError):
                how = f"killed by {signal.Signals(-code).name}"
        said = [line for line in self._errors if line]
        return f"{how}; its last words: {said[-1]}" if said and self.state != "ready" else how


def _cause(errors: bytes) -> str:
    """Return the last line of a traceback, and what helps where that is known."""
    last = (errors.decode(errors="replace").strip() or "it ends without a word").splitlines()[-1][-LAST_CHARACTERS:]
    advice = "; on Debian and Ubuntu: apt install libgomp1 libstdc++6" if "libgomp" in last or "libstdc" in last else ""
    return last + advice
