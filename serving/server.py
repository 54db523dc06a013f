"""transformers' own server, with the models of this package, and those that come with code of their own, known to it.

`transformers serve` looks the class of a model up by its name among those of transformers, which have no memory, and hands on
no option of ours. Here the process that serves puts what loads such a model there; routes, batching and streams are its own.
"""

import logging
import socket
from collections.abc import Sequence
from typing import Any

import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
from transformers.utils.import_utils import is_serve_available

from ..configuration_engram import EngramConfig
from ..multimodal_engram import EngramForConditionalGeneration
from ..safetensors_engram import EngramError

logger = logging.getLogger(f"transformers.{__name__}")


def serve(
    name: str,
    *,
    host: str = "localhost",
    port: int = 8000,
    residency: str = "auto",
    continuous_batching: bool = False,
    trust_remote_code: bool = False,
    options: Sequence[str] = (),
) -> None:
    """Serve one model by an OpenAI-compatible API until the process is told to stop.

    Args:
        name: folder or Hub id; requests have to give the same name, or none.
        host, port: where to listen.
        residency: where the memory's tables live, see `EngramForCausalLM.from_pretrained`.
        continuous_batching: run requests together, in paged blocks, instead of one after another.
        trust_remote_code: run code from the model's folder.
        options: further arguments of `transformers serve`, as on its command line.

    Raises:
        ValueError: what the server needs is not installed; the model has no tokenizer, or no memory to have a `residency`, or its
            backbone cannot be batched continuously.
        OSError: the port cannot be listened on, or there is no such model.
    """
    if not is_serve_available():
        raise EngramError("`engram serve` starts transformers' server; install it: pip install 'engram-hf[serving]'.")
    require_free_port(host, port)
    prepare(name, residency, continuous_batching, trust_remote_code)

    from transformers.cli.transformers import app

    flags = {"--continuous-batching": continuous_batching, "--trust-remote-code": trust_remote_code}
    arguments = [
        "serve",
        name,
        "--host",
        host,
        "--port",
        str(port),
        *(flag for flag, is_set in flags.items() if is_set),
    ]
    app([*arguments, *options], prog_name="engram")


def prepare(name: str, residency: str, continuous_batching: bool, trust_remote_code: bool = False) -> None:
    """Check a model before it is loaded, and let the server of this process find what loads it.

    Args:
        name, residency, continuous_batching, trust_remote_code: as in [`serve`].

    Raises:
        ValueError: the model has no tokenizer, or no memory to have a `residency`.
        OSError: there is no such model.
    """
    config = AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)
    if residency != "auto" and not isinstance(config, EngramConfig):
        raise EngramError(f"{name} has no memory whose residency could be {residency}; leave --residency out.")
    _check_tokenizer(name, trust_remote_code)
    _make_known(config, residency, continuous_batching)


def require_free_port(host: str, port: int) -> None:
    """Refuse a port that cannot be listened on, which the server itself finds out after the model is loaded.

    Raises:
        OSError: it is in use, or not allowed; or there is no such host.
    """
    try:
        for family, kind, protocol, _, address in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM):
            with socket.socket(family, kind, protocol) as tried:
                tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                tried.bind(address)
    except OSError as error:
        reason = error.strerror or str(error)
        raise OSError(f"Cannot listen on port {port} of {host}: {reason}; give another --port or --host.") from error


def _check_tokenizer(name: str, trust_remote_code: bool) -> None:
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)
    except Exception as error:  # of many kinds, according to which file is missing or damaged
        raise EngramError(
            f"{name} has no tokenizer that can be loaded ({type(error).__name__}: {error}); save one there with its "
            "save_pretrained, since requests are texts."
        ) from error
    if tokenizer.chat_template is None:
        logger.warning(
            "%s has no chat template: of the API, only /v1/completions answers; save one with the tokenizer.", name
        )


def _make_known(config: PreTrainedConfig, residency: str, continuous_batching: bool) -> None:
    """Let the server find what loads a model of this config, if its class is not one of transformers."""
    architecture = (config.architectures or [None])[0]
    if architecture is None or hasattr(transformers, architecture):
        return
    auto_class = AutoModelForImageTextToText if _reads_images(config, architecture) else AutoModelForCausalLM
    options = {"engram_residency": residency} if isinstance(config, EngramConfig) else {}
    setattr(transformers, architecture, Loader(auto_class, continuous_batching, options))
    if auto_class is AutoModelForImageTextToText:  # by which it tells that requests may have images
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.setdefault(config.model_type, architecture)


def _reads_images(config: PreTrainedConfig, architecture: str) -> bool:
    others = getattr(config, "auto_map", None) or {}
    if isinstance(config, EngramConfig) or not others:
        return architecture == EngramForConditionalGeneration.__name__
    return AutoModelForCausalLM.__name__ not in others


class Loader:
    """Stands for a class in the namespace of transformers, where the server calls its `from_pretrained`.

    Args:
        auto_class: the Auto class that knows the model, or finds its code.
        continuous_batching: refuse a model that cannot be batched, which the server would tell with the first request.
        options: what `from_pretrained` is given besides.
    """

    def __init__(self, auto_class: type, continuous_batching: bool, options: dict[str, Any]):
        self.auto_class, self.continuous_batching, self.options = auto_class, continuous_batching, options

    def from_pretrained(self, name: str, **kwargs):
        """The model; arguments are those of the server, which are those of `PreTrainedModel.from_pretrained`."""
        model = self.auto_class.from_pretrained(name, **kwargs, **self.options)
        if self.continuous_batching:
            model.init_continuous_batching()
        return model
