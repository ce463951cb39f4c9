"""Invariants 4 to 6 as far as a host can break them: the noise, what depends on the data, and the numbers that are reported."""

from __future__ import annotations

import dataclasses
import json
import random
import warnings
from typing import Any

import numpy as np
import pytest
import torch

import hf_dp_xattn as dpx
from hf_dp_xattn.hosts.worth import ROW
from hf_dp_xattn.privacy.bits import SeededEntropy

from ..hosts_tiny import CHANNELS, LENGTH, picture, tiny_sd, tiny_unet
from .anchor_calibrations import BOTH, protect
from .transformers.encoder_decoder.tiny import tiny

PROMPT = "a red circle"


def seed_everything() -> None:
    torch.manual_seed(0)
    np.random.seed(0)
    random.seed(0)


def noise_of(entropy: Any, private: Any) -> torch.Tensor:
    """All released numbers of one prompt, after every seed that a program could set."""
    pipe = tiny_sd()
    seed_everything()
    release = dpx.protect(pipe, private, entropy=entropy, ledger=dpx.Ledger()).release(PROMPT)
    return torch.cat([s.tensors()["sums"].flatten() for s in release.contexts[0].structures])


def check_unpredictable(entropy: Any, private: Any) -> None:
    a, b = (noise_of(entropy() if callable(entropy) else entropy, private) for _ in range(2))
    assert float((a != b).float().mean()) > 0.9


def test_no_seed_reaches_the_noise(private: Any) -> None:
    """Invariant 4."""
    check_unpredictable(None, private)


def test_seeded_noise_is_caught_and_labelled(private: Any) -> None:
    with pytest.raises(AssertionError):
        check_unpredictable(lambda: SeededEntropy(1), private)
    pipe = tiny_sd()
    handle = dpx.protect(pipe, private, entropy=SeededEntropy(1))
    release = handle.release(PROMPT)
    assert not release.guarantees[0].is_private
    assert "NOT PRIVATE" in str(handle.report()) and "seeded" in str(handle.report())


