"""Logs that tell a story: each transition once with its ids, one line a task, no traceback, and no secret in any."""

from __future__ import annotations

import ast
import asyncio
import itertools
import json
import logging
import re
import signal
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest

from rma_core.commands import common
from rma_core.http import open_client
from tests import crash_kit, slow_service
from tests.agent_cable import cable_to
from tests.pools import NO_ENGINE, Running, environment, rma

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from tests.crash_kit import Town

Record = dict[str, Any]

ROOT = Path(__file__).resolve().parents[1]
#: What every record has, and in this order; then the names of what it is about, the same ones everywhere.
HEAD = ("time", "level", "logger", "message", "action")
NAMES = {
    "worker": r"worker-[0-9a-f]{8}",
    "task": r"task-[0-9a-z]{20}",
    "client_request_id": r"[!-~]{1,128}",
    "attempt": r"\d+",
    "token": r"[0-9a-f]{8}",
    "key": r"[0-9a-f]{8}",
    "container": r"rma-[a-z-]+",
    "service": r"[a-z]+",
    "model": r"\S+",
    "runtime": r"[a-z]+",
    "plugin": r"[a-z_]+",
    "pool": r"rma-[0-9a-f]{16}",
    "path": r"/.+",
    "reason": r".+",
    "seconds": r"[\d.]+",
    "starts": r"\d+",
    "tier": r"[123]",
}
#: Words that only requests and answers hold, and only their clients and services may see.
IN_BODY, IN_QUERY, IN_HEADER = "orchard-body-4711", "orchard-query-4712", "orchard-header-4713"
#: What looks like a credential, whatever it opens: keys, tokens, JWTs, private keys, the header that carries them.
CREDENTIALS = re.compile(r"rma[acj]_[0-9A-Za-z]{8}|eyJ[\w-]{8,}\.|PRIVATE KEY|Bearer\s|[Aa]uthorization['\"]?\s*[:=]")


class Story(NamedTuple):
    """What was said in a whole life of a pool, and what must not be found in it."""

    coordinator: Sequence[Sequence[str]]
    """Its lines, for each of its lives."""
    agents: dict[str, list[str]]
    tasks: dict[str, str]
    """Each task that was made, and how it ended."""
    workers: dict[str, str]
    token_id: str
    secrets: dict[str, str]

    @property
    def lines(self) -> list[str]:
        return [line for said in (*self.coordinator, *self.agents.values()) for line in said]


def records(lines: Iterable[str]) -> list[Record]:
    """Return what is JSON; what a person is told at the start is not."""
    return [json.loads(line) for line in lines if line.startswith("{")]


def told(found: Iterable[Record], *levels: str) -> list[Record]:
    return [one for one in found if one["level"] in (levels or ("info", "warning", "error", "critical"))]


def actions(found: Iterable[Record], pattern: str, **about: object) -> list[str]:
    """Return the actions that match, in order, of the records about something."""
    return [
        one["action"]
        for one in told(found)
        if re.fullmatch(pattern, one["action"]) and all(one.get(name) == value for name, value in about.items())
    ]


def leaks(lines: Iterable[str], secrets: dict[str, str]) -> list[str]:
    """Return what of the secrets stands in which line, and what looks like a credential."""
    found = []
    for line in lines:
        found += [f"{name}: {line}" for name, secret in secrets.items() if secret in line]
        found += [f"{match[0]!r}: {line}" for match in CREDENTIALS.finditer(line)]
    return found


# -- the story -----------------------------------------------------------------------------------------------------


def start_agent(made: Town, name: str, token: str, url: str, **settings: str) -> Running:
    """Start an agent as its owner does, at the default level unless ``settings`` say otherwise."""
    where = {"RMA_COORDINATOR_URL": url, "RMA_JOIN_TOKEN": token, "RMA_INSECURE_HTTP": "1", "RMA_DRAIN_S": "1"}
    how = {"RMA_RUNTIMES": "process", "RMA_SERVICE_SOURCES": str(made.sources)}
    env = environment(made.agents_home / name, {**NO_ENGINE, **where, **how, **settings})
    made.agents[name] = agent = Running(rma("agent"), env)
    return agent


async def says(agent: Running, pattern: str, *, times: int = 1) -> None:
    await crash_kit.until(
        lambda: len(re.findall(pattern, agent.text)) >= times, what=f"{times} times {pattern}\n{agent.text}"
    )


#: How the coordinator and ``a0`` log; ``a1`` logs as by default.
TALK = {"RMA_LOG_JSON": "1", "RMA_LOG_LEVEL": "debug"}


