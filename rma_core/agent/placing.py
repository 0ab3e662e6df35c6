"""Where a container goes: the first of the owner's runtimes that can run it and has, or can pull, its image."""

from __future__ import annotations

import asyncio
import hashlib
from typing import TYPE_CHECKING, NamedTuple

from rma_core.agent.engines import asked, looked_up, stopped
from rma_core.catalog import ISOLATED_ONLY
from rma_core.errors import (
    ImageMissing,
    ImagePullFailed,
    NotSupported,
    OutOfSpace,
    RuntimeAbsent,
    RuntimeFailure,
)
from rma_core.interfaces import ContainerSpec
from rma_core.models.hardware import ContainerAccess
from rma_core.models.strict import encode

if TYPE_CHECKING:
    from collections.abc import Callable

    from rma_core.agent.context import Context
    from rma_core.agent.engines import Engine
    from rma_core.interfaces import ContainerHandle, GivenFiles, PullProgress
    from rma_core.models.hardware import Device
    from rma_core.models.worker import Assignment

    Pulling = Callable[[Engine, "PullProgress | None"], None]


#: What `container_access` says where the toolkit is installed and no CDI specification was made.
NVIDIA_TOOLKIT = "nvidia-container-toolkit"
#: What engines can say of an image, the most hopeful first.
WEIGHT = (ImagePullFailed, OutOfSpace, RuntimeAbsent, ImageMissing, NotSupported)


#: Seconds for which a pull may report nothing: longer than the patience of the runtimes that come with RMA.
PULL_SILENCE_S = 1200.0


class Spot(NamedTuple):
    """An engine and the spec as it is for that engine; ``adopted`` is what already runs there."""

    engine: Engine
    spec: ContainerSpec
    adopted: ContainerHandle | None = None

    @classmethod
    def on(
        cls, engine: Engine, wanted: Assignment, spec_hash: str, context: Context, files: GivenFiles | None = None
    ) -> Spot | str:  # fmt: skip
        """Return the spot on one engine, with what the container is given to read, or why there is none."""
        isolated = engine.runtime.isolated
        if wanted.service in ISOLATED_ONLY and not isolated:
            return f"{wanted.service} runs in containers only"
        if reason := _too_loose(engine, wanted):
            return reason
        if not isolated and wanted.process is None:
            return f"{wanted.service} cannot run as a process"
        device = context.gpu_for(wanted.name, wanted) if wanted.requires_gpu else None
        if wanted.requires_gpu and device is None:
            return f"{wanted.service} needs a GPU, and none that fits is free"
        access = _access(device, engine) if device is not None else None
        if device is not None and isolated and access is None:
            why = device.reason or "no way to hand it over was found"
            return f"containers cannot be given {device.name}: {why}"
        spec = ContainerSpec(
            worker_id=context.worker_id,
            name=wanted.name,
            service=wanted.service,
            image=wanted.image,
            image_digest=wanted.image_digest,
            port=wanted.port,
            # The agent says when a model is loaded: others may be in its way.
            env={**wanted.env, "LOAD": "0"} if wanted.model else wanted.env,
            limits=wanted.limits,
            spec_hash=spec_hash,
            access=access,
            process=wanted.process,
            files=files,
        )
        return cls(engine, spec)


def _too_loose(engine: Engine, wanted: Assignment) -> str:
    """Say why an engine is none for an image that is not trusted; what it cannot limit is known once it was probed."""
    if wanted.trusted or (engine.runtime.isolated and not engine.health.cannot_limit):
        return ""
    lacking = f"limit {', '.join(engine.health.cannot_limit)}" if engine.runtime.isolated else "keep it apart"
    return f"the image of {wanted.service} is not trusted, and this engine cannot {lacking}"


def _access(device: Device, engine: Engine) -> ContainerAccess | None:
    """Return how a container gets a GPU: as its detector says, or by its UUID where only NVIDIA's toolkit is there.

    A detector cannot know which engine will run the container; an engine with the toolkit takes the name that CDI
    would have, and hands the GPU over its own way.
    """
    toolkit = device.attributes.get("container_access") == NVIDIA_TOOLKIT and "gpu:nvidia" in engine.health.features
    if device.access is None and toolkit:
        return ContainerAccess(cdi=(f"nvidia.com/gpu={device.id.removeprefix('gpu:')}",))
    return device.access


