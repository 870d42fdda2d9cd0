"""Captions cut into words as the published caption metrics cut them, without Java.

Published BLEU, ROUGE-L, CIDEr, METEOR and SPICE are computed on the tokens of the Stanford PTB tokenizer
(`-preserveLines -lowerCase`, CoreNLP 3.4.1) less a list of punctuation: pycocoevalcap's `PTBTokenizer`. The rules
here were found by asking that tokenizer and are our own; tests/golden holds its answers and the few that differ.

It is a longest-match scanner. At each place every rule is tried and the one that reads furthest wins, the first
listed among equals. A rule may read on behind its token (the `'s` behind "dog", the digit behind "No. 5"): that
counts for the contest and is left in the text for the next token.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterator
from typing import NamedTuple

# pycocoevalcap removes these. Its list has "-LRB-" too, but the tokens are in lower case by then: brackets stay.
_PUNCTUATION = frozenset(("''", "'", "``", "`", ".", "?", "!", ",", ":", "-", "--", "...", ";"))

_WRITTEN_AS = {
    **{"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"},
    **{"¼": "1/4", "½": "1/2", "¾": "3/4", "⅓": "1/3", "⅔": "2/3"},
    **{"¢": "cents", "£": "#", "€": "$", "¤": "$", "₠": "$", "\x80": "$"},
    **{"&lt;": "<", "&gt;": ">", "&amp;": "&", "&quot;": "''", "&nbsp;": "-"},
}
_QUOTES = {
    **{"‘": "`", "‛": "`", "‹": "`", "\x91": "`", "`": "`", "’": "'", "›": "'", "\x92": "'"},
    **{"“": "``", "«": "``", "\x93": "``", "”": "''", "»": "''", "\x94": "''"},
}

# Abbreviations that keep their full stop wherever they stand.
_TITLES = """adj adm adv alex assoc asst atty attys ave brig capt cf cie cmdr col comdr cpl dept det dr drs elec ens
ft gen gov govs hon insp invt jos lieut lt maj messrs mfg mlle mme mr mrs ms msgr mt mtg natl pfc ph pres prof profs
pvt rep reps rev sen sens sfc sgt spc st ste supt supts treas vs wm"""
# Those that keep it too, but give way to a longer reading of what follows ("Inc.xy").
_ENDINGS = r"""al ala apr ariz assn aug bhd bldg blvd bros calif co colo conn corp cos ct dak dec esq est etc ext feb
fla fri ga inc ind intl jan jr jul jun kan kans ky ltd mar md mich minn mo mon mont neb nev nov oct okla penn plc
ppte pptes ppty pptys pte ptes pty ptys rd rt sep sept seq sq sr sys tel tenn thu thurs tue tues univ va vt wed wis
wisc wyo ph\.d ed\.d"""
_CAPITAL_ENDINGS = "Ark Az Del Ill La Mass Miss Ore Pa Tex Wash"
# Those that keep it before a number only.
_BEFORE_NUMBERS = "art ca fig figs no nos op pp prop"
# A single letter keeps its full stop, "plan b.", unless one of these begins a sentence behind it: "plan B. The".
_STARTERS = """A About According Additionally After An As At But Earlier He Her Here However If In It Last Many More
Now Once One Other Our She Since So Some Such That The Their Then There These They This We What When While Yet
You"""
_FILE_TYPES = """bat bmp c cgi cpp dll doc docx exe gif gz h htm html jar java jpeg jpg mov mp3 pdf php pl png ppt ps
py sql tar txt wav x xml zip"""


def tokenize(caption: str) -> list[str]:
    """The caption's tokens in lower case, punctuation left out, as pycocoevalcap 1.2 gives them.

    "A woman's dog (a pug) can't jump." → a woman 's dog -lrb- a pug -rrb- ca n't jump. Brackets stay as "-lrb-",
    emoji go, a token may hold a no-break space ("3 1/2" is one). A caption is taken by itself. pycocoevalcap has
    Java read all captions as one text, where the first word of the *next* caption can decide over a last full
    stop: "plan B." gives "b." before "a dog" and "b" before "A dog". Here it is always "b.".
    """
    one_line = caption.replace("\n", " ").replace("\xad", "")
    return [token for token in _scan(one_line + "\n") if token not in _PUNCTUATION]


def _scan(text: str) -> Iterator[str]:
    place = 0
    while place < len(text):
        plain = _PLAIN.match(text, place)  # blanks and unadorned words: most of a caption, and no rule is needed
        if plain:
            place = plain.end()
            if plain.group(1):
                yield plain.group(1).lower()
            continue
        best, rewrite = None, _unchanged
        for rule in _RULES:
            match = rule.pattern.match(text, place)
            if match and (best is None or match.end() > best.end()):
                best, rewrite = match, rule.rewrite
        if best is None:
            place += 1  # neither letter nor symbol to that tokenizer: an emoji, say
            continue
        place = best.end(1)
        yield rewrite(best.group(1)).lower()


class _Rule(NamedTuple):
    """Group 1 is the token; the rest of the match only takes part in the contest."""

    pattern: re.Pattern[str]
    rewrite: Callable[[str], str]


def _unchanged(token: str) -> str:
    return token


def _joined(token: str) -> str:
    """Blanks inside the token made no-break, parentheses spelled out."""
    return token.replace("(", "-lrb-").replace(")", "-rrb-").replace(" ", "\xa0")


def _written_as(token: str) -> str:
    return _WRITTEN_AS.get(token.lower(), token)


def _straight(token: str) -> str:
    """Typewriter's quotes for curly ones."""
    return re.sub("’|\x92|&apos;", "'", re.sub("‘|\x91", "`", token))


