"""The pool's models: requests meet workers that have them, and one that is away is told from one never seen."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest

from rma_coordinator.domain.models import MOST_MODELS, REMEMBERED_S, ModelRecord, Models, ModelView
from rma_coordinator.domain.tasks import Task
from rma_core.errors import NotFound, TryLater
from rma_core.model_catalog import ModelEntry
from rma_core.models import channel as frames
from rma_core.models.worker import ATTACHED, ContainerState, ContainerStatus, Heartbeat, ModelStatus
from tests.coordinator_fixtures import Line, Running, running, soon, until

if TYPE_CHECKING:
    from pathlib import Path


def attached(*models: str | ModelStatus, slots: int = 1, state: ContainerState = "healthy") -> ContainerStatus:
    found = tuple(ModelStatus(name=one) if isinstance(one, str) else one for one in models)
    return ContainerStatus(
        name="attached-8081", service="llm", state=state, runtime=ATTACHED, isolated=False, slots=slots, models=found
    )


async def shares(pool: Running, line: Line, *containers: ContainerStatus) -> None:
    """Say by the channel what a worker shares, and wait until the coordinator knows."""
    slots = {"llm": sum(one.slots for one in containers)}
    await line.say(frames.Beat(beat=Heartbeat(worker_id=line.id, containers=containers), slots=slots))
    await until(lambda: pool.pool.fleet.get(line.id).containers == containers)


def ask(pool: Running, model: str) -> Task:
    """Submit a request for a model; its answer is nobody's."""
    task = Task(
        service="llm", model=model, method="POST", path="/v1/chat/completions", headers=(), body_bytes=0,
        key_id="key:1", now=pool.pool.clock(), timeout_s=60,
    )  # fmt: skip
    pool.pool.submit(task, pool.pool.spools.make())
    return task


async def test_a_request_goes_to_the_worker_that_has_its_model(tmp_path: Path) -> None:
    async with running(tmp_path) as pool, pool.worker(slots=0) as one, pool.worker(slots=0) as other:
        await shares(pool, one, attached("small", slots=4))
        await shares(pool, other, attached("large", slots=1))
        tasks = [ask(pool, "large"), ask(pool, "large"), ask(pool, "small")]
        offers = [await soon(other.frame(frames.Task)), await soon(one.frame(frames.Task))]
        assert [(frame.offer.task_id, frame.offer.model) for frame in offers] == [
            (tasks[0].id, "large"),
            (tasks[2].id, "small"),
        ]
        assert tasks[1].state == "queued", "the other worker has room, but not the model"
        await shares(pool, one, attached("small", "large", slots=4))
        assert (await soon(one.frame(frames.Task))).offer.task_id == tasks[1].id


async def test_a_model_that_a_worker_does_not_have_any_more_is_not_asked_of_it(tmp_path: Path) -> None:
    async with running(tmp_path) as pool, pool.worker(slots=0) as line:
        await shares(pool, line, attached("small"))
        pool.pool.check_model("small")
        await shares(pool, line, attached("small", state="unhealthy"))
        with pytest.raises(TryLater, match="no worker offers it now"):
            pool.pool.check_model("small")
        with pytest.raises(NotFound, match="no model 'large'") as refused:
            pool.pool.check_model("large")
        assert refused.value.hints == ("it has or had: small",)


async def test_a_model_is_known_after_a_restart_though_nobody_offers_it_yet(tmp_path: Path) -> None:
    async with running(tmp_path) as pool, pool.worker(slots=0) as line:
        await shares(pool, line, attached(ModelStatus(name="small", context=4096)))
        await pool.pool.flush()
        assert pool.pool.seen_models.changed == set()
    async with running(tmp_path) as pool:
        view = pool.pool.models()["small"]
        assert (view.state, view.workers, view.context) == ("away", 0, 4096)
        with pytest.raises(TryLater):
            pool.pool.check_model("small")


async def test_a_new_model_is_written_long_before_the_counters_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running(tmp_path) as pool, pool.worker(slots=0) as line:

        async def too_late() -> None:
            """Write nothing: whoever waits for this waits for too long."""

        monkeypatch.setattr(pool.pool, "flush", too_late)
        await shares(pool, line, attached("small"))
        await until(lambda: pool.pool.seen_models.changed == set())
        assert [record.name for record in await pool.pool.store.load(ModelRecord)] == ["small"]


