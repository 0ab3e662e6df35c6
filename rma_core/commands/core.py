"""The commands that come with rma-core: of volunteers, plugin authors, admins and clients."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rma_core.commands import running, volunteer
from rma_core.commands.infer import infer
from rma_core.commands.machine import detect, doctor
from rma_core.commands.models import models
from rma_core.commands.plugins import plugins
from rma_core.commands.policies import policies
from rma_core.commands.pool import backup, keys, tokens, workers
from rma_core.commands.results import cancel, result
from rma_core.commands.services import services
from rma_core.commands.tasks import tasks

if TYPE_CHECKING:
    import click

COMMANDS: list[click.Command] = [
    *running.COMMANDS,
    *volunteer.COMMANDS,
    backup,
    cancel,
    detect,
    doctor,
    infer,
    keys,
    models,
    plugins,
    policies,
    result,
    services,
    tasks,
    tokens,
    workers,
]
