"""The coordinator's own fields, above all times that must fit one another."""

import stat
from pathlib import Path

import grpc
import pytest

import coordinator.endpoints
from coordinator.config import Config, ConfigError, load, prepare_directories
from coordinator.core.state import Options
from coordinator.main import _options
from coordinator.transport import Tls, TransportError, check_listen, listen, open_channel


def read(*flags: str, **environment: str) -> Config:
    return load(["--config", "", *flags], environment).config


def refusals(*flags: str) -> tuple[str, ...]:
    with pytest.raises(ConfigError) as caught:
        read(*flags)
    return caught.value.sentences


def test_the_defaults_stand_and_are_the_cores() -> None:
    config, core = read(), Options()
    assert config.validate() == []
    assert config.listen == "127.0.0.1:7070"
    assert config.tls() is None
    for name in ("heartbeat_interval_ms", "lease_ms", "closed_grace_ms", "restart_grace_ms"):
        assert getattr(config, name) == getattr(core, name)


def test_the_store_follows_the_state_directory() -> None:
    assert read().store_path == "/var/lib/baton/coordinator/baton.sqlite3"
    assert read("--state-directory", "/s").store_path == "/s/baton.sqlite3"
    assert read("--state-directory", "/s", "--store-path", "/t/x").store_path == "/t/x"
    assert read("--store-path", "", BATON_COORDINATOR_STATE_DIRECTORY="/e").store_path == (
        "/e/baton.sqlite3"
    )


def test_a_short_lease_with_defaults_otherwise() -> None:
    assert read("--lease-ms", "3000").lease_ms == 3_000


def test_a_lease_outlasts_two_heartbeats() -> None:
    assert read("--heartbeat-interval-ms", "4000").lease_ms == 8_000
    assert refusals("--heartbeat-interval-ms", "4001") == (
        "'lease_ms' is 8000, less than 2 heartbeats of 4001 ms: one late heartbeat would cost a "
        "node its jobs; make it at least 8002",
    )


def test_a_closed_connection_waits_at_most_a_lease() -> None:
    assert read("--closed-grace-ms", "8000").closed_grace_ms == 8_000
    assert refusals("--closed-grace-ms", "8001") == (
        "'closed_grace_ms' must be 0 to the lease (8000 ms), after which the node is lost anyway, "
        "not 8001",
    )
    assert len(refusals("--closed-grace-ms=-1")) == 1


@pytest.mark.parametrize(
    ("field", "value", "span"),
    [
        ("heartbeat_interval_ms", 99, "100 to 60000"),
        ("lease_ms", 600_001, "1 to 600000"),
        ("restart_grace_ms", -1, "0 to 600000"),
        ("restart_grace_ms", 600_001, "0 to 600000"),
        ("jobs_kept", 1_999, "2000 to 100000"),
        ("jobs_kept", 100_001, "2000 to 100000"),
    ],
)
def test_numbers_have_ranges(field: str, value: int, span: str) -> None:
    flag = "--" + field.replace("_", "-")
    assert refusals(f"{flag}={value}") == (f"'{field}' must be {span}, not {value}",)


def test_how_many_ended_jobs_are_kept_reaches_the_core() -> None:
    assert _options(read("--jobs-kept=20000")).jobs_kept == 20_000
    assert _options(read()).jobs_kept == Options().jobs_kept


def test_quotas_have_ranges() -> None:
    assert not Options().projects
    assert not read().projects
    demo = read("--projects=demo={gpu_hours_per_day=48, weight=2}").projects["demo"]
    assert (demo.gpu_hours_per_day, demo.weight) == (48, 2)
    wrong = (
        "--projects=demo={gpu_hours_per_day=-1, weight=0}",
        "--projects=low={weight=nan}",
        "--projects=Upper={}",
    )
    assert refusals(*wrong) == (
        "'gpu_hours_per_day' of 'demo' in 'projects' must be 0 to 10000000, not -1",
        "'weight' of 'demo' in 'projects' must be 0.01 to 100, not 0",
        "'weight' of 'low' in 'projects' must be 0.01 to 100, not nan",
        "'Upper' in 'projects' must be 1 to 64 of a-z, 0-9 and '-'",
    )


def test_all_that_is_wrong_is_said_at_once() -> None:
    assert refusals("--state-directory", "s", "--store-path", "x", "--log-format", "xml") == (
        "'state_directory' must be an absolute path, not 's'",
        "'store_path' must be an absolute path, not 'x'",
        "'log_format' must be one of auto, json, console, not 'xml'",
    )


def test_a_choice_that_may_be_empty_is_named() -> None:
    assert refusals("--scaling-mode", "auto") == (
        "'scaling_mode' must be one of observe, advise, act, or empty, not 'auto'",
    )


def test_a_directory_that_cannot_be_is_said_once(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError) as caught:
        prepare_directories(read(f"--state-directory={tmp_path}/file/state"))
    assert caught.value.sentences == (
        f"the directory {tmp_path}/file/state cannot be used: Not a directory",
    )


