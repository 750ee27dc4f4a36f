"""What the suite does not see: secrets, certificates, and how each way to switch is really used."""

import ssl
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from coordinator.capacity import credentials
from coordinator.capacity.driver import CapacityError, State
from coordinator.capacity.ipmi import Ipmi
from coordinator.capacity.redfish import Redfish
from coordinator.capacity.wake import PACKETS, Wake, magic_packet
from coordinator.core.capacity_orders import CapacityOrder, Verb
from tests.capacity.bench import VirtualClock
from tests.capacity.emulator import PASSWORD, SESSIONS, Service, serving
from tests.capacity.worlds import (
    GRACEFUL_MS,
    BurstWorld,
    IpmiWorld,
    WakeWorld,
    write_credentials,
)
from tests.e2e.certificates import Authority

ON = CapacityOrder("k1", Verb.RESUME, ("n01",))
OFF = CapacityOrder("k2", Verb.SUSPEND, ("n01",))


@pytest.fixture
async def clock() -> VirtualClock:
    return VirtualClock()


@pytest.fixture
def service(tmp_path: Path, clock: VirtualClock) -> Iterator[Service]:
    with serving(tmp_path, ["n01"], clock.now_s, has_sessions=True) as made:
        yield made


@pytest.fixture
def redfish(tmp_path: Path, clock: VirtualClock, service: Service) -> Redfish:
    return Redfish(lambda node: service.url, write_credentials(tmp_path), GRACEFUL_MS, clock)


async def switched_on(driver: Redfish | Ipmi, clock: VirtualClock) -> None:
    await driver.apply(ON)
    await clock.sleep_ms(GRACEFUL_MS)


# --- Redfish --------------------------------------------------------------------------------------


async def test_a_shutdown_that_is_heeded_is_not_forced(
    redfish: Redfish, service: Service, clock: VirtualClock
) -> None:
    await switched_on(redfish, clock)
    await redfish.apply(OFF)
    assert service.resets == ["On", "GracefulShutdown"]
    assert await redfish.state(["n01"]) == {"n01": State.OFF}


async def test_one_that_is_not_heeded_is_forced_after_its_bound(
    redfish: Redfish, service: Service, clock: VirtualClock
) -> None:
    await switched_on(redfish, clock)
    service.deaf = True
    begun_ms = clock.now_ms()
    await redfish.apply(OFF)
    assert service.resets == ["On", "GracefulShutdown", "ForceOff"]
    assert clock.now_ms() - begun_ms == GRACEFUL_MS


async def test_what_is_as_ordered_is_left_alone(redfish: Redfish, service: Service) -> None:
    await redfish.apply(OFF)
    assert service.resets == []


async def test_a_session_is_used_and_ended(redfish: Redfish, service: Service) -> None:
    await redfish.state(["n01"])
    assert [(method, how) for method, _, how in service.requests] == [
        ("GET", ""),
        ("POST", ""),
        ("GET", "token"),
        ("GET", "token"),
        ("DELETE", "token"),
    ]
    assert service.requests[-1][1] == f"{SESSIONS}/1"
    assert service.sessions == 0


async def test_basic_authentication_if_it_is_wanted(
    tmp_path: Path, service: Service, clock: VirtualClock
) -> None:
    driver = Redfish(
        lambda node: service.url,
        write_credentials(tmp_path),
        GRACEFUL_MS,
        clock,
        authentication="basic",
    )
    await driver.state(["n01"])
    assert [how for _, _, how in service.requests] == ["Basic", "Basic"]


@pytest.mark.parametrize("authentication", ["session", "basic"])
async def test_a_wrong_password_is_refused_and_not_repeated(
    tmp_path: Path, service: Service, clock: VirtualClock, authentication: str
) -> None:
    path = write_credentials(tmp_path)
    set_password(path, "a guess")
    driver = Redfish(
        lambda node: service.url, path, GRACEFUL_MS, clock, authentication=authentication
    )
    with pytest.raises(CapacityError) as caught:
        await driver.apply(ON)
    assert str(caught.value) == (
        f"the BMC of n01 at {service.url} refuses the user and password of credentials_file"
    )


def set_password(path: str, password: str) -> None:
    file = Path(path)
    file.write_text(file.read_text().replace(PASSWORD, password))


async def test_which_of_several_systems_must_be_said(tmp_path: Path, clock: VirtualClock) -> None:
    with serving(tmp_path, ["a", "b"], clock.now_s) as service:
        path = write_credentials(tmp_path)
        driver = Redfish(lambda node: service.url, path, GRACEFUL_MS, clock)
        with pytest.raises(CapacityError, match="has 2 systems; say which is meant"):
            await driver.apply(ON)
        driver = Redfish(lambda node: service.url, path, GRACEFUL_MS, clock, system="b")
        await switched_on(driver, clock)
        assert await driver.state(["n01"]) == {"n01": State.ON}


async def test_its_certificate_is_verified(tmp_path: Path, clock: VirtualClock) -> None:
    files = Authority(tmp_path / "ca").issue("bmc")
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(files.cert, files.key)
    path = write_credentials(tmp_path)
    with serving(tmp_path, ["n01"], clock.now_s, tls=tls) as service:
        url = service.url.replace("http://127.0.0.1", "https://localhost")
        trusting = Redfish(lambda node: url, path, GRACEFUL_MS, clock, ca_file=str(files.ca))
        assert await trusting.state(["n01"]) == {"n01": State.OFF}
        count = len(service.requests)
        strict = Redfish(lambda node: url, path, GRACEFUL_MS, clock)
        with pytest.raises(CapacityError, match="CERTIFICATE_VERIFY_FAILED"):
            await strict.state(["n01"])
        assert len(service.requests) == count


