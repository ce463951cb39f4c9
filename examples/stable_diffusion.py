"""Stable Diffusion with a private prompt: released once, drawn as often as you like, the prompt never seen by the UNet.

    python examples/stable_diffusion.py                                    # the shipped pipeline and a stand-in prompt; half a minute
    python examples/stable_diffusion.py --prompt-file prompt.txt --ledger ledger.json
    python examples/stable_diffusion.py --model ./my-sd15 --calibration ./my-calibration --prompt-file prompt.txt --size 512

Any Stable Diffusion 1.x pipeline of diffusers, a folder or a Hub id, with a calibration that was made for its text encoder from PUBLIC
prompts:

    hf-dp-xattn calibrate ./my-sd15 --public prompts.txt --unit context --out ./my-calibration

The calibration says what a guarantee covers (a row, a phrase, or the whole prompt) and at which epsilons. The ledger keeps what each
prompt has spent: in a file, or it is forgotten at exit. The prompt is read from a file, since shells and process tables keep arguments.
"""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from pathlib import Path

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")

import torch
from diffusers import StableDiffusionPipeline

import hf_dp_xattn as dpx
from hf_dp_xattn.records import decode_text

SHAPES = Path(__file__).resolve().parent / "shapes"
PROMPT = "a large green star on the right, black background"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default=str(SHAPES / "pipeline"), help="folder or Hub id of the pipeline")
    parser.add_argument(
        "--calibration", default=str(SHAPES / "calibrations/context"), help="folder or Hub id"
    )
    parser.add_argument("--prompt-file", type=Path, help="file with the private prompt")
    parser.add_argument("--negative-prompt", help="PUBLIC")
    parser.add_argument("--epsilon", type=float, default=16.0)
    parser.add_argument("--ledger", type=Path, help="file that keeps what was spent")
    parser.add_argument("--pictures", type=int, default=4, help="all from one release (default 4)")
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--size", type=int, default=32, help="of a picture, in pixels")
    parser.add_argument("--out", type=Path, default=Path("out/stable_diffusion"))
    args = parser.parse_args()
    warnings.filterwarnings("ignore", category=UserWarning)
    args.out.mkdir(parents=True, exist_ok=True)

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.float16 if device == "cuda" else torch.float32
    pipe = StableDiffusionPipeline.from_pretrained(args.model, dtype=dtype).to(device)
    calibration = dpx.Calibration.from_pretrained(args.calibration)
    print(dpx.plan(calibration, epsilon=args.epsilon))  # what to expect; nothing is spent

    config = dpx.DPXAttnConfig(
        mechanism="anchors",
        epsilon=args.epsilon,
        unit=calibration.unit,
        neighboring=calibration.neighboring,
    )
    prompt = PROMPT if args.prompt_file is None else decode_text(args.prompt_file.read_bytes()).strip()
    try:
        with dpx.protect(pipe, config, calibration=calibration, ledger=dpx.Ledger(args.ledger)) as protected:
            release = protected.release(prompt)  # charged before the prompt is encoded
            pictures = pipe(
                **release.inputs(),
                negative_prompt=args.negative_prompt,
                num_images_per_prompt=args.pictures,
                num_inference_steps=args.steps,
                height=args.size,
                width=args.size,
            ).images
            print(f"\n{protected.report()}\n")
    except dpx.DPXAttnError as error:  # its text never quotes the prompt
        sys.exit(f"Nothing was drawn: {error}")
    for i, picture in enumerate(pictures):
        picture.save(args.out / f"{i}.png")
    print(f"{len(pictures)} pictures of one release: {args.out.resolve()}")


if __name__ == "__main__":
    main()
