"""The studio's queue: order, stopping, errors, what is forgotten, and that owners are kept apart."""

import threading
import time
from collections.abc import Callable, Iterator

import pytest

from vgen.app import jobs as module
from vgen.app.core import explain
from vgen.app.jobs import Job, Jobs
from vgen.types import SettingError

WAIT = 20.0


@pytest.fixture
def jobs() -> Iterator[Jobs]:
    made = Jobs(explain)
    yield made
    made.close()


class Gate:
    """Work that waits to be let through its steps, and says whether it was closed."""

    def __init__(self, steps: int = 3) -> None:
        self.steps, self.turns, self.taken, self.closed = steps, threading.Semaphore(0), 0, threading.Event()
        self.inside = threading.Event()

    def __call__(self, job: Job) -> Iterator[None]:
        try:
            for index in range(self.steps):
                self.inside.set()
                assert self.turns.acquire(timeout=WAIT)
                self.taken += 1
                job.show(index)
                yield
        finally:
            self.closed.set()

    def let(self, number: int = 1) -> None:
        self.turns.release(number)


def submit(jobs: Jobs, work: Callable[[Job], Iterator[None]], owner: str = "a") -> Job:
    return jobs.submit(owner, "test", "a test", work)


def test_jobs_run_in_order_one_at_a_time(jobs: Jobs) -> None:
    first, second = Gate(), Gate()
    one, two = submit(jobs, first), submit(jobs, second)
    assert first.inside.wait(WAIT) and (one.state, two.state) == ("running", "queued")
    assert (jobs.position(one), jobs.position(two)) == (0, 1)
    assert not second.inside.is_set()
    first.let(3)
    assert one.wait_until_ended(WAIT) and second.inside.wait(WAIT)
    second.let(3)
    assert two.wait_until_ended(WAIT)
    assert (one.state, two.state, one.view, two.view) == ("done", "done", 2, 2)


def test_stop_ends_a_running_job_within_one_evaluation(jobs: Jobs) -> None:
    gate = Gate(100)
    job = submit(jobs, gate)
    assert gate.inside.wait(WAIT)
    gate.let(2)
    while gate.taken < 2:
        time.sleep(0.001)
    assert jobs.stop("a", job.id)
    gate.let(50)  # the evaluation it is in may end, no other may begin
    assert job.wait_until_ended(WAIT) and gate.closed.is_set()
    assert job.state == "stopped" and gate.taken <= 3 and job.view == gate.taken - 1  # what was done stays


def test_stop_ends_a_waiting_job_at_once_and_no_other(jobs: Jobs) -> None:
    gates = [Gate(1), Gate(1), Gate(1)]
    running, waiting, last = (submit(jobs, gate) for gate in gates)
    assert gates[0].inside.wait(WAIT)
    assert jobs.stop("a", waiting.id) and waiting.state == "stopped"
    for gate in gates:
        gate.let()
    assert running.wait_until_ended(WAIT) and last.wait_until_ended(WAIT)
    assert (running.state, last.state) == ("done", "done")
    assert gates[1].taken == 0 and not gates[1].inside.is_set()
    assert not jobs.stop("a", waiting.id)  # nothing is left to stop


def test_an_owner_reaches_their_own_jobs_alone(jobs: Jobs) -> None:
    gate = Gate(1)
    job = submit(jobs, gate, owner="a")
    assert jobs.get("a", job.id) is job
    assert jobs.get("b", job.id) is None and not jobs.stop("b", job.id) and jobs.unfinished("b") == []
    assert jobs.get("a", None) is None and jobs.get("a", "nonsense") is None
    gate.let()
    assert job.wait_until_ended(WAIT) and job.state == "done"


def raises(error: Exception) -> Callable[[Job], Iterator[None]]:
    def work(job: Job) -> Iterator[None]:
        yield
        raise error

    return work


