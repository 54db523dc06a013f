"""engram-hf: DeepSeek's Engram memory for any Hugging Face language model."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer

from . import auto_deepseek_v41 as auto_deepseek_v41
from .configuration_engram import EngramConfig
from .convert_scripts import direct_loading
from .modeling_engram import EngramForCausalLM, EngramForConditionalGeneration, EngramModel
from .tokenization import EngramTokenizer
from .training import peft_defaults

__version__ = "0.1.0"
__all__ = [
    "EngramConfig",
    "EngramForCausalLM",
    "EngramForConditionalGeneration",
    "EngramModel",
    "EngramTokenizer",
]

AutoConfig.register(EngramConfig.model_type, EngramConfig)
AutoModel.register(EngramConfig, EngramModel)
AutoModelForCausalLM.register(EngramConfig, EngramForCausalLM)
AutoModelForImageTextToText.register(EngramConfig, EngramForConditionalGeneration)
AutoTokenizer.register(EngramConfig, fast_tokenizer_class=EngramTokenizer)
direct_loading.register()
peft_defaults.register()
