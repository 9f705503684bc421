"""Descriptors between processes: who gets one, who does not, and what is left behind."""

import contextlib
import os
import resource
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest

from gradwire_protocol.handover import Directory, Handover, take_over
from gradwire_protocol.shared_block import BlockError

TICKET = bytes(range(16))


def descriptors():
    return len(os.listdir("/proc/self/fd"))


@contextlib.contextmanager
def serving(parent, ticket=TICKET):
    """A handover on another thread; yields it and the list of what it gave (paths)."""
    given, over = [], threading.Event()

    def descriptor():
        made = os.open("/dev/null", os.O_RDONLY)
        given.append("/dev/null")
        return made

    with Handover(parent) as handover:
        thread = threading.Thread(target=lambda: handover.serve(ticket, descriptor, over.is_set))
        thread.start()
        try:
            yield handover, given
        finally:
            over.set()
            thread.join()


def test_who_knows_the_ticket_gets_the_descriptor(tmp_path):
    before = descriptors()
    with serving(tmp_path) as (handover, given):
        descriptor = take_over(tmp_path, handover.name, TICKET, 2)
        assert os.readlink(f"/proc/self/fd/{descriptor}") == "/dev/null"
        assert not os.get_inheritable(descriptor)
        os.close(descriptor)
    assert given
    assert descriptors() == before
    assert os.listdir(tmp_path / f"gradwire-shared-{os.geteuid()}") == []


def test_a_long_path_is_no_hindrance(tmp_path):
    deep = tmp_path / ("x" * 150) / ("y" * 150)
    deep.mkdir(parents=True)
    with serving(deep) as (handover, _):
        os.close(take_over(deep, handover.name, TICKET, 2))


@pytest.mark.parametrize("ticket", [bytes(16), TICKET[:-1], b"", TICKET[::-1]])
def test_others_get_nothing_and_do_not_hinder_the_right_one(tmp_path, ticket):
    with (
        serving(tmp_path) as (handover, given),
        Directory(tmp_path) as directory,
        socket.socket(socket.AF_UNIX) as wrong,
    ):
        wrong.connect(directory.address(handover.name))
        wrong.sendall(ticket)
        wrong.shutdown(socket.SHUT_WR)
        assert wrong.recv(1) == b""
        assert not given
        os.close(take_over(tmp_path, handover.name, TICKET, 2))
        assert len(given) == 1


def test_another_hosts_socket_is_not_found(tmp_path):
    with pytest.raises(BlockError, match="another host") as caught:
        take_over(tmp_path, "0" * 32, TICKET, 2)
    assert caught.value.reason == "other-host"


@pytest.mark.parametrize("name", ["", "../x", "/run/docker.sock", "0" * 31, "G" * 32, "0" * 32 + "\n", "." + "0" * 31])
def test_only_handovers_can_be_reached(tmp_path, name):
    with pytest.raises(BlockError, match="not the name"):
        take_over(tmp_path, name, TICKET, 2)


def test_a_socket_that_nobody_serves_ends_in_time(tmp_path):
    with Handover(tmp_path) as handover:
        start = time.monotonic()
        with pytest.raises(BlockError, match="not handed over"):
            take_over(tmp_path, handover.name, TICKET, 0.2)
        assert time.monotonic() - start < 2


def test_an_offer_that_is_over_ends_the_wait(tmp_path):
    with Handover(tmp_path) as handover:
        assert handover.serve(TICKET, pytest.fail, iter([False, False, True]).__next__) is False


def test_a_directory_that_others_can_enter_or_own_is_refused(tmp_path):
    directory = tmp_path / f"gradwire-shared-{os.geteuid()}"
    directory.mkdir(0o700)
    directory.chmod(0o750)
    with pytest.raises(BlockError, match="not private") as caught:
        Handover(tmp_path)
    assert caught.value.reason == "not-allowed"
    directory.rmdir()
    directory.symlink_to("/tmp")
    with pytest.raises(BlockError, match="cannot be used"):
        Handover(tmp_path)
    with pytest.raises(BlockError, match="cannot be used"):
        Handover(tmp_path / "missing")


