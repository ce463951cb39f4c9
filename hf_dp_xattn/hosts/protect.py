"""`protect` and `unprotect`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

from ..calibration.anchors.anchors_calibration import AnchorCalibration
from ..calibration.calibration import Calibration
from ..calibration.library.text_library import TextLibrary
from ..config import DPXAttnConfig
from ..errors import ConfigError, UnsupportedModelError
from ..known_mechanisms import KNOWN
from ..privacy.ledger import Budget, Ledger
from .accounts import PROTECT_AGAIN, STAYS
from .guard import handle_on
from .host_registry import kind_of, model_of
from .locks import Lock
from .protected import Protected
from .release import Release
from .text.protected_text import ProtectedText
from .text.text_hosts import handle_of_parts, surface_of
from .weights import own_precision
from .worth import require_worth

if TYPE_CHECKING:
    from ..calibration.calibration import AnyCalibration
    from ..privacy.bits import Entropy


PREPARED = (
    "The model was prepared by Accelerate for mixed precision, and what it does cannot be told from outside: its forward rounds. Call "
    "dpx.protect before accelerator.prepare (or in between, accelerator.unwrap_model(model, keep_fp32_wrapper=False)). Nothing was patched."
)
_installing = Lock()  # two threads that protect one host get one handle


Handle = Protected | ProtectedText


def handle_of(host: Any) -> Any:
    """The handle (`Protected`, `ProtectedText`) of a protected pipeline, UNet or model, or None.

    Args:
        host: what was given to `protect`, or a part of it.

    Example:
        >>> protected = dpx.protect(pipe, dpx.DPXAttnConfig())
        >>> dpx.handle_of(pipe.unet) is protected
        True
    """
    found = handle_on(model_of(host))
    return handle_on(host) if found is None else found  # a pipeline's, whatever became of its UNet


def protect(
    host: Any,
    config: DPXAttnConfig,
    *,
    calibration: AnyCalibration | None = None,
    ledger: Ledger | None = None,
    budget: Budget | None = None,
    entropy: Entropy | None = None,
    tokenizer: Any = None,
    encoder: Any = None,
    allow_useless: bool = False,
) -> Any:
    """Patches a Stable Diffusion pipeline (text-to-image, img2img, inpaint), a bare UNet, an encoder-decoder or a decoder-only model in
    place.

    From then on prompts and prompt_embeds given to the pipeline are private: each is released once under `config`, and the UNet receives a
    placeholder. So is what an encoder-decoder model's `generate` is given for its encoder. A decoder-only model's
    private prefix (its system prompt) is given to `protected.release` only; its `generate` runs with `release.inputs(input_ids=...)`. Of
    Mllama, the image is private and the text public.
    Protecting again with the same settings returns the same handle; another pipeline that shares the UNet joins it.

    With mechanism="library" no attention is patched, and any host that reads text is taken: diffusers pipelines with a `prompt`, a
    text-generation pipeline (its system message is private), models that generate text, or None, for a host that is elsewhere.

    Args:
        host: a supported pipeline, a `UNet2DConditionModel`, or a language model of transformers (docs/hosts.md), or its pipeline.
        config: what is released, and at which price.
        calibration: public statistics from `dpx.calibrate`; `anchors` cannot do without.
        ledger: what was spent, and on which context. By default the process's own, which all handles share and which `unprotect` leaves as
            it is: the file that the environment variable HF_DP_XATTN_LEDGER names, or in memory, where a restart forgets.
        budget: total per context; by default one release at (config.epsilon, config.delta).
        entropy: source of the noise, the operating system's by default. A seeded one (tests) makes every release NOT private.
        tokenizer: mechanism="library" only: of a model that comes without a pipeline.
        encoder: mechanism="library" only: what made the library's codes, where that was not the host's own text encoder: a function from a
            list of strings to codes [n, d], or (model, tokenizer) of an encoder of transformers.
        allow_useless: go on where the calibration says that a release at this epsilon is not known to be better than none.

    Raises:
        UnsupportedModelError: the host is not in the table, or what is private has ways around cross-attention.
        ConfigError: the host is protected with other settings; the calibration is missing, or made for another mechanism, unit, model or
            text encoder; or its plan for this epsilon is not known to be better than no release (see `allow_useless`).
        ProtectionLostError: the host is protected and something was replaced since.
        LedgerError: the process's ledger cannot be opened.
        In each case nothing was patched.

    Example:
        >>> protected = dpx.protect(pipe, dpx.DPXAttnConfig(epsilon=8.0))
        >>> images = pipe("a red circle", num_inference_steps=2).images  # the prompt is private: released once, and charged
        >>> print(protected.report())
        Privacy report: ...
    """
    with _installing:
        settings = (config, calibration, ledger, budget, entropy)
        return _protect(host, *settings, tokenizer=tokenizer, encoder=encoder, allow_useless=allow_useless)


def protect_to_serve(
    host: Any,
    config: DPXAttnConfig,
    *,
    ledger: Ledger | None = None,
    budget: Budget | None = None,
    tokenizer: Any = None,
) -> Handle:
    """`protect` for a release that was loaded: without a calibration or a ledger, which only new releases need (`accounts.NoLedger`)."""
    with _installing:
        return _protect(host, config, ledger=ledger, budget=budget, tokenizer=tokenizer, serving_only=True)


def _serve(host: Any, config: DPXAttnConfig, ledger: Ledger | None) -> tuple[Handle, bool]:
    """See `Release.from_pretrained`.

    Args:
        host: what is to be served.
        config: the release's.
        ledger: what has been spent so far, or None.
    """
    handle = handle_of(host)
    if handle is None:
        return protect_to_serve(host, config, ledger=ledger), True
    if ledger not in (None, handle.ledger):
        raise ConfigError(
            "This host is protected with another ledger, or with none, already. Load the release without `ledger`; or call "
            f"dpx.unprotect(host) and load it with this one ({STAYS})."
        )
    return handle, False


Release.server = staticmethod(_serve)


def _protect(
    host: Any,
    config: DPXAttnConfig,
    calibration: AnyCalibration | None = None,
    ledger: Ledger | None = None,
    budget: Budget | None = None,
    entropy: Entropy | None = None,
    *,
    tokenizer: Any = None,
    encoder: Any = None,
    serving_only: bool = False,
    allow_useless: bool = False,
) -> Handle:
    if not isinstance(config, DPXAttnConfig):
        raise ConfigError(f"config must be a DPXAttnConfig, got {type(config).__name__}.")
    _check_types(calibration, ledger, budget)
    require_worth(config, calibration, allow_useless=allow_useless)
    if KNOWN[config.mechanism].releases == "texts" or isinstance(handle_of(host), ProtectedText):
        settings = (config, calibration, ledger, budget, entropy)
        return _protect_text(host, settings, tokenizer, encoder, serving_only=serving_only)
    if tokenizer is not None or encoder is not None:
        raise ConfigError("`tokenizer` and `encoder` are for mechanism='library'.")
    model = model_of(host)
    kind = kind_of(model)
    pipe = kind.pipeline(host)
    handle: Protected | None = handle_of(model)
    if handle is not None:
        _check_same(handle, config, calibration, ledger, budget, entropy)
        handle.guard.check_thoroughly()
        if pipe is not None and not handle.host.has(pipe):
            handle.host.join(pipe, handle.host.side_of(pipe, handle.guard.maker))
        return handle
    try:
        with own_precision(model):
            served = kind.host(model)
    except UnsupportedModelError as error:
        if "_original_forward" in vars(model):
            raise UnsupportedModelError(PREPARED) from error
        raise
    handle = Protected(
        served,
        config,
        calibration=calibration,
        ledger=ledger,
        budget=budget,
        entropy=entropy,
        serving_only=serving_only,
    )
    side = None if pipe is None else handle.host.side_of(pipe, handle.guard.maker)
    try:
        handle.install()
        if pipe is not None:
            handle.host.join(pipe, side)
    except BaseException:
        handle.unprotect()
        raise
    return handle


def _protect_text(
    host: Any, settings: tuple[Any, ...], tokenizer: Any, encoder: Any, *, serving_only: bool
) -> ProtectedText:
    """`_protect` for a host that reads released text. settings: config, calibration, ledger, budget, entropy."""
    config, calibration, ledger, budget, entropy = settings
    handle = handle_of(host) or handle_of_parts(host)
    if handle is not None:
        _check_same(handle, *settings)
        handle.check()
        if not handle.has(host):
            handle.join(surface_of(host, handle, tokenizer))
        return cast(ProtectedText, handle)
    if calibration is not None and not isinstance(calibration, TextLibrary):
        raise ConfigError(
            f"This calibration is for mechanism={calibration.mechanism!r}, the config says {config.mechanism!r}: change the config, or "
            "make a library (dpx.calibrate(host, public_contexts, config))."
        )
    made = ProtectedText(
        config,
        library=calibration,
        encoder=encoder,
        tokenizer=tokenizer,
        host=host,
        ledger=ledger,
        budget=budget,
        entropy=entropy,
        serving_only=serving_only,
    )
    try:
        if host is not None:
            made.join(surface_of(host, made, tokenizer))
    except BaseException:
        made.unprotect()
        raise
    return made


def _check_types(calibration: Any, ledger: Any, budget: Any) -> None:
    """A path or a number in the place of an object would be noticed at the first release only, or be taken for something else."""
    for name, given, kinds, way in (
        (
            "calibration",
            calibration,
            (Calibration, AnchorCalibration, TextLibrary),
            "dpx.Calibration.from_pretrained(path)",
        ),
        ("ledger", ledger, (Ledger,), "dpx.Ledger(path)"),
        ("budget", budget, (Budget,), "dpx.Budget(epsilon, delta)"),
    ):
        if given is not None and not isinstance(given, kinds):
            raise ConfigError(f"`{name}` is a {type(given).__name__}: pass {way}. Nothing was patched.")


def _check_same(handle: Handle, config: DPXAttnConfig, *others: Any) -> None:
    own = (handle.calibration, handle.ledger, handle.budget, handle.entropy)
    same = all(
        o is None
        or o is mine
        or (isinstance(o, Budget) and o.scoped(handle.config.unit, handle.config.neighboring) == mine)
        for o, mine in zip(others, own, strict=True)
    )
    if config != handle.config or not same:
        raise ConfigError(
            "This host is protected with other settings already. Call dpx.unprotect(host) first, then "
            f"{PROTECT_AGAIN}."
        )


def unprotect(host: Any) -> None:
    """Restores a protected host (and every pipeline that joined it) to what it was. Does nothing where there is no protection.

    Args:
        host: what was given to `protect`, or a part of it.

    Example:
        >>> protected = dpx.protect(pipe, dpx.DPXAttnConfig())
        >>> dpx.unprotect(pipe)
        >>> protected.active
        False
    """
    handle = handle_of(host)
    if handle is not None:
        handle.unprotect()
