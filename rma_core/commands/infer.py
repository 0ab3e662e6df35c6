"""`rma infer`: a request from the shell; the answer is written as it comes."""

from __future__ import annotations

import functools
import json
import mimetypes
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import click

from rma_core.commands import common
from rma_core.errors import UsageProblem

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from rma_core.http import Response

#: Longest wait between two pieces of an answer.
GAP_S = 600.0
PIECE_BYTES = 64 * 1024
#: What a request may be given.
SECONDS = click.FloatRange(min=0, min_open=True)


@click.command()
@click.argument("service")
@click.argument("source", required=False, metavar="[FILE | TEXT | -]")
@click.option(
    "-o", "--option", "extras", multiple=True, metavar="NAME=VALUE", help="An option of the service; repeatable."
)
@click.option("--type", "content_type", metavar="TYPE", help="Media type of the file, where its name does not tell.")
@click.option("--detach", is_flag=True, help="Print the task's id at once; `rma result ID` waits for its answer.")
@click.option("--idempotency-key", metavar="KEY", help="Sent again under the same key, the request is not done again.")
@click.option("--priority", type=click.Choice(["high", "normal", "low"]), help="How urgent it is [default: normal].")
@click.option("--timeout", "timeout_s", type=SECONDS, metavar="SECONDS", help="How long it may take in all.")
@click.option("--webhook", metavar="URL", help="With --detach: an https address that is told of its end, signed.")
@common.pool_options
@common.json_option
def infer(
    service: str,
    source: str | None,
    extras: tuple[str, ...],
    content_type: str | None,
    detach: bool,
    idempotency_key: str | None,
    priority: str | None,
    timeout_s: float | None,
    webhook: str | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Send a request to SERVICE and print its answer.

    The request is a file's content, stdin (`-`), or a text. `rma infer notes paper.pdf`
    """
    service, _, rest = service.partition("/")
    path = "/".join(["/api/inference", *map(common.part, [service, *rest.split("/")] if rest else [service])])
    body, kind = _body(source, content_type)
    headers = {"content-type": kind}
    if detach:
        headers["prefer"] = "respond-async"
    if idempotency_key:
        headers["idempotency-key"] = idempotency_key
    if priority:
        headers["rma-priority"] = priority
    if timeout_s is not None:
        headers["rma-timeout"] = f"{timeout_s:g}"
    if webhook:
        if not detach:
            raise UsageProblem("--webhook goes with --detach", hints=("who waits for the answer is told by it",))
        headers["rma-webhook"] = webhook
    for name, value in headers.items():
        if not value.isascii() or not value.isprintable():
            raise UsageProblem(f"the header {name} cannot be {value!r}", hints=("use ASCII, on one line",))
    show = _print_task if detach and not as_json else functools.partial(_print, as_json=as_json)
    stream(options, "POST", path, params=_query(extras), content=body, headers=headers, show=show)


def stream(
    options: dict[str, Any], method: str, path: str, *, show: Callable[[Response], None] | None = None, **more: Any
) -> None:
    """Make one call to the pool and write its answer as it comes. Raises CoordinatorError."""
    from rma_core import http

    to = common.target(options)
    context = http.tls_context(to.certificate) if to.certificate else None
    with http.open_sync_client(to.url, context=context, token=to.key, timeout_s=GAP_S) as client:
        try:
            with client.stream(method, path, **more) as answer:
                if not answer.is_success:
                    raise http.error_of(answer.status_code, answer.headers, http.read_problem_sync(answer))
                (show or functools.partial(_print, as_json=False))(answer)
        except http.HTTPError as error:
            raise http.unreachable(to.url, error) from None


def _print_task(answer: Response) -> None:
    """Write the id of a task that was acknowledged."""
    from rma_core import http

    found = common.json_of(str(answer.url), http.read_sync(answer))
    click.echo(common.printable(str(found["task_id"])))


def _query(extras: tuple[str, ...]) -> dict[str, str]:
    wrong = [extra for extra in extras if "=" not in extra]
    if wrong:
        raise UsageProblem(f"{wrong[0]!r} is not NAME=VALUE")
    return dict(extra.split("=", 1) for extra in extras)


def _body(source: str | None, content_type: str | None) -> tuple[bytes | Iterator[bytes], str]:
    """Return the request's body and its media type: a file when there is one of that name, else the text itself."""
    if source in (None, "-"):
        if sys.stdin.isatty():
            raise UsageProblem(
                "what should be sent?", hints=("rma infer SERVICE FILE, a text in quotes, or - for stdin",)
            )
        return sys.stdin.buffer.read(), content_type or "text/plain"
    path = Path(str(source))
    if path.is_file():
        guessed = content_type or mimetypes.guess_type(path.name)[0] or "application/octet-stream"
        return _pieces(path.open("rb")), guessed
    if (path.suffix or "/" in str(source)) and " " not in str(source):
        raise UsageProblem(f"there is no file {source}", hints=("a text that is no file name is sent as it is",))
    return str(source).encode("utf-8", "surrogateescape"), content_type or "text/plain; charset=utf-8"


def _pieces(file: BinaryIO) -> Iterator[bytes]:
    with file:
        while piece := file.read(PIECE_BYTES):
            yield piece


def _print(answer: Response, *, as_json: bool) -> None:
    """Write the answer as it comes; to a file or pipe exactly, on a terminal without what that would obey."""
    is_json = answer.headers.get("content-type", "").startswith("application/json")
    terminal = sys.stdout.isatty()
    indented = _indented(answer.read()) if is_json and (terminal or as_json) else None
    if indented is not None:
        click.echo(indented)
    elif terminal:
        for text in answer.iter_text():
            sys.stdout.write(common.printable(text.replace("\r\n", "\n"), keep="\n\t"))
            sys.stdout.flush()
    else:
        for piece in answer.iter_bytes():
            sys.stdout.buffer.write(piece)
            sys.stdout.buffer.flush()
        if is_json:
            click.echo()


def _indented(body: bytes) -> str | None:
    """Return JSON as people read it, or nothing for what only claims to be JSON."""
    try:
        return common.escaped_json(json.dumps(json.loads(body), indent=2, ensure_ascii=False))
    except (ValueError, RecursionError):
        return None
