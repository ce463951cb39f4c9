"""`hf-dp-xattn generate`: a picture or a text from a saved release, or from a private text that is released first."""

from __future__ import annotations

import argparse
import json
import os
import secrets
import sys
import time
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from ..privacy.default_ledger import user_folder
from .models import (
    SETTINGS,
    driver_of,
    is_protected,
    load_plain,
    load_tokenizer,
    parse_dtype,
    protected_model,
    quiet,
    source_of,
)
from .private_text import LINES, WHY, read_private_text
from .public_numbers import NOTHING, check_numbers
from .release_command import REFUSED, add_releasing, keep, new_folder, open_ledger, release_or_refuse, say
from .watching import Stage, watching

NOTE = "hf-dp-xattn: note: "
NAME = "generate"
HELP = "a picture or a text from a release"
DESCRIPTION = f"""\
Draws a picture (diffusers) or writes a text (transformers) from a release. With --release it reads a saved one: nothing is charged, and
no private text is asked for. Otherwise it releases a private text first, once, and charges it to the ledger. That release is kept, in
your cache folder or where --keep says, since the ledger refuses a second one of the same text where it exceeds the budget.

{WHY}
{LINES}"""
EXAMPLES = """\
examples:
  as many pictures as you like from a saved release:
    hf-dp-xattn generate ./my-pipeline --release ./release --out a.png --seed 1
    hf-dp-xattn generate ./my-pipeline --release ./release --out b.png --public "an oil painting of"
  release and draw; the prompt is asked for, hidden:
    hf-dp-xattn generate ./my-protected-pipeline --ledger ledger.json --keep ./release --out a.png
  text: an encoder-decoder model reads a private document; a decoder-only model has a private prefix and a public question:
    hf-dp-xattn generate ./my-bart --release ./release
    hf-dp-xattn generate ./my-llama --release ./release --public "What are your opening hours?" --new-tokens 60
  a chat model: the question is put into the words of its template; a model whose decoder is started with the question:
    hf-dp-xattn generate examples/chat/model --release ./release --chat --public "please say bird and ship"
    hf-dp-xattn generate examples/rag/model --release ./release --begin "what is the colour ?" --new-tokens 1

exit codes: 0 done; 1 the ledger refuses and nothing was released, or something failed after the charge or while drawing or writing (the
message on stderr says which, what was charged, and where the release is kept); 2 bad input, nothing was spent (the message is on stderr);
130 stopped by Ctrl-C before anything was spent.
"""


def add_options(parser: argparse.ArgumentParser) -> None:
    """All of them but `--json`."""
    add_releasing(parser)
    parser.add_argument("--release", metavar="FOLDER", help="folder or Hub id of a saved release")
    parser.add_argument(
        "--keep",
        metavar="FOLDER",
        help="new folder for a release that is made here (default: one in hf_dp_xattn/releases of your cache folder; it is printed)",
    )
    parser.add_argument(
        "--public",
        metavar="TEXT",
        help="PUBLIC words that are read exactly beside the release: a public prompt, or a user's turn",
    )
    parser.add_argument(
        "--begin",
        metavar="TEXT",
        help="encoder-decoder models: PUBLIC words that the decoder starts with, such as a question; they are not printed again",
    )
    parser.add_argument(
        "--out",
        metavar="FILE",
        help="the picture (.png, .jpg, .webp), or the text (default: standard output)",
    )
    parser.add_argument("--steps", type=int, metavar="N", help="pictures: denoising steps")
    parser.add_argument("--guidance", type=float, metavar="W", help="pictures: guidance scale, 0 or more")
    parser.add_argument(
        "--height", type=int, metavar="PIXELS", help="pictures: a multiple of 8 (or of what the VAE needs)"
    )
    parser.add_argument("--width", type=int, metavar="PIXELS", help="pictures: likewise")
    parser.add_argument("--new-tokens", type=int, metavar="N", help="texts: at most so many (default: 60)")
    parser.add_argument(
        "--seed",
        type=int,
        metavar="N",
        help="of the picture or of sampling, 0 to 2^63 - 1; public, and not of the release",
    )


def run(args: argparse.Namespace) -> int:
    """Writes the picture or the text; 1 where the ledger refuses, or where it fails after a charge or with a saved release."""
    private = _check(args)
    if args.release is not None:
        return _run(args, private)
    with new_folder(_kept_by_default() if args.keep is None else Path(args.keep)) as keep_in:
        return _run(args, private, keep_in)


