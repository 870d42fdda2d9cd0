"""The model card of a saved model: what it is, what it learned from and how, how well it did, and what it cannot do."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml
from huggingface_hub import ModelCardData

from qformers.models.config import LanguageConfig, ModelConfig
from qformers.models.stage1 import Stage1Model
from qformers.models.stage2 import Stage2Model

# Of the hub ids in our recipes and documents, as their publishers say; the longest beginning that fits counts.
LICENCES = {
    "openai/clip-": "MIT",
    "facebook/dinov2-": "Apache-2.0",
    "google/siglip": "Apache-2.0",
    "Salesforce/blip2-": "MIT",
    "google-bert/": "Apache-2.0",
    "bert-base-": "Apache-2.0",
    "sentence-transformers/all-MiniLM-": "Apache-2.0",
    "facebook/opt-": "OPT's own, not for commercial use",
    "google/flan-t5-": "Apache-2.0",
    "google/gemma": "Gemma's terms of use",
    "HuggingFaceTB/SmolLM2-": "Apache-2.0",
    "openai-community/gpt2": "MIT",
}
UNKNOWN_LICENCE = "licence not known here"
_SECRETS = re.compile(r"(?<=://)[^/\s'\"@]+@|(?<=[^\s'\"])\?[^\s'\",\]}]*=[^\s'\",\]}]*")
_FRONT_MATTER = re.compile(r"\A---\n(.*?)\n---", re.DOTALL)
# In a finished run's metrics, what says how well it did; the rest is about speed and the schedule.
_TELLING = re.compile(r"^(loss|validation)/|_accuracy$|^(temperature|query_diversity)$")


@dataclass(frozen=True)
class Provenance:
    """Where a trained model comes from.

    Attributes:
        sources: paths or URLs of the training data; pictures: how many records they have.
        recipe: every setting of the run, as YAML.
        metrics: the newest value of everything the run logged.
    """

    sources: Sequence[str]
    pictures: int
    recipe: str
    metrics: Mapping[str, float]


def model_card(
    model: Stage1Model | Stage2Model,
    config: ModelConfig,
    language: LanguageConfig | None,
    provenance: Provenance | None = None,
) -> str:
    """What a stranger needs to know of the folder. Without `provenance` the card says that it is not known."""
    parts = [
        f"---\n{_front_matter(model, config, language).to_yaml()}\n---\n",
        _what_it_is(model, config, language),
        _data(provenance),
        _recipe(provenance),
        _metrics(provenance),
        _limits(model, provenance),
    ]
    return "\n".join(parts)


def licence_of(path: str) -> str:
    """The licence of a pretrained model: as the card in its folder says, or known by its hub id."""
    card = Path(path) / "README.md"
    if card.is_file() and (found := _FRONT_MATTER.match(card.read_text(encoding="utf-8", errors="replace"))):
        try:
            stated = yaml.safe_load(found[1])
        except yaml.YAMLError:
            stated = None
        if isinstance(stated, dict) and stated.get("license"):
            return str(stated["license"])
    known = [beginning for beginning in LICENCES if path.startswith(beginning)]
    return LICENCES[max(known, key=len)] if known else UNKNOWN_LICENCE


def without_secrets(text: str) -> str:
    """`text` without the users, passwords and signed queries of the addresses in it: a card is made to be published."""
    return _SECRETS.sub("", text)


def _front_matter(
    model: Stage1Model | Stage2Model, config: ModelConfig, language: LanguageConfig | None
) -> ModelCardData:
    paths = [config.vision_encoder, config.text_encoder, *([language.path] if language and language.path else [])]
    # A folder of this machine means nothing on a hub.
    hub_ids = [path for path in paths if re.fullmatch(r"[\w.-]+/[\w.-]+", path) and not Path(path).exists()]
    return ModelCardData(
        library_name="qformers",
        tags=["q-former", "blip-2", f"stage-{2 if isinstance(model, Stage2Model) else 1}"],
        pipeline_tag="image-to-text" if isinstance(model, Stage2Model) else None,
        base_model=hub_ids or None,
    )


def _what_it_is(model: Stage1Model | Stage2Model, config: ModelConfig, language: LanguageConfig | None) -> str:
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    trained_in_all = f"{trained:,} trained parameters in all."
    seen = sum(parameter.numel() for parameter in model.vision_encoder.parameters())
    encoder = model.vision_encoder
    if isinstance(model, Stage2Model):
        assert language is not None
        stage, can = 2, "captions and answers through a frozen language model"
        path, prompt = language.path or "", language.prompt
        spoken = sum(parameter.numel() for parameter in model.language_model.parameters())
        speaks = f"- Language model: {_named(path)}, frozen, {spoken:,} parameters, prompt {prompt!r}."
        example = 'model.caption(["picture.jpg"])'
    else:
        stage, can = 1, "ITC similarity, ITM match score, ITG captions"
        speaks = "- No language model."
        example = 'model.itc(["picture.jpg"], ["a poodle", "a canoe"])'
    if config.bridge == "qformer":
        title = f"A Q-Former, stage {stage}"
        bridge = f"- Q-Former: preset `{config.preset}`, {config.num_queries} queries, {trained_in_all}"
        bridge += f"\n- Text: started from {_named(config.text_encoder)}."
    else:
        title = f"A {config.bridge} bridge instead of a Q-Former, stage {stage}"
        bridge = f"- Bridge: {config.bridge}, {config.num_queries} visual tokens, {trained_in_all}"
    return f"""# {title}

