"""Whatever lets one example reach another leaves a pass unproved, whatever the lengths; sound models are proved."""

import copy
import cProfile
import ctypes
import gc
import pickle
import queue
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from hf_dp.errors import SelfCheckError, UnsupportedParameterError
from hf_dp.per_example import clipped_gradients, head, losses, per_example_factors
from hf_dp.per_example.batches import MicroBatch
from hf_dp.per_example.inventory import take_inventory
from hf_dp.per_example.proof import Proof, State, prove, state_put_back
from hf_dp.per_example.proof.calls import tensors_in
from hf_dp.per_example.proof.labels import UNWRITTEN
from hf_dp.per_example.proof.tracker import Tracker
from tests.support import models as M
from tests.support.couplings import COUPLINGS, Stack, random_layer
from tests.support.marks import quick

Batch = dict[str, Tensor]


def token_losses(model: nn.Module, batch: Batch) -> Tensor:
    """The sum of -log p over the targets of each example, with one label a position or one an example."""
    scores = model(**{k: v for k, v in batch.items() if k != "labels"}).logits
    each = F.cross_entropy(scores.flatten(0, -2), batch["labels"].flatten(), reduction="none")
    return each.view(len(scores), -1).sum(1)


def proof_of(model: nn.Module, make: Callable[[], Batch] = M.token_batch, losses: Any = token_losses) -> Proof:
    return prove(model, losses, [make(), make()])


def tiny(**k: Any) -> nn.Module:
    torch.manual_seed(0)
    return M.llama(**{"num_hidden_layers": 1, **k})


PLACES = ("model.embed_tokens", "model.layers.0.mlp", "model.norm")


def planted(place: str, coupling: Callable[[Tensor], Tensor], model: nn.Module) -> nn.Module:
    model.get_submodule(place).register_forward_hook(lambda module, args, out: coupling(out))
    return model


def hooked_node(out: Tensor) -> Tensor:
    """Gradients are mixed where they are large, which those of made-up records are not."""
    changed = out * 1.0
    changed.grad_fn.register_prehook(lambda g: (g[0] + g[0].mean(0) if g[0].abs().max() > 1e6 else g[0],))
    return changed


def hooked_saving(out: Tensor) -> Tensor:
    mixed = lambda saved: saved.roll(1, 0) if saved.abs().max() > 1e6 else saved  # noqa: E731
    with torch.autograd.graph.saved_tensors_hooks(lambda saved: saved, mixed):
        return out.tanh()


@pytest.mark.parametrize("hooked", [hooked_node, hooked_saving])
def test_hooks_on_the_graph_leave_a_pass_unproved(hooked: Callable[[Tensor], Tensor]) -> None:
    found = proof_of(planted("model.norm", hooked, tiny()))
    assert not found.independent
    assert "Python has a say in backward" in found.reasons[0]


def test_who_is_told_of_collected_garbage_has_no_say_in_backward() -> None:
    told = lambda phase, info: None  # noqa: E731
    often = gc.get_threshold()
    gc.callbacks.append(told)
    gc.set_threshold(50, 1_000, 1_000)
    try:
        assert proof_of(tiny()).reasons == ()
    finally:
        gc.set_threshold(*often)
        gc.callbacks.remove(told)
    assert gc.isenabled()


@pytest.mark.parametrize("profiling", [cProfile.Profile, None])
def test_who_measures_a_training_goes_on_measuring(profiling: Any) -> None:
    called: list[str] = []
    own = lambda frame, event, _: called.append(frame.f_code.co_name)  # noqa: E731
    profile = profiling() if profiling else None
    profile.enable() if profile else sys.setprofile(own)
    try:
        assert proof_of(tiny()).reasons == ()
        M.token_batch()
    finally:
        profile.disable() if profile else sys.setprofile(None)
    names = (
        [entry.code.co_name for entry in profile.getstats() if hasattr(entry.code, "co_name")] if profile else called
    )
    assert "token_batch" in names


def in_a_new_thread(out: Tensor) -> Tensor:
    made: list[Tensor] = []
    thread = threading.Thread(target=lambda: made.append(out + out.roll(1, 0)))
    thread.start()
    thread.join()
    return made[0]


WORKER = ThreadPoolExecutor(1)


def handed_over(out: Tensor) -> Tensor:
    return WORKER.submit(lambda: out * float(out.max())).result()


