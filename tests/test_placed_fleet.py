"""Whatever happens to the machines of a pool, heartbeats alone bring it to rest within its rules of placement."""

from __future__ import annotations

import asyncio
import hashlib
from typing import TYPE_CHECKING, Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rma_coordinator import enrolment
from rma_coordinator.domain.census import Census
from rma_coordinator.domain.rules import Machines, Rules
from rma_coordinator.pool import Pool
from rma_coordinator.store import MemoryStore
from rma_core.builtin.threshold import ThresholdPolicy
from rma_core.models.hardware import Capabilities
from rma_core.models.worker import Heartbeat, RegisterRequest
from tests import coordinator_fixtures as fixtures
from tests.test_model_placement import LLAMA, model
from tests.test_placement import DOCKER, entry
from tests.test_rules import rule_of

if TYPE_CHECKING:
    from pathlib import Path

    import pytest

    from rma_coordinator.domain.fleet import Worker

NEEDS: dict[str, Any] = {"cpu_cores": 1, "memory": "1GB"}
CATALOG = (entry("ocr", 2, **NEEDS), entry("notes", 3, **NEEDS), entry("extra", **NEEDS), LLAMA)
MODELS = (model("a:1b", 1), model("b:1b", 12))
SIZES = st.sampled_from([(2, "4GB"), (4, "8GB"), (16, "64GB")])
SERVICES = st.dictionaries(st.sampled_from(["ocr", "notes", "extra"]), rule_of())
RULES = st.builds(
    Rules,
    strategy=st.sampled_from(["fill", "spread", "pack"]),
    services=SERVICES,
    models=st.dictionaries(st.sampled_from([one.name for one in MODELS]), rule_of()),
)
#: What may happen to one of the machines, and rules that others take the place of.
HAPPENINGS = ["leave", "silence", "pause", "drain", "disable", "again", "beat"]
EVENTS = st.lists(
    st.one_of(
        st.tuples(st.just("join"), SIZES, st.sampled_from(["lab", "attic", ""])),
        st.tuples(
            st.sampled_from(["leave", "silence", "pause", "drain", "disable", "again", "beat"]), st.integers(0, 9)
        ),
        st.tuples(st.just("rules"), RULES),
    ),
    min_size=3,
    max_size=25,
)


class Machinery:
    """A pool in memory, its machines, and what they say with their heartbeats."""

    def __init__(self, home: Path) -> None:
        self.now = 1000.0
        self.pool = Pool(
            fixtures.settings(home), store=MemoryStore(), clock=lambda: self.now, wall=lambda: self.now,
            policies={"threshold": ThresholdPolicy()}, catalog=CATALOG, models=MODELS,
        )  # fmt: skip
        self.said: dict[str, dict[str, Any]] = {}
        self.requests: dict[str, RegisterRequest] = {}

    def join(self, size: tuple[int, str], site: str) -> None:
        number = len(self.said)
        cores, ram = size
        request = RegisterRequest(
            capabilities=Capabilities(cpu_cores=cores, ram=ram, storage="500GB"),
            labels={"site": site} if site else {}, runtimes=(DOCKER,), public_key=f"key-{number}",
        )  # fmt: skip
        self.enlist(hashlib.sha256(f"{number}".encode()).hexdigest(), request)

    def enlist(self, thumbprint: str, request: RegisterRequest) -> None:
        known = self.pool.fleet.by_thumbprint(thumbprint)
        worker = enrolment._enlist(self.pool, request, thumbprint, known, ip_address="")
        self.said.setdefault(worker.id, {})
        self.requests[worker.id] = request

    def beat(self, worker: Worker) -> None:
        beat = Heartbeat(worker_id=worker.id, generation=worker.brief.generation, **self.said[worker.id])
        self.pool.heard(worker, beat, ip_address="")

    async def happen(self, what: str, number: int) -> None:
        worker = list(self.pool.fleet.workers.values())[number % len(self.said)]
        said = self.said[worker.id]
        if what == "leave":
            self.pool.unregister(worker)
        elif what == "silence":
            self.pool.fleet._to(worker, "offline", "silent")
        elif what in ("pause", "drain"):
            field = "paused" if what == "pause" else "draining"
            said[field] = not said.get(field, False)
            self.beat(worker)
        elif what == "disable":
            await self.pool.set_disabled(worker, disabled=not worker.brief.disabled)
        elif what == "again" and not worker.brief.disabled:
            said.clear()
            self.enlist(worker.record.thumbprint, self.requests[worker.id])
        elif what == "beat" and not worker.brief.disabled:
            self.beat(worker)

    def rest(self) -> None:
        """Let all who are there beat, and nobody else be looked at, until nothing changes any more."""
        there = [one for one in self.pool.fleet.workers.values() if one.present]
        for _ in range(30):
            before = [(one.brief.assignment, one.standing) for one in there]
            for worker in there:
                self.beat(worker)
            if before == [(one.brief.assignment, one.standing) for one in there]:
                return
        raise AssertionError("it never comes to rest")

    def check(self) -> None:
        """Say what is wrong with where the services are."""
        fleet, arranged = self.pool.fleet, self.pool.arranging.now
        there = [one for one in fleet.workers.values() if one.present]
        census = Census()
        for one in fleet.workers.values():
            census.add(one.stood)
        assert _counts(census) == _counts(fleet.census)
        lanes = [(one.service, one.wanted, arranged.rules.of(one.service)) for one in arranged.entries if one != LLAMA]
        lanes += [(f"llm {one.name}", one.wanted, arranged.rules.of("llm", one.name)) for one in arranged.models]
        for lane, wanted, rule in lanes:
            have = [one for one in there if any(a.lane == lane for a in one.brief.assignment)]
            assert rule.most is None or len(have) <= rule.most, (lane, rule, len(have))
            assert fleet.assigned().get(lane, 0) == len(have)
            if rule.only == Machines(labels={"site": "lab"}):
                assert all(one.record.labels.get("site") == "lab" for one in have)
            if len(have) < wanted:
                told = {one.record.placement.get(lane, "") for one in there if one not in have}
                assert not any("left to" in why or "as it may" in why or "enough" in why for why in told), (lane, told)


def _counts(census: Census) -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = [
        (name, [one.copies, one._having, one._roomy]) for name, one in census._lanes.items()
    ]
    return sorted(found, key=lambda one: one[0])


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(events=EVENTS)
def test_heartbeats_alone_bring_a_pool_to_rest_within_its_rules(
    tmp_path: Path, events: list[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def live() -> None:
        made = Machinery(tmp_path)
        await made.pool.start()
        try:
            # What a start has found is waited for in a task that is not run here.
            made.pool.tiers.waiting = ()
            made.pool.switching._start = None
            made.join((4, "8GB"), "lab")
            for what, *about in events:
                if what == "join":
                    made.join(*about)
                elif what == "rules":
                    [rules] = about

                    async def read(_text: str, rules: Rules = rules) -> Rules:
                        return rules

                    monkeypatch.setattr(made.pool.arranging, "read", read)
                    await made.pool.arranging.apply("", by="test")
                else:
                    await made.happen(what, *about)
            made.rest()
            made.check()
        finally:
            await made.pool.stop()

    asyncio.run(live())
