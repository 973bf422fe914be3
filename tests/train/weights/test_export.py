"""What a run writes of its model is what transformers' `save_pretrained` would have written, tensor for tensor, while
no process holds more than a parameter at a time."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from dft_train.release.directory import Release
from dft_train.weights import export
from dft_train.weights.export import read_model, write_model
from dft_train.weights.tensor_file import TensorFile
from dft_train.weights.weight_plan import make_plan
from train import handmade

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {"tie_word_embeddings": True},
    "qwen3": {},
    "gemma2": {},
    "gpt2": {},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    "mixtral": {"num_local_experts": 4},
}
INDEX = "model.safetensors.index.json"
SMALL = 20_000


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Path]:
    directory = tmp_path_factory.mktemp("export")
    return {name: handmade.write_model(directory / name, name, **more) for name, more in ARCHITECTURES.items()}


def tensors(directory: Path) -> dict[str, torch.Tensor]:
    return {name: value for path in directory.glob("*.safetensors") for name, value in load_file(path).items()}


def assert_same_tensors(directory: Path, expected: dict[str, torch.Tensor]) -> None:
    found = tensors(directory)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype and torch.equal(found[name], value), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_files_are_those_of_save_pretrained(architecture, dtype, models, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(models[architecture], dtype=dtype)
    next(model.parameters()).requires_grad_(False)
    model.save_pretrained(tmp_path / "theirs")
    write_model(model, tmp_path / "ours")
    ours, theirs = (
        {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("ours", "theirs")
    )
    assert ours == theirs


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_shards_hold_the_same_and_can_be_loaded(architecture, models, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(models[architecture], dtype=torch.float32)
    write_model(model, tmp_path, shard_size=SMALL)
    assert_same_tensors(tmp_path, load_file(models[architecture] / "model.safetensors"))
    shards = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert shards == [f"model-{at + 1:05}-of-{len(shards):05}.safetensors" for at in range(len(shards))]
    for shard in shards:
        held = load_file(tmp_path / shard).values()
        assert len(held) == 1 or sum(value.nbytes for value in held) <= SMALL
    index = json.loads((tmp_path / INDEX).read_text())
    assert index["weight_map"].keys() == tensors(tmp_path).keys()
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in tensors(tmp_path).values())
    assert index["metadata"]["total_parameters"] == sum(value.numel() for value in tensors(tmp_path).values())
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    for name, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name


def test_buffers_and_names_to_ignore_are_as_save_pretrained_has_them(models, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(models["qwen3"])
    model.register_buffer("kept", torch.arange(3.0))
    model.register_buffer("left_out", torch.arange(3.0))
    model.register_buffer("passing", torch.arange(3.0), persistent=False)
    model._keys_to_ignore_on_save = {"left_out"}
    model.save_pretrained(tmp_path / "theirs")
    write_model(model, tmp_path / "ours")
    assert {name for name in tensors(tmp_path / "ours") if "." not in name} == {"kept"}
    assert_same_tensors(tmp_path / "ours", tensors(tmp_path / "theirs"))


def test_what_cannot_be_written_is_raised_at_the_end_and_leaves_no_files(models, tmp_path, monkeypatch):
    """At the end: until then the other ranks wait in collectives for this one."""
    calls = []
    original = TensorFile.put

    def put(self: TensorFile, name: str, tensor: torch.Tensor) -> bool:
        calls.append(name)
        if len(calls) == 5:
            raise OSError(28, "No space left on device")
        return original(self, name, tensor)

    gathered = []
    monkeypatch.setattr(TensorFile, "put", put)
    monkeypatch.setattr(export, "_gathered", lambda parts: gathered.extend(parts) or torch.no_grad())
    model = AutoModelForCausalLM.from_pretrained(models["llama"], dtype=torch.float32)
    with pytest.raises(OSError, match="No space left"):
        write_model(model, tmp_path, shard_size=SMALL)
    assert len(calls) == 5 and len(gathered) == len(load_file(models["llama"] / "model.safetensors"))
    assert not list(tmp_path.glob("*.safetensors*"))


@pytest.mark.parametrize(
    "architecture",
    [pytest.param("llama", marks=pytest.mark.slow), "qwen3_moe", pytest.param("gemma2", marks=pytest.mark.slow)],
)
def test_two_ranks_of_zero3_write_what_they_read(architecture, models, dataset, ranks, zero3_float32, tmp_path):
    """With a step size of 0 the weights stay; tied, converted and embedded ones find their way through the ranks."""
    ranks(
        2, "--dataset_dir", dataset, "--model_name_or_path", models[architecture], "--output_dir", tmp_path / "run",
        "--deepspeed", zero3_float32, "--torch_dtype", "float32", "--max_steps", 2, "--learning_rate", 0,
        "--save_steps", 1, "--save_only_model",
    )  # fmt: skip
    expected = load_file(models[architecture] / "model.safetensors")
    for directory in (tmp_path / "run", tmp_path / "run" / "checkpoint-1"):
        assert_same_tensors(directory, expected)
        assert {path.name for path in directory.glob("*")} >= {
            "config.json",
            "generation_config.json",
            "dft.json",
            "README.md",
        }


def test_a_mixture_of_experts_goes_on_from_its_checkpoint(models, dataset, train_here, tmp_path):
    """Its files have its experts under other names than the model: all of them must find their way back."""
    flags = (
        "--dataset_dir", dataset, "--model_name_or_path", models["qwen3_moe"], "--output_dir", tmp_path,
        "--max_steps", 4, "--save_steps", 2, "--learning_rate", 1e-2,
    )  # fmt: skip
    assert train_here(*flags)[0] == 0
    expected = tensors(tmp_path)
    code, error = train_here(*flags, "--resume_from_checkpoint", tmp_path / "checkpoint-2")
    assert code == 0 and "going on from" in error, error
    assert_same_tensors(tmp_path, expected)


def _live_bytes() -> int:
    """Of all tensors of this process, storages counted once."""
    sizes = {}
    for one in gc.get_objects():
        if isinstance(one, torch.Tensor) and one.device.type == "cpu":
            storage = one.untyped_storage()
            sizes[storage.data_ptr()] = storage.nbytes()
    return sum(sizes.values())


def measured_run(out: Path, *arguments: str) -> None:
    """`dft-train` in this process, with shards of SMALL bytes; into `out`, the bytes that are alive while it saves
    (those before not counted). Nothing may ask for the whole model."""
    import deepspeed

    from dft_train.cli import main

    before: list[int] = []
    during: list[int] = []
    puts: list[str] = []
    write, put = Release.write, TensorFile.put

    def measured_write(self: Release, *args: Any, **kwargs: Any) -> None:
        before.append(_live_bytes())
        write(self, *args, **kwargs)

    def measured_put(self: TensorFile, name: str, tensor: torch.Tensor) -> bool:
        puts.append(name)
        # Asking takes a while.
        if len(puts) % 9 == 0 or "embed" in name or "head" in name:
            during.append(_live_bytes() - before[-1])
        return put(self, name, tensor)

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("the whole model")

    Release.write, TensorFile.put = measured_write, measured_put
    deepspeed.DeepSpeedEngine._zero3_consolidated_16bit_state_dict = PreTrainedModel.save_pretrained = refuse
    export.SHARD_SIZE = SMALL
    assert main(list(arguments)) == 0
    out.write_text(json.dumps({"during": during, "puts": len(puts)}))


@pytest.mark.slow
def test_a_save_holds_one_parameter_at_a_time(dataset, tmp_path):
    """With parameters that ZeRO-3 keeps whole among those that it parts. In a process of its own: DeepSpeed starts
    once in one."""
    model = handmade.write_model(tmp_path / "model", "qwen3", num_hidden_layers=12)
    config = tmp_path / "zero3.json"
    zero = {"stage": 3, "stage3_param_persistence_threshold": 1_000}
    config.write_text(json.dumps({"train_micro_batch_size_per_gpu": "auto", "zero_optimization": zero}))
    words = (
        tmp_path / "out.json", "--dataset_dir", dataset, "--model_name_or_path", model,
        "--output_dir", tmp_path / "run", "--deepspeed", config, "--torch_dtype", "float32", "--max_steps", 2,
        "--learning_rate", 0, "--save_strategy", "no",
    )  # fmt: skip
    script = "import sys, pathlib; from train.weights.test_export import measured_run as run; "
    script += "run(pathlib.Path(sys.argv[1]), *sys.argv[2:])"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, "-c", script, *map(str, words)], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-4000:]
    expected = load_file(model / "model.safetensors")
    assert_same_tensors(tmp_path / "run", expected)
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["puts"] == len(expected) > 100 and len(found["during"]) > 10
    largest = max(value.nbytes for value in expected.values())
    assert max(found["during"]) <= 2.5 * largest < sum(value.nbytes for value in expected.values()) / 5


# The plan


def _convert(wanted: dict[str, tuple[str, ...]]):
    """`wanted`: name on disk -> the names that are put together for it; `a.0` is the upper half of `a`."""

    def convert(found: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        made = {}
        for target, parts in wanted.items():
            names = [part.partition("/")[0] for part in parts]
            if not set(names) & set(found):
                continue
            if len(parts) == 1 and "/" not in parts[0]:
                made[target] = found[parts[0]]
                continue
            have = [(part, found[name]) for part, name in zip(parts, names, strict=True) if name in found]
            made[target] = torch.cat([value.chunk(2)[int(part[-1])] if "/" in part else value for part, value in have])
        return made

    return convert


@given(st.data())
@settings(max_examples=60)
def test_piece_by_piece_gives_what_the_whole_gives(data):
    names = [f"w{at}" for at in range(data.draw(st.integers(1, 6)))]
    model = {name: torch.randn(data.draw(st.sampled_from([2, 4])), 3) for name in names}
    wanted: dict[str, tuple[str, ...]] = {}
    free = list(names)
    while free:
        kind = data.draw(st.sampled_from(["rename", "split", "join"]))
        if kind == "join" and len(free) > 1:
            wanted[f"j{len(free)}"] = (free.pop(), free.pop())
        elif kind == "split":
            name = free.pop()
            wanted |= {f"{name}.0": (f"{name}/0",), f"{name}.1": (f"{name}/1",)}
        else:
            wanted[f"r{len(free)}"] = (free.pop(),)
    convert = _convert(wanted)
    plan = make_plan({name: value.to("meta") for name, value in model.items()}, convert)
    assert sorted(name for piece in plan.pieces for name in piece.sources) == names
    made: dict[str, torch.Tensor] = {}
    for piece in plan.pieces:
        part = {name: model[name] for name in piece.sources}
        made |= convert(part) if piece.converted else {piece.targets[0]: part[piece.sources[0]]}
    whole = convert(dict(model))
    assert list(plan.tensors) == list(whole) and made.keys() == whole.keys()
    for name, value in whole.items():
        assert torch.equal(made[name], value)


def test_a_piece_is_no_larger_than_it_must_be():
    convert = _convert({"x": ("a",), "y0": ("b/0",), "y1": ("b/1",), "z": ("c", "d")})
    plan = make_plan({name: torch.empty(4, 2, device="meta") for name in "abcd"}, convert)
    assert [piece.sources for piece in plan.pieces] == [("a",), ("b",), ("c", "d")]
    assert [piece.targets for piece in plan.pieces] == [("x",), ("y0", "y1"), ("z",)]


# The file

_DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.uint8, torch.bool, torch.float64]


@given(
    st.dictionaries(
        st.text(min_size=1, max_size=6),
        st.tuples(st.sampled_from(_DTYPES), st.lists(st.integers(0, 4), max_size=3)),
        min_size=1,
        max_size=6,
    ),
    st.randoms(),
)
@settings(max_examples=60)
def test_a_file_written_in_any_order_is_that_of_safetensors(tmp_path_factory, specs, random):
    directory = tmp_path_factory.mktemp("file")
    held = {name: torch.randn(shape).to(dtype) for name, (dtype, shape) in specs.items() if name.isprintable()}
    if not held:
        return
    file = TensorFile(directory / "ours", held)
    order = random.sample(sorted(held), len(held))
    assert [file.put(name, held[name]) for name in order] == [False] * (len(held) - 1) + [True]
    save_file(held, directory / "theirs", metadata={"format": "pt"})
    found, expected = load_file(directory / "ours"), load_file(directory / "theirs")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) and found[name].dtype == value.dtype for name, value in expected.items())


def test_reading_weights_touches_no_gpu_and_no_random_number(qwen3, monkeypatch):
    """As on a machine with several GPUs: torch would open every one of them and warn of it at length."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    model, before = AutoModelForCausalLM.from_pretrained(qwen3), torch.get_rng_state()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        read_model(model, qwen3)
    assert torch.equal(torch.get_rng_state(), before)
