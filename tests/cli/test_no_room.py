"""A disk that is full ends a command in a few lines."""

import errno
import os

import pytest

from hf_dp import cli


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "out/model.safetensors"),
        RuntimeError(f"PytorchStreamWriter failed writing file: {os.strerror(errno.ENOSPC)}"),
    ],
)
def test_a_full_disk_is_told_in_a_few_lines(
    error: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full() -> None:
        raise error

    monkeypatch.setattr(cli, "app", full)
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith("hf-dp: there is no room on the disk")
    assert "What was charged is in the ledger" in said


def test_other_errors_stay_what_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> None:
        raise OSError(errno.EIO, "input/output error")

    monkeypatch.setattr(cli, "app", broken)
    with pytest.raises(OSError, match="input/output"):
        cli.main()
