"""One person's own words: contacts by nickname, places by their household names, devices, routines and a food log.

The base has seen none of them: what "my sister" or "gym mode" stands for can only be learnt from the rows made here.
Training and held-out rows are drawn from two separate lists of phrasings, so no sentence template is in both. The
nicknames and what they stand for are the same in both, since that is what is learnt.
"""

from __future__ import annotations

from random import Random
from typing import NamedTuple

from sample.text import Action, Row, fill, polite, resolve, to_json
from sample.values import SLOTS, Slot, sentence

CONTACTS = {
    "my sister": "mirela hoban",
    "my mum": "judit hoban",
    "grandpa": "aurel stancu",
    "my boss": "oyvind strand",
    "the dentist": "dr castellane",
    "coach": "tamsin okoro",
    "the plumber": "bluewater pipes",
    "my flatmate": "ruben achterberg",
    "the babysitter": "lotte vinther",
    "the vet": "pawside clinic",
}
PLACES = {
    "the cabin": "14 otter lane brekka",
    "my hideout": "27 quill street",
    "the gym": "ironworks hall 9 mill road",
    "the studio": "5 lantern yard",
    "grandma's house": "62 elder hill tarnby",
    "the allotment": "plot 31 canal walk",
    "the kids' school": "18 tarn lane",
    "the climbing wall": "vertigo centre 3 dock avenue",
}
DEVICES = {
    "the big lamp": "lamp_7",
    "the fish tank": "plug_2",
    "the fairy lights": "strip_1",
    "the kettle": "plug_5",
    "the attic fan": "fan_3",
    "the towel rail": "heat_4",
    "the robot": "vacuum_1",
    "the pond pump": "pump_6",
}
ROUTINES: dict[str, list[Action]] = {
    "gym mode": [
        {"do": "play", "list": "heavy lifting"}, {"do": "volume", "level": 80}, {"do": "workout", "sport": "weights"},
    ],
    "movie night": [
        {"do": "light", "room": "living room", "level": 15}, {"do": "set", "what": "do not disturb", "on": True},
    ],
    "bedtime": [
        {"do": "light", "room": "bedroom", "on": False}, {"do": "door", "locked": True},
        {"do": "alarm", "time": "06:40"},
    ],
    "deep work": [{"do": "set", "what": "do not disturb", "on": True}, {"do": "timer", "minutes": 50}],
    "tea break": [{"do": "timer", "minutes": 12}, {"do": "play", "list": "slow rain"}],
    "the school run": [
        {"do": "go", "to": "18 tarn lane"}, {"do": "message", "to": "lotte vinther", "text": "we are on our way"},
    ],
    "laundry day": [{"do": "device", "id": "heat_4", "on": True}, {"do": "timer", "minutes": 55}],
    "guest mode": [
        {"do": "light", "room": "hallway", "on": True}, {"do": "heat", "degrees": 22},
        {"do": "play", "list": "dinner jazz"},
    ],
}  # fmt: skip
ENTRIES = {
    "an espresso": "caffeine 75 mg",
    "a flat white": "caffeine 130 mg",
    "a glass of water": "water 250 ml",
    "my big bottle": "water 900 ml",
    "my blue pill": "levora 5 mg",
    "my inhaler": "salvane 2 puffs",
    "a protein bar": "energy 210 kcal",
    "my usual breakfast": "energy 430 kcal",
}


class Topic(NamedTuple):
    """An action with `{slots}`, phrasings for training, and other phrasings that are held out."""

    action: Action
    train: tuple[str, ...]
    held_out: tuple[str, ...]


def _topic(action: Action, train: str, held_out: str) -> Topic:
    def lines(text: str) -> tuple[str, ...]:
        return tuple(line.strip() for line in text.strip().splitlines())

    return Topic(action, lines(train), lines(held_out))


