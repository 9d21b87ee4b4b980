"""A seed -> made-up customer records: public ones of a bicycle shop, private ones of an electricity supplier.

Each record has the columns `topic`, `tone` and `note`. A private note names a person who occurs nowhere else, with an
account number, a telephone number and an amount. None of them exists.
"""

import json
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

Record = dict[str, str]

FIRST_NAMES = """Ada Aisha Alma Amir Ana Anton Arvid Bela Bruno Carla Chidi Clara Daria David Dilan Edda Elif Emil
Enzo Esther Farid Fiona Frida Gita Greta Hana Hugo Ida Igor Ines Ivan Jana Jonas Jun Karim Kofi Lara Leif Lena Liam
Lucia Maja Malik Marek Mei Mila Nadia Nils Noor Olga Omar Otto Paula Pavel Petra Priya Rafael Rosa Ruben Samir Selma
Sofia Tamar Teo Tove Uma Vera Viktor Wanda Yara Yusuf Zoe""".split()
SURNAMES = """Adler Almeida Andersen Baker Banerjee Bauer Berg Bianchi Brandt Carter Castro Chen Dahl Diaz Dubois
Ekman Farah Fischer Fontana Garcia Graf Haas Hansen Horvath Ibrahim Ivanov Jansen Jensen Kaya Keller Khan Kovacs
Kowalski Kruger Larsen Laurent Lehmann Lopez Lindgren Maier Marino Meyer Moreau Nakamura Nguyen Novak Okafor Olsen
Osei Patel Petrov Popescu Ricci Romano Rossi Sato Schmid Silva Singh Sorensen Steiner Suzuki Tanaka Torres Vargas
Vogel Wagner Weber Winter Wolf Yilmaz Zhang Zimmer""".split()
MONTHS = "January February March April May June July August September October November December".split()
TONES = {"calm": "was friendly", "worried": "sounded worried", "angry": "was upset"}

PUBLIC = {
    "repair": [
        "{name} (phone {phone}) brought the {color} bicycle in on {day}. The {part} is worn: {amount} euros.",
        "Repair of the {part} asked for on {day} by {name}, account {account}. It takes two days and costs {amount} "
        "euros.",
    ],
    "order": [
        "{name}, account {account}, ordered a {color} bicycle on {day} at {amount} euros. Call {phone}.",
        "Order of {name}: one {part}, {color}, to be sent before {day}. Paid {amount} euros.",
    ],
    "return": [
        "{name} returned a {part} on {day}. It does not fit. Refund of {amount} euros to account {account}.",
        "The {color} {part} of {name} came back damaged on {day}. Call back: {phone}.",
    ],
}
PRIVATE = {
    "bill": [
        "{name}, account {account}, disputes the bill of {amount} euros from {day}. Call back: {phone}.",
        "Bill of {day} is twice that of last year, says {name} from {phone}. Account {account}, {amount} euros.",
    ],
    "move": [
        "{name} moves house on {day} and closes account {account}. Refund of {amount} euros. Call {phone}.",
        "New address of {name} from {day}. Account {account} goes on at {amount} euros a month. Phone {phone}.",
    ],
    "outage": [
        "{name}, account {account}, had no electricity on {day}. Damage of {amount} euros claimed. Call {phone}.",
        "Power failure on {day} reported by {name} from {phone}. Account {account}, {amount} euros granted.",
    ],
}


class Halves(NamedTuple):
    """The files with the records: JSON lines, split by person."""

    public_train: Path
    private_train: Path
    private_heldout: Path


def write_records(
    folder: Path, *, num_public: int, num_private: int, num_heldout: int, planted: Sequence[Record] = (), seed: int = 0
) -> Halves:
    """Writes the three files; the same arguments give the same bytes. No person is in two of them.

    The last private training records are those in `planted`.
    """
    names = _names(random.Random(f"{seed} names"))
    halves = Halves(*(folder / f"{name}.jsonl" for name in Halves._fields))
    folder.mkdir(parents=True, exist_ok=True)
    sizes = (num_public, num_private, num_heldout)
    for path, size, templates in zip(halves, sizes, (PUBLIC, PRIVATE, PRIVATE), strict=True):
        rng = random.Random(f"{seed} {path.stem}")
        records = [_record(rng, templates, next(names)) for _ in range(size)]
        if path == halves.private_train:
            records[len(records) - len(planted) :] = planted
        path.write_text("".join(json.dumps(r) + "\n" for r in records), encoding="utf-8")
    return halves


def _names(rng: random.Random) -> Iterator[str]:
    """Every name at most once, in random order: first name, an initial, surname."""
    initials = "ABCDEFGHIJKLMNOPRSTUVWYZ"
    everybody = [(f, i, s) for f in range(len(FIRST_NAMES)) for i in range(len(initials)) for s in range(len(SURNAMES))]
    rng.shuffle(everybody)
    return (f"{FIRST_NAMES[f]} {initials[i]}. {SURNAMES[s]}" for f, i, s in everybody)


def _record(rng: random.Random, templates: dict[str, list[str]], name: str) -> Record:
    topic = rng.choice(list(templates))
    tone = rng.choice(list(TONES))
    text = rng.choice(templates[topic]).format(
        name=name,
        day=f"{rng.randint(1, 28)} {rng.choice(MONTHS)}",
        amount=f"{rng.randint(20, 900)}.{rng.choice(('00', '50', '90'))}",
        account=rng.randint(10_000, 99_999),
        phone=f"0{rng.randint(151, 179)} {rng.randint(100_000, 999_999)}",
        color=rng.choice(("red", "blue", "green", "black", "white")),
        part=rng.choice(("brake", "chain", "pedal", "saddle", "front wheel", "rear light", "tyre", "gear")),
    )
    return {"topic": topic, "tone": tone, "note": f"{text} The customer {TONES[tone]}."}
