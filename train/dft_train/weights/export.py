"""Writes a model's weights and configuration as `from_pretrained` loads them. Called by `loop` on every rank.

What is written is what transformers' `save_pretrained` writes: the names on disk, tied weights once, shards and their
index. But no rank ever holds the model: parameters are gathered one at a time (ZeRO-3), by all ranks in the same
order, and the rank that writes puts each into its file and lets it go.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from dft_common.manifest import encode_json, write_atomically
from dft_train.weights.tensor_file import TensorFile
from dft_train.weights.weight_plan import Convert, Piece, Tensors, WeightPlan, make_plan

SHARD_SIZE = 5_000_000_000
"""Bytes of a file of weights, unless one tensor is larger."""
WEIGHTS_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"


class Source(NamedTuple):
    """One tensor to be saved. `read` makes it, on any device, while the parameters of `held` are whole."""

    held: tuple[Tensor, ...]
    shape: torch.Size
    dtype: torch.dtype
    read: Callable[[], Tensor]


def whole_shape(tensor: Tensor) -> torch.Size:
    """Of a parameter, also where ZeRO-3 holds it in parts."""
    return torch.Size(getattr(tensor, "ds_shape", tensor.shape))


def as_it_is(tensor: Tensor) -> Source:
    return Source((tensor,), whole_shape(tensor), tensor.dtype, tensor.detach)


def _surplus_names(model: PreTrainedModel, names: list[str]) -> list[str]:
    """Of the names of one tied tensor, those that are not saved: the declared targets of tying go first."""
    declared = [
        f"{prefix}.{pattern}" if prefix else pattern
        for prefix, module in model.named_modules()
        for pattern in getattr(module, "_tied_weights_keys", None) or ()
    ]
    targets = [name for name in sorted(names) if any(re.search(pattern, name) for pattern in declared)]
    kept = next((name for name in names if name not in targets), targets[-1] if targets else names[0])
    return [name for name in names if name != kept]


def saved_tensors(model: PreTrainedModel, state: Mapping[str, Any]) -> dict[str, Tensor]:
    """Of `state` (from `state_dict(keep_vars=True)`) what `save_pretrained` would save: a tied tensor once."""
    kept = {name: value for name, value in state.items() if isinstance(value, Tensor)}
    for name in model._keys_to_ignore_on_save or ():
        kept.pop(name, None)
    tied: dict[int, list[str]] = {}
    for name, value in kept.items():
        tied.setdefault(id(value), []).append(name)
    for names in tied.values():
        for name in _surplus_names(model, names) if len(names) > 1 else ():
            del kept[name]
    return kept


def model_sources(model: PreTrainedModel) -> dict[str, Source]:
    """What is to be written of `model`, under its own names."""
    return {name: as_it_is(value) for name, value in saved_tensors(model, model.state_dict(keep_vars=True)).items()}


def _shapes(sources: Mapping[str, Source]) -> Tensors:
    return {name: torch.empty(source.shape, dtype=source.dtype, device="meta") for name, source in sources.items()}


def conversion_of(model: PreTrainedModel, sources: Mapping[str, Source]) -> Convert:
    """transformers' own way back to the form on disk."""
    shapes = _shapes(sources)

    def convert(tensors: Tensors) -> Tensors:
        # Conversions ask the model for shapes, which ZeRO-3's parameters do not have.
        model.get_parameter = shapes.__getitem__  # pyright: ignore[reportAttributeAccessIssue]
        try:
            return revert_weight_conversion(model, tensors)
        finally:
            del model.get_parameter

    return convert


def planned_tensors(sources: Mapping[str, Source], convert: Convert) -> Tensors:
    """What `write_weights` would write, as meta tensors by their names on disk."""
    return dict(make_plan(_shapes(sources), convert).tensors)


class _Shards:
    """The files of one export, each opened with its first tensor and closed with its last."""

    def __init__(self, directory: Path, files: Mapping[str, list[str]], tensors: Tensors) -> None:
        self._directory = directory
        self._files = files
        self._tensors = tensors
        self._file_of = {name: file for file, names in files.items() for name in names}
        self._open: dict[str, TensorFile] = {}

    def put(self, name: str, tensor: Tensor) -> None:
        file = self._file_of[name]
        if file not in self._open:
            self._directory.mkdir(parents=True, exist_ok=True)
            held = {other: self._tensors[other] for other in self._files[file]}
            self._open[file] = TensorFile(self._directory / file, held)
        if self._open[file].put(name, tensor):
            del self._open[file]

    def discard(self) -> None:
        for file in self._files:
            if file in self._open:
                self._open[file].close()
            (self._directory / file).unlink(missing_ok=True)


