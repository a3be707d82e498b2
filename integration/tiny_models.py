"""Tiny random-weight models for tests with real engines: fixed seeds, wide margins, a real (trivial) tokenizer.

The output matrix is a permutation of the input embeddings (or equal to them, where the model ties both), so the next
token wins by a wide margin and greedy text does not hang on rounding, while the layers still move every
log-probability: tests compare both.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers

VOCAB = 512
WINDOW = 64
BOS, EOS, PAD = 257, 258, 256
HEAD_SIZE, HEADS, KV_HEADS, LAYERS = 64, 4, 2, 4
_SHARED: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "head_dim": HEAD_SIZE,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
    "pad_token_id": PAD,
    "max_position_embeddings": 4096,
    "initializer_range": 0.06,
    "tie_word_embeddings": False,
}


def llama(folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    """Grouped-query attention, full causal."""
    return _save(transformers.LlamaForCausalLM, transformers.LlamaConfig(**_SHARED), folder, dtype)


def mistral(folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    """The same sliding window in every layer."""
    return _save(
        transformers.MistralForCausalLM, transformers.MistralConfig(**_SHARED, sliding_window=WINDOW), folder, dtype
    )


def gemma2(folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    """Sliding window in every second layer, soft-capped scores, multi-query heads of another size."""
    config = transformers.Gemma2Config(
        **{**_SHARED, "head_dim": 32, "num_key_value_heads": 1, "tie_word_embeddings": True},
        sliding_window=WINDOW,
        query_pre_attn_scalar=32,
        attn_logit_softcapping=20.0,
        final_logit_softcapping=None,
    )
    return _save(transformers.Gemma2ForCausalLM, config, folder, dtype)


def _save(model_class: Any, config: Any, folder: Path, dtype: torch.dtype) -> Path:
    torch.manual_seed(20_261_123)
    model = model_class(config).eval()
    permutation = torch.randperm(VOCAB, generator=torch.Generator().manual_seed(7))
    with torch.no_grad():
        embeddings = torch.randn(VOCAB, config.hidden_size, generator=torch.Generator().manual_seed(11))
        if config.tie_word_embeddings:
            model.get_input_embeddings().weight.copy_(embeddings * 0.1)
        else:
            model.get_input_embeddings().weight.copy_(embeddings)
            model.get_output_embeddings().weight.copy_(embeddings[permutation] * 0.1)
    model.to(dtype).save_pretrained(folder)
    _tokenizer().save_pretrained(folder)
    return folder


def _tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = [f"w{i}" for i in range(256)] + ["<pad>", "<s>", "</s>", "<unk>"]
    words += [f"w{i}" for i in range(len(words), VOCAB)]
    vocabulary = {word: index for index, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