def test_an_error_ends_one_job_and_says_what_and_why(jobs: Jobs, caplog: pytest.LogCaptureFixture) -> None:
    wrong = submit(jobs, raises(SettingError("top_k is -1: it must lie in 0..16")))
    assert wrong.wait_until_ended(WAIT) and wrong.error == "top_k is -1: it must lie in 0..16"
    ours = submit(jobs, raises(KeyError("secret")))
    assert ours.wait_until_ended(WAIT) and ours.state == "failed"
    assert "KeyError" in str(ours.error) and "secret" not in str(ours.error)  # details are for the log
    assert any("secret" in (record.exc_text or "") for record in caplog.records)
    gate = Gate(1)
    gate.let()
    after = submit(jobs, gate)
    assert after.wait_until_ended(WAIT) and after.state == "done"


def test_the_queue_has_bounds(jobs: Jobs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_WAITING_EACH", 2)
    monkeypatch.setattr(module, "MAX_WAITING", 3)
    gate = Gate(1)
    submit(jobs, gate)
    assert gate.inside.wait(WAIT)
    for _ in range(2):
        submit(jobs, Gate(1))
    with pytest.raises(SettingError, match="2 of your runs are waiting, the limit is 2"):
        submit(jobs, Gate(1))
    submit(jobs, Gate(1), owner="b")
    with pytest.raises(SettingError, match="3 of all runs are waiting, the limit is 3"):
        submit(jobs, Gate(1), owner="c")
    gate.let()


def test_many_jobs_and_many_cancellations_leave_nothing_behind(jobs: Jobs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "KEPT_EACH", 3)
    gate = Gate(1)
    blocking = submit(jobs, gate, owner="owner 0")
    assert gate.inside.wait(WAIT)

    def quick(job: Job) -> Iterator[None]:
        yield

    made = [submit(jobs, quick, owner=f"owner {i % 5}") for i in range(50)]
    for job in made[::5] + made[1::5]:
        assert jobs.stop(job.owner, job.id)
    gate.let()
    assert blocking.wait_until_ended(WAIT)
    for job in made:
        assert job.wait_until_ended(WAIT)
    states = [job.state for job in made]
    assert states.count("stopped") == 20 and states.count("done") == 30
    assert all(jobs.unfinished(f"owner {i}") == [] for i in range(5))
    last = submit(jobs, quick)  # which drops what is too old
    assert last.wait_until_ended(WAIT)
    assert len(jobs._known) <= 5 * 3 + 1


def test_a_leased_job_ends_when_nobody_watches_it_and_is_forgotten(jobs: Jobs) -> None:
    gate = Gate(100)
    running = jobs.submit("a", "test", "a test", gate, lease=1000.0)
    waiting = jobs.submit("a", "test", "a test", Gate(1), lease=1000.0)
    kept = submit(jobs, Gate(0))
    assert gate.inside.wait(WAIT)
    gate.let()
    while gate.taken < 1:
        time.sleep(0.001)
    running.seen = waiting.seen = float("-inf")  # long ago
    gate.let(50)
    assert running.wait_until_ended(WAIT) and running.state == "stopped" and gate.closed.is_set() and gate.taken <= 3
    assert waiting.wait_until_ended(WAIT) and waiting.state == "stopped" and waiting.began is None
    assert kept.wait_until_ended(WAIT) and list(jobs._known) == [kept.id]


def test_closing_ends_what_waits_and_what_runs() -> None:
    jobs, gate = Jobs(explain), Gate(100)
    running, waiting = submit(jobs, gate), submit(jobs, Gate(1))
    assert gate.inside.wait(WAIT)
    gate.let(1000)
    jobs.close()
    assert running.state == "stopped" and gate.closed.is_set() and waiting.state == "stopped"
    with pytest.raises(SettingError, match="shutting down"):
        submit(jobs, Gate(1))


def test_of_many_finished_jobs_those_somebody_goes_back_to_are_kept(
    jobs: Jobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "KEPT_EACH", 3)
    made = [submit(jobs, Gate(0), owner="a") for _ in range(3)]
    for job in made:
        assert job.wait_until_ended(WAIT)
    assert jobs.get("b", made[1].id) is None and jobs.get("a", made[0].id) is made[0]
    for _ in range(2):
        assert submit(jobs, Gate(0), owner="a").wait_until_ended(WAIT)
    assert jobs.get("a", made[0].id) is made[0] and jobs.get("a", made[1].id) is None
