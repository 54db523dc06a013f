"""Load on transformers' server: memory against its bare backbone, one request after another and batched.

    pip install -e '.[serving]' && python benchmarks/serving.py

An open-loop client sends a bounded number of streamed completions, at fixed times that no answer delays: at load N, N
requests arrive in the time that the bare backbone takes for one alone. Every answer is compared with that of
`generate`. The script prints tokens per second, the median and the 95th percentile of the time to the first token and
of the time between tokens (ms), and how many answers were wrong or lost. Two ratios compare the server with the bare
backbone at the same load, each in its best round: the median time between tokens, and the server's processor time per
token, which other work on the machine disturbs less.
"""

import argparse
import asyncio
import contextlib
import dataclasses
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import torch
from openai import APIConnectionError, AsyncOpenAI, OpenAI
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, MixtralConfig, PreTrainedTokenizerFast

from engram_hf import EngramForCausalLM, EngramTokenizer

WORDS = 4000
PROMPTS = 16


@dataclasses.dataclass
class Server:
    """A server in a separate process, and the expected answers."""

    name: str
    folder: Path
    answers: list[str]
    url: str
    process: psutil.Process
    bare: str | None  # The times of this setting are the reference.


@dataclasses.dataclass
class Answer:
    """One streamed answer: its text, and the arrival times of its tokens in seconds after the request."""

    text: str
    times: list[float]

    @property
    def gaps(self) -> list[float]:
        return [later - earlier for earlier, later in zip(self.times, self.times[1:], strict=False)]


@dataclasses.dataclass
class Round:
    """The result of one round: answers or errors, seconds, and processor seconds of the server."""

    answers: list
    seconds: float
    processor: float

    @property
    def got(self) -> list[Answer]:
        return [answer for answer in self.answers if isinstance(answer, Answer)]

    @property
    def tokens(self) -> int:
        return sum(len(answer.times) for answer in self.got)

    @property
    def gap(self) -> float:
        """The median time between tokens."""
        return statistics.median(gap for answer in self.got for gap in answer.gaps)

    @property
    def processor_cost(self) -> float:
        """Processor seconds for each token."""
        return self.processor / self.tokens


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument(
        "--loads", type=int, nargs="+", default=[1, 8, 32], help="numbers of requests that are under way together"
    )
    parser.add_argument(
        "--requests",
        type=int,
        default=12,
        help="requests of each round; at least as many as the largest load (default: %(default)s)",
    )
    parser.add_argument("--rounds", type=int, default=3, help="rounds of each load (default: %(default)s)")
    parser.add_argument("--new-tokens", type=int, default=16, help="tokens of an answer (default: %(default)s)")
    parser.add_argument("--prompt-tokens", type=int, default=24, help="tokens of a prompt (default: %(default)s)")
    parser.add_argument("--layers", type=int, default=12, help="decoder layers of the model (default: %(default)s)")
    parser.add_argument("--hidden", type=int, default=512, help="hidden size of the model (default: %(default)s)")
    parser.add_argument(
        "--rows", type=int, default=200_000, help="rows of each of the two tables (default: %(default)s)"
    )
    parser.add_argument("--threads", type=int, default=1, help="threads of each server (default: %(default)s)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary, contextlib.ExitStack() as running:
        bare, memory = make_folders(Path(temporary), arguments)
        prompts = make_prompts(arguments.prompt_tokens)
        servers = start_servers(running, bare, memory, prompts, arguments)
        seconds = statistics.median(asyncio.run(ask_alone(servers[0], prompts, arguments.new_tokens)))
        print(f"one request alone on the bare backbone: {seconds:.2f} s for {arguments.new_tokens} tokens")
        print(
            f"{'load':>4}  {'model':34}{'tokens/s':>9}{'first':>8}{'p95':>9}{'between':>9}{'p95':>7}{'ratio':>7}{'processor':>10}  wrong  lost"
        )
        for load in arguments.loads:
            report(load, servers, prompts, seconds / load, arguments)


def make_folders(folder: Path, arguments: argparse.Namespace) -> tuple[Path, Path]:
    """Save the same backbone without memory and with it, each with a tokenizer."""
    words = ["<pad>", "<unk>", *(f"w{index}" for index in range(WORDS - 2))]
    backend = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    plain = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", unk_token="<unk>")
    config = MixtralConfig(
        vocab_size=WORDS,
        hidden_size=arguments.hidden,
        intermediate_size=arguments.hidden * 3,
        num_hidden_layers=arguments.layers,
        num_attention_heads=8,
        num_key_value_heads=4,
        num_local_experts=4,
        num_experts_per_tok=2,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=None,
    )
    torch.manual_seed(0)
    backbone = AutoModelForCausalLM.from_config(config).eval()
    tokenizer = EngramTokenizer.from_tokenizer(plain)
    backbone.save_pretrained(folder / "bare")
    plain.save_pretrained(folder / "bare")
    memory = EngramForCausalLM.from_backbone(
        folder / "bare", tokenizer, layer_ids=[1, 2], rows=arguments.rows, engram_head_dim=64
    )
    with torch.no_grad():
        for name, parameter in memory.named_parameters():
            if ".engram." in name and not parameter.any():
                parameter.normal_(std=0.05)  # A new memory changes no token.
    memory.save_pretrained(folder / "memory")
    tokenizer.save_pretrained(folder / "memory")
    parameters = sum(parameter.numel() for parameter in backbone.parameters())
    print(
        f"Mixtral, {parameters / 1e6:.0f}M parameters, memory in layers 1 and 2, {arguments.rows:,} rows of 64 each, "
        f"requests of {arguments.prompt_tokens} and {arguments.new_tokens} tokens, "
        f"{arguments.threads} thread(s)"
    )
    return folder / "bare", folder / "memory"


def make_prompts(length: int) -> list[str]:
    draw = torch.Generator().manual_seed(1)
    return [
        " ".join(f"w{word}" for word in torch.randint(WORDS - 2, (length,), generator=draw).tolist())
        for _ in range(PROMPTS)
    ]


def generated(folder: Path, prompts: list[str], count: int) -> list[str]:
    """Return the output of `generate` for each prompt alone."""
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    texts = []
    for prompt in prompts:
        inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
        tokens = model.generate(**inputs, max_new_tokens=count, do_sample=False)
        texts.append(tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :]))
    return texts


