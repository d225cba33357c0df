"""A model of two layers that trains in milliseconds, behind a real tokenizer and chat template."""

from pathlib import Path

from engines.real import small_model


def tiny_model(path: Path, seed: int, heads: int = 4) -> Path:
    """Make a random Llama of 2 layers and 64 dimensions behind SmolLM2's tokenizer."""
    import torch
    from transformers import AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=49152, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=heads,
        num_key_value_heads=2, max_position_embeddings=512, tie_word_embeddings=True, bos_token_id=1, eos_token_id=2,
        pad_token_id=2,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(bos_token_id=1, eos_token_id=2, pad_token_id=2)
    model.save_pretrained(path)
    AutoTokenizer.from_pretrained(small_model()).save_pretrained(path)
    return path
