"""What a guarantee does not cover: the ONE table of it, whoever says it (reports, releases, cards, plans).

HOSTS, GROUPS: of each kind of host, and what more there is where groups are units. CONFIG, CALIBRATION: of their cards. PLAN, PLAN_UNIT: of
what a planner predicts, and by the unit.
"""

from __future__ import annotations

_OWN_LEDGER = "give each customer a handle and a ledger of their own"
_LEARNED = (
    "what can be learned from the release at this epsilon, by anyone who sees it or many {made} made from it"
)
_TRAINED = "weights: {adapter} or a model that was trained on private data{parts} reveals it on its own"
_TIMING = "timing, memory, and the number of requests"
_RELEASE_TIME = "timing, memory, the number of requests, and the time that a release takes"
_LOGGED = "{private} that the surrounding program logs, keeps or shows in tracebacks; {code} that the operator installs"
_REPEATED = "that {one} was repeated: the same {reads} the same release, and a ledger refuses a second one; "
_REPEATED += _OWN_LEDGER
_TEXTS = _LEARNED.format(made="texts")
_ADAPTERS = _TRAINED.format(adapter="an adapter", parts="")
_PROCESSORS = "hooks and logits processors"
_RENAMED = "the release under another name: the ledger counts "
_ONE_BY_ONE = "they are protected one by one"
_SECOND = "a second release of the same context (charged again)"

HOSTS: dict[str, tuple[str, ...]] = {
    "prompt": (
        "words: a text encoder mixes its rows, so unit='row' protects one embedding row, never a word, and a prompt that differs in one "
        "word may differ in every row; unit='context' protects the whole prompt and costs accordingly",
        _LEARNED.format(made="pictures"),
        "that a prompt was repeated: the same prompt reads the same release, and a ledger refuses a second one, so two requests can be "
        f"seen to be equal; {_OWN_LEDGER}",
        "the initial image and the mask of img2img and inpainting, negative prompts, public prompts, and anything inside "
        "protected.public()",
        _TRAINED.format(adapter="a LoRA", parts=" (the text encoder's too)"),
        f"{_RENAMED}token ids, embeddings and other encodings of one text as different contexts",
        f"{_TIMING}; the safety checker sees the finished picture only",
        _LOGGED.format(private="prompts", code="callbacks and hooks"),
    ),
    "document": (
        "words: the encoder mixes the rows of a document, so unit='row' protects one row of its output, never a word; unit='context' "
        "protects the whole document and costs accordingly; unit='group' with groups='documents' protects one document of many, end to "
        "end, because each is encoded apart from all others",
        _TEXTS,
        _REPEATED.format(one="a document", reads="document reads"),
        "decoder inputs: prompts of the decoder, forced tokens, labels, public documents, and anything inside protected.public()",
        _ADAPTERS,
        f"{_RENAMED}token ids, embeddings and hidden states of one document as different contexts, and ids of two vocabularies unless it "
        "is given their text",
        _TIMING,
        _LOGGED.format(private="documents", code=_PROCESSORS),
    ),
    "prefix": (
        "words: in one sequence every token knows of those before it, so unit='row' protects one position's keys and values, never a word; "
        "unit='context' protects the whole prefix and costs accordingly; unit='group' with groups='segments' protects one segment of many, "
        "end to end, because each is encoded apart from all others",
        _TEXTS,
        "the user's own tokens, the public head, and anything inside protected.public(): they are attended exactly",
        "that a prefix was used before: the same prefix reads the same release, and a ledger refuses a second one",
        "the same text as other tokens: the ledger names a prefix by its private token ids in order, so a prefix with one token more or "
        "less, or with its segments in another order, is another one to it",
        _ADAPTERS,
        _RELEASE_TIME,
        _LOGGED.format(private="prefixes", code=_PROCESSORS),
    ),
    "image": (
        "patches: the vision model mixes the patches of all tiles, so unit='row' protects one row of its projected output, never a patch "
        "of the picture, a face or a word in it; unit='context' protects the whole image and costs accordingly",
        _TEXTS,
        _REPEATED.format(one="an image", reads="pixels read"),
        "the text: questions about the image, its captions, labels, public images, and anything inside protected.public()",
        _ADAPTERS,
        f"{_RENAMED}pixels that were processed otherwise (cropped, resized, projected) as different contexts",
        _TIMING,
        _LOGGED.format(private="images", code=_PROCESSORS),
    ),
    "text": (
        "which units stand together, their order and their number: units are protected one by one, and correlations between them are not",
        _LEARNED.format(made="pictures or texts"),
        "a unit whose own words stand in the library: its answer may be those very words, as may that of any other unit",
        _REPEATED.format(one="a text", reads="text reads"),
        "negative prompts, the users' turns, tools and documents that were declared public, pictures, and anything inside "
        "protected.public()",
        f"{_RENAMED}other spellings of one text, and token ids of other vocabularies, as different contexts",
        _RELEASE_TIME,
        _LOGGED.format(private="texts", code="callbacks, hooks and logits processors"),
    ),
}
GROUPS = {
    "prompt": f"which phrases (or groups) stand together: {_ONE_BY_ONE}; correlations between those of one prompt are not, and what a "
    "phrase's position or their number says is public",
    "document": f"which documents (or groups) stand together: {_ONE_BY_ONE}; groups of rows that were encoded together know of each other",
    "prefix": f"which segments (or groups) stand together: {_ONE_BY_ONE}; groups of tokens of one sequence know of each other",
    "image": f"which groups stand together: {_ONE_BY_ONE}, and rows of one image, which are encoded together, know of each other",
}
CONFIG = (
    "words: an encoder mixes its rows, so unit='row' protects one row of its output, never a word; unit='context' protects everything at "
    "once and costs accordingly",
    "what can be learned from a release at this epsilon, by anyone who sees it or what is made from it",
    "negative prompts, public prompts, the initial image of img2img; weights and calibrations that were made from private data",
    "further releases of the same context, and the same text under another name (token ids, embeddings): each is charged on its own",
    "timing, memory, the number of requests, and what the surrounding program logs",
    "anything more that `protected.report()` lists for the host at hand",
)
CALIBRATION = (
    "data that was not public when it was made: nothing protects it",
    "other contexts than the public ones: what is predicted here holds for contexts like them",
    "another model or text encoder: it is refused there",
)
PLAN_UNIT = {
    "row": "not covered: words; an encoder mixes its rows, so a prompt that differs in one word may differ in every row",
    "group": "not covered: groups that were not encoded apart from each other; there replacing one changes the others' rows too",
    "context": "not covered: that two requests used the same context, which reads the same release",
}
PLAN = (
    f"not covered: {_SECOND}, the text in logs or tracebacks, timing, the initial image, public prompts, and weights that were trained on "
    "private data"
)
PLAN_TEXTS = f"not covered: {_SECOND}, and what several units say together"
