"""A released corpus as a dataset of `datasets`, which any retriever may index."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from ...errors import ConfigError
from .released_texts import ReleasedText

BATCH = 256


def released_dataset(text: ReleasedText, embed: Callable[[list[str]], Any] | None) -> Any:
    """See `Release.to_dataset`. Everything in it is public."""
    try:
        import datasets
    except ImportError:  # an optional dependency
        raise ConfigError(
            'This needs `datasets`: pip install "hf_dp_xattn[corpus]". Nothing was spent.'
        ) from None
    texts = list(text)
    columns: dict[str, Any] = {"text": texts, "count": list(text.counts)}
    features = {"text": datasets.Value("string"), "count": datasets.Value("int64")}
    if embed is not None:
        parts = [
            np.asarray(embed(texts[i : i + BATCH]), dtype=np.float32) for i in range(0, len(texts), BATCH)
        ]
        rows = np.concatenate(parts)
        if rows.ndim != 2 or len(rows) != len(texts) or not np.isfinite(rows).all():
            raise ConfigError(
                f"`embed` gives [n, d] finite numbers for n texts, got {list(rows.shape)} for {len(texts)}."
            )
        columns["embedding"] = rows
        features["embedding"] = datasets.List(datasets.Value("float32"), length=rows.shape[1])
    return datasets.Dataset.from_dict(columns, features=datasets.Features(features))
