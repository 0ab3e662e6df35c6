"""Two real model servers with the same weights: what one began the other ends, and nobody can tell."""

from __future__ import annotations

import contextlib
import json
import random
from typing import TYPE_CHECKING, Any

import pytest

from rma_coordinator.domain.continuing import Delivered, Seam, continued, decide
from tests.model_servers import SOLID, SOLID_PROMPT, ModelServer, events, serving
from tests.needs import need

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator

#: Tokens of an uncut answer, and how many of its places are cut.
TOKENS, CUTS = 120, 30
CHAT, PLAIN = "/v1/chat/completions", "/v1/completions"


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[ModelServer]]:
    need("llama")
    with serving(tmp_path_factory.mktemp("servers"), count=2) as two:
        yield two


def asked(path: str, **options: Any) -> bytes:
    says = {"messages": [{"role": "user", "content": SOLID[0]}]} if path == CHAT else {"prompt": SOLID_PROMPT}
    whole = {"model": "tiny", **says, "max_tokens": TOKENS, "temperature": 0, "stream": True, "seed": 7}
    return json.dumps({**whole, "stream_options": {"include_usage": True}, **options}).encode()


def streamed(server: ModelServer, path: str, body: bytes) -> Generator[dict[str, Any]]:
    """Give the events of an answer; who stops reading closes the connection."""
    with contextlib.closing(server.send(path, body)) as connection:
        yield from events(connection.getresponse())


def said(chunks: list[dict[str, Any]]) -> str:
    choices = [choice for chunk in chunks for choice in chunk["choices"]]
    return "".join(choice.get("delta", choice).get("content") or choice.get("text") or "" for choice in choices)


def facts(chunks: list[dict[str, Any]]) -> tuple[Any, ...]:
    """Return what has to be the same however often an answer was cut."""
    choices = [choice for chunk in chunks for choice in chunk["choices"]]
    roles = [choice["delta"]["role"] for choice in choices if choice.get("delta", {}).get("role")]
    ends = [choice["finish_reason"] for choice in choices if choice["finish_reason"]]
    counts = [
        (usage["prompt_tokens"], usage["completion_tokens"], usage["total_tokens"])
        for chunk in chunks
        if (usage := chunk.get("usage"))
    ]
    return said(chunks), roles, ends, counts


def through(servers: list[ModelServer], path: str, body: bytes, cuts: list[int]) -> list[dict[str, Any]]:
    """Return what a client gets when runs, in turn on each server, are left after so many events each."""
    answer, out = Delivered(), list[dict[str, Any]]()
    for turn, left in enumerate([*cuts, None]):
        if turn:
            assert decide(body, answer).outcome in ("restart", "continue")
        sent, seam = continued(body, answer), Seam(body, answer)
        with contextlib.closing(streamed(servers[turn % 2], path, sent)) as stream:
            for number, chunk in enumerate(stream):
                if number == left:
                    break
                out += seam.take(chunk)
    return out


@pytest.mark.parametrize("path", [CHAT, PLAIN])
def test_an_answer_cut_anywhere_is_ended_by_another_server_as_if_nothing_had_happened(
    servers: list[ModelServer], path: str
) -> None:
    body = asked(path)
    uncut = list(streamed(servers[0], path, body))
    text = said(uncut)
    assert len(text) == TOKENS
    begun = int(path == CHAT)
    # Behind white space the request differs from the text so far, so those places are cut too.
    spaces = [place + 1 + begun for place, one in enumerate(text) if one == " "]
    places = random.Random(5).sample(range(TOKENS + begun), CUTS)
    for place in {*places, *spaces}:
        cut = through(servers, path, body, [place])
        assert facts(cut) == facts(uncut), place
        # Not `created`: in a plain completion llama.cpp gives every event the time of its own.
        assert len({chunk["id"] for chunk in cut}) == 1


@pytest.mark.parametrize("path", [CHAT, PLAIN])
def test_an_answer_cut_again_and_again_is_still_the_same(servers: list[ModelServer], path: str) -> None:
    body = asked(path)
    uncut = list(streamed(servers[0], path, body))
    cut = through(servers, path, body, [13, 1, 30, 0, 22])
    assert facts(cut) == facts(uncut)


@pytest.mark.parametrize("path", [CHAT, PLAIN])
def test_a_stop_string_ends_a_cut_answer_where_it_ends_an_uncut_one(servers: list[ModelServer], path: str) -> None:
    text = said(list(streamed(servers[0], path, asked(path))))
    # It shows up in the middle for the first time, so that there is something to cut before it.
    stop = next(text[at : at + 4] for at in range(20, TOKENS) if text.index(text[at : at + 4]) == at)
    # With its count in every event, for several tokens come together where a stop string might have begun.
    body = asked(path, stop=[stop], timings_per_token=True)
    uncut = list(streamed(servers[0], path, body))
    assert said(uncut) == text[: text.index(stop)]
    for place in range(1, len(uncut) - 2):
        cut = through(servers, path, body, [place])
        assert facts(cut)[:3] == facts(uncut)[:3], place


def test_an_answer_goes_on_as_its_own_client_had_begun_it(servers: list[ModelServer]) -> None:
    messages = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Well, "}]
    body = asked(CHAT, messages=messages, continue_final_message=True, add_generation_prompt=False)
    uncut = list(streamed(servers[0], CHAT, body))
    assert facts(through(servers, CHAT, body, [40])) == facts(uncut)
