"""Train the shapes pipeline and its reader from scratch: `python examples/shapes/train.py --out DIR`.

Stages, each resumable and skipped when done: vae, text, cache, decoder, reader, unet, export.

* vae: pixels to 8 x 8 latents.
* text: the CLIP text encoder learns to tell every attribute from its end-of-text rows, through a
  linear head that is then thrown away. It stays frozen afterwards.
* cache: latents and text rows of the training scenes, so that a UNet step costs only the UNet.
* decoder: the VAE's decoder learns on with its encoder fixed, from slightly noisy latents.
* reader: the attribute classifier of :mod:`shapes.reader`.
* unet: v-prediction diffusion on the latents, 10 % of the captions emptied for guidance.
* export: `DIR/pipeline` (fp16 safetensors) and `DIR/reader.safetensors`.

On several cores the slow stage is faster with one single-threaded process per core, once the stages
before it are done: `torchrun --nproc_per_node 2 examples/shapes/train.py --out DIR --threads 1`.

Only training scenes are ever seen (see ``heldout_triples``).
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from shapes.evaluate import evaluate_pipeline
from shapes.fitting import fit
from shapes.parts import (
    CONTEXT,
    TEXT_WIDTH,
    build_pipeline,
    build_scheduler,
    build_text_encoder,
    build_tokenizer,
    build_unet,
    build_vae,
    tokenize,
)
from shapes.reader import HEAD_SIZES, Reader, to_pixels
from shapes.scenes import Example, render, scene_targets, train_examples

STAGES = ("vae", "text", "cache", "decoder", "reader", "unet", "export")
CHANNELS_LAST = {"memory_format": torch.channels_last}


def targets_loss(groups: list[Tensor], targets: Tensor) -> Tensor:
    """Summed cross-entropy of all attribute heads; -100 (colour of an empty place) is ignored."""
    losses = [
        F.cross_entropy(g, t, ignore_index=-100, reduction="sum")
        for g, t in zip(groups, targets.unbind(1), strict=True)
    ]
    return torch.stack(losses).sum() / len(targets)


def picture_loss(recon: Tensor, x: Tensor) -> Tensor:
    """Pixel error in which the objects of a picture count nearly as much as its background.

    Objects get a weight in inverse proportion to their area, or else the few pixels that tell a
    small star from a small circle drown. The corner pixel is always background.
    """
    inside = ((x - x[:, :, :1, :1]).abs().amax(1, keepdim=True) > 0.1).float()
    weight = 1 + 0.6 * inside / inside.mean((1, 2, 3), keepdim=True)
    error = recon - x
    return (weight * (error.abs() + 2 * error**2)).mean()


@torch.no_grad()
def standardise_latents(vae: AutoencoderKL, latents: Tensor) -> None:
    """Give every latent channel mean 0 and standard deviation 1, so that noise hits all alike.

    The affine map and its inverse go into the 1 x 1 convolutions on either side of the latents, so
    pictures stay what they were and the scaling factor becomes 1.
    """
    n = vae.config.latent_channels
    mean, std = latents.mean((0, 2, 3)), latents.std((0, 2, 3))
    quant, post = vae.quant_conv, vae.post_quant_conv
    post.bias += post.weight[:, :, 0, 0] @ mean
    post.weight *= std.view(1, n, 1, 1)
    quant.weight[:n] /= std.view(n, 1, 1, 1)
    quant.bias[:n] = (quant.bias[:n] - mean) / std
    quant.bias[n:] -= 2 * std.log()
    vae.register_to_config(scaling_factor=1.0)


class TextWithHeads(nn.Module):
    """The text encoder and the linear head of its pre-training."""

    def __init__(self, vocab_size: int) -> None:
        super().__init__()
        self.encoder = build_text_encoder(vocab_size)
        self.heads = nn.Linear(TEXT_WIDTH, sum(HEAD_SIZES))


class Trainer:
    """All stages; the first use of a part trains it or loads its checkpoint."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.out: Path = args.out
        self.out.mkdir(parents=True, exist_ok=True)
        torch.manual_seed(args.seed)
        self.tokenizer = build_tokenizer()
        self.vae = build_vae().to(**CHANNELS_LAST)
        self.text = TextWithHeads(len(self.tokenizer))
        self.reader = Reader()
        self.unet = build_unet().to(**CHANNELS_LAST)

    def batch(self, n: int, count: int, generator: torch.Generator) -> np.ndarray:
        return torch.randint(n, (count,), generator=generator).numpy()

    def pictures(self, n: int, seed: int) -> tuple[np.ndarray, Tensor]:
        """Rendered training scenes and their targets."""
        scenes = [e.scene for e in train_examples(n, seed)]
        return render(scenes, seed), torch.from_numpy(scene_targets(scenes))

    def train_vae(self) -> None:
        vae, steps = self.vae, self.args.vae_steps
        images: list[np.ndarray] = []

        def loss_fn(_: int, generator: torch.Generator) -> Tensor:
            if not images:
                images.append(self.pictures(40_000, self.args.seed + 1)[0])
            x = to_pixels(images[0][self.batch(40_000, 16, generator)])
            x = x.contiguous(**CHANNELS_LAST)
            posterior = vae.encode(x).latent_dist
            recon = vae.decode(posterior.sample(generator=generator)).sample
            kl = 0.5 * (posterior.mean**2 + posterior.var - 1 - posterior.logvar).mean()
            return picture_loss(recon, x) + 1e-4 * kl

        average = fit("vae", vae, loss_fn, out=self.out, steps=steps, lr=2e-3, seed=self.args.seed)
        self.vae = average
        probe = to_pixels(self.pictures(2000, self.args.seed + 2)[0])
        with torch.no_grad():
            latents = torch.cat([average.encode(p).latent_dist.mode() for p in probe.split(250)])
        standardise_latents(average, latents)

    def train_decoder(self) -> None:
        """The encoder is fixed from here on; the decoder learns more, from slightly noisy latents."""
        self.train_vae()
        decoder = nn.ModuleDict({"post_quant_conv": self.vae.post_quant_conv, "decoder": self.vae.decoder})
        decoder.requires_grad_(True)
        data: list[np.ndarray] = []

        def loss_fn(_: int, generator: torch.Generator) -> Tensor:
            if not data:
                data.extend([self.scene_pictures(), self.cached_latents()])
            pick = self.batch(len(data[0]), 16, generator)
            z = torch.from_numpy(data[1][pick]).float() / self.vae.config.scaling_factor
            level = 0.15 * torch.rand(len(z), 1, 1, 1, generator=generator)
            z = z + level * torch.randn(z.shape, generator=generator)
            recon = decoder["decoder"](decoder["post_quant_conv"](z.contiguous(**CHANNELS_LAST)))
            return picture_loss(recon, to_pixels(data[0][pick]).contiguous(**CHANNELS_LAST))

        average = fit(
            "decoder",
            decoder,
            loss_fn,
            out=self.out,
            steps=self.args.decoder_steps,
            lr=1e-3,
            seed=self.args.seed,
        )
        self.vae.post_quant_conv.load_state_dict(average["post_quant_conv"].state_dict())
        self.vae.decoder.load_state_dict(average["decoder"].state_dict())

    def train_text(self) -> None:
        text, steps, n = self.text, self.args.text_steps, 200_000
        data: list[Tensor] = []

        def loss_fn(step: int, generator: torch.Generator) -> Tensor:
            if not data:
                examples = train_examples(n, self.args.seed + 3)
                data.append(tokenize(self.tokenizer, [e.caption for e in examples]))
                data.append(torch.from_numpy(scene_targets([e.scene for e in examples])))
            pick = torch.randint(n, (128,), generator=generator)
            # The longest caption has 31 tokens; the last quarter of the steps sees all 77 rows.
            length = 32 if step < 0.75 * steps else CONTEXT
            ids = data[0][pick, :length]
            rows = text.encoder(ids).last_hidden_state
            end = (ids[:, 1:] == 1).float().argmax(1) + 1
            late = (end + torch.rand(len(end), generator=generator) * (length - end)).long()
            everyone = torch.arange(len(end))
            heard = torch.cat([rows[everyone, end], rows[everyone, late]])
            return targets_loss(list(text.heads(heard).split(HEAD_SIZES, dim=1)), data[1][pick].repeat(2, 1))

        self.text = fit("text", text, loss_fn, out=self.out, steps=steps, lr=1e-3, seed=self.args.seed)

    def train_reader(self) -> None:
        self.train_decoder()
        vae, data = self.vae, []

        def loss_fn(_: int, generator: torch.Generator) -> Tensor:
            if not data:
                targets = scene_targets([e.scene for e in self.examples()])
                data.extend([self.scene_pictures(), self.cached_latents(), torch.from_numpy(targets)])
            pick = self.batch(len(data[0]), 96, generator)
            x = to_pixels(data[0][pick])
            # A third are VAE reconstructions of noisy latents, as a sampler would leave them.
            z = torch.from_numpy(data[1][pick[:32]]).float() / vae.config.scaling_factor
            z = z + 0.25 * torch.rand(32, 1, 1, 1, generator=generator) * torch.randn(
                z.shape, generator=generator
            )
            with torch.no_grad():
                recon = vae.decode(z).sample.clamp(-1, 1)
            blurred = F.interpolate(
                F.avg_pool2d(x[32:64], 2), scale_factor=2, mode="bilinear", align_corners=False
            )
            mix = torch.rand(32, 1, 1, 1, generator=generator)
            x = torch.cat([recon, x[32:64].lerp(blurred, mix), x[64:]])
            noise = 0.15 * torch.rand(96, 1, 1, 1, generator=generator)
            x = (x + noise * torch.randn(x.shape, generator=generator)).clamp(-1, 1)
            return targets_loss(self.reader(x), data[2][pick])

        self.reader = fit(
            "reader",
            self.reader,
            loss_fn,
            out=self.out,
            steps=self.args.reader_steps,
            lr=1.5e-3,
            seed=self.args.seed,
        )

    def cache(self) -> None:
        self.cached_rows()
        self.cached_latents()

    @torch.no_grad()
    def cached_rows(self) -> tuple[np.ndarray, np.ndarray]:
        """fp16 text rows [n, 77, width] of the training captions (on disk) and of the empty prompt."""
        path, path_empty = self.out / "cache_rows.npy", self.out / "cache_empty.npy"
        if not path_empty.exists():
            self.train_text()
            captions = [e.caption for e in self.examples()]
            shape = (len(captions), CONTEXT, TEXT_WIDTH)
            rows = np.lib.format.open_memmap(path, mode="w+", dtype=np.float16, shape=shape)
            for i in tqdm(range(0, len(captions), 50), desc="text rows", mininterval=5.0):
                rows[i : i + 50] = self.encode(captions[i : i + 50])
            rows.flush()
            np.save(path_empty, self.encode([""]))
        return np.load(path, mmap_mode="r"), np.load(path_empty)

    @torch.no_grad()
    def cached_latents(self) -> np.ndarray:
        """fp16 latents [n, 8, 8, 8] of the training scenes, as the diffusion model sees them."""
        path = self.out / "cache_latents.npy"
        if not path.exists():
            self.train_vae()
            latents = []
            for images in tqdm(np.array_split(self.scene_pictures(), 1000), desc="latents", mininterval=5.0):
                mean = self.vae.encode(to_pixels(images)).latent_dist.mode()
                latents.append((mean * self.vae.config.scaling_factor).numpy().astype(np.float16))
            np.save(path, np.concatenate(latents))
        return np.load(path)

    def scene_pictures(self) -> np.ndarray:
        """The pictures of the UNet's training scenes, the same at every call."""
        scenes, seed = [e.scene for e in self.examples()], self.args.seed + 5
        return np.concatenate([render(scenes[i : i + 1000], seed + i) for i in range(0, len(scenes), 1000)])

    def examples(self) -> list[Example]:
        return train_examples(self.args.scenes, self.args.seed + 5)

    def encode(self, captions: list[str]) -> np.ndarray:
        return self.text.encoder(tokenize(self.tokenizer, captions)).last_hidden_state.numpy()

    def train_unet(self) -> None:
        scheduler = build_scheduler()
        batch = self.args.batch
        data: list[np.ndarray] = []

        def loss_fn(_: int, generator: torch.Generator) -> Tensor:
            if not data:
                data.extend([self.cached_latents(), *self.cached_rows()])
            latents, rows, empty = data
            pick = np.sort(self.batch(len(latents), batch, generator))
            z = torch.from_numpy(latents[pick]).float().contiguous(**CHANNELS_LAST)
            context = torch.from_numpy(rows[pick]).float()
            dropped = torch.rand(batch, generator=generator) < 0.1
            context[dropped] = torch.from_numpy(empty).float()
            t = torch.randint(scheduler.config.num_train_timesteps, (batch,), generator=generator)
            noise = torch.randn(z.shape, generator=generator)
            noisy = scheduler.add_noise(z, noise, t)
            wanted = scheduler.get_velocity(z, noise, t)
            return F.mse_loss(self.unet(noisy, t, context).sample, wanted)

        def on_checkpoint(step: int, average: nn.Module) -> None:
            self.train_reader()
            self.export(average)
            result = evaluate_pipeline(self.out / "pipeline", n=60, reader=self.reader.eval())
            tqdm.write(f"step {step}: {result.accuracy:.3f} of held-out attributes right, {result.by_kind}")

        self.unet = fit(
            "unet",
            self.unet,
            loss_fn,
            out=self.out,
            steps=self.args.unet_steps,
            lr=self.args.lr,
            seed=self.args.seed,
            decay=0.999,
            warmup=300,
            every=500,
            on_checkpoint=on_checkpoint,
        )

    def export(self, unet: nn.Module | None = None) -> None:
        """Write the pipeline and the reader in half precision; the folder is swapped in whole."""
        models = {"vae": self.vae, "text_encoder": self.text.encoder, "unet": unet or self.unet}
        fresh = {
            "vae": build_vae(),
            "text_encoder": build_text_encoder(len(self.tokenizer)),
            "unet": build_unet(),
        }
        for key, model in models.items():
            fresh[key].load_state_dict(model.state_dict())
        fresh["vae"].register_to_config(scaling_factor=self.vae.config.scaling_factor)
        pipeline = build_pipeline(tokenizer=self.tokenizer, **{k: m.half() for k, m in fresh.items()})
        part, final = self.out / "pipeline.part", self.out / "pipeline"
        shutil.rmtree(part, ignore_errors=True)
        pipeline.save_pretrained(part)
        shutil.rmtree(final, ignore_errors=True)
        os.replace(part, final)
        reader = {k: v.half().contiguous() for k, v in self.reader.state_dict().items()}
        save_file(reader, self.out / "reader.safetensors")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--stage", choices=STAGES, default="export", help="stop after this stage")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--vae-steps", type=int, default=4000)
    parser.add_argument("--decoder-steps", type=int, default=3000)
    parser.add_argument("--text-steps", type=int, default=1500)
    parser.add_argument("--reader-steps", type=int, default=1500)
    parser.add_argument("--unet-steps", type=int, default=3000)
    parser.add_argument("--scenes", type=int, default=80_000, help="training scenes of the UNet")
    parser.add_argument("--batch", type=int, default=48, help="UNet batch of each process")
    parser.add_argument("--lr", type=float, default=1e-3)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if "WORLD_SIZE" in os.environ:
        torch.distributed.init_process_group("gloo")
    trainer = Trainer(args)
    stages: dict[str, Callable[[], object]] = {
        "vae": trainer.train_vae,
        "text": trainer.train_text,
        "cache": trainer.cache,
        "decoder": trainer.train_decoder,
        "reader": trainer.train_reader,
        "unet": trainer.train_unet,
        "export": trainer.export,
    }
    for stage in STAGES[: STAGES.index(args.stage) + 1]:
        if stage == "export" and os.environ.get("RANK", "0") != "0":
            continue  # one process writes the folder
        stages[stage]()


if __name__ == "__main__":
    main()
