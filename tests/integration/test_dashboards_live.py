"""A real Prometheus watches real runs: every panel and every rule has data, and what happens is seen.

The tests of this file are one story, in this order: runs that go well, one that stands still, one that fails.
"""

from __future__ import annotations

import math
import re
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager

import psutil
import pytest
import torch
import torch.nn.functional as F
import yaml
from prometheus_pages import page_text
from torch import nn
from watched_cluster import WatchedCluster, watched_cluster

import gradwire
from dashboard_queries import PanelQuery, ask, panel_queries, shown
from exported_metrics import metric_types, pages
from prometheus_tools import ALERTS, promtool

pytestmark = pytest.mark.deploy

RATE_INTERVAL = "5s"
REPLICAS = gradwire.Plan(
    stages=2, replicas=2, microbatches=4, cuts=["2"], compression="int8", activation_compression="int8"
)
PARAMETER_SERVER = gradwire.Plan(
    stages=2, replicas=2, microbatches=4, cuts=["2"], exchange="parameter-server(staleness=1)"
)
WIDTH, ROWS = 64, 32


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WatchedCluster]:
    with watched_cluster(tmp_path_factory.mktemp("watched")) as made:
        yield made


@pytest.fixture(scope="module")
def cluster(watched: WatchedCluster) -> Iterator[gradwire.Cluster]:
    with watched.connect() as made:
        yield made


def a_trainer(cluster: gradwire.Cluster, plan: gradwire.Plan) -> tuple[gradwire.Trainer, tuple[torch.Tensor, ...]]:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, 8))
    batch = torch.randn(ROWS, WIDTH), torch.randint(0, 8, (ROWS,))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    return cluster.trainer(model, optimizer, loss=F.cross_entropy, example=batch, plan=plan), batch


@pytest.fixture(scope="module")
def trained(watched: WatchedCluster, cluster: gradwire.Cluster) -> tuple[float, float, list[str], int]:
    """When runs with replicas, and with parameter servers, began and ended; their names, and the first one's steps."""
    began, names, steps = time.time(), [], 0
    for plan in (REPLICAS, PARAMETER_SERVER):
        trainer, batch = a_trainer(cluster, plan)
        with trainer:
            names.append(trainer.run_id)
            started = time.monotonic()
            while time.monotonic() - started < 4:
                trainer.step(*batch)
                steps += plan is REPLICAS
            if plan is REPLICAS:
                trainer.save("live", storage="server")
            time.sleep(1.5)  # for another scrape or two
    return began, time.time(), names, steps


def test_the_pages_of_real_services_are_as_they_should_be(
    watched: WatchedCluster, trained: tuple[float, float, list[str], int]
) -> None:
    """Names follow Prometheus' rules, and are those that other tests and the documentation go by."""
    for name, address in watched.metrics.items():
        page = page_text(address)
        assert promtool("check", "metrics", page=page) == "", name
        expected = pages()["coordinator" if name == "coordinator" else "stage server"]
        assert metric_types(page) == metric_types(expected), name
    assert 'gradwire_info{role="parameter"' in page_text(watched.metrics["parameter"])


@pytest.mark.parametrize("query", panel_queries(RATE_INTERVAL), ids=lambda query: f"{query.dashboard}-{query.panel}")
def test_every_panel_has_data(
    watched: WatchedCluster, trained: tuple[float, float, list[str], int], query: PanelQuery
) -> None:
    began, ended, *_ = trained
    found = shown(watched.prometheus, query, began, ended)
    assert any(math.isfinite(value) for _, values in found for value in values), f"no data: {query}"
    for labels, _ in found:
        assert set(re.findall(r"\{\{(\w+)\}\}", query.legend)) <= set(labels), f"nothing to show in the legend: {query}"


def test_every_rule_has_data(watched: WatchedCluster, trained: tuple[float, float, list[str], int]) -> None:
    began, ended, names, _ = trained
    groups = yaml.safe_load(ALERTS.read_text())["groups"]
    for record in [rule["record"] for group in groups for rule in group["rules"] if "record" in rule]:
        found = ask(watched.prometheus, "query_range", query=record, start=began, end=ended, step=0.5)["result"]
        servers = [{name: series["metric"][name] for name in ("run", "stage", "replica")} for series in found]
        # Two stages in two replicas for each run; not the parameter server.
        assert len(servers) == 8, record
        assert {each["run"] for each in servers} == set(names)
        assert {each["stage"] for each in servers} == {"0", "1"}
    for rule in ask(watched.prometheus, "rules")["groups"]:
        assert [each for each in rule["rules"] if each["health"] != "ok"] == []


