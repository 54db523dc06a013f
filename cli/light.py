"""Let commands that run no model read modules of `engram_hf` without running its `__init__`, which imports torch and
transformers.
"""

import importlib.util
import sys
from types import ModuleType
from typing import Any


class _Package(ModuleType):
    """The module `engram_hf` before its `__init__` has run; the first use of one of the package's own names runs it."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # The import system reads such names; a package has all that it needs already.
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        self.__class__ = ModuleType
        self.__spec__.loader.exec_module(self)
        return getattr(self, name)


def postpone_package(name: str = "engram_hf") -> None:
    """Let `import engram_hf.safetensors_engram` import that module alone, in this process, from now on.

    Nothing is registered with transformers and PEFT until a public name is imported, as in `from engram_hf import EngramConfig`.
    Therefore, only the process of a command may call this, and no function that other code can call: other code expects
    that `import engram_hf` registers everything.
    """
    spec = importlib.util.find_spec(name)
    if name in sys.modules or spec is None:
        return
    package = importlib.util.module_from_spec(spec)
    package.__class__ = _Package
    sys.modules[name] = package