def test_listening_beyond_loopback_needs_tls() -> None:
    sentence = (
        "listening on 0.0.0.0:7070 needs mutual TLS: "
        "give --tls-cert, --tls-key and --tls-ca, or listen on 127.0.0.1"
    )
    assert refusals("--listen", "0.0.0.0:7070") == (sentence,)
    with pytest.raises(TransportError) as caught:
        check_listen("0.0.0.0:7070", None)
    assert str(caught.value) == sentence
    config = read("--listen=0.0.0.0:7070", "--tls-cert=c", "--tls-key=k", "--tls-ca=a")
    assert config.tls() == Tls("c", "k", "a")
    assert refusals("--listen=0.0.0.0:7070", "--tls-cert=c") == (
        "'tls_cert', 'tls_key' and 'tls_ca' belong together: give all three or none",
    )


def test_metrics_are_off_and_beyond_loopback_need_tls() -> None:
    assert read().metrics_listen == ""
    assert read("--metrics-listen=[::1]:0").metrics_listen == "[::1]:0"
    (sentence,) = refusals("--metrics-listen=0.0.0.0:9070")
    assert sentence.startswith("listening on 0.0.0.0:9070 needs mutual TLS")
    assert refusals("--metrics-listen=9070") == (
        "'metrics_listen' must be HOST:PORT with a port of 0 to 65535, not '9070'",
    )


def test_spans_go_nowhere_unless_told_and_able_to(monkeypatch: pytest.MonkeyPatch) -> None:
    assert read().otel_endpoint == ""
    endpoint = "--otel-endpoint=http://collector:4318"
    assert read(endpoint).otel_endpoint == "http://collector:4318"
    for wrong in ("collector:4318", "http://collector", "ftp://collector:1", "http://c:1/v1"):
        (sentence,) = refusals(f"--otel-endpoint={wrong}")
        assert sentence == (
            "'otel_endpoint' must be http://HOST:PORT or https://HOST:PORT, without a path, "
            f"not '{wrong}'"
        )
    monkeypatch.setattr(coordinator.endpoints, "OTLP_MODULE", "opentelemetry_that_is_not.there")
    assert refusals(endpoint) == (
        "'otel_endpoint' is set, but what exports spans is not installed here: "
        "`pip install 'gpu-baton[otel]'`, or leave it empty",
    )


def test_recommendations_go_nowhere_unless_told() -> None:
    assert (read().lease_file, read().lease_webhook) == ("", "")
    assert refusals("--lease-file=leases.json") == (
        "'lease_file' must be an absolute path, not 'leases.json'",
    )
    for right in ("http://hooks/x", "https://hooks.example:8443/a/b?c=d", "http://[::1]:1/"):
        assert read(f"--lease-webhook={right}").lease_webhook == right


@pytest.mark.parametrize(
    "wrong",
    ["hooks/x", "ftp://hooks/x", "http:///S3CRET", "http://me:S3CRET@hooks/x", "http://h:0/S3CRET",
     "http://h:S3CRET/", "http://h/S3 CRET", "http://h/x#S3CRET", "http://h/" + 2_048 * "S3CRET"],
)  # fmt: skip
def test_a_webhook_that_cannot_be_one_is_refused_without_its_path(wrong: str) -> None:
    (sentence,) = refusals(f"--lease-webhook={wrong}")
    assert sentence.startswith("'lease_webhook' must be http://HOST[:PORT]/PATH or https://")
    assert "S3" not in sentence


async def test_a_server_listens_and_a_channel_reaches_it() -> None:
    server = grpc.aio.server()
    port = listen(server, "127.0.0.1:0", None)
    await server.start()
    try:
        async with open_channel(f"127.0.0.1:{port}", None) as channel:
            await channel.channel_ready()
    finally:
        await server.stop(0)


async def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    tls = Tls(str(tmp_path / "c.pem"), str(tmp_path / "k.pem"), str(tmp_path / "ca.pem"))
    with pytest.raises(TransportError, match=r"cannot read .*k\.pem: No such file"):
        listen(grpc.aio.server(), "127.0.0.1:0", tls)
    with pytest.raises(TransportError, match=r"cannot read .*ca\.pem: No such file"):
        open_channel("127.0.0.1:1", tls)


def test_the_state_is_for_this_user_and_the_stores_directory_stays_as_it_is(
    tmp_path: Path,
) -> None:
    state, store = tmp_path / "state", tmp_path / "store"
    state.mkdir(mode=0o755)
    store.mkdir(mode=0o755)
    prepare_directories(read(f"--state-directory={state}", f"--store-path={store}/b.sqlite3"))
    assert stat.S_IMODE(state.stat().st_mode) == 0o700
    assert stat.S_IMODE(store.stat().st_mode) == 0o755
    prepare_directories(read(f"--state-directory={state}", f"--store-path={state}/new/b.sqlite3"))
    assert stat.S_IMODE((state / "new").stat().st_mode) == 0o700