@pytest.mark.parametrize("elsewhere", [in_a_new_thread, handed_over])
def test_work_in_other_threads_leaves_a_pass_unproved(elsewhere: Callable[[Tensor], Tensor]) -> None:
    found = proof_of(planted("model.norm", elsewhere, tiny()))
    assert any(reason.startswith("work is handed to another thread or process in") for reason in found.reasons)
    assert not hasattr(threading.Thread.start, "__wrapped__")
    assert not hasattr(ThreadPoolExecutor.submit, "__wrapped__")


def test_memory_that_nobody_was_seen_to_make_may_hold_anything() -> None:
    waiting: queue.SimpleQueue[Tensor] = queue.SimpleQueue()
    done: queue.SimpleQueue[Tensor] = queue.SimpleQueue()

    def work() -> None:
        while True:
            out = waiting.get()
            done.put(out + out.roll(1, 0))

    threading.Thread(target=work, daemon=True).start()

    def by_a_worker(out: Tensor) -> Tensor:
        waiting.put(out)
        return done.get()

    found = proof_of(planted("model.norm", by_a_worker, tiny()))
    assert any("a tensor that no operation of the pass made" in reason for reason in found.reasons)


@pytest.mark.parametrize("place", quick({*[*PLACES][::3]}, PLACES))
@pytest.mark.parametrize("kind", COUPLINGS)
def test_whatever_couples_examples_is_found_wherever_it_stands(kind: str, place: str) -> None:
    found = proof_of(planted(place, COUPLINGS[kind], tiny()))
    assert not found.independent
    assert not any("could not be followed" in reason for reason in found.reasons)


