"""Denoising steps at real shapes, protected / unprotected: SDXL's UNet, PixArt's transformer, Flux's transformer (random weights, float32).

Widths, heads, text and latents are those of the published configurations at 512 x 512; the depth is cut to what a CPU runs in seconds (a
step is made of equal blocks, so that the share of its text layers hardly depends on it), and text encoders have one layer. An unprotected
pipeline and a protected one share their weights and take turns; a timed step is not a picture's first, which is timed beside it. Steps are
CPU seconds of one thread: what else runs on the machine adds none.
Correctness first: with `mechanism="none"` both must draw the same. A release is timed from embeddings (`library`: from codes), where no
encoder runs. Targets: step <= 1.00, `kernel_sum` <= 1.25; release <= 50 ms, `kernel_sum` <= 5 s.
"""

from __future__ import annotations

import copy
import gc
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from attend import median_interval
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    PixArtAlphaPipeline,
    PixArtTransformer2DModel,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from tokenizers import Tokenizer, models, pre_tokenizers
from tqdm.auto import tqdm
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
)

import hf_dp_xattn as dpx
from hf_dp_xattn.hosts.diffusers.prompt_encoder import STAND_IN

CHARACTERS = [chr(c) for c in range(33, 127)]
TARGETS = {"kernel_sum": (1.25, 5000)}  # of a step's ratio and of a release, in ms
TARGET = (1.0, 50)  # of all others
PROMPT = "a castle of glass above the clouds"


def clip_words() -> CLIPTokenizer:
    pieces = ["<|startoftext|>", "<|endoftext|>", *CHARACTERS, *(c + "</w>" for c in CHARACTERS)]
    return CLIPTokenizer(vocab={t: i for i, t in enumerate(pieces)}, merges=[], model_max_length=77)


