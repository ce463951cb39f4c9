"""What a protected pipeline or UNet refuses by name, at no cost, before diffusers stumbles over it."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
import torch
from diffusers.hooks import apply_layerwise_casting
from diffusers.image_processor import VaeImageProcessor

import hf_dp_xattn as dpx
from hf_dp_xattn import ConfigError, ProtectionLostError
from hf_dp_xattn.hosts.diffusers.public_arguments import check_arguments

from ...hosts_tiny import CHANNELS, LENGTH, latents, picture, tiny_img2img, tiny_sd

NONE = dpx.DPXAttnConfig(unit="row", mechanism="none")


@pytest.mark.parametrize("training", [True, False])
def test_gradient_checkpointing_is_refused_by_name(pipe: Any, private: Any, training: bool) -> None:
    handle = dpx.protect(pipe, private, ledger=dpx.Ledger())
    unet = pipe.unet.train(training)
    unet.enable_gradient_checkpointing()
    inputs = handle.release("a cat").inputs()["prompt_embeds"]
    public = torch.randn(1, LENGTH, CHANNELS)
    with pytest.raises(ConfigError, match="checkpointing"):
        unet(latents(), 10, encoder_hidden_states=inputs)
    with handle.public(), pytest.raises(ConfigError, match="checkpointing"):
        unet(latents(), 10, encoder_hidden_states=public)
    with torch.no_grad():  # nothing is run again
        assert unet(latents(), 10, encoder_hidden_states=inputs).sample.isfinite().all()
    unet.disable_gradient_checkpointing()
    unet(latents(), 10, encoder_hidden_states=inputs).sample.square().mean().backward()
    assert unet.conv_in.weight.grad.isfinite().all()


def test_a_replaced_image_processor_is_noticed_before_the_charge(pipe: Any, private: Any) -> None:
    handle = dpx.protect(pipe, private, ledger=dpx.Ledger())
    kept, pipe.image_processor = pipe.image_processor, VaeImageProcessor(vae_scale_factor=2)
    with pytest.raises(ProtectionLostError, match="image_processor"):
        picture(pipe, "a cat")
    assert handle.ledger.entries() == ()
    pipe.image_processor = kept
    picture(pipe, "a cat")
    del vars(kept)["postprocess"]
    with pytest.raises(ProtectionLostError, match="image_processor"):
        picture(pipe, "a cat")


def test_an_image_processor_that_is_replaced_within_a_call_is_noticed(pipe: Any, private: Any) -> None:
    dpx.protect(pipe, private, ledger=dpx.Ledger())

    def replace(pipe: Any, step: int, timestep: Any, kwargs: Any) -> Any:
        pipe.image_processor = VaeImageProcessor(vae_scale_factor=2)
        return kwargs

    with pytest.raises(ProtectionLostError, match="image_processor"):
        picture(pipe, "a cat", callback_on_step_end=replace)


NAN = torch.full((1, 4, 8, 8), torch.nan)
FAULTS: dict[str, tuple[dict[str, Any], str]] = {
    "a callback that is none": ({"callback_on_step_end": 3}, "callback_on_step_end"),
    "a callback of one argument": ({"callback_on_step_end": lambda x: {}}, "callback_on_step_end"),
    "half a step": ({"num_inference_steps": 2.5}, "num_inference_steps"),
    "NaN to start from": ({"latents": NAN}, "latents"),
    "Inf to start from": ({"latents": NAN.nan_to_num(nan=torch.inf)}, "latents"),
    "NaN beside it": ({"negative_prompt_embeds": torch.full((1, LENGTH, CHANNELS), torch.nan)}, "negative"),
    "GLIGEN": ({"cross_attention_kwargs": {"gligen": {"boxes": 1}}}, "GLIGEN"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_of_a_call_costs_nothing(name: str, pipe: Any, private: Any) -> None:
    handle = dpx.protect(pipe, private, ledger=dpx.Ledger())
    arguments, match = FAULTS[name]
    with pytest.raises(ConfigError, match=match):
        picture(pipe, "a cat", **arguments)
    assert handle.ledger.entries() == ()
    picture(pipe, "a cat", callback_on_step_end=lambda *a: {})


def test_an_image_of_nan_costs_nothing(private: Any) -> None:
    pipe = tiny_img2img()
    handle = dpx.protect(pipe, private, ledger=dpx.Ledger())
    for image in (torch.full((1, 3, 16, 16), torch.nan), [torch.full((3, 16, 16), torch.nan)]):
        with pytest.raises(ConfigError, match="image"):
            picture(pipe, "a cat", image=image)
    assert handle.ledger.entries() == ()


def test_a_picture_without_a_vae_costs_nothing(pipe: Any, private: Any) -> None:
    handle = dpx.protect(pipe, private, ledger=dpx.Ledger())
    pipe.vae = None
    with pytest.raises(ConfigError, match="VAE"):
        pipe("a cat", num_inference_steps=2, height=16, width=16)
    assert handle.ledger.entries() == ()


def test_a_vae_of_another_dtype_costs_nothing(pipe: Any, private: Any) -> None:
    handle = dpx.protect(pipe, private, ledger=dpx.Ledger())
    draw = {"num_inference_steps": 2, "height": 16, "width": 16}
    pipe.vae.to(torch.float64)
    with pytest.raises(ConfigError, match="The VAE is"):
        pipe("a cat", **draw)
    assert handle.ledger.entries() == ()
    picture(pipe, "a cat")  # of latents
    decode = pipe.vae.decode
    pipe.vae.decode = lambda z, *args, **kwargs: decode(z.double(), *args, **kwargs)  # the caller's own way
    assert len(pipe("a cat", **draw).images) == 1


@pytest.mark.parametrize("name", ["KarrasVeScheduler", "ScoreSdeVeScheduler", "RePaintScheduler"])
def test_a_scheduler_with_other_steps_costs_nothing(name: str, pipe: Any, private: Any) -> None:
    handle = dpx.protect(pipe, private, ledger=dpx.Ledger())
    before, pipe.scheduler = pipe.scheduler, getattr(diffusers, name)()
    with pytest.raises(ConfigError, match=name):
        picture(pipe, "a cat")
    assert handle.ledger.entries() == ()
    pipe.scheduler = before
    picture(pipe, "a cat")


def test_the_schedulers_of_stable_diffusion_are_taken(pipe: Any) -> None:
    """Those that diffusers itself says can take each other's place."""
    for kind in pipe.scheduler.compatibles:
        if kind is not diffusers.DPMSolverSDEScheduler:  # needs a library
            pipe.scheduler = kind()
        check_arguments(pipe, {"output_type": "latent"})


def test_a_unet_whose_weights_are_gone_says_so(pipe: Any, private: Any) -> None:
    handle = dpx.protect(pipe, private, ledger=dpx.Ledger())
    pipe.unet.to("meta")
    with pytest.raises(ConfigError, match="meta"):
        picture(pipe, "a cat")
    assert handle.ledger.entries() == ()


def test_a_text_encoder_in_eight_bits_that_computes_in_more() -> None:
    pipe, plain = tiny_sd(), tiny_sd()
    for each in (pipe, plain):
        apply_layerwise_casting(
            each.text_encoder,
            storage_dtype=torch.float8_e4m3fn,
            compute_dtype=torch.float32,
            skip_modules_pattern=["embeddings"],
        )
    with dpx.protect(pipe, NONE, ledger=dpx.Ledger()) as handle:
        first, second = picture(pipe, "a cat"), picture(pipe, "a cat")
        assert len(handle.releases.spent) == 1
    torch.testing.assert_close(first, second)
    torch.testing.assert_close(first, picture(plain, "a cat"), atol=1e-3, rtol=1e-2)
