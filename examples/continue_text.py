"""Continue a text with a saved model, through the Auto classes alone.

The script does not import engram-hf, even where it is installed: it runs the code in the model's folder.

    python examples/continue_text.py out/quickstart/model "def read(self, size=-1):"

"""

import argparse
import os
import sys
from typing import Any


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="folder of a saved model with its tokenizer")
    parser.add_argument("prompt", help="text to continue")
    parser.add_argument("--tokens", type=int, default=48, help="how many tokens to add at most (default: %(default)s)")
    args = parser.parse_args()
    sys.stdout.write(continue_text(args.model, args.prompt, args.tokens) + "\n")


def continue_text(folder: str, prompt: str, tokens: int) -> str:
    """Return `prompt` and up to `tokens` more tokens of greedy decoding."""
    sys.modules["engram_hf"] = None  # type: ignore[assignment]  # importing it fails from here on, as where it was never installed
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
    output = model.generate(**inputs, max_new_tokens=tokens, do_sample=False, repetition_penalty=1.1)
    return str(tokenizer.decode(output[0], skip_special_tokens=True))


if __name__ == "__main__":
    main()
