"""The tokenizer inside a GGUF file, as the bytes of a tokenizer.json."""

from __future__ import annotations

from narrowcast.errors import FormatError, UnsupportedError

from .gguf import GGUFFile

_CONTROL, _USER_DEFINED = 3, 4

# How text is cut before byte-pair merging, by the name in ``tokenizer.ggml.pre``. None: the cut of GPT-2.
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_TAIL = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_PATTERNS = {
    "gpt-2": None,
    "default": None,
    "smollm": None,
    "llama-bpe": _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + _TAIL,
    "qwen2": _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + _TAIL,
}
_SINGLE_DIGITS = ("smollm",)


def tokenizer_json(file: GGUFFile) -> bytes:
    """Builds the byte-level BPE tokenizer that ``tokenizer.ggml.*`` describes.

    Raises UnsupportedError for another kind of tokenizer, or without the library ``tokenizers``; FormatError
    when its parts do not fit together.
    """
    try:
        from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors
    except ImportError:
        raise UnsupportedError(
            "the tokenizer of a GGUF file needs the library tokenizers: pip install narrowcast[gguf]"
        ) from None

    name = file.path.name
    kind, pre = file.get("tokenizer.ggml.model", str), file.get("tokenizer.ggml.pre", str, "default")
    if kind != "gpt2":
        raise UnsupportedError(f"{name}: the tokenizer {kind!r} is not supported, only 'gpt2' is")
    if pre not in _PATTERNS:
        raise UnsupportedError(f"{name}: the pre-tokenizer {pre!r} is not one of {', '.join(_PATTERNS)}")
    tokens, merges, types = (
        _list(file, f"tokenizer.ggml.{key}", element)
        for key, element in (("tokens", str), ("merges", str), ("token_type", int))
    )
    vocab = {token: i for i, token in enumerate(tokens)}
    rows = file.info("token_embd.weight").shape[0]
    if len(vocab) != len(tokens) or len(types) != len(tokens) or len(tokens) > rows:
        raise FormatError(
            f"{name}: {len(tokens)} tokens ({len(vocab)} different), {len(types)} types, {rows} embeddings"
        )
    pairs = []
    for merge in merges:
        left, _, right = merge.partition(" ")
        if left not in vocab or right not in vocab or left + right not in vocab:
            raise FormatError(f"{name}: the merge {merge!r} uses or makes a token that does not exist")
        pairs.append((left, right))

    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=pairs, ignore_merges=pre == "llama-bpe"))
    steps = []
    if pre in _SINGLE_DIGITS:
        steps.append(pre_tokenizers.Digits(individual_digits=True))
    if _PATTERNS[pre] is not None:
        steps.append(pre_tokenizers.Split(Regex(_PATTERNS[pre]), "isolated"))
    prefix = file.get("tokenizer.ggml.add_space_prefix", bool, False)
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=prefix, use_regex=_PATTERNS[pre] is None))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [AddedToken(t, special=True, normalized=False) for t, k in zip(tokens, types) if k == _CONTROL]
    )
    tokenizer.add_tokens(
        [AddedToken(t, special=False, normalized=False) for t, k in zip(tokens, types) if k == _USER_DEFINED]
    )
    if file.get("tokenizer.ggml.add_bos_token", bool, False):
        bos = file.get("tokenizer.ggml.bos_token_id", int)
        if not 0 <= bos < len(tokens):
            raise FormatError(f"{name}: the bos token must be below {len(tokens)}, got {bos}")
        tokenizer.post_processor = processors.TemplateProcessing(
            single=[tokens[bos], "$A"], special_tokens=[(tokens[bos], bos)]
        )
    return tokenizer.to_str().encode()


def _list(file: GGUFFile, key: str, element: type) -> list:
    values = file.get(key, list)
    if any(type(v) is not element for v in values):
        raise FormatError(f"{file.path.name}: {key!r} must hold {element.__name__} values only")
    return values