async def live(folder: Path) -> Story:
    """Run a pool through everything that happens to one."""
    made = crash_kit.Town(folder, **TALK)
    tasks: dict[str, str] = {}
    try:
        made.start()
        await made.ready()
        async with made.client() as admin, cable_to(made.url) as cable:
            token = (await admin.post("/api/admin/tokens", json={"uses": 2, "label": "two\nmachines"})).json()
            asked = {"kind": "client", "scopes": ["infer:*", "tasks:read"]}
            key = (await admin.post("/api/admin/keys", json=asked)).json()
            async with open_client(made.url, token=key["key"], timeout_s=crash_kit.PATIENCE_S) as client:
                start_agent(made, "a1", token["token"], made.url)
                await made.serving(1)
                await requests(made, client, tasks)
                killed = await lose_worker(made, client, tasks, token["token"], cable.url)
                cable.cut()
                await says(made.agents["a0"], '"action": "channel_open"', times=2)
                before = await lose_coordinator(made, client, tasks)
            await admin.delete(f"/api/admin/keys/{key['key_id']}")
            admin_key = admin.headers["authorization"].removeprefix("Bearer ")
            secrets = {"admin key": admin_key, "client key": key["key"], "join token": token["token"]}
            secrets |= {f"{name}'s key": secret for name in made.agents for secret in device_keys(made, name)}
            await asyncio.to_thread(leave, made, "a1")
            await says(made.agents["a1"], "said goodbye")
            await asyncio.to_thread(made.agents["a0"].stop, signal.SIGTERM)
        made.stop(signal.SIGTERM)
    finally:
        await made.quiet()
        made.close()
    agents = {name: agent.lines for name, agent in made.agents.items()}
    workers = {name: re.findall(r"worker-[0-9a-f]{8}", made.agents[name].text)[0] for name in agents}
    secrets |= {"body": IN_BODY, "query": IN_QUERY, "header": IN_HEADER}
    lives = [before, made.said[len(before) :]]
    return Story(lives, agents | {"a1 before": killed}, tasks, workers, token["token_id"], secrets)


async def lose_worker(made: Town, client: Any, tasks: dict[str, str], token: str, url: str) -> list[str]:
    """Kill ``a1`` under a request, which ends on ``a0``, and start it again; return what it had said."""
    ends = made.begin(client.post("/api/inference/slow", content=slow_service.request("killed", before_s=3)))
    await crash_kit.until(lambda: made.where("killed"), what="the request runs")
    killed = made.agents["a1"]
    killed.stop(signal.SIGKILL)
    start_agent(made, "a0", token, url, **TALK)
    tasks[(await ends).headers["rma-task-id"]] = "succeeded"
    await says(start_agent(made, "a1", token, made.url), "rma-slow-worker is healthy")
    return killed.lines


async def lose_coordinator(made: Town, client: Any, tasks: dict[str, str]) -> list[str]:
    """Kill the coordinator under a durable request, and start it again; return what it had said."""
    (lasting,) = await durable(client, "lasting", wait_for="nothing", before_s=3)
    await crash_kit.until(lambda: made.where("lasting"), what="the durable request runs")
    made.stop(signal.SIGKILL)
    before = list(made.said)
    made.start()
    await made.ready()
    await made.serving(2)
    tasks[lasting] = (await client.get(f"/api/inference/tasks/{lasting}?wait=30")).json()["status"]
    return before


async def requests(made: Town, client: Any, tasks: dict[str, str]) -> None:
    """Make one request of each kind, with words in it that nobody else is to see."""
    headers = {"X-Api-Key": IN_HEADER, "Idempotency-Key": IN_HEADER}
    body = slow_service.request(IN_BODY, filling=10)
    answer = await client.post(f"/api/inference/slow?api_key={IN_QUERY}", content=body, headers=headers)
    assert IN_BODY in answer.text, answer.text
    tasks[answer.headers["rma-task-id"]] = "succeeded"
    broken = await client.post("/api/inference/slow", content=json.dumps({"id": IN_BODY}).encode())
    assert broken.status_code == 502, broken.text
    tasks[broken.headers["rma-task-id"]] = "failed"
    assert (await client.post(f"/api/inference/none?x={IN_QUERY}", content=body)).status_code == 404
    assert (await client.get("/api/admin/workers", headers={"Authorization": f"Bearer {IN_HEADER}"})).status_code == 401
    tasks |= await durable(client, IN_BODY, wait_for="succeeded", headers=headers)
    cancelled = await durable(client, "cancelled", wait_for="nothing", before_s=30)
    await crash_kit.until(lambda: made.where("cancelled"), what="the request runs")
    assert (await client.delete(f"/api/inference/tasks/{next(iter(cancelled))}")).status_code == 200
    tasks |= dict.fromkeys(cancelled, "cancelled")


