"""A private model's folder and prompts -> texts on the screen, or a data set of them with its card and record."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from hf_dp.cli.texts import Sampling

TEXTS = "train.jsonl"  # the Hub takes it for the training split


def generate(
    folder: Annotated[Path, typer.Argument(help="The folder of a model saved by hf_dp: an adapter or a whole one.")],
    prompts: Annotated[
        list[str] | None, typer.Argument(help="What the texts begin with; \\n is a new line. Default: nothing.")
    ] = None,
    prompts_file: Annotated[Path | None, typer.Option("--prompts", help="A file with one prompt a line.")] = None,
    num: Annotated[int | None, typer.Option(help="How many texts, of the prompts in turn. Default: one each.")] = None,
    temperature: Annotated[float, typer.Option(help="1: the model's own probabilities; 0: the likeliest.")] = 1.0,
    top_p: Annotated[float, typer.Option(help="Draw among the likeliest tokens with this probability.")] = 1.0,
    max_new_tokens: Annotated[int, typer.Option(help="The most tokens of a text.")] = 200,
    output: Annotated[
        Path | None, typer.Option(help="A new folder: the texts as a data set, with card and privacy.json.")
    ] = None,
) -> None:
    """Writes texts with a private model. With --output, a data set: it has the model's epsilon, and costs nothing more.

    Prompts must be public: epsilon says nothing of what stands in them.
    """
    from hf_dp.cli.libraries import quiet
    from hf_dp.cli.texts import Sampling, texts

    asked = _in_turn([*(prompts or []), *_lines_of(prompts_file)], num)
    sampling = Sampling(temperature, top_p, max_new_tokens)
    sampling.refuse_wrong()
    quiet()
    model, tokenizer = _loaded(folder)
    written = texts(model, tokenizer, asked, sampling)
    if output is None:
        _show(asked, written)
    else:
        _save(folder, output, zip(asked, written, strict=True), _described(len(asked), sampling))


def _in_turn(prompts: Sequence[str], num: int | None) -> list[str]:
    from hf_dp.errors import ConfigError

    if num is not None and num < 1:
        raise ConfigError(f"--num: expected 1 or more, got {num}")
    given = [prompt.replace("\\n", "\n") for prompt in prompts] or [""]
    return [given[i % len(given)] for i in range(num or len(given))]


def _lines_of(path: Path | None) -> list[str]:
    from hf_dp.errors import ConfigError

    if path is None:
        return []
    try:
        found = [line for line in path.read_text(encoding="utf-8-sig").splitlines() if line]
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise ConfigError(f"--prompts: cannot read {path}: {reason}") from None
    if not found:
        raise ConfigError(f"--prompts: {path} holds no prompt: expected one a line")
    return found


def _loaded(folder: Path) -> tuple[Any, Any]:
    """Model and tokenizer.

    Raises:
        ConfigError: there is no model, it cannot be loaded, or it writes no text.
    """
    import transformers

    from hf_dp.cli.hub import first_line
    from hf_dp.cli.loading import CANNOT_BE_LOADED, on_its_base, settings_of
    from hf_dp.errors import ConfigError, HfDpError

    settings = settings_of(folder)
    try:
        if settings is not None:
            model, base = on_its_base(folder, settings), settings["base_model_name_or_path"]
        elif (folder / "config.json").is_file():
            whole = transformers.AutoConfig.from_pretrained(folder)
            auto = transformers.AutoModelForSeq2SeqLM if whole.is_encoder_decoder else transformers.AutoModelForCausalLM
            model, base = auto.from_pretrained(folder), folder
        else:
            raise ConfigError(f"{folder} holds no model: expected adapter_config.json or config.json in it")
        its_own = (folder / "tokenizer_config.json").is_file() or (folder / "tokenizer.json").is_file()
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder if its_own else base)
    except HfDpError:
        raise
    except CANNOT_BE_LOADED as error:
        raise ConfigError(f"the model in {folder} cannot be loaded to write texts: {first_line(error)}") from None
    if not model.can_generate():
        raise ConfigError(f"the model in {folder} writes no text: {type(model).__name__} has another task")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return model, tokenizer


def _show(prompts: Sequence[str], written: Iterator[str]) -> None:
    several = len(prompts) > 1
    for number, (prompt, text) in enumerate(zip(prompts, written, strict=True), start=1):
        print(f"{number}. {prompt.strip()}\n{text}\n" if several else text)


def _described(num: int, sampling: "Sampling") -> dict[str, str]:
    """Name -> value, for the card's table."""
    likeliest = sampling.temperature == 0
    return {
        "texts": f"{num:,}",
        "temperature": "0 (the likeliest token)" if likeliest else f"{sampling.temperature:g}",
        "top-p": "not used" if likeliest else f"{sampling.top_p:g}",
        "tokens of a text": f"at most {sampling.most_tokens:,}",
    }


def _save(folder: Path, output: Path, pairs: Iterator[tuple[str, str]], rows: dict[str, str]) -> None:
    from hf_dp.card import carry_to_texts
    from hf_dp.cli.folders import appearing_whole, no_empty_folder, refuse_unverified

    refuse_unverified(folder, "written")
    with no_empty_folder(output), appearing_whole(output) as unfinished:
        with (unfinished / TEXTS).open("w", encoding="utf-8") as file:
            for prompt, text in pairs:
                file.write(json.dumps({"prompt": prompt, "text": text}, ensure_ascii=False) + "\n")
        carry_to_texts(folder, unfinished, rows, name=output.name)
    print(f"Texts: {output / TEXTS}\nCard: {output / 'README.md'}; `hf-dp verify {output}` says whether it is true")
