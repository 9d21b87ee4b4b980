"""An output folder -> the complete checkpoint in it from which training resumes."""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

from hf_dp import durable
from hf_dp.errors import LedgerError

CHECKPOINTS = "checkpoint-*"
COMPLETE = "privacy_complete.json"  # the last file of a checkpoint: with it, the checkpoint is whole
LEARNT = (".safetensors", ".bin", ".pt")  # files of weights, optimizer and scheduler


def checkpoint_to_resume(folder: Path, asked: str | bool | None) -> Path | None:
    """The checkpoint that `resume_from_checkpoint` means; True means the newest *complete* one. Half-written ones are
    skipped.

    Raises:
        LedgerError: there is none, or the one that was named is not complete.
    """
    if not asked:
        return None
    if asked is not True:
        if not (Path(asked) / COMPLETE).is_file():
            raise LedgerError(
                f"{asked} is no complete checkpoint of a private training (it has no {COMPLETE}): choose another"
            )
        return _as_it_was_saved(Path(asked))
    complete = sorted(folder.glob(f"{CHECKPOINTS}/{COMPLETE}"), key=lambda marker: step_of(marker.parent))
    if not complete:
        raise LedgerError(f"{folder} has no complete checkpoint to resume from: start anew in another output_dir")
    return _as_it_was_saved(complete[-1].parent)


def has_checkpoint(folder: Path) -> bool:
    """Whether an output folder has a complete checkpoint."""
    return any(folder.glob(f"{CHECKPOINTS}/{COMPLETE}"))


def seal(checkpoint: Path, ledger_head: str) -> None:
    """Writes the completion marker: which line of the ledger was the last, and the hash of each file of weights and
    optimizer that lies in the folder.
    """
    files = dict(_digests(checkpoint))
    durable.replace(checkpoint / COMPLETE, json.dumps({"ledger_head": ledger_head, "files": files}).encode())


def _as_it_was_saved(checkpoint: Path) -> Path:
    """The checkpoint. Weights of another run hold what another ledger counts.

    Raises:
        LedgerError: a file of weights or optimizer is not the one that was sealed.
    """
    try:
        files = json.loads((checkpoint / COMPLETE).read_text(encoding="utf-8")).get("files", {})
    except (OSError, ValueError, AttributeError):
        raise LedgerError(f"{checkpoint / COMPLETE} cannot be read: resume from another checkpoint") from None
    now = dict(_digests(checkpoint))
    if changed := sorted(name for name, digest in files.items() if now.get(name) != digest):
        raise LedgerError(
            f"{', '.join(changed)} in {checkpoint} is not what was saved there, and the ledger counts the steps of "
            "what was: put it back, or resume from another checkpoint"
        )
    return checkpoint


def _digests(folder: Path) -> Iterator[tuple[str, str]]:
    """The path of each such file within the folder, an adapter of a name of its own in one beneath, and its hash."""
    for path in sorted(folder.rglob("*")):
        if path.suffix in LEARNT and path.is_file():
            digest = hashlib.blake2b()
            with path.open("rb") as file:
                while block := file.read(1 << 20):
                    digest.update(block)
            yield path.relative_to(folder).as_posix(), digest.hexdigest()


def step_of(checkpoint: Path) -> int:
    """The step in the name of a checkpoint's folder; -1 where the name has none."""
    number = checkpoint.name.rpartition("-")[2]
    return int(number) if number.isdigit() else -1