async def durable(client: Any, name: str, *, wait_for: str, headers: Any = None, before_s: float = 0) -> dict[str, str]:
    """Make a request whose answer is fetched later; return its task."""
    body = slow_service.request(name, before_s=before_s)
    made = await client.post(
        "/api/inference/slow", content=body, headers={**(headers or {}), "Prefer": "respond-async"}
    )
    assert made.status_code == 202, made.text
    if wait_for == "nothing":
        return {made.json()["task_id"]: "queued"}
    found = (await client.get(f"{made.headers['location']}?wait=30")).json()
    assert found["status"] == wait_for, found
    return {found["task_id"]: wait_for}


def leave(made: Town, name: str) -> None:
    env = environment(made.agents_home / name)
    subprocess.run(rma("leave", "--yes"), env=env, capture_output=True, timeout=60, check=True)


def device_keys(made: Town, name: str) -> list[str]:
    """Return the secret part of a machine's key, in every form in which it is kept."""
    found = []
    for path in (made.agents_home / name).glob("*key*"):
        text = path.read_text(encoding="utf-8")
        found += [line for line in text.splitlines() if len(line) > 30 and "---" not in line]
    assert found, f"{name} has no key"
    return found


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> Story:
    """The whole story, once. The path is short: the services listen on Unix sockets below it."""
    return asyncio.run(live(tmp_path_factory.mktemp("l")))


# -- what the logs say ---------------------------------------------------------------------------------------------


def test_a_pool_says_when_it_opens_and_when_it_closes(story: Story) -> None:
    before, after = map(records, story.coordinator)
    assert actions(before, "pool_.*") == ["pool_open"]
    assert actions(after, "pool_.*") == ["pool_open", "pool_closed"]
    opened = [one for one in (*before, *after) if one["action"] == "pool_open"]
    assert [one["starts"] for one in opened] == [1, 2]
    assert opened[1]["message"].endswith("(start 2; workers known: 2; tasks that go on: 1)")
    assert actions(before, "(key|token)_.*") == ["key_created", "token_created", "key_created"]
    assert actions(after, "(key|token)_.*") == ["key_revoked"]


def test_each_transition_of_a_worker_is_there_once_with_its_id(story: Story) -> None:
    before, after = map(records, story.coordinator)
    killed, stayed = story.workers["a1"], story.workers["a0"]
    worker = "worker_.*|channel_.*"
    assert actions(before, worker, worker=killed) == [
        "worker_joined",
        "worker_healthy",
        "channel_down",
        "worker_registered",
    ]
    assert actions(before, worker, worker=stayed) == ["worker_joined", "worker_healthy"]
    assert actions(after, worker, worker=killed) == ["worker_healthy", "worker_offline"]
    assert actions(after, worker, worker=stayed) == ["worker_healthy", "worker_offline"]
    joined = [one for one in before if one["action"] == "worker_joined"]
    assert {one["token"] for one in joined} == {story.token_id}


def test_each_task_has_one_line_that_says_how_it_ended_and_where(story: Story) -> None:
    found = [one for life in story.coordinator for one in told(records(life)) if one["action"].startswith("task_")]
    assert {one["task"]: one["action"].removeprefix("task_") for one in found} == story.tasks
    assert len(found) == len(story.tasks)
    assert all({"worker", "attempt", "service", "seconds", "key"} <= set(one) for one in found)
    assert {one["level"] for one in found if one["action"] == "task_failed"} == {"warning"}
    (moved,) = [one for one in found if one["attempt"] == 2]
    assert moved["worker"] == story.workers["a0"]
    assert f"{story.workers['a1']}: the worker's connection broke" in moved["message"]


def test_an_agent_tells_how_it_stands_with_its_coordinator_and_what_it_runs(story: Story) -> None:
    found = records(story.agents["a0"])
    assert actions(found, "enrolled|left|drain") == ["enrolled", "drain", "left"]
    assert actions(found, "channel_.*") == ["channel_open", "channel_broken"] * 2 + ["channel_open"]
    assert actions(found, "desired") == ["desired"]
    assert actions(found, "container_.*")[:2] == ["container_pulling", "container_healthy"]
    assert actions(found, "link_.*")[:1] == ["link_up"]
    broke = [one for one in found if one["action"] == "channel_broken"]
    assert all(re.search(r"broke \(.+\)", one["message"]) for one in broke)
    ends = [one for one in found if one["action"].startswith("attempt_")]
    assert len({(one["task"], one["attempt"]) for one in ends}) == len(ends)


