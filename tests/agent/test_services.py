"""What is of another service on a GPU is no leftover of a job."""

from pathlib import Path

import pytest

from agent.telemetry.services import is_of_another_service

OWN = "0::/system.slice/baton-agent.service"
HYBRID = "12:memory:/x\n1:name=systemd:/system.slice/{}\n0::/"


@pytest.mark.parametrize(
    ("own", "its", "other"),
    [
        (OWN, "0::/system.slice/display-manager.service", True),
        (OWN, "0::/user.slice/user-7.slice/session-3.scope", True),
        (OWN, f"{OWN}/worker", False),
        (OWN, "0::/system.slice/baton-job-7.1.service", False),
        (OWN, "0::/", False),
        (OWN, "", False),
        (OWN, None, False),  # it has gone, or is not to be seen
        ("0::/", "0::/system.slice/display-manager.service", False),
        (HYBRID.format("baton-agent.service"), HYBRID.format("dcgm.service"), True),
        (HYBRID.format("baton-agent.service"), HYBRID.format("baton-agent.service"), False),
    ],
)
def test_services(tmp_path: Path, own: str, its: str | None, other: bool) -> None:
    for name, text in (("self", own), ("17", its)):
        (tmp_path / name).mkdir()
        if text is not None:
            (tmp_path / name / "cgroup").write_text(text)
    assert is_of_another_service(17, str(tmp_path)) == other
