"""What one pipeline of diffusers does under each mechanism, found by running it."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import io
import logging
import random
import re
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any
from unittest import mock

import torch

import hf_dp_xattn as dpx
from hf_dp_xattn.hosts import placeholder, releases
from hf_dp_xattn.hosts.text.prompt_swap import takes_prompt

from ..hosts.text.libraries import answer_with, config, library
from ..private_content import PrivateContent
from .checkout import Case
from .findings import MECHANISMS, WORKS, Finding, NotBuilt, accepted, codes, protect, reason
from .recorder import Record, recording

SECRETS = (
    "a purple cross under water, Zanzibar",
    "the vault opens with 918273, at midnight, Quetzal, on a long road",
)
"""Of different lengths and numbers of words; no text of the library has their names."""
WORDS = re.compile("prompt|text|lyric|phrase|caption|message|tags|transcri|concept|instruction")
Seen = tuple[Record, dict[str, bytes], str]
"""What models, callbacks and caller saw, what saving wrote, and what was logged."""
SHORT = "not tried: the tests' tiny model takes shorter prompts than the pipeline's own"
PUBLIC = re.compile("neg|.*negative|.*_(path|type)$")


def build(case: Case) -> Any:
    """A fresh pipeline in evaluation mode, the same each time."""
    torch.manual_seed(0)
    pipe = case.make()
    pipe.set_progress_bar_config(disable=True)
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):
            part.eval()
    return pipe


def private(pipe: Any, inputs: dict[str, Any]) -> tuple[str, ...]:
    """The arguments of a call that are text and not declared public; what the package itself takes for private is not asked."""
    takes = inspect.signature(type(pipe).__call__).parameters
    return tuple(
        n
        for n in takes
        if n == "prompt" or (WORDS.search(n) and not PUBLIC.match(n) and _is_text(inputs.get(n)))
    )


def _is_text(value: Any) -> bool:
    return isinstance(value, str) or (isinstance(value, (list, tuple)) and any(map(_is_text, value)))


def arguments(case: Case, pipe: Any, secret: str) -> dict[str, Any]:
    """The tests' own call, with a private text for every argument that takes one."""
    inputs = case.inputs()
    for name in private(pipe, inputs):
        given = inputs.get(name)
        several = isinstance(given, (list, tuple))
        inputs[name] = [f"{secret} {i}" for i in range(len(given))] if several else secret
    return {n: v for n, v in inputs.items() if n != "prompt_embeds"}


def run(pipe: Any, inputs: dict[str, Any]) -> Record:
    """One call, with a callback that notes all that callbacks may read."""
    options = dict(inputs)
    takes = inspect.signature(type(pipe).__call__).parameters
    with recording(pipe) as record:
        if "callback_on_step_end" in takes and "callback_on_step_end" not in options:
            options["callback_on_step_end"] = _noting(record)
            if "callback_on_step_end_tensor_inputs" in takes:
                options["callback_on_step_end_tensor_inputs"] = list(
                    getattr(pipe, "_callback_tensor_inputs", ())
                )
        torch.manual_seed(0)
        output = pipe(**options)
    record.add("output", output if isinstance(output, (tuple, list)) else vars(output))
    return record


