"""Which kinds of host there are: the one place to add another. `protect`, `calibrate`, the audit and the command line ask here."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from ..calibration.calibration_options import CalibrationOptions
from ..calibration.public_data import PublicData
from ..config import DPXAttnConfig
from .diffusers.architectures import check_pipeline_class, refuse_host, unwrap
from .diffusers.public_prompts import public_prompts
from .diffusers.unet_host import UNetHost
from .guard import handle_on
from .host import Family
from .layer_host import LayerHost
from .transformers.decoder_only.decoder_host import DecoderHost
from .transformers.decoder_only.prefix_probing import is_decoder_only
from .transformers.decoder_only.public_prefixes import public_prefixes
from .transformers.encoder_decoder.cross_probing import is_seq2seq
from .transformers.encoder_decoder.encoder_decoder_host import EncoderDecoderHost
from .transformers.encoder_decoder.public_documents import public_documents
from .transformers.mllama.mllama_host import MllamaHost
from .transformers.mllama.mllama_probing import is_image_text
from .transformers.mllama.public_images import public_images


@dataclass(frozen=True)
class HostKind:
    """A kind of host: which ones it is, what adapts it, what its public contexts give, and the options that it alone takes.

    public_data: (host, public contexts, config, options) -> what a calibration is fitted to; the host is ready for that while it lasts.
    takes: of the options of `calibrate` that not all kinds take. documents: whether groups are documents that are encoded apart. pipeline:
    what of a given host is the pipeline that its model is to be protected in, or None; raises where it is neither.
    """

    matches: Callable[[Any], bool]
    host: type[LayerHost]
    public_data: Callable[[Any, Any, DPXAttnConfig, CalibrationOptions], AbstractContextManager[PublicData]]
    takes: frozenset[str] = frozenset()
    documents: bool = False
    pipeline: Callable[[Any], Any] = lambda host: None

    @property
    def family(self) -> Family:
        """What the audit and the command line know it by."""
        return self.host.family


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


QUESTIONS = frozenset({"questions"})
PREFIXES = frozenset({"public_head", "prefix_bucket", "replies"})
DIFFUSERS = HostKind(lambda host: True, UNetHost, public_prompts, pipeline=_pipeline)
# the first that matches; the last takes what no other takes, and refuses what it does not know
KINDS = (
    HostKind(is_seq2seq, EncoderDecoderHost, public_documents, QUESTIONS, documents=True),
    HostKind(is_image_text, MllamaHost, public_images, QUESTIONS),
    HostKind(is_decoder_only, DecoderHost, public_prefixes, QUESTIONS | PREFIXES),
    DIFFUSERS,
)


def kind_of(model: Any) -> HostKind:
    """The kind of a model, or of a diffusers pipeline; not of a pipeline of transformers (`model_of` gives its model)."""
    return next(kind for kind in KINDS if kind.matches(model))


def model_of(host: Any) -> Any:
    """The UNet or model of a host: of a diffusers or transformers pipeline, or the host itself."""
    from transformers import Pipeline

    return unwrap(host.model if isinstance(host, Pipeline) else getattr(host, "unet", host))
