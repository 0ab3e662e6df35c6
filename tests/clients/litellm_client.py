"""Drives LiteLLM for tests: one request of the test's a line on stdin, one answer a line on stdout.

``{"id", "do", "params"}`` is answered by ``{"id", "value" or "error", "chunks"}``; ``{"do": "abort", "which"}`` leaves
an earlier request. Run by the python of LiteLLM's own environment.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from typing import Any

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"

import litellm  # type: ignore[import-not-found]  # its own environment has it

litellm.suppress_debug_info = True
litellm.telemetry = False

RUNNING: dict[int, asyncio.Task[None]] = {}


async def chat(params: dict[str, Any], _: list[Any], __: int) -> Any:
    return (await litellm.acompletion(**params)).model_dump()


async def stream(params: dict[str, Any], chunks: list[Any], stop_after: int) -> Any:
    answer = await litellm.acompletion(**params, stream=True)
    async for chunk in answer:
        chunks.append(chunk.model_dump())
        if stop_after and len(chunks) >= stop_after:
            await answer.aclose()
            break
    return None


async def embed(params: dict[str, Any], _: list[Any], __: int) -> Any:
    return (await litellm.aembedding(**params)).model_dump()


async def models(params: dict[str, Any], _: list[Any], __: int) -> Any:
    return await asyncio.to_thread(litellm.get_valid_models, check_provider_endpoint=True, **params)


ACTS = {"chat": chat, "stream": stream, "embed": embed, "models": models}


def told(error: Exception) -> dict[str, Any]:
    names = ("status_code", "code", "param", "type", "body")
    found = {name: getattr(error, name, None) for name in names}
    headers = getattr(getattr(error, "response", None), "headers", None) or {}
    kinds = [kind.__name__ for kind in type(error).__mro__]
    return {"kinds": kinds, "message": str(error), "request_id": headers.get("x-request-id"), **found}


async def serve(asked: dict[str, Any]) -> None:
    chunks: list[Any] = []
    answer: dict[str, Any]
    try:
        act = ACTS[asked["do"]]
        answer = {"value": await act(asked["params"], chunks, asked.get("stop_after") or 0)}
    except asyncio.CancelledError:
        answer = {"error": {"kinds": ["CancelledError"]}}
    except Exception as error:  # noqa: BLE001 - whatever it raises is what the test looks at
        answer = {"error": told(error)}
    sys.stdout.write(json.dumps({"id": asked["id"], "chunks": chunks, **answer}, default=str) + "\n")
    sys.stdout.flush()


async def main() -> None:
    loop = asyncio.get_running_loop()
    while line := await loop.run_in_executor(None, sys.stdin.readline):
        asked = json.loads(line)
        if asked["do"] == "abort":
            RUNNING[asked["which"]].cancel()
        else:
            RUNNING[asked["id"]] = asyncio.create_task(serve(asked))


if __name__ == "__main__":
    asyncio.run(main())
