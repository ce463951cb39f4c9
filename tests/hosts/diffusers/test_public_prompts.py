"""dpx.calibrate for anchors: from public prompts to a protected pipeline, for every unit; what is refused, and memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import hf_dp_xattn as dpx
from hf_dp_xattn.calibration.anchors.anchors_calibration import AnchorCalibration
from hf_dp_xattn.calibration.anchors.slot_schedule import slot_schedule
from hf_dp_xattn.calibration.anchors.slots_fit import SlotSettings
from hf_dp_xattn.calibration.library.text_library import TextLibrary
from hf_dp_xattn.calibration.public_data import choose_contexts, equal_contexts
from hf_dp_xattn.hosts.diffusers.architectures import find_layers
from hf_dp_xattn.hosts.layer import row_flops

from ...hosts_tiny import picture, tiny_unet

NAMES = [
    f"a {c} {s} {p}"
    for c in ("red", "blue", "dark")
    for s in ("cat", "dog", "car", "sun")
    for p in ("up", "low", "in", "by")
]
PUBLIC = [f"{a}, {b}" for i, a in enumerate(NAMES) for b in NAMES[i % 5 :: 16]]


def config(**changes: Any) -> dpx.DPXAttnConfig:
    return dpx.DPXAttnConfig(**{"mechanism": "anchors", "unit": "row", **changes})


def calibrate(
    pipe: Any, public: Any = PUBLIC, settings: dpx.DPXAttnConfig | None = None, **kwargs: Any
) -> AnchorCalibration:
    options = {
        "epsilons": (1.0, 8.0),
        "anchors": 16,
        "steps": 8,
        "query_prompts": 2,
        "query_steps": 2,
        "progress": False,
    }
    result = dpx.calibrate(pipe, public, config() if settings is None else settings, **{**options, **kwargs})
    assert isinstance(result, AnchorCalibration)
    return result


@pytest.mark.parametrize(
    ("unit", "grouping"), [("row", "rows"), ("group", "phrases"), ("context", "context")]
)
@pytest.mark.slow
def test_from_public_prompts_to_a_protected_picture(pipe: Any, unit: str, grouping: str) -> None:
    calibration = calibrate(pipe, settings=config(unit=unit))
    assert calibration.grouping == grouping and calibration.contexts == len(PUBLIC)
    assert [p.epsilon for p in calibration.plans] == [1.0, 8.0]
    with dpx.protect(pipe, config(unit=unit), calibration=calibration, allow_useless=True) as protected:
        assert torch.isfinite(picture(pipe, "a red dog by, a blue sun in")).all()
        report = protected.report()
    (release,) = report.releases
    assert release["guarantee"]["units"] == {"row": 7, "group": 2, "context": 1}[unit] or unit == "row"
    assert release["guarantee"]["is_private"] and release["spent_epsilon"] <= 8.0 + 1e-9


def test_a_library_is_what_calibrate_makes_by_default(pipe: Any) -> None:
    calibration = dpx.calibrate(pipe, PUBLIC, epsilons=(8.0,), progress=False)
    assert isinstance(calibration, TextLibrary) and calibration.unit == "group"


@pytest.mark.slow
def test_lists_of_phrases_are_the_same_as_prompts_that_split_into_them(pipe: Any) -> None:
    lists = [p.split(", ") for p in PUBLIC]
    a, b = (calibrate(pipe, public, config(unit="group")) for public in (PUBLIC, lists))
    assert all(torch.equal(p.matrix, q.matrix) for p, q in zip(a.plans, b.plans, strict=True))


@pytest.mark.slow
def test_embeddings_without_a_text_encoder_work_too(pipe: Any) -> None:
    channels = pipe.unet.config.cross_attention_dim
    rows = torch.randn(80, 7, channels, generator=torch.Generator().manual_seed(0))
    calibration = calibrate(pipe, rows)
    with dpx.protect(pipe, config(), calibration=calibration, allow_useless=True) as protected:
        assert protected.release(rows[0]).guarantees[0].rows == 7


@pytest.mark.slow
def test_the_pipeline_and_the_random_state_are_left_alone(pipe: Any) -> None:
    torch.manual_seed(3)
    before, state = picture(pipe, "a red dog"), torch.get_rng_state()
    weights = {k: v.clone() for k, v in pipe.unet.state_dict().items()}
    calibrate(pipe)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(v, weights[k]) for k, v in pipe.unet.state_dict().items())
    assert all(p.grad is None for p in pipe.unet.parameters())
    assert torch.equal(picture(pipe, "a red dog"), before)


@pytest.mark.slow
def test_it_is_reproducible(pipe: Any) -> None:
    a, b = calibrate(pipe), calibrate(pipe)
    assert all(
        torch.equal(p.matrix, q.matrix) and p.quality == q.quality
        for p, q in zip(a.plans, b.plans, strict=True)
    )


@pytest.mark.parametrize(
    ("public", "changes", "options", "message"),
    [
        (PUBLIC[:20], {}, {}, "at least 64"),
        ("one prompt", {}, {}, "list of contexts"),
        ([["a", "b"]] * 80, {}, {}, "Lists of phrases"),
        (PUBLIC, {"unit": "group"}, {"grouping": "rows"}, "phrases"),
        (PUBLIC, {"unit": "context"}, {"grouping": "rows"}, "expected one of"),
        (
            PUBLIC,
            {"unit": "group", "neighboring": "add_or_remove_one"},
            {"releases": ("response",)},
            "possible: sum",
        ),
        (torch.full((80, 7, 4), float("nan")), {}, {}, "NaN"),
    ],
    ids=[
        "too few",
        "a string",
        "phrases for rows",
        "grouping",
        "grouping of a context",
        "relation",
        "NaN",
    ],
)
def test_bad_input_is_refused(
    pipe: Any, public: Any, changes: dict[str, Any], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(dpx.ConfigError, match=message):
        calibrate(pipe, public, config(**changes), **options)


def test_only_what_fits_the_memory_is_chosen_before_encoding() -> None:
    many = [str(i) for i in range(1_000_000)]
    chosen = choose_contexts(many, bytes_each=1 << 20, memory_mb=100, seed=0)
    assert len(chosen) == 100 and len(set(chosen)) == 100
    assert chosen == choose_contexts(many, bytes_each=1 << 20, memory_mb=100, seed=0)
    assert choose_contexts(many[:50], bytes_each=1 << 20, memory_mb=100, seed=0) == many[:50]


def test_large_hosts_get_smaller_batches() -> None:
    def schedule(layers: dict[str, Any], steps: int | None = None) -> SlotSettings:
        public = equal_contexts(torch.zeros(1, 77, 4), "row")
        return slot_schedule(public, row_flops(layers.values()), steps, 0)

    small = schedule(find_layers(tiny_unet()))
    assert small.steps == 3000 and small.batch == 48
    with torch.device("meta"):
        wide = find_layers(tiny_unet(block_out_channels=(320, 640), cross_attention_dim=768))
    large = schedule(wide)
    assert large.batch < small.batch and large.layers < small.layers
    assert large.steps == small.steps  # how long it goes on is for `minutes` to say
    assert schedule(wide, 12).steps == 12
