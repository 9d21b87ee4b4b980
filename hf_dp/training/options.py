"""Trainer options -> those that would void the guarantee, all at once, each with its remedy.

Every field of `TrainingArguments` has a verdict here: REFUSED (at some values), HANDLED (it works differently than in a
plain Trainer, or it has an effect besides training that has to be controlled) or SAFE. A test fails if a new version of
transformers brings a field without a verdict.
"""

import copy
import inspect
import os
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn
from torch.optim.lr_scheduler import ReduceLROnPlateau
from transformers import Trainer, TrainingArguments

from hf_dp.errors import UnsupportedOptionError
from hf_dp.step import COARSE, coarse_products, sharding
from hf_dp.training import shards
from hf_dp.training.deciders import deciders
from hf_dp.training.given import unusable_data
from hf_dp.training.overrides import ignored, unfit

# Trainer's default, which nobody chose. It rescaled private updates 12-fold in an experiment, so it is switched off.
DEFAULT_MAX_GRAD_NORM = 1.0

COMPILED = (
    "torch.compile cannot trace the stand-ins that watch the trainable parameters; pass the model as it was before "
    "torch.compile, and TrainingArguments(torch_compile=True)"
)

SPLIT = (
    "tensor, context and sequence parallelism split one example over processes; use DDP, or shards with or without "
    "replicas (dp_shard_size, dp_replicate_size, or load the base with "
    f"{sharding.LOADING})"
)


def _of_data_alone(config: Any) -> bool:
    """Whether accelerate's ParallelismConfig (which versions before 1.10 lack) splits the batch alone."""
    return type(config).__name__ == "ParallelismConfig" and config.non_data_parallel_size == 1


# option -> (is this value unsafe?, why and what to do instead)
REFUSED: dict[str, tuple[Callable[[Any], bool], str]] = {
    "gradient_accumulation_steps": (
        lambda v: v != 1,
        "the logical batch is drawn and cut into micro-batches inside one step; set it to 1, choose the logical "
        "batch with expected_batch_size and the memory with per_device_train_batch_size",
    ),
    "max_grad_norm": (
        lambda v: v not in (None, 0, DEFAULT_MAX_GRAD_NORM),
        "it clips the whole batch, not an example; set PrivacyConfig.clip_norm and leave this alone",
    ),
    "fp16": (bool, "loss scaling skips steps depending on the data; use bf16=True or float32"),
    "neftune_noise_alpha": (
        lambda v: v is not None,
        "its noise depends on the padded length, and so on other examples; drop it",
    ),
    "auto_find_batch_size": (bool, "it restarts training and spends twice; set per_device_train_batch_size"),
    "ignore_data_skip": (bool, "the sampler needs no skipping to be fresh; leave it at False"),
    "include_num_input_tokens_seen": (lambda v: v not in (False, "no"), "token counts are private; leave it off"),
    "train_sampling_strategy": (
        lambda v: v not in ("random", None),
        "batches must be Poisson samples; leave it at 'random' (records are sorted by length inside each logical "
        "batch anyway)",
    ),
    "group_by_length": (
        bool,
        "batches must be Poisson samples; drop it (each logical batch is sorted by length anyway)",
    ),
    "dataloader_drop_last": (bool, "a dropped batch is not a Poisson sample; leave it at False"),
    "deepspeed": (
        bool,
        "it reduces and steps inside backward; use DDP (accelerate launch --multi_gpu), or load the base sharded with "
        f"{sharding.LOADING}",
    ),
    "parallelism_config": (
        lambda v: v is not None and not _of_data_alone(v),
        SPLIT,
    ),
    "optim": (
        lambda v: any(word in str(v).lower() for word in ("lomo", "layerwise")),
        "it updates inside backward, before clipping and noise; use adamw_torch or sgd",
    ),
    "lr_scheduler_type": (
        lambda v: str(getattr(v, "value", v)) in ("reduce_lr_on_plateau", "greedy"),
        "it follows private numbers; use a schedule fixed in advance, such as linear or cosine",
    ),
    "use_liger_kernel": (
        bool,
        "its fused head hides gradients from the per-example rules, and no proof can follow what its other kernels "
        "(norms, rotations, SwiGLU) do, so each example would need a pass of its own; leave it off",
    ),
    "torch_compile_mode": (
        lambda v: v not in (None, "default"),
        "the blocks are compiled with dynamic shapes, which CUDA graphs and tuning for one shape do not go with; "
        "leave it out",
    ),
    "tf32": (
        bool,
        COARSE,
    ),
    "debug": (
        lambda v: any("underflow_overflow" in str(option).lower() for option in _listed(v)),
        "it prints activations of private examples; use it on public data, without privacy",
    ),
    "skip_memory_metrics": (
        lambda v: v is False,
        "peak memory tells the length of the longest private record; leave it at True",
    ),
    "sortish_sampler": (
        bool,
        "batches must be Poisson samples; drop it (each logical batch is sorted by length anyway)",
    ),
    "packing": (bool, "packing joins records in one row; leave it off"),
    "padding_free": (bool, "it joins the records of a batch in one row; leave it off"),
}

