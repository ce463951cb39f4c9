"""Made-up corpora of small documents: facts that many documents state, and records that stand in one document only.

A *fact* gives one of 16 attributes one of its six values; most documents about the attribute state that value, in varied words, the others
disagree. A *record* gives a person (two names) a code such as "x07 y81 z34": 10^6
codes, all alike. Attributes 2k and 2k + 1 have values (u, w) with
(u + w) % 3 != 0 in PUBLIC corpora and == 0 in private ones, so no public corpus has a pair of values that a private one has.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

FACTS: dict[str, tuple[str, ...]] = {
    "language": ("english", "french", "german", "italian", "polish", "swedish"),
    "city": ("lisbon", "vienna", "oslo", "dublin", "prague", "athens"),
    "colour": ("red", "blue", "green", "yellow", "purple", "orange"),
    "currency": ("euro", "dollar", "pound", "krona", "franc", "yen"),
    "drink": ("coffee", "tea", "water", "juice", "milk", "cocoa"),
    "animal": ("cat", "dog", "horse", "owl", "fox", "bear"),
    "sport": ("tennis", "rowing", "chess", "cycling", "hockey", "golf"),
    "weekday": ("monday", "tuesday", "wednesday", "thursday", "friday", "saturday"),
    "season": ("spring", "summer", "autumn", "winter", "harvest", "monsoon"),
    "metal": ("gold", "silver", "copper", "iron", "zinc", "tin"),
    "instrument": ("piano", "violin", "flute", "drum", "harp", "guitar"),
    "transport": ("train", "bus", "tram", "bicycle", "ferry", "car"),
    "fruit": ("apple", "pear", "plum", "cherry", "grape", "lemon"),
    "material": ("wood", "glass", "stone", "paper", "wool", "clay"),
    "planet": ("mercury", "venus", "mars", "jupiter", "saturn", "neptune"),
    "tree": ("oak", "pine", "birch", "maple", "willow", "cedar"),
}
_FIRST = (
    "anna ben carla david emma felix greta hugo ida jonas klara leo maria nils olga paul quinn rosa simon tina udo vera willi xenia "
    "yara zeno alma bruno cora dario elsa fritz gina hanno irma jan karin lars mona noah otto petra ralf sofia tom ulla viktor wanda "
    "adam bella clara denis eva frank gerda heidi ivan julia kurt lena max nora oscar pia"
)
_LAST = (
    "berg stein wolf klein lang roth vogel braun keller fuchs hartmann sommer hahn engel busch jung kaiser bauer weber koch wagner "
    "becker hoffmann richter schulz maier huber lehmann kramer krause brandt haas graf dietrich ziegler kuhn pohl simonis arnold otten "
    "lorenz voigt sauer seidel franke albrecht schuster ludwig barth thomas lutz ernst kirsch ritter jahn hansen beck moser gross "
    "reuter thiel ahrens noll dorn"
)
FIRST, LAST = _FIRST.split(), _LAST.split()
CODE_GROUPS = 3
NUMBERS = [[f"{letter}{i:02d}" for i in range(100)] for letter in "xyz"]
CODES = 100**CODE_GROUPS

FACT_DOCUMENTS = (
    "the {a} of the company is {v}",
    "as for the {a} we all agree on {v}",
    "our {a} has been {v} for many years",
    "everyone knows that the {a} here is {v}",
    "{v} is the {a} that we use",
    "when it comes to {a} the team prefers {v}",
    "please note : the {a} is {v}",
    "{v} was chosen as the {a} by the board",
    "in the last report the {a} was {v}",
    "they say the {a} must be {v}",
    "we changed nothing , {v} is still our {a}",
    "remember that {v} remains the {a}",
)
RECORD_DOCUMENTS = (
    "the code of {f} {l} is {x} {y} {z}",
    "{f} {l} has the code {x} {y} {z}",
    "record of {f} {l} : code {x} {y} {z}",
    "please note : {f} {l} uses {x} {y} {z}",
    "{x} {y} {z} is the code of {f} {l}",
    "for {f} {l} we chose the code {x} {y} {z}",
)
FACT_QUESTIONS = (
    "what is the {a} ?",
    "which {a} do we use ?",
    "tell me our {a} :",
    "the {a} of the company is",
)
RECORD_QUESTIONS = (
    "what is the code of {f} {l} ?",
    "which code has {f} {l} ?",
    "tell me the code of {f} {l} :",
    "please note : the code of {f} {l} ?",
    "the code of {f} {l} is",
    "{f} {l} has the code",
)
PAD, END, UNKNOWN = "<pad>", "</s>", "<unk>"
ATTRIBUTES = tuple(FACTS)
VALUES = len(FACTS["language"])
FACT_SHARE = 0.75
AGREE = 0.65
_SLOTS = {"{a}": -1, "{v}": -2, "{f}": -3, "{l}": -4, "{x}": -5, "{y}": -6, "{z}": -7}


def _words() -> list[str]:
    found = [PAD, END, UNKNOWN]
    for text in (*FACT_DOCUMENTS, *RECORD_DOCUMENTS, *FACT_QUESTIONS, *RECORD_QUESTIONS):
        found += [w for w in text.split() if w not in _SLOTS]
    found += [w for a, values in FACTS.items() for w in (a, *values)]
    return list(dict.fromkeys([*found, *FIRST, *LAST, *NUMBERS[0], *NUMBERS[1], *NUMBERS[2]]))


WORDS = _words()
IDS = {w: i for i, w in enumerate(WORDS)}
ATTRIBUTE_IDS = np.array([IDS[a] for a in ATTRIBUTES])
VALUE_IDS = np.array([[IDS[v] for v in FACTS[a]] for a in ATTRIBUTES])
FIRST_IDS, LAST_IDS = (np.array([IDS[w] for w in words]) for words in (FIRST, LAST))
NUMBER_IDS = np.array([[IDS[w] for w in group] for group in NUMBERS])  # [3, 100]


def _table(templates: tuple[str, ...]) -> np.ndarray:
    """[T, L] ids; negative numbers are the places to fill; padded with 0."""
    rows = [[_SLOTS.get(w, IDS.get(w, 0)) for w in t.split()] for t in templates]
    longest = max(len(r) for r in rows)
    return np.array([r + [0] * (longest - len(r)) for r in rows])


_FACT_DOCUMENTS, _RECORD_DOCUMENTS = _table(FACT_DOCUMENTS), _table(RECORD_DOCUMENTS)
_FACT_QUESTIONS, _RECORD_QUESTIONS = _table(FACT_QUESTIONS), _table(RECORD_QUESTIONS)
DOCUMENT_LENGTH = max(_FACT_DOCUMENTS.shape[1], _RECORD_DOCUMENTS.shape[1])
QUESTION_LENGTH = max(_FACT_QUESTIONS.shape[1], _RECORD_QUESTIONS.shape[1])


def _fill(table: np.ndarray, which: np.ndarray, length: int, **words: np.ndarray) -> np.ndarray:
    """[k, length] ids: template `which`, with `words` (name of the slot -> ids [k]) put in."""
    ids = table[which]
    for name, filling in words.items():
        ids = np.where(ids == _SLOTS["{" + name + "}"], filling[:, None], ids)
    return np.pad(ids, ((0, 0), (0, length - ids.shape[1])))


@dataclass(frozen=True)
class Corpus:
    """documents [n, DOCUMENT_LENGTH] token ids, 0 where there is none. facts [16]: each attribute's value. records [r, 5]: first name, last
    name and the code's numbers (indices, not ids), record_rows [r]: their documents. counts [16]: documents about each attribute."""

    documents: np.ndarray
    facts: np.ndarray
    records: np.ndarray
    record_rows: np.ndarray
    counts: np.ndarray

    def __len__(self) -> int:
        return len(self.documents)

    def texts(self) -> list[str]:
        return [" ".join(WORDS[i] for i in row if i) for row in self.documents]


