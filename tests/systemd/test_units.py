"""The units as systemd itself judges them, without starting any.

No directive that it does not know, and an exposure of 2.0 at most (0 is best, 10 worst; Prometheus
has 4.0, slurmd 9.6).
"""

import configparser
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.tidy.source import ROOT

UNITS = ROOT / "systemd"
EXPOSURE_TENTHS_MAX = 20
PYTHON = "/opt/baton/bin/python"

pytestmark = pytest.mark.skipif(
    shutil.which("systemd-analyze") is None,
    reason="systemd-analyze is not installed here (sudo apt-get install systemd)",
)


def analyze(*arguments: str) -> str:
    """What it prints. Fails when it finds anything."""
    command = ["systemd-analyze", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.mark.parametrize("program", ["agent", "coordinator"])
def test_exposure_stays_low(program: str) -> None:
    unit = str(UNITS / f"baton-{program}.service")
    analyze("security", "--offline=true", "--no-pager", f"--threshold={EXPOSURE_TENTHS_MAX}", unit)


def test_a_unit_without_hardening_would_be_found(tmp_path: Path) -> None:
    unit = tmp_path / "open.service"
    unit.write_text("[Service]\nExecStart=/bin/true\n")
    with pytest.raises(AssertionError, match="UNSAFE"):
        analyze("security", "--offline=true", "--no-pager", "--threshold=20", str(unit))


def laid_out(directory: Path) -> list[str]:
    """The units and the drop-in as the package installs them, with a program that is there."""
    paths = []
    for unit in sorted((*UNITS.glob("*.service"), *UNITS.glob("*.socket"))):
        path = directory / unit.name
        path.write_text(unit.read_text(encoding="utf-8").replace(PYTHON, "/bin/true"))
        paths.append(str(path))
    drop_in = directory / "baton-agent.service.d" / "50-trainers-inside.conf"
    drop_in.parent.mkdir()
    drop_in.write_text((UNITS / "trainers-inside.conf").read_text(encoding="utf-8"))
    return paths


def test_systemd_understands_every_line(tmp_path: Path) -> None:
    assert analyze("verify", "--man=no", *laid_out(tmp_path)) == ""


def test_a_misspelt_directive_would_be_found(tmp_path: Path) -> None:
    paths = laid_out(tmp_path)
    with open(tmp_path / "baton-agent.service", "a", encoding="utf-8") as unit:
        unit.write("[Service]\nProtectHoem=yes\n")
    assert "ProtectHoem" in analyze("verify", "--man=no", *paths)


@pytest.mark.parametrize("program", ["agent", "coordinator"])
def test_every_directive_has_its_reason(program: str) -> None:
    """A comment at its head, or at the head of the lines that it stands in: not a blank line."""
    text = (UNITS / f"baton-{program}.service").read_text(encoding="utf-8")
    service = text.partition("[Service]\n")[2].partition("[Install]")[0]
    for paragraph in service.strip().split("\n\n"):
        assert "#" in paragraph, paragraph


@pytest.mark.parametrize("program", ["agent", "coordinator"])
def test_the_log_can_know_the_boot(program: str) -> None:
    """By the kernel's file, or, where the unit hides that, by what systemd says."""
    text = (UNITS / f"baton-{program}.service").read_text(encoding="utf-8")
    assert ("ProcSubset=pid\n" in text) == ("\nEnvironment=BATON_BOOT_ID=%b\n" in text)


def test_both_programs_are_watched_and_restarted() -> None:
    for program in ("agent", "coordinator"):
        parser = configparser.RawConfigParser(strict=False)
        parser.optionxform = str  # type: ignore[assignment,method-assign]
        parser.read(UNITS / f"baton-{program}.service")
        service = parser["Service"]
        assert service["Type"] == "notify"
        assert service["Restart"] == "always"
        assert int(service["WatchdogSec"].removesuffix("s")) > 0
        assert service["DevicePolicy"] == "closed"


def test_a_package_is_of_the_release_and_the_python_that_it_was_built_for(tmp_path: Path) -> None:
    """And on nothing that was true on one release alone; what the template leaves open is filled
    in."""
    folder = ROOT / "systemd" / "debian"
    control, build = (folder / "control").read_text(), (folder / "build.sh").read_text()
    assert "python3 (>= @PYTHON@), python3 (<< @PYTHON_NEXT@)" in control
    assert all(f"s/{word}/" in build for word in re.findall("@[A-Z_]+@", control))
    assert not re.search(r"python3\.\d", build)
    function = build[build.index("release() {") : build.index("version=")]
    for system, said in (
        ("debian\nVERSION_ID=12", "deb12"),
        ('ubuntu\nVERSION_ID="24.04"', "ubuntu24.04"),
    ):
        (tmp_path / "os-release").write_text(f"ID={system}\n")
        asked = f"{function}release {tmp_path}/os-release"
        assert subprocess.check_output(["bash", "-euc", asked], text=True) == said
    assert "libstdc++6" in control, "gRPC's wheel brings none, and a small Ubuntu has none"
