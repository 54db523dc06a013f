"""Draft layers loaded at their first use come from the model's own revision."""

import shutil

from child_processes import finish, start
from deepseek_v41_reference import copy_release
from hub_server import HubServer, client_environment
from safetensors import safe_open
from safetensors.torch import save_file

from engram_hf.convert_scripts import convert_deepseek_v41

DRAFT = """
import json, sys
import torch
import engram_hf
from transformers import AutoModelForCausalLM

first, last = (AutoModelForCausalLM.from_pretrained("me/v41", dtype="float32", revision=name) for name in sys.argv[1:])
prompt = torch.tensor([[0, 300, 411, 52, 633, 74, 85]])
answers = []
for model in (first, last):
    model.generate(prompt, max_new_tokens=6, use_mtp=True, do_sample=False, pad_token_id=2)
    answers.append(float(model.draft.markov_head.weight.float().abs().max()))
print(json.dumps(answers))
"""


def test_draft_layers_come_from_the_models_revision(golden, tmp_path):
    release = copy_release(golden / "deepseek_v41_tiny_vl", tmp_path / "release")
    folders = [tmp_path / "first", tmp_path / "last"]
    assert convert_deepseek_v41.main([str(release), str(folders[0]), "--dtype", "float32"]) == 0
    shutil.copytree(*folders)
    for path in folders[1].glob("model-*.safetensors"):
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if "draft.markov_head.weight" in tensors:
            tensors["draft.markov_head.weight"].zero_()
            save_file(tensors, path, metadata={"format": "pt"})
    with HubServer(tmp_path / "hub") as server:
        repository, revisions = server.create("me/v41"), []
        for folder in folders:
            files = {p.name: server.store(p.read_bytes()) for p in folder.iterdir() if p.is_file()}
            revisions.append(repository.commit("main", folder.name, files))
        env = client_environment(server, tmp_path / "home")
        first, last = finish(start(DRAFT, revisions[0], "main", env=env, cwd=tmp_path))
    assert first > 0 and last == 0