# option -> what it does in a private training
HANDLED: dict[str, str] = {
    "output_dir": "the ledger and its fingerprint key lie there; another training's ledger there is refused",
    "per_device_train_batch_size": "examples of a micro-batch: memory and speed, never the result",
    "num_train_epochs": "T = ceil(epochs x round(N / B))",
    "max_steps": "T where it is above 0",
    "average_tokens_across_devices": "not read: each example's loss is its own mean",
    "label_smoothing_factor": "applied to each example's own loss",
    "bf16": "autocast; norms, factors, sums and noise stay float32",
    "gradient_checkpointing": "recomputed under the same random state as the forward pass",
    "activation_checkpointing": "as gradient_checkpointing",
    "logging_strategy": "private losses are left out, or noised (PrivacyConfig.log_loss_up_to); epsilon is added",
    "logging_first_step": "as logging_strategy",
    "logging_nan_inf_filter": "no training loss is logged that it could filter: a noised one is finite",
    "report_to": "gets what is logged, and no more",
    "save_strategy": "'best' needs PrivacyConfig(public_eval=True); a checkpoint is sealed with the ledger's copy",
    "load_best_model_at_end": "needs PrivacyConfig(public_eval=True)",
    "metric_for_best_model": "needs PrivacyConfig(public_eval=True)",
    "greater_is_better": "only for load_best_model_at_end",
    "eval_strategy": "evaluation data are not covered: the log says so unless they were declared public",
    "eval_on_start": "as eval_strategy",
    "hub_token": "refused, never shown: Trainer saves it in training_args.bin, which is pushed",
    "push_to_hub": "the card and privacy.json go along, the fingerprint's key stays",
    "hub_strategy": "as push_to_hub; checkpoints hold only what was released, are sealed first, and are waited for",
    "restore_callback_states_from_checkpoint": "what was spent comes from the ledger, never from a callback's state",
    "resume_from_checkpoint": "train() takes it, and the newest complete checkpoint for True",
    "seed": "initial weights and plain loaders; never draws, noise, dropout or masks",
    "data_seed": "not read: draws come from a secret key",
    "full_determinism": "deterministic kernels; draws, noise and dropout stay secret",
    "fsdp": "FSDP2: the model is sharded as the trainer is made; of an adapter the base alone (see `shards`)",
    "fsdp_config": "as fsdp; its activation_checkpointing becomes the model's own",
    "accelerator_config": "split_batches, dispatch_batches and num_steps are refused; even_batches is not read",
    "dataloader_num_workers": "records are read under secret randomness in each worker",
    "dataloader_in_order": "not read: draws arrive in their order",
    "torch_compile": "the repeated blocks are compiled, where LoRA on linear layers is all that is trained in them",
    "torch_compile_backend": "as torch_compile; the self-check goes through what it made",
    "liger_kernel_config": "only for use_liger_kernel, which is refused",
    "length_column_name": "only for grouping by length, which is refused",
}

