"""The vision side of a protected model: inputs checked before anything is spent, then encoded one image at a time."""

from __future__ import annotations

from typing import Any

import torch

from ....errors import ConfigError, ContextError
from ...context import Trial
from ...private_run import private_run
from ..encoder_decoder.document_encoder import EncoderSide
from .image_contexts import ONE_IMAGE, PIXELS, RATIO_IDS, RATIO_MASK
from .mllama_probing import vision_parts


class VisionSide(EncoderSide):
    """Runs the model's vision model, which is closed to all others, and the projection of its output."""

    kind = "vision model"

    @property
    def module(self) -> Any:
        return vision_parts(self._model)[0]

    @property
    def patches(self) -> int:
        """Rows of a tile, its class row included."""
        return int(self.module.num_patches)

    def check(self, inputs: dict[str, torch.Tensor]) -> None:
        """Checks an image's inputs: pixel_values [B, 1, tiles, channels, height, width], aspect_ratio_ids [B, 1], aspect_ratio_mask
        [B, 1, tiles].

        Raises:
            ConfigError: several images for one text; ContextError: a wrong shape or value. Nothing was spent.
        """
        if PIXELS not in inputs:
            return
        pixels, ids, mask = inputs[PIXELS], inputs[RATIO_IDS], inputs[RATIO_MASK]
        config = self.module.config
        want = (config.max_num_tiles, config.num_channels, config.image_size, config.image_size)
        if (
            pixels.ndim != 6
            or pixels.shape[2:] != want
            or 0 in pixels.shape
            or not pixels.is_floating_point()
        ):
            raise ContextError(
                f"`{PIXELS}` must be floating-point [B, 1, {', '.join(map(str, want))}], got {pixels.dtype} {list(pixels.shape)}."
            )
        if pixels.shape[1] != 1:
            raise ConfigError(ONE_IMAGE)
        batch, tiles = len(pixels), config.max_num_tiles
        if ids.shape != (batch, 1) or mask.shape != (batch, 1, tiles):
            raise ContextError(
                f"`{RATIO_IDS}` must be [{batch}, 1] and `{RATIO_MASK}` [{batch}, 1, {tiles}], got {list(ids.shape)} and "
                f"{list(mask.shape)}."
            )
        if not bool(torch.isfinite(pixels).all()):
            raise ContextError(f"`{PIXELS}` holds NaN or Inf; nothing was spent.")
        if bool(((ids < 1) | (ids > config.max_aspect_ratio_id)).any()):
            raise ContextError(
                f"`{RATIO_IDS}` must lie in 1..{config.max_aspect_ratio_id} (0 means no image)."
            )
        if not bool(((mask == 0) | (mask == 1)).all()) or not bool(mask.any(-1).all()):
            raise ContextError(f"`{RATIO_MASK}` must hold 0 and 1, and show one tile at least.")

    def encode(self, inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows [tiles * patches, C] of one image, and which of them are of tiles that are no padding."""
        rows = self.encode_batch(inputs)[0]
        mask = inputs[RATIO_MASK].flatten().to(rows.device, torch.bool)
        return rows, mask.repeat_interleave(self.patches)

    def _run(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        vision, projector = vision_parts(self._model)
        device = next(vision.parameters()).device
        with private_run(vision, projector):
            states = vision(**{name: value.to(device) for name, value in inputs.items()})[0]
            rows: torch.Tensor = projector(states.to(next(projector.parameters()).device))
        return rows.reshape(len(rows), -1, rows.shape[-1])

    def trial(self, inputs: dict[str, torch.Tensor]) -> Trial:
        """The encoding of a black image with the same tiles, which are public."""
        beside = tuple(tuple(inputs[n].flatten().tolist()) for n in (RATIO_IDS, RATIO_MASK))
        zeros = {**inputs, PIXELS: torch.zeros_like(inputs[PIXELS])}
        return Trial(
            (tuple(inputs[PIXELS].shape), inputs[PIXELS].dtype, *beside), lambda: self._run(zeros)[0]
        )