async def test_what_is_attached_counts_for_its_one_service_and_only_so_far(tmp_path: Path) -> None:
    async with running(tmp_path) as pool, pool.worker(slots=0) as line:
        many = attached("small", slots=1000)
        stray = ContainerStatus(name="x", service="ner", state="healthy", runtime=ATTACHED, slots=5)
        slots = {"llm": 1000, "ner": 5}
        await line.say(frames.Beat(beat=Heartbeat(worker_id=line.id, containers=(many, stray)), slots=slots))
        await until(lambda: line.id in pool.pool.dispatcher.seats and pool.pool.dispatcher.seats[line.id].models)
        assert pool.pool.dispatcher.seats[line.id].slots == {"llm": 64, "ner": 0} | assigned(pool, line, "ner")


def assigned(pool: Running, line: Line, service: str) -> dict[str, int]:
    """Return the slots of a service that the pool itself gave a worker."""
    given = [one.slots for one in pool.pool.fleet.get(line.id).brief.assignment if one.service == service]
    return {service: min(5, sum(given))} if given else {}


async def test_tasks_for_models_nobody_asks_for_any_more_leave_nothing_behind(tmp_path: Path) -> None:
    async with running(tmp_path) as pool:
        tasks = [ask(pool, f"model-{number}") for number in range(20)]
        for task in tasks:
            pool.pool.dispatcher.cancel(task, "nobody waits")
        pool.pool.dispatcher.tick()
        line = pool.pool.dispatcher._matcher._lines["llm"]
        assert (list(line), line._groups, line._open) == ([], {}, {})
        await asyncio.sleep(0)


class Turned:
    """A wall clock that the test turns, and the models under it."""

    def __init__(self) -> None:
        self.now = 1_800_000_000.0
        self.models = Models(wall=lambda: self.now)

    def names(self, *names: str, context: int = 0) -> None:
        self.models.note([attached(*(ModelStatus(name=name, context=context) for name in names))])


def test_names_that_workers_make_up_are_forgotten_before_there_are_too_many() -> None:
    turned = Turned()
    for first in range(0, MOST_MODELS + 100, 50):
        turned.names(*(f"model-{number}" for number in range(first, first + 50)))
    assert len(turned.models.view([])) == MOST_MODELS
    assert "model-0" in turned.models.gone
    assert "model-0" not in turned.models
    assert f"model-{MOST_MODELS + 99}" in turned.models


def test_a_model_that_nobody_had_for_a_month_is_forgotten_at_the_next_start() -> None:
    turned = Turned()
    old = ModelRecord(name="old", context=0, seen_at=turned.now - REMEMBERED_S - 1)
    turned.models.restore([old, ModelRecord(name="new", context=8, seen_at=turned.now)])
    assert turned.models.view([]) == {"new": ModelView("new", "away", 0, 8, turned.now)}
    assert turned.models.gone == {"old"}


def test_a_model_is_noted_anew_when_something_changed_or_now_and_then() -> None:
    turned = Turned()
    turned.names("small", context=8)
    turned.models.changed.clear()
    turned.names("small")
    assert turned.models.changed == set(), "a worker that does not know the context changes nothing"
    turned.names("small", context=16)
    assert turned.models.changed == {"small"}
    turned.models.changed.clear()
    turned.now -= 86_400
    turned.names("small", context=16)
    assert turned.models.changed == {"small"}, "a clock that was set back does not stop it"


def view_of(**facts: Any) -> ModelView:
    return ModelView(**{"name": "m", "state": "loaded", "workers": 1, "context": 0, "seen_at": 0.0, **facts})


async def test_of_several_workers_what_all_of_them_can_do_is_shown_and_who_has_it_ready(tmp_path: Path) -> None:
    async with running(tmp_path) as pool, pool.worker(slots=0) as one, pool.worker(slots=0) as other:
        await shares(pool, one, attached(ModelStatus(name="m", capabilities=("completion", "vision", "tools"))))
        await shares(pool, other, attached(ModelStatus(name="m", state="cold", capabilities=("completion", "tools"))))
        view = pool.pool.models()["m"]
        assert (view.workers, view.loaded, view.capabilities) == (2, 1, ("completion", "tools"))
        await shares(pool, other, attached(ModelStatus(name="m")))
        view = pool.pool.models()["m"]
        assert (view.loaded, view.capabilities) == (2, ("completion", "vision", "tools")), (
            "who says nothing denies nothing"
        )


