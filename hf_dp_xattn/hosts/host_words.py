"""What is public of each kind of host, and what its guarantee does not cover: the one table of the words of reports and releases."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..config import DPXAttnConfig
from ..privacy.units import NeighboringRelation

WEIGHTS = "the model's weights and the shapes of its layers"
CHOICES = "how tokens are chosen: beams, sampling, lengths, seeds"
LEARNED = (
    "what can be learned from the release at this epsilon, by anyone who sees it or many {made} made from it"
)
TRAINED = "weights: {adapter} or a model that was trained on private data{parts} reveals it on its own"
TIMING = "timing, memory, and the number of requests"
LOGGED = "{private} that the surrounding program logs, keeps or shows in tracebacks; {code} that the operator installs"
TEXTS = LEARNED.format(made="texts")
ADAPTERS = TRAINED.format(adapter="an adapter", parts="")
PROCESSORS = "hooks and logits processors"

PROMPT = (
    "words: a text encoder mixes its rows, so unit='row' protects one embedding row, never a word, and a prompt that differs in one word "
    "may differ in every row; unit='context' protects the whole prompt and costs accordingly",
    LEARNED.format(made="pictures"),
    "that a prompt was repeated: the same prompt reads the same release, and a ledger refuses a second one, so two requests can be seen "
    "to be equal; give each customer a handle and a ledger of their own",
    "the initial image and the mask of img2img and inpainting, negative prompts, public prompts, and anything inside protected.public()",
    TRAINED.format(adapter="a LoRA", parts=" (the text encoder's too)"),
    "the release under another name: the ledger counts token ids, embeddings and other encodings of one text as different contexts",
    f"{TIMING}; the safety checker sees the finished picture only",
    LOGGED.format(private="prompts", code="callbacks and hooks"),
)
PHRASES = (
    "which phrases (or groups) stand together: they are protected one by one; correlations between those of one prompt are not, and what a "
    "phrase's position or their number says is public"
)
DOCUMENT = (
    "words: the encoder mixes the rows of a document, so unit='row' protects one row of its output, never a word; unit='context' protects "
    "the whole document and costs accordingly; unit='group' with groups='documents' protects one document of many, end to end, because "
    "each is encoded apart from all others",
    TEXTS,
    "that a document was repeated: the same document reads the same release, and a ledger refuses a second one; give each customer a "
    "handle and a ledger of their own",
    "decoder inputs: prompts of the decoder, forced tokens, labels, public documents, and anything inside protected.public()",
    ADAPTERS,
    "the release under another name: the ledger counts token ids, embeddings and hidden states of one document as different contexts, and "
    "ids of two vocabularies unless it is given their text",
    TIMING,
    LOGGED.format(private="documents", code=PROCESSORS),
)
DOCUMENTS = (
    "which documents (or groups) stand together: they are protected one by one; groups of rows that were encoded together know of each "
    "other"
)
PREFIX = (
    "words: in one sequence every token knows of those before it, so unit='row' protects one position's keys and values, never a word; "
    "unit='context' protects the whole prefix and costs accordingly; unit='group' with groups='segments' protects one segment of many, "
    "end to end, because each is encoded apart from all others",
    TEXTS,
    "the user's own tokens, the public head, and anything inside protected.public(): they are attended exactly",
    "that a prefix was used before: the same prefix reads the same release, and a ledger refuses a second one",
    "the same text as other tokens: the ledger names a prefix by its private token ids in order, so a prefix with one token more or less, "
    "or with its segments in another order, is another one to it",
    ADAPTERS,
    "timing, memory, the number of requests, and the time that a release takes",
    LOGGED.format(private="prefixes", code=PROCESSORS),
)
SEGMENTS = "which segments (or groups) stand together: they are protected one by one; groups of tokens of one sequence know of each other"
IMAGE = (
    "patches: the vision model mixes the patches of all tiles, so unit='row' protects one row of its projected output, never a patch of "
    "the picture, a face or a word in it; unit='context' protects the whole image and costs accordingly",
    TEXTS,
    "that an image was repeated: the same pixels read the same release, and a ledger refuses a second one; give each customer a handle and "
    "a ledger of their own",
    "the text: questions about the image, its captions, labels, public images, and anything inside protected.public()",
    ADAPTERS,
    "the release under another name: the ledger counts pixels that were processed otherwise (cropped, resized, projected) as different "
    "contexts",
    TIMING,
    LOGGED.format(private="images", code=PROCESSORS),
)
ROWS = "which groups stand together: they are protected one by one, and rows of one image, which are encoded together, know of each other"

TEXT = (
    "which units stand together, their order and their number: units are protected one by one, and correlations between them are not",
    LEARNED.format(made="pictures or texts"),
    "a unit whose own words stand in the library: its answer may be those very words, as may that of any other unit",
    "that a text was repeated: the same text reads the same release, and a ledger refuses a second one; give each customer a handle and a "
    "ledger of their own",
    "negative prompts, the users' turns, tools and documents that were declared public, pictures, and anything inside protected.public()",
    "the release under another name: the ledger counts other spellings of one text, and token ids of other vocabularies, as different "
    "contexts",
    "timing, memory, the number of requests, and the time that a release takes",
    LOGGED.format(private="texts", code="callbacks, hooks and logits processors"),
)


@dataclass(frozen=True)
class HostWords:
    """host: class of the model. public, not_covered: of its reports. warnings: of the host's own, behind those of its releases."""

    host: str
    public: tuple[str, ...]
    not_covered: tuple[str, ...]
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class Setting:
    """What the words depend on. counted: whether neighbours have equally many units."""

    unit: str
    counted: bool
    calibrated: bool

    @classmethod
    def of(cls, config: DPXAttnConfig, calibration: object) -> Setting:
        counted = config.neighboring == NeighboringRelation.REPLACE_ONE.value
        return cls(config.unit, counted, calibration is not None)

    def if_counted(self, words: str = ", and how many groups there are") -> str:
        return words if self.counted else ""

    def words(
        self, host: object, public: Sequence[str], last: Sequence[str], covered: Sequence[str], groups: str
    ) -> HostWords:
        """host: the model. last: public too, behind the calibration. groups: what is not covered where groups are units."""
        items = (*public, *(["the calibration"] if self.calibrated else []), *last)
        more = (groups,) if self.unit == "group" else ()
        return HostWords(type(host).__name__, items, (*covered, *more))


