"""`rma models`: the models of the pool, and a new entry written from a file."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click
import msgspec

from rma_core.commands import common
from rma_core.models.sizes import duration, human

#: What stands above those fields of a new entry that a person should look at.
REMARKS = {
    "name": "What clients ask for.",
    "url": "Where workers get the file; without it only machines that have it already can serve the model.",
    "licence": "Shown to owners before anything is downloaded.",
    "context": "Tokens of one slot, requests at once, and copies that the pool would like.",
}


@click.group(invoke_without_command=True)
@common.pool_options
@common.json_option
@click.pass_context
def models(ctx: click.Context, /, as_json: bool, **options: Any) -> None:
    """List the pool's models: how they stand, what they take, and why one is nowhere; `describe` writes an entry."""
    ctx.obj = options
    if ctx.invoked_subcommand is not None:
        return
    found = common.call(options, "GET", "/api/admin/models")
    rows = [
        (
            m["model"],
            _state(m),
            m["workers"],
            f"{m['assigned']} of {m['wanted']}" if m["in_catalog"] else "-",
            human(m["size_bytes"]) if m["size_bytes"] else "-",
            human(m["memory_bytes"]) if m["memory_bytes"] else "-",
            m["licence"] or "-",
            m["reason"],
        )
        for m in found["models"]
    ]
    columns = ("model", "state", "workers", "assigned", "size", "takes", "licence", "why")
    empty = "No models yet. Write an entry from a file: rma models describe FILE.gguf"
    common.show(found, as_json, common.table(columns, rows, empty=empty))


def _state(model: dict[str, Any]) -> str:
    done = "" if model["progress"] is None else f" {model['progress']:.0%}"
    left = "" if model["eta_s"] is None else f", {duration(model['eta_s'])} left"
    return f"{model['state']}{done}{left}"


@models.command("describe")
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--name", help="What clients will ask for (default: the file's name).")
@click.option("--url", default="", help="Where workers get it (https).")
@click.option("--licence", "--license", default="unknown", help="Its licence, as owners are shown it.")
@common.json_option
def models_describe(file: Path, name: str | None, url: str, licence: str, as_json: bool) -> None:
    """Write the entry of a model from its GGUF file: hash, size, and what decides how much memory it takes.

    Put what is printed into the folder `models` of the pool's catalog, as NAME.toml. No pool is needed.
    """
    from rma_core import gguf, model_describe
    from rma_core.model_catalog import file_name

    found = gguf.read(file)
    shown = sys.stderr.isatty()

    def told(share: float) -> None:
        if shown:
            click.echo(f"\rreading {file.name}: {share:.0%}", err=True, nl=False)

    sha256 = model_describe.digest(file, told)
    if shown:
        click.echo(err=True)
    entry = model_describe.described(found, sha256=sha256, name=name or file_name(file.stem), url=url, licence=licence)
    if as_json:
        common.show(msgspec.to_builtins(entry), as_json, lambda _: None)
        return
    click.echo(model_describe.toml(entry, remarks=REMARKS), nl=False)
    estimate = entry.memory()
    common.say(f"{entry.name} takes {human(estimate.total_bytes)} in use: {estimate.words}.")
