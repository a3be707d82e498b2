"""T5: how a verifier's probabilities become a score, for tokenizers of three kinds."""

import math

import pytest

from jettison.hooks.errors import EnvironmentRefused
from jettison.plugins.trimr.scoring import (
    NO,
    YES,
    NoAnswerError,
    YesNo,
    chat_distribution,
    completion_distributions,
)


def byte_level():
    """GPT-2's kind: a space is part of the next token and shows as Ġ."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["Yes", "No", "ĠYes", "ĠNo", "yes", "no", "Ġyes", "Ġno", "YES", "NO", "<unk>"]
    letters = sorted(set(pre_tokenizers.ByteLevel.alphabet()))
    vocabulary = {token: i for i, token in enumerate(dict.fromkeys([*letters, *_all_prefixes(words), *words]))}
    merges = [(word[:cut], word[cut:]) for word in _all_prefixes(words) for cut in [len(word) - 1] if len(word) > 1]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return tokenizer


def _all_prefixes(words):
    return list(dict.fromkeys(word[:size] for word in words for size in range(1, len(word) + 1) if word != "<unk>"))


def sentencepiece():
    """Llama's kind: spaces become ▁, and a word may come with or without one."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["▁Yes", "▁No", "▁yes", "▁no", "▁YES", "▁NO", "▁", "是", "否", "Yes", "No", "<unk>"]
    tokenizer = Tokenizer(models.Unigram([(word, -1.0) for word in words], unk_id=len(words) - 1))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    return tokenizer


def characters():
    """One token per character: Yes begins with Y, No with N."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({c: i for i, c in enumerate("YesNoESOyn 是否?")}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    return tokenizer


@pytest.mark.parametrize("make", [byte_level, sentencepiece, characters])
def test_t5_yes_and_no_are_found_in_three_tokenizers(make):
    tokenizer = make()
    pieces = {form: tokenizer.encode(form, add_special_tokens=False).tokens for form in (*YES, *NO)}
    mapping = YesNo.of_pieces(pieces)
    yes, no = (next(t for t in pieces[word] if t.strip("▁Ġ ")) for word in (" Yes", " No"))
    log = math.log
    assert mapping.score([(yes, log(0.6)), (no, log(0.3)), ("The", log(0.1))]) == pytest.approx(log(2)), pieces
    assert mapping.score([(no, log(0.8)), (yes, log(0.2))]) == pytest.approx(-log(4)), pieces


def test_t5_a_tokenizer_that_begins_both_words_alike_is_refused():
    pieces = {form: ["▁", *form] for form in (*YES, *NO)}
    assert YesNo.of_pieces(pieces).yes, "the space mark alone says nothing, and the next piece does"
    same = {form: ["W", form] for form in (*YES, *NO)}
    with pytest.raises(EnvironmentRefused, match="begins Yes and No with the same token"):
        YesNo.of_pieces(same)


def test_t5_forms_are_summed_and_ties_are_no():
    words = YesNo.of_words()
    log = math.log
    spread = [(" Yes", log(0.2)), ("yes", log(0.1)), ("YES", log(0.1)), (" No", log(0.3)), ("是", log(0.05))]
    assert words.score(spread) == pytest.approx(log(0.45 / 0.3))
    assert words.score([("Yes", log(0.4)), ("No", log(0.4))]) == pytest.approx(0.0), "a tie does not lie above 0"


def test_t5_a_missing_word_is_bounded_never_guessed():
    words = YesNo.of_words()
    log = math.log
    only_yes = words.score([("Yes", log(0.9)), ("The", log(0.06)), ("So", log(0.02))])
    assert only_yes == pytest.approx(log(0.9 / 0.02)), "No may have all that is left over: 2 %"
    assert only_yes < words.score([("Yes", log(0.9)), ("The", log(0.0998)), ("No", log(0.0002))])
    assert words.score([("No", log(0.01)), ("The", log(0.9))]) < -10, "an absent Yes is no Yes"


@pytest.mark.parametrize(
    "listed", [[("The", -0.1), ("So", -3.0)], [("Yes", math.nan)], [("Yes", math.inf)], [("Yes", 2.0)]]
)
def test_t5_probabilities_without_an_answer_are_refused(listed):
    with pytest.raises(NoAnswerError):
        YesNo.of_words().score(listed)


@pytest.mark.parametrize(
    "body",
    [None, [], {}, {"choices": []}, {"choices": [{"logprobs": None}]}, {"choices": [{"logprobs": {"content": []}}]},
     {"choices": [{"logprobs": {"content": [{"top_logprobs": []}]}}]}, {"choices": 3}, "Yes",
     {"choices": [{"logprobs": {"content": [{"top_logprobs": [{"token": "Yes", "logprob": "much"}]}]}}]}],
)  # fmt: skip
def test_t5_missing_logprobs_are_no_answer(body):
    with pytest.raises(NoAnswerError):
        chat_distribution(body)
    with pytest.raises(NoAnswerError):
        completion_distributions(body, 1)


def test_t5_batches_keep_the_order_of_their_prompts():
    choices = [{"index": i, "logprobs": {"top_logprobs": [{f"w{i}": -1.0}]}} for i in (2, 0, 1)]
    assert [found[0][0] for found in completion_distributions({"choices": choices}, 3)] == ["w0", "w1", "w2"]
    with pytest.raises(NoAnswerError, match="one choice per prompt"):
        completion_distributions({"choices": choices[:2]}, 3)
