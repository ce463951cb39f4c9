"""`hf-dp-xattn calibrate`: a calibration of a model from a file of PUBLIC texts."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError
from ..records import plain_text, read_records
from .models import HELP as MODEL
from .models import SETTINGS, add_units, load_plain, load_tokenizer, parse_dtype, quiet, tokenizer_of
from .private_text import add_text_options
from .public_numbers import check_numbers
from .quick_library import few
from .release_command import new_folder
from .watching import Stopped

if TYPE_CHECKING:
    from ..config import DPXAttnConfig

NAME = "calibrate"
HELP = "fit a calibration to public texts; spends nothing"
ABBREVIATES = True  # nothing private could be taken for an option
DESCRIPTION = """\
Fits everything data-dependent that a release will read to PUBLIC texts, and writes it to a folder, with a card. No budget is spent, and
the calibration may be shared. By default that is a library of public texts (--mechanism library), which needs no training: minutes for a
model of 135 M parameters. --unit row and the options of `anchors` (--releases, --steps, ...) train a decoder, which may take hours.

The texts must be public: a calibration is neither noised nor counted, and it tells what it was made from. Use texts that anybody may read
and that resemble the private ones; about 100 are the least that works, thousands do better. Without --public, those are taken that come
with the package: 608 system prompts, or 3,000 prompts of pictures.

Ctrl-C loses little: what was encoded and trained is kept in a hidden folder in --out, and the same command goes on from there.

For --unit group of a transformers model and `anchors` a text is made of segments (decoder-only) or documents (encoder-decoder), each
encoded apart: each line is then JSON, a list of strings, such as ["be polite", "close at five"].
"""
EXAMPLES = """\
examples:
  a library of the public prompts that come with the package, for a chat model's sentences or a pipeline's phrases; a first try:
    hf-dp-xattn calibrate ./my-llama --out ./my-library
    hf-dp-xattn calibrate ./my-pipeline --out ./my-library --quick
  of your own public texts, one a line:
    hf-dp-xattn calibrate ./my-pipeline --public prompts.txt --epsilons 4 8 16 --out ./by-phrase
    hf-dp-xattn calibrate ./my-llama --unit context --public system_prompts.txt --out ./my-library
  anchors: a Stable Diffusion pipeline, one public prompt a line:
    hf-dp-xattn calibrate ./my-pipeline --mechanism anchors --unit context --public prompts.txt --out ./my-calibration
  an encoder-decoder model, from documents of 128 tokens; a decoder-only model, with public questions:
    hf-dp-xattn calibrate ./my-bart --public documents.txt --length 128 --out ./my-calibration
    hf-dp-xattn calibrate ./my-llama --public prefixes.txt --questions questions.txt --out ./my-calibration
  system prompts of a chat model in segments, and corpora of documents, as JSON lines:
    hf-dp-xattn calibrate examples/chat/model --public prompts.jsonl --unit group --chat --prefix-bucket 64 --questions questions.txt \\
      --releases sum --out ./my-calibration
    hf-dp-xattn calibrate examples/rag/model --public corpora.jsonl --unit group --questions questions.txt --releases histogram \\
      --anchors 1024 --out ./my-calibration
  then:
    hf-dp-xattn plan ./my-calibration

