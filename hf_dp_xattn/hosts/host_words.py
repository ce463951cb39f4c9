"""What is public of each kind of host, in the words of reports and releases; what is not covered: `not_covered.py`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..config import DPXAttnConfig
from ..not_covered import GROUPS, HOSTS
from ..privacy.units import NeighboringRelation

WEIGHTS = "the model's weights and the shapes of its layers"
CHOICES = "how tokens are chosen: beams, sampling, lengths, seeds"


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

    def of_groups(self, what: str, pieces: str) -> list[str]:
        """What is public where groups are encoded apart, or are pieces of one text."""
        counted = "how many there are (not how long each is)"
        hidden = "nothing more: their number is private too"
        number = counted if self.counted else hidden
        return [f"with groups={what!r}, {number}", f"with groups=[...], which {pieces} form a group"]

    def words(self, host: object, kind: str, public: Sequence[str], *last: str) -> HostWords:
        """host: the model. kind: of `not_covered.HOSTS`. last: public too, behind the calibration."""
        items = (*public, *(["the calibration"] if self.calibrated else []), *last)
        more = (GROUPS[kind],) if self.unit == "group" else ()
        return HostWords(type(host).__name__, items, (*HOSTS[kind], *more))


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
    return s.words(unet, "prompt", public, *last)


def placed_words(
    model: object, s: Setting, rows: int | None, masked: bool, first_is_public: bool
) -> HostWords:
    """Of a pipeline whose denoiser is given a public stand-in for a prompt. rows: of a prompt; masked: some of them are none of a text."""
    public = [
        WEIGHTS,
        "all else that is made of a prompt (pooled vectors, masks, the number of tokens): it is made of a public text in its place",
    ]
    if rows is not None and not masked:
        public.append(f"the number of rows of a prompt (always {rows}, padded)")
    elif s.counted and s.unit == "row":
        public.append("the number of tokens of a prompt")
    if first_is_public:
        public.append("the first row of a prompt's encoding (the causal encoders make it from no word)")
    if s.unit == "group":
        public.append("where a prompt was split into phrases" + s.if_counted(", and how many there are"))
    last = (
        "the negative prompt",
        "guidance, steps, seeds and sizes of the pictures, and pictures that are given",
    )
    return s.words(model, "prompt", public, *last)


def rows_words(model: object, s: Setting, rows: int | None, vectors: int, first_is_public: bool) -> HostWords:
    """Of a pipeline whose denoiser is given released rows. rows: of a prompt, pooled vectors among them; None where that depends on it."""
    public = [
        WEIGHTS,
        "all else that is made of a prompt (masks, text ids, lengths"
        + (")" if vectors else ", pooled vectors)")
        + ": it is made of a public text in its place",
    ]
    if rows is not None:
        beside = f", the pooled vector{'s' if vectors > 1 else ''} among them" if vectors else ""
        public.append(f"the number of rows of a prompt (always {rows}{beside})")
    elif s.counted and s.unit == "row":
        public.append("the number of tokens of a prompt")
    if first_is_public:
        public.append("the first row of a prompt's encoding (the causal encoders make it from no word)")
    last = (
        "the negative prompt",
        "guidance, steps, seeds and sizes of the pictures, and pictures that are given",
    )
    return s.words(model, "prompt", public, *last)


def document_words(model: object, s: Setting) -> HostWords:
    """Of an encoder-decoder model."""
    public = [WEIGHTS]
    if s.counted and s.unit == "row":
        public.append("the number of rows of a context, with padding and without")
    if s.unit == "group":
        public += s.of_groups("documents", "rows")
    return s.words(model, "document", public, "decoder inputs and public documents", CHOICES)


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
        public += s.of_groups("segments", "tokens")
    return s.words(model, "prefix", public, "the user's own tokens", CHOICES)


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
    return s.words(model, "image", public, *last)


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
    return HostWords(host, (*public, *last), HOSTS["text"])