def _noting(record: Record) -> Any:
    def note(pipe: Any, step: int, time: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        record.add("callback", {"step": step, "time": time, **tensors})
        return {}

    return note


def probe(case: Case) -> Finding:
    """Raises NotBuilt where the tests' own call fails unprotected."""
    try:
        pipe = build(case)
        if not takes_prompt(type(pipe)):
            return Finding((), {})
        with torch.no_grad():
            plain = [
                run(pipe, arguments(case, pipe, text)) for text in ("a public text", "another one, of a dog")
            ]
        inputs = arguments(case, pipe, SECRETS[0])
    except Exception as error:
        raise NotBuilt(f"{type(error).__name__}: {str(error)[:200]}") from error
    if not plain[0].difference(plain[1]):
        raise NotBuilt(
            "unprotected, its models see no difference between two texts"
        )  # so that a leak would not be seen
    return Finding(private(pipe, inputs), {"library": how("library", case, pipe), **by_attention(case, pipe)})


def attention(case: Case) -> Finding:
    """The mechanisms on attention alone, of a pipeline that `probe` knows. Raises NotBuilt where a package is missing here."""
    try:
        pipe = build(case)
    except Exception as error:
        raise NotBuilt(f"{type(error).__name__}: {str(error)[:200]}") from error
    return Finding((), by_attention(case, pipe) if takes_prompt(type(pipe)) else {})


def by_attention(case: Case, pipe: Any) -> dict[str, str]:
    """The mechanisms on attention."""
    found = {m: how(m, case, pipe) for m in MECHANISMS if m != "library"}
    if found["anchors"] == WORKS:  # which was accepted only, for want of a calibration
        found["anchors"] = found["none"]
    return found


def how(mechanism: str, case: Case, pipe: Any) -> str:
    """What happens to a pipeline under one mechanism; it is as before afterwards."""
    try:
        if mechanism == "anchors":
            return accepted(mechanism, pipe)
        seen = _seen_library if mechanism == "library" else functools.partial(_seen_layers, mechanism)
        found = _compared(case, lambda: pipe, seen)
        # it may keep a state
        return _compared(case, lambda: build(case), seen) if found.startswith("LEAKS") else found
    except (dpx.UnsupportedModelError, dpx.ConfigError) as error:
        return f"refused: {reason(str(error))}"
    except Exception as error:
        if mechanism != "library" and not _takes_the_usual_length(case):
            return SHORT
        return f"fails: {type(error).__name__}: {str(error)[:300]}"
    finally:
        dpx.unprotect(pipe)


def _takes_the_usual_length(case: Case) -> bool:
    """Whether the tests' tiny model, unprotected, takes a prompt of the length that the pipeline gives it by default."""
    pipe = build(case)
    inputs = arguments(case, pipe, "a public text")
    inputs.pop("max_sequence_length", None)
    try:
        with torch.no_grad():
            run(pipe, inputs)
    except Exception:
        return False
    return True


def _compared(case: Case, make: Callable[[], Any], see: Callable[..., Any]) -> str:
    """Two private prompts with one release: equal in all that models, callbacks, caller, files and logs see; and none of it private."""
    first: list[Any] = []
    seen = [see(case, make(), secret, first) for secret in SECRETS]
    records, files, logs = zip(*seen, strict=True)
    if not records[0].models:
        return "fails: no model was seen"
    different = records[0].difference(records[1])
    more = set(logs[1].splitlines()) - set(logs[0].splitlines())  # what is said once is said for the first
    different = different or ("files" if files[0] != files[1] else "logs" if more else "")
    if different:
        return f"LEAKS: {different}"
    needles = PrivateContent(texts=("Zanzibar 918273 Quetzal midnight",)).needles()
    blobs = {"calls": records[0].bytes(), "logs": "".join(logs).encode(), **files[0]}
    leaked = sorted(
        {f"{what} in {where}" for where, blob in blobs.items() for n, what in needles.items() if n in blob}
    )
    return f"LEAKS: {leaked}" if leaked else WORKS


def _seen_library(case: Case, pipe: Any, secret: str, first: list[Any]) -> Seen:
    """Of one call that is protected by `library`, whose answers are fixed."""
    given: dict[str, Any] = {
        "calibration": _public_library(),
        "encoder": codes,
        "ledger": dpx.Ledger(),
    }
    protected = dpx.protect(pipe, config(), **given)
    answer_with(protected, "a red circle", "on wood")
    return _seen(protected, pipe, arguments(case, pipe, secret))


def _seen_layers(mechanism: str, case: Case, pipe: Any, secret: str, first: list[Any]) -> Seen:
    """Of one call that is protected by attention. first: what the first prompt's contexts released, which serves the second's too."""
    chosen = random.Random(0)  # the marks of placeholders, which are drawn anew for each release
    with mock.patch.object(placeholder.secrets, "randbelow", chosen.randrange):
        return _seen_release(protect(mechanism, pipe), case, pipe, secret, first)


def _seen_release(protected: Any, case: Case, pipe: Any, secret: str, first: list[Any]) -> Seen:
    inputs = arguments(case, pipe, secret)
    inputs.pop("max_sequence_length", None)  # a release has the default length
    texts = inputs["prompt"] if isinstance(inputs["prompt"], list) else [inputs["prompt"]]
    made = iter(list(first))
    original = releases.Releases.run

    def run_(self: Any, *given: Any) -> Any:
        result = original(self, *given)
        fixed = next(made, None)
        if fixed is None:
            first.append(result)
            return result
        return dataclasses.replace(result, structures=fixed.structures, context=fixed.context)

    with mock.patch.object(releases.Releases, "run", run_), _logged() as log, torch.no_grad():
        for text in texts:  # here, so that encoders see private text; not in the call that is recorded
            protected.release(text)
    record, files, more = _seen(protected, pipe, inputs)
    return record, files, log.getvalue() + more


def _seen(protected: Any, pipe: Any, inputs: dict[str, Any]) -> Seen:
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        with _logged() as log:
            record = run(pipe, inputs)
        if not protected.report().releases:
            raise AssertionError("nothing was charged")
        _save(pipe, folder)
        files = {
            str(f.relative_to(folder)): f.read_bytes() for f in sorted(Path(folder).rglob("*")) if f.is_file()
        }
    dpx.unprotect(pipe)
    return record, files, log.getvalue()


@functools.cache
def _public_library() -> Any:
    return library(None, encoder=codes)


def _save(pipe: Any, folder: str) -> None:
    """All but the weights, which no call has written to."""
    with ExitStack() as stack:
        for part in pipe.components.values():
            if isinstance(part, torch.nn.Module):
                stack.enter_context(mock.patch.object(part, "save_pretrained", lambda *args, **kwargs: None))
        pipe.save_pretrained(folder)


@contextmanager
def _logged() -> Iterator[io.StringIO]:
    """Inside, all that is logged or printed is caught."""
    out = io.StringIO()
    handler = logging.StreamHandler(out)
    with ExitStack() as stack:
        for name in ("", "diffusers", "transformers", "hf_dp_xattn"):
            logger = logging.getLogger(name)
            logger.addHandler(handler)
            stack.callback(logger.removeHandler, handler)
        stack.enter_context(redirect_stdout(out))
        stack.enter_context(redirect_stderr(out))
        stack.enter_context(warnings.catch_warnings())
        yield out