Image-text model of the BLIP-2 kind (arXiv 2301.12597): {can}.

- Image encoder: {_named(config.vision_encoder)}, layer {encoder.layer}, {encoder.image_px} px,
  {"trained" if config.train_vision_encoder else "frozen"}, {seen:,} parameters.
{bridge}
{speaks}

```python
import qformers

model = qformers.load("this/folder")
{example}
```
"""


def _named(path: str) -> str:
    """A pretrained model by its name, with its licence; where it lies on the machine that trained says nothing."""
    name = Path(path).name if Path(path).exists() else path
    return f"`{name}` ({licence_of(path)})"


def _data(provenance: Provenance | None) -> str:
    if provenance is None:
        return "## Data\n\nNot known here: the weights come from another format or from before cards named it.\n"
    sources = "\n".join(f"- `{source}`" for source in provenance.sources)
    return (
        f"## Data\n\n{provenance.pictures:,} records of pictures with captions:\n\n{sources}\n\n"
        "The licences of pictures and captions are not known here: whoever publishes the model names them.\n"
    )


def _recipe(provenance: Provenance | None) -> str:
    if provenance is None:
        return "## Recipe\n\nNot known here.\n"
    return f"## Recipe\n\n```yaml\n{provenance.recipe.rstrip()}\n```\n"


def _metrics(provenance: Provenance | None) -> str:
    telling = {} if provenance is None else {k: v for k, v in provenance.metrics.items() if _TELLING.search(k)}
    if not telling:
        return "## Metrics\n\nNone known here.\n"
    rows = "\n".join(f"| {name} | {value:.4g} |" for name, value in sorted(telling.items()))
    return (
        f"## Metrics\n\nAs logged last in training; `loss/` on a training batch, `validation/` on held-out data.\n\n"
        f"| metric | value |\n|---|---|\n{rows}\n\nRecall and caption scores are what `qformers evaluate` says.\n"
    )


def _limits(model: Stage1Model | Stage2Model, provenance: Provenance | None) -> str:
    seen = "an unknown number of" if provenance is None else f"{provenance.pictures:,}"
    stage = (
        "- It may name what is not in the picture, and says it as surely as what is."
        if isinstance(model, Stage2Model)
        else "- A match probability is calibrated for the negatives of training, not for yours; a similarity is no\n"
        "  probability at all. Compare scores of one picture or one text with each other."
    )
    return f"""## Limits

- It has learned from {seen} records and knows little beyond them. What they leave out or get wrong, it does too.
- The frozen models bring their own biases and their own licences along.
- Pictures are read at {model.vision_encoder.image_px} px, the centre square: small print and edges are lost.
{stage}
- Not made to recognise or judge people, nor for decisions that need to be right.
"""
