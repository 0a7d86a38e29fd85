"""``narrowcast run``: a plan (or a .gguf / .onnx file) on real input."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from . import output


def run(
    plan: Annotated[Path, typer.Argument(help="a .plan file")],
    inputs: Annotated[
        list[str], typer.Argument(metavar="INPUT...", help="a prompt; sentences; or picture files")
    ],
    max_new_tokens: Annotated[int, typer.Option(min=1, help="length of the answer")] = 128,
    temperature: Annotated[float, typer.Option(min=0.0, help="0: always the likeliest token")] = 0.0,
    top_k: Annotated[int, typer.Option(min=0, help="0: all")] = 0,
    top_p: Annotated[float, typer.Option(min=0.0, max=1.0)] = 1.0,
    seed: Annotated[int, typer.Option()] = 0,
    stream: Annotated[bool, typer.Option(help="print the answer as it comes")] = True,
    chat: Annotated[
        bool, typer.Option(help="wrap the prompt in the chat template, if the model has one")
    ] = True,
    top: Annotated[int, typer.Option(min=1, help="classes shown per picture")] = 5,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda")] = "auto",
    threads: Annotated[int | None, typer.Option(min=1)] = None,
    json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> None:
    """Run a plan: a prompt is answered, sentences are compared, pictures are classified."""
    import narrowcast
    from narrowcast.errors import ArgumentError

    executor = narrowcast.load(plan, device=device, threads=threads)
    if executor.kind == "decoder":
        if len(inputs) != 1:
            raise ArgumentError(f"a language model takes one prompt, got {len(inputs)}; quote it")
        # A base model carries no template; its prompt is continued as it stands.
        asked = chat and "chat_template" in executor.assets
        pieces = executor.generate(
            [{"role": "user", "content": inputs[0]}] if asked else inputs[0],
            max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed,
        )  # fmt: skip
        if json:
            output.print_json({"prompt": inputs[0], "text": "".join(pieces)})
        elif stream:
            for piece in pieces:
                sys.stdout.write(piece)
                sys.stdout.flush()
            print()
        else:
            print("".join(pieces))
    elif executor.kind == "encoder":
        _compare(executor, inputs, json)
    elif executor.kind == "image":
        _classify(executor, inputs, top, json)
    else:
        raise ArgumentError(
            f"{plan} takes tensors: run it from Python with narrowcast.load({str(plan)!r})(...)"
        )


def _compare(executor, sentences: list[str], json: bool) -> None:
    import torch

    from narrowcast.errors import UnsupportedError

    vectors = executor.encode(sentences)
    if vectors.dim() != 2:
        raise UnsupportedError("sentences are compared by a pooling encoder; this plan gives hidden states")
    vectors = torch.nn.functional.normalize(vectors.float(), dim=-1)
    similarity = vectors @ vectors.T
    if json:
        output.print_json({"sentences": sentences, "similarity": similarity.tolist()})
        return
    first = similarity[0]
    order = sorted(range(1, len(sentences)), key=lambda i: -first[i])
    rows = [[f"{first[i]:.3f}", sentences[i]] for i in order]
    output.console().print(output.table(f"nearest to: {sentences[0]}", ["cosine", "sentence"], rows, {0}))


def _classify(executor, files: list[str], top: int, json: bool) -> None:
    from narrowcast.runtime.tasks import classify

    results = classify(executor, files, top)
    if json:
        output.print_json([{"picture": f, "classes": r} for f, r in zip(files, results)])
        return
    for file, classes in zip(files, results):
        rows = [[f"{c['probability']:.3f}", c["label"]] for c in classes]
        output.console().print(output.table(file, ["probability", "class"], rows, {0}))
