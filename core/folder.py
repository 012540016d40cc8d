"""A Hugging Face model folder, read and written without transformers.

    config = read_config("runs/sft/checkpoints/step_000400")
    weights = dict(read_weights(folder, shapes))   # {"model.embed_tokens.weight": (V, D), ...}
    write_folder(folder, config, weights, torch.bfloat16)

1) Read in the spelling of transformers 4 and 5: rope_theta and rope_scaling or rope_parameters,
   torch_dtype or dtype; one model.safetensors or several files with an index; a tied head left out
   or repeated. Pickled weights are never opened.
2) A family or feature that model.py does not compute is refused by name, and every parameter must
   be there in its shape: a model that is almost right trains without an error.
3) Written so that transformers (4 and 5) and vLLM load it. Keys of config.json that are not used
   here are kept.
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

# model_type: (the class in transformers, keys of config.json whose default is the family's own)
FAMILIES = {
    "qwen2": ("Qwen2ForCausalLM", {}),
    "qwen3": ("Qwen3ForCausalLM", {}),
    "llama": ("LlamaForCausalLM", {}),
    "mistral": ("MistralForCausalLM", {"sliding_window": 4096}),
    "olmo2": ("Olmo2ForCausalLM", {"rms_norm_eps": 1e-5}),
    "smollm3": ("SmolLM3ForCausalLM", {"rope_theta": 2e6, "tie_word_embeddings": True}),
}
# rope_type: the numbers that it needs; core/rope.py computes with them
ROPE_NUMBERS = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": ("factor", "original_max_position_embeddings"),
}
YARN_OPTIONS = (
    "attention_factor",
    "beta_fast",
    "beta_slow",
    "mscale",
    "mscale_all_dim",
    "truncate",
)
# Sizes in config.json and their defaults in transformers; ... = the file must give it. None = it
# follows from other sizes; if that were wrong, the shapes of the weights would not fit.
SIZES = {
    "vocab_size": ...,
    "hidden_size": ...,
    "intermediate_size": ...,
    "num_hidden_layers": ...,
    "num_attention_heads": ...,
    "num_key_value_heads": None,
    "head_dim": None,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 2048,
}


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The shape of a model. The defaults are Qwen2 with a tied head."""

    model_type: str = "qwen2"  # the family: decides which class of transformers reads the folder
    vocab_size: int  # V
    hidden_size: int  # D
    intermediate_size: int  # width inside the gated MLP
    num_hidden_layers: int  # L
    num_attention_heads: int  # H
    num_key_value_heads: int | None = None  # Hkv; None = H
    head_dim: int | None = None  # K; None = D / H
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0  # base of the rotary wavelengths
    rope_scaling: dict | None = None  # None or {"rope_type": ..., and its numbers}: core/rope.py
    max_position_embeddings: int = 32768  # of the pretraining; nothing here stops at it
    tie_word_embeddings: bool = True  # the head is the embedding matrix
    attention_bias: bool = True  # on q, k and v
    output_bias: bool = False  # on the output of the attention
    mlp_bias: bool = False
    qk_norm: bool = False  # RMSNorm over each head of q and k (Qwen3, OLMo 2)
    joint_qk_norm: bool = False  # it is over all heads of a token together (OLMo 2)
    rotary_layers: tuple[bool, ...] | None = None  # which layers rotate q and k; None = all
    post_norm: bool = False  # norms behind attention and MLP, not before them (OLMo 2)
    dtype: str = "float32"  # of the stored weights
    raw: dict = field(default_factory=dict, repr=False, compare=False)  # config.json as read

    def __post_init__(self):
        H = self.num_attention_heads
        # object.__setattr__, because the class is frozen
        object.__setattr__(self, "num_key_value_heads", self.num_key_value_heads or H)
        object.__setattr__(self, "head_dim", self.head_dim or self.hidden_size // H)
        if self.rotary_layers and len(self.rotary_layers) != self.num_hidden_layers:
            raise UserError(
                f"no_rope_layers has {len(self.rotary_layers)} entries for num_hidden_layers "
                f"{self.num_hidden_layers}; give one for each layer"
            )
        if H % self.num_key_value_heads or self.head_dim % 2:
            raise UserError(
                f"num_attention_heads {H}, num_key_value_heads {self.num_key_value_heads}, "
                f"head_dim {self.head_dim}; the first must be a multiple of the second, and the "
                "third even"
            )


# ---- config.json
def read_config(folder) -> ModelConfig:
    """config.json of a model folder, in the spelling of transformers 4 or 5.

    Raises UserError, naming the file, for a missing file or key and for every feature that is not
    implemented.
    """
    path = Path(folder) / "config.json"
    raw = _read_json(path)
    family = raw.get("model_type")
    if family in FAMILIES:
        raw = FAMILIES[family][1] | raw
    _refuse(raw, path)
    sizes = _read_sizes(raw, path)
    theta, scaling = _read_rope(raw, path)
    # Qwen2 and Mistral ignore the key: the first always has these biases, the second never.
    bias = family not in ("qwen2", "mistral") and bool(raw.get("attention_bias"))
    dtype = raw.get("dtype") or raw.get("torch_dtype") or "float32"
    try:
        return ModelConfig(
            model_type=family,
            **sizes,
            rope_theta=theta,
            rope_scaling=scaling,
            tie_word_embeddings=bool(raw.get("tie_word_embeddings")),
            attention_bias=bias or family == "qwen2",
            output_bias=bias,
            mlp_bias=family in ("llama", "smollm3") and bool(raw.get("mlp_bias")),
            qk_norm=family in ("qwen3", "olmo2"),
            joint_qk_norm=family == "olmo2",
            rotary_layers=_rotary_layers(raw, sizes["num_hidden_layers"]),
            post_norm=family == "olmo2",
            dtype=str(dtype).removeprefix("torch."),
            raw=raw,
        )
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def config_dict(config: ModelConfig) -> dict:
    """A config.json that transformers 4 and 5 read: the keys it was read with, and ours over them.

    Rotary settings and dtype are spelled as in version 4, which version 5 still reads.
    """
    defaults = {
        "architectures": [FAMILIES[config.model_type][0]],
        "hidden_act": "silu",
        "sliding_window": None,
    }
    kept = {k: v for k, v in config.raw.items() if k not in ("rope_parameters", "dtype")}
    ours = {f.name: getattr(config, f.name) for f in fields(config)}
    ours["torch_dtype"] = config.dtype
    # Implied by other keys, or by the family:
    implied = ("raw", "dtype", "output_bias", "qk_norm", "joint_qk_norm", "post_norm")
    for name in (*implied, "rotary_layers"):
        del ours[name]
    if config.rotary_layers:
        ours["no_rope_layers"] = [int(rotary) for rotary in config.rotary_layers]
    if config.model_type in ("qwen2", "mistral"):
        del ours["attention_bias"], ours["mlp_bias"]
    return defaults | kept | ours


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
    """Raise UserError for what would change the computation and is not implemented."""
    family = raw.get("model_type")
    experts = any(raw.get(k) for k in ("num_experts", "num_local_experts", "n_routed_experts"))
    # The window of Mistral is on unless it is null, that of others is off unless switched on.
    window = raw.get("sliding_window")
    windowed = window if family == "mistral" else raw.get("use_sliding_window")
    kinds = set(raw.get("layer_types") or ())
    refused = {
        f"mixture of experts (model_type {family!r})": experts
        or "moe" in str(family)
        or family == "mixtral",
        f"model_type {family!r}": family not in FAMILIES,
        "quantization_config": raw.get("quantization_config"),
        f"sliding_window {window}": windowed,
        f"layer_types {sorted(kinds)}": kinds - {"full_attention"},
        f"hidden_act {raw.get('hidden_act')!r}": raw.get("hidden_act", "silu") != "silu",
    }
    for feature, found in refused.items():
        if found:
            raise UserError(
                f"{path}: {feature} is not implemented; use a dense, unquantized model with full "
                f"attention and silu, of model_type {', '.join(FAMILIES)}"
            )


def _read_sizes(raw: dict, path: Path) -> dict:
    sizes = {key: raw.get(key, default) for key, default in SIZES.items()}
    for key, value in sizes.items():
        if value is None and SIZES[key] is None:
            continue
        kind = float if key == "rms_norm_eps" else int
        if not isinstance(value, kind) or value <= 0:
            shown = None if value is ... else value
            raise UserError(
                f"{path}: {key} is {shown!r}; write the positive number that the weights were "
                "made with"
            )
    return sizes


def _read_rope(raw: dict, path: Path) -> tuple[float, dict | None]:
    """Base and scaling, from rope_theta and rope_scaling (version 4) or rope_parameters (5)."""
    given = [raw[key] for key in ("rope_parameters", "rope_scaling") if raw.get(key)]
    rope = {}
    kinds = set()
    for settings in given:  # keys of the later one win
        if not isinstance(settings, dict) or any(isinstance(v, dict) for v in settings.values()):
            kinds.add("a type per layer")
            continue
        kinds.add(settings.get("rope_type", settings.get("type", "default")))
        rope |= settings
    kind = min(kinds, default="default")
    rotated = raw.get("partial_rotary_factor") or rope.get("partial_rotary_factor") or 1.0
    if len(kinds) > 1 or kind not in ROPE_NUMBERS or rotated != 1.0:
        raise UserError(
            f"{path}: rotary settings {given} are not implemented; use a model whose rope_type is "
            f"one of {', '.join(ROPE_NUMBERS)}, the same in each layer and over the whole head"
        )
    theta = rope.get("rope_theta", raw.get("rope_theta", 10000.0))
    scaling = {key: rope.get(key) for key in ROPE_NUMBERS[kind]}
    if kind == "yarn":
        scaling |= {key: rope[key] for key in YARN_OPTIONS if rope.get(key) is not None}
    for key, value in {"rope_theta": theta, **scaling}.items():
        if not isinstance(value, (int, float)):
            raise UserError(
                f"{path}: {key} is {value!r}; rope_type {kind} needs a number, as in the original "
                "model"
            )
    return float(theta), {"rope_type": kind, **scaling} if scaling else None


def _rotary_layers(raw: dict, n_layers: int) -> tuple[bool, ...] | None:
    """no_rope_layers of SmolLM3, where 1 means a rotary layer; by default every fourth is none."""
    if raw["model_type"] != "smollm3":
        return None
    interval = raw.get("no_rope_layer_interval") or 4
    default = [(i + 1) % interval != 0 for i in range(n_layers)]
    layers = raw.get("no_rope_layers") or default
    return tuple(bool(rotary) for rotary in layers[:n_layers])


# ---- weights, read
def read_weights(
    folder, shapes: dict[str, torch.Size], rows_of=lambda n: (0, n)
) -> Iterator[tuple[str, Tensor]]:
    """(name, rows of the weight) for each name in `shapes`, in the stored type, on the CPU.

    rows_of(n) -> (first, end): the rows to read, of n. Raises UserError, naming the file or the
    parameter and before any weight is yielded, for what is missing, damaged, of another shape or
    not of floating point.
    """
    found = _open_weights(Path(folder))

    def read(name: str) -> Tensor:
        first, end = rows_of(shapes[name][0])
        return found[name][first:end]

    head = None
    if "lm_head.weight" not in shapes:
        head = found.pop("lm_head.weight", None)  # a tied head may be there all the same
    _check({name: w.get_shape() for name, w in found.items()}, shapes, folder)
    if head is not None:
        shape = shapes["model.embed_tokens.weight"]
        first, end = rows_of(shape[0])
        same_shape = list(head.get_shape()) == list(shape)
        if not same_shape or not torch.equal(head[first:end], read("model.embed_tokens.weight")):
            raise UserError(
                f"{folder}: lm_head.weight differs from the embedding; set tie_word_embeddings to "
                "false"
            )
    return ((name, read(name)) for name in shapes)


def _open_weights(folder: Path) -> dict:
    """Slices of safetensors files by parameter name; nothing is read yet."""
    found = {}
    for path in _weight_files(folder):
        if not path.is_file():
            raise UserError(f"{path}: no such file, but the index names it; copy the missing file")
        try:
            file = safe_open(path, framework="pt")
            for name in file.keys():
                if not name.endswith("rotary_emb.inv_freq"):  # of old versions of transformers
                    found[name] = file.get_slice(name)
        except (SafetensorError, OSError) as error:
            raise UserError(
                f"{path}: not a whole safetensors file ({error}); copy it again"
            ) from None
        kinds = {w.get_dtype() for w in found.values()} - {"F64", "F32", "F16", "BF16"}
        if kinds:
            raise UserError(
                f"{path}: weights of type {sorted(kinds)} are not implemented; use the "
                "unquantized model"
            )
    return found


def _weight_files(folder: Path) -> list[Path]:
    single = folder / "model.safetensors"
    if single.is_file():
        return [single]
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        places = _read_json(index).get("weight_map")
        if not isinstance(places, dict) or not places:
            raise UserError(f"{index}: no weight_map; copy the file again")
        return [folder / name for name in sorted(set(places.values()))]
    pickles = [p for p in sorted(folder.iterdir()) if p.suffix in (".bin", ".pt", ".pth")]
    fix = "add the weights"
    if pickles:
        fix = f"{pickles[0].name} can run code when opened and is never read, convert it"
    raise UserError(f"{folder}: neither {single.name} nor {index.name}; {fix}")


def _check(found: dict[str, list[int]], shapes: dict[str, torch.Size], folder) -> None:
    missing = sorted(set(shapes) - set(found))
    extra = sorted(set(found) - set(shapes))
    wrong = []
    for name, shape in shapes.items():
        if name in found and list(found[name]) != list(shape):
            wrong.append(f"{name} {list(found[name])} for {list(shape)}")
    fix = "weights and config.json must come from one checkpoint"
    if missing == ["lm_head.weight"]:
        fix = "set tie_word_embeddings to true if the embedding is the head"
    if missing or extra or wrong:
        raise UserError(
            f"{folder}: weights do not fit config.json: {len(missing)} missing {missing[:3]}, "
            f"{len(extra)} unexpected {extra[:3]}, {len(wrong)} of another shape {wrong[:3]}; {fix}"
        )


# ---- weights, written
def write_folder(
    folder,
    config: ModelConfig,
    weights: dict[str, Tensor],
    dtype: torch.dtype,
    max_file_bytes: float = 5e9,
    whole=lambda w: w.detach(),
    writes: bool = True,
) -> None:
    """Write config.json, and the weights in dtype: one file, or several with an index.

    Weights may be on any device; whole(w) gathers a sharded one. They are brought to the CPU one
    file at a time. All ranks call this, and the one with writes=True writes. Where it cannot, it
    still takes part in every gather and raises at the end, so that no other rank waits for it.
    """
    folder = Path(folder)
    places = _place(weights, dtype, max_file_bytes)
    failure = None
    try:
        if writes:
            folder.mkdir(parents=True, exist_ok=True)
            # Files of an earlier save under other names: a loader might prefer them.
            for old in folder.glob("model*.safetensors*"):
                old.unlink()
    except OSError as error:
        failure = error
    for file in dict.fromkeys(places.values()):
        part = {}
        for name in weights:
            if places[name] == file:
                gathered = whole(weights[name])
                if writes:
                    part[name] = gathered.to("cpu", dtype).contiguous()
        try:
            if writes and not failure:
                # transformers refuses files without this metadata
                save_file(part, folder / file, metadata={"format": "pt"})
        except (OSError, SafetensorError) as error:
            failure = error
    if failure:
        raise failure
    if not writes:
        return
    if len(set(places.values())) > 1:
        total = sum(w.numel() for w in weights.values()) * dtype.itemsize
        index = {"metadata": {"total_size": total}, "weight_map": places}
        _write_json(folder / "model.safetensors.index.json", index)
    config = replace(config, dtype=str(dtype).removeprefix("torch."))
    _write_json(folder / "config.json", config_dict(config))


def _place(weights: dict[str, Tensor], dtype: torch.dtype, max_bytes: float) -> dict[str, str]:
    """The file of each weight: a new file begins where one would become larger than max_bytes."""
    numbers = {}
    number = 1
    used = 0
    for name, w in weights.items():
        size = w.numel() * dtype.itemsize
        if used and used + size > max_bytes:
            number += 1
            used = 0
        numbers[name] = number
        used += size
    if number == 1:
        return dict.fromkeys(weights, "model.safetensors")
    return {name: f"model-{i:05d}-of-{number:05d}.safetensors" for name, i in numbers.items()}


def _write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
