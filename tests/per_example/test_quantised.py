"""LoRA on a base of 4 or 8 bits (bitsandbytes on the CPU) and on bfloat16 weights, against one example at a time."""

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TrainingArguments

from hf_dp.errors import UnsupportedOptionError
from hf_dp.per_example import Proof, losses, prove
from hf_dp.training.options import check_options
from tests.support import engine, reference
from tests.support import models as M

pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed: pip install 'hf_dp[quantised]'")
FOUR = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.float32}
EIGHT = {"load_in_8bit": True, "llm_int8_threshold": 0.0}


def quantised(folder: Path, checkpointing: bool = True, **settings) -> nn.Module:
    M.llama().save_pretrained(folder)
    config = BitsAndBytesConfig(**settings)
    base = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, device_map="cpu")
    base = prepare_model_for_kbit_training(base, use_gradient_checkpointing=checkpointing)
    return M.stirred(get_peft_model(base, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))).train()


@pytest.mark.parametrize("settings", [FOUR, EIGHT], ids=["4-bit", "8-bit"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_lora_on_a_quantised_base_is_exact(settings: dict, checkpointing: bool, tmp_path) -> None:
    model, batch = quantised(tmp_path, checkpointing, **settings), M.token_batch()
    inputs = lambda b: {k: v for k, v in b.items() if k != "labels"}  # noqa: E731
    into, seen = engine.clipped_sum(model, batch, lambda m, b: losses.causal_lm(m(**inputs(b)), b["labels"]), 0.05)
    assert len(into) == 28
    assert seen.norms.min() > 0.05 / 10
    # the slow twin calls autograd.grad, which the reentrant kind of checkpointing does not support
    model.get_base_model().gradient_checkpointing_disable()
    slow = reference.clipped_sum(model, batch, reference.causal_lm_loss, 0.05)
    assert reference.relative_difference(into, slow) < 2e-5  # float32 matrix products of another shape


def test_a_pass_over_a_base_of_4_bits_may_hold_several_examples(tmp_path: Path) -> None:
    """bitsandbytes' own product (from 0.50 on) is known to take rows one by one; what mixes them before it is seen."""
    model, batches = quantised(tmp_path, **FOUR), [M.token_batch() for _ in range(2)]
    inputs = lambda b: {k: v for k, v in b.items() if k != "labels"}  # noqa: E731
    example_losses = lambda m, b: losses.causal_lm(m(**inputs(b)), b["labels"])  # noqa: E731
    assert prove(model, example_losses, batches) == Proof(True, (), ())
    model.get_base_model().model.norm.register_forward_hook(lambda module, args, out: out - out.mean(0, keepdim=True))
    assert "examples are mixed by mean" in prove(model, example_losses, batches).reasons[0]


def test_8_bit_with_outlier_columns_is_refused(tmp_path: Path) -> None:
    """bitsandbytes looks for outliers over the whole batch: one record changes how the others are rounded."""

    model = quantised(tmp_path, load_in_8bit=True)
    args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    with pytest.raises(UnsupportedOptionError, match=r"llm_int8_threshold=6.0 .*llm_int8_threshold=0.0"):
        check_options(args, public_eval=False, model=model)
    check_options(args, public_eval=False, model=quantised(tmp_path, **EIGHT))


def test_outlier_columns_do_couple_the_records_of_a_batch() -> None:
    """The reason for the refusal above, measured: scaling another row changes this one's result."""
    import bitsandbytes as bnb

    torch.manual_seed(0)
    moved = {}
    for threshold in (0.0, 6.0):
        layer = bnb.nn.Linear8bitLt(32, 16, bias=False, has_fp16_weights=False, threshold=threshold)
        layer.weight = bnb.nn.Int8Params(torch.randn(16, 32), requires_grad=False, has_fp16_weights=False)
        x = torch.randn(3, 5, 32)
        layer = layer.to(
            "cpu"
        ).eval()  # quantises; training on a CPU alone takes a path that leaves activations as they are
        before, other = layer(x)[0], x.clone()
        other[1:] *= 10
        moved[threshold] = float((layer(other)[0] - before).abs().max())
    assert moved[0.0] == 0.0
    assert moved[6.0] > 1e-3
