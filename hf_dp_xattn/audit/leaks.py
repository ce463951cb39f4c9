"""Leak tests of an installed protection: invariants that a proof takes for granted, tried on the user's own host with canaries.

Each check says what it did and whether it could have failed: where the unprotected host answers two canaries alike, "alike" shows nothing,
and the verdict is "not applicable". The host is protected anew for each check, with a ledger of its own, and unprotected after it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch

from ..errors import BudgetExceededError, DPXAttnError, ProtectionLostError
from ..hosts.driver import Canary, Driver, Outputs
from ..hosts.text.released_texts import ReleasedTexts
from .audit_report import FAIL, NOT_APPLICABLE, PASS, Check
from .snapshot import differences, snapshot
from .spy import Spy

NO_POWER = "the unprotected host answers both canaries alike, bit for bit: this check could not fail here"
Pair = tuple[Canary, Canary]


@contextmanager
def held_fixed(handle: Any) -> Iterator[None]:
    """While inside, every context gets what the first one released: what differs then did not come through the release."""
    original, first = handle.releases.run, []

    def fixed(*arguments: Any) -> Any:
        result = original(*arguments)  # so that any way past the release would run
        first.append(result)
        if isinstance(result, ReleasedTexts):
            return dataclasses.replace(result, text=first[0].text)
        return dataclasses.replace(result, structures=first[0].structures, context=first[0].context)

    vars(handle.releases)["run"] = fixed
    try:
        yield
    finally:
        del vars(handle.releases)["run"]


@contextmanager
def captured(handle: Any) -> Iterator[list[tuple[torch.Tensor, torch.Tensor | None]]]:
    """While inside, the private rows [n, C] and groups of what is released are kept; of canaries only."""
    original, kept = handle.releases.run, []

    def keep(recipe: Any, context: Any, groups: torch.Tensor | None, current: Any) -> Any:
        loaded = context.load()
        kept.append((loaded[0].detach().clone(), groups))
        return original(recipe, dataclasses.replace(context, load=lambda: loaded), groups, current)

    vars(handle.releases)["run"] = keep
    try:
        yield kept
    finally:
        del vars(handle.releases)["run"]


def same(a: Outputs, b: Outputs) -> bool:
    """Bitwise equal."""
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def has_nan(outputs: Outputs) -> bool:
    return any(bool(t.isnan().any()) for t in outputs if t.is_floating_point())


def only_the_release(subject: Driver, pair: Pair) -> Check:
    """Invariant 1: with the release held fixed, two private contexts give bitwise equal outputs."""
    name = "nothing but the release"
    if same(*(subject.plain(c) for c in pair)):
        return Check(name, NOT_APPLICABLE, NO_POWER)
    compared, broken = 0, False
    with subject.protected() as handle, held_fixed(handle):
        uses: list[Callable[[Canary], Outputs | None]] = [
            lambda c: subject.answer(subject.inputs(subject.release(c))),
            subject.direct,
        ]
        equal = True
        for use in uses:
            a, b = (use(c) for c in pair)
            if a is None or b is None:
                continue
            compared += 1
            equal &= same(a, b)
            broken |= has_nan(a)
    how = "by release.inputs() and by the host's ordinary call" if compared > 1 else "by release.inputs()"
    if broken:
        return Check(name, FAIL, f"the protected host gives NaN ({how}): it does not work")
    text = f"the release held fixed, two canaries give bitwise {'equal' if equal else 'DIFFERENT'} outputs, {how}; unprotected, they differ"
    return Check(name, PASS if equal else FAIL, text)


def nothing_travels(subject: Driver, pair: Pair) -> Check:
    """Invariant 1: what stands in for the private rows holds none of them, and no module is given one."""
    name = "no private row travels"
    with subject.protected() as handle, captured(handle) as kept:
        inputs = subject.inputs(subject.release(pair[0]))
        rows, unless = kept[0][0], kept[1][0] if subject.release_alone(pair[0]) else None
        if not subject.is_blank(inputs):  # before the host, which would refuse it
            return Check(name, FAIL, "the placeholder of a release holds numbers besides its marker")
        spy = Spy(rows, unless)
        with spy.watching(subject.serving):
            subject.answer(inputs)
    control = Spy(rows, unless)
    with control.watching(subject.serving):
        subject.plain(pair[0])
    looked = f"{spy.tensors:,} tensors of {spy.modules:,} modules"
    if spy.matches:
        return Check(name, FAIL, f"{spy.matches} of {looked} hold numbers of the canary's private rows")
    if not control.matches:
        return Check(
            name,
            NOT_APPLICABLE,
            f"none in {looked}, but the search finds none in the unprotected host either",
        )
    text = (
        f"none of {looked} holds a piece of the canary's rows (unprotected: {control.matches:,}); the placeholder is NaN but for a "
        "marker"
    )
    return Check(name, PASS, text)


def a_lost_layer(subject: Driver, pair: Pair) -> Check:
    """Invariant 3: a layer that lost its processor or attention function stops the host; with the gate shut as well, nothing leaks."""
    name = "a lost layer fails closed"
    with subject.protected() as handle:
        names = list(handle.layers)
    chosen = sorted({0, len(names) - 1})
    ends = []
    for i in chosen:
        with subject.protected() as handle, held_fixed(handle):
            inputs = [subject.inputs(subject.release(c)) for c in pair]
            restore = subject.lose(names[i])
            try:
                with suppress(ProtectionLostError):
                    subject.answer(inputs[0])
                    return Check(name, FAIL, "a layer lost what protects it, and the host ran on")
                ends.append(_without_gates(subject, handle, inputs))
            finally:
                restore()
    if "leak" in ends:
        return Check(name, FAIL, "with a layer and the gate lost, two canaries give different outputs")
    text = (
        f"{len(chosen)} of {len(names)} layers tried: the host refuses to run; with its gate removed too, the output is "
        + " / ".join(sorted(set(ends)))
    )
    return Check(name, PASS, text)


def _without_gates(subject: Driver, handle: Any, inputs: list[dict[str, Any]]) -> str:
    """What comes out where nothing looks any more: "an error", "NaN", "the same for both", or "leak"."""
    vars(handle.guard)["check"] = lambda: None
    try:
        outputs = [subject.ungated(placeholder) for placeholder in inputs]
    except (DPXAttnError, RuntimeError, ValueError, TypeError, AttributeError):
        return "an error"
    finally:
        del vars(handle.guard)["check"]
    if all(map(_only_nan, outputs)):
        return "NaN"
    return "the same for both" if same(*outputs) else "leak"


def _only_nan(outputs: Outputs) -> bool:
    return all(bool((t.isnan() | t.isinf()).all()) for t in outputs if t.is_floating_point())


def no_release_no_answer(subject: Driver, pair: Pair) -> Check:
    """Invariant 3: what is no placeholder does not pass."""
    name = "no release, no answer"
    with subject.protected():
        try:
            subject.refused()
        except ProtectionLostError:
            return Check(
                name,
                PASS,
                "the protected host, called with ordinary inputs in place of a release, refuses before its forward",
            )
        except DPXAttnError as error:
            return Check(name, PASS, f"the protected host refuses ordinary inputs ({type(error).__name__})")
    return Check(name, FAIL, "the protected host answered without a release")


def one_release(subject: Driver, pair: Pair) -> Check:
    """Invariant 2: use is free, a second release of the same context is charged or refused."""
    name = "one release per context"
    with subject.protected() as handle:
        release = subject.release(pair[0])
        inputs = subject.inputs(release)
        subject.answer(inputs)
        subject.answer(inputs)
        first = len(handle.ledger.entries())  # with documents as units, one for each of them as well
        again = subject.release(pair[0])
        reused = all(a is b for a, b in zip(release.contexts, again.contexts, strict=True))
        once = 0 < first == len(handle.ledger.entries())
        try:
            subject.release(pair[0], fresh=True)
            second = "charged" if len(handle.ledger.entries()) == 2 * first else ""
        except BudgetExceededError:
            second = "refused"
        before = len(handle.ledger.entries())
        subject.release(pair[1])
        other = len(handle.ledger.entries()) == before + first
    if reused and once and second and other:
        text = f"two answers and a repeated release cost one charge; a fresh release of the same canary is {second}, another canary charged"
        return Check(name, PASS, text)
    wrong = [
        text
        for bad, text in (
            (not reused, "the same canary was released anew without being asked"),
            (not once, "using a release changed the ledger"),
            (not second, "a second release of the same canary was not charged"),
            (not other, "another canary was not charged"),
        )
        if bad
    ]
    return Check(name, FAIL, "; ".join(wrong))


def restored(subject: Driver, pair: Pair) -> Check:
    """Invariant 8: `unprotect` gives the host back bit for bit."""
    name = "unprotect restores the host"
    want = subject.plain(pair[0])
    before = snapshot(subject.host, subject.modules)
    with subject.protected():
        subject.answer(subject.inputs(subject.release(pair[0])))
    changed = differences(before, snapshot(subject.host, subject.modules))
    if changed:
        return Check(name, FAIL, f"{len(changed)} parts differ, such as {changed[0]}")
    if not same(want, subject.plain(pair[0])):
        return Check(name, FAIL, "the unprotected host answers otherwise than before")
    return Check(
        name,
        PASS,
        f"{len(before):,} weights, attributes and hooks are as before, and so is its answer, bit for bit",
    )


OF_LAYERS = (nothing_travels, a_lost_layer)
"""Those that a host has nothing for whose layers read no release: what reaches it is public text, through the gates of the others."""
LEAKS: tuple[Callable[[Driver, Pair], Check], ...] = (
    only_the_release,
    nothing_travels,
    a_lost_layer,
    no_release_no_answer,
    one_release,
    restored,
)
