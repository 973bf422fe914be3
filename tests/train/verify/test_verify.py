"""`dft-train verify`: right layouts agree, a broken reduction is caught, the excerpt is part of the dataset."""

from __future__ import annotations

import json
import math

import pytest
import torch
from safetensors.torch import save_file

from dft_common.manifest import read_manifest
from dft_train import loop
from dft_train.data.dataset import PackedSplit
from dft_train.verify import command as verify
from dft_train.verify import layouts as verify_layouts
from dft_train.verify.command import choose_layers, largest_difference
from dft_train.verify.excerpt import write_excerpt
from dft_train.verify.flags import PASSED_ON, as_words, verify_flags
from dft_train.verify.layouts import Layout, layouts
from train import handmade


@pytest.fixture
def verify_here(train_here, dataset, qwen3, monkeypatch):
    """`dft-train verify` with the layouts of one rank, each run in this process: (exit code, what it prints)."""
    monkeypatch.setattr(loop, "DftTrainer", loop.DftTrainer)
    one_rank = [
        layout for layout in layouts(1, bf16=False, deepspeed=None, has_deepspeed=False) if "2 x 2" not in layout.name
    ]
    monkeypatch.setattr(verify, "layouts", lambda *_, **__: one_rank)
    right = loop.DftTrainer

    def here(layout, arguments, port, outputs):
        monkeypatch.setattr(loop, "DftTrainer", right_now[0])
        outputs[0].touch()
        return [verify_layouts.run_rank(arguments)]

    right_now = [right]
    monkeypatch.setattr(verify_layouts, "_fork_all", here)
    printed: list[str] = []
    monkeypatch.setattr(verify.click, "echo", printed.append)

    def run(*flags, trainer=right):
        right_now[0] = trainer
        threads = torch.get_num_threads()
        code, _ = train_here("verify", "--dataset_dir", dataset, "--model_name_or_path", qwen3, *flags)
        torch.set_num_threads(threads)
        return code, printed.pop() if printed else ""

    return run


def test_right_layouts_agree(verify_here):
    code, text = verify_here("--format", "json", "--objective", "power", "--power_k", 0.3)
    found = json.loads(text)
    assert code == 0 and found["good"] and len(found["layouts"]) == 3
    for row in found["layouts"]:
        assert not row["differs"] and len(row["losses"]) == 2
        assert max(row["loss"], row["norm"], row["gradient"], row["weights"]) < 1e-5
    assert found["packing"]["others"] == 0.0


def test_a_mean_of_means_is_caught(verify_here):
    class MeansOfMeans(loop.DftTrainer):
        """Each micro-batch divides by its own trained tokens, and the micro-batches are averaged."""

        def compute_loss(self, model, inputs, *args, **kwargs):
            own = int((inputs.labels != -100).sum())
            loss = super().compute_loss(model, inputs, *args, **kwargs)
            return loss * inputs.num_valid_tokens / max(own, 1) / self.args.gradient_accumulation_steps

    code, text = verify_here(trainer=MeansOfMeans)
    assert code == 1 and "NOT all layouts train the same model" in text
    accumulated = next(line for line in text.splitlines() if "x 4 accumulated" in line)
    assert "DIFFERS" in accumulated and "gradient" in accumulated
    assert text.count("DIFFERS") == 1


def test_a_layout_that_fails_is_told(verify_here, monkeypatch):
    failing = [
        Layout("1 rank, batch 4", 1, 4),
        Layout("bad", 1, 1, json.dumps({"zero_optimization": {"stage": 9}})),
    ]
    monkeypatch.setattr(verify, "layouts", lambda *_, **__: failing)
    code, text = verify_here()
    assert code == 1 and "FAILED" in text and "exit" in text


