"""Public texts are encoded once while their rows fit."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_dp_xattn.hosts.encode_once import EncodeOnce


@given(st.lists(st.lists(st.integers(0, 5), min_size=1, max_size=6), min_size=1, max_size=6))
def test_each_name_is_encoded_once_and_rows_stand_where_their_names_do(calls: list[list[int]]) -> None:
    known, encoded = EncodeOnce(memory_mb=1), []
    for names in calls:

        def encode(new: list[int], names: list[int] = names) -> list[torch.Tensor]:
            encoded.extend(names[i] for i in new)
            return [torch.full((2, 3), float(names[i])) for i in new]

        rows = known.rows(names, encode)
        assert [int(r[0, 0]) for r in rows] == names
    assert sorted(encoded) == sorted({n for names in calls for n in names})


def test_what_does_not_fit_is_forgotten() -> None:
    known = EncodeOnce(memory_mb=1)
    large = torch.zeros(2**18 + 1)  # float32: more than a megabyte
    counts: list[int] = []

    def encode(new: list[int]) -> list[torch.Tensor]:
        counts.append(len(new))
        return [large for _ in new]

    for _ in range(3):
        assert known.rows(["a"], encode) == [large]
    assert counts == [1, 1, 1]
