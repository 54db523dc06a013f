"""An adapter on the Hub refers to its base model: tables come from there, at the revision of the weights."""

import os
import sys

from child_processes import finish, start
from hub_server import TOKEN, HubServer, client_environment

ADAPTER = """
import json
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tiny_backbones import build, random_ids
from transformers import AutoModelForCausalLM
from engram_hf import EngramForCausalLM
from engram_hf.training import EngramRowsConfig, scan_rows

base = build("llama", engram_head_dim=32)
base.save_pretrained("saved")
EngramForCausalLM.from_pretrained("saved", engram_residency="mapped").push_to_hub("me/base")
base = EngramForCausalLM.from_pretrained("me/base", engram_residency="mapped")
config = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], init_lora_weights=False)
adapted = get_peft_model(base, config).eval()
adapted.push_to_hub("me/adapter")
ids = random_ids(1, 9)
found = {}
with torch.no_grad():
    expected = adapted(ids).logits
    for load in (EngramForCausalLM, AutoModelForCausalLM):
        for residency in ("auto", "mapped"):
            model = load.from_pretrained("me/adapter", engram_residency=residency).eval()
            resident = {memory.table.is_resident for memory in model.base_model.memories().values()}
            assert resident == {residency == "auto"}, resident
            found[f"{load.__name__}, {residency}"] = float((model(ids).logits - expected).abs().max())

base = EngramForCausalLM.from_pretrained("me/base", engram_residency="mapped")
rows = get_peft_model(base, EngramRowsConfig(rows=scan_rows([{"input_ids": ids}], None, base))).eval()
with torch.no_grad():
    plain = rows(ids).logits
    for name, parameter in rows.named_parameters():
        if name.endswith("delta"):
            parameter.normal_()
    expected = rows(ids).logits
    rows.push_to_hub("me/rows")
    model = PeftModel.from_pretrained(EngramForCausalLM.from_pretrained("me/base"), "me/rows").eval()
    found["rows"] = float((model(ids).logits - expected).abs().max())
found["effect of the rows"] = float((plain - expected).abs().max())
print(json.dumps(found))
"""


def test_adapter_loads_the_tables_of_its_base_model_from_the_hub(tmp_path):
    paths = os.pathsep.join(path for path in sys.path if path)
    with HubServer(tmp_path / "hub") as hub:
        env = client_environment(hub, tmp_path / "home", HF_TOKEN=TOKEN, PYTHONPATH=paths)
        found = finish(start(ADAPTER, env=env, cwd=tmp_path))
    assert found.pop("effect of the rows") > 1e-2
    assert len(found) == 5
    assert max(found.values()) < 1e-5, found
