"""What `rma up` prints: how services get ready, requests that work when pasted, and where."""

from __future__ import annotations

import json
import shutil
from importlib.resources import files
from typing import TYPE_CHECKING

from rma_core.models.sizes import duration
from rma_core.models.worker import ATTACHED

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from rma_core.models.worker import ContainerStatus

#: The service of the printed request: when it answers, `rma up` is ready, and others may still be on their way.
EXAMPLE = "notes"


def name(status: ContainerStatus) -> str:
    """Return what a service is called on the screen: with its model where it serves one of its own."""
    if status.runtime == ATTACHED:
        return status.name
    return f"{status.service} {status.models[0].name}" if status.models else status.service


def words(status: ContainerStatus) -> str:
    """Return how a service stands, and why."""
    if status.runtime == ATTACHED and status.state == "healthy":
        return status.reason
    done = f" {status.progress:.0%}" if status.progress else ""
    where = f" ({status.runtime}{'' if status.isolated else ', not isolated'})" if status.state == "healthy" else ""
    said = f"{status.state}{done}{where}" + (f": {status.reason}" if status.reason else "")
    loading = next((one for one in status.models if one.state == "loading" and status.state == "starting"), None)
    left = f", about {duration(loading.eta_s)} left" if loading is not None and loading.eta_s is not None else ""
    return said + left


def examples(statuses: Iterable[ContainerStatus], *, url: str, key: str, folder: Path) -> list[str]:
    """Return requests that work when pasted, for what answers now."""
    healthy = [status for status in statuses if status.state == "healthy"]
    lines = []
    if any(status.service == EXAMPLE for status in healthy):
        lines += [f"  {_document(url, key, folder)}", "  rma infer notes YOUR.pdf"]
    if model := next((model.name for status in healthy for model in status.models), ""):
        asked = json.dumps({"model": model, "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 200})
        sent = f"curl -s -H 'Authorization: Bearer {key}' -H 'Content-Type: application/json'"
        lines.append(f"  {sent} -d '{asked}' {url}/v1/chat/completions")
    return ["", "Try it:", *lines] if lines else []


def _document(url: str, key: str, folder: Path) -> str:
    sample = folder / "sample.pdf"
    shutil.copyfile(str(files("rma_coordinator") / "static" / "sample.pdf"), sample)
    return (
        f"curl -s -H 'Authorization: Bearer {key}' -H 'Content-Type: application/pdf' "
        f"--data-binary @{sample} {url}/api/inference/notes"
    )
