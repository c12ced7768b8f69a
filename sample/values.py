"""What fills the slots of a request: names, times, places, amounts and free text.

A slot function takes a `random.Random` and returns (what is said, what stands in the JSON action). Where the two are
equal the model has to copy. Most names, titles and words are therefore composed from random syllables: a list of real
names could be learnt by heart, and then a name outside the list would be lost.
"""

from __future__ import annotations

import tomllib
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

Value = Any  # what JSON can hold
Slot = Callable[[Random], tuple[str, Value]]

WORDS = {
    key: [" ".join(entry.split()).replace("-", "") for entry in entries.split(",")]
    for key, entries in tomllib.loads((Path(__file__).parent / "words.toml").read_text(encoding="utf-8")).items()
}
# Of each pair of groups, one unit is turned into another.
UNITS = (
    (
        {"miles": "mi", "feet": "ft", "inches": "in", "yards": "yd"},
        {"kilometers": "km", "meters": "m", "centimeters": "cm"},
    ),
    ({"pounds": "lb", "ounces": "oz"}, {"kilos": "kg", "grams": "g"}),
    ({"gallons": "gal", "cups": "cup", "pints": "pt"}, {"liters": "l", "milliliters": "ml"}),
    ({"dollars": "usd", "pounds sterling": "gbp"}, {"euros": "eur", "yen": "jpy"}),
    ({"degrees fahrenheit": "f"}, {"degrees celsius": "c"}),
)


def pick(rng: Random, key: str) -> str:
    return rng.choice(WORDS[key])


def invented_word(rng: Random) -> str:
    """A pronounceable word that is in no list: two or three syllables, sometimes one."""
    count = rng.choice((1, 2, 2, 2, 3))
    return "".join(pick(rng, part) for _ in range(count) for part in ("onsets", "vowels", "codas"))


def any_words(rng: Random, count: int) -> str:
    """`count` words with no meaning together, about a third of them invented."""
    return " ".join(pick(rng, "words") if rng.random() < 0.65 else invented_word(rng) for _ in range(count))


def _copied(text: str) -> tuple[str, Value]:
    return text, text


def _one_of(key: str) -> Slot:
    return lambda rng: _copied(rng.choice(WORDS[key]))


def first_name(rng: Random) -> str:
    return pick(rng, "first_names") if rng.random() < 0.3 else invented_word(rng)


def name(rng: Random) -> tuple[str, Value]:
    if rng.random() < 0.65:
        return _copied(first_name(rng))
    last = pick(rng, "last_names") if rng.random() < 0.3 else invented_word(rng)
    return _copied(f"{first_name(rng)} {last}")


def city(rng: Random) -> tuple[str, Value]:
    return _copied(pick(rng, "cities") if rng.random() < 0.4 else invented_word(rng))


def place(rng: Random) -> tuple[str, Value]:
    kind = rng.random()
    if kind < 0.35:
        return _copied(pick(rng, "places"))
    if kind < 0.55:
        return city(rng)
    return _copied(f"{rng.randint(1, 199)} {invented_word(rng)} {pick(rng, 'streets')}")


def title(rng: Random) -> tuple[str, Value]:
    """A song, list or event title: any one to four words."""
    return _copied(any_words(rng, rng.choice((1, 2, 2, 3, 3, 4))))


def artist(rng: Random) -> tuple[str, Value]:
    return name(rng) if rng.random() < 0.5 else _copied("the " + invented_word(rng) + "s")


def sentence(rng: Random) -> tuple[str, Value]:
    """A message as people send it; the object in it is a common word."""
    late = rng.choice(("late", "running late", f"{rng.randint(2, 9) * 5} minutes late", "stuck in traffic"))
    day = rng.choice(WORDS["days"][:7])
    soon = rng.choice(("soon", "tonight", "tomorrow", f"at {time(rng)[0]}", "in an hour", f"on {day}"))
    thing = rng.choice(WORDS["nouns"] + WORDS["goods"])
    return _copied(pick(rng, "messages").format(late=late, soon=soon, thing=thing))


