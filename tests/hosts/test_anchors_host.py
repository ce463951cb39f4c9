"""`anchors` on a pipeline: rows of context space serve every layer; the calibration must be for this host; weights may change."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import hf_dp_xattn as dpx
from hf_dp_xattn.errors import ReleaseError
from hf_dp_xattn.hosts.identity import OTHER_PROJECTIONS
from hf_dp_xattn.hosts.tables import MAX_CACHED_ROWS
from hf_dp_xattn.hosts.worth import ROW
from hf_dp_xattn.mechanisms.context_rows import ContextRows

from ..hosts_tiny import CHANNELS, latents, picture, tiny_img2img, tiny_sd, tiny_unet
from .anchor_calibrations import CONFIG, RELEASES, calibration_for, protect
from .test_lora import add_lora
from .test_restore import check_restored, snapshot

PROMPT = "a red circle"


def naive_step(unet: Any, context: ContextRows, public: torch.Tensor) -> torch.Tensor:
    """diffusers' own attention over the released and the public rows; log weights by its additive mask, in double precision."""
    rows = torch.cat([context.rows.double(), public.double()]).unsqueeze(0)
    bias = torch.cat([context.log_weights.double(), public.new_zeros(len(public)).double()])
    mask = (1 + bias / 10_000).unsqueeze(0)  # which the UNet turns into (1 - mask) * -10000
    return unet(latents(1, torch.float64), 5, rows, encoder_attention_mask=mask).sample


def test_layers_of_different_numbers_of_heads() -> None:
    """As SDXL and Stable Diffusion 2 have them."""
    blocks = {
        "down_block_types": ("CrossAttnDownBlock2D",) * 2,
        "up_block_types": ("CrossAttnUpBlock2D",) * 2,
    }
    pipe = tiny_sd(unet=tiny_unet(**blocks, attention_head_dim=(2, 4)))
    words = (
        ("red", "blue", "dark", "new"),
        ("cat", "dog", "car", "tree"),
        ("at night", "in snow", "on wood", "by day"),
    )
    public = [f"a {a} {b} {c}" for a in words[0] for b in words[1] for c in words[2]]
    few = {"anchors": 8, "steps": 2, "query_prompts": 1, "query_steps": 1}
    made = dpx.calibrate(pipe, public, CONFIG, epsilons=(8.0,), releases=("sum",), progress=False, **few)
    handle = dpx.protect(pipe, CONFIG, calibration=made, allow_useless=True)
    assert {layer.heads for layer in handle.layers.values()} == {2, 4}
    assert bool(picture(pipe, PROMPT).isfinite().all())


@pytest.mark.parametrize("how", ["written", "scaled", "another parameter"])
def test_weights_that_change_between_two_steps_are_noticed(pipe: Any, how: str) -> None:
    """All steps get one tensor, and what it was read to is kept; a step after a change is what a first step would be."""
    add_lora(pipe.unet)
    handle = protect(pipe, CONFIG)
    negative = torch.randn(1, handle.release(PROMPT).contexts[0].rows, CHANNELS)
    inputs = handle.release(PROMPT).inputs()["prompt_embeds"]
    with torch.no_grad():
        states = torch.cat([negative, inputs])
        before = pipe.unet(latents(2), 5, states).sample
        assert pipe.unet(latents(2), 5, states).sample.equal(before)
        layer = next(iter(handle.layers.values())).module.to_v
        if how == "written":
            layer.base_layer.weight.mul_(1.5)
        elif how == "scaled":
            layer.scaling["style"] *= 3
        else:
            layer.base_layer.weight = torch.nn.Parameter(layer.base_layer.weight * 1.5)
        after = pipe.unet(latents(2), 5, states).sample
        assert after.equal(pipe.unet(latents(2), 5, states.clone()).sample)
    for element in (0, 1):  # the public and the private one
        assert float((after - before)[element].abs().max()) > 1e-3


