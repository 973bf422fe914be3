"""Every architecture on tiny weights: packed conversations are as if alone, and the loss is the one of its own logits.

The oracle is transformers alone: one conversation at a time, eager, float64, the DFT formula over its logits. Weights
are drawn widely (initializer_range 0.3), so that attention and state matter: with those of an untrained model a leak
from one conversation into the next would show at 1e-4 only.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from dft_common.reader import Row
from dft_train.data.collate import collate
from dft_train.guards.probe import inputs_for, probe_logits, probe_packing
from dft_train.models.head import HeadTap, LossRequest
from dft_train.models.recurrent import recurrent_layers, reset_states
from train import handmade, oracle

VOCAB, ALPHA, COUNT = 64, 0.7, 10.0
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
LOCAL_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
DELTA = {
    "linear_num_value_heads": 2,
    "linear_num_key_heads": 1,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "layer_types": ["linear_attention", "full_attention"],
}
MAMBA = {
    "mamba_n_heads": 4,
    "mamba_d_head": 16,
    "mamba_d_state": 8,
    "mamba_n_groups": 1,
    "mamba_chunk_size": 8,
}
WINDOW = {"sliding_window": 5}
MIXED = {**WINDOW, "layer_types": ["sliding_attention", "full_attention"]}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    model: str
    sizes: dict[str, Any] = dataclasses.field(default_factory=dict)
    attention: str = "sdpa"
    recurrent: int = 0
    """Layers that carry a state along."""


ATTENTION = [
    Case(model="qwen3"),
    Case(model="llama", sizes={"tie_word_embeddings": True}),
    Case(
        model="gemma2", sizes={**WINDOW, "query_pre_attn_scalar": 16, "attn_logit_softcapping": 5.0}, attention="eager"
    ),
    Case(model="gemma3_text", sizes={**MIXED, "query_pre_attn_scalar": 16}),
    Case(model="phi3", sizes=WINDOW),
    Case(model="mistral", sizes=WINDOW),
    Case(model="granite", sizes={"logits_scaling": 4.0, "embedding_multiplier": 3.0, "attention_multiplier": 0.2}),
    Case(model="cohere2", sizes={**MIXED, "logit_scale": 0.25}),
]
MORE_ATTENTION = [
    Case(model="cohere", sizes={"logit_scale": 0.25}),
    Case(model="qwen2"),
    Case(model="gemma"),
    Case(model="phi"),
    Case(model="ministral", sizes=WINDOW),
    Case(model="olmo2"),
    Case(model="olmo3", sizes=MIXED),
    Case(model="smollm3"),
    Case(model="glm4"),
    Case(model="starcoder2"),
    Case(model="stablelm"),
    Case(model="gpt_neox"),
    Case(model="gpt2"),
    Case(model="exaone4", sizes=MIXED),
    Case(model="nemotron"),
    Case(model="ernie4_5"),
    Case(model="hunyuan_v1_dense"),
    Case(model="seed_oss"),
]
MIXTURE = [
    Case(model="qwen3_moe", sizes={**EXPERTS, "decoder_sparse_step": 1}),
    Case(model="mixtral", sizes=LOCAL_EXPERTS),
]
MORE_MIXTURE = [
    Case(model="qwen2_moe", sizes={**EXPERTS, "shared_expert_intermediate_size": 16}),
    Case(model="olmoe", sizes=EXPERTS),
    Case(model="granitemoe", sizes=LOCAL_EXPERTS),
    Case(model="phimoe", sizes=LOCAL_EXPERTS),
    Case(model="jetmoe", sizes={**LOCAL_EXPERTS, "kv_channels": 16}),
]
NEXT = {**EXPERTS, **DELTA, "shared_expert_intermediate_size": 16, "decoder_sparse_step": 1}
HYBRID = [
    Case(model="qwen3_next", sizes=NEXT, recurrent=1),
    Case(model="lfm2", sizes={"layer_types": ["conv", "full_attention"]}, recurrent=1),
    Case(
        model="falcon_h1",
        sizes={**MAMBA, "mamba_d_ssm": 32, "mamba_d_head": 8, "lm_head_multiplier": 0.5},
        recurrent=2,
    ),
]
MORE_HYBRID = [
    Case(model="qwen3_5_text", sizes=DELTA, recurrent=1),
    Case(model="olmo_hybrid", sizes=DELTA, recurrent=1),
    Case(
        model="lfm2_moe",
        sizes={**EXPERTS, "layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
        recurrent=1,
    ),
    Case(model="bamba", sizes={**MAMBA, "attn_layer_indices": [1]}, recurrent=1),
    Case(model="mamba", sizes={"state_size": 8}, attention="eager", recurrent=2),
    Case(
        model="mamba2",
        sizes={"state_size": 8, "num_heads": 4, "n_groups": 1, "chunk_size": 8},
        attention="eager",
        recurrent=2,
    ),
]


def cases(*lists: list[Case], slow: tuple[list[Case], ...] = ()) -> list[Any]:
    quick = [case for one in lists for case in one]
    rest = [case for one in slow for case in one if case not in quick]
    marked = [pytest.param(case, id=case.model, marks=pytest.mark.slow) for case in rest]
    return [*(pytest.param(case, id=case.model) for case in quick), *marked]


def make(case: Case) -> Any:
    torch.manual_seed(1)
    config = AutoConfig.for_model(case.model, **{**handmade.SMALL, **case.sizes})
    return AutoModelForCausalLM.from_config(config, attn_implementation=case.attention)


ROWS = handmade.random_rows([7, 12, 1, 9], ids=(3, VOCAB))


def ours(net: Any, case: Case, rows: list[Row]) -> tuple[float, dict[str, torch.Tensor]]:
    """The same packed into one sequence, as the trainer does it."""
    reset_states(net)
    tap = HeadTap(net)
    inputs = inputs_for(case.attention, torch.device("cpu"))
    probe_packing(tap, net, inputs, torch.float32)
    transform = probe_logits(tap, net, net.config, inputs)
    batch = collate(rows, [0] * len(rows), int(COUNT), case.attention)
    request = LossRequest(batch.labels, None, COUNT, "dft", ALPHA)._replace(**transform._asdict())
    loss, _ = tap.loss(net, batch.inputs, request)
    loss.backward()
    return loss.item(), {name: weight.grad for name, weight in net.named_parameters()}


def assert_gradients(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float) -> None:
    """Each element to `tolerance` of the largest of its parameter's."""
    assert set(found) == set(expected)
    for name, gradient in expected.items():
        if gradient is None:
            assert found[name] is None or not found[name].any(), name
            continue
        size = float(gradient.abs().max())
        torch.testing.assert_close(
            found[name].double(),
            gradient.double(),
            rtol=0,
            atol=tolerance * size + 1e-9,
            msg=lambda text, n=name: n + text,
        )


