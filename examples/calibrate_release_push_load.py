"""Calibrate, plan, release, push, and load on a second machine: what may be shared, and in which order.

    python examples/calibrate_release_push_load.py                                        # no Hub: into out/push_load
    hf auth login; python examples/calibrate_release_push_load.py --repo me/my-scene      # to your own repository

1. *Calibrate* on PUBLIC prompts: codebooks, priors and a decoder for each epsilon. Spends nothing. So few prompts and steps take a minute
   or two; the calibrations that ship with `shapes` had twelve thousand of each.
2. *Plan*: from the calibration alone, what quality to expect at each epsilon and what an attacker could guess. Spends nothing.
3. *Release* one private prompt at the epsilon that was decided on. The ledger, a file, is charged before anything is computed.
4. *Push* calibration and release: JSON and safetensors with a card each that states the guarantee. A release is differentially private,
   so it may be public; what it tells at its epsilon, it then tells to everybody, for ever. The ledger and the prompt stay at home.
5. *Load* by id and revision on a machine that has the pipeline but neither prompt, nor ledger, nor calibration, and draw. This costs
   nothing either: it is the same release.

Nothing is pushed without --repo. --endpoint (or HF_ENDPOINT) names another Hub than huggingface.co; the token is read from `hf auth
login` or HF_TOKEN, never from the arguments, which shells and process tables keep. So is the prompt: --prompt-file, or else the public
stand-in below.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
import warnings
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")

UNIT = "group"  # phrase by phrase: "replace one phrase" is then a guarantee for words, end to end
PROMPT = "a large green star on the right, a small red circle on the left, black background"
EPSILONS = (8.0, 16.0)
CALIBRATION, RELEASE = "calibration", "release"  # subfolders of the repository


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("out/push_load"))
    parser.add_argument("--repo", help="Hub id (owner/name) to push to; without it everything stays in --out")
    parser.add_argument("--endpoint", help="address of the Hub, where it is not huggingface.co")
    parser.add_argument("--private-repo", action="store_true", help="make a new repository private")
    parser.add_argument("--prompt-file", type=Path, help="the private prompt, in the words of shapes")
    parser.add_argument("--epsilon", type=float, choices=EPSILONS, default=16.0)
    parser.add_argument("--captions", type=int, default=600, help="public prompts (default 600)")
    parser.add_argument(
        "--allow-useless",
        action="store_true",
        help="go on where so short a calibration is no better than none",
    )
    parser.add_argument("--steps", type=int, default=150, help="training steps of the decoder (default 150)")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    args = parser.parse_args()
    if args.endpoint and not args.repo:
        parser.error("--endpoint says where to push, --repo what: give both")
    return args


def second_machine(source: str, out: Path, *, subfolder: str, revision: str | None, token: Any = None) -> Any:
    """Loads the release for a pipeline of its own and draws. Knows nothing else of the first machine."""
    from shapes.evaluate import load_pipeline

    import hf_dp_xattn as dpx

    pipe = load_pipeline()
    release = dpx.Release.from_pretrained(
        source, host=pipe, subfolder=subfolder, revision=revision, token=token
    )
    print(f"  loaded {release}; {release.guarantees[0].sentence()}")
    return draw(pipe, release)


def draw(pipe: Any, release: Any) -> Any:
    """One picture of the release."""
    import torch
    from shapes.evaluate import GUIDANCE, STEPS
    from shapes.scenes import IMAGE_SIZE

    settings = {"num_inference_steps": STEPS, "guidance_scale": GUIDANCE}
    noise = torch.Generator().manual_seed(0)
    return pipe(**release.inputs(), height=IMAGE_SIZE, width=IMAGE_SIZE, generator=noise, **settings).images[
        0
    ]


def main() -> None:
    args = arguments()
    if args.endpoint:
        os.environ["HF_ENDPOINT"] = args.endpoint  # read when huggingface_hub is imported, which is below
    from shapes.evaluate import load_pipeline
    from shapes.private import DELTA, PUBLIC_SEED, config, prompts
    from shapes.scenes import train_examples

    import hf_dp_xattn as dpx
    from hf_dp_xattn.records import decode_text

    warnings.filterwarnings("ignore", category=UserWarning)
    args.out.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()

    def say(message: str) -> None:
        print(f"[{time.perf_counter() - start:3.0f} s] {message}", flush=True)

    say(f"1. Calibrating on {args.captions} public prompts ...")
    pipe = load_pipeline()
    settings = config(args.epsilon, unit=UNIT)
    calibration = dpx.calibrate(
        pipe,
        prompts(train_examples(args.captions, PUBLIC_SEED), UNIT, PUBLIC_SEED),
        settings,
        epsilons=EPSILONS,
        releases=("response",),  # a few phrases drown in the noise of a sum
        steps=args.steps,
        query_prompts=4,
        query_steps=4,
        progress=not args.quiet,
    )
    calibration.save_pretrained(args.out / CALIBRATION, license="apache-2.0")

    say("2. What to expect; nothing is spent to know this:\n")
    print(dpx.plan(calibration, epsilons=EPSILONS, delta=DELTA, measure=False))

    say(f"3. Releasing one private prompt at epsilon = {args.epsilon:g} for one phrase ...")
    prompt = PROMPT if args.prompt_file is None else decode_text(args.prompt_file.read_bytes()).strip()
    ledger = dpx.Ledger(args.out / "ledger.json")  # stays here: a restart must not forget what was spent
    with dpx.protect(
        pipe, settings, calibration=calibration, ledger=ledger, allow_useless=args.allow_useless
    ) as protected:
        try:
            release = protected.release(prompt)
        except dpx.BudgetExceededError as error:  # an earlier run into --out released it
            sys.exit(
                f"{error}\nIts release is in {args.out / RELEASE}. To play on as if it had not been made, take another --out."
            )
        release.save_pretrained(args.out / RELEASE, license="apache-2.0")
        first = draw(pipe, release)
        report = protected.report()
        print(f"{report}\n")
        if args.repo:
            say(f"4. Pushing calibration and release to {args.repo} ...")
            share: dict[str, Any] = {"private": True if args.private_repo else None, "license": "apache-2.0"}
            calibration.push_to_hub(args.repo, subfolder=CALIBRATION, **share)
            commit = release.push_to_hub(args.repo, subfolder=RELEASE, **share).rsplit("/", 1)[-1]
            print(f"  commit {commit}")
        else:
            say("4. No --repo: nothing was pushed. What would be is in the folder.")
            commit = None

    say("5. A second machine loads the release and draws:")
    source = args.repo or str(args.out)
    second = second_machine(source, args.out, subfolder=RELEASE, revision=commit)
    same = first.tobytes() == second.tobytes()
    print(f"  the same picture from the same noise: {'yes' if same else 'NO'}")
    second.resize((256, 256), resample=0).save(args.out / "second_machine.png")
    (args.out / "report.txt").write_text(f"{report}\n")
    # phrases are charged by two names, their own and the text's
    releases = max(charge.number_of_releases for charge in ledger.entries())
    found = {"pushed": commit, "repo": args.repo, "same_picture": same, "releases": releases}
    (args.out / "summary.json").write_text(json.dumps(found, indent=2) + "\n")
    say(f"Done; files in {args.out.resolve()}")


if __name__ == "__main__":
    main()
