"""The model card of a saved model."""

from __future__ import annotations

from pathlib import Path

from qformers.models.config import LanguageConfig, ModelConfig
from qformers.models.stage1 import Stage1Model
from qformers.models.stage2 import Stage2Model


def model_card(model: Stage1Model | Stage2Model, config: ModelConfig, language: LanguageConfig | None) -> str:
    """What a stranger needs to know of the folder, from the model itself."""
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    frozen = sum(parameter.numel() for parameter in model.vision_encoder.parameters())
    encoder = model.vision_encoder
    if isinstance(model, Stage2Model):
        assert language is not None
        stage, can = 2, "captions through a frozen language model"
        name, prompt = Path(language.path or "").name, language.prompt
        spoken = sum(parameter.numel() for parameter in model.language_model.parameters())
        speaks = f"- Language model: `{name}`, frozen, {spoken:,} parameters, prompt {prompt!r}.\n"
        example = 'model.caption(["picture.jpg"])'
    else:
        stage, can = 1, "ITC similarity, ITM match score, ITG captions"
        speaks = "- No language model.\n"
        example = 'model.itc(["picture.jpg"], ["a poodle", "a canoe"])'
    return f"""# A Q-Former, stage {stage}

Image-text model of the BLIP-2 kind (arXiv 2301.12597): {can}.

- Image encoder: `{Path(config.vision_encoder).name}`, layer {encoder.layer}, {encoder.image_px} px,
  {"trained" if config.train_vision_encoder else "frozen"}, {frozen:,} parameters.
- Q-Former: preset `{config.preset}`, {config.num_queries} queries; {trained:,} trained parameters in all.
- Text: started from `{Path(config.text_encoder).name}`.
{speaks}
```python
import qformers

model = qformers.load("this/folder")
{example}
```

The run folder that it came from keeps the resolved settings (`config.yaml`) and `metrics.jsonl`.
"""
