"""Damage to model files, drawn by dice: to their bytes, and to what the bytes say with everything else kept whole.

Every function takes the bytes of a file and dice, and returns other bytes and what was done to them.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from random import Random
from typing import Any

import safetensors.torch
import torch

from .damage_plain import INTEGERS, Damaged, change_json, cut, dump, flip, json_file, shift
from .wholes import gguf_text

# --- safetensors --------------------------------------------------------------------------------------

_DTYPES = (
    torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int8, torch.uint8, torch.int16, torch.int32,
    torch.int64, torch.bool, torch.float8_e4m3fn,
)  # fmt: skip
_NAMES = (
    "F64",
    "F32",
    "F16",
    "BF16",
    "I64",
    "I32",
    "I16",
    "I8",
    "U8",
    "BOOL",
    "F8_E4M3",
    "F4",
    "U64",
    "C64",
    "X",
    "",
)


def _parts(data: bytes) -> tuple[list[tuple[str, Any]], bytes]:
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length], object_pairs_hook=list), data[8 + length :]


def _join(pairs: list[tuple[str, Any]], body: bytes, length: int | None = None) -> bytes:
    text = "{" + ",".join(f"{json.dumps(k)}:{dump(v)}" for k, v in pairs) + "}"
    raw = text.encode()
    raw += b" " * (-len(raw) % 8)
    length = len(raw) if length is None else length
    return (length & (1 << 64) - 1).to_bytes(8, "little") + raw + body


def safetensors_header(data: bytes, dice: Random) -> Damaged:
    """The header says something that the bytes do not bear out."""
    pairs, body = _parts(data)
    pairs = [(k, dict(v)) for k, v in pairs]
    if dice.random() < 0.1:
        length = dice.choice(INTEGERS)
        return _join(pairs, body, length), f"the header's length {length}"
    i = dice.randrange(len(pairs))
    name, entry = pairs[i]
    how = dice.choice(("left out", "twice", "dtype", "shape", "offsets", "any"))
    what = f"{name}: {how}"
    if how == "left out":
        del pairs[i]
    elif how == "twice":
        pairs.insert(dice.randrange(len(pairs)), (name, entry))
    elif how == "dtype" and "dtype" in entry:
        entry["dtype"] = dice.choice(_NAMES)
    elif how in ("shape", "offsets") and "shape" in entry:
        key = "shape" if how == "shape" else "data_offsets"
        entry[key] = list(entry[key])
        if dice.random() < 0.3 or not entry[key]:
            entry[key].append(dice.choice(INTEGERS))
        else:
            entry[key][dice.randrange(len(entry[key]))] = dice.choice(INTEGERS)
        what = f"{name}: {key} {entry[key]}"
    else:
        changed, what = change_json(entry, dice)
        pairs[i] = (name, changed)
        what = f"{name}: {what}"
    return _join(pairs, body), what


def _reshaped(t: torch.Tensor, dice: Random) -> tuple[torch.Tensor, str]:
    """A tensor of other sizes, dtype or values."""
    axis = dice.randrange(t.dim()) if t.dim() else 0
    how = dice.choice(
        (
            "dtype",
            "bytes",
            "short",
            "long",
            "turned",
            "flat",
            "deeper",
            "empty",
            "scalar",
            "zeros",
            "ones",
            "most",
            "rubbish",
        )
    )
    if how == "dtype":
        t = t.float().to(dice.choice(_DTYPES))
    elif how == "bytes" and t.dim() and t.numel():
        t = t.contiguous().flatten().view(torch.uint8)
    elif how in ("short", "long", "empty") and t.dim() and t.shape[axis]:
        keep = {"short": t.shape[axis] - 1, "long": t.shape[axis], "empty": 0}[how]
        t = t.narrow(axis, 0, keep)
        t = torch.cat((t, t.narrow(axis, 0, 1)), axis) if how == "long" else t
    elif how == "turned" and t.dim() > 1:
        t = t.transpose(0, 1)
    elif how == "flat":
        t = t.flatten()
    elif how == "deeper":
        t = t[None]
    elif how == "scalar":
        t = t.flatten()[:1].reshape(()) if t.numel() else t
    elif t.numel():
        raw = t.contiguous().clone().flatten()
        rubbish = torch.tensor(list(dice.randbytes(raw.nbytes)), dtype=torch.uint8)
        filled = {"zeros": torch.zeros_like, "ones": lambda r: torch.full_like(r, 255)}
        filled |= {"most": lambda r: torch.full_like(r, 127)}
        raw = filled.get(how, lambda r: rubbish)(raw.view(torch.uint8)).view(t.dtype)
        t = raw.reshape(t.shape)
    return t.contiguous(), how


def safetensors_content(data: bytes, dice: Random) -> Damaged:
    """A whole file whose tensors or texts are others than the format promises."""
    tensors = safetensors.torch.load(data)
    pairs, _ = _parts(data)
    metadata = dict(next((v for k, v in pairs if k == "__metadata__"), ())) or None
    if metadata and dice.random() < 0.4:
        key = dice.choice(list(metadata))
        metadata[key], what = _text(metadata[key], dice)
        what = f"metadata {key}: {what}"
        return safetensors.torch.save(tensors, {k: v for k, v in metadata.items() if v is not None}), what
    name = dice.choice([n for n in tensors if "proj" in n] if dice.random() < 0.8 else list(tensors))
    how = dice.random()
    if how < 0.1:
        del tensors[name]
        what = f"{name} left out"
    elif how < 0.2:
        other = name.rpartition(".")[0] + dice.choice(
            (".g_idx", ".weight", ".SCB", ".qweight", ".scales", ".W_q", ".x")
        )
        tensors[other] = tensors[name].clone()
        what = f"{name} again as {other}"
    elif how < 0.3:
        other = dice.choice(list(tensors))
        tensors[name], tensors[other] = tensors[other].clone(), tensors[name].clone()
        what = f"{name} and {other} exchanged"
    elif "quant_state" in name:
        state, what = change_json(json.loads(bytes(tensors[name].tolist())), dice)
        tensors[name] = torch.tensor(list(dump(state).encode()), dtype=torch.uint8)
        what = f"{name}: {what}"
    else:
        tensors[name], what = _reshaped(tensors[name], dice)
        what = f"{name}: {what}"
    return safetensors.torch.save(tensors, metadata), what


def _text(text: str, dice: Random) -> tuple[str | None, str]:
    """Another text; one that is JSON is changed as JSON."""
    try:
        document = json.loads(text)
    except ValueError:
        document = None
    if document is None or dice.random() < 0.15:
        return dice.choice((None, "", "{", "[]", "null", "x" * 300)), "replaced"
    document, what = change_json(document, dice)
    return dump(document), what


# --- GGUF ---------------------------------------------------------------------------------------------


def gguf_fields(data: bytes) -> list[tuple[int, str]]:
    """Where every count, length, type, dimension, offset and number of the header lies, with its struct letter."""
    letters = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "B", 10: "Q", 11: "q", 12: "d"}
    fields, at = [(4, "I"), (8, "Q"), (16, "Q")], 24
    tensors, keys = struct.unpack_from("<QQ", data, 8)

    def field(letter: str) -> int:
        nonlocal at
        fields.append((at, letter))
        at += struct.calcsize(f"<{letter}")
        return struct.unpack_from(f"<{letter}", data, fields[-1][0])[0]

    def text() -> None:
        nonlocal at
        count = field("Q")
        at += count

    def value(kind: int) -> None:
        if kind == 8:
            text()
        elif kind == 9:
            inner, count = field("I"), field("Q")
            for _ in range(count):
                value(inner)
        else:
            field(letters[kind])

    for _ in range(keys):
        text()
        value(field("I"))
    for _ in range(tensors):
        text()
        for _ in range(field("I")):
            field("Q")
        field("I")
        field("Q")
    return fields


def gguf_field(data: bytes, dice: Random) -> Damaged:
    fields = gguf_fields(data)
    # Most fields are the lengths of 258 tokens: those of the ends say more.
    chosen = dice.choice((fields, fields[:60], fields[-120:]))
    at, letter = dice.choice(chosen)
    size = struct.calcsize(f"<{letter}")
    if letter in "fd":
        value: Any = dice.choice((0.0, -1.0, float("nan"), float("inf"), 1e30))
        raw = struct.pack(f"<{letter}", value)
    else:
        value = dice.choice(INTEGERS) & (1 << 8 * size) - 1
        raw = value.to_bytes(size, "little")
    return data[:at] + raw + data[at + size :], f"the field at {at} ({letter}) = {value}"


def gguf_entry(data: bytes, dice: Random) -> Damaged:
    """A key or tensor under another name, so that one is missing and another has no place."""
    names = [m for m in (b"token_embd.weight", b"output_norm.weight", b"blk.0.attn_q.weight", b"blk.0.ffn_down.weight",
                         b"llama.context_length", b"llama.block_count", b"tokenizer.ggml.tokens", b"tokenizer.ggml.pre",
                         b"general.architecture") if m in data]  # fmt: skip
    name = dice.choice(names).decode()
    other = dice.choice((name[:-1] + "x", name[::-1], "blk.0.attn_k.weight", "general.alignment", "split.count",
                         "llama.expert_count", "rope_freqs.weight", "output.weight", ""))  # fmt: skip
    old, new = gguf_text(name), gguf_text(other)
    return data.replace(old, new, 1), f"{name} is called {other!r}"


# --- ONNX ---------------------------------------------------------------------------------------------


def onnx_field(data: bytes, dice: Random) -> Damaged:
    """One field of one message somewhere in the file is another, left out or doubled."""
    import onnx

    model = onnx.ModelProto.FromString(data)
    messages = []

    def walk(message, name: str) -> None:
        messages.append((message, name))
        for field, value in message.ListFields():
            if field.type == field.TYPE_MESSAGE:
                for i, inner in enumerate(value if hasattr(value, "append") else [value]):
                    walk(inner, f"{name}.{field.name}[{i}]")

    walk(model.graph if dice.random() < 0.9 else model, "model")
    message, name = dice.choice(messages)
    fields = message.ListFields() or [(f, getattr(message, f.name)) for f in message.DESCRIPTOR.fields]
    field, value = dice.choice(fields)
    what = f"{name}.{field.name}"
    try:
        if hasattr(value, "append"):
            return _repeated(model, message, field, value, dice, what)
        if dice.random() < 0.2 or field.type == field.TYPE_MESSAGE:
            message.ClearField(field.name)
            return model.SerializeToString(), f"{what} left out"
        setattr(message, field.name, _scalar(field, value, dice))
    except (ValueError, TypeError, OverflowError):
        message.ClearField(field.name)
    return model.SerializeToString(), what


def _repeated(model, message, field, value, dice: Random, what: str) -> Damaged:
    i = dice.randrange(len(value)) if len(value) else 0
    if len(value) and dice.random() < 0.35:
        del value[i]
        return model.SerializeToString(), f"{what}[{i}] left out"
    if field.type == field.TYPE_MESSAGE:
        if len(value):
            value.add().CopyFrom(value[i])
        return model.SerializeToString(), f"{what}[{i}] twice"
    new = _scalar(field, value[i] if len(value) else 0, dice)
    if len(value) and dice.random() < 0.7:
        value[i] = new
    else:
        value.append(new)
    return model.SerializeToString(), f"{what}[{i}] = {str(new)[:40]}"


def _scalar(field, value, dice: Random) -> Any:
    if field.type == field.TYPE_STRING:
        return dice.choice(("", "x", "q", "s", "z", "y", "Reshape", "Conv", "com.microsoft", "a" * 200))
    if field.type == field.TYPE_BYTES:
        return dice.choice((b"", value[:-1], value + b"\0", value * 2, b"\xff" * len(value)))
    if field.type in (field.TYPE_FLOAT, field.TYPE_DOUBLE):
        return dice.choice((0.0, -1.0, float("nan"), float("inf"), 3e38))
    numbers = [i for i in INTEGERS if -(1 << 31) <= i < 1 << 31] if "32" in str(field.cpp_type) else INTEGERS
    return dice.choice((*numbers, *range(24)))


# --- plans --------------------------------------------------------------------------------------------


def plan_document(data: bytes, dice: Random) -> Damaged:
    """A plan by an author who lies: its sums are right, its document is not."""
    pairs, body = _parts(data)
    metadata = dict(dict(pairs)["__metadata__"])
    document = json.loads(metadata["narrowcast"])
    part = dice.choice(("graph", "graph", "graph", "config", "record", "certificate", "source", ""))
    changed, what = change_json(document[part] if part else document, dice)
    document = {**document, part: changed} if part else changed
    metadata["narrowcast"] = dump(document)
    entries = [(k, metadata if k == "__metadata__" else dict(v)) for k, v in pairs]
    return _join(entries, body), f"{part}: {what}"


def plan_tensors(data: bytes, dice: Random) -> Damaged:
    """A plan whose tensors are others, with sums that agree."""
    import hashlib

    tensors = safetensors.torch.load(data)
    metadata = dict(dict(_parts(data)[0])["__metadata__"])
    name = dice.choice(list(tensors))
    if dice.random() < 0.1:
        tensors[name + "x"] = tensors.pop(name)
        what = f"{name} is called {name}x"
    else:
        tensors[name], what = _reshaped(tensors[name], dice)
        what = f"{name}: {what}"
    document = json.loads(metadata["narrowcast"])
    document["sha256"] = {
        n: hashlib.sha256(t.reshape(-1).view(torch.uint8).numpy().tobytes() if t.numel() else b"").hexdigest()
        for n, t in tensors.items()
    }
    return safetensors.torch.save(tensors, {"narrowcast": json.dumps(document)}), what


# --- the choice ---------------------------------------------------------------------------------------

_BYTES: list[Callable] = [cut, flip, shift]
#: End of a file's name -> the ways to damage it, the likelier ones several times.
WAYS: dict[str, list[Callable]] = {
    ".json": [*_BYTES, *[json_file] * 6],
    ".safetensors": [*_BYTES, *[safetensors_header] * 2, *[safetensors_content] * 5],
    ".gguf": [*_BYTES, *[gguf_field] * 6, gguf_entry],
    ".onnx": [*_BYTES, *[onnx_field] * 6],
    ".plan": [*_BYTES, safetensors_header, *[plan_document] * 4, *[plan_tensors] * 2],
}


def places(name: str, data: bytes) -> list[int]:
    """Where the parts of a file end."""
    if name.endswith(".gguf"):
        return [at for at, _ in gguf_fields(data)]
    if name.endswith((".safetensors", ".plan")):
        length = 8 + int.from_bytes(data[:8], "little")
        entries = [dict(v) for k, v in _parts(data)[0] if k != "__metadata__"]
        return [8, length, *(length + end for e in entries for end in e["data_offsets"])]
    return [8, len(data) // 2]


def damage(files: dict[str, bytes], dice: Random) -> tuple[dict[str, bytes], str]:
    """One or two of a model's files damaged. Returns the files and what was done."""
    files, done = dict(files), []
    for _ in range(dice.choice((1, 1, 1, 2))):
        name = dice.choice(list(files))
        way = dice.choice(WAYS["." + name.rpartition(".")[2]])
        try:
            if way in _BYTES:
                files[name], what = way(files[name], dice, places(name, files[name]))
            else:
                files[name], what = way(files[name], dice)
        except Exception:
            if not done:  # only what is damaged already may not be understood here
                raise
            continue
        done.append(f"{name}: {what}")
        if not files[name]:
            break
    return files, "; ".join(done)
