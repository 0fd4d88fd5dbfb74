"""What all routes share: the app, the limits, paths, and waiting for jobs."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, TypeVar
from urllib.parse import quote

from starlette.requests import Request

from postroom.errors import ConfigurationError
from postroom.gateway.problems import Problem
from postroom.producer.job import JobStatus
from postroom.topology import known

if TYPE_CHECKING:
    from postroom.app import App

T = TypeVar("T")

_FIRST_LOOK = 0.005
_LAST_LOOK = 0.25


class Site:
    """The surroundings of one gateway's routes. ``max_upload``, ``max_batch``: see ``Gateway``."""

    def __init__(self, app: App, max_upload: int, max_batch: int) -> None:
        self.app = app
        self.max_upload = max_upload
        self.max_batch = max_batch
        self.stopping = False
        """Whoever waits is answered now, so that the server can end."""

    async def wait(self, job_id: str, enough: Callable[[JobStatus], bool], seconds: float) -> JobStatus:
        """The first status that is ``enough``, or that after ``seconds``. Raises ``JobNotFound``."""
        clock = asyncio.get_running_loop().time
        deadline = clock() + seconds
        pause = _FIRST_LOOK
        while True:
            status = await self.app.job(job_id).astatus()
            left = deadline - clock()
            if enough(status) or left <= 0 or self.stopping:
                return status
            await asyncio.sleep(min(pause, left))
            pause = min(pause * 1.5, _LAST_LOOK)


def job_path(request: Request, job_id: str) -> str:
    """The path of a job's status, wherever the gateway is mounted."""
    return f"{quote(request.scope.get('root_path', ''))}/v1/jobs/{quote(job_id, safe='')}"


def find(name: str, among: Mapping[str, T], what: str) -> T:
    """Raises ``Problem`` 404 that suggests the nearest name."""
    try:
        return among[known(name, among, what)]
    except ConfigurationError as error:
        raise Problem(404, str(error)) from error
