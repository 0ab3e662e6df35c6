"""Belonging to a pool: registered, unreachable or forgotten, and back again by itself."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Literal

from rma_core.backoff import Backoff
from rma_core.errors import CoordinatorError, CoordinatorUnreachable, NotAuthenticated, NotFound, TryLater

if TYPE_CHECKING:
    from collections.abc import Callable

    from rma_core.agent.client import CoordinatorClient
    from rma_core.models.worker import RegisterRequest, RegisterResponse

logger = logging.getLogger(__name__)

Standing = Literal["joining", "registered", "unreachable", "unknown", "refused"]

#: Messages of the coordinator that are remembered.
MAX_MESSAGES = 64

UNKNOWN = "the coordinator does not know this machine"


class Link:
    """Whether the coordinator can be spoken to; a change is logged once, however many calls notice it."""

    def __init__(self, client: CoordinatorClient) -> None:
        self._client = client
        self.standing: Standing = "joining"
        self.reason = ""

    def up(self) -> None:
        """A call was answered well."""
        if self.standing != "registered":
            back = "" if self.standing == "joining" else " again"
            words = "%s is registered with the coordinator%s, at %s"
            about = {"action": "link_up", "worker": self._client.worker_id}
            logger.info(words, self._client.worker_id, back, self._client.base_url, extra=about)
        self.standing, self.reason = "registered", ""

    def failed(self, error: CoordinatorError) -> None:
        """A call was not answered, or refused."""
        away = isinstance(error, CoordinatorUnreachable | TryLater)
        self.down("unreachable" if away else "refused", error.message)

    def down(self, standing: Standing, reason: str) -> None:
        """A call failed."""
        if self.standing != standing:
            about = {"action": f"link_{standing}", "worker": self._client.worker_id or None}
            logger.warning("%s; trying again, less and less often", reason, extra=about)
        self.standing, self.reason = standing, reason


class Messages:
    """What the coordinator has to say to the owner of this machine, each message once."""

    def __init__(self) -> None:
        self._said: dict[str, None] = {}

    def say(self, message: str) -> None:
        """Show a message, unless it was shown before."""
        if message not in self._said:
            logger.info("the coordinator says: %s", message[:500], extra={"action": "message"})
            self._said[message] = None
            if len(self._said) > MAX_MESSAGES:
                del self._said[next(iter(self._said))]


class Membership:
    """Keeps this worker registered; ``accepted`` is told every answer."""

    def __init__(
        self,
        client: CoordinatorClient,
        request: Callable[[], RegisterRequest],
        accepted: Callable[[RegisterResponse], None],
        *,
        link: Link,
        join_token: str = "",
        backoff: Backoff | None = None,
    ) -> None:
        self._client, self._request, self._accepted = client, request, accepted
        self._link, self._join_token = link, join_token
        self._backoff = backoff or Backoff()
        self._forgotten = asyncio.Event()
        #: Set while registered, as far as is known.
        self.registered = asyncio.Event()

    def forgotten(self) -> None:
        """A call was refused because the coordinator does not know this worker."""
        if self.registered.is_set():
            self.registered.clear()
            self._forgotten.set()

    async def run(self) -> None:
        """Stay registered until cancelled."""
        while True:
            self._accepted(await self._until_registered())
            self._link.up()
            self._backoff.reset()
            self._forgotten.clear()
            self.registered.set()
            await self._forgotten.wait()

    async def _until_registered(self) -> RegisterResponse:
        while True:
            retry_after_s = None
            try:
                return await self._once()
            except (NotAuthenticated, NotFound) as error:
                again = f"`rma join {self._client.base_url} TOKEN` enrols it again"
                self._link.down("unknown", f"{UNKNOWN} ({error}); {again}")
            except CoordinatorError as error:
                retry_after_s = error.retry_after_s if isinstance(error, TryLater) else None
                self._link.failed(error)
            await asyncio.sleep(self._backoff.next_s(retry_after_s))

    async def _once(self) -> RegisterResponse:
        """Register by key; where that is not known, with the join token of an unattended start."""
        if self._client.worker_id:
            try:
                return await self._client.register(self._request())
            except (NotAuthenticated, NotFound):
                if not self._join_token:
                    raise
        return await self._client.register(self._request(), join_token=self._join_token)
