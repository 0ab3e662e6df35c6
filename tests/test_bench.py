"""Every measurement runs, with parameters so small that its numbers mean nothing; none is judged by its speed.

What a measurement works out by itself is held against loads whose numbers are known.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import math
import os
import subprocess
import sys
from itertools import count, pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench import _phases, _profile, _stub, gateway
from bench._stub import Load, Meter
from tests.needs import need

ROOT = Path(__file__).parents[1]
#: Seconds in which the slowest of them must have ended, on a machine that is busy.
WITHIN_S = 90
#: The one with several gateways and a search in it takes longer.
GATEWAY_WITHIN_S = 480

SCRIPTS = {
    "agent": {"pss_mib", "cpu_percent", "runtime", "targets"},
    "attached": {"cpu_percent", "us_a_line", "targets"},
    "detection": {"wall_s", "slowest_s", "wall_over_slowest", "over_slowest_ms", "detectors"},
    "durable": {"store", "celery", "procrastinate", "fsync_us"},
    "fleet": {"workers", "memory_at_rest", "phases", "memory_per_100_workers", "limit", "targets"},
    "gateway": {"workers", "cores", "left_out", "gateways", "ratios", "targets"},
    "heartbeats": {"floor", "http", "channel", "of_floor"},
    "idle": {"workers", "interval_s", "open", "parked", "targets"},
    "memory": {"workers", "rss_mib", "mb_per_100"},
    "overhead": {"direct", "pool", "added_p50_ms"},
    "policies": {
        "preview_s",
        "plugin_preview_s",
        "plugin_differs",
        "changes",
        "steps_s",
        "surprises",
        "not_back",
        "failures",
        "fleets",
        "targets",
    },
    "pause": {"held_mib", "stopped_s", "free_s", "loaded_again_s"},
    "simulation": {"workers", "simulated_s", "ways", "targets"},
    "startup": {"interpreter_s", "first_s", "later_s", "rest_rss_mib"},
}


def run(name: str, within_s: float = WITHIN_S) -> dict[str, Any]:
    command = [sys.executable, "-m", f"bench.{name}", "--workers", "5", "--seconds", "1", "--json"]
    # Neither peers from a package index nor an engine that happens to run here.
    env = {
        **os.environ,
        "RMA_BENCH_PEERS": "none",
        "RMA_BENCH_PEERS_GATEWAY": "none",
        "DOCKER_HOST": "unix:///nonexistent/docker.sock",
    }
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=within_s, check=False)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_every_script_that_make_bench_runs_is_tried_here() -> None:
    assert {path.stem for path in ROOT.glob("bench/[!_]*.py")} == set(SCRIPTS)


@pytest.mark.parametrize("name", sorted(SCRIPTS.keys() - {"fleet", "gateway"}))
def test_a_measurement_prints_its_keys(name: str) -> None:
    if name == "pause":
        # It installs the services that it measures.
        need("pypi")
        need("llama")
    assert run(name).keys() >= SCRIPTS[name]


def test_the_fleet_is_measured_in_every_phase_and_no_call_fails() -> None:
    found = run("fleet")
    assert found.keys() >= SCRIPTS["fleet"]
    assert {name: phase["first_failures"] for name, phase in found["phases"].items()} == {
        "register": [],
        "connect": [],
        "steady": [],
        "joining": [],
    }
    measured = found["phases"]["steady"]["latency"]
    assert {"heartbeat_http", "heartbeat_channel", "admin_workers", "admin_stats"} <= measured.keys()
    assert found["phases"]["register"]["latency"]["register"]["count"] == 5
    assert {"floor", "http", "channel"} <= found["limit"].keys()


# -- gateway -------------------------------------------------------------------------------------------------------


@pytest.mark.timeout(GATEWAY_WITHIN_S + 10)
def test_gateways_are_measured_in_every_phase_and_no_request_fails() -> None:
    need("go")
    found = run("gateway", GATEWAY_WITHIN_S)
    assert found.keys() >= SCRIPTS["gateway"]
    assert found["left_out"].keys() >= {"litellm", "sglang"}
    rows = found["gateways"]
    assert rows.keys() >= {"alone", "rma", "uvicorn", "agent"}
    assert [(name, phase, row[phase]["failures"]) for name, row in rows.items() for phase in _phases.PHASES] == [
        (name, phase, []) for name in rows for phase in _phases.PHASES
    ]
    assert all(row[phase]["per_s"] > 0 for row in rows.values() for phase in _phases.PHASES)
    # Of the agent both are watched.
    assert {name: len(row["requests"]["cpu_us"]) for name, row in rows.items()} == {
        "alone": 1,
        "rma": 1,
        "uvicorn": 1,
        "agent": 2,
    }
    assert [held["asked"] for held in rows["rma"]["memory"]["streams"]] == [1, 100, 5 * _stub.SLOTS]
    assert rows["rma"]["capacity"]["streams"] >= 0


def test_the_stub_is_well_formed_go() -> None:
    need("go")
    for command in (["go", "vet", "."], ["gofmt", "-l", "."]):
        done = subprocess.run(command, cwd=_stub.SOURCES, capture_output=True, text=True, timeout=WITHIN_S, check=False)
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_the_model_server_answers_as_one_does(tmp_path: Path) -> None:
    need("go")
    with _stub.backend(_stub.build(tmp_path), tmp_path / "backend", set()) as server, contextlib.ExitStack() as stack:
        connection = http.client.HTTPConnection(server.url.removeprefix("http://"), timeout=WITHIN_S)
        stack.callback(connection.close)
        connection.request("POST", "/v1/chat/completions", _stub.request(tokens=3))
        answer = json.load(connection.getresponse())
        assert answer["choices"][0]["message"]["content"] == " token token token"
        assert answer["usage"] == {"prompt_tokens": 32, "completion_tokens": 3, "total_tokens": 35}

        connection.request("POST", "/v1/chat/completions", _stub.request(tokens=3, rate=100, stream=True))
        *events, end = connection.getresponse().read().decode().removesuffix("\n\n").split("\n\n")
        assert end == "data: [DONE]"
        choices = [json.loads(event.removeprefix("data: "))["choices"][0] for event in events]
        due = [int(choice["delta"]["content"].removeprefix("@")) for choice in choices[1:-1]]
        assert [later - sooner for sooner, later in pairwise(due)] == [10_000, 10_000]
        assert choices[-1]["finish_reason"] == "length"


def load(per_s: float = 100.0, *, seconds: float = 2.0, **more: Any) -> Load:
    """What a load measures, of which only a part matters."""
    found = {"failed": 0, "begun": 0, "failures": (), "p50_us": 0, "p90_us": 0, "p99_us": 0, "max_us": 0}
    return Load(seconds, round(per_s * seconds), **{**found, **more})


def test_a_load_says_what_each_answer_cost() -> None:
    found = load(1000.0, seconds=2.0, used=(Meter(0.5, 0.1), Meter(0.2, 0.0)))
    assert (found.per_s, found.cpu_us(), found.cpu_us(1)) == (1000.0, 250.0, 100.0)
    assert (found.busy(), found.busy(1), found.waited()) == (0.25, 0.1, 0.05)
    assert math.isnan(load(0.0, used=(Meter(0.5, 0.0),)).cpu_us())


@given(limit=st.integers(1, 2000), most=st.integers(1, 1024), guess=st.floats(0.0, 1.0))
def test_the_most_streams_that_a_gateway_sustains_are_found_whatever_was_expected(
    limit: int, most: int, guess: float
) -> None:
    asked = []

    def measure(streams: int) -> Load:
        asked.append(streams)
        busy = min(1.0, streams / limit)
        late = 2_000_000 if streams > limit else 1000
        rate = min(streams, limit) * _phases.PACE
        return load(rate, seconds=2.0, begun=streams, p99_us=late, used=(Meter(2.0 * busy, 0.0),))

    true_cost_us = 1e6 / (limit * _phases.PACE)
    found = _phases.capacity(measure, true_cost_us * 10 ** (2 * guess - 1), most, within_s=WITHIN_S)
    assert found.streams <= min(limit, most)
    # One step below what is too much, or all there are.
    assert found.streams == most or found.streams >= min(limit, most) / _phases.LEAST_STEP - 1
    assert len(asked) < 20
    assert max(asked) <= most
    assert found.load is not None


def test_streams_are_too_many_when_they_are_late_or_few_or_never_began() -> None:
    full = Meter(1.9, 0.0)
    good = load(500.0, begun=10, p99_us=5000, used=(full,))
    assert _phases.sustained(lambda _: good, 10) == good
    for bad in (
        good._replace(p99_us=_phases.SUSTAINED_LATE_US),
        good._replace(done=900),
        good._replace(begun=9),
        good._replace(failed=1),
    ):
        assert _phases.sustained(lambda _, bad=bad: bad, 10) is None  # type: ignore[misc]


def test_streams_that_others_disturbed_are_tried_again() -> None:
    calls = count()
    disturbed = load(300.0, begun=10, used=(Meter(0.8, 1.0),))
    good = load(500.0, begun=10, used=(Meter(0.8, 0.0),))
    assert _phases.sustained(lambda _: good if next(calls) == 2 else disturbed, 10) == good
    assert next(calls) == 3


def test_the_rounds_that_waited_least_count() -> None:
    rounds = [
        load(rate, used=(Meter(1.0, waited),)) for rate, waited in ((1, 0.5), (2, 0.1), (3, 0.9), (4, 0.2), (5, 2))
    ]
    assert [found.per_s for found in _phases.calm(rounds)] == [2, 4, 1]
    assert _phases.calm(rounds[:1]) == rounds[:1]


def test_what_a_gateway_adds_is_over_the_model_server_alone() -> None:
    def side(p50_us: int) -> list[Load]:
        return [load(p50_us=p50_us, p99_us=10 * p50_us, used=(Meter(0.02, 0.0),))]

    done = {"latency": {_phases.ALONE: side(200), "rma": side(900)}}
    found = _phases.row(done, "rma")["latency"]
    assert (found["p50_ms"], found["added_p50_ms"], found["added_p99_ms"]) == (0.9, 0.7, 7.0)
    assert found["cpu_us"] == [100.0]


def rows(**costs: tuple[float, float]) -> dict[str, Any]:
    """Rows of gateways, by name, with what a request and a token cost in microseconds."""
    return {
        name: {
            "latency": {"added_p50_ms": 0.5},
            "requests": {"cpu_us": [request], "per_s": 1e6 / request},
            "streams": {"p99_ms": 4.0},
            "capacity": {"cpu_us": token, "per_s": 1e6 / token, "streams": 10},
        }
        for name, (request, token) in costs.items()
    }


def test_gateways_are_compared_by_what_they_do_in_the_same_cpu_time() -> None:
    found = rows(rma=(250.0, 60.0), uvicorn=(100.0, 40.0), litellm=(7500.0, 600.0), sglang=(50.0, 30.0))
    ratios = gateway._ratios(found)
    assert ratios["rma of litellm"] == {
        "requests": 30.0, "requests_by_the_wall": 30.0, "tokens": 10.0, "tokens_by_the_wall": 10.0,
    }  # fmt: skip
    assert (ratios["uvicorn of sglang"]["requests"], ratios["uvicorn of sglang"]["tokens"]) == (0.5, 0.75)
    missed = [target.name for target in gateway._targets(found) if not target.met]
    assert missed == ["uvicorn of sglang: requests in the same CPU time"]


def test_only_what_was_measured_has_targets_and_a_full_core_that_was_not_reached_is_a_miss() -> None:
    found = rows(rma=(250.0, 60.0))
    assert all(target.met for target in gateway._targets(found))
    found["rma"]["capacity"] = {"streams": 0}
    assert [target.name for target in gateway._targets(found) if not target.met] == [
        "rma: us of CPU a streamed token, the core full"
    ]


def test_a_profile_counts_each_function_once_a_stack() -> None:
    raw = (
        "main (a/b/app.py:1);walk (x/y/z/tree.py:5);walk (x/y/z/tree.py:7) 3\nmain (a/b/app.py:2);[libc] 1\nno stack\n"
    )
    found = _profile.count(raw)
    assert found.looks == 4
    assert found.itself == {"walk (z/tree.py)": 3, "[libc]": 1}
    assert found.within == {"main (b/app.py)": 4, "walk (z/tree.py)": 3, "[libc]": 1}
    shown = list(_profile.lines(found, each=100.0))
    assert any(line.split() == ["75.0%", "75.0", "us", "walk", "(z/tree.py)"] for line in shown)
    # The way in is no news.
    assert not any("main" in line for line in shown)
