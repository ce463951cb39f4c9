"""Which kinds of host there are: the one place to add another. `protect`, `calibrate`, the audit and the command line ask here."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from ..calibration.calibration_options import CalibrationOptions
from ..calibration.public_data import PublicData
from ..config import DPXAttnConfig
from ..known_mechanisms import KNOWN
from .diffusers.architectures import PIPELINES, check_pipeline_class, refuse_host, unwrap
from .diffusers.denoiser_host import denoiser_of
from .diffusers.picture_driver import PipelineDriver, PlacedDriver, UNetDriver
from .diffusers.placed_public import placed_public
from .diffusers.public_prompts import public_prompts
from .diffusers.rows_host import placed_host
from .diffusers.unet_host import UNetHost
from .driver import Driver
from .guard import handle_on
from .layer_host import LayerHost
from .text.released_drivers import released_driver
from .transformers.decoder_only.decoder_host import DecoderHost
from .transformers.decoder_only.prefix_driver import PrefixDriver
from .transformers.decoder_only.prefix_probing import is_decoder_only
from .transformers.decoder_only.public_prefixes import public_prefixes
from .transformers.encoder_decoder.cross_probing import is_seq2seq
from .transformers.encoder_decoder.document_driver import DocumentDriver
from .transformers.encoder_decoder.encoder_decoder_host import EncoderDecoderHost
from .transformers.encoder_decoder.public_documents import public_documents
from .transformers.mllama.image_driver import ImageDriver
from .transformers.mllama.mllama_host import MllamaHost
from .transformers.mllama.mllama_probing import is_image_text
from .transformers.mllama.public_images import public_images


@dataclass(frozen=True)
class HostKind:
    """A kind of host: which ones it is, what adapts it, what its public contexts give, and the options that it alone takes.

    public_data: (host, public contexts, config, options) -> what a calibration is fitted to; the host is ready for that while it lasts.
    driver: its use from plain texts, by the audit and the command line. takes: of the options of `calibrate` that not all kinds take.
    documents: whether groups are documents that are encoded apart. pipeline: what of a given host is the pipeline that its model is to be
    protected in, or None; raises where it is neither. whole: the host adapts that pipeline, not its model. shipped: the kind of the
    package's public prompts that are like what it reads; None where there are none.
    """

    matches: Callable[[Any], bool]
    host: Callable[[Any], LayerHost]
    public_data: Callable[[Any, Any, DPXAttnConfig, CalibrationOptions], AbstractContextManager[PublicData]]
    driver: type[Driver]
    takes: frozenset[str] = frozenset()
    documents: bool = False
    pipeline: Callable[[Any], Any] = lambda host: None
    whole: bool = False
    shipped: str | None = "system"


def _pipeline(host: Any) -> Any:
    """The pipeline of diffusers that was given; None for a bare UNet. Raises UnsupportedModelError for anything else."""
    from diffusers import DiffusionPipeline, UNet2DConditionModel

    if type(model_of(host)) is not UNet2DConditionModel:
        raise refuse_host(host)
    if not isinstance(host, DiffusionPipeline):
        return None
    known = handle_on(host)
    if known is None or known is not handle_on(model_of(host)):  # else it has joined
        check_pipeline_class(host)
    return host


def _is_other_pipeline(host: Any) -> bool:
    """A pipeline of diffusers that is none of those whose UNet is patched (`PIPELINES`)."""
    import diffusers

    return isinstance(host, diffusers.DiffusionPipeline) and not isinstance(
        host, tuple(getattr(diffusers, name) for name in PIPELINES)
    )


QUESTIONS = frozenset({"questions"})
PREFIXES = frozenset({"public_head", "prefix_bucket", "replies"})
DIFFUSERS = HostKind(
    lambda host: True, UNetHost, public_prompts, PipelineDriver, pipeline=_pipeline, shipped="picture"
)
# the first that matches; the last takes what no other takes, and refuses what it does not know
KINDS = (
    HostKind(
        is_seq2seq,
        EncoderDecoderHost,
        public_documents,
        DocumentDriver,
        QUESTIONS,
        documents=True,
        shipped=None,
    ),
    HostKind(is_image_text, MllamaHost, public_images, ImageDriver, QUESTIONS),
    HostKind(is_decoder_only, DecoderHost, public_prefixes, PrefixDriver, QUESTIONS | PREFIXES),
    HostKind(
        _is_other_pipeline,
        placed_host,
        placed_public,
        PlacedDriver,
        pipeline=lambda host: host,
        whole=True,
        shipped="picture",
    ),
    DIFFUSERS,
)


def kind_of(model: Any) -> HostKind:
    """The kind of a model, or of a diffusers pipeline; not of a pipeline of transformers (`model_of` gives its model)."""
    return next(kind for kind in KINDS if kind.matches(model))


def driver_for(host: Any, config: DPXAttnConfig) -> type[Driver]:
    """What uses a host from plain texts. Raises UnsupportedModelError, ConfigError."""
    if KNOWN[config.mechanism].releases == "texts":
        return released_driver(host)
    kind = kind_of(host)
    return UNetDriver if kind is DIFFUSERS and kind.pipeline(host) is None else kind.driver


def model_of(host: Any) -> Any:
    """The denoiser or model of a host: of a diffusers or transformers pipeline, or the host itself."""
    from diffusers import DiffusionPipeline
    from transformers import Pipeline

    if isinstance(host, DiffusionPipeline):
        denoiser = denoiser_of(host)
        return host if denoiser is None else denoiser
    return unwrap(host.model if isinstance(host, Pipeline) else getattr(host, "unet", host))


def kind_to_protect(host: Any) -> HostKind:
    """The kind of whatever `protect` was given."""
    whole = kind_of(host)
    return whole if whole.whole else kind_of(model_of(host))
