"""A user's module: functions whose results depend on what the module keeps."""

CALLS = [0]
WORDS: dict[str, int] = {}
FLAG = {"on": False}


def number() -> int:
    CALLS[0] += 1
    return CALLS[0]


def word(of: str) -> int:
    return WORDS.setdefault(of, len(WORDS))


def is_on() -> bool:
    return FLAG["on"]
