"""Clusters for the end-to-end tests, each on a disk of its own that goes with the test.

A test that kills a node or changes a program's configuration takes `cluster`, which is empty until
it starts something. Files whose tests leave the cluster as they found it make one for the file.
"""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.cluster import Cluster
from tests.e2e.work import Gate


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    """Of this test alone; nothing runs in it yet."""
    with Cluster(tmp_path / "cluster") as made:
        yield made


@pytest.fixture
def gate(tmp_path: Path) -> Gate:
    """For a counting job, closed."""
    return Gate(tmp_path / "gate")
