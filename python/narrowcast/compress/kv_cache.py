"""An INT8 key/value cache: the caches' inputs change dtype and get a scale per token and head."""

from __future__ import annotations

import torch

from narrowcast.errors import ArgumentError
from narrowcast.graph import Graph

ops = torch.ops.narrowcast


def quantize_kv_cache(graph: Graph) -> int:
    """In place. Layer i's inputs become k_cache_i, v_cache_i, k_scale_i, v_scale_i. Returns the layers."""
    scales = {}
    caches = graph.inputs[3:]
    if not caches or len(caches) % 2:
        raise ArgumentError("kv_cache must be float: this graph has no key/value cache inputs")
    for index in range(len(caches) // 2):
        after = caches[2 * index + 1]
        for cache, name in zip(caches[2 * index : 2 * index + 2], (f"k_scale_{index}", f"v_scale_{index}")):
            with graph.fx.inserting_after(after):
                scale = graph.fx.placeholder(name)
            val = cache.meta.get("val")
            if val is not None:
                cache.meta["val"] = val.new_empty(val.shape, dtype=torch.int8)
                scale.meta["val"] = val.new_empty(val.shape[:-1], dtype=torch.float32)
            else:  # read from a plan
                cache.meta["dtype"], scale.meta["dtype"] = torch.int8, torch.float32
                scale.meta["shape"] = list(cache.meta["shape"])[:-1]
            scales[cache] = scale
            after = scale
    for node in graph.calls(ops.kv_append.default):
        k, v = node.args[0], node.args[1]
        args = list(node.args) + [None] * (7 - len(node.args))
        args[5], args[6] = scales[k], scales[v]
        node.args = tuple(args)
    for node in graph.calls(ops.attention_decode.default):
        k, v = node.args[1], node.args[2]
        args = list(node.args) + [None] * (6 - len(node.args))
        args[4], args[5] = scales[k], scales[v]
        node.args = tuple(args)
    return len(caches) // 2
