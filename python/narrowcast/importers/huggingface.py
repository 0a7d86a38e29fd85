"""Hugging Face models: decoders of the Llama family and encoders of the BERT family.

They enter through the library's own doors: an attention function registered under a name, a cache object, and
the rotary embedding as a module. Nothing in a model's attention source is matched or rewritten.
"""

from __future__ import annotations

import inspect
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from narrowcast.errors import ArgumentError, Error, FormatError, UnsupportedError

from . import quantized
from .llama import MAX_LAYERS, check_positions, export_decoder
from .model import Model, describe_shards
from .torch_module import export

ops = torch.ops.narrowcast

DECODERS = ("llama", "mistral", "qwen2", "qwen3")
ENCODERS = ("bert", "roberta", "xlm-roberta", "distilbert")
POOLINGS = ("mean", "cls", "none")
_ROPE_TYPES = ("default", "linear", "llama3", "yarn")
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_MAX_JSON = 64 << 20
_NAME = "narrowcast"


@dataclass
class _Step:
    """What the doors need to know of the call being traced."""

    start: Tensor
    lengths: Tensor
    cos: Tensor
    sin: Tensor
    caches: tuple[Tensor, ...]


_step: ContextVar[_Step | None] = ContextVar("narrowcast_step", default=None)


class _Cache:
    """Keys are rotated as they are appended; what comes back is the whole cache."""

    is_compileable = True

    def __init__(self, step: _Step):
        self.step = step

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0

    def update(self, key, value, layer_idx, *args, **kwargs):
        s = self.step
        k_cache, v_cache = s.caches[2 * layer_idx], s.caches[2 * layer_idx + 1]
        ops.kv_append(k_cache, v_cache, key, value, s.start, cos=s.cos, sin=s.sin)
        return k_cache, v_cache


def _attention(module, query, key, value, attention_mask, scaling=None, sliding_window=None, **kwargs):
    step = _step.get()
    if step is None:
        out = ops.attention(query, key, value, attention_mask, scaling)
    else:
        out = ops.attention_decode(
            query, key, value, step.lengths, scale=scaling, window=int(sliding_window or 0)
        )
    return out.transpose(1, 2), None


def _rotate_query(q, k, cos, sin, *args, **kwargs):
    return ops.rope(q, cos, sin, _step.get().start), k


class _Tables(nn.Module):
    """In the place of the rotary embedding: the tables themselves, rows are chosen inside the ops."""

    def __init__(self, cos: Tensor, sin: Tensor):
        super().__init__()
        self.register_buffer("cos", cos)
        self.register_buffer("sin", sin)

    def forward(self, x, position_ids=None, *args, **kwargs):
        return self.cos, self.sin


class _DecoderModule(nn.Module):
    def __init__(self, model: nn.Module, cache_argument: str):
        super().__init__()
        self.model, self.cache_argument = model, cache_argument

    def forward(self, input_ids, start, logit_rows, *caches):
        body = self.model.model
        tables = body.rotary_emb
        step = _Step(start, start + input_ids.shape[1], tables.cos, tables.sin, caches)
        token = _step.set(step)
        try:
            x = body(
                input_ids=input_ids,
                # A mask of four dimensions is passed on as it is; the length and the cache decide here.
                attention_mask=torch.zeros(1, 1, 1, 1),
                position_ids=start[:, None],
                use_cache=True,
                **{self.cache_argument: _Cache(step)},
            ).last_hidden_state
        finally:
            _step.reset(token)
        x = x.flatten(0, 1).index_select(0, logit_rows)
        return self.model.lm_head(x).float()


class _EncoderModule(nn.Module):
    def __init__(self, model: nn.Module, pooling: str, normalize: bool):
        super().__init__()
        self.model, self.pooling, self.normalize = model, pooling, normalize

    def forward(self, input_ids, attention_mask):
        dtype = next(self.model.parameters()).dtype
        bias = (1 - attention_mask[:, None, None, :]).to(dtype) * torch.finfo(dtype).min
        x = self.model(input_ids=input_ids, attention_mask=bias).last_hidden_state.float()
        if self.pooling == "mean":
            weight = attention_mask.unsqueeze(-1).float()
            x = (x * weight).sum(1) / weight.sum(1).clamp(min=1e-9)
        elif self.pooling == "cls":
            x = x[:, 0]
        return F.normalize(x, dim=-1) if self.normalize else x