@pytest.mark.parametrize("release", RELEASES)
@pytest.mark.parametrize("prompt", [None, "a wash"], ids=["alone", "beside a public prompt"])
def test_a_step_is_attention_over_released_and_public_rows(release: str, prompt: str | None) -> None:
    pipe = tiny_sd().to(torch.float64)
    plain = copy.deepcopy(pipe.unet)
    handle = dpx.protect(pipe, CONFIG, calibration=calibration_for(pipe, release))
    released = handle.release(PROMPT)
    (context,) = released.contexts
    public = context.public_rows
    assert public.shape == (1, CHANNELS) and context.context is not None and context.structures == ()
    if prompt is not None:
        public = torch.cat([public, handle.text.public_rows(prompt)])
    inputs = released.inputs(prompt=prompt)["prompt_embeds"]
    step = pipe.unet(latents(1, torch.float64), 5, inputs).sample
    expected = naive_step(plain, context.context, public)
    assert float((step - expected).abs().max()) < 1e-5 * float(expected.abs().max())
    lighter = ContextRows(context.context.rows, context.context.log_weights - 1.0)
    assert float((step - naive_step(plain, lighter, public)).abs().max()) > 1e-3  # power


def test_a_step_projects_no_released_row(pipe: Any) -> None:
    """Keys and values are computed once per release and weights, those of the negative prompt once per picture: no step calls to_k."""
    handle = protect(pipe, CONFIG)
    inputs = handle.release(PROMPT).inputs()
    sizes: list[int] = []
    pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn2.to_k.register_forward_hook(
        lambda module, args, out: sizes.append(args[0].shape[0])
    )

    def calls(steps: int, **arguments: Any) -> int:
        sizes.clear()
        picture(pipe, **inputs, num_inference_steps=steps, **arguments)
        assert set(sizes) <= {1}
        return len(sizes)

    alone = calls(4, guidance_scale=1.0)  # the fingerprint's probes at each call
    assert calls(9, guidance_scale=1.0) == alone
    assert [calls(n, negative_prompt="ugly") - alone for n in (4, 8)] == [1, 1]


def test_the_cache_is_bounded_and_follows_the_weights(pipe: Any) -> None:
    handle = protect(pipe, CONFIG)
    for i in range(MAX_CACHED_ROWS + 3):
        handle.release(f"prompt {i}").inputs()
    assert len(handle.guard._tables._cache) == MAX_CACHED_ROWS
    batch = handle.release([f"prompt {i}" for i in range(MAX_CACHED_ROWS + 3)])
    noise = latents(len(batch))
    together = pipe.unet(noise, 5, batch.inputs()["prompt_embeds"]).sample
    alone = pipe.unet(noise[:1], 5, handle.release("prompt 0").inputs()["prompt_embeds"]).sample
    assert torch.allclose(together[:1], alone, atol=1e-5)
    with torch.no_grad():
        for attn in handle.layers.values():
            attn.module.to_v.weight.mul_(1.5)
    moved = pipe.unet(noise[:1], 5, handle.release("prompt 0").inputs()["prompt_embeds"]).sample
    assert float((moved - alone).abs().max()) > 1e-3
    dpx.unprotect(pipe)
    assert not handle.guard._tables._cache


def test_unlike_releases_are_not_batched(pipe: Any, private: Any, tmp_path: Path) -> None:
    with protect(pipe, private) as handle:
        handle.release(PROMPT).save_pretrained(tmp_path)
    handle = protect(pipe, CONFIG)
    own = handle.release("another")
    loaded = dpx.Release.from_pretrained(tmp_path, host=pipe)
    with pytest.raises(ReleaseError, match="mechanisms"):
        dpx.Release([*own.contexts, *loaded.contexts], CONFIG, handle).inputs()
    for release in (own, loaded):  # and the host is not the worse for it
        assert bool(picture(pipe, **release.inputs()).isfinite().all())


# ---- weights that change -------------------------------------------------------------------------------------------------------


def fuse(unet: Any) -> None:
    add_lora(unet)
    unet.fuse_lora()


def tune(unet: Any) -> None:
    with torch.no_grad():
        for attn in (m for n, m in unet.named_modules() if n.endswith(".attn2")):
            attn.to_k.weight.mul_(1.05)


