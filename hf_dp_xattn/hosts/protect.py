"""`protect`, `unprotect`, and `Release`, which protects the host that it is loaded for."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, Unpack, cast

from ..artefacts import HubOptions
from ..config import DPXAttnConfig
from ..errors import ConfigError, DPXAttnError, UnsupportedModelError
from ..known_mechanisms import KNOWN
from ..privacy.ledger import Budget, Ledger
from .accounts import PROTECT_AGAIN, STAYS, Settings
from .chosen import chosen_config, read_calibration
from .diffusers.architectures import check_text_encoders
from .guard import handle_on
from .host import Host
from .host_registry import HostKind, kind_to_protect, model_of
from .locks import Lock
from .protected import Protected
from .release import BaseRelease
from .text.text_host import TextHost, handle_of_parts
from .text.text_release_file import load_release, locate_release
from .weights import own_precision
from .worth import enough_units, require_calibration, require_sense, require_worth

if TYPE_CHECKING:
    from ..calibration.stored import Stored
    from ..privacy.bits import Entropy


PREPARED = (
    "The model was prepared by Accelerate for mixed precision, and what it does cannot be told from outside: its forward rounds. Call "
    "dpx.protect before accelerator.prepare (or in between, accelerator.unwrap_model(model, keep_fp32_wrapper=False)). Nothing was patched."
)
OTHER_KIND = (
    "{pipeline} shares its denoiser with a pipeline that is protected in another way. Call dpx.unprotect(pipe) first, then "
    f"{PROTECT_AGAIN}."
)
_installing = Lock()  # two threads that protect one host get one handle


def handle_of(host: Any) -> Any:
    """The handle (`Protected`) of a protected pipeline, UNet or model, or None.

    Args:
        host: what was given to `protect`, or a part of it.

    Example:
        >>> protected = dpx.protect(pipe, calibration=library)
        >>> dpx.handle_of(pipe) is protected
        True
    """
    handle = handle_on(model_of(host))
    return handle_on(host) if handle is None else handle  # a pipeline's, whatever became of its UNet


def protect(
    host: Any,
    config: DPXAttnConfig | None = None,
    *,
    epsilon: float | None = None,
    calibration: Stored | str | os.PathLike[str] | None = None,
    ledger: Ledger | None = None,
    budget: Budget | None = None,
    entropy: Entropy | None = None,
    tokenizer: Any = None,
    encoder: Any = None,
    allow_useless: bool = False,
    allow_uncalibrated: bool = False,
    allow_large_epsilon: bool = False,
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
        config: what is released, and at which price. By default mechanism, unit and relation are those that the calibration was made for.
        epsilon: in place of a config, where that is all that it would say.
        calibration: public statistics from `dpx.calibrate`, or their folder or Hub id.
        ledger: what was spent, and on which context. By default the process's own, which all handles share and which `unprotect` leaves as
            it is: the file that the environment variable HF_DP_XATTN_LEDGER names, or in memory, where a restart forgets.
        budget: total per context; by default one release at (config.epsilon, config.delta).
        entropy: source of the noise, the operating system's by default. A seeded one (tests) makes every release NOT private.
        tokenizer: mechanism="library" only: of a model that comes without a pipeline.
        encoder: mechanism="library" only: what made the library's codes, where that was not the host's own text encoder: a function from a
            list of strings to codes [n, d], or (model, tokenizer) of an encoder of transformers.
        allow_useless: go on where the calibration says that a release at this epsilon, or of so few units, is not known to be better than
            none.
        allow_uncalibrated: go on without a calibration, where the budget is spent for noise.
        allow_large_epsilon: take an epsilon above 100, which promises nothing that anyone could notice.

    Warns:
        UserWarning: epsilon is above 16; or unit="row", which protects one embedding row: not a word, and not the prompt.

    Raises:
        UnsupportedModelError: the host is not in the table, or what is private has ways around cross-attention.
        ConfigError: the host is protected with other settings; the calibration is missing, or made for another mechanism, unit, model or
            text encoder; its plan for this epsilon is not known to be better than no release (see `allow_useless`); there is none (see
            `allow_uncalibrated`); or epsilon is above 100.
        ProtectionLostError: the host is protected and something was replaced since.
        LedgerError: the process's ledger cannot be opened.
        In each case nothing was patched.

    Example:
        >>> protected = dpx.protect(pipe, epsilon=8.0, calibration=library)
        >>> images = pipe("a red circle", num_inference_steps=2).images  # the prompt is private: released once, and charged
        >>> print(protected.report())
        Privacy report: ...
    """
    calibration, there = read_calibration(calibration), handle_of(host)
    if there is None:
        config = chosen_config(config, epsilon, calibration)
        require_sense(config, allow_large_epsilon=allow_large_epsilon)
        require_calibration(config, calibration, allow_uncalibrated=allow_uncalibrated)
    elif config is None and epsilon is None:
        config = there.config
    else:
        config = chosen_config(config, epsilon, there.calibration if calibration is None else calibration)
    settings = Settings(config, calibration, ledger, budget, entropy, allow_useless=allow_useless)
    return _protect(host, settings, tokenizer=tokenizer, encoder=encoder)


