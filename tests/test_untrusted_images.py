"""Images that a pool does not trust run only where an engine keeps them apart and can limit all they take."""

from __future__ import annotations

import msgspec
import pytest

from rma_coordinator.domain.placement import place
from rma_core import diagnosis
from rma_core.agent.consent import Consent
from rma_core.agent.engines import in_order
from rma_core.agent.reconcile import Reconciler
from rma_core.catalog import CatalogEntry, ProcessForm
from rma_core.interfaces import RuntimeHealth
from rma_core.models.hardware import Capabilities, HardwareReport
from rma_core.models.worker import Assignment, RuntimeReport
from tests.agent_runtimes import MemoryRuntime

IMAGE = "ghcr.io/rma/notes-worker:latest"
FORM = ProcessForm(distribution="rma-notes", module="rma_notes")
ENTRY = CatalogEntry(
    service="notes", name="rma-notes", image=IMAGE, routes=("POST /notes",), tiers=(2,), process=FORM, trusted=False
)
MACHINE = HardwareReport(
    capabilities=Capabilities(cpu_cores=8, ram="16GB", storage="100GB", gpu_memory="0GB", gpu_type=""),
    devices=(),
    probes=(),
)
DOCKER = RuntimeReport(name="docker", isolated=True, state="healthy")
LOOSE = RuntimeReport(name="podman", isolated=True, state="healthy", cannot_limit=("memory", "pids"))
PROCESS = RuntimeReport(name="process", isolated=False, state="healthy")


class LooseRuntime(MemoryRuntime):
    """An engine that cannot limit memory."""

    async def probe(self) -> RuntimeHealth:
        return msgspec.structs.replace(await super().probe(), cannot_limit=("memory",))


def reason(*runtimes: RuntimeReport) -> str:
    return place((ENTRY,), MACHINE, 2, pool={}, runtimes=runtimes).reasons.get("notes", "")


def test_an_untrusted_image_is_placed_where_everything_can_be_limited() -> None:
    assert reason(DOCKER) == ""
    assert reason(LOOSE, DOCKER) == ""


@pytest.mark.parametrize("runtimes", [(LOOSE,), (LOOSE, PROCESS)])
def test_an_untrusted_image_is_not_placed_where_something_cannot_be_limited(
    runtimes: tuple[RuntimeReport, ...],
) -> None:
    assert (
        reason(*runtimes)
        == "its image is not trusted, and no engine here can limit it (podman cannot limit memory, pids)"
    )


def test_an_untrusted_image_is_no_process_and_goes_to_nobody_who_tells_of_no_engine() -> None:
    assert reason(PROCESS).startswith("no engine works here")
    assert "the worker told of none" in reason()


def test_a_trusted_image_runs_where_limits_are_missing() -> None:
    trusted = msgspec.structs.replace(ENTRY, trusted=True)
    placed = place((trusted,), MACHINE, 2, pool={}, runtimes=(LOOSE,))
    assert [assignment.trusted for assignment in placed.assignments] == [True]


async def test_the_agent_takes_the_engine_that_can_limit_and_no_other() -> None:
    loose, tight = LooseRuntime("podman"), MemoryRuntime("docker")
    assert await state_on(loose, tight) == ("healthy", "docker", "")
    assert loose.containers == {}
    assert len(tight.containers) == 1


async def test_the_agent_refuses_an_untrusted_image_where_nothing_can_limit_it() -> None:
    state, _, why = await state_on(LooseRuntime("podman"), MemoryRuntime("process", isolated=False))
    assert state != "healthy"
    assert "podman: the image of notes is not trusted, and this engine cannot limit memory" in why
    assert "process: the image of notes is not trusted, and this engine cannot keep it apart" in why


async def state_on(*runtimes: MemoryRuntime) -> tuple[str, str, str]:
    """Return state, runtime and reason of an untrusted image on a machine with these runtimes."""

    async def well(*_: object) -> str:
        return ""

    reconciler = Reconciler(
        in_order({runtime.name: runtime for runtime in runtimes}, [runtime.name for runtime in runtimes]),
        worker_id="worker-0123abcd",
        consent=Consent(everything=True),
        gpus=(),
        check=well,
    )
    wanted = Assignment(name="rma-notes", service="notes", image=IMAGE, port=8000, process=FORM, trusted=False)
    reconciler.want(1, [wanted])
    for _ in range(4):
        await reconciler.round()
    [status] = reconciler.statuses()
    return status.state, status.runtime, status.reason


def test_doctor_says_what_cannot_be_limited_and_what_that_means() -> None:
    health = RuntimeHealth(state="healthy", version="4.3.1", cannot_limit=("memory",))
    finding = diagnosis._of_runtime("podman", health, "4.3.1; Podman cannot limit memory of containers here")
    assert finding.level == "warning"
    assert "cannot limit memory" in finding.message
    assert "no images that its pool does not trust" in finding.advice
    tight = RuntimeHealth(state="healthy", version="4.3.1")
    assert diagnosis._of_runtime("podman", tight, "4.3.1").level == "ok"
