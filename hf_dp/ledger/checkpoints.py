"""An output folder -> the complete checkpoint in it from which training resumes."""

from pathlib import Path

from hf_dp.errors import LedgerError

CHECKPOINTS = "checkpoint-*"
COMPLETE = "privacy_complete.json"  # the last file of a checkpoint: with it, the checkpoint is whole


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
        return Path(asked)
    complete = sorted(folder.glob(f"{CHECKPOINTS}/{COMPLETE}"), key=lambda marker: step_of(marker.parent))
    if not complete:
        raise LedgerError(f"{folder} has no complete checkpoint to resume from: start anew in another output_dir")
    return complete[-1].parent


def step_of(checkpoint: Path) -> int:
    """The step in the name of a checkpoint's folder; -1 where the name has none."""
    number = checkpoint.name.rpartition("-")[2]
    return int(number) if number.isdigit() else -1
