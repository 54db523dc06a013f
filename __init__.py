"""engram-hf: DeepSeek's Engram memory for any Hugging Face language model."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer

from . import auto_deepseek_v41 as auto_deepseek_v41
from . import display
from .adding_engram import add_memory, config_for_backbone
from .backbone_engram import require_backbone, require_decoder
from .card_engram import write_model_card
from .claiming_engram import ClaimedFolderWriter
from .configuration_engram import EngramConfig
from .convert_scripts import direct_loading
from .hashing_engram import register_compression
from .modeling_engram import EngramForCausalLM, EngramModel, EngramPreTrainedModel
from .multimodal_engram import EngramForConditionalGeneration
from .other_models import load_with_tables
from .safetensors_engram import EngramError
from .serving.admission import generate_batch
from .serving.continuous_batching import init_continuous_batching
from .serving.lookback import read_lookback
from .tokenization import EngramTokenizer
from .tokenization.vocabulary_compression import set_refusal_class
from .training import peft_defaults, rows_peft

__version__ = "0.2.0"
__all__ = [
    "EngramConfig",
    "EngramError",
    "EngramForCausalLM",
    "EngramForConditionalGeneration",
    "EngramModel",
    "EngramTokenizer",
    "load_with_tables",
]

AutoConfig.register(EngramConfig.model_type, EngramConfig)
AutoModel.register(EngramConfig, EngramModel)
AutoModelForCausalLM.register(EngramConfig, EngramForCausalLM)
AutoModelForImageTextToText.register(EngramConfig, EngramForConditionalGeneration)
AutoTokenizer.register(EngramConfig, fast_tokenizer_class=EngramTokenizer)
direct_loading.register()
peft_defaults.register()
rows_peft.register()
display.register()
# What the code beside a model's weights does without: it comes from here while the package is installed.
EngramPreTrainedModel.write_model_card = staticmethod(write_model_card)
EngramPreTrainedModel.folder_writer = ClaimedFolderWriter
EngramConfig.for_backbone = classmethod(config_for_backbone)
EngramForCausalLM.from_backbone = classmethod(add_memory)
EngramForCausalLM.init_continuous_batching = init_continuous_batching
EngramForCausalLM.generate_batch = generate_batch
EngramModel.read_lookback = read_lookback
EngramPreTrainedModel.require_backbone = staticmethod(require_backbone)
EngramPreTrainedModel.require_decoder = staticmethod(require_decoder)
register_compression(EngramTokenizer.from_tokenizer)
set_refusal_class(EngramError)
