"""Invariant 8: `unprotect` gives back the host bit for bit; protecting twice is safe; several pipelines share one handle."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import StableDiffusionImg2ImgPipeline, StableDiffusionInpaintPipeline, StableDiffusionPipeline

import hf_dp_xattn as dpx
from hf_dp_xattn.hosts import guard
from hf_dp_xattn.hosts.diffusers import unet_host
from hf_dp_xattn.hosts.diffusers.processor import DPAttnProcessor

from ..hosts_tiny import CHANNELS, picture, quiet, tiny_sd
from .anchor_calibrations import BOTH, protect

PROMPT = "a red circle"


def snapshot(pipe: Any) -> dict[str, Any]:
    """Everything of a pipeline that patching could touch; objects by identity, weights by value."""
    parts: dict[str, Any] = {"pipe": dict(vars(pipe)), "components": dict(pipe.components)}
    for name in ("unet", "text_encoder"):
        model = getattr(pipe, name)
        parts[f"{name} processors"] = dict(getattr(model, "attn_processors", {}))
        parts[f"{name} weights"] = {k: v.clone() for k, v in model.state_dict().items()}
        for path, module in model.named_modules():
            state = {k: v for k, v in vars(module).items() if not k.startswith("_")}
            hooks = {k: dict(v) for k, v in vars(module).items() if k.endswith("_hooks")}
            hooks |= {k: dict(v) for k, v in vars(module).items() if k.endswith("_with_kwargs")}
            parts[f"{name}.{path}"] = (state, hooks, set(vars(module)))
    parts["tokenizer"] = dict(pipe.tokenizer.deprecation_warnings)
    return parts


def equal(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return a is b or torch.equal(a, b)
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, tuple):
        return len(a) == len(b) and all(map(equal, a, b))
    return a is b or (isinstance(a, (str, int, float, bool, set, list)) and a == b)


def check_restored(before: dict[str, Any], after: dict[str, Any]) -> None:
    assert [k for k in before if not equal(before[k], after.get(k))] == []
    assert before.keys() == after.keys()


def use(pipe: Any, handle: Any) -> None:
    picture(pipe, PROMPT)
    picture(pipe, **handle.release("another one").inputs(prompt="a wash"))


@pytest.mark.parametrize("mechanism", ["none", "kernel_sum", "dptree", "anchors"])
def test_unprotect_restores_everything(mechanism: str, pipe: Any, private: Any) -> None:
    image = picture(pipe, PROMPT)
    before = snapshot(pipe)
    handle = protect(pipe, private.replace(mechanism=mechanism))
    assert not equal(before["unet processors"], pipe.unet.attn_processors)
    use(pipe, handle)
    dpx.unprotect(pipe)
    check_restored(before, snapshot(pipe))
    assert torch.equal(image, picture(pipe, PROMPT))


@pytest.mark.parametrize("plant", ["a fresh processor", "a hook", "an attribute", "a weight"])
def test_the_comparison_has_power(plant: str, pipe: Any, private: Any) -> None:
    before = snapshot(pipe)
    protect(pipe, private)
    dpx.unprotect(pipe)
    attn = pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn2
    if plant == "a fresh processor":
        attn.processor = type(attn.processor)()
    elif plant == "a hook":
        pipe.text_encoder.register_forward_pre_hook(lambda *a: None)
    elif plant == "an attribute":
        pipe.unet.extra = 1
    else:
        attn.to_k.weight.data[0, 0] += 1e-7
    with pytest.raises(AssertionError):
        check_restored(before, snapshot(pipe))


def test_the_original_processor_objects_come_back(pipe: Any, private: Any) -> None:
    before = dict(pipe.unet.attn_processors)
    with protect(pipe, private) as handle:
        during = pipe.unet.attn_processors
        assert {n for n in before if during[n] is not before[n]} == {f"{n}.processor" for n in handle.layers}
        assert all(isinstance(during[f"{n}.processor"], DPAttnProcessor) for n in handle.layers)
    assert all(pipe.unet.attn_processors[n] is p for n, p in before.items())


@BOTH
def test_the_context_manager_restores_on_errors(pipe: Any, private: Any) -> None:
    before = snapshot(pipe)
    with pytest.raises(ZeroDivisionError), protect(pipe, private):
        1 / 0  # noqa: B018
    check_restored(before, snapshot(pipe))


def test_unprotect_twice_or_unprotected(pipe: Any, private: Any) -> None:
    dpx.unprotect(pipe)
    protect(pipe, private)
    dpx.unprotect(pipe.unet)
    dpx.unprotect(pipe)
    assert bool(picture(pipe, PROMPT).isfinite().all())


def test_protecting_twice_gives_the_same_handle(pipe: Any, private: Any) -> None:
    handle = protect(pipe, private)
    release = handle.release(PROMPT)
    assert protect(pipe, dpx.DPXAttnConfig.from_dict(private.to_dict())) is handle
    assert protect(pipe.unet, private) is handle
    assert protect(pipe, private, ledger=handle.ledger) is handle
    assert handle.release(PROMPT).contexts == release.contexts


@pytest.mark.parametrize("change", ["config", "ledger", "budget"])
def test_protecting_with_other_settings_is_refused(change: str, pipe: Any, private: Any) -> None:
    handle = protect(pipe, private)
    settings: dict[str, Any] = (
        {"ledger": dpx.Ledger()} if change == "ledger" else {"budget": dpx.Budget(99.0, 1e-5)}
    )
    config = private.replace(epsilon=4.0) if change == "config" else private
    with pytest.raises(dpx.ConfigError, match="unprotect"):
        protect(pipe, config, **({} if change == "config" else settings))
    handle.check()


@BOTH
@pytest.mark.parametrize("stage", ["processors", "text encoder", "pipeline"])
def test_nothing_stays_half_patched(
    stage: str, pipe: Any, private: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("planted")

    before = snapshot(pipe)
    with monkeypatch.context() as patch:
        if stage == "processors":
            patch.setattr(guard.Tables, "build", fail)
        elif stage == "text encoder":
            patch.setattr(unet_host, "TextSide", fail)
        else:
            patch.setattr(unet_host.PipelinePatch, "install", fail)
        with pytest.raises(RuntimeError, match="planted"):
            protect(pipe, private)
    check_restored(before, snapshot(pipe))
    protect(pipe, private)


def test_protect_leaves_the_torch_generator_alone(pipe: Any, private: Any) -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    handle = protect(pipe, private)
    handle.release(PROMPT).inputs()
    assert torch.equal(expected, torch.rand(3))


def test_save_pretrained_writes_the_same_weights(pipe: Any, private: Any, tmp_path: Any) -> None:
    pipe.unet.save_pretrained(tmp_path / "before")
    handle = protect(pipe, private)
    handle.release(PROMPT)
    pipe.unet.save_pretrained(tmp_path / "protected")
    for path in sorted((tmp_path / "before").iterdir()):
        assert path.read_bytes() == (tmp_path / "protected" / path.name).read_bytes()


# ---- pipelines that share a UNet -----------------------------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize("cls", [StableDiffusionImg2ImgPipeline, StableDiffusionInpaintPipeline])
@pytest.mark.parametrize("how", ["from_pipe", "components"])
def test_pipelines_that_share_the_unet_join_one_handle(cls: Any, how: str, pipe: Any, private: Any) -> None:
    handle = protect(pipe, private)
    first = picture(pipe, PROMPT)
    other = quiet(
        cls.from_pipe(pipe) if how == "from_pipe" else cls(**pipe.components, requires_safety_checker=False)
    )
    before = dict(vars(other))
    assert protect(other, private) is handle
    extra: dict[str, Any] = {"image": torch.zeros(1, 3, 16, 16), "strength": 1.0}
    if cls is StableDiffusionInpaintPipeline:
        extra |= {"mask_image": torch.ones(1, 1, 16, 16), "height": 16, "width": 16}
    assert bool(picture(other, PROMPT, **extra).isfinite().all())
    assert len(handle.report().releases) == 1  # one release for both pipelines
    assert torch.equal(first, picture(pipe, PROMPT))
    dpx.unprotect(other)
    assert dict(vars(other)).keys() - {"_interrupt"} <= before.keys() | set(vars(other))
    assert "encode_prompt" not in vars(other) and "encode_prompt" not in vars(pipe)
    assert not pipe.text_encoder._forward_pre_hooks and not pipe.unet._forward_pre_hooks


@BOTH
def test_a_pipeline_may_join_a_protected_unet(private: Any) -> None:
    pipe = tiny_sd()
    handle = protect(pipe.unet, private)
    assert "encoder_hidden_states" in handle.release(torch.randn(16, CHANNELS)).inputs()
    assert protect(pipe, private) is handle
    assert bool(picture(pipe, PROMPT).isfinite().all())
    assert "prompt_embeds" in handle.release(PROMPT).inputs()


def test_two_hosts_do_not_know_each_other(private: Any) -> None:
    one, two = tiny_sd(0), tiny_sd(1)
    first, second = protect(one, private), protect(two, private)
    assert first is not second
    dpx.unprotect(one)
    assert bool(picture(two, PROMPT).isfinite().all())


def test_a_pipeline_without_text_encoder(private: Any) -> None:
    pipe: StableDiffusionPipeline = tiny_sd(text_encoder=None, tokenizer=None)
    handle = protect(pipe, private)
    rows = torch.randn(1, 16, CHANNELS)
    image = picture(pipe, prompt_embeds=rows, negative_prompt_embeds=torch.zeros(1, 16, CHANNELS))
    assert bool(image.isfinite().all())
    with pytest.raises(dpx.ConfigError, match="text encoder"):
        handle.release(PROMPT)
    with pytest.raises(dpx.ConfigError, match="text encoder"):
        picture(pipe, PROMPT, guidance_scale=1.0)
