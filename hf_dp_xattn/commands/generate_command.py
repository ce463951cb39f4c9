"""`hf-dp-xattn generate`: a picture or a text from a saved release, or from a private text that is released first."""

from __future__ import annotations

import argparse
import json
import os
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from .models import (
    SETTINGS,
    by_text,
    check_texts,
    is_given,
    load_plain,
    parse_dtype,
    protected_model,
    read_private_prefix,
    writes_text,
)
from .private_text import WHY, read_private_text
from .public_head import check_chat
from .public_numbers import NOTHING, check_decoder_room, check_numbers, check_pictures
from .release_command import REFUSED, add_releasing, keep, new_folder, open_ledger, release_or_refuse, say
from .texts import LINES, chat_head, load_tokenizer, plain_ids, read_question, tokenize
from .watching import Stage, watching

NAME = "generate"
NEW_TOKENS = 60
_DESCRIPTION = f"""\
Draws a picture (diffusers) or writes a text (transformers) from a release. With --release it reads a saved one: nothing is charged, and
no private text is asked for. Otherwise it releases a private text first, once, and charges it to the ledger; keep that release with
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

exit codes: 0 done; 1 the ledger refuses and nothing was released, or something failed after the charge or while drawing or writing (the
message on stderr says which, what was charged, and where the release is kept); 2 bad input, nothing was spent (the message is on stderr).
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
    add_releasing(parser)
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
    parser.add_argument("--guidance", type=float, metavar="W", help="pictures: guidance scale, 0 or more")
    parser.add_argument(
        "--height", type=int, metavar="PIXELS", help="pictures: a multiple of 8 (or of what the VAE needs)"
    )
    parser.add_argument("--width", type=int, metavar="PIXELS", help="pictures: likewise")
    parser.add_argument(
        "--new-tokens", type=int, metavar="N", help=f"texts: at most so many (default: {NEW_TOKENS})"
    )
    parser.add_argument(
        "--seed",
        type=int,
        metavar="N",
        help="of the picture or of sampling, 0 to 2^63 - 1; public, and not of the release",
    )
    parser.add_argument("--json", action="store_true", help="print JSON, and no progress")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Writes the picture or the text; 1 where the ledger refuses, or where it fails after a charge or with a saved release."""
    with nullcontext() if args.keep is None else new_folder(Path(args.keep)):
        return _run(args)


def _run(args: argparse.Namespace) -> int:
    private = _check(args)
    say(args, "loading the model")
    ledger, release = None, None
    if args.release is not None:
        handle, release = _given(args)
    else:
        ledger = open_ledger(args)
        handle = protected_model(args, ledger)
    public = None if _check_host(handle, args) else _read_public(handle, args)
    if public is not None:
        _check_room(handle, args, *public, private=private)
        _check_chat(handle, release, args)
    stage = Stage("Generating", private=release is None, keep=None if args.keep else "--keep FOLDER")
    with watching(ledger, stage):
        if release is None:
            stage.doing = "Releasing"
            say(args, "releasing")
            release = release_or_refuse(handle, args, str(private))
            if release is None:
                return REFUSED
            if args.keep is not None:
                keep(release, Path(args.keep), stage)
            stage.doing, stage.private = "Generating", False
        say(args, "generating")
        made: dict[str, Any] = (
            _draw(handle, release, args) if public is None else _write(handle, release, args, *public)
        )
        _tell(args, made, [g.sentence() for g in release.guarantees])
    return 0


def _tell(args: argparse.Namespace, made: dict[str, Any], guarantees: list[str]) -> None:
    if args.json:
        print(json.dumps({**made, "guarantees": guarantees}, sort_keys=True))
        return
    if "texts" in made and "files" not in made:
        print("\n".join(made["texts"]))
    for told in (*guarantees, *(f"wrote {file}" for file in made.get("files", ()))):
        print(told, file=sys.stderr)


def _check(args: argparse.Namespace) -> str | None:
    """The private text, where one is to be released; everything that can be refused without a model is."""
    check_numbers(args)
    given = [
        n
        for n in ("config", *SETTINGS, "calibration", "prompt_file", "prefix_bucket", "ledger", "keep")
        if is_given(getattr(args, n))
    ]
    if args.release is not None:
        if given:
            names = ", --".join(n.replace("_", "-") for n in given)
            raise ConfigError(f"--release reads what was released before; leave out --{names}.")
        return None
    return read_private_text(args.prompt_file)


def _given(args: argparse.Namespace) -> tuple[Any, Any]:
    """The handle and a saved release; no budget is at hand, and none is spent."""
    from ..hosts.protect import Release, handle_of
    from ..hosts.protection import FOLDER
    from ..hosts.restoring import from_pretrained

    dtype = parse_dtype(args.dtype)
    if (Path(args.model) / FOLDER).is_dir():
        host = from_pretrained(args.model, dtype=dtype)
    else:
        host = load_plain(args.model, dtype)
    release = Release.from_pretrained(args.release, host=host)
    return handle_of(host), release


