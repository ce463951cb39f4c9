from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import EulerDiscreteScheduler

import hf_dp_xattn as dpx
from hf_dp_xattn.hosts.diffusers.architectures import find_layers
from hf_dp_xattn.hosts.layer import project_rows
from hf_dp_xattn.hosts.worth import ROW

from ..hosts_tiny import picture, tiny_inpaint, tiny_sd, tiny_unet

PUBLIC = [
    f"a {c} {s} {p}"
    for c in ("red", "blue", "dark")
    for s in ("cat", "dog", "car")
    for p in ("up", "low", "in", "by")
]
CONFIG = dpx.DPXAttnConfig(mechanism="kernel_sum", unit="row", epsilon=8.0, degree=1, projection_dim=3)


def calibrate(
    pipe: Any, public: Any = PUBLIC, config: dpx.DPXAttnConfig = CONFIG, **kwargs: Any
) -> dpx.Calibration:
    options = {
        "rank": 8,
        "epsilons": (1.0, 8.0),
        "query_prompts": 2,
        "query_steps": 2,
        "progress": False,
        **kwargs,
    }
    return dpx.calibrate(pipe, public, config, **options)


def test_a_calibrated_pipeline_draws_and_says_so(pipe: Any) -> None:
    calibration = calibrate(pipe)
    with dpx.protect(pipe, CONFIG, calibration=calibration) as protected:
        assert torch.isfinite(picture(pipe, "a red dog by")).all()
        report = protected.report()
    assert report.releases[0]["guarantee"]["calibrated"] and "the calibration" in report.public
    assert report.warnings == (ROW,), "the warning about a missing calibration must be gone"


def test_the_pipeline_and_the_random_state_are_left_alone(pipe: Any) -> None:
    torch.manual_seed(3)
    before, state = picture(pipe, "a red dog"), torch.get_rng_state()
    weights = {k: v.clone() for k, v in pipe.unet.state_dict().items()}
    calibrate(pipe)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(v, weights[k]) for k, v in pipe.unet.state_dict().items())
    assert not any(m._forward_hooks for m in pipe.unet.modules())
    assert torch.equal(picture(pipe, "a red dog"), before)


def test_it_is_reproducible_and_survives_the_disk(pipe: Any, tmp_path: Path) -> None:
    first, second = calibrate(pipe), calibrate(pipe)
    assert first.plans[0].predicted_fvu == second.plans[0].predicted_fvu
    loaded = dpx.Calibration.from_pretrained(first.save_pretrained(tmp_path))
    with dpx.protect(pipe, CONFIG, calibration=loaded):
        assert torch.isfinite(picture(pipe, "a dog")).all()


@pytest.mark.parametrize("unit", ["row", "context"])
def test_embeddings_and_units(pipe: Any, unit: str) -> None:
    config = CONFIG.replace(unit=unit)
    public = torch.randn(24, 16, 32, generator=torch.Generator().manual_seed(0))
    calibration = calibrate(pipe, public, config)
    with dpx.protect(pipe, config, calibration=calibration) as protected:
        release = protected.release(torch.randn(16, 32))
        assert release.guarantees[0].unit == unit
        assert release.guarantees[0].rows == (None if unit == "context" else 16)


@pytest.mark.parametrize("host", ["inpaint", "euler"])
def test_other_hosts(host: str) -> None:
    pipe = tiny_inpaint() if host == "inpaint" else tiny_sd()
    if host == "euler":
        pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    assert calibrate(pipe).layers == tuple(find_layers(pipe.unet))


def test_bad_input_is_refused(pipe: Any) -> None:
    for public in (
        PUBLIC[:3],
        "one string",
        [1, 2],
        torch.zeros(4, 5),
        torch.full((9, 16, 32), float("nan")),
    ):
        with pytest.raises(dpx.ConfigError):
            calibrate(pipe, public)
    with dpx.protect(pipe, CONFIG), pytest.raises(dpx.ConfigError, match="Calibrate before"):
        calibrate(pipe)
    other = calibrate(tiny_sd(unet=tiny_unet(block_out_channels=(8, 24))))
    with pytest.raises(dpx.ConfigError, match="another model"):
        dpx.protect(pipe, CONFIG, calibration=other)
    assert not hasattr(pipe.unet, "_dpx_handle") and torch.isfinite(picture(pipe, "a dog")).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(16, 32), (77, 32), (300, 32)], ids=lambda s: "n{}C{}".format(*s))
def test_a_rows_keys_and_values_do_not_depend_on_other_rows(
    pipe: Any, shape: tuple[int, int], dtype: torch.dtype
) -> None:
    """The sensitivity proof takes each row's keys and values as a function of that row: the matrix products of the host must
    not let another row, however extreme, change their bits."""
    pipe.unet.to(dtype)
    gen = torch.Generator().manual_seed(0)
    rows = torch.randn(shape, generator=gen).to(dtype)
    for attn in find_layers(pipe.unet).values():
        before = project_rows(attn, rows)
        for extreme in (0.0, 1e-4, 100.0):
            changed = rows.clone()
            changed[5] = extreme
            after = project_rows(attn, changed)
            kept = torch.arange(shape[0]) != 5
            assert all(torch.equal(a[:, kept], b[:, kept]) for a, b in zip(before, after, strict=True))


def test_one_epsilon_and_a_generator_of_contexts(pipe: Any, tmp_path: Path) -> None:
    found = [
        calibrate(pipe, epsilons=(8.0,)),
        *(calibrate(pipe, (text for text in PUBLIC), epsilons=e) for e in (8.0, 8)),
    ]
    for number, calibration in enumerate(found):
        calibration.save_pretrained(tmp_path / str(number))
    first, *others = (
        {file.name: file.read_bytes() for file in (tmp_path / str(number)).iterdir()}
        for number in range(len(found))
    )
    assert first and all(other == first for other in others)


@pytest.mark.parametrize("epsilons", ["8", True, None, [], [0.0], [-1.0], ["a"], [float("nan")]], ids=str)
def test_epsilons_that_are_none(pipe: Any, epsilons: Any) -> None:
    with pytest.raises(dpx.ConfigError, match="epsilons must be positive"):
        calibrate(pipe, epsilons=epsilons)


def test_a_public_text_that_spells_the_end_token(pipe: Any) -> None:
    """The words behind it would be left out without a word."""
    end = pipe.tokenizer.eos_token
    release = dpx.protect(pipe, CONFIG).release("a red dog")
    with pytest.raises(dpx.ConfigError, match="end"):
        release.inputs(prompt=f"a {end} blue")
