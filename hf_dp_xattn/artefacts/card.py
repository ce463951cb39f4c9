"""From parts to a `huggingface_hub.ModelCard`, by `template.md`."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

from ..errors import ConfigError

if TYPE_CHECKING:
    from huggingface_hub import ModelCard

README = "README.md"
MARKER = "<!-- Written by hf_dp_xattn; "
LIBRARY = "hf_dp_xattn"
TAGS = ("differential-privacy", "cross-attention", LIBRARY)
NO_LICENSE = "unknown"  # the Hub's own word where the publisher chose none
HERE = "path/to/this/folder"
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)
_LICENSE = re.compile(r"[a-z0-9][a-z0-9.+-]*")


class CardOptions(TypedDict, total=False):
    """What only the publisher knows.

    license: a Hub license id ("apache-2.0"). base_model: Hub id of the model it is for. utility: what more was measured, in Markdown.
    repo_id: where the card will stand, for the lines that load it.
    """

    license: str | None
    base_model: str | None
    utility: str | None
    repo_id: str | None


def card_options(values: Mapping[str, Any]) -> CardOptions:
    """Raises ConfigError for unknown options, and for a license or a model's name that the Hub would refuse."""
    unknown = sorted(set(values) - set(CardOptions.__annotations__))
    if unknown:
        raise ConfigError(f"Unknown option(s): {', '.join(unknown)}.")
    license_, base = values.get("license"), values.get("base_model")
    if license_ is not None and not _LICENSE.fullmatch(license_):
        raise ConfigError("`license` must be a license id of the Hub, such as 'apache-2.0'.")
    if base is not None and not is_hub_id(base):
        raise ConfigError("`base_model` must be the id of a model on the Hub, such as 'owner/name'.")
    options: CardOptions = values  # type: ignore[assignment]
    return options


def is_hub_id(name: Any) -> bool:
    """'owner/name', and no folder here: a local path says nothing to others, and may say too much."""
    return isinstance(name, str) and _HUB_ID.fullmatch(name) is not None and not Path(name).exists()


@dataclass(frozen=True)
class Parts:
    """A card's parts, in Markdown; public and not_covered: one entry per point."""

    title: str
    summary: str
    code: str
    guarantee: str
    public: Sequence[str]
    not_covered: Sequence[str]
    details: str
    tags: Sequence[str] = ()
    base_model: str | None = None
    utility: str | None = None


def template() -> str:
    return resources.files(__package__).joinpath("template.md").read_text(encoding="utf-8")


def render(parts: Parts, options: CardOptions) -> ModelCard:
    """The card. Its metadata: library_name, license, tags, and base_model where it is known."""
    from huggingface_hub import ModelCard, ModelCardData

    data = ModelCardData(
        library_name=LIBRARY,
        license=options.get("license") or NO_LICENSE,
        base_model=options.get("base_model") or parts.base_model,
        tags=[*TAGS, *parts.tags],
    )
    card: ModelCard = ModelCard.from_template(
        data,
        template_str=template(),
        marker=f"{MARKER}delete this line to keep your own text when it is saved or pushed again. -->",
        title=parts.title,
        summary=parts.summary,
        code=parts.code,
        guarantee=parts.guarantee,
        public=bullets(parts.public),
        not_covered=bullets(parts.not_covered),
        utility="\n\n".join(text for text in (parts.utility, options.get("utility")) if text),
        details=parts.details,
    )
    return card


def card_file(folder: Path, card: ModelCard) -> dict[str, bytes]:
    """{"README.md": ...} to write into `folder`, or nothing where somebody else's stands there."""
    path = folder / README
    if path.exists() and MARKER not in path.read_text(encoding="utf-8", errors="replace"):
        return {}
    return {README: card_bytes(card)}


def card_bytes(card: ModelCard) -> bytes:
    return (str(card).rstrip("\n") + "\n").encode()


def bullets(items: Sequence[str]) -> str:
    return "\n".join(f"- {item}" for item in items)


def table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(_cell(cell) for cell in line) + " |" for line in lines)


def _cell(value: Any) -> str:
    return " ".join(str(value).split()).replace("|", "\\|")