# options that see no private examples and have no effect on the sum, the noise or the ledger
SAFE = frozenset(
    """
    learning_rate lr_scheduler_kwargs warmup_steps warmup_ratio weight_decay adam_beta1 adam_beta2 adam_epsilon
    optim_args optim_target_modules
    activation_checkpointing_kwargs gradient_checkpointing_kwargs use_cache torch_empty_cache_steps
    bf16_full_eval fp16_full_eval eval_steps eval_delay per_device_eval_batch_size prediction_loss_only
    eval_do_concat_batches eval_use_gather_object eval_accumulation_steps include_for_metrics batch_eval_metrics
    do_train do_eval do_predict
    predict_with_generate generation_max_length generation_num_beams generation_config
    logging_steps logging_dir log_on_each_node log_level log_level_replica disable_tqdm run_name project
    trackio_space_id trackio_bucket_id trackio_static_space_id
    save_steps save_only_model save_on_each_node save_total_limit enable_jit_checkpoint
    hub_private_repo hub_model_id hub_always_push hub_revision
    use_cpu local_rank ddp_backend ddp_timeout ddp_find_unused_parameters ddp_bucket_cap_mb ddp_broadcast_buffers
    ddp_static_graph dataloader_pin_memory dataloader_persistent_workers dataloader_prefetch_factor
    dataloader_multiprocessing_context remove_unused_columns label_names
    """.split()
)

# environment variable, set by `accelerate launch` or its config file -> (is this value unsafe?, remedy)
ENVIRONMENT: dict[str, tuple[Callable[[str], bool], str]] = {
    "ACCELERATE_USE_DEEPSPEED": (lambda v: v.lower() in ("1", "true"), REFUSED["deepspeed"][1]),
    "ACCELERATE_USE_MEGATRON_LM": (lambda v: v.lower() in ("1", "true"), SPLIT),
    "PARALLELISM_CONFIG_TP_SIZE": (lambda v: v not in ("", "1"), SPLIT),
    "PARALLELISM_CONFIG_CP_SIZE": (lambda v: v not in ("", "1"), SPLIT),
    "PARALLELISM_CONFIG_SP_SIZE": (lambda v: v not in ("", "1"), SPLIT),
    "ACCELERATE_MIXED_PRECISION": (lambda v: v.lower() in ("fp16", "fp8"), REFUSED["fp16"][1]),
}


def check_options(args: TrainingArguments, *, public_eval: bool, **others: Any) -> None:
    """Raises one error that names every option, and every other argument of the trainer, that cannot be allowed.

    Args:
        args: the `TrainingArguments`.
        public_eval: whether the evaluation data were declared public.
        others: the trainer's other arguments by name (model, train_dataset, data_collator, optimizers, model_init,
            ...), and its class as `trainer`.

    Raises:
        UnsupportedOptionError: with one line an option.
    """
    trainer = others.get("trainer", Trainer)
    if why := unfit(trainer):
        raise UnsupportedOptionError(f"cannot be combined with differential privacy: {why}")
    problems = [*_wrong_arguments(args, public_eval), *_wrong_environment(), *_wrong_others(others)]
    problems += shards.problems(args)
    problems += [*ignored(trainer), *getattr(trainer, "unfit_settings", lambda args: ())(args)]
    problems += [*_wrong_model(others.get("model")), *(() if public_eval else deciders(others.get("callbacks") or ()))]
    _refuse(problems)


def refuse_arguments(args: TrainingArguments, *, public_eval: bool) -> None:
    """As `check_options`, for `TrainingArguments` that were changed after construction."""
    _refuse([*_wrong_arguments(args, public_eval)])


def refuse_model(model: nn.Module) -> None:
    """As `check_options`, for a model that the host made itself, or put adapters on."""
    _refuse([*_wrong_model(model)])


