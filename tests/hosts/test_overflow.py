"""No finite context is refused after it was charged, on any host and in any precision: that would tell it from its neighbour."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import pytest
import torch

import hf_dp_xattn as dpx
from hf_dp_xattn.hosts.making import ContextRecipe, LayerRecipe
from hf_dp_xattn.mechanisms.anchors.move import RowMove
from hf_dp_xattn.mechanisms.anchors.plan import Decoders

from ..hosts_tiny import CHANNELS, tiny_unet
from . import anchor_calibrations
from .transformers.decoder_only import calibrations as prefix_calibrations
from .transformers.decoder_only import tiny as decoders
from .transformers.encoder_decoder import calibrations as seq2seq_calibrations
from .transformers.encoder_decoder import tiny as seq2seq
from .transformers.mllama import protecting as image_calibrations
from .transformers.mllama import tiny as images

HALF, BRAIN, SINGLE, DOUBLE = torch.float16, torch.bfloat16, torch.float32, torch.float64
DTYPES = (HALF, BRAIN, SINGLE, DOUBLE)
SHAPES = ("largest", "most negative", "mixed", "one huge row", "smallest", "denormal and largest", "zero")
CONFIG = dpx.DPXAttnConfig(
    unit="row", mechanism="kernel_sum", epsilon=8.0, delta=1e-5, degree=1, projection_dim=4, tree_bins=4
)
LAYERED = ("kernel_sum", "dptree", "none")
ANCHORS = ("sum", "response", "histogram", "mixed")
N = 5


def extreme(shape: str, channels: int, dtype: torch.dtype, n: int = N) -> torch.Tensor:
    """[n, channels] finite numbers at the ends of a dtype's range."""
    info = torch.finfo(dtype)
    gen = torch.Generator().manual_seed(0)
    sign = torch.randint(0, 2, (n, channels), generator=gen).to(dtype) * 2 - 1
    one, largest = torch.ones(1, dtype=dtype), torch.full((1,), info.max, dtype=dtype)
    rows = {
        "largest": torch.full((n, channels), info.max, dtype=dtype),
        "most negative": torch.full((n, channels), info.min, dtype=dtype),
        "mixed": sign * info.max,
        "one huge row": sign * torch.where(torch.arange(n).unsqueeze(1) == 1, largest, one),
        "smallest": sign * info.smallest_normal,
        "denormal and largest": torch.where(sign > 0, one * (info.smallest_normal / 4), largest),
        "zero": torch.zeros(n, channels, dtype=dtype),
    }[shape]
    assert bool(rows.isfinite().all()) and rows.dtype == dtype
    return rows


@functools.cache
def model(kind: str, dtype: torch.dtype) -> Any:
    builders = {
        "unet": tiny_unet,
        "image": images.tiny,
        "llama": lambda: decoders.tiny("llama"),
    }
    built = builders[kind]() if kind in builders else seq2seq.tiny(kind)
    return built.to(dtype)


def mixed(host: Any) -> Any:
    """A calibration that releases counts beside a sum."""
    found = anchor_calibrations.calibration_for(host, "histogram")
    (plan,) = found.plans
    cells, width = plan.codes.shape[1:]
    move = RowMove(
        torch.tensor(0.1), torch.zeros(cells, width), torch.zeros(found.channels, width), torch.eye(width)
    )
    decoders_ = Decoders(None, found.decoders.cells, move)
    return dataclasses.replace(found, plans=(dataclasses.replace(plan, release="mixed"),), decoders=decoders_)


# contexts that half precision cannot tell apart are charged as one
ROOM = dpx.Budget(1000.0, 0.1)


