"""Four kinds of host with a private context: used in every way, and everything that they show or write collected."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

import hf_dp_xattn as dpx

from ..hosts import anchor_calibrations
from ..hosts.transformers.decoder_only.tiny import tiny as decoder_tiny
from ..hosts.transformers.encoder_decoder import calibrations
from ..hosts.transformers.encoder_decoder.tiny import generate, one, tiny
from ..hosts.transformers.mllama import protecting
from ..hosts.transformers.mllama.tiny import generate as describe
from ..hosts.transformers.mllama.tiny import images, texts
from ..hosts.transformers.mllama.tiny import tiny as image_tiny
from ..hosts_tiny import CHANNELS, picture, tiny_sd
from ..private_content import PrivateContent

SECRET = "zebra quartz"
LONG_SECRET = "zebra quartz jukebox wyvern obelisk marzipan"
Calls = Sequence[Callable[[], Any]]


@dataclass(frozen=True)
class Host:
    """make: a fresh host. protect(host, config, **arguments). content: what is private. use(host, handle) -> releases, by all ways
    in. wrong(host, handle): calls that private input makes fail."""

    make: Callable[[], Any]
    protect: Callable[..., Any]
    content: Callable[[], PrivateContent]
    use: Callable[[Any, Any], list[Any]]
    wrong: Callable[[Any, Any], Calls]


@torch.no_grad()
def _unet_content() -> PrivateContent:
    pipe = tiny_sd()
    attn = pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn2
    texts, ids, rows = (SECRET, LONG_SECRET), [], []
    for text in texts:
        tokens = pipe.tokenizer(
            text, padding="max_length", max_length=16, truncation=True, return_tensors="pt"
        )
        ids.append(tokens.input_ids[0])
        private = pipe.text_encoder(tokens.input_ids)[0][0, 1:]
        rows += [private, attn.to_k(private), attn.to_v(private)]
    return PrivateContent(texts, tuple(ids), tuple(rows))


def _use_unet(pipe: Any, handle: Any) -> list[Any]:
    picture(pipe, SECRET, negative_prompt="ugly")
    picture(pipe, LONG_SECRET, num_images_per_prompt=2)
    release = handle.release([SECRET, LONG_SECRET])
    release.inputs(prompt="a wash")
    return [release]


def _wrong_unet(pipe: Any, handle: Any) -> Calls:
    rows = _unet_content().rows[0]
    padded = torch.cat([rows[:1], rows]).unsqueeze(0)
    ids = _unet_content().ids[0]
    spoiled = padded.clone()
    spoiled[0, 3, 3] = torch.nan
    return [
        lambda: picture(pipe, SECRET, prompt_embeds=padded),
        lambda: picture(pipe, [SECRET, 3]),
        lambda: picture(pipe, {SECRET: 1}),
        lambda: picture(pipe, [SECRET, SECRET], negative_prompt=["a", "b", "c"]),
        lambda: picture(pipe, SECRET, clip_skip=1),
        lambda: picture(pipe, prompt_embeds=padded[..., : CHANNELS // 2]),
        lambda: picture(pipe, prompt_embeds=spoiled),
        lambda: pipe.unet(torch.zeros(1, 4, 8, 8), 0, padded),
        lambda: handle.release(SECRET, fresh=True),
        lambda: handle.release(SECRET, groups=torch.zeros(3)),
        lambda: handle.release(ids.repeat(9)),
        lambda: handle.release(ids + 1),
        lambda: handle.release({SECRET}),
        lambda: handle.release(SECRET.encode()),
    ]


@torch.no_grad()
def _seq2seq_content() -> PrivateContent:
    model, ids, rows = tiny("bart"), [], []
    attn = model.model.decoder.layers[0].encoder_attn
    for seed in (3, 4):
        document = one("bart", seed)
        private = model.get_encoder()(**document).last_hidden_state[0]
        ids.append(document["input_ids"][0])
        rows += [private, attn.k_proj(private), attn.v_proj(private)]
    return PrivateContent((), tuple(ids), tuple(rows))


def _use_seq2seq(model: Any, handle: Any) -> list[Any]:
    generate(model, one("bart", 3), num_beams=2)
    release = handle.release(**one("bart", 4))
    generate(model, release.inputs(input_ids=torch.tensor([[9, 8, 7]])))
    return [release, handle.release(**one("bart", 3))]


def _wrong_seq2seq(model: Any, handle: Any) -> Calls:
    content, document = _seq2seq_content(), one("bart", 3)
    rows, ids = content.rows[0], content.ids[0]
    spoiled = torch.where(torch.arange(len(rows))[:, None] == 2, torch.nan, rows)
    return [
        lambda: handle.release(**document, fresh=True),
        lambda: handle.release(spoiled),
        lambda: handle.release(rows[:, :3]),
        lambda: handle.release(ids, groups=torch.zeros(3)),
        lambda: handle.release(ids, **document),
        lambda: handle.release(ids.reshape(1, 1, -1)),
        lambda: handle.release({"input_ids": ids.tolist()}),
        lambda: model(input_ids=ids[None], decoder_input_ids=ids[None]),
        lambda: model(encoder_outputs=(rows[None],), decoder_input_ids=torch.tensor([[2]])),
        lambda: model.generate(**document, encoder_repetition_penalty=1.5),
        lambda: model.get_encoder()(**document),
    ]


PREFIXES = (torch.tensor([1, 31, 17, 23, 9, 38, 12, 5]), torch.tensor([1, 29, 14, 33, 8, 21, 36, 11, 7]))
HEAD = 1  # BOS is public


def _decoder() -> Any:
    return decoder_tiny("llama")


@torch.no_grad()
def _decoder_content() -> PrivateContent:
    model, rows = _decoder(), []
    attn = model.model.layers[1].self_attn
    for ids in PREFIXES:
        hidden = model(ids[None], output_hidden_states=True, use_cache=False).hidden_states
        private = [
            h[0, HEAD:] for h in hidden[1:]
        ]  # the first are rows of the embedding table, which is public
        first = model.model.layers[1].input_layernorm(private[0])
        rows += [*private, first, attn.k_proj(first), attn.v_proj(first)]
    return PrivateContent((), PREFIXES, tuple(rows))


def _use_decoder(model: Any, handle: Any) -> list[Any]:
    releases = [handle.release(ids, public_head=HEAD) for ids in PREFIXES]
    for release in releases:
        model.generate(**release.inputs(input_ids=torch.tensor([[3, 4, 6]])), max_new_tokens=2)
    return releases


def _wrong_decoder(model: Any, handle: Any) -> Calls:
    ids = PREFIXES[0]
    return [
        lambda: handle.release(ids, public_head=HEAD, fresh=True),
        lambda: handle.release(ids + 30, public_head=HEAD),
        lambda: handle.release(-ids, public_head=HEAD),
        lambda: handle.release(ids.float(), public_head=HEAD),
        lambda: handle.release(ids, public_head=HEAD, prefix_bucket=2),
        lambda: handle.release(ids, groups="segments"),
        lambda: handle.release(ids, groups=torch.zeros(3)),
        lambda: handle.release({"input_ids": str(ids.tolist())}),
        lambda: model(ids[None]),
        lambda: model.generate(ids[None]),
    ]


@torch.no_grad()
def _image_content() -> PrivateContent:
    """Rows of the vision model, keys and values, and the pixels themselves, line by line."""
    model, rows, lines = image_tiny(), [], []
    attn = model.model.language_model.layers[1].cross_attn
    for given in (images(1, seed=3), images(2, seed=4)):
        vision = model.model.vision_model(**given).last_hidden_state
        projected = model.model.multi_modal_projector(vision)[:, 0]  # [B, tiles, patches, C]
        for states, shown in zip(projected, given["aspect_ratio_mask"][:, 0], strict=True):
            private = states[shown.bool()].flatten(0, 1)
            keys, values = attn.k_proj(private), attn.v_proj(private)
            normed = attn.k_norm(keys.unflatten(-1, (-1, attn.head_dim))).flatten(1)
            rows += [private, keys, values, normed]
        lines.append(given["pixel_values"][given["aspect_ratio_mask"].bool()].flatten(0, -2))
    return PrivateContent((), (), (*rows, *lines))


def _use_image(model: Any, handle: Any) -> list[Any]:
    describe(model, {**images(1, seed=3), **texts(1)}, num_beams=2)
    release = handle.release(**images(2, seed=4))
    describe(model, release.inputs(**texts(2)))
    return [release, handle.release(**images(1, seed=3))]


def _wrong_image(model: Any, handle: Any) -> Calls:
    given, rows = images(1, seed=3), _image_content().rows[0]
    pixels = given["pixel_values"]
    spoiled = {**given, "pixel_values": torch.where(torch.arange(8) == 2, torch.nan, pixels)}
    return [
        lambda: handle.release(**given, fresh=True),
        lambda: handle.release(**spoiled),
        lambda: handle.release(pixels),
        lambda: handle.release(pixels.tolist()),
        lambda: handle.release(**{**given, "pixel_values": pixels[..., :4]}),
        lambda: handle.release(**{**given, "pixel_values": pixels.tolist()}),
        lambda: handle.release(**{**given, "aspect_ratio_ids": torch.tensor([[99]])}),
        lambda: handle.release(rows[:, :3]),
        lambda: handle.release(torch.where(torch.arange(len(rows))[:, None] == 2, torch.nan, rows)),
        lambda: handle.release({"image": pixels}),
        lambda: handle.release(**given, groups="tiles"),
        lambda: handle.release(**given, groups=torch.zeros(3)),
        lambda: handle.release(**given, horizon=2),
        lambda: model(**given, **texts(1)),
        lambda: model.model.vision_model(**given),
        lambda: model(cross_attention_states=rows[None], **texts(1)),
        lambda: model.generate(**given, **texts(2)),
        lambda: model.generate(**given, **texts(1), prompt_lookup_num_tokens=2),
    ]


HOSTS: dict[str, Host] = {
    "unet": Host(tiny_sd, anchor_calibrations.protect, _unet_content, _use_unet, _wrong_unet),
    "seq2seq": Host(
        lambda: tiny("bart"), calibrations.protect, _seq2seq_content, _use_seq2seq, _wrong_seq2seq
    ),
    "image_text": Host(image_tiny, protecting.protect, _image_content, _use_image, _wrong_image),
    "decoder": Host(_decoder, dpx.protect, _decoder_content, _use_decoder, _wrong_decoder),
}


def shown(host: Any, handle: Any, releases: list[Any]) -> dict[str, bytes]:
    """repr and str of everything that a user may print."""
    things: dict[str, Any] = {
        "host": host,
        "handle": handle,
        "ledger": handle.ledger,
        "report": handle.report(),
    }
    things |= {"entries": handle.ledger.entries(), "budget": handle.budget, "json": handle.report().to_json()}
    for i, release in enumerate(releases):
        things |= {f"release {i}": release, f"contexts {i}": release.contexts, f"terms {i}": release.terms}
        things[f"guarantees {i}"] = release.guarantees
    return {name: (repr(thing) + str(thing)).encode() for name, thing in things.items()}


def saved(host: Any, handle: Any, releases: list[Any], folder: Path) -> None:
    """All that can be saved."""
    for i, release in enumerate(releases):
        release.save_pretrained(folder / f"release {i}")
    host.save_pretrained(folder / "host")
    handle.config.save_pretrained(folder / "config")
    if handle.calibration is not None:
        handle.calibration.save_pretrained(folder / "calibration")


def errors(calls: Calls) -> dict[str, bytes]:
    """What each failing call says, with its tracebacks and causes."""
    texts = {}
    for i, call in enumerate(calls):
        with pytest.raises(Exception) as caught:
            call()
        chain = traceback.format_exception(caught.value)
        texts[f"error {i}"] = (repr(caught.value) + "".join(chain)).encode()
        assert isinstance(caught.value, (dpx.DPXAttnError, ValueError, TypeError)), f"call {i}"
    return texts


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
