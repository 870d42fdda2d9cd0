"""Questions about pictures: python examples/question_answering.py --picture cat.jpg --model runs/captioner

Any stage-2 model answers, one that was trained on questions or instructions far better: a BLIP-2 or an InstructBLIP of
Hugging Face's will do as `--model`.
"""

from __future__ import annotations

from jsonargparse import auto_cli

import qformers

QUESTIONS = ["what is in the picture?", "how many are there?", "what colour is it?"]


def main(picture: str = "cat.jpg", model: str = "runs/captioner", questions: list[str] = QUESTIONS) -> None:
    """Ask all questions of one picture, then sample several answers to the first."""
    speaker = qformers.load(model)
    for question, answer in zip(questions, speaker.ask(picture, questions), strict=True):
        print(f"{question}  {answer}")

    print("as it comes:", end=" ")
    for piece in speaker.stream_answer(picture, questions[0]):
        print(piece, end="", flush=True)
    print()

    for answer in speaker.ask(picture, questions[0], top_p=0.9, num_return_sequences=3):
        print("perhaps:", answer)


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
