"""A Hugging Face model folder, read and written without transformers: config.json as a ModelConfig, weights by name.

1) Read as transformers 4 or 5 spell it: rope_theta and rope_scaling or rope_parameters, torch_dtype or dtype, one
   model.safetensors or shards with an index, a tied head left out or repeated. Pickled weights are never opened.
2) A family or feature that model.py does not compute is refused by name, and every parameter must be there in its
   shape: a model that is almost right trains in silence.
3) Written so that transformers (4 and 5) and vLLM load it: keys of config.json that nobody here uses survive.

  config = read_config("runs/sft/checkpoints/step_000400")
  weights = dict(read_weights(folder, shapes))   # {"model.embed_tokens.weight": (V, D), ...}
  write_folder(folder, config, weights, torch.bfloat16)
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from core.errors import UserError

FAMILIES = "qwen2", "qwen3", "llama", "mistral"  # the values of model_type that load
ROPE_NUMBERS = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Shape of one model. The defaults are the built-in one's: Qwen2 style with a tied head."""

    model_type: str = "qwen2"  # family: decides which transformers class reads the folder
    vocab_size: int  # V
    hidden_size: int  # D
    intermediate_size: int  # width inside the gated MLP
    num_hidden_layers: int  # L
    num_attention_heads: int  # H
    num_key_value_heads: int | None = None  # Hkv; None = H
    head_dim: int | None = None  # K; None = D / H
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0  # base of the rotary wavelengths
    rope_scaling: dict | None = (
        None  # None or {"rope_type": "linear" | "llama3", "factor": ..., ...}
    )
    max_position_embeddings: int = (
        32768  # what the checkpoint was trained for; nothing here stops at it
    )
    tie_word_embeddings: bool = True  # the head is the embedding matrix
    attention_bias: bool = True  # on q, k and v
    output_bias: bool = False  # on the attention's output
    mlp_bias: bool = False
    qk_norm: bool = False  # RMSNorm over each head of q and k (Qwen3)
    dtype: str = "float32"  # of the stored weights
    raw: dict = field(
        default_factory=dict, repr=False, compare=False
    )  # config.json as read; kept when saved

    def __post_init__(self):
        D, H = self.hidden_size, self.num_attention_heads
        object.__setattr__(
            self, "num_key_value_heads", self.num_key_value_heads or H
        )  # the class is frozen
        object.__setattr__(self, "head_dim", self.head_dim or D // H)
        if H % self.num_key_value_heads or self.head_dim % 2:
            raise UserError(
                f"num_attention_heads {H}, num_key_value_heads {self.num_key_value_heads}, head_dim "
                f"{self.head_dim}; make the first a multiple of the second, and the third even"
            )


def _read_json(path: Path) -> dict:
    if not path.is_file():
        raise UserError(
            f"{path}: no such file; give a model folder, with config.json and *.safetensors"
        )
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:  # of the encoding, of the JSON, or not an object
        raise UserError(
            f"{path}: not a readable JSON object ({error}); copy or write the file again"
        ) from None


def _refuse(raw: dict, path: Path) -> None:
    """Raise ValueError for what would change the computation and is not implemented."""
    family, kinds = raw.get("model_type"), set(raw.get("layer_types") or ())
    # Qwen's window is off unless switched on; Mistral's is on unless null, and 4096 where the key is missing
    window = (
        raw.get("sliding_window", 4096) if family == "mistral" else raw.get("use_sliding_window")
    )
    experts = [
        key for key in ("num_experts", "num_local_experts", "n_routed_experts") if raw.get(key)
    ]
    refused = {
        f"mixture of experts (model_type {family!r})": experts
        or "moe" in str(family)
        or family == "mixtral",
        f"model_type {family!r}": family not in FAMILIES,
        "quantization_config": raw.get("quantization_config"),
        f"sliding_window {raw.get('sliding_window', 4096)}": window,
        f"layer_types {sorted(kinds)}": kinds - {"full_attention"},
        f"hidden_act {raw.get('hidden_act')!r}": raw.get("hidden_act", "silu") != "silu",
    }
    for what, found in refused.items():
        if found:
            raise UserError(
                f"{path}: {what} is not implemented; use a dense, unquantized model with full attention "
                f"and silu, of model_type {', '.join(FAMILIES)}"
            )


def _read_rope(raw: dict, path: Path) -> tuple[float, dict | None]:
    """Base and scaling, from rope_theta and rope_scaling (transformers 4) or from rope_parameters (5)."""
    given = [
        raw[key] for key in ("rope_parameters", "rope_scaling") if raw.get(key)
    ]  # the later one wins
    flat = all(
        isinstance(rope, dict) and not any(isinstance(v, dict) for v in rope.values())
        for rope in given
    )
    rope = {key: value for one in given for key, value in one.items()} if flat else {}
    kinds = (
        {one.get("rope_type", one.get("type", "default")) for one in given}
        if flat
        else {"by layer"}
    )
    kind = kinds.pop() if kinds else "default"
    part = raw.get("partial_rotary_factor") or rope.get("partial_rotary_factor") or 1.0
    if kinds or kind not in ROPE_NUMBERS or part != 1.0:
        raise UserError(
            f"{path}: rotary settings {given} are not implemented; use a model whose rope_type is one of "
            f"{', '.join(ROPE_NUMBERS)}, the same in each layer and over the whole head"
        )
    numbers = {key: rope.get(key) for key in ROPE_NUMBERS[kind]}
    theta = rope.get("rope_theta", raw.get("rope_theta", 10000.0))
    for key, value in {"rope_theta": theta, **numbers}.items():
        if not isinstance(value, (int, float)):
            raise UserError(
                f"{path}: {key} is {value!r}; rope_type {kind} needs a number, as in the original model"
            )
    return float(theta), {"rope_type": kind, **numbers} if numbers else None


def read_config(folder) -> ModelConfig:
    """config.json of a model folder, as transformers 4 or 5 spell it. Raises ValueError, naming the file, for a missing
    file or key and for every feature that is not implemented."""
    path = Path(folder) / "config.json"
    raw = _read_json(path)
    _refuse(raw, path)
    theta, scaling = _read_rope(raw, path)
    sizes = {
        "num_key_value_heads": None,
        "head_dim": None,
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 2048,
    }
    for key in (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        *sizes,
    ):
        value = sizes[key] = raw.get(key, sizes.get(key))
        if value is None and key in ("num_key_value_heads", "head_dim"):
            continue  # derived from the other sizes; were that wrong, the weights' shapes would not fit
        if not isinstance(value, float if key == "rms_norm_eps" else int) or value <= 0:
            raise UserError(
                f"{path}: {key} is {value!r}; write the positive number that the weights were made with"
            )
    kind = raw["model_type"]
    bias = kind in ("qwen3", "llama") and bool(
        raw.get("attention_bias")
    )  # the others do not read the key
    try:
        return ModelConfig(
            model_type=kind,
            **sizes,
            rope_theta=theta,
            rope_scaling=scaling,
            raw=raw,
            qk_norm=kind == "qwen3",
            tie_word_embeddings=bool(raw.get("tie_word_embeddings")),
            attention_bias=bias or kind == "qwen2",
            output_bias=bias,
            mlp_bias=kind == "llama" and bool(raw.get("mlp_bias")),
            dtype=str(raw.get("dtype") or raw.get("torch_dtype") or "float32").removeprefix(
                "torch."
            ),
        )
    except ValueError as error:
        raise UserError(f"{path}: {error}") from None


def config_dict(config: ModelConfig) -> dict:
    """A config.json that transformers 4 and 5 both read: the keys it was read with, and ours over them. Rotary settings
    and dtype are spelled as in version 4, which 5 still reads."""
    architecture = f"{config.model_type.title()}ForCausalLM"
    silent = {"architectures": [architecture], "hidden_act": "silu", "sliding_window": None}
    others = {
        key: value for key, value in config.raw.items() if key not in ("rope_parameters", "dtype")
    }
    ours = {f.name: getattr(config, f.name) for f in fields(config)} | {"torch_dtype": config.dtype}
    unsaid = {
        "raw",
        "dtype",
        "output_bias",
        "qk_norm",
    }  # spelled otherwise, or implied by the family
    if config.model_type not in ("qwen3", "llama"):
        unsaid |= {
            "attention_bias",
            "mlp_bias",
        }  # fixed there; in the others attention_bias is for q, k, v and o
    return silent | others | {key: value for key, value in ours.items() if key not in unsaid}


def read_weights(
    folder, shapes: dict[str, torch.Size], rows_of=lambda n: (0, n)
) -> Iterator[tuple[str, Tensor]]:
    """(name, rows of the weight) for each name of `shapes`, in the stored type on the CPU. rows_of(n) -> (first, end)
    of n rows: only those are read. Raises ValueError, naming file or parameter and before any weight is given out, for
    what is missing, damaged, of another shape or no float."""
    found = {}
    for path in _weight_files(Path(folder)):
        if not path.is_file():
            raise UserError(
                f"{path}: no such file, but the index beside it names it; copy the missing shard"
            )
        try:
            file = safe_open(path, framework="pt")
            for name in file.keys():
                if not name.endswith("rotary_emb.inv_freq"):  # of old versions
                    found[name] = file.get_slice(name)
        except (SafetensorError, OSError) as error:
            raise UserError(
                f"{path}: not a whole safetensors file ({error}); copy it again"
            ) from None
        kinds = {w.get_dtype() for w in found.values()} - {"F64", "F32", "F16", "BF16"}
        if kinds:
            raise UserError(
                f"{path}: weights of type {sorted(kinds)} are not implemented; use the unquantized model"
            )

    def read(name):
        first, end = rows_of(shapes[name][0])
        return found[name][first:end]

    spare = "lm_head.weight" in found and "lm_head.weight" not in shapes
    head, embedding = found.pop("lm_head.weight") if spare else None, "model.embed_tokens.weight"
    _check({name: w.get_shape() for name, w in found.items()}, shapes, folder)
    if spare:
        first, end = rows_of(shapes[embedding][0])
        if list(head.get_shape()) != list(shapes[embedding]) or not torch.equal(
            head[first:end], read(embedding)
        ):
            raise UserError(
                f"{folder}: lm_head.weight differs from the embedding; set tie_word_embeddings to false"
            )
    return ((name, read(name)) for name in shapes)


def _weight_files(folder: Path) -> list[Path]:
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        return [single]
    if index.is_file():
        places = _read_json(index).get("weight_map")
        if not isinstance(places, dict) or not places:
            raise UserError(f"{index}: no weight_map; copy the file again")
        return [folder / name for name in sorted(set(places.values()))]
    pickles = [
        path.name for kind in ("*.bin", "*.pt", "*.pth") for path in sorted(folder.glob(kind))
    ]
    why = (
        f"{pickles[0]} can run code when opened and is never read, convert it"
        if pickles
        else "add the weights"
    )
    raise UserError(f"{folder}: neither model.safetensors nor model.safetensors.index.json; {why}")


def _check(found: dict[str, list[int]], shapes: dict[str, torch.Size], folder) -> None:
    missing, extra = sorted(set(shapes) - set(found)), sorted(set(found) - set(shapes))
    wrong = [
        f"{name} {list(found[name])} for {list(shape)}"
        for name, shape in shapes.items()
        if name in found and list(found[name]) != list(shape)
    ]
    fix = "weights and config.json must come from one checkpoint"
    if missing == ["lm_head.weight"]:
        fix = "set tie_word_embeddings to true if the embedding is the head"
    if missing or extra or wrong:
        raise UserError(
            f"{folder}: weights do not fit config.json: {len(missing)} missing {missing[:3]}, "
            f"{len(extra)} unexpected {extra[:3]}, {len(wrong)} of another shape {wrong[:3]}; {fix}"
        )


def write_folder(
    folder,
    config: ModelConfig,
    weights: dict[str, Tensor],
    dtype: torch.dtype,
    max_shard_bytes: float = 5e9,
    whole=lambda w: w.detach(),
    writes: bool = True,
) -> None:
    """config.json and model.safetensors in dtype; above max_shard_bytes numbered shards and an index. Weights may lie
    on any device and are brought to the CPU one shard at a time; whole(w) puts a sharded one together.

    writes: this process writes; the others only take part in whole(). A failure to write is therefore raised at the
    end, when nobody waits for this process any more."""
    folder = Path(folder)
    shards, room = [[]], max_shard_bytes  # names by shard, in the model's order
    for name, w in weights.items():
        size = w.numel() * dtype.itemsize
        if size > room and shards[-1]:
            shards.append([])
            room = max_shard_bytes
        shards[-1].append(name)
        room -= size
    places, failure = {}, None
    if writes:
        folder.mkdir(parents=True, exist_ok=True)
        for old in folder.glob(
            "model*.safetensors*"
        ):  # of an earlier save in other shards, which a loader may prefer
            old.unlink()
    for i, names in enumerate(shards, 1):
        file = (
            f"model-{i:05d}-of-{len(shards):05d}.safetensors"
            if len(shards) > 1
            else "model.safetensors"
        )
        part = {}
        for name in names:
            w = whole(weights[name])
            if writes:
                part[name] = w.to("cpu", dtype).contiguous()
        try:
            if writes and not failure:
                save_file(
                    part, folder / file, metadata={"format": "pt"}
                )  # transformers asks for the metadata
        except (OSError, SafetensorError) as error:
            failure = error
        places |= dict.fromkeys(names, file)
    if failure:
        raise failure
    if not writes:
        return
    if len(shards) > 1:
        total = sum(w.numel() for w in weights.values()) * dtype.itemsize
        index = {"metadata": {"total_size": total}, "weight_map": places}
        (folder / "model.safetensors.index.json").write_text(
            json.dumps(index, indent=2) + "\n", encoding="utf-8"
        )
    config = replace(config, dtype=str(dtype).removeprefix("torch."))
    (folder / "config.json").write_text(
        json.dumps(config_dict(config), indent=2) + "\n", encoding="utf-8"
    )