@contextlib.contextmanager
def _at_rest(engine: Any) -> Iterator[None]:
    """DeepSpeed's own frame around a save: parameters that it keeps whole are parted, and whole again afterwards."""
    optimizer: Any = getattr(engine, "optimizer", None)
    if not hasattr(optimizer, "checkpoint_event_prologue"):
        yield
        return
    optimizer.checkpoint_event_prologue()
    try:
        yield
    finally:
        optimizer.checkpoint_event_epilogue()


def _gathered(sources: list[Source]) -> contextlib.AbstractContextManager[Any]:
    held = [tensor for source in sources for tensor in source.held if hasattr(tensor, "ds_id")]
    if not held:
        return contextlib.nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(held)


def _write_piece(piece: Piece, parts: list[Source], convert: Convert, shards: _Shards) -> None:
    made = {name: part.read().cpu() for name, part in zip(piece.sources, parts, strict=True)}
    made = convert(made) if piece.converted else {piece.targets[0]: made[piece.sources[0]]}
    for name, tensor in made.items():
        shards.put(name, tensor)


def _stream(sources: Mapping[str, Source], plan: WeightPlan, convert: Convert, shards: _Shards | None) -> None:
    """Gather piece by piece and put each into `shards`. What fails on the writing rank is raised at the end: the
    others wait for it in the next gathering."""
    failure: Exception | None = None
    for piece in plan.pieces:
        parts = [sources[name] for name in piece.sources]
        with torch.no_grad(), _gathered(parts):
            if shards is None or failure is not None:
                continue
            try:
                _write_piece(piece, parts, convert, shards)
            except Exception as error:
                failure = error
                # At once: the room may be needed.
                shards.discard()
    if failure is not None:
        raise failure


def write_weights(
    sources: Mapping[str, Source],
    convert: Convert,
    directory: Path,
    *,
    engine: Any = None,
    writes: bool = True,
    shard_size: int | None = None,
    name: str = WEIGHTS_NAME,
) -> None:
    """Write `sources` into `directory` as one safetensors file, or as shards of `shard_size` (SHARD_SIZE) bytes and
    their index.

    Every rank calls it; those with `writes` write. `directory` is new or empty, and gets its name when all is in it
    (`saving`). `engine`: DeepSpeed's, where there is one. Raises OSError on a writing rank that cannot write, when all
    ranks are through and its files are gone.
    """
    plan = make_plan(_shapes(sources), convert)
    pattern = name.replace(".safetensors", "{suffix}.safetensors")
    split = split_torch_state_dict_into_shards(
        plan.tensors, filename_pattern=pattern, max_shard_size=shard_size or SHARD_SIZE
    )
    shards = _Shards(directory, split.filename_to_tensors, plan.tensors) if writes else None
    with _at_rest(engine):
        _stream(sources, plan, convert, shards)
    if writes and split.is_sharded:
        parameters = sum(source.shape.numel() for source in sources.values())
        metadata = {"total_parameters": parameters, **split.metadata}
        index = {"metadata": metadata, "weight_map": dict(sorted(split.tensor_to_filename.items()))}
        write_atomically(directory / INDEX_NAME, encode_json(index))


def write_config(model: PreTrainedModel, directory: Path) -> None:
    """config.json, generation_config.json and, where a model brings its code, that."""
    model.config.dtype = str(model.dtype).removeprefix("torch.")
    model.config.architectures = [type(model).__name__]
    if model.is_remote_code():
        from transformers.dynamic_module_utils import custom_object_save

        custom_object_save(model, str(directory), config=model.config)  # pyright: ignore[reportArgumentType]
    model.config.save_pretrained(directory)
    # Also for a model whose code lacks transformers' generate, with which `save_pretrained` saves none.
    model.generation_config.save_pretrained(directory)


def write_model(
    model: PreTrainedModel,
    directory: Path,
    *,
    engine: Any = None,
    writes: bool = True,
    shard_size: int | None = None,
    sources: Mapping[str, Source] | None = None,
) -> None:
    """The whole model, as `write_weights` does. `sources`: in the place of the model's own tensors."""
    sources = model_sources(model) if sources is None else sources
    convert = conversion_of(model, sources)
    write_weights(sources, convert, directory, engine=engine, writes=writes, shard_size=shard_size)
    if writes:
        write_config(model, directory)


def read_model(model: PreTrainedModel, directory: Path) -> None:
    """Put the weights in `directory` into `model`, which is whole on this rank: the way back from `write_model`.

    Not `load_state_dict` of the files alone, which would leave out every tensor that has another form on disk.
    """
    # Weights are made on the CPU. By default the states of every GPU of the machine would be kept, with a long warning.
    with torch.random.fork_rng(devices=()):
        loaded = type(model).from_pretrained(directory, dtype=model.dtype)
    model.load_state_dict(loaded.state_dict())
