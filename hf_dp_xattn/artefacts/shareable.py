"""What can be pushed to the Hub, with its card beside it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, ClassVar, Unpack

from .card import README, CardOptions, card_bytes, card_options
from .transfer import PushOptions, check_options, push_files

if TYPE_CHECKING:
    from huggingface_hub import ModelCard


class Shareable(ABC):
    """An artefact with files and a card. WORD: what it is called ("config")."""

    WORD: ClassVar[str]

    @abstractmethod
    def files(self) -> dict[str, bytes]:
        """Its files without the card, by name, in the order in which they are written."""

    @abstractmethod
    def card(self, options: CardOptions) -> ModelCard:
        """Its card, with what only the publisher knows."""

    def push_to_hub(self, repo_id: str, **options: Unpack[PushOptions]) -> str:
        """Uploads its files and a card to a Hub repository.

        A README.md that somebody else wrote stays as it is.

        Args:
            repo_id: "owner/name"; made if needed.
            options: private, token, revision, create_pr, subfolder, commit_message, license, base_model (`artefacts.PushOptions`).

        Returns:
            The commit's address.

        Raises:
            HubError: the upload failed, and the repository is as it was.
            ConfigError: unknown options, or a license or base_model that the Hub would refuse.
        """
        check_options(options, PushOptions, "push_to_hub")
        license_, base_model = options.get("license"), options.get("base_model")
        card = card_options({"license": license_, "base_model": base_model, "repo_id": repo_id})
        files = {**self.files(), README: card_bytes(self.card(card))}
        return push_files(files, repo_id, f"Upload a DP attention {self.WORD}", options)