def text(rng: Random) -> tuple[str, Value]:
    """What may be said in a message or a note: a sentence, at times about an invented thing, or any words."""
    if rng.random() < 0.6:
        said = sentence(rng)[0]
        return _copied(said if rng.random() < 0.6 else said.replace("the ", f"the {invented_word(rng)} "))
    return _copied(any_words(rng, rng.randint(3, 7)))


def chore(rng: Random) -> tuple[str, Value]:
    if rng.random() < 0.4:
        return _copied(pick(rng, "chores"))
    verb = pick(rng, "chore_verbs")
    if rng.random() < 0.4:
        return _copied(f"{verb} the {pick(rng, 'words')}")
    return _copied(f"{verb} {first_name(rng)}")


def event(rng: Random) -> tuple[str, Value]:
    return _copied(pick(rng, "events")) if rng.random() < 0.5 else title(rng)


def item(rng: Random) -> tuple[str, Value]:
    return _copied(pick(rng, "goods") if rng.random() < 0.6 else title(rng)[0])


def time(rng: Random) -> tuple[str, Value]:
    """A time of day as it is said, and as 24-hour HH:MM. Hours without am or pm are meant as they stand."""
    hour, minute = rng.randint(1, 12), rng.choice((0, 0, 0, 15, 30, 45, rng.randint(1, 11) * 5, rng.randint(1, 59)))
    half_day = rng.choice(("am", "pm"))
    as_24 = hour % 12 + (12 if half_day == "pm" else 0)
    style = rng.random()
    if style < 0.55:
        said = f"{hour} {half_day}" if minute == 0 else f"{hour}:{minute:02d} {half_day}"
        return said, f"{as_24:02d}:{minute:02d}"
    if style < 0.8:
        as_24 = rng.randint(0, 23)
        return f"{as_24}:{minute:02d}", f"{as_24:02d}:{minute:02d}"
    minute = rng.choice((15, 30, 45))
    if minute == 45:
        return f"quarter to {hour % 12 + 1}", f"{hour:02d}:45"
    return f"{'half' if minute == 30 else 'quarter'} past {hour}", f"{hour:02d}:{minute:02d}"


def count(low: int, high: int, words: bool = False) -> Slot:
    def draw(rng: Random) -> tuple[str, Value]:
        value = rng.randint(low, high)
        return (WORDS["number_words"][value - 1] if words and value <= 12 and rng.random() < 0.4 else str(value)), value

    return draw


def amount(rng: Random) -> tuple[str, Value]:
    value: Value = rng.randint(1, 400) if rng.random() < 0.7 else rng.randint(1, 99) + rng.randint(1, 9) / 10
    return str(value), value


def units(rng: Random) -> tuple[str, Value]:
    """From which unit to which, for example ("miles to kilometers", "mi/km")."""
    groups = list(rng.choice(UNITS))
    rng.shuffle(groups)
    (said_from, source), (said_to, target) = (rng.choice(list(group.items())) for group in groups)
    return f"{said_from} {rng.choice(('in', 'to', 'into'))} {said_to}", f"{source}/{target}"


SLOTS: dict[str, Slot] = {
    "name": name,
    "first": lambda rng: _copied(first_name(rng)),
    "city": city,
    "place": place,
    "title": title,
    "artist": artist,
    "text": text,
    "chore": chore,
    "item": item,
    "time": time,
    "amount": amount,
    "units": units,
    "minutes": count(1, 59, words=True),
    "seconds": count(5, 90),
    "hours": count(1, 12, words=True),
    "percent": count(1, 100),
    "degrees": count(12, 28),
    "day": _one_of("days"),
    "room": _one_of("rooms"),
    "colour": _one_of("colours"),
    "language": _one_of("languages"),
    "sport": _one_of("sports"),
    "app": _one_of("apps"),
    "switch": _one_of("switches"),
    "list": _one_of("lists"),
    "event": event,
}
