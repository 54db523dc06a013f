"""Entry point of the remote code of a model on DeepSeek-V4.1's backbone: it imports the backbone, which transformers
lacks.
"""

from . import modeling_deepseek_v41
from .causal_lm_deepseek_v41 import DeepseekV41TextForCausalLM
from .configuration_deepseek_v41 import DeepseekV41TextConfig
from .configuration_engram import EngramConfig, register_remote_backbone
from .modeling_deepseek_v41 import DeepseekV41TextModel
from .modeling_engram import EngramForCausalLM, EngramModel
from .multimodal_deepseek_v41 import DeepseekV41ForConditionalGeneration
from .multimodal_engram import EngramForConditionalGeneration
from .processing_deepseek_v41 import DeepseekV41Processor

register_remote_backbone(DeepseekV41TextConfig.model_type, __name__.rpartition(".")[2])
# In version 0.1 the class was in that module, and programs import it from there.
setattr(modeling_deepseek_v41, DeepseekV41TextForCausalLM.__name__, DeepseekV41TextForCausalLM)

__all__ = [
    "DeepseekV41ForConditionalGeneration",
    "DeepseekV41Processor",
    "DeepseekV41TextConfig",
    "DeepseekV41TextForCausalLM",
    "DeepseekV41TextModel",
    "EngramConfig",
    "EngramForCausalLM",
    "EngramForConditionalGeneration",
    "EngramModel",
]
