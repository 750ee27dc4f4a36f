"""Exporters that others run on a GPU box for its figures, for the comparison in `bench.agent`.

Problem: what an agent costs says little without what people accept today. Here are two that install
from public packages: nvitop-exporter (PyPI; NVML in Python, as our sampler) and Prometheus' node
exporter (Debian; the host alone, in Go). Both do their work when they are scraped, so they are
scraped as often as the agent reads. DCGM-exporter needs a GPU and is not here.

What does not install is left out, and said.
"""

import shutil
import socket
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from pathlib import Path
from types import TracebackType
from typing import Self

from bench import report

PACKAGES = Path(__file__).parents[1] / "build/bench/nvitop-exporter"
INSTALL_S_MAX = 120
SCRAPE_S_MAX = 5.0


def nvitop_exporter() -> tuple[list[str], dict[str, str]] | None:
    """Command (without its port) and variables; installs it beside our own packages, once."""
    if not (PACKAGES / "nvitop_exporter").is_dir():
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--target", str(PACKAGES)]
        done = subprocess.run(
            [*command, "nvitop-exporter"], check=False, timeout=INSTALL_S_MAX, capture_output=True
        )
        if done.returncode != 0:
            report.say("agent: nvitop-exporter does not install here and is left out")
            return None
    words = ["-P", "-m", "nvitop_exporter", "--bind-address", "127.0.0.1", "--interval", "1.0"]
    return [sys.executable, *words, "--port"], {"PYTHONPATH": str(PACKAGES)}


def node_exporter() -> tuple[list[str], dict[str, str]] | None:
    """The same for Prometheus' own; its address ends in the port."""
    program = shutil.which("prometheus-node-exporter")
    if program is None:
        report.say(
            "agent: prometheus-node-exporter is not installed here and is left out "
            "(sudo apt-get install prometheus-node-exporter)"
        )
        return None
    return [program, "--web.listen-address=127.0.0.1:"], {}


def free_port() -> int:
    """One that nobody listens on; neither exporter can choose by itself and say which."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Scraper:
    """Reads these URLs once a second, as Prometheus would; a context manager."""

    def __init__(self, urls: list[str]) -> None:
        self._urls = urls
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self.answers = dict.fromkeys(urls, 0)
        """How many scrapes of each were answered."""

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._end.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._end.wait(1.0):
            for url in self._urls:
                try:
                    with urllib.request.urlopen(  # noqa: S310 - ours, on loopback
                        url, timeout=SCRAPE_S_MAX
                    ) as answer:
                        answer.read()
                except (urllib.error.URLError, TimeoutError, ConnectionError):
                    continue  # not up yet; who never answers is missing in `answers`
                self.answers[url] += 1
