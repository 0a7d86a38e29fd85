"""A narrower key/value cache: the caches' inputs change dtype, and each gets an input for its scales.

int8: codes [B, Hkv, C, D] and a float32 scale per token and head. int4: two codes a byte [B, Hkv, C, D / 2] of rows
rotated by a Hadamard matrix, and bfloat16 grids [B, Hkv, C, D / 16]. The rotation is part of the ops, which apply it to
queries and to sums over values as well: weights stay as they are, quantised or not, and keys can only be turned behind
their rope. What all keys of a head have in common is taken away before they are rounded; no softmax sees it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from narrowcast.errors import ArgumentError, UnsupportedError
from narrowcast.graph import Graph

ops = torch.ops.narrowcast

KINDS = ("float", "int8", "int4")
#: Head sizes that a cache of 4 bits takes; tokens of a text whose keys are no measure: attention rests on them.
SIZES_INT4, FIRST_TOKENS = (32, 64, 128, 256), 4


def quantize_kv_cache(graph: Graph, kind: str = "int8", shifts: Sequence[Tensor] = ()) -> int:
    """In place. Layer i's inputs become k_cache_i, v_cache_i, k_scale_i, v_scale_i. Returns the layers.

    kind: "int8" or "int4". shifts: for int4, from :func:`common_keys`; without, nothing is taken away.

    Raises ArgumentError for a graph without caches, UnsupportedError for a head size that 4 bits do not take.
    """
    caches = graph.inputs[3:]
    if not caches or len(caches) % 2:
        raise ArgumentError("kv_cache must be float: this graph has no key/value cache inputs")
    depth = int(_shape(caches[0])[-1])
    if kind == "int4" and depth not in SIZES_INT4:
        raise UnsupportedError(
            f"kv_cache must be float or int8 for heads of {depth}: int4 takes {SIZES_INT4}"
        )
    scales = {}
    for index in range(len(caches) // 2):
        after = caches[2 * index + 1]
        for cache, name in zip(caches[2 * index : 2 * index + 2], (f"k_scale_{index}", f"v_scale_{index}")):
            with graph.fx.inserting_after(after):
                scale = graph.fx.placeholder(name)
            shape = list(_shape(cache))
            wide, dtype, grid, grid_dtype = shape, torch.int8, shape[:-1], torch.float32
            if kind == "int4":
                wide, dtype = [*shape[:-1], depth // 2], torch.uint8
                grid, grid_dtype = [*shape[:-1], depth // 16], torch.bfloat16
            for node, sizes, kept in ((cache, wide, dtype), (scale, grid, grid_dtype)):
                val = cache.meta.get("val")
                if val is not None:
                    node.meta["val"] = val.new_empty(sizes, dtype=kept)
                else:  # read from a plan
                    node.meta["dtype"], node.meta["shape"] = kept, sizes
            scales[cache] = scale
            after = scale
    for index, node in enumerate(graph.calls(ops.kv_append.default)):
        k, v = node.args[0], node.args[1]
        args = list(node.args) + [None] * (7 - len(node.args))
        args[5], args[6] = scales[k], scales[v]
        node.args = tuple(args)
        if shifts:
            shift = graph.add_weight(f"k_shift_{index}", shifts[caches.index(k) // 2], before=node)
            node.kwargs = {**node.kwargs, "k_shift": shift}
    for node in graph.calls(ops.attention_decode.default):
        k, v = node.args[1], node.args[2]
        args = list(node.args) + [None] * (6 - len(node.args))
        args[4], args[5] = scales[k], scales[v]
        node.args = tuple(args)
    return len(caches) // 2


def _shape(cache) -> Sequence:
    return cache.meta["val"].shape if "val" in cache.meta else cache.meta["shape"]


def common_keys(graph: Graph, batches: Sequence[tuple[Tensor, ...]]) -> list[Tensor]:
    """Per layer the mean [Hkv, D] of the keys that float runs of a decoder leave in their caches, float32.

    batches: a decoder's inputs, each with caches that its tokens fill. An empty list for a graph whose softmax would
    see the difference (a softcap, or sinks beside the scores).
    """
    for node in graph.calls(ops.attention_decode.default):
        names = [a.name for a in node.target._schema.arguments]
        given = dict(zip(names, node.args)) | dict(node.kwargs)
        if given.get("softcap", 0.0) or given.get("sinks") is not None:
            return []
    sums: list[Tensor] = []
    count = 0
    for batch in batches:
        inputs = [x.clone() for x in batch]
        graph.run(*inputs)
        length = inputs[0].shape[1]
        first = FIRST_TOKENS if length > 2 * FIRST_TOKENS else 0
        keys = [k[:, :, first:length].double() for k in inputs[3::2]]
        count += keys[0].shape[0] * keys[0].shape[2]
        parts = [k.sum((0, 2)) for k in keys]
        sums = [a + b for a, b in zip(sums, parts)] if sums else parts
    return [(s / count).float() for s in sums]
