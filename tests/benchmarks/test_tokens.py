"""benchmarks/tokens.py at tiny sizes: the unprotected side reads all n rows, both sides answer alike, releases give finite scores; page."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import tokens
from token_parts import caches, clock
from token_parts.hosts import BLOCK, DecoderOnly, EncoderDecoder, Host, Sizes, repeated

TINY = Sizes(layers=2, width=32, heads=4, key_heads=4, inner=48, vocabulary=50, question=3)
SHARED = Sizes(layers=2, width=32, heads=4, key_heads=2, inner=48, vocabulary=50, question=3)
HOSTS = {
    "decoder-only": (DecoderOnly, TINY),
    "shared key heads": (DecoderOnly, SHARED),
    "encoder-decoder": (EncoderDecoder, TINY),
}


@pytest.fixture(scope="module", params=HOSTS)
def host(request: pytest.FixtureRequest) -> Host:
    kind, sizes = HOSTS[request.param]
    return kind(sizes)


def scores(model: Any, inputs: dict[str, Any], count: int = 3) -> torch.Tensor:
    out = model.generate(
        **inputs, max_new_tokens=count, do_sample=False, output_scores=True, return_dict_in_generate=True
    )
    return torch.stack(tuple(out.scores))


@pytest.mark.parametrize("row", [0, 20, 39])
def test_the_unprotected_side_reads_every_row(row: int, host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    def changed(self: Host, n: int) -> torch.Tensor:
        rows = original(self, n).clone()
        rows[row] *= 30.0
        return rows

    want = scores(host.plain, host.exact_inputs(40, 3)[0]())
    original = type(host).rows
    monkeypatch.setattr(type(host), "rows", changed)
    got = scores(host.plain, host.exact_inputs(40, 3)[0]())
    assert not torch.allclose(want, got, atol=1e-6)


def test_rows_of_long_contexts_repeat() -> None:
    rows = repeated(BLOCK + 5, 2, seed=0)
    assert rows.shape == (BLOCK + 5, 2) and torch.equal(rows[BLOCK:], rows[:5])
    assert len(torch.unique(rows[:, 0])) == BLOCK


def test_long_prefixes_are_in_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """The cache repeats the rows where the release's rows do."""
    monkeypatch.setattr("token_parts.hosts.BLOCK", 8)
    host = DecoderOnly(TINY)
    cache = host.exact_inputs(20, 3)[0]()["past_key_values"]
    rows = host.rows(20).view(20, 2, 2, 4, 8)
    for i, layer in enumerate(cache.layers):
        assert torch.equal(layer.keys[0].transpose(0, 1), rows[:, i, 0])
        assert torch.equal(layer.values[0].transpose(0, 1), rows[:, i, 1])


@pytest.mark.parametrize("n", [1, 7, 64])
def test_both_sides_answer_alike_from_exact_rows(n: int, host: Host) -> None:
    assert tokens.check(host, n) < 1e-5


def test_wrong_answers_print_nothing(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    original = type(host).release
    monkeypatch.setattr(type(host), "release", lambda self, h, rows: original(self, h, 3.0 * rows))
    with pytest.raises(SystemExit, match="wrong"):
        tokens.check(host)


def test_protected_answers_are_finite_and_used_again(host: Host) -> None:
    for mechanism in tokens.PROTECTED:
        handle = host.protect(mechanism)
        for n in (30, 200):
            release = host.release(handle, host.rows(n))
            inputs = host.protected_inputs(release)
            first, second = (scores(handle.model, inputs()) for _ in range(2))
            assert bool(first.isfinite().all()) and torch.equal(first, second)
            assert release.guarantees[0].is_private and release.guarantees[0].rows == n
        assert len(handle.report().releases) == 2


def test_caches_agree() -> None:
    """In place and by default, over and over: the same answers; the default one takes the rows away."""
    host = DecoderOnly(TINY)
    inputs, by_default = host.exact_inputs(40, 3)
    first, second = (scores(host.plain, inputs()) for _ in range(2))
    assert torch.equal(first, second) and by_default is not None
    cache = inputs()["past_key_values"]
    third = scores(host.plain, by_default()())
    assert torch.allclose(first, third, atol=1e-6)
    assert all(layer.keys is None for layer in cache.layers)


def test_a_layer_in_place_writes_behind_its_rows() -> None:
    rows = torch.randn(1, 2, 5, 3), torch.randn(1, 2, 5, 3)
    layer = caches.InPlaceLayer(rows, room=4)
    more = torch.randn(1, 2, 3, 3), torch.randn(1, 2, 3, 3)
    for _ in range(2):
        layer.rewind()
        key, value = layer.update(*more)
        assert layer.get_seq_length() == 8 and layer.get_mask_sizes(1) == (9, 0)
        assert torch.equal(key, torch.cat([rows[0], more[0]], 2))
        assert torch.equal(value, torch.cat([rows[1], more[1]], 2))
    assert torch.equal(rows[0], layer.keys[:, :, :5])


def test_the_clock_counts_tokens_and_layers() -> None:
    host = DecoderOnly(TINY)
    watched = host.watched(host.plain)
    timed = clock.answer(host.plain, host.exact_inputs(9, 4)[0], watched, 4)
    assert len(watched) == 2 and 0 < timed.layers < timed.token and timed.first > 0
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in watched)
    host.plain.generation_config.eos_token_id = list(range(50))  # an answer that ends early is no measurement
    with pytest.raises(SystemExit, match="tokens instead of"):
        clock.answer(host.plain, host.exact_inputs(9, 4)[0], watched, 4)


