"""Speed and memory of the DeepSeek-V4.1 conversion, on a synthetic checkpoint in the release's layout.

    python benchmarks/conversion.py --folder /path/on/the/disk --gigabytes 4

The script makes the checkpoint (random weights, the miniature's tokenizer). Then it prints, for `cp` and for each
command, seconds, bytes per second and peak resident memory, whether the export equals the source, and how long linked
tables of two sizes take.
"""

import argparse
import filecmp
import itertools
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

MINIATURE = Path(__file__).parents[1] / "tests" / "golden" / "deepseek_v41_tiny"
TABLE_SHARE = 0.4  # This is their share of the bytes, as in the release.
ROW_BYTES = 256 + 8
EXPERT_BYTES = 3 * 2048 * (1024 + 64)
POOL_BYTES = 16 << 20
ITEM_BYTES = {"BF16": 2, "F32": 4}


def synthetic_config(gigabytes: float, table_share: float = TABLE_SHARE) -> dict:
    """Return the miniature's config with wide experts and tables, of `gigabytes` in total."""
    from engram_hf.table_format_engram import draw_primes

    config = json.loads((MINIATURE / "config.json").read_text(encoding="utf-8"))
    text = config["text_config"]
    total = gigabytes * 1e9
    experts = max(4, round(total * (1 - table_share) / EXPERT_BYTES / text["num_hidden_layers"]))
    text |= {"hidden_size": 2048, "moe_intermediate_size": 2048, "n_routed_experts": experts, "engram_head_dim": 256}
    text["engram_vocab_size"] = round(total * table_share / ROW_BYTES / 2 / 6)
    layers, heads = len(text["engram_layer_ids"]), text["engram_n_heads"]
    primes = draw_primes(layers, (text["engram_vocab_size"],) * 3, heads)
    text["engram_num_embeddings"] = [sum(map(sum, orders)) for orders in primes]
    return config


def make_checkpoint(folder: Path, *size: float) -> None:
    """Make a synthetic checkpoint in a separate process: the memory of this one would count as its children's peak."""
    process = multiprocessing.get_context("spawn").Process(target=write_checkpoint, args=(folder, *size))
    process.start()
    process.join()
    if process.exitcode:
        raise SystemExit("the synthetic checkpoint could not be made")


def write_checkpoint(folder: Path, *size: float) -> None:
    """Write a checkpoint with `synthetic_config(*size)`: one shard per layer, the tables in separate shards."""
    from engram_hf.convert_scripts.deepseek_v41 import DEEPSEEK_V41
    from engram_hf.convert_scripts.safetensors_files import INDEX_NAME
    from engram_hf.convert_scripts.streaming import (
        MANIFEST_NAME,
        Computed,
        Plan,
        Tensor,
        run_plan,
        tensor_file,
    )
    from engram_hf.convert_scripts.tensor_rules import map_tensors
    from engram_hf.safetensors_engram import json_bytes

    config = synthetic_config(*size)
    groups: dict[tuple[int, int], list] = {}
    for mapping in map_tensors(DEEPSEEK_V41, config):
        for tensor in mapping.upstream:
            count = int(np.prod(tensor.shape)) * ITEM_BYTES.get(tensor.dtype, 1)
            part = Computed(count, lambda dtype=tensor.dtype, count=count: random_bytes(dtype, count))
            layer = -1 if mapping.layer is None else mapping.layer
            key = (int(".engram." in tensor.name), layer)
            groups.setdefault(key, []).append(Tensor(tensor.name, tensor.dtype, tensor.shape, [part]))
    names = [f"model-{number:05d}-of-{len(groups):05d}.safetensors" for number in range(1, len(groups) + 1)]
    files = [tensor_file(name, groups[key]) for name, key in zip(names, sorted(groups), strict=True)]
    index = {"weight_map": {tensor: file.name for file in files for tensor in file.tensors}}
    documents = {"config.json": json_bytes(config), INDEX_NAME: json_bytes(index)}
    documents |= {name: (MINIATURE / name).read_bytes() for name in ("tokenizer.json", "tokenizer_config.json")}
    run_plan(Plan(files, documents, {"synthetic": config}), folder)
    (folder / MANIFEST_NAME).unlink()


