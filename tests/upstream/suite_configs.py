"""Run transformers' common tests of configs on those of bare backbones and on those that add memory."""

import unittest

import awake
from transformers_tests.test_configuration_common import ConfigTester

# These are fields that saving adds, and dictionaries with numbers as keys, which JSON converts to strings.
LEFT_OUT = ("model_type", "transformers_version", "_name_or_path", "id2label")


def _common_tests() -> list[str]:
    return [name for name in dir(ConfigTester) if name.startswith(("create_and_test_", "check_"))]


def _test(method: str, make_config):
    def run(self):
        config = make_config(self.backbone)
        self.model_tester = self  # One of the tests calls `model_tester.get_config()`.
        self.get_config = lambda: make_config(self.backbone)
        fields = {key: value for key, value in config.to_dict().items() if key not in LEFT_OUT and value is not None}
        getattr(ConfigTester(self, config_class=type(config), **fields), method)()

    return run


def _test_class(kind: str, name: str, make_config) -> type:
    tests = {f"test_{method}": _test(method, make_config) for method in _common_tests()}
    return type(f"{kind}_{name}", (unittest.TestCase,), {**tests, "backbone": name, "__module__": __name__})


for _name in awake.NAMES:
    globals()[f"Bare_{_name}"] = _test_class("Bare", _name, awake.bare_config)
    globals()[f"Memory_{_name}"] = _test_class("Memory", _name, awake.memory_config)
