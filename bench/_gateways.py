"""What bench/gateway.py compares: RMA's coordinator, alone and with a real agent, LiteLLM's proxy, the sglang router.

Each runs on the core that is measured, with access logs off and only warnings logged; model server, workers, agent and
load run on the others. The peers come from bench/peers-gateway.txt into a virtual environment that is thrown away, or
that of ``RMA_BENCH_PEERS_GATEWAY`` (the path of its python; ``none`` leaves the peers out).
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import secrets
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import psutil

from bench import _common, _load, _peers, _stub
from bench._stub import MODEL, SLOTS, Aim

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from bench._common import Server

#: Arguments with which a coordinator runs on uvicorn instead of Hypercorn.
ON_UVICORN = ("--server", "uvicorn")
#: Seconds for a peer to start; LiteLLM takes 10 to 20.
START_S = 90.0
QUIET = ("--log-level", "warning")

LITELLM_CONFIG = """
model_list:
  - model_name: {model}
    litellm_params:
      model: openai/{model}
      api_base: {url}/v1
      api_key: none
"""
#: It would log each request.
LITELLM_LOGGING = {
    "version": 1,
    "disable_existing_loggers": False,
    "loggers": {
        name: {"level": "WARNING", "handlers": [], "propagate": True} for name in ("uvicorn", "uvicorn.access")
    },
}


class Place(NamedTuple):
    """Where a gateway runs: the stub, a folder, the model server, the gateway's core, the others; workers of a pool."""

    stub: Path
    folder: Path
    backend: Server
    served: set[int]
    loading: set[int]
    workers: int


@contextlib.contextmanager
def rma(place: Place, *, name: str = "rma", arguments: Sequence[str] = ()) -> Iterator[Aim]:
    """Run a coordinator, with the stub's workers."""
    with (
        _coordinator(place, name, arguments) as server,
        _stub.workers(place.stub, server, place.workers, place.loading),
    ):
        yield Aim(server.url, server.key, (server.process,))


@contextlib.contextmanager
def uvicorn(place: Place) -> Iterator[Aim]:
    """Run a coordinator on uvicorn."""
    with rma(place, name="uvicorn", arguments=ON_UVICORN) as aim:
        yield aim


@contextlib.contextmanager
def agent(place: Place) -> Iterator[Aim]:
    """Run a coordinator and a real agent, whose owner has attached the model server; the agent is watched too."""
    with _coordinator(place, "agent", ()) as server:
        home = place.folder / "agent-home"
        env = {
            "RMA_COORDINATOR_URL": server.url,
            "RMA_JOIN_TOKEN": asyncio.run(_load.join_token(server, 1)),
            "RMA_RUNTIMES": "process",
            "RMA_ATTACH": f"{place.backend.url}#slots={SLOTS}",
            "RMA_LOG_LEVEL": "warning",
        }
        with _common.started(["-m", "rma_core", "agent"], home=home, cores=place.loading, env=env) as process:
            asyncio.run(_stub.listed(server, 1))
            yield Aim(server.url, server.key, (server.process, psutil.Process(process.pid)))


@contextlib.contextmanager
def _coordinator(place: Place, name: str, arguments: Sequence[str]) -> Iterator[Server]:
    catalog = place.folder / f"{name}-catalog"
    # What an owner attaches needs no entry.
    catalog.mkdir()
    arguments = ("--catalog", str(catalog), *QUIET, *arguments)
    with _common.coordinator(place.folder / name, cores=place.served, arguments=arguments) as server:
        yield server


# -- peers ---------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def litellm(place: Place) -> Iterator[Aim]:
    """Run LiteLLM's proxy, one worker, as it comes. Raises NoPeerError."""
    home = place.folder / "litellm"
    home.mkdir()
    config, logging, key = home / "config.yaml", home / "logging.json", f"sk-{secrets.token_hex(24)}"
    config.write_text(LITELLM_CONFIG.format(model=MODEL, url=place.backend.url), encoding="utf-8")
    logging.write_text(json.dumps(LITELLM_LOGGING), encoding="utf-8")
    env = {
        "LITELLM_MASTER_KEY": key,
        "LITELLM_LOG": "WARNING",
        # Else it fetches its table of prices.
        "LITELLM_LOCAL_MODEL_COST_MAP": "True",
        # Else it opens no more than 500 streams at one server.
        "AIOHTTP_CONNECTOR_LIMIT": "100000",
        "AIOHTTP_CONNECTOR_LIMIT_PER_HOST": "100000",
    }
    command = ["--config", str(config), "--log_config", str(logging), "--host", "127.0.0.1"]
    with _peer(place, home, "litellm", command, ready="/health/liveliness", env=env) as aim:
        yield aim._replace(key=key)


@contextlib.contextmanager
def sglang(place: Place) -> Iterator[Aim]:
    """Run the sglang router, as it comes. Raises NoPeerError."""
    home = place.folder / "sglang"
    command = [
        "launch", "--worker-urls", place.backend.url, "--host", "127.0.0.1", "--log-level", "warn",
        "--prometheus-host", "127.0.0.1", "--prometheus-port", str(_common.free_port()),
    ]  # fmt: skip
    with _peer(place, home, "sglang-router", command, ready="/readiness") as aim:
        yield aim


@contextlib.contextmanager
def _peer(
    place: Place, home: Path, program: str, command: Sequence[str], *, ready: str, env: dict[str, str] | None = None
) -> Iterator[Aim]:
    python = _peers.python(place.folder / "peers", requirements="peers-gateway.txt", variable="RMA_BENCH_PEERS_GATEWAY")
    port = _common.free_port()
    script = Path(python).parent / program
    if not script.exists():
        raise _peers.NoPeerError(f"{script.parent} has no {program}")
    command = [str(script), *command, "--port", str(port)]
    with _common.started(command, home=home, cores=place.served, env=env, program=python) as process:
        url = f"http://127.0.0.1:{port}"
        if not _common.answers(f"{url}{ready}", process, within_s=START_S):
            raise _peers.NoPeerError(f"{program} did not start: {_common.log_of(home)[-300:]}")
        yield Aim(url, "", (psutil.Process(process.pid),))
