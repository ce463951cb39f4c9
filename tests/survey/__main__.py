"""Runs every host under every mechanism, and writes what was found to docs/hosts/, from which docs/hosts.md has its tables.

`python -m tests.survey pipelines --diffusers-source FOLDER`: every pipeline that diffusers' own tests build, from a checkout of its public
repository (of the installed version or near it). `python -m tests.survey models`: every causal and encoder-decoder class of transformers.
`python -m tests.survey peers --diffusers-source FOLDER`: diffusers' own tests of Stable Diffusion with `mechanism="none"`.
Then `python -m tests.hosts.transformers.encoder_decoder.table > docs/hosts.md`. A survey that was interrupted goes on where it was.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import diffusers
import transformers

from hf_dp_xattn.hosts.text.prompt_swap import takes_prompt

from . import checkout, language, peers, pipelines
from .findings import FOLDER, WORKS, Finding, NotBuilt
from .stand_ins import no_downloads

Trial = tuple[str, str, Callable[[], Finding]]


def of_pipelines(source: Path, only: str, attention: bool) -> Iterator[Trial]:
    """(name of a pipeline class, what tries it, how)."""
    checkout.load(source)
    for name in checkout.modules(source):
        if only in name:
            try:
                found = list(checkout.cases(name))
            except (ImportError, RuntimeError) as error:  # the second of diffusers' own lazy imports
                print(name, "not imported:", error, flush=True)
                continue
            for case in found:
                how = pipelines.attention if attention else pipelines.probe
                yield case.host, case.name, lambda case=case, how=how: how(case)


def classes(*, takes: bool) -> list[str]:
    """The pipeline classes of diffusers that take a `prompt`, or do not."""
    named = {n: getattr(diffusers, n) for n in dir(diffusers) if "Pipeline" in n}
    found = {
        n: c for n, c in named.items() if isinstance(c, type) and issubclass(c, diffusers.DiffusionPipeline)
    }
    return sorted(n for n, c in found.items() if n != "DiffusionPipeline" and takes_prompt(c) == takes)


def of_models(only: str) -> Iterator[Trial]:
    for kind, name, config in language.every():
        if only in name:
            yield name, kind, lambda n=name, c=config, k=kind: language.probe(n, c, k)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.survey", description=__doc__)
    parser.add_argument("what", choices=("pipelines", "models", "peers"))
    parser.add_argument("--diffusers-source", type=Path, help="a checkout of diffusers")
    parser.add_argument("--only", default="", help="part of the names of files of tests, or of models")
    parser.add_argument(
        "--attention",
        action="store_true",
        help="only the mechanisms on attention, of pipelines that are known",
    )
    parser.add_argument("--again", action="store_true", help="with --attention: only what has a refusal")
    parser.add_argument("--out", type=Path, default=FOLDER)
    given = parser.parse_args()
    if given.what != "models" and given.diffusers_source is None:
        parser.error("pipelines are made by diffusers' own tests: pass --diffusers-source")
    if given.what == "peers":
        peers.write(given.diffusers_source, given.out)
        return
    diffusers.utils.logging.set_verbosity_error()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    warnings.simplefilter("ignore")
    page = given.out / f"{given.what}.json"
    known = json.loads(page.read_text()) if page.exists() else {"found": {}, "not run": {}}
    library = diffusers if given.what == "pipelines" else transformers
    if given.what == "pipelines":
        known |= {"with prompt": classes(takes=True), "without prompt": classes(takes=False)}
    known["version"] = f"{library.__name__} {library.__version__}"
    trials = (
        of_models(given.only)
        if given.what == "models"
        else of_pipelines(given.diffusers_source, given.only, given.attention)
    )
    with no_downloads() if given.what == "pipelines" else contextlib.nullcontext():
        done: set[str] = set()
        for name, by, trial in trials:
            how = known["found"].get(name, {}).get("how", {})
            if given.attention != (name in known["found"]) or name in done:
                continue
            if given.again and set(how.values()) == {WORKS}:
                continue
            try:
                finding = trial()
                before = known["found"].get(name, {})
                known["found"][name] = {"by": by, **finding.to_dict()}
                if given.attention:
                    known["found"][name] = {**before, "how": {**before["how"], **finding.how}}
                done.add(name)
                known["not run"].pop(name, None)
                print(name, finding.how, flush=True)
            except NotBuilt as error:
                if not given.attention:
                    known["not run"][name] = str(error)
                print(name, "not run:", error, flush=True)
            given.out.mkdir(parents=True, exist_ok=True)
            page.write_text(json.dumps(known, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
