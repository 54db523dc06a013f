"""Admission of requests to continuous batching: one that cannot be run is refused when it is added.

transformers notices it while generating, where the error ends the batching of all requests.
"""

import time
from contextvars import ContextVar
from typing import Any

from transformers import GenerationMixin
from transformers.generation.continuous_batching import ContinuousBatchingManager, PagedAttentionCache

from ..layer_engram import within
from ..safetensors_engram import EngramError


class RefusedRequestError(EngramError):
    """A request that would end the batching of all others."""


# `generate_batch` of this thread has refused these: transformers logs an error that adding a request raises, and
# continues.
_REFUSALS: ContextVar[list[RefusedRequestError] | None] = ContextVar("refused requests", default=None)
# transformers' `add_requests` calls `add_request` with requests that were checked together before.
_ARE_CHECKED: ContextVar[bool] = ContextVar("requests are checked", default=False)


def check_requests(manager: ContinuousBatchingManager, vocab_size: int) -> ContinuousBatchingManager:
    """Make a manager raise [`RefusedRequestError`] from `add_request`, and from `add_requests` before it adds any.

    It refuses requests without tokens, with token ids outside `0..vocab_size - 1`, and those that the whole cache
    could not store. The cache is made when the manager starts; the length of a request that is added before is not
    checked.
    """
    if "add_request" in vars(manager):
        return manager  # It belongs to an earlier session, which transformers kept.
    add_request, add_requests = manager.add_request, manager.add_requests

    def require(input_ids: list[int], max_new_tokens: int | None) -> None:
        try:
            _require_known_ids(input_ids, vocab_size)
            cache = _running_cache(manager)
            count = manager.generation_config.max_new_tokens if max_new_tokens is None else max_new_tokens
            if cache is not None and count is not None:
                _require_room(cache, len(input_ids), count)
        except RefusedRequestError as error:
            if (refusals := _REFUSALS.get()) is not None:
                refusals.append(error)
            raise

    def add_checked_request(
        input_ids: list[int], request_id: str | None = None, max_new_tokens: int | None = None, **options: Any
    ) -> str | None:
        if not _ARE_CHECKED.get():
            require(input_ids, max_new_tokens)
        return add_request(input_ids, request_id, max_new_tokens, **options)

    def add_checked_requests(inputs: list[list[int]], max_new_tokens: int | None = None, **options: Any) -> list[str]:
        for input_ids in inputs:
            require(input_ids, max_new_tokens)
        with within(_ARE_CHECKED, True):
            return add_requests(inputs, max_new_tokens, **options)

    vars(manager).update(add_request=add_checked_request, add_requests=add_checked_requests)
    return manager


def generate_batch(model: GenerationMixin, inputs: list[list[int]], *args: Any, **options: Any) -> dict:
    """Do as `GenerationMixin.generate_batch`.

    Raises:
        ValueError: a request cannot be run; then none was.
    """
    refusals: list[RefusedRequestError] = []
    with within(_REFUSALS, refusals):
        outputs = GenerationMixin.generate_batch(model, inputs, *args, **options)
    if refusals:
        raise refusals[0]
    return outputs


def _require_known_ids(input_ids: list[int], vocab_size: int) -> None:
    if len(input_ids) == 0:
        raise RefusedRequestError("A request has no tokens; give at least one, such as the one that begins a text.")
    smallest, largest = min(input_ids), max(input_ids)
    if smallest < 0 or largest >= vocab_size:
        raise RefusedRequestError(
            f"A request has token ids from {smallest} to {largest}, but the model knows 0 to {vocab_size - 1}; encode it with the "
            "model's own tokenizer."
        )


def _running_cache(manager: ContinuousBatchingManager) -> PagedAttentionCache | None:
    """Return the cache of a manager, which its thread makes soon after its start; None if it does not run."""
    while manager.batch_processor is None and manager.is_running():
        time.sleep(0.005)
    return getattr(manager.batch_processor, "cache", None)


def _require_room(cache: PagedAttentionCache, prompt_tokens: int, new_tokens: int) -> None:
    longest = prompt_tokens + new_tokens - 1  # Keys of the last new token are never read.
    if _sectors_of(cache, longest) <= cache.num_sectors:
        return
    raise RefusedRequestError(
        f"A request of {prompt_tokens} tokens and up to {new_tokens} new ones is longer than the whole cache of continuous batching, "
        f"which holds {_longest_that_fits(cache, longest)}; shorten it, ask for fewer new tokens, or give the cache more blocks "
        "(num_blocks of ContinuousBatchingConfig, --cb-num-blocks of engram serve)."
    )


def _sectors_of(cache: PagedAttentionCache, length: int) -> int:
    """Return how many of the cache's sectors, its unit of allocation, a request of `length` tokens needs when it is
    alone.
    """
    total = 0
    for allocator in cache.cache_allocators.values():
        blocks = allocator.needs_new_blocks("", 0, length)
        total += -(-blocks // allocator.blocks_per_sector)
    return total


def _longest_that_fits(cache: PagedAttentionCache, too_long: int) -> int:
    fits = 0
    while too_long - fits > 1:
        middle = (fits + too_long) // 2
        if _sectors_of(cache, middle) <= cache.num_sectors:
            fits = middle
        else:
            too_long = middle
    return fits