def test_a_torch_seeded_sampler_would_be_caught(private: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted: floating-point noise from torch's generator in place of the lattice."""
    from hf_dp_xattn.privacy import additive

    def planted(shape: Any, sigma_squared: Any, *, entropy: Any) -> np.ndarray:
        return (torch.randn(shape) * float(sigma_squared) ** 0.5).round().to(torch.int64).numpy()

    monkeypatch.setattr(additive, "discrete_gaussian", planted)
    with pytest.raises(AssertionError):
        check_unpredictable(None, private)


def shapes_of(release: Any) -> list[Any]:
    context = release.contexts[0]
    tensors = [
        (n, tuple(t.shape), t.dtype) for s in context.structures for n, t in sorted(s.tensors().items())
    ]
    return [
        *tensors,
        context.rows,
        tuple(context.public_rows.shape),
        release.inputs()["prompt_embeds"].shape,
        context.guarantee,
    ]


def check_shapes(pipe: Any, handle: Any) -> None:
    prompts = ("", "a", "a very long prompt that will be cut off somewhere", "é☃ \u202e")
    first, *rest = (shapes_of(handle.release(p)) for p in prompts)
    assert all(r == first for r in rest)


def test_no_shape_depends_on_the_prompt(pipe: Any, private: Any) -> None:
    """Invariant 5: whatever is public about a release is the same for all prompts."""
    check_shapes(pipe, dpx.protect(pipe, private))


def test_a_shape_that_depends_on_the_prompt_is_caught(
    pipe: Any, private: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Planted: padding rows are left out, which reveals the number of tokens."""
    handle = dpx.protect(pipe, private)
    text = handle.host._patches[0].text
    full = text.private_rows
    monkeypatch.setattr(
        text, "private_rows", lambda ids, mask: (full(ids, mask)[0][: int(mask.sum())], full(ids, mask)[1])
    )
    with pytest.raises(AssertionError):
        check_shapes(pipe, handle)


def sums_without_noise(
    unet: Any, private: Any, rows: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> torch.Tensor:
    """The joint vector before noise, in units of its clipping bound."""
    from hf_dp_xattn.mechanisms.kernel_sum import kernel_sum

    seen = []
    original = kernel_sum.sum_rows

    def spy(encoders: Any, keys: Any, values: Any, bound: int, **kwargs: Any) -> Any:
        sums = original(encoders, keys, values, bound, **kwargs)
        seen.append(torch.cat([s.flatten().double() for s in sums]) / bound)
        return sums

    with monkeypatch.context() as patch:
        patch.setattr(kernel_sum, "sum_rows", spy)
        with dpx.protect(unet, private) as handle:
            handle.release(rows)
    return seen[0]


def check_sensitivity(unet: Any, private: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Replacing one row (by a huge one) moves the joint sum over all layers by at most twice the clipping bound."""
    rows = torch.randn(LENGTH, CHANNELS, generator=torch.Generator().manual_seed(0))
    other = rows.clone()
    other[4] = 1e3 * torch.randn(CHANNELS, generator=torch.Generator().manual_seed(1))
    a, b = (sums_without_noise(unet, private, r, monkeypatch) for r in (rows, other))
    assert 0.1 < float((a - b).norm()) <= 2.0


def test_one_row_moves_the_joint_sum_by_no_more_than_stated(
    private: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_sensitivity(tiny_unet(), private, monkeypatch)


def test_a_projection_that_mixes_rows_is_caught(private: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted: keys centred by the mean over all private rows, a bound that reads the data."""
    from hf_dp_xattn.hosts import making

    original = making.project_apart

    def mixing(attn: Any, rows: torch.Tensor, units: Any) -> Any:
        key, value = original(attn, rows, units)
        return key - key.mean(dim=1, keepdim=True), value - value.amax(dim=1, keepdim=True)

    monkeypatch.setattr(making, "project_apart", mixing)
    with pytest.raises(AssertionError):
        check_sensitivity(tiny_unet(), private, monkeypatch)


def check_removal(private: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Removing a row takes its own contribution away and changes no other one, though all rows are huge where no projection looks: there,
    what their keys and values are is what rounding makes of them."""
    unet = tiny_unet(
        cross_attention_dim=250
    )  # rows of 1,000 bytes: their places in memory differ in alignment
    weights = [
        w
        for n, m in unet.named_modules()
        if n.endswith(".attn2")
        for w in (m.to_k.weight.detach(), m.to_v.weight.detach())
    ]
    unseen = torch.linalg.svd(torch.cat(weights).double()).Vh[-1].float()
    gen = torch.Generator().manual_seed(0)
    rows = torch.randn(4, 250, generator=gen) + 1e8 * torch.randn(4, 1, generator=gen) * unseen
    config = private.replace(neighboring="add_or_remove_one")
    whole, less, alone = (
        sums_without_noise(unet, config, r, monkeypatch) for r in (rows, rows[1:], rows[:1])
    )
    assert float(alone.norm()) > 0.1
    assert float((whole - less - alone).abs().max()) < 1e-12  # integers, in units of a bound of 2^34: equal


def test_a_row_that_is_removed_takes_its_own_contribution_along(
    private: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_removal(private, monkeypatch)


def test_rounding_that_depends_on_the_number_of_rows_is_caught(
    private: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Planted: all rows in one product, whose order of summation depends on how many they are, as a BLAS may choose."""
    from hf_dp_xattn.hosts import making

    def together(attn: Any, rows: torch.Tensor, units: Any) -> Any:
        cut = 16 * len(rows)
        found = [
            rows[:, :cut] @ m.weight[:, :cut].mT + rows[:, cut:] @ m.weight[:, cut:].mT for m in attn.parts()
        ]
        return tuple(t.unflatten(-1, (attn.heads, -1)).transpose(0, 1) for t in found)

    monkeypatch.setattr(making, "project_apart", together)
    with pytest.raises(AssertionError):
        check_removal(private, monkeypatch)


def _recipe(host: str, config: Any) -> tuple[Any, int]:
    """A recipe whose projections add to each row the mean of all rows of one call: what it makes of a unit shows who was beside it."""
    model = tiny_unet() if host == "unet" else tiny("bart")
    handle = dpx.protect(model, config)
    for name, module in model.named_modules():
        if name.endswith(("attn2.to_k", "attn2.to_v", "encoder_attn.k_proj", "encoder_attn.v_proj")):
            module.register_forward_hook(lambda m, a, out: out + out.mean(dim=1, keepdim=True))
    return handle.guard.prepare(handle.guard.fingerprint()), handle.host.channels


@pytest.mark.parametrize("neighboring", ["replace_one", "add_or_remove_one"])
@pytest.mark.parametrize("unit", ["row", "group"])
@pytest.mark.parametrize("mechanism", ["kernel_sum", "dptree"])
@pytest.mark.parametrize("host", ["unet", "bart"])
def test_no_unit_is_projected_beside_another(
    host: str, mechanism: str, unit: str, neighboring: str, private: Any
) -> None:
    """So that its contribution cannot depend on the others, whatever a product makes of the rows that it is given."""
    config = private.replace(mechanism=mechanism, unit=unit, neighboring=neighboring)
    recipe, channels = _recipe(host, config)
    gen = torch.Generator().manual_seed(0)
    rows = torch.randn(9, channels, generator=gen)
    labels = torch.tensor([2, 0, 0, 1, 2, 2, 1, 0, 3])
    groups = labels if unit == "group" else None
    units = [labels == g for g in range(4)] if unit == "group" else [torch.arange(9) == i for i in range(9)]
    before = recipe.private(rows, groups)
    for mine in units:
        other = rows.clone()
        other[mine] = 1e8 * torch.randn(int(mine.sum()), channels, generator=gen)
        less = recipe.private(rows[~mine], None if groups is None else groups[~mine])
        after = recipe.private(other, groups)
        for side in ("keys", "values"):
            triples = zip(*(getattr(found, side) for found in (before, after, less)), strict=True)
            for want, replaced, removed in triples:
                assert torch.equal(replaced[:, ~mine], want[:, ~mine])
                assert torch.equal(removed, want[:, ~mine])
                assert not torch.equal(replaced[:, mine], want[:, mine])


def check_numbers(handle: Any, config: Any) -> None:
    """Invariant 6: config, guarantee, ledger and report state the same numbers, and the ledger not less."""
    (entry,) = handle.report().to_dict()["releases"]
    assert (entry["epsilon"], entry["delta"]) == (config.epsilon, config.delta)
    assert (entry["unit"], entry["neighboring"]) == (config.unit, config.neighboring)
    assert f"({config.epsilon:g}, {config.delta:g})-differentially private" in entry["guarantee_text"]
    assert config.epsilon * 0.999 <= entry["spent_epsilon"] <= config.epsilon * (1 + 1e-6)
    charges = handle.ledger.entries()
    charge = charges[0]
    assert all(c.events == charge.events for c in charges)  # the context's, and its grouping's
    factor = 2 if config.neighboring == "replace_one" else 1
    g = entry["guarantee"]
    assert g["sensitivity"] == pytest.approx(factor * g["clip_norm"])
    (event,) = charge.events
    assert float(event.sensitivity) / float(event.sigma_squared) ** 0.5 == pytest.approx(
        g["sensitivity"] / g["sigma"], rel=1e-6
    )


@BOTH
@pytest.mark.parametrize("neighboring", ["replace_one", "add_or_remove_one"])
@pytest.mark.parametrize("epsilon", [0.5, 8.0])
def test_the_numbers_are_handed_on_unaltered(
    epsilon: float, neighboring: str, pipe: Any, private: Any
) -> None:
    config = private.replace(epsilon=epsilon, neighboring=neighboring)
    handle = protect(pipe, config)
    picture(pipe, PROMPT)
    check_numbers(handle, config)


@pytest.mark.parametrize("plant", ["half the epsilon", "half the sensitivity"])
def test_understated_numbers_are_caught(plant: str, pipe: Any, private: Any) -> None:
    handle = dpx.protect(pipe, private)
    current, recipe = handle.guard.maker._prepared
    (event,) = recipe.events
    if plant == "half the epsilon":
        picture(pipe, PROMPT)
        spent = handle.releases.spent[0]
        handle.releases.spent[0] = dataclasses.replace(
            spent, guarantee=dataclasses.replace(spent.guarantee, epsilon=4.0)
        )
    else:
        weaker = dataclasses.replace(event, sensitivity=event.sensitivity // 2)
        planted = dataclasses.replace(recipe.prepared, event=weaker)
        handle.guard.maker._prepared = current, dataclasses.replace(recipe, prepared=planted)
        picture(pipe, PROMPT)
    with pytest.raises(AssertionError):
        check_numbers(handle, private)


def test_the_report_says_what_is_public_and_what_is_not_covered(pipe: Any, private: Any) -> None:
    handle = dpx.protect(pipe, private)
    picture(pipe, PROMPT)
    report = handle.report()
    text = str(report)
    for phrase in (
        "never a word",
        "repeated",
        "negative prompt",
        "initial image",
        "BOS",
        "LoRA",
        "in memory only",
        "timing",
    ):
        assert phrase in text, phrase
    assert json.loads(report.to_json()) == report.to_dict()
    assert report.layers == 4 and report.heads == 8
    assert report.warnings[0] == ROW and "calibration" in report.warnings[1]


def test_mechanism_none_is_not_called_private(pipe: Any, exact: Any) -> None:
    handle = dpx.protect(pipe, exact)
    picture(pipe, PROMPT)
    report = handle.report()
    assert report.releases[0]["epsilon"] is None and report.releases[0]["spent_epsilon"] == "unbounded"
    assert (
        "NOT PRIVATE" in str(report) and "differentially private" not in report.releases[0]["guarantee_text"]
    )


@pytest.mark.parametrize("mechanism", ["none", "kernel_sum"])
def test_protect_warns_once_at_the_callers_line(mechanism: str, pipe: Any, private: Any) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        dpx.protect(pipe, private.replace(mechanism=mechanism))
        picture(pipe, PROMPT)
    ours = [w for w in caught if "calibration" in str(w.message) or "NOT private" in str(w.message)]
    assert len(ours) == 1 and ours[0].filename == __file__
