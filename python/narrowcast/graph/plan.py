"""The plan file: a compressed model as data. Loading one executes nothing.

Layout: safetensors (an 8-byte length, a JSON header, the tensors). ``__metadata__`` holds one entry,
``narrowcast``: a JSON document with the format version, the graph, the recipe, the quantisation record, the
certificate, and the sha256 of every tensor. Large parts (tokenizer, labels, certificate samples) are tensors
named ``asset:NAME`` and ``certificate:NAME``; weights are ``weight:NAME``. Tensors are in canonical packing:
any device, any CPU, any supported torch.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from narrowcast._version import __version__
from narrowcast.errors import ArgumentError, FormatError, UnsupportedError, VerificationError
from narrowcast.files import atomic_path

from .ir import Graph
from .record import check_config, check_document
from .serialize import MAX_RANK, from_json, to_json

FORMAT_VERSION = 1
MAX_HEADER = 64 << 20
_KEY = "narrowcast"


@dataclass
class Plan:
    """A graph with everything needed to run it and to check it."""

    graph: Graph
    kind: str  #: "decoder", "encoder", "image" or "generic"
    recipe: str
    config: dict[str, Any] = field(default_factory=dict)  #: the model's own figures (layers, heads, eos ids)
    record: dict[str, Any] = field(default_factory=dict)  #: how it was quantised, with what data
    certificate: dict[str, Any] = field(
        default_factory=dict
    )  #: measured errors, and what they were measured on
    samples: dict[str, Tensor] = field(
        default_factory=dict
    )  #: the certificate's inputs and reference outputs
    assets: dict[str, bytes] = field(default_factory=dict)  #: tokenizer.json, chat template, labels
    source: dict[str, Any] = field(default_factory=dict)  #: what it was made from: name, bytes, sha256
    signature: str | None = None  #: Ed25519 over the document, hexadecimal
    written_by: str = f"narrowcast {__version__}"
    path: Path | None = None  #: the file it was loaded from

    @property
    def weight_bytes(self) -> int:
        return self.graph.weight_bytes

    # --- writing ----------------------------------------------------------------------------------

    def _tensors(self) -> dict[str, Tensor]:
        tensors = {f"weight:{name}": w for name, w in self.graph.weights.items()}
        tensors |= {f"certificate:{name}": t for name, t in self.samples.items()}
        for name, data in self.assets.items():
            tensors[f"asset:{name}"] = (
                torch.frombuffer(bytearray(data), dtype=torch.uint8)
                if data
                else (torch.empty(0, dtype=torch.uint8))
            )
        return {name: t.detach().cpu().contiguous() for name, t in tensors.items()}

    def _document(self, tensors: dict[str, Tensor]) -> dict[str, Any]:
        return {
            "format_version": FORMAT_VERSION,
            "written_by": self.written_by,
            "kind": self.kind,
            "recipe": self.recipe,
            "config": self.config,
            "record": self.record,
            "certificate": self.certificate,
            "source": self.source,
            "graph": to_json(self.graph),
            "sha256": {name: _sha256(t) for name, t in tensors.items()},
        }

    def save(self, path: str | os.PathLike) -> None:
        """Writes the file whole or not at all (a temporary file beside it, then a rename)."""
        path = Path(path)
        if not path.parent.is_dir():
            raise ArgumentError(f"cannot write {path}: the folder {path.parent} does not exist")
        tensors = _unshared(self._tensors())
        document = self._document(tensors)
        if self.signature:
            document["signature"] = self.signature
        text = _text(document)
        with atomic_path(path) as temporary:
            safetensors.torch.save_file(tensors, str(temporary), metadata={_KEY: text})

    # --- reading ----------------------------------------------------------------------------------

    @classmethod
    def load(cls, path: str | os.PathLike, check: bool = True) -> Plan:
        """The plan in a file; its tensors are views of a memory map.

        Raises FormatError when the file is truncated, altered or not a plan (``check=False`` trusts the
        checksums), UnsupportedError for a newer format, ArgumentError for a missing file.
        """
        path = Path(path)
        if not path.is_file():
            raise ArgumentError(f"there is no file {path}")
        _check_header(path)
        try:
            file = safetensors.safe_open(str(path), framework="pt")
            with file as opened:
                metadata = opened.metadata() or {}
                tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        except (safetensors.SafetensorError, OSError, ValueError) as error:
            raise FormatError(f"{path} is not a whole plan file: {error}") from error
        if _KEY not in metadata:
            raise FormatError(f"{path} is a safetensors file but not a narrowcast plan")
        document = _parse(path, metadata[_KEY])
        if check:
            _check_sums(path, document, tensors)
        parts: dict[str, dict[str, Tensor]] = {"weight": {}, "certificate": {}, "asset": {}}
        for name, tensor in tensors.items():
            kind, _, rest = name.partition(":")
            if kind not in parts or tensor.dim() > MAX_RANK:
                raise FormatError(
                    f"{path} holds a tensor of unknown kind: {name[:80]} {list(tensor.shape)[:9]}"
                )
            if kind == "asset" and (tensor.dtype, tensor.dim()) != (torch.uint8, 1):
                raise FormatError(f"{path} holds the asset {rest[:80]} as something else than bytes")
            parts[kind][rest] = tensor
        try:
            graph = from_json(document["graph"], parts["weight"])
            check_config(document["config"])
            check_document(document["record"], document["certificate"], document["source"])
        except FormatError as error:
            raise FormatError(f"{path}: {error}") from error
        return cls(
            graph=graph,
            kind=document["kind"],
            recipe=document["recipe"],
            config=document["config"],
            record=document["record"],
            certificate=document["certificate"],
            samples=parts["certificate"],
            assets={name: t.numpy().tobytes() for name, t in parts["asset"].items()},
            source=document["source"],
            signature=document.get("signature"),
            written_by=document["written_by"],
            path=path,
        )

    # --- signing ----------------------------------------------------------------------------------

    def _signed_bytes(self) -> bytes:
        return _text(self._document(_unshared(self._tensors()))).encode()

    def sign(self, private_key: bytes) -> None:
        """Signs with a raw 32-byte Ed25519 private key (RFC 8032); needs the package cryptography."""
        key = _ed25519().Ed25519PrivateKey.from_private_bytes(private_key)
        self.signature = key.sign(self._signed_bytes()).hex()

    def verify_signature(self, public_key: bytes) -> None:
        """Raises VerificationError unless the plan was signed by the owner of a raw 32-byte public key."""
        if self.signature is None:
            raise VerificationError("the plan carries no signature")
        module = _ed25519()
        from cryptography.exceptions import InvalidSignature

        try:
            key = module.Ed25519PublicKey.from_public_bytes(public_key)
            key.verify(bytes.fromhex(self.signature), self._signed_bytes())
        except (InvalidSignature, ValueError) as error:
            raise VerificationError("the plan was not signed with this key, or was changed since") from error


def _text(document: dict[str, Any]) -> str:
    try:
        return json.dumps(document, sort_keys=True, separators=(",", ":"), allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ArgumentError(
            f"config, record, certificate and source must be plain JSON without NaN: {error}"
        ) from error


def _ed25519():
    try:
        from cryptography.hazmat.primitives.asymmetric import ed25519
    except ImportError as error:
        raise UnsupportedError(
            "signatures need the package cryptography: pip install cryptography"
        ) from error
    return ed25519


def _unshared(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """safetensors refuses tensors that share memory (tied weights are one tensor in a graph already)."""
    seen: set[int] = set()
    result = {}
    for name, t in tensors.items():
        pointer = t.untyped_storage().data_ptr()
        result[name] = (
            t.clone() if t.numel() and (pointer in seen or t.untyped_storage().nbytes() != t.nbytes) else t
        )
        seen.add(pointer)
    return result


def _sha256(t: Tensor) -> str:
    return hashlib.sha256(t.reshape(-1).view(torch.uint8).numpy().data if t.numel() else b"").hexdigest()


def _check_header(path: Path) -> None:
    """The declared header must fit the file before anything is allocated for it."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        start = file.read(9)
    length = int.from_bytes(start[:8], "little") if len(start) == 9 else 0
    if len(start) < 9 or start[8:9] != b"{" or not 2 <= length <= min(MAX_HEADER, size - 8):
        raise FormatError(f"{path} is not a plan: it does not start with a safetensors header")


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _parse(path: Path, text: str) -> dict[str, Any]:
    try:
        document = json.loads(text, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{path} holds a document that is not JSON: {error}") from error
    if not isinstance(document, dict) or not isinstance(document.get("format_version"), int):
        raise FormatError(f"{path} names no format version")
    version = document["format_version"]
    if version > FORMAT_VERSION:
        raise UnsupportedError(
            f"{path} has plan format {version} ({str(document.get('written_by'))[:80]}); "
            f"narrowcast {__version__} reads up to {FORMAT_VERSION}: install the release that wrote it"
        )
    expected = {
        "kind": str, "recipe": str, "config": dict, "record": dict, "certificate": dict, "source": dict,
        "graph": dict, "sha256": dict, "written_by": str,
    }  # fmt: skip
    for name, kind in expected.items():
        if not isinstance(document.get(name), kind):
            raise FormatError(f"{path} has no valid {name}")
    if not isinstance(document.get("signature", ""), str):
        raise FormatError(f"{path} has no valid signature")
    return document


def _check_sums(path: Path, document: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    sums = document["sha256"]
    if set(sums) != set(tensors):
        raise FormatError(f"{path}: the tensors are not the ones its document names")
    for name, tensor in tensors.items():
        if _sha256(tensor) != sums[name]:
            raise FormatError(
                f"{path}: tensor {name} was altered (its sha256 does not match); copy the file again"
            )
