"""Private contexts before their release: validated and named (for the ledger), not yet encoded."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from ..config import DPXAttnConfig
from ..errors import ConfigError, ContextError, DPXAttnError
from ..privacy.units import public_counts
from ..report import Guarantee
from .grouping import TEXT, Grouping, canonical, one_text, partition
from .lengths import dimensions

Rows = tuple[torch.Tensor, torch.Tensor]  # private [n, C], exact public [p, C]


class Part(NamedTuple):
    """A name that is charged. units: what is a unit of it, where groups are units; None: the context's own groups, of those private rows
    that are named in `rows` (None: of all). former: an earlier version's name, charged where the ledger holds charges of it."""

    name: tuple[bytes, ...]
    units: Grouping | None = None
    rows: tuple[int, ...] | None = None
    former: bool = False


@dataclass(frozen=True)
class Trial:
    """An encoding of something public. size: what tells it from others, public. run: gives rows [n, C]."""

    size: Hashable
    run: Callable[[], torch.Tensor]


@dataclass(frozen=True)
class PrivateContext:
    """One context. `name` is what the ledger digests; `load` encodes and may be called only after the charge.

    rows counts all rows of the placeholder, public ones included; private_rows those that are released. padded: `rows` is a public number
    whatever the content (else see `public_length`). phrases: the groups of the private rows where they are phrases;
    public. variant: how it is encoded: another variant is not served by the same release, but charged to the
    same name. parts: names of the documents that it consists of, or of the text that it was given as or that its phrases are of; they are
    charged as well. trials: encodings of public stand-ins, to be tried before the charge. encoder: the modules that encode it; () where it
    was given encoded. kept: bool, which of all positions are private rows, where not all are; public. ambiguous: a number of positions that
    is not theirs but that of what was given before it was padded.
    """

    rows: int
    private_rows: int
    name: tuple[bytes, ...] = field(repr=False)
    load: Callable[[], Rows] = field(repr=False, compare=False)
    phrases: torch.Tensor | None = field(default=None, repr=False, compare=False)
    variant: bytes = field(default=b"", repr=False)
    parts: tuple[Part, ...] = field(default=(), repr=False)
    padded: bool = False
    trials: tuple[Trial, ...] = field(default=(), repr=False, compare=False)
    kept: torch.Tensor | None = field(default=None, repr=False, compare=False)
    ambiguous: int | None = field(default=None, repr=False)
    encoder: tuple[Any, ...] = field(default=(), repr=False, compare=False)

    def charged(self, groups: torch.Tensor | None) -> tuple[Part, ...]:
        """All that is charged, and which rows of it are a unit; groups: as `groups` gave them."""
        apart = self.phrases is not None

        def units(part: Part) -> Grouping | None:
            if groups is None or part.units is not None:
                return None if groups is None else part.units
            if part.name[0] == TEXT and not bool(canonical(groups).any()):
                return one_text(part.name)  # one unit, however many rows it has on this host
            return partition(groups if part.rows is None else groups[list(part.rows)], apart=apart)

        charges = [Part(p.name, units(p), former=p.former) for p in (Part(self.name), *self.parts)]
        current = {p.name for p in charges if not p.former}
        return tuple(dict.fromkeys(p for p in charges if not (p.former and p.name in current)))

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise DPXAttnError("A private context cannot be pickled or copied.")

    def groups(self, groups: torch.Tensor | None, unit: str) -> torch.Tensor | None:
        """Groups of the private rows, from labels of exactly these, or of all positions (padding and public ones included).

        Raises:
            ContextError: they do not fit; ConfigError: the unit needs them and they are missing, or the reverse.
        """
        if (unit == "group") != (groups is not None or self.phrases is not None):
            need = "needs" if unit == "group" else "is the only one that takes"
            raise ConfigError(
                f"unit='group' {need} `groups`: protected.release(context, groups=...). The unit is {unit!r}."
            )
        if groups is None:
            return self.phrases
        if not self.private_rows:
            raise ContextError(
                "How many rows this context has is known when it is encoded only, so that its rows cannot be named in groups: encode it "
                "yourself and release the rows. Nothing was spent."
            )
        whole = self.private_rows if self.kept is None else len(self.kept)
        integers = (
            isinstance(groups, torch.Tensor)
            and not groups.is_floating_point()
            and not groups.is_complex()
            and groups.dtype != torch.bool
        )
        if not integers or groups.ndim != 1 or len(groups) not in (self.private_rows, whole):
            raise ContextError(
                "`groups` must be an integer tensor [n], a number for each private row, or for each of all positions; nothing was spent."
            )
        if len(groups) == whole:
            return groups if self.kept is None else groups[self.kept.to(groups.device)]
        if len(groups) == self.ambiguous:
            raise ContextError(
                "These `groups` may be of the tokens as given, or of the private rows behind the public first one: pass a number for each "
                "position, padding included; nothing was spent."
            )
        return groups

    def public_length(self, config: DPXAttnConfig, hidden: int) -> int:
        """Length of the placeholder of its release: its rows where they are padded to a public number or where the neighbouring relation
        makes their number public; else `hidden`, whatever the context."""
        counts = public_counts(config.unit, config.neighboring, self.rows, 0)
        return self.rows if self.padded or (counts["rows"] is not None and not self.hides_rows) else hidden

    @property
    def hides_rows(self) -> bool:
        """Whether its groups are units of a length that neighbours need not share: encoded apart, and not padded to one length."""
        return self.phrases is not None and not self.padded

    def shown(self, guarantee: Guarantee) -> Guarantee:
        """The guarantee of its release without a number that it hides."""
        return dataclasses.replace(guarantee, rows=None) if self.hides_rows else guarantee

    def variant_of(self, groups: torch.Tensor | None) -> bytes:
        """What tells a release from another one of the same context: how it was encoded and grouped."""
        return self.variant + (b"" if groups is None else plain_bytes(canonical(groups)))


