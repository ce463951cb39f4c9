"""`hf-dp-xattn demo`: one PUBLIC text, unprotected and at several epsilons, as pictures or replies, and the privacy report."""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from .models import add_settings
from .public_numbers import check_numbers, check_pictures
from .release_command import say
from .trial_hosts import load_trial

NAME = "demo"
HELP = "one public text at several epsilons: pictures or replies"
EPSILONS = (1.0, 4.0, 8.0, 16.0, 64.0)
_SHIPPED = Path("examples") / "shapes"
_SHIPPED_TEXT = ("a large green star on the right", "black background")
_TEXT = ("the meeting is at noon", "the house by the river is red")
_QUESTION = "when is the meeting?"
DESCRIPTION = """\
Shows what a protection leaves of a text: the same text unprotected, and released at several epsilons. A pipeline draws a strip of
pictures (one PNG, the same initial noise in all of them, and first what it draws without a text); a language model gives a table of
replies. Then comes the privacy report. In a checkout, without MODEL, it takes the pipeline that is shipped, with its calibrations.

The text is for demonstration, and must be PUBLIC: it is an argument, which shells and process tables keep, it is drawn unprotected, and it
is released once for each epsilon, which adds up. For a private text: hf-dp-xattn release, hf-dp-xattn generate.
"""
EXAMPLES = """\
examples:
  in a checkout:
    hf-dp-xattn demo
    hf-dp-xattn demo --unit row --epsilons 1 8 64 --out ./strip
  your own pipeline; several texts are phrases, segments or documents:
    hf-dp-xattn demo ./my-pipeline --calibration ./by-phrase --unit group --text "a red circle" "a blue background"
  a language model with a public question:
    hf-dp-xattn demo ./my-llama --calibration ./my-calibration --text "The code is 1234." --question "What is the code?"

exit codes: 0 done; 2 bad input (the message is on stderr).
"""


@dataclass(frozen=True)
class Column:
    """One picture or reply; epsilon None: not protected."""

    label: str
    epsilon: float | None
    made: Any


def add_options(parser: argparse.ArgumentParser) -> None:
    """All of them but `--json`."""
    parser.add_argument(
        "model",
        nargs="?",
        help="folder or Hub id of a diffusers pipeline or a transformers model, plain or protected",
    )
    parser.add_argument(
        "--text", nargs="+", metavar="TEXT", help="a PUBLIC text; several are phrases, segments or documents"
    )
    parser.add_argument("--question", metavar="TEXT", help="decoder-only models: a public user's turn")
    parser.add_argument("--epsilons", type=float, nargs="+", metavar="E", help="default: 1 4 8 16 64")
    add_settings(parser)
    parser.add_argument(
        "--out", default=".", metavar="FOLDER", help="for demo.png (default: the current one)"
    )
    parser.add_argument(
        "--steps", type=int, default=20, metavar="N", help="pictures: denoising steps (default: 20)"
    )
    parser.add_argument("--guidance", type=float, metavar="W", help="pictures: guidance scale")
    parser.add_argument("--pixels", type=int, metavar="N", help="pictures: edge (default: the model's own)")
    parser.add_argument(
        "--new-tokens", type=int, default=20, metavar="N", help="replies: at most so many (default: 20)"
    )
    parser.add_argument(
        "--seed", type=int, default=0, metavar="N", help="of the pictures; not of the releases"
    )
    parser.set_defaults(config=None, epsilon=None)


def run(args: argparse.Namespace) -> int:
    """Writes the strip or prints the replies, and the report."""
    epsilons = _settle(args)
    out = Path(args.out)
    say(args, "loading the model")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from ..audit.subjects import subject_of

        trial = load_trial(args)
        subject = subject_of(trial.host, trial.config, trial.calibration, trial.tokenizer)
        pictures = subject.draws
        if pictures:
            check_pictures(trial.host, args)
        canary = _canary(subject, args)
        columns, report = _columns(subject, canary, epsilons, args, pictures)
    values: dict[str, Any] = {"report": report.to_dict(), "unit": subject.config.unit}
    values["columns"] = [{"label": c.label, "epsilon": c.epsilon} for c in columns]
    if pictures:
        values["file"] = str(_write(columns, out))
    else:
        for found, column in zip(values["columns"], columns, strict=True):
            found["reply"] = column.made
    print(json.dumps(values, sort_keys=True) if args.json else _told(values, columns, report, pictures))
    return 0


def _settle(args: argparse.Namespace) -> tuple[float, ...]:
    """Fills in what was left out; the epsilons."""
    from ..hosts.protection import FOLDER

    check_numbers(args)
    if not Path(args.out).is_dir():
        raise ConfigError("--out takes a folder that exists.")
    if args.model is None:
        _take_the_shipped(args)
    epsilons = tuple(args.epsilons or EPSILONS)
    if (Path(args.model) / FOLDER).is_dir():
        return epsilons  # saved with its protection, which says the rest
    args.epsilon = max(epsilons)
    return epsilons


