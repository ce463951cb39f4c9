from __future__ import annotations

import math
import warnings

import pytest
import torch

import hf_dp_xattn.mechanisms.kernel_sum.kernel_sum as kernel_sum
from hf_dp_xattn.config import DPXAttnConfig
from hf_dp_xattn.errors import ConfigError, ContextError
from hf_dp_xattn.mechanisms.base import LayerSpec
from hf_dp_xattn.mechanisms.inputs import LayerRows
from hf_dp_xattn.mechanisms.kernel_sum.features import taylor_relative_error
from hf_dp_xattn.mechanisms.merge import exact_partial, merge
from hf_dp_xattn.mechanisms.registry import prepare_release
from hf_dp_xattn.mechanisms.release_attention import release_attention
from hf_dp_xattn.mechanisms.structure import ExactStructure, KernelSumStructure, stack
from hf_dp_xattn.privacy.accountant import epsilon_of
from hf_dp_xattn.privacy.bits import SeededEntropy

from .kernel_sum.geometries import random_geometry
from .kernel_sum.naive_kernel_sum import naive_attend, naive_sum
from .paper_bounds import attention_relative_error

LOUD = DPXAttnConfig(
    mechanism="kernel_sum", unit="row", epsilon=1e6, logit_bound=1.0
)  # so little noise that the approximation itself is seen


def rows(
    b: int, h: int, n: int, d: int, dv: int, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    gen = torch.Generator().manual_seed(seed)
    key = torch.randn(b, h, n, d, generator=gen)
    key = (
        key / key.norm(dim=-1, keepdim=True) * d**0.25 * 0.9
    )  # inside the declared range: nothing is clipped
    query = torch.randn(b, h, 9, d, generator=gen)
    query = query / query.norm(dim=-1, keepdim=True) * d**0.25 * 0.9
    value = torch.rand(b, h, n, dv, generator=gen)
    return key, value, query


def quiet(*args, **kwargs):  # type: ignore[no-untyped-def]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return release_attention(*args, **{"allow_useless": True, **kwargs})


@pytest.mark.parametrize(
    "shape",
    [(1, 1, 5, 4, 3), (2, 3, 77, 8, 8), (1, 2, 300, 16, 4)],
    ids=lambda s: "B{}H{}n{}d{}dv{}".format(*s),
)
@pytest.mark.parametrize("degree", [1, 2, 3, 4])
def test_attend_is_within_the_papers_relative_error(shape: tuple[int, ...], degree: int) -> None:
    key, value, query = rows(*shape)
    out = quiet(key, value, LOUD.replace(degree=degree)).attend(query)
    exact = torch.softmax(query @ key.mT / math.sqrt(shape[3]), -1) @ value
    bound = attention_relative_error(taylor_relative_error(0.81, degree))
    assert float(((out - exact).abs() / exact).max()) <= bound * 1.01 + 5e-3
    if degree == 4:
        assert float((out - exact).norm() / exact.norm()) < 5e-3


@pytest.mark.parametrize("unit", ["row", "group", "context"])
@pytest.mark.parametrize("degree", [0, 2, 3])
def test_structure_equals_the_naive_twin(unit: str, degree: int) -> None:
    """The whole path (lattice, clipping, fold, floor, attend) against explicit loops, at negligible noise."""
    geometry = random_geometry(2, 4, 3, seed=5)
    config = LOUD.replace(degree=degree, unit=unit, epsilon=1e9)
    gen = torch.Generator().manual_seed(1)
    key, value = torch.randn(2, 8, 4, generator=gen), torch.randn(2, 8, 3, generator=gen)
    groups = torch.tensor([0, 0, 1, 1, 1, 2, 2, 2]) if unit == "group" else None
    units = {
        "row": [[i] for i in range(8)],
        "group": [[0, 1], [2, 3, 4], [5, 6, 7]],
        "context": [list(range(8))],
    }[unit]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernel_sum, "geometry_of", lambda spec, config: geometry)
        prepared = prepare_release(config, [LayerSpec("layer", 2, 4, 3, geometry.scale)])
    assert isinstance(prepared, kernel_sum.PreparedKernelSum)
    released = prepared.run(LayerRows([key], [value]), groups=groups).structures[0]
    assert isinstance(released, KernelSumStructure)
    sums = naive_sum([geometry], degree, [key], [value], prepared.clip_norm, units)[0]
    query = torch.randn(2, 6, 4, generator=gen)
    naive = naive_attend(geometry, degree, sums, query, released.floor.flatten().tolist())
    torch.testing.assert_close(released.attend(query[None])[0].double(), naive, rtol=5e-3, atol=5e-3)