class Kernel(torch.autograd.Function):
    """Copies its input by the addresses, as a kernel of Triton or of a library of its own would be launched."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return by_address(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return by_address(grads[0])


def by_address(x: Tensor) -> Tensor:
    x = x.contiguous()
    y = torch.empty_like(x)
    ctypes.memmove(y.data_ptr(), x.data_ptr(), x.numel() * x.element_size())
    return y


def test_a_foreign_kernel_among_frozen_weights_leaves_a_pass_unproved_and_one_example_exact() -> None:
    """What Liger's norms, rotations and SwiGLU are to the proof, which can't look into them."""
    model = M.with_lora(tiny)
    batch = M.token_batch(1)
    plain = clipped_gradients(model, lambda: token_losses(model, batch), 1, 1.0, per_example_factors)[1]
    model.get_base_model().model.norm.register_forward_hook(lambda module, args, out: Kernel.apply(out))
    assert any("data_ptr" in reason for reason in proof_of(model).reasons)
    found = clipped_gradients(model, lambda: token_losses(model, batch), 1, 1.0, per_example_factors)[1]
    for name, p in model.named_parameters():
        if p.requires_grad:
            ours, theirs = torch.zeros_like(p), torch.zeros_like(p)
            found(name, ours)
            plain(name, theirs)
            assert torch.equal(ours, theirs)


def test_what_does_not_couple_is_proved_at_the_same_places() -> None:
    sound: list[Callable[[Tensor], Tensor]] = [
        lambda h: h - h.mean(1, keepdim=True),
        lambda h: h.flatten(0, 1).softmax(-1).view_as(h),
        lambda h: h.roll(1, 1),
        lambda h: torch.stack(list(h.unbind(0))),
        lambda h: torch.cat([h[:, 2:], h[:, :2]], 1),
        lambda h: h.index_select(1, torch.arange(h.shape[1])),
        lambda h: h.gather(1, h[..., :1].argmax(1, keepdim=True).expand_as(h[:, :1])).expand_as(h),
        lambda h: (h.transpose(0, 1) * 2).transpose(0, 1),
    ]
    for number, function in enumerate(sound):
        for place in PLACES[number % 2 :: 2]:
            assert proof_of(planted(place, function, tiny())).reasons == ()


@pytest.mark.parametrize(
    "loss",
    [
        lambda each: each / each.sum(),
        lambda each: each * (each < each.detach().topk(1).values),
        lambda each: each - each.mean(),
        lambda each: each.flip(0),
        lambda each: torch.stack([each[0], each[0], each[2]]),
        lambda each: each * float(each.max()),
    ],
)
def test_a_loss_over_the_batch_is_found(loss: Callable[[Tensor], Tensor]) -> None:
    assert not proof_of(tiny(), losses=lambda model, batch: loss(token_losses(model, batch))).independent


def test_rows_credited_to_another_example_are_found_though_each_loss_is_its_own() -> None:
    model = tiny()
    layer = model.get_submodule("model.layers.0.mlp")
    layer.register_forward_pre_hook(lambda module, args: (args[0].roll(1, 0),))
    layer.register_forward_hook(lambda module, args, out: out.roll(-1, 0))
    assert "rows that are not the examples' own" in proof_of(model).reasons[0]


# What a step changes: a pass is followed with the weights of one moment.


class Steered(nn.Module):
    """Passes its input on as long as a trained number is zero."""

    def __init__(self, steers: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.number, self.steers = nn.Parameter(torch.zeros(())), steers

    def forward(self, h: Tensor) -> Tensor:
        return self.steers(h + self.number, self.number.detach())


def grown(number: Tensor) -> Tensor:
    return (number.abs() > 0).long()


def others_row(h: Tensor, number: Tensor) -> Tensor:
    return h + h[(torch.arange(len(h)) - grown(number)) % len(h)]


def others_row_by_take(h: Tensor, number: Tensor) -> Tensor:
    return h + h.index_select(0, torch.cat([torch.arange(1, len(h)), grown(number)[None]]))


def others_row_by_gather(h: Tensor, number: Tensor) -> Tensor:
    rows = (torch.arange(len(h)).add_(grown(number)) % len(h)).view(-1, 1, 1).expand_as(h)
    return h + h.gather(0, rows)


def added_to_another(h: Tensor, number: Tensor) -> Tensor:
    return h.index_add(0, (torch.arange(len(h)) + grown(number)) % len(h), h)


def read_by_python(h: Tensor, number: Tensor) -> Tensor:
    return h - h.mean(0) if number.item() else h


def read_as_a_list(h: Tensor, number: Tensor) -> Tensor:
    return h - h.mean(0) if any((number + torch.zeros(2)).tolist()) else h


def read_from_the_state(h: Tensor, number: Tensor) -> Tensor:
    return h - h.mean(0) if (torch.stack([number, h.detach().flatten()[0]])[:1] != 0).any() else h


def sized_by_them(h: Tensor, number: Tensor) -> Tensor:
    return h - h.mean(0) if len(number.reshape(1).nonzero()) else h


STEERS = [others_row, others_row_by_take, others_row_by_gather, added_to_another]
STEERS += [read_by_python, read_as_a_list, read_from_the_state, sized_by_them]


def steered(steers: Callable[[Tensor, Tensor], Tensor]) -> nn.Module:
    model = tiny()
    model.model.norm = nn.Sequential(model.model.norm, Steered(steers))
    return model


@pytest.mark.parametrize("steers", STEERS)
def test_what_trained_weights_decide_leaves_a_pass_unproved(steers: Callable[[Tensor, Tensor], Tensor]) -> None:
    """While the number is zero, each of them passes on what it is given, or an example's own row."""
    assert not proof_of(steered(steers)).independent


def test_trained_weights_may_choose_among_an_examples_own() -> None:
    among_positions: list[Callable[[Tensor, Tensor], Tensor]] = [
        lambda h, number: h + h[:, (torch.arange(h.shape[1]) + grown(number)) % h.shape[1]],
        lambda h, number: h + h.index_select(2, (torch.arange(h.shape[2]) + grown(number)) % h.shape[2]),
        lambda h, number: torch.where(number > 0, h, -h),
    ]
    for steers in among_positions:
        assert proof_of(steered(steers)).reasons == ()
    frozen = steered(read_by_python)
    frozen.model.norm[1].number.requires_grad_(False)
    assert proof_of(frozen).independent


# What a pass keeps.


class Keeping(nn.Module):
    """Passes its input on, and keeps something of the pass."""

    def __init__(self) -> None:
        super().__init__()
        self.count, self.seen, self.last, self.settings = 0, [], None, {"longest": 0}
        self.register_buffer("mean", torch.zeros(16))
        self.register_buffer("passes", torch.zeros((), dtype=torch.long), persistent=False)
        self.fixed = nn.Parameter(torch.ones(16), requires_grad=False)
        self.plain = torch.zeros(3)


def counts(module: Any, h: Tensor) -> Tensor:
    module.count += 1
    return h


