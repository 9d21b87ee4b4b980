"""A ledger's bytes and the files beside it -> nothing, or an error: what was saved with a ledger must still be in it.

Three kinds of file know how far a ledger had come: its copies in the checkpoints; a checkpoint's
`privacy_complete.json`, which names the hash of the last line; and `privacy.json`, which names that hash too. A ledger
that was replaced by an older copy, or lost, lacks a line that one of them names.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from hf_dp.errors import LedgerError
from hf_dp.ledger.checkpoints import CHECKPOINTS, COMPLETE
from hf_dp.ledger.format import HASH_FIELD, parse

LEDGER_NAME = "privacy_ledger.jsonl"
STATED = "privacy.json"  # of the model beside the ledger, or in a checkpoint


class _Witness(NamedTuple):
    """What a file knows of the ledger: its beginning, byte for byte, or the hash of one of its lines; and how an error
    says so.
    """

    beginning: bytes
    head: str
    words: str


def refuse_older(path: Path, data: bytes, *checkpoints: Path) -> None:
    """Passes if the ledger holds everything that the files beside it and in `checkpoints` know of it.

    Args:
        path: of the ledger.
        data: its bytes, empty where there is none.
        checkpoints: further folders to look into.

    Raises:
        LedgerError: a line is missing that one of the files names, or a copy in a checkpoint is damaged.
        OSError: a file can't be read.
    """
    for witness in _witnesses(path, *checkpoints):
        named = f'{HASH_FIELD}{witness.head}"'.encode() in data if witness.head else bool(data)
        if named and data.startswith(witness.beginning):
            continue
        have = "is missing" if not data else f"has {parse(data, str(path)).num_steps} steps and is not its continuation"
        raise LedgerError(
            f"{witness.words} (head {witness.head[:12] or 'not readable'}), but {path} {have}: steps would go "
            "uncounted. Put the newest ledger back (it lies beside the checkpoints that it belongs to), or start anew "
            "in another output_dir: what was spent on the same data adds up"
        )


def _witnesses(path: Path, *further: Path) -> Iterator[_Witness]:
    """Those in the ledger's folder, in its checkpoints, and in `further` folders."""
    for checkpoint in sorted({*path.parent.glob(CHECKPOINTS), *further}):
        if (copy := checkpoint / LEDGER_NAME).is_file():
            yield _by_copy(checkpoint, copy)
        yield from _named_by(checkpoint / COMPLETE, ("ledger_head",), f"{checkpoint.name} was saved with a ledger")
        yield from _named_by(checkpoint / STATED, ("ledger", "head"), f"{checkpoint.name} was saved with a ledger")
    stated = path.parent / STATED
    yield from _named_by(stated, ("ledger", "head"), f"{stated} states what a training in this folder spent")


def _by_copy(checkpoint: Path, copy: Path) -> _Witness:
    kept = copy.read_bytes()
    record = parse(kept, str(copy))
    if record.torn or not kept.endswith(b"\n"):
        raise LedgerError(f"{copy} is cut short; a checkpoint's copy is written whole. Resume from another checkpoint")
    return _Witness(kept, record.head, f"{checkpoint.name} was saved after {record.num_steps} charged steps")


def _named_by(file: Path, keys: tuple[str, ...], words: str) -> Iterator[_Witness]:
    """The hash that a JSON file names; a file that is not readable still shows that there was a ledger."""
    if not file.is_file():
        return
    try:
        said = json.loads(file.read_bytes())
        for key in keys:
            said = said[key]
    except (ValueError, KeyError, TypeError, RecursionError):
        said = ""
    yield _Witness(b"", said if isinstance(said, str) else "", words)
