"""Mutual TLS between real programs: who has no certificate of the fleet's authority reaches
nothing, an agent is only the node that its certificate names, and nothing listens beyond loopback
without it.
"""

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import grpc
import pytest

from protos.baton.v1 import nodes_pb2, nodes_pb2_grpc, peer_pb2, peer_pb2_grpc
from tests.e2e import work
from tests.e2e.certificates import Authority, Files
from tests.e2e.cluster import Cluster
from tests.e2e.trainers.counting import chain
from tests.e2e.work import Gate
from tests.fakenvml.build import h100

pytestmark = [pytest.mark.e2e, pytest.mark.xdist_group("e2e-tls")]


@dataclass(frozen=True, slots=True)
class Fleet:
    """A cluster under TLS, its authority, and a stranger's."""

    cluster: Cluster
    authority: Authority
    stranger: Authority
    user: Files

    def baton(self, *words: str) -> subprocess.CompletedProcess[str]:
        """The command line with a user's certificate."""
        return self.cluster.baton(*self.user.flags(), *words)


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    """A coordinator and two agents, each with a certificate of its own."""
    directory = tmp_path_factory.mktemp("tls")
    authority, stranger = Authority(directory / "fleet"), Authority(directory / "stranger")
    user = authority.issue("a-user")
    with Cluster(directory / "cluster") as made:
        made.credentials = user.credentials()
        made.start_coordinator(**authority.issue("coordinator").config())
        for name in ("n1", "n2"):
            made.start_agent(name, h100(1, node=name), **authority.issue(name).config())
        made.wait_for_nodes("n1", "n2")
        yield Fleet(made, authority, stranger, user)


def list_nodes(fleet: Fleet, credentials: grpc.ChannelCredentials | None) -> None:
    """One call over a channel of its own."""
    address = fleet.cluster.address
    channel = (
        grpc.secure_channel(address, credentials) if credentials else grpc.insecure_channel(address)
    )
    with channel:
        stub = nodes_pb2_grpc.NodeServiceStub(channel)
        stub.ListNodes(nodes_pb2.ListNodesRequest(), timeout=work.DEADLINE_S)


def test_right_certificate_is_let_in(fleet: Fleet) -> None:
    list_nodes(fleet, fleet.user.credentials())
    done = fleet.baton("nodes", "--json")
    assert done.returncode == 0, done.stderr
    assert '"n1"' in done.stdout


def test_client_without_a_certificate_is_refused(fleet: Fleet) -> None:
    bare = grpc.ssl_channel_credentials(fleet.authority.path.read_bytes())
    for credentials in (bare, None):
        with pytest.raises(grpc.RpcError) as raised:
            list_nodes(fleet, credentials)
        assert raised.value.code() is grpc.StatusCode.UNAVAILABLE
    done = fleet.cluster.baton("nodes")
    assert done.returncode == 3
    assert fleet.cluster.address in done.stderr


def test_certificate_of_another_authority_is_refused(fleet: Fleet) -> None:
    theirs = fleet.stranger.issue("a-user")
    posing = Files(theirs.cert, theirs.key, fleet.authority.path)
    for files in (theirs, posing):
        with pytest.raises(grpc.RpcError) as raised:
            list_nodes(fleet, files.credentials())
        assert raised.value.code() is grpc.StatusCode.UNAVAILABLE
        assert fleet.cluster.baton(*files.flags(), "nodes").returncode == 3


def test_agent_is_only_the_node_that_its_certificate_names(fleet: Fleet) -> None:
    fleet.cluster.start_agent("n3", (), **fleet.authority.issue("not-n3").config())
    closed = work.wait_log(fleet.cluster, "n3", "link.closed")
    assert "not-n3" in str(closed["reason"])
    assert "names not-n3, localhost, 127.0.0.1, not node n3: give the" in str(closed["reason"])
    assert "n3" not in fleet.cluster.node_phases()
    fleet.cluster.stop_agent("n3")


def test_agent_of_another_authority_is_refused(fleet: Fleet) -> None:
    fleet.cluster.start_agent("n4", (), **fleet.stranger.issue("n4").config())
    work.wait_log(fleet.cluster, "n4", "link.closed")
    assert "n4" not in fleet.cluster.node_phases()
    fleet.cluster.stop_agent("n4")


def test_checkpoints_and_logs_travel_under_tls(fleet: Fleet, gate: Gate) -> None:
    cluster = fleet.cluster
    gate.open_to(3)
    job_id = work.submit(cluster, gate.job(steps=4, every=2), gpus=1)
    job = work.wait_committed(cluster, job_id, 2)
    assert sorted(job.checkpoint.replicas) == ["n1", "n2"]
    work.wait_step(cluster, job_id, 3)
    assert fleet.baton("drain", job.attempts[0].node).returncode == 0
    again = work.wait_running(cluster, job_id, 2)
    assert again.restored_step == 3
    gate.open_to(4)
    work.wait_succeeded(cluster, job_id)
    read = fleet.baton("logs", str(job_id))
    assert work.parsed(read.stdout)[-1]["value"] == chain(4)
    assert fleet.baton("uncordon", job.attempts[0].node).returncode == 0


def test_peer_service_wants_a_certificate_too(fleet: Fleet) -> None:
    address = work.node(fleet.cluster, "n1").peer_address
    bare = grpc.ssl_channel_credentials(fleet.authority.path.read_bytes())
    with grpc.secure_channel(address, bare) as channel:
        stub = peer_pb2_grpc.PeerServiceStub(channel)
        with pytest.raises(grpc.RpcError) as raised:
            stub.FindMissing(peer_pb2.FindMissingRequest(), timeout=work.DEADLINE_S)
    assert raised.value.code() is grpc.StatusCode.UNAVAILABLE


@pytest.mark.parametrize("package", ["coordinator", "agent"])
@pytest.mark.parametrize("address", ["0.0.0.0:0", "[::]:0"])
def test_beyond_loopback_nothing_starts_without_tls(
    package: str, address: str, tmp_path: Path
) -> None:
    words = [f"--listen={address}", f"--state-directory={tmp_path / 'state'}"]
    if package == "agent":
        words += [f"--runtime-directory={tmp_path / 'run'}", "--node=n1"]
    done = subprocess.run(
        [sys.executable, "-P", "-m", package, *words],
        capture_output=True,
        text=True,
        timeout=work.DEADLINE_S,
        check=False,
    )
    assert done.returncode == 2
    assert f"listening on {address} needs mutual TLS" in done.stderr
    assert "--tls-cert" in done.stderr
    assert not (tmp_path / "state").exists()
