"""Write captions.json.gz: what pycocoevalcap 1.2 makes of captions, its tokens and its scores.

Needs Java and `pip install pycocoevalcap==1.2`, and emojibase-data 17.0.0 (npm, https://github.com/milesj/emojibase,
MIT licence, © Miles Johnson), whose emoji labels are two fifths of the captions; the others are made up here.

    python tests/golden/make_caption_golden.py path/to/emojibase-data/en/data.json
"""

from __future__ import annotations

import gzip
import json
import random
import sys
from pathlib import Path

from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.rouge.rouge import Rouge
from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

OUTPUT = Path(__file__).with_name("captions.json.gz")
LICENCE = "emoji labels and tags: emojibase-data 17.0.0, MIT, © Miles Johnson; the others are made by this script"

# Parted by |, over several lines.
THINGS = """
dog|cat|man|woman|child|bus|train|pizza|giraffe|bear|bench|kite|boat|plate|clock|street|kitchen|field|beach|
table|umbrella|skateboard|surfboard|elephant|zebra|bicycle|motorcycle|sign|laptop|vase|sandwich|café|piñata|Zoë|
jalapeño
"""
KINDS = """
red|small|old|wooden|black-and-white|well-known|two-story|12-inch|half-eaten|striped|U.S.|tie-dyed|mid-1990s|
3-D|naïve|semi-open|green/blue|6-foot-tall|hand-made|50's|so-called|part-time|non-stop
"""
DOINGS = """
sitting on|standing next to|riding|looking at|eating|holding|parked near|flying over|walking past|in front of|
isn't near|can't see|doesn't like|won't leave|cannot reach|is gonna eat|wants to (slowly) pass|'s behind|
they're on
"""
ADDED = """
at 10:30 a.m.|at 5 p.m.|in the '90s|for $5.99|for 1,000 people|with 10% off|by 3/4|on the 2nd of Jan.|
in St. Paul|by Mr. Smith|from Acme Inc.|at No. 5|with a "STOP" sign|with a ‘stop’ sign|with “big” letters|
called `Rex`|saying ''hi''|(a pug)|[blurred]|{broken}|<b>here</b>|-- again|— again|– again|- again|...|…|!|?!|
!!!|; then|: then|and/or a cat|& a cat|R&B|AT&T|http://www.example.com/a?b=c|www.example.org|see example.com|
me@example.com|#tag|@someone|😀|❤️|👩‍🦱|½ full|1/2 full|3 1/2 miles|€5|£20|5¢|¥100|25°C|-5 degrees|+1|3.5|.5|1.|
o'clock|O'Brien's|rock 'n' roll|rock'n'roll|'tis|ma'am|y'all|the boys' toys|James's|it's|it’s|don’t|boys’|
e.g. a cat|i.e. a cat|etc.|vs. a cat|approx. 5|Ph.D.|J.R.R. Tolkien|L.A.|the U.S.A.|-LRB- x -RRB-|* star *|
under_score|a~b|a ^ b|x = y|C++|5'10"|6"|24/7|555-1234|(555) 555-1234|1990s|F-16|4x4|5km|photo.jpg|:)|;-)|:D|
^_^|№ 5|• dot|→ there|© 2014|&amp; more|last.Next|why?Because|x,y|Jr.|Sr., too|Dr.|Ave.|p. 5|fig. 2|Apr. 5|
Sat. night|ft. tall|30 ft.|5 lbs.|12 oz. cup
"""
ENDS = ["", "", "", ".", ".", ".", " .", "!", "?", "...", "..", " ", "  ", ",", '."', "'", "”", ")"]

# One caption's last full stop hangs on the next caption's first word; and what our rules leave out.
DIFFERING = ["it is plan B.", "A dog", "see fig.", "5 dogs", "a caf&eacute; table", "see 😀example.com", "မြန်မာ sign"]


def one_of(rng: random.Random, choices: str) -> str:
    return rng.choice(choices.replace("\n", "").split("|"))


