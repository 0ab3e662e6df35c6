"""Starting the agent: settings and state folder in, a running agent out, signals turned into a drain."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import sys
from typing import TYPE_CHECKING

import msgspec

from rma_core import http
from rma_core.agent.attach.attachable import addresses
from rma_core.agent.attach.nearby import find
from rma_core.agent.consent import Consent
from rma_core.agent.detecting import Detecting
from rma_core.agent.join import enrol, invited, registration
from rma_core.agent.lifecycle import Agent
from rma_core.agent.llm.own_models import own_files
from rma_core.agent.state import StateFolder
from rma_core.errors import UsageProblem

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterator

    from rma_core.agent.keys import DeviceKey
    from rma_core.agent.state import WorkerRecord
    from rma_core.host import Plugins, PluginTables
    from rma_core.models.hardware import HardwareReport
    from rma_core.settings import AgentSettings

logger = logging.getLogger(__name__)

#: What an unattended start or `rma up` agrees to: the owner's own words, in a setting or on the command line.
EVERYTHING = Consent(everything=True)


async def run_agent(
    settings: AgentSettings,
    *,
    plugins: Plugins | None = None,
    again: Callable[[], AgentSettings] | None = None,
    consent: Consent | None = None,
    handle_signals: bool = True,
    use_channel: bool = True,
    ready: Callable[[Agent], None] = lambda _: None,
) -> None:
    """Run the agent until it is stopped by a signal, `Agent.stop` or ``rma drain``.

    A machine that is not enrolled yet enrols with ``settings.join_token``, agreeing to ``consent`` (by default to what
    ``settings.services`` lists, or to whatever the pool chooses). ``again`` reads the settings anew for each further
    look at the hardware. ``ready`` is given the agent before it works.
    Raises UsageProblem when there is no coordinator to work for, or when what is attached is elsewhere;
    SettingProblem for an unusable state folder.
    """
    # Before anything is detected or kept: a wrong address or file is the owner's to mend.
    addresses(settings.attach)
    own_files(settings.models)
    os.umask(0o077)
    detecting = Detecting(settings, plugins, again=again)
    runtimes = detecting.plugins.runtimes(plugin_tables(settings))
    async with opened(settings, detecting.look, consent=consent) as (folder, record, key, report):
        agent = Agent(
            settings,
            folder,
            record,
            key,
            report=report,
            runtimes=runtimes,
            plugins=detecting.reports,
            look=detecting.look,
            use_channel=use_channel,
        )
        ready(agent)
        with _signals(agent) if handle_signals else contextlib.nullcontext():
            await tell_found(settings, record.coordinator_url)
            await agent.run()


async def tell_found(settings: AgentSettings, coordinator_url: str) -> None:
    """Log which model servers run here and are not shared; nobody shares them but the owner."""
    if settings.find_model_servers:
        for one in await find((*settings.attach, coordinator_url)):
            words = "%s is not shared; to share it: --attach %s"
            logger.info(words, one.words(), one.url, extra={"action": "attachable"})


def plugin_tables(settings: AgentSettings) -> PluginTables:
    """Return the plugins' tables, the runtimes' completed by what the agent itself was told."""
    told: dict[str, dict[str, object]] = {name: {"home": str(settings.home_path)} for name in settings.runtimes}
    told["process"] = {"home": str(settings.home_path), "sources": settings.service_sources}
    return {**settings.plugins, **{name: table | settings.plugins.get(name, {}) for name, table in told.items()}}


@contextlib.asynccontextmanager
async def opened(
    settings: AgentSettings,
    detect: Callable[[], Awaitable[HardwareReport]],
    *,
    consent: Consent | None = None,
) -> AsyncIterator[tuple[StateFolder, WorkerRecord, DeviceKey, HardwareReport]]:
    """Open the state folder for one agent, with a record and a key in it; enrol first where there are none."""
    folder = StateFolder(settings.home_path)
    # Looked at before anything is made: a start by mistake leaves nothing behind.
    enrolled = settings.home_path.exists() and folder.load_record() is not None and folder.load_key() is not None
    if not enrolled and not (settings.coordinator_url and settings.join_token):
        raise UsageProblem(
            "this machine has not joined a pool yet",
            hints=("rma join URL TOKEN", "or set RMA_COORDINATOR_URL and RMA_JOIN_TOKEN for an unattended start"),
        )
    folder.prepare()
    folder.lock()
    try:
        report = await detect()
        if not enrolled:
            await _enrol(settings, folder, report, consent)
        record, key = _moved(folder, settings, consent), folder.load_key()
        assert key is not None  # noqa: S101 - just enrolled
        yield folder, record, key, report
    finally:
        folder.unlock()


async def _enrol(settings: AgentSettings, folder: StateFolder, report: HardwareReport, consent: Consent | None) -> None:
    invitation = await invited(settings.coordinator_url, settings.join_token, insecure_http=settings.insecure_http)
    agreed = consent or EVERYTHING.narrowed(settings.services)
    request = registration(
        report, services=agreed.names, agreed_models=agreed.model_names, labels=settings.labels
    )  # fmt: skip
    answer = await enrol(invitation, request, folder, consent=agreed)
    logger.info(
        "enrolled as %s at %s",
        answer.worker_id,
        invitation.url,
        extra={"action": "enrolled", "worker": answer.worker_id},
    )


def _moved(folder: StateFolder, settings: AgentSettings, consent: Consent | None) -> WorkerRecord:
    """Return the record, with the address and consent that the owner gives now."""
    record = folder.load_record()
    assert record is not None  # noqa: S101 - enrolled
    url = settings.coordinator_url or record.coordinator_url
    insecure = settings.insecure_http or record.insecure_http
    url = http.check_url(url, insecure_http=insecure)
    changed = msgspec.structs.replace(record, coordinator_url=url, consent=consent or record.consent)
    if changed != record:
        folder.save_record(changed)
    return changed


@contextlib.contextmanager
def _signals(agent: Agent) -> Iterator[None]:
    """Drain on SIGTERM and SIGINT; the second one ends the waiting."""
    loop = asyncio.get_running_loop()
    wanted = [signal.SIGTERM, signal.SIGINT]
    if sys.platform == "win32":
        # No signal handlers in the loop there: Python's own run between two of its steps.
        wanted.append(signal.SIGBREAK)
        before = {number: signal.signal(number, lambda *_: loop.call_soon_threadsafe(agent.stop)) for number in wanted}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
    else:
        for number in wanted:
            loop.add_signal_handler(number, agent.stop)
        try:
            yield
        finally:
            for number in wanted:
                loop.remove_signal_handler(number)
