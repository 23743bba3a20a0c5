"""The HTTP application: wiring only. `uvicorn --factory service.app:create_app`."""

import asyncio
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

from fastapi import FastAPI
from starlette.concurrency import run_in_threadpool

from service import tracing
from service.api import (
    advice,
    aliases,
    attempts,
    audit,
    cards,
    checkpoints,
    datasets,
    dry_run,
    events,
    health,
    jobs,
    keys,
    losses,
    metrics,
    models,
    operators,
    overview,
    prometheus,
    reference,
    rollouts,
    schema,
    sessions,
    usage,
    webhooks,
)
from service.dashboard import pages
from service.doorbell import Doorbell, Signals
from service.edge import faces, problems
from service.edge.answers import Answers
from service.edge.context import Context
from service.edge.limits import OpenAnswers
from service.edge.middleware import Frame
from service.edge.rate import Limiter
from service.edge.shares import Shares
from service.edge.shutdown import on_stop_signal
from service.edge.startup import check_secrets, ensure_bootstrap_key
from service.edge.tails import Tails
from service.jobs.reconciler import Reconciler
from service.memory import keep_freed_memory
from service.openai import face, files, fine_tuning, routes
from service.relay import line
from service.relay.queue import RequestQueue
from service.settings import Settings, get_settings
from service.store.session import open_store
from service.telemetry import configure_logging, warn_of_unknown_variables
from service.tinker.face import FACE as TINKER
from service.tinker.routes import ROUTERS as TINKER_ROUTERS
from service.webhooks.courier import Courier

# A path is looked for in the order of the routers: first those whose callers wait for milliseconds.
QUICK = (losses, sessions)
RESOURCES = (
    dry_run,
    jobs,
    events,
    metrics,
    overview,
    advice,
    attempts,
    rollouts,
    checkpoints,
    cards,
    aliases,
    datasets,
    models,
    keys,
    usage,
    operators,
    webhooks,
    audit,
)

SWITCH_S = 0.001  # a thread that computes lets others run after so long; with Python's 5 ms some of them make a wait of seconds


def create_app(settings: Settings | None = None) -> FastAPI:
    """Settings default to the environment. Nothing is opened before the application starts."""
    settings = settings or get_settings()

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        configure_logging(settings)
        warn_of_unknown_variables()
        keep_freed_memory()
        tracing.start("api")
        sys.setswitchinterval(SWITCH_S)
        check_secrets(settings)
        async with AsyncExitStack() as open_parts:
            open_parts.push_async_callback(run_in_threadpool, tracing.stop)
            store, doorbell, signals = open_store(settings), Doorbell(settings), Signals(settings)
            limiter = Limiter(settings)
            open_parts.callback(store.close)
            open_parts.callback(doorbell.close)
            open_parts.push_async_callback(limiter.close)
            await run_in_threadpool(ensure_bootstrap_key, store, settings)
            queue = RequestQueue(settings, line.losses(settings))
            open_parts.push_async_callback(queue.close)
            await signals.start()
            open_parts.push_async_callback(signals.stop)
            reconciler = Reconciler(store, settings, doorbell)
            reconciler.start()
            open_parts.push_async_callback(run_in_threadpool, reconciler.stop)
            store.on_deliveries = doorbell.ring_couriers
            courier = Courier(store, settings)
            courier.start()
            open_parts.push_async_callback(run_in_threadpool, courier.stop)
            listening = asyncio.create_task(courier.listen(signals), name="courier's bell")
            open_parts.callback(listening.cancel)
            app.state.context = context = Context(
                settings,
                store,
                doorbell,
                signals,
                queue,
                limiter,
                Shares(settings.key_requests_at_once),
                OpenAnswers(settings.key_open_streams),
                Tails(signals),
                Answers(signals, store),
            )
            loop = asyncio.get_running_loop()
            with on_stop_signal(lambda: loop.call_soon_threadsafe(context.stop)):
                yield

    app = FastAPI(
        title="Ratchet",
        description="Reinforcement learning of language models as a service: jobs, their curves, samples and checkpoints.",
        version=schema.version(),
        lifespan=lifespan,
        docs_url=None,  # both draw their scripts from a CDN; service/api/reference.py is ours
        redoc_url=None,
        redirect_slashes=False,
        generate_unique_id_function=lambda route: route.name,
    )
    app.state.has_sso = settings.sso_header is not None
    faces.install(app, TINKER, *face.FACES)
    problems.install(app)
    app.add_middleware(Frame)
    common = problems.responses(*problems.COMMON)
    for resource in QUICK:
        app.include_router(resource.router, responses=common)
    for router in TINKER_ROUTERS:
        app.include_router(router)
    for resource in RESOURCES:
        app.include_router(resource.router, responses=common)
    for openai in (routes, files, fine_tuning):
        app.include_router(openai.router)
    app.include_router(health.router)
    app.include_router(prometheus.router)
    app.include_router(reference.router)
    app.include_router(pages.router)
    schema.complete(app)
    return app