def t5_words(length: int) -> PreTrainedTokenizerFast:
    """A token for each character."""
    pieces = ["<pad>", "</s>", "<unk>", *CHARACTERS]
    made = Tokenizer(models.BPE({t: i for i, t in enumerate(pieces)}, [], unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    named = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=made, model_max_length=length, **named)


def clip(width: int, cls: Any = CLIPTextModel) -> Any:
    sizes = {"hidden_size": width, "projection_dim": width, "intermediate_size": width}
    layers = {"num_hidden_layers": 2, "num_attention_heads": width // 64}
    return cls(CLIPTextConfig(vocab_size=256, **sizes, **layers, bos_token_id=0, eos_token_id=1)).eval()


def t5(width: int) -> T5EncoderModel:
    return T5EncoderModel(
        T5Config(vocab_size=128, d_model=width, d_kv=64, d_ff=64, num_layers=1, num_heads=4, pad_token_id=0)
    ).eval()


def vae(latents: int, **options: Any) -> AutoencoderKL:
    """That scales by 8, and is not run: a call ends in latents."""
    return AutoencoderKL(
        block_out_channels=(8,) * 4,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=latents,
        norm_num_groups=8,
        **options,
    ).eval()


def sdxl(widths: Sequence[int] = (320, 640, 1280), text: int = 2048, depth: int = 1) -> Any:
    """2 and 10 transformer blocks in each of the deeper layers are `depth` here."""
    unet = UNet2DConditionModel(
        sample_size=64,
        block_out_channels=tuple(widths),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=depth,
        attention_head_dim=[w // 64 for w in widths],
        cross_attention_dim=text,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=6 * 256 + text * 5 // 8,
    )
    return StableDiffusionXLPipeline(
        vae=vae(4),
        text_encoder=clip(text * 3 // 8),
        text_encoder_2=clip(text * 5 // 8, CLIPTextModelWithProjection),
        tokenizer=clip_words(),
        tokenizer_2=clip_words(),
        unet=unet.eval(),
        scheduler=DDIMScheduler(),
        add_watermarker=False,
    )


def pixart(heads: int = 16, text: int = 4096, depth: int = 2) -> Any:
    """28 blocks are `depth` here."""
    transformer = PixArtTransformer2DModel(
        sample_size=64,
        num_layers=depth,
        num_attention_heads=heads,
        attention_head_dim=72,
        in_channels=4,
        out_channels=8,
        cross_attention_dim=72 * heads,
        caption_channels=text,
    )
    return PixArtAlphaPipeline(
        tokenizer=t5_words(120),
        text_encoder=t5(text),
        vae=vae(4),
        transformer=transformer.eval(),
        scheduler=DDIMScheduler(),
    )


def flux(heads: int = 24, text: int = 4096, depth: int = 1) -> Any:
    """19 blocks of two streams and 38 of one are `depth` of each here."""
    transformer = FluxTransformer2DModel(
        num_layers=depth,
        num_single_layers=depth,
        num_attention_heads=heads,
        joint_attention_dim=text,
        guidance_embeds=True,
    )
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=vae(16, shift_factor=0.1, scaling_factor=0.4),
        text_encoder=clip(768),
        tokenizer=clip_words(),
        text_encoder_2=t5(text),
        tokenizer_2=t5_words(512),
        transformer=transformer.eval(),
    )


@dataclass(frozen=True)
class Host:
    """make: the pipeline. mechanisms: that it serves. words: of its table. options: of its calls. size: of its pictures."""

    make: Callable[[], Any]
    mechanisms: tuple[str, ...]
    words: str
    options: dict[str, Any]
    size: int = 512


HOSTS = {
    "sdxl": Host(
        sdxl,
        ("anchors", "library"),
        "SDXL's UNet, 1 of 2 and 1 of 10 transformer blocks in its deeper layers; 77 rows of text, guidance (batch 2)",
        {},
    ),
    "pixart": Host(
        pixart,
        ("anchors", "library", "kernel_sum"),
        "PixArt-alpha's transformer, 2 of 28 blocks; 120 rows of text, guidance (batch 2)",
        {"use_resolution_binning": False},
    ),
    "flux": Host(
        flux,
        ("library",),
        "Flux's transformer, 1 of 19 blocks of two streams and 1 of 38 of one; 512 rows of text, 256 x 256",
        {},
        256,
    ),
}


def public_texts(count: int) -> list[str]:
    """Distinct ones; what is timed does not depend on what they say."""
    first = (
        "a castle",
        "two dogs",
        "an old boat",
        "a red barn",
        "the sea",
        "three birds",
        "a lamp",
        "a road",
    )
    second = (
        "in snow",
        "at night",
        "made of glass",
        "in a storm",
        "on a hill",
        "in the style of a poster",
        "far away",
        "in spring",
    )
    third = (
        "oil on canvas",
        "a photograph",
        "in pastel",
        "pen and ink",
        "very detailed",
        "soft light",
        "wide shot",
        "from above",
    )
    every = [f"{a} {b}, {c}" for a in first for b in second for c in third]
    return every[:count]


def codes(texts: Sequence[str]) -> torch.Tensor:
    """Of public texts and private ones, by their letters: no encoder runs."""
    return torch.tensor([[float(t.count(c)) for c in "abcdefghijklmnopqrstuvwxyz"] for t in texts])


def twin(pipe: Any) -> Any:
    """A pipeline of the same weights, in other modules."""
    kept: dict[int, Any] = {}
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):
            kept |= {id(t): t for t in (*part.parameters(), *part.buffers())}
    made = type(pipe)(**copy.deepcopy(pipe.components, kept))
    made.set_progress_bar_config(disable=True)
    return made


class Stopwatch:
    """CPU seconds of each forward of a pipeline's denoiser, hooks of others included. Made after the pipeline was protected."""

    def __init__(self, pipe: Any) -> None:
        model = getattr(pipe, "unet", None) or pipe.transformer
        self.seconds: list[float] = []
        self._begun = 0.0
        self._hooks = [
            model.register_forward_pre_hook(self._begin, prepend=True),
            model.register_forward_hook(self._end),
        ]

    def _begin(self, *given: Any) -> None:
        self._begun = time.process_time()

    def _end(self, *given: Any) -> None:
        self.seconds.append(time.process_time() - self._begun)

    def remove(self) -> None:
        for hook in self._hooks:
            hook.remove()


@torch.no_grad()
def draw(pipe: Any, host: Host, steps: int, size: int, prompt: str = PROMPT) -> torch.Tensor:
    """Latents."""
    latents: torch.Tensor = pipe(
        prompt,
        height=size,
        width=size,
        num_inference_steps=steps,
        output_type="latent",
        generator=torch.Generator().manual_seed(0),
        return_dict=False,
        **host.options,
    )[0]
    return latents


def protect(pipe: Any, mechanism: str, plain: Any) -> Any:
    """plain: a pipeline of these weights that is not protected, for the calibration. Random rows are released to be timed."""
    given: dict[str, Any] = {"ledger": dpx.Ledger(), "allow_useless": True, "budget": dpx.Budget(1e6, 0.5)}
    if mechanism == "library":
        config = dpx.DPXAttnConfig(mechanism="library")
        made = dpx.calibrate(plain, public_texts(400), config, epsilons=8.0, encoder=codes, progress=False)
        return dpx.protect(pipe, config, calibration=made, encoder=codes, **given)
    config = dpx.DPXAttnConfig(unit="row", mechanism=mechanism)
    if mechanism == "anchors":
        few = {"epsilons": 8.0, "releases": ("sum",), "steps": 10, "query_prompts": 1, "query_steps": 1}
        given["calibration"] = dpx.calibrate(plain, public_texts(128), config, progress=False, **few)
    return dpx.protect(pipe, config, allow_uncalibrated=True, **given)


def check(pipe: Any, plain: Any, host: Host, size: int = 128) -> float:
    """Largest relative difference of what both draw under `none`, for the text of which a protected pipeline's pooled vectors are."""
    if host.mechanisms == ("library",):  # there a call is the unprotected one, of another text
        return 0.0
    expected = draw(plain, host, 1, size, STAND_IN)
    with dpx.protect(pipe, dpx.DPXAttnConfig(unit="row", mechanism="none"), ledger=dpx.Ledger()):
        found = draw(pipe, host, 1, size, STAND_IN)
    error = float((found - expected).abs().max() / expected.abs().max())
    if not error < 1e-3:
        raise SystemExit(f"a protected step is wrong (relative error {error:.3g}): no times are printed.")
    return error


def release_times(protected: Any, mechanism: str, host: Any, count: int = 11) -> list[float]:
    """Of different contexts."""
    gen, taken = torch.Generator().manual_seed(3), []
    for i in range(count):
        private: Any = f"my {i} dogs at the lake"
        if mechanism != "library":
            private = torch.randn(host.encoder.rows, host.channels, generator=gen)
        start = time.process_time()
        protected.release(private)
        taken.append(time.process_time() - start)
    return taken


def compare(
    name: str, mechanism: str, calls: int, steps: int = 4, size: int | None = None, **changes: Any
) -> dict[str, object]:
    """One host and mechanism: calls of both pipelines in turn, each pair in the other order than the one before. All steps but a call's
    first are compared, each with its twin."""
    host = HOSTS[name]
    size = host.size if size is None else size
    torch.manual_seed(0)
    pipe = host.make(**changes)
    pipe.set_progress_bar_config(disable=True)
    plain = twin(pipe)
    error = check(pipe, plain, host)
    protected = protect(pipe, mechanism, plain)
    released = release_times(protected, mechanism, protected.host)
    watches = {"plain": Stopwatch(plain), "protected": Stopwatch(pipe)}
    seconds: dict[str, list[float]] = {"plain": [], "protected": [], "first": []}
    draw(pipe, host, 1, size)  # released here, and tried
    for i in tqdm(range(calls), desc=f"{name}, {mechanism}"):
        for which in ("plain", "protected") if i % 2 else ("protected", "plain"):
            watches[which].seconds.clear()
            draw(plain if which == "plain" else pipe, host, steps, size)
            first, *rest = watches[which].seconds[-steps:]
            seconds[which] += rest
            seconds["first"] += [first] if which == "protected" else []
    ratios = [a / b for a, b in zip(seconds["protected"], seconds["plain"], strict=True)]
    protected.unprotect()
    return {
        "host": host.words,
        "mechanism": mechanism,
        "error": error,
        "pairs": len(ratios),
        "step_protected_s": median(seconds["protected"]),
        "step_unprotected_s": median(seconds["plain"]),
        "step_ratio": median(ratios),
        "interval": median_interval(ratios),
        "first_step_s": median(seconds["first"]),
        "release_s": median(released),
    }


def measure(name: str, calls: int = 3) -> dict[str, object]:
    """One host with each mechanism that it serves."""
    warnings.simplefilter("ignore")
    threads, rows = torch.get_num_threads(), []
    torch.set_num_threads(1)
    try:
        for mechanism in HOSTS[name].mechanisms:
            rows.append(compare(name, mechanism, calls))
            tqdm.write(str(rows[-1]), file=sys.stderr)
            gc.collect()
    finally:
        torch.set_num_threads(threads)
    return {"rows": rows}


def markdown(rows: Sequence[dict[str, Any]]) -> list[str]:
    lines = [
        "",
        "**Denoising steps at real shapes**: widths, heads, text and latents (of 512 x 512, where nothing else is said), random weights, "
        "float32; the depth is cut as said. Steps are CPU seconds of one thread; ratios are medians of pairs that take turns, with their "
        "95 % interval. A release is of embeddings (`library`: of codes), so that no encoder runs.",
        "",
        "| denoiser | mechanism | step, protected / unprotected | pairs | target | step, s | first step, s | release, ms | target |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        low, high = r["interval"]
        ratio, release = TARGETS.get(r["mechanism"], TARGET)
        lines.append(
            f"| {r['host']} | `{r['mechanism']}` | {r['step_ratio']:.3f} ({low:.3f} to {high:.3f}) | {r['pairs']} | {ratio:.2f} | "
            f"{r['step_protected_s']:.2f} | {r['first_step_s']:.2f} | {1e3 * r['release_s']:.0f} | {release:,} |"
        )
    return lines
