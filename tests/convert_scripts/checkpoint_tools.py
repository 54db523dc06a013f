"""Helpers of the conversion tests: they damage checkpoints, write malformed ones, and compare folders."""

import json
import struct
from pathlib import Path


class EditableCheckpoint:
    """A private copy of the miniature checkpoint that a test may damage."""

    def __init__(self, folder: Path):
        self.folder = folder

    @property
    def shards(self) -> list[Path]:
        return sorted(self.folder.glob("model-*.safetensors"))

    def edit_json(self, name: str, change) -> None:
        path = self.folder / name
        value = json.loads(path.read_text(encoding="utf-8"))
        change(value)
        path.write_text(json.dumps(value), encoding="utf-8")

    def edit_index(self, change) -> None:
        self.edit_json("model.safetensors.index.json", lambda index: change(index["weight_map"]))

    def edit_text_config(self, change) -> None:
        self.edit_json("config.json", lambda config: change(config["text_config"]))

    def shard_of(self, name: str) -> Path:
        index = json.loads((self.folder / "model.safetensors.index.json").read_text(encoding="utf-8"))
        return self.folder / index["weight_map"][name]

    def rewrite(self, path: Path, change) -> None:
        """Apply `change` to a shard's `{name: [dtype, shape, bytes]}` and write a well-formed shard again."""
        raw = path.read_bytes()
        start = 8 + struct.unpack("<Q", raw[:8])[0]
        header = json.loads(raw[8:start])
        header.pop("__metadata__")
        tensors = {
            name: [
                entry["dtype"],
                entry["shape"],
                raw[start + entry["data_offsets"][0] : start + entry["data_offsets"][1]],
            ]
            for name, entry in header.items()
        }
        change(tensors)
        write_safetensors(path, tensors)


def write_safetensors(path: Path, tensors: dict) -> None:
    """Write the format independently of the library, for files that no library would write."""
    header, data = {"__metadata__": {"format": "pt"}}, b""
    for name, (dtype, shape, content) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(data), len(data) + len(content)]}
        data += content
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def contents(folder: Path) -> dict[str, bytes]:
    """Return every file below a folder, by relative name."""
    paths = sorted(folder.rglob("*"))
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths if path.is_file()}
