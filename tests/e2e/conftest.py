"""Clusters for the end-to-end tests, each on a disk of its own that goes with the test.

A test that kills a node or changes a program's configuration takes `cluster`, which is empty until
it starts something. Files whose tests leave the cluster as they found it make one for the file.

A test here starts several programs and waits for one thing after another. Each of these waits has a
deadline of its own that says what did not happen and shows the programs' logs; the suite's timeout
for a whole test must not come before it on a machine that is only slow.
"""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.cluster import Cluster
from tests.e2e.work import Gate

# A cluster's start and the waits of the longest test here, where one of them meets its deadline and
# the others take half of theirs.
TEST_TIMEOUT_S = 900


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Give the tests of real programs their time, where they do not say theirs."""
    for item in items:
        if item.get_closest_marker("e2e") and not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(TEST_TIMEOUT_S))


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    """Of this test alone; nothing runs in it yet."""
    with Cluster(tmp_path / "cluster") as made:
        yield made


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with tiny models and data, only to be read."""
    from tests.e2e.trainers import tiny  # torch: a process of its own would import it once more

    directory = tmp_path_factory.mktemp("models")
    tiny.make(directory)
    return directory


@pytest.fixture
def gate(tmp_path: Path) -> Gate:
    """For a counting job, closed."""
    return Gate(tmp_path / "gate")
