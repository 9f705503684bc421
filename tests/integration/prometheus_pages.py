"""What Prometheus reads of servers."""

from __future__ import annotations

import time
import urllib.request
from collections.abc import Iterable

from prometheus_client.parser import text_string_to_metric_families

Page = dict[tuple[str, frozenset[tuple[str, str]]], float]


def page_text(address: str) -> str:
    with urllib.request.urlopen(f"http://{address}/metrics", timeout=5) as page:
        return str(page.read().decode())


def scrape(address: str) -> Page:
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(page_text(address))
        for sample in family.samples
    }


def total(samples: Page, name: str, **labels: str) -> float:
    wanted = set(labels.items())
    return sum(value for (found, their), value in samples.items() if found == name and wanted <= their)


def scrape_settled(addresses: Iterable[str], run: str) -> list[Page]:
    """The pages of all servers of a run, once what they sent each other is what they received.

    A message counts as sent when it is receipted, which may be after the step that it belongs to.
    """
    addresses = list(addresses)
    deadline = time.monotonic() + 10
    while True:
        pages = [scrape(address) for address in addresses]
        sent, received = (
            sum(_between_servers(page, run, direction) for page in pages) for direction in ("sent", "received")
        )
        if sent == received:
            return pages
        assert time.monotonic() < deadline, f"sent {sent:g} bytes, received {received:g}"
        time.sleep(0.05)


def _between_servers(page: Page, run: str, direction: str) -> float:
    name = "gradwire_transfer_bytes_total"
    return total(page, name, run=run, direction=direction) - total(
        page, name, run=run, direction=direction, peer="client"
    )
