"""Text in and out of a decoder: tokenizer, chat template, pieces as they become certain."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..errors import ArgumentError, UnsupportedError

Message = Mapping[str, Any]  # {"role": "user", "content": "..."}


class TextStream:
    """Turns token ids into text pieces.

    A piece is held back while its last character is incomplete UTF-8, and while its end could be the
    beginning of a stop string. ``stopped`` is set once a stop string appeared; nothing from it on is
    given out.
    """

    def __init__(self, decode: Callable[[list[int]], str], stop: Sequence[str] = ()):
        self._decode, self._stop = decode, [s for s in stop if s]
        self._ids: list[int] = []
        self._start = self._read = 0  # the window that is decoded again, and its part given out
        self._held = ""
        self.stopped = False

    def add(self, token: int) -> str:
        """The text that this token makes certain, perhaps empty."""
        if self.stopped:
            return ""
        self._ids.append(token)
        text = self._decode(self._ids[self._start :])
        if text.endswith("\ufffd"):
            return ""
        return self._pass(self._advance(text))

    def finish(self) -> str:
        """What was held back, when no token follows."""
        if self.stopped:
            return ""
        rest = self._pass(self._advance(self._decode(self._ids[self._start :])))
        rest, self._held = rest + ("" if self.stopped else self._held), ""
        return rest

    def _advance(self, text: str) -> str:
        # Decoders may merge or strip at the start of what they get: decoding from the previous piece
        # on and cutting that piece off gives the same text as decoding everything.
        before = self._decode(self._ids[self._start : self._read])
        self._start, self._read = self._read, len(self._ids)
        return text[len(before) :]

    def _pass(self, piece: str) -> str:
        self._held += piece
        found = [i for i in (self._held.find(s) for s in self._stop) if i >= 0]
        if found:
            self.stopped = True
            out, self._held = self._held[: min(found)], ""
            return out
        keep = max((_overlap(self._held, s) for s in self._stop), default=0)
        cut = len(self._held) - keep
        out, self._held = self._held[:cut], self._held[cut:]
        return out


def _overlap(text: str, stop: str) -> int:
    """The longest end of text that begins stop."""
    for n in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:n]):
            return n
    return 0


def load_tokenizer(assets: Mapping[str, bytes]) -> Any:
    """The ``tokenizers.Tokenizer`` of a model. Raises UnsupportedError when there is none."""
    if "tokenizer.json" not in assets:
        raise UnsupportedError("text needs a tokenizer, and this model carries none; pass token ids")
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise UnsupportedError('text needs tokenizers: pip install "narrowcast[gguf]"') from error
    return Tokenizer.from_str(bytes(assets["tokenizer.json"]).decode("utf-8"))


def apply_chat_template(
    assets: Mapping[str, bytes], messages: Sequence[Message], bos_token: str = "", eos_token: str = ""
) -> str:
    """The prompt text that the model's own template makes of messages, ready for the answer.

    The template runs in jinja2's sandbox: it comes out of a file and may compute nothing but text.
    """
    template = assets.get("chat_template")
    if template is None:
        raise UnsupportedError("messages need a chat template, and this model carries none")
    try:
        from jinja2 import TemplateError
        from jinja2.sandbox import ImmutableSandboxedEnvironment
    except ImportError as error:
        raise UnsupportedError("messages need jinja2: pip install jinja2") from error

    def refuse(message: str) -> None:
        raise ArgumentError(f"messages: {message}")

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = lambda value, **options: json.dumps(value, ensure_ascii=False, **options)
    environment.globals["raise_exception"] = refuse
    try:
        return environment.from_string(bytes(template).decode("utf-8")).render(
            messages=[dict(m) for m in messages],
            add_generation_prompt=True,
            bos_token=bos_token,
            eos_token=eos_token,
        )
    except TemplateError as error:
        raise UnsupportedError(f"chat template: {error}") from error