def start_servers(
    running: contextlib.ExitStack, bare: Path, memory: Path, prompts: list[str], arguments: argparse.Namespace
) -> list[Server]:
    """Start all settings; one that the server refuses is printed with the reason and left out."""
    settings = []
    for batching in ([], ["--continuous-batching", "--cb-num-blocks", "64", "--cb-max-batch-tokens", "512"]):
        how = ", batched" if batching else ", one by one"
        settings += [
            (f"bare{how}", bare, batching, None),
            (f"memory, resident{how}", memory, [*batching, "--residency", "resident"], f"bare{how}"),
            (f"memory, mapped{how}", memory, [*batching, "--residency", "mapped"], f"bare{how}"),
        ]
    answers = {folder: generated(folder, prompts, arguments.new_tokens) for folder in (bare, memory)}
    servers = []
    for name, folder, options, measure in settings:
        try:
            url, process = running.enter_context(server_process(folder, options, arguments.threads))
        except RuntimeError as error:
            print(f"{name}: {error}")
            continue
        servers.append(Server(name, folder, answers[folder], url, process, measure))
    return servers


@contextlib.contextmanager
def server_process(folder: Path, options: list[str], threads: int) -> Iterator[tuple[str, psutil.Process]]:
    """Start `engram serve` on a free port; yield its address, and the process.

    Raises:
        RuntimeError: it ended; the message has its last output.
    """
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "engram_cli", "serve", str(folder), "--port", str(port), "--device", "cpu"]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "PASSIVE"}
    with tempfile.TemporaryFile("w+") as log:
        command += [*options, "--log-level", "error"]
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)
        try:
            client = OpenAI(base_url=f"http://localhost:{port}/v1", api_key="none", max_retries=0)
            while not is_up(client):
                if process.poll() is not None:
                    log.seek(0)
                    raise RuntimeError(log.read().strip().splitlines()[-1])
                time.sleep(0.2)
            yield f"http://localhost:{port}/v1", psutil.Process(process.pid)
        finally:
            process.terminate()
            process.wait()