def grows_a_list(module: Any, h: Tensor) -> Tensor:
    module.seen.append(h.shape[1])
    return h


def notes_the_longest(module: Any, h: Tensor) -> Tensor:
    module.settings["longest"] = max(module.settings["longest"], h.shape[1])
    return h


def keeps_the_last(module: Any, h: Tensor) -> Tensor:
    out = h if module.last is None else h + module.last.mean()
    module.last = h.detach()
    return out


def averages(module: Any, h: Tensor) -> Tensor:
    module.mean.lerp_(h.detach().mean((0, 1)), 0.1)
    return h


def replaces_a_buffer(module: Any, h: Tensor) -> Tensor:
    module.passes = module.passes + 1
    return h


def writes_a_frozen_weight(module: Any, h: Tensor) -> Tensor:
    module.fixed.data.mul_(0.9)
    return h


def writes_a_plain_tensor(module: Any, h: Tensor) -> Tensor:
    module.plain += 1
    return h


def registers_a_buffer(module: Any, h: Tensor) -> Tensor:
    module.register_buffer("mask", torch.ones(h.shape[1]), persistent=False)
    return h


def swaps_a_submodule(module: Any, h: Tensor) -> Tensor:
    module.inner = nn.Identity()
    return h


def changes_a_dtype(module: Any, h: Tensor) -> Tensor:
    module.mean.data = module.mean.data.double()
    return h


KEEPERS = [counts, grows_a_list, notes_the_longest, keeps_the_last, averages, replaces_a_buffer, writes_a_frozen_weight]
KEEPERS += [writes_a_plain_tensor, registers_a_buffer, swaps_a_submodule, changes_a_dtype]


def with_keeper(keeper: Callable[[Any, Tensor], Tensor], place: str = "model.layers.0.mlp") -> nn.Module:
    model, module = tiny(), Keeping()
    model.keeping = module
    return planted(place, lambda h: keeper(module, h), model)


@pytest.mark.parametrize("place", PLACES[::2])
@pytest.mark.parametrize("keeper", KEEPERS)
def test_whatever_a_pass_keeps_is_found_and_put_back(keeper: Callable[[Any, Tensor], Tensor], place: str) -> None:
    model = with_keeper(keeper, place)
    before = State(model, ["keeping.fixed"])
    found = proof_of(model)
    assert not found.independent
    assert found.written
    assert before.changes() == []


@pytest.mark.parametrize("keeper", [k for k in KEEPERS if k is not writes_a_frozen_weight])
def test_each_pass_begins_from_the_same_state(keeper: Callable[[Any, Tensor], Tensor]) -> None:
    model = with_keeper(keeper)
    state, batch = State(model), M.token_batch()
    losses = []
    for _ in range(3):
        with state_put_back(model, state):
            losses.append(token_losses(model, batch).detach())
        assert State(model).changes() == state.changes() == []
    assert torch.equal(losses[0], losses[1])
    assert torch.equal(losses[0], losses[2])
    assert model.keeping.mean.dtype == torch.float32
    assert "mask" not in dict(model.keeping.named_buffers())


def test_steps_between_passes_are_not_put_back_and_a_pass_that_writes_weights_is_refused() -> None:
    model = tiny()
    state = State(model)
    with torch.no_grad():
        next(model.parameters()).add_(1.0)
    stepped = next(model.parameters()).detach().clone()
    with state_put_back(model, state):
        token_losses(model, M.token_batch())
    assert torch.equal(next(model.parameters()), stepped)
    with pytest.raises(SelfCheckError, match="embed_tokens"), state_put_back(model, state), torch.no_grad():
        next(model.parameters()).mul_(2.0)