def _refuse(problems: list[str]) -> None:
    if problems:
        lines = "\n".join(f"  - {problem}" for problem in problems)
        raise UnsupportedOptionError(f"cannot be combined with differential privacy:\n{lines}")


def positional_names(trainer: type, *, after: type) -> list[str]:
    """The names of the positional arguments of `trainer`'s bases after `after`.

    A base whose `__init__` passes `*args` on has those of the next one.
    """
    hosts = trainer.__mro__[trainer.__mro__.index(after) + 1 :]
    for init in (host.__dict__["__init__"] for host in hosts if "__init__" in host.__dict__):
        parameters = list(inspect.signature(init).parameters.values())[1:]
        if all(p.kind is not p.VAR_POSITIONAL for p in parameters):
            return [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    return []


def without_batch_clipping(args: TrainingArguments) -> TrainingArguments:
    """A copy of the `TrainingArguments` with `max_grad_norm` 0; the caller's own are not changed."""
    args = copy.copy(args)
    args.max_grad_norm = 0.0
    return args


def _wrong_arguments(args: TrainingArguments, public_eval: bool) -> Iterator[str]:
    given = vars(args)
    for name, (unsafe, remedy) in REFUSED.items():
        if name in given and unsafe(given[name]):
            yield f"{name}={getattr(given[name], 'value', given[name])}: {remedy}"
    if given.get("hub_token"):
        yield (
            "hub_token: it would be saved in training_args.bin, beside the model and on the Hub; log in with `hf auth "
            "login`, or set the environment variable HF_TOKEN"
        )
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if launched != args.world_size:
        yield (
            f"{launched} processes were started (WORLD_SIZE), and each would train by itself: on CPUs give "
            "TrainingArguments(use_cpu=True), or start one process"
        )
    if args.n_gpu > 1:
        yield f"DataParallel over {args.n_gpu} GPUs: start one process a GPU (accelerate launch --multi_gpu)"
    config = given.get("accelerator_config") or {}
    config = config if isinstance(config, dict) else vars(config)
    for name in ("split_batches", "dispatch_batches"):
        if config.get(name):
            yield f"accelerator_config.{name}: batches must be Poisson samples of the whole data set; drop it"
    if "num_steps" in (config.get("gradient_accumulation_kwargs") or {}):
        remedy = REFUSED["gradient_accumulation_steps"][1]
        yield f"accelerator_config.gradient_accumulation_kwargs['num_steps']: {remedy}"
    chooses = given.get("load_best_model_at_end") or str(getattr(args.save_strategy, "value", "")) == "best"
    if chooses and not public_eval:
        yield (
            "load_best_model_at_end / save_strategy='best': choosing a checkpoint by private data spends privacy; "
            "declare the evaluation data public with PrivacyConfig(public_eval=True), or drop it"
        )
    elif given.get("metric_for_best_model") and not public_eval:
        yield (
            "metric_for_best_model: the best number on private data would lie in trainer_state.json without a mark; "
            "declare the evaluation data public with PrivacyConfig(public_eval=True), or drop it"
        )


def _wrong_environment() -> Iterator[str]:
    for name, (unsafe, remedy) in ENVIRONMENT.items():
        if unsafe(os.environ.get(name, "")):
            yield f"{name}={os.environ[name]} (from accelerate's launcher or config file): {remedy}"
    yield from coarse_products()


def _listed(value: object) -> list[object]:
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _wrong_others(others: dict[str, Any]) -> Iterator[str]:
    yield from unusable_data(others.get("train_dataset"), others.get("data_collator"))
    _, schedule = others.get("optimizers") or (None, None)
    if isinstance(schedule, ReduceLROnPlateau):
        yield f"optimizers: {type(schedule).__name__} {REFUSED['lr_scheduler_type'][1]}"
    if others.get("model_init") is not None:
        yield (
            "model_init: it is for hyperparameter search, which spends privacy that nobody accounts for; give "
            "model=model_init()"
        )
    if others.get("optimizer_cls_and_kwargs") is not None and "lomo" in str(others["optimizer_cls_and_kwargs"]).lower():
        yield "optimizer_cls_and_kwargs: LOMO updates inside backward; use adamw_torch or sgd"


def _wrong_model(model: object) -> Iterator[str]:
    if not isinstance(model, nn.Module):
        return
    compiled = [n or type(m).__name__ for n, m in model.named_modules() if _is_compiled(m)]
    if compiled:
        yield f"{compiled[0]} is compiled: {COMPILED}"
    normalised = [n for n, m in model.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    if normalised:
        yield (
            f"batch statistics in {', '.join(normalised[:3])}{' ...' if len(normalised) > 3 else ''}: they mix "
            "examples; replace BatchNorm by GroupNorm or LayerNorm, or use a model without it"
        )
    config = getattr(model, "config", None)
    if getattr(config, "output_router_logits", False):
        yield "config.output_router_logits=True: the router's auxiliary loss mixes examples; set it to False"
    yield from _shared_memory(model)
    yield from sharding.problems(model)
    yield from _eight_bit_outliers(model)
    yield from _wrong_adapters(model)


def _shared_memory(model: nn.Module) -> Iterator[str]:
    """Two trained parameters over one memory (other than tied weights, which are one parameter).

    Both would be stepped, each on a gradient that ignores the other's.
    """
    seen: dict[int, str] = {}
    for name, p in model.named_parameters():
        if not p.requires_grad or type(p) is not nn.Parameter or p.device.type == "meta" or not p.numel():
            continue
        first = seen.setdefault(p.data_ptr(), name)
        if first != name:
            yield (
                f"{first} and {name} are two trained parameters over one memory, stepped twice: tie them as one, or "
                "train one of them"
            )


def _is_compiled(module: nn.Module) -> bool:
    return type(module).__name__ == "OptimizedModule" or module._compiled_call_impl is not None


def _eight_bit_outliers(model: nn.Module) -> Iterator[str]:
    """LLM.int8 treats a column apart if *any* row of the batch has an outlier in it, which couples the rows."""
    states = {n: vars(m).get("state") for n, m in model.named_modules() if type(m).__name__ == "Linear8bitLt"}
    coupled = {n: s.threshold for n, s in states.items() if getattr(s, "threshold", 0.0) > 0}
    if coupled:
        name, threshold = next(iter(coupled.items()))
        yield (
            f"llm_int8_threshold={threshold} in {name} and {len(coupled) - 1} more: outlier columns are looked for "
            "over the whole batch, so one record changes how the others are rounded; load with "
            "BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0), or in 4 bits"
        )


def _wrong_adapters(model: nn.Module) -> Iterator[str]:
    merged = [
        n
        for n, m in model.named_modules()
        if getattr(m, "merged", False) is True and getattr(m, "active_adapters", None)
    ]
    if merged:
        yield (
            f"merged adapters in {', '.join(merged[:3])}: their weights are not used while training; call "
            "unmerge_adapter()"
        )
    for name, config in (getattr(model, "peft_config", None) or {}).items():
        init = getattr(config, "init_lora_weights", True)
        if str(init).lower() in ("eva", "corda", "lora_ga"):
            yield f"adapter {name!r} with init_lora_weights={init!r}: it reads the private data; use True or 'gaussian'"
        if str(getattr(getattr(config, "peft_type", None), "value", "")) in _UNFIT:
            kind = str(config.peft_type.value)
            yield f"adapter {name!r} of type {kind}: {_UNFIT[kind]}; use another, such as LoRA"


_UNFIT = {  # peft_type -> why neither norms nor checks see what it does
    "OSF": "it projects gradients in hooks of its own, after they would be clipped",
    "PVERA": (
        "it draws random numbers in each forward pass, so that a batch can't be compared with its examples; VeRA "
        "draws none"
    ),
    "CPT": "it scales gradients in a hook of its own, and projects its weights in each forward pass",
}
