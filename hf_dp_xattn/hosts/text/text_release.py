"""`TextRelease`: a release whose content is public text."""

from __future__ import annotations

from collections.abc import Sequence

from ...config import DPXAttnConfig
from ...errors import ReleaseError
from ..release import Release, Releasing
from ..terms import Terms
from .released_texts import ReleasedText, ReleasedTexts
from .text_release_file import TextReleaseFile


class TextRelease(Release):
    """One list of public texts for each context; whatever any host does with them is post-processing.

    `text` (of one context) and `texts` may be shown to anyone and given to any model, also to one that this package cannot patch.
    """

    def __init__(
        self,
        contexts: Sequence[ReleasedTexts],
        config: DPXAttnConfig,
        handle: Releasing,
        *,
        terms: Terms | None = None,
    ) -> None:
        super().__init__(contexts, config, handle, terms=terms)  # type: ignore[arg-type]
        self._texts = tuple(contexts)

    @property
    def texts(self) -> tuple[ReleasedText, ...]:
        """The released texts of each context."""
        return tuple(c.text for c in self._texts)

    @property
    def text(self) -> ReleasedText:
        """The released texts, one for each unit; `str(release.text)` is all of them as one text.

        Raises:
            ReleaseError: of several contexts; see `texts`.
        """
        if len(self._texts) != 1:
            raise ReleaseError(f"This is a release of {len(self._texts)} contexts: see release.texts.")
        return self._texts[0].text

    def _file(self) -> TextReleaseFile:
        return TextReleaseFile(self._texts, self.config, self.terms)
