"""The image encoder against the whole Hugging Face models that it is cut out of."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import transformers
from torch import nn
from transformers import PreTrainedModel

from qformers.errors import CheckpointError, ConfigError
from qformers.models.freezing import freeze, frozen_parts
from qformers.models.vision import build_vision_encoder

TOLERANCE = 1e-6
PX = 56
VIT = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": PX,
    "patch_size": 14,
}
TEXT = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "vocab_size": 50,
}
OPT = {
    "model_type": "opt",
    "hidden_size": 32,
    "ffn_dim": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "vocab_size": 50,
    "word_embed_proj_dim": 32,
}
RESNET = {"embedding_size": 8, "hidden_sizes": [8, 16, 32], "depths": [1, 2, 1]}
CONVNEXT = {"hidden_sizes": [8, 16, 32], "depths": [1, 2, 1], "num_stages": 3, "image_size": 64}
EFFICIENTNET = {"width_coefficient": 0.25, "depth_coefficient": 0.3, "hidden_dim": 320, "image_size": 64}
VITS = {
    "clip": ("CLIPVisionModel", VIT, 1),
    "siglip": ("SiglipVisionModel", VIT, 0),
    "dinov2": ("Dinov2Model", {**VIT, "mlp_ratio": 2}, 1),
    "eva": ("Blip2VisionModel", VIT, 1),
}
CNNS = {
    "resnet": ("ResNetModel", RESNET),
    "convnext": ("ConvNextModel", CONVNEXT),
    "efficientnet": ("EfficientNetModel", EFFICIENTNET),
}


def random_model(model_name: str, settings: dict) -> PreTrainedModel:
    """A whole Hugging Face model with large random weights: fresh norms and biases would hide a wrong one."""
    torch.manual_seed(0)
    model_class = getattr(transformers, model_name)
    model = model_class(model_class.config_class(**settings)).eval()
    with torch.no_grad():
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if name.endswith("running_var"):
                tensor.uniform_(0.5, 1.5)
            elif tensor.is_floating_point():
                tensor.normal_(mean=1.0 if "norm" in name and tensor.ndim == 1 else 0.0, std=0.2)
    return model


def pictures(px: int) -> torch.Tensor:
    return torch.randn(2, 3, px, px, generator=torch.Generator().manual_seed(1))


@pytest.fixture(params=VITS)
def vit(request, tmp_path):
    """Family name, the whole model, its number of [CLS] tokens and the folder it is saved in."""
    model_name, settings, prefix_tokens = VITS[request.param]
    model = random_model(model_name, settings)
    model.save_pretrained(tmp_path)
    return request.param, model, prefix_tokens, tmp_path


@torch.no_grad()
def test_vit_equals_the_hidden_states_of_the_whole_model(vit) -> None:
    family, model, prefix_tokens, folder = vit
    expected = model(pictures(PX), output_hidden_states=True).hidden_states
    # EVA's checkpoints come without the model's last layer, so what they hold ends with layer −2.
    counted = {-2: -1, -3: -2, 1: 1} if family == "eva" else {-1: -1, -2: -2, 1: 1}
    for layer, read in zip(counted, (3, 2, 1), strict=True):
        encoder = build_vision_encoder(folder, layer=layer)
        patch_embeds = encoder(pictures(PX))
        torch.testing.assert_close(patch_embeds, expected[counted[layer]], atol=TOLERANCE, rtol=0)
        assert (encoder.family, encoder.layer, encoder.image_px) == (family, read, PX)
        assert (encoder.patches, encoder.dim) == tuple(patch_embeds.shape[1:]) == (16 + prefix_tokens, 32)
        # Two norms in each layer that is built, and CLIP's before the first; none after the last.
        norms = [module for module in encoder.modules() if isinstance(module, nn.LayerNorm)]
        assert len(norms) == 2 * read + (family == "clip")


@torch.no_grad()
def test_vit_interpolates_positions_for_another_size(vit) -> None:
    _, model, prefix_tokens, folder = vit
    options = {} if model.config.model_type == "dinov2" else {"interpolate_pos_encoding": True}
    layer = -1 if model.config.model_type == "blip_2_vision_model" else -2
    expected = model(pictures(84), output_hidden_states=True, **options).hidden_states[layer]
    encoder = build_vision_encoder(folder, image_px=84)
    assert encoder.grid == 6 and encoder.patches == 36 + prefix_tokens
    torch.testing.assert_close(encoder(pictures(84)), expected, atol=TOLERANCE, rtol=0)
    with pytest.raises(ConfigError, match=r"56 × 56 px.*84 px"):
        encoder(pictures(PX))
    for px in (60, 0, -14):
        with pytest.raises(ConfigError, match=rf"image_px is {px},.*14 px"):
            build_vision_encoder(folder, image_px=px)


@torch.no_grad()
@pytest.mark.parametrize("family", CNNS)
def test_cnn_gives_its_feature_map_row_by_row(family, tmp_path) -> None:
    model = random_model(*CNNS[family])
    model.save_pretrained(tmp_path)
    whole = model(pictures(64), output_hidden_states=True)
    for layer, expected in ((-1, whole.last_hidden_state), (-2, whole.hidden_states[-2])):
        if family == "efficientnet" and layer == -2:
            expected = whole.hidden_states[-1]  # the last block; the head is no hidden state there
        encoder = build_vision_encoder(tmp_path, layer=layer, image_px=64)
        patch_embeds = encoder(pictures(64))
        assert (encoder.patches, encoder.dim) == tuple(patch_embeds.shape[1:])
        torch.testing.assert_close(patch_embeds, expected.flatten(2).mT, atol=TOLERANCE, rtol=TOLERANCE)
    with pytest.raises(ConfigError, match="image_px is 50"):
        build_vision_encoder(tmp_path, layer=-1, image_px=50)


@torch.no_grad()
def test_only_the_vision_part_of_a_whole_model_is_read(tmp_path) -> None:
    both = {"text_config": TEXT, "vision_config": VIT}
    blip2 = {"vision_config": VIT, "qformer_config": {**TEXT, "encoder_hidden_size": 32}, "text_config": OPT}
    for name, settings in (
        ("CLIPModel", both),
        ("SiglipModel", both),
        ("Blip2ForConditionalGeneration", blip2),
        ("InstructBlipForConditionalGeneration", blip2),
    ):
        model = random_model(name, settings)
        model.save_pretrained(tmp_path / name)
        tower = getattr(model, "vision_model", None) or model.model.vision_model
        layer = -1 if "Blip" in name else -2
        expected = tower(pictures(PX), output_hidden_states=True).hidden_states[layer]
        encoder = build_vision_encoder(tmp_path / name)
        torch.testing.assert_close(encoder(pictures(PX)), expected, atol=TOLERANCE, rtol=0)


def test_dtype_fingerprint_and_image_processor(tmp_path) -> None:
    random_model(*VITS["dinov2"][:2]).save_pretrained(tmp_path)
    encoder = build_vision_encoder(tmp_path)
    assert encoder.mean == (0.485, 0.456, 0.406)
    processor = '{"crop_size": {"height": 84, "width": 84}, "image_mean": [0.1, 0.2, 0.3], "image_std": [1, 1, 1]}'
    (tmp_path / "preprocessor_config.json").write_text(processor)
    half = build_vision_encoder(tmp_path, dtype=torch.bfloat16)
    assert (half.image_px, half.mean) == (84, (0.1, 0.2, 0.3))
    assert half(pictures(84)).dtype == torch.bfloat16
    # The size and what comes after the layer are no part of the weights in use; precision and the layer are.
    assert build_vision_encoder(tmp_path).fingerprint() == encoder.fingerprint() != half.fingerprint()
    assert build_vision_encoder(tmp_path, layer=-1).fingerprint() != encoder.fingerprint()
    with torch.no_grad():
        next(encoder.parameters()).view(-1)[0] += 1e-3
    assert build_vision_encoder(tmp_path).fingerprint() != encoder.fingerprint()


def test_the_layer_that_a_blip2_checkpoint_leaves_out_cannot_be_read(tmp_path) -> None:
    random_model(*VITS["eva"][:2]).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"layer is -1.* has 3 layers \(it leaves out the last 1 .*use -4 to -2"):
        build_vision_encoder(tmp_path, layer=-1)


def test_bad_sources_are_named_in_one_line(tmp_path) -> None:
    with pytest.raises(ConfigError, match="no such folder"):
        build_vision_encoder(tmp_path / "absent")
    with pytest.raises(ConfigError, match=r"no config\.json"):
        build_vision_encoder(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ConfigError, match="bert is no supported image encoder; supported: clip"):
        build_vision_encoder(tmp_path)

    model = random_model(*VITS["clip"][:2])
    model.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"layer is 4, but .* has 3 layers"):
        build_vision_encoder(tmp_path, layer=4)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(CheckpointError) as damaged:
        build_vision_encoder(tmp_path)
    assert str(tmp_path) in str(damaged.value) and "\n" not in str(damaged.value)
    weights.unlink()
    with pytest.raises(CheckpointError, match="cannot be read"):
        build_vision_encoder(tmp_path)
    state = {name: tensor for name, tensor in model.state_dict().items() if "fc1.weight" not in name}
    model.save_pretrained(tmp_path, state_dict=state)
    with pytest.raises(CheckpointError, match="2 of 37 weights are missing"):
        build_vision_encoder(tmp_path)


class Parent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Dropout(0.5))
        self.head = nn.Linear(4, 2)


def test_nothing_wakes_a_frozen_part() -> None:
    model = Parent()
    names = list(model.state_dict())
    freeze(model.encoder, "vision_encoder")
    for woken in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        before = copy.deepcopy(woken.encoder.state_dict())
        woken.train()
        woken.encoder.train()
        assert woken.head.training
        assert not any(module.training for module in woken.encoder.modules())
        picture = torch.randn(2, 3, 4, 4)
        assert torch.equal(woken.encoder(picture), woken.encoder(picture)), "dropout is on"
        for name, tensor in woken.encoder.state_dict().items():
            assert torch.equal(tensor, before[name]), f"{name} changed"
        assert not any(parameter.requires_grad for parameter in woken.encoder.parameters())
        assert all(parameter.requires_grad for parameter in woken.head.parameters())
        assert frozen_parts(woken) == {"vision_encoder": 3 * 4 + 4 + 4 + 4}
    assert list(model.state_dict()) == names
