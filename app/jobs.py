"""Runs that outlive the page which started them: a queue, one worker, and what anybody watching may see.

Knows neither models nor Gradio. Work is an iterator that yields after every model evaluation; stopping a job closes it.
"""

import contextlib
import logging
import secrets
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from vgen.types import SettingError

log = logging.getLogger(__name__)

MAX_WAITING = 64  # jobs in the queue, of all owners
MAX_WAITING_EACH = 16  # of one owner
KEPT_EACH = 16  # finished jobs that an owner can go back to
KEPT = 64  # of all owners
MAX_OWNERS_SECONDS = 24 * 3600.0  # after which a finished job is forgotten
ENDED = ("done", "stopped", "failed")
FAILED_INSIDE = "something went wrong inside vgen ({name}): the server's log says where; other runs are not affected"


@dataclass(eq=False)
class Job:
    """One run: what it does, how far it is, and what it leaves."""

    owner: str
    kind: str
    title: str
    work: Callable[["Job"], Iterator[None]]
    explain: Callable[[BaseException], str | None]
    lease: float | None = None  # seconds without anybody watching after which it stops and is forgotten; None: never
    seen: float = field(default_factory=time.monotonic)  # when somebody last watched
    used: float = field(default_factory=time.monotonic)  # when somebody last asked for it
    id: str = field(default_factory=lambda: secrets.token_urlsafe(12))
    state: str = "queued"  # then "running", and one of ENDED
    error: str | None = None
    view: Any = None  # whatever the work shows
    version: int = 0  # counts what was shown
    created: float = field(default_factory=time.time)
    began: float | None = None
    seconds: float | None = None  # of running, once it has ended
    stopping: threading.Event = field(default_factory=threading.Event)
    changed: threading.Condition = field(default_factory=threading.Condition)

    @property
    def ended(self) -> bool:
        return self.state in ENDED

    @property
    def abandoned(self) -> bool:
        """Whether it was to run only while somebody watches, and nobody does."""
        return self.lease is not None and time.monotonic() - self.seen > self.lease

    def show(self, view: Any = None) -> None:
        """Tell whoever watches that there is something new."""
        with self.changed:
            if view is not None:
                self.view = view
            self.version += 1
            self.changed.notify_all()

    def wait_until_ended(self, seconds: float) -> bool:
        """Whether the job ends within so many seconds."""
        with self.changed:
            return self.changed.wait_for(lambda: self.ended, seconds)

    def run(self) -> None:
        """Drain the work, closing it within one evaluation of being stopped. Errors end this job alone."""
        self.began, began = time.time(), time.monotonic()
        self._become("running")
        try:
            with contextlib.closing(self.work(self)) as steps:  # type: ignore[type-var]
                for _ in steps:
                    if self.abandoned:
                        self.stopping.set()
                    if self.stopping.is_set():
                        break
            state = "stopped" if self.stopping.is_set() else "done"
        except Exception as error:
            state, self.error = "failed", self.explain(error)
            if self.error is None:
                log.exception("job %s (%s) failed", self.id, self.kind)
                self.error = FAILED_INSIDE.format(name=type(error).__name__)
        self.seconds = time.monotonic() - began
        self._become(state)

    def _become(self, state: str) -> None:
        self.state = state
        self.show()


