"""Spelling of an answer, before it is parsed: LaTeX wrappers, Unicode signs and decorations go, meaning stays."""

from __future__ import annotations

import re
import unicodedata

MAX_CHARACTERS = 400
"""Longer answers are not compared."""

_SUPER = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺ⁿ", "0123456789-+n")
_SUB = str.maketrans("₀₁₂₃₄₅₆₇₈₉", "0123456789")
_FRACTIONS = {
    "½": "1/2",
    "⅓": "1/3",
    "⅔": "2/3",
    "¼": "1/4",
    "¾": "3/4",
    "⅕": "1/5",
    "⅛": "1/8",
    "⅜": "3/8",
    "⅝": "5/8",
}
_SIGNS = {
    "−": "-", "–": "-", "﹣": "-", "×": "*", "·": "*", "⋅": "*", "÷": "/", "∕": "/", "⁄": "/", "√": r"\sqrt ",
    "π": r"\pi ", "∞": r"\infty ", "≤": "<=", "≥": ">=", "≠": "!=", "≈": r"\approx ", "°": r"\degree ", "∪": r"\cup ",
    "∅": r"\emptyset ", "±": r"\pm ", "，": ", ", "；": "; ", "：": ": ", "。": ".", "％": "%", "’": "'",
    "℃": r"\degree C",
}  # fmt: skip
_WORDS = [
    (re.compile(r"\\(?:left|right|bigl?|bigr|Bigl?|Bigr|displaystyle|limits|quad|qquad|mathstrut)(?![A-Za-z])"), " "),
    (re.compile(r"\\[dtc]frac(?![A-Za-z])"), r"\\frac"),
    (re.compile(r"\\(?:cdot|times|ast)(?![A-Za-z])"), "*"),
    (re.compile(r"\\div(?![A-Za-z])"), "/"),
    (re.compile(r"\\(?:leq?|leqslant)(?![A-Za-z])"), "<="),
    (re.compile(r"\\(?:geq?|geqslant)(?![A-Za-z])"), ">="),
    (re.compile(r"\\lt(?![A-Za-z])"), "<"),
    (re.compile(r"\\gt(?![A-Za-z])"), ">"),
    (re.compile(r"\\(?:varnothing)(?![A-Za-z])"), r"\\emptyset"),
    (re.compile(r"\^\s*\{?\s*\\circ\s*\}?"), r"\\degree "),
    (re.compile(r"(?<=\d)\\,(?=\d{3}(?!\d))"), ""),
    (re.compile(r"\{,\}"), ","),
    (re.compile(r"\\[,;:! ]|~"), " "),
]
_TEXT = re.compile(r"\\(?:text|mathrm|textbf|textit|mathbf|mathit|mbox|operatorname|textrm|mathsf)\s*\{([^{}]*)\}")
_BOXED = re.compile(r"\\(?:boxed|fbox)\s*\{(.*)\}", re.DOTALL)
_WRAPPERS = (("\\(", "\\)"), ("\\[", "\\]"), ("$$", "$$"), ("$", "$"), ("**", "**"), ("`", "`"), ("*", "*"), ('"', '"'))
_LEAD = re.compile(r"^(?:(?:is|are|equals?|be|to|=|:)\s+|[=:]\s*)+", re.IGNORECASE)


def clean(text: str) -> str:
    """One spelling for one meaning: ASCII operators, LaTeX commands without layout, no wrapper around the whole.

    Superscripts become `^{...}`, a currency sign `$` that is not a formula's becomes `\\$`. Empty if too long.
    """
    if len(text) > MAX_CHARACTERS:
        return ""
    text = re.sub(r"[⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺ⁿ]+", lambda found: "^{" + found[0].translate(_SUPER) + "}", text)
    text = re.sub(r"[₀₁₂₃₄₅₆₇₈₉]+", lambda found: "_{" + found[0].translate(_SUB) + "}", text)
    for sign, plain in _FRACTIONS.items():
        text = re.sub(rf"(?<=\d)\s*{sign}", f" {plain}", text).replace(sign, plain)
    text = re.sub(r"√\s*(\d+(?:\.\d+)?)", r"\\sqrt{\1}", text)
    for sign, plain in _SIGNS.items():
        text = text.replace(sign, plain)
    text = unicodedata.normalize("NFKC", text)
    text = "".join(sign for sign in text if sign.isprintable() or sign.isspace())
    text = _unwrap(text)
    for pattern, plain in _WORDS:
        text = pattern.sub(plain, text)
    text = _TEXT.sub(r" \1 ", text)
    text = _dollars(text)
    return " ".join(_unwrap(text).split())


def _unwrap(text: str) -> str:
    """Take off what stands around the whole: formula signs, emphasis, a box, a final full stop, a leading "is"."""
    for _ in range(8):
        before = text
        text = _LEAD.sub("", text.strip()).strip()
        if re.search(r"(?<!\\)[.,;:]$|(?<=[A-Za-z])!$", text):
            text = text[:-1]
        boxed = _BOXED.fullmatch(text)
        if boxed is not None and _balanced(boxed[1]):
            text = boxed[1]
        for left, right in _WRAPPERS:
            inner = text[len(left) : len(text) - len(right)]
            around = inner and text == left + inner + right
            if around and left not in inner and right not in inner and not inner.endswith("\\"):
                text = inner
                break
        if text == before:
            break
    return text


def _balanced(text: str) -> bool:
    depth = 0
    for sign in re.sub(r"\\[{}]", "", text):
        depth += (sign == "{") - (sign == "}")
        if depth < 0:
            return False
    return depth == 0


def _dollars(text: str) -> str:
    """Formula signs in pairs go; an odd one stands for money."""
    bare = re.findall(r"(?<!\\)\$", text)
    return re.sub(r"(?<!\\)\$", r"\\$" if len(bare) == 1 else " ", text)
