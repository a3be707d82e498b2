"""Whether a question has a definite answer; where it has none, agreement means nothing and overthinking never fires."""

from __future__ import annotations

import re

_OPEN = re.compile(
    r"\b(?:write|compose|draft|create|generate|brainstorm|summari[sz]e|translate|rewrite|rephrase|paraphrase|describe"
    r"|explain|discuss|essay|story|poem|haiku|email|letter|blog|slogan|advice|recommend|opinion|pros and cons|plan"
    r"|implement|refactor|design|outline|imagine|role-?play|prove|show that)\b"
    r"|写(?:一|个|封|首|篇|出一)|翻译|总结|概括|解释|介绍|描述|讨论|建议|证明|故事|诗|作文|改写|润色",
    re.IGNORECASE,
)
_EXACT = re.compile(
    r"\b(?:how (?:many|much|far|long|old|fast)|what is the (?:value|sum|product|probability|area|volume|number|result"
    r"|remainder|distance|length|ratio|least|greatest|smallest|largest|maximum|minimum)|find (?:the|all)|compute"
    r"|calculate|evaluate|solve|which of the following|choose the|select the|true or false|final answer|boxed)\b"
    r"|\\boxed|(?:^|\s)\(?A[).]\s.+\s\(?B[).]\s|多少|求|计算|等于几|是几|哪个选项|下列|选择",
    re.IGNORECASE | re.DOTALL,
)


def is_open_ended(question: str) -> bool:
    """Judge by the words of a question: it asks for text, and for no value or choice."""
    question = question[-8_000:]
    return _OPEN.search(question) is not None and _EXACT.search(question) is None
