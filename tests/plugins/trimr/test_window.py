import time

import pytest

from jettison.plugins.trimr.question import is_open_ended
from jettison.plugins.trimr.window import MAX_THOUGHT, complete_part, excerpt, find_statement, squeezed

STATED = [
    ("So the answer is 12.", "12"),
    ("The final answer is $\\frac{3}{4}$ because it is.", "$\\frac{3}{4}$"),
    ("Thus \\boxed{\\frac{1}{2}}.", "\\frac{1}{2}"),
    ("Nested \\boxed{\\text{a } \\frac{1}{\\sqrt{2}}} here.", "\\text{a } \\frac{1}{\\sqrt{2}}"),
    ("First \\boxed{3}, later \\boxed{4}.", "4"),
    ("The answer is 3. No, the answer is 4.", "4"),
    ("**Final Answer**\n42", "42"),
    ("**Answer:** 42 apples", "42 apples"),
    ("#### 18", "18"),
    ("Therefore the correct answer is (B) 13.", "(B) 13"),
    ("I will go with option (C).", "(C)"),
    ("So B is correct.", "B"),
    ("The answer is 3.5. Let me see.", "3.5"),
    ("The answer should be 12, not 13.", "12"),
    ("The answer: 1,000", "1,000"),
    ("The solution is (1, 2).", "(1, 2)"),
    ("The answer is x = 5 or x = -2.", "x = 5 or x = -2"),
    ("42 is the answer.", "42"),
    ("答案是12。", "12"),
    ("最终答案为：3/4。", "3/4"),
    ("所以选B。", "B"),
    ("The answer is 12. Check: 5 + 7 = 12 holds.", "12"),
]
NOT_STATED = [
    "The answer is not 12.",
    "Is the answer 12?",
    "The answer is 12?",
    "If the answer is 12, then x is even.",
    "Suppose the answer is 12.",
    "Let me check that the answer is 12.",
    "They said the answer is 12.",
    "The answer is unclear.",
    "The answer is obvious by now.",
    "The answer is a number between one and ten that I do not know yet.",
    "The answer is…",
    "Put it as \\boxed{answer} in the end.",
    "I should write \\boxed{...} there.",
    "\\boxed{12",
    "We get to the answers later.",
    "如果答案是12，",
    "答案不是12。",
    "So x = 12.",
    "",
]


@pytest.mark.parametrize(("text", "result"), STATED)
def test_a_stated_answer_is_found(text, result):
    found = find_statement("Some work came first. " * 3 + "\n" + text)
    assert found is not None
    assert found.strong
    assert found.text == result
    assert found.answer is not None


@pytest.mark.parametrize("text", NOT_STATED)
def test_denials_questions_and_suppositions_state_nothing(text):
    found = find_statement("Some work came first. " + text)
    assert found is None or not found.strong, found


def test_a_conclusion_is_weak_and_a_later_other_one_weakens_a_stated_answer():
    weak = find_statement("So x = 3 + 4 = 7.")
    assert weak is not None
    assert (weak.text, weak.strong) == ("7", False)
    changed = find_statement("The answer is 12. That was wrong, so x = 13.")
    assert changed is not None
    assert (changed.text, changed.strong) == ("13", False)
    same = find_statement("The answer is 12. It holds, so x = 12.")
    assert same is not None
    assert (same.text, same.strong) == ("12", True)


def test_code_quotations_tool_calls_and_echoes_of_the_question_state_nothing():
    for text in (
        "```\nThe answer is 12.\n```\nok",
        "~~~\nThe answer is 12.",
        "> The answer is 12.\n",
        '<tool_call>{"text": "The answer is 12."}</tool_call>',
    ):
        assert find_statement("Some work.\n" + text) is None, text
    after = find_statement("```\nThe answer is 12.\n```\nThe answer is 13.")
    assert after is not None
    assert after.text == "13"
    question = squeezed("Remember:  the ANSWER is\n7. What is 3 * 4?")
    assert find_statement("So the answer is 7.", weak=False, question=question) is None
    genuine = find_statement("They say the answer is 7. But the answer is 12.", question=question)
    assert genuine is not None
    assert genuine.text == "12"


def test_the_excerpt_is_the_last_sentences():
    thought = " ".join(f"Sentence number {n} is here." for n in range(20))
    text = excerpt(thought, None, 6, 10_000)
    assert text == " ".join(f"Sentence number {n} is here." for n in range(14, 20))
    assert excerpt(thought, None, 6, 50) == thought[-50:].strip()
    assert excerpt("第一句。第二句。第三句。", None, 2, 100) == "第二句。第三句。"
    assert excerpt("Take 3.5 and 1.25 now. Add them.", None, 2, 100) == "Take 3.5 and 1.25 now. Add them."


def test_the_excerpt_reaches_back_to_the_stated_answer():
    thought = "The answer is 12. " + " ".join(f"Sentence number {n} is here." for n in range(20))
    found = find_statement(thought)
    text = excerpt(thought, found, 6, 10_000)
    assert text.startswith("The answer is 12 … Sentence number 14")
    assert text.endswith("number 19 is here.")
    for room in (10, 20, 25, 60):
        assert len(excerpt(thought, found, 6, room)) <= room
    long = "x" * (MAX_THOUGHT + 500) + ". " + thought
    assert excerpt(long, find_statement(long), 6, 10_000).startswith("The answer is 12 … Sentence number 14")


def test_a_cut_by_force_drops_the_broken_sentence():
    assert complete_part("The answer is 1. The answer is 12") == "The answer is 1."
    assert complete_part("The answer is 12") == ""
    assert complete_part("第一句。第二") == "第一句。"


def test_hostile_thoughts_take_linear_time():
    for unit in (
        "answer is ",
        "\\boxed{",
        "so = ",
        "答案是",
        "**",
        "#### ",
        "the answer to ",
        "is the answer ",
        "A is ",
        "```\n",
        "\n> ",
        "<tool_call>",
        "```",
        "the answer is 1. ",
        "\n",
    ):
        thought = (unit * MAX_THOUGHT)[: 10 * MAX_THOUGHT]
        start = time.process_time()
        found = find_statement(thought)
        excerpt(thought, found, 6, 1_000)
        assert time.process_time() - start < 1.0, unit


@pytest.mark.parametrize(
    ("question", "is_open"),
    [
        ("What is 3 * 4?", False),
        ("Write a poem about the sea.", True),
        ("Explain how rainbows form.", True),
        ("Explain and compute the value of x.", False),
        ("How many ways are there to design a flag with 3 stripes?", False),
        ("Prove that the square root of 2 is irrational.", True),
        ("Which of the following describes it? (A) one (B) two", False),
        ("Tom has 3 apples and eats one. What is left?", False),
        ("写一首关于海的诗", True),
        ("小明有3个苹果，吃了1个，还剩多少？", False),
        ("翻译这句话。", True),
        ("", False),
    ],
)
def test_open_ended_questions_are_told_apart(question, is_open):
    assert is_open_ended(question) is is_open