def _quotes(token: str) -> str:
    return "".join(_QUOTES.get(character, character) for character in token)


def _ampersand(token: str) -> str:
    return token.replace("&amp;", "&")


def _letters() -> str:
    """The inside of a character class: letters, marks and foreign digits of Unicode's first plane."""
    categories = {"Lu", "Ll", "Lt", "Lm", "Lo", "Mn", "Mc", "Nd"}
    points = {point for point in range(0x80, 0x10000) if unicodedata.category(chr(point)) in categories}
    points |= set(range(0x250, 0x37E))  # modifier signs among the letters count as letters
    points -= set(range(0xFE00, 0xFE10))  # variation selectors, as in "❤️", do not
    first = sorted(point for point in points if point - 1 not in points)
    last = sorted(point for point in points if point + 1 not in points)
    return "a-zA-Z" + "".join(f"{chr(a)}-{chr(b)}" for a, b in zip(first, last, strict=True))


def _any_of(words: str) -> str:
    return "|".join(sorted(words.split(), key=len, reverse=True))


_LETTERS = _letters()
_L, _A = f"[{_LETTERS}]", f"[{_LETTERS}0-9]"
_APOSTROPHE = "(?:['’\x92]|&apos;)"
_ANY_APOSTROPHE = "(?:['’\x92`‘\x91]|&apos;)"
_CLITIC = "(?:[sSmMdD]|[rR][eE]|[vV][eE]|[lL][lL])"
_WORD = rf"{_L}{_A}*(?:[.!?]{_L}{_A}*)*"  # "end.start" and "ready?go" are one word each
_PART = rf"(?:[dDlLoO]{_ANY_APOSTROPHE}{_A}(?={_A}))?{_A}+"
_COMPOUND = rf"{_PART}(?:[-_\u058a\u2010\u2011]{_PART})*"  # 12-year-old, o'clock-ish, snake_case
_INITIALS = "[A-Z]+(?:(?:[+&]|&amp;)[A-Z]+)+"  # AT&T
_NAME = "[A-Za-z][A-Za-z0-9_.:-]*"
_URL_PART, _URL_END = r"[^\s\"<>|(){}]", r"[^\s\"<>|.!?(){},\-]"
_HOST_PART = r"[^\sA-Z0-9\"'$()./:;<=>@\[\\\]^_`{|},?!\U00010000-\U0010ffff-]"
_EYE = "[x^=~<>'-]"
_PHONE_START = r"(?:\([0-9]{2,3}\)[ \xa0]?|(?:\+\+?)?(?:[0-9]{2,4}[- \xa0])?[0-9]{2,4}[- \xa0])"
_SYMBOLS = (
    r"$%&+,./:;<=>\\^|~\-"
    "¡¥-©¬®-´¶-¹¿×÷\u037e\u0387฿₤‖‗†-‣‰-‸※‾-⁂⁄⁰-⁾₀-₎⅕-⅞℀-⅏←-⯿"
    "、。〒・！-／：-＠［-｀｛-･￠￡￥￦"
)