def _take_the_shipped(args: argparse.Namespace) -> None:
    roots = (Path(), Path(__file__).resolve().parents[2])
    root = next(
        (r / _SHIPPED for r in roots if (r / _SHIPPED / "pipeline" / "model_index.json").is_file()), None
    )
    if root is None:
        raise ConfigError(
            "Name a model: hf-dp-xattn demo MODEL --calibration FOLDER. (Without one it takes examples/shapes/pipeline of a checkout; this "
            "is none.)"
        )
    args.model, args.text = str(root / "pipeline"), args.text or list(_SHIPPED_TEXT)
    if args.calibration is not None:
        return  # it says the rest
    args.unit = args.unit or "context"
    if args.mechanism in (None, "anchors"):
        args.calibration = str(root / "calibrations" / args.unit)


def _canary(subject: Any, args: argparse.Namespace) -> Any:
    """The text as the subject takes it: its parts, or one whole."""
    texts = list(args.text or _TEXT)
    if not all(t.strip() for t in texts):
        raise ConfigError("--text must not be empty.")
    if subject.kind == "decoder-only":
        subject.question = args.question or _QUESTION
    elif args.question is not None:
        raise ConfigError("--question is for decoder-only models.")
    return subject.whole(texts)


def _columns(
    subject: Any, canary: Any, epsilons: tuple[float, ...], args: argparse.Namespace, pictures: bool
) -> tuple[list[Column], Any]:
    """What is made unprotected and at each epsilon, and the report of the last one."""
    from tqdm.auto import tqdm

    make = _draw if pictures else _reply
    nothing = subject.nothing()
    columns = [] if nothing is None else [Column("no text", None, make(subject, nothing, args))]
    columns.append(Column("not protected", None, make(subject, subject.unprotected(canary), args)))
    report = None
    for epsilon in tqdm(epsilons, disable=args.json, desc="epsilons"):
        with subject.protected(subject.config.replace(epsilon=float(epsilon))) as handle:
            inputs = subject.inputs(subject.release(canary))
            columns.append(Column(f"epsilon {epsilon:g}", float(epsilon), make(subject, inputs, args)))
            report = handle.report()
    return columns, report


def _draw(subject: Any, inputs: dict[str, Any], args: argparse.Namespace) -> Any:
    import torch

    named = {"guidance_scale": args.guidance, "height": args.pixels, "width": args.pixels}
    if args.pixels is None and isinstance(subject.unet.config.sample_size, int):
        named["height"] = named["width"] = subject.unet.config.sample_size * subject.host.vae_scale_factor
    generator = torch.Generator().manual_seed(args.seed)
    return subject.host(
        **inputs,
        generator=generator,
        num_inference_steps=args.steps,
        **{k: v for k, v in named.items() if v is not None},
    ).images[0]


def _reply(subject: Any, inputs: dict[str, Any], args: argparse.Namespace) -> str:
    import torch

    if subject.tokenizer is None:
        raise ConfigError("There is no tokenizer beside the model; save one there.")
    with torch.no_grad():
        found = subject.host.generate(**inputs, max_new_tokens=args.new_tokens, do_sample=False, num_beams=1)
    skip = inputs["input_ids"].shape[1] if subject.kind == "decoder-only" else 0
    text: str = subject.tokenizer.decode(found[0, skip:], skip_special_tokens=True)
    return " ".join(text.split())


def _write(columns: list[Column], out: Path) -> Path:
    """One row of labelled pictures. Raises ConfigError where it cannot be written."""
    try:
        from PIL import Image, ImageDraw
    except ImportError:
        raise ConfigError("Pictures need Pillow: pip install 'hf_dp_xattn[examples]'.") from None
    width, height = columns[0].made.size
    factor = max(1, -(-160 // width))  # labels need room
    width, height, margin, label = factor * width, factor * height, 6, 18
    strip = Image.new("RGB", (len(columns) * (width + margin) + margin, height + label + 2 * margin), "white")
    draw = ImageDraw.Draw(strip)
    for i, column in enumerate(columns):
        left = margin + i * (width + margin)
        draw.text((left, margin), column.label, fill="black")
        picture = column.made.convert("RGB").resize((width, height), Image.Resampling.NEAREST)
        strip.paste(picture, (left, margin + label))
    path = out / "demo.png"
    try:
        strip.save(path)
    except OSError as error:
        raise ConfigError(f"{path.name!r} cannot be written ({type(error).__name__}).") from None
    return path


def _told(values: dict[str, Any], columns: list[Column], report: Any, pictures: bool) -> str:
    lines = []
    if pictures:
        print(f"wrote {values['file']}", file=sys.stderr)
    else:
        width = max(len(c.label) for c in columns)
        lines += [f"{c.label:<{width}}  {c.made}" for c in columns] + [""]
    lines.append(
        f"The text was released {len([c for c in columns if c.epsilon])} times, once for each epsilon; a private text would be charged for "
        "each. The last one:"
    )
    return "\n".join([*lines, str(report)])