WEIGHTS: dict[str, Callable[[Any], Any]] = {"a LoRA": add_lora, "a fused LoRA": fuse, "tuned weights": tune}


@pytest.mark.parametrize("name", WEIGHTS)
def test_a_release_survives_new_weights(name: str, pipe: Any, tmp_path: Path) -> None:
    """And is read through the new weights: as by a fresh handle that adopts it."""
    handle = protect(pipe, CONFIG)
    release = handle.release(PROMPT)
    inputs = release.inputs()
    before = picture(pipe, **inputs)
    WEIGHTS[name](pipe.unet)
    after = picture(pipe, **inputs)  # the same placeholder, made before
    assert not torch.allclose(before, after, atol=1e-3)
    assert torch.equal(after, picture(pipe, PROMPT)) and torch.equal(after, picture(pipe, **release.inputs()))
    assert len(handle.report().releases) == 1
    assert OTHER_PROJECTIONS in handle.report().warnings
    fresh = tiny_sd()
    WEIGHTS[name](fresh.unet)
    fresh_handle = protect(fresh, CONFIG)
    adopted = dpx.Release(release.contexts, CONFIG, fresh_handle)
    assert torch.equal(after, picture(fresh, **adopted.inputs()))


def test_taking_a_lora_away_gives_the_first_picture(pipe: Any) -> None:
    protect(pipe, CONFIG)
    before = picture(pipe, PROMPT)
    add_lora(pipe.unet)
    picture(pipe, PROMPT)
    pipe.unload_lora_weights()
    assert torch.allclose(before, picture(pipe, PROMPT), atol=1e-5)


def test_the_report_of_the_host_that_was_calibrated_has_no_warning(pipe: Any) -> None:
    assert protect(pipe, CONFIG).report().warnings == (ROW,)


# ---- calibrations that do not fit ----------------------------------------------------------------------------------------------


def other_text_encoder() -> Any:
    return tiny_sd(text_encoder=tiny_sd(1).text_encoder)


def kernel_sum_calibration(pipe: Any) -> Any:
    config = CONFIG.replace(mechanism="kernel_sum", degree=1, projection_dim=3)
    public = [f"a {c} {s}" for c in ("red", "blue", "dark") for s in ("cat", "dog", "car")]
    return dpx.calibrate(
        pipe, public, config, rank=4, epsilons=(8.0,), query_prompts=2, query_steps=2, progress=False
    )


BAD: dict[str, tuple[Callable[[Any], Any], dict[str, Any], str]] = {
    "none": (lambda pipe: None, {}, "needs a calibration"),
    "another model": (lambda pipe: calibration_for(tiny_sd(unet=tiny_unet(1))), {}, "another model"),
    "another shape": (
        lambda pipe: calibration_for(tiny_sd(unet=tiny_unet(layers_per_block=2))),
        {},
        "another model",
    ),
    "other channels": (lambda pipe: calibration_for(pipe, channels=CHANNELS + 1), {}, "channels"),
    "another text encoder": (lambda pipe: calibration_for(other_text_encoder()), {}, "text encoder"),
    "another unit": (calibration_for, {"unit": "context"}, "unit"),
    "another relation": (calibration_for, {"neighboring": "add_or_remove_one"}, "neighboring"),
    "kernel_sum's": (kernel_sum_calibration, {}, "kernel_sum"),
    "anchors' for kernel_sum": (calibration_for, {"mechanism": "kernel_sum"}, "anchors"),
    "anchors' for none": (calibration_for, {"mechanism": "none"}, "anchors"),
}


@pytest.mark.parametrize("name", BAD)
def test_calibrations_that_do_not_fit(name: str, pipe: Any) -> None:
    make, changes, message = BAD[name]
    calibration = make(pipe)
    before, ledger = snapshot(pipe), dpx.Ledger()
    with pytest.raises(dpx.ConfigError, match=message):
        dpx.protect(pipe, CONFIG.replace(**changes), calibration=calibration, ledger=ledger)
    check_restored(before, snapshot(pipe))
    assert ledger.entries() == ()


