"""Enrolment: from an address and a join token to a worker's record, with the owner's consent between."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import rma_core
from rma_core import http, tls
from rma_core.agent.client import CoordinatorClient
from rma_core.agent.keys import DeviceKey
from rma_core.agent.state import WorkerRecord
from rma_core.models.worker import RegisterRequest

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from rma_core.agent.consent import Consent
    from rma_core.agent.state import StateFolder
    from rma_core.models.hardware import HardwareReport
    from rma_core.models.worker import PluginReport, RegisterResponse, RuntimeReport


class Invitation(NamedTuple):
    """Where to enrol, with which secret, and whom to trust there: ``certificate`` is the pinned one, or empty."""

    url: str
    secret: str
    certificate: str
    insecure_http: bool

    def client(self, key: DeviceKey) -> CoordinatorClient:
        """Return a client for enrolment; close it."""
        context = tls.pinned_context(self.certificate) if self.certificate else None
        return CoordinatorClient(self.url, key, context=context)


async def invited(url: str, join_token: str, *, insecure_http: bool = False) -> Invitation:
    """Return a checked invitation; a pinned certificate is fetched and compared before anything else is sent.

    Raises UsageProblem for an address or token that cannot be one, CoordinatorUnreachable for a foreign certificate.
    """
    url = http.check_url(url, insecure_http=insecure_http)
    token = tls.split_token(join_token)
    certificate = await tls.fetch_pinned(url, token.pin) if token.pin else ""
    return Invitation(url, token.secret, certificate, insecure_http)


def registration(
    report: HardwareReport,
    *,
    runtimes: Iterable[RuntimeReport] = (),
    plugins: Iterable[PluginReport] = (),
    services: tuple[str, ...] | None = None,
    agreed_models: tuple[str, ...] | None = None,
    own_models: Iterable[str] = (),
    labels: Mapping[str, str] | None = None,
) -> RegisterRequest:
    """Return what this machine tells a coordinator about itself."""
    return RegisterRequest(
        capabilities=report.capabilities,
        report=report,
        agent_version=rma_core.__version__,
        runtimes=tuple(runtimes),
        plugins=tuple(plugins),
        services=services,
        agreed_models=agreed_models,
        own_models=tuple(own_models)[:64],
        labels=dict(labels or {}),
    )


async def preview(invitation: Invitation, request: RegisterRequest) -> RegisterResponse:
    """Ask what the pool would make of this machine; nothing is kept on either side."""
    client = invitation.client(DeviceKey.generate())
    try:
        return await client.register(request, join_token=invitation.secret, preview=True)
    finally:
        await client.aclose()


async def enrol(
    invitation: Invitation, request: RegisterRequest, folder: StateFolder, *, consent: Consent
) -> RegisterResponse:
    """Register this machine and keep its key and record; on a refusal nothing new stays behind.

    The folder is prepared; a machine that has a key keeps it, and so its name in the pool.
    """
    known = folder.load_key()
    key = known or DeviceKey.generate()
    client = invitation.client(key)
    try:
        if known is None:
            # Before the call: if the answer is lost, the same key gets the same answer again.
            folder.save_key(key)
        answer = await client.register(request, join_token=invitation.secret)
    except BaseException:
        if known is None:
            folder.forget()
        raise
    finally:
        await client.aclose()
    folder.save_record(
        WorkerRecord(
            worker_id=answer.worker_id,
            coordinator_url=invitation.url,
            certificate=invitation.certificate,
            insecure_http=invitation.insecure_http,
            consent=consent,
        )
    )
    return answer
