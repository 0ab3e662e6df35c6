"""One child process with a plugin's tier policies, from the side of who asks: started, asked, and ended with all of it.

It is asked one machine after the other under a deadline each. It fails as a whole: one that hangs, dies, or says
anything but the next answer is killed with everything that it started, and the words why are kept.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import sys
from collections import deque
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast

import msgspec
from msgspec import Meta

from rma_core.catalog import ServiceName
from rma_core.detection import CONFINED, Words, bounds, deadline_of, died, mapped, request_for
from rma_core.interfaces import PolicyInput
from rma_core.isolation import LAST_WORDS_S, OUTPUT_BYTES, REAP_S, Ended, settle, surely
from rma_core.models.hardware import Name
from rma_core.models.worker import Seconds
from rma_core.offers import TIERS
from rma_core.platforms import child_environment, detached_popen_kwargs, kill_tree, neutral_folder
from rma_core.policy_child import CHARACTERS, OUT_OF_MEMORY

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from rma_core.host import State

#: Importing a plugin and calling its hook take no longer.
START_S = 10.0
#: One decision takes no longer, unless ``deadline_s`` in the plugin's own table says otherwise.
DECISION_S, MOST_DECISION_S = 2.0, 30.0
#: What a child may take for data, where the system has such a limit.
MEMORY_BYTES = 512 * 1024 * 1024
#: What it says first, and each answer, is at most this long.
LINE_BYTES = 256 * 1024

PROGRAM = str(Path(__file__).with_name("policy_child.py"))
#: What a busy machine may take until Python has started, and until a question is read: nobody is to blame for that.
STARTING_S, READING_S = 5.0, 0.5
_USE = "rma_core.policy_child:offer"


class Question(msgspec.Struct, frozen=True, kw_only=True):
    """One machine, for one of the policies of a child."""

    policy: str
    deadline_s: float
    asked: PolicyInput


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    """What it says of that machine; ``error`` where it failed. Believed no more than the policy in it."""

    tier: Annotated[int, Meta(ge=TIERS.start, lt=TIERS.stop)] | None
    reason: Annotated[str, Meta(max_length=CHARACTERS)] = ""
    prefers: Annotated[tuple[ServiceName, ...], Meta(max_length=32)] = ()
    error: Annotated[str, Meta(max_length=CHARACTERS)] = ""


class Offered(msgspec.Struct, frozen=True, kw_only=True):
    """One policy that a plugin has."""

    name: Name
    summary: Annotated[str, Meta(max_length=CHARACTERS)]


class Hello(msgspec.Struct, frozen=True, kw_only=True):
    """What a child says first: the policies that it has, or why it has none."""

    outcome: Literal["answered", "failed", "invalid", "declined", "raised", "unusable"]
    reason: Annotated[str, Meta(max_length=2000)] = ""
    import_seconds: Seconds = 0.0
    given: tuple[Offered, ...] = ()
    deprecated: Words = ()


def decision_deadline(name: str, table: Mapping[str, object]) -> tuple[float, str]:
    """Return how long one decision may take: as a plugin's table says, else DECISION_S; and what is wrong there."""
    if not isinstance(table.get(CONFINED, True), bool):
        return DECISION_S, f"{CONFINED} in [plugins.{name}] is {table[CONFINED]!r}: give true or false"
    return deadline_of(name, table, DECISION_S, most_s=MOST_DECISION_S)


def unusable(hello: Hello, ended: str) -> tuple[State, str]:
    """Return the state of a plugin whose child had nothing to say and has ``ended``, and why."""
    if not hello.reason:
        return "failed", ended
    before = {"failed": "cannot be imported: ", "raised": "rma_tier_policies: "}.get(hello.outcome, "")
    return "invalid" if hello.outcome == "invalid" else "failed", f"{before}{hello.reason}"


def confined(value: str, table: Mapping[str, object], folder: str, *, hidden: Sequence[str] = ()) -> dict[str, object]:
    """Return what a child is told to keep to: it reads Python, its ``folder`` and what its table names, and no more."""
    found = bounds(table, folder, *mapped(value), writes="", hidden=hidden)
    return {"bounds": {**cast("dict[str, object]", found["bounds"]), "writes": []}} if found else {}


