"""A seed -> made-up customer records: `public` ones of a bicycle shop, `private` ones of an electricity supplier.

Each record has the columns `topic`, `tone` and `note`. A private note names a person who occurs nowhere else, with an account
number, a telephone number and an amount. Nobody in here exists.
"""

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

Record = dict[str, str]

FIRST_NAMES = """Ada Aisha Alma Amir Ana Anton Arvid Bela Bruno Carla Chidi Clara Daria David Dilan Edda Elif Emil Enzo Esther
Farid Fiona Frida Gita Greta Hana Hugo Ida Igor Ines Ivan Jana Jonas Jun Karim Kofi Lara Leif Lena Liam Lucia Maja Malik
Marek Mei Mila Nadia Nils Noor Olga Omar Otto Paula Pavel Petra Priya Rafael Rosa Ruben Samir Selma Sofia Tamar Teo Tove
Uma Vera Viktor Wanda Yara Yusuf Zoe""".split()
SURNAMES = """Adler Almeida Andersen Baker Banerjee Bauer Berg Bianchi Brandt Carter Castro Chen Dahl Diaz Dubois Ekman Farah
Fischer Fontana Garcia Graf Haas Hansen Horvath Ibrahim Ivanov Jansen Jensen Kaya Keller Khan Kovacs Kowalski Kruger
Larsen Laurent Lehmann Lopez Lindgren Maier Marino Meyer Moreau Nakamura Nguyen Novak Okafor Olsen Osei Patel Petrov
Popescu Ricci Romano Rossi Sato Schmid Silva Singh Sorensen Steiner Suzuki Tanaka Torres Vargas Vogel Wagner Weber
Winter Wolf Yilmaz Zhang Zimmer""".split()
MONTHS = "January February March April May June July August September October November December".split()
TONES = {"calm": "was friendly", "worried": "sounded worried", "angry": "was upset"}

PUBLIC = {
    "repair": [
        "{name} brought the {color} bicycle in on {day}. The {part} is worn and has to be replaced. We agreed on {amount} euros.",
        "On {day} {name} asked for a repair of the {part}. The work takes two days and costs {amount} euros, parts included.",
    ],
    "order": [
        "{name} ordered a {color} bicycle with a new {part} on {day}. The price is {amount} euros, order number {number}.",
        "Order {number} of {name}: one {part}, {color}, to be sent before {day}. Paid {amount} euros by card.",
    ],
    "return": [
        "{name} returned a {part} on {day} because it does not fit. Order number {number}, refund of {amount} euros.",
        "The {color} {part} from order {number} came back on {day}. {name} gets {amount} euros back to the same card.",
    ],
}
PRIVATE = {
    "bill": [
        "{name} (account {account}) called on {day}: the bill of {amount} euros is twice that of last year. Call back: {phone}.",
        "Account {account}, {name}: disputes the bill of {amount} euros from {day}. Meter reading requested, telephone {phone}.",
    ],
    "move": [
        "{name} moves house on {day} and closes account {account}. Final meter reading {reading}, refund {amount} euros, {phone}.",
        "New address from {day} for {name}, account {account}. Contract goes on at {amount} euros a month. Reach at {phone}.",
    ],
    "outage": [
        "{name}, account {account}, had no electricity on {day}. Technician sent, damage of {amount} euros claimed, {phone}.",
        "Power failure on {day} reported by {name} from {phone}. Account {account}, compensation of {amount} euros granted.",
    ],
}


class Halves(NamedTuple):
    """Where the records lie: JSON lines, split by person."""

    public_train: Path
    private_train: Path
    private_heldout: Path


def write_records(folder: Path, *, num_public: int, num_private: int, num_heldout: int, seed: int = 0) -> Halves:
    """Writes the three files; the same arguments give the same bytes. No person is in two of them."""
    names = _names(random.Random(f"{seed} names"))
    halves = Halves(*(folder / f"{name}.jsonl" for name in Halves._fields))
    folder.mkdir(parents=True, exist_ok=True)
    sizes = (num_public, num_private, num_heldout)
    for path, size, templates in zip(halves, sizes, (PUBLIC, PRIVATE, PRIVATE), strict=True):
        rng = random.Random(f"{seed} {path.stem}")
        records = (_record(rng, templates, next(names)) for _ in range(size))
        path.write_text("".join(json.dumps(r) + "\n" for r in records), encoding="utf-8")
    return halves


def _names(rng: random.Random) -> Iterator[str]:
    """Every name at most once: first name, an initial, surname, in random order."""
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
        number=rng.randint(1000, 9999),
        account=f"{rng.randint(1000, 9999)}-{rng.randint(100, 999)}",
        reading=rng.randint(10_000, 99_999),
        phone=f"0{rng.randint(151, 179)} {rng.randint(100_000, 999_999)}",
        color=rng.choice(("red", "blue", "green", "black", "white")),
        part=rng.choice(("brake", "chain", "pedal", "saddle", "front wheel", "rear light", "tyre", "gear")),
    )
    return {"topic": topic, "tone": tone, "note": f"{text} The customer {TONES[tone]}."}