def _kept_by_default() -> Path:
    """A folder that is not there yet; nothing of the private text is in its name."""
    name = f"{time.strftime('%Y-%m-%d-%H%M%S')}-{secrets.token_hex(4)}"
    return user_folder() / "releases" / name


def _run(args: argparse.Namespace, private: str | None, keep_in: Path | None = None) -> int:
    if args.json:
        quiet()
    say(args, "loading the model")
    ledger, release = None, None
    if args.release is not None:
        handle, release = _read_saved(args)
    else:
        ledger = open_ledger(args)
        handle = protected_model(args, ledger)
    driver = driver_of(handle, args)
    driver.prepare(release, private)
    for note in driver.notes:
        print(f"{NOTE}{note}", file=sys.stderr)
    if driver.draws and Path(args.out or "").suffix.lower() not in (".png", ".jpg", ".jpeg", ".webp"):
        raise ConfigError("A picture needs a file: --out picture.png")
    if args.out is not None:
        _check_out(Path(args.out).resolve())
    stage = Stage("Generating", private=release is None)
    with watching(ledger, stage):
        if release is None:
            stage.doing = "Releasing"
            say(args, "releasing")
            release = release_or_refuse(driver, str(private))
            if release is None:
                return REFUSED
            assert keep_in is not None
            keep(release, keep_in, stage)
            say(args, f"the release is kept in {keep_in}; go on from there with --release, at no cost")
            stage.doing, stage.private = "Generating", False
        say(args, "generating")
        written = _write(args, driver.draw(release), driver.draws)
        if keep_in is not None:
            written["release"] = str(keep_in)
        _tell(args, written, [g.sentence() for g in release.guarantees])
    return 0


def _write(args: argparse.Namespace, drawn: list[Any], pictures: bool) -> dict[str, Any]:
    """Writes what was drawn to --out, where there is one: "files", "texts"."""
    if not pictures:
        if args.out is None:
            return {"texts": drawn}
        Path(args.out).write_text("\n".join(drawn) + "\n", encoding="utf-8")
        return {"texts": drawn, "files": [args.out]}
    out = Path(args.out)
    files = [out] if len(drawn) == 1 else [out.with_stem(f"{out.stem}-{i}") for i in range(len(drawn))]
    for image, file in zip(drawn, files, strict=True):
        image.save(file)
    return {"files": [str(f) for f in files]}


def _tell(args: argparse.Namespace, written: dict[str, Any], guarantees: list[str]) -> None:
    if args.json:
        print(json.dumps({**written, "guarantees": guarantees}, sort_keys=True))
        return
    if "texts" in written and "files" not in written:
        print("\n".join(written["texts"]))
    for line in (*guarantees, *(f"wrote {file}" for file in written.get("files", ()))):
        print(line, file=sys.stderr)


def _check(args: argparse.Namespace) -> str | None:
    """The private text, where one is to be released; everything that can be refused without a model is."""
    check_numbers(args)
    options = [
        n
        for n in (
            "config",
            *SETTINGS,
            "calibration",
            "prompt_file",
            "prefix_bucket",
            "ledger",
            "budget",
            "keep",
        )
        if getattr(args, n) not in (None, False)
    ]
    if args.release is not None:
        if options:
            names = ", --".join(n.replace("_", "-") for n in options)
            raise ConfigError(f"--release reads what was released before; leave out --{names}.")
        return None
    return read_private_text(args.prompt_file)


def _read_saved(args: argparse.Namespace) -> tuple[Any, Any]:
    """The handle and a saved release; no budget is at hand, and none is spent."""
    from ..hosts.protect import Release, handle_of
    from ..hosts.restoring import from_pretrained

    dtype = parse_dtype(args.dtype)
    if is_protected(args.model):
        host = from_pretrained(args.model, dtype=dtype)
    else:
        host = load_plain(args.model, dtype)
    # a GGUF file has no tokenizer beside it
    words = load_tokenizer(args.model) if source_of(args.model)[1] else None
    release = Release.from_pretrained(args.release, host=host, tokenizer=words)
    return handle_of(host), release


def _check_out(out: Path) -> None:
    if not out.parent.is_dir() or out.is_dir():
        raise ConfigError(f"--out takes a file in a folder that exists. {NOTHING}")
    if not os.access(out if out.exists() else out.parent, os.W_OK):
        raise ConfigError(f"Nothing can be written to the file of --out. {NOTHING}")
