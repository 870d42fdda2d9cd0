"""What a language model reads and says of a caption: start and end tokens, prompts, splits, cuts, padding."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from toy_language import END, PAD, START, WORDS, toy_tokenizer

from qformers.data.batch import IGNORED_LABEL
from qformers.data.language_text import LanguageTokenizer
from qformers.errors import ConfigError, DataError

ID = {word: 4 + place for place, word in enumerate(WORDS)}


@pytest.fixture
def make(tmp_path):
    def tokenizer(is_encoder_decoder=False, starts=False, ends=False, pads=True, **settings) -> LanguageTokenizer:
        toy_tokenizer(tmp_path, starts=starts, ends=ends, pads=pads)
        return LanguageTokenizer.from_pretrained(tmp_path, is_encoder_decoder, **settings)

    return tokenizer


def ids(words: str) -> list[int]:
    return [ID[word] for word in words.split()]


@pytest.mark.parametrize("starts", [True, False])
def test_a_decoder_only_model_says_the_caption_and_the_end(make, starts):
    input_ids, labels = make(starts=starts, prompt="a photo of").encode_example("the red cat", None)
    before = [START] * starts + ids("a photo of")
    assert input_ids.tolist() == before + ids("the red cat") + [END]
    assert labels.tolist() == [IGNORED_LABEL] * len(before) + ids("the red cat") + [END]


def test_without_a_prompt_the_start_token_is_given_and_not_said(make):
    input_ids, labels = make(starts=True).encode_example("red cat", None)
    assert input_ids.tolist() == [START, *ids("red cat"), END]
    assert labels.tolist() == [IGNORED_LABEL, *ids("red cat"), END]


def test_what_follows_a_prompt_in_use_is_what_followed_it_in_training(make):
    tokenizer = make(starts=True, prompt="a photo of")
    trained, labels = tokenizer.encode_example("cat", None)
    used, mask = tokenizer.encode_prompts(["a photo of", ""])
    assert trained[: (labels == IGNORED_LABEL).sum()].tolist() == used[0].tolist()
    assert used[1].tolist() == [START, PAD, PAD, PAD] and mask.sum(dim=1).tolist() == [4, 1]


def test_an_encoder_decoder_s_caption_is_split_in_the_middle_or_anywhere(make):
    tokenizer = make(True, ends=True, prompt="a photo of")
    caption = "the red cat sits on car"
    read, said = tokenizer.encode_example(caption, None)
    assert read.tolist() == [*ids("a photo of the red cat"), END]
    assert said.tolist() == [*ids("sits on car"), END]
    seen = set()
    for seed in range(60):
        read, said = tokenizer.encode_example(caption, np.random.default_rng(seed))
        assert read.tolist()[3:-1] + said.tolist()[:-1] == ids(caption), "nothing is lost or said twice"
        seen.add(len(said))
    assert seen == {2, 3, 4, 5, 6, 7}, "at least one word is left to say, at most all"
    whole = make(True, ends=True, split_captions=False)
    assert whole.encode_example(caption, None)[1].tolist() == [*ids(caption), END]
    assert whole.encode_prompts(["a photo"])[0].tolist() == [[*ids("a photo"), END]]


def test_a_long_caption_is_cut_counted_and_still_ends(make):
    tokenizer = make(max_tokens=4)
    assert tokenizer.encode_example("the red cat sits on car", None)[1].tolist() == [*ids("the red cat"), END]
    assert tokenizer.encode_example("the red cat", None)[1].tolist() == [*ids("the red cat"), END]
    assert tokenizer.cut_captions == 1


def test_text_ends_at_the_end_token_and_special_tokens_are_left_out(make):
    tokenizer = make()
    rows = [[*ids("red cat"), END, *ids("dog on")], [START, *ids("red cat on"), PAD]]
    assert tokenizer.decode(torch.tensor(rows)) == ["red cat", "red cat on"]
    assert tokenizer.decode(torch.tensor([[END, PAD]])) == [""]


def test_a_tokenizer_without_pad_token_pads_with_its_end_token_and_says_so(make, caplog):
    with caplog.at_level("INFO", logger="qformers"):
        tokenizer = make(pads=False)
    assert tokenizer.pad_id == END
    assert "has no pad token: its end token pads, which changes nothing" in caplog.text
    padded, mask = tokenizer.encode_prompts(["red cat", "red"])
    assert padded.tolist() == [ids("red cat"), [*ids("red"), END]] and mask.tolist() == [[True, True], [True, False]]


def test_another_end_token_may_be_chosen_if_it_is_one_token(make):
    assert make(end_token="flies").encode_example("red", None)[1].tolist() == ids("red flies")
    with pytest.raises(ConfigError, match="end_token 'red cat' is 2 tokens of this tokenizer: it must be one"):
        make(end_token="red cat")


def test_special_tokens_in_a_caption_are_words(make):
    _, labels = make().encode_example("red </s> cat", None)
    assert labels.tolist().count(END) == 1 and labels[-1] == END


def test_no_tokenizer_is_one_clear_line(tmp_path):
    with pytest.raises(DataError, match="no tokenizer could be loaded"):
        LanguageTokenizer.from_pretrained(tmp_path / "none", False)
