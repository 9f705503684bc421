"""The `gradwire` command as people and machines call it: results, exit codes, and that no process stays behind."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

TINY = {
    "layers": 2,
    "width": 32,
    "heads": 2,
    "context": 32,
    "batch": 8,
    "steps": 5,
    "microbatches": 4,
    "warmup-steps": 1,
    "validation-windows": 9,
    "evaluate-every": 3,
}
FLAGS = [word for name, value in TINY.items() for word in (f"--{name}", str(value))]
SUMMARY = {
    "validation_loss",
    "bits_per_byte",
    "tokens_per_second",
    "bubble",
    "theoretical_bubble",
    "verdict",
    "epochs",
    "run_directory",
}


class Commands:
    """Starts commands whose processes, and their children's, carry a mark in their environment."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.mark = uuid.uuid4().hex
        self._started: list[subprocess.Popen[str]] = []

    def start(self, *arguments: str, **environment: str) -> subprocess.Popen[str]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith("GRADWIRE_")}
        kept["GRADWIRE_COORDINATOR_PROFILING_SECONDS"] = "0.5"
        process = subprocess.Popen(
            [sys.executable, "-m", "gradwire", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=self.directory,
            env=kept | {"MARK": self.mark, "COLUMNS": "200"} | environment,
        )
        self._started.append(process)
        return process

    def run(self, *arguments: str, **environment: str) -> tuple[int, str, str]:
        process = self.start(*arguments, **environment)
        out, err = process.communicate(timeout=120)
        return process.returncode, out, err

    def processes(self) -> list[psutil.Process]:
        found = []
        for process in psutil.process_iter():
            try:
                if process.environ().get("MARK") == self.mark:
                    found.append(process)
            except (psutil.NoSuchProcess, psutil.AccessDenied):
                continue
        return found

    def assert_none_left(self, seconds: float = 0.0) -> None:
        _, alive = psutil.wait_procs(self.processes(), timeout=seconds)
        assert not alive, [process.cmdline() for process in alive]

    def close(self) -> None:
        for process in self.processes():
            process.kill()
        for started in self._started:
            with started:  # waits, and closes its pipes
                pass


@pytest.fixture
def commands(tmp_path: Path) -> Iterator[Commands]:
    commands = Commands(tmp_path)
    yield commands
    commands.close()


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "text.txt").write_text("the quick brown fox jumps over the lazy dog\n" * 300)
    return folder


def test_train_tells_machines_everything_and_leaves_a_run_directory(commands: Commands, data: Path) -> None:
    code, out, err = commands.run("train", "--json", "--data", str(data), "--out", "run", *FLAGS)
    assert code == 0, err
    commands.assert_none_left()
    assert err == ""
    *steps, summary = map(json.loads, out.splitlines())
    assert [step["step"] for step in steps] == [1, 2, 3, 4, 5]
    assert {"loss", "seconds", "bubble", "tokens_per_second", "gradient_norm", "learning_rate"} <= steps[0].keys()
    assert summary.keys() >= SUMMARY
    assert summary["verdict"] == "equal"
    assert [check["data_type"] for check in summary["checks"]] == ["float32", "float64"]
    # Of 1F1B with equal stages; what "auto" takes is no worse.
    assert 0 <= summary["theoretical_bubble"] <= 1 / 5 + 1e-9
    assert 0 < summary["bubble"] < 1
    assert summary["bits_per_byte"] == pytest.approx(summary["validation_loss"] / 0.693147, rel=1e-5)
    assert summary["tokens"] == 5 * 8 * 32
    assert summary["epochs"][0]["training_loss"] == pytest.approx(sum(step["loss"] for step in steps) / 5)

    run = commands.directory / "run"
    assert {path.name for path in run.iterdir()} == {
        "settings.toml",
        "plan.json",
        "report.json",
        "report.txt",
        "metrics.jsonl",
        "summary.json",
        "weights.safetensors",
        "logs",
    }
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in metrics if "loss" in line] == [1, 2, 3, 4, 5]
    assert [line["step"] for line in metrics if "validation_loss" in line] == [3, 5]
    assert len(json.loads((run / "plan.json").read_text())["stages"]) == 2
    report = json.loads((run / "report.json").read_text())
    assert (report["first_step"], report["last_step"], len(report["servers"])) == (2, 5, 2)
    assert report["seconds"] == {
        "predicted": summary["predicted_step_seconds"],
        "measured": summary["step_seconds"],
    }
    assert (run / "report.txt").read_text().splitlines()[-1] == f"• {summary['findings'][-1]}"
    assert {path.name for path in (run / "logs").iterdir()} == {"coordinator.log", "stage-0.log", "stage-1.log"}

    code, out, err = commands.run("sample", "run", "--prompt", "the quick", "--length", "20")
    assert code == 0, err
    assert out.startswith("the quick")
    assert len(out.encode(errors="surrogateescape")) >= 20

    # The same directory is not written over.
    code, out, err = commands.run("train", "--data", str(data), "--out", "run", *FLAGS)
    assert code == 2
    assert "not empty" in err


