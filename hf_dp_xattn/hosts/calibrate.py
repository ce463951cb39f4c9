"""`calibrate`: public statistics of a host's cross-attention, from public prompts or documents."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from tqdm.auto import tqdm

from ..calibration.anchors.anchors_calibration import AnchorCalibration
from ..calibration.anchors.anchors_fit import candidates, fit_anchors
from ..calibration.anchors.objective import Objective
from ..calibration.calibration import Calibration
from ..calibration.calibration_options import CalibrationOptions
from ..calibration.kernel_fit import PublicQueries, Rows, fit_calibration
from ..config import DPXAttnConfig
from ..errors import ConfigError
from .access import Access
from .architectures import check_pipeline_class, find_layers
from .decoder_only.probing import is_decoder_only
from .identity import host_identity
from .image_text.probing import is_image_text
from .protect import handle_of
from .public_prompts import Public, gather_contexts, is_large, layer_probes, slot_schedule
from .rows import layer_specs, project_rows, split_heads
from .seq2seq.probing import is_seq2seq
from .text import TextSide

if TYPE_CHECKING:
    from diffusers.models.attention_processor import Attention

EPSILONS = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0)


def calibrate(
    pipe: Any,
    public_contexts: Public,
    config: DPXAttnConfig | None = None,
    *,
    epsilons: Sequence[float] = EPSILONS,
    anchors: int = 4096,
    releases: Sequence[str] = ("sum", "response", "histogram", "mixed"),
    steps: int | None = None,
    grouping: str | None = None,
    memory_mb: int = 2048,
    rank: int = 128,
    query_prompts: int | None = None,
    query_steps: int | None = None,
    queries_per_step: int = 32,
    seed: int = 0,
    progress: bool = True,
    public_head: Any = 0,
    questions: Sequence[Any] | None = None,
    prefix_bucket: int | None = None,
    replies: int = 0,
) -> Calibration | AnchorCalibration:
    """Everything data-dependent that a mechanism reads, fitted to PUBLIC prompts.

    Nothing private may be among `public_contexts`: a calibration is not noised and not counted. The pipeline must not be
    protected; its weights and random state are left alone.

    * `anchors`: codebook, priors, learned sums, decoders, and for each epsilon the release that did best on public contexts that were
      held out. From about 100 to 10^6 public contexts; what does not fit `memory_mb` is left out by a random choice, before encoding.
    * `kernel_sum`: centres, balancing maps, clipping bounds, a sketch basis of `rank` directions, and one plan per epsilon.

    Args:
        pipe: a Stable Diffusion pipeline, or an encoder-decoder model of transformers.
        public_contexts: prompts; lists of phrases for unit="group"; or embeddings [N, n, C] of which all rows are used. For an
            encoder-decoder model: token ids [N, n] cut to one length, or what else its encoder takes, as in `protected.release`; for
            unit="group" a list of contexts, each a batch of documents as `release(..., groups="documents")` takes it. For a Mllama:
            what its image processor gives for images of one number of tiles. For a
            decoder-only model: token ids [N, n] or a list of token id lists; for unit="group", a list of lists of segments.
        config: mechanism, unit and relation to fit for; by default `anchors` with unit="row".
        anchors: cells of the histogram's codebook. releases: candidates of `anchors` ("sum", "response", "histogram", "mixed").
        steps: training steps of the decoder; by default what takes a few minutes on two cores. More do better.
        grouping: how units are encoded, "rows", "phrases" or "context"; by default what the unit says.
        rank: kernel_sum only; 0 fits geometry and bounds only.
        query_prompts, query_steps, queries_per_step: public denoising runs from which queries are taken; by default 8 prompts over 6
            steps, or 2 over 4 on a host as large as Stable Diffusion's (16 sampled tokens for each of 8 documents or prefixes).
        public_head, prefix_bucket: decoder-only models, as in `protected.release`.
        questions: token ids of public users' turns (of an encoder-decoder model: of what its decoder's texts start with), whose queries
            (and those of answers that are sampled) the calibration is fitted to; by default only sampled text.
        replies: decoder-only models, `anchors`: how many questions each public prefix is asked, so that the decoder is trained on the
            model's own replies (of up to `query_steps` tokens) as well as on its attention. Each training step then runs the model
            forwards and backwards. What a user sees gains most from this.

    Raises:
        ConfigError: too few contexts, wrong type. UnsupportedModelError: not a supported pipeline.
    """
    config = DPXAttnConfig(mechanism="anchors") if config is None else config
    options = CalibrationOptions(
        epsilons=epsilons,
        anchors=anchors,
        releases=tuple(releases),
        steps=steps,
        grouping=grouping,
        memory_mb=memory_mb,
        rank=rank,
        query_prompts=query_prompts,
        query_steps=query_steps,
        queries_per_step=queries_per_step,
        seed=seed,
        progress=progress,
        public_head=public_head,
        questions=questions,
        prefix_bucket=prefix_bucket,
        replies=replies,
    )
    if handle_of(pipe) is not None:
        raise ConfigError(
            "Calibrate before `protect` (or after `unprotect`): a protected pipeline has no exact queries."
        )
    if is_decoder_only(pipe) and not is_image_text(pipe):
        from .decoder_only.public_prefixes import calibrate_decoder

        return calibrate_decoder(pipe, public_contexts, config, options)
    if prefix_bucket is not None or public_head != 0 or replies:
        raise ConfigError("public_head, prefix_bucket and replies are for decoder-only models.")
    if is_seq2seq(pipe) or is_image_text(pipe):
        from .image_text.public_images import calibrate_image_text
        from .seq2seq.public_documents import calibrate_seq2seq

        fit = calibrate_seq2seq if is_seq2seq(pipe) else calibrate_image_text
        return fit(pipe, public_contexts, config, options)
    if questions is not None:
        raise ConfigError("questions are for models that generate text.")
    return _calibrate_pipeline(pipe, public_contexts, config, options)


def _calibrate_pipeline(
    pipe: Any, public_contexts: Public, config: DPXAttnConfig, options: CalibrationOptions
) -> Calibration | AnchorCalibration:
    """See `calibrate`. Queries are those of public denoising runs."""
    check_pipeline_class(pipe)
    layers = find_layers(pipe.unet)
    text = TextSide(pipe, Access())
    large = is_large(layers)
    prompts = (2 if large else 8) if options.query_prompts is None else options.query_prompts

    def queries_of(whole: torch.Tensor) -> list[torch.Tensor]:
        steps = (4 if large else 6) if options.query_steps is None else options.query_steps
        chosen = whole[:prompts].to(pipe.unet.dtype)
        return public_queries(
            pipe, layers, text, chosen, steps, options.queries_per_step, options.seed, options.progress
        )

    gains = [output_gain(attn) for attn in layers.values()]
    if config.mechanism == "anchors":
        settings = options.anchor_settings(validation=128 if large else 400)
        candidates(config, settings)  # refuses what cannot be before minutes are spent on it
        grouping = options.grouping or {"row": "rows", "group": "phrases", "context": "context"}[config.unit]
        contexts, public_rows = gather_contexts(
            text,
            public_contexts,
            config.unit,
            grouping,
            memory_mb=options.memory_mb,
            seed=options.seed,
            progress=options.progress,
        )
        schedule = slot_schedule(layers, contexts.whole.shape[1], options.steps, options.seed)
        settings = dataclasses.replace(settings, slots=schedule)
        queries = queries_of(contexts.whole)
        objective = Objective(layer_probes(layers, queries, gains), public_rows)
        identity = host_identity(layers, pipe.unet.dtype, text)
        return fit_anchors(
            config,
            contexts,
            objective,
            identity,
            grouping=grouping,
            epsilons=options.epsilons,
            settings=settings,
        )
    private, whole = _encode(text, public_contexts, options.progress)
    specs = layer_specs(layers, pipe.unet.dtype)

    @torch.no_grad()
    def contexts_of_layers() -> Iterator[Rows]:
        for rows in private:
            pairs = [project_rows(attn, rows) for attn in layers.values()]
            yield [k for k, _ in pairs], [v for _, v in pairs]

    return fit_calibration(
        config,
        specs,
        contexts_of_layers,
        PublicQueries(queries_of(torch.stack(list(whole[:prompts]))), gains),
        count=len(private),
        epsilons=options.epsilons,
        rank=options.rank,
        progress=options.progress,
    )


def _encode(text: TextSide, public: Public, progress: bool) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """(rows that a release would treat as private, whole encodings) of the public contexts."""
    if isinstance(public, torch.Tensor):
        if public.ndim != 3 or not public.is_floating_point() or not bool(torch.isfinite(public).all()):
            raise ConfigError("Public embeddings must be a finite floating-point tensor [N, n, C].")
        return list(public), list(public)
    if isinstance(public, str) or not all(isinstance(t, str) for t in public):
        raise ConfigError("public_contexts must be a list of prompts or a tensor of embeddings [N, n, C].")
    whole = [
        text.encode(*text.tokenize(t))
        for t in tqdm(public, desc="encoding", disable=not progress, leave=False)
    ]
    return [rows[1:] if text.first_row_is_public else rows for rows in whole], whole


def output_gain(attn: Attention) -> torch.Tensor:
    """[H] mean squared gain from a head's output channel to the layer's output."""
    projection: Any = getattr(attn.to_out[0], "base_layer", attn.to_out[0])
    weight = projection.weight.detach().to("cpu", torch.float64)
    per_head = weight.reshape(weight.shape[0], attn.heads, -1)
    return per_head.square().sum((0, 2)) / per_head.shape[2]


@contextmanager
def _capture(layers: Iterable[Attention], per_step: int, seed: int) -> Iterator[list[list[torch.Tensor]]]:
    """Collects `per_step` queries a call from each layer's `to_q`."""
    gen = torch.Generator().manual_seed(seed)
    hooks, store = [], []
    for attn in layers:
        seen: list[torch.Tensor] = []

        def hook(
            module: Any, args: Any, output: torch.Tensor, attn: Any = attn, seen: list[torch.Tensor] = seen
        ) -> None:
            query = split_heads(output, attn.heads)
            if attn.norm_q is not None:
                query = attn.norm_q(query)
            index = torch.randperm(query.shape[2], generator=gen)[:per_step].to(query.device)
            seen.append(query[:, :, index].transpose(0, 1).flatten(1, 2).to("cpu", torch.float32))

        hooks.append(attn.to_q.register_forward_hook(hook))
        store.append(seen)
    try:
        yield store
    finally:
        for h in hooks:
            h.remove()