def protect(kind: str, dtype: torch.dtype, mechanism: str, **changes: Any) -> Any:
    host, ledger = model(kind, dtype), dpx.Ledger()
    if mechanism in LAYERED:
        return dpx.protect(host, CONFIG.replace(mechanism=mechanism, **changes), ledger=ledger, budget=ROOM)
    config = CONFIG.replace(mechanism="anchors", **changes)
    if kind == "unet":
        make = (
            mixed
            if mechanism == "mixed"
            else functools.partial(anchor_calibrations.calibration_for, release=mechanism)
        )
        return dpx.protect(host, config, calibration=make(host), ledger=ledger, budget=ROOM)
    kinds = {"llama": prefix_calibrations, "image": image_calibrations}
    return kinds.get(kind, seq2seq_calibrations).protect(host, config, ledger=ledger, budget=ROOM)


def check_released(release: Any) -> None:
    """What queries read is finite."""
    (context,) = release.contexts
    tensors = [t for s in context.structures for t in s.tensors().values()]
    if context.context is not None:
        tensors += [context.context.rows, context.context.log_weights]
    assert tensors and all(bool(t.isfinite().all()) for t in tensors if t.is_floating_point())


@pytest.mark.slow
@pytest.mark.parametrize("mechanism", [*LAYERED, *ANCHORS])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_embeddings_of_any_finite_numbers_are_released(dtype: torch.dtype, mechanism: str) -> None:
    """In the host's own precision, and in double precision, which a cast overflows."""
    with protect("unet", dtype, mechanism) as handle:
        for given in {dtype, DOUBLE}:
            for shape in SHAPES if mechanism != "mixed" else SHAPES[2:4]:  # its noise takes seconds
                check_released(handle.release(extreme(shape, CHANNELS, given)))


@pytest.mark.parametrize(
    ("unit", "neighboring"),
    [("group", "replace_one"), ("group", "add_or_remove_one"), ("context", "replace_one")],
)
@pytest.mark.parametrize("mechanism", ["kernel_sum", "dptree"])
def test_units_of_several_rows(mechanism: str, unit: str, neighboring: str) -> None:
    groups = torch.tensor([0, 0, 1, 1, 2]) if unit == "group" else None
    for dtype in (HALF, SINGLE):
        with protect("unet", dtype, mechanism, unit=unit, neighboring=neighboring) as handle:
            for shape in SHAPES:
                check_released(handle.release(extreme(shape, CHANNELS, DOUBLE), groups=groups))


@pytest.mark.parametrize("mechanism", [*LAYERED, "anchors"])
@pytest.mark.parametrize("dtype", [HALF, BRAIN, SINGLE], ids=str)
@pytest.mark.parametrize("kind", ["bart", "image"])
def test_rows_of_an_encoders_output(kind: str, dtype: torch.dtype, mechanism: str) -> None:
    with protect(kind, dtype, mechanism) as handle:
        for given in {dtype, DOUBLE}:
            for shape in SHAPES:
                check_released(handle.release(extreme(shape, handle.host.channels, given)))


@pytest.mark.parametrize("mechanism", ["kernel_sum", "anchors"])
@pytest.mark.parametrize("dtype", [HALF, BRAIN, SINGLE], ids=str)
def test_an_encoder_that_overflows(dtype: torch.dtype, mechanism: str) -> None:
    """Finite inputs, of which an encoder makes NaN or infinity."""
    for kind, name in (("t5", "inputs_embeds"), ("vit2gpt2", "pixel_values")):
        with protect(kind, dtype, mechanism) as handle:
            for given in {dtype, DOUBLE}:
                for shape in SHAPES[:6]:
                    if name == "pixel_values":
                        inputs = extreme(shape, 8, given, 24).reshape(1, 3, 8, 8)
                    else:
                        inputs = extreme(shape, 16, given).unsqueeze(0)
                    check_released(handle.release(**{name: inputs}))


