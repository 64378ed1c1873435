"""llama.cpp's own sampler, set up as ``SamplingParams`` documents it."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from minicpm_edge.engines.llama_cpp.library import llama
from minicpm_edge.engines.sampling_params import SamplingParams


@contextmanager
def sampler_chain(params: SamplingParams) -> Iterator[Any]:
    """A ``llama_sampler`` chain for one request: top-k, top-p, min-p, temperature, then one seeded draw."""
    chain: Any = llama.llama_sampler_chain_init(llama.llama_sampler_chain_default_params())
    try:
        if params.temperature == 0:
            stages = [llama.llama_sampler_init_greedy()]
        else:
            seed = secrets.randbits(32) if params.seed is None else params.seed
            stages = [
                llama.llama_sampler_init_top_k(params.top_k),
                llama.llama_sampler_init_top_p(params.top_p, 1),
                llama.llama_sampler_init_min_p(params.min_p, 1),
                llama.llama_sampler_init_temp(params.temperature),
                # The one 32-bit value left out is LLAMA_DEFAULT_SEED, for which llama.cpp draws a seed of its own.
                llama.llama_sampler_init_dist(seed % llama.LLAMA_DEFAULT_SEED),
            ]
        for stage in stages:
            llama.llama_sampler_chain_add(chain, stage)
        yield chain
    finally:
        llama.llama_sampler_free(chain)