def test_noise_is_what_the_accountant_says() -> None:
    """y - (exact sum) over a release has standard deviation sigma: within 6 standard errors (false alarm < 1e-8)."""
    key, value, _ = rows(1, 2, 20, 8, 8)
    config = DPXAttnConfig(mechanism="kernel_sum", unit="row", epsilon=3.0, delta=1e-6)
    prepared = prepare_release(config, [LayerSpec("a", 2, 8, 8, 8**-0.5)])
    assert isinstance(prepared, kernel_sum.PreparedKernelSum)
    event = prepared.events[0]
    assert 0.999 * 3.0 < epsilon_of([event], 1e-6) <= 3.0
    assert event.sensitivity == 2 * prepared.bound
    silent = kernel_sum.sum_rows(prepared.encoders, [key[0]], [value[0]], prepared.bound)[0]
    seen = []
    original = kernel_sum.layer_structure

    def spy(encoder, sums, *rest):  # type: ignore[no-untyped-def]
        seen.append(sums.clone())
        return original(encoder, sums, *rest)

    kernel_sum.layer_structure = spy
    try:
        guarantee = prepared.run(LayerRows([key[0]], [value[0]])).guarantee
    finally:
        kernel_sum.layer_structure = original
    noise = (seen[0] - silent.double() * 2.0 ** -prepared.encoders[0].exponent).flatten()
    ratio = float(noise.std()) / guarantee.sigma
    tolerance = 6.0 / math.sqrt(2 * noise.numel())
    assert abs(ratio - 1) < tolerance
    assert abs(0.5 * ratio - 1) > tolerance  # power: half the noise is caught


def test_add_or_remove_needs_half_the_noise_and_does_not_use_n() -> None:
    replace = prepare_release(
        DPXAttnConfig(mechanism="kernel_sum", unit="row"), [LayerSpec("a", 1, 4, 4, 0.5)]
    )
    remove = prepare_release(
        DPXAttnConfig(mechanism="kernel_sum", unit="row", neighboring="add_or_remove_one"),
        [LayerSpec("a", 1, 4, 4, 0.5)],
    )
    assert isinstance(replace, kernel_sum.PreparedKernelSum) and isinstance(
        remove, kernel_sum.PreparedKernelSum
    )
    assert math.isclose(math.sqrt(replace.sigma_squared / remove.sigma_squared), 2.0, rel_tol=1e-5)
    key, value, _ = rows(1, 1, 30, 4, 4)
    counts = {
        name: float(
            quiet(
                key,
                value,
                DPXAttnConfig(mechanism="kernel_sum", unit="row", neighboring=name),
                entropy=SeededEntropy(1),
            ).structure.sums[0, 0, 0, -1]
        )
        for name in ("replace_one", "add_or_remove_one")
    }
    assert counts["replace_one"] == 30.0, "n is public under replace_one"
    assert counts["add_or_remove_one"] != 30.0, (
        "n is private under add_or_remove_one: the count must be noised"
    )


def test_counts_that_are_private_are_not_stated() -> None:
    key, value, _ = rows(1, 1, 30, 4, 4)
    kept = quiet(key, value, DPXAttnConfig(mechanism="kernel_sum", unit="row")).guarantees[0]
    hidden = quiet(
        key, value, DPXAttnConfig(mechanism="kernel_sum", unit="row", neighboring="add_or_remove_one")
    ).guarantees[0]
    assert (kept.rows, kept.units) == (30, 30)
    assert (hidden.rows, hidden.units) == (None, None) and "30" not in repr(hidden)