def is_up(client: OpenAI) -> bool:
    try:
        client.get("../health", cast_to=object)
    except APIConnectionError:
        return False
    return True


async def ask(client: AsyncOpenAI, prompt: str, count: int, delay: float = 0.0) -> Answer:
    await asyncio.sleep(delay)
    start, times, text = time.perf_counter(), [], ""
    stream = await client.completions.create(model=None, prompt=prompt, max_tokens=count, temperature=0, stream=True)
    async for chunk in stream:
        if chunk.choices[0].text:
            times.append(time.perf_counter() - start)
            text += chunk.choices[0].text
    return Answer(text, times)


def connect(server: Server) -> AsyncOpenAI:
    """Return a client for one event loop, to be closed in it."""
    return AsyncOpenAI(base_url=server.url, api_key="none", max_retries=0, timeout=600)


async def ask_alone(server: Server, prompts: list[str], count: int) -> list[float]:
    """Return the seconds of requests one at a time; the first ones warm up."""
    async with connect(server) as client:
        return [(await ask(client, prompt, count)).times[-1] for prompt in prompts[:6]][2:]


async def ask_all(
    server: Server, prompts: list[str], spacing: float, count: int, arguments: argparse.Namespace
) -> "Round":
    async with connect(server) as client:
        await ask(client, prompts[0], 2)  # The first request initializes the server.
        start, processor = time.perf_counter(), processor_seconds(server.process)
        requests = [
            ask(client, prompts[index % PROMPTS], arguments.new_tokens, index * spacing) for index in range(count)
        ]
        answers = await asyncio.gather(*requests, return_exceptions=True)
        return Round(answers, time.perf_counter() - start, processor_seconds(server.process) - processor)


def report(
    load: int, servers: list[Server], prompts: list[str], spacing: float, arguments: argparse.Namespace
) -> None:
    """Load all servers one after the other, in several rounds, so that other work affects each equally; print a line
    for each.
    """
    rounds: dict[str, list[Round]] = {server.name: [] for server in servers}
    count = max(load, arguments.requests)
    for _ in range(arguments.rounds):
        for server in servers:
            rounds[server.name].append(asyncio.run(ask_all(server, prompts, spacing, count, arguments)))
    for server in servers:
        mine, bare = rounds[server.name], rounds[server.bare or server.name]
        answers = [(index % PROMPTS, answer) for one in mine for index, answer in enumerate(one.answers)]
        got = [(index, answer) for index, answer in answers if isinstance(answer, Answer)]
        wrong = sum(answer.text != server.answers[index] for index, answer in got)
        firsts = sorted(answer.times[0] for _, answer in got if answer.times)
        gaps = sorted(gap for _, answer in got for gap in answer.gaps)
        speed = sum(one.tokens for one in mine) / sum(one.seconds for one in mine)
        times = [statistics.median(firsts), quantile(firsts), statistics.median(gaps), quantile(gaps)]
        first, late_first, gap, late_gap = (f"{moment * 1e3:.1f}" for moment in times)
        ratios = [
            min(map(cost, mine)) / min(map(cost, bare))
            for cost in (lambda one: one.gap, lambda one: one.processor_cost)
        ]
        print(
            f"{load:4}  {server.name:34}{speed:9.1f}{first:>8}{late_first:>9}{gap:>9}{late_gap:>7}{ratios[0]:7.3f}{ratios[1]:10.3f}  "
            f"{wrong:5}{len(answers) - len(got):6}",
            flush=True,
        )


def processor_seconds(process: psutil.Process) -> float:
    times = process.cpu_times()
    return times.user + times.system


def quantile(values: list[float], share: float = 0.95) -> float:
    return values[min(int(len(values) * share), len(values) - 1)]


if __name__ == "__main__":
    main()
