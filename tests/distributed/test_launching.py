"""accelerate reads the config files in recipes/, and `hf-dp train` runs under them, with one launcher and with two."""

import json
import sys
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.utils import DistributedType

from hf_dp.ledger.ledger import LEDGER_NAME, read_ledger
from tests.distributed.launch import finish, free_port
from tests.support import recipes as R

FOLDER = Path(__file__).resolve().parents[2] / "recipes" / "accelerate"
FILES = sorted(FOLDER.glob("*.yaml"))
HF_DP = ["--no_python", sys.executable, "-c", "from hf_dp.cli import main; main()", "train"]


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_accelerate_reads_its_config_files(path: Path) -> None:
    """It refuses keys that it does not know."""
    config = load_config_from_file(str(path))
    sharded = path.stem == "sharded"
    assert config.distributed_type == (DistributedType.FSDP if sharded else DistributedType.MULTI_GPU)
    assert config.mixed_precision == "no"  # the recipe's to say
    assert config.num_machines == {"one-node": 1, "sharded": 1, "several-nodes": 2}[path.stem]
    assert config.num_processes % config.num_machines == 0


@pytest.mark.slow
@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_a_recipe_runs_under_accelerates_config_files(path: Path, tmp_path: Path) -> None:
    """Two processes over gloo, under one launcher or each under its own, as on two machines."""
    recipe, port = R.write(tmp_path), str(free_port())
    common = ["--num_processes", "2", "--main_process_port", port]
    nodes = [[]] if path.stem != "several-nodes" else [["--machine_rank", str(n)] for n in range(2)]
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(path), *common]
    done = finish(*([*launch, *node, *HF_DP, str(recipe)] for node in nodes))
    assert [d.returncode for d in done] == [0] * len(nodes), [d.stderr[-2000:] for d in done]
    record = json.loads((tmp_path / "out" / "privacy.json").read_text())
    assert read_ledger(tmp_path / "out" / LEDGER_NAME).num_steps == record["segments"][0]["num_steps"] == 2
    assert "ceil(B / 2 processes" in " ".join(done[0].stdout.split())
