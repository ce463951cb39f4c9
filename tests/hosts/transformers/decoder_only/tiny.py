"""Tiny decoder-only models with random weights, one for each architecture; no download."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import transformers as tf

VOCABULARY = 40
POSITIONS = 512
_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": POSITIONS,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GROUPED = {"num_key_value_heads": 2}


def _of(family: str, *, text: bool = False, **changes: Any) -> Callable[[], Any]:
    def build() -> Any:
        config = getattr(tf, f"{family}{'Text' if text else ''}Config")(**{**_COMMON, **changes})
        return getattr(tf, f"{family}ForCausalLM")(config)

    return build


def _gpt2() -> Any:
    config = tf.GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=POSITIONS,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    return tf.GPT2LMHeadModel(config)


BUILDERS: dict[str, Callable[[], Any]] = {
    "llama": _of("Llama", **_GROUPED),
    "qwen2": _of("Qwen2", **_GROUPED),
    "qwen3": _of("Qwen3", head_dim=8, **_GROUPED),
    "qwen3_moe": _of(
        "Qwen3Moe", head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, **_GROUPED
    ),
    "mistral": _of("Mistral", sliding_window=None, **_GROUPED),
    "mistral_window": _of("Mistral", sliding_window=256, **_GROUPED),
    "mixtral": _of("Mixtral", num_local_experts=4, **_GROUPED),
    "gemma": _of("Gemma", head_dim=8, **_GROUPED),
    "gemma2": _of("Gemma2", head_dim=8, query_pre_attn_scalar=8, sliding_window=256, **_GROUPED),
    "gemma3": _of("Gemma3", text=True, head_dim=8, query_pre_attn_scalar=8, sliding_window=256, **_GROUPED),
    "gpt2": _gpt2,
    "phi": _of("Phi"),
    "phi3": _of("Phi3", **_GROUPED),
    "olmo": _of("Olmo", **_GROUPED),
    "olmo2": _of("Olmo2", **_GROUPED),
    "olmo3": _of("Olmo3", sliding_window=256, **_GROUPED),
    "granite": _of("Granite", **_GROUPED),
    "cohere": _of("Cohere", **_GROUPED),
    "cohere2": _of("Cohere2", sliding_window=256, **_GROUPED),
    "stablelm": _of("StableLm", **_GROUPED),
    "starcoder2": _of("Starcoder2", **_GROUPED),
    "gpt_neox": _of("GPTNeoX"),
    "opt": _of("OPT", ffn_dim=48, word_embed_proj_dim=32),
    "smollm3": _of("SmolLM3", **_GROUPED),
    "glm": _of("Glm", head_dim=8, **_GROUPED),
    "nemotron": _of("Nemotron", **_GROUPED),
    "helium": _of("Helium", head_dim=8, **_GROUPED),
    "exaone4": _of("Exaone4", sliding_window=256, **_GROUPED),
    "ernie4_5": _of("Ernie4_5", head_dim=8, **_GROUPED),
    "seed_oss": _of("SeedOss", head_dim=8, **_GROUPED),
    "deepseek_v3": _of(
        "DeepseekV3",
        q_lora_rank=8,
        kv_lora_rank=8,
        qk_nope_head_dim=8,
        qk_rope_head_dim=8,
        v_head_dim=8,
        n_routed_experts=4,
        n_group=1,
        topk_group=1,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        first_k_dense_replace=1,
    ),
}
REFUSED: dict[str, Callable[[], Any]] = {
    "gpt_neo": _of("GPTNeo", num_layers=2, num_heads=4, attention_types=[[["global"], 2]]),
    "gptj": _of("GPTJ", n_embd=32, n_layer=2, n_head=4, rotary_dim=4, n_positions=POSITIONS),
    "codegen": _of("CodeGen", n_embd=32, n_layer=2, n_head=4, rotary_dim=4, n_positions=POSITIONS),
    "bloom": _of("Bloom", n_layer=2, n_head=4),
    "falcon": _of("Falcon"),
    "mpt": _of("Mpt", d_model=32, n_layers=2, n_heads=4),
    "gpt_oss": _of("GptOss", head_dim=8, num_local_experts=4, sliding_window=256, **_GROUPED),
    "mamba": _of("Mamba", state_size=4),
    "bamba": _of(
        "Bamba", mamba_n_heads=4, mamba_d_head=16, mamba_n_groups=1, attn_layer_indices=[1], **_GROUPED
    ),
    "recurrent_gemma": _of("RecurrentGemma", **_GROUPED),
    "llama_dynamic": _of("Llama", rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}),
}
_LATENT: dict[str, Any] = {
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "n_routed_experts": 4,
    "n_group": 1,
    "topk_group": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "first_k_dense_replace": 1,
}
_INDEXED = {"index_topk": 32, "index_head_dim": 16, "index_n_heads": 2}
_GEMMA3N: dict[str, Any] = {
    "head_dim": 8,
    "sliding_window": 64,
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": VOCABULARY,
    "laurel_rank": 4,
    "activation_sparsity_pattern": [0.0, 0.0],
    **_GROUPED,
}


def _scaled(kind: str, **more: Any) -> dict[str, Any]:
    rope = {
        "rope_type": kind,
        "factor": 4.0,
        "rope_theta": 1e4,
        "original_max_position_embeddings": 64,
        **more,
    }
    return {"rope_parameters": rope, **_GROUPED}


# whose attention changes with the length, or is computed in parts: right wherever they are accepted
UNUSUAL: dict[str, Callable[[], Any]] = {
    "doge_64": _of("Doge", keep_window_size=64, **_GROUPED),
    "doge_2048": _of("Doge", keep_window_size=2048, **_GROUPED),
    "llama4": _of(
        "Llama4",
        text=True,
        head_dim=8,
        attention_chunk_size=48,
        intermediate_size_mlp=48,
        num_local_experts=2,
        layer_types=["chunked_attention", "full_attention"],
        no_rope_layers=[1, 0],
        moe_layers=[1],
        **_GROUPED,
    ),
    "gemma3n": _of(
        "Gemma3n",
        text=True,
        num_kv_shared_layers=0,
        layer_types=["sliding_attention", "full_attention"],
        **_GEMMA3N,
    ),
    "gemma3n_shared": _of(
        "Gemma3n", text=True, num_kv_shared_layers=1, layer_types=["sliding_attention"] * 2, **_GEMMA3N
    ),
    "modernbert_decoder": lambda: tf.ModernBertDecoderForCausalLM(
        tf.ModernBertDecoderConfig(**_COMMON, local_attention=64)
    ),
    "deepseek_v2": _of("DeepseekV2", **_LATENT),
    "deepseek_v32": _of("DeepseekV32", **_LATENT, **_INDEXED),
    "glm_moe_dsa": _of("GlmMoeDsa", **_LATENT, **_INDEXED),
    "minimax": _of("MiniMax", head_dim=8, block_size=32, num_local_experts=2, **_GROUPED),
    "jamba": _of(
        "Jamba",
        attn_layer_period=2,
        attn_layer_offset=1,
        mamba_d_state=4,
        num_experts=2,
        use_mamba_kernels=False,
        **_GROUPED,
    ),
    "falcon_h1": _of(
        "FalconH1",
        mamba_d_ssm=32,
        mamba_n_heads=4,
        mamba_d_head=8,
        mamba_n_groups=1,
        mamba_d_state=8,
        **_GROUPED,
    ),
    "lfm2": _of("Lfm2", layer_types=["conv", "full_attention"], **_GROUPED),
    "biogpt": _of("BioGpt"),
    "jetmoe": _of("JetMoe", kv_channels=8, num_local_experts=2, num_experts_per_tok=1, num_key_value_heads=4),
    "diffllama": _of("DiffLlama", **_GROUPED),
    "phi3_window": _of("Phi3", sliding_window=64, **_GROUPED),
    "qwen2_window": _of("Qwen2", use_sliding_window=True, sliding_window=64, max_window_layers=1, **_GROUPED),
    "llama_yarn": _of("Llama", **_scaled("yarn")),
    "llama_scaled": _of("Llama", **_scaled("llama3", low_freq_factor=1.0, high_freq_factor=4.0)),
}


@functools.cache
def _built(name: str) -> Any:
    torch.manual_seed(3)
    model = {**BUILDERS, **REFUSED, **UNUSUAL}[name]().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(6.0)  # so that the prefix has a visible effect in an untrained model
    model.generation_config.pad_token_id = 0
    return model


def tiny(name: str) -> Any:
    """A fresh copy of the tiny model, in evaluation mode."""
    return copy.deepcopy(_built(name))


def tokens(count: int, seed: int = 0) -> torch.Tensor:
    """[count] ordinary token ids."""
    return torch.randint(3, VOCABULARY, (count,), generator=torch.Generator().manual_seed(seed))


def segments(lengths: Sequence[int], seed: int = 0) -> list[list[int]]:
    ids = tokens(sum(lengths), seed)
    return [part.tolist() for part in ids.split(list(lengths))]


def questions() -> dict[str, torch.Tensor]:
    """Two users' turns [2, 6], the second shorter and padded on the left."""
    ids, mask = tokens(12, 7).view(2, 6).clone(), torch.ones(2, 6, dtype=torch.int64)
    mask[1, :2] = 0
    ids[1, :2] = 0
    return {"input_ids": ids, "attention_mask": mask}


def generate(model: Any, inputs: dict[str, Any], **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """(new tokens, scores of all steps); sampling starts from one seed."""
    torch.manual_seed(0)
    out: Any = model.generate(
        **inputs,
        **{"max_new_tokens": 5, "min_new_tokens": 5, **options},
        output_scores=True,
        return_dict_in_generate=True,
    )
    return out.sequences[:, inputs["input_ids"].shape[1] :], torch.stack(tuple(out.scores))