def spec_hash(wanted: Assignment) -> str:
    """Return what tells one version of an assignment from another."""
    return hashlib.sha256(encode(wanted)).hexdigest()


async def find_spot(
    wanted: Assignment,
    spec_hash: str,
    context: Context,
    *,
    last: Engine | None,
    pulling: Pulling,
    files: GivenFiles | None = None,
) -> Spot:
    """Return where to start a container, with its image there, and copies of the files it is given.

    ``last`` is where it ran before: it waits for that engine to come back. Raises ImageMissing when nobody has the
    image, RuntimeAbsent while no engine can be used, ImagePullFailed or OutOfSpace when a pull broke off: never is a
    container replaced by a process because of that.
    """
    failures: list[RuntimeFailure] = []
    for engine in context.engines:
        pull_broke = next((f for f in failures if isinstance(f, ImagePullFailed | OutOfSpace)), None)
        if pull_broke is not None and not engine.runtime.isolated:
            raise pull_broke
        try:
            return await _try(engine, Spot.on(engine, wanted, spec_hash, context, files), wanted, context, pulling)
        except RuntimeAbsent as error:
            if engine is last and engine.health.state == "unhealthy":
                raise
            failures.append(error)
        except (ImageMissing, NotSupported, ImagePullFailed, OutOfSpace) as error:
            failures.append(error)
    raise _weightiest(failures)


async def _try(engine: Engine, spot: Spot | str, wanted: Assignment, context: Context, pulling: Pulling) -> Spot:
    """Return the spot on one engine with the image there; a failure names the engine."""
    try:
        if isinstance(spot, str):
            raise NotSupported(spot)
        if not await engine.look(context.worker_id):
            raise RuntimeAbsent(engine.health.reason or engine.health.state)
        if reason := _too_loose(engine, wanted):
            raise NotSupported(reason)
        await _fetch(spot, pulling)
    except (RuntimeAbsent, ImageMissing, NotSupported, ImagePullFailed, OutOfSpace) as error:
        if isinstance(error, RuntimeAbsent) and engine.health.state == "healthy":
            engine.doubt(error)
        raise type(error)(f"{engine.name}: {error.message}", hints=error.hints) from None
    return spot


async def _fetch(spot: Spot, pulling: Pulling) -> None:
    runtime = spot.engine.runtime
    if await looked_up(runtime, lambda: runtime.has_image(spot.spec)):
        return
    pulling(spot.engine, None)
    loop = asyncio.get_running_loop()
    patience, over = asyncio.timeout(PULL_SILENCE_S), asyncio.Event()

    def heard(progress: PullProgress) -> None:
        # What a thread reports may come after the end.
        if not over.is_set() and not patience.expired():
            patience.reschedule(loop.time() + PULL_SILENCE_S)
            pulling(spot.engine, progress)

    def report(progress: PullProgress) -> None:
        # A runtime that wraps a blocking SDK may report from a thread of its own.
        loop.call_soon_threadsafe(heard, progress)

    try:
        async with patience:
            await asked(runtime, lambda: runtime.pull(spot.spec, report))
    except TimeoutError:
        raise ImagePullFailed(f"the pull of {spot.spec.image} said nothing for {PULL_SILENCE_S:.0f} s") from None
    finally:
        over.set()


async def adopted(wanted: Assignment, spec_hash: str, context: Context) -> Spot | None:
    """Return the container that an earlier run of the agent left, when it is of this very version."""
    for engine in context.engines:
        if not await engine.look(context.worker_id):
            continue
        orphan = engine.orphans.get(wanted.name)
        if orphan is None:
            continue
        spot = Spot.on(engine, wanted, spec_hash, context)
        if orphan.spec_hash == spec_hash and isinstance(spot, Spot):
            del engine.orphans[wanted.name]
            return spot._replace(adopted=orphan)
        await stopped(engine.runtime, orphan)
        engine.orphans.pop(wanted.name, None)
    return None


def _weightiest(failures: list[RuntimeFailure]) -> RuntimeFailure:
    """Return the failure of all engines together: what may pass by itself outweighs what will not."""
    words = "; ".join(failure.message for failure in failures) or "the owner of this machine lists no container runtime"
    kinds = [kind for kind in WEIGHT if any(isinstance(failure, kind) for failure in failures)]
    return (kinds[0] if kinds else NotSupported)(words)