class PolicyProcess:
    """A child that lives; ``ended`` says in words how it has ended, and is empty until then."""

    def __init__(self, hello: Hello, transport: asyncio.SubprocessTransport, talk: _Talk, mark: str) -> None:
        self.hello = hello
        self.ended = ""
        #: Machines that it has answered for.
        self.answered = 0
        self._transport, self._talk, self._mark = transport, talk, mark

    @classmethod
    async def start(
        cls,
        value: str,
        table: Mapping[str, object],
        *,
        folder: str = "",
        hidden: Sequence[str] = (),
        start_s: float = START_S,
        memory_bytes: int = MEMORY_BYTES,
    ) -> PolicyProcess:
        """Start a child for the plugin that ``value`` names, with its configuration ``table``; wait for what it says.

        Its modules may be in a ``folder`` of its own; ``hidden`` folders are kept from it, and so are all files that it
        need not read. One that has nothing to say has ``ended``, and its ``hello`` is no answer. Raises OSError.
        """
        from rma_core.process_tree import MARK

        more = {"use": _USE, "memory_bytes": memory_bytes, **confined(value, table, folder, hidden=hidden)}
        loop, mark = asyncio.get_running_loop(), f"policy-{secrets.token_hex(8)}"
        transport, talk = await loop.subprocess_exec(
            lambda: _Talk(loop),
            # What it compiles is not written: of two versions within a second the second would be the first.
            *(sys.executable, "-I", "-B", *(["-S"] if folder or sys.flags.no_site else []), "-X", "utf8", PROGRAM),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            cwd=neutral_folder(),
            env=child_environment(more={MARK: mark}),
            **detached_popen_kwargs(),
        )
        self = cls(Hello(outcome="failed"), transport, talk, mark)
        try:
            self._say(request_for(value, table, start_s, own=folder, more=more) + b"\n")
            # Its own clock starts only once Python has.
            line = await self._line(start_s + STARTING_S, start_s)
            if line is not None:
                self.hello = self._read(line, Hello) or self.hello
        except BaseException:
            await self.close()
            raise
        if self.ended or self.hello.outcome != "answered":
            await self.close()
        return self

    def lives(self) -> bool:
        """Say whether it has not ended, as far as is known."""
        return not self.ended and not self._talk.over.is_set()

    async def ask(self, questions: Sequence[bytes], deadline_s: float) -> list[Answer]:
        """Return the answers to encoded questions, in order; ``deadline_s`` is for each.

        Fewer than were asked mean that it has ``ended``, at the question after the last answer.
        """
        answers: list[Answer] = []
        if not self.lives():
            return answers
        self._talk.printed.clear()
        self._talk.expected += len(questions)
        self._say(b"".join(questions))
        while len(answers) < len(questions):
            line = await self._line(deadline_s + READING_S, deadline_s)
            answer = self._read(line, Answer) if line is not None else None
            if answer is None:
                break
            answers.append(answer)
        self.answered += len(answers)
        if not self.ended:
            self.ended = self._talk.wrong
        if not self.lives():
            await self.close()
        return answers

    async def close(self) -> None:
        """End it, and what it has started; once is enough."""
        self.ended = self.ended or "was ended"
        await surely(self._bury())

    def _say(self, data: bytes) -> None:
        cast("asyncio.WriteTransport", self._transport.get_pipe_transport(0)).write(data)

    async def _line(self, within_s: float, deadline_s: float) -> bytes | None:
        """Return what it says next; ``None`` once it has ``ended``, which is also when that took too long."""
        talk = self._talk
        if not talk.lines and not talk.over.is_set():
            talk.more.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(talk.more.wait(), within_s)
        if talk.over.is_set():
            # Its last words may still be on their way.
            await asyncio.wait({talk.gone}, timeout=LAST_WORDS_S)
        if talk.lines:
            return talk.lines.popleft()
        self.ended = talk.wrong or self._died(deadline_s)
        return None

    def _died(self, deadline_s: float) -> str:
        code = self._transport.get_returncode()
        if code == OUT_OF_MEMORY:
            return f"took more memory than the {MEMORY_BYTES // 1024**2} MiB that it may have, and was ended"
        printed = self._talk.printed.decode(errors="replace")
        late = code is None
        return died(Ended(None, code, late, too_long=False, output=printed, seconds=0.0), deadline_s)

    def _read(self, line: bytes, kind: type[Any]) -> Any:  # noqa: ANN401 - of that kind
        """Return what it has said; ``None``, and it has ``ended``, when that is nothing of that kind."""
        try:
            return msgspec.json.decode(line, type=kind)
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            self.ended = f"gave an answer that does not fit: {error}"
            return None

    async def _bury(self) -> None:
        transport, talk = self._transport, self._talk
        talk.kill()
        await asyncio.wait({talk.exited}, timeout=REAP_S)
        transport.close()
        await asyncio.wait({talk.gone}, timeout=LAST_WORDS_S)
        await asyncio.to_thread(_end_strays, self._mark)


class _Talk(asyncio.SubprocessProtocol):
    """Its pipes, always read; what is more than one answer a question, or too long, ends it at once."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.lines: deque[bytes] = deque()
        self.printed = bytearray()
        #: What is wrong with what it has said; how many answers are still to come.
        self.wrong, self.expected = "", 1
        #: There is something to look at; nothing will come any more.
        self.more, self.over = asyncio.Event(), asyncio.Event()
        self.exited: asyncio.Future[None] = loop.create_future()
        self.gone: asyncio.Future[None] = loop.create_future()
        self._part = bytearray()
        self._pid = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._pid = cast("asyncio.SubprocessTransport", transport).get_pid()

    def pipe_data_received(self, fd: int, data: bytes) -> None:
        if fd == 2:  # noqa: PLR2004 - stderr
            self.printed += data
            del self.printed[:-OUTPUT_BYTES]
        elif not self.wrong:
            self._take(data)

    def _take(self, data: bytes) -> None:
        *lines, rest = (bytes(self._part) + data).split(b"\n")
        self._part[:] = rest
        self.expected -= len(lines)
        if self.expected < 0:
            self.wrong = "said more than it was asked"
        elif any(len(line) > LINE_BYTES for line in (*lines, rest)):
            self.wrong = f"gave an answer of more than {LINE_BYTES // 1024} KiB: a bug in the plugin"
        self.lines.extend(lines)
        if self.wrong:
            self.kill()
        self.more.set()

    def kill(self) -> None:
        """Kill it and its session, unless it has ended: by now its number may be another's."""
        if not self.exited.done():
            kill_tree(self._pid)

    def process_exited(self) -> None:
        # What it has left in its session goes with it.
        self.kill()
        settle(self.exited)
        self.over.set()
        self.more.set()

    def connection_lost(self, exc: Exception | None) -> None:
        del exc
        settle(self.gone)


def _end_strays(mark: str) -> None:
    """Kill what has left its session."""
    from rma_core import process_tree

    process_tree.kill_until_gone(lambda: [p for p, _ in process_tree.marked(mark)], within_s=REAP_S)
