"""Rows of four and two bits: bytes on disk, gathering them, and making them.

    python benchmarks/packed_rows.py [FOLDER] [--gigabytes 1] [--repeats 5]

Bytes of every table against what its bits promise; gathering and decoding warm rows against float8 ones; and quantizing a
bfloat16 table against `cp` of its file, both until the bytes are on the disk. FOLDER is on the disk to measure.
"""

import argparse
import math
import os
import shutil
import subprocess
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch
from tables_folder import LAYER, WIDTH, make_hasher
from tables_gather import best

from engram_hf.row_sources_engram import MappedRows
from engram_hf.safetensors_engram import read_header
from engram_hf.saving_engram import manifest_entry, table_file_name, write_manifest
from engram_hf.table_engram import QUANTIZED_FORMATS, read_rows
from engram_hf.table_format_engram import describe_table, file_description, read_tables
from engram_hf.table_writer_engram import TableWriter, quantize_table


def write_floats(folder: Path, gigabytes: float) -> None:
    """A table of normal noise in bfloat16."""
    hasher = make_hasher(int(gigabytes * 1e9 / (2 * WIDTH)))
    description, name = describe_table(hasher, 0, width=WIDTH, dtype="BF16"), table_file_name(LAYER)
    with TableWriter(folder / name, description) as writer:
        noise = (torch.randn(1 << 16, WIDTH) * 0.02).bfloat16()
        for first in range(0, description.num_rows, len(noise)):
            writer.write(first, noise.roll(first // len(noise), 1)[: description.num_rows - first])
    write_manifest(folder, {LAYER: manifest_entry([(name, description.rows, description.tensors)])})


def sync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?")
    parser.add_argument("--gigabytes", type=float, default=1.0)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as home:
        floats = Path(home, "floats")
        floats.mkdir()
        write_floats(floats, options.gigabytes)
        table = read_tables(floats)[LAYER]
        description = replace(table.description, tensors=table.parts[0].names)
        processor: dict[str, float] = {}
        file, copied = table.parts[0].file.path, Path(home, "copy")
        sync(file)

        def copy(durable: bool = True) -> None:
            copied.unlink(missing_ok=True)
            subprocess.run(["cp", "--reflink=never", str(file), str(copied)], check=True)
            if durable:
                sync(copied)

        def quantize(dtype: str) -> None:
            folder = Path(home, dtype)
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            before = time.process_time()
            quantize_table(MappedRows(table), folder / file.name, description, dtype)
            processor[dtype] = min(processor.get(dtype, math.inf), time.process_time() - before)
            sync(folder / file.name)

        actions = {"cp": copy, "cp, no fsync": lambda: copy(False)} | {
            dtype: lambda dtype=dtype: quantize(dtype) for dtype in QUANTIZED_FORMATS
        }
        seconds = best(actions, max(2, options.repeats // 2))
        print(
            f"making rows of {WIDTH} channels from {table.size / 1e9:.2f} GB of bfloat16, {torch.get_num_threads()} threads"
        )
        for name, took in seconds.items():
            own = f"   {table.size / processor[name] / 1e9:6.3f} GB a processor second" if name in processor else ""
            print(
                f"  {name:14} {table.size / took / 1e9:6.3f} GB/s of bfloat16   {seconds['cp'] / took:5.2f}x cp's{own}"
            )

        sources = {}
        print("bytes of a table file, against bits of its values and scales")
        for dtype, row_format in QUANTIZED_FORMATS.items():
            folder = Path(home, dtype)
            described = file_description(read_header(folder / file.name))
            write_manifest(folder, {LAYER: manifest_entry([(file.name, described.rows, described.tensors)])})
            sources[dtype] = MappedRows(read_tables(folder)[LAYER])
            channel = 8 * row_format.dtype.itemsize / row_format.packed
            promised = channel + 8 * row_format.scale_dtype.itemsize * row_format.scales(WIDTH) / WIDTH
            size = (folder / file.name).stat().st_size
            expected = table.num_rows * WIDTH * promised / 8
            print(f"  {dtype:14} {promised:6.3f} bits a channel  {size / 1e6:9.1f} MB  {size / expected - 1:+.3%}")

        ids = torch.randint(0, table.num_rows, (4096, 24))
        for dtype in (torch.bfloat16, torch.float32):
            reads = {
                name: (lambda source=source, dtype=dtype: read_rows(source, ids, dtype))
                for name, source in sources.items()
            }
            times = best(reads, 5 * options.repeats)
            print(f"gathering 4096 x 24 rows of {WIDTH} channels, warm, into {dtype}")
            for name, took in times.items():
                print(f"  {name:14} {took * 1e3:7.1f} ms  {took / times['float8_e4m3fn']:5.2f}x float8's")


if __name__ == "__main__":
    main()
