"""The reasoner's tokenizer: byte-level pairs learned from its own texts, every digit a token, and a chat template."""

from __future__ import annotations

from random import Random
from typing import Any

from lab.problems import Difficulty, draw
from lab.traces import END_THINK, FORCEFUL, GENTLE, THINK, Habits, ending, think

PAD, END, USER, ASSISTANT = "<|pad|>", "<|end|>", "<|user|>", "<|assistant|>"
SPECIAL = (PAD, END, USER, ASSISTANT, THINK, END_THINK)
SIZE = 512
TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>\n' + message['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n<think>\n' }}{% endif %}"
)


def prompt(question: str) -> str:
    """What the chat template makes of one question."""
    return f"{USER}\n{question}\n{ASSISTANT}\n{THINK}\n"


def train(size: int = SIZE, samples: int = 1_500) -> Any:
    """Return a fast tokenizer of Hugging Face: the same one whatever is trained with it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_texts(samples), trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=END,
        additional_special_tokens=[USER, ASSISTANT],
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = TEMPLATE
    return fast


def _texts(samples: int) -> list[str]:
    rng = Random(0)
    habits = Habits(longest=200)
    texts = []
    for _ in range(samples):
        problem = draw(rng, Difficulty(), held_out=False)
        texts.append(problem.question + think(rng, problem, habits).text + ending(rng, 0) + GENTLE + FORCEFUL)
    return texts
