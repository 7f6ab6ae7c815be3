"""Methods of ``generate`` that a bound model has of its own. All of it reversible.

Each function stands in for the method of the same name. A copied model keeps them; a pickled one has the class's own again.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from transformers import PreTrainedModel
from transformers.generation import CompileConfig

from . import versions
from .weak_method import Override

if TYPE_CHECKING:
    from transformers.generation.candidate_generator import CandidateGenerator


def override(model: PreTrainedModel) -> None:
    """Gives ``model`` the methods of this file, unless it has others of its own. Doing it again changes nothing."""
    for method in _METHODS:
        name = method.__name__
        if name not in model.__dict__ or _is_of_class(model, name):
            model.__dict__[name] = Override(method, model)


def restore(model: PreTrainedModel) -> None:
    """Undoes `override`."""
    for method in _METHODS:
        name = method.__name__
        own = getattr(model.__dict__.get(name), "function", None)
        if own is method or _is_of_class(model, name):
            model.__dict__.pop(name, None)


def _is_of_class(model: PreTrainedModel, name: str) -> bool:
    """Whether the attribute ``name`` of ``model`` is the method of its class, as it is after unpickling."""
    own = getattr(model.__dict__.get(name), "__func__", None)
    return own is not None and own is getattr(type(model), name, None)


def generate(self: PreTrainedModel, *args, **kwargs):
    """``generate`` of transformers before 5.24, which takes ``cache``, too."""
    cache = kwargs.pop("cache", None)
    if cache is not None and kwargs.get("past_key_values") is not None:
        raise ValueError("both cache and past_key_values were given, which are two names of one argument: leave one out")
    if cache is not None:
        kwargs["past_key_values"] = cache
    return type(self).generate(self, *args, **kwargs)


def _valid_auto_compile_criteria(self: PreTrainedModel, model_kwargs: dict, generation_config) -> bool:
    """Whether ``generate`` compiles decode steps: for a cache that asks for it on every device, not on a GPU alone."""
    own, cache = type(self)._valid_auto_compile_criteria, model_kwargs.get(versions.CACHE_ARGUMENT)
    if not hasattr(cache, "expect_length") or not cache.is_compileable:
        return own(self, model_kwargs, generation_config)
    asked = copy.copy(generation_config)
    asked.compile_config = copy.copy(asked.compile_config or CompileConfig())
    asked.compile_config._compile_all_devices = True
    valid = own(self, model_kwargs, asked)
    if valid:
        cache.expect_length(generation_config.max_length)
    return valid


def get_compiled_call(self: PreTrainedModel, compile_config) -> Callable:
    """The compiled call, which a cache may run or not."""
    return partial(_call, self, type(self).get_compiled_call(self, compile_config))


def _call(model: PreTrainedModel, compiled: Callable, *args, **kwargs):
    run = getattr(kwargs.get(versions.CACHE_ARGUMENT), "run_step", None)
    return compiled(*args, **kwargs) if run is None or args else run(model, compiled, kwargs)


def _get_candidate_generator(self: PreTrainedModel, *args, **kwargs) -> CandidateGenerator:
    """The drafts of assisted decoding, from the second forward on where a cache takes none along with its prompt."""
    candidates = type(self)._get_candidate_generator(self, *args, **kwargs)
    cache = (kwargs.get("model_kwargs") or {}).get(versions.CACHE_ARGUMENT)
    # Those that draft from the model's own outputs have none before the first forward anyway.
    if getattr(cache, "reads_prompt_alone", False) and not getattr(candidates, "requires_model_outputs", False):
        _skip_first_draft(candidates)
    return candidates


def _skip_first_draft(candidates: CandidateGenerator) -> None:
    """Makes a new candidate generator answer its first call with no draft, as prompt lookup does where it finds none."""
    draft = candidates.get_candidates

    def get_candidates(input_ids, *args, **kwargs):
        del candidates.get_candidates
        # Drafted all the same: an assistant model reads its prompt here, and goes on from it.
        draft(input_ids, *args, **kwargs)
        return input_ids, None

    candidates.get_candidates = get_candidates


_METHODS: list[Callable] = [_get_candidate_generator, _valid_auto_compile_criteria, get_compiled_call]
if versions.CACHE_ARGUMENT != "cache":
    _METHODS.append(generate)
