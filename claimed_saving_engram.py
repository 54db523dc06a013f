"""Saves that wait for other writers to their folder, such as a conversion.

The code beside a saved model lacks this: saves wait for each other there, too, but not for a conversion.
"""

from collections.abc import Callable

from .claiming_engram import FolderClaim
from .saving_engram import FolderWriter

# A save waits this number of seconds for other saves that are being put in place in the same folder.
SAVE_WAITS = 60.0


class ClaimedFolderWriter(FolderWriter):
    """A [`~saving_engram.FolderWriter`] that claims its target while it puts files in place.

    Raises:
        FolderInUseError: another process holds the claim for too long; nothing was changed.
    """

    def _begin(self) -> None:
        FolderClaim(self.target).make_folder()  # It says what to do if that is not possible.
        super()._begin()

    def publish(
        self,
        is_stale: Callable[[str], bool] = lambda name: False,
        last: str | None = None,
        is_claimed: bool = False,
    ) -> None:
        """Put all files in place, see [`~saving_engram.FolderWriter`].

        Args:
            is_claimed: whether the caller holds the claim of the target. Otherwise other saves to it are waited for.
        """
        claim = FolderClaim(self.target)
        try:
            if not is_claimed and self.names is None:
                claim.take(SAVE_WAITS)
            super().publish(is_stale, last)
        finally:
            claim.release()
