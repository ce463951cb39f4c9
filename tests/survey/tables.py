"""The part of docs/hosts.md on every pipeline and every language model, from what the survey found (docs/hosts/*.json)."""

from __future__ import annotations

import json
from typing import Any

from .findings import FOLDER, WORKS

ATTENTION = ("anchors", "kernel_sum", "dptree", "none")
PIPELINES = """
## Every pipeline of diffusers, by running it

Of {built} pipeline classes of {version} that diffusers' own tests build here {took} take a `prompt`. They were run (`python -m
tests.survey pipelines --diffusers-source FOLDER`): tiny parts, two private prompts of different lengths, one release. *Works* with
`library`: each prompt was charged, and all that the pipeline's models were given and gave back, the callbacks' tensors, the output,
what saving wrote and what was logged were the same bytes for both, with no word of either. With `kernel_sum`, `dptree` and `none` the
same was run (of `anchors`, which needs a calibration, stands what `none` gives). **{any} of {took} work with at least one mechanism:
{works} with `library`, {layers} with one or more of the others. {leaks} of them run unprotected.**

| pipeline | private arguments | `library` | `anchors`, `kernel_sum`, `dptree`, `none` |
|---|---|---|---|
"""
OTHERS = """
{count} more classes take a `prompt` and are served by the same code (`library` looks at the signature, not at the name), but were not run:
{names}.

No text to protect, so refused by name ({without_count}): {without}.
"""
MODELS = """
## Every causal and encoder-decoder class of transformers, by running it

`python -m tests.survey models` builds a tiny model of each class ({version}) with random weights. *Works* with `library`: two private texts
with one release gave equal scores, and were charged. *Works* with `none`: the scores of the unprotected model; the other three mechanisms
are accepted by the same probe. {causal}; {seq2seq}.

| model | `library` | `none` | `anchors`, `kernel_sum`, `dptree` |
|---|---|---|---|
"""

PEERS = """
## diffusers' own tests, protected

Of {unprotected} tests of {version} ({files}) that pass here unprotected, {protected} pass with `mechanism="none"`, where each pipeline is
protected before its first call (`python -m tests.survey peers --diffusers-source FOLDER`). What they download is replaced by tiny models;
text of 8 channels has 32 here, for a release's mark needs 15. The others, by cause:

| tests | cause |
|---|---|
"""


def load(what: str) -> dict[str, Any]:
    return dict(json.loads((FOLDER / f"{what}.json").read_text(encoding="utf-8")))


def _same(how: dict[str, str], names: tuple[str, ...]) -> str:
    """One cell for several mechanisms."""
    by: dict[str, list[str]] = {}
    for name in names:
        by.setdefault(_cell(how[name]), []).append(name)
    if len(by) == 1:
        return next(iter(by))
    return "; ".join(f"{', '.join(f'`{n}`' for n in of)}: {what}" for what, of in by.items())


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _names(names: Any) -> str:
    return ", ".join(f"`{n}`" for n in sorted(names))


def pipelines() -> str:
    known = load("pipelines")
    found = {n: f for n, f in known["found"].items() if f["how"]}
    rows = [
        f"| {n} | {_names(f['text'])} | {_cell(f['how']['library'])} | {_same(f['how'], ATTENTION)} |"
        for n, f in sorted(found.items())
    ]
    rest, without = set(known["with prompt"]) - set(found), known["without prompt"]
    head = PIPELINES.format(
        version=known["version"],
        built=len(known["found"]),
        took=len(found),
        any=sum(WORKS in f["how"].values() for f in found.values()),
        works=sum(f["how"]["library"] == WORKS for f in found.values()),
        layers=sum(any(f["how"][m] == WORKS for m in ATTENTION[:3]) for f in found.values()),
        leaks=sum(any(h.startswith("LEAKS") for h in f["how"].values()) for f in found.values()),
    )
    others = OTHERS.format(
        count=len(rest), names=_names(rest), without_count=len(without), without=_names(without)
    )
    return head + "\n".join(rows) + "\n" + others


def _counted(found: dict[str, Any], kind: str, words: str) -> str:
    own = [f["how"] for f in found.values() if f["by"] == kind]
    layers = sum(all(h[m] == WORKS for m in ATTENTION) for h in own)
    return f"of {len(own)} {words} {sum(h['library'] == WORKS for h in own)} work with `library` and {layers} with all others"


def models() -> str:
    known = load("models")
    found = known["found"]
    head = MODELS.format(
        version=known["version"],
        causal=_counted(found, "causal", "causal models").capitalize(),
        seq2seq=_counted(found, "seq2seq", "encoder-decoder models"),
    )
    rows = [
        f"| {n} | {_cell(f['how']['library'])} | {_cell(f['how']['none'])} | {_same(f['how'], ATTENTION[:3])} |"
        for n, f in sorted(found.items())
    ]
    not_run = ", ".join(f"`{n}`" for n in sorted(known["not run"]))
    return head + "\n".join(rows) + f"\n\nNot built at this size, or not run unprotected: {not_run}.\n"


def peers() -> str:
    known = load("peers")
    files = ", ".join(f"`{name.rsplit('/', 1)[-1]}`" for name in known["files"])
    head = PEERS.format(**{**known, "files": files})
    return head + "".join(f"| {len(tests)} | {_cell(cause)} |\n" for cause, tests in known["causes"].items())


def section() -> str:
    return pipelines() + peers() + models()
