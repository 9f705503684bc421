"""The harness as a process: readiness, health, metrics, signals, and the death of its parent."""

import json
import os
import signal
import subprocess
import sys
import time
import urllib.request

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from gradwire_protocol.channels import open_channel
from gradwire_protocol.errors import SettingsError
from gradwire_protocol.serving import Service, ServiceSettings

MAIN = """
import sys, time
from gradwire_protocol.serving import Service, ServiceSettings, exit_in_time, watch_stdin
watch_stdin()
if "slow" in sys.argv: time.sleep(60)
service = Service("test", ServiceSettings(ready_fd=int(sys.argv[1])))
service.install_signal_handlers()
service.start()
service.report_ready()
service.wait()
service.stop()
exit_in_time()
"""


@pytest.fixture
def process():
    read, write = os.pipe()
    child = subprocess.Popen([sys.executable, "-c", MAIN, str(write)], stdin=subprocess.PIPE, pass_fds=[write])
    os.close(write)
    with os.fdopen(read) as ready:
        child.addresses = json.loads(ready.readline())
        assert ready.read() == ""
    yield child
    child.kill()
    child.wait()
    child.stdin.close()


def test_a_ready_service_is_healthy_and_serves_metrics(process):
    with open_channel(process.addresses["address"]) as channel:
        reply = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=5)
        assert reply.status == health_pb2.HealthCheckResponse.SERVING
    with urllib.request.urlopen(f"http://{process.addresses['metrics_address']}/metrics", timeout=5) as page:
        assert page.status == 200


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_end_it_in_order(process, number):
    process.send_signal(number)
    assert process.wait(5) == 0


def test_it_ends_when_its_parent_lets_go(process):
    process.stdin.close()
    assert process.wait(5) == 0


def test_even_before_it_serves():
    child = subprocess.Popen([sys.executable, "-c", MAIN, "1", "slow"], stdin=subprocess.PIPE)
    time.sleep(0.8)
    child.stdin.close()
    assert child.wait(5) == -signal.SIGTERM


def test_busy_ports_and_undialable_addresses_are_refused():
    service = Service("one", ServiceSettings())
    with pytest.raises(SettingsError, match="Cannot listen on"):
        Service("two", ServiceSettings(listen=service.address))
    service.start()
    with pytest.raises(SettingsError, match="Cannot serve metrics"):
        Service("three", ServiceSettings(metrics_listen=service.metrics_address)).start()
    service.stop()
    with pytest.raises(SettingsError, match="others can dial"):
        Service("four", ServiceSettings(listen="0.0.0.0:0", insecure=True))
    everywhere = Service("five", ServiceSettings(listen="0.0.0.0:0", insecure=True, advertise="gpu-1:7070"))
    assert everywhere.address == "gpu-1:7070"


def test_a_stopped_service_refuses_calls():
    service = Service("one", ServiceSettings(metrics_listen=""))
    service.start()
    with open_channel(service.address) as channel:
        service.stop()
        with pytest.raises(grpc.RpcError):
            health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=1)
