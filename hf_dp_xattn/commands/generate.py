"""`hf-dp-xattn generate`: a picture or a text from a saved release, or from a private text that is released first."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from .models import SETTINGS, check_texts, load_plain, parse_dtype, protected_model
from .private_text import WHY, read_private_text
from .release import REFUSED, add_releasing, new_folder, release_or_refuse, say
from .texts import LINES, load_tokenizer, plain_ids, read_question, tokenize

NAME = "generate"
_DESCRIPTION = f"""\
Draws a picture (diffusers) or writes a text (transformers) from a release. With --release it reads a saved one: nothing is charged, and
no private text is asked for. Otherwise it releases a private text first, once, and charges it to --ledger; keep that release with
--keep, since the ledger refuses a second one of the same text where it exceeds the budget.

{WHY}
{LINES}"""
_EXAMPLES = """\
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

exit codes: 0 done; 1 the ledger refuses, nothing was released; 2 bad input, nothing was spent (the message is on stderr).
"""


def add(subparsers: Any) -> None:
    """Registers the subcommand."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        NAME,
        help="a picture or a text from a release",
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,  # --prompt must not be taken for --prompt-file
    )
    add_releasing(parser, ledger_required=False)
    parser.add_argument("--release", metavar="FOLDER", help="folder or Hub id of a saved release")
    parser.add_argument("--keep", metavar="FOLDER", help="new folder for a release that is made here")
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
    parser.add_argument("--guidance", type=float, metavar="W", help="pictures: guidance scale")
    parser.add_argument("--height", type=int, metavar="PIXELS", help="pictures")
    parser.add_argument("--width", type=int, metavar="PIXELS", help="pictures")
    parser.add_argument("--new-tokens", type=int, metavar="N", help="texts: at most so many (default: 60)")
    parser.add_argument(
        "--seed", type=int, metavar="N", help="of the picture or of sampling; public, and not of the release"
    )
    parser.add_argument("--json", action="store_true", help="print JSON, and no progress")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Writes the picture or the text; 1 where the ledger refuses."""
    private = _check(args)
    say(args, "loading the model")
    handle, release = _given(args) if args.release is not None else (_protected(args), None)
    public = None if _check_host(handle, args) else _read_public(handle, args)
    if release is None:
        say(args, "releasing")
        release = release_or_refuse(handle, args, str(private))
        if release is None:
            return REFUSED
        if args.keep is not None:
            release.save_pretrained(args.keep)
    say(args, "generating")
    made: dict[str, Any] = (
        _draw(handle, release, args) if public is None else _write(handle, release, args, *public)
    )
    if args.json:
        print(json.dumps({**made, "guarantees": [g.sentence() for g in release.guarantees]}, sort_keys=True))
        return 0
    if "texts" in made and "files" not in made:
        print("\n".join(made["texts"]))
    for guarantee in release.guarantees:
        print(guarantee.sentence(), file=sys.stderr)
    for file in made.get("files", ()):
        print(f"wrote {file}", file=sys.stderr)
    return 0


def _check(args: argparse.Namespace) -> str | None:
    """The private text, where one is to be released; everything that can be refused without a model is."""
    given = [
        n
        for n in ("config", *SETTINGS, "calibration", "prompt_file", "prefix_bucket", "ledger", "keep")
        if getattr(args, n)
    ]
    if args.release is not None:
        if given:
            names = ", --".join(n.replace("_", "-") for n in given)
            raise ConfigError(f"--release reads what was released before; leave out --{names}.")
        return None
    if args.ledger is None:
        raise ConfigError("A private text is charged to a ledger: --ledger FILE. Or give a saved --release.")
    if args.keep is not None:
        new_folder(Path(args.keep))
    return read_private_text(args.prompt_file)


def _protected(args: argparse.Namespace) -> Any:
    from ..privacy.ledger import Ledger

    return protected_model(args, Ledger(args.ledger))


def _given(args: argparse.Namespace) -> tuple[Any, Any]:
    """The handle and a saved release; no budget is at hand, and none is spent."""
    from ..hosts.protect import handle_of
    from ..hosts.release import Release
    from ..hosts.restoring import from_pretrained
    from ..hosts.saving import FOLDER

    dtype = parse_dtype(args.dtype)
    if (Path(args.model) / FOLDER).is_dir():
        host = from_pretrained(args.model, torch_dtype=dtype)
    else:
        host = load_plain(args.model, dtype)
    release = Release.from_pretrained(args.release, host=host)
    return handle_of(host), release


def _check_host(handle: Any, args: argparse.Namespace) -> bool:
    """Whether it makes pictures; before anything is spent."""
    from ..hosts.decoder_only.handle import ProtectedDecoder
    from ..hosts.seq2seq.handle import ProtectedSeq2Seq

    check_texts(handle, args)
    decoder = isinstance(handle, ProtectedDecoder)
    pictures = not decoder and not isinstance(handle, ProtectedSeq2Seq)
    of_pictures = [n for n in ("steps", "guidance", "height", "width") if getattr(args, n) is not None]
    if pictures:
        if args.new_tokens is not None:
            raise ConfigError("--new-tokens is for texts, and this is a pipeline of pictures.")
        if args.out is None or Path(args.out).suffix.lower() not in (".png", ".jpg", ".jpeg", ".webp"):
            raise ConfigError("A picture needs a file: --out picture.png")
    elif of_pictures:
        raise ConfigError(f"--{', --'.join(of_pictures)}: for pictures, and this model writes text.")
    if args.begin is not None and (pictures or decoder):
        raise ConfigError("--begin is for encoder-decoder models.")
    if decoder and args.public is None:
        raise ConfigError("A decoder-only model answers something: --public TEXT is the user's turn.")
    if args.out is not None and (not Path(args.out).resolve().parent.is_dir() or Path(args.out).is_dir()):
        raise ConfigError("--out takes a file in a folder that exists.")
    return pictures


def _draw(handle: Any, release: Any, args: argparse.Namespace) -> dict[str, Any]:
    import torch

    pipe = handle.text.pipe
    pipe.set_progress_bar_config(disable=args.json)
    named = {
        "num_inference_steps": args.steps,
        "guidance_scale": args.guidance,
        "height": args.height,
        "width": args.width,
    }
    if args.seed is not None:
        named["generator"] = torch.Generator().manual_seed(args.seed)
    images = pipe(
        **release.inputs(prompt=args.public), **{k: v for k, v in named.items() if v is not None}
    ).images
    out = Path(args.out)
    files = [out] if len(images) == 1 else [out.with_stem(f"{out.stem}-{i}") for i in range(len(images))]
    for image, file in zip(images, files, strict=True):
        image.save(file)
    return {"files": [str(f) for f in files]}


def _read_public(handle: Any, args: argparse.Namespace) -> tuple[dict[str, Any], int]:
    """The public inputs of a model of text, and how many of their tokens its output begins with, which are not printed again.

    Raises:
        ConfigError, ContextError: no tokenizer, or words that it cannot take; before anything is spent.
    """
    from ..hosts.decoder_only.handle import ProtectedDecoder
    from ..hosts.seq2seq.calibrate import starts_of

    load_tokenizer(args.model)
    if isinstance(handle, ProtectedDecoder):
        ids = read_question(args.model, args.public, chat=args.chat)
        return {"input_ids": ids}, ids.shape[1]
    public = {} if args.public is None else {"input_ids": tokenize(args.model, args.public)[0]}
    if args.begin is None:
        return public, 0
    start = starts_of(handle.unet, [plain_ids(args.model, args.begin)])[0]
    return {**public, "decoder_input_ids": start.unsqueeze(0)}, len(start)


def _write(
    handle: Any, release: Any, args: argparse.Namespace, public: dict[str, Any], skip: int
) -> dict[str, Any]:
    import torch

    tokenizer = load_tokenizer(args.model)
    if args.seed is not None:
        torch.manual_seed(args.seed)
    options: dict[str, Any] = {"max_new_tokens": 60 if args.new_tokens is None else args.new_tokens}
    if args.seed is not None:
        options["do_sample"] = True
    found = handle.unet.generate(**release.inputs(**public), **options)
    texts = tokenizer.batch_decode(found[:, skip:], skip_special_tokens=True)
    if args.out is None:
        return {"texts": texts}
    Path(args.out).write_text("\n".join(texts) + "\n", encoding="utf-8")
    return {"texts": texts, "files": [args.out]}