@pytest.mark.parametrize("case", cases(ATTENTION, MIXTURE, HYBRID, slow=(MORE_ATTENTION, MORE_MIXTURE, MORE_HYBRID)))
def test_packed_conversations_have_the_loss_and_gradients_of_each_alone(case, tmp_path):
    """And what is saved afterwards loads as the same model."""
    net = make(case).eval()
    assert len(recurrent_layers(net)) == case.recurrent
    alone = [
        handmade.Conversation(ids=row.input_ids.tolist(), mask=row.assistant_masks.tolist(), source="s") for row in ROWS
    ]
    expected = oracle.loss_and_gradients(oracle.double(net), alone, ALPHA, COUNT)
    found = ours(net, case, ROWS)
    assert expected[0] > 1
    assert found[0] == pytest.approx(expected[0], rel=1e-5)
    assert_gradients(found[1], expected[1], 1e-4)
    net.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation=case.attention).eval()
    with torch.no_grad():
        ids = torch.from_numpy(ROWS[1].input_ids.astype(np.int64))[None]
        assert torch.equal(again(input_ids=ids).logits, net(input_ids=ids).logits)


@pytest.mark.parametrize(
    "case",
    cases([ATTENTION[2]], [MIXTURE[0]], [HYBRID[0]], slow=(ATTENTION, MIXTURE, MORE_MIXTURE, HYBRID, MORE_HYBRID)),
)
def test_a_run_evaluates_saves_and_loads_what_it_trained(case, dataset, rows, train_here, tmp_path):
    """The evaluation after two steps is that of the saved model, by transformers alone."""
    model, run = handmade.write_model(tmp_path / "model", case.model, **case.sizes), tmp_path / "run"
    code, error = train_here(
        "--dataset_dir", dataset, "--model_name_or_path", model, "--output_dir", run, "--max_steps", 2,
        "--per_device_train_batch_size", 2, "--per_device_eval_batch_size", 3, "--learning_rate", 3e-3,
        "--eval_strategy", "steps", "--eval_steps", 2, "--save_strategy", "no", "--torch_dtype", "float32",
        "--attn_implementation", case.attention,
    )  # fmt: skip
    assert code == 0, error
    assert ("carry a state along" in error) == bool(case.recurrent)
    (found,) = (line for line in handmade.read_state(run)["log_history"] if "eval_loss" in line)
    expected = oracle.numbers(run, rows[1], 0.7)
    for source, numbers in expected.items():
        prefix = f"eval_{source}_" if source else "eval_"
        mine = [found[prefix + name] for name in ("loss", "ce_loss", "avg_p_correct")]
        assert mine == pytest.approx(numbers, rel=5e-6), source
    before = oracle.numbers(model, rows[1], 0.7)
    assert abs(expected[""][1] - before[""][1]) > 1e-3
