"""Give PEFT the backbone's config for a model with memory: PEFT looks up defaults by its type, and reads ties and
sizes from it.
"""

from typing import Any

from peft.tuners.tuners_utils import BaseTuner
from torch import nn

from ..configuration_engram import EngramConfig

_get_model_config = BaseTuner.get_model_config


def _get_backbone_config(model: nn.Module) -> dict[str, Any]:
    """Return the config that PEFT reads for `model`: for a model with memory, its backbone's."""
    config = getattr(model, "config", None)
    return config.backbone.to_dict() if isinstance(config, EngramConfig) else _get_model_config(model)


def register() -> None:
    """Let PEFT choose target modules for a model with memory as for its bare backbone (`LoraConfig()` without
    targets).
    """
    BaseTuner.get_model_config = staticmethod(_get_backbone_config)
