"""The sample's language: what people say to a phone or a watch, and the JSON action that is meant.

A request is drawn in three steps: an intent, one of its phrasings with its `(choices|or)` and `[optional]` parts
resolved, then values for its `{slots}`. Requests are lower case without final punctuation, as speech recognition
writes them. The sentence before the slots are filled is the row's template: two rows with one template differ in
values only. Some rows join two requests, and their action has two steps.

The language is small on purpose: about forty intents, English, one turn, no context.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from random import Random
from typing import Any, NamedTuple

from sample.values import SLOTS, Slot, Value

Action = dict[str, Any]


class Row(NamedTuple):
    """One request; `template` still has its slots, `action` is the JSON text that is wanted."""

    template: str
    request: str
    action: str


class Intent(NamedTuple):
    """An action with `{slots}` as values, and the phrasings that mean it; one that starts with "?" is a question."""

    action: Action
    phrasings: tuple[str, ...]


def _intent(action: Action, phrasings: str) -> Intent:
    return Intent(action, tuple(line.strip() for line in phrasings.strip().splitlines()))


INTENTS = (
    _intent({"do": "alarm", "time": "{time}"}, """
        set (an|my|the) alarm (for|at) {time}
        wake me [up] at {time}
        (i need|i want) to (wake up|get up|be up) at {time}
        alarm (at|for) {time}
        (make|create|add) an alarm (for|at) {time}
        get me (up|out of bed) at {time}"""),
    _intent({"do": "alarm", "time": "{time}", "day": "{day}"}, """
        set (an|my|the) alarm for {time} [on] {day}
        wake me [up] at {time} [on] {day}
        {day} [i need] an alarm (for|at) {time}
        (on|this) {day} wake me [up] at {time}"""),
    _intent({"do": "alarm_off", "time": "{time}"}, """
        (cancel|delete|remove|turn off|switch off) (my|the) {time} alarm
        (cancel|delete|remove|turn off) (my|the) alarm (for|at) {time}
        i don't need the {time} alarm [any more]"""),
    _intent({"do": "timer", "minutes": "{minutes}"}, """
        (set|start) a timer for {minutes} minutes
        (set|start) a {minutes} minute timer
        [start] counting down {minutes} minutes
        timer {minutes} minutes
        (tell|ping|alert) me (in|after) {minutes} minutes
        {minutes} minutes on the (timer|clock)"""),
    _intent({"do": "timer", "seconds": "{seconds}"}, """
        (set|start) a timer for {seconds} seconds
        (set|start) a {seconds} second timer
        timer {seconds} seconds"""),
    _intent({"do": "timer", "hours": "{hours}"}, """
        (set|start) a timer for {hours} hours
        (set|start) a {hours} hour timer"""),
    _intent({"do": "timer_stop"}, """
        (stop|cancel|end|clear) (the|my) timer
        turn (off the timer|the timer off)
        make the timer stop"""),
    _intent({"do": "stopwatch"}, """
        start (the|a) stopwatch
        (open|run) the stopwatch
        time me"""),
    _intent({"do": "message", "to": "{name}", "text": "{text}"}, """
        (text|message) {name} saying {text}
        (text|tell|message) {name} that {text}
        send [a] (message|text) to {name} (saying|that says) {text}
        send {name} a (message|text) (saying|that says) {text}
        let {name} know [that] {text}
        make sure {name} knows [that] {text}
        drop {name} a (line|note) (saying|that) {text}
        say {text} to {name}
        send {text} to {name}"""),
    _intent({"do": "message", "to": "{first}", "text": "{text}"}, """
        (text|message|tell) {first} {text}
        write [to] {first} {text}"""),
    _intent({"do": "call", "to": "{name}"}, """
        (call|phone|ring|dial) {name}
        (call|phone|ring) {name} (up|back)
        give {name} a (call|ring|buzz)
        (make|place|start) a (call|phone call) to {name}
        get {name} on the (phone|line)
        (i need|i want|i'd like) to (speak|talk) (to|with) {name}
        put me through to {name}
        connect me (to|with) {name}"""),
    _intent({"do": "video", "to": "{name}"}, """
        video call {name}
        (start|make) a video call (with|to) {name}
        facetime {name}
        call {name} (on|with) video"""),
    _intent({"do": "hang_up"}, """
        hang up
        (end|stop|finish) (the|this) call
        put the phone down"""),
    _intent({"do": "go", "to": "{place}"}, """
        (navigate|drive|go) to {place}
        take me to {place}
        [give me|show me|get me] directions to {place}
        (guide|bring|lead) me to {place}
        ?how do i get to {place}
        ?(what's|what is|which is) the (way|best way|route) to {place}
        (find|plan|show) [me] (a|the) (route|way) to {place}
        i (want|need|have) to (get|go) to {place}
        start navigation to {place}"""),
    _intent({"do": "go", "to": "{place}", "by": "foot"}, """
        walk [me] to {place}
        [give me|show me] walking directions to {place}
        ?how do i (walk|get on foot) to {place}"""),
    _intent({"do": "go", "to": "{place}", "by": "bike"}, """
        (bike|cycle) to {place}
        [give me|show me] (bike|cycling) directions to {place}
        ?how do i (bike|cycle) to {place}"""),
    _intent({"do": "taxi", "to": "{place}"}, """
        (get|call|book|order) [me] a (taxi|cab|ride) to {place}
        i need a (taxi|cab|ride|lift) to {place}"""),
    _intent({"do": "play", "title": "{title}"}, """
        play [the song] {title}
        put on [the song] {title}
        (i want|i'd like) to (hear|listen to) [the song] {title}
        let me hear {title}"""),
    _intent({"do": "play", "artist": "{artist}"}, """
        play [some|a song by|something by|songs by] music by {artist}
        play (songs|something|anything|the latest) (by|from) {artist}
        (put|turn) on (some|the) music (by|from) {artist}
        (i want|i'd like) to (hear|listen to) (songs|music|something) by {artist}"""),
    _intent({"do": "play", "list": "{title}"}, """
        (play|start|shuffle) (my|the) {title} playlist
        (play|start|put on) (my|the) playlist (called|named) {title}"""),
    _intent({"do": "music", "set": "pause"}, """
        (pause|stop|halt) (the music|the song|playback|this song)
        [be] quiet (for a moment|for a second)
        stop playing"""),
    _intent({"do": "music", "set": "next"}, """
        (skip|next) (this song|song|track|this track|this one)
        play the next (song|one|track)
        (go|jump) to the next (song|track)"""),
    _intent({"do": "music", "set": "resume"}, """
        (resume|continue|unpause) (the music|the song|playback|playing)
        (go on|keep on) playing"""),
    _intent({"do": "light", "room": "{room}", "on": True}, """
        (turn|switch) on the {room} (light|lights|lamp)
        (turn|switch) the {room} (light|lights|lamp) on
        (turn|switch) on the (light|lights) in the {room}
        {room} (light|lights) on
        (light|brighten) up the {room}
        i need [some] light in the {room}"""),
    _intent({"do": "light", "room": "{room}", "on": False}, """
        (turn|switch) off the {room} (light|lights|lamp)
        (turn|switch) the {room} (light|lights|lamp) off
        (turn|switch) off the (light|lights) in the {room}
        {room} (light|lights) off
        (make|keep) the {room} dark
        kill the (light|lights) in the {room}"""),
    _intent({"do": "light", "room": "{room}", "level": "{percent}"}, """
        (dim|set|turn|bring) the {room} (light|lights) to {percent} [percent]
        (dim|set) the (light|lights) in the {room} to {percent} [percent]
        {room} (light|lights) [at|to] {percent} percent"""),
    _intent({"do": "light", "room": "{room}", "colour": "{colour}"}, """
        (make|turn|set) the {room} (light|lights) {colour}
        change the {room} (light|lights) to {colour}
        {colour} (light|lights) in the {room}"""),
    _intent({"do": "heat", "degrees": "{degrees}"}, """
        set the (heating|thermostat|temperature) to {degrees} [degrees]
        (turn|put) the (heating|thermostat) (to|up to|down to) {degrees} [degrees]
        (make|keep) it {degrees} degrees [in here]"""),
    _intent({"do": "heat", "room": "{room}", "degrees": "{degrees}"}, """
        set the {room} to {degrees} degrees
        (heat|warm|cool) the {room} to {degrees} [degrees]
        set the (heating|thermostat|temperature) in the {room} to {degrees} [degrees]
        (make|keep) the {room} [at] {degrees} degrees"""),
    _intent({"do": "remind", "text": "{chore}", "time": "{time}"}, """
        remind me to {chore} at {time}
        remind me at {time} to {chore}
        at {time} remind me to {chore}
        (set|add|make) a reminder (for|at) {time} to {chore}
        don't let me forget to {chore} at {time}"""),
    _intent({"do": "remind", "text": "{chore}", "day": "{day}"}, """
        remind me to {chore} [on] {day}
        (on|this) {day} remind me to {chore}
        remind me [on] {day} to {chore}
        (set|add|make) a reminder for {day} to {chore}
        i have to {chore} [on] {day} so remind me"""),
    _intent({"do": "remind", "text": "{chore}", "minutes": "{minutes}"}, """
        remind me to {chore} in {minutes} minutes
        in {minutes} minutes remind me to {chore}
        remind me in {minutes} minutes to {chore}"""),
    _intent({"do": "weather", "city": "{city}"}, """
        ?(what's|what is|how's|how is) the weather [like] in {city}
        [show me|check|tell me] the weather (in|for) {city}
        ?is it (raining|cold|hot|sunny|windy) in {city}
        [the] forecast for {city}"""),
    _intent({"do": "weather", "day": "{day}"}, """
        ?(what's|what is|how's|how is) the weather [like] [on] {day}
        ?will it (rain|snow|be hot|be cold) [on] {day}
        ?do i need (an umbrella|a coat|a jacket) [on] {day}
        [show me|check|tell me] the weather for {day}"""),
    _intent({"do": "weather", "city": "{city}", "day": "{day}"}, """
        ?(what's|what is|how's|how is) the weather [like] in {city} [on] {day}
        ?will it (rain|snow|be hot|be cold) in {city} [on] {day}
        [show me|check|tell me] the weather (in|for) {city} [on] {day}"""),
    _intent({"do": "note", "text": "{text}"}, """
        (take|make|write) a note [saying|that|that says] {text}
        note [down] [that] {text}
        (write|jot) down [that] {text}
        (remember|keep in mind) that {text}"""),
    _intent({"do": "list", "name": "{list}", "add": "{item}"}, """
        (add|put) {item} (to|on) (my|the) {list} list
        (my|the) {list} list needs {item}
        on (my|the) {list} list (put|write) {item}"""),
    _intent({"do": "volume", "level": "{percent}"}, """
        (set|turn|change|put) the volume to {percent} [percent]
        volume [to|at] {percent} [percent]
        (make|play) it at {percent} percent [volume]"""),
    _intent({"do": "volume", "step": 1}, """
        (turn|crank) (it|the volume|the sound) up
        (turn|crank) up the (volume|sound)
        (make it|a bit|much) louder"""),
    _intent({"do": "volume", "step": -1}, """
        turn (it|the volume|the sound) down
        turn down the (volume|sound)
        (make it|a bit|much) quieter
        ?why is it so loud"""),
    _intent({"do": "heart_rate"}, """
        ?(what's|what is|how is|how's) my (heart rate|pulse)
        (check|measure|show|take) my (heart rate|pulse)
        ?how fast is my heart (beating|going)"""),
    _intent({"do": "steps", "day": "{day}"}, """
        ?how many steps did i (do|take|walk|make) [on] {day}
        (show me|check|tell me) my steps (for|on) {day}
        ?how far did i walk [on] {day}"""),
    _intent({"do": "workout", "sport": "{sport}"}, """
        (start|begin|track|record) (a|my) {sport} [workout|session]
        (i'm going|let's go) for a {sport}
        (start|track) a workout (of type|called) {sport}
        {sport} (workout|session) starts"""),
    _intent({"do": "workout", "sport": "{sport}", "minutes": "{minutes}"}, """
        (start|begin|track|record) a {minutes} minute {sport} [workout|session]
        (start|do|log) {minutes} minutes of {sport}
        {sport} for {minutes} minutes"""),
    _intent({"do": "workout_end"}, """
        (stop|end|finish) (my|the|this) (workout|session|training)
        i'm done (training|working out|exercising)"""),
    _intent({"do": "convert", "value": "{amount}", "units": "{units}"}, """
        (convert|change|turn) {amount} {units}
        ?(what's|what is|what are|how much is|how much are) {amount} {units}
        {amount} {units}"""),
    _intent({"do": "event", "title": "{event}", "day": "{day}", "time": "{time}"}, """
        (add|put|schedule|book) [a] {event} [on|for] {day} at {time}
        (create|make) an event called {event} [on|for] {day} at {time}
        put {event} in my calendar (on|for) {day} at {time}
        i have [a] {event} [on] {day} at {time}
        {day} at {time} [i have] [a] {event}"""),
    _intent({"do": "agenda", "day": "{day}"}, """
        ?(what's|what is) on my (calendar|agenda|schedule) [on|for] {day}
        ?what do i have [on] {day}
        (show|read|tell) me my (calendar|agenda|schedule) for {day}
        ?am i (busy|free) [on] {day}"""),
    _intent({"do": "open", "app": "{app}"}, """
        (open|start|launch) [the] {app} [app]
        (show|bring up) [me] the {app} app
        (go|switch) to the {app} app"""),
    _intent({"do": "set", "what": "{switch}", "on": True}, """
        (turn|switch) on {switch}
        (turn|switch) {switch} on
        (enable|activate) {switch}"""),
    _intent({"do": "set", "what": "{switch}", "on": False}, """
        (turn|switch) off {switch}
        (turn|switch) {switch} off
        (disable|deactivate) {switch}"""),
    _intent({"do": "screen", "level": "{percent}"}, """
        (set|turn|change) the (brightness|screen) to {percent} [percent]
        [screen] brightness [to|at] {percent} [percent]"""),
    _intent({"do": "translate", "text": "{text}", "to": "{language}"}, """
        translate {text} (to|into) {language}
        ?how do (you|i) say {text} in {language}
        say {text} in {language}"""),
    _intent({"do": "clock", "city": "{city}"}, """
        ?(what time|what hour) is it in {city}
        ?(what's|what is) the time in {city}
        [tell me|show me] the time in {city}"""),
    _intent({"do": "pay", "to": "{name}", "amount": "{amount}"}, """
        (pay|send|give|transfer) {name} {amount} (dollars|bucks)
        (pay|send|transfer) {amount} (dollars|bucks) to {name}"""),
    _intent({"do": "find", "what": "phone"}, """
        (find|ring|locate) my phone
        ?where is my phone
        i (lost|can't find) my phone"""),
    _intent({"do": "battery"}, """
        ?how much (battery|charge) (is left|do i have)
        (show|check) the battery [level]
        ?(what's|what is) my battery [level|at]"""),
    _intent({"do": "door", "locked": True}, """
        lock (the|my) [front] door
        make sure the door is locked"""),
    _intent({"do": "door", "locked": False}, """
        (unlock|open) (the|my) [front] door
        let (me|them|him|her) in"""),
)  # fmt: skip