@pytest.mark.slow
def test_structure_and_page() -> None:
    rows = (1024, 4096)
    plan = tokens.Plan(
        tuple((kind, sizes, rows) for kind, sizes in HOSTS.values()),
        kernel_rows=1024,
        tokens=2,
        long_tokens=2,
        long_rows=4096,
        repeats=2,
        long_repeats=3,
    )
    found = json.loads(json.dumps(tokens.measure(plan, progress=False)))
    assert [h["name"] for h in found["hosts"]] == ["Llama", "Llama", "BART"]
    for host in found["hosts"]:
        assert [p["n"] for p in host["points"]] == list(rows)
        for point in host["points"]:
            assert 32 <= point["rows_served"] <= 48
            kernel = ["kernel_sum"] if point["n"] == 1024 else []
            assert list(point["speedup"]) == ["anchors", *kernel] == list(point["release_s"])
            default = ["default cache"] if host["name"] == "Llama" else []
            assert list(point["sides"]) == ["anchors", *kernel, "exact", *default]
            assert all(v > 0 for times in point["sides"].values() for v in times.values())
            for ratios in point["speedup"].values():
                assert all(r["low"] <= r["median"] <= r["high"] for r in ratios.values())
    page = tokens.markdown(found)
    assert page.count("| 4,096 |") == 3 and "Llama, shared key heads: exact / protected" in page
    tables = [block.splitlines() for block in page.split("\n\n") if block.startswith("|")]
    assert len(tables) == 4 and all(len({line.count("|") for line in table}) == 1 for table in tables)


def test_targets_are_read_off_the_longest_context() -> None:
    times = {"first": 1.0, "token": 0.01, "layers": 0.005}
    points = []
    for n, factor in ((1024, 0.5), (4096, 1.5), (262_144, 25.0)):
        ratio = dict.fromkeys(("median", "low", "high"), factor)
        slow = {k: factor * v for k, v in times.items()}
        points.append(
            {
                "n": n,
                "rows_served": 40,
                "release_s": {"anchors": 1.0},
                "sides": {
                    "anchors": times,
                    "exact": slow,
                    "default cache": {k: 2 * v for k, v in slow.items()},
                },
                "speedup": {"anchors": dict.fromkeys(times, ratio)},
            }
        )
    described = {
        "name": "BART",
        "parameters": 5_000_000,
        "layers": 2,
        "width": 32,
        "heads": 4,
        "key_heads": 4,
    }
    host = {**described, "inner": 48, "vocabulary": 50, "question": 3, "points": points}
    page = tokens.markdown({"threads": 2, "hosts": [host]})
    assert "| BART: exact / protected token, least from 4,096 rows on | 1.50 (1.50 to 1.50) | > 1 |" in page
    assert "| BART: the same at 262,144 rows | 25 (25 to 25) | 20 |" in page
    assert "| BART: the same, transformers' default cache | 50 | 20 |" in page
    assert "| BART: first token at 262,144 rows | 25 (25 to 25) | 20 |" in page
    assert "| BART: protected token at 262,144 rows / at 1,024 | 1.00 | 1 |" in page
