"""`calibrate` for Mllama: public images in, calibrations of both kinds out."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import hf_dp_xattn as dpx
from hf_dp_xattn.calibration.calibration_options import CalibrationOptions
from hf_dp_xattn.hosts.transformers.mllama.public_images import _encode

from .tiny import PATCHES, generate, images, texts, tiny

EPSILONS = (8.0,)


def public(count: int = 80, tiles: int = 2) -> dict[str, torch.Tensor]:
    mask = torch.tensor([1] * tiles + [0] * (2 - tiles)).expand(count, 1, 2)
    pixels = torch.randn(count, 1, 2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    return {
        "pixel_values": pixels * mask[..., None, None, None],
        "aspect_ratio_ids": torch.full((count, 1), tiles),
        "aspect_ratio_mask": mask,
    }


def calibrate(model: Any, config: dpx.DPXAttnConfig, given: Any = None, **options: Any) -> Any:
    options = {"anchors": 16, "steps": 6, "rank": 8, "query_prompts": 4, "query_steps": 4, **options}
    given = public() if given is None else given
    return dpx.calibrate(model, given, config, epsilons=EPSILONS, progress=False, **options)


@pytest.mark.parametrize("unit", ["row", "context"])
@pytest.mark.parametrize("mechanism", ["kernel_sum", "anchors"])
def test_from_public_images_to_a_text(mechanism: str, unit: str, private: dpx.DPXAttnConfig) -> None:
    model = tiny()
    config = private.replace(mechanism=mechanism, projection_dim=16, unit=unit)
    random = torch.get_rng_state()
    options = {"releases": ("sum", "histogram") if unit == "row" else ("sum",)}
    calibration = calibrate(model, config, questions=[[60, 7, 8], [60, 9, 10]], **options)
    assert torch.equal(random, torch.get_rng_state())
    handle = dpx.protect(model, config, calibration=calibration, allow_useless=True)
    assert bool(generate(model, {**images(), **texts()})[1].isfinite().any())
    assert all(r["guarantee"]["calibrated"] for r in handle.report().releases)


def test_rows_of_padding_tiles_are_left_out() -> None:
    model = tiny()
    with torch.no_grad():
        options = CalibrationOptions(memory_mb=64)
        both, one = (_encode(model, public(6, t), options) for t in (2, 1))
        vision = model.model.vision_model(**public(6, 1)).last_hidden_state
        want = model.model.multi_modal_projector(vision)[:, 0, 0]
    assert (both.shape, one.shape) == ((6, 2 * PATCHES, 32), (6, PATCHES, 32))
    assert torch.allclose(one.float(), want, atol=2e-2)


def test_what_cannot_be_calibrated(private: dpx.DPXAttnConfig) -> None:
    model = tiny()
    with pytest.raises(dpx.ConfigError, match="one number of tiles"):
        calibrate(model, private, {n: torch.cat([t] * 4) for n, t in images().items()})
    with pytest.raises(dpx.ConfigError, match="unit"):
        calibrate(model, private.replace(unit="group"))
    with pytest.raises(dpx.ConfigError, match="public_head"):
        calibrate(model, private, public_head=1)
    with pytest.raises(dpx.ConfigError, match="questions"):
        calibrate(model, private, questions=[[]])
    dpx.protect(model, private)
    with pytest.raises(dpx.ConfigError, match="before"):
        calibrate(model, private)
