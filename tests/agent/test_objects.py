"""Checkpoints in an object store, against a real S3-speaking server on loopback.

Safety: a manifest appears after its chunks; nothing that was altered in the bucket is restored; a
place that holds no chunk store, and credentials that are refused, say nothing of any checkpoint, so
nobody falls back to an older one for them. Liveness: what was pushed is restored after every local
copy is gone.
"""

import http.client
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import boto3
import pytest
from moto.server import ThreadedMotoServer

from agent.chunks.manifest import (
    CHUNK_BYTES_MAX,
    Absent,
    Altered,
    Denied,
    Invalid,
    Unreachable,
    digest_of,
)
from agent.chunks.objects import REQUESTS_MAX, ObjectStore
from agent.config import Config, ConfigError, prepare_directories
from agent.core.values import ReplicaSource, StoredCheckpoint
from agent.ports import ChunkError
from tests.agent.chunk_worlds import Node, candidate, files_under, objects
from tests.agent.http_worlds import made_of

BUCKET = "fleet"
URL = f"s3://{BUCKET}/baton/chunks"
SHARED = ReplicaSource("shared", URL)
FILES = {"backbone": os.urandom(2 * CHUNK_BYTES_MAX + 9), "sub/head": b"h" * 70}


class Bucket:
    """Looks behind the store's back."""

    def __init__(self, endpoint: str) -> None:
        self.endpoint = endpoint
        self._client = boto3.client(
            "s3",
            endpoint_url=endpoint,
            region_name="us-east-1",
            aws_access_key_id="operator",
            aws_secret_access_key="secret",
        )

    def reset(self) -> None:
        self._post("reset", b"")
        self._client.create_bucket(Bucket=BUCKET)

    def written(self) -> list[str]:
        found = self._client.list_objects_v2(Bucket=BUCKET).get("Contents", [])
        return [item["Key"] for item in found]

    def flip(self, key: str) -> None:
        data = bytearray(self._client.get_object(Bucket=BUCKET, Key=key)["Body"].read())
        data[len(data) // 2] ^= 1
        self._client.put_object(Bucket=BUCKET, Key=key, Body=bytes(data))

    def remove(self, key: str) -> None:
        self._client.delete_object(Bucket=BUCKET, Key=key)

    def demand_credentials(self, wanted: bool) -> None:
        """From now on a key that nobody was given is refused, as AWS does; or not any more."""
        self._post("reset-auth", b"0" if wanted else b"inf")

    def _post(self, name: str, data: bytes) -> None:
        connection = http.client.HTTPConnection(self.endpoint.removeprefix("http://"), timeout=30)
        connection.request("POST", f"/moto-api/{name}", data, {"Content-Type": "text/plain"})
        assert connection.getresponse().status == 200
        connection.close()


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def bucket(endpoint: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Bucket]:
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "agent")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    made = Bucket(endpoint)
    made.reset()
    yield made
    made.demand_credentials(False)


def key_of(data: bytes) -> str:
    digest = digest_of(data)
    return f"baton/chunks/objects/{digest[:2]}/{digest}"


def manifest_key(stored: StoredCheckpoint) -> str:
    return f"baton/chunks/manifests/{stored.digest}.json"


async def test_what_was_pushed_comes_back_on_a_node_that_has_nothing(
    bucket: Bucket, one: Node, two: Node
) -> None:
    stored = await one.checkpoint(FILES, 1)
    await one.chunks.replicate(stored.digest, SHARED)
    pieces = [FILES["backbone"][at : at + CHUNK_BYTES_MAX] for at in range(0, 9 << 20, 4 << 20)]
    wanted = [key_of(piece) for piece in (*pieces, FILES["sub/head"])]
    assert sorted(bucket.written()) == sorted(
        [*wanted, manifest_key(stored), "baton/chunks/store.json"]
    )
    for path in objects(one.store):
        path.unlink()
    for node in (one, two):
        restored = await node.chunks.restore([candidate(stored, SHARED)], str(node.root / "out"))
        assert (restored.digest, restored.skipped) == (stored.digest, ())
        assert files_under(restored.directory) == FILES


