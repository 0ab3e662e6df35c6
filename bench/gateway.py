"""RMA's coordinator as a gateway, beside LiteLLM's proxy and the sglang router: requests, streamed tokens, memory.

One run, one machine: each gateway on the same core, in front of the same model server (bench/stub, in Go), which makes
up its tokens, on the other cores, with the load. RMA's has ``--workers`` workers (Go too), so that no agent is in it;
``agent`` is a coordinator with one real agent that shares the model server. All take turns in rounds of two seconds.

What counts is CPU a request and a token: rates by the wall are less wherever others use the core, which `waited` tells.
``--seconds`` is how long each gateway is measured in each phase; ``--only rma,sglang`` leaves the others out;
``--profile requests`` (``streams``, ``uvicorn-…``, ``agent-…``) shows instead where time is spent.
"""

from __future__ import annotations

import argparse
import contextlib
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench import _common, _gateways, _phases, _profile, _stub
from bench._common import Target
from bench._gateways import Place
from bench._peers import NoPeerError
from bench._phases import ALONE, PHASES, Bench, Phase
from bench._stub import SLOTS, Aim

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from contextlib import AbstractContextManager

    from bench._common import Options

#: What can be measured, in the order in which it takes turns.
GATEWAYS: dict[str, Callable[[Place], AbstractContextManager[Aim]]] = {
    "rma": _gateways.rma,
    "uvicorn": _gateways.uvicorn,
    "agent": _gateways.agent,
    "litellm": _gateways.litellm,
    "sglang": _gateways.sglang,
}
#: The one of these with a real agent: it has fewer slots, and its coordinator's memory is `rma`'s.
AGENT = "agent"
#: Workers of the pool: with as many slots as one machine may share, they take the most streams that are measured.
WORKERS = 16
SECONDS = 6.0
#: The search for the most streams takes so many times the seconds of another phase at most.
SEARCH = 15
#: What can be profiled: the coordinator, or a real agent, under one kind of load.
PROFILES = ("requests", "streams", "uvicorn-requests", "uvicorn-streams", "agent-requests", "agent-streams")
#: Streams of the coordinator's profile, enough to keep it busy.
PROFILED = 150

#: The bars. Requests are compared with LiteLLM's on Hypercorn, with the sglang router's on uvicorn.
OF_LITELLM, OF_SGLANG_REQUESTS, OF_SGLANG_TOKENS = 25.0, 0.6, 0.75
TOKEN_US, ADDED_MS, AGENT_ADDED_MS, LATE_MS = 70.0, 0.6, 3.0, 5.0


def main() -> int:
    given = _arguments()
    asked = _common.read_options(given)
    served, loading = _common.split_cores()
    with tempfile.TemporaryDirectory(prefix="rma-bench-") as name, contextlib.ExitStack() as stack:
        folder = Path(name)
        stub = _stub.build(folder)
        _common.pin(loading)
        backend = stack.enter_context(_stub.backend(stub, folder / "backend", loading))
        place = Place(stub, folder, backend, served, loading, asked.workers)
        if given.profile:
            return _profiled(place, given.profile, asked)
        aims, left_out = _started(stack, place, given.only)
        result: dict[str, Any] = {
            "workers": asked.workers,
            "cores": {"gateway": sorted(served), "load": sorted(loading)},
            "left_out": left_out,
            "gateways": _measure(place, aims, asked.seconds),
        }
    result["ratios"] = _ratios(result["gateways"])
    return _common.show(result, _lines(result), _targets(result["gateways"]), asked)


def _arguments() -> argparse.Namespace:
    parser = _common.parser(__doc__)
    parser.set_defaults(workers=WORKERS, seconds=SECONDS)
    parser.add_argument("--only", type=_names, default=tuple(GATEWAYS), help=f"some of {','.join(GATEWAYS)}")
    parser.add_argument("--profile", choices=PROFILES, help="where the coordinator, or an agent, spends its time")
    return parser.parse_args()


def _names(text: str) -> tuple[str, ...]:
    names = tuple(text.split(","))
    if unknown := set(names) - set(GATEWAYS):
        raise argparse.ArgumentTypeError(f"no {', '.join(sorted(unknown))}; there are {', '.join(GATEWAYS)}")
    return names


