"""The pool: everything the coordinator knows and decides, behind one method per thing that can be asked of it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
from datetime import UTC, datetime
from itertools import count, islice
from typing import TYPE_CHECKING, Any

import msgspec

from rma_coordinator import tokens
from rma_coordinator.arranging import Arranging
from rma_coordinator.audit import ITSELF
from rma_coordinator.books import Books
from rma_coordinator.domain import addresses
from rma_coordinator.domain.credentials import SCOPES, JoinTokenRecord, KeyRecord, Nonces, Principal
from rma_coordinator.domain.dispatch import Dispatcher
from rma_coordinator.domain.fleet import ATTACHABLE, SWEEP_S, Fleet, Worker, WorkerRecord
from rma_coordinator.domain.keyring import Keyring
from rma_coordinator.domain.limits import Limiter, counted
from rma_coordinator.domain.models import ModelRecord, Models
from rma_coordinator.domain.placement import Ruling, could_run, place
from rma_coordinator.domain.repeats import Repeats
from rma_coordinator.domain.rules import Machine, Rules
from rma_coordinator.domain.tasks import NO_LANES, NO_SHARES
from rma_coordinator.domain.traffic import Traffic, TrafficRecord
from rma_coordinator.domain.webhooks import WebhookSecrets
from rma_coordinator.domain.worker_records import differs
from rma_coordinator.hub import Hub
from rma_coordinator.ledger import Ledger
from rma_coordinator.parking import Parking
from rma_coordinator.policy_versions import ChildPolicy
from rma_coordinator.relay import Relay
from rma_coordinator.spool import Spools
from rma_coordinator.store import Delete, Put, StoreFailed
from rma_coordinator.switching import Switching, asked_of
from rma_coordinator.tiers import FOLDER, NoDecision, Pending, Tiers
from rma_coordinator.webhooks import Webhooks
from rma_core.backoff import Backoff
from rma_core.errors import NotFound, RMAError, SettingProblem, TryLater
from rma_core.interfaces import PolicyInput, TierDecision
from rma_core.models.worker import HeartbeatAnswer

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping, Sequence
    from pathlib import Path

    from rma_coordinator.arranging import Arranged
    from rma_coordinator.domain.census import Census
    from rma_coordinator.domain.limits import Limits, Reservation
    from rma_coordinator.domain.models import ModelView
    from rma_coordinator.domain.placement import Placement
    from rma_coordinator.domain.records import LedgerEntry
    from rma_coordinator.domain.tasks import Attempt, Task
    from rma_coordinator.policy_plugins import Found, PolicyPlugins
    from rma_coordinator.spool import Body
    from rma_coordinator.store import Store
    from rma_core.catalog import CatalogEntry
    from rma_core.failures import Failures
    from rma_core.interfaces import TierPolicy
    from rma_core.model_catalog import ModelEntry
    from rma_core.models.hardware import HardwareReport
    from rma_core.models.worker import AttemptRef, Heartbeat, PluginReport, RegisterRequest
    from rma_core.settings import CoordinatorSettings

logger = logging.getLogger(__name__)

#: How often leases and deadlines are looked at.
TICK_S = 0.5
#: Backups that are kept; an older one is removed when a new one has been made.
KEPT_BACKUPS = 7
#: Models that a client is told of when it names another, and the longest wait it is told when one is made ready.
SHOWN_MODELS, MOST_WAIT_S = 20, 3600.0
#: Machines whose reasons a client is told when none of all could do what it asks.
SHOWN_MACHINES = 3
#: Counters that only heartbeats and finished tasks move are written at most this often.
FLUSH_S = 10.0
#: Workers that no policy has decided are looked at again so often.
DECIDED_S, DECIDED_AT_ONCE = 10.0, 10
#: Who told something new within so long is decided together.
GATHERED_S = 0.05
#: Workers' records that are whole in memory at a time, 10 KB each, when many are read or written.
FLUSHED_AT_ONCE = 50
#: Counts of bytes that are written in one commit.
COUNTS_AT_ONCE = 1000

#: What anyone may know of a store that takes nothing; the whole reason, with its paths, is the admin's to read.
UNWELL: dict[str, str] = {
    "full": "the coordinator's disk is full",
    "stalled": "the coordinator's disk does not answer",
    "read_only": "the coordinator's disk cannot be written",
    "damaged": "the coordinator's state is damaged",
}


class PoolRecord(msgspec.Struct, frozen=True, kw_only=True):
    """What makes the pool itself: its name in tokens, the secret that signs them, and how often it was started."""

    issuer: str
    token_secret: bytes
    created_at: float
    starts: int = 0


class Pool:
    """A running pool. ``clock`` is monotonic seconds, ``wall`` Unix seconds."""

    fleet: Fleet
    keyring: Keyring
    worker_tokens: tokens.WorkerTokens
    record: PoolRecord

    def __init__(
        self,
        settings: CoordinatorSettings,
        *,
        store: Store,
        clock: Callable[[], float],
        wall: Callable[[], float],
        policies: Mapping[str, TierPolicy],
        catalog: Sequence[CatalogEntry],
        models: Sequence[ModelEntry] = (),
        plugins: Callable[[], tuple[PluginReport, ...]] = tuple,
        policy_plugins: PolicyPlugins | None = None,
        failures: Failures | None = None,
        pin: str = "",
    ) -> None:
        self.settings = settings
        self.store = store
        self.clock = clock
        self.wall = wall
        self.tiers = Tiers(policies, wanted=settings.tier_policy, folder=settings.home_path / FOLDER, failures=failures)
        #: What plugins have of policies, each in a child; ``None`` where nobody looks for them.
        self.policy_plugins = policy_plugins
        self.switching = Switching(self)
        self.arranging = Arranging(self, [_registry(entry, settings.image_registry) for entry in catalog], models)
        self.hub = Hub(on_accepted=self._accepted, on_closing=self._closing, on_finished=self._finished)
        self.dispatcher = Dispatcher(
            self.hub, clock=clock, max_queued=settings.max_queued_tasks, lease_s=settings.lease_s
        )
        self.spools = Spools(
            settings.home_path / "spool",
            memory_bytes=settings.memory_body_bytes,
            total_memory_bytes=settings.memory_bodies_bytes,
            disk_bytes=settings.spool_bytes,
        )
        self.parking = Parking(self.hub, self.dispatcher, most=settings.max_channels, usable=self._usable)
        self.seen_models = Models(wall=wall, offered=models)
        self.webhooks = Webhooks(store=store, clock=clock, wall=wall, allowed=_networks(settings.webhook_networks))
        self.limiter = Limiter()
        #: Tokens that were reserved for tasks which have not ended.
        self.reserved: dict[str, Reservation] = {}
        self.traffic = Traffic(most=settings.bytes_per_month, most_worker=settings.worker_bytes_per_month, now=wall())
        self.books = Books(
            store=store,
            spools=self.spools,
            dispatcher=self.dispatcher,
            hub=self.hub,
            webhooks=self.webhooks,
            settings=settings,
            clock=clock,
            wall=wall,
            ledger=Ledger(store, self._credited),
        )
        #: Runs under /v1, by what was asked for.
        self.repeats: Repeats[Any] = Repeats(clock)
        # They end with the process, so no step of the wall clock need cost anyone theirs.
        self.nonces = Nonces(clock)
        #: What the plugin host says of the coordinator's own plugins.
        self.plugins = plugins
        #: Follows a join token when the certificate is not publicly trusted: `.` and the hash of its key.
        self.pin = pin
        #: A word for this process: workers tell the next one what this one may not have written.
        self.process = secrets.token_hex(8)
        self._made_at = clock()
        self._started = False
        self._renewing = asyncio.Lock()
        self._writing = asyncio.Lock()

    @property
    def entries(self) -> tuple[CatalogEntry, ...]:
        """The catalog, with as many copies wanted as the rules say."""
        return self.arranging.now.entries

    @property
    def catalog(self) -> dict[str, CatalogEntry]:
        """One entry for each service: of several engines for its models the first."""
        return self.arranging.now.catalog

    @property
    def model_entries(self) -> tuple[ModelEntry, ...]:
        """The models of the catalog, with as many copies wanted as the rules say."""
        return self.arranging.now.models

    @property
    def unwell(self) -> str:
        """Why no new work is taken, in words for anyone; empty while it is."""
        state = self.store.state
        return "" if state.ok else UNWELL.get(state.code, "the coordinator's store has failed")

    @property
    def uptime_s(self) -> float:
        """Seconds since it was made, whatever was done to the wall clock meanwhile."""
        return round(self.clock() - self._made_at, 1)

    # -- life --------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Load what the store holds; once is enough. Raises SettingProblem for a policy that nobody has installed."""
        if self._started:
            return
        if self.policy_plugins is not None:
            await self.look_at_policies(first=True)
        self.tiers.check()
        await self.store.open()
        found = await self.store.load(PoolRecord)
        if not found:
            record = PoolRecord(
                issuer=f"rma-{secrets.token_hex(8)}", token_secret=secrets.token_bytes(32), created_at=self.wall()
            )
            found = [record]
        self.record = msgspec.structs.replace(found[0], starts=found[0].starts + 1)
        await self.store.commit([Put("pool", self.record)])
        self.worker_tokens = tokens.WorkerTokens(self.record.token_secret, issuer=self.record.issuer, clock=self.wall)
        self.keyring = Keyring(
            await self.store.load(KeyRecord),
            await self.store.load(JoinTokenRecord),
            clock=self.wall,
            webhooks=await self.store.load(WebhookSecrets),
        )
        self.fleet = Fleet(
            clock=self.clock,
            wall=self.wall,
            interval_s=self.settings.heartbeat_interval_s,
            beats_per_s=self.settings.heartbeats_per_s,
        )
        async for records in self.store.pages(WorkerRecord, FLUSHED_AT_ONCE):
            self.fleet.restore(records)
        self.seen_models.restore(await self.store.load(ModelRecord))
        self.traffic.restore(await self.store.load(TrafficRecord))
        await self.books.open(self.record.starts)
        await self.webhooks.open(self.keyring, kept=self.books.known)
        await self.switching.open()
        await self.arranging.open()
        if self.policy_plugins is not None:
            await self.policy_plugins.tidy(self.switching.needed, idle_s=0)
        completed = self.books.ledger.completed()
        for worker in self.fleet.workers.values():
            worker.completed = completed[worker.id]
        self._started = True
        name, starts = self.record.issuer, self.record.starts
        known, going_on = len(self.fleet.workers), len(self.dispatcher.tasks)
        words = "pool %s is open (start %d; workers known: %d; tasks that go on: %d)"
        logger.info(words, name, starts, known, going_on, extra={"action": "pool_open", "pool": name, "starts": starts})

    async def stop(self) -> None:
        """Write what is not written yet and close the store; once is enough."""
        await self.end_policies()
        if not self._started:
            return
        self._started = False
        try:
            await self.webhooks.close()
            self.fleet.changed |= {worker.id for worker in self.fleet.workers.values() if worker.heard}
            await self.flush()
            await self.books.close()
        except RMAError as error:
            # Durable tasks go on after the next start; what is lost is said.
            logger.error("not everything could be written at the end: %s", error, extra={"action": "not_written"})  # noqa: TRY400 - expected
        finally:
            await self.store.close()
            name = self.record.issuer
            logger.info("pool %s is closed", name, extra={"action": "pool_closed", "pool": name})

    async def keep_time(self) -> None:
        """Let leases, deadlines and silent workers run out. Runs until it is cancelled."""
        swept = self.clock()
        while True:
            await asyncio.sleep(TICK_S)
            try:
                self.dispatcher.tick()
                self.webhooks.tick()
                self.traffic.tick(self.wall())
                self.parking.count()
                if self.clock() - swept >= SWEEP_S:
                    swept = self.clock()
                    self.sweep()
            except Exception:
                # The clock of the pool must not stop for one bad round; the traceback says what to mend.
                logger.exception("a round of upkeep failed")

    async def keep_books(self) -> None:
        """Write the counters that changed, now and then; a slow disk holds up nothing else. Runs until cancelled.

        A new model is written soon: after a crash it would be one that nobody ever had, and clients give up.
        """
        for tick in count(1):
            await asyncio.sleep(TICK_S)
            try:
                if tick % round(FLUSH_S / TICK_S) == 0:
                    await self.flush()
                elif self.seen_models.news:
                    await self._write_news()
            except Exception:
                # The books must go on after one bad round; the traceback says what to mend.
                logger.exception("the counters could not be written")

    async def look_at_policies(self, *, first: bool = False, by: str = ITSELF) -> Found:
        """Look at which policies plugins have now; what is in force stays so. Raises PluginError, SettingProblem."""
        assert self.policy_plugins is not None  # noqa: S101 - whoever asks has looked
        try:
            found = await self.policy_plugins.look(first=first)
            self.tiers.take(self.policy_plugins.policies, self.policy_plugins.refused)
        except RMAError as error:
            if not first:
                with contextlib.suppress(StoreFailed):
                    await self.switching.rescanned(f"none is taken in: {error}", by=by)
            raise
        if not first:
            await self.switching.rescanned(found.words, by=by)
        return found

    async def end_policies(self) -> None:
        """End every child with policies."""
        if self.policy_plugins is not None:
            await self.policy_plugins.close()

    async def keep_deciding(self) -> None:
        """Decide who waits for a policy's answer, and now and then once more whom it failed for. Until cancelled."""
        again = Backoff(base_s=TICK_S, cap_s=DECIDED_S)
        while True:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self.tiers.pended.wait(), DECIDED_S)
            undecided = 0
            try:
                if not self.tiers.pended.is_set() and isinstance(self.tiers.current, ChildPolicy):
                    self.tiers.pending |= self.tiers.failing
                undecided = await self.decide_pending()
                if self.policy_plugins is not None:
                    await self.policy_plugins.tidy(self.switching.needed)
            except Exception:
                logger.exception("workers that wait for their tier could not be decided")
            if undecided:
                # There was no answer for some: a child may be left alone for now.
                await asyncio.sleep(again.next_s())
            else:
                # One that tells something new all the time waits for each round, and holds up nobody else.
                again.reset()
                await asyncio.sleep(GATHERED_S)

    async def decide_pending(self) -> int:
        """Ask the policy about workers that wait for its answer, and decide them; return for how many it has none."""
        waiting, self.tiers.pending = self.tiers.pending, set()
        self.tiers.pended.clear()
        return await self.decide_all(sorted(waiting))

    async def decide_all(self, worker_ids: Sequence[str]) -> int:
        """Decide workers once more, those that there still are; return for how many there is no answer.

        Each is decided as it was when it was asked about: what it has told meanwhile has its own turn.
        """
        workers, undecided = self.fleet.workers, 0
        for start in range(0, len(worker_ids), DECIDED_AT_ONCE):
            some = worker_ids[start : start + DECIDED_AT_ONCE]
            await asyncio.sleep(0)
            asked = {one: asked_of(workers[one]) for one in some if one in workers}
            await self.tiers.ask_shadow(asked.values())
            await self.tiers.prepare(asked.values())
            for one, about in asked.items():
                if one in workers:
                    undecided += self.tiers.undecided(about)
                    self.decide_again(workers[one], about)
        return undecided

    def sweep(self) -> None:
        """Look for workers that fell silent: their attempts are lost, and they are given nothing new."""
        for worker in self.fleet.sweep():
            self._gone(worker, worker.reason, blame=True)
        for seat in list(self.dispatcher.seats.values()):
            found = self.fleet.workers.get(seat.worker_id)
            self.dispatcher.set_usable(seat, usable=found is not None and self._usable(found))

    async def flush(self) -> None:
        """Write the records that changed; what cannot be written now is tried again the next time."""
        try:
            await self.write_workers()
            await self._write_models()
            await self._write_traffic()
            await self.arranging.make_sure()
        except RMAError as error:
            logger.debug("%s; it is tried again", error)

    async def write_workers(self) -> None:
        """Write the workers' records that changed; all are on disk when it returns. Raises StoreFailed, OutOfSpace."""
        async with self._writing:
            changed, self.fleet.changed = self.fleet.changed, set()
            try:
                while changed:
                    some = list(islice(changed, FLUSHED_AT_ONCE))
                    workers = [self.fleet.workers[one] for one in some if one in self.fleet.workers]
                    await self.store.commit([Put(worker.id, self._seen(worker)) for worker in workers])
                    changed.difference_update(some)
            except BaseException:
                self.fleet.changed |= changed
                raise

    async def _write_news(self) -> None:
        try:
            await self._write_models()
        except RMAError as error:
            logger.debug("%s; it is tried again", error)

    async def _write_models(self) -> None:
        models = self.seen_models
        models.news = False
        changed, gone = set(models.changed), set(models.gone)
        if not changed and not gone:
            return
        puts = [Put(name, record) for name in changed if (record := models.record(name))]
        await self.store.commit([*puts, *(Delete(ModelRecord, name) for name in gone)])
        models.changed -= changed
        models.gone -= gone

    async def _write_traffic(self) -> None:
        records, gone = self.traffic.take()
        try:
            for start in range(0, len(records), COUNTS_AT_ONCE):
                await self.store.commit([Put(one.key, one) for one in records[start : start + COUNTS_AT_ONCE]])
            if gone:
                await self.store.commit([Delete(TrafficRecord, key) for key in gone])
        except BaseException:
            self.traffic.put_back(records, gone)
            raise

    def _seen(self, worker: Worker) -> WorkerRecord:
        worker.record = record = msgspec.structs.replace(worker.record, last_seen_at=self.fleet.last_seen(worker))
        return record

    async def backup(self) -> tuple[Path, int]:
        """Copy the store to a new file in the state folder; the newest KEPT_BACKUPS are kept. Return it and its size.

        Raises SettingProblem for a store that has nothing to copy, OutOfSpace, StoreFailed.
        """
        folder = self.settings.home_path / "backups"
        await asyncio.to_thread(folder.mkdir, parents=True, exist_ok=True, mode=0o700)
        stamp = datetime.fromtimestamp(self.wall(), UTC).strftime("%Y%m%dT%H%M%S.%f")
        path = folder / f"coordinator-{stamp}Z.db"
        size = await self.store.backup(path)
        await asyncio.to_thread(_keep_newest, folder, "coordinator-*.db", KEPT_BACKUPS)
        logger.info("the state was copied to %s (%d bytes)", path, size, extra={"action": "backup", "path": str(path)})
        return path, size

    # -- keys --------------------------------------------------------------------------------------------------

    async def create_key(
        self,
        *,
        kind: str,
        label: str,
        scopes: tuple[str, ...],
        ttl_s: float | None,
        limits: Limits | None = None,
        owner: str = "",
    ) -> tuple[str, KeyRecord]:
        """Make a key and keep it; the secret is shown this once."""
        secret, record = self.keyring.create_key(
            kind=kind, label=label, scopes=scopes, ttl_s=ttl_s, limits=limits, owner=owner
        )
        await self.store.commit([Put(record.hash, record)])
        about = {"action": "key_created", "key": record.key_id}
        logger.info("key %s was made: %s (%s)", record.key_id, label or kind, " ".join(scopes), extra=about)
        return secret, record

    async def renew_webhook_secret(self, key_id: str) -> WebhookSecrets:
        """Make a new secret that signs a key's webhooks, beside the former for a day. Raises NotFound, Refused."""
        # Of two at once the later must know the earlier, which has been shown to somebody.
        async with self._renewing:
            renewed = self.keyring.renewed_webhook_secrets(key_id)
            await self.store.commit([Put(key_id, renewed)])
            self.keyring.sign_with(renewed)
        words, about = "a webhook secret of key %s was made", {"action": "webhook_secret_made", "key": key_id}
        logger.info(words, key_id, extra=about)
        return renewed

    async def first_key(self) -> str:
        """Make an admin key with every scope: what `rma up` prints."""
        secret, _ = await self.create_key(kind="admin", label="first key", scopes=SCOPES, ttl_s=90 * 86_400)
        return secret

    async def create_token(
        self, *, label: str, uses: int, ttl_s: float, owner: str = ""
    ) -> tuple[str, JoinTokenRecord]:
        """Make a join token and keep it; the secret is shown this once."""
        secret, record = self.keyring.create_token(label=label, uses=uses, ttl_s=ttl_s, owner=owner)
        await self.store.commit([Put(record.hash, record)])
        words, about = "join token %s was made%s; uses: %d", {"action": "token_created", "token": record.token_id}
        logger.info(words, record.token_id, f": {label}" if label else "", uses, extra=about)
        return secret, record

    async def revoke(self, key_id: str) -> None:
        """End a key or join token at once."""
        record = self.keyring.revoke(key_id)
        self.limiter.forget(f"key:{key_id}")
        await self.store.commit([Put(record.hash, record)])
        kind = "token" if isinstance(record, JoinTokenRecord) else "key"
        what = "join token" if kind == "token" else "key"
        logger.info("%s %s was revoked", what, key_id, extra={"action": f"{kind}_revoked", kind: key_id})

    # -- tiers and placement -----------------------------------------------------------------------------------

    def decide(
        self, report: HardwareReport, *, labels: dict[str, str], worker_id: str, known: WorkerRecord | None = None
    ) -> TierDecision:
        """Ask the policy in force for a machine's tier.

        A ``known`` worker stays where it was while it waits for its turn, and where the policy fails.
        """
        if known is not None and self.tiers.waits(worker_id):
            return _stays(known, known.tier_reason)
        decision = self.tiers.decide(PolicyInput(report=report, labels=labels, worker_id=worker_id))
        if known is None or not isinstance(decision, NoDecision):
            return decision
        if isinstance(decision, Pending):
            return _stays(known, known.tier_reason)
        return _stays(known, f"{decision.reason}; the tier stays as it was")

    def placement(
        self,
        machine: WorkerRecord | RegisterRequest,
        report: HardwareReport,
        tier: int | None,
        *,
        worker_id: str,
        ruling: Ruling,
        current: Sequence[str] = (),
        counts: Mapping[str, int] | None = None,
        arranged: Arranged | None = None,
    ) -> Placement:
        """Choose what a machine should run, by rules; ``current`` lanes stay as long as they fit.

        ``counts`` are what the pool has beside it, where that is not what it has now, ``arranged`` what placement goes
        by, where that is not what is in force.
        """
        url, arranged = self.settings.public_url, arranged or self.arranging.now
        return place(
            arranged.entries,
            report,
            tier,
            models=arranged.models,
            pool=self.fleet.assigned(besides=worker_id) if counts is None else counts,
            ruling=ruling,
            allowed=machine.services,
            agreed=machine.agreed_models,
            own=machine.own_models,
            runtimes=machine.runtimes,
            current=current,
            env={"COORDINATOR_URL": url} if url else {},
        )

    def ruling(
        self,
        worker_id: str,
        labels: Mapping[str, str],
        prefers: Sequence[str],
        census: Census,
        *,
        draining: bool = False,
        rules: Rules | None = None,
    ) -> Ruling:
        """Return the rules (those in force unless given) as they bear on one machine; ``census`` counts all others."""
        machine = Machine(worker_id=worker_id, labels=labels, prefers=prefers)
        why = "the machine is being drained" if draining else ""
        return Ruling(self.arranging.now.rules if rules is None else rules, machine, census, takes_nothing=why)

    # -- workers -----------------------------------------------------------------------------------------------

    def place(self, worker: Worker, *, anew: bool = False) -> None:
        """Choose the worker's services again; a changed choice is a new generation.

        What it runs stays as long as it fits, unless the choice is made ``anew``, as after a change of tier.
        """
        record = worker.record
        if worker.could is None:
            worker.could = could_run(self.entries, record)
        current = () if anew else tuple(assignment.lane for assignment in record.assignment)
        with self.fleet.census.without(worker.stood) as census:
            ruling = self.ruling(worker.id, record.labels, record.prefers, census, draining=worker.draining)
            chosen = self.placement(
                record, record.report, record.tier, worker_id=worker.id, current=current, ruling=ruling
            )
        self.give(worker, record, chosen)

    def give(self, worker: Worker, record: WorkerRecord, chosen: Placement) -> None:
        """Give a worker the services that were chosen for its record as it is now."""
        changed = chosen.assignments != record.assignment
        if changed or chosen.reasons != record.placement:
            worker.record = msgspec.structs.replace(
                record,
                assignment=chosen.assignments,
                placement=chosen.reasons,
                generation=record.generation + changed,
            )
            self.fleet.changed.add(worker.id)
        # What one machine runs changes what the pool lacks: the others are looked at with their next heartbeat.
        if changed:
            self.fleet.recount(worker)
        self.fleet.stand(worker, chosen.standing)
        worker.placed = self.fleet.need

    def heartbeat(self, worker: Worker, beat: Heartbeat, *, ip_address: str, nonce: bool = True) -> HeartbeatAnswer:
        """Take a sign of life in and say what the worker should do next, with a ``nonce`` if it will need one soon."""
        cancel = self.heard(worker, beat, ip_address=ip_address)
        return self.answer(worker, beat.generation, cancel=cancel, nonce=nonce)

    def heard(self, worker: Worker, beat: Heartbeat, *, ip_address: str) -> tuple[AttemptRef, ...]:
        """Take a sign of life in; return those of the worker's attempts that nobody wants any more."""
        self.fleet.beat(worker, beat, ip_address=ip_address)
        if beat.report is not None or beat.runtimes is not None or beat.plugins is not None:
            self._new_facts(worker, beat)
        if worker.placed != self.fleet.need:
            self.place(worker)
        seat = self.dispatcher.seats.get(worker.id)
        if seat is not None and seat.running:
            # A worker that polls has no other way to say that it has begun and goes on.
            self.dispatcher.heard(worker.id, beat.attempts)
        return self.unwanted(worker, beat.attempts) if beat.attempts else ()

    def _new_facts(self, worker: Worker, beat: Heartbeat) -> None:
        record = worker.record
        told = msgspec.structs.replace(
            record,
            report=beat.report or record.report,
            runtimes=record.runtimes if beat.runtimes is None else beat.runtimes,
            plugins=record.plugins if beat.plugins is None else beat.plugins,
        )
        # After a restart of the coordinator everyone tells everything once more.
        if told == record:
            return
        worker.record = told
        self.fleet.changed.add(worker.id)
        if (told.report, told.runtimes) != (record.report, record.runtimes):
            worker.could = None
            self.decide_again(worker)

    def decide_again(self, worker: Worker, asked: PolicyInput | None = None) -> None:
        """Ask for a worker's tier once more, as it is now or was when it was ``asked`` about; choose its services."""
        record = worker.record
        asked = asked or PolicyInput(report=record.report, labels=record.labels)
        decision = self.decide(asked.report, labels=asked.labels, worker_id=worker.id, known=record)
        if (decision.tier, decision.reason) != (record.tier, record.tier_reason):
            about = {"action": "tier", "worker": worker.id, "tier": decision.tier}
            logger.info("%s: %s", worker.id, decision.reason, extra=about)
        worker.record = decided = msgspec.structs.replace(
            record, tier=decision.tier, tier_reason=decision.reason, prefers=decision.prefers
        )
        self.fleet.changed.add(worker.id)
        self.place(worker, anew=differs(record, decided))

    def unwanted(self, worker: Worker, refs: Collection[AttemptRef]) -> tuple[AttemptRef, ...]:
        """Return those of a worker's attempts that nobody wants any more."""
        seat = self.dispatcher.seats.get(worker.id)
        running = seat.running if seat else {}
        return tuple(ref for ref in refs if ref.lease_id not in running)

    def answer(
        self, worker: Worker, generation: int, *, cancel: tuple[AttemptRef, ...] = (), nonce: bool = True
    ) -> HeartbeatAnswer:
        """Return what a worker that runs ``generation`` should do next."""
        record = worker.brief
        return HeartbeatAnswer(
            heartbeat_interval_s=self.fleet.interval_s,
            generation=record.generation,
            tier=record.tier,
            tier_reason=record.tier_reason,
            containers=record.assignment if generation != record.generation else None,
            cancel=cancel,
            nonce=self.nonces.make() if nonce else "",
            connect=self.parking.keeps_channel(worker),
            process=self.process,
        )

    def offers(self, worker: Worker, slots: Mapping[str, int] | None = None) -> None:
        """Tell dispatch what a worker can take: the slots it says, else those of its healthy containers.

        Only services that it was assigned count: nobody draws other requests to a machine by claiming to serve them.
        """
        offered, models, usable = worker.offered(slots), worker.models, self._usable(worker)
        cold, shares = (worker.cold, worker.shares) if models else (NO_LANES, NO_SHARES)
        seat, owner = self.dispatcher.seats.get(worker.id), worker.brief.owner
        if owner != (seat.owner if seat is not None else ""):
            self.dispatcher.belongs(worker.id, owner)
        # Most heartbeats change nothing, and what waits is looked at every TICK_S anyway.
        same = seat is not None and seat.slots is offered and seat.models is models and seat.cold is cold
        same = same and seat is not None and seat.shares is shares
        if seat is None or not same or seat.usable != usable:
            if any(one.models for one in worker.containers):
                self.seen_models.note(worker.containers)
            self.dispatcher.offers(worker.id, offered, models=models, shares=shares, cold=cold, usable=usable)
            seat = self.dispatcher.seats[worker.id]
        seat.load = worker.current_load

    def _usable(self, worker: Worker) -> bool:
        """Say whether a worker may be given new work, now and this month."""
        return worker.usable and not self.traffic.full_for(worker.id)

    def models(self) -> dict[str, ModelView]:
        """Return the pool's models by name: what can be asked for now, then what was there before."""
        return self.seen_models.view(self.fleet.workers.values())

    def check_model(self, model: str) -> None:
        """Raise NotFound for a model that nobody ever had, TryLater for one that nobody offers now."""
        if self.dispatcher.can_serve(ATTACHABLE, model):
            return
        if model in self.seen_models:
            view = self.models()[model]
            raise TryLater(view.sentence, retry_after_s=min(MOST_WAIT_S, view.eta_s or 30))
        known = ", ".join(sorted(self.seen_models.newest(SHOWN_MODELS))) or "none yet"
        raise NotFound(f"this pool has no model {model!r}", hints=(f"it has or had: {known}",))

    def unregister(self, worker: Worker) -> None:
        """A worker says goodbye: its tasks go to others at once, its key stays known."""
        self.fleet.leave(worker)
        self._gone(worker, "the worker left", blame=False)

    def _gone(self, worker: Worker, reason: str, *, blame: bool) -> None:
        """Free what a worker had, and end its connection: if it speaks again, it begins with a new one."""
        self.dispatcher.gone(worker.id, reason, blame=blame)
        self.hub.close(worker.id)

    async def set_disabled(self, worker: Worker, *, disabled: bool) -> None:
        """Shut a worker out (its tokens end at once), or let it in again."""
        record = worker.record
        worker.record = msgspec.structs.replace(record, disabled=disabled, epoch=record.epoch + disabled)
        self.fleet.recount(worker)
        if disabled:
            self._gone(worker, "an admin disabled the worker", blame=False)
        await self.store.commit([Put(worker.id, worker.record)])
        state, done = ("disabled", "shut out") if disabled else ("enabled", "let in again")
        about = {"action": f"worker_{state}", "worker": worker.id}
        logger.info("%s was %s by an admin", worker.id, done, extra=about)

    async def set_owner(self, worker: Worker, owner: str) -> None:
        """Say whose machine a worker is: whose requests come first there. Empty: nobody's in particular."""
        await self.store.commit([Put(worker.id, msgspec.structs.replace(worker.record, owner=owner))])
        worker.record = msgspec.structs.replace(worker.record, owner=owner)
        if worker.id in self.dispatcher.seats:
            self.dispatcher.belongs(worker.id, owner)
        words, about = "%s is %s now, an admin says", {"action": "worker_owner", "worker": worker.id}
        logger.info(words, worker.id, f"{owner}'s" if owner else "nobody's in particular", extra=about)

    # -- requests ----------------------------------------------------------------------------------------------

    def _accepted(self, attempt: Attempt) -> None:
        worker = self.fleet.workers.get(attempt.worker_id)
        if worker is not None and attempt.task.model:
            attempt.model_state = worker.state_of(attempt.task.service, attempt.task.model)
        self.books.accepted(attempt)

    def _closing(self, task: Task) -> None:
        self._tally(task)
        self.books.closing(task)

    def _tally(self, task: Task) -> None:
        if (relay := self.hub.relays.get(task.id)) is not None:
            relay.tally()

    def check_store(self) -> None:
        """Refuse new work while nothing can be written: its end could not be kept. Raises StoreFailed, OutOfSpace."""
        state = self.store.state
        if not state.ok:
            hints = ("what runs goes on; try again later", "the pool's admin sees why in /api/admin/health")
            raise StoreFailed(f"no new work is taken now: {self.unwell}", hints=hints)

    def check_service(self, service: str, principal: Principal) -> CatalogEntry:
        """Return the catalog entry that a client may use. Raises NotFound, Forbidden."""
        entry = self.catalog.get(service)
        if entry is None:
            raise NotFound(
                f"this pool has no service {service!r}", hints=(f"it has: {', '.join(sorted(self.catalog)) or 'none'}",)
            )
        principal.need(f"infer:{service}")
        return entry

    def impossible(self, entry: CatalogEntry) -> str:
        """Say why no machine of the pool could ever run a service, whatever else it runs; empty while one could."""
        service = entry.service
        if self.dispatcher.can_serve(service):
            return ""
        known = [worker for worker in self.fleet.workers.values() if not worker.brief.disabled]
        # Of a machine that has not spoken since the start nothing is known.
        if not known or any(
            worker.could is None or service in worker.could or any(one.service == service for one in worker.containers)
            for worker in known
        ):
            return ""
        reasons = {worker.record.placement.get(service, "") for worker in known[:SHOWN_MACHINES]} - {""}
        return "; ".join(sorted(reasons)) or "they lack what it needs"

    def check_served(self, service: str) -> None:
        """Raise TryLater, with the reason, unless a worker offers the service or is about to."""
        if self.dispatcher.can_serve(service):
            return
        theirs = [
            w
            for w in self.fleet.workers.values()
            if w.present and not w.draining and any(a.service == service for a in w.brief.assignment)
        ]
        coming = [w for w in theirs if not self.traffic.full_for(w.id)]
        states = [c for w in coming for c in w.containers if c.service == service]
        if any(c.state in ("pending", "pulling", "starting", "healthy", "backoff") for c in states) or (
            coming and not states
        ):
            return
        reasons = {f"{c.state}: {c.reason}" if c.reason else c.state for c in states}
        if len(coming) < len(theirs):
            reasons.add("its workers have used up their bytes of this month")
        why = "; ".join(sorted(reasons)) or "no worker offers it"
        raise TryLater(
            f"{service} cannot be served now: {why}",
            retry_after_s=30,
            hints=("`rma workers` shows why each machine runs what it runs",),
        )

    def submit(self, task: Task, body: Body) -> Relay:
        """Queue a task and return the relay of its answer. Raises TryLater when too many wait."""
        relay = Relay(task, body, self.clock)
        self.hub.relays[task.id] = relay
        try:
            self.dispatcher.submit(task)
        except RMAError:
            del self.hub.relays[task.id]
            raise
        return relay

    def unreserve(self, task_id: str) -> None:
        """Give back the tokens that were reserved for a task which does not come to be."""
        if (reservation := self.reserved.pop(task_id, None)) is not None:
            reservation.settle(0, self.clock())

    def _finished(self, task: Task) -> None:
        if not task.durable:
            self._tally(task)
        self.traffic.task(task)
        if self.reserved and (reservation := self.reserved.pop(task.id, None)) is not None:
            tokens = counted(task.usage)
            # Who leaves has had the work done all the same, as far as anyone knows.
            if tokens is not None or task.state == "failed":
                reservation.settle(tokens or 0, self.clock())
        # The books have written a durable one before this.
        if task.state == "succeeded" and not task.durable:
            self.books.credit(task)

    def _credited(self, entry: LedgerEntry) -> None:
        worker = self.fleet.workers.get(entry.worker_id)
        if worker is not None:
            worker.completed += 1


def _stays(known: WorkerRecord, reason: str) -> TierDecision:
    return TierDecision(tier=known.tier, reason=reason, prefers=known.prefers)


def _networks(texts: Sequence[str]) -> tuple[addresses.Network, ...]:
    """Return networks as settings name them. Raises SettingProblem."""
    try:
        return tuple(map(addresses.network, texts))
    except ValueError as error:
        raise SettingProblem(
            f"webhook_networks: {error}", hints=("a network looks like 10.0.0.0/8 or fd00::/8",)
        ) from None


def _keep_newest(folder: Path, pattern: str, count: int) -> None:
    # Their names begin with their time.
    for path in sorted(folder.glob(pattern))[:-count]:
        path.unlink(missing_ok=True)


def _registry(entry: CatalogEntry, registry: str) -> CatalogEntry:
    """Take images from the admin's own registry when one is set."""
    if not registry:
        return entry
    return msgspec.structs.replace(entry, image=entry.image.replace("ghcr.io/rma", registry.rstrip("/"), 1))