def plain_bytes(tensor: torch.Tensor) -> bytes:
    """The same for equal numbers, whatever their type (-0.0 equals 0.0)."""
    floating = tensor.is_floating_point()
    plain = tensor.detach().to("cpu", torch.float32 if floating else torch.int64)
    return (plain + 0.0 if floating else plain).contiguous().numpy().tobytes()


def casts(tensor: torch.Tensor) -> list[torch.Tensor]:
    """Finite numbers as models of half precision read them, where they can; nothing of integers. In either type they are the same to
    such a model."""
    if not tensor.is_floating_point():
        return []
    halves = (tensor.to(dtype) for dtype in (torch.bfloat16, torch.float16))
    return [half for half in halves if bool(torch.isfinite(half).all())]


def from_embeddings(rows: torch.Tensor, channels: int) -> PrivateContext:
    """A context given by embeddings [n, C]; all n rows are private.

    Raises:
        ContextError: wrong rank or channels, no rows, NaN or Inf.
    """
    if rows.ndim != 2 or rows.shape[-1] != channels:
        raise ContextError(
            f"Embeddings must be [n, {channels}] or [B, n, {channels}], got {dimensions(rows)}, the last of size {rows.shape[-1]}."
        )
    if rows.shape[0] == 0:
        raise ContextError("The context has no rows (n = 0): there is nothing to release.")
    if not bool(torch.isfinite(rows).all()):
        raise ContextError("The embeddings hold NaN or Inf; nothing was spent.")
    kept = (
        rows.detach().clone()
    )  # what was named is what is released, whatever becomes of the caller's tensor

    def load() -> Rows:
        return kept, kept[:0]

    names = [(b"embeddings", plain_bytes(t)) for t in (kept, *casts(kept))]
    parts = tuple(dict.fromkeys(map(Part, names[1:])))
    return PrivateContext(rows.shape[0], rows.shape[0], names[0], load, parts=parts)