def test_randomised_response_cannot_add_or_remove(pipe: Any) -> None:
    calibration = calibration_for(pipe, "response", neighboring="add_or_remove_one")
    with pytest.raises(dpx.ConfigError, match="add_or_remove_one"):
        dpx.protect(pipe, CONFIG.replace(neighboring="add_or_remove_one"), calibration=calibration)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_cast_host_takes_the_calibration(dtype: torch.dtype, pipe: Any) -> None:
    calibration = calibration_for(pipe)
    with dpx.protect(tiny_sd().to(dtype), CONFIG, calibration=calibration) as handle:
        assert handle.report().warnings == (ROW,)


def test_a_joining_pipeline_is_checked_too(pipe: Any) -> None:
    handle = protect(pipe, CONFIG)
    other = tiny_img2img()
    other.unet, other.text_encoder = pipe.unet, tiny_sd(1).text_encoder
    with pytest.raises(dpx.ConfigError, match="text encoder"):
        dpx.protect(other, CONFIG)
    assert "encode_prompt" not in vars(other) and not other.text_encoder._forward_pre_hooks
    handle.check()


def test_hosts_without_text(private: Any) -> None:
    """A bare UNet or a pipeline without a text encoder cannot be checked for one; neither can a calibration without a probe."""
    pipe = tiny_sd()
    for host, calibration in (
        (pipe.unet, calibration_for(pipe)),
        (tiny_sd(text_encoder=None, tokenizer=None), calibration_for(pipe)),
        (pipe, calibration_for(tiny_sd().unet)),
    ):
        with dpx.protect(host, CONFIG, calibration=calibration) as handle:
            assert handle.release(torch.randn(16, CHANNELS)).guarantees[0].rows == 16


# ---- releases that are served without a calibration ----------------------------------------------------------------------------


def test_a_loaded_release_needs_no_calibration(pipe: Any, tmp_path: Path) -> None:
    with protect(pipe, CONFIG) as handle:
        release = handle.release(PROMPT)
        image = picture(pipe, **release.inputs(prompt="ink"))
        release.save_pretrained(tmp_path)
    other = tiny_sd()
    loaded = dpx.Release.from_pretrained(tmp_path, host=other)
    assert torch.equal(image, picture(other, **loaded.inputs(prompt="ink")))
    assert loaded.config == CONFIG and loaded.guarantees == release.guarantees
    handle = dpx.protect(other, CONFIG)  # the handle that the release made
    for call in (lambda: handle.release("new"), lambda: picture(other, "new")):
        with pytest.raises(dpx.ConfigError, match="calibration"):
            call()
    assert handle.ledger.entries() == () and len(handle.report().releases) == 1
    dpx.unprotect(other)
    assert protect(other, CONFIG).release("new").guarantees[0].epsilon == 8.0


@pytest.mark.parametrize("damage", ["nan", "channels", "empty", "weights"])
def test_rows_that_cannot_be_served(damage: str, pipe: Any, tmp_path: Path) -> None:
    release = protect(pipe, CONFIG).release(PROMPT)
    rows, weights = release.contexts[0].context.rows, release.contexts[0].context.log_weights
    changed = {
        "nan": (rows * torch.nan, weights),
        "channels": (rows[:, :-1], weights),
        "empty": (rows[:0], weights[:0]),
        "weights": (rows, weights[:-1]),
    }[damage]
    context = dataclasses.replace(release.contexts[0], context=ContextRows(*changed))
    dpx.Release([context], CONFIG, protect(pipe, CONFIG)).save_pretrained(tmp_path)
    with pytest.raises(ReleaseError, match="damaged"):
        dpx.Release.from_pretrained(tmp_path, host=tiny_sd())


def test_the_report_states_the_release(pipe: Any) -> None:
    handle = dpx.protect(pipe, CONFIG, calibration=calibration_for(pipe, "histogram"))
    picture(pipe, PROMPT)
    report = handle.report()
    assert "the calibration" in report.public
    assert "24 public cells" in report.releases[0]["details"]
    assert report.releases[0]["guarantee"]["mechanism"] == "anchors"
