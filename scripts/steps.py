"""A random model -> one gradient step on a batch of full rows, plain and private, by each library that is installed."""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from hf_dp.per_example.batches import MicroBatch
from hf_dp.per_example.borrowing import Places, places_kept
from hf_dp.per_example.capture import Pass, clipped_gradient_sum, per_example_factors, views
from hf_dp.per_example.compiled import CompiledBlocks
from hf_dp.per_example.head import next_token_losses
from hf_dp.per_example.inventory import Inventory, take_inventory
from hf_dp.step.integers import add_integer_gradient, grid_of

Batch = dict[str, Tensor]
Step = Callable[[Batch], None]
CLIP_NORM = 0.1
TOKENS = {"shallow": 256, "narrow": 256, "tiny": 2048, "1b": 16384, "7b": 8192}  # in a micro-batch
SHAPES = {  # width, layers, heads, key-value heads, feed-forward, vocabulary
    "shallow": (64, 2, 4, 2, 172, 512),
    "narrow": (64, 16, 4, 2, 172, 512),
    "tiny": (256, 4, 8, 4, 704, 8192),
    "1b": (2048, 16, 32, 8, 8192, 32000),
    "7b": (4096, 32, 32, 8, 11008, 32000),
}


def build(kind: str, size: str, lora: bool, length: int, device: str) -> nn.Module:
    """A random-weight model without dropout, in training mode; bfloat16 on a GPU."""
    width, layers, heads, kv_heads, ff, vocabulary = SHAPES[size]
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16 if device == "cuda" else torch.float32)
    with torch.device(device):
        if kind == "gpt2":
            no_dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
            sizes = {"n_embd": width, "n_layer": layers, "n_head": heads, "vocab_size": vocabulary}
            model: nn.Module = GPT2LMHeadModel(GPT2Config(n_positions=max(length, 128), **sizes, **no_dropout))
        else:
            model = LlamaForCausalLM(
                LlamaConfig(
                    hidden_size=width,
                    num_hidden_layers=layers,
                    num_attention_heads=heads,
                    num_key_value_heads=kv_heads,
                    intermediate_size=ff,
                    vocab_size=vocabulary,
                    max_position_embeddings=max(length, 2048),
                    tie_word_embeddings=False,
                )
            )
        if lora:
            model = get_peft_model(model, LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM"))
    torch.set_default_dtype(torch.float32)
    return model.train()


def make_batch(length: int, size: str, device: str) -> Batch:
    """Full rows of one length: what is compared is the step, not padding."""
    rows = max(2, TOKENS[size] // length)
    ids = torch.randint(0, SHAPES[size][5], (rows, length), generator=torch.Generator().manual_seed(1)).to(device)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


def example_losses(model: nn.Module, batch: Batch) -> Tensor:
    """The mean over each row's tokens, by torch's own cross entropy: the loss of all methods but ours."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    labels = batch["labels"][:, 1:]
    flat = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels.flatten(), reduction="none")
    return flat.view(labels.shape).mean(1)


def our_losses(model: nn.Module, batch: Batch) -> Tensor:
    """As `DPTrainer` forms them."""
    inputs = {k: v for k, v in batch.items() if k != "labels"}
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    return next_token_losses(model, base, inputs, batch["labels"], 0.0)


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def plain(model: nn.Module) -> Step:
    """What Trainer does: the model's own loss, backward."""

    def step(batch: Batch) -> None:
        model.zero_grad(set_to_none=True)
        model(**batch).loss.backward()

    return step


def ours(model: nn.Module) -> Step:
    """hf_dp: per-example clipping and the clipped sum in one backward pass."""
    return clipping(model, partial(per_example_factors, forms=inventory(model).forms))


def clipping(model: nn.Module, passes: Pass) -> Step:
    flat = torch.zeros(sum(p.numel() for p in trainable(model).values()), device=next(model.parameters()).device)
    into, known = views(flat, trainable(model)), Places(model)

    def step(batch: Batch) -> None:
        flat.zero_()
        with places_kept(model, known):
            clipped_gradient_sum(model, lambda: our_losses(model, batch), len(batch["labels"]), CLIP_NORM, into, passes)

    return step


def inventory(model: nn.Module) -> Inventory:
    """As `DPTrainer` takes it, on made-up records."""
    tokens = torch.ones((2, 5), dtype=torch.long, device=next(model.parameters()).device)
    return take_inventory(model, MicroBatch({"input_ids": tokens, "labels": tokens}, 2), our_losses)


def compiled(model: nn.Module) -> Step:
    """As ours, with `torch_compile=True`."""
    return clipping(model, CompiledBlocks(model, inventory(model)))


def plain_compiled(model: nn.Module) -> Step:
    """As plain, with `torch_compile=True`: the whole model is compiled."""
    return plain(torch.compile(model))  # type: ignore[arg-type]


def discrete(model: nn.Module) -> Step:
    """hf_dp with noise="discrete": a pass for each example, its gradient rounded to whole numbers, without noise."""
    grid = grid_of(model, 1.0, CLIP_NORM)
    into = {name: torch.zeros(p.shape, dtype=torch.int64, device=p.device) for name, p in trainable(model).items()}

    def step(batch: Batch) -> None:
        for buffer in into.values():
            buffer.zero_()
        for row in range(len(batch["labels"])):
            one = {k: v[row : row + 1] for k, v in batch.items()}
            add_integer_gradient(model, lambda one=one: our_losses(model, one), 1, grid, into)

    return step


def opacus_ghost(model: nn.Module) -> Step:
    """Opacus' fast gradient clipping: ghost norms, then a second backward pass over the weighted loss."""
    from opacus.grad_sample import GradSampleModuleFastGradientClipping as Wrapped

    wrapped = Wrapped(model, batch_first=True, max_grad_norm=CLIP_NORM, use_ghost_clipping=True, loss_reduction="mean")

    def step(batch: Batch) -> None:
        model.zero_grad(set_to_none=True)
        loss = example_losses(wrapped, batch)
        loss.mean().backward(retain_graph=True)
        weights = wrapped.get_clipping_coef()
        model.zero_grad(set_to_none=True)
        wrapped.disable_hooks()
        (weights * loss).sum().backward()
        wrapped.enable_hooks()

    return step


def opacus_hooks(model: nn.Module) -> Step:
    """Opacus' default: every per-example gradient is kept, then clipped and summed."""
    from opacus.grad_sample import GradSampleModule

    wrapped = GradSampleModule(model, batch_first=True, loss_reduction="sum")

    def step(batch: Batch) -> None:
        wrapped.zero_grad(set_to_none=True)
        example_losses(wrapped, batch).sum().backward()
        samples = {n: p.grad_sample for n, p in model.named_parameters() if p.requires_grad}
        norms = torch.stack([g.flatten(1).norm(dim=1) for g in samples.values()], 1).norm(dim=1)
        weights = (CLIP_NORM / norms).clamp(max=1.0)
        for name, p in trainable(model).items():
            p.grad = torch.einsum("b,b...->...", weights.to(samples[name].dtype), samples[name])
            p.grad_sample = None

    return step


def fastdp(model: nn.Module) -> Step:
    """fastDP's hybrid book-keeping, its default."""
    from fastDP import PrivacyEngine

    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0)
    engine = PrivacyEngine(
        model,
        batch_size=32,
        sample_size=10_000,
        epochs=1,
        noise_multiplier=1.0,
        clipping_fn="Abadi",
        clipping_mode="MixOpt",
        clipping_style="all-layer",
    )
    engine.attach(optimizer)

    def step(batch: Batch) -> None:
        model.zero_grad(set_to_none=True)
        example_losses(model, batch).mean().backward()
        for p in trainable(model).values():
            p.grad = p.private_grad
            del p.private_grad  # as its optimizer.step does

    return step


METHODS: dict[str, Callable[[nn.Module], Step]] = {
    "plain": plain,
    "ours": ours,
    "compiled": compiled,
    "plain, compiled": plain_compiled,
    "discrete": discrete,
    "Opacus ghost": opacus_ghost,
    "Opacus hooks": opacus_hooks,
    "fastDP": fastdp,
}