# An intent with more to copy is drawn more often: there is more of it to learn.
WEIGHTS = tuple(1 + sum(str(value).startswith("{") for value in intent.action.values()) for intent in INTENTS)

# Values of these slots may be any words, so nothing polite may follow them and they stand in no joined request.
OPENSLOTS = frozenset({"text", "title", "chore", "item", "event"})
NO_VERB = ("{", "i ", "i'", "let's", "on ", "at ", "in ", "this ")
BEFORE_COMMAND = ("please", "hey", "ok", "can you", "could you", "would you", "i'd like you to", "hey can you", "now")
BEFORE_ANY = ("hey", "ok", "so")
AFTER = ("please", "thanks", "for me", "right now", "now")
JOINTS = (" and ", " and then ", " then ", " and also ")

SLOT = re.compile(r"\{(\w+)\}")
_CHOICE = re.compile(r"\(([^()\[\]]*)\)|\[([^()\[\]]*)\]")


def resolve(phrasing: str, rng: Random) -> str:
    """One sentence of a phrasing: `(a|b)` becomes a or b, `[a|b]` becomes a, b or nothing."""
    while match := _CHOICE.search(phrasing):
        options = (match[1] if match[1] is not None else match[2]).split("|")
        chosen = "" if match[1] is None and rng.random() < 0.5 else rng.choice(options)
        phrasing = phrasing[: match.start()] + chosen + phrasing[match.end() :]
    return " ".join(phrasing.split())