def protect_to_serve(
    host: Any,
    config: DPXAttnConfig,
    *,
    ledger: Ledger | None = None,
    budget: Budget | None = None,
    tokenizer: Any = None,
) -> Protected:
    """`protect` for a release that was loaded: without a calibration or a ledger, which only new releases need (`accounts.NoLedger`)."""
    settings = Settings(config, ledger=ledger, budget=budget, serving_only=True)
    return _protect(host, settings, tokenizer=tokenizer)


class Release(BaseRelease):
    """One release per context; every query, layer, step and output that uses it is post-processing.

    *Formal guarantee.* `guarantees[i]` states what was released of context i; for `mechanism="none"` that is nothing private.
    Made by `protected.release(...)`, saved and loaded with `save_pretrained` / `from_pretrained`; not by hand.

    Args:
        contexts: what was released of each.
        config: under which.
        handle: that made or loaded it; held weakly.
        growing: its growing side, where there is one.
        terms: what was public and not covered where it was made; None: here.

    Example:
        >>> release = dpx.protect(pipe, epsilon=8.0, calibration=library).release("a red circle")
        >>> images = pipe(**release.inputs(), num_inference_steps=2).images
        >>> folder = release.save_pretrained("red-circle")
        >>> again = dpx.Release.from_pretrained("red-circle", host=pipe)
    """

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | os.PathLike[str],
        *,
        host: Any,
        ledger: Ledger | None = None,
        tokenizer: Any = None,
        **options: Unpack[HubOptions],
    ) -> BaseRelease:
        """Loads a release (a folder or a Hub repository, `HubOptions`) for `host`, which is protected with the release's config if it
        is not yet.

        No calibration or ledger is needed to serve a release. A host that is protected here makes no release of its own without a ledger,
        and no `anchors` release at all (protect it first, with the calibration).

        Args:
            name_or_path: folder or Hub id.
            host: what it is to serve.
            options: revision, token, subfolder, ... (`artefacts.HubOptions`).
            ledger: what has been spent so far, if the host is to make releases too. The variable HF_DP_XATTN_LEDGER gives one as well.
            tokenizer: of released text: of a model that comes without a pipeline and has none beside it (a GGUF file).

        Raises:
            ConfigError: the host is protected already, with another ledger.
            ReleaseError: damaged, truncated, of another schema, or made for another model. The host is as it was.
        """
        file = load_release(locate_release(name_or_path, **options))
        known = handle_of(host)
        if known is not None and ledger not in (None, known.ledger):
            raise ConfigError(
                "This host is protected with another ledger, or with none, already. Load the release without `ledger`; or call "
                f"dpx.unprotect(host) and load it with this one ({STAYS})."
            )
        handle = (
            protect_to_serve(host, file.config, ledger=ledger, tokenizer=tokenizer)
            if known is None
            else known
        )
        try:
            return cast(BaseRelease, handle.take_in(file))
        except DPXAttnError:
            if known is None:
                handle.unprotect()
            raise