_PLAIN = re.compile(r"\s+|(?!(?i:cannot|gonna|gotta|wanna|gimme|lemme)\b)([A-Za-z]+)(?=\s)")


def _rule(pattern: str, rewrite: Callable[[str], str] = _unchanged) -> _Rule:
    return _Rule(re.compile(pattern), rewrite)


_RULES = (
    # Contractions written as one word.
    _rule("((?i:can))(?i:not)"),
    _rule("((?i:gon|wan))(?i:na)"),
    _rule("((?i:got))(?i:ta)"),
    _rule("((?i:gim|lem))(?i:me)"),
    _rule("('(?i:t))(?i:is|was)"),
    # Mark-up.
    _rule(r"(<!--.*?-->|<[?!][A-Za-z][^<>]*>)", _joined),
    _rule(rf"(</?{_NAME}(?:\s+{_NAME}(?:\s*=\s*(?:'[^']*'|\"[^\"]*\"))?)*\s*/?>)", _joined),
    _rule("(&(?:(?i:amp|lt|gt|nbsp)|quot);)", _written_as),
    _rule("(&(?:[aeiouAEIOU](?:acute|grave|uml)|QUOT|Quot|#[0-9]+);)"),
    # Words and what hangs on them: dog|'s, do|n't.
    _rule(rf"({_WORD}){_APOSTROPHE}{_CLITIC}"),
    _rule(rf"([A-Za-z]*?[A-MO-Za-mo-z])[nN]{_ANY_APOSTROPHE}[tT]"),
    _rule(rf"({_APOSTROPHE}{_CLITIC})[^A-Za-z]", _straight),
    _rule(rf"([nN]{_ANY_APOSTROPHE}[tT])", _straight),
    _rule(rf"({_WORD})"),
    # Words with an apostrophe of their own: O'Brien, ma'am, 'em, rock|'n'|roll, the '90s, d'|x.
    _rule(rf"([A-HJ-XZdlno]{_ANY_APOSTROPHE}{_L}{{2,}}|{_L}+[aeiouyAEIOUY]{_ANY_APOSTROPHE}[aeiouA-Z]{_L}*)"),
    _rule(rf"({_APOSTROPHE}[nN]{_APOSTROPHE}?|(?:[lLdDjJ]|(?i:ol|somethin|dunkin)){_APOSTROPHE})"),
    _rule(rf"({_APOSTROPHE}(?:(?i:em)|till?|cause|[2-9]0s))"),
    _rule(r"((?i:c'est|c'mon|cap'n|e'er|ev'ry|li'l|nat'l|nor'easter|s'mores|o'o|cont'd\.))"),
    _rule(rf"([yY]{_APOSTROPHE}){_L}"),
    _rule(rf"({_APOSTROPHE}[0-9]{{2}})\s"),
    # Addresses and names.
    _rule(rf"((?i:https?)://{_URL_PART}+{_URL_END})"),
    _rule(rf"(www\.(?:[^\s\"<>|.!?(){{}},]+\.)+[A-Za-z]{{2,4}}(?:/{_URL_PART}+{_URL_END})?)"),
    _rule(rf"((?:{_HOST_PART}+\.)+(?i:com|net|org|edu)(?:/{_URL_PART}+{_URL_END})?)"),
    _rule(rf"(<?[A-Za-z0-9]{_URL_PART}*@(?:[^\s\"<>|(){{}}.]+\.)*[^\s\"<>|(){{}}.]+>?)"),
    _rule(rf"(@[A-Za-z_][A-Za-z_0-9]*|#{_L}+)"),
    _rule(f"({_INITIALS})", _ampersand),
    _rule(r"([cC]\+\+|[cCfF]#|[A-Z]+\$)"),
    # Numbers: 1,000.5 10:30 -5, "3 1/2" (one token), telephone numbers.
    _rule(r"([-+]?(?:[0-9]*(?:[.,:][0-9]+)+|[0-9]+))"),
    _rule(r"((?:[0-9]{1,4}[- \xa0])?[0-9]{1,4}(?:\\?/|⁄)[0-9]{1,4})", _joined),
    _rule(rf"({_PHONE_START}[0-9]{{3,4}}[- \xa0]?[0-9]{{3,5}})", _joined),
    # Full stops that belong to the word.
    _rule(
        rf"((?:(?i:{_any_of(_ENDINGS)})|{_any_of(_CAPITAL_ENDINGS)}|{_any_of(_CAPITAL_ENDINGS.upper())})\.)(?s:.{{0,2}})"
    ),
    _rule(rf"([A-Za-z])\.\s+(?:(?:{_any_of(_STARTERS)}|{_any_of(_STARTERS.upper())})|M[rs]\.)\s"),
    _rule(rf"((?:(?i:{_any_of(_TITLES)})|[A-Za-z](?:\.[A-Za-z])*)\.)"),
    _rule(rf"((?i:{_any_of(_BEFORE_NUMBERS)})\.)\s?[0-9]"),
    _rule(rf"((?:{_WORD}|{_COMPOUND}|{_INITIALS})\.)[,;:]", _ampersand),
    _rule(rf"({_A}+(?:\.{_A}+)*\.(?i:{_any_of(_FILE_TYPES)}))[\s.,!?]"),
    # Compounds; then 1.5-inch and non-U.S.; then and/or.
    _rule(f"({_COMPOUND})"),
    _rule(r"([A-Za-z0-9][A-Za-z0-9.,]*(?:-(?:[A-Za-z](?:\.[A-Za-z])+\.|[A-Za-z0-9]+))+)"),
    _rule(r"([A-Za-z0-9]+(?:-[A-Za-z]+){0,2}(?:\\?/[A-Za-z0-9]+(?:-[A-Za-z]+){0,2}){1,2})"),
    # Smileys.
    _rule(r"([<>]?[:;=][-'o*]?[()DPdpO{@|\\\[\]])[^A-Za-z0-9]", _joined),
    _rule(rf"(\({_EYE}[_.-]?{_EYE}\)|{_EYE}_{_EYE})", _joined),
    # Quotes, punctuation, symbols.
    _rule(rf"('){_L}\S"),  # an opening quote: it keeps the "'s" out of 'summer'
    _rule(f"({_APOSTROPHE}{_CLITIC})", _straight),
    _rule("(''|[\"']|&apos;)", lambda _: "''"),
    _rule("([`‘’‚‛‹›“”„‟«»\x91-\x94]{1,2})", _quotes),
    _rule(r"(\.\.\.+|\. \. \.|[…\x85])", lambda _: "..."),
    _rule(r"(---?-?|[–—―\x96\x97]|&(?:MD|mdash|ndash);)", lambda _: "--"),
    _rule(r"([!?]+|_+|\*+|#+|@+|(?:\\\*)+|-----+|<<|>>)"),
    _rule(r"(-(?i:[lr][rsc]b)-|[(){}\[\]]|[¼½¾⅓⅔¢£€¤₠\x80])", _written_as),
    _rule(f"([{_SYMBOLS}])"),
)
