"""Which lengths a probe goes beyond, and which are limits."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_dp_xattn.hosts.transformers.named_lengths import BEYOND, MOST, SEVERAL, probed_length, unprobed_length


class Config:
    def __init__(self, **entries: Any) -> None:
        self._entries = entries

    def to_dict(self) -> dict[str, Any]:
        return self._entries


TINY, LARGE = 10_000, 10**10


@given(value=st.integers(2, 10**6), parameters=st.integers(1, 10**11), nested=st.booleans())
def test_a_length_is_probed_or_a_limit(value: int, parameters: int, nested: bool) -> None:
    own = {"keep_window_size": value, "vocab_size": 10**9, "use_cache": True}
    config = Config(**({"attention": [own]} if nested else own))
    length, limit = probed_length(config, parameters), unprobed_length(config, parameters)
    assert SEVERAL <= length <= MOST
    assert (limit is None) == (value < length) and limit in (None, value)


@given(value=st.integers(2, MOST - BEYOND))
def test_every_number_is_probed_where_it_can_be_afforded(value: int) -> None:
    assert probed_length(Config(whatever=value), TINY) >= value + BEYOND


def test_a_large_model_is_probed_at_several_hundred() -> None:
    config = Config(index_topk=700, hidden_size=900)
    assert probed_length(config, LARGE) == SEVERAL
    assert unprobed_length(config, LARGE) == 700
    assert unprobed_length(config, TINY) is None


def test_so_many_blocks_of_a_size_are_a_length() -> None:
    config = Config(index_block_size=128, index_topk_blocks=16)
    assert unprobed_length(config, TINY) == 2048


@pytest.mark.parametrize("name", ["max_position_embeddings", "max_window_layers", "sliding_window"])
def test_what_is_known_to_be_none_or_looked_at_elsewhere(name: str) -> None:
    assert unprobed_length(Config(**{name: 4096}), TINY) is None
