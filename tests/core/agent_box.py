"""A node for the tests of the agent's core."""

from agent.core import messages as m
from agent.core.launch import LaunchOptions
from agent.core.state import Options
from agent.core.values import HostFacts, ReplicaSource

LAUNCH = LaunchOptions("n1", "/sock", "/attempts", "/python", ())
# With a floor that the time between two events can pass.
OPTIONS = Options("n1:1", LAUNCH, hang_floor_ms=50)
HOST = HostFacts("box", "boot", 8, 1, "", "")
GPUS = ("A", "B")
PEER = ReplicaSource("n2", "n2:1")
ENDS = m.AttemptExited | m.AttemptRefused
ROUNDS_MAX = 400  # of the last, friendly stretch of a history; far more than anything needs