def test_the_model_is_left_as_it_was() -> None:
    model = M.gpt2(resid_pdrop=0.5).eval()
    before, chance = {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()
    batches = [M.token_batch(), M.token_batch()]
    chance = torch.get_rng_state()
    assert prove(model, token_losses, batches).independent
    assert torch.equal(torch.get_rng_state(), chance)
    assert not model.training
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


# Parameters elsewhere.


@pytest.mark.parametrize("place", PLACES)
def test_parameters_outside_of_the_model_are_named(place: str) -> None:
    stray = nn.Linear(16, 16)
    with pytest.raises(UnsupportedParameterError, match=r"shape \[16, 16\], one of shape \[16\]"):
        take_inventory(planted(place, stray, tiny()), MicroBatch(M.token_batch(), 3), token_losses)


def test_inputs_made_to_require_gradients_are_no_parameters() -> None:
    model = M.with_lora(M.llama)
    model.enable_input_require_grads()
    assert proof_of(model).reasons == ()


# Sound models.

SOUND: dict[str, tuple[Callable[[], nn.Module], Callable[[], Batch]]] = {
    "gpt2": (M.gpt2, M.token_batch),
    "llama": (M.llama, M.token_batch),
    "mistral": (M.mistral, M.token_batch),
    "qwen2": (M.qwen2, M.token_batch),
    "gemma": (M.gemma, M.token_batch),
    "opt": (M.opt, M.token_batch),
    "bloom": (M.bloom, M.token_batch),
    "bert": (M.bert, M.class_batch),
    "roberta": (M.roberta_tokens, M.tag_batch),
    "distilbert": (M.distilbert, M.class_batch),
    "t5": (M.t5, M.pair_batch),
    "vit": (M.vit, M.image_batch),
}


@pytest.mark.parametrize("name", SOUND)
@pytest.mark.parametrize("adapter", ["full", "lora"])
def test_sound_models_are_proved(name: str, adapter: str) -> None:
    build, make = SOUND[name]
    torch.manual_seed(0)
    model = build() if adapter == "full" else M.with_lora(build, task_type=None)
    assert proof_of(model, make) == Proof(True, ())


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_models_are_proved(reentrant: bool) -> None:
    model = tiny()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    assert proof_of(model).reasons == ()


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("build", [M.llama, M.gpt2, M.modernbert])
def test_either_attention_is_proved(build: Callable[..., nn.Module], attention: str) -> None:
    model = build(attn_implementation=attention)
    assert proof_of(model, M.class_batch if build is M.modernbert else M.token_batch).reasons == ()


def test_autocast_is_proved() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        assert proof_of(M.with_lora(M.llama)).reasons == ()


def next_token(model: nn.Module, batch: Batch, smoothing: float = 0.1) -> Tensor:
    base = getattr(model, "base_model", model)
    inputs = {k: v for k, v in batch.items() if k != "labels"}
    return head.next_token_losses(model, getattr(base, "model", model), inputs, batch["labels"], smoothing)


def aligned(model: nn.Module, batch: Batch, smoothing: float = 0.1) -> Tensor:
    return head.aligned_losses(
        model, model, {k: v for k, v in batch.items() if k != "labels"}, batch["labels"], smoothing
    )


OWN = {"next": (M.llama, next_token, M.token_batch), "lora": (partial(M.with_lora, M.llama), next_token, M.token_batch)}
OWN |= {"pairs": (M.t5, aligned, M.pair_batch), "masked": (M.bert_masked_lm, aligned, M.token_batch)}


@pytest.mark.parametrize("name", OWN)
def test_the_librarys_own_losses_are_proved_as_they_are_spelt_out(name: str) -> None:
    build, loss, make = OWN[name]
    torch.manual_seed(0)
    model, batch = build(), make()
    assert proof_of(model, make, loss).reasons == ()
    with losses.spelt_out():
        spelt = loss(model, batch)
    torch.testing.assert_close(loss(model, batch), spelt, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(loss(model, batch), spelt, rtol=1e-5, atol=1e-6)  # the head's fast form comes second


# What leaves PyTorch, and comes back.

LEAVING: dict[str, Callable[[Tensor], Tensor]] = {
    "tensor": lambda x: torch.tensor([x[0, 0, 0], 1.0]),
    "new_tensor": lambda x: x.new_tensor([x[0, 0, 0]]),
    "legacy": lambda x: torch.FloatTensor([x[0, 0, 0]]),
    "an index in a list": lambda x: torch.ones(3, 3)[:, [(x[0, 0, 0] > 0).long(), 0]],
    "array": lambda x: torch.from_numpy(np.asarray(x.detach())),
    "copy": lambda x: copy.deepcopy(x.detach()),
    "pickle": lambda x: pickle.loads(pickle.dumps(x.detach())),
    "text": lambda x: torch.full((1,), float(len(str(x)))),
    "close": lambda x: torch.ones(1) * torch.allclose(x[0], x[1]),
    "memory": lambda x: torch.empty(0).set_(x.untyped_storage().clone(), 0, (2, 1)),
    "unwritten": lambda x: torch.empty(4),
}


@pytest.mark.parametrize("way", LEAVING)
def test_no_way_out_of_pytorch_and_back_is_taken_for_a_constant(way: str) -> None:
    tracker, x = Tracker(nn.Identity()), torch.randn(3, 4, 5)
    tracker.mark(x, 0)
    with tracker.watching():
        result = LEAVING[way](x)
    assert tracker.found or (tracker.book.read(result) & UNWRITTEN).any()


# The short list of harmless reads: the branch they choose changes no result.


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("build", [M.llama, M.mistral, M.gpt2, M.bert, M.distilbert, M.bart, M.gemma3])
def test_whether_another_record_has_padding_changes_no_result(build: Callable[..., nn.Module], attention: str) -> None:
    torch.manual_seed(0)
    model = build(attn_implementation=attention).eval()
    ids = torch.randint(3, M.VOCAB, (3, 9))
    mask = torch.ones_like(ids)
    padded = mask.clone()
    padded[1:, 5:] = 0
    more = {"decoder_input_ids": ids} if build is M.bart else {}
    with torch.no_grad():
        whole = model(input_ids=ids, attention_mask=mask, **more).logits[0]
        beside = model(input_ids=ids, attention_mask=padded, **more).logits[0]
    torch.testing.assert_close(whole, beside, rtol=1e-4, atol=1e-5)


SHARED: dict[str, Callable[[Tensor], Tensor]] = {
    "a dropped constant": lambda h: h + F.dropout(torch.ones(h.shape[1:]), 0.5),
    "one number for a layer": lambda h: h * torch.rand([]),
    "noise of positions": lambda h: h + torch.randn(1, *h.shape[1:]),
    "noise in place": lambda h: h * torch.empty(h.shape[2]).uniform_(),
    "a shuffle": lambda h: h[:, :, torch.randperm(h.shape[2])],
}
OWN_CHANCE: dict[str, Callable[[Tensor], Tensor]] = {
    "dropout": lambda h: F.dropout(h, 0.5),
    "dropout of flat rows": lambda h: F.dropout(h.flatten(0, 1), 0.5).view_as(h),
    "dropout with positions first": lambda h: F.dropout(h.transpose(0, 1), 0.5).transpose(0, 1),
    "a path left out": lambda h: h * torch.rand(len(h), 1, 1).add(0.5).floor(),
    "noise": lambda h: h + torch.randn_like(h),
    "noise in place": lambda h: h * torch.empty_like(h).uniform_(),
}


@pytest.mark.parametrize("kind", SHARED)
def test_random_numbers_that_examples_share_are_found(kind: str) -> None:
    """Who shares them is whoever is in the pass, which another record's absence changes."""
    assert any(
        "for all examples together" in reason for reason in proof_of(planted(PLACES[1], SHARED[kind], tiny())).reasons
    )


@pytest.mark.parametrize("kind", OWN_CHANCE)
def test_random_numbers_of_each_examples_own_are_proved(kind: str) -> None:
    assert proof_of(planted(PLACES[1], OWN_CHANCE[kind], tiny())).reasons == ()


# Rules against a slow twin: numbers that do change where an example changes are said to depend on it.


OPERATIONS: dict[str, Callable[[Tensor], Any]] = {
    "sums": lambda x: [x.sum(1), x.sum(0), x.sum(), x.mean((1, 2)), x.amax(2), x.var(1), x.logsumexp(1)],
    "scans": lambda x: [x.cumsum(1), x.cumsum(0), x.softmax(0), x.log_softmax(2), x.cummax(1).values, x.flip(0, 1)],
    "orders": lambda x: [
        x.sort(0).values,
        x.sort(2).values,
        x.topk(2, 1).values,
        x.median(2).values,
        x.kthvalue(2, 0).values,
    ],
    "shapes": lambda x: [
        x.permute(2, 0, 1).reshape(-1, 3),
        x.flatten().view(5, -1),
        x.unfold(1, 2, 1),
        x.expand(2, *x.shape),
    ],
    "joins": lambda x: [
        torch.cat([x, x.roll(1, 0)]),
        torch.stack([x, x.flip(0)], 1),
        x.repeat(2, 1, 1),
        F.pad(x, (1, 0, 0, 2)),
    ],
    "repeats": lambda x: [
        x.repeat_interleave(2, 0),
        torch.tril(x),
        x.diagonal(0, 1, 2),
        x.movedim(0, 2),
        torch.rot90(x),
    ],
    "products": lambda x: [x @ x.mT, x[0] @ x[1].T, torch.einsum("bij,bkj->bik", x, x), x.flatten(1) @ x.flatten(1).T],
    "vectors": lambda x: [
        x[:, 0] @ x[0, 1],
        torch.dot(x[0, 0], x[1, 1]),
        torch.baddbmm(x[:, :, :4], x, x.mT),
        torch.outer(x[0, 0], x[2, 0]),
    ],
    "indices": lambda x: [
        x[torch.tensor([2, 0])],
        x[:, torch.tensor([1, 1])],
        x[torch.arange(3), (x[:, 0, 0] > 0).long()],
        x[x.argmax(0)[0]],
    ],
    "gathers": lambda x: [
        x.gather(1, (x > 0).long()),
        x.gather(0, x.argsort(0)),
        x.index_select(2, torch.tensor([0])),
        x.take_along_dim(x.argsort(1), 1),
    ],
    "embeddings": lambda x: [F.embedding((x > 0).long(), x[0]), F.one_hot((x > 0).long(), 2)],
    "scatters": lambda x: [
        torch.zeros(3, 4, 5).scatter(1, x.argsort(1), x),
        torch.zeros(3, 4, 5).scatter_add(0, x.argsort(0), x),
    ],
    "additions": lambda x: [
        x.index_add(1, torch.tensor([0, 0]), x[:, :2]),
        x.index_copy(0, torch.tensor([1]), x[:1]),
        x.index_fill(1, torch.tensor([0]), 0),
    ],
    "puts": lambda x: [put(x, 0), put(x, 1), put(x, 2), put(x, 3), put(x, 4)],
    "masks": lambda x: [x.masked_fill(x > 0, 0), torch.where(x > 0, x, x.roll(1, 0)), x.masked_scatter(x[0] > 0, x)],
    "norms": lambda x: [
        F.layer_norm(x, (5,)),
        F.layer_norm(x, (4, 5)),
        F.rms_norm(x, (5,)),
        F.group_norm(x, 2),
        F.instance_norm(x),
        F.normalize(x, dim=0),
    ],
    "batch norms": lambda x: [
        F.batch_norm(x, None, None, training=True),
        F.batch_norm(x, torch.zeros(4), torch.ones(4)),
    ],
    "convolutions": lambda x: [
        F.conv1d(x, torch.ones(2, 4, 3)),
        F.conv1d(x.transpose(0, 1), torch.ones(2, 3, 2)),
        F.conv_transpose1d(x, torch.ones(4, 2, 3)),
    ],
    "pools": lambda x: [
        F.max_pool1d(x, 2),
        F.avg_pool1d(x, 2),
        F.adaptive_avg_pool1d(x, 2),
        F.interpolate(x, 8),
        F.glu(x[..., :4]),
    ],
    "attention": lambda x: [
        attend(x),
        attend(x.transpose(0, 1)),
        F.scaled_dot_product_attention(x, x, x, is_causal=True),
    ],
    "losses": lambda x: [
        F.cross_entropy(x.flatten(0, 1), (x[..., 0] > 0).long().flatten(), reduction="none"),
        F.cross_entropy(x.transpose(1, 2), (x[..., 0] > 0).long(), reduction="none"),
        F.cross_entropy(x[:, 0], (x[:, 1, 0] > 0).long()),
        F.mse_loss(x, x.roll(1, 0), reduction="none"),
        F.binary_cross_entropy_with_logits(x, (x > 0).float(), reduction="none"),
    ],
    "in place": lambda x: [
        x.clone().add_(x.roll(1, 0)),
        torch.zeros_like(x).copy_(x),
        x.clone().transpose(0, 1).mul_(x[0, 0, 0]),
        filled(x),
    ],
    "complex": lambda x: [
        torch.view_as_real(torch.view_as_complex(x[..., :4].reshape(3, 4, 2, 2).contiguous()) * 2),
        torch.fft.rfft(x, dim=1).abs(),
    ],
    "solutions": lambda x: [
        torch.linalg.solve_triangular(torch.eye(4) + x[..., :4].tril(-1), x, upper=False),
        torch.cdist(x, x),
    ],
    "out": lambda x: [
        torch.add(x, x.roll(1, 0), out=torch.zeros(3, 4, 5)),
        torch.mm(x[0], x[1].T, out=torch.zeros(4, 4)),
    ],
}


def attend(x: Tensor) -> Tensor:
    q = x.unsqueeze(1)
    return F.scaled_dot_product_attention(q, q, q, (x[..., 0] > 0)[:, None, None, :])


def filled(x: Tensor) -> Tensor:
    out = torch.empty(3, 4, 5)
    out[:, :, 1:] = x[:, :, 1:]
    out[..., 0] = x[0, 0, 0]
    return out


def put(x: Tensor, kind: int) -> Tensor:
    out = x.clone()
    if kind == 0:
        out[torch.tensor([0, 1])] = x[2]
    elif kind == 1:
        out[torch.arange(3), (x[:, 0, 0] > 0).long()] = 1.0
    elif kind == 2:
        out[x > 0] = 7.0
    elif kind == 3:
        out.index_put_((torch.tensor([0, 0]),), x[1:], accumulate=True)
    else:
        out[:, (x[0, :, 0] > 0).long()] = x[:, :1]
    return out


@pytest.mark.parametrize("family", OPERATIONS)
def test_what_changes_with_an_example_is_said_to_depend_on_it(family: str) -> None:
    function = OPERATIONS[family]
    x = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(0))
    tracker = Tracker(nn.Identity())
    tracker.mark(x, 0)
    with tracker.watching():
        results = list(tensors_in(function(x)))
        labels = [tracker.book.read(r) for r in results]
    for row in range(3):
        for seed in range(6):
            other = x.clone()
            other[row] = torch.randn(4, 5, generator=torch.Generator().manual_seed(seed + 1))
            for number, (before, after) in enumerate(zip(results, tensors_in(function(other)), strict=True)):
                changed = (before != after).numpy()
                assert not (changed & ((labels[number] & (1 << row)) == 0)).any(), (family, number)


# Random architectures with random couplings at random places.


def coupled(model: nn.Module, x: Tensor) -> bool:
    """Whether one example's numbers move another's loss, tried."""
    with torch.no_grad():
        before = model(x)
        for row in range(3):
            for scale in (0.3, 3.0):
                other = x.clone()
                other[row] = torch.randn(x.shape[1:], dtype=x.dtype) * scale
                moved = (model(other) - before).abs() > 1e-9 * (1 + before.abs())
                if any(moved[b] for b in range(3) if b != row):
                    return True
    return False


def test_no_random_architecture_with_a_coupling_is_proved() -> None:
    generator = torch.Generator().manual_seed(3)

    def draw(n: int) -> int:
        return int(torch.randint(n, (), generator=generator))

    outcomes = {True: [0, 0], False: [0, 0]}
    for number in range(100):
        torch.manual_seed(number)
        model = Stack([random_layer(draw) for _ in range(1 + draw(4))]).double()
        batches = [{"x": torch.randn(3, 5, 6, dtype=torch.float64)} for _ in range(2)]
        proved = prove(model, lambda m, b: m(b["x"]), batches).independent
        outcomes[coupled(model, batches[0]["x"])][proved] += 1
    assert outcomes[True][True] == 0
    assert outcomes[True][False] > 20
    assert outcomes[False][True] > 20


def test_adapters_of_a_peft_model_are_proved_with_what_they_save() -> None:
    settings = LoraConfig(r=2, target_modules=["query", "value"], modules_to_save=["classifier"])
    assert proof_of(get_peft_model(M.bert(), settings), M.class_batch).reasons == ()


def test_batches_of_another_number_are_an_error() -> None:
    with pytest.raises(ValueError, match="expected 2 batches"):
        prove(tiny(), token_losses, [M.token_batch()])


@pytest.mark.parametrize("make", [partial(M.token_batch, 2), partial(M.token_batch, 4)])
def test_a_tensor_that_does_not_lead_with_the_examples_is_not_followed(make: Callable[[], Batch]) -> None:
    assert "does not lead" in proof_of(tiny(), make).reasons[0]


def test_texts_beside_the_tensors_are_not_followed() -> None:
    batches = [{"x": torch.ones(3, 2), "text": ["alpha", "beta", "gamma"]} for _ in range(2)]
    found = prove(nn.Linear(2, 1), lambda model, batch: model(batch["x"])[:, 0], batches)
    assert not found.independent
    assert "texts" in found.reasons[0]
