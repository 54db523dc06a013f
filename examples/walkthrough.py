"""One position of one text, from its token to the gate: an Engram memory step by step, on the real classes.

    python examples/walkthrough.py

Everything that is printed is computed twice: by the model, and here by hand. The model is small and untrained, so its
gate has no meaning yet; `engram show` prints the same for a trained one.
"""

import math

import torch
from stdlib_text import read_sources, train_tokenizer
from transformers import LlamaConfig

from engram_hf import EngramConfig, EngramForCausalLM
from engram_hf.analysis.evaluation import Edit
from engram_hf.hashing_engram import row_offsets

TEXT = "The list and THE LIST"
HEADS, WIDTH = 4, 32


def main() -> None:
    """Print all steps."""
    torch.manual_seed(0)
    sources, _ = read_sources()
    tokenizer = train_tokenizer(sources[:60], 2000)
    model = build(tokenizer)
    ids = tokenizer(TEXT)["input_ids"]
    compressed = show_compression(tokenizer, ids)
    row_ids = show_hash(model, compressed)
    rows = show_lookup(model, row_ids)
    show_gate(model, ids, rows)


def build(tokenizer) -> EngramForCausalLM:
    """Build four decoder layers with memory in the second: 2-grams and 3-grams, four heads each, rows of 32 numbers."""
    backbone = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    config = EngramConfig.for_backbone(
        backbone, tokenizer, layer_ids=[1], engram_n_heads=HEADS, engram_head_dim=WIDTH, engram_vocab_size=10_000
    )
    model = EngramForCausalLM(config)
    model.set_token_map(tokenizer)
    return model.eval()


def show_compression(tokenizer, ids: list[int]) -> list[int]:
    """Show how token ids become compressed ids: tokens that differ in case, accents or a leading space share one."""
    print(f"1. Compression: {len(tokenizer):,} token ids become {tokenizer.compressed_vocab_size:,}\n")
    compressed = [int(tokenizer.token_map[token]) for token in ids]
    print("   token        id  compressed")
    for token, number in zip(ids, compressed, strict=True):
        print(f"   {tokenizer.decode([token])!r:10} {token:>4}  {number:>10}")
    return compressed


def show_hash(model: EngramForCausalLM, compressed: list[int]) -> list[int]:
    """Show how the last position's 2-gram and 3-gram choose a row for each head."""
    hashing = model.model.hashing
    multipliers, primes = hashing.multipliers[0].tolist(), hashing.primes[0].tolist()
    offsets = row_offsets(hashing.primes)[0].tolist()
    last = compressed[::-1][:3]  # The current one comes first.
    print(
        "\n2. Hash of the last position: mix = c0*m0 ^ c1*m1 (^ c2*m2), row = mix mod prime + first row of the head\n"
    )
    print(f"   compressed ids, latest first: {last}")
    print(f"   multipliers (odd, of 64 bits): {multipliers}")
    by_hand, mix = [], wrap(last[0] * multipliers[0])
    for order in (2, 3):
        mix ^= wrap(last[order - 1] * multipliers[order - 1])
        print(f"   mix of the {order}-gram: {mix}")
        for head in range(HEADS):
            prime, offset = primes[order - 2][head], offsets[order - 2][head]
            by_hand.append(mix % prime + offset)
            print(f"      head {head}: {mix} mod {prime:,} + {offset:,} = row {by_hand[-1]:,}")
    computed = hashing(torch.tensor([compressed]))[0, 0, -1].tolist()
    assert by_hand == computed, "the model hashes otherwise"
    return computed


def wrap(number: int) -> int:
    """Wrap an integer like 64-bit arithmetic."""
    return (number + 2**63) % 2**64 - 2**63


def show_lookup(model: EngramForCausalLM, row_ids: list[int]) -> torch.Tensor:
    """Show the eight rows of 32 numbers."""
    memory = model.model.memories()[1]
    rows = memory.table(torch.tensor([[row_ids]]))[0, 0]
    by_hand = torch.cat([memory.table.weight[row] for row in row_ids])
    assert torch.equal(rows, by_hand), "the table reads otherwise"
    print(
        f"\n3. Lookup: {len(row_ids)} rows of {WIDTH} = {rows.numel()} numbers, out of a table of {memory.table.num_rows:,} rows\n"
    )
    for head, row in enumerate(row_ids):
        values = memory.table.weight[row]
        print(f"   row {row:>6,} (order {2 + head // HEADS}, head {head % HEADS}): "
              f"{', '.join(f'{value:+.3f}' for value in values[:4].tolist())}, ...   norm {values.norm():.3f}")  # fmt: skip
    return rows


@torch.no_grad()
def show_gate(model: EngramForCausalLM, ids: list[int], rows: torch.Tensor) -> None:
    """Show how rows become a key and a value, and how the agreement of key and residual stream scales the value."""
    memory, seen = model.model.memories()[1], {}

    def note(memory, rows, inputs):
        seen["rows"] = rows[0, -1]
        return rows

    edit: Edit = note
    stream = model(torch.tensor([ids]), output_hidden_states=True, engram_edit=edit).hidden_states[1][0, -1]
    assert torch.equal(seen["rows"], rows)
    key, value = memory.kv_proj(rows).split(64)

    def normalized(norm, states):
        return states / (states.square().mean() + norm.eps).sqrt() * norm.weight[0]

    dot = (normalized(memory.q_norm, stream) * normalized(memory.k_norm, key)).sum() / math.sqrt(64)
    gate = 1 / (1 + math.exp(-math.copysign(math.sqrt(max(abs(float(dot)), 1e-6)), float(dot))))
    computed = float(model.engram_gates(torch.LongTensor([ids]))[1][0, -1, 0])
    print("\n4. Gate: the rows become a key and a value of the backbone's width\n")
    print(f"   agreement of the normalized residual stream and key: {float(dot):+.4f}")
    print(f"   gate = sigmoid(sign(x) * sqrt(|x|)) = {gate:.4f}   (the model says {computed:.4f})")
    print(
        f"   gate * value is added to the residual stream: norm {float(gate * value.norm()):.4f} beside {float(stream.norm()):.4f}"
    )
    assert abs(gate - computed) < 1e-5, "the model's gate is another"


if __name__ == "__main__":
    main()
