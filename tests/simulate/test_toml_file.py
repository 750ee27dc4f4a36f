"""What is missing in a file of a simulation is said in its own words."""

from pathlib import Path

import msgspec
import pytest

from coordinator.sim.toml_file import BadFile, read_toml


class Kind(msgspec.Struct):
    count: int


class Fleet(msgspec.Struct):
    gpus: dict[str, Kind]


@pytest.mark.parametrize(
    ("text", "said"),
    [("", "gpus is missing"), ("[gpus.A100]\n", "gpus.NAME.count is missing")],
)
def test_a_missing_key_is_named_with_its_table(text: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "fleet.toml"
    path.write_text(text)
    with pytest.raises(BadFile, match=f"{path}: {said}$"):
        read_toml(path, Fleet)