async def test_of_several_workers_the_readiest_state_and_the_smallest_context_are_shown(tmp_path: Path) -> None:
    async with running(tmp_path) as pool, pool.worker(slots=0) as one, pool.worker(slots=0) as other:
        await shares(pool, one, attached(ModelStatus(name="m", state="cold", context=8192)))
        await shares(pool, other, attached(ModelStatus(name="m", state="loading", context=4096)))
        view = pool.pool.models()["m"]
        assert view._replace(seen_at=0.0) == view_of(state="loading", workers=2, context=4096)


def making(name: str, *, state: ContainerState = "pulling", **known: Any) -> ContainerStatus:
    """Return a container whose model is on its way for the first time."""
    model = ModelStatus(name=name, state="loading", **known)
    return ContainerStatus(name="llama", service="llm", state=state, runtime="docker", by_owner=True, models=(model,))


@pytest.mark.parametrize(
    ("known", "said", "retry_after_s"),
    [
        ({}, "the model 'm' is made ready on 1 worker", 30),
        ({"progress": 0.0}, "the model 'm' is made ready on 1 worker: 0% done", 30),
        ({"progress": 0.25, "eta_s": 90.0}, "the model 'm' is made ready on 1 worker: 25% done, about 2 min left", 90),
    ],
)
async def test_a_model_on_its_way_is_told_with_how_far_it_is_where_that_is_known(
    tmp_path: Path, known: dict[str, Any], said: str, retry_after_s: float
) -> None:
    async with running(tmp_path) as pool, pool.worker(slots=0) as line:
        await shares(pool, line, making("m", **known))
        view = pool.pool.models()["m"]
        assert (view.state, view.workers, view.coming) == ("loading", 0, 1)
        assert (view.progress, view.eta_s) == (known.get("progress"), known.get("eta_s"))
        with pytest.raises(TryLater) as refused:
            pool.pool.check_model("m")
        assert (refused.value.message, refused.value.retry_after_s) == (said, retry_after_s)


async def test_of_several_that_make_a_model_ready_the_furthest_counts_until_one_has_it(tmp_path: Path) -> None:
    async with running(tmp_path) as pool, pool.worker(slots=0) as one, pool.worker(slots=0) as other:
        await shares(pool, one, making("m", progress=0.2, eta_s=500.0))
        await shares(pool, other, making("m", progress=0.7, eta_s=60.0, state="starting"))
        view = pool.pool.models()["m"]
        assert (view.coming, view.progress, view.eta_s) == (2, 0.7, 60.0)
        assert view.sentence == "the model 'm' is made ready on 2 workers: 70% done, about 60 s left"
        await shares(pool, one, attached("m"))
        pool.pool.check_model("m")
        view = pool.pool.models()["m"]
        assert (view.state, view.workers, view.coming, view.progress) == ("loaded", 1, 1, None)


async def test_a_loaded_model_that_waits_for_nothing_shows_no_progress_of_others(tmp_path: Path) -> None:
    async with running(tmp_path) as pool, pool.worker(slots=0) as line:
        model = ModelStatus(name="m", state="loading", progress=0.5, eta_s=3.0)
        await shares(pool, line, attached(model))
        view = pool.pool.models()["m"]
        assert (view.state, view.workers, view.progress, view.eta_s) == ("loading", 1, 0.5, 3.0)
        pool.pool.check_model("m")
        await shares(pool, line, attached(ModelStatus(name="m", state="cold")))
        assert pool.pool.models()["m"].progress is None


def test_models_of_the_catalog_are_known_before_anybody_has_them() -> None:
    entry = ModelEntry(name="qwen", licence="Apache-2.0", sha256="1" * 64, size_bytes=1, context=2048)
    models = Models(wall=lambda: 5.0, offered=[entry])
    assert "qwen" in models
    assert models.view([]) == {"qwen": ModelView("qwen", "away", 0, 2048, 0)}
    assert models.newest(9) == ["qwen"]
    models.note([attached("other")])
    assert models.newest(9) == ["other", "qwen"]


async def test_a_paused_worker_is_given_nothing_and_its_models_are_away(tmp_path: Path) -> None:
    async with running(tmp_path) as pool, pool.worker(slots=0) as line:
        await shares(pool, line, attached("m"))
        beat = Heartbeat(worker_id=line.id, containers=(attached("m"),), paused=True)
        await line.say(frames.Beat(beat=beat, slots={"llm": 1}))
        await until(lambda: pool.pool.fleet.get(line.id).paused)
        assert pool.pool.models()["m"].state == "away"
        with pytest.raises(TryLater):
            pool.pool.check_model("m")
        assert ask(pool, "m").state == "queued"
        await shares(pool, line, attached("m"))
        assert (await soon(line.frame(frames.Task))).offer.model == "m"
