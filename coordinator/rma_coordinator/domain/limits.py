"""How much a key may ask for in a minute: requests, and tokens of language models. Pure, given the time.

The generic cell rate algorithm (GCRA, ITU-T I.371): of each rule one number is kept, the moment at which all that was
taken will have been given back. A minute's worth may be taken at once, and comes back evenly. Tokens are reserved when
a request is admitted, for nobody knows yet how many it takes, and settled when its engine has counted them.
"""

from __future__ import annotations

from collections import OrderedDict
from itertools import islice
from typing import Annotated, Any, NamedTuple

import msgspec
from msgspec import Meta

MINUTE_S = 60.0
#: Keys whose state is kept, about 300 bytes each; who has taken nothing for a minute is forgotten first.
MOST_KEYS = 50_000
#: Of them, how many are looked at when there is no room for another.
FORGOTTEN_AT_ONCE = 64
#: Seconds that floats may be wrong by after years: a minute's worth is a minute's worth, however it is divided.
ROUNDING_S = 1e-3
#: An answer that was longer than its reservation holds up its key for this long at most: a stranger has counted it.
MOST_DEBT_S = 600.0
#: Characters of a token, until an engine has counted; what a picture or a recording is taken for.
TOKEN_CHARACTERS = 4
MEDIA_TOKENS = 768
#: Tokens of an answer whose request does not bound it.
ANSWER_TOKENS = 256
#: Parts of a message that are none of its text.
MEDIA = ("image_url", "input_audio", "audio", "file", "input_image", "video_url")

Count = Annotated[int, Meta(ge=1, le=2**53)]