def wait_for_line(process: subprocess.Popen[str], pattern: str) -> re.Match[str]:
    assert process.stdout is not None
    for line in process.stdout:
        if found := re.search(pattern, line):
            return found
    raise AssertionError(f"no line like {pattern}: {process.communicate()[1]}")


def test_up_serves_train_and_status_until_ctrl_c(commands: Commands, data: Path) -> None:
    up = commands.start("up", "--stages", "2", "--parameter-servers", "1")
    address = wait_for_line(up, r"coordinator at (\S+), 2 stage servers, 1 parameter servers")[1]

    code, out, err = commands.run("status", GRADWIRE_COORDINATOR=address)
    assert code == 0, err
    assert out.count("free") == 3
    assert out.count("parameters") == 1
    code, out, err = commands.run("status", "--json", "--coordinator", address)
    assert code == 0, err
    assert len(json.loads(out)["servers"]) == 3

    arguments = ["--coordinator", address, "--data", str(data), "--no-check", *FLAGS]
    code, out, err = commands.run("train", *arguments, "--out", "plain")
    assert code == 0, err
    for expected in ("step 1/5", "after step 3", "bits a byte", "measured", "verdict: not checked", "gradwire sample"):
        assert expected in out

    code, out, err = commands.run("train", *arguments, "--stages", "3")
    assert code == 2
    assert "fewer stage servers than the plan takes" in err

    # Under autocast, with recomputation and a parameter server, and checked.
    flags = ["--precision", "bf16", "--recompute", "--json", "--coordinator", address, "--data", str(data)]
    flags += ["--exchange", "parameter-server"]
    code, out, err = commands.run("train", *FLAGS, *flags)
    assert code == 0, err
    summary = json.loads(out.splitlines()[-1])
    assert summary["verdict"] == "equal"
    assert [check["data_type"] for check in summary["checks"]] == ["float32 under bfloat16 autocast", "float64"]
    assert summary["checks"][0]["gradient_difference"] < 1e-3

    assert up.poll() is None
    up.send_signal(signal.SIGINT)
    _, err = up.communicate(timeout=20)
    assert (up.returncode, err.strip()) == (130, "Interrupted.")
    commands.assert_none_left()


def test_up_ends_with_an_error_when_a_server_ends(commands: Commands) -> None:
    up = commands.start("up", "--stages", "1")
    wait_for_line(up, r"coordinator at (\S+),")
    (stage,) = (process for process in commands.processes() if "gradwire_stage" in process.cmdline())
    stage.kill()
    _, err = up.communicate(timeout=30)
    assert up.returncode == 1
    assert "stage server 0 ended unexpectedly, by SIGKILL" in err
    commands.assert_none_left()


