"""Commands that use a trained model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

from jsonargparse import ArgumentParser, Namespace
from jsonargparse.typing import NonNegativeFloat, PositiveInt

from qformers.cli.command import Command, instance, model_option, source_options


def _retrieval_options(parser: ArgumentParser) -> None:
    model_option(parser)
    parser.add_argument("--data", type=str, required=True, help="Pictures with captions, any supported format.")
    source_options(parser)
    parser.add_argument(
        "--rerank",
        type=int,
        default=0,
        metavar="K",
        help="Re-rank the K best by ITC with the ITM head; 0: ITC alone. The paper: 128.",
    )
    parser.add_argument(
        "--rule",
        type=Literal["itm", "itm+itc", "itm+itc/temperature"],
        default="itm+itc",
        help="What re-ranking goes by. itm: the match logit (the paper); itm+itc: plus the cosine (the authors' code); "
        "itm+itc/temperature: plus ITC's own logit, for a model whose ITM is the weaker head.",
    )
    parser.add_argument(
        "--itm_weight",
        type=NonNegativeFloat,
        default=1.0,
        help="Of ITM beside ITC's logit in itm+itc/temperature, chosen on pictures that are not these.",
    )
    parser.add_argument(
        "--scores", type=str, metavar="FILE", help="Keep the ITM scores here: killed, the same command goes on there."
    )
    parser.add_argument(
        "--captions_per_image",
        type=PositiveInt,
        metavar="N",
        help="Only the first N captions of each picture: 5 in the tables of COCO and Flickr30K.",
    )
    parser.add_argument("--json", type=str, metavar="FILE", help="Write the figures here too.")


def _evaluate_retrieval(options: Namespace) -> None:
    from qformers.data.config import SourceConfig
    from qformers.errors import ConfigError
    from qformers.evaluation.run import Reranking, evaluate_retrieval

    if options.rerank < 0:
        raise ConfigError(f"--rerank is {options.rerank}: give how many candidates, or 0 for none")
    source = instance(SourceConfig, options, path=options.data)
    reranking = Reranking(options.rerank, options.rule, options.scores, options.itm_weight) if options.rerank else None
    metrics = evaluate_retrieval(options.model, source, reranking, options.captions_per_image)
    for name, value in metrics.items():
        print(f"{name:<24} {value:.4g}")
    if options.json:
        Path(options.json).write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")


def _match_options(parser: ArgumentParser) -> None:
    parser.add_argument("image", type=str, metavar="IMAGE", help="Picture file.")
    parser.add_argument("texts", type=str, nargs="+", metavar="TEXT", help="Each is judged against the picture.")
    model_option(parser)
    parser.add_argument("--json", action="store_true", help="Print JSON.")


def _match(options: Namespace) -> None:
    from qformers.predictor import load

    model = load(options.model)
    probabilities = model.match(options.image, options.texts)
    judged = [{"text": text, "match": float(match)} for text, match in zip(options.texts, probabilities, strict=True)]
    if options.json:
        print(json.dumps(judged, indent=2, ensure_ascii=False))
        return
    for pair in judged:
        print(f"{pair['match']:.3f}  {pair['text']}")


def _caption_options(parser: ArgumentParser) -> None:
    from qformers.models.config import GenerationSettings

    parser.add_argument("images", type=str, nargs="+", metavar="IMAGE", help="Picture files.")
    model_option(parser)
    parser.add_argument("--prompt", type=str, help="Text to go on from; default: the one the model was trained with.")
    parser.add_argument("--stream", action="store_true", help="Print the words of one picture as they come.")
    parser.add_argument("--json", action="store_true", help="Print JSON.")
    parser.add_class_arguments(GenerationSettings, None)


def _caption(options: Namespace) -> None:
    from dataclasses import asdict

    from qformers.errors import ConfigError
    from qformers.models.config import GenerationSettings
    from qformers.predictor import load

    settings = instance(GenerationSettings, options)
    if options.stream and (len(options.images) > 1 or options.json):
        raise ConfigError("--stream prints one picture's words: give one picture, and leave out --json")
    model = load(options.model)
    if options.stream:
        for piece in model.stream_caption(options.images[0], options.prompt, **asdict(settings)):
            print(piece, end="", flush=True)
        print()
        return
    captions = model.caption(options.images, options.prompt, **asdict(settings))
    each = settings.num_return_sequences
    said = [
        {"image": image, "captions": captions[row * each : (row + 1) * each]}
        for row, image in enumerate(options.images)
    ]
    if options.json:
        print(json.dumps(said, indent=2, ensure_ascii=False))
        return
    for picture in said:
        for caption in picture["captions"]:
            print(caption if len(said) == 1 else f"{picture['image']}\t{caption}")


def _ask_options(parser: ArgumentParser) -> None:
    from dataclasses import asdict

    from qformers.models.config import GenerationSettings

    parser.add_argument("image", type=str, metavar="IMAGE", help="Picture file.")
    parser.add_argument("questions", type=str, nargs="+", metavar="QUESTION", help="Each is asked by itself.")
    model_option(parser)
    parser.add_argument(
        "--template", type=str, help="How the language model is asked, {} is the question; default: as it was trained."
    )
    parser.add_argument("--json", action="store_true", help="Print JSON.")
    parser.add_class_arguments(GenerationSettings, None)
    parser.set_defaults(asdict(GenerationSettings.for_answers()))


def _ask(options: Namespace) -> None:
    from dataclasses import asdict

    from qformers.models.config import GenerationSettings
    from qformers.predictor import load

    settings = instance(GenerationSettings, options)
    answers = load(options.model).ask(options.image, options.questions, options.template, **asdict(settings))
    each = settings.num_return_sequences
    said = [
        {"question": question, "answers": answers[row * each : (row + 1) * each]}
        for row, question in enumerate(options.questions)
    ]
    if options.json:
        print(json.dumps(said, indent=2, ensure_ascii=False))
        return
    for asked in said:
        for answer in asked["answers"]:
            print(answer if len(said) == 1 else f"{asked['question']}\t{answer}")


def _captioning_options(parser: ArgumentParser) -> None:
    from qformers.models.config import GenerationSettings

    model_option(parser)
    parser.add_argument("--data", type=str, required=True, help="Pictures with captions, any supported format.")
    source_options(parser)
    parser.add_class_arguments(GenerationSettings, None)
    parser.add_argument("--json", type=str, metavar="FILE", help="Write the figures here too.")
    parser.add_argument("--captions", type=str, metavar="FILE", help="Write the captions here, as COCO results.")
    parser.add_argument("--domains", action="store_true", help="D is NoCaps' own file: score its domains apart too.")
    parser.add_argument(
        "--java", action="store_true", help="METEOR and SPICE too, through pycocoevalcap where it and Java are there."
    )


def _evaluate_captioning(options: Namespace) -> None:
    from qformers.data.config import SourceConfig
    from qformers.evaluation.captioning import evaluate_captioning
    from qformers.models.config import GenerationSettings

    source, settings = instance(SourceConfig, options, path=options.data), instance(GenerationSettings, options)
    scores, metrics = evaluate_captioning(options.model, source, settings, options.domains)
    for name, value in metrics.items():
        print(f"{name:<12} {value:.4g}")
    if options.java:
        from qformers.evaluation.java_metrics import java_metrics

        for name, score in java_metrics(scores.captions, scores.references).items():
            print(f"{name:<12} {score.reason if score.value is None else f'{score.value:.4g}'}")
            if score.value is not None:
                metrics[name] = score.value
    for path, content in ((options.json, metrics), (options.captions, scores.results())):
        if path:
            Path(path).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _vqa_options(parser: ArgumentParser) -> None:
    from dataclasses import asdict

    from qformers.models.config import GenerationSettings

    model_option(parser)
    parser.add_argument("--data", type=str, required=True, help="Questions: of VQAv2, OK-VQA, GQA, or JSONL.")
    source_options(parser)
    parser.add_argument(
        "--template", type=str, help="How the language model is asked, {} is the question; default: as it was trained."
    )
    parser.add_argument(
        "--candidates", type=str, metavar="FILE", help="Answer with the likeliest line of this file, not by generating."
    )
    parser.add_argument(
        "--metric",
        type=Literal["auto", "vqa", "exact"],
        default="auto",
        help="vqa: the official accuracy over ten answers; exact: one of the answers (GQA); auto: by their number.",
    )
    parser.add_argument("--json", type=str, metavar="FILE", help="Write the figures here too.")
    parser.add_argument("--submission", type=str, metavar="FILE", help="Write the answers here, as VQAv2's results.")
    parser.add_argument("--without_answers", action="store_true", help="D is a test set: only answer its questions.")
    parser.add_class_arguments(GenerationSettings, None)
    parser.set_defaults(asdict(GenerationSettings.for_answers()))


def _evaluate_vqa(options: Namespace) -> None:
    from qformers.data.config import SourceConfig
    from qformers.errors import DataError
    from qformers.evaluation.answering import evaluate_vqa
    from qformers.models.config import GenerationSettings

    source, settings = instance(SourceConfig, options, path=options.data), instance(GenerationSettings, options)
    candidates = None
    if options.candidates:
        try:
            candidates = Path(options.candidates).read_text(encoding="utf-8").split("\n")
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"{options.candidates}: cannot be read: {error}") from error
        candidates = [line.strip() for line in candidates if line.strip()]
        if not candidates:
            raise DataError(f"{options.candidates}: holds no answer: write one a line")
    answered = evaluate_vqa(
        options.model, source, settings, options.template, candidates, need_answers=not options.without_answers
    )
    metrics = answered.metrics(None if options.metric == "auto" else options.metric)
    for name, value in metrics.items():
        print(f"{name:<32} {value:.4g}")
    for path, content in ((options.json, metrics), (options.submission, answered.submission())):
        if path:
            Path(path).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _inspect_options(parser: ArgumentParser) -> None:
    parser.add_argument("image", type=str, metavar="IMAGE", help="Picture file.")
    parser.add_argument(
        "--text",
        type=str,
        help="What the queries are to look for, or a VQA model's question; without it they read no text.",
    )
    model_option(parser)
    parser.add_argument("--output", type=str, required=True, metavar="PNG", help="Picture to write.")


def _inspect(options: Namespace) -> None:
    from qformers.evaluation.attention import draw_attention
    from qformers.predictor import load

    maps = load(options.model).attention(options.image, options.text)
    draw_attention(options.image, maps, Path(options.output))
    print(options.output)


COMMANDS: dict[tuple[str, ...], Command] = {
    ("evaluate", "retrieval"): Command(
        "Recall at 1, 5 and 10: the captions of each picture and the picture of each caption.",
        "--model M --data D [--rerank K] [--rule R] [--scores FILE] [--captions_per_image N] [--json FILE] [reading D]",
        "qformers evaluate retrieval --model runs/stage1 --data test.jsonl --rerank 128 --json recall.json",
        _retrieval_options,
        _evaluate_retrieval,
    ),
    ("evaluate", "captioning"): Command(
        "Caption every picture and score it against its captions: BLEU, ROUGE-L, CIDEr.",
        "--model M --data D [--json FILE] [--captions FILE] [--domains] [--java] [generation] [how to read D]",
        "qformers evaluate captioning --model runs/stage2 --data test.jsonl --num_beams 5 --json captioning.json",
        _captioning_options,
        _evaluate_captioning,
    ),
    ("evaluate", "vqa"): Command(
        "Answer questions about pictures and score the answers: VQA accuracy or exact match, by type.",
        "--model M --data D [--annotations FILE] [--candidates FILE] [--metric W] [--json FILE] [--submission FILE]",
        "qformers evaluate vqa --model runs/vqa --data v2_OpenEnded_mscoco_val2014_questions.json "
        "--annotations v2_mscoco_val2014_annotations.json --images val2014",
        _vqa_options,
        _evaluate_vqa,
    ),
    ("caption",): Command(
        "Say what is in a picture, through the language model of a stage-2 run.",
        "IMAGE [IMAGE ...] --model M [--prompt TEXT] [--stream] [--json] [generation]",
        "qformers caption cat.jpg dog.jpg --model runs/stage2 --num_beams 5",
        _caption_options,
        _caption,
    ),
    ("ask",): Command(
        "Answer questions about a picture, through the language model of a stage-2 run.",
        "IMAGE QUESTION [QUESTION ...] --model M [--template TEXT] [--json] [generation]",
        'qformers ask cat.jpg "what is on the sofa?" --model runs/vqa',
        _ask_options,
        _ask,
    ),
    ("match",): Command(
        "The probability that each text describes the picture.",
        "IMAGE TEXT [TEXT ...] --model M [--json]",
        'qformers match cat.jpg "a cat on a sofa" "a red car" --model runs/stage1',
        _match_options,
        _match,
    ),
    ("inspect",): Command(
        "Draw which parts of the picture each query looks at.",
        "IMAGE [--text T] --model M --output PNG",
        'qformers inspect cat.jpg --text "a cat on a sofa" --model runs/stage1 --output attention.png',
        _inspect_options,
        _inspect,
    ),
}
