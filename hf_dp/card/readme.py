"""The text of README.md -> the same text with our YAML block, tags and section in it.

A README has a front matter (YAML between two lines `---`) and a body. Ours are the top-level key `privacy` in the front
matter, and the text between START and END in the body. Everything else belongs to the user, PEFT or Trainer, and stays
unchanged to the character. Only where PEFT's or Trainer's template made all of it, the whole card is ours: its sections
stand between marks of their own, with a checksum, and one that was edited is the user's from then on.
"""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import yaml

from hf_dp.card.untouched import untouched
from hf_dp.errors import ConfigError

START = "<!-- hf_dp: privacy section, start; rewritten at every save, write outside of it -->"
END = "<!-- hf_dp: privacy section, end -->"
_STATED = re.compile(r"^\s*#+\s*privacy:\s*(?:epsilon|not private)", re.IGNORECASE | re.MULTILINE)
_FRONT_MATTER = re.compile(r"\A\s*---[ \t]*\r?\n(?P<yaml>(?:.*?\n)??)---[ \t]*(?:\r?\n|\Z)", re.DOTALL)
SECTIONS = ("model", "training", "results", "claims")  # of the whole card, in order; the privacy section is the last
_SECTION = re.compile(
    rf"<!-- hf_dp: (?P<name>{'|'.join(SECTIONS)}) section, start (?P<sum>\w+)[^>]*-->\r?\n(?P<words>.*?)\r?\n"
    r"<!-- hf_dp: (?P=name) section, end -->",
    re.DOTALL,
)
_ANY_MARK = re.compile(r"<!-- hf_dp: privacy section, (start|end)\b[^>]*-->")


def read_readme(path: Path) -> str:
    """The file's text with its line ends; "" where there is no file.

    Raises:
        ConfigError: the file is not UTF-8.
    """
    try:
        return path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        return ""
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{path}: expected a model card in UTF-8, got a byte that is not ({error}); save it as UTF-8."
        ) from error


def with_front_matter(text: str, block: Mapping[str, object], tags: Sequence[str], *, tagged: bool = True) -> str:
    """`text` with `privacy: block` in its YAML and with all of `tags`, or with none of them if not `tagged`.

    Other keys and tags, their order and their comments stay.

    Raises:
        ConfigError: the front matter is not a YAML mapping with one key a line.
    """
    present = tags_of(yaml_of(text))
    add = [tag for tag in tags if tag not in present] if tagged else []
    kept = [tag for tag in present if tagged or tag not in tags]
    return with_keys(text, {"privacy": dict(block), "tags": kept + add})


def with_keys(text: str, keys: Mapping[str, object]) -> str:
    """`text` with these keys in its YAML, and without those that are None. Other keys, their order and their comments
    stay.

    Raises:
        ConfigError: the front matter is not a YAML mapping with one key a line.
    """
    match, newline = _FRONT_MATTER.match(text), _newline(text)
    front, body = (match["yaml"], text[match.end() :]) if match else ("", text and "\n" + text)
    before = _mapping(front)
    for key, value in keys.items():
        if (key in before or value is not None) and before.get(key, []) != value:
            front = _with_key(front, key, value, newline)
    asked = {key: value for key, value in (before | dict(keys)).items() if value is not None or key not in keys}
    expected, got = ({"tags": []} | mapping for mapping in (asked, _mapping(front)))
    assert yaml.safe_dump(got) == yaml.safe_dump(expected), "more than hf_dp's own keys was changed"  # NaN is not NaN
    return f"---{newline}{front}---{newline}{body}"


def of_a_whole_model(text: str) -> str:
    """`text` of an adapter with the YAML of a whole model: the library is transformers, and PEFT's tags are gone."""
    front = yaml_of(text)
    if front.get("library_name") != "peft":
        return text
    tags = [t for t in tags_of(front) if t != "lora" and not str(t).startswith("base_model:adapter:")]
    return with_keys(text, {"library_name": "transformers", "tags": tags, "base_model_relation": "finetune"})


def with_section(text: str, section: str) -> str:
    """`text` with `section` between the marks: in place of the old section, or at the end.

    Raises:
        ConfigError: one of the marks is missing, so that it is unknown where the old section ends.
    """
    newline = _newline(text)
    marked = f"{START}\n{section.strip()}\n{END}".replace("\n", newline)
    marks = list(_ANY_MARK.finditer(text))
    kinds = [m[1] for m in marks]
    if not marks:
        return f"{text}{newline if text and not text.endswith(newline) else ''}{newline}{marked}{newline}"
    if kinds != ["start", "end"]:
        raise ConfigError(
            f"README.md: expected the privacy section between one start and one end mark, got {', '.join(kinds)}. "
            "Delete the old section with its marks (<!-- hf_dp: privacy section ... -->); it is then written anew."
        )
    return text[: marks[0].start()] + marked + text[marks[1].end() :]


def is_ours(text: str) -> bool:
    """Whether the whole card is ours to write: nobody else's words are in it, or our sections are already."""
    body = text[_end_of_yaml(text) :]
    return bool(_SECTION.search(body)) or untouched(_without_ours(body))