def random_bytes(dtype: str, size: int) -> Iterator[memoryview]:
    """Yield `size` bytes of finite numbers of moderate size."""
    pool = np.random.default_rng(0).integers(0, 256, POOL_BYTES, dtype=np.uint8)
    if dtype == "F8_E8M0":
        pool = pool % 8 + 116
    elif dtype in ("BF16", "F32"):
        pool[ITEM_BYTES[dtype] - 1 :: ITEM_BYTES[dtype]] = 0x3C  # This is the byte with the exponent.
    elif dtype == "F8_E4M3":
        pool &= 0xBF
    done = 0
    for shift in itertools.count(0, 64):
        if done == size:
            return
        chunk = memoryview(np.roll(pool, shift) if done else pool)[: size - done]
        yield chunk
        done += len(chunk)


def timed(label: str, command: list[str], count: int) -> float:
    """Run a command and sync the disk, print its figures, and return the wall seconds of both."""
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    said = process.stdout.read().strip().partition(": ")[2]
    _, status, usage = os.wait4(process.pid, 0)
    subprocess.run(["sync"], check=True)
    seconds = time.perf_counter() - start
    if status:
        raise SystemExit(f"{label} failed")
    cpu = usage.ru_utime + usage.ru_stime
    print(
        f"{label:36} {seconds:6.2f} s wall with sync ({count / seconds / 1e9:.2f} GB/s), {cpu:6.2f} s CPU, "
        f"peak {usage.ru_maxrss / 1e6:.2f} GB  {said}",
        flush=True,
    )
    return seconds


def start_up() -> float:
    """Return the seconds until a command has imported its modules: they are the same for 4 and for 500 GB."""
    modules = "convert_deepseek_v41", "import_plan", "deepseek_v41_config"
    code = "".join(f"import engram_hf.convert_scripts.{name}\n" for name in modules)
    return min(timed(f"imports alone, turn {turn}", [sys.executable, "-c", code], 0) for turn in range(3))


def command(module: str, *arguments: object) -> list[str]:
    """Return one of the conversion commands."""
    return [sys.executable, "-m", f"engram_hf.convert_scripts.{module}", *map(str, arguments)]


def main() -> None:
    """Print all figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--folder",
        type=Path,
        required=True,
        help="a folder with space for four times the size; it is emptied afterwards",
    )
    parser.add_argument(
        "--gigabytes", type=float, default=4.0, help="size of the checkpoint that is made (default: %(default)s)"
    )
    given = parser.parse_args()
    work = given.folder / "conversion-benchmark"
    shutil.rmtree(work, ignore_errors=True)
    source = work / "source"
    make_checkpoint(source, given.gigabytes)
    size = sum(path.stat().st_size for path in source.iterdir())
    print(f"synthetic checkpoint: {size / 1e9:.2f} GB in {len(list(source.iterdir()))} files", flush=True)
    try:
        compare_with_cp(source, work, size)
        time_links(work, given.gigabytes)
    finally:
        shutil.rmtree(work)


def compare_with_cp(source: Path, work: Path, size: int) -> None:
    """Alternate `cp` and the conversion, so that both see the same state of the disk; then export."""
    ours, back = work / "ours", work / "back"
    imports, cp, own = start_up(), [], []
    for turn in range(3):
        cp.append(timed(f"cp, turn {turn}", ["cp", "-r", str(source), str(back)], size))
        shutil.rmtree(back)
        shutil.rmtree(ours, ignore_errors=True)
        own.append(timed(f"convert, turn {turn}", command("convert_deepseek_v41", source, ours), size))
    ratios = min(cp) / min(own), min(cp) / (min(own) - imports)
    print("throughput, best of 3 each: {:.2f} of cp's, {:.2f} without the imports".format(*ratios), flush=True)
    timed("verify", command("convert_deepseek_v41", source, ours, "--verify-only"), size)
    timed("export", command("export_deepseek_v41", ours, back), size)
    _, mismatch, errors = filecmp.cmpfiles(source, back, [path.name for path in source.iterdir()], shallow=False)
    print(f"export identical to the source: {not mismatch and not errors}", flush=True)
    shutil.rmtree(back)
    shutil.rmtree(ours)
    timed("convert --dtype bfloat16", command("convert_deepseek_v41", source, ours, "--dtype", "bfloat16"), size)
    timed("export of bfloat16", command("export_deepseek_v41", ours, back), size)
    shutil.rmtree(back)
    shutil.rmtree(ours)


def time_links(work: Path, gigabytes: float) -> None:
    """Time linked tables: small and large ones beside the same few experts."""
    for table in (gigabytes / 16, gigabytes):
        source, target = work / "tables", work / "linked"
        make_checkpoint(source, table, 0.98)
        linked = command("convert_deepseek_v41", source, target, "--link-tables")
        timed(f"--link-tables, {table:.2f} GB of tables", linked, 0)
        shutil.rmtree(source)
        shutil.rmtree(target)


if __name__ == "__main__":
    main()