def _check_host(handle: Any, args: argparse.Namespace) -> bool:
    """Whether it makes pictures; before anything is spent."""
    check_texts(handle, args)
    kind = writes_text(handle)
    decoder, pictures = kind == "decoder", kind is None
    of_pictures = [n for n in ("steps", "guidance", "height", "width") if getattr(args, n) is not None]
    if pictures:
        if args.new_tokens is not None:
            raise ConfigError("--new-tokens is for texts, and this is a pipeline of pictures.")
        if args.out is None or Path(args.out).suffix.lower() not in (".png", ".jpg", ".jpeg", ".webp"):
            raise ConfigError("A picture needs a file: --out picture.png")
        check_pictures(_pipe_of(handle), args)
        if args.public is not None and not by_text(handle):
            handle.text.tokenize(args.public)  # refused now, not after the charge
    elif of_pictures:
        raise ConfigError(f"--{', --'.join(of_pictures)}: for pictures, and this model writes text.")
    if args.begin is not None and (pictures or decoder):
        raise ConfigError("--begin is for encoder-decoder models.")
    if decoder and args.public is None:
        raise ConfigError("A decoder-only model answers something: --public TEXT is the user's turn.")
    if args.out is not None:
        _check_out(Path(args.out).resolve())
    return pictures


def _pipe_of(handle: Any) -> Any:
    return handle.model if by_text(handle) else handle.text.pipe


def _check_out(out: Path) -> None:
    if not out.parent.is_dir() or out.is_dir():
        raise ConfigError(f"--out takes a file in a folder that exists. {NOTHING}")
    if not os.access(out if out.exists() else out.parent, os.W_OK):
        raise ConfigError(f"Nothing can be written to the file of --out. {NOTHING}")


def _draw(handle: Any, release: Any, args: argparse.Namespace) -> dict[str, Any]:
    import torch

    pipe = _pipe_of(handle)
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
    from ..hosts.transformers.encoder_decoder.public_documents import starts_of

    load_tokenizer(args.model)
    if writes_text(handle) == "decoder":
        ids = read_question(args.model, args.public, chat=args.chat)
        _check_words(ids)
        head = {"public_head": chat_head(args.model)} if args.chat and by_text(handle) else {}
        return {"input_ids": ids, **head}, ids.shape[1]
    public: dict[str, Any] = {}
    if args.public is not None:
        public["input_ids"] = tokenize(args.model, args.public)[0]
        _check_words(public["input_ids"])
    if args.public is not None and by_text(handle):
        public = {"prompt": args.public}
    if args.begin is None:
        return public, 0
    start = starts_of(handle.model, [plain_ids(args.model, args.begin)])[0]
    return {**public, "decoder_input_ids": start.unsqueeze(0)}, len(start)


def _check_words(ids: Any) -> None:
    if not ids.shape[1]:
        raise ConfigError(f"--public holds no words. {NOTHING}")


def _check_room(
    handle: Any, args: argparse.Namespace, public: dict[str, Any], skip: int, *, private: str | None
) -> None:
    """Raises ConfigError where the model has too few positions for the text; of a decoder-only model with a saved release, `generate`
    itself says so, at no cost."""
    from ..hosts.transformers.decoder_only.decoder_host import DecoderHost
    from ..hosts.transformers.decoder_only.prefix_attention import check_window
    from ..hosts.transformers.decoder_only.prefix_contexts import padded_length

    if writes_text(handle) == "encoder-decoder":
        check_decoder_room(handle.model, max(1, skip) + _new_tokens(args) - 1)
    elif private is not None and isinstance(
        getattr(handle, "host", None), DecoderHost
    ):  # what is released as text is as long as it is
        prefix = read_private_prefix(handle, args, private)
        parts = prefix.context if isinstance(prefix.context, list) else [prefix.context]
        slots = padded_length(max(map(len, parts), default=0), args.prefix_bucket)
        try:
            check_window(handle.host.limit, len(prefix.head) + slots + skip + _new_tokens(args) - 1)
        except ConfigError as error:
            raise ConfigError(f"{error} {NOTHING}") from None


def _check_chat(handle: Any, release: Any | None, args: argparse.Namespace) -> None:
    from ..hosts.transformers.decoder_only.decoder_host import DecoderHost

    if release is not None and isinstance(getattr(handle, "host", None), DecoderHost):
        check_chat(handle, release, args)


def _new_tokens(args: argparse.Namespace) -> int:
    return NEW_TOKENS if args.new_tokens is None else args.new_tokens


def _write(
    handle: Any, release: Any, args: argparse.Namespace, public: dict[str, Any], skip: int
) -> dict[str, Any]:
    import torch

    tokenizer = load_tokenizer(args.model)
    if args.seed is not None:
        torch.manual_seed(args.seed)
    options: dict[str, Any] = {"max_new_tokens": _new_tokens(args)}
    if args.seed is not None:
        options["do_sample"] = True
    inputs = release.inputs(**public)
    if by_text(handle) and writes_text(handle) == "decoder":  # the released text stands before the user's own
        skip = inputs["input_ids"].shape[1]
    found = handle.model.generate(**inputs, **options)
    texts = tokenizer.batch_decode(found[:, skip:], skip_special_tokens=True)
    if args.out is None:
        return {"texts": texts}
    Path(args.out).write_text("\n".join(texts) + "\n", encoding="utf-8")
    return {"texts": texts, "files": [args.out]}
