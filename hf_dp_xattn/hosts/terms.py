"""What a release carries along about the host that made it: for its card, and for whoever loads it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..report import Guarantee
    from .handle import ProtectedPipeline


@dataclass(frozen=True)
class Terms:
    """host: class of the model. base_model: its Hub id, where it came from the Hub. The rest: word for word from the host's report."""

    host: str
    base_model: str | None
    public: tuple[str, ...]
    not_covered: tuple[str, ...]
    warnings: tuple[str, ...]


@dataclass(frozen=True)
class Charges:
    """number: releases of this context that the ledger counted, this one included. epsilon: of all of them, at the guarantee's delta;
    None where the ledger is not at hand. Of a corpus, each is the largest among its documents."""

    number: int
    epsilon: float | None


def base_model_of(host: Any) -> str | None:
    """The Hub id that a pipeline or model was loaded from. A local path says nothing to others, and may say too much."""
    from ..artefacts.card import is_hub_id

    config = getattr(host, "config", None)
    name = getattr(host, "name_or_path", None) or getattr(config, "_name_or_path", None)
    return name if is_hub_id(name) else None


def terms_of(handle: ProtectedPipeline) -> Terms:
    """The host's terms as they are now."""
    report = handle.report()
    hosts = [handle.unet if handle.text is None else handle.text.pipe, handle.unet]
    return Terms(
        host=report.host,
        base_model=next((name for host in hosts if (name := base_model_of(host)) is not None), None),
        public=report.public,
        not_covered=report.not_covered,
        warnings=report.warnings,
    )


def charges_of(handle: ProtectedPipeline, digests: Sequence[str], guarantee: Guarantee) -> Charges:
    """What the handle's ledger counted, at most, of the context and of what it consists of; of one release where it knows none of them."""
    if not digests or not guarantee.is_private:
        return Charges(1, None)
    return Charges(*handle.ledger.most(digests, guarantee.delta))


def read_terms(values: dict[str, Any]) -> Terms:
    """Raises TypeError or ValueError for unknown, missing or malformed parts."""

    def texts(value: Any) -> tuple[str, ...]:
        if not isinstance(value, list) or not all(isinstance(v, str) for v in value):
            raise ValueError("a list of texts")
        return tuple(value)

    lists = {name: texts(values[name]) for name in ("public", "not_covered", "warnings")}
    base = values["base_model"]
    if not isinstance(values["host"], str) or not (base is None or isinstance(base, str)):
        raise ValueError("a name")
    return Terms(**{**values, **lists})


def read_charges(values: dict[str, Any]) -> Charges:
    """Raises TypeError or ValueError for unknown, missing or malformed parts."""
    charges = Charges(**values)
    if type(charges.number) is not int or charges.number < 1:
        raise ValueError("a number of releases")
    if charges.epsilon is not None and not (type(charges.epsilon) is float and charges.epsilon >= 0):
        raise ValueError("an epsilon")
    return charges
