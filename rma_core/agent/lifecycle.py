"""The agent's life: detect, register, reconcile, heartbeat, execute, report; drain at the end."""

from __future__ import annotations

import asyncio
import logging
import random
from typing import TYPE_CHECKING, Any, Literal

import rma_core
from rma_core import http
from rma_core.agent.answers import Answers
from rma_core.agent.attach.attachable import addresses
from rma_core.agent.attach.attached import AttachedServers
from rma_core.agent.attempts import Attempts, Stop, lease_clock
from rma_core.agent.channel import Channel
from rma_core.agent.client import CoordinatorClient
from rma_core.agent.control import ControlServer
from rma_core.agent.ending import Ending
from rma_core.agent.engines import in_order
from rma_core.agent.heart import Heart
from rma_core.agent.join import registration
from rma_core.agent.llm.model_files import ModelFiles
from rma_core.agent.llm.model_room import ModelRoom
from rma_core.agent.llm.own_models import OwnModels
from rma_core.agent.load import Load
from rma_core.agent.lookout import Lookout
from rma_core.agent.membership import Link, Membership, Messages
from rma_core.agent.news import News, Told
from rma_core.agent.offering import Offering
from rma_core.agent.owner import Owner, status
from rma_core.agent.poll import Poller
from rma_core.agent.reconcile import Reconciler
from rma_core.agent.state import MODELS_FOLDER
from rma_core.models.worker import Heartbeat, HeartbeatAnswer, RegisterRequest, RegisterResponse

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine, Iterable, Mapping

    from rma_core.agent.keeper import Keeper
    from rma_core.agent.keys import DeviceKey
    from rma_core.agent.state import StateFolder, WorkerRecord
    from rma_core.agent.status import AgentStatus
    from rma_core.agent.streams import ChannelStream
    from rma_core.interfaces import ContainerRuntime
    from rma_core.models.hardware import HardwareReport
    from rma_core.models.worker import Assignment, AttemptRef, PluginReport
    from rma_core.settings import AgentSettings

logger = logging.getLogger(__name__)

#: Attempts that a heartbeat and HELLO can list.
MAX_LISTED = 1024
#: How `websockets` calls a connection that ended without a goodbye.
CUT_OFF = "no close frame received or sent"