def polite(sentence: str, question: bool, rng: Random) -> str:
    """The sentence with, at times, words around it that change nothing."""
    last = SLOT.findall(sentence)[-1:] if sentence.endswith("}") else []
    starts_with_verb = not question and not sentence.startswith(NO_VERB)
    if rng.random() < 0.3:
        sentence = f"{rng.choice(BEFORE_COMMAND if starts_with_verb else BEFORE_ANY)} {sentence}"
    if rng.random() < 0.2 and not OPENSLOTS.intersection(last):
        sentence = f"{sentence} {rng.choice(AFTER if starts_with_verb else AFTER[:2])}"
    return sentence


def fill(sentence: str, action: Action, rng: Random, slots: Mapping[str, Slot]) -> tuple[str, Action]:
    """The sentence and the action with one value drawn for every slot of the sentence."""
    said: dict[str, str] = {}
    meant: dict[str, Value] = {}
    for slot in SLOT.findall(sentence):
        said[slot], meant[slot] = slots[slot](rng)

    def put(value: Any) -> Any:
        return meant[value[1:-1]] if isinstance(value, str) and SLOT.fullmatch(value) else value

    return SLOT.sub(lambda match: said[match[1]], sentence), {key: put(value) for key, value in action.items()}


def to_json(action: Action) -> str:
    return json.dumps(action, separators=(",", ":"), ensure_ascii=False)