exit codes: 0 done; 1 nothing can be written; 2 bad input (the message is on stderr); 130 stopped by Ctrl-C.
"""
_KEPT = ".unfinished"  # in --out, until it is done
_ANCHORS = ("anchors", "releases", "steps", "minutes", "length", "questions", "replies", "prefix_bucket")
_QUICK = {"library": (2.0, 4.0, 8.0, 16.0, 32.0), "anchors": (4.0, 8.0, 16.0)}


def add_options(parser: argparse.ArgumentParser) -> None:
    """All of them but `--json`."""
    parser.add_argument("model", help=MODEL)
    parser.add_argument(
        "--public",
        metavar="FILE",
        help="text file in UTF-8 with one PUBLIC text a line, or JSON lines (see above; default: prompts that come with the package)",
    )
    parser.add_argument("--out", required=True, metavar="FOLDER", help="new folder for the calibration")
    parser.add_argument(
        "--mechanism",
        choices=("anchors", "kernel_sum", "library"),
        help="what will be released (default: library, public texts, for --unit group or context of any host; anchors with --unit row "
        "or with its options)",
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="a first try: 2,000 public units, fewer epsilons, shorter training",
    )
    add_units(
        parser,
        delta=" (default: 1e-5)",
        unit=" (default: group)",
        neighboring=" (default: replace_one)",
    )
    parser.add_argument(
        "--epsilons", type=float, nargs="+", metavar="E", help="one plan for each (default: 0.5 to 64)"
    )
    parser.add_argument(
        "--anchors",
        type=int,
        metavar="M",
        help="cells of the histogram's codebook (default: 4096, or what there is)",
    )
    parser.add_argument(
        "--releases",
        nargs="+",
        choices=("sum", "response", "histogram", "mixed"),
        help="candidates among which each epsilon chooses (default: all)",
    )
    parser.add_argument(
        "--steps", type=int, metavar="N", help="training steps of the decoder (default: some minutes)"
    )
    parser.add_argument(
        "--minutes",
        type=float,
        metavar="T",
        help="for all of it, about (default: 10 where --steps is not given)",
    )
    parser.add_argument(
        "--length",
        type=int,
        metavar="N",
        help="encoder-decoder models: texts are cut to N tokens, shorter ones left out",
    )
    parser.add_argument(
        "--questions",
        metavar="FILE",
        help="models of text: public users' turns (what an encoder-decoder model's decoder starts with), one a line",
    )
    parser.add_argument(
        "--replies",
        type=int,
        metavar="N",
        help="decoder-only models: train the decoder on the model's own replies to N questions behind each public prefix as well; "
        "slower, and what a user sees gains most",
    )
    parser.add_argument(
        "--grouping",
        choices=("phrases", "sentences", "lines", "segments", "documents", "context"),
        help="library: where texts are cut in units (default: phrases of prompts, documents of encoder-decoder models, else sentences)",
    )
    parser.add_argument(
        "--expand",
        action="store_true",
        default=None,
        help="library: add texts in which words that stand in the same public texts take each other's place",
    )
    add_text_options(parser)
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the fit; public (default: 0)")
    parser.add_argument("--dtype", default="float32", help="type of the weights (default: float32)")
    parser.add_argument("--license", help="license id of the Hub for the card, such as apache-2.0")


def run(args: argparse.Namespace) -> int:
    """Writes the calibration and says what each of its plans is expected to give."""
    check_numbers(args)
    if args.json:
        quiet()
    args.mechanism = args.mechanism or _default_mechanism(args)
    if args.mechanism == "library":
        args.unit = args.unit or "group"
    with new_folder(Path(args.out), but=_KEPT) as out:
        kept = out / _KEPT
        before = kept.exists()
        try:
            return _run(args, out)
        except KeyboardInterrupt:
            if kept.exists():
                raise Stopped("Stopped. The same command goes on from what is kept in --out.") from None
            raise
        except ConfigError as error:
            from ..calibration.checkpoints import CannotKeepError

            if not before and not isinstance(error, CannotKeepError):  # nothing could go on from it
                shutil.rmtree(kept, ignore_errors=True)
            raise


def _default_mechanism(args: argparse.Namespace) -> str:
    return (
        "anchors" if args.unit == "row" or any(getattr(args, n) is not None for n in _ANCHORS) else "library"
    )


def _run(args: argparse.Namespace, out: Path) -> int:
    from ..artefacts import CardOptions
    from ..config import DPXAttnConfig
    from ..hosts.calibrate import calibrate

    texts = None if args.public is None else read_records(args.public, "--public")
    questions = None if args.questions is None else read_records(args.questions, "--questions")
    settings = {name: getattr(args, name, None) for name in SETTINGS if name != "epsilon"}
    if args.mechanism != "library" and settings["unit"] is None:
        settings["unit"] = "row"  # as the help says; what it protects is told where it is used
    config = DPXAttnConfig(**{k: v for k, v in settings.items() if v is not None})
    model = load_plain(args.model, parse_dtype(args.dtype))
    named = {
        name: getattr(args, name)
        for name in ("epsilons", "anchors", "releases", "steps", "minutes", "replies")
    }
    options: dict[str, Any] = {k: v for k, v in named.items() if v is not None}
    options["folder"] = out / _KEPT
    if args.quick:
        options.setdefault("epsilons", _QUICK.get(args.mechanism, _QUICK["anchors"]))
    if args.mechanism == "library":
        public, more = _texts_of(args, texts, model)
        more["tokenizer"] = tokenizer_of(model, args.model)
    elif texts is None:
        raise ConfigError(
            f"--mechanism {args.mechanism} needs --public FILE, texts that resemble the private ones."
        )
    elif args.expand is not None or args.grouping is not None:
        raise ConfigError("--grouping and --expand are for --mechanism library.")
    else:
        public, more = _public(model, config, args, texts, questions)
        if args.quick and args.mechanism == "anchors":
            options = {"steps": 300, "anchors": 512, **options}
    if args.quick and isinstance(public, list):
        public = few(public)
    calibration = calibrate(model, public, config, seed=args.seed, progress=not args.json, **more, **options)
    card: CardOptions = {} if args.license is None else {"license": args.license}
    calibration.save_pretrained(out, **card)
    shutil.rmtree(out / _KEPT, ignore_errors=True)
    if args.json:
        plans = [{"epsilon": p.epsilon, "delta": config.delta, **_summary(p)} for p in calibration.plans]
        print(json.dumps({"folder": str(out), "contexts": len(public), "unit": config.unit, "plans": plans}))
        return 0
    for plan in calibration.plans:
        values = ", ".join(
            f"{k} {v:.3g}" if isinstance(v, float) else str(v) for k, v in _summary(plan).items()
        )
        print(f"epsilon {plan.epsilon:g}: {values}")
    print(f"wrote {out}; see: hf-dp-xattn report {out}")
    return 0


def _texts_of(
    args: argparse.Namespace, texts: list[str] | None, model: Any
) -> tuple[list[Any], dict[str, Any]]:
    """The public contexts of a library: texts, which are cut; or with --unit group, where all lines are JSON, lists of units."""
    from ..hosts.calibrate import shipped_contexts

    refused = [n for n in _ANCHORS if getattr(args, n) is not None]
    if refused or args.chat:
        name = "chat" if args.chat else refused[0].replace("_", "-")
        raise ConfigError(f"--{name} is not for --mechanism library, which is made of the texts alone.")
    options = {n: getattr(args, n) for n in ("grouping", "expand") if getattr(args, n) is not None}
    if texts is None:
        return shipped_contexts(model), options
    listed = args.unit == "group" and all(text.startswith("[") for text in texts)
    return (read_lists(texts) if listed else texts), options


def _summary(plan: Any) -> dict[str, Any]:
    """What a plan releases, and how far from the truth it is predicted to be."""
    if hasattr(plan, "entries") and hasattr(plan.quality, "distortion"):
        return {"texts": int(plan.entries.shape[-1]), "distortion": float(plan.quality.distortion)}
    if hasattr(plan, "release"):
        return {"release": plan.release, "fvu": float(plan.quality.fvu)}
    return {"fvu": float(plan.predicted_fvu)}


def read_lists(lines: list[str]) -> list[list[str]]:
    """Public contexts of segments or documents, from JSON lines.

    Raises:
        ConfigError: a line is not a list of strings, or an empty one.
    """
    contexts = []
    for i, line in enumerate(lines, 1):
        try:
            parts = json.loads(line)
        except (ValueError, RecursionError):
            parts = None
        if (
            not isinstance(parts, list)
            or not parts
            or not all(isinstance(p, str) and p.strip() for p in parts)
        ):
            raise ConfigError(
                f"For --unit group each line of --public is JSON, a list of the context's segments or documents; text {i} is not."
            )
        contexts.append([" ".join(plain_text(p).split()) for p in parts])
    return contexts


def _public(
    model: Any, config: DPXAttnConfig, args: argparse.Namespace, texts: list[str], questions: list[str] | None
) -> tuple[Any, dict[str, Any]]:
    """(public contexts, further options) as `calibrate` takes them for this kind of host."""
    from ..hosts.host_registry import driver_for

    driver = driver_for(model, config)(model, config, options=args)
    if driver.tokenizes:
        driver.tokenizer = load_tokenizer(args.model)
    units = read_lists(texts) if config.unit == "group" and driver.tokenizes else texts
    public, more = driver.public_contexts(units, questions)
    for note in () if args.json else driver.notes:
        print(note, file=sys.stderr)
    return public, more