def prompt_words(unet: object, s: Setting, rows: int | None, first_is_public: bool, split: str) -> HostWords:
    """Of a Stable Diffusion pipeline. rows: of a prompt, None without a text encoder. split: where prompts are split into phrases."""
    public = [WEIGHTS]
    if s.counted and s.unit != "context":
        public.append("the number of rows of embeddings")
    if rows is not None:
        public.append(f"the number of rows of a prompt (always {rows}, padded)")
        if first_is_public:
            public.append(
                "the first row of a prompt's encoding (BOS: the causal encoder makes it from no word)"
            )
    if s.unit == "group":
        public.append("which rows form a group" + s.if_counted())
        if rows is not None:
            many = s.if_counted(", and how many there are")
            public.append(f"where a prompt was split into phrases ({split}){many}")
    last = ("the negative prompt and public prompts", "guidance, steps, seeds and sizes of the pictures")
    return s.words(unet, public, last, PROMPT, PHRASES)


def document_words(model: object, s: Setting) -> HostWords:
    """Of an encoder-decoder model."""
    public = [WEIGHTS]
    if s.counted and s.unit == "row":
        public.append("the number of rows of a context, with padding and without")
    if s.unit == "group":
        public.append(
            "with groups='documents', how many there are (not how long each is)"
            if s.counted
            else "with groups='documents', nothing more: their number is private too"
        )
        public.append("with groups=[...], which rows form a group")
    return s.words(model, public, ("decoder inputs and public documents", CHOICES), DOCUMENT, DOCUMENTS)


def prefix_words(model: object, s: Setting) -> HostWords:
    """Of a decoder-only model."""
    public = [
        WEIGHTS,
        "the public head, and the padded length of the prefix (of its longest segment), a multiple of 64 or `prefix_bucket`: a "
        "neighbour has the same",
    ]
    if s.unit == "row" and s.counted:
        public.append("the number of private tokens")
    if s.unit == "group":
        public.append(
            "with groups='segments', how many there are (not how long each is)"
            if s.counted
            else "with groups='segments', nothing more: their number is private too"
        )
        public.append("with groups=[...], which tokens form a group")
    return s.words(model, public, ("the user's own tokens", CHOICES), PREFIX, SEGMENTS)


def image_words(model: object, s: Setting) -> HostWords:
    """Of a model whose text reads an image."""
    tiles = (
        "the aspect ratio of an image: which of its tiles are padding (their rows are left out), and so how many rows it has, follow from "
        "it"
    )
    public = [WEIGHTS, tiles]
    if s.unit == "group":
        public.append("which rows form a group" + s.if_counted())
    last = ("the text, that it has an image, and which of its tokens may see it", CHOICES)
    return s.words(model, public, last, IMAGE, ROWS)


def text_words(host: str, s: Setting, cut: str) -> HostWords:
    """Of a host that is served by released text. host: its class. cut: where private texts are cut in units."""
    public = [
        "the model and all of its weights: it reads nothing but public text",
        "the library: its texts, their codes and the encoder, and for each epsilon which of them may answer",
        f"where a private text is cut in units ({cut}), "
        + ("and so how many units it has" if s.counted else "and that there is one at least"),
        "the released text itself",
    ]
    last = ("negative prompts, the users' turns, and what was declared public", CHOICES)
    return HostWords(host, (*public, *last), TEXT)