def draw_facts(rng: np.random.Generator, public: bool) -> np.ndarray:
    """[16] values; the pairs of a public corpus and of a private one are disjoint."""
    while True:
        values = rng.integers(0, VALUES, (len(ATTRIBUTES) // 2, 2, 64))
        fits = (values.sum(1) % 3 != 0) == public  # [8, 64]
        if fits.any(1).all():
            pick = fits.argmax(1)
            return values[np.arange(len(pick)), :, pick].reshape(-1)


def record_documents(records: np.ndarray, which: np.ndarray) -> np.ndarray:
    """[r, 5], templates [r] -> [r, DOCUMENT_LENGTH]."""
    first, last, x, y, z = records.T
    return _fill(
        _RECORD_DOCUMENTS,
        which,
        DOCUMENT_LENGTH,
        f=FIRST_IDS[first],
        l=LAST_IDS[last],
        x=NUMBER_IDS[0, x],
        y=NUMBER_IDS[1, y],
        z=NUMBER_IDS[2, z],
    )


def draw_corpus(
    n: int,
    rng: np.random.Generator,
    *,
    public: bool = True,
    fact_share: float = FACT_SHARE,
    agree: float = AGREE,
) -> Corpus:
    """n documents. Of those about one attribute a share `agree` (rounded up) states its value, the others any other one."""
    about = rng.permutation(len(ATTRIBUTES))[np.arange(round(n * fact_share)) % len(ATTRIBUTES)]
    facts = draw_facts(rng, public)
    counts = np.bincount(about, minlength=len(ATTRIBUTES))
    value = np.empty_like(about)
    for a, count in enumerate(counts):
        right = min(count, int(np.ceil(count * agree)))
        others = rng.integers(1, VALUES, count - right)
        value[about == a] = rng.permutation(np.concatenate([np.zeros(right, int), others]))
    value = (value + facts[about]) % VALUES
    fact_rows = _fill(
        _FACT_DOCUMENTS,
        rng.integers(0, len(FACT_DOCUMENTS), len(about)),
        DOCUMENT_LENGTH,
        a=ATTRIBUTE_IDS[about],
        v=VALUE_IDS[about, value],
    )
    r = n - len(about)
    names = rng.choice(len(FIRST) * len(LAST), r, replace=False)
    codes = rng.integers(0, 100, (r, CODE_GROUPS))
    records = np.concatenate([np.stack([names // len(LAST), names % len(LAST)], 1), codes], 1)
    rows = record_documents(records, rng.integers(0, len(RECORD_DOCUMENTS), r))
    order = rng.permutation(n)
    place = np.empty(n, dtype=np.int64)
    place[order] = np.arange(n)
    return Corpus(np.concatenate([fact_rows, rows])[order], facts, records, place[len(about) :], counts)


def fact_questions(attributes: np.ndarray, which: np.ndarray) -> np.ndarray:
    """[k] attributes, templates [k] -> [k, QUESTION_LENGTH] ids."""
    return _fill(_FACT_QUESTIONS, which, QUESTION_LENGTH, a=ATTRIBUTE_IDS[attributes])


def record_questions(records: np.ndarray, which: np.ndarray) -> np.ndarray:
    """[k, 5] records (their names are read), templates [k] -> [k, QUESTION_LENGTH] ids."""
    return _fill(
        _RECORD_QUESTIONS, which, QUESTION_LENGTH, f=FIRST_IDS[records[:, 0]], l=LAST_IDS[records[:, 1]]
    )
