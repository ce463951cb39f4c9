"""Codes of many public texts: in chunks, on one progress bar, taken up again where a folder keeps them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from ...errors import ConfigError
from ...ranks import Ranks
from ..checkpoints import Checkpoints, digest
from .text_library import Encode

ALONE = Ranks()
CHUNK = 64  # texts: what is lost where a run is broken off


def checked(codes: torch.Tensor, texts: int) -> torch.Tensor:
    """Codes [n, C] as float32 on the CPU.

    Raises:
        ConfigError: not one finite row of floats for each text.
    """
    if (
        not isinstance(codes, torch.Tensor)
        or codes.ndim != 2
        or len(codes) != texts
        or not codes.is_floating_point()
    ):
        raise ConfigError("An encoder takes a list of n strings and gives a float tensor [n, C].")
    codes = codes.detach().to("cpu", torch.float32)
    if not bool(codes.isfinite().all()):
        raise ConfigError(
            "The encoder gives NaN or Inf for a public text; leave that text out, or use another encoder."
        )
    return codes


def encode_chunks(
    texts: Sequence[str], encode: Encode, name: str, kept: Checkpoints, ranks: Ranks = ALONE
) -> Iterator[tuple[torch.Tensor, bool]]:
    """Codes of each CHUNK of texts, in order, and whether they were made now.

    Args:
        kept: keeps them, under a name of the texts and the encoder.
        ranks: processes that each were given all texts, and encode their share of the chunks.
    """
    chunks = [list(texts[start : start + CHUNK]) for start in range(0, len(texts), CHUNK)]

    def codes_of(part: list[str]) -> tuple[torch.Tensor, bool]:
        chunk = "" if kept.folder is None else digest(name, part)
        cached = kept.read(chunk)
        codes = checked(encode(part), len(part)) if cached is None else cached["codes"]
        if cached is None:
            kept.keep(chunk, {"codes": codes})
        return codes, cached is None

    if ranks.count == 1:
        yield from map(codes_of, chunks)
        return
    mine = ranks.agreed(lambda: [codes_of(part) for part in chunks[ranks.rank :: ranks.count]])
    shares = ranks.everyone(mine)
    for i in range(len(chunks)):
        yield shares[i % ranks.count][i // ranks.count]
