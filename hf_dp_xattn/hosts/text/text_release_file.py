"""A release of texts on disk: one JSON file that anyone can read, without a model and without tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...artefacts import CardOptions, HubOptions, locate
from ...artefacts.card import Parts, render, table
from ...artefacts.codec import Encoded, Tensors
from ...artefacts.words import code, name_of, release_guarantee
from ...config import DPXAttnConfig
from ...errors import ReleaseError
from ...report import Guarantee, PrivacyReport, release_entry
from ..storage import CHECKS, CODEC, ReleaseFile, check_promise, read_guarantee, read_terms
from ..terms import Terms
from .released_texts import ReleasedText, ReleasedTexts

if TYPE_CHECKING:
    from huggingface_hub import ModelCard

_SHOWN = 20  # texts on a card


@dataclass(frozen=True, eq=False)
class TextReleaseFile(Encoded):
    """A release of texts as its file holds it, without a host."""

    WORD = CHECKS.word
    CODEC = CODEC
    KIND = "texts"
    KEYS = frozenset({"kind", "config", "host", "contexts"})

    contexts: tuple[ReleasedTexts, ...]
    config: DPXAttnConfig
    terms: Terms

    @property
    def guarantees(self) -> tuple[Guarantee, ...]:
        return tuple(c.guarantee for c in self.contexts)

    def files(self) -> dict[str, bytes]:
        """Raises ReleaseError where the answers were drawn by a seeded generator: who knows the seed knows which of them are true."""
        if not all(g.is_private for g in self.guarantees):
            raise ReleaseError(
                "The answers of this release came from a seeded generator (for tests), and promise nothing. It is never written to disk. "
                "Protect without `entropy`, and make a new release."
            )
        return super().files()

    def header(self) -> dict[str, Any]:
        return {
            "kind": self.KIND,
            "config": self.config.to_dict(),
            "host": asdict(self.terms),
            "contexts": [
                {
                    "texts": list(c.text),
                    **({"counts": list(c.text.counts)} if "counts" in c.text.shown() else {}),
                    "joint": c.text.joint,
                    "guarantee": c.guarantee.to_dict(),
                    "guarantee_text": c.guarantee.sentence(),
                }
                for c in self.contexts
            ],
        }

    def tensors(self) -> Tensors:
        return {}

    @classmethod
    def from_parts(cls, header: Mapping[str, Any], tensors: Tensors) -> TextReleaseFile:
        config = DPXAttnConfig.from_dict(header["config"])
        CHECKS.keys(header["config"], set(config.to_dict()), "the config")
        contexts = []
        for i, entry in enumerate(header["contexts"]):
            where = f"context {i}"
            counted = "counts" in entry  # of votes
            known = {"texts", "joint", "guarantee", "guarantee_text", *(["counts"] if counted else [])}
            CHECKS.keys(entry, known, where)
            joint = CHECKS.name(entry["joint"], f"what joins the texts of {where}")
            texts = CHECKS.texts(entry["texts"], f"the texts of {where}")
            counts = [CHECKS.integer(n, f"a count of {where}") for n in entry["counts"]] if counted else None
            if counts is not None and (len(counts) != len(texts) or len(set(texts)) != len(texts)):
                CHECKS.refuse(f"the counts of {where} are not those of its texts")
            text = ReleasedText(texts, joint, counts)
            contexts.append(ReleasedTexts(text, read_guarantee(entry, where)))
        return cls(tuple(contexts), config, read_terms(header["host"]))

    def verify(self) -> None:
        if not self.contexts or not all(c.text and all(c.text) for c in self.contexts):
            CHECKS.refuse("no contexts, or one without a text, or an empty text")
        for context in self.contexts:
            check_promise(context.guarantee, self.config)

    def card(self, options: CardOptions) -> ModelCard:
        several = len(self.contexts) > 1
        shown = [
            (i + 1, text.replace("|", "\\|")) for i, c in enumerate(self.contexts) for text in c.text[:_SHOWN]
        ]
        return render(
            Parts(
                title=f"Released private context{'s' if several else ''}, as text",
                summary=(
                    "A private context, released once by `hf_dp_xattn`: each of its units was answered by a text of a public library, near "
                    "ones more often than far ones. What is released is public text, and any model may read it."
                ),
                code=code(
                    f'release = dpx.Release.from_pretrained("{name_of(options)}", host=host)  # or host=None',
                    "print(release.texts)",
                ),
                guarantee=release_guarantee([c.guarantee.sentence() for c in self.contexts]),
                public=self.terms.public,
                not_covered=self.terms.not_covered,
                details=table(("context", "released text"), shown),
                tags=("release", self.config.mechanism),
                base_model=self.terms.base_model,
            ),
            options,
        )

    def report(self) -> PrivacyReport:
        """What is promised, in the words of the host that made it."""
        entries = [
            {**release_entry(f"context {i + 1}", c.guarantee), **c.text.shown()}
            for i, c in enumerate(self.contexts)
        ]
        return self.terms.report(self.config.to_dict(), entries)


def locate_release(name_or_path: Any, **options: Any) -> Path:
    """The folder of a release's files, all of one commit (`HubOptions`). Raises ReleaseError where there is none."""
    located = locate(name_or_path, (CODEC.json_name,), error=ReleaseError, **options)
    if located.commit is not None and CODEC.read_document(located.folder).get("kind") != TextReleaseFile.KIND:
        more: HubOptions = {**options, "revision": located.commit}  # type: ignore[typeddict-item]
        locate(name_or_path, CODEC.names, error=ReleaseError, **more)
    return located.folder


def load_release(folder: Path) -> ReleaseFile | TextReleaseFile:
    """Reads and checks a release's files in a local folder, of whichever kind. Raises ReleaseError."""
    texts = CODEC.read_document(folder).get("kind") == TextReleaseFile.KIND
    return TextReleaseFile.load(folder) if texts else ReleaseFile.load(folder)
