"""transformers' own server, extended by loaders for the models of this package and for models with remote code.

`transformers serve` finds the class of a model by its name in the namespace of transformers, and has no option for the
residency of tables. The serving process therefore registers a loader under that name; routes, batching and streams
remain transformers' own.
"""

import functools
import logging
import socket
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import transformers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    ContinuousBatchingConfig,
    GenerationConfig,
    GenerationMixin,
    PreTrainedConfig,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
from transformers.utils import is_serve_available

from ..configuration_engram import EngramConfig
from ..multimodal_engram import EngramForConditionalGeneration
from ..safetensors_engram import EngramError
from .admission import RefusedRequestError

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
    """Serve one model by an OpenAI-compatible API until the process is stopped.

    Args:
        name: a folder or Hub id, with `id@revision` for another revision than `main`; requests must give the same
            name, or none.
        host, port: the address to listen on.
        residency: where the memory's tables are kept, see `EngramForCausalLM.from_pretrained`.
        continuous_batching: run requests together, in paged blocks, instead of one after another.
        trust_remote_code: run code from the model's folder.
        options: further arguments of `transformers serve`, as on its command line.

    Raises:
        ValueError: a package of the server is not installed; the model has no tokenizer, or one with more token ids
            than embeddings; it has no memory, but a `residency` is given; it cannot be batched continuously.
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
    """Check a model before it is loaded, and register its loader for the server of this process.

    Args:
        name, residency, continuous_batching, trust_remote_code: as in [`serve`].

    Raises:
        ValueError: the model has no tokenizer, or one with more token ids than embeddings; it has no memory, but a
            `residency` is given; it reads images, which the server does not batch continuously.
        OSError: there is no such model.
    """
    source = _find(name, trust_remote_code)
    config = AutoConfig.from_pretrained(**source)
    if residency != "auto" and not isinstance(config, EngramConfig):
        raise EngramError(f"{name} has no memory whose residency could be {residency}; leave --residency out.")
    _check_tokenizer(name, source, config)
    architecture = (config.architectures or [None])[0]
    if architecture is None or _is_of_transformers(architecture):
        return
    reads_images = _reads_images(config, architecture)
    if reads_images and continuous_batching:
        raise EngramError(
            f"{name} reads images, and the server batches only models of text continuously; leave --continuous-batching out."
        )
    auto_class = AutoModelForImageTextToText if reads_images else AutoModelForCausalLM
    options = {"engram_residency": residency} if isinstance(config, EngramConfig) else {}
    setattr(transformers, architecture, Loader(auto_class, continuous_batching, options))
    if reads_images:  # The server looks here for models whose requests may have images.
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.setdefault(config.model_type, architecture)


def require_free_port(host: str, port: int) -> None:
    """Refuse a port that cannot be listened on; the server itself would fail only after loading the model.

    Raises:
        OSError: it is in use, or not allowed; or there is no such host.
    """
    try:
        for family, kind, protocol, _, address in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM):
            with socket.socket(family, kind, protocol) as tried:
                tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                tried.bind(address)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise OSError(
            f"The server cannot listen on port {port} of {host} ({reason}); give another --port or --host."
        ) from error


def require_batchable(model: GenerationMixin, name: str) -> None:
    """Refuse a model that cannot be batched continuously; the server would fail only at the first request.

    This depends on the layers, the caches and the attention of its backbone, so one short request is tried.

    Raises:
        ValueError: the request failed; the message names the model and the reason.
    """
    generation = GenerationConfig(max_new_tokens=2, do_sample=False, eos_token_id=-1)
    small = ContinuousBatchingConfig(num_blocks=8, max_batch_tokens=64)
    try:
        outputs = model.generate_batch([[0, 0]], generation_config=generation, continuous_batching_config=small)
        problem = next((output.error for output in outputs.values()), "it gave no answer to a trial request")
    except Exception as error:  # The model's own code may raise any error.
        problem = str(error) or type(error).__name__
    if problem is not None:
        raise EngramError(f"{name} cannot be batched continuously ({problem}); leave --continuous-batching out.")


def _find(name: str, trust_remote_code: bool) -> dict[str, Any]:
    """Return the arguments of `from_pretrained` for a name as the server reads it."""
    folder_or_id, _, revision = (name, "", "") if Path(name).exists() else name.partition("@")
    source = {"pretrained_model_name_or_path": folder_or_id, "trust_remote_code": trust_remote_code}
    return source | ({"revision": revision} if revision else {})


def _check_tokenizer(name: str, source: dict[str, Any], config: PreTrainedConfig) -> None:
    try:
        tokenizer = AutoTokenizer.from_pretrained(**source)
    except Exception as error:  # The type depends on which file is missing or damaged.
        raise EngramError(
            f"{name} has no tokenizer that can be loaded ({type(error).__name__}: {error}); save one there with its "
            "save_pretrained, since requests are texts."
        ) from error
    if tokenizer.chat_template is None:
        logger.warning(
            "%s has no chat template: of the API, only /v1/completions answers; save one with the tokenizer.", name
        )
    largest = max(tokenizer.get_vocab().values(), default=0)
    if isinstance(config, EngramConfig) and largest >= (embedded := config.get_text_config().vocab_size):
        raise EngramError(
            f"The tokenizer of {name} has token ids up to {largest}, but the model embeds {embedded}: requests would fail. "
            "Call model.resize_token_embeddings(len(tokenizer)) and save the model again."
        )


def _is_of_transformers(architecture: str) -> bool:
    found = getattr(transformers, architecture, None)
    return found is not None and not isinstance(found, Loader)


def _reads_images(config: PreTrainedConfig, architecture: str) -> bool:
    others = getattr(config, "auto_map", None) or {}
    if isinstance(config, EngramConfig) or not others:
        return architecture == EngramForConditionalGeneration.__name__
    return AutoModelForCausalLM.__name__ not in others


class Loader:
    """Replaces a class in the namespace of transformers, where the server calls its `from_pretrained`.

    Args:
        auto_class: the Auto class that knows the model, or finds its code.
        continuous_batching: refuse a model that cannot be batched.
        options: further arguments of `from_pretrained`.
    """

    def __init__(self, auto_class: Any, continuous_batching: bool, options: dict[str, Any]):
        self.auto_class, self.continuous_batching, self.options = auto_class, continuous_batching, options

    def from_pretrained(self, name: str, **kwargs):
        """Load the model, with the server's arguments of `PreTrainedModel.from_pretrained`.

        Raises:
            ValueError: continuous batching is requested, but the model cannot be batched.
        """
        model = self.auto_class.from_pretrained(name, **kwargs, **self.options)
        if self.continuous_batching:
            require_batchable(model, name)
            model.init_continuous_batching = functools.partial(_init_with_statuses, model.init_continuous_batching)
        return model


def _init_with_statuses(init_continuous_batching: Callable, *args, **kwargs):
    """Return a manager whose refusal of a request is answered with status 400 and the reason, not as a fault of the
    server.
    """
    from fastapi import HTTPException

    manager = init_continuous_batching(*args, **kwargs)
    add_request = manager.add_request

    @functools.wraps(add_request)
    def add_or_answer(*args, **kwargs):
        try:
            return add_request(*args, **kwargs)
        except RefusedRequestError as error:
            raise HTTPException(status_code=400, detail=str(error)) from error

    manager.add_request = add_or_answer
    return manager
