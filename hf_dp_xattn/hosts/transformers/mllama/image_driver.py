"""Models whose text reads an image, used with random images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ....errors import ConfigError
from ... import canaries
from ...driver import Canary, Driver, Outputs
from ..model_driver import IDS, ModelDriver

IMAGE = (
    "The private context of this model is an image, which the command line does not read: in Python, protected.release(**processor."
    "image_processor(image, return_tensors='pt'))."
)


class ImageDriver(ModelDriver):
    """A model whose text reads an image by cross-attention (Mllama); contexts are random images."""

    kind = "image-text"
    tokenizes = False

    def check(self) -> None:
        raise ConfigError(IMAGE)

    def public_contexts(self, texts: list[Any], questions: list[str] | None) -> tuple[Any, dict[str, Any]]:
        raise ConfigError(
            "This model reads images, which the command line does not: dpx.calibrate in Python."
        )

    @property
    def serving(self) -> torch.nn.Module:
        model: torch.nn.Module = self.host.model.language_model
        return model

    def _parts(self, count: int) -> list[Any]:
        vision = self.host.config.vision_config
        tiles, size = int(vision.max_num_tiles), int(vision.image_size)
        mask = torch.zeros(1, 1, tiles, dtype=torch.int64)
        mask[..., 0] = 1
        images = []
        for i in range(count):
            generator = torch.Generator().manual_seed(i)
            pixels = (
                torch.randn(1, 1, tiles, 3, size, size, generator=generator) * mask[..., None, None, None]
            )
            ratio = torch.ones(1, 1, dtype=torch.int64)
            image = {"pixel_values": pixels, "aspect_ratio_ids": ratio, "aspect_ratio_mask": mask}
            images.append({name: tensor.to(self.host.device) for name, tensor in image.items()})
        return images

    def canaries(self, count: int) -> list[Canary]:
        if self.by_groups:
            raise ConfigError(
                "An image's rows have no groups that an audit could choose; audit unit 'row' or 'context'."
            )
        return super().canaries(count)

    def _of_texts(self, texts: Sequence[str]) -> list[Any]:
        return Driver._of_texts(self, texts)

    def text(self) -> dict[str, Any]:
        ids = canaries.random_ids(self.host, 1, IDS, seed=1)[0]
        ids[0] = self.host.config.image_token_index
        whole = ids.unsqueeze(0).to(self.host.device)
        return {"input_ids": whole, "attention_mask": torch.ones_like(whole)}

    def release(self, canary: Canary, **options: Any) -> Any:
        return self.handle.release(**canary[-1], **options)

    def inputs(self, release: Any) -> dict[str, Any]:
        return dict(release.inputs(**self.text()))

    def call_inputs(self, canary: Canary) -> dict[str, Any]:
        return {**canary[-1], **self.text()}

    def direct(self, canary: Canary) -> Outputs | None:
        return self.answer(self.call_inputs(canary))

    def refused(self) -> None:
        self.host(**self.canaries(1)[0][-1], **self.text())