class Limits(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What a key may ask for; ``None`` is as much as it likes. Bytes are counted by the calendar month, in UTC."""

    requests_per_minute: Count | None = None
    tokens_per_minute: Count | None = None
    bytes_per_month: Count | None = None

    def __bool__(self) -> bool:
        return self != NONE


#: Of a key that may ask for as much as it likes.
NONE = Limits()


class Left(NamedTuple):
    """How one rule stands: what it allows, how much of that could be taken now, seconds until all of it could be."""

    limit: int
    remaining: int
    reset_s: float


class Over(NamedTuple):
    """A rule that a request would break: what it counts, and when that could be taken; ``None`` for never."""

    what: str
    limit: int
    wanted: int
    retry_after_s: float | None


def decide(full_at: float, now: float, *, limit: int, wanted: int) -> tuple[float, float]:
    """Return when all would be given back if so much was taken now, and how many seconds too early that is.

    Not too early (0 or less) means that it may be taken. ``full_at`` is what was returned when the last was taken.
    """
    after = max(full_at, now) + wanted * MINUTE_S / limit
    return after, after - now - MINUTE_S - ROUNDING_S


class Bucket:
    """What one key has taken: when its requests, and its tokens, will all have been given back."""

    __slots__ = ("requests_at", "tokens_at")

    def __init__(self) -> None:
        self.requests_at = self.tokens_at = 0.0

    def idle(self, now: float) -> bool:
        """Say whether forgetting it would give nobody anything."""
        return self.requests_at <= now and self.tokens_at <= now


class Reservation(NamedTuple):
    """Tokens that were taken for a request, ``at`` a time at which nobody could know how many it needs."""

    bucket: Bucket
    limit: int
    tokens: int
    at: float

    def settle(self, tokens: int, now: float) -> None:
        """Take what it really needed instead; a longer answer delays what comes next, within bounds.

        What was reserved too much is given back as far as time has not done so: the bucket would have been empty for
        at most as long as the request took, less what its own tokens take to come back.
        """
        bucket, each_s = self.bucket, MINUTE_S / self.limit
        if tokens > self.tokens:
            latest = max(bucket.tokens_at, now + MINUTE_S + MOST_DEBT_S)
            bucket.tokens_at = min(max(bucket.tokens_at, now) + (tokens - self.tokens) * each_s, latest)
        else:
            still = self.tokens * each_s - (now - self.at)
            bucket.tokens_at -= max(0.0, min((self.tokens - tokens) * each_s, still))


class Limiter:
    """What every key that has limits has taken of them."""

    def __init__(self, most: int = MOST_KEYS) -> None:
        self._most = most
        self._buckets: OrderedDict[str, Bucket] = OrderedDict()

    def admit(
        self, key: str, limits: Limits, now: float, *, tokens: int = 0, requests: int = 1
    ) -> Reservation | Over | None:
        """Take requests, and reserve ``tokens``, where they are limited; of what one rule forbids nothing is taken."""
        most_requests, most_tokens = limits.requests_per_minute, limits.tokens_per_minute
        if most_requests is None and (most_tokens is None or not tokens):
            return None
        bucket = self._bucket(key, now)
        requests_at, tokens_at = bucket.requests_at, bucket.tokens_at
        if most_requests is not None and requests:
            requests_at, early_s = decide(requests_at, now, limit=most_requests, wanted=requests)
            if early_s > 0:
                return Over("requests", most_requests, requests, early_s)
        if most_tokens is not None and tokens:
            if tokens > most_tokens:
                return Over("tokens", most_tokens, tokens, None)
            tokens_at, early_s = decide(tokens_at, now, limit=most_tokens, wanted=tokens)
            if early_s > 0:
                return Over("tokens", most_tokens, tokens, early_s)
        bucket.requests_at, bucket.tokens_at = requests_at, tokens_at
        return None if most_tokens is None or not tokens else Reservation(bucket, most_tokens, tokens, now)

    def left(self, key: str, limits: Limits, now: float) -> dict[str, Left]:
        """Return how each rule of a key stands, by what it counts."""
        bucket = self._buckets.get(key) or Bucket()
        rules = {
            "requests": (limits.requests_per_minute, bucket.requests_at),
            "tokens": (limits.tokens_per_minute, bucket.tokens_at),
        }
        return {what: _left(limit, full_at, now) for what, (limit, full_at) in rules.items() if limit is not None}

    def forget(self, key: str) -> None:
        """Forget a key that was revoked."""
        self._buckets.pop(key, None)

    def _bucket(self, key: str, now: float) -> Bucket:
        bucket = self._buckets.get(key)
        if bucket is None:
            if len(self._buckets) >= self._most:
                self._make_room(now)
            bucket = self._buckets[key] = Bucket()
        self._buckets.move_to_end(key)
        return bucket

    def _make_room(self, now: float) -> None:
        """Forget whoever took something the longest time ago; of those that are all given back, some at once."""
        self._buckets.popitem(last=False)
        for key in list(islice(self._buckets, FORGOTTEN_AT_ONCE)):
            if self._buckets[key].idle(now):
                del self._buckets[key]


def _left(limit: int, full_at: float, now: float) -> Left:
    reset_s = max(0.0, full_at - now)
    remaining = int((MINUTE_S + ROUNDING_S - reset_s) * limit / MINUTE_S)
    return Left(limit, max(0, min(limit, remaining)), reset_s)


# -- tokens that nobody has counted yet --------------------------------------------------------------------------------


class _Asked(msgspec.Struct, frozen=True, kw_only=True):
    """What of a request to a language model is read to estimate it."""

    messages: Any = None
    prompt: Any = None
    input: Any = None
    tools: Any = None
    max_completion_tokens: Any = None
    max_tokens: Any = None


class Estimate(NamedTuple):
    """About how many tokens a request needs: those that it sends, and those that it may be answered with."""

    prompt: int
    answer: int

    @property
    def total(self) -> int:
        """All of them."""
        return self.prompt + self.answer


def estimate(body: bytes) -> Estimate:
    """Return about how many tokens a request to a language model needs; of what is none, by its length."""
    try:
        asked = msgspec.json.decode(body, type=_Asked)
    except (msgspec.MsgspecError, UnicodeError, RecursionError):
        return by_size(len(body))
    prompt = _weight([asked.messages, asked.prompt, asked.input, asked.tools])
    if asked.input is not None and asked.messages is None and asked.prompt is None:
        # Vectors are not made of tokens.
        return Estimate(prompt, 0)
    bounds = (asked.max_completion_tokens, asked.max_tokens)
    answer = next((one for one in bounds if type(one) is int and one >= 0), ANSWER_TOKENS)
    return Estimate(prompt, answer)


def by_size(size: int) -> Estimate:
    """Return about how many tokens a request of so many bytes needs."""
    return Estimate(_tokens(size), ANSWER_TOKENS)


def _weight(value: object) -> int:
    """Return about how many tokens there are in plain data: its texts by their characters, a number is one."""
    characters, tokens, todo = 0, 0, [value]
    while todo:
        one = todo.pop()
        if isinstance(one, str):
            characters += len(one)
        elif isinstance(one, dict):
            media = any(name in one for name in MEDIA)
            tokens += MEDIA_TOKENS * media
            todo += [one["text"]] if media and "text" in one else [] if media else one.values()
        elif isinstance(one, list):
            todo += one
        elif isinstance(one, int):
            tokens += 1
    return tokens + _tokens(characters)


def _tokens(characters: int) -> int:
    return -(-characters // TOKEN_CHARACTERS)


def counted(usage: object) -> int | None:
    """Return how many tokens an engine says that it used; ``None`` where it says nothing that could be believed."""
    if not isinstance(usage, dict):
        return None
    total = _number(usage.get("total_tokens"))
    parts = [_number(usage.get(name)) for name in ("prompt_tokens", "completion_tokens")]
    known = [part for part in parts if part is not None]
    return sum(known) if known else total


def _number(value: object) -> int | None:
    """Return a count as engines and workers write it."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 2**53:
        return None
    return int(value)