def _protect(host: Any, settings: Settings, *, tokenizer: Any = None, encoder: Any = None) -> Protected:
    config = settings.config
    _check_types(settings)
    check_text_encoders(host)
    with _installing:
        handle: Protected | None = handle_of(host)
        kind: HostKind | None = None
        if KNOWN[config.mechanism].releases == "texts" or isinstance(getattr(handle, "host", None), TextHost):
            handle, model, pipe = handle or handle_of_parts(host), host, host
        else:
            if tokenizer is not None or encoder is not None:
                raise ConfigError("`tokenizer` and `encoder` are for mechanism='library'.")
            model, kind = model_of(host), kind_to_protect(host)
            pipe = kind.pipeline(host)
            handle = handle_of(model)
            beside = handle_of_parts(host) if handle is None and pipe is not None else None
            if beside is not None and isinstance(beside.host, TextHost) and beside.host.draws_with(model):
                raise UnsupportedModelError(OTHER_KIND.format(pipeline=type(pipe).__name__))
            if handle is not None and pipe is not None and handle.host.adapts_pipelines != kind.whole:
                raise UnsupportedModelError(OTHER_KIND.format(pipeline=type(pipe).__name__))
        if handle is None:
            return _installed(_host(host, model, kind, settings, tokenizer, encoder), settings, pipe)
        _check_same(handle, settings)
        handle.guard.check_thoroughly()
        if pipe is not None and not handle.host.has(pipe):
            handle.host.join(pipe, handle.host.side_of(pipe, handle.guard), handle)
        return handle


def _host(
    host: Any, model: Any, kind: HostKind | None, settings: Settings, tokenizer: Any, encoder: Any
) -> Host:
    """What adapts a host that is not protected. kind: None where texts are released. Raises UnsupportedModelError."""
    if kind is None:
        return TextHost(model, tokenizer, encoder)
    try:
        with own_precision(model):
            return kind.host(host if kind.whole else model)
    except UnsupportedModelError as error:
        if "_original_forward" in vars(model):
            raise UnsupportedModelError(PREPARED) from error
        raise


def _installed(host: Host, settings: Settings, pipe: Any) -> Protected:
    """The handle of a host, with the pipeline that was given. Nothing stays patched where it fails."""
    handle = Protected(host, settings, Release)
    require_worth(settings)
    handle.releases.enough = enough_units(settings)
    side = None if pipe is None else host.side_of(pipe, handle.guard)
    try:
        handle.install()
        if pipe is not None:
            host.join(pipe, side, handle)
    except BaseException:
        handle.unprotect()
        raise
    return handle


def _check_types(settings: Settings) -> None:
    """A path or a number in the place of an object would be noticed at the first release only, or be taken for something else."""
    for name, value, kinds, expected in (
        ("ledger", settings.ledger, (Ledger,), "dpx.Ledger(path)"),
        ("budget", settings.budget, (Budget,), "dpx.Budget(epsilon, delta)"),
    ):
        if value is not None and not isinstance(value, kinds):
            raise ConfigError(f"`{name}` is a {type(value).__name__}: pass {expected}. Nothing was patched.")


def _check_same(handle: Protected, settings: Settings) -> None:
    asked = (settings.calibration, settings.ledger, settings.entropy)
    current = (handle.calibration, handle.ledger, handle.entropy)
    same = all(a is None or a is b for a, b in zip(asked, current, strict=True))
    budget = settings.budget is None or settings.scoped() == handle.budget
    if settings.config != handle.config or not (same and budget):
        raise ConfigError(
            "This host is protected with other settings already. Call dpx.unprotect(host) first, then "
            f"{PROTECT_AGAIN}."
        )


def unprotect(host: Any) -> None:
    """Restores a protected host to what it was. Does nothing where there is no protection.

    Hosts that share a model (a UNet, a text encoder) share one handle. ALL of them are unprotected, whichever was given: from then on each
    of them reads private text exactly. To go on with another of them, protect it again, with the same ledger.

    Args:
        host: what was given to `protect`, or a part of it.

    Example:
        >>> protected = dpx.protect(pipe, calibration=library)
        >>> dpx.unprotect(pipe)
        >>> protected.active
        False
    """
    handle = handle_of(host)
    if handle is not None:
        handle.unprotect()
