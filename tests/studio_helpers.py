"""What the studio's tests share: a studio over tiny models, a visitor, and runs driven to their end."""

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import tiny
import tiny_masked
import tiny_video

from vgen.app.core import Studio, owner_name
from vgen.app.forms import Ask
from vgen.app.jobs import Job

WAIT = 60.0
VISITOR = "a browser's secret token"
REQUEST: Any = SimpleNamespace(username=None, session_hash="session", query_params={})
OWNER = owner_name(None, VISITOR)
MAKERS: dict[str, Callable[[], Any]] = {
    "tiny": tiny.tiny_pipeline,  # next scale, 8 x 8 grey images, classes ant, bee and cat
    "masked": tiny_masked.tiny_pipeline,  # 16 tokens of 12 codes
    "video": tiny_video.tiny_pipeline,
}


def make_studio(folder: Path, *names: str, **options: Any) -> Studio:
    """A studio in `folder`/out whose own models are these tiny ones, in `folder`/models."""
    models = folder / "models"
    models.mkdir(exist_ok=True)
    for name in names or ("tiny",):
        if not (models / name).is_dir():
            MAKERS[name]().save_pretrained(models / name)
    return Studio(folder / "out", models=models, device="cpu", **options)


def finish(job: Job) -> Job:
    """The job, once it has ended."""
    assert job.wait_until_ended(WAIT), job.state
    return job


def sample(studio: Studio, model: str = "tiny", owner: str = OWNER, **ask: Any) -> Job:
    """A finished run of two images of class 0, unless asked otherwise."""
    asked: dict[str, Any] = {"classes": [0], "per_class": 2} if model != "video" else {}
    return finish(studio.sample(owner, Ask(model=model, **asked | ask)))


def drain(items: AsyncIterator[Any]) -> list[Any]:
    """All that an asynchronous handler yields."""

    async def collect() -> list[Any]:
        return [item async for item in items]

    return asyncio.run(asyncio.wait_for(collect(), WAIT))