async def test_only_what_is_missing_is_written(
    bucket: Bucket, one: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    put: list[str] = []
    real = ObjectStore.put

    def counted(store: ObjectStore, path: str, data: bytes, doing: str) -> None:
        put.append(path.removeprefix(f"{BUCKET}/"))
        real(store, path, data, doing)

    monkeypatch.setattr(ObjectStore, "put", counted)
    first = await one.checkpoint(FILES, 1)
    await one.chunks.replicate(first.digest, SHARED)
    assert put[-1] == manifest_key(first), "last"
    put.clear()
    second = await one.checkpoint(FILES | {"sub/head": b"new"}, 2)
    await one.chunks.replicate(second.digest, SHARED)
    assert put == [key_of(b"new"), manifest_key(second)]


def test_a_manifest_waits_for_its_chunks(bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    """One chunk of many fails, behind the caller's back: no manifest."""
    _, encoded, _ = made_of(os.urandom(100))
    pieces = [os.urandom(100) for _ in range(2 * REQUESTS_MAX)]
    store = ObjectStore(URL)
    store.open()
    real = ObjectStore.put

    def breaking(store: ObjectStore, path: str, data: bytes, doing: str) -> None:
        if digest_of(pieces[3]) in path:
            raise ChunkError("the line is dead")
        real(store, path, data, doing)

    monkeypatch.setattr(ObjectStore, "put", breaking)

    def push() -> None:
        with store.writing() as writing:
            for piece in pieces:
                writing.put_chunk(digest_of(piece), piece)
            writing.publish(digest_of(encoded), encoded)

    with pytest.raises(ChunkError, match="the line is dead"):
        push()
    assert [key for key in bucket.written() if "manifests" in key] == []


async def test_a_flipped_byte_in_the_bucket_is_refused_and_named(
    bucket: Bucket, one: Node, two: Node
) -> None:
    old = await one.checkpoint({"old": b"old"}, 1)
    new = await one.checkpoint(FILES, 2)
    for stored in (old, new):
        await one.chunks.replicate(stored.digest, SHARED)
    bucket.flip(key_of(FILES["sub/head"]))
    candidates = [candidate(new, SHARED), candidate(old, SHARED)]
    restored = await two.chunks.restore(candidates, str(two.root / "out"))
    assert restored.digest == old.digest, "everybody answered"
    why = restored.skipped[0][1]
    assert URL in why
    assert f"chunk {digest_of(FILES['sub/head'])[:8]}..." in why
    assert "bytes do not match their digest" in why
    assert digest_of(FILES["sub/head"]) not in [path.name for path in objects(two.store)]

    bucket.flip(manifest_key(old))
    nothing = await two.chunks.restore([candidate(old, SHARED)], str(two.root / "out"))
    assert nothing.digest == old.digest, "it is here by now"
    with pytest.raises(Altered, match=r"manifest .* bytes do not match"):
        ObjectStore(URL).read_manifest(old.digest)


async def test_refused_credentials_are_a_sentence_and_lose_nothing(
    bucket: Bucket, one: Node, two: Node
) -> None:
    old = await two.checkpoint({"old": b"old"}, 1)
    new = await one.checkpoint(FILES, 2)
    await one.chunks.replicate(new.digest, SHARED)
    bucket.demand_credentials(True)
    more = await one.checkpoint({"more": b"more"}, 3)
    with pytest.raises(Denied, match=rf"{URL}: .*the credentials are refused or missing"):
        await one.chunks.replicate(more.digest, SHARED)
    candidates = [candidate(new, SHARED), candidate(old)]
    with pytest.raises(Unreachable, match="the credentials are refused or missing"):
        await two.chunks.restore(candidates, str(two.root / "out"))
    bucket.demand_credentials(False)
    await one.chunks.replicate(more.digest, SHARED)
    restored = await two.chunks.restore(candidates, str(two.root / "out"))
    assert restored.digest == new.digest


def test_no_credentials_at_all_are_a_sentence(
    bucket: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are looked for at each try, so an operator who adds them need not restart the agent."""
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    store = ObjectStore(URL)
    with pytest.raises(ChunkError, match="credentials"):
        store.open()
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "agent")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    store.open()


async def test_a_store_that_does_not_answer_is_no_answer(
    bucket: Bucket, one: Node, two: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = await two.checkpoint({"old": b"old"}, 1)
    new = await one.checkpoint(FILES, 2)
    await one.chunks.replicate(new.digest, SHARED)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    with pytest.raises(Unreachable, match=r"Could not connect .*127\.0\.0\.1:1"):
        await two.chunks.restore([candidate(new, SHARED), candidate(old)], str(two.root / "out"))


def test_the_wrong_place_says_nothing_of_any_chunk(bucket: Bucket) -> None:
    for url in ("s3://fleet/elsewhere", "s3://nobody-has-this/baton"):
        with pytest.raises(ChunkError, match="is the address right") as caught:
            ObjectStore(url).read_chunk(digest_of(b"x"))
        assert not isinstance(caught.value, (Absent, Altered)), url
    with pytest.raises(ChunkError, match="is the address right"):
        ObjectStore("s3://nobody-has-this/baton").open()
    store = ObjectStore(URL)
    store.open()
    with pytest.raises(Absent, match=r"chunk .*: missing"):
        store.read_chunk(digest_of(b"x"))


def test_what_is_no_digest_becomes_no_key(bucket: Bucket) -> None:
    store = ObjectStore(URL)
    for call in (store.read_chunk, store.read_manifest, lambda digest: store.missing([digest])):
        with pytest.raises(Invalid, match="not a digest"):
            call("../../secrets")
    with store.writing() as writing:
        with pytest.raises(Altered):
            writing.put_chunk(digest_of(b"x"), b"y")
        with pytest.raises(Invalid):
            writing.put_chunk(digest_of(b""), b"")
    assert bucket.written() == []


def test_without_the_extra_the_sentence_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "fsspec", None)
    with pytest.raises(Denied, match=r"needs the extra 'objects' .*pip install"):
        ObjectStore(URL).open()


@pytest.mark.parametrize(
    ("fields", "place"),
    [
        ({"shared_url": URL}, URL),
        ({"shared_url": "s3://fleet"}, "s3://fleet"),
        ({"shared_url": "file:///mnt/fleet"}, "/mnt/fleet"),
        ({"shared_directory": "/mnt/fleet"}, "/mnt/fleet"),
        ({}, ""),
    ],
)
def test_one_setting_says_where_shared_replicas_go(fields: dict[str, str], place: str) -> None:
    config = Config(**fields)  # type: ignore[arg-type]
    assert (config.validate(), config.shared_place()) == ([], place)


@pytest.mark.parametrize(
    "url", ["s3://", "s3://UPPER", "s3://fleet/x?y", "http://h/x", "file://host/x", "/mnt", "s3:/b"]
)
def test_another_url_is_refused_with_what_would_do(url: str) -> None:
    assert Config(shared_url=url).validate() == [
        f"'shared_url' must be s3://BUCKET, s3://BUCKET/PREFIX or file:///PATH, not '{url}'"
    ]


def test_two_places_are_one_too_many() -> None:
    config = Config(shared_url=URL, shared_directory="/mnt/fleet")
    assert config.validate() == [
        "'shared_directory' and 'shared_url' say the same thing: give one of them"
    ]


def test_what_a_shared_place_needs_is_looked_for_at_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:

    def prepare(url: str) -> None:
        state, runtime = str(tmp_path / "state"), str(tmp_path / "run")
        prepare_directories(
            Config(shared_url=url, state_directory=state, runtime_directory=runtime)
        )

    with pytest.raises(ConfigError, match="the shared directory /nowhere/fleet is missing"):
        prepare("file:///nowhere/fleet")
    prepare(URL)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"s3://fleet/baton/chunks needs the extra 'objects'"):
        prepare(URL)
