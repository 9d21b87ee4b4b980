"""PyTorch settings that give products of float32 fewer bits are named, at construction and at every step."""

import pytest
import torch

from hf_dp.step.arithmetic import coarse_products

SETTINGS = {
    "float32_matmul_precision": "torch.set_float32_matmul_precision('medium')",
    "cuda.matmul": "torch.backends.cuda.matmul.allow_tf32 = True",
    "cuda.matmul.fp32_precision": "torch.backends.cuda.matmul.fp32_precision = 'tf32'",
    "mkldnn.matmul.fp32_precision": "torch.backends.mkldnn.matmul.fp32_precision = 'bf16'",
    "backends.fp32_precision": "torch.backends.fp32_precision = 'tf32'",
}


def restored():
    torch.backends.fp32_precision = "none"
    torch.backends.mkldnn.matmul.fp32_precision = "none"
    torch.backends.cuda.matmul.fp32_precision = "none"
    torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize("named", SETTINGS)
def test_each_setting_that_takes_bits_away_is_named(named):
    assert list(coarse_products()) == []
    try:
        exec(SETTINGS[named], {"torch": torch})
        found = list(coarse_products())
        assert found
        assert named.partition(".matmul")[0] in found[0] or "float32_matmul_precision" in found[0]
    finally:
        restored()
    assert list(coarse_products()) == []
