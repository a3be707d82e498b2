"""How a verifier's next-token distribution becomes a score: log P(yes) - log P(no) after one prefill (section 3.2)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from jettison.hooks.errors import EnvironmentRefused

YES = ("Yes", " Yes", "yes", " yes", "YES", "是")
NO = ("No", " No", "no", " no", "NO", "否")
_MARKS = " \t\n\r▁ĠĊ"
_FLOOR = 1e-12


class NoAnswerError(Exception):
    """The verifier's answer has no usable probabilities; the text is one of a few fixed phrases."""


@dataclass(frozen=True)
class YesNo:
    """Which first tokens mean Yes and which No, without their space marks and in lower case."""

    yes: frozenset[str]
    no: frozenset[str]

    @classmethod
    def of_words(cls) -> YesNo:
        """Return the mapping for tokenizers that hold each word in one token, as nearly all do."""
        return cls(frozenset(map(plain, YES)), frozenset(map(plain, NO)))

    @classmethod
    def of_pieces(cls, pieces: Mapping[str, list[str]]) -> YesNo:
        """Return the mapping from how the verifier's tokenizer cuts each form of `YES` and `NO`.

        A first piece that both words share says nothing and is left out, as are pieces of no text.

        Raises:
            EnvironmentRefused: nothing is left of one word.
        """
        yes = frozenset(first for form in YES if (first := _first(pieces.get(form, []))))
        no = frozenset(first for form in NO if (first := _first(pieces.get(form, []))))
        found = cls(yes - no, no - yes)
        if not found.yes or not found.no:
            raise EnvironmentRefused(
                "the verifier's tokenizer begins Yes and No with the same token",
                allowed="allowed is a model whose first answer token tells them apart",
                do="choose another verifier",
            )
        return found

    def score(self, distribution: Iterable[tuple[str, float]]) -> float:
        """Return log P(yes) - log P(no) in nats of the likeliest tokens (text, log-probability).

        A No that is not listed has at most the probability that the list leaves over and, per form, at most that of
        the least likely token listed; that bound stands in for it, so that its absence cannot make a Yes look surer.

        Raises:
            NoAnswerError: neither word is listed, or a probability is not a number.
        """
        listed = [(plain(token), logprob) for token, logprob in distribution]
        if any((not math.isfinite(logprob) and logprob != -math.inf) or logprob > 1e-3 for _, logprob in listed):
            raise NoAnswerError("log-probabilities are not numbers up to 0")
        masses = [(token, math.exp(min(logprob, 0.0))) for token, logprob in listed]
        yes = sum(mass for token, mass in masses if token in self.yes)
        no = sum(mass for token, mass in masses if token in self.no)
        if yes <= 0 and no <= 0:
            raise NoAnswerError("neither Yes nor No is among the likeliest tokens")
        rest = max(0.0, 1.0 - sum(mass for _, mass in masses))
        least = min(mass for _, mass in masses)
        no = no or min(rest, least * len(NO))
        return math.log(max(yes, _FLOOR)) - math.log(max(no, _FLOOR))


def plain(token: str) -> str:
    """Return a token's text without space marks (of byte-level and of SentencePiece tokenizers), in lower case."""
    return token.strip(_MARKS).casefold()


def _first(pieces: list[str]) -> str:
    text = next((piece for piece in pieces if plain(piece)), "")
    return "" if "\ufffd" in text else plain(text)


def chat_distribution(body: Any) -> list[tuple[str, float]]:
    """Return the first token's (text, log-probability) list of a chat completion.

    Raises:
        NoAnswerError: the body has another shape.
    """
    try:
        entries = body["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
        found = [(str(entry["token"]), float(entry["logprob"])) for entry in entries]
    except (LookupError, TypeError, ValueError) as error:
        raise NoAnswerError("the answer has no top_logprobs") from error
    return _nonempty(found)


def completion_distributions(body: Any, count: int) -> list[list[tuple[str, float]]]:
    """Return the same of a completion with `count` prompts, in the order of the prompts.

    Raises:
        NoAnswerError: the body has another shape.
    """
    try:
        choices = sorted(body["choices"], key=lambda choice: int(choice["index"]))
        if [int(choice["index"]) for choice in choices] != list(range(count)):
            raise NoAnswerError("the answer does not have one choice per prompt")
        tops = [choice["logprobs"]["top_logprobs"][0] for choice in choices]
        found = [[(str(token), float(logprob)) for token, logprob in top.items()] for top in tops]
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise NoAnswerError("the answer has no top_logprobs") from error
    return [_nonempty(one) for one in found]


def _nonempty(found: list[tuple[str, float]]) -> list[tuple[str, float]]:
    if not found:
        raise NoAnswerError("the answer has no top_logprobs")
    return found
