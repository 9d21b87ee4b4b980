"""Parts of `bench_gpu`: a device and sizes go in, JSON-able numbers come out. Each part stands alone."""

import copy
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from steps import CLIP_NORM, METHODS, SHAPES, Batch, build, example_losses, inventory, make_batch, our_losses, trainable
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig

from hf_dp.ledger.ledger import Ledger, LedgerHeader
from hf_dp.per_example.batches import MicroBatch
from hf_dp.per_example.capture import Pass, clipped_gradient_sum, per_example_factors, views
from hf_dp.per_example.compiled import CompiledBlocks
from hf_dp.randomness import on_device
from hf_dp.randomness.noise import BLOCK, NoiseSource
from hf_dp.randomness.streams import ChaChaKey, Role, fresh_key
from hf_dp.step.memory import MemoryLimit
from hf_dp.step.release import Releaser

Result = dict[str, Any]
BF16_PEAK = {
    "H100": 989e12,
    "H200": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "4090": 165e12,
}  # multiply-adds count twice
ROUNDS = 5
OURS = ("plain", "ours", "compiled")  # they leave the model as it was, and share one
WRAPPING = ("Opacus ghost", "Opacus hooks")


def synchronise(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


# ---- exactness -------------------------------------------------------------------------------------------------------


def exactness(device: str, left_out: frozenset[str], deadline: float) -> Result:
    """Clipped sums against one example at a time in float64, as relative differences; and how large they may be."""
    found: Result = {}
    for name, (prepare, tolerance) in EXACT.items():
        if name in left_out:
            found[name] = "left out"
            continue
        if time.time() > deadline:
            found[name] = "no time"
            continue
        try:
            model, passes_of = prepare(device)
        except ImportError as error:
            found[name] = f"not installed: {error.name}"
            continue
        batch = make_batch(32, "shallow", device)
        difference = relative_difference(model, batch, passes_of(model))
        found[name] = {"difference": difference, "allowed": tolerance, "ok": difference <= tolerance}
    return found


def shallow(device: str, lora: bool, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A small Llama; LoRA's zeros are stirred, so that no gradient is hidden."""
    return stirred(build("llama", "shallow", lora, 32, device).to(dtype))


def stirred(model: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for p in trainable(model).values():
            p += 0.02 * torch.randn(p.shape, generator=generator).to(p)
    return model


def quantised(device: str) -> nn.Module:
    """LoRA on a base of 4 bits. Raises ImportError without bitsandbytes."""
    import bitsandbytes  # noqa: F401

    with tempfile.TemporaryDirectory() as folder:
        build("llama", "shallow", False, 32, "cpu").save_pretrained(folder)
        dtype = torch.bfloat16 if device == "cuda" else torch.float32
        bits = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
        config = AutoConfig.from_pretrained(folder)
        base = AutoModelForCausalLM.from_pretrained(
            folder, config=config, quantization_config=bits, device_map=device, dtype=dtype
        )
    return stirred(get_peft_model(base, LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM")).train())


def checkpointed(model: nn.Module) -> nn.Module:
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})  # type: ignore[operator]
    return model


def captured(model: nn.Module) -> Pass:
    return partial(per_example_factors, forms=inventory(model).forms)


def compiled(model: nn.Module) -> Pass:
    return CompiledBlocks(model, inventory(model))


Prepared = tuple[nn.Module, Callable[[nn.Module], Pass]]
EXACT: dict[str, tuple[Callable[[str], Prepared], float]] = {
    "LoRA": (lambda device: (shallow(device, True), captured), 2e-5),  # float32 products of another shape
    "full": (lambda device: (shallow(device, False), captured), 2e-5),
    "checkpointed": (lambda device: (checkpointed(shallow(device, True)), captured), 2e-5),
    "bfloat16": (lambda device: (shallow(device, True, torch.bfloat16), captured), 5e-2),  # 8 bits
    "QLoRA": (lambda device: (quantised(device), captured), 5e-2),
    "compiled": (lambda device: (shallow(device, True), compiled), 2e-5),
}


def relative_difference(model: nn.Module, batch: Batch, passes: Pass) -> float:
    """|ours - slow| / |slow|, with C at the median of the gradient norms."""
    gradients = one_at_a_time(model, batch)
    lengths = torch.stack([g.norm() for g in gradients])
    clip_norm = float(lengths.median())
    slow = torch.stack([g * (clip_norm / length).clamp(max=1.0) for g, length in zip(gradients, lengths, strict=True)])
    flat = torch.zeros(len(gradients[0]), device=gradients[0].device)
    losses = lambda: our_losses(model, batch)  # noqa: E731
    clipped_gradient_sum(model, losses, len(gradients), clip_norm, views(flat, trainable(model)), passes)
    return float((flat.double() - slow.sum(0)).norm() / slow.sum(0).norm())


def one_at_a_time(model: nn.Module, batch: Batch) -> list[Tensor]:
    """Each example's gradient by autograd, flat; in float64 where the weights can be."""
    model = model if getattr(model, "is_quantized", False) else copy.deepcopy(model).double()
    found = []
    for row in range(len(batch["labels"])):
        loss = example_losses(model, {k: v[row : row + 1] for k, v in batch.items()})[0]
        found.append(torch.autograd.grad(loss, list(trainable(model).values())))
    return [torch.cat([g.flatten().double() for g in gradients]) for gradients in found]


# ---- noise, release, memory ------------------------------------------------------------------------------------------


def noise(device: str, numbers: int) -> Result:
    """sigma^2 measured over stated, and by how many standard errors; 2/3 and 3/2 of sigma would be far outside."""
    kinds = {"philox": fresh_key(), "chacha20": ChaChaKey(fresh_key())}
    found = {name: _noise_of(NoiseSource(key=key), device, numbers) for name, key in kinds.items()}
    return {**found, "ok": all(of["ok"] for of in found.values())}


def _noise_of(source: NoiseSource, device: str, numbers: int) -> Result:
    std = 1.7
    drawn = source.gaussian(numbers, std=std, device=device).double()
    share = float(drawn.square().mean()) / std**2
    error = (2 / numbers) ** 0.5
    far = {name: abs(share / factor**2 - 1) / error for name, factor in (("2/3", 2 / 3), ("3/2", 3 / 2))}
    fits = abs(share - 1) < 5 * error and abs(float(drawn.mean())) < 5 * std / numbers**0.5
    return {"variance": share, "standard_errors": abs(share - 1) / error, "ok": fits and min(far.values()) > 5}


def release(device: str, sizes: tuple[int, ...], deadline: float) -> Result:
    """Seconds of a release of so many coordinates: charge, noise, sum; and of the noise alone, by each generator.

    ChaCha20 is first compared with the CPU's, bit by bit, and then made by the device's own operations (on a CPU too).
    """
    found: Result = {}
    header = LedgerHeader(num_examples=1000, unit="record", relation="zero-out", delta=1e-5)
    for number, size in enumerate(sizes):
        if time.time() > deadline:
            found[f"{size:,}"] = "no time"
            continue
        with tempfile.TemporaryDirectory() as folder, Ledger.open(Path(folder) / "ledger.jsonl", header) as ledger:
            ledger.begin(sample_rate=0.05, joint_noise_multiplier=1.0, clip_norm=1.0, expected_batch_size=50)
            flat, source = torch.zeros(size, device=device), NoiseSource()
            releaser = Releaser(ledger, source)
            alone = seconds_of(partial(source.gaussian, size, std=1.0, device=device), device)
            there = torch.device(device)
            made_there = partial(on_device.gaussian, fresh_key(), Role.NOISE, 0, size, BLOCK, there)
            made_there()  # compares, and compiles what the driver compiles
            chacha = seconds_of(made_there, device)
            whole = seconds_of(
                partial(releaser, flat, sensitivity=1.0, noise_multiplier=1.0, draw_number=number), device
            )
        found[f"{size:,}"] = {"noise_seconds": alone, "chacha20_seconds": chacha, "release_seconds": whole}
    return found


def seconds_of(run: Callable[[], object], device: str) -> float:
    synchronise(device)
    start = time.perf_counter()
    run()
    synchronise(device)
    return time.perf_counter() - start


def out_of_memory(device: str) -> Result:
    """A pass that does not fit is made again in halves, to the same sum. A card has its memory limited for it."""
    model = shallow(device, True)
    passes, batch = captured(model), make_batch(16, "shallow", device)
    whole = MicroBatch(batch, len(batch["labels"]))
    flat = torch.zeros(sum(p.numel() for p in trainable(model).values()), device=device)
    into, limit, tried = views(flat, trainable(model)), MemoryLimit(), []

    def sum_all(most: int) -> None:
        flat.zero_()
        for part in limit.one_by_one(limit.parts([whole])):
            tried.append(part.size)
            scarce = torch.empty(1 << 50, dtype=torch.uint8, device=device) if part.size > most else None
            clipped_gradient_sum(model, lambda part=part: our_losses(model, part), part.size, CLIP_NORM, into, passes)
            del scarce

    sum_all(whole.size)
    plenty = flat.clone()
    limit.until_it_fits(partial(sum_all, whole.size // 4))
    difference = float((flat - plenty).norm() / plenty.norm())
    return {"sizes_tried": tried[1:], "difference": difference, "ok": difference < 1e-5}


# ---- speed -----------------------------------------------------------------------------------------------------------


def speed(device: str, cases: list[tuple[str, int]], left_out: frozenset[str], deadline: float) -> Iterator[Result]:
    """A case after the other, as long as there is time: tokens a second and peak memory of each method."""
    for case in cases:
        if time.time() > deadline:
            yield {"model": case[0], "tokens in a row": case[1], "methods": {}, "note": "no time"}
        else:
            yield one_case(device, case, left_out, deadline)


def one_case(device: str, case: tuple[str, int], left_out: frozenset[str], deadline: float) -> Result:
    """Medians over rounds in which methods take turns; those that wrap the model come last, each by itself."""
    size, length = case
    model = build("llama", size, True, length, device)
    batch, steps, why = make_batch(length, size, device), {}, dict.fromkeys(left_out, "left out")
    rows = fitting(METHODS["plain"](model), batch, device)
    batch = {name: value[:rows] for name, value in batch.items()}
    seconds: dict[str, list[float]] = {}
    peaks: dict[str, float] = {}
    for name in (n for n in OURS if n not in left_out):
        _prepare(name, model, batch, steps, why)
    for _ in range(ROUNDS):
        for name, step in steps.items():
            if time.time() < deadline or not seconds.get(name):
                _measure(name, step, batch, seconds, peaks, device)
    for name in WRAPPING:
        steps = {}
        if time.time() < deadline:
            _prepare(name, model, batch, steps, why)
        for step in steps.values():
            for _ in range(ROUNDS):
                _measure(name, step, batch, seconds, peaks, device)
            unwrap(model)
    tokens, flops = rows * length, flops_a_token(size, length)
    peak = next((value for card, value in BF16_PEAK.items() if device == "cuda" and card in card_name(device)), None)
    methods: Result = dict(why)
    for name, taken in seconds.items():
        rate = tokens / statistics.median(taken)
        methods[name] = {
            "tokens_a_second": rate,
            "ratios": [a / b for a, b in zip(taken, seconds["plain"], strict=False)],
            "peak_bytes": peaks[name],
            "share_of_peak": rate * flops / peak if peak else None,
        }
    return {"model": size, "tokens in a row": length, "rows": rows, "methods": methods}


def fitting(step: Callable[[Batch], None], batch: Batch, device: str) -> int:
    """The most rows, halved from those of the batch, with which a plain step fits."""
    rows = len(batch["labels"])
    while rows > 1:
        try:
            step({name: value[:rows] for name, value in batch.items()})
            return rows
        except torch.OutOfMemoryError:
            rows //= 2
        if device == "cuda":
            torch.cuda.empty_cache()
    return rows


def _prepare(name: str, model: nn.Module, batch: Batch, steps: dict[str, Any], why: dict[str, str]) -> None:
    """A step that ran twice; or why there is none."""
    try:
        step = METHODS[name](model)
        for _ in range(2):
            step(batch)
        steps[name] = step
    except ImportError:
        why[name] = "not installed"
    except Exception as error:  # another library's failure is a result, and so is a compiler's
        why[name] = type(error).__name__
        unwrap(model)


def _measure(
    name: str, step: Callable[[Batch], None], batch: Batch, seconds: dict[str, list[float]], peaks: Any, device: str
) -> None:
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    seconds.setdefault(name, []).append(seconds_of(partial(step, batch), device))
    peaks[name] = torch.cuda.max_memory_allocated() if device == "cuda" else 0


def unwrap(model: nn.Module) -> None:
    """Takes off what a library hung on the model."""
    for module in model.modules():
        for hooks in (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks):
            hooks.clear()
    model.zero_grad(set_to_none=True)
    for p in model.parameters():
        for name in ("grad_sample", "_norm_sample"):
            vars(p).pop(name, None)


def flops_a_token(size: str, length: int) -> float:
    """Forward and back through frozen weights (4 a weight), and attention's two products over T / 2 positions."""
    width, layers, heads, kv_heads, ff, vocabulary = SHAPES[size]
    weights = layers * (width * width * (2 + 2 * kv_heads / heads) + 3 * width * ff) + width * vocabulary
    return 4 * weights + 6 * 2 * layers * width * length / 2


def card_name(device: str) -> str:
    return torch.cuda.get_device_name() if device == "cuda" else "CPU"


# ---- profile ---------------------------------------------------------------------------------------------------------


def profiled(device: str, size: str, length: int) -> Result:
    """The five operations on which a private step spends most beyond a plain one, in milliseconds of the device."""
    model, batch = build("llama", size, True, length, device), make_batch(length, size, device)
    batch = {name: value[: fitting(METHODS["plain"](model), batch, device)] for name, value in batch.items()}
    spent = {}
    for name in ("plain", "ours"):
        step = METHODS[name](model)
        step(batch)
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device == "cuda" else [])]
        with profile(activities=activities) as seen:
            step(batch)
            synchronise(device)
        on = "self_device_time_total" if device == "cuda" else "self_cpu_time_total"
        spent[name] = {event.key: getattr(event, on) / 1e3 for event in seen.key_averages()}
    more = {key: took - spent["plain"].get(key, 0.0) for key, took in spent["ours"].items()}
    most = sorted(more, key=lambda key: -more[key])[:5]
    return {"model": size, "tokens in a row": length, "more_milliseconds": {key: more[key] for key in most}}
