"""Functions that the commands share: opening a source, and reporting an error."""

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from ..safetensors_engram import MAX_HEADER_BYTES, FileFormatError, FileHeader, parse_head
from .safetensors_files import ConversionError, read_listed_shard, require_torch

SHARDS = "*.safetensors"
# Most headers are shorter, so that one request is enough.
FIRST_BYTES = 100_000


def run_command(command: Callable[[], None]) -> int:
    """Run `command`; print an error of the input as one line on the error stream, and return 1 for it."""
    try:
        command()
    except (ConversionError, FileFormatError) as error:
        print(f"engram: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        print(
            f"engram: {error.filename or 'A file'} cannot be read or written ({error.strerror or error}); check its rights.",
            file=sys.stderr,
        )
        return 1
    except KeyboardInterrupt:
        print("engram: interrupted; the same command goes on where it stopped.", file=sys.stderr)
        return 130
    return 0


@dataclass
class Source:
    """A checkpoint that is only read: a folder, or a Hub repository, of which only the needed files and headers are
    downloaded.

    Args:
        folder: the folder, or the local snapshot of the repository.
        repository: its Hub id; None for a folder.
    """

    folder: Path
    repository: str | None = None
    _read: list[str] = field(default_factory=list)

    @classmethod
    def open(cls, source: str, revision: str | None = None) -> "Source":
        """Return the folder that `source` names, or the repository of this name with all files except the shards."""
        if Path(source).is_dir():
            return cls(Path(source))
        return cls(_download(source, revision, ignore_patterns=[SHARDS]), source)

    def read_shard(self, path: Path) -> FileHeader:
        """Return the checked header of a shard, as `read_listed_shard` does; a missing shard's is read over the
        network.
        """
        self._read.append(path.name)
        if self.repository is None or path.is_file():
            return read_listed_shard(path)
        head, size = _download_head(self.repository, self.folder.name, path.name)
        shard = parse_head(path, head)
        if shard.size != size:
            raise ConversionError(
                f"{path.name} of {self.repository} has {size} bytes, but its header describes {shard.size}; its upload is "
                "damaged: upload it again."
            )
        return require_torch(shard)

    def fetch_read_shards(self) -> None:
        """Download the shards whose headers were read."""
        if self.repository is not None:
            _download(self.repository, self.folder.name, allow_patterns=self._read)


def local_folder(source: str, revision: str | None = None, only: list[str] | None = None) -> Path:
    """Return the folder `source` names, or the local snapshot of the Hub repository it names.

    Args:
        only: patterns of the files to download; None for all.

    Raises:
        ConversionError: there is neither a folder nor a repository of this name.
    """
    if Path(source).is_dir():
        return Path(source)
    return _download(source, revision) if only is None else _download(source, revision, allow_patterns=only)


def _download(source: str, revision: str | None, **patterns: list[str]) -> Path:
    if Path(source).exists() or source.count("/") != 1 or source.startswith((".", "/", "~")):
        raise ConversionError(
            f"{source} is neither a folder nor a Hub id; give one, as in 'deepseek-ai/DeepSeek-V4.1-Flash'."
        )
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(source, revision=revision, **patterns))
    except (OSError, ValueError) as error:
        raise ConversionError(
            f"{source} is no folder here, and the Hub did not give a repository of that name ({reason_of(error)}); check "
            f"the name, the connection and your token."
        ) from error


def reason_of(error: Exception) -> str:
    """Return the first line of an error of the Hub's client, without its full stop, to quote it in a sentence."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")


def _download_head(repository: str, commit: str, file: str) -> tuple[bytes, int]:
    """Return length prefix and header of a shard on the Hub, and the size of the whole file."""
    from huggingface_hub.errors import HTTPError

    try:
        head, size = _download_range(repository, commit, file, 0, FIRST_BYTES)
        length = 8 + int.from_bytes(head[:8], "little")
        if length > MAX_HEADER_BYTES:
            raise ConversionError(f"{file} of {repository} announces a header of {length} bytes: upload it again.")
        if length > len(head):
            head += _download_range(repository, commit, file, len(head), length)[0]
        return head[:length], size
    except HTTPError as error:
        raise ConversionError(
            f"The Hub did not give the header of {file} of {repository} ({reason_of(error)}); check the connection and your "
            "token."
        ) from error


def _download_range(repository: str, commit: str, file: str, first: int, stop: int) -> tuple[bytes, int]:
    """Return bytes `first` to `stop - 1` of a file, or up to its end, and the size of the whole file."""
    from huggingface_hub import hf_hub_url
    from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

    headers = {**build_hf_headers(), "Range": f"bytes={first}-{stop - 1}"}
    # The answer is streamed, so that an answer with the whole file is not downloaded.
    with get_session().stream("GET", hf_hub_url(repository, file, revision=commit), headers=headers) as response:
        if response.is_error:
            response.read()
        hf_raise_for_status(response)
        if response.status_code != 206:
            raise ConversionError(f"The Hub gives no part of {file} of {repository}; download it and give the folder.")
        return response.read(), int(response.headers["Content-Range"].rpartition("/")[2])