def test_torch_seed_does_not_fix_the_noise() -> None:
    key, value, query = rows(1, 1, 10, 4, 4)
    outs = []
    for _ in range(2):
        torch.manual_seed(0)
        outs.append(quiet(key, value, DPXAttnConfig(mechanism="kernel_sum", unit="row")).attend(query))
    assert not torch.equal(*outs)


def test_seeded_noise_is_reproducible_and_labelled_not_private() -> None:
    key, value, query = rows(1, 1, 10, 4, 4)
    a, b = (
        quiet(key, value, DPXAttnConfig(mechanism="kernel_sum", unit="row"), entropy=SeededEntropy(7))
        for _ in range(2)
    )
    assert torch.equal(a.attend(query), b.attend(query))
    assert not a.guarantees[0].is_private and "NOT PRIVATE" in a.guarantees[0].sentence()
    assert quiet(key, value, DPXAttnConfig(mechanism="kernel_sum", unit="row")).guarantees[0].is_private


@pytest.mark.parametrize("mechanism", ["kernel_sum", "none"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_dtypes(mechanism: str, dtype: torch.dtype) -> None:
    key, value, query = (t.to(dtype) for t in rows(1, 2, 12, 8, 8))
    out = quiet(key, value, LOUD.replace(mechanism=mechanism)).attend(query)
    exact = torch.softmax(query.float() @ key.float().mT / math.sqrt(8), -1) @ value.float()
    assert out.dtype == dtype
    assert float((out.float() - exact).norm() / exact.norm()) < 0.05


def test_none_is_exact() -> None:
    key, value, query = rows(2, 3, 33, 8, 5)
    out = quiet(key, value, DPXAttnConfig(unit="row", mechanism="none"), scale=0.3).attend(query)
    torch.testing.assert_close(out, torch.softmax(query @ key.mT * 0.3, -1) @ value)


def test_merge_with_public_rows_is_exact_attention_over_the_union() -> None:
    key, value, query = rows(1, 2, 40, 8, 4)
    released = quiet(key[:, :, :30], value[:, :, :30], LOUD.replace(degree=4)).structure
    assert isinstance(released, KernelSumStructure)
    public = exact_partial(query, key[:, :, 30:], value[:, :, 30:], 8**-0.5)
    out = merge(*released.partial(query), *public)[0].to(query.dtype)
    exact = torch.softmax(query @ key.mT / math.sqrt(8), -1) @ value
    assert float((out - exact).norm() / exact.norm()) < 5e-3
    wrong = released.attend(query)  # power: leaving the public rows out is noticed
    assert float((wrong - exact).norm() / exact.norm()) > 5e-3


def test_positive_random_features_approximate_attention() -> None:
    key, value, query = rows(1, 2, 40, 8, 4)
    out = quiet(key, value, LOUD.replace(features="positive_random", num_features=2048)).attend(query)
    exact = torch.softmax(query @ key.mT / math.sqrt(8), -1) @ value
    assert float((out - exact).norm() / exact.norm()) < 0.1


def test_stack_and_select() -> None:
    key, value, query = rows(2, 2, 12, 8, 4)
    both = quiet(key, value, LOUD).structure
    swapped = both.select(torch.tensor([1, 0]))
    torch.testing.assert_close(swapped.attend(query.flip(0)), both.attend(query).flip(0))
    torch.testing.assert_close(
        stack([swapped.select(torch.tensor([1])), swapped.select(torch.tensor([0]))]).attend(query),
        both.attend(query),
    )
    exact = ExactStructure(key, value, 0.5)
    torch.testing.assert_close(exact.select(torch.tensor([1])).attend(query[1:]), exact.attend(query)[1:])


def test_queries_in_chunks_agree() -> None:
    key, value, _ = rows(1, 2, 12, 8, 4)
    structure = quiet(key, value, LOUD).structure
    query = torch.randn(1, 2, 5000, 8, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(structure.attend(query)[:, :, 4990:], structure.attend(query[:, :, 4990:]))


def test_without_calibration_a_warning_says_what_it_would_gain() -> None:
    key, value, _ = rows(1, 1, 5, 4, 4)
    with pytest.warns(UserWarning, match="calibration"):
        release_attention(key, value, LOUD)


@pytest.mark.parametrize(("unit", "epsilon", "n"), [("row", 1.0, 20), ("row", 8.0, 5), ("context", 8.0, 50)])
def test_what_would_be_noise_is_refused(unit: str, epsilon: float, n: int) -> None:
    """Refused before anything private is read; what is refused is further off than no answer at all, and what is not refused says so."""
    config = DPXAttnConfig(mechanism="kernel_sum", unit=unit, epsilon=epsilon)
    key, value, query = rows(1, 2, n, 8, 8)
    with pytest.raises(ContextError, match="too few for epsilon"):
        release_attention(key * math.nan, value, config)
    exact = torch.softmax(query @ key.mT / math.sqrt(8), -1) @ value
    out = quiet(key, value, config, entropy=SeededEntropy(3)).attend(query)
    assert float((out - exact).square().sum()) > float(exact.square().sum())
    if unit == "context":  # it has no other relation
        return
    # where their number is private no choice may hang on it
    hidden = config.replace(neighboring="add_or_remove_one")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        release_attention(key, value, hidden)


def test_many_rows_are_enough() -> None:
    key, value, query = rows(1, 2, 5000, 8, 8)
    config = DPXAttnConfig(mechanism="kernel_sum", unit="row", epsilon=8.0)
    out = quiet(key, value, config, allow_useless=False, entropy=SeededEntropy(3)).attend(query)
    exact = torch.softmax(query @ key.mT / math.sqrt(8), -1) @ value
    assert float((out - exact).square().sum()) < 0.2 * float(exact.square().sum())


@pytest.mark.parametrize(
    ("key_shape", "value_shape"),
    [
        ((2, 5, 4), (2, 5, 4)),
        ((1, 2, 0, 4), (1, 2, 0, 4)),
        ((1, 2, 5, 4), (1, 2, 6, 4)),
        ((1, 2, 5, 4), (1, 3, 5, 4)),
        ((1, 2, 5, 0), (1, 2, 5, 4)),
    ],
    ids=["rank", "n=0", "n differs", "heads differ", "d=0"],
)
def test_bad_shapes(key_shape: tuple[int, ...], value_shape: tuple[int, ...]) -> None:
    with pytest.raises(ContextError):
        quiet(
            torch.zeros(key_shape),
            torch.zeros(value_shape),
            DPXAttnConfig(mechanism="kernel_sum", unit="row"),
        )


@pytest.mark.parametrize("mechanism", ["kernel_sum", "none"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf], ids=str)
def test_nan_and_inf_are_refused(bad: float, mechanism: str) -> None:
    key, value, _ = rows(1, 1, 5, 4, 4)
    value[0, 0, 3, 1] = bad
    with pytest.raises(ContextError, match="NaN or Inf"):
        quiet(key, value, DPXAttnConfig(unit="row", mechanism=mechanism))


def test_bad_scale_groups_and_dtype() -> None:
    key, value, _ = rows(1, 1, 5, 4, 4)
    for scale in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ConfigError, match="scale"):
            quiet(key, value, DPXAttnConfig(mechanism="kernel_sum", unit="row"), scale=scale)
    with pytest.raises(ConfigError, match="groups"):
        quiet(
            key,
            value,
            DPXAttnConfig(mechanism="kernel_sum", unit="group"),
            groups=torch.zeros(7, dtype=torch.long),
        )
    with pytest.raises(ContextError, match="floating-point"):
        quiet(key.long(), value.long(), DPXAttnConfig(mechanism="kernel_sum", unit="row"))
    with pytest.raises(ConfigError, match="query must be"):
        quiet(key, value, DPXAttnConfig(mechanism="kernel_sum", unit="row")).attend(torch.zeros(1, 1, 3, 5))
