"""A seed -> made-up customer notes: public ones of six trades, private ones of an electricity supplier.

Each record has the columns `customer`, `topic` and `note`. A customer occurs nowhere else. None of them exists.
"""

import json
import random
import re
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

PUBLIC = {  # every word of the private notes is known from here, as a base model knows a language's words; no note is
    "bicycle": [
        "The brake of the {color} bicycle is worn, the repair costs {amount} euros.",
        "The customer came back on {day}, because the saddle was too high by {number} centimetres.",
        "There was no {color} bicycle in the shop on {day}.",
        "The repair was paid twice, the shop pays {amount} euros back.",
    ],
    "bakery": [
        "A cake for {number} people was ordered for {day}.",
        "The bread was burnt, so {amount} euros were paid back.",
        "The last cake of {day} is for the new neighbour.",
        "The oven had no power, the electricity came from the house next door.",
    ],
    "hotel": [
        "A room for {number} nights from {day} was asked for.",
        "The heating was away on {day} for {number} hours, the guest gets {amount} euros.",
        "The guest moves to a room in the new house, and the bill goes to the office.",
        "The code of the door is on the key, the box is by the stairs.",
    ],
    "library": [
        "The customer moves to a new address and returns {number} books.",
        "A reading about light and electricity took place on {day}.",
        "The outage of the lamps took {number} hours, the readers go home.",
        "The last book is away since {day}, it costs {amount} euros.",
    ],
    "garage": [
        "The {color} car was away for repair since {day}.",
        "The meter of the car reads {number}, and the bill is not paid.",
        "The power of the motor is too high for the new brake.",
        "The move of the whole garage ends on {day}.",
    ],
    "telephone": [
        "The line was dead in the whole street, the failure took {number} hours.",
        "The contract ends on {day}, a cheaper one at {amount} euros goes on.",
        "There was no line in the house on {day}, so the customer asked for a new contract.",
        "The bill of {day} was sent twice to the customer.",
    ],
}
PRIVATE = {
    "bill": [
        "The electricity bill of {day} is too high by {amount} euros.",
        "The last bill was paid twice, so {amount} euros go back to the customer.",
    ],
    "move": [
        "The customer moves to a new house on {day}, the contract goes on.",
        "The contract ends on {day}, and the meter reads {number}.",
    ],
    "outage": [
        "There was no electricity in the whole street on {day} for {number} hours.",
        "The power was away on {day}, the customer asked for {amount} euros.",
    ],
}
FORMS = {  # of what stands in a template's braces
    "day": rf"\d{{1,2}} (?:{'|'.join(MONTHS)})",
    "amount": r"\d{2,3}",
    "number": r"\d{1,2}",
}


class Halves(NamedTuple):
    """The files with the records: JSON lines, split by customer."""

    public_train: Path
    private_train: Path
    private_heldout: Path


def write_records(
    folder: Path, *, num_public: int, num_private: int, num_heldout: int, planted: Sequence[Record] = (), seed: int = 0
) -> Halves:
    """Writes the three files; the same arguments give the same bytes. No customer is in two of them.

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


def is_as_asked(record: Record, note: str) -> bool:
    """Whether a note that a model wrote is one of the supplier's, a whole sentence, and on the record's topic."""
    return any(re.fullmatch(_form(template), note) for template in PRIVATE[record["topic"]])


def _form(template: str) -> str:
    """A regular expression for all notes from a template."""
    pieces = re.split(r"\{(\w+)\}", template)
    return "".join(FORMS[piece] if i % 2 else re.escape(piece) for i, piece in enumerate(pieces))


def _names(rng: random.Random) -> Iterator[str]:
    """Every name at most once, in random order: first name, an initial, surname."""
    initials = "ABCDEFGHIJKLMNOPRSTUVWYZ"
    everybody = [(f, i, s) for f in range(len(FIRST_NAMES)) for i in range(len(initials)) for s in range(len(SURNAMES))]
    rng.shuffle(everybody)
    return (f"{FIRST_NAMES[f]} {initials[i]}. {SURNAMES[s]}" for f, i, s in everybody)


def _record(rng: random.Random, templates: dict[str, list[str]], customer: str) -> Record:
    topic = rng.choice(list(templates))
    note = rng.choice(templates[topic]).format(
        day=f"{rng.randint(1, 28)} {rng.choice(MONTHS)}",
        amount=rng.randint(20, 900),
        number=rng.randint(2, 40),
        color=rng.choice(("red", "blue", "green", "black", "white")),
    )
    return {"customer": customer, "topic": topic, "note": note}
