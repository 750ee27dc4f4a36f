"""`/metrics` of real programs: from NVML's stand-in, a job and its checkpoints to what Prometheus
reads; off unless it is asked for, and under TLS for those with a certificate alone.
"""

import ssl
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator

import pytest

from tests.e2e import work
from tests.e2e.certificates import Authority, Files
from tests.e2e.cluster import Cluster
from tests.e2e.work import Gate
from tests.fakenvml.build import h100
from tests.metrics.reading import Series, named, series

pytestmark = [pytest.mark.e2e, pytest.mark.xdist_group("e2e-metrics")]

(GPU,) = h100(1)
ON = {"metrics_listen": "127.0.0.1:0"}


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Both programs with their metrics on, the agent with NVIDIA's names too."""
    with Cluster(tmp_path_factory.mktemp("metrics") / "cluster") as made:
        made.start_coordinator(heartbeat_interval_ms=100, **ON)
        made.start_agent("n1", (GPU,), sample_interval_ms=100, metrics_dcgm_names=True, **ON)
        made.wait_for_nodes("n1")
        yield made


def read(url: str, context: ssl.SSLContext | None = None) -> str:
    assert url.startswith(("http://", "https://"))
    with urllib.request.urlopen(  # noqa: S310 - checked above
        url, timeout=work.DEADLINE_S, context=context
    ) as answer:
        return str(answer.read().decode())


def url(fleet: Cluster, name: str) -> str:
    return str(work.wait_log(fleet, name, "metrics.serving")["url"])


def wait_said(fleet: Cluster, name: str, wanted: Callable[[Series], bool], what: str) -> Series:
    """What a program says, once it is as wanted."""

    def look() -> Series | None:
        found = series(read(url(fleet, name)))
        return found if wanted(found) else None

    return fleet.wait_until(look, work.DEADLINE_S, what)


def test_an_agents_gpus_and_health(fleet: Cluster) -> None:
    found = wait_said(
        fleet,
        "n1",
        lambda it: bool(named(it, "baton_gpu_up")) and named(it, "baton_agent_link_up")[()] == 1,
        "a reading, and a link",
    )
    assert GPU.power_mw is not None
    assert named(found, "baton_gpu_power_watts") == {(GPU.name, GPU.uuid): GPU.power_mw / 1000}
    ((labels, percent),) = named(found, "DCGM_FI_DEV_GPU_UTIL").items()
    assert labels[1:] == (GPU.uuid, "0", GPU.name)
    assert percent == GPU.utilization_percent
    assert named(found, "baton_agent_link_up") == {(): 1}
    assert named(found, "baton_agent_sample_age_seconds")[()] >= 0
    assert named(found, "process_resident_memory_bytes")[()] > 1 << 20
    later = wait_said(
        fleet,
        "n1",
        lambda it: (
            named(it, "baton_agent_samples_total")[()]
            > named(found, "baton_agent_samples_total")[()]
        ),
        "another reading",
    )
    rounds = "baton_agent_loop_rounds_total"
    assert named(later, rounds)[()] > named(found, rounds)[()]


def test_a_jobs_life_is_counted(fleet: Cluster, gate: Gate) -> None:
    gate.open_to(2)
    job_id = work.submit(fleet, gate.job(steps=4, every=2), gpus=1)
    work.wait_committed(fleet, job_id, 2)
    found = wait_said(
        fleet,
        "coordinator",
        lambda it: named(it, "baton_jobs").get(("standard", "active")) == 1,
        "an active job",
    )
    assert named(found, "baton_attempts")["running",] == 1
    assert named(found, "baton_gpus") == {
        ("absent", GPU.name): 0,
        ("free", GPU.name): 0,
        ("held", GPU.name): 1,
    }
    assert named(found, "baton_nodes")["open", "up"] == 1
    assert named(found, "baton_sessions") == {(): 1}
    assert named(found, "baton_checkpoints") == {(): 1}
    assert named(found, "baton_coordinator_checkpoint_answers_total")["accepted",] == 1
    assert named(found, "baton_coordinator_batch_commit_seconds_count")[()] > 0
    assert named(found, "baton_coordinator_store_size_bytes")[()] > 0
    assert named(found, "baton_coordinator_leader_epoch") == {(): 1}
    agents = wait_said(
        fleet,
        "n1",
        lambda it: named(it, "baton_agent_attempts")["running",] == 1,
        "a running attempt",
    )
    assert named(agents, "baton_agent_checkpoints_stored_total") == {(): 1}
    assert named(agents, "baton_agent_checkpoints_proposed_total") == {(): 1}
    assert named(agents, "baton_agent_checkpoint_stored_bytes_total")[()] > 0
    gate.open_to(4)
    work.wait_succeeded(fleet, job_id)


def test_nothing_listens_unless_it_is_asked_to(fleet: Cluster) -> None:
    fleet.start_agent("n2", ())
    work.wait_log(fleet, "n2", "agent.started")
    assert not [line for line in fleet.log_lines("n2") if line["event"] == "metrics.serving"]
    fleet.stop_agent("n2")


def context(files: Files, *, certificate: bool) -> ssl.SSLContext:
    made = ssl.create_default_context(cafile=str(files.ca))
    made.verify_flags &= ~ssl.VERIFY_X509_STRICT
    if certificate:
        made.load_cert_chain(files.cert, files.key)
    return made


def test_under_tls_a_scraper_needs_a_certificate(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    directory = tmp_path_factory.mktemp("metrics-tls")
    authority = Authority(directory / "fleet")
    scraper = authority.issue("prometheus")
    with Cluster(directory / "cluster") as made:
        made.credentials = scraper.credentials()
        everywhere = {"metrics_listen": "0.0.0.0:0"}
        made.start_coordinator(**authority.issue("coordinator").config(), **everywhere)
        made.start_agent("n1", (GPU,), **authority.issue("n1").config(), **everywhere)
        for name, metric in (("coordinator", "baton_jobs"), ("n1", "baton_agent_attempts")):
            address = url(made, name).replace("//0.0.0.0:", "//127.0.0.1:")
            assert address.startswith("https://")
            assert named(series(read(address, context(scraper, certificate=True))), metric)
            with pytest.raises((urllib.error.URLError, ssl.SSLError, ConnectionError)):
                read(address, context(scraper, certificate=False))
            with pytest.raises((urllib.error.URLError, ConnectionError)):
                read(address.replace("https", "http"))
