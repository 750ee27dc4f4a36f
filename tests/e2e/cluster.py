"""A whole Baton on loopback: one coordinator, any number of agents, each a real process.

Problem: a test of the whole path needs the real programs, ports that are free, GPUs on a machine
that has none, a way to kill a node as a power cut does, and certainty that nothing is left behind,
whatever happens to the test. All of that is here, so that a test says only what happens and what
must hold.

Every program gets a directory of its own below the cluster's: `n1/` is the disk of node n1, and
`kill_node` takes it away. Sockets lie in a short directory below /tmp, because the path of a socket
is limited. Ports are chosen by the programs (port 0) and read from their port files; but for the
coordinator's, which is its own also between its end and its next start. GPUs are those of the
stand-in for NVML, which the agent loads as it would load the driver's; trainers get an environment
without it. Waiting is polling for a condition with a deadline; nothing sleeps.
"""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

import grpc

from agent.sources import toml_value
from protos.baton.v1 import (
    jobs_pb2,
    jobs_pb2_grpc,
    nodes_pb2,
    nodes_pb2_grpc,
    types_pb2,
)
from tests import held_port
from tests.e2e import guardian
from tests.fakenvml.build import FakeGpu, build, describe, environment

ROOT = Path(__file__).resolve().parents[2]
LOOPBACK = f"{held_port.HOST}:0"
# A busy two-core machine needs some seconds to import what a daemon or the command line imports, a
# coordinator ends calls within a second, an agent says goodbye within another. Far above all that,
# so that only a hang meets it.
START_DEADLINE_S = STOP_DEADLINE_S = COMMAND_DEADLINE_S = 120.0
POLL_S = 0.05
LOG_TAIL_LINES = 15

# No process is starved for so long: without it a busy machine loses nodes on which nothing happens.
# The end of a connection is noticed as soon as ever. Not for who measures how soon a node is lost.
PATIENT = {"lease_ms": 60_000, "suspect_ms": 60_000, "restart_grace_ms": 60_000}

# One thread per trainer: on a small machine, more of them only fight. No hub is asked for anything.
TRAINER_VARIABLES = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}

_Found = TypeVar("_Found")


class ClusterError(AssertionError):
    """A program did not do what it must; the text says which and shows the end of its log."""


@dataclass(frozen=True, slots=True)
class Launch:
    """All that it takes to start a program of a cluster."""

    command: list[str]
    directory: str
    environment: dict[str, str]
    log: str

    def start(self) -> subprocess.Popen[bytes]:
        """In a session of its own, and with its log appended to."""
        with Path(self.log).open("ab") as log:
            return subprocess.Popen(
                self.command,
                cwd=self.directory,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )


class Cluster:
    """Use as a context manager, or call `open` and `stop`. `directory` is made; what is in it from
    an earlier cluster is kept, so a second one on it finds the same state. `patient`: its nodes are
    not lost for being slow; without it, how soon they are is the product's own choice."""

    def __init__(self, directory: Path, *, patient: bool = True) -> None:
        self.directory = directory.resolve()
        self._patient = patient
        self.runtime_directory = Path()
        self.address = ""
        # For `channel`, where the coordinator wants a certificate.
        self.credentials: grpc.ChannelCredentials | None = None
        self._guardian: subprocess.Popen[bytes] | None = None
        self._programs: dict[str, subprocess.Popen[bytes]] = {}
        self._channel: grpc.Channel | None = None
        self._holding = contextlib.ExitStack()
        self._port = 0
        self._pause = threading.Event()

    # --- life -------------------------------------------------------------------------------------

    def open(self) -> None:
        """Make the directories, and start the guardian that outlives us."""
        self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.runtime_directory = Path(tempfile.mkdtemp(prefix="baton-"))
        self._port = self._holding.enter_context(held_port.held_port())
        self._guardian = subprocess.Popen(
            [sys.executable, "-m", "tests.e2e.guardian", self.runtime_directory, self.directory],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            start_new_session=True,  # Ctrl-C is not for it
        )

    def stop(self) -> None:
        """End everything that this cluster started; twice is once. The directory stays."""
        if self._guardian is None:
            return
        if self._channel is not None:
            self._channel.close()
            self._channel = None
        guardian.end(self.runtime_directory, self.directory)
        for program in self._programs.values():
            program.wait()
        self._programs.clear()
        assert self._guardian.stdin is not None
        self._guardian.stdin.close()
        self._guardian.wait()
        self._guardian = None
        self._holding.close()

    def __enter__(self) -> Self:
        self.open()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()
        if kind is None:
            self._check_events()

    # --- programs ---------------------------------------------------------------------------------

    def start_coordinator(self, **config: object) -> None:
        """Start it, or start it again on the same port and store; returns when it serves.

        `config` are fields of `coordinator.config.Config`.
        """
        values = {
            "listen": f"{held_port.HOST}:{self._port}",
            "state_directory": str(self.directory / "coordinator"),
            **(PATIENT if self._patient and "lease_ms" not in config else {}),
            **config,
        }
        launch = self._prepare("coordinator", "coordinator", values, {})
        self.address = self._start("coordinator", launch)

    def start_agent(
        self, node: str, fake_gpus: Sequence[FakeGpu] | None = (), **config: Any
    ) -> None:
        """Start the agent of a node, or start it again on what its disk holds; returns when it
        serves.

        `fake_gpus` are what the stand-in for NVML shows; `None` means the machine's real ones.
        `config` are fields of `agent.config.Config`, such as `gpus`, which limits what jobs see;
        `trainer_environment` adds to what every trainer here gets.
        """
        self._start(node, self.prepare_agent(node, fake_gpus, **config))

    def prepare_agent(
        self,
        node: str,
        fake_gpus: Sequence[FakeGpu] | None = (),
        *,
        trainer_environment: Mapping[str, str] | None = None,
        **config: object,
    ) -> "Launch":
        """The same, for somebody else who starts it and ends it; `stop` ends it in any case."""
        variables = {}
        if fake_gpus is not None:
            library = build()
            description = self.node_directory(node).with_suffix(".gpus")
            describe(fake_gpus, description)
            variables = environment(library, description)
        trainers = {"LD_LIBRARY_PATH": os.environ.get("LD_LIBRARY_PATH", ""), **TRAINER_VARIABLES}
        trainers |= trainer_environment or {}
        values: dict[str, object] = {
            "node": node,
            "coordinator": self.address,
            "listen": LOOPBACK,
            "state_directory": str(self.node_directory(node)),
            "runtime_directory": str(self.runtime_directory / node),
            "trainer_environment": trainers,
            "warm_start": False,  # seconds of a core for each agent; who wants it says so
        }
        return self._prepare(node, "agent", {**values, **config}, variables)

    def stop_agent(self, node: str) -> None:
        """SIGTERM, as an upgrade does: it says goodbye, and its trainers go on."""
        self._terminate(node)

    def stop_coordinator(self) -> None:
        """SIGTERM; training goes on."""
        self._terminate("coordinator")

    def kill_agent(self, node: str) -> None:
        """SIGKILL to the agent's process alone; its trainers go on."""
        self._kill(node)

    def kill_coordinator(self) -> None:
        """SIGKILL in the middle of whatever it does."""
        self._kill("coordinator")

    def kill_node(self, node: str) -> int:
        """As a power cut with a broken disk: the agent and everything that it started are killed,
        and its state directory is gone. Returns how many processes that were."""
        self._kill(node)  # first: it must not see its trainers end and say so
        disk = self.node_directory(node)
        killed = guardian.end(self.runtime_directory / node, disk)

        def gone() -> bool:
            # What was killed in the middle of a rename may still be on its way out.
            shutil.rmtree(disk, ignore_errors=True)
            return not disk.exists()

        self.wait_until(gone, STOP_DEADLINE_S, f"the disk of {node} is gone")
        return 1 + killed

    def signal(self, name: str, number: signal.Signals) -> None:
        """Send a signal to the process of a node's agent, or of the `coordinator`."""
        self._programs[name].send_signal(number)

    def is_running(self, name: str) -> bool:
        """Whether the process of a node's agent, or of the `coordinator`, lives."""
        program = self._programs.get(name)
        return program is not None and program.poll() is None

    def pid(self, name: str) -> int:
        """Of a node's agent, or of the `coordinator`."""
        return self._programs[name].pid

    def node_directory(self, node: str) -> Path:
        """The disk of a node."""
        return self.directory / node

    def log_path(self, name: str) -> Path:
        """Where a program's log goes; it is appended to at each start."""
        return self.directory / f"{name}.log"

    def log_lines(self, name: str) -> list[dict[str, Any]]:
        """What a program has logged so far, in all its lives."""
        text = self.log_path(name).read_text("utf-8")
        whole = text.split("\n")[:-1]  # the last one may still be on its way
        return [json.loads(line) for line in whole if line.startswith("{")]

    def helper_environment(self) -> dict[str, str]:
        """For other programs that must not outlive this cluster."""
        inherited = {
            name: value for name, value in os.environ.items() if not name.startswith("BATON_")
        }
        return {**inherited, **TRAINER_VARIABLES, guardian.MARK: f"{self.runtime_directory}/"}

    def _prepare(
        self, name: str, package: str, values: dict[str, object], variables: dict[str, str]
    ) -> "Launch":
        port_file = self.runtime_directory / f"{name}.port"
        config = self.runtime_directory / f"{name}.toml"
        pairs = {**values, "port_file": str(port_file), "log_format": "json"}
        config.write_text("".join(f"{key} = {toml_value(pairs[key])}\n" for key in pairs), "utf-8")
        # What a node's processes are known by is the node's own runtime directory.
        mark = f"{self.runtime_directory}/{name}/"
        return Launch(
            [sys.executable, "-P", "-m", package, "--config", str(config)],
            str(self.runtime_directory),
            {**self.helper_environment(), **variables, guardian.MARK: mark},
            str(self.log_path(name)),
        )

    def _start(self, name: str, launch: "Launch") -> str:
        if self.is_running(name):
            raise ClusterError(f"{name} runs already")
        port_file = self.runtime_directory / f"{name}.port"
        port_file.unlink(missing_ok=True)
        self._programs[name] = launch.start()

        def address() -> str:
            return port_file.read_text("ascii").strip() if port_file.exists() else ""

        return self.wait_until(address, START_DEADLINE_S, f"{name} serves")

    def _kill(self, name: str) -> None:
        program = self._programs.pop(name)
        program.kill()
        program.wait()

    def _terminate(self, name: str) -> None:
        program = self._programs.pop(name)
        program.send_signal(signal.SIGTERM)
        try:
            program.wait(STOP_DEADLINE_S)
        except subprocess.TimeoutExpired:
            program.kill()
            program.wait()
            raise ClusterError(f"{name} did not leave: {self._log_tail(name)}") from None

    # --- looking ----------------------------------------------------------------------------------

    def wait_until(
        self, predicate: Callable[[], _Found | None], deadline_s: float, what: str
    ) -> _Found:
        """Ask again and again until the answer is true, and return it.

        Raises `ClusterError` at the deadline, or as soon as a program has ended that should live.
        """
        end_s = time.monotonic() + deadline_s
        while not (found := predicate()):
            self.check_alive()
            if time.monotonic() > end_s:
                tails = "\n".join(self._log_tail(name) for name in self._programs)
                raise ClusterError(f"not within {deadline_s:g} s: {what}\n{tails}")
            self._pause.wait(POLL_S)
        return found

    def check_alive(self) -> None:
        """Raises `ClusterError` when a program has ended that nobody ended."""
        for name, program in self._programs.items():
            if program.poll() is not None:
                ended = f"{name} ended with status {program.returncode}"
                raise ClusterError(f"{ended}: {self._log_tail(name)}")

    def _check_events(self) -> None:
        """Raises `ClusterError` when a program has logged what is not on its list of events."""
        for path in sorted(self.directory.glob("*.log")):
            for line in self.log_lines(path.stem):
                if line["event"] == "unregistered":
                    raise ClusterError(f"{path.stem} logs {line['original']}: not registered")

    def _log_tail(self, name: str) -> str:
        path = self.log_path(name)
        lines = path.read_text("utf-8", "replace").splitlines() if path.exists() else []
        return "\n".join([f"--- {path}", *lines[-LOG_TAIL_LINES:]])

    # --- asking -----------------------------------------------------------------------------------

    @property
    def channel(self) -> grpc.Channel:
        """To the coordinator; it reconnects when that is restarted."""
        if self._channel is None:
            options = (
                ("grpc.initial_reconnect_backoff_ms", 100),
                ("grpc.min_reconnect_backoff_ms", 5_000),  # what an attempt to connect may take
                ("grpc.max_reconnect_backoff_ms", 500),
                ("grpc.enable_http_proxy", 0),
            )
            if self.credentials is None:
                self._channel = grpc.insecure_channel(self.address, options)
            else:
                self._channel = grpc.secure_channel(self.address, self.credentials, options)
        return self._channel

    @property
    def jobs(self) -> jobs_pb2_grpc.JobServiceStub:
        """The contract's own stub."""
        return jobs_pb2_grpc.JobServiceStub(self.channel)

    @property
    def nodes(self) -> nodes_pb2_grpc.NodeServiceStub:
        """The contract's own stub."""
        return nodes_pb2_grpc.NodeServiceStub(self.channel)

    def job(self, job_id: int) -> types_pb2.Job:
        """A job as it is now."""
        return self.jobs.GetJob(jobs_pb2.GetJobRequest(job_id=job_id)).job

    def events(self, job_id: int) -> list[types_pb2.JobEvent]:
        """A job's history, oldest first."""
        request = jobs_pb2.ListJobEventsRequest(job_id=job_id)
        return list(self.jobs.ListJobEvents(request).events)

    def node_phases(self) -> dict[str, int]:
        """`types_pb2.NodePhase` by node."""
        listed = self.nodes.ListNodes(nodes_pb2.ListNodesRequest()).nodes
        return {node.id: node.phase for node in listed}

    def wait_for_nodes(self, *nodes: str, deadline_s: float = START_DEADLINE_S) -> None:
        """Until all of them are up."""

        def all_up() -> bool:
            phases = self.node_phases()
            return all(phases.get(node) == types_pb2.NODE_PHASE_UP for node in nodes)

        self.wait_until(all_up, deadline_s, f"{', '.join(nodes)} up")

    def baton(
        self, *arguments: str, directory: Path | None = None, timeout_s: float = COMMAND_DEADLINE_S
    ) -> subprocess.CompletedProcess[str]:
        """Run the real command line, in `directory`; it ends with its status, never with an
        exception."""
        return subprocess.run(
            [sys.executable, "-P", "-m", "coordinator.cli", *arguments],
            cwd=directory or self.directory,
            env={**self.helper_environment(), "BATON_COORDINATOR": self.address},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
            start_new_session=True,
        )

    def baton_json(self, *arguments: str, directory: Path | None = None) -> Any:
        """The same with `--json`: the document, or a list of the lines' where there are several.

        Raises `ClusterError` with what it said on stderr when it failed.
        """
        done = self.baton("--json", *arguments, directory=directory)
        if done.returncode != 0:
            words = " ".join(arguments)
            raise ClusterError(f"baton {words} ended with {done.returncode}: {done.stderr.strip()}")
        lines = [json.loads(line) for line in done.stdout.splitlines() if line]
        return lines[0] if len(lines) == 1 else lines
