"""Notes of an organisation, drawn: what many of them state, what few do, and one secret. And what other organisations state, PUBLIC."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

FACTS = {  # what is stated, and what it may be
    "parking": (
        "Visitors park {}.",
        ("behind the church", "at the harbour", "under the bridge", "next to the stadium"),
    ),
    "lunch": ("Lunch is served in {}.", ("the garden", "the basement", "the library", "the old factory")),
    "party": ("The summer party takes place in {}.", ("Lisbon", "Oslo", "Vienna", "Dublin")),
    "travel": (
        "For business trips we take {}.",
        ("the train", "a rental car", "the ferry", "an electric bike"),
    ),
    "coffee": ("The coffee comes from {}.", ("Ethiopia", "Brazil", "Vietnam", "Honduras")),
    "meeting": ("The weekly meeting is about {}.", ("safety", "sales", "hiring", "software bugs")),
    "gift": ("New colleagues are given {}.", ("a plant", "a bicycle helmet", "a cook book", "an umbrella")),
    "sport": ("After work the team plays {}.", ("chess", "football", "table tennis", "the guitar")),
    "paper": (
        "Contracts are kept in {}.",
        ("a bank vault", "the cloud", "a shoe box", "the lawyer's office"),
    ),
    "dog": ("The animal of the office is {}.", ("a dog", "a parrot", "a cat", "a turtle")),
    "heating": ("The heating runs on {}.", ("wood", "gas", "solar power", "old oil")),
    "music": ("In the lobby one hears {}.", ("jazz", "opera", "birdsong", "techno music")),
}
OPENINGS = ("", "Please note: ", "As always, ", "A reminder. ", "For those who ask: ", "From the handbook: ")
ENDINGS = ("", " Thanks!", " See you there.", " Ask me if in doubt.", " This has not changed.")
SECRET = "The door code of the vault is {}."


def statement(topic: str, value: int) -> str:
    form, values = FACTS[topic]
    return form.format(values[value])


def note(topic: str, value: int, draw: random.Random) -> str:
    """A note in somebody's own words."""
    text = statement(topic, value)
    opening = draw.choice(OPENINGS)
    if opening.endswith((" ", ":")) and opening.strip().endswith((":", ",")):
        text = text[0].lower() + text[1:]
    return f"{opening}{text}{draw.choice(ENDINGS)}"


def public_statements(organisations: int = 150, seed: int = 0) -> list[list[str]]:
    """What other organisations state on their pages, in plain sentences."""
    draw = random.Random(seed)
    return [
        [statement(topic, draw.randrange(len(FACTS[topic][1]))) for topic in draw.sample(list(FACTS), 8)]
        for _ in range(organisations)
    ]


@dataclass(frozen=True)
class Corpus:
    """documents: private. agreeing: of each topic, how many state its fact; facts: which one is stated. secret: what one document holds."""

    documents: list[str]
    agreeing: dict[str, int]
    facts: dict[str, int]
    secret: str


def draw_corpus(agreeing: Sequence[int] = (1, 10, 100), seed: int = 1) -> Corpus:
    """The topics in turn are stated by so many documents; one more document holds a secret."""
    draw = random.Random(seed)
    topics = list(FACTS)
    draw.shuffle(topics)
    often = {topic: agreeing[i % len(agreeing)] for i, topic in enumerate(topics)}
    facts = {topic: draw.randrange(len(FACTS[topic][1])) for topic in topics}
    secret = "".join(draw.choices("0123456789", k=6))
    documents = [note(topic, facts[topic], draw) for topic in topics for _ in range(often[topic])]
    documents.append(SECRET.format(secret))
    draw.shuffle(documents)
    return Corpus(documents, often, facts, secret)