def test_shares_of_a_stages_time_add_up(watched: WatchedCluster, trained: tuple[float, float, list[str], int]) -> None:
    """What is computed, what is encoded and decoded, and what is waited is all there is."""
    _, ended, *_ = trained
    matched = "gradwire_stage_busy_seconds_total{phase=~'encode|decode'}"
    coding = f"sum without (phase) (rate({matched}[5m])) / stage:gradwire_accounted_seconds:rate5m"
    whole = f"stage:gradwire_utilisation:ratio_rate5m + stage:gradwire_bubble:ratio_rate5m + {coding}"
    found = ask(watched.prometheus, "query", query=whole, time=ended)["result"]
    assert len(found) == 8
    # Rules are evaluated a little earlier than the query.
    assert [float(series["value"][1]) for series in found] == pytest.approx([1.0] * 8, abs=0.02)


def test_figures_are_those_of_the_run(watched: WatchedCluster, trained: tuple[float, float, list[str], int]) -> None:
    _, _, (first, second), steps = trained

    def value(expression: str) -> float:
        (series,) = ask(watched.prometheus, "query", query=expression)["result"]
        return float(series["value"][1])

    assert value(f'gradwire_steps_total{{run="{first}"}}') == steps
    # float32 and its gradients in int8 with a scale for each 256, and whatever is too small to gain by it.
    ratio = f'{{run="{first}", kind=~"forward|backward"}}'
    decoded, encoded = (
        f"sum(max_over_time({name}{ratio}[10m]))"
        for name in ("gradwire_transfer_decoded_bytes_total", "gradwire_transfer_bytes_total")
    )
    received = encoded.replace("{run", '{direction="received", run')
    assert 3.5 < value(f"{decoded} / {received}") < 4
    gradients = f'sum(max_over_time(gradwire_exchange_gradient_bytes_total{{run="{first}"}}[10m]))'
    sent = f'sum(max_over_time(gradwire_transfer_bytes_total{{run="{first}", direction="sent", kind="reduce"}}[10m]))'
    # Two replicas send a byte for each of gradients. int8 takes a quarter of it; what goes with it is as it is.
    assert 0.25 < value(f"{sent} / {gradients}") < 0.6
    assert value(f'max(max_over_time(gradwire_weights_behind_steps{{run="{second}"}}[10m]))') == 1


@contextmanager
def frozen(watched: WatchedCluster, name: str) -> Iterator[None]:
    """Stop a server for the block."""
    process = psutil.Process(watched.processes[name].process_id)
    process.send_signal(signal.SIGSTOP)
    try:
        yield
    finally:
        process.send_signal(signal.SIGCONT)


@contextmanager
def going_on(trainer: gradwire.Trainer, batch: tuple[torch.Tensor, ...]) -> Iterator[None]:
    """Train for the block, on a thread that takes results as they come: the run waits for nobody but its servers."""
    ended = threading.Event()

    def train() -> None:
        with closing(trainer.run([batch], steps=100_000, progress=False)) as results:
            for _ in results:
                if ended.is_set():
                    return

    with ThreadPoolExecutor(1) as pool:
        training = pool.submit(train)
        try:
            yield
        finally:
            ended.set()
            training.result(60)


def test_a_run_that_stands_still_is_seen_to_do_so(watched: WatchedCluster, cluster: gradwire.Cluster) -> None:
    trainer, batch = a_trainer(cluster, REPLICAS)
    with trainer:
        still, steps = (f'gradwire_{what}{{run="{trainer.run_id}"}}' for what in ("run_still_seconds", "steps_total"))
        with going_on(trainer, batch):
            watched.wait_until(f"{steps} > 0")
            with frozen(watched, "stage-1"):
                watched.wait_until(f"{still} > 2", seconds=12)
                (before,) = watched.wait_until(steps)
            # It goes on, and is not taken for a stalled one any more.
            watched.wait_until(f"{steps} > {float(before['value'][1]) + 20}")
            watched.wait_until(f"{still} < 1")
    watched.wait_until(f"absent({still})")


def test_a_lost_server_and_its_run_are_alarming(watched: WatchedCluster, cluster: gradwire.Cluster) -> None:
    firing = 'ALERTS{alertstate="firing", alertname="%s"}'
    for name in ("GradwireServerLost", "GradwireRunFailed"):
        assert ask(watched.prometheus, "query", query=firing % name)["result"] == []
    trainer, batch = a_trainer(cluster, REPLICAS)
    with trainer:
        results = trainer.run([batch], steps=100_000, progress=False)
        next(results)
        watched.processes["stage-2"].kill()
        with pytest.raises(gradwire.StageFailed):
            for _ in results:
                pass
    (lost,) = watched.wait_until(firing % "GradwireServerLost")
    assert lost["metric"]["role"] == "stage"
    assert lost["metric"]["reason"] in ("silent", "unreachable")
    assert lost["metric"]["severity"] == "critical"
    (failed,) = watched.wait_until(firing % "GradwireRunFailed")
    assert failed["metric"]["reason"] == "StageFailed"
    # Fires only after a minute.
    (down,) = watched.wait_until('ALERTS{alertstate="pending", alertname="GradwireTargetDown"}')
    assert down["metric"]["instance"] == watched.metrics["stage-2"]