async def test_nobody_there_is_a_sentence(tmp_path: Path, clock: VirtualClock) -> None:
    path = write_credentials(tmp_path)
    driver = Redfish(lambda node: "http://127.0.0.1:1", path, GRACEFUL_MS, clock)
    with pytest.raises(CapacityError, match=r"the BMC of n01 at http://127.0.0.1:1 cannot be"):
        await driver.state(["n01"])


# --- credentials ----------------------------------------------------------------------------------


def test_a_node_may_have_a_password_of_its_own(tmp_path: Path) -> None:
    path = write_credentials(tmp_path)
    with open(path, "a") as file:
        file.write('[nodes.n07]\npassword = "own"\n')
    assert credentials.read(path, "n01").password == PASSWORD
    assert credentials.read(path, "n07").password == "own"
    assert credentials.read(path, "n07").user == "baton"
    assert PASSWORD not in repr(credentials.read(path, "n01"))


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (lambda path: path.chmod(0o644), "can be read or written by others (mode 0644)"),
        (lambda path: path.unlink(), "cannot be read: No such file or directory"),
        (lambda path: path.write_text(f"password = {PASSWORD}"), "is not TOML"),
        (lambda path: path.write_text(f'password = "{PASSWORD}"'), "has no user and password"),
    ],
)
def test_what_is_wrong_with_a_file_is_said_without_a_word_of_it(
    tmp_path: Path, spoil: Callable[[Path], object], sentence: str
) -> None:
    path = write_credentials(tmp_path)
    spoil(Path(path))
    with pytest.raises(CapacityError) as caught:
        credentials.read(path, "n01")
    assert sentence in str(caught.value)
    assert PASSWORD not in str(caught.value)
    assert caught.value.__suppress_context__ or PASSWORD not in str(caught.value.__cause__)


# --- IPMI -----------------------------------------------------------------------------------------


async def test_the_password_is_in_the_environment_alone(
    tmp_path: Path, clock: VirtualClock
) -> None:
    world = IpmiWorld(tmp_path, clock)
    await world.driver.apply(ON)
    (call,) = world.site.calls()
    assert call["environment"]["IPMI_PASSWORD"] == PASSWORD
    assert call["command"] == "-I lanplus -H n01-bmc -U baton -E chassis power on".split()


async def test_a_soft_shutdown_comes_first_and_a_hard_one_after_its_bound(
    tmp_path: Path, clock: VirtualClock
) -> None:
    world = IpmiWorld(tmp_path, clock)
    await world.driver.apply(ON)
    await world.driver.apply(OFF)
    assert [call["command"][-1] for call in world.site.calls()] == ["on", "soft"]
    await world.driver.apply(ON)
    world.go_wrong("deaf")
    begun_ms = clock.now_ms()
    await world.driver.apply(OFF)
    assert [call["command"][-1] for call in world.site.calls()][2:] == ["on", "soft", "off"]
    assert clock.now_ms() - begun_ms == GRACEFUL_MS
    assert not world.is_on("n01")


async def test_without_ipmitool_the_sentence_names_it(tmp_path: Path, clock: VirtualClock) -> None:
    driver = Ipmi(
        "{}-bmc".format, write_credentials(tmp_path), GRACEFUL_MS, clock, "/nowhere/ipmitool"
    )
    with pytest.raises(CapacityError, match="the BMC of n01: /nowhere/ipmitool cannot be started"):
        await driver.state(["n01"])


# --- the rest -------------------------------------------------------------------------------------


async def test_a_magic_packet_is_what_cards_listen_for(tmp_path: Path) -> None:
    world = WakeWorld(tmp_path)
    await world.driver.apply(ON)
    assert world.is_on("n01")
    assert world.deeds() == 1, "and all of its packets are here"
    assert world.heard == [b"\xff\xff\xff\xff\xff\xff" + b"\x00\x11\x22\x33\x44\x01" * 16] * PACKETS
    world.close()


def test_addresses_of_cards_may_have_dashes() -> None:
    assert magic_packet("AA-bb-01-02-03-04") == magic_packet("aa:bb:01:02:03:04")


async def test_a_packet_that_cannot_be_sent_is_a_sentence() -> None:
    driver = Wake(lambda node: "00:11:22:33:44:55", "999.0.0.1:9", "/s")
    with pytest.raises(CapacityError, match="no packet can be sent to 999"):
        await driver.apply(ON)


async def test_a_burst_command_gets_the_new_nodes_name(tmp_path: Path) -> None:
    world = BurstWorld(tmp_path)
    await world.driver.apply(CapacityOrder("k1", Verb.CREATE, ("burst-07",), "H100"))
    (call,) = world.site.calls()
    assert (call["program"], call["arguments"]) == ("create", ["burst-07"])
    assert call["environment"]["BATON_CAPACITY_KEY"] == "k1"
    assert call["environment"]["BATON_GPU_TYPE"] == "H100"
