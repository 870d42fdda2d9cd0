"""Stage 2 as a user runs it, at toy size: from a stage-1 run to captions, for both families of language models."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from toy_language import toy_tokenizer, toy_transformers_model
from toy_run import toy_config, write_toy_data

import qformers
from qformers.cli import main
from qformers.errors import CheckpointError, ConfigError
from qformers.models.config import LanguageConfig
from qformers.models.saving import load_model
from qformers.models.vision import build_vision_encoder
from qformers.training.config import TrainConfig
from qformers.training.loop import train


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("stage2")
    write_toy_data(folder)
    for family in ("gpt2", "t5"):
        toy_transformers_model(family).save_pretrained(folder / family)
        toy_tokenizer(folder / family, ends=family == "t5")
    train(toy_config(folder, folder / "stage1", steps=4, precision="fp32"))
    return folder


def stage2_config(data: Path, family: str, output: Path, **settings) -> TrainConfig:
    chosen = {"stage": 2, "start": str(data / "stage1"), "language": LanguageConfig(path=str(data / family))}
    return toy_config(data, output, precision="fp32", **{**chosen, **settings})


@pytest.fixture(scope="module", params=["gpt2", "t5"])
def run(request, data) -> tuple[str, TrainConfig, Path]:
    config = stage2_config(data, request.param, data / f"run_{request.param}")
    return request.param, config, train(config).model


def metric_rows(output: Path) -> list[dict]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def test_training_lowers_the_loss_and_leaves_the_language_model_alone(run, data):
    family, config, model = run
    rows = metric_rows(Path(config.output))
    assert [row["step"] for row in rows] == list(range(1, 13))
    assert rows[-1]["loss/lm"] < rows[0]["loss/lm"] == pytest.approx(rows[0]["loss/total"])
    assert {"tokens_per_second", "peak_memory_gb", "token_accuracy", "validation/lm"} <= rows[-1].keys()
    before = load_file(data / family / "model.safetensors")
    after = load_file(model / "language_model" / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    log = (Path(config.output) / "train.log").read_text()
    assert "language_model" in log and "text_branch" in log


def test_what_is_trained_is_saved_and_the_text_branch_is_kept(run, data):
    _, config, model = run
    loaded, _ = load_model(model).stage2()
    start = load_model(data / "stage1").stage1().state_dict()
    now = loaded.state_dict()
    for name, tensor in start.items():
        if "text_embeddings" in name or "text_ffn" in name or name.startswith("vision_encoder"):
            assert torch.equal(now[name], tensor), name
    assert not torch.equal(now["qformer.query_tokens"], start["qformer.query_tokens"])
    assert not [name for name in now if name.startswith(("itm_head", "itg_head", "text_projection"))]
    last = load_file(Path(config.output) / "checkpoints/step_00000012/model.safetensors")
    assert all(torch.equal(now[name], tensor) for name, tensor in last.items())
    assert not [name for name in last if name.startswith("language_model") or "text_ffn" in name]


def test_resumed_run_ends_with_the_same_weights(run, tmp_path):
    _, config, model = run
    copy = tmp_path / "run"
    shutil.copytree(config.output, copy)
    shutil.rmtree(copy / "model")
    for later in ("step_00000010", "step_00000012"):
        shutil.rmtree(copy / "checkpoints" / later)
    resumed = train(replace(config, output=str(copy)), resume="auto").model
    assert len(metric_rows(copy)) == 12
    expected, found = load_file(model / "model.safetensors"), load_file(resumed / "model.safetensors")
    assert expected.keys() == found.keys()
    assert all(torch.equal(tensor, found[name]) for name, tensor in expected.items())


def test_captions_are_the_same_alone_in_a_batch_streamed_and_from_the_command_line(run, data, capsys):
    _, config, model = run
    predictor = qformers.load(model)
    pictures = [data / f"{number}.png" for number in range(3)]
    prompts = ["a photo of", "", "the red"]
    together = predictor.caption(pictures, prompts, max_new_tokens=6)
    alone = [predictor.caption(*pair, max_new_tokens=6)[0] for pair in zip(pictures, prompts, strict=True)]
    assert together == alone
    assert "".join(predictor.stream_caption(pictures[0], prompts[0], max_new_tokens=6)).strip() == alone[0]
    beams = predictor.caption(pictures, num_beams=3, num_return_sequences=2, max_new_tokens=6)
    assert len(beams) == 6
    torch.manual_seed(0)
    assert len(predictor.caption(pictures[0], top_p=0.9, num_return_sequences=3, max_new_tokens=6)) == 3

    captions = predictor.caption(pictures[:2], max_new_tokens=6)
    arguments = [str(picture) for picture in pictures[:2]]
    assert main(["caption", *arguments, "--model", config.output, "--max_new_tokens", "6", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert [picture["captions"][0] for picture in said] == captions
    assert main(["caption", arguments[0], "--model", config.output, "--max_new_tokens", "6", "--stream"]) == 0
    assert capsys.readouterr().out.strip() == captions[0]


def test_saved_again_it_says_the_same(run, data, tmp_path):
    predictor = qformers.load(run[2])
    predictor.save_pretrained(tmp_path / "copy")
    copy = qformers.load(tmp_path / "copy")
    for name, tensor in predictor.model.state_dict().items():
        assert torch.equal(copy.model.state_dict()[name], tensor), name
    assert copy.caption(data / "1.png", max_new_tokens=5) == predictor.caption(data / "1.png", max_new_tokens=5)


def test_evaluation_scores_every_picture(run, data, tmp_path, capsys):
    _, config, _ = run
    arguments = ["evaluate", "captioning", "--model", config.output, "--data", str(data / "pairs.jsonl")]
    files = ["--json", str(tmp_path / "scores.json"), "--captions", str(tmp_path / "captions.json")]
    assert main([*arguments, *files, "--max_new_tokens", "6"]) == 0
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert {"images", "bleu4", "rouge_l", "cider"} <= scores.keys() and scores["images"] == 16
    captions = json.loads((tmp_path / "captions.json").read_text())
    assert len(captions) == 16 and captions[0].keys() == {"image_id", "caption"}
    assert "cider" in capsys.readouterr().out


def test_nocaps_domains_are_scored_apart(run, data, tmp_path):
    _, config, _ = run
    domains = ["in-domain", "near-domain", "out-domain"]
    images = [{"id": n, "file_name": f"{data}/{n}.png", "domain": domains[n % 3]} for n in range(6)]
    said = [{"image_id": n, "caption": text} for n in range(6) for text in ("a red cat.", f"a dog and {n} birds")]
    (tmp_path / "nocaps.json").write_text(json.dumps({"images": images, "annotations": said}))
    arguments = ["evaluate", "captioning", "--model", config.output, "--data", str(tmp_path / "nocaps.json")]
    more = ["--format", "coco", "--domains", "--max_new_tokens", "5", "--json", str(tmp_path / "scores.json")]
    assert main([*arguments, *more]) == 0
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert scores["images"] == 6 and "overall/cider" not in scores
    assert {"cider", *(f"{domain}/cider" for domain in domains)} <= scores.keys()


def test_captioning_goes_on_from_stage_2_with_a_prompt_a_larger_picture_and_the_image_encoder(run, data, tmp_path):
    """As the paper fine-tunes: "a photo of", position embeddings interpolated, layers learning at falling rates."""
    _, config, model = run
    finer = replace(
        config,
        output=str(tmp_path / "run"),
        start=str(model),
        language=LanguageConfig(prompt="a photo of"),
        model=replace(config.model, train_vision_encoder=True, checkpoint_vision_encoder=True),
        data=replace(config.data, transform=replace(config.data.transform, image_px=42)),
        optimiser=replace(config.optimiser, vision_layer_decay=0.5),
        steps=4,
    )
    result = train(finer)
    before, after = load_file(model / "model.safetensors"), load_file(result.model / "model.safetensors")
    encoder = [name for name in before if name.startswith("vision_encoder.") and name.endswith("weight")]
    assert encoder and all(not torch.equal(before[name], after[name]) for name in encoder if "layernorm" not in name)
    predictor = qformers.load(result.model)
    assert predictor.preprocess(data / "0.png").shape[-1] == 42
    assert predictor.loaded.stage2()[1].prompt == "a photo of"
    assert isinstance(predictor.caption(data / "0.png", max_new_tokens=4)[0], str)


def test_what_a_stage_lacks_is_said_in_one_line(run, data):
    speaker, matcher = qformers.load(run[2]), qformers.load(data / "stage1")
    with pytest.raises(CheckpointError, match="a stage-2 model has no ITC and ITM heads: give the stage-1 run"):
        speaker.itc(data / "0.png", "a cat")
    with pytest.raises(CheckpointError, match="a stage-1 model has no language model: train stage 2 from it"):
        matcher.caption(data / "0.png")
    with pytest.raises(ConfigError, match="beams end all at once"):
        list(speaker.stream_caption(data / "0.png", num_beams=2))


def test_bad_input_gets_one_line(run, data, tmp_path, capsys, monkeypatch):
    family, config, model = run
    with pytest.raises(CheckpointError, match=r"query_tokens has shape \(4, 32\), the recipe's model \(5, 32\)"):
        train(replace(config, output=str(tmp_path / "a"), model=replace(config.model, num_queries=5)))
    with pytest.raises(ConfigError, match="stage 2 needs start"):
        replace(config, start=None)
    with pytest.raises(ConfigError, match="belongs to stage 2"):
        replace(config, stage=1)
    with pytest.raises(ConfigError, match="there is no such folder"):
        train(replace(config, output=str(tmp_path / "b"), language=LanguageConfig(path=str(tmp_path / "none"))))
    with pytest.raises(ConfigError, match=r"language\.path is not set"):
        train(replace(config, output=str(tmp_path / "c"), language=LanguageConfig()))
    with pytest.raises(CheckpointError, match=r"no qformers model here"):
        train(replace(config, output=str(tmp_path / "e"), start=str(tmp_path / "typo"), language=LanguageConfig()))
    every_block = replace(config, output=str(tmp_path / "f"), start=str(tmp_path / "every_block"))
    train(toy_config(data, tmp_path / "every_block", steps=4, model=replace(config.model, cross_attention_frequency=1)))
    with pytest.raises(CheckpointError, match=r"\d+ of its weights have no place in the recipe's model, first qformer"):
        train(every_block)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="needs bitsandbytes"):
        train(
            replace(
                config,
                output=str(tmp_path / "d"),
                language=LanguageConfig(path=str(data / family), quantization="8bit"),
            )
        )
    if family == "gpt2":  # T5's positions are relative: it has no context to exceed
        with pytest.raises(ConfigError, match=r"take \d+ tokens, the language model's context is 64"):
            qformers.load(model).caption(data / "0.png", prompt="red " * 70)
        assert main(["caption", str(data / "0.png"), "--model", config.output, "--prompt", "red " * 70]) == 1
        assert "context is 64: shorten the prompt" in capsys.readouterr().err
    assert main(["caption", str(data / "0.png"), "--model", config.output, "--num_return_sequences", "2"]) != 0
    assert "only as many captions as beams" in capsys.readouterr().err
    scored = ["evaluate", "captioning", "--model", config.output, "--data", str(data / "pairs.jsonl")]
    assert main([*scored, "--num_beams", "2", "--num_return_sequences", "2"]) == 1
    assert "one caption a picture is scored" in capsys.readouterr().err
    assert main([*scored, "--domains"]) == 1
    assert "not JSON" in capsys.readouterr().err


def test_an_end_token_that_is_a_word_ends_captions_and_is_not_said(data, tmp_path):
    language = LanguageConfig(path=str(data / "gpt2"), end_token="flies")
    model = train(stage2_config(data, "gpt2", tmp_path / "run", language=language, steps=6)).model
    speaker = qformers.load(model)
    captions = speaker.caption([data / f"{number}.png" for number in range(4)], max_new_tokens=8)
    assert not any("flies" in caption for caption in captions)
    assert "".join(speaker.stream_caption(data / "0.png", max_new_tokens=8)).strip() == captions[0]
    further = train(stage2_config(data, "gpt2", tmp_path / "on", start=str(model), language=LanguageConfig(), steps=4))
    _, kept = load_model(further.model).stage2()
    assert kept.end_token == "flies" and kept.path == str(data / "gpt2")


def test_layers_are_computed_twice_when_checkpointed(data):
    """The same loss and gradients; each layer of the image encoder runs once more in the backward pass."""
    pixels = torch.randn(2, 3, 28, 28)
    gradients, runs = [], []
    for checkpointed in (False, True):
        encoder = build_vision_encoder(data / "encoder", image_px=28).train()
        if checkpointed:
            encoder.checkpoint_layers()
        counted: list[int] = []
        mlp = next(part for name, part in encoder.named_modules() if name.endswith("layer.0.mlp"))
        mlp.register_forward_hook(lambda *_, counted=counted: counted.append(1))
        encoder(pixels).pow(2).sum().backward()
        gradients.append([parameter.grad for parameter in encoder.parameters() if parameter.grad is not None])
        runs.append(len(counted))
    assert runs == [1, 2]
    for plain, again in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, again)


def test_a_caption_that_is_empty_after_cleaning_is_named(data, tmp_path):
    rows = [json.loads(line) for line in (data / "pairs.jsonl").read_text().splitlines()]
    rows[3]["caption"] = "..."
    (data / "empty.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = stage2_config(data, "gpt2", tmp_path / "run", steps=4)
    source = replace(config.data.train[0], path=str(data / "empty.jsonl"))
    train(replace(config, data=replace(config.data, train=[source], validation=[], max_broken_fraction=1.0)))
    assert "empty after cleaning" in (tmp_path / "run" / "broken_images.log").read_text()