def _transformers():
    try:
        import transformers
    except ImportError:
        raise UnsupportedError(
            "a Hugging Face model needs the library transformers: pip install narrowcast[hf]"
        ) from None
    return transformers


def is_pretrained(module: nn.Module) -> bool:
    """Whether a module is a model of the library, without importing it."""
    library = sys.modules.get("transformers")
    return library is not None and isinstance(module, library.PreTrainedModel)


@contextmanager
def _doors(model: nn.Module, changes: dict[tuple[Any, str], Any]) -> Iterator[None]:
    """Registers the attention function and makes ``changes`` for the time of an export."""
    _transformers().AttentionInterface.register(_NAME, _attention)
    before = [(owner, name, getattr(owner, name)) for owner, name in changes]
    implementation = model.config._attn_implementation
    try:
        model.config._attn_implementation = _NAME
        for (owner, name), value in changes.items():
            setattr(owner, name, value)
        yield
    finally:
        model.config._attn_implementation = implementation
        for owner, name, value in before:
            setattr(owner, name, value)


def from_object(
    model: nn.Module, pooling: str | None = None, normalize: bool | None = None, context: int | None = None
) -> Model:
    """Imports a model object: ``...ForCausalLM`` as a decoder, a bare encoder as an encoder.

    pooling: "mean", "cls" or "none" (the default: last_hidden_state); encoders only. normalize: to length 1,
    by default with pooling. context: positions to prepare, by default ``max_position_embeddings``.
    """
    _transformers()
    kind, dtype = model.config.model_type, next(model.parameters()).dtype
    if dtype not in _DTYPES:
        raise ArgumentError(f"model must be float32, float16 or bfloat16, got {dtype}")
    if kind in DECODERS and hasattr(model, "lm_head"):
        if pooling is not None or normalize is not None:
            raise ArgumentError("pooling and normalize belong to an encoder")
        return _decoder(model, dtype, context)
    if kind in ENCODERS and hasattr(model, "embeddings"):
        if context is not None:
            raise ArgumentError("context belongs to a decoder")
        return _encoder(model, pooling or "none", normalize)
    raise UnsupportedError(
        f"{type(model).__name__} is not supported: decoders with a head ({', '.join(DECODERS)}) and bare "
        f"encoders ({', '.join(ENCODERS)}) are; with example_inputs it enters as any torch.nn.Module"
    )


