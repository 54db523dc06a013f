"""engram-hf: DeepSeek's Engram memory for any Hugging Face language model."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer

from . import auto_deepseek_v41 as auto_deepseek_v41
from .card_engram import write_model_card
from .configuration_engram import EngramConfig
from .convert_scripts import direct_loading
from .hashing_engram import register_compression
from .modeling_engram import EngramForCausalLM, EngramModel, EngramPreTrainedModel
from .tokenization import EngramTokenizer
from .training import peft_defaults

__version__ = "0.1.0"
__all__ = ["EngramConfig", "EngramForCausalLM", "EngramModel", "EngramTokenizer"]

AutoConfig.register(EngramConfig.model_type, EngramConfig)
AutoModel.register(EngramConfig, EngramModel)
AutoModelForCausalLM.register(EngramConfig, EngramForCausalLM)
AutoTokenizer.register(EngramConfig, fast_tokenizer_class=EngramTokenizer)
direct_loading.register()
peft_defaults.register()
# What the code beside a model's weights does without: it comes from here while the package is installed.
EngramPreTrainedModel.write_model_card = staticmethod(write_model_card)
register_compression(EngramTokenizer.from_tokenizer)
