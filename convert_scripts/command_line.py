"""What the commands share: where a source comes from, and how an error ends."""

import sys
from collections.abc import Callable
from pathlib import Path

from .safetensors_files import ConversionError


def run_command(command: Callable[[], None]) -> int:
    """Run `command`; an error of the input is one line on the error stream and exit code 1."""
    try:
        command()
    except ConversionError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        print(
            f"error: {error.filename} cannot be read or written ({error.strerror}); check its rights.", file=sys.stderr
        )
        return 1
    except KeyboardInterrupt:
        print("interrupted; the same command goes on where it stopped.", file=sys.stderr)
        return 130
    return 0


def local_folder(source: str, revision: str | None = None) -> Path:
    """The folder `source` names, or the local snapshot of the Hub repository it names."""
    folder = Path(source)
    if folder.is_dir():
        return folder
    if folder.exists() or source.count("/") != 1 or source.startswith((".", "/", "~")):
        raise ConversionError(f"{source} is neither a folder nor a Hub id like 'deepseek-ai/DeepSeek-V4.1-Flash'.")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(source, revision=revision))
    except (OSError, ValueError) as error:
        raise ConversionError(
            f"{source} is no folder here, and the Hub did not give a repository of that name ({error}); check the name, "
            f"the connection and your token."
        ) from error
