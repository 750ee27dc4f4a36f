"""What the demonstration is made of, without the making, which takes a minute."""

import subprocess
import sys
from pathlib import Path

import pytest

from trainers import configuration, prepare, pretrained
from trainers.finetune import FinetuneOptions
from trainers.lora import LoraOptions
from trainers.transfer import TransferOptions


def test_what_is_made_appears_whole_and_is_made_once(tmp_path: Path) -> None:
    made: list[Path] = []

    def make(folder: Path) -> None:
        (folder / "file").write_text("content")
        made.append(folder)
        if len(made) == 1:
            raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        prepare.make_once(tmp_path / "thing", make)
    assert list(tmp_path.iterdir()) == [], "nor is anything left of it"
    prepare.make_once(tmp_path / "thing", make)
    prepare.make_once(tmp_path / "thing", make)
    assert len(made) == 2
    assert (tmp_path / "thing" / "file").read_text() == "content"


def test_another_process_that_was_first_is_no_error(tmp_path: Path) -> None:
    def make(folder: Path) -> None:
        (folder / "file").write_text("ours")
        (tmp_path / "thing").mkdir()
        (tmp_path / "thing" / "file").write_text("theirs")

    prepare.make_once(tmp_path / "thing", make)

    assert [path.name for path in tmp_path.iterdir()] == ["thing"]
    assert (tmp_path / "thing" / "file").read_text() == "theirs"


def test_without_scikit_learn_it_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A user's trainers do without."""
    monkeypatch.delitem(sys.modules, "sklearn.datasets", raising=False)
    monkeypatch.setitem(sys.modules, "sklearn", None)
    assert prepare.main(["--out", str(tmp_path)]) == 1
    assert "pip install scikit-learn" in capsys.readouterr().err


def test_the_configurations_are_right() -> None:
    jobs = prepare.configurations()
    kinds = {"finetune": FinetuneOptions, "lora": LoraOptions, "transfer": TransferOptions}
    for name, values in jobs.items():
        configuration.build(kinds[name[:-5].partition("-")[0]], values, source=name)
    assert jobs["transfer-scratch.json"]["freeze"] is False


def test_where_all_is_made_torch_is_not_loaded(tmp_path: Path) -> None:
    for what in ("digits", "text"):
        (tmp_path / f"{what}-{prepare.RECIPE_VERSION}").mkdir()
    program = (
        "import sys\nfrom trainers import prepare\n"
        f"prepare.main(['--out', {str(tmp_path)!r}])\n"
        "print([name for name in ('torch', 'transformers', 'numpy') if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == "[]"
    assert (tmp_path / "transfer.json").is_file()


def test_texts_are_at_hand_with_and_without_the_system(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert len(pretrained.standard_library()) == pretrained.CORPUS_BYTES
    monkeypatch.setattr(pretrained, "LICENCES", tmp_path / "absent")
    corpus = pretrained.licences()
    assert sum(len(text) for text in corpus.values()) > 50_000
    assert len(set(corpus.values())) == len(corpus)
    (tmp_path / "absent").mkdir()
    (tmp_path / "absent" / "GPL").write_text("text")
    (tmp_path / "absent" / "GPL-3").symlink_to("GPL")
    assert pretrained.licences() == {"GPL": "text"}