@torch.no_grad()
def public_queries(
    pipe: Any,
    layers: dict[str, Attention],
    text: TextSide,
    embeddings: torch.Tensor,
    steps: int,
    per_step: int,
    seed: int,
    progress: bool,
) -> list[torch.Tensor]:
    """Queries [H, m, d] of each layer along public denoising runs (guided, from noise), with a scheduler of our own."""
    scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)
    device, unet = pipe._execution_device, pipe.unet
    scheduler.set_timesteps(steps, device=device)
    size = unet.config.sample_size
    height, width = (size, size) if isinstance(size, int) else size
    gen = torch.Generator().manual_seed(seed)
    shape = (len(embeddings), pipe.vae.config.latent_channels, height, width)
    sample = torch.randn(shape, generator=gen).to(device, unet.dtype) * scheduler.init_noise_sigma
    if text.available and embeddings.shape[1] == text.length:
        empty = text.encode(*text.tokenize("")).unsqueeze(0).expand_as(embeddings)
    else:
        empty = torch.zeros_like(embeddings)
    both = torch.cat([empty, embeddings]).to(device, unet.dtype)
    with _capture(layers.values(), per_step, seed) as store:
        for t in tqdm(scheduler.timesteps, desc="public queries", disable=not progress, leave=False):
            model_input = scheduler.scale_model_input(torch.cat([sample, sample]), t)
            if unet.config.in_channels != model_input.shape[1]:  # inpainting: an empty mask and image
                extra = unet.config.in_channels - model_input.shape[1]
                model_input = torch.cat(
                    [model_input, model_input.new_zeros(model_input.shape[0], extra, height, width)], 1
                )
            uncond, cond = unet(model_input, t, encoder_hidden_states=both).sample.chunk(2)
            sample = scheduler.step(uncond + 3.0 * (cond - uncond), t, sample).prev_sample
    # the unconditional half of each call comes from the empty prompt: its queries are as public as the others
    return [torch.cat(seen, dim=1) for seen in store]
