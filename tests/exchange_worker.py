"""One side of an exchange between versions of transformers; version_matrix.py runs it in each version's environment.

exchange_worker.py save FOLDER    saves a small model for remote code, and prints the tokens it generates
exchange_worker.py load FOLDER    loads it as remote code, without this package, and prints its tokens
"""

import json
import sys

import torch

PROMPT = torch.tensor([[4, 9, 17, 33, 5, 70], [0, 0, 8, 21, 21, 64]])
MASK = torch.tensor([[1] * 6, [0] * 2 + [1] * 4])


def save(folder: str):
    """Save a Mixtral whose memory changes its tokens."""
    from tiny_backbones import build

    model = build("mixtral")
    model.save_pretrained(folder)
    return model


def load(folder: str):
    """Load the model of a folder with the code in that folder."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
    assert "engram_hf" not in sys.modules, "the folder's own code is to be tested"
    return model


def main() -> None:
    """Print the tokens as the last line."""
    side, folder = sys.argv[1:]
    model = {"save": save, "load": load}[side](folder)
    tokens = model.generate(PROMPT, attention_mask=MASK, max_new_tokens=12, do_sample=False, eos_token_id=None)
    print(json.dumps(tokens.tolist()))


if __name__ == "__main__":
    main()
