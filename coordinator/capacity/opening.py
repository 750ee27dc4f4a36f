"""The actuator as the configuration describes it: a driver for each group, and the journal.

Problem: one driver brings an HTTP client, and most coordinators have no use for it. So this is the
one place that knows all drivers, and it imports that one where a fleet uses it.
"""

from pathlib import Path
from typing import Final

from coordinator.capacity.actuator import Actuator, Group, Log, Report
from coordinator.capacity.burst import Burst
from coordinator.capacity.driver import Driver
from coordinator.capacity.ipmi import Ipmi
from coordinator.capacity.journal import Journal
from coordinator.capacity.programs import Programs
from coordinator.capacity.simulated import Simulated
from coordinator.capacity.wake import Wake
from coordinator.capacity_settings import CapacityGroup
from coordinator.config import Config
from coordinator.ports import Clock

JOURNAL_NAME: Final = "capacity.jsonl"


def open_actuator(config: Config, report: Report, *, clock: Clock, log: Log) -> Actuator:
    """Within the event loop in which orders are given. Whoever opens it closes it. Raises `OSError`
    where the state directory cannot be written."""
    journal = Journal(Path(config.state_directory) / JOURNAL_NAME)
    journal.open()
    return Actuator(open_groups(config, clock), journal, clock, report, log)


def open_groups(config: Config, clock: Clock) -> dict[str, Group]:
    """By node."""
    found = {}
    for name, settings in config.capacity.items():
        group = Group(name, open_driver(settings, clock), settings.deadline_ms)
        found.update(dict.fromkeys(settings.names(), group))
    return found


def open_driver(settings: CapacityGroup, clock: Clock) -> Driver:
    match settings.driver:
        case "programs":
            return Programs(
                settings.resume_program,
                settings.suspend_program,
                settings.resume_fail_program,
                settings.state_program,
            )
        case "redfish":
            return _open_redfish(settings, clock)
        case "ipmi":
            return Ipmi(settings.address_of, settings.credentials_file, settings.graceful_ms, clock)
        case "wake":
            return Wake(
                settings.address_of,
                settings.broadcast,
                settings.suspend_program,
                settings.state_program,
            )
        case "burst":
            return Burst(settings.create_program, settings.delete_program, settings.state_program)
        case _:
            assert settings.driver == "simulated", f"{settings.driver} has passed `validate`"
            return Simulated()


def _open_redfish(settings: CapacityGroup, clock: Clock) -> Driver:
    """Imported here: it brings an HTTP client, which nobody else pays for."""
    from coordinator.capacity.redfish import Redfish

    return Redfish(
        settings.address_of,
        settings.credentials_file,
        settings.graceful_ms,
        clock,
        settings.system,
        settings.authentication,
        settings.ca_file,
    )