def sentence(rng: random.Random) -> str:
    """One made-up caption, with up to three of the things that are hard to cut."""
    article = rng.choice(["a", "A", "the", "The", "two", "2", "An", "some", "this", "THE"])
    words = [
        article,
        one_of(rng, KINDS),
        one_of(rng, THINGS),
        one_of(rng, DOINGS),
        rng.choice(["a", "the", "his", "her"]),
    ]
    words += [rng.choice([one_of(rng, THINGS), one_of(rng, THINGS) + "'s", one_of(rng, KINDS)]), one_of(rng, THINGS)]
    for _ in range(rng.randint(0, 3)):
        words.insert(rng.randint(1, len(words)), one_of(rng, ADDED))
    joined = words[0]
    for word in words[1:]:
        joined += rng.choice([" "] * 30 + ["-", ",", ", ", "/", ""]) + word
    return joined + rng.choice(ENDS)


def emoji_captions(data: Path, rng: random.Random, count: int) -> list[str]:
    """Labels alone, and labels with tags behind a comma."""
    entries = [entry for entry in json.loads(data.read_text(encoding="utf-8")) if entry["label"]]
    captions = [entry["label"] for entry in entries]
    captions += [", ".join([entry["label"], *entry["tags"]]) for entry in entries if entry.get("tags")]
    return rng.sample(sorted(set(captions)), count)


def tokenized(captions: list[str]) -> list[str]:
    """pycocoevalcap's tokens of each, blank between them."""
    tokens = PTBTokenizer().tokenize({row: [{"caption": text}] for row, text in enumerate(captions)})
    return [tokens[row][0] for row in range(len(captions))]


def pictures(rng: random.Random, sentences: list[str], count: int, most: int) -> tuple[list[str], list[list[str]]]:
    """Candidates with 1 to `most` references each that share most of their words, as tokens."""
    candidates, references = [], []
    for _ in range(count):
        words = rng.choice(sentences).split(" ")
        texts = []
        for _ in range(rng.randint(1, most) + 1):
            kept = [word for word in words if rng.random() < 0.8]
            other = rng.choice(sentences).split(" ")
            texts.append(" ".join(kept + other[: rng.randint(0, 4)]))
        candidates.append(texts[0])
        references.append(texts[1:])
    return candidates, references


def scored(name: str, candidates: list[str], references: list[list[str]]) -> dict:
    given = dict(enumerate(references)), {row: [text] for row, text in enumerate(candidates)}
    bleu, _ = Bleu(4).compute_score(*given, verbose=0)
    scores = {f"bleu{n}": float(bleu[n - 1]) for n in (1, 2, 3, 4)}
    scores["rouge_l"] = float(Rouge().compute_score(*given)[0])
    scores["cider"] = float(Cider().compute_score(*given)[0])
    return {"name": name, "candidates": candidates, "references": references, "scores": scores}


def main() -> None:
    rng = random.Random(0)
    captions = emoji_captions(Path(sys.argv[1]), rng, 2000) + [sentence(rng) for _ in range(3000)]
    rng.shuffle(captions)
    tokens = tokenized(captions)
    sentences = [text for text in tokens if len(text.split()) > 3]
    candidates, references = pictures(rng, sentences, 300, 6)
    alone = [texts[:1] for texts in references]
    short = [" ".join(text.split()[: row % 4]) for row, text in enumerate(candidates)]
    sets = [
        scored("1 to 6 references each", candidates, references),
        scored("one reference each", candidates, alone),
        scored("candidates of 0 to 3 words", short, references),
        scored("every candidate empty", [""] * 300, references),
        scored("one picture", candidates[:1], references[:1]),
        scored("one picture, its candidate empty", [""], references[:1]),
        scored("candidate and reference empty", ["", "a dog"], [[""], ["a dog"]]),
        scored("two pictures, an empty reference", candidates[:2], [["", references[0][0]], references[1]]),
        scored("the candidate is a reference", [texts[0] for texts in references], references),
        scored("all pictures alike", candidates[:1] * 5, references[:1] * 5),
        scored(
            "a no-break space in a token", ["3\xa01/2 miles of road", "a dog"], [["3 1/2 miles"], ["3\xa01/2 dogs"]]
        ),
    ]
    differing = list(zip(DIFFERING, tokenized(DIFFERING), strict=True))
    content = {"licence": LICENCE, "captions": captions, "tokens": tokens, "differing": differing, "sets": sets}
    with open(OUTPUT, "wb") as file, gzip.GzipFile(fileobj=file, mode="wb", filename="", mtime=0) as packed:
        packed.write(json.dumps(content, ensure_ascii=False, indent=0).encode())
    print(f"{OUTPUT}: {len(captions)} captions, {OUTPUT.stat().st_size} bytes")


if __name__ == "__main__":
    main()
