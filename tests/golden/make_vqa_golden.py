"""How vqa.json.gz was made: the official evaluator's values for answers that meet every rule of its normalisation.

    pip download --no-deps salesforce-lavis==1.0.2
    unzip salesforce_lavis-1.0.2-py3-none-any.whl 'lavis/common/vqa_tools/vqa_eval.py'
    python tests/golden/make_vqa_golden.py lavis/common/vqa_tools/vqa_eval.py

That file is VQAEval of github.com/GT-Vision-Lab/VQA (PythonEvaluationTools/vqaEvaluation/vqaEval.py) as LAVIS, the
authors of BLIP-2, carry it: the same tables, regular expressions and evaluate(), formatted otherwise.
"""

from __future__ import annotations

import gzip
import importlib.util
import json
import random
import sys
from pathlib import Path

OUTPUT = Path(__file__).parent / "vqa.json.gz"
WORDS = ["cat", "dog", "red", "blue", "left", "right", "tennis", "frisbee", "New York", "pizza", "yes", "no", "2", "10"]


class Answers:
    """What VQAEval reads of a file of questions or of results."""

    def __init__(self, by_question: dict) -> None:
        self.qa = by_question

    def getQuesIds(self) -> list:
        return list(self.qa)


def texts(evaluator) -> list[str]:
    """Answers that meet each rule: every mark in every place, periods, digits, articles, contractions, spaces."""
    found = ["", " ", "the", "a an the", "\n", "two\tcats", "two\ncats", "  a  Cat ", "YES", "Yes.", "?", "., ;"]
    for mark in [*evaluator.punct, "'", ".", ":", "&", "%", "$"]:
        found += [f"a{mark}b", f"a{mark} b", f"a {mark}b", f"a {mark} b", f"{mark}", f"cat{mark}", f"{mark}cat"]
        found += [f"1{mark}000", f"1,000{mark}5 cats", f"x{mark}y {mark}z"]
    found += ["1.5", "1.", ".5", "3.14.", "p.m.", "5 p.m", "a.b.c", "." * 31, "." * 40, "x." * 40, "1. 2. 3", "v1.0"]
    found += ["1,000", "1,000,000", "1, 000", "10,5 kg, about", "a,b", "12,3-4", "Is it 1,000?", "€5,50 (or so)"]
    for number in evaluator.manualMap:
        found += [number, number.upper(), f"{number} cats", f"the {number}", f"{number}."]
    found += ["eleven", "twenty one", "none of them", "one-two", "ten10", "a one and a two"]
    found += ["A", "An apple", "the the cat", "cat on a mat", "theatre", "a's"]
    for contraction, whole in evaluator.contractions.items():
        found += [contraction, whole, contraction.upper()]
    found += ["I dont know", "it's", "its", "dont't", "whats that", "Whats, that", "isnt it", "can't-be", "cant/wont"]
    return list(dict.fromkeys(found))


def cases(evaluator) -> list[dict]:
    """A question for each text, with ten people who agree with it wholly, partly, in other spelling, or not at all."""
    draw = random.Random(0)
    made = []
    for number, text in enumerate(texts(evaluator)):
        normal = evaluator.processDigitArticle(
            evaluator.processPunctuation(text.replace("\n", " ").replace("\t", " ").strip())
        )
        agreeing = number % 12 if number % 12 <= 10 else draw.randint(0, 10)
        spelled = draw.choice([normal, text, text.lower(), normal])
        people = [spelled] * agreeing + draw.sample(WORDS, 10 - agreeing)
        draw.shuffle(people)
        made.append({"answer": text, "people": people})
    for agreeing in range(11):  # ties: two answers share the ten
        people = ["cat"] * agreeing + ["dog"] * (10 - agreeing)
        made += [{"answer": answer, "people": people} for answer in ("cat", "dog", "The Cat.", "")]
    made.append({"answer": "p.m.", "people": ["p.m."] * 10})  # all the same: people's periods stay
    made.append({"answer": "pm", "people": ["p.m."] * 9 + ["pm"]})
    types = ["what", "is the", "how many", "what color is the", "none of the above"]
    for number, case in enumerate(made):
        case["question_type"] = types[number * 7 % 5]
        case["answer_type"] = ("other", "number", "yes/no")[number % 3]
    return made


def main(path: str) -> None:
    spec = importlib.util.spec_from_file_location("vqa_eval", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    made = cases(module.VQAEval())
    asked = {
        number: {
            "question_type": case["question_type"],
            "answer_type": case["answer_type"],
            "answers": [{"answer": text, "answer_id": place} for place, text in enumerate(case["people"], 1)],
        }
        for number, case in enumerate(made)
    }
    said = {number: {"answer": case["answer"]} for number, case in enumerate(made)}
    evaluator = module.VQAEval(Answers(asked), Answers(said), n=12)
    evaluator.evaluate()
    for number, case in enumerate(made):
        text = case["answer"].replace("\n", " ").replace("\t", " ").strip()
        case["normal"] = evaluator.processDigitArticle(evaluator.processPunctuation(text))
        case["accuracy"] = evaluator.evalQA[number]
    content = {"cases": made, "accuracy": evaluator.accuracy}
    with gzip.GzipFile(OUTPUT, "wb", mtime=0) as file:
        file.write(json.dumps(content, ensure_ascii=False, indent=1).encode())
    print(f"\n{len(made)} answers, {len({case['accuracy'] for case in made})} different accuracies", file=sys.stderr)


if __name__ == "__main__":
    main(sys.argv[1])
