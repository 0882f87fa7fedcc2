"""`vgen studio`: what it refuses before it serves, and that it serves until it is interrupted."""

import os
import signal
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest
from tiny import ROOT, Run


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (("--port", 0), "--port is 0: it must lie in 1..65535"),
        (("--port", 70_000), "--port is 70000"),
        (("--auth", "secret"), "--auth is no NAME:PASSWORD"),
        (("--auth", ":secret"), "--auth is no NAME:PASSWORD"),
        (("--models", "missing"), "there is no folder"),
        (("--device", "abacus"), "device is 'abacus'"),
    ],
)
def test_what_cannot_be_served_is_one_line(run: Run, flags: tuple, says: str) -> None:
    result = run("studio", *flags)
    assert result.code == 2 and says in result.err and len(result.err.splitlines()) == 1
    assert "secret" not in result.err


def test_a_port_that_is_taken_is_one_line(run: Run) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        result = run("studio", "--port", taken.getsockname()[1])
    assert result.code == 2 and "is taken: choose another one with --port" in result.err


@pytest.mark.slow
def test_it_serves_until_it_is_interrupted(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "vgen.cli", "studio", "--port", str(port), "--out", str(tmp_path / "out")]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        cwd=tmp_path,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # ignored by what runs in the background
    )
    try:
        assert process.stderr is not None
        line = next(line for line in process.stderr if "the studio is at" in line)
        assert f"http://127.0.0.1:{port}" in line
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=120) as answer:
            assert "vgen studio" in answer.read().decode()
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=120) == 0
    finally:
        process.kill()
    assert (tmp_path / "out" / "files").is_dir() and list(tmp_path.iterdir()) == [tmp_path / "out"]