@pytest.fixture
def open_directory():
    """One that every user can enter, with a path that is short enough for a socket's address."""
    with tempfile.TemporaryDirectory(dir="/tmp") as path:
        Path(path).chmod(0o711)
        yield Path(path)


def as_nobody(script, *arguments):
    """Run a script as another user; return its output, and its errors if there is none."""
    # What is imported, as root: another user may not be able to read it.
    become = "import os, socket, sys, traceback\nfrom pathlib import Path\nfrom gradwire_protocol import handover\n"
    become += "os.setgid(65534); os.setuid(65534)\n"
    command = [sys.executable, "-c", become + script, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    return done.stdout or done.stderr


@pytest.mark.skipif(os.geteuid() != 0, reason="needs to become another user")
def test_another_user_is_refused_on_both_sides(open_directory):
    """Even where both can see the socket: each checks whom the kernel says that it talks to."""
    taker = """
parent, own, name = Path(sys.argv[1]), Path("/tmp"), sys.argv[2]
# As if the directories of the two users were one.
handover.Directory.address = lambda self, name: f"{parent}/gradwire-shared-0/{name}"
handover.Directory.__init__ = lambda self, parent: setattr(self, "descriptor", handover.os.open("/", 0))
try:
    handover.take_over(own, name, bytes(range(16)), 2)
except handover.BlockError as error:
    print(error.reason, error)
"""
    without_checks = """
with socket.socket(socket.AF_UNIX) as connection:
    connection.connect(sys.argv[1])
    connection.sendall(bytes(range(16)))
    print(socket.recv_fds(connection, 1, 1)[:2])
"""
    with serving(open_directory) as (served, given):
        directory = open_directory / "gradwire-shared-0"
        directory.chmod(0o711)
        (directory / served.name).chmod(0o666)
        assert as_nobody(taker, open_directory, served.name) == "not-allowed its socket is another user's: 0\n"
        said = as_nobody(without_checks, directory / served.name)
        assert said == "(b'', [])\n" or "ConnectionReset" in said or "BrokenPipe" in said
        assert not given


def test_sockets_of_the_killed_are_swept_and_no_others(tmp_path):
    script = (
        "import sys, time; from pathlib import Path; from gradwire_protocol.handover import Handover\n"
        "made = Handover(Path(sys.argv[1])); print(made.name, flush=True); time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    name = process.stdout.readline().strip()
    with serving(tmp_path) as (handover, _), Directory(tmp_path) as directory:
        assert directory.sweep() == 0
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        with pytest.raises(BlockError, match="cannot be reached"):
            take_over(tmp_path, name, TICKET, 2)
        private = tmp_path / f"gradwire-shared-{os.geteuid()}"
        (private / "a file").write_text("not ours to remove")
        young, old = socket.socket(socket.AF_UNIX), socket.socket(socket.AF_UNIX)
        for made, unfinished in ((young, ".young"), (old, ".old")):
            made.bind(directory.address(unfinished))
            made.close()
        os.utime(private / ".old", (0, 0))
        assert directory.sweep() == 2
        assert sorted(os.listdir(private)) == sorted([".young", "a file", handover.name])
        os.close(take_over(tmp_path, handover.name, TICKET, 2))  # the sweep does not hinder it


def test_descriptors_may_have_high_numbers(tmp_path):
    """As in a server with very many connections: `select` takes none from 1,024 on."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < 1200:
        pytest.skip("a process may have too few descriptors here")
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(before[0], 1200), hard))
    taken = [os.open("/dev/null", os.O_RDONLY)]
    try:
        while taken[-1] < 1024:
            taken.append(os.dup(taken[0]))
        with serving(tmp_path) as (handover, given):
            os.close(take_over(tmp_path, handover.name, TICKET, 2))
        assert given
    finally:
        for descriptor in taken:
            os.close(descriptor)
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
