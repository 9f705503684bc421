"""Hugging Face's models, tiny and without dropout, as the library makes them.

Most compute parts in float32 in a float64 model too: the loss of causal language models, RMS normalisations.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from model_zoo import Generator, Kind, attention_mask, masked_labels, numbers, tokens
from torch import nn

VOCABULARY = 19
LENGTH = 6


def double_loss(logits: torch.Tensor, labels: torch.Tensor, vocab_size: int, **_: Any) -> torch.Tensor:
    """Hugging Face's loss of causal language models, but in the logits' own type: theirs is float32."""
    labels = F.pad(labels, (0, 1), value=-100)[..., 1:].contiguous()
    return F.cross_entropy(logits.view(-1, vocab_size), labels.view(-1), ignore_index=-100)


def causal(name: str, shows: str, *, title: str = "", batch: Any = None, dynamic: Any = None, **settings: Any) -> Kind:
    """A causal language model `name`, that computes its loss itself, from labels of which many are ignored."""
    in_double = batch is not None

    def make() -> nn.Module:
        import transformers

        config = getattr(transformers, f"{name}Config")(
            vocab_size=VOCABULARY, pad_token_id=0, bos_token_id=1, eos_token_id=2, use_cache=False, **settings
        )
        model = getattr(transformers, NAMES.get(name, f"{name}ForCausalLM"))(config)
        if in_double:
            model.loss_function = double_loss
        return model

    title = title or TITLES.get(name, name)
    return Kind(
        name=f"Hugging Face {title}",
        make=make,
        batch=batch or causal_batch,
        shows=shows,
        float32_weight=None if in_double else counted_next,
        dynamic=dynamic,
    )


def counted_next(batch: Any) -> int:
    """How many labels count as a next token."""
    return int((batch["labels"][:, 1:] != -100).sum())


def counted(batch: Any) -> int:
    """How many labels count."""
    return int((batch["labels"] != -100).sum())


NAMES = {"GPT2": "GPT2LMHeadModel"}
TITLES = {"GPT2": "GPT-2", "GPTNeoX": "GPT-NeoX"}


def causal_batch(rows: int, generator: Generator) -> dict[str, Any]:
    return {
        "input_ids": tokens(rows, LENGTH, VOCABULARY, generator),
        "labels": masked_labels(rows, LENGTH, VOCABULARY, generator),
    }


def padded_batch(rows: int, generator: Generator) -> dict[str, Any]:
    return {**causal_batch(rows, generator), "attention_mask": attention_mask(rows, LENGTH, generator)}


def varying_batch(rows: int, generator: Generator) -> dict[str, Any]:
    length = int(torch.randint(2, 9, (), generator=generator))
    return {
        "input_ids": tokens(rows, length, VOCABULARY, generator),
        "attention_mask": attention_mask(rows, length, generator),
        "labels": masked_labels(rows, length, VOCABULARY, generator),
    }


def bert() -> nn.Module:
    import transformers

    config = transformers.BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=LENGTH,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return transformers.BertForMaskedLM(config)


def t5() -> nn.Module:
    import transformers

    config = transformers.T5Config(
        vocab_size=VOCABULARY,
        d_model=8,
        d_kv=4,
        d_ff=16,
        num_layers=1,
        num_heads=2,
        dropout_rate=0.0,
        decoder_start_token_id=0,
        use_cache=False,
    )
    return transformers.T5ForConditionalGeneration(config)


def t5_batch(rows: int, generator: Generator) -> dict[str, Any]:
    return {
        "input_ids": tokens(rows, LENGTH, VOCABULARY, generator),
        "attention_mask": attention_mask(rows, LENGTH, generator),
        "labels": masked_labels(rows, 5, VOCABULARY, generator),
    }


def whisper() -> nn.Module:
    import transformers

    config = transformers.WhisperConfig(
        vocab_size=VOCABULARY,
        num_mel_bins=4,
        d_model=8,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=16,
        decoder_ffn_dim=16,
        max_source_positions=5,
        max_target_positions=8,
        dropout=0.0,
        attention_dropout=0.0,
        activation_dropout=0.0,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
        use_cache=False,
    )
    return transformers.WhisperForConditionalGeneration(config)


def whisper_batch(rows: int, generator: Generator) -> dict[str, Any]:
    return {
        "input_features": numbers(rows, 4, 10, generator=generator),
        "labels": masked_labels(rows, 5, VOCABULARY, generator),
    }


def vit() -> nn.Module:
    import transformers

    config = transformers.ViTConfig(
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        image_size=8,
        patch_size=4,
        num_channels=3,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        num_labels=3,
    )
    return transformers.ViTForImageClassification(config)


def vit_batch(rows: int, generator: Generator) -> dict[str, Any]:
    return {
        "pixel_values": numbers(rows, 3, 8, 8, generator=generator),
        "labels": torch.randint(0, 3, (rows,), generator=generator),
    }


SMALL = {
    "hidden_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "max_position_embeddings": 16,
}
GPT2 = {
    "n_embd": 8,
    "n_layer": 1,
    "n_head": 2,
    "n_positions": 16,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
}

KINDS = (
    causal("GPT2", "tied embedding, labels with −100", **GPT2),
    causal(
        "Llama",
        "grouped-query attention, rotary positions, tied",
        **SMALL | {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True},
    ),
    causal("Qwen2", "biased projections", **SMALL | {"num_key_value_heads": 1}),
    causal("GPTNeoX", "parallel residuals", **SMALL),
    causal(
        "OPT",
        "learned positions from the mask",
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        ffn_dim=16,
        max_position_embeddings=16,
        word_embed_proj_dim=8,
        dropout=0.0,
    ),
    causal("Mamba", "selective scan, convolution", hidden_size=8, num_hidden_layers=1, state_size=4),
    causal(
        "GPT2",
        "input_ids, attention_mask and labels of one length; a loss in float64",
        title="GPT-2, lengths that differ",
        batch=varying_batch,
        dynamic={name: {1: "length"} for name in ("input_ids", "attention_mask", "labels")},
        **GPT2,
    ),
    Kind(name="Hugging Face BERT", make=bert, batch=padded_batch, shows="attention mask, masked language model"),
    Kind(
        name="Hugging Face T5",
        make=t5,
        batch=t5_batch,
        shows="encoder and decoder, relative positions, mask",
        float32_weight=counted,
    ),
    Kind(name="Hugging Face Whisper", make=whisper, batch=whisper_batch, shows="convolutions, encoder and decoder"),
    Kind(name="Hugging Face ViT", make=vit, batch=vit_batch, shows="image patches, a class token"),
)