@pytest.mark.parametrize("logged", [True, False])
def test_a_layout_that_logs_no_norm_is_compared_by_all_else(logged, tmp_path):
    """As DeepSpeed's stage 0 in float32."""
    (tmp_path / "gradients").mkdir()
    lines = [{"loss": loss, **({"grad_norm": 2.0} if logged else {})} for loss in (1.5, 1.25)]
    (tmp_path / "trainer_state.json").write_text(json.dumps({"log_history": [*lines, {"train_loss": 1.375}]}))
    for name in ("model", "gradients/gradients-1", "gradients/gradients-2"):
        save_file({"weight": torch.ones(3)}, tmp_path / f"{name}.safetensors")
    outcome = verify_layouts.Outcome(Layout("ZeRO-0", 2, 1), tmp_path, 0, "")
    same = verify.Numbers([1.5, 1.25], [2.0, 2.0], [{"weight": torch.ones(3)}] * 2, {"weight": torch.ones(3)})
    row = verify.compare(outcome, same)
    assert row.losses == [1.5, 1.25] and row.norm == (0.0 if logged else None) and row.wrong(bf16=False) == []
    assert verify.compare(outcome, same._replace(losses=[1.5, 1.0])).wrong(bf16=False) == ["loss"]
    assert json.loads(verify._as_json([row], {}, "", False, True))["layouts"][0]["norm"] == row.norm
    shown = verify._text([row], {}, "", False, True).splitlines()[3]
    assert shown.endswith("ok") and ("  -  " in shown) is not logged


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_every_layout_with_real_ranks(precision, ranks, dataset, qwen3):
    started = ranks.start(
        1, "verify", "--dataset_dir", dataset, "--model_name_or_path", qwen3, "--format", "json",
        "--verify_layers", 1, "--bf16", precision == "bf16",
    )  # fmt: skip
    # Nine layouts one after the other.
    (rank,) = ranks.wait(started, timeout=500)
    assert rank.returncode == 0, rank.stdout + rank.stderr[-3000:]
    found = json.loads(rank.stdout[rank.stdout.index("{") :])
    names = [row["name"] for row in found["layouts"]]
    assert found["good"] and "1 layers and random weights" in found["model"]
    assert {"2 ranks x 2 accumulated", "ZeRO-2, 2 ranks", "ZeRO-3, 2 ranks", "ZeRO-3 with offload, 2 ranks"} <= set(
        names
    )


def test_the_excerpt_is_part_of_the_dataset(dataset, tmp_path):
    manifest = read_manifest(dataset)
    live = write_excerpt(dataset, tmp_path / "excerpt", None, 24)
    whole = PackedSplit(dataset, manifest, "train", 64, "sdpa")
    part = PackedSplit(tmp_path / "excerpt", manifest, "train", 64, "sdpa")
    assert len(part) == 7 and part.tokens.max() <= 24
    assert live == part.lives.sum() > 0
    stretches = {piece.row: (piece.start, piece.end) for at in range(len(whole)) for piece in whole.index[at]}
    for at in range(len(part)):
        for piece in part.index[at]:
            start, end = stretches[piece.row]
            assert start <= piece.start < piece.end <= end
            row = part.reader.row(piece.row, piece.start, piece.end)
            assert piece.live == handmade.live_labels(
                handmade.Conversation(
                    ids=row.input_ids.tolist(),
                    mask=row.assistant_masks.tolist(),
                    source="",
                    weights=None if row.loss_weights is None else row.loss_weights.tolist(),
                ),
                0,
                len(row.input_ids),
            )


def test_the_difference_is_by_tensor_and_noise_around_zero_is_none():
    big, small = torch.full((100,), 1.0), torch.full((4,), 1e-9)
    expected = {"big": big, "small": small}
    assert largest_difference({"big": big, "small": small * 2}, expected) < 1e-5
    assert largest_difference({"big": big, "small": small + 0.1}, expected) > 1
    changed = big.clone()
    changed[0] = 2.0
    assert largest_difference({"big": changed, "small": small}, expected) == pytest.approx(0.1)
    assert math.isinf(largest_difference({"big": big}, expected))
    assert math.isinf(largest_difference({"big": big * math.nan, "small": small}, expected))


def test_projections_show_a_difference_anywhere():
    from dft_train.verify.rank import _projected

    gradient = torch.randn(4096, generator=torch.Generator().manual_seed(0))
    changed = gradient.clone()
    changed[17] += 0.5
    difference = (_projected("a", changed) - _projected("a", gradient))[1:].abs()
    assert difference.max() == pytest.approx(0.5, rel=1e-3)
    assert not torch.equal(_projected("a", gradient)[1:], _projected("b", gradient)[1:])


def test_layouts_have_the_same_global_batch():
    for ranks in (1, 2, 4):
        for layout in layouts(ranks, bf16=False, deepspeed=None, has_deepspeed=True):
            words = layout.words()
            accumulation = int(words[words.index("--gradient_accumulation_steps") + 1])
            assert layout.ranks * layout.per_device * accumulation == 4


def test_a_large_model_is_verified_by_its_shape():
    assert choose_layers(None, 1_000_000, 2) == 0
    assert choose_layers(None, 70_000_000_000, 2) == 2
    assert choose_layers(0, 70_000_000_000, 2) == 0
    assert choose_layers(3, 1, 2) == 3


def test_flags_of_a_step_are_passed_on():
    assert as_words({"dft_alpha": "0.5", "dataset_dir": "x", "format": "json", "max_grad_norm": 0.3}) == [
        "--dft_alpha", "0.5", "--max_grad_norm", "0.3",
    ]  # fmt: skip
    assert set(PASSED_ON) <= {flag.name for flag in verify_flags()}
