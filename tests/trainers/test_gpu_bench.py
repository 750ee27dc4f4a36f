"""What a person with a card for half an hour runs: `python -m bench.gpu`, without a card."""

import json
from datetime import UTC, datetime
from pathlib import Path

import pytest

from bench.gpu import EXIT_NO_DEVICE, __main__, card
from bench.gpu.__main__ import Script, main, run, section

CARD = "NVIDIA H200, 140 GiB"
ROW = {
    "name": "a step", "value": 1.0042, "unit": "times", "reference": 1.25,
    "reference_source": ".to(), this run", "ratio": 1.245, "goal": 1.01, "met": True,
}  # fmt: skip
PLAIN = dict.fromkeys(("reference", "ratio", "goal", "met"))
ROWS = [
    ROW,
    {**ROW, **PLAIN, "reference_source": "", "name": "a step, lowest", "value": 1.0},
    {**ROW, **PLAIN, "reference_source": "", "name": "a step, highest", "value": 1.02},
    {**ROW, **PLAIN, "reference_source": "", "name": "left | right", "met": False, "goal": 2},
]
GOOD = Script("good", ("-c", f"print('a library talks'); print({json.dumps(ROWS)!r})"), rows=True)
BAD = Script("bad", ("-c", "raise SystemExit('the driver | says no')"))
HANGING = Script("hanging", ("-c", "import threading; threading.Event().wait()"))


def test_a_script_that_fails_takes_no_other_with_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(__main__, "SCRIPTS", (BAD, GOOD))
    monkeypatch.setattr(__main__, "ask_card", lambda: (0, CARD))
    assert main(["--out", str(tmp_path)]) == 1
    text = (tmp_path / "gpu.md").read_text(encoding="utf-8")
    assert capsys.readouterr().out.strip() == text.strip()
    assert CARD in text
    assert "| bad | ended with 1 |" in text
    assert "the driver | says no" in text
    assert "| good | ok |" in text
    assert "| a step | 1 (1 to 1.02) | times | 1.01, met | 1.25, .to(), this run | 1.25 |" in text
    assert "| left \\| right | 1 | times | 2, **missed** |  |  |" in text
    assert main(["--out", str(tmp_path), "--only", "good", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == ROWS


def test_a_script_that_hangs_is_ended(tmp_path: Path) -> None:
    ran = run(HANGING, tmp_path, quick=False, limit_s=0.0)
    assert (ran.verdict, ran.held) == ("not done in 0 s", False)
    assert "| hanging | not done in 0 s |" in section(CARD, datetime.now(UTC), [ran])


def test_rows_that_are_none_are_a_failure(tmp_path: Path) -> None:
    odd = Script("odd", ("-c", "print('Traceback')"), rows=True)
    assert run(odd, tmp_path, quick=False, limit_s=60.0).verdict == "its rows are not JSON"


def test_without_a_card_it_says_why_and_runs_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(__main__, "SCRIPTS", (BAD,))
    monkeypatch.setattr(__main__, "ask_card", lambda: (EXIT_NO_DEVICE, "no CUDA device: ..."))
    assert main(["--out", str(tmp_path / "out")]) == EXIT_NO_DEVICE
    assert capsys.readouterr().err == "no CUDA device: ...\n"
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("cuda", "driver", "said"),
    [
        (None, "", "is built without CUDA"),
        ("13.0", "", "there is no NVIDIA driver here"),
        ("13.0", "570.86.15", "the driver is 570.86.15"),
    ],
)
def test_there_is_no_card_for_one_of_three_reasons(
    monkeypatch: pytest.MonkeyPatch, cuda: str | None, driver: str, said: str
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("torch.version.cuda", cuda)
    monkeypatch.setattr(card, "driver_version", lambda: driver)
    assert said in card.missing()