# From before the first import to the middle of training, which is where `seconds` is None.
@pytest.mark.parametrize(
    ("seconds", "number", "code"),
    [
        (0.05, signal.SIGINT, 130),
        (0.5, signal.SIGINT, 130),
        (1.0, signal.SIGINT, 130),
        (2.0, signal.SIGINT, 130),
        (3.5, signal.SIGTERM, 143),
        (None, signal.SIGINT, 130),
    ],
)
def test_a_signal_at_any_moment_leaves_no_process(
    commands: Commands, data: Path, seconds: float | None, number: int, code: int
) -> None:
    flags = [*FLAGS[: FLAGS.index("--steps")], "--steps", "100000"]
    process = commands.start("train", "--data", str(data), "--out", "run", *flags)
    if seconds is None:
        wait_for_line(process, r"step 1/")
    else:
        time.sleep(seconds)
    process.send_signal(number)
    early = seconds is not None and seconds < 0.1
    try:
        _, err = process.communicate(timeout=5 if early else 25)
    except subprocess.TimeoutExpired:
        if not early:
            raise
        # Python itself, on its way to our first line, can drop an interrupt: whoever pressed Ctrl-C presses it again.
        process.send_signal(number)
        _, err = process.communicate(timeout=25)
    if not early:  # before that, Python may not have come to its own handler
        # As a shell tells it, also where Python ends itself by the signal that it was given.
        assert process.returncode in (code, 128 - code), err
        assert "Traceback" not in err
    # A signal between a child's start and its entry in the books leaves it to end itself: it watches its parent.
    commands.assert_none_left(5.0)


@pytest.mark.fault
def test_kill_9_of_the_command_leaves_no_process(commands: Commands, data: Path) -> None:
    process = commands.start("train", "--data", str(data), "--steps", "100000", *FLAGS[:10])
    wait_for_line(process, r"step 1/")
    assert len(commands.processes()) == 4
    process.kill()
    process.communicate()
    commands.assert_none_left(12.0)


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--steps", "0"], 2, ["steps", "greater than or equal to 1"]),
        (["--steps", "many"], 2, ["steps"]),
        (["--schedule", "zigzag"], 2, ["schedule"]),
        (["--data", "empty"], 2, ["The data folder is empty", "remedy"]),
        (["--data", "nowhere"], 2, ["no such file or folder"]),
        (["--config", "nowhere.toml"], 2, ["cannot be read"]),
        (["--coordinator", "127.0.0.1:9"], 1, ["Cannot reach the coordinator at 127.0.0.1:9", "remedy"]),
        (["--coordinator", "nonsense"], 2, ["Not an address"]),
    ],
)
def test_wrong_input_is_told_in_a_few_lines(
    commands: Commands, arguments: list[str], code: int, words: list[str]
) -> None:
    (commands.directory / "empty").mkdir()
    began = time.monotonic()
    returned, _, err = commands.run("train", *arguments)
    assert time.monotonic() - began < 10.0
    assert returned == code
    assert "Traceback" not in err
    assert len(err.splitlines()) <= 12
    for word in words:
        assert word in err
    assert not (commands.directory / "runs").exists()


def test_a_busy_port_is_told(commands: Commands) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        code, _, err = commands.run("up", "--listen", address)
    assert code == 2
    assert f"Cannot listen on {address}" in err
    commands.assert_none_left()


def test_train_with_replicas_takes_servers_for_all_of_them(commands: Commands, data: Path) -> None:
    arguments = ["--json", "--no-check", "--data", str(data), "--out", "run", *FLAGS]
    code, out, err = commands.run("train", "--stages", "1", "--replicas", "2", "--compression", "int8", *arguments)
    assert code == 0, err
    assert len(out.splitlines()) == 6
    run = commands.directory / "run"
    assert {path.name for path in (run / "logs").iterdir()} == {"coordinator.log", "stage-0.log", "stage-1.log"}
    plan = json.loads((run / "plan.json").read_text())
    assert (plan["replica_shares"], plan["compression"]) == ([0.5, 0.5], "int8")
    assert [server["replica"] for server in json.loads((run / "report.json").read_text())["servers"]] == [0, 1]
    commands.assert_none_left()