@pytest.mark.parametrize("mechanism", ["kernel_sum", "anchors"])
@pytest.mark.parametrize("dtype", [HALF, BRAIN, SINGLE], ids=str)
def test_an_image_of_any_finite_pixels(dtype: torch.dtype, mechanism: str) -> None:
    with protect("image", dtype, mechanism) as handle:
        for given in {dtype, DOUBLE}:
            for shape in SHAPES[:6]:
                image = images.images(1)
                pixels = extreme(shape, 8, given, 48).reshape(image["pixel_values"].shape)
                check_released(handle.release(**{**image, "pixel_values": pixels}))


@pytest.mark.parametrize("mechanism", ["kernel_sum", "anchors"])
@pytest.mark.parametrize("dtype", [HALF, BRAIN, SINGLE], ids=str)
def test_a_prefix_that_overflows_inside_the_model(dtype: torch.dtype, mechanism: str) -> None:
    """One token's values overflow in the last layer: what holds it is released like its neighbour."""
    with protect("llama", dtype, mechanism) as handle:
        embedding = handle.model.get_input_embeddings().weight
        values = handle.model.model.layers[-1].self_attn.v_proj.weight
        before = embedding.detach().clone(), values.detach().clone()
        with torch.no_grad():
            embedding[7] = 0
            embedding[7, 0], values[:, 0] = 100.0, torch.finfo(dtype).max / 3
        try:
            head, overflows = torch.zeros(0, dtype=torch.int64), []
            for ids in ([3, 4, 5], [3, 7, 5], [7, 7]):
                rows, _ = handle.host.encoder.encode(head, [torch.tensor(ids)])
                overflows.append((~rows.isfinite().all(1)).tolist())
                check_released(handle.release(ids))
            assert overflows == [[False, False, False], [False, True, False], [True, True]]
        finally:
            with torch.no_grad():
                embedding.copy_(before[0])
                values.copy_(before[1])


@pytest.mark.parametrize("mechanism", ["kernel_sum", "sum", "histogram", "response"])
def test_a_growing_context(mechanism: str) -> None:
    with protect("unet", HALF, mechanism) as handle:
        release = handle.release(extreme("mixed", CHANNELS, HALF), horizon=8)
        for shape in SHAPES:
            if shape != "mixed":
                release.append(extreme(shape, CHANNELS, HALF))
            check_released(release)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("mechanism", ["kernel_sum", "sum"])
def test_numbers_that_are_not_finite_are_refused_before_the_charge(mechanism: str, bad: float) -> None:
    """Assumed of what the user gives (docs/guarantee.md); nothing is spent, and nothing is encoded."""
    rows = extreme("zero", CHANNELS, SINGLE)
    rows[2, 3] = bad
    with protect("unet", SINGLE, mechanism) as handle:
        with pytest.raises(dpx.ContextError, match="nothing was spent"):
            handle.release(rows)
        assert not handle.ledger.entries()
    with protect("bart", SINGLE, "kernel_sum") as handle:
        for name in ("inputs_embeds", "encoder_outputs"):
            with pytest.raises(dpx.ContextError, match="nothing was spent"):
                handle.release(**{name: rows[:, :16].unsqueeze(0)})
        assert not handle.ledger.entries()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_one_way_in(dtype: torch.dtype) -> None:
    """Whatever a cast, an encoder or a projection made of a row: finite, and of ordinary numbers unchanged."""
    rows = torch.tensor([[torch.nan, torch.inf, -torch.inf, 1.5] * (CHANNELS // 4)], dtype=DOUBLE)
    ends = torch.finfo(SINGLE)
    found = ContextRecipe(None).private(rows.to(dtype), None)  # type: ignore[arg-type]
    assert torch.equal(found[0, :4], torch.tensor([0.0, ends.max, ends.min, 1.5]))
    with protect("unet", dtype, "none") as handle:
        recipe = handle.guard.prepare(handle.guard.fingerprint())
        assert isinstance(recipe, LayerRecipe)
        given = recipe.private(rows, None)
        assert all(bool(t.isfinite().all()) for t in (*given.keys, *given.values))
