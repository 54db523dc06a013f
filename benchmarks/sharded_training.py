"""The memory and traffic of a process when tables are sharded: `shard_tables` under DDP, on local gloo processes.

    python benchmarks/sharded_training.py [--processes 1 2 4] [--rows 4000000] [--steps 4]

The script trains the memory of the small Qwen3 of `sparse_training.py`, whose backbone is frozen, on 4 x 256 random
tokens in each process. Tables have the printed number of rows of 64 float32 channels in two layers. Peak memory is
that of the first process beyond the same with small tables, in units of all tables; bytes are those that its
all-to-all calls sent to other processes. The last line computes these bytes from the number of distinct rows that a
process reads.
"""

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from sparse_training import BATCH, LENGTH, SMALL, VOCAB, WIDTH, build
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel

from engram_hf.training import SparseAdamW, engram_parameter_groups, shard_tables, tables_on_meta


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--processes", type=int, nargs="*", default=[1, 2, 4], help="numbers of processes")
    parser.add_argument("--rows", type=int, default=4_000_000, help="rows of each table (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=4, help="measured training steps (default: %(default)s)")
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        measure(options.one, options.steps)
        return
    print(
        f"{'processes':>9}{'tables GB':>11}{'own rows GB':>13}{'moments MB':>12}{'peak, tables':>14}{'sent MB/step':>14}{'computed':>10}"
    )
    for processes in options.processes:
        small, large = (together(processes, rows, options.steps) for rows in (SMALL, options.rows))
        tables = large["rows"] * WIDTH * 4
        peak = (large["peak"] - small["peak"]) / tables
        # For each distinct row, the id is sent once, the row and its gradient once; this share goes to other
        # processes.
        computed = large["distinct"] * (8 + 2 * WIDTH * 4) * (processes - 1) / processes
        print(
            f"{processes:>9}{tables / 1e9:>11.2f}{large['own'] / 1e9:>13.2f}{large['moments'] / 1e6:>12.1f}{peak:>14.2f}"
            f"{large['sent'] / 1e6:>14.2f}{computed / 1e6:>10.2f}",
            flush=True,
        )


def together(processes: int, rows: int, steps: int) -> dict[str, float]:
    """Return the measurements of the first of several processes."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    started = []
    for rank in range(processes):
        group = {
            "RANK": rank,
            "WORLD_SIZE": processes,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
            "GLOO_SOCKET_IFNAME": "lo",
        }
        environment = os.environ | {name: str(value) for name, value in group.items()} | {"OMP_NUM_THREADS": "1"}
        command = [sys.executable, __file__, "--one", str(rows), "--steps", str(steps)]
        started.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True))
    printed = [one.communicate()[0] for one in started]
    if any(one.returncode for one in started):
        raise SystemExit("a process failed")
    return json.loads(printed[0].splitlines()[-1])


def measure(rows: int, steps: int) -> None:
    dist.init_process_group("gloo")
    with tables_on_meta():
        model = build(rows)
    shard_tables(model)
    wrapped = DistributedDataParallel(model)
    optimizer = SparseAdamW(engram_parameter_groups(model, lr=1e-3))
    sent = count_sent_bytes()
    torch.manual_seed(dist.get_rank())
    seconds, each, distinct = [], [], []
    for _ in range(steps):
        ids = torch.randint(1, VOCAB, (BATCH, LENGTH))
        started, before = time.perf_counter(), sent[0]
        wrapped(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - started)
        each.append(sent[0] - before)
        distinct.append(sum(part.unique().numel() for part in model.model.prepare_memory(ids).row_ids))
    tables = [memory.table.weight for memory in model.model.memories().values()]
    moments = [optimizer.moments_of(table) for table in tables]
    found = {
        "rows": sum(len(table) for table in tables),
        "own": sum(table.to_local().nbytes for table in tables),
        "moments": sum(some.nbytes for part in moments for some in part.values()),
        "distinct": statistics.mean(distinct),
        "sent": statistics.mean(each),
        "seconds": statistics.median(seconds),
        "peak": peak_memory(),
    }
    dist.barrier()
    print(json.dumps(found), flush=True)
    # Gloo's threads that still hold tensors may abort a process whose interpreter shuts down (pytorch 179291).
    os._exit(0)


def count_sent_bytes() -> list[int]:
    """Count the bytes that all-to-all sends to other processes."""
    sent, exchange = [0], dist.all_to_all_single

    def counted(output, data, received, splits, group=None):
        others = sum(splits) - splits[dist.get_rank()]
        sent[0] += others * (data[0].nbytes if len(data) else 0)
        return exchange(output, data, received, splits, group=group)

    dist.all_to_all_single = counted
    return sent


def peak_memory() -> int:
    """Return the peak memory of this process in bytes."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    main()