def _started(stack: contextlib.ExitStack, place: Place, names: Sequence[str]) -> tuple[dict[str, Aim], dict[str, str]]:
    """Start everything that was asked for; return it, and why the rest is not there."""
    aims, left_out = dict[str, Aim](), dict[str, str]()
    for name in names:
        try:
            aims[name] = stack.enter_context(GATEWAYS[name](place))
        except NoPeerError as error:
            left_out[name] = str(error)
    return aims, left_out


def _measure(place: Place, aims: Mapping[str, Aim], seconds: float) -> dict[str, Any]:
    floor = Aim(place.backend.url, "", (place.backend.process,))
    bench = Bench(place.stub, place.backend, {ALONE: floor, **aims}, place.workers * SLOTS)
    whole = [name for name in aims if name != AGENT]
    rest = {name: bench.gateways[name].resident_mib() for name in whole}
    done = {name: _phases.rounds(bench, phase, seconds) for name, phase in PHASES.items()}
    rows = {name: _phases.row(done, name) for name in bench.gateways}
    for name in whole:
        rows[name]["capacity"] = _capacity(bench, name, rows[name], seconds)
    for name in whole:
        # Last: not every gateway lets go of what streams left behind.
        held = [held._asdict() for held in _phases.memory(bench, name)]
        rows[name]["memory"] = {"rest_mib": rest[name], "streams": held}
    return rows


def _capacity(bench: Bench, name: str, row: Mapping[str, Any], seconds: float) -> dict[str, Any]:
    found = _phases.capacity(
        lambda count: bench.run(name, Phase(count, _phases.PACE, stream=True), min(seconds, _phases.ROUND_S)),
        row["streams"]["cpu_us"][0],
        bench.most,
        within_s=SEARCH * seconds,
    )
    load = found.load
    if load is None:
        return {"streams": 0}
    return {
        "streams": found.streams,
        "per_s": round(load.per_s),
        "cpu_us": round(load.cpu_us(), 1),
        "busy": round(load.busy(), 2),
        "waited": round(load.waited(), 2),
        "p99_ms": round(load.p99_us / 1000, 2),
    }


def _profiled(place: Place, what: str, asked: Options) -> int:
    """Show where the coordinator, or the agent behind it, spends its time under one kind of load."""
    who, _, kind = what.rpartition("-")
    phase = PHASES[kind]
    if kind == "streams" and who != AGENT:
        phase = phase._replace(connections=PROFILED)
    with GATEWAYS[who or "rma"](place) as aim:
        bench = Bench(place.stub, place.backend, {what: aim}, place.workers * SLOTS)
        watched = len(aim.watched) - 1
        looks: list[_profile.Profile] = []

        def mark() -> None:
            if not looks:
                looks.append(_profile.Profile(aim.watched[watched].pid, asked.seconds, place.folder))

        load = bench.run(what, phase, asked.seconds, mark)
        stacks = looks[0].result()
    cost = load.cpu_us(watched)
    print(f"{what}: {load.per_s:.0f} /s, {cost:.1f} us of CPU each, {load.busy(watched):.2f} of the core")
    print("\n".join(_profile.lines(stacks, each=cost)))
    return 0


# -- what it comes to ----------------------------------------------------------------------------------------------


