"""What a user may choose about a model. Light: the command line builds its options from it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from qformers.errors import ConfigError

PresetName = Literal["blip2", "small", "tiny", "other"]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]
QFormerReads = Literal["nothing", "question", "empty", "prompt"]
BridgeName = Literal["qformer", "linear", "mlp", "perceiver"]
TextReadout = Literal["cls", "mean"]


@dataclass(frozen=True)
class ModelConfig:
    """One model: which image encoder it reads, and the shape and start of its Q-Former."""

    vision_encoder: str = "openai/clip-vit-large-patch14"
    """Folder or hub id of the frozen image encoder."""
    vision_layer: int = -2
    """Which layer's output to read; later ones are not built. The paper takes the second-to-last."""
    bridge: BridgeName = "qformer"
    """What stands between image encoder and language model. Instead of a Q-Former, in stage 2: linear (pooled patches,
    projected), mlp (the same through LLaVA's two layers) or perceiver (Flamingo's resampler of the preset's size);
    each gives `num_queries` visual tokens and needs no stage 1."""
    preset: PresetName = "blip2"
    """Shape of the Q-Former: blip2 (BERT-base), small (MiniLM: 6 layers, 384 wide), tiny (tests); other: that of a
    checkpoint that was read from another format, which no recipe can build."""
    text_encoder: str = "bert-base-uncased"
    """Folder or hub id of the BERT that gives the tokenizer and, with `start_from_text_encoder`, weights."""
    start_from_text_encoder: bool = True
    """False: random weights, for tests of shape and speed."""
    num_queries: int = 32
    """Learned queries, and so visual tokens, per image."""
    cross_attention_frequency: int = 2
    """Blocks 0, n, 2n, … read the image."""
    embed_dim: int = 256
    """Width of the space in which ITC compares images and texts."""
    text_readout: TextReadout = "cls"
    """What ITC compares of a text: the output of [CLS], as the paper, or the mean over all its tokens, as sentence
    embeddings are made. Started from a BERT of that kind, mean names words that training never says better."""
    dropout: float = 0.1
    """On embeddings and on every sub-layer's output, as BERT."""
    attention_dropout: float = 0.1
    """On attention weights, as BERT."""
    query_start: Literal["noise", "words"] = "noise"
    """What fresh query tokens are: noise, as the authors', or, with `start_from_text_encoder`, words of it drawn at
    random, each at its place in a sentence. Its self-attention keeps words apart and makes noise alike."""
    standardise_patches: bool = False
    """Start `vision_norm` from the mean and spread of the training pictures' patches instead of 0 and 1. Short runs
    need it: their queries become alike without it (docs/reproduction.md)."""
    train_vision_encoder: bool = False
    """Train the image encoder too, as the paper does when it fine-tunes; otherwise it is frozen."""
    checkpoint_vision_encoder: bool = False
    """Compute the image encoder's layers a second time in the backward pass instead of keeping their outputs."""


@dataclass(frozen=True)
class LanguageConfig:
    """Which language model says what the Q-Former sees, and how it is asked."""

    path: str | None = None
    """Folder or hub id: decoder-only (OPT, Llama, Qwen, Gemma, GPT-2, …) or encoder-decoder (T5, BART)."""
    dtype: Dtype = "auto"
    """Of its frozen weights; auto: as they are stored, in float32 where the machine would only emulate a half."""
    quantization: Literal["none", "8bit", "4bit"] = "none"
    """Load the language model, and only it, in 8 or 4 bits (needs bitsandbytes)."""
    prompt: str = ""
    """Text before every caption, in training and after: the paper fine-tunes captioning with "a photo of"."""
    split_captions: bool = True
    """Encoder-decoder: prefix language modelling, as the paper's stage 2. False: the encoder reads the prompt alone and
    the decoder says the whole caption, as fine-tuning needs."""
    end_token: str | None = None
    """What ends a caption; default: the tokenizer's own. The authors end OPT's with a line break."""
    question_template: str = "Question: {} Answer:"
    """How the language model is asked: {} is the question (the paper's prompt for VQA)."""
    qformer_reads: QFormerReads = "nothing"
    """What the queries read beside the picture, as text: nothing (captioning), the question alone, so that they look
    where it points (the paper's VQA), or all that the language model is asked (InstructBLIP). empty: a text without
    words, the control of VQA that knows no question and has as many weights to train."""

    def __post_init__(self) -> None:
        if self.question_template.count("{}") != 1:
            raise ConfigError(
                f"language.question_template {self.question_template!r} has {self.question_template.count('{}')} "
                "places {} for the question: it must have one"
            )

    @property
    def reads_instructions(self) -> bool:
        """Whether the Q-Former is to be given text with each picture."""
        return self.qformer_reads != "nothing"


