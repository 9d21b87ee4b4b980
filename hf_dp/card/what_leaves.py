"""A model's folder -> which of its files may be uploaded to the Hub: those that a model is made of, by an allow-list.

Everything else stays: keys, records, logs, and states that only resuming needs. Symbolic links stay too, wherever they
point. Imports no torch.
"""

from fnmatch import fnmatchcase
from pathlib import Path
from typing import NamedTuple

CARD_FILES = ("privacy.json", "privacy_tradeoff.svg", "README.md", "privacy_ledger.jsonl")
_NUMBER = "[0-9]" * 5
WEIGHTS = ("model.safetensors", f"model-{_NUMBER}-of-{_NUMBER}.safetensors", "adapter_model.safetensors")
SETTINGS = (
    "config.json",
    "generation_config.json",
    "model.safetensors.index.json",
    "adapter_config.json",
    "classes.json",
)
TOKENIZER = (
    *(
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "added_tokens.json",
        "vocab.json",
        "vocab.txt",
    ),
    *("merges.txt", "tokenizer.model", "spiece.model", "sentencepiece.model", "sentencepiece.bpe.model", "spm.model"),
    *(
        "spm_char.model",
        "source.spm",
        "target.spm",
        "target_vocab.json",
        "entity_vocab.json",
        "byte_maps.json",
        "bpe.codes",
    ),
    *("prophetnet.tokenizer", "tekken.json", "normalizer.json", "chat_template.jinja", "chat_template.json"),
)
PROCESSOR = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")
ALLOWED = (*CARD_FILES, *WEIGHTS, *SETTINGS, *TOKENIZER, *PROCESSOR)
TEMPLATES = "additional_chat_templates"  # a tokenizer's folder; only its *.jinja files are uploaded
STATES = ("optimizer.pt", "scheduler.pt", "scaler.pt", "rng_state.pth", "rng_state_[0-9]*.pth", "trainer_state.json")
OF_A_CHECKPOINT = (*STATES, "privacy_complete.json")  # only where Trainer was asked to push checkpoints


class Leaving(NamedTuple):
    """Paths in a folder, with `/`: the files that are uploaded, and what is left behind (a folder's name ends with
    `/`).
    """

    files: tuple[str, ...]
    behind: tuple[str, ...]

    @property
    def words(self) -> str:
        """What is left behind, in one line."""
        return f"Left behind, as no part of a model: {', '.join(self.behind)}" if self.behind else ""


def leaving(folder: Path, *, resumable: bool = False) -> Leaving:
    """What of `folder` is uploaded: the model and, if others are to resume from it, the states of a checkpoint."""
    allowed = ALLOWED + OF_A_CHECKPOINT if resumable else ALLOWED
    files, behind = [], []
    for path in sorted(folder.iterdir()):
        if path.name == TEMPLATES and path.is_dir() and not path.is_symlink():
            inner = sorted(path.iterdir())
            files += [f"{TEMPLATES}/{p.name}" for p in inner if _is_one_of(p, ("*.jinja",))]
            behind += [f"{TEMPLATES}/{p.name}" for p in inner if not _is_one_of(p, ("*.jinja",))]
        elif _is_one_of(path, allowed):
            files.append(path.name)
        else:
            behind.append(f"{path.name}/" if path.is_dir() else path.name)
    return Leaving(tuple(files), tuple(behind))


def processing_files(folder: Path) -> tuple[str, ...]:
    """The files of `folder` that a tokenizer or processor is made of, of those that are uploaded."""
    names = (*TOKENIZER, *PROCESSOR)
    return tuple(name for name in leaving(folder).files if name in names or name.startswith(f"{TEMPLATES}/"))


def _is_one_of(path: Path, allowed: tuple[str, ...]) -> bool:
    return path.is_file() and not path.is_symlink() and any(fnmatchcase(path.name, pattern) for pattern in allowed)
