"""`audit`: what a sceptical operator would try against a protection, on the operator's own model, through the public interface."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from tqdm.auto import tqdm

from ..config import DPXAttnConfig
from ..errors import ConfigError, ContextError
from ..hosts.driver import Canary, Driver
from ..hosts.making import LayerRecipe
from .audit_report import NOT_APPLICABLE, AuditReport, Check, EpsilonBound, Extraction
from .empirical import audit_releases, preparer, targets
from .extraction import extract, verdict
from .leaks import LEAKS, OF_LAYERS
from .settings import CANDIDATES, CONFIDENCE, DRAWS, SMALLER, TRIALS, check_numbers
from .subjects import subject_of

OWN_LEDGER = (
    "Canaries were charged to a ledger in memory that only this audit had; no budget of yours was spent."
)


def audit(
    host: Any,
    config: DPXAttnConfig,
    *,
    calibration: Any = None,
    tokenizer: Any = None,
    texts: Sequence[str] | None = None,
    contexts: Sequence[Any] | None = None,
    draws: int = DRAWS,
    trials: int = TRIALS,
    confidence: float = CONFIDENCE,
    progress: bool = False,
) -> AuditReport:
    """Tries leak tests, an empirical epsilon and an extraction on a host as `dpx.protect(host, config)` would protect it.

    The host is protected for the time of the audit, with a ledger of its own in memory, and left unprotected, as it was.

    Args:
        host: a host that `protect` takes and that is not protected now. calibration: as for `protect`.
        tokenizer: of a transformers model; without one, canaries are random token ids.
        texts: candidates for the extraction, at least two; what you would hide, or texts like it. They are not written into the report.
            For unit="group" each is ONE unit beside others. By default random words of the tokenizer's vocabulary.
        contexts: in place of canaries, for encoders that read no text: at least two mappings of encoder inputs.
        draws: releases of each neighbour for the empirical epsilon. trials: releases for the extraction.
        confidence: of all lower bounds on epsilon together: a sound release fails with probability at most 1 - confidence.

    Returns:
        An `AuditReport`; `passed` is False where something failed.

    Raises:
        ConfigError: mechanism "none", a host that is protected already, numbers out of range, or no canaries can be made.
        UnsupportedModelError: see `protect`.
    """
    check_config(config)
    check_numbers(draws, trials, confidence)
    subject = subject_of(host, config, calibration, tokenizer)
    canaries = _canaries(subject, texts, contexts)
    leaks = [check for check in LEAKS if subject.layered or check not in OF_LAYERS]
    with _Bar(progress, len(leaks) + len(SMALLER) + 4) as step:
        checks = [_leak(check, subject, canaries, step) for check in leaks]
        more, bounds = _releases(subject, draws, confidence, step)
        step("extraction")
        guessed, extraction = _extraction(subject, canaries, trials)
    return AuditReport(
        host=f"{type(host).__name__} ({subject.kind})",
        config=config.to_dict(),
        checks=(*checks, *more, *guessed),
        bounds=tuple(bounds),
        extraction=extraction,
        notes=(OWN_LEDGER,),
    )


def check_config(config: DPXAttnConfig) -> None:
    """Raises ConfigError where nothing is promised."""
    if not isinstance(config, DPXAttnConfig):
        raise ConfigError(f"config must be a DPXAttnConfig, got {type(config).__name__}.")
    if not config.is_private:
        raise ConfigError("mechanism='none' is exact attention: NOT private, and there is nothing to audit.")


def _canaries(subject: Driver, texts: Sequence[str] | None, contexts: Sequence[Any] | None) -> list[Canary]:
    candidates = texts if texts is not None else contexts
    if candidates is not None and len(candidates) < 2:
        raise ConfigError("An audit needs at least two candidates: it asks which of them was released.")
    if texts is not None:
        return subject.from_texts(texts)
    if contexts is not None:
        return [(c,) for c in contexts]
    return subject.canaries(CANDIDATES)


def _leak(
    check: Callable[[Driver, Any], Check],
    subject: Driver,
    canaries: Sequence[Canary],
    step: Callable[[str], None],
) -> Check:
    step(check.__name__.replace("_", " "))
    return check(subject, (canaries[0], canaries[1]))


@torch.no_grad()
def _releases(
    subject: Driver, draws: int, confidence: float, step: Callable[[str], None]
) -> tuple[list[Check], list[EpsilonBound]]:
    with subject.protected() as handle:
        recipe = handle.guard.prepare(handle.guard.current())
        prepared = recipe.prepared
        specs = (
            [layer.spec(recipe.dtype) for layer in recipe.layers] if isinstance(recipe, LayerRecipe) else ()
        )
    audited = targets(prepared, subject.config, preparer(prepared, specs, subject.calibration), SMALLER)
    return audit_releases(audited, draws=draws, confidence=confidence, step=step)


def _extraction(
    subject: Driver, canaries: Sequence[Canary], trials: int
) -> tuple[list[Check], Extraction | None]:
    try:
        game = extract(subject, canaries, trials=trials)
    except ContextError:
        raise
    except ConfigError as error:
        return [Check("extraction", NOT_APPLICABLE, str(error))], None
    return [verdict(game)], game


class _Bar:
    """A progress bar over named steps."""

    def __init__(self, shown: bool, total: int) -> None:
        self._bar = tqdm(
            total=total,
            disable=not shown,
            desc="audit",
            bar_format="{l_bar}{bar}| {n_fmt}/{total_fmt} {postfix}",
        )

    def __enter__(self) -> Callable[[str], None]:
        def step(name: str) -> None:
            self._bar.set_postfix_str(name)
            self._bar.update()

        return step

    def __exit__(self, *exc: object) -> None:
        self._bar.close()