@dataclass(frozen=True)
class FrozenParts:
    """What a checkpoint of LAVIS leaves out: the frozen models that it was trained with."""

    vision_encoder: str | None = None
    """Of a LAVIS .pth, folder or hub id of its frozen image encoder: CLIP ViT-L/14, or for ViT-g any BLIP-2 of Hugging
    Face's, whose image encoder alone is taken."""
    language_model: str | None = None
    """Of a LAVIS .pth of stage 2, folder or hub id of its frozen language model."""
    text_encoder: str = ModelConfig.text_encoder
    """Of a LAVIS .pth, folder or hub id of the BERT whose tokenizer and number of heads its Q-Former has."""


@dataclass(frozen=True)
class GenerationSettings:
    """How text is generated. The defaults are greedy; the paper's captions are from 5 beams."""

    max_new_tokens: int = 30
    """A caption is cut off after so many tokens."""
    min_new_tokens: int = 1
    """No caption ends before. The authors: 8 on COCO."""
    num_beams: int = 1
    """Beams kept at each token; 1: greedy."""
    top_p: float | None = None
    """Nucleus sampling: draw from the likeliest tokens that together have this probability; default: no sampling."""
    temperature: float = 1.0
    """Of sampling: below 1 likelier tokens are drawn more often."""
    num_return_sequences: int = 1
    """Captions per picture."""
    length_penalty: float = 1.0
    """Beam scores are divided by length to this power: below 0 shortens, above lengthens."""
    repetition_penalty: float = 1.0
    """Above 1, tokens said before become less likely."""

    @classmethod
    def for_answers(cls, **settings: Any) -> GenerationSettings:
        """`settings` with the paper's for VQA where they say nothing: 5 beams, length penalty -1; at most 10 tokens.

        Where `settings` ask for sampling it is plain sampling, without beams.
        """
        beams = {"num_beams": 5, "length_penalty": -1.0} if settings.get("top_p") is None else {}
        return cls(**{"max_new_tokens": 10, **beams, **settings})

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1 or not 0 <= self.min_new_tokens <= self.max_new_tokens:
            raise ConfigError(
                f"min_new_tokens is {self.min_new_tokens} and max_new_tokens {self.max_new_tokens}: "
                "needed is 0 <= min <= max and 1 <= max"
            )
        if self.num_beams < 1 or self.num_return_sequences < 1:
            raise ConfigError(
                f"num_beams is {self.num_beams} and num_return_sequences {self.num_return_sequences}: "
                "each must be at least 1"
            )
        if self.num_return_sequences > self.num_beams and (self.top_p is None or self.num_beams > 1):
            raise ConfigError(
                f"num_return_sequences is {self.num_return_sequences} with num_beams {self.num_beams}: there are only "
                "as many captions as beams; without beams, sampling (top_p) gives any number"
            )
        if self.top_p is None and self.temperature != 1.0:
            raise ConfigError(f"temperature is {self.temperature} without top_p: only sampling has a temperature")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p is {self.top_p}: must be above 0 and at most 1")
        if self.temperature <= 0 or self.repetition_penalty <= 0:
            raise ConfigError(
                f"temperature is {self.temperature} and repetition_penalty {self.repetition_penalty}: "
                "each must be above 0"
            )
