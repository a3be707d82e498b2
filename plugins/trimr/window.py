"""The answer window: the end of a thought, and the result that it states (paper, section 3.2).

A stated result is strong when it is said to be the answer (a box, "the answer is", a chosen option), weak when a
sentence merely concludes something ("so x = 3"). Questions, denials and suppositions state nothing.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from jettison.plugins.trimr.normalise import Answer, parse_answer
from jettison.plugins.trimr.normalise_same import same

MAX_THOUGHT = 20_000
"""Characters of a thought that are searched: the last ones."""
_MAX_RESULT = 200
_GAP = " … "
_TAIL = 4_000
_MAX_HITS = 64

_BREAK = re.compile(r"[.!?](?=[\s*])[\s*]*|[。！？]\s*|\n+")
_END = (
    r"(?=[.!?](?:\s|$)|[。！？；;\n]|\*\*(?!\w)|,?\s{1,8}(?:because|since|so|which|but|if|when|and so|right|then|wait"
    r"|while|unless|after|not|hence|as)\b|，|$)"
)
_RESULT = rf"\s{{0,8}}(?:\*\*)?\s{{0,8}}(?P<result>[^\n]{{1,{_MAX_RESULT}}}?){_END}"
_IS = (
    r"(?:\s{1,8}(?:to [^.\n]{1,60}?|here|again)\s{0,8})?(?:\*\*)?\s{0,8}"
    r"(?:is|are|=|:|equals|comes out to(?: be)?|must be|should be)(?![A-Za-z])\s{0,8}:?"
)
_BEFORE, _AFTER = 230, 300
_STRONG = [
    (
        ("answer", "solution", "choice"),
        re.compile(
            rf"(?<![A-Za-z])(?:the |my )?(?:final |correct |right )?(?:answer|solution|choice){_IS}{_RESULT}",
            re.IGNORECASE,
        ),
    ),
    (
        ("answer**", "answer:**", "solution**", "solution:**"),
        re.compile(rf"\*\*(?:the )?(?:final )?(?:answer|solution):?\*\*:?\s{{0,8}}{_RESULT}", re.IGNORECASE),
    ),
    (("####",), re.compile(rf"(?:^|\n)####\s{{0,8}}{_RESULT}")),
    (
        ("choose ", "pick ", "go with ", "select "),
        re.compile(r"(?:choose|pick|go with|select) (?:option |answer )?(?P<result>\(?[A-J]\)?)(?![A-Za-z])"),
    ),
    (
        (" is correct", " is the correct", " is right", " is the right"),
        re.compile(
            r"(?<![A-Za-z])(?P<result>\(?[A-J]\)?) is (?:the )?(?:correct|right)"
            r"(?: (?:answer|option|choice))?(?![A-Za-z])"
        ),
    ),
    (
        (" is the answer", " is my answer", " is the final", " is my final", " is the correct answer"),
        re.compile(
            rf"(?<![^\s*])(?P<result>[^\s*]{{1,{_MAX_RESULT}}}) is (?:the|my) (?:final |correct )?answer(?![A-Za-z])"
        ),
    ),
    (("答案",), re.compile(rf"(?:最终)?答案(?:就|应该|应当)?\s{{0,8}}(?:是|为|：|:|=)+{_RESULT}")),
    (("选",), re.compile(r"(?:应该|应|故|所以)?选(?:择)?\s{0,8}(?P<result>[（(]?[A-J][）)]?)(?![A-Za-z])")),
]
"""Words, pattern: a pattern is tried only around its words, which are cheap to find."""
_WEAK = re.compile(
    r"(?:^|[.!?;,\n]\s{0,8}|。|，|\s)"
    r"(?:so|thus|therefore|hence|giving|which gives|we get|we have|finally|所以|因此|得到|于是)"
    rf"[^\n]{{0,{_MAX_RESULT}}}?(?:=|equals|is|为|是|等于)(?P<result>[^=\n]{{1,{_MAX_RESULT}}}?){_END}",
    re.IGNORECASE,
)
_DOUBT_BEFORE = re.compile(
    r"(?:\b(?:if|whether|suppose|assume|assuming|guess|unless|unlikely|doubt|not|isn't|never|wrong|claim(?:s|ed)?|said"
    r"|says|check(?:ing)?(?: that| if)?|verify(?: that| if)?|is|could|might|maybe|perhaps)"
    r"(?:\s{1,8}that)?(?:\s{1,8}(?:the|my|this|option))?|如果|假设|是否|不是|不)\s{0,8}(?:final |correct |right )?$",
    re.IGNORECASE,
)
_DOUBT_WITHIN = re.compile(
    r"^(?:not|n't|wrong|incorrect|unclear|unknown|probably|maybe|perhaps|likely|either|neither|correct|right|supposed"
    r"|going to|obvious|clear|simple|easy|to|that|what|how|based|given|already|still|just|in the|the same|a|an"
    r"|different|不|错|可能)(?![A-Za-z])|\?\s{0,8}$|？\s{0,8}$|^\.{2,}|^…",
    re.IGNORECASE,
)
_QUOTED = re.compile(
    r"(?:^|(?<=\n)) {0,3}(```|~~~)[^\n]*\n.*?(?:\n {0,3}\1|\Z)|(?:^|(?<=\n)) {0,3}>[^\n]*"
    r"|<(tool_call|function_call|tool_code)>.*?(?:</\2>|\Z)",
    re.DOTALL,
)
_QUOTES = ("```", "~~~", ">")
_PLACEHOLDER = {"answer", "your answer", "final answer", "...", "…", "number", "result", "x", "ans"}


@dataclass(frozen=True)
class Statement:
    """A stated result.

    Attributes:
        text: the result's own text.
        answer: its value, None if it cannot be read.
        strong: said to be the answer.
        start, end: where the sentence part that states it lies in the thought.
    """

    text: str
    answer: Answer | None
    strong: bool
    start: int
    end: int


def squeezed(text: str) -> str:
    """Text for comparing wordings: small letters, single spaces."""
    return " ".join(text.lower().split())


def find_statement(thought: str, *, weak: bool = True, question: str = "") -> Statement | None:
    """The latest result that a thought states as its answer, else (with `weak`) the latest conclusion, else None.

    A strong result that a later conclusion contradicts, or may contradict, gives way to it. What stands in code, quoted
    lines or tool calls is not stated, nor is what repeats the wording of the question.

    Args:
        thought: its text.
        weak: look for conclusions too.
        question: the user's question, `squeezed`.
    """
    skipped = max(0, len(thought) - MAX_THOUGHT)
    text = thought[skipped:]
    if any(sign in text for sign in _QUOTES):
        text = _QUOTED.sub(lambda quoted: "\n" * len(quoted[0]), text)
    stated = [one for one in (*_boxes(text), *_phrases(text)) if not _echoes(text, one, question)]
    found = max((one for one in stated if one.strong), key=_end, default=None)
    if found is not None or weak:
        lesser = [one for one in stated if not one.strong]
        lesser += _conclusions(text, found.end if found is not None else 0)
        last = max(lesser, key=_end, default=None)
        if found is None or (last is not None and last.start >= found.end and _contradicts(last, found)):
            found = last
    if found is None:
        return None
    return Statement(found.text, found.answer, found.strong, found.start + skipped, found.end + skipped)


def _end(statement: Statement) -> int:
    return statement.end


def _echoes(text: str, statement: Statement, question: str) -> bool:
    """Whether the question has the same wording, at least up to the first word of the result."""
    if not question:
        return False
    said = text[statement.start : statement.end]
    result = said.find(statement.text)
    first = re.match(r"\s*[^\s,;。，；]+", said[result:]) if result > 0 else None
    wording = squeezed(said[:result] + first[0] if first else said).rstrip(".,;:!?)")
    place = question.find(wording)
    while place >= 0:
        end = place + len(wording)
        if not question[end : end + 1].isalnum():
            return True
        place = question.find(wording, place + 1)
    return False


def _contradicts(weak: Statement, strong: Statement) -> bool:
    if weak.answer is None or strong.answer is None or weak.answer.kind == "word":
        return False
    return same(weak.answer, strong.answer) is not True


def _boxes(text: str) -> list[Statement]:
    found = []
    for match in [*re.finditer(r"\\(?:boxed|fbox) ?\{", text)][-_MAX_HITS:]:
        depth, at = 1, match.end()
        while at < len(text) and depth and at - match.end() <= 2 * _MAX_RESULT:
            if text[at] == "\\":
                at += 1
            else:
                depth += (text[at] == "{") - (text[at] == "}")
            at += 1
        inner = text[match.end() : at - 1]
        before = text[max(0, match.start() - 40) : match.start()].rstrip("$ ")
        if not depth and not _DOUBT_BEFORE.search(before + " ") and inner.strip().casefold() not in _PLACEHOLDER:
            found.append(Statement(inner, parse_answer(inner), True, match.start(), at))
    return found


def _phrases(text: str) -> list[Statement]:
    found = []
    lower = text.lower()
    if len(lower) != len(text):
        lower = text  # NOTES: some capitals have no small letter of one character, and places must agree
    for words, pattern in _STRONG:
        for match in _around(words, pattern, text, lower):
            result = match["result"].strip()
            before = text[max(0, match.start() - 40) : match.start()]
            asked = text[match.end() : match.end() + 1] in ("?", "？")
            if asked or not result or _DOUBT_BEFORE.search(before) or _DOUBT_WITHIN.search(result):
                continue
            if "\\boxed" in result or result.casefold() in _PLACEHOLDER:
                continue
            answer = parse_answer(result)
            if answer is not None and answer.kind == "word" and len(answer.text.split()) > 6:
                answer = None
            found.append(Statement(result, answer, answer is not None, match.start(), match.end()))
    return found


def _around(words: Sequence[str], pattern: re.Pattern[str], text: str, lower: str) -> Iterator[re.Match[str]]:
    """Matches of a pattern near its words, each once."""
    hits = sorted(hit for word in words for hit in _places(word, lower))
    done = 0
    for hit in hits[-_MAX_HITS:]:
        end = min(hit + _AFTER, len(text))
        for match in pattern.finditer(text, max(done, hit - _BEFORE), end):
            if match.end() > done and (match.end() < end or end == len(text)):
                done = match.end()
                yield match


def _places(word: str, text: str) -> Iterator[int]:
    place = text.find(word)
    while place >= 0:
        yield place
        place = text.find(word, place + len(word))


def _conclusions(text: str, start: int) -> list[Statement]:
    found = []
    for match in _WEAK.finditer(text, start):
        result = match["result"].strip()
        if result and text[match.end() : match.end() + 1] not in ("?", "？") and not _DOUBT_WITHIN.search(result):
            answer = parse_answer(result)
            found.append(Statement(result, answer, False, match.start(), match.end()))
    return found


def excerpt(thought: str, statement: Statement | None, sentences: int, max_characters: int) -> str:
    """The last sentences of a thought, at most `max_characters`, with the stated result where it lies before them."""
    skipped = max(0, len(thought) - MAX_THOUGHT)
    thought = thought[skipped:]
    earliest = max(0, len(thought.rstrip()) - max_characters)
    starts = [match.end() for match in _BREAK.finditer(thought, earliest) if match.end() < len(thought)]
    start = max(starts[-sentences], earliest) if len(starts) >= sentences else earliest
    tail = thought[start:].strip()
    if statement is None or not statement.strong or statement.start - skipped >= start:
        return tail
    stated = thought[max(0, statement.start - skipped) : statement.end - skipped].strip()[:max_characters]
    room = max_characters - len(stated) - len(_GAP)
    return f"{stated}{_GAP}{tail[-room:]}" if room > 0 else stated


def complete_part(thought: str) -> str:
    """A thought that was cut by force, without the sentence that the cut broke."""
    ends = [match.start() + (match[0][0] != "\n") for match in _BREAK.finditer(thought, max(0, len(thought) - _TAIL))]
    return thought[: ends[-1]] if ends else ""