def with_whole_card(text: str, sections: Mapping[str, str]) -> str:
    """`text`, which has a privacy section, with these of SECTIONS before it; as it is where it is not ours to write.

    Templates' words go, the user's stay where they are. A section that was edited stays as it is, one with no words
    is taken away.
    """
    if not is_ours(text):
        return text
    newline, end = _newline(text), _end_of_yaml(text)
    head, body = text[:end], text[end:]
    old = {found["name"]: found for found in _SECTION.finditer(body)}
    new = {name: _marked(name, words) for name, words in sections.items()}
    new |= {name: found[0] for name, found in old.items() if name not in new or _edited(found)}
    written = {name: new[name].replace("\r\n", "\n").replace("\n", newline) for name in SECTIONS if new.get(name)}
    if untouched(_without_ours(body)):
        privacy = f"{START}{section_of(text)}{END}"
        return head + newline + (newline * 2).join([*written.values(), privacy]) + newline
    for name, found in reversed(old.items()):
        body = body[: found.start()] + written.pop(name, "") + body[found.end() :]
    added = "".join(words + newline * 2 for words in written.values())
    place = body.index(START)
    return head + body[:place] + added + body[place:]


def kept(before: str, after: str) -> str:
    """The card that holds after somebody else has made a new one: `before` with what is new in the YAML of `after`,
    or `after` where nobody had written in `before`, nor we.
    """
    body = before[_end_of_yaml(before) :]
    if not _SECTION.search(body) and untouched(_without_ours(body)):
        return after
    old, new = yaml_of(before), yaml_of(after)
    tags = [*tags_of(old), *(tag for tag in tags_of(new) if tag not in tags_of(old))]
    return with_keys(before, {key: value for key, value in new.items() if key not in old} | {"tags": tags})


def words_of(text: str, name: str) -> str | None:
    """What stands in one of SECTIONS, or None where the card has none."""
    return next((found["words"] for found in _SECTION.finditer(text) if found["name"] == name), None)


def _marked(name: str, words: str) -> str:
    words = words.strip()
    if not words:
        return ""
    mark = f"<!-- hf_dp: {name} section, start {_sum(words)}; rewritten at every save until you edit it -->"
    return f"{mark}\n\n{words}\n\n<!-- hf_dp: {name} section, end -->"


def _sum(words: str) -> str:
    return hashlib.sha256(" ".join(words.split()).encode()).hexdigest()[:12]


def _edited(found: "re.Match[str]") -> bool:
    return _sum(found["words"]) != found["sum"]


def _without_ours(body: str) -> str:
    """The words between front matter and end that stand in none of our sections."""
    marks = list(_ANY_MARK.finditer(body))
    if [m[1] for m in marks] == ["start", "end"]:
        body = body[: marks[0].start()] + body[marks[1].end() :]
    return _SECTION.sub("", body)


def _end_of_yaml(text: str) -> int:
    match = _FRONT_MATTER.match(text)
    return match.end() if match else 0


def yaml_of(text: str) -> dict[str, object]:
    """The front matter as a mapping; {} where there is none.

    Raises:
        ConfigError: it is not a YAML mapping.
    """
    match = _FRONT_MATTER.match(text)
    return _mapping(match["yaml"]) if match else {}


def tags_of(front: Mapping[str, object]) -> list[object]:
    """The front matter's `tags`: a list, where it may also be one text or left out."""
    tags = front.get("tags")
    return list(tags) if isinstance(tags, list) else [tags] if tags else []


def section_of(text: str) -> str | None:
    """The text between the marks, or None where there are not exactly one start and one end."""
    marks = list(_ANY_MARK.finditer(text))
    return text[marks[0].end() : marks[1].start()] if [m[1] for m in marks] == ["start", "end"] else None


def said_twice(text: str) -> str:
    """What in a card stands beside the statement between the marks, or hides it, in words; "" for nothing."""
    match, inside = _FRONT_MATTER.match(text), section_of(text) or ""
    if len(re.findall(r"^['\"]?privacy['\"]?\s*:", match["yaml"] if match else "", re.MULTILINE)) > 1:
        return "privacy stands more than once in the YAML"
    if len(_STATED.findall(text)) > len(_STATED.findall(inside)):
        return "a heading outside of the marks states a privacy"
    before = text.partition(START)[0].lower()
    if any(before.count(f"<{tag}") > before.count(f"</{tag}") for tag in ("details", "div", "template")):
        return "the statement is inside of something that may hide it"
    return ""


def to_json(record: Mapping[str, object]) -> str:
    """Readable JSON with all digits of floats; a NaN or an infinity is an error."""
    return json.dumps(record, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def _newline(text: str) -> str:
    return "\r\n" if "\r\n" in text else "\n"


def _mapping(front: str) -> dict[str, object]:
    try:
        value = yaml.safe_load(front)
    except yaml.YAMLError as error:
        raise ConfigError(
            f"README.md: expected YAML between its first two lines `---`, got {error}; mend it by hand."
        ) from error
    if not isinstance(value, dict | None):
        raise ConfigError(
            f"README.md: expected `key: value` lines between its first two lines `---`, got {front[:80]!r}."
        )
    return value or {}


def _with_key(front: str, key: str, value: object, newline: str) -> str:
    """The YAML text with one top-level key set, or taken away where `value` is None.

    New lines replace the old ones, or come at the end.

    Raises:
        ConfigError: the result is not YAML, as where the old text was one flow mapping `{a: 1}`.
    """
    new = yaml.safe_dump({key: value}, sort_keys=False, allow_unicode=True).replace("\n", newline)
    new = "" if value is None else new
    lines = front.splitlines(keepends=True)
    node = yaml.compose(front)
    for name, old in node.value if node is not None else []:
        if name.value == key:
            first, last = name.start_mark.line, max(old.end_mark.line, name.start_mark.line + 1)
            if old.end_mark.column > 0 and old.end_mark.line > name.start_mark.line:
                last += 1  # a flow value ends within its last line, a block at the start of the next one
            while last > first + 1 and lines[last - 1].strip()[:1] in ("", "#"):
                last -= 1  # what stands before the next key is the user's
            front = "".join([*lines[:first], new, *lines[last:]])
            break
    else:
        front += new
    _mapping(front)
    return front
