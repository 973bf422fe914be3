"""What a pack costs: against torch's own count of a real model's products, forward and backward."""

from __future__ import annotations

import types

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM

from dft_train.data.flops import PEAK_TFLOPS, attended_pairs, model_work, pack_flops, peak_flops

SIZES = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 24,
    "max_position_embeddings": 512,
}


def small_model(architecture, **more):
    sizes = {name: size for name, size in {**SIZES, **more}.items() if size is not None}
    config = AutoConfig.for_model(architecture, **sizes)
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, attn_implementation="eager")


class OnePack:
    """A split of one pack with slices of `lengths` tokens, `live` of which are trained."""

    def __init__(self, lengths, live):
        self.lengths = np.array(lengths)
        self.tokens, self.lives = np.array([sum(lengths)]), np.array([live])

    def pairs(self, window):
        return np.array([attended_pairs(self.lengths, window).sum()])


def counted(model, length):
    """torch's count of a forward and backward pass over one sequence, every token of which is trained."""
    ids = torch.arange(length)[None] % 97
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    return counter.get_total_flops()


@pytest.mark.parametrize(
    ("architecture", "more"),
    [
        ("qwen3", {}),
        ("llama", {"tie_word_embeddings": True}),
        (
            "gemma2",
            {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"], "sliding_window": 512},
        ),
        ("phi3", {"pad_token_id": 0, "head_dim": None}),
    ],
    ids=["qwen3", "llama-tied", "gemma2", "phi3"],
)
def test_as_torch_counts_them(architecture, more):
    model = small_model(architecture, **more)
    length = 128
    work = model_work(model, model.config, model.get_output_embeddings())
    ours = pack_flops(OnePack([length], length), work)[0]
    # Eager attention computes every pair, the masked ones too: ours counts those that see each other.
    masked = (length**2 - length * (length + 1) // 2) * sum(work.per_pair.values())
    assert ours + masked == pytest.approx(counted(model, length), rel=0.01)
    assert masked > 0.01 * ours


def test_frozen_weights_need_no_gradient_of_their_own():
    model = small_model("qwen3")
    head = model.get_output_embeddings()
    whole = model_work(model, model.config, head)
    model.requires_grad_(False)
    frozen = model_work(model, model.config, head)
    assert (frozen.per_token * 3, frozen.per_live * 3) == (whole.per_token * 2, whole.per_live * 2)
    assert frozen.per_pair == whole.per_pair


def test_a_token_passes_only_its_experts():
    more = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "decoder_sparse_step": 1}
    model = small_model("qwen3_moe", **more)
    work = model_work(model, model.config, model.get_output_embeddings())
    hidden, heads, dim = 64, 4, 24
    attention = hidden * heads * dim * 2 + hidden * 2 * dim * 2
    experts = 2 * 3 * hidden * 32
    router = hidden * 8
    assert work.per_token == 6 * 3 * (attention + experts + router)


def test_only_pairs_within_a_slice_and_its_window_count():
    def naive(length, window):
        return sum(1 for query in range(length) for key in range(query + 1) if window is None or query - key < window)

    lengths = np.array([1, 2, 5, 9])
    for window in (None, 1, 3, 5, 20):
        assert attended_pairs(lengths, window).tolist() == [naive(length, window) for length in lengths]


def test_dead_labels_cost_no_head():
    model = small_model("qwen3")
    work = model_work(model, model.config, model.get_output_embeddings())
    live, dead = (pack_flops(OnePack([60, 68], count), work)[0] for count in (100, 0))
    assert live - dead == 100 * 6 * 97 * 64


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 NVL", 835),
        ("NVIDIA H200", 989),
        ("NVIDIA GB200", 2500),
        ("NVIDIA B300 SXM6 AC", 2250),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA L4", 121),
        ("NVIDIA L40S", 362),
        ("AMD Instinct MI300X", 1307),
        ("NVIDIA GeForce RTX 9999", None),
    ],
)
def test_peak_by_the_name_of_the_device(monkeypatch, name, tflops):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    device = types.SimpleNamespace(type="cuda")
    assert peak_flops(device, None) == (tflops and tflops * 1e12)
    assert peak_flops(device, 5.0) == 5e12
    assert peak_flops(torch.device("cpu"), None) is None
    assert len(PEAK_TFLOPS) == len({words for words, _ in PEAK_TFLOPS})
