"""Systems that lack a feature of this one are simulated: a process removes the feature before it imports the package."""

import pytest
import torch
from child_processes import run_elsewhere
from tiny_backbones import build, random_ids

from engram_hf import EngramForCausalLM

LOADING = """
import json, mmap, os, sys
import peft, torch  # others tell systems apart by other means
from transformers import PreTrainedModel
for name in {modules}:
    sys.modules[name] = None
for name in {names}:
    for module in (mmap, os):
        if hasattr(module, name):
            delattr(module, name)
if hasattr(os, "sysconf"):
    ask, known = os.sysconf, {{key: number for key, number in os.sysconf_names.items() if key != "SC_AVPHYS_PAGES"}}
    os.sysconf_names, os.sysconf = known, lambda name: ask(known[name])
from engram_hf import EngramForCausalLM
from engram_hf.table_format_engram import free_host_memory
rows = {{}}
for residency in ("auto", "resident", "mapped"):
    model = EngramForCausalLM.from_pretrained({folder!r}, engram_residency=residency)
    if model.model.prefetcher is not None:
        model.model.prefetcher.when = "always"
    rows[residency] = model(torch.tensor({ids})).logits[0, -1].tolist()
print(json.dumps({{"rows": rows, "free": free_host_memory()}}))
"""
# macOS reports the total memory, but not the free memory.
NOT_POSIX = ["posix_fadvise", "posix_fallocate", "copy_file_range"]
NOT_UNIX = ["preadv", "pread", "pwrite", "sysconf", "sysconf_names", "MADV_RANDOM", "O_NONBLOCK"]
SYSTEMS = {"macos": ([], NOT_POSIX), "windows": (["fcntl", "resource"], [*NOT_POSIX, *NOT_UNIX])}


@pytest.mark.slow
@pytest.mark.parametrize("system", SYSTEMS)
def test_tables_load_in_every_residency(system, tmp_path):
    build("llama").save_pretrained(tmp_path / "plain")
    model = EngramForCausalLM.from_pretrained(tmp_path / "plain", engram_residency="mapped")
    model.save_pretrained(tmp_path / "mapped")
    modules, names = SYSTEMS[system]
    ids = random_ids(1, 7)
    code = LOADING.format(modules=modules, names=names, folder=str(tmp_path / "mapped"), ids=ids.tolist())
    found = run_elsewhere(code, tmp_path)
    expected = model(ids).logits[0, -1]
    for logits in found["rows"].values():
        torch.testing.assert_close(torch.tensor(logits), expected)
    assert found["free"] > 1 << 20
