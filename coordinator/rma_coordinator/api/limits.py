"""What a key may ask for, at the door: whoever asks for more is told so, and when it may ask again.

A key without limits passes with two looks. Under /v1 the answers to the others say what is left, as OpenAI's do.
"""

from __future__ import annotations

import math
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from rma_coordinator.api.problems import HTTPProblem
from rma_coordinator.domain.limits import Estimate, Over, Reservation, by_size, counted, estimate

if TYPE_CHECKING:
    from rma_coordinator.api.asgi import Call
    from rma_coordinator.domain.credentials import Principal
    from rma_coordinator.domain.limits import Limits
    from rma_coordinator.pool import Pool

#: Where the scope of a call has what is limited of its key.
METERED = "rma.metered"
SECOND_MS = 1000


class OverLimit(HTTPProblem):
    """A request that its key may not make, not now or never."""

    def __init__(self, status: int, message: str, *, code: str, retry_after_s: float | None, again: bool) -> None:
        headers = {} if again else {"x-should-retry": "false"}
        super().__init__(status, message, code=code, retry_after_s=retry_after_s, headers=headers)


class Metered:
    """One call of a key that has limits: what was reserved for it, and what is left."""

    def __init__(self, pool: Pool, key: str, limits: Limits) -> None:
        self._pool, self._key, self._limits = pool, key, limits
        self._estimate = Estimate(0, 0)
        self._reservation: Reservation | None = None

    def take(self, data: bytes | None) -> None:
        """Take a request, and the tokens of one whose body is given. Raises OverLimit."""
        if data is not None and self._limits.tokens_per_minute is not None:
            self._estimate = estimate(data)
        self._reservation = take(self._pool, self._key, self._limits, tokens=self._estimate.total)

    def settle(self, tokens: int) -> None:
        """Take what the request really needed; only the first word counts."""
        reservation, self._reservation = self._reservation, None
        if reservation is not None:
            reservation.settle(tokens, self._pool.clock())

    def delivered(self, tokens: int) -> None:
        """Take what the request sent and got, where no engine has counted it."""
        self.settle(self._estimate.prompt + tokens)

    def headers(self) -> dict[str, str]:
        """Return what is left of each rule, as OpenAI writes it."""
        found: dict[str, str] = {}
        for what, left in self._pool.limiter.left(self._key, self._limits, self._pool.clock()).items():
            found[f"x-ratelimit-limit-{what}"] = str(left.limit)
            found[f"x-ratelimit-remaining-{what}"] = str(left.remaining)
            found[f"x-ratelimit-reset-{what}"] = duration(left.reset_s)
        return found


# -- everywhere --------------------------------------------------------------------------------------------------------


def admit(pool: Pool, call: Call, principal: Principal, data: bytes | None = None) -> None:
    """Let a request in that runs something, and reserve the tokens of ``data``, where it is given. Raises OverLimit."""
    if pool.traffic.full:
        until, wait_s = _month_ends(pool)
        message = f"this pool has passed on all bytes of this month; more may pass from {until} on"
        raise OverLimit(503, message, code="pool_quota", retry_after_s=wait_s, again=False)
    if principal.limits is None:
        return
    most = principal.limits.bytes_per_month
    if most is not None and pool.traffic.of(principal.id).total >= most:
        until, wait_s = _month_ends(pool)
        message = f"this key has used up the bytes of this month; it has more from {until} on"
        raise OverLimit(429, message, code="insufficient_quota", retry_after_s=wait_s, again=False)
    know(pool, call, principal)
    call.scope[METERED].take(data)


def take(pool: Pool, key: str, limits: Limits, *, tokens: int, requests: int = 1) -> Reservation | None:
    """Take requests and tokens of a key. Raises OverLimit."""
    found = pool.limiter.admit(key, limits, pool.clock(), tokens=tokens, requests=requests)
    if isinstance(found, Over):
        raise _over(found)
    return found


def _month_ends(pool: Pool) -> tuple[str, float]:
    """Return when the month ends, in words, and in how many seconds."""
    ends_at = pool.traffic.ends_at
    return datetime.fromtimestamp(ends_at, UTC).strftime("%Y-%m-%d %H:%M UTC"), max(1.0, ends_at - pool.wall())


def _over(found: Over) -> OverLimit:
    if found.what == "requests":
        message = f"this key may make {found.limit} requests a minute, and has"
    elif found.retry_after_s is None:
        message = (
            f"this request takes about {found.wanted} tokens, and this key may use {found.limit} a minute: "
            "shorten it, or bound its answer with max_tokens"
        )
    else:
        message = f"this key may use {found.limit} tokens a minute; too few are left for the {found.wanted} of this one"
    again = found.retry_after_s is not None
    after_s = math.ceil(found.retry_after_s) if found.retry_after_s is not None else None
    return OverLimit(429, message, code="rate_limit_exceeded", retry_after_s=after_s, again=again)


# -- under /api/inference ----------------------------------------------------------------------------------------------


def reserve(pool: Pool, principal: Principal, task_id: str, body: bytes | None, *, size: int) -> None:
    """Reserve the tokens of a request to a language model until its task has ended; of a large one by its ``size``.

    Raises OverLimit.
    """
    if principal.limits is None or principal.limits.tokens_per_minute is None:
        return
    wanted = by_size(size) if body is None else estimate(body)
    taken = take(pool, principal.id, principal.limits, tokens=wanted.total, requests=0)
    if taken is not None:
        pool.reserved[task_id] = taken


# -- under /v1 ---------------------------------------------------------------------------------------------------------


def know(pool: Pool, call: Call, principal: Principal) -> Principal:
    """Note whose call it is, so that every answer to it can say what is left; return that."""
    if principal.limits is not None and METERED not in call.scope:
        call.scope[METERED] = Metered(pool, principal.id, principal.limits)
    return principal


def headers(call: Call) -> dict[str, str]:
    """Return what the answer to a call says of its key's limits; nothing where that has none."""
    metered: Metered | None = call.scope.get(METERED)
    return metered.headers() if metered is not None else {}


def failed(call: Call) -> None:
    """Nothing of an answer has been delivered: give back what was reserved."""
    if (metered := call.scope.get(METERED)) is not None:
        metered.settle(0)


def settle_whole(metered: Metered | None, usage: object) -> None:
    """Take what a whole answer says it used; an engine that does not say leaves it at what was reserved."""
    if metered is not None and (tokens := counted(usage)) is not None:
        metered.settle(tokens)


def settle_stream(metered: Metered | None, usage: object, delivered: int) -> None:
    """Take what a stream's engine says it used, else what was ``delivered``, in tokens, and what was sent."""
    if metered is None:
        return
    tokens = counted(usage)
    if tokens is None:
        metered.delivered(delivered)
    else:
        metered.settle(tokens)


def duration(seconds: float) -> str:
    """Return seconds as OpenAI writes them: `0s`, `20ms`, `1.5s`, `6m0s`; rounded up."""
    milliseconds = math.ceil(seconds * SECOND_MS)
    if milliseconds < SECOND_MS:
        return f"{milliseconds}ms" if milliseconds else "0s"
    minutes, rest = divmod(milliseconds, 60 * SECOND_MS)
    hours, minutes = divmod(minutes, 60)
    parts = [f"{hours}h"] if hours else []
    if hours or minutes:
        parts.append(f"{minutes}m")
    return "".join([*parts, f"{rest / SECOND_MS:g}s"])