class Agent:
    """One machine's part in the pool, from `run` to `stop`. The folder is prepared, locked and enrolled.

    ``report`` is what was detected, ``look`` detects it anew; ``plugins`` are asked for with each heartbeat.
    ``use_channel`` off means the plain way from the start. ``clock`` and ``uniform`` are monotonic seconds and
    randomness.
    """

    def __init__(
        self,
        settings: AgentSettings,
        folder: StateFolder,
        record: WorkerRecord,
        key: DeviceKey,
        *,
        report: HardwareReport,
        runtimes: Mapping[str, ContainerRuntime],
        plugins: Callable[[], Iterable[PluginReport]] = tuple,
        look: Callable[[], Awaitable[HardwareReport]] | None = None,
        use_channel: bool = True,
        clock: Callable[[], float] = lease_clock,
        uniform: Callable[[float, float], float] = random.uniform,
    ) -> None:
        self.settings, self.folder, self.record = settings, folder, record
        self.lookout = Lookout(
            report, look or self._no_look, self._looked, interval_s=settings.detect_interval_s if look else 0,
            uniform=uniform,
        )  # fmt: skip
        self.plugins, self._use_channel, self._clock = plugins, use_channel, clock
        self._started_at = clock()
        self._runtimes = runtimes
        context = http.tls_context(record.certificate) if record.coordinator_url.startswith("https:") else None
        self.client = CoordinatorClient(
            record.coordinator_url, key, worker_id=record.worker_id, context=context, clock=clock
        )
        self.engines = in_order(runtimes, settings.runtimes, clock=clock)
        self.consent = record.consent.narrowed(settings.services)
        self.reconciler = Reconciler(
            self.engines,
            worker_id=record.worker_id,
            consent=self.consent,
            gpus=report.gpus,
            changed=self.changed,
            freed=self._freed,
            stop_attempts=self._withdraw_attempts,
            room=ModelRoom(report),
            files=ModelFiles(folder.path / MODELS_FOLDER, hosts=settings.model_hosts),
            model_idle_s=settings.model_idle_s,
            clock=clock,
            uniform=uniform,
        )
        self.own = OwnModels(settings.models, report, self.engines, self.reconciler)
        self.attached = AttachedServers(
            addresses(settings.attach), changed=self.changed, freed=self._freed, uniform=uniform
        )
        self.offering = Offering(self.reconciler, self.attached)
        self.answers = Answers(self.client, changed=self.changed, clock=clock)
        self.link = Link(self.client)
        self.load = Load()
        self._news = News(self._all)
        self.channel = Channel(self.client, self, self.answers, agent_version=rma_core.__version__, clock=clock)
        self.membership = Membership(
            self.client,
            self._registration,
            self._registered,
            link=self.link,
            join_token=settings.join_token.partition(".")[0],
        )
        self.heart = Heart(
            self.client,
            self.channel,
            make=self.heartbeat,
            bare=self.sign_of_life,
            told=self._news.read,
            answered=self.assigned,
            forgotten=self.forgotten,
            link=self.link,
            clock=clock,
            uniform=uniform,
        )
        self.attempts = Attempts(self.offering.place, beat=self.heart.beat_by_http, clock=clock)
        self.poller = Poller(
            self.client,
            self.attempts,
            self.answers,
            room=lambda: 0 if self.draining or self.paused else self.offering.free(),
            beat=self.heart.beat_by_http,
            forgotten=self.forgotten,
            clock=clock,
        )
        self.tier: int | None = None
        self.tier_reason = ""
        self.draining = False
        self._had_channel: bool | None = None
        self._stopping = asyncio.Event()
        self._hurried = asyncio.Event()
        self._plain_way = asyncio.Event()
        self._messages = Messages()
        self._minor: set[asyncio.Task[None]] = set()
        self.owner = Owner(self)
        self._ending = Ending(self, hurried=self._hurried)

    # Its life.

    async def run(self) -> None:
        """Work until `stop`, then drain, leave and clear away.

        Raises what a part of the agent failed with, if it was a bug: a part that is gone must not go unnoticed.
        """
        control = ControlServer(self.folder, self.owner.handlers)
        await control.start()
        try:
            await asyncio.gather(*(engine.look(self.reconciler.worker_id) for engine in self.engines))
            await self.own.look()
            self.reconciler.start()
            await self._work()
        finally:
            await control.aclose()
            await self._ending.clear_away(self._runtimes.values())

    def stop(self) -> None:
        """Begin to drain; a second call ends the waiting."""
        if self._stopping.is_set():
            self._hurried.set()
        self._stopping.set()

    async def _work(self) -> None:
        parts = [
            self._part("membership", self.membership.run()),
            self._part("load", self.load.run()),
            self._part("hardware", self.lookout.run()),
            self._part("heartbeats", self._when_registered(self.heart.run)),
            self._part("late answers", self._when_registered(self.answers.run)),
            self._part("plain way", self._poll_when_needed()),
        ]
        if self._use_channel:
            parts.append(self._part("channel", self._when_registered(self.channel.run)))
        else:
            self._plain_way.set()
        if self.attached:
            parts.append(self._part("attached servers", self.attached.run()))
        if self.own:
            parts.append(self._part("own models", self.own.run()))
        stopping = self._part("stop", self._wait_for_stop())
        try:
            done, _ = await asyncio.wait({stopping, *parts}, return_when=asyncio.FIRST_COMPLETED)
            for task in done - {stopping}:
                task.result()
            await self._ending.drain()
        finally:
            for task in (stopping, *parts, *self._minor):
                task.cancel()
            await asyncio.gather(stopping, *parts, *self._minor, return_exceptions=True)
        if self.membership.registered.is_set():
            # Last of all: whatever is heard of a worker after its goodbye counts as its return.
            await self._ending.goodbye()

    def _part(self, name: str, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        return asyncio.create_task(work, name=name)

    async def _wait_for_stop(self) -> None:
        await self._stopping.wait()

    async def _when_registered(self, work: Callable[[], Coroutine[Any, Any, None]]) -> None:
        await self.membership.registered.wait()
        await work()

    async def _poll_when_needed(self) -> None:
        """Poll while there is no channel and none can be had."""
        while True:
            await self._plain_way.wait()
            await self.membership.registered.wait()
            polling = asyncio.create_task(self.poller.run())
            try:
                while self._plain_way.is_set() and not polling.done():
                    await asyncio.wait({polling}, timeout=1.0)
            finally:
                polling.cancel()
            if polling.done() and not polling.cancelled():
                polling.result()

    # Membership.

    def _registration(self) -> RegisterRequest:
        told = self._news.registering()
        return registration(
            self.report,
            runtimes=told.runtimes or (),
            plugins=told.plugins or (),
            services=self.consent.names,
            agreed_models=self.consent.model_names,
            own_models=self.own.offered.paths,
            labels=self.settings.labels,
        )

    def _registered(self, answer: RegisterResponse) -> None:
        self.reconciler.worker_id = answer.worker_id
        self._news.registered()
        self._set_tier(answer.tier, answer.tier_reason)
        self.heart.pace(answer.heartbeat_interval_s)
        self._want(answer.generation, answer.containers)
        self.channel.hurry()

    def _set_tier(self, tier: int | None, reason: str) -> None:
        if (tier, reason) != (self.tier, self.tier_reason) and reason:
            logger.info("%s", reason, extra={"action": "tier", "tier": tier})
        self.tier, self.tier_reason = tier, reason

    # What the channel tells, its `Events`.

    def slots(self) -> dict[str, int]:
        """Return the slots of each service; none while draining or paused."""
        return {} if self.draining or self.paused else self.offering.slots()

    def held(self) -> tuple[AttemptRef, ...]:
        """Return every attempt that this machine still has: what runs, and finished answers not yet delivered."""
        refs = {ref.lease_id: ref for ref in (*self.attempts.refs(), *self.answers.refs())}
        return tuple(refs.values())[:MAX_LISTED]

    def offered(self, stream: ChannelStream) -> None:
        """Begin a task."""
        self.attempts.begin(stream.offer, stream.body, stream)

    def withdrawn(self, stream: ChannelStream, reason: str) -> None:
        """Stop an attempt that nobody wants any more."""
        self.attempts.stop(stream.ref.lease_id, Stop("request", reason, tell=False))

    def lost(self, stream: ChannelStream) -> None:
        """Stop an attempt that can no longer be delivered."""
        self.attempts.stop(stream.ref.lease_id, Stop("coordinator", "the channel broke", tell=False))

    def connected(self) -> None:
        """The channel is open: heartbeats go over it, and no poll is needed."""
        self._plain_way.clear()
        self._say_channel("open" if self._had_channel is None else "open again")
        self._had_channel = True
        self.link.up()
        self.heart.soon()
        self.answers.kick()

    def disconnected(self, reason: str) -> None:
        """The channel is broken, or does not get through at all."""
        if self._had_channel and not self.draining:
            self._say_channel("broken" if self.channel.wanted.is_set() else "parked", reason)
        else:
            logger.debug("the channel is down: %s", reason, extra={"action": "channel_down"})
        if self.channel.given_up and not self._plain_way.is_set():
            logger.info("WebSocket does not get through (%s); polling instead", reason, extra={"action": "plain_way"})
            self._plain_way.set()
        if self._had_channel is not False:
            # Not after every failed try: the interval's own heartbeats tell of a coordinator that is away.
            self.heart.soon()
        self._had_channel = False

    def _say_channel(self, state: str, reason: str = "") -> None:
        """Log what became of the channel, once for each change, however often it is tried to mend it."""
        words = {
            "parked": "the channel is closed: the coordinator calls this machine back when it is needed",
            "broken": f"the channel broke ({'cut off' if reason == CUT_OFF else reason}); it is opened again",
        }
        about = {"action": f"channel_{state.partition(' ')[0]}", "worker": self.client.worker_id}
        logger.info("%s", words.get(state, f"the channel to the coordinator is {state}"), extra=about)

    def forgotten(self) -> None:
        """The coordinator does not know this worker."""
        self.membership.forgotten()

    def assigned(self, answer: HeartbeatAnswer) -> None:
        """Do what a heartbeat's answer says."""
        if self.link.standing != "registered":
            self.channel.hurry()
        self.answers.heard()
        self.heart.heard()
        self.heart.pace(answer.heartbeat_interval_s)
        self.client.keep_nonce(answer.nonce)
        if self._news.answered_by(answer.process):
            self.changed()
        self._set_tier(answer.tier, answer.tier_reason)
        for ref in answer.cancel:
            self.attempts.stop(ref.lease_id, Stop("request", "the coordinator no longer wants it", tell=False))
        if answer.containers is not None and answer.generation != self.reconciler.generation:
            self._want(answer.generation, answer.containers)
        for message in answer.messages:
            self._messages.say(message)
        if answer.connect:
            self.channel.wanted.set()
        elif not self.attempts and not self.answers and (self.channel.wanted.is_set() or self.channel.up):
            self._spawn(self.channel.park())

    def _want(self, generation: int, containers: Iterable[Assignment]) -> None:
        if not self.draining:
            self.reconciler.want(generation, containers)

    def _spawn(self, work: Awaitable[None]) -> None:
        task = asyncio.ensure_future(work)
        self._minor.add(task)
        task.add_done_callback(self._minor.discard)

    # What it says of itself.

    def heartbeat(self) -> Heartbeat:
        """Return the next heartbeat, with everything that the coordinator does not know yet."""
        return self._news.added_to(self.sign_of_life())

    def sign_of_life(self) -> Heartbeat:
        """Return what every heartbeat says."""
        engine_down = next((e.health.reason for e in self.engines if e.health.state == "unhealthy"), "")
        usable = any(e.health.state == "healthy" for e in self.engines) or self.attached.healthy
        broken = bool(engine_down) and not usable
        return Heartbeat(
            worker_id=self.client.worker_id,
            status="degraded" if broken else "healthy",
            reason=engine_down[:2000] if broken else "",
            current_load=self.current_load,
            containers=self.offering.statuses(),
            attempts=self.held(),
            generation=max(0, self.reconciler.generation),
            draining=self.draining,
            paused=self.paused,
        )

    def _all(self) -> Told:
        """Return all that is told only when it is new."""
        return Told(self.report, tuple(engine.report() for engine in self.engines), tuple(self.plugins()))

    @property
    def report(self) -> HardwareReport:
        """What was found when the hardware was last another."""
        return self.lookout.report

    async def _no_look(self) -> HardwareReport:
        return self.report

    def _looked(self, report: HardwareReport) -> None:
        """Go by hardware that has changed."""
        self.reconciler.gpus = tuple(report.gpus)
        self.reconciler.room.measure(report)
        self._spawn(self.own.measure(report))
        self.changed()

    @property
    def paused(self) -> bool:
        """Whether the owner wants the machine back for now."""
        return self.owner.pause is not None

    @property
    def connection(self) -> Literal["channel", "polling", "none"]:
        """How tasks come now."""
        return "channel" if self.channel.up else "polling" if self._plain_way.is_set() else "none"

    @property
    def current_load(self) -> float:
        """How busy this machine is, from 0 to 1."""
        return round(max(self.offering.busy_share(), self.load.share), 3)

    @property
    def uptime_s(self) -> float:
        """Seconds since it was made."""
        return round(self._clock() - self._started_at, 1)

    def status(self) -> AgentStatus:
        """Return how the agent stands, as `rma status` shows it."""
        return status(self)

    # What its parts tell each other.

    def changed(self) -> None:
        """Something has changed that the coordinator should know at once."""
        self.heart.soon()
        self.poller.changed.set()

    def _freed(self) -> None:
        self.poller.changed.set()

    def _withdraw_attempts(self, keeper: Keeper) -> None:
        """End the attempts at a container that must go; it is the pool that wants it so."""
        self.attempts.stop_at(keeper, Stop("coordinator", f"{keeper.wanted.name} was withdrawn", tell=True))
