"""The application: `create_app` puts the pool behind its route table, Quart for most calls, raw ASGI for the rest."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from quart import Quart, Response
from werkzeug.exceptions import HTTPException, MethodNotAllowed

from rma_coordinator import enrolment, tokens
from rma_coordinator.api import admin, browsers, channel, inference, plain, policies, services, tasks, worker
from rma_coordinator.api.asgi import CONTROL_BYTES, Call, Gone, too_slow
from rma_coordinator.api.problems import STATUS_WORDS, HTTPProblem, problem, unexpected, wrong_method
from rma_coordinator.api.routes import ROUTES, Route, Router
from rma_coordinator.api.v1 import calls as openai
from rma_coordinator.api.v1 import errors as openai_errors
from rma_coordinator.api.v1 import models as openai_models
from rma_coordinator.api.v1.access import covers
from rma_coordinator.api.waiting import go_on
from rma_coordinator.api.web import CALL, Web, without_body
from rma_coordinator.policy_plugins import PolicyPlugins
from rma_coordinator.pool import Pool
from rma_core.catalog import load_folder
from rma_core.errors import RMAError, SettingProblem
from rma_core.model_catalog import load_models
from rma_core.models.strict import encode

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Awaitable, Callable, Generator

    from rma_coordinator.api.asgi import Message, Receive, Send
    from rma_coordinator.store import Store
    from rma_core.catalog import CatalogEntry
    from rma_core.host import Plugins
    from rma_core.model_catalog import ModelEntry
    from rma_core.settings import CoordinatorSettings

    Handler = Callable[[Pool, Web], Awaitable[object]]
    RawHandler = Callable[[Pool, Call], Awaitable[None]]
    ASGI = Callable[[Message, Receive, Send], Awaitable[None]]

logger = logging.getLogger(__name__)

CHANNEL_PATH = "/api/worker/channel"


def create_app(
    config: CoordinatorSettings,
    *,
    store: Store,
    plugins: Plugins,
    clock: Callable[[], float] = time.monotonic,
    wall: Callable[[], float] = time.time,
    catalog: tuple[CatalogEntry, ...] | None = None,
    models: tuple[ModelEntry, ...] = (),
    pin: str = "",
    settings_now: Callable[[], CoordinatorSettings] | None = None,
) -> Quart:
    """Return the coordinator as a Quart application whose lifespan opens and closes the pool.

    ``clock`` is monotonic seconds, ``wall`` Unix seconds. The pool is at ``app.extensions["rma"]``.
    ``models`` go with a ``catalog`` that is given. ``settings_now`` returns what the settings say by now, for plugins
    that are installed meanwhile. Raises SettingProblem or ValidationProblem for a configuration that
    cannot work.
    """
    ours = plugins.policies(config.plugins)
    pool = Pool(
        config,
        store=store,
        clock=clock,
        wall=wall,
        policies=ours,
        policy_plugins=PolicyPlugins(plugins, settings_now or (lambda: config), taken=ours, clock=clock),
        catalog=load_catalog(config) if catalog is None else catalog,
        models=load_model_catalog(config) if catalog is None else models,
        plugins=plugins.reports,
        failures=plugins.failures,
        pin=pin,
    )
    app = Quart("rma_coordinator", static_folder=None)
    app.extensions["rma"] = pool
    app.config["MAX_CONTENT_LENGTH"] = CONTROL_BYTES
    app.config["RESPONSE_TIMEOUT"] = None
    # "//health" is no other way to write "/health", and nothing is answered with a redirect.
    app.url_map.merge_slashes = False
    app.while_serving(functools.partial(_serving, pool))
    for route in ROUTES:
        if route.lane == "quart":
            _add(app, pool, route)
    app.register_error_handler(Exception, _failed)
    lanes = app.extensions["rma_lanes"] = Lanes(cast("ASGI", app.asgi_app), pool)
    app.asgi_app = cast("Any", lanes)  # type: ignore[method-assign]
    return app


def load_catalog(config: CoordinatorSettings) -> tuple[CatalogEntry, ...]:
    """Return the entries of the configured folder, else of those that came along.

    Raises SettingProblem, ValidationProblem.
    """
    return load_folder(_catalog_folder(config))


def load_model_catalog(config: CoordinatorSettings) -> tuple[ModelEntry, ...]:
    """Return the models of the configured folder, else of the folder `models` beside the catalog's entries.

    Raises SettingProblem, ValidationProblem.
    """
    if config.model_catalog:
        folder = Path(config.model_catalog).expanduser()
        if not folder.is_dir():
            raise SettingProblem(f"the folder of models {folder} does not exist", hints=("set RMA_MODEL_CATALOG",))
        return load_models(folder)
    return load_models(_catalog_folder(config) / "models")


def _catalog_folder(config: CoordinatorSettings) -> Path:
    if config.catalog:
        folder = Path(config.catalog).expanduser()
        if not folder.is_dir():
            raise SettingProblem(f"the catalog folder {folder} does not exist", hints=("set --catalog or RMA_CATALOG",))
        return folder
    here = Path(__file__).parent
    installed = here / "catalog"
    return installed if installed.is_dir() else here.parents[1] / "containers"


async def _serving(pool: Pool) -> AsyncGenerator[None, None]:
    """Open the pool, keep its time while the application serves, and close it."""
    try:
        await pool.start()
    except BaseException:
        await pool.end_policies()
        raise
    upkeep = [
        asyncio.create_task(pool.keep_time(), name="the pool's clock"),
        asyncio.create_task(pool.keep_books(), name="the pool's counters"),
        asyncio.create_task(pool.books.run(), name="the pool's books"),
        asyncio.create_task(pool.switching.keep(), name="the pool's tier policy"),
        asyncio.create_task(pool.keep_deciding(), name="what decides workers that wait for a policy"),
        asyncio.create_task(tokens.warm(), name="what checks tokens"),
    ]
    for task in upkeep:
        task.add_done_callback(_never_silent)
    try:
        yield
    finally:
        runs = list(pool.repeats)
        for run in runs:
            run.stop()
        for task in upkeep:
            task.cancel()
        await asyncio.wait([*upkeep, *(run.work for run in runs)])
        await pool.stop()


def _never_silent(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and task.exception() is not None:
        logger.critical("%s has ended; restart the coordinator", task.get_name(), exc_info=task.exception())


def _add(app: Quart, pool: Pool, route: Route) -> None:
    """Put one route of the table behind Quart: access is checked here, and only here."""
    modules = (worker, policies, services, admin)
    handler: Handler = next(getattr(module, route.handler) for module in modules if hasattr(module, route.handler))

    async def view(**parts: str) -> Response:
        web = Web(parts, status=route.status, proxies=pool.settings.trusted_proxies)
        if ":" in route.access:
            web.admin(pool, route.access)
        value = await handler(pool, web)
        body = value if isinstance(value, bytes) else encode(value)
        return Response(body, status=web.status, headers=web.headers, content_type=web.content_type)

    path = route.path.replace("{", "<").replace("}", ">")
    app.add_url_rule(path, endpoint=f"{route.method} {route.path}", view_func=view, methods=[route.method])


async def _failed(error: Exception) -> Response:
    """Turn whatever a handler raised into a problem; a bug is logged with its traceback."""
    if isinstance(error, RMAError):
        # Its frames hold what was read of the body, and Quart holds the error.
        status, headers, body = problem(error.with_traceback(None))
    elif isinstance(error, HTTPException):
        status, headers, body = problem(_refusal(error))
    elif isinstance(error, Gone):
        # Nobody is there to read it.
        status, headers, body = problem(HTTPProblem(400, "the body broke off"))
    else:
        logger.error("a handler failed", exc_info=error, extra={"action": "bug"})
        status, headers, body = unexpected()
    return Response(body, status=status, headers=headers)


def _refusal(error: HTTPException) -> HTTPProblem:
    """Return what the framework refused by itself, in our words."""
    code = error.code or 500
    if isinstance(error, MethodNotAllowed):
        return wrong_method(list(error.valid_methods or ()))
    words = {404: "there is nothing at this address", 413: f"a body may have at most {CONTROL_BYTES} bytes"}
    message = words.get(code, STATUS_WORDS.get(code, (error.name, ""))[0].lower())
    return HTTPProblem(code, message, hints=("the calls are listed at /openapi.json",))


async def upgrade(pool: Pool, call: Call) -> None:
    """GET /api/worker/channel without an upgrade: say what the address speaks."""
    enrolment.worker_of(pool, call.bearer)
    raise HTTPProblem(426, "this address speaks WebSocket", headers={"upgrade": "websocket", "connection": "upgrade"})


RAW: dict[str, RawHandler] = {
    "heartbeat": plain.heartbeat,
    "poll": plain.poll,
    "task_body": plain.task_body,
    "result": plain.result,
    "complete": plain.complete,
    "infer": inference.infer,
    "task": tasks.task,
    "task_result": tasks.task_result,
    "cancel_task": tasks.cancel_task,
    "chat_completions": openai.chat_completions,
    "completions": openai.completions,
    "embeddings": openai.embeddings,
    "models": openai_models.models,
    "model": openai_models.model,
    "channel": upgrade,
}


class Lanes:
    """What stands below Quart: the channel, streams, and the hot calls; everything else goes on to Quart."""

    def __init__(self, quart: ASGI, pool: Pool) -> None:
        self._quart = quart
        self._pool = pool
        self._proxies = pool.settings.trusted_proxies
        self._origins = pool.settings.cors_origins
        self._router = Router()
        #: What is being served below Quart now, so that it can be ended when the coordinator stops.
        self._open: set[asyncio.Task[Any]] = set()

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Serve one ASGI scope."""
        if scope["type"] != "http":
            await self._no_call(scope, receive, send)
            return
        call = Call(scope, receive, send, proxies=self._proxies)
        route, parts, allowed = self._router.find(call.method, call.path)
        if route is None and not allowed and not covers(call.path):
            await self._quart({**scope, CALL: call}, without_body(), call.hand_on)
            return
        call.parts = parts
        page = b"origin" in call.raw and covers(call.path) and browsers.let_in(call, self._origins)
        try:
            if route is None and call.method == "OPTIONS" and allowed and covers(call.path):
                await browsers.options(call, allowed, page=page)
                return
            if route is None:
                raise wrong_method(list(allowed)) if allowed else openai_errors.nothing_here()
            steps = RAW[route.handler](self._pool, call).__await__()
            try:
                waits_for = next(steps)
            except StopIteration:
                # Most never wait; nothing else has run meanwhile that could have ended it.
                return
            await self._wait(call, steps, waits_for)
        except (Gone, inference.CutAnswer) as error:
            # The server closes a connection whose answer nothing ends; what it was about has a line of its own.
            logger.debug("%s %s was cut: %s", call.method, call.path, str(error) or "the other side left")
        except RMAError as error:
            # Its frames hold what was read of the request, and the answer to a client that does not read may take long.
            await self._explain(call, _problem(call, error), error.with_traceback(None))
        except Exception as error:
            logger.exception("%s %s failed", call.method, call.path, extra={"action": "bug"})
            await self._explain(call, _problem(call, None), error)

    async def _no_call(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] != "websocket" or scope["path"] != CHANNEL_PATH:
            await self._quart(scope, receive, send)
            return
        task = self._count()
        try:
            await channel.serve_channel(self._pool, scope, receive, send)
        finally:
            self._open.discard(task)

    def cut(self) -> None:
        """End what is still open: the coordinator stops."""
        for task in self._open:
            task.cancel()
        for run in self._pool.repeats:
            run.stop()

    def _count(self) -> asyncio.Task[Any]:
        task = asyncio.current_task()
        if task is None:
            raise RuntimeError("an ASGI application runs in a task")
        self._open.add(task)
        return task

    async def _wait(self, call: Call, steps: Generator[Any, Any, None], waits_for: object) -> None:
        """Go on with a call that has to wait: from now on it can be ended, and its time may be bounded."""
        task, bound_s = self._count(), call.bound_s
        try:
            if bound_s is None:
                await go_on(steps, waits_for)
                return
            try:
                async with asyncio.timeout(bound_s):
                    await go_on(steps, waits_for)
            except TimeoutError:
                raise (Gone if call.started else too_slow(bound_s)) from None
        finally:
            self._open.discard(task)

    async def _explain(self, call: Call, answer: tuple[int, dict[str, str], bytes], error: Exception) -> None:
        """Answer with a problem where that is still possible."""
        if call.started:
            logger.info("%s %s broke off: %s", call.method, call.path, error, extra={"action": "call_cut"})
            return
        task = self._count()
        try:
            with contextlib.suppress(Gone):
                await call.answer(*answer)
        finally:
            self._open.discard(task)


def _problem(call: Call, error: RMAError | None) -> tuple[int, dict[str, str], bytes]:
    """Return a failure, or a bug, in the form that the address has."""
    if covers(call.path):
        return openai_errors.problem(error, call) if error else openai_errors.unexpected(call)
    return problem(error) if error else unexpected()


def pool_of(app: Quart) -> Pool:
    """Return the pool behind an application."""
    pool: Any = app.extensions["rma"]
    return cast("Pool", pool)
