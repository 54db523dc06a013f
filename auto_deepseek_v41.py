"""Where the remote code of a model on DeepSeek-V4.1's backbone begins: it brings the backbone, which transformers lacks."""

from .configuration_deepseek_v41 import DeepseekV41TextConfig
from .configuration_engram import EngramConfig, register_remote_backbone
from .modeling_deepseek_v41 import DeepseekV41TextModel
from .modeling_engram import EngramForCausalLM, EngramModel

register_remote_backbone(DeepseekV41TextConfig.model_type, __name__.rpartition(".")[2])

__all__ = ["DeepseekV41TextConfig", "DeepseekV41TextModel", "EngramConfig", "EngramForCausalLM", "EngramModel"]