def test_at_the_default_level_a_volunteer_reads_the_same_story_in_words(story: Story) -> None:
    lines = story.agents["a1"]
    assert all(re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d (INFO|WARNING) ", line) for line in lines), lines
    worker = story.workers["a1"]
    words = [
        rf"{worker} is registered with the coordinator, at http",
        "rma-slow-worker is healthy",
        r"WARNING .* cannot be reached: .*; trying again",
        rf"{worker} is registered with the coordinator again",
        "stopping; nothing runs",
        rf"{worker} has said goodbye",
    ]
    assert [len([line for line in lines if re.search(one, line)]) for one in words] == [1] * len(words), lines


def test_every_record_has_the_same_keys_and_each_name_means_one_thing(story: Story) -> None:
    found = records(story.lines)
    assert len(found) > 40
    for one in found:
        assert tuple(one)[: len(HEAD)] == HEAD, one
        about = {name: value for name, value in one.items() if name not in HEAD}
        assert set(about) <= set(NAMES), one
        assert [name for name, value in about.items() if not re.fullmatch(NAMES[name], str(value))] == [], one
        assert one["logger"].startswith(("rma_core", "rma_coordinator")), one
        assert one["action"] or one["level"] == "debug", one


def test_nothing_is_said_twice_in_a_row_and_nothing_with_a_traceback(story: Story) -> None:
    assert [line for line in story.lines if "Traceback" in line or "traceback" in line] == []
    for said in (*story.coordinator, *story.agents.values()):
        words = [one["message"] for one in told(records(said))] or [line[20:] for line in said]
        assert [one for one, after in itertools.pairwise(words) if one == after] == []
    assert {one["action"] for one in told(records(story.lines), "error", "critical")} == set()


def test_no_secret_stands_in_any_log(story: Story) -> None:
    assert leaks(story.lines, story.secrets) == []
    assert len(story.secrets) >= 7


def test_a_secret_in_a_record_would_be_found(story: Story) -> None:
    logger = logging.getLogger("rma_core.planted")
    for form in (common.JSONLine(), common.OneLine("%(message)s")):
        for name, secret in story.secrets.items():
            record = logger.makeRecord(logger.name, logging.DEBUG, "x.py", 1, "calling with %s", (secret,), None)
            assert leaks([form.format(record)], {name: secret}), name
    for planted in ("rmaa_" + "x" * 36, "eyJhbGciOiJIUzI1NiJ9.e30.x", "Authorization: Basic eDp5", "Bearer abc"):
        record = logger.makeRecord(
            logger.name, logging.INFO, "x.py", 1, "call", (), None, extra={"headers": {"x": planted}}
        )
        assert leaks([common.JSONLine().format(record)], {}), planted


# -- what goes for every line that there can be --------------------------------------------------------------------


def test_what_comes_from_elsewhere_is_one_bounded_line_of_json_too() -> None:
    evil = 'gone\n{"time": "2026-01-01", "level": "info"}\x1b[2J\u202e' + "x" * 1_000_000
    record = logging.getLogger("x").makeRecord(
        "x", logging.WARNING, "x.py", 1, "%s is offline: %s", ("worker-0badcafe", evil), None, extra={"reason": evil}
    )
    line = common.JSONLine().format(record)
    assert line.isascii()
    assert line.isprintable()
    assert len(line) < 3 * common.LOG_LINE
    found = json.loads(line)
    assert found["message"].startswith('worker-0badcafe is offline: gone\n{"time"')
    assert max(map(len, found.values())) <= common.LOG_LINE


def test_a_traceback_stays_inside_its_json_record() -> None:
    try:
        raise ValueError("first\nsecond")
    except ValueError as error:
        info = (type(error), error, error.__traceback__)
    record = logging.getLogger("x").makeRecord("x", logging.ERROR, "x.py", 1, "it failed", (), info)
    line = common.JSONLine().format(record)
    assert "\n" not in line
    assert "ValueError: first\nsecond" in json.loads(line)["traceback"]


def test_libraries_only_warn_even_where_everything_is_logged() -> None:
    words = "import logging; from rma_core.commands import common; common.set_up_logging('debug', as_json=True)\n"
    words += "for name in ('hpack', 'httpx2', 'websockets.client', 'asyncio', 'rma_core.x'):\n"
    words += "    logging.getLogger(name).debug('authorization: x')\n"
    words += "logging.getLogger('hpack').warning('odd')"
    done = subprocess.run([*rma()[:1], "-c", words], capture_output=True, text=True, timeout=60, check=True)
    assert [one["logger"] for one in records(done.stderr.splitlines())] == ["rma_core.x", "hpack"]


def abouts() -> list[tuple[str, set[str]]]:
    """Return, for each dictionary in the code that names an action, where it stands and its names."""
    found = []
    for path in (*(ROOT / "rma_core").rglob("*.py"), *(ROOT / "coordinator" / "rma_coordinator").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Dict):
                names = {str(key.value) for key in node.keys if isinstance(key, ast.Constant)}
                if "action" in names and "level" not in names:
                    found.append((f"{path.name}:{node.lineno}", names - {"action"}))
    return found


def test_whatever_is_logged_names_things_alike() -> None:
    found = abouts()
    assert len(found) > 50
    assert [(where, names - set(NAMES)) for where, names in found if names - set(NAMES)] == []
