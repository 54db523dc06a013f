"""The cost of DeepSeek-V4.1's vision tower and its image processing, against their unavoidable operations alone.

    python benchmarks/deepseek_v41_vision.py

The tower and the aligner, at the release's widths with a few layers, run on one image of the largest size, against
torch's `scaled_dot_product_attention` and the matrix products of the same shapes. The image processor runs on a
photograph of 12 megapixels, against Pillow's bicubic resize to the same size. The figures are medians of several runs
of one thread, in processor time, which other work on the machine affects least.
"""

import argparse
import statistics
import time

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from engram_hf.configuration_vision_deepseek_v41 import DeepseekV41VisionConfig
from engram_hf.image_processing_deepseek_v41 import DeepseekV41ImageProcessor
from engram_hf.vision_deepseek_v41 import DeepseekV41VisionModel


def seconds(*actions, runs: int) -> list[float]:
    """Return the median processor time of each action, run alternately."""
    times = [[] for _ in actions]
    for _ in range(runs):
        for action, taken in zip(actions, times, strict=True):
            start = time.process_time()
            action()
            taken.append(time.process_time() - start)
    return [statistics.median(taken) for taken in times]


def bare_tower(config: DeepseekV41VisionConfig, patches: int, positions: int, dtype: torch.dtype):
    """Return a function for the matrix products and attentions of the tower and the aligner, on random numbers."""
    hidden, heads = config.hidden_size, config.num_attention_heads
    window = hidden * config.downsample_ratio**2
    layer = [
        (hidden, 3 * hidden),
        (hidden, hidden),
        (hidden, 2 * config.intermediate_size),
        (config.intermediate_size, hidden),
    ]
    shapes = [(patches, 3 * config.patch_size**2, hidden)]
    shapes += [(patches, *shape) for _ in range(config.num_hidden_layers) for shape in layer]
    shapes += [
        (positions, window, config.out_hidden_size),
        (positions, config.out_hidden_size, config.out_hidden_size),
    ]
    products = [
        (torch.randn(rows, width, dtype=dtype), torch.randn(out, width, dtype=dtype)) for rows, width, out in shapes
    ]
    states = torch.randn(3, 1, heads, patches, hidden // heads, dtype=dtype)

    def run():
        for x, weight in products:
            F.linear(x, weight)
        for _ in range(config.num_hidden_layers):
            F.scaled_dot_product_attention(*states)

    return run


@torch.no_grad()
def measure_tower(layers: int, runs: int, dtype: torch.dtype) -> None:
    """Print the tower's time and its ratio to the bare products."""
    config = DeepseekV41VisionConfig(num_hidden_layers=layers)
    model = DeepseekV41VisionModel(config).to(dtype).eval()
    grid = torch.tensor([[93, 93]])
    pixels = torch.randn(93 * 93, 3, 14, 14)
    whole, bare = seconds(lambda: model(pixels, grid), bare_tower(config, 93 * 93, 31 * 31, dtype), runs=runs)
    print(f"tower, {layers} layers, 93 x 93 patches, {str(dtype).removeprefix('torch.')}: {whole:.2f} s, "
          f"attention and matrix products alone {bare:.2f} s, {whole / bare:.2f}x")  # fmt: skip


def measure_processing(runs: int) -> None:
    """Print the image processor's time and its ratio to Pillow's resize."""
    noise = np.random.default_rng(0).integers(0, 256, (3000 // 8, 4000 // 8, 3), dtype=np.uint8)
    photo = Image.fromarray(noise).resize((4000, 3000), Image.Resampling.BICUBIC)
    processor = DeepseekV41ImageProcessor()
    plan = processor.plan(*photo.size)
    size = (plan.width, round(photo.height / photo.width * plan.width))
    whole, bare = seconds(
        lambda: processor(photo, return_tensors="pt"),
        lambda: photo.resize(size, Image.Resampling.BICUBIC),
        runs=runs,
    )
    print(f"image processing, 4000 x 3000 to {plan.width} x {plan.height}: {whole * 1e3:.0f} ms, resize alone {bare * 1e3:.0f} ms, {whole / bare:.2f}x")  # fmt: skip


def main() -> None:
    """Print both measurements."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=2, help="layers of the tower (default: %(default)s)")
    parser.add_argument("--runs", type=int, default=5, help="runs of each measurement (default: %(default)s)")
    given = parser.parse_args()
    torch.set_num_threads(1)
    measure_processing(max(given.runs, 9))
    measure_tower(given.layers, given.runs, torch.float32)


if __name__ == "__main__":
    main()
