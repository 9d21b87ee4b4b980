"""The E2E recipe on real rows, with one process and with two: the same epsilon, and the same loss within the noise."""

import itertools
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from tests.distributed.launch import collected, run_groups

REPEATS = 3


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_one_and_two_processes_end_alike(real_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Path(os.environ.get("HF_DP_MODEL", real_data.parent / "models" / "stories260K"))
    if not (model / "config.json").is_file():
        pytest.skip(f"no small model at {model}: set HF_DP_MODEL to a causal LM's folder to run this test")
    monkeypatch.setenv("REAL_MODEL", str(model))
    folders = {(w, n): tmp_path / f"{w}.{n}" for w, n in itertools.product((1, 2), range(REPEATS))}
    for folder in folders.values():
        for name, rows in (("train", 2000), ("validation", 64)):
            lines = (real_data / "e2e_nlg" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()[:rows]
            (folder / "given").mkdir(parents=True, exist_ok=True)
            (folder / "given" / f"{name}.jsonl").write_text("\n".join(lines), encoding="utf-8")
    statuses, errors = run_groups(*([w, folder, "real_rows"] for (w, _), folder in folders.items()), seconds=800)
    assert statuses == [[0] * w for w, _ in folders], errors[-2000:]
    found = {at: collected(folder, at[0], "real_rows")["real_rows"] for at, folder in folders.items()}
    check(found)


def check(found: dict[tuple[int, int], list[dict[str, Any]]]) -> None:
    """Draws and noise are secret and differ from run to run, and that is the only spread there is."""
    first = found[1, 0][0]
    after = {w: np.array([found[w, n][0]["after"] for n in range(REPEATS)]) for w in (1, 2)}
    for processes in found.values():
        for one in processes:
            assert one["spent"] == first["spent"]
            assert one["before"] == pytest.approx(first["before"], rel=1e-5)  # float32 in another order
            assert (one["weights"] == processes[0]["weights"]).all()
    spread = np.sqrt((after[1].var(ddof=1) + after[2].var(ddof=1)) / 2)
    assert 0 < spread < 0.2 * (first["before"] - after[1].mean())  # they learn, and much more than they differ
    assert abs(after[1].mean() - after[2].mean()) < stats.t.ppf(1 - 5e-5, 2 * REPEATS - 2) * spread * np.sqrt(
        2 / REPEATS
    )