def _ratios(rows: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Return how many times a peer's work each of ours does in the same CPU time, by peer."""
    return {
        f"{ours} of {peer}": {
            "requests": _of(rows[ours]["requests"]["cpu_us"][0], rows[peer]["requests"]["cpu_us"][0]),
            "requests_by_the_wall": _of(rows[peer]["requests"]["per_s"], rows[ours]["requests"]["per_s"]),
            "tokens": _of(_token_us(rows[ours]), _token_us(rows[peer])),
            "tokens_by_the_wall": _of(rows[peer]["capacity"].get("per_s"), rows[ours]["capacity"].get("per_s")),
        }
        for ours in ("rma", "uvicorn")
        for peer in ("litellm", "sglang")
        if ours in rows and peer in rows
    }


def _of(less: float | None, more: float | None) -> float:
    return round(more / less, 2) if less and more else float("nan")


def _token_us(row: Mapping[str, Any]) -> float:
    """Return what a token costs when the core is full of streams."""
    return float(row["capacity"].get("cpu_us", "nan"))


def _targets(rows: Mapping[str, Any]) -> list[Target]:
    ratios = _ratios(rows)
    found = []
    for ours in ("rma", "uvicorn"):
        if ours in rows:
            streams = rows[ours]["streams"]
            found += [
                Target(f"{ours}: added to a request, p50 ms", rows[ours]["latency"]["added_p50_ms"], ADDED_MS),
                Target(f"{ours}: us of CPU a streamed token, the core full", _token_us(rows[ours]), TOKEN_US),
                Target(f"{ours}: {_phases.STREAMS} streams, a token late by ms, p99", streams["p99_ms"], LATE_MS),
            ]
    if AGENT in rows:
        added = rows[AGENT]["latency"]["added_p50_ms"]
        found.append(Target("with a real agent: added to a request, p50 ms", added, AGENT_ADDED_MS))
    for pair, what, limit in (
        ("rma of litellm", "requests", OF_LITELLM),
        ("uvicorn of sglang", "requests", OF_SGLANG_REQUESTS),
        ("uvicorn of sglang", "tokens", OF_SGLANG_TOKENS),
    ):
        if pair in ratios:
            found.append(Target(f"{pair}: {what} in the same CPU time", ratios[pair][what], limit, least=True))
    return found


def _lines(result: Mapping[str, Any]) -> Iterator[str]:
    rows = result["gateways"]
    yield from (f"{name} is not measured: {why}" for name, why in result["left_out"].items())
    if result["cores"]["gateway"] == result["cores"]["load"]:
        yield "there is one core only: the load takes its time from the gateways"
    yield f"a request at a time, and {_phases.LOW_RATE:g} a second (ms; added to the model server alone):"
    yield from _latencies(rows)
    yield f"{_phases.AT_ONCE} connections without a pause:"
    yield from _loads(rows, "requests", "a request")
    yield f"{_phases.STREAMS} streams of {_phases.PACE:g} tokens a second (ms late by its schedule):"
    yield from _loads(rows, "streams", "a token")
    yield f"as many such streams as keep their pace, up to {result['workers'] * SLOTS}:"
    yield from _capacities(rows)
    yield "memory (RSS), MiB, at rest and by open streams:"
    yield from _memory(rows)
    for pair, ratio in result["ratios"].items():
        yield (
            f"{pair}, in the same CPU time (by the wall): requests {ratio['requests']:.2f} "
            f"({ratio['requests_by_the_wall']:.2f}), tokens {ratio['tokens']:.2f} ({ratio['tokens_by_the_wall']:.2f})"
        )
    failures = (
        (name, phase, text) for name, row in rows.items() for phase in PHASES for text in row[phase]["failures"]
    )
    yield from (f"FAILED  {name}, {phase}: {text}" for name, phase, text in failures)


def _latencies(rows: Mapping[str, Any]) -> Iterator[str]:
    for name, row in rows.items():
        one, low = row["latency"], row["low"]
        yield (
            f"    {name:8} p50 {one['p50_ms']:8.3f}  p99 {one['p99_ms']:8.3f}  added p50 {one['added_p50_ms']:8.3f}  "
            f"p99 {one['added_p99_ms']:8.3f}   paced: p50 {low['p50_ms']:8.3f}  p99 {low['p99_ms']:8.3f}"
        )


def _capacities(rows: Mapping[str, Any]) -> Iterator[str]:
    for name, row in rows.items():
        most = row.get("capacity", {})
        if most.get("streams"):
            yield (
                f"    {name:8}{most['per_s']:8} /s in {most['streams']:4} streams  late p99 {most['p99_ms']:8.2f}  "
                f"{most['cpu_us']:.1f} us of CPU a token: {1e6 / most['cpu_us']:.0f} in a second of it  "
                f"core {most['busy']:.2f}, waited {most['waited']:.2f}"
            )
        elif most:
            yield f"    {name:8} none"


def _memory(rows: Mapping[str, Any]) -> Iterator[str]:
    for name, row in rows.items():
        if "memory" in row:
            held = (f"{one['open']} of {one['asked']}: {one['mib']:.1f}" for one in row["memory"]["streams"])
            yield f"    {name:8}{row['memory']['rest_mib']:8.1f}  " + "   ".join(held)


def _loads(rows: Mapping[str, Any], phase: str, what: str) -> Iterator[str]:
    for name, row in rows.items():
        found = row[phase]
        costs = " + ".join(f"{cost:.1f}" for cost in found["cpu_us"])
        yield (
            f"    {name:8}{found['per_s']:8.0f} /s  p50 {found['p50_ms']:8.3f}  p99 {found['p99_ms']:8.3f}  "
            f"{costs} us of CPU {what}  core {found['busy']:.2f}, waited {found['waited']:.2f}"
        )


if __name__ == "__main__":
    raise SystemExit(main())