TOPICS = (
    _topic({"do": "call", "to": "{contact}"}, """
        call {contact}
        (phone|dial) {contact}
        give {contact} a (call|ring)
        i need to talk to {contact}""", """
        ring {contact} [up|back]
        call {contact} back
        give {contact} a buzz
        get {contact} on the (phone|line)
        put me through to {contact}
        connect me with {contact}
        (make|place) a call to {contact}
        i'd like to speak (to|with) {contact}"""),
    _topic({"do": "message", "to": "{contact}", "text": "{text}"}, """
        text {contact} that {text}
        tell {contact} that {text}
        send a message to {contact} saying {text}
        let {contact} know that {text}""", """
        message {contact} (that|saying) {text}
        text {contact} saying {text}
        send a text to {contact} that says {text}
        send {contact} a message saying {text}
        make sure {contact} knows that {text}
        drop {contact} a line saying {text}
        say {text} to {contact}"""),
    _topic({"do": "video", "to": "{contact}"}, """
        video call {contact}""", """
        start a video call with {contact}
        facetime {contact}"""),
    _topic({"do": "go", "to": "{place}"}, """
        (drive|navigate) to {place}
        take me to {place}
        directions to {place}
        ?what's the way to {place}""", """
        go to {place}
        (guide|bring|lead) me to {place}
        show me directions to {place}
        ?how do i get to {place}
        ?what's the best route to {place}
        plan a route to {place}
        i (want|need) to get to {place}
        start navigation to {place}"""),
    _topic({"do": "go", "to": "{place}", "by": "foot"}, """
        walk to {place}
        walking directions to {place}""", """
        ?how do i walk to {place}
        show me walking directions to {place}"""),
    _topic({"do": "taxi", "to": "{place}"}, """
        (get|book) me a taxi to {place}
        i need a cab to {place}""", """
        (call|order) a taxi to {place}
        i need a ride to {place}
        book a cab to {place}"""),
    _topic({"do": "device", "id": "{device}", "on": True}, """
        turn on {device}
        (turn|switch) {device} on
        start {device}""", """
        switch on {device}
        {device} on
        enable {device}
        get {device} (going|running)
        i need {device} on"""),
    _topic({"do": "device", "id": "{device}", "on": False}, """
        turn off {device}
        (turn|switch) {device} off
        stop {device}""", """
        switch off {device}
        {device} off
        disable {device}
        make sure {device} is off
        i don't need {device} any more"""),
    _topic({"do": "device", "id": "{device}", "on": True, "minutes": "{minutes}"}, """
        (run|turn on) {device} for {minutes} minutes
        switch {device} on for {minutes} minutes""", """
        start {device} for {minutes} minutes
        give {device} {minutes} minutes
        i need {device} for {minutes} minutes"""),
    _topic({"do": "all", "steps": "{routine}"}, """
        {routine}
        (start|run) {routine}
        turn on {routine}
        time for {routine}
        let's do {routine}
        it's {routine} [time]""", """
        begin {routine}
        activate {routine}
        switch to {routine}
        switch on {routine}
        go into {routine}
        i'm ready for {routine}
        get [everything] ready for {routine}
        set (up|things up) for {routine}
        i want {routine}
        put {routine} on"""),
    _topic({"do": "log", "entry": "{entry}"}, """
        log {entry}
        i (had|just had) {entry}
        (add|put) {entry} (to|in) my log
        write down {entry}""", """
        track {entry}
        record {entry}
        note that i had {entry}
        i've (had|just had) {entry}
        count {entry}
        {entry} goes in the log"""),
)  # fmt: skip


SLOTS_OF_MINE: dict[str, Slot] = {
    "contact": lambda rng: rng.choice(list(CONTACTS.items())),
    "place": lambda rng: rng.choice(list(PLACES.items())),
    "device": lambda rng: rng.choice(list(DEVICES.items())),
    "routine": lambda rng: rng.choice(list(ROUTINES.items())),
    "entry": lambda rng: rng.choice(list(ENTRIES.items())),
    "text": sentence,
    "minutes": SLOTS["minutes"],
}


def draw(phrasings: str, count: int, seed: int) -> list[Row]:
    """`count` distinct requests from the "train" or the "held_out" phrasings, every topic in turn."""
    rng = Random(seed)
    rows: dict[str, Row] = {}
    while len(rows) < count:
        for topic in TOPICS:
            phrasing = rng.choice(getattr(topic, phrasings))
            template = polite(resolve(phrasing.lstrip("?"), rng), phrasing.startswith("?"), rng)
            request, action = fill(template, topic.action, rng, SLOTS_OF_MINE)
            rows.setdefault(request, Row(template, request, to_json(action)))
    return list(rows.values())[:count]
