"""A data set and the folder of its ledger -> a keyed hash of all records, which shows whether a resumed run has the
same data.

The hash is HMAC-SHA256 under 256 random bits. The key stays in the folder, readable by its owner alone, under a name
that Trainer does not upload. Without a key, anybody could hash a guess at the data and compare.
"""

import datetime
import decimal
import hashlib
import hmac
import json
import os
import secrets
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from hf_dp import durable
from hf_dp.errors import ConfigError, LedgerError
from hf_dp.randomness import fork_forward_rng

if TYPE_CHECKING:
    import datasets

    from hf_dp.sampling import Records

KEY_NAME = "_privacy_fingerprint.key"
KEY_BYTES = 32
ROWS = 1000  # of one Arrow batch; another number would give other fingerprints


Update = Callable[[bytes], None]


def fingerprint(dataset: "Records", folder: Path | str) -> str:
    """HMAC-SHA256, in hex, over the records of `dataset` in their order, under the folder's key, which is created if
    missing.

    The same records in the same order have the same fingerprint in one folder, and unrelated fingerprints in two. A
    `datasets.Dataset` is read as Arrow, without its transforms. Any other map-style data set is read record by record;
    meanwhile the global generators are at a fixed state, so that random augmentations repeat, and afterwards they are
    as before.

    Args:
        dataset: with `len` and integer indices. Records may be None, bool, int, float, str, bytes, tensors, arrays,
            images, and mappings and sequences of these.
        folder: the output folder, where the ledger lies.

    Raises:
        ConfigError: a record holds something that has no defined bytes.
        LedgerError: the key can't be written or read, or is not a key.
    """
    return under_key(dataset, key_of(Path(folder)))


def under_key(dataset: "Records", key: bytes) -> str:
    """`fingerprint` under a key that is given, for a process that cannot read the folder."""
    import datasets

    digest = hmac.new(key, digestmod=hashlib.sha256)
    if isinstance(dataset, datasets.Dataset):
        _hash_arrow(dataset, digest.update)
    else:
        with fork_forward_rng(seed=0):
            _piece(digest.update, "records", str(len(dataset)).encode())
            for index in range(len(dataset)):
                _hash_value(dataset[index], digest.update)
    return digest.hexdigest()


def key_of(folder: Path) -> bytes:
    """The folder's key, created if missing. It is only ever shared with the other processes of a run.

    Raises:
        LedgerError: the key can't be written or read, or is not a key.
    """
    path = folder / KEY_NAME
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            durable.create(path, secrets.token_bytes(KEY_BYTES), mode=0o600)
        os.chmod(path, 0o600)
        key = path.read_bytes()
    except OSError as error:
        raise LedgerError(
            f"{path}: the fingerprint's key can't be kept there ({error.strerror}); give write access"
        ) from error
    if len(key) != KEY_BYTES:
        raise LedgerError(
            f"{path}: expected a key of {KEY_BYTES} bytes, found {len(key)}; put the right one back from a backup"
        )
    return key


def _hash_arrow(dataset: "datasets.Dataset", update: Update) -> None:
    """Hashes Arrow's stream format in batches of `ROWS`, rebuilt by `take`, so that slices, chunks and metadata don't
    matter.
    """
    import pyarrow as pa

    _piece(update, "arrow", str(len(dataset)).encode())
    for start in range(0, len(dataset), ROWS):
        table = dataset.with_format("arrow")[start : start + ROWS].replace_schema_metadata(None)
        table = table.take(pa.array(range(table.num_rows))).combine_chunks()
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
        _piece(update, "batch", sink.getvalue().to_pybytes())


def _hash_value(value: object, update: Update) -> None:
    """Hashes kind, length and bytes of a value, so that two different values never give the same input to the hash."""
    if value is None or type(value) in (bool, int, float, str):
        _piece(update, type(value).__name__, json.dumps(value).encode())
    elif isinstance(value, bytes):
        _piece(update, "bytes", value)
    elif isinstance(value, (datetime.date, datetime.time, datetime.timedelta, decimal.Decimal)):
        _piece(update, type(value).__name__, repr(value).encode())
    elif isinstance(value, Mapping):
        _piece(update, "mapping", str(len(value)).encode())
        for name in sorted(value, key=str):
            _hash_value(str(name), update)
            _hash_value(value[name], update)
    elif isinstance(value, Sequence):
        _piece(update, "sequence", str(len(value)).encode())
        for item in value:
            _hash_value(item, update)
    else:
        _hash_array(value, update)


def _hash_array(value: object, update: Update) -> None:
    import torch

    if isinstance(value, torch.Tensor):
        plain = value.detach().cpu().contiguous()
        header, data = f"{plain.dtype}{tuple(plain.shape)}", plain.reshape(-1).view(torch.uint8).numpy().tobytes()
    else:
        array = np.asarray(value)
        if array.dtype.hasobject:
            raise ConfigError(
                f"a record holds a {type(value).__name__}, which has no defined bytes to fingerprint. Let the data set "
                "return None, numbers, texts, bytes, tensors, arrays, and mappings and sequences of these"
            )
        header, data = f"{array.dtype.str}{array.shape}", array.tobytes()
    _piece(update, header, data)


def _piece(update: Update, kind: str, data: bytes) -> None:
    update(f"{kind}:{len(data)}:".encode())
    update(data)
