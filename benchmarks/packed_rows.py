"""Rows of four and two bits: their bytes on disk, and the time to gather and to quantize them.

    python benchmarks/packed_rows.py [FOLDER] [--gigabytes 1] [--repeats 5]

The script compares the bytes of every table with the bits of its format; the time of gathering and decoding warm rows
with that of float8 rows; and the time of quantizing a bfloat16 and a float8 table with `cp` of its file, each without
and with `fsync`, by torch and, if numba is installed, by compiled code. FOLDER is on the disk to measure.
"""

import argparse
import contextlib
import filecmp
import os
import shutil
import statistics
import subprocess
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch
from tables_folder import LAYER, WIDTH, make_hasher
from tables_gather import best

from engram_hf.row_sources_engram import MappedRows
from engram_hf.safetensors_engram import ITEM_BITS, read_header
from engram_hf.saving_engram import manifest_entry, table_file_name, write_manifest
from engram_hf.table_engram import read_rows
from engram_hf.table_format_engram import QUANTIZED_FORMATS, StoredTable, describe_table, file_description, read_tables
from engram_hf.table_writer_engram import StoredRounding, TableWriter, quantize_table

with contextlib.suppress(ImportError):  # Without numba, only the path of torch is measured.
    from engram_hf.convert_scripts.compiled_quantization import CompiledRounding


def write_floats(folder: Path, gigabytes: float) -> None:
    """Write a table of normal noise in bfloat16."""
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


def compiled(table: StoredTable, dtypes: list[str]) -> dict[str, StoredRounding]:
    """Return compiled code for each of `dtypes`, and print how long that takes; none without numba."""
    if "CompiledRounding" not in globals():
        print("numba is not installed: there is no compiled code")
        return {}
    found, took = {}, []
    for dtype in dtypes:
        start = time.perf_counter()
        found[dtype] = CompiledRounding(table.dtype, dtype, table.width)
        took.append(f"{dtype} {time.perf_counter() - start:.1f} s")
    print("compiling, the first one with the import of its libraries:", ", ".join(took))
    return found


def making(table: StoredTable, dtypes: list[str], home: Path, of: str, rounds: int) -> None:
    """Quantize a table to files in `home/DTYPE`; print medians of `rounds` in which all formats and `cp` alternate."""
    roundings = compiled(table, dtypes)
    description, file, copied = (
        replace(table.description, tensors=table.parts[0].names),
        table.parts[0].file.path,
        home / "copy",
    )
    home.mkdir(exist_ok=True)
    sync(file)

    def copy() -> Path:
        copied.unlink(missing_ok=True)
        subprocess.run(["cp", "--reflink=never", str(file), str(copied)], check=True)
        return copied

    def quantize(dtype: str, rounding: StoredRounding | None = None) -> Path:
        folder = home / dtype if rounding is None else home / f"{dtype} compiled"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        quantize_table(MappedRows(table), folder / file.name, description, dtype, rounding=rounding)
        return folder / file.name

    actions = {"cp": copy}
    for dtype in dtypes:
        actions[f"{dtype}, torch"] = lambda dtype=dtype: quantize(dtype)
        if dtype in roundings:
            actions[f"{dtype}, compiled"] = lambda dtype=dtype: quantize(dtype, roundings[dtype])
    took: dict[str, list[tuple[float, float, float]]] = {name: [] for name in actions}
    for _ in range(rounds):
        for name, action in actions.items():
            start, processor = time.perf_counter(), processor_seconds()
            made = action()
            written = time.perf_counter() - start
            sync(made)
            took[name].append((written, time.perf_counter() - start, processor_seconds() - processor))
    for dtype in roundings:
        assert filecmp.cmp(home / dtype / file.name, home / f"{dtype} compiled" / file.name, shallow=False), dtype
        shutil.rmtree(home / f"{dtype} compiled")
    print(
        f"rows of {WIDTH} channels from {table.size / 1e9:.2f} GB of {of}, {torch.get_num_threads()} threads; times of cp's bytes a second"
    )
    medians = {name: [statistics.median(some) for some in zip(*rows, strict=True)] for name, rows in took.items()}
    for name, seconds in medians.items():
        ratios = [own / other for own, other in zip(medians["cp"], seconds, strict=True)]
        print(
            f"  {name:23} {table.size / seconds[0] / 1e9:6.3f} GB/s, {ratios[0]:5.2f}x   with fsync {table.size / seconds[1] / 1e9:6.3f} GB/s, "
            f"{ratios[1]:5.2f}x   {table.size / seconds[2] / 1e9:6.3f} GB a processor second, {ratios[2]:5.2f}x"
        )


def processor_seconds() -> float:
    """Return the processor seconds of this process and of its finished children."""
    times = os.times()
    return sum(times[:4])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", help="a folder on the disk to measure (default: a temporary one)")
    parser.add_argument(
        "--gigabytes", type=float, default=1.0, help="size of the bfloat16 table (default: %(default)s)"
    )
    parser.add_argument("--repeats", type=int, default=5, help="runs of each measurement (default: %(default)s)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as home:
        floats = Path(home, "floats")
        floats.mkdir()
        write_floats(floats, options.gigabytes)
        table = read_tables(floats)[LAYER]
        making(table, list(QUANTIZED_FORMATS), Path(home), "bfloat16", max(3, options.repeats // 2))
        file = table.parts[0].file.path

        sources = {}
        print("bytes of a table file, against bits of its values and scales")
        for dtype, row_format in QUANTIZED_FORMATS.items():
            folder = Path(home, dtype)
            described = file_description(read_header(folder / file.name))
            write_manifest(folder, {LAYER: manifest_entry([(file.name, described.rows, described.tensors)])})
            sources[dtype] = MappedRows(read_tables(folder)[LAYER])
            channel = ITEM_BITS[row_format.dtype] / row_format.packed
            promised = channel + ITEM_BITS[row_format.scale_dtype] * row_format.scales(WIDTH) / WIDTH
            size = (folder / file.name).stat().st_size
            expected = table.num_rows * WIDTH * promised / 8
            print(f"  {dtype:14} {promised:6.3f} bits a channel  {size / 1e6:9.1f} MB  {size / expected - 1:+.3%}")

        eight = read_tables(Path(home, "float8_e4m3fn"))[LAYER]
        making(eight, ["nvfp4", "int4", "int2"], Path(home, "of eight"), "float8", max(3, options.repeats // 2))
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
