"""`Trainer` pushes a trained model with mapped tables completely; it loads from the Hub by name without the package."""

import pytest
from child_processes import WITHOUT_PACKAGE, finish, start
from hub_server import TOKEN, HubServer, client_environment
from tiny_backbones import build

TRAIN = """
import json, sys
import torch
from transformers import Trainer, TrainingArguments
from engram_hf import EngramForCausalLM

model = EngramForCausalLM.from_pretrained(sys.argv[1], engram_residency="mapped")
examples = [{"input_ids": row, "labels": row} for row in torch.randint(3, 100, (8, 12), generator=torch.Generator().manual_seed(0))]
arguments = TrainingArguments(
    "out", max_steps=4, per_device_train_batch_size=2, save_steps=2, learning_rate=1e-2, report_to=[], use_cpu=True,
    push_to_hub=True, hub_model_id="me/trained", hub_strategy="every_save", disable_tqdm=True,
)
trainer = Trainer(model, arguments, train_dataset=examples)
trainer.train()
trainer.push_to_hub()
model.eval()
with torch.no_grad():
    print(json.dumps(model(examples[0]["input_ids"][None]).logits[0, -1].tolist()))
"""
LOAD = (
    WITHOUT_PACKAGE
    + """
import json
import torch
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("me/trained", trust_remote_code=True, engram_residency="mapped")
row = torch.randint(3, 100, (8, 12), generator=torch.Generator().manual_seed(0))[0]
with torch.no_grad():
    print(json.dumps(model(row[None]).logits[0, -1].tolist()))
"""
)


@pytest.mark.slow
def test_trainer_pushes_a_model_with_mapped_tables(tmp_path):
    build("qwen3", "v4.1", engram_table_dtype="float8_e4m3fn", engram_head_dim=32).save_pretrained(tmp_path / "start")
    with HubServer(tmp_path / "hub") as hub:
        env = client_environment(hub, tmp_path / "home", HF_TOKEN=TOKEN)
        trained = finish(start(TRAIN, tmp_path / "start", env=env, cwd=tmp_path))
        files = hub.files("me/trained")
        loaded = finish(start(LOAD, env=client_environment(hub, tmp_path / "other-home"), cwd=tmp_path))
        before = finish(start(LOAD.replace("me/trained", str(tmp_path / "start")), env=env, cwd=tmp_path))
    assert loaded == pytest.approx(trained, abs=1e-5)
    assert before != pytest.approx(trained, abs=1e-2)  # Training changed the weights.
    tables = {name for name in files if name.startswith("engram-layer-")}
    assert {"README.md", "config.json", "engram_tables.json", "model.safetensors", "modeling_engram.py"} <= files
    assert len(tables) == 2
