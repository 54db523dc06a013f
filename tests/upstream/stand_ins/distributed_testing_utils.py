"""Replaces a file that transformers' source distribution lacks: it runs a function in several processes."""

import os
import socket

import torch.distributed
import torch.multiprocessing


def _run(rank, function, world_size, port, arguments):
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "WORLD_SIZE": str(world_size)}
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    torch.distributed.init_process_group("gloo", rank=rank, world_size=world_size)
    function(rank, *arguments)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def run_distributed(world_size):
    """Decorate a function so that `world_size` processes call it as `function(rank, *arguments)`."""

    def decorate(function):
        def call(*arguments):
            with socket.socket() as free:
                free.bind(("localhost", 0))
                port = free.getsockname()[1]
            torch.multiprocessing.spawn(_run, (function, world_size, port, arguments), nprocs=world_size)

        return call

    return decorate
