"""Bodies that only admins and the sign-on use."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from rma_coordinator.domain.limits import Count
from rma_coordinator.domain.rollout import Steps
from rma_core.models.worker import OwnerName
from rma_core.policy_file import Text as PolicyText

Label = Annotated[str, Meta(max_length=100)]
#: Ninety days: long enough to be no nuisance, short enough that a lost key ends.
KEY_TTL_S = 90 * 86_400.0
TOKEN_TTL_S = 3600.0


class NonceAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """What a proof must contain: a nonce that is good for a minute, and the pool's name."""

    nonce: str
    issuer: str


class KeyRequest(msgspec.Struct, frozen=True, kw_only=True):
    """A key to be made; ``ttl_s`` of ``None`` means that it does not expire."""

    kind: Literal["admin", "client"] = "client"
    label: Label = ""
    scopes: Annotated[tuple[Label, ...], Meta(max_length=32)] = ("infer:*",)
    ttl_s: Annotated[float, Meta(ge=60, le=315_360_000)] | None = KEY_TTL_S
    #: How much it may ask for; ``None`` is as much as it likes.
    requests_per_minute: Count | None = None
    tokens_per_minute: Count | None = None
    bytes_per_month: Count | None = None
    #: On whose machines its requests come first.
    owner: OwnerName = ""


class WebhookSecretAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """A secret that signs a key's webhooks, shown this once; the one before it signs too until ``former_until``."""

    key_id: str
    secret: str
    former_until: str | None = None


class TokenMake(msgspec.Struct, frozen=True, kw_only=True):
    """A join token to be made."""

    label: Label = ""
    uses: Annotated[int, Meta(ge=1, le=1000)] = 1
    ttl_s: Annotated[float, Meta(ge=60, le=604_800)] = TOKEN_TTL_S
    #: Whose machines join with it.
    owner: OwnerName = ""


class WorkerOwner(msgspec.Struct, frozen=True, kw_only=True):
    """Whose machine a worker is; empty: nobody's in particular."""

    owner: OwnerName


class PolicyPreview(msgspec.Struct, frozen=True, kw_only=True):
    """Machines to put before a policy: hardware reports or bare capabilities; without any, the live fleet.

    The policy is an installed one, or a ``file`` that is no more than looked at, in TOML.
    """

    policy: Label = ""
    file: PolicyText = ""
    reports: Annotated[list[dict[str, Any]], Meta(max_length=100_000)] | None = None


class PolicyActivation(msgspec.Struct, frozen=True, kw_only=True):
    """A policy to be put in force: an installed one, or a ``file`` in TOML, of that name.

    ``plan`` is that of a preview: where the fleet or the policy has changed since, nothing is done.
    """

    policy: Annotated[str, Meta(min_length=1, max_length=100)]
    file: PolicyText = ""
    plan: Label = ""
    steps: Steps = msgspec.field(default_factory=Steps)


class PolicyRollback(msgspec.Struct, frozen=True, kw_only=True):
    """Which policy whoever asks believes in force; where it is another, nothing is done."""

    active: Label = ""


class PolicyShadow(msgspec.Struct, frozen=True, kw_only=True):
    """A policy to be asked beside the one in force: an installed one, or a ``file`` in TOML, of that name."""

    policy: Annotated[str, Meta(min_length=1, max_length=100)]
    file: PolicyText = ""


class RulesPreview(msgspec.Struct, frozen=True, kw_only=True):
    """Rules of placement that are no more than looked at, in TOML."""

    file: PolicyText


class RulesApplied(msgspec.Struct, frozen=True, kw_only=True):
    """Rules of placement to be put in force, in TOML.

    ``plan`` is that of a preview: where the fleet has changed since, nothing is done.
    """

    file: PolicyText
    plan: Label = ""


# -- OpenAI's requests: what is looked at; everything else goes on as it came -------------------------------------

AskedModel = Annotated[str, Meta(min_length=1, max_length=200)]
#: One choice an answer: more would be as many runs.
OneChoice = Annotated[int, Meta(ge=1, le=1)]


class StreamOptions(msgspec.Struct, frozen=True, kw_only=True):
    """What a stream should have beside the answer."""

    include_usage: bool | None = None


class ChatCompletionRequest(msgspec.Struct, frozen=True, kw_only=True):
    """A chat; every other field of OpenAI's API goes to the model server as it is."""

    model: AskedModel
    messages: Annotated[list[dict[str, Any]], Meta(min_length=1)]
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: OneChoice | None = None
    tools: list[dict[str, Any]] | None = None
    max_tokens: Any = None
    max_completion_tokens: Any = None


class CompletionRequest(msgspec.Struct, frozen=True, kw_only=True):
    """A text to go on from; every other field of OpenAI's API goes to the model server as it is."""

    model: AskedModel
    prompt: str | list[Any]
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: OneChoice | None = None
    max_tokens: Any = None


class EmbeddingRequest(msgspec.Struct, frozen=True, kw_only=True):
    """Texts to be embedded; every other field of OpenAI's API goes to the model server as it is."""

    model: AskedModel
    input: str | list[Any]
    encoding_format: Literal["float", "base64"] | None = None