class Jobs:
    """All jobs, and the one thread that works them off in order: a device does one thing at a time.

    Args:
        explain: one line for an error that is the user's, None for one that is ours.
    """

    def __init__(self, explain: Callable[[BaseException], str | None]) -> None:
        self._explain = explain
        self._lock = threading.Lock()
        self._news = threading.Condition(self._lock)
        self._waiting: list[Job] = []
        self._running: Job | None = None
        self._known: OrderedDict[str, Job] = OrderedDict()  # by age
        self._closed = False
        self._worker = threading.Thread(target=self._work, name="vgen-jobs", daemon=True)
        self._worker.start()

    def submit(
        self,
        owner: str,
        kind: str,
        title: str,
        work: Callable[[Job], Iterator[None]],
        lease: float | None = None,
    ) -> Job:
        """Put a job at the end of the queue; with a lease it is forgotten once it has ended, or nobody watches it.

        Raises SettingError where the queue is full.
        """
        job = Job(owner, kind, title, work, self._explain, lease)
        with self._lock:
            if self._closed:
                raise SettingError("the studio is shutting down: start it again")
            mine = sum(other.owner == owner for other in self._waiting)
            for number, limit, whose in ((mine, MAX_WAITING_EACH, "your"), (len(self._waiting), MAX_WAITING, "all")):
                if number >= limit:
                    raise SettingError(f"{number} of {whose} runs are waiting, the limit is {limit}: stop one, or wait")
            self._waiting.append(job)
            self._known[job.id] = job
            self._forget_old()
            self._news.notify_all()
        return job

    def get(self, owner: str, job_id: str | None) -> Job | None:
        """An owner's job by its id; None for anybody else's, and for one that is forgotten."""
        with self._lock:
            job = self._known.get(job_id or "")
            if job is None or job.owner != owner:
                return None
            job.used = time.monotonic()
            return job

    def theirs(self, owner: str, *kinds: str) -> list[Job]:
        """An owner's jobs of some kinds that are not forgotten, the oldest first."""
        with self._lock:
            return [job for job in self._known.values() if job.owner == owner and job.kind in kinds]

    def latest(self, owner: str, kind: str) -> Job | None:
        """An owner's newest job of a kind, for a page that was loaded anew."""
        theirs = self.theirs(owner, kind)
        return theirs[-1] if theirs else None

    def position(self, job: Job) -> int:
        """How many runs come before it: 0 for one that is running or has ended."""
        with self._lock:
            if job not in self._waiting:
                return 0
            return self._waiting.index(job) + (self._running is not None)

    def unfinished(self, owner: str) -> list[Job]:
        """An owner's jobs that run or wait, in order."""
        with self._lock:
            running = [self._running] if self._running is not None else []
            return [job for job in running + self._waiting if job.owner == owner]

    def stop(self, owner: str, job_id: str | None) -> bool:
        """End a job: at once where it waits, within one evaluation where it runs. False where it is not there."""
        job = self.get(owner, job_id)
        if job is None or job.ended:
            return False
        job.stopping.set()
        with self._lock:
            waited = job in self._waiting
            if waited:
                self._waiting.remove(job)
        if waited:
            job._become("stopped")
        return True

    def forget(self, job: Job) -> None:
        """Drop a job and all that it holds, stopping it first."""
        self.stop(job.owner, job.id)
        with self._lock:
            self._known.pop(job.id, None)

    def close(self) -> None:
        """Stop everything; the worker ends after the evaluation it is in."""
        with self._lock:
            self._closed = True
            waiting, self._waiting = self._waiting, []
            running = self._running
            self._news.notify_all()
        for job in waiting:
            job.stopping.set()
            job._become("stopped")
        if running is not None:
            running.stopping.set()
        self._worker.join(timeout=60)

    def _work(self) -> None:
        while True:
            with self._lock:
                self._running = None
                self._news.wait_for(lambda: self._waiting or self._closed)
                if self._closed:
                    return
                self._running = job = self._waiting.pop(0)
            if job.abandoned:
                job._become("stopped")
            else:
                job.run()
            if job.lease is not None:
                self.forget(job)

    def _forget_old(self) -> None:
        """Drop finished jobs: those not used for longest of an owner who has many, of all where there are very many,
        and by age."""
        finished = sorted((job for job in self._known.values() if job.ended), key=lambda job: job.used)
        old = [job for job in finished if time.time() - job.created > MAX_OWNERS_SECONDS]
        by_owner: dict[str, list[Job]] = {}
        for job in finished:
            by_owner.setdefault(job.owner, []).append(job)
        for theirs in by_owner.values():
            old += theirs[: max(0, len(theirs) - KEPT_EACH)]
        old += finished[: max(0, len(finished) - KEPT)]
        for job in old:
            self._known.pop(job.id, None)