def draw_row(rng: Random) -> Row:
    """One request of the base's own intents."""
    if rng.random() < 0.06:
        return _draw_joined(rng)
    intent = rng.choices(INTENTS, WEIGHTS)[0]
    phrasing = rng.choice(intent.phrasings)
    template = polite(resolve(phrasing.lstrip("?"), rng), phrasing.startswith("?"), rng)
    request, action = fill(template, intent.action, rng, SLOTS)
    return Row(template, request, to_json(action))


def _draw_joined(rng: Random) -> Row:
    templates, requests, steps = [], [], []
    while len(steps) < rng.choice((2, 2, 3)):
        intent = rng.choice(INTENTS)
        phrasing = rng.choice(intent.phrasings)
        template = resolve(phrasing, rng)
        if phrasing.startswith("?") or OPENSLOTS.intersection(SLOT.findall(template)):
            continue
        request, action = fill(template, intent.action, rng, SLOTS)
        templates.append(template)
        requests.append(request)
        steps.append(action)
    joint = rng.choice(JOINTS)
    return Row(joint.join(templates), joint.join(requests), to_json({"do": "all", "steps": steps}))


def draw_rows(seed: int, without: frozenset[str] = frozenset()) -> Iterator[Row]:
    """An endless stream of requests; none whose words are in `without`. The same seed gives the same stream."""
    rng = Random(seed)
    while True:
        row = draw_row(rng)
        if row.request not in without:
            yield row