def _decoder(model: nn.Module, dtype: torch.dtype, context: int | None) -> Model:
    config, body = model.config, model.model
    rope = getattr(body.rotary_emb, "rope_type", "default")
    if rope not in _ROPE_TYPES:
        raise UnsupportedError(f"rotary scaling {rope!r} depends on the length of the text")
    limit = config.max_position_embeddings
    if type(limit) is not int or limit < 1:
        raise FormatError(f"max_position_embeddings must be a positive integer, got {limit!r}")
    if context is not None and not 1 <= context <= limit:
        raise ArgumentError(f"context must be between 1 and the model's {limit}, got {context}")
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    check_positions(context or limit, head_dim, sum(p.nbytes for p in model.parameters()))
    positions = torch.arange(context or limit)[None]
    with torch.no_grad():
        cos, sin = body.rotary_emb(torch.zeros(1, dtype=torch.float32), position_ids=positions)
    tables = _Tables(*(t[0, :, : t.shape[-1] // 2].float().contiguous() for t in (cos, sin)))
    library = sys.modules[type(body).__module__]
    _check_rotation(library.apply_rotary_pos_emb, cos, sin, tables)
    parameters = inspect.signature(body.forward).parameters
    cache_argument = "cache" if "cache" in parameters else "past_key_values"
    changes = {(library, "apply_rotary_pos_emb"): _rotate_query, (body, "rotary_emb"): tables}
    with _doors(model, changes):
        exported = export_decoder(
            _DecoderModule(model, cache_argument),
            config.num_hidden_layers,
            config.num_key_value_heads,
            head_dim,
            dtype,
        )
    return Model(exported, "decoder", _config(model, context))


def _check_rotation(theirs, cos: Tensor, sin: Tensor, tables: _Tables) -> None:
    """The library's rotation must be the one of the op: halves of a head, by these tables."""
    n = min(cos.shape[1], 8)
    x = torch.arange(n * cos.shape[-1], dtype=torch.float32).cos().view(1, 1, n, -1)
    expected = theirs(x, x, cos[:, :n].float(), sin[:, :n].float())[1]
    c, s = tables.cos[:n], tables.sin[:n]
    a, b = x.chunk(2, -1)
    if not torch.allclose(torch.cat((a * c - b * s, b * c + a * s), -1), expected, atol=1e-5):
        raise UnsupportedError("the model rotates its queries in a way that narrowcast.rope does not know")


def _encoder(model: nn.Module, pooling: str, normalize: bool | None) -> Model:
    if pooling not in POOLINGS:
        raise ArgumentError(f"pooling must be one of {', '.join(POOLINGS)}, got {pooling!r}")
    normalize = pooling != "none" if normalize is None else normalize
    dim = torch.export.Dim
    shape = {0: dim("batch", max=1 << 20), 1: dim("length", max=_positions(model))}
    ids = torch.ones(2, 7, dtype=torch.int64)
    with _doors(model, {}):
        exported = export(_EncoderModule(model, pooling, normalize), (ids, ids.clone()), (shape, shape))
    return Model(exported, "encoder", {**_config(model, None), "pooling": pooling, "normalize": normalize})


def _positions(model: nn.Module) -> int:
    config = model.config
    # RoBERTa counts its positions from behind the padding index.
    first = (config.pad_token_id or 0) + 1 if "roberta" in config.model_type else 0
    return config.max_position_embeddings - first


def _config(model: nn.Module, context: int | None) -> dict[str, Any]:
    c = model.config
    keep = {
        "architecture": c.model_type,
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        "max_position_embeddings": context or _positions(model),
        "vocab": c.vocab_size,
        "hidden": c.hidden_size,
        "layers": c.num_hidden_layers,
        "heads": c.num_attention_heads,
    }
    for name in ("eos_token_id", "bos_token_id", "pad_token_id"):
        keep[name] = getattr(c, name, None)
    return keep


def from_folder(
    path: str | Path,
    dtype: torch.dtype = torch.float32,
    pooling: str | None = None,
    normalize: bool | None = None,
    context: int | None = None,
) -> Model:
    """Imports a folder with config.json and .safetensors weights; nothing is downloaded, no code is run.

    Quantised weights of the methods in ``quantized.METHODS`` are read as they are (``Model.native``). A
    sentence-transformers folder (modules.json) brings its own pooling. Otherwise as :func:`from_object`.
    """
    path = Path(path)
    if dtype not in _DTYPES:
        raise ArgumentError(f"dtype must be float32, float16 or bfloat16, got {dtype}")
    settings = _json(path / "config.json")
    if settings is None:
        raise FormatError(f"the folder {path.name!r} has no config.json")
    if not any(path.glob("*.safetensors")):
        raise UnsupportedError(f"the folder {path.name!r} has no .safetensors weights")
    kind = settings.get("model_type")
    if kind not in DECODERS + ENCODERS:
        raise UnsupportedError(f"{kind!r} is not one of the known models {', '.join(DECODERS + ENCODERS)}")
    method = quantized.settings_of(path, settings)
    held = None if method is None else quantized.read_folder(path, method, dtype)
    model = _pretrained(path, kind, dtype, held)
    if kind in ENCODERS and pooling is None:
        pooling, found = _pooling(path)
        normalize = found if normalize is None else normalize
    result = from_object(model, pooling, normalize, context)
    if held is not None:
        result.native = _native(result, model, held)
        result.config["quant_method"] = method["quant_method"]
        result.warnings += held.warnings
    _add_texts(result, path)
    result.source = describe_shards(path, quantized.weight_files(path))
    return result


def _pretrained(path: Path, kind: str, dtype: torch.dtype, held: quantized.Weights | None) -> nn.Module:
    """The library's model; with ``held`` its weights are those, whatever the folder's own files hold."""
    library = _transformers()
    factory = library.AutoModelForCausalLM if kind in DECODERS else library.AutoModel
    options = {"local_files_only": True, "trust_remote_code": False}
    try:
        config = library.AutoConfig.from_pretrained(str(path), **options)
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        chosen = _described(factory, config, path)
        if held is None:
            return factory.from_pretrained(str(path), use_safetensors=True, dtype=dtype, **options)
        model, report = chosen.from_pretrained(
            None, config=config, state_dict=dict(held.values), output_loading_info=True, dtype=dtype
        )
    except Error:
        raise
    except Exception as error:
        raise FormatError(f"the folder {path.name!r} cannot be read: {error}") from error
    missing, astray = sorted(report["missing_keys"]), sorted(held.quantised & set(report["unexpected_keys"]))
    if missing:
        raise FormatError(f"the folder {path.name!r} lacks the weight {missing[0]!r}")
    if astray:
        raise FormatError(f"the quantised weight {astray[0]!r} of {path.name!r} has no place in the model")
    return model


def _described(factory: Any, config: Any, path: Path) -> type[nn.Module]:
    """The class of the model that config.json describes, if the files can hold that model.

    Raises FormatError before anything is made for layers or sizes that no byte of the weights stands for.
    """
    layers = getattr(config, "num_hidden_layers", None)
    if type(layers) is not int or not 1 <= layers <= MAX_LAYERS:
        raise FormatError(
            f"config.json: num_hidden_layers must be between 1 and {MAX_LAYERS}, got {layers!r}"
        )
    with torch.device("meta"):
        model = factory.from_config(config)
    parameters = sum(p.numel() for p in model.parameters())
    stored = sum(file.stat().st_size for file in quantized.weight_files(path))
    if parameters > 8 * stored:
        raise FormatError(f"config.json describes {parameters} weights, its files have {stored} bytes")
    return type(model)


def _native(result: Model, model: nn.Module, held: quantized.Weights) -> dict[str, Any]:
    """The quantised forms under the names of the exported parameters."""
    prefix = f"{model.base_model_prefix}."
    native = {}
    for name in result.exported.state_dict:
        own = name.removeprefix("model.")
        for candidate in (own, own.removeprefix(prefix), prefix + own):
            if candidate in held.native:
                native[name] = held.native[candidate]
    return native


def _json(path: Path, kind: type = dict) -> Any:
    """The object (or list) in a file, or None where there is none."""
    if not path.is_file():
        return None
    if path.stat().st_size > _MAX_JSON:
        raise FormatError(f"{path.name} is larger than {_MAX_JSON} bytes")
    try:
        value = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        raise FormatError(f"{path.name} is no JSON") from None
    if not isinstance(value, kind):
        raise FormatError(f"{path.name} must hold {'an object' if kind is dict else 'a list'}")
    return value


def _pooling(path: Path) -> tuple[str | None, bool | None]:
    modules = _json(path / "modules.json", list)
    if modules is None:
        return None, None
    kinds = [str(m.get("type", "")).rpartition(".")[2] for m in modules if isinstance(m, dict)]
    unknown = [k for k in kinds if k not in ("Transformer", "Pooling", "Normalize")]
    if unknown:
        raise UnsupportedError(f"the module {unknown[0]!r} of modules.json is not supported")
    modes = _json(path / "1_Pooling" / "config.json") or {}
    chosen = [m for m, on in modes.items() if m.startswith("pooling_mode_") and on is True]
    if modes.get("pooling_mode") in ("mean", "cls"):
        return modes["pooling_mode"], "Normalize" in kinds
    names = {"pooling_mode_mean_tokens": "mean", "pooling_mode_cls_token": "cls"}
    if "Pooling" not in kinds:
        return "none", "Normalize" in kinds
    if len(chosen) != 1 or chosen[0] not in names:
        raise UnsupportedError(f"the pooling {', '.join(chosen) or 'of an unknown kind'} is not supported")
    return names[chosen[0]], "Normalize" in kinds


def _add_texts(model: Model, path: Path) -> None:
    if (path / "tokenizer.json").is_file():
        model.assets["tokenizer.json"] = (path / "tokenizer.json").read_bytes()
    words = _json(path / "tokenizer_config.json") or {}
    template = words.get("chat_template")
    if (path / "chat_template.jinja").is_file():
        model.assets["chat_template"] = (path / "chat_template.jinja").read_bytes()
    elif isinstance(template, str):
        model.assets["chat_template"] = template.encode()
    for name in ("bos_token", "eos_token", "pad_token"):
        word = words.get(name)
        word = word.get("content") if isinstance(word, dict) else word
        if isinstance(word, str):
            model.config[name] = word
    generation = _json(path / "generation_config.json") or {}
    if generation.get("eos_token_id") is not None:
        model.config["eos_token_id"] = generation["eos_token_id"]
