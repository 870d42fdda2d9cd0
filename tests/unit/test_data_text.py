"""Cleaning, WordPiece with [DEC] last, and the two rules for captions over the limit."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import BertTokenizerFast

from qformers.data.text import CaptionTokenizer, clean_caption
from qformers.errors import ConfigError, DataError

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "cat", "on", "mat", "##s", "[", "]", "sep", "dec"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bert")
    (folder / "vocab.txt").write_text("\n".join(WORDS))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "BertTokenizer"}))
    return folder


@pytest.mark.parametrize(
    ("raw", "clean"),
    [
        ('A  Cat, on-the "Mat"!\n', "a cat, on-the mat"),
        ("one.two(three)*four#five:six;seven~eight", "one two three four five six seven eight"),
        ("What's this?", "what's this?"),
        (' .!"()*#:;~\t\n', ""),
        ("w " * 60, " ".join(["w"] * 50)),
    ],
)
def test_cleaning_is_the_authors_rule(raw, clean):
    assert clean_caption(raw) == clean


def test_dec_is_the_last_id_and_survives_saving(folder, tmp_path):
    tokenizer = CaptionTokenizer.from_pretrained(folder)
    assert (tokenizer.dec_id, tokenizer.vocab_size) == (len(WORDS), len(WORDS) + 1)
    assert (tokenizer.pad_id, tokenizer.cls_id, tokenizer.sep_id) == (0, 2, 3)
    tokenizer.save(tmp_path / "saved")
    again = CaptionTokenizer.from_pretrained(tmp_path / "saved")
    assert (again.dec_id, again.vocab_size) == (len(WORDS), len(WORDS) + 1)
    assert again.encode_one("a cats") == tokenizer.encode_one("a cats") == [2, 5, 6, 9, 3]


def test_encode_pads_right_and_agrees_with_transformers(folder):
    texts = ["a cat", "cats on a mat", ""]
    input_ids, attention_mask = CaptionTokenizer.from_pretrained(folder).encode(texts)
    theirs = BertTokenizerFast.from_pretrained(folder)(texts, padding=True, return_tensors="pt")
    assert torch.equal(input_ids, theirs["input_ids"]) and torch.equal(attention_mask, theirs["attention_mask"].bool())
    assert CaptionTokenizer.from_pretrained(folder).encode([])[0].shape == (0, 0)


def test_decode_leaves_special_tokens_out(folder):
    tokenizer = CaptionTokenizer.from_pretrained(folder)
    assert tokenizer.decode([tokenizer.dec_id, 5, 6, 9, 3, 0, 0]) == "a cats"
    assert tokenizer.decode(torch.tensor([2, 8, 3])) == "mat"


def test_special_tokens_typed_in_a_caption_are_plain_text(folder):
    ids = CaptionTokenizer.from_pretrained(folder).encode_one("[sep] [SEP] [DEC]")
    assert ids == [2, *(10, 12, 11), *(10, 12, 11), *(10, 13, 11), 3]


def test_a_long_caption_is_cut_and_counted_or_refused(folder, recwarn):
    cutting = CaptionTokenizer.from_pretrained(folder, max_tokens=5)
    assert cutting.encode_one("a cat on") == [2, 5, 6, 7, 3] and cutting.cut_captions == 0
    assert cutting.encode_one("a cat on a mat") == [2, 5, 6, 7, 3] and cutting.cut_captions == 1
    assert cutting.encode_one("a " * 600)[-1] == cutting.sep_id and cutting.cut_captions == 2
    assert cutting.is_too_long("a cat on a") and not cutting.is_too_long("a cat on")
    strict = CaptionTokenizer.from_pretrained(folder, max_tokens=32, too_long="error")
    with pytest.raises(DataError, match=r"^caption has 41 tokens, the limit is 32: it would be cut"):
        strict.encode_one("a " * 39)
    assert not recwarn.list


def test_no_tokenizer_and_one_of_another_kind(folder, tmp_path):
    with pytest.raises(DataError, match="no tokenizer could be loaded"):
        CaptionTokenizer.from_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="max_tokens is 2"):
        CaptionTokenizer.from_pretrained(folder, max_tokens=2)
    other = BertTokenizerFast.from_pretrained(folder)
    other.add_special_tokens({"bos_token": "[DEC]"})
    other.add_tokens(["later"])
    with pytest.raises(ConfigError, match=r"has \[DEC\] at 14 of 16 ids"):
        CaptionTokenizer(other)
    headless = BertTokenizerFast.from_pretrained(folder)
    headless.cls_token = None
    with pytest.raises(ConfigError, match=r"has no \[CLS\], \[SEP\] or \[PAD\]"):
        CaptionTokenizer(headless)
