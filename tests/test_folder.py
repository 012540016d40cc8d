"""Model folders: every spelling reads alike, what is saved reads back bit for bit, and what is
wrong or not implemented is refused in one line."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

import model as m
from core import folder

RAW = dict(
    model_type="llama",
    vocab_size=50,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=4,
    rms_norm_eps=1e-5,
    max_position_embeddings=64,
    hidden_act="silu",
)
LLAMA3 = dict(
    factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32
)


def config_of(path, **changes):
    """read_config() of a folder with RAW and the changes in config.json; ... removes a key."""
    path.mkdir(exist_ok=True)
    raw = {**RAW, **changes}
    kept = {key: value for key, value in raw.items() if value is not ...}
    (path / "config.json").write_text(json.dumps(kept))
    return m.read_config(path)


def saved(path, **changes):
    """A folder with a random model, and that model."""
    model = m.init_model(config_of(path, **changes), 3)
    m.save_model(model, path)
    return model


def same(a, b):
    x = dict(a.named_parameters())
    y = dict(b.named_parameters())
    return x.keys() == y.keys() and all(torch.equal(x[name], y[name]) for name in x)


# ---- config.json
def test_old_and_new_spellings_give_one_config(tmp_path):
    old = config_of(
        tmp_path, rope_theta=5e5, rope_scaling={"type": "llama3", **LLAMA3}, torch_dtype="bfloat16"
    )
    new = config_of(
        tmp_path,
        rope_parameters={"rope_theta": 5e5, "rope_type": "llama3", **LLAMA3},
        dtype="bfloat16",
    )
    both = config_of(
        tmp_path,
        rope_theta=5e5,
        rope_scaling={"rope_type": "llama3", **LLAMA3},
        dtype="bfloat16",
        rope_parameters={"rope_theta": 5e5, "rope_type": "llama3", **LLAMA3},
    )
    assert old == new == both
    assert (new.rope_theta, new.dtype, new.rope_scaling) == (
        5e5,
        "bfloat16",
        {"rope_type": "llama3", **LLAMA3},
    )


def test_absent_null_and_default_rotary_settings_mean_none(tmp_path):
    for changes in (
        {},
        {"rope_scaling": None},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
        {"rope_scaling": {"type": "default"}},
        {"partial_rotary_factor": 1.0},
    ):
        config = config_of(tmp_path, **changes)
        assert config.rope_scaling is None and config.rope_theta == 10000.0


def test_head_width_and_key_heads_are_derived_when_not_given(tmp_path):
    for gone in (..., None):
        config = config_of(tmp_path, head_dim=gone, num_key_value_heads=gone)
        assert (config.head_dim, config.num_key_value_heads) == (4, 4)
    assert config_of(tmp_path, head_dim=8).head_dim == 8


@pytest.mark.parametrize(
    "kind, raw, flags",
    [
        ("qwen2", {}, (True, False, False, False)),
        ("qwen2", {"attention_bias": False, "mlp_bias": True}, (True, False, False, False)),
        ("qwen3", {}, (False, False, False, True)),
        ("qwen3", {"attention_bias": True}, (True, True, False, True)),
        ("llama", {"attention_bias": True}, (True, True, False, False)),
        ("llama", {"mlp_bias": True}, (False, False, True, False)),
        ("mistral", {"attention_bias": True, "sliding_window": None}, (False, False, False, False)),
        ("smollm3", {"attention_bias": True, "mlp_bias": True}, (True, True, True, False)),
        ("olmo2", {"attention_bias": True, "mlp_bias": True}, (True, True, False, True)),
    ],
)
def test_biases_follow_the_family_as_transformers_codes_it(kind, raw, flags, tmp_path):
    config = config_of(tmp_path, model_type=kind, **raw)
    assert (config.attention_bias, config.output_bias, config.mlp_bias, config.qk_norm) == flags


def test_smollm3_has_defaults_of_its_own(tmp_path):
    config = config_of(tmp_path, model_type="smollm3", num_hidden_layers=5)
    assert config.rotary_layers == (True, True, True, False, True)
    assert config.rope_theta == 2e6 and config.tie_word_embeddings
    explicit = dict(no_rope_layers=[1, 0], rope_theta=1e4, tie_word_embeddings=False)
    config = config_of(tmp_path, model_type="smollm3", **explicit)
    assert config.rotary_layers == (True, False)
    assert config.rope_theta == 1e4 and not config.tie_word_embeddings


def test_a_sliding_window_that_is_switched_off_is_no_obstacle(tmp_path):
    for changes in (
        dict(model_type="qwen2", sliding_window=32, use_sliding_window=False, max_window_layers=1),
        dict(model_type="qwen3", sliding_window=None, layer_types=["full_attention"] * 2),
        dict(model_type="mistral", sliding_window=None),
    ):
        assert (
            config_of(tmp_path, **changes).model_type == changes["model_type"]
        )  # read, not refused


@pytest.mark.parametrize(
    "changes, words",
    [
        (dict(model_type="gpt2"), "model_type 'gpt2'"),
        (dict(model_type=...), "model_type None"),
        (dict(model_type="mixtral"), "mixture of experts"),
        (dict(model_type="qwen3_moe"), "mixture of experts"),
        (dict(num_local_experts=8), "mixture of experts"),
        (dict(model_type="qwen2", use_sliding_window=True, sliding_window=32), "sliding_window 32"),
        (dict(model_type="mistral", sliding_window=32), "sliding_window 32"),
        (
            dict(model_type="mistral"),
            "sliding_window 4096",
        ),  # transformers' default where the key is missing
        (dict(layer_types=["full_attention", "sliding_attention"]), "sliding_attention"),
        (dict(quantization_config={"bits": 4}), "quantization_config"),
        (dict(hidden_act="gelu"), "hidden_act 'gelu'"),
        (dict(rope_scaling={"type": "dynamic"}), "rope_type dynamic needs a number"),
        (
            dict(rope_parameters={"rope_type": "yarn", "factor": 2.0}),
            "original_max_position_embeddings is None; rope_type yarn",
        ),
        (
            dict(rope_scaling={"rope_type": "longrope", "short_factor": [1], "long_factor": [2]}),
            "longrope",
        ),
        (
            dict(
                rope_parameters={"rope_type": "default"},
                rope_scaling={"type": "yarn", "factor": 2.0},
            ),
            "yarn",
        ),
        (dict(rope_parameters={"full_attention": {"rope_type": "default"}}), "full_attention"),
        (dict(rope_scaling="linear"), "linear"),
        (
            dict(rope_parameters={"rope_type": "default", "partial_rotary_factor": 0.5}),
            "partial_rotary_factor",
        ),
        (dict(partial_rotary_factor=0.5), "rotary settings"),
        (dict(rope_scaling={"type": "linear"}), "factor is None"),
        (dict(rope_theta="10000"), "rope_theta is '10000'"),
        (dict(model_type="smollm3", no_rope_layers=[1]), "no_rope_layers has 1 entries"),
        (dict(hidden_size=...), "hidden_size is None"),
        (dict(vocab_size=-1), "vocab_size is -1"),
        (dict(num_hidden_layers="2"), "num_hidden_layers is '2'"),
        (dict(num_key_value_heads=3), "num_key_value_heads 3"),
        (dict(head_dim=5), "head_dim 5"),
    ],
)
def test_what_is_not_implemented_is_refused_by_name_in_one_line(changes, words, tmp_path):
    with pytest.raises(ValueError) as caught:
        config_of(tmp_path, **changes)
    message = str(caught.value)
    assert (
        words in message
        and str(tmp_path / "config.json") in message
        and "\n" not in message
        and "; " in message
    )


@pytest.mark.parametrize(
    "changes",
    [
        dict(
            rope_theta=5e5,
            rope_scaling={"rope_type": "llama3", **LLAMA3},
            attention_bias=True,
            mlp_bias=True,
            torch_dtype="float16",
        ),
        dict(
            rope_parameters={"rope_type": "linear", "factor": 4.0, "rope_theta": 1e6},
            dtype="bfloat16",
        ),
        dict(
            rope_scaling={"type": "yarn", "factor": 4.0, "beta_fast": 16, "truncate": False}
            | {"original_max_position_embeddings": 32}
        ),
        dict(rope_scaling={"rope_type": "dynamic", "factor": 2.0}),
        dict(model_type="qwen2", use_sliding_window=False, sliding_window=32),
        dict(model_type="qwen3", attention_bias=True, head_dim=8),
        dict(model_type="mistral", sliding_window=None, tie_word_embeddings=True),
        dict(model_type="olmo2", attention_bias=True),
        dict(model_type="smollm3", no_rope_layers=[0, 1], mlp_bias=True),
    ],
)
def test_a_written_config_reads_back_equal_and_keeps_the_keys_of_others(changes, tmp_path):
    config = config_of(
        tmp_path / "a", eos_token_id=[7, 8], use_cache=True, somebody="else", **changes
    )
    for source in (config, replace(config, raw={})):  # read from a folder, or made in code
        written = folder.config_dict(source)
        (tmp_path / "config.json").write_text(json.dumps(written))
        assert m.read_config(tmp_path) == config
        assert (
            "rope_parameters" not in written
            and written["rope_theta"] == config.rope_theta
            and written["torch_dtype"] == config.dtype
        )
    assert (
        folder.config_dict(config)["eos_token_id"] == [7, 8]
        and folder.config_dict(config)["somebody"] == "else"
    )


# ---- weights
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("shard", [5e9, 3000.0])
def test_a_saved_model_loads_back_bit_for_bit(tied, shard, tmp_path):
    model = m.init_model(config_of(tmp_path, tie_word_embeddings=tied, model_type="qwen3"), 1)
    m.save_model(model, tmp_path / "out", max_shard_bytes=shard)
    assert same(m.load_model(tmp_path / "out"), model)
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    stored = {name: w for file in files for name, w in load_file(file).items()}
    assert ("lm_head.weight" in stored) is not tied and (len(files) > 1) is (shard == 3000)
    if shard == 3000:
        index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
        assert (
            index["metadata"]["total_size"] == sum(w.nbytes for w in stored.values())
            and index["weight_map"].keys() == stored.keys()
        )
        for file in files:  # within the limit, unless a single parameter is above it
            sizes = [w.nbytes for w in load_file(file).values()]
            assert sum(sizes) <= shard or len(sizes) == 1


def test_a_cast_is_written_and_said_in_config_json(tmp_path):
    model = saved(tmp_path / "a")
    m.save_model(model, tmp_path / "b", torch.bfloat16)
    back = m.load_model(tmp_path / "b")
    assert m.read_config(tmp_path / "b").dtype == "bfloat16" and back.head.dtype == torch.float32
    assert all(
        torch.equal(q, p.bfloat16().float()) for p, q in zip(model.parameters(), back.parameters())
    )
    assert m.load_model(tmp_path / "a", torch.bfloat16).head.dtype == torch.bfloat16


def test_a_later_save_leaves_no_weights_of_an_earlier_one(tmp_path):
    first = saved(tmp_path)
    m.save_model(first, tmp_path, max_shard_bytes=1000)
    other = m.init_model(first.config, 9)
    m.save_model(other, tmp_path, max_shard_bytes=3000)
    assert same(m.load_model(tmp_path), other) and not (tmp_path / "model.safetensors").exists()
    m.save_model(first, tmp_path)
    assert same(m.load_model(tmp_path), first) and not list(tmp_path.glob("model-*"))


def test_overwriting_its_files_does_not_change_a_loaded_model(tmp_path):
    first = saved(tmp_path)
    loaded = m.load_model(tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(bytes(path.stat().st_size))
    assert same(loaded, first)
    m.save_model(loaded, tmp_path)
    assert same(m.load_model(tmp_path), first)


def test_a_tied_checkpoint_may_repeat_its_head_but_not_with_other_values(tmp_path):
    model = saved(tmp_path, tie_word_embeddings=True)
    path = tmp_path / "model.safetensors"
    weights = load_file(path)
    save_file({**weights, "lm_head.weight": weights["model.embed_tokens.weight"].clone()}, path)
    assert same(m.load_model(tmp_path), model)
    save_file({**weights, "lm_head.weight": weights["model.embed_tokens.weight"] + 1}, path)
    with pytest.raises(ValueError, match="lm_head.weight differs .*tie_word_embeddings"):
        m.load_model(tmp_path)


def test_rotary_tables_of_old_checkpoints_are_ignored(tmp_path):
    model = saved(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    save_file(
        {**weights, "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(2)},
        tmp_path / "model.safetensors",
    )
    assert same(m.load_model(tmp_path), model)


def cut(path):
    path.write_bytes(path.read_bytes()[:-100])


def change(edit):
    """A breaker that rewrites the first weight file with edit(weights) applied."""

    def apply(folder):
        path = min(folder.glob("*.safetensors"))
        weights = load_file(path)
        edit(weights)
        save_file(weights, path)

    return apply


def pickled(folder):
    for path in folder.glob("model*"):
        path.unlink()
    torch.save({}, folder / "pytorch_model.bin")


NORM = "model.layers.0.input_layernorm.weight"
BREAKS = {  # what is wrong: (how, what the message says)
    "no config": (lambda f: (f / "config.json").unlink(), ["config.json: no such file"]),
    "config is no JSON": (
        lambda f: (f / "config.json").write_text('{"model_type": '),
        ["config.json: not a readable JSON object", "line 1"],
    ),
    "config is a list": (
        lambda f: (f / "config.json").write_text("[1]"),
        ["config.json: not a readable JSON object"],
    ),
    "config is binary": (
        lambda f: (f / "config.json").write_bytes(b"\xff\xfe\x00"),
        ["config.json: not a readable JSON object"],
    ),
    "index is no JSON": (
        lambda f: (f / "model.safetensors.index.json").write_text("{"),
        ["index.json: not a readable JSON object"],
    ),
    "index without places": (
        lambda f: (f / "model.safetensors.index.json").write_text("{}"),
        ["index.json: no weight_map"],
    ),
    "missing shard": (
        lambda f: (f / "model-00002-of-00003.safetensors").unlink(),
        ["model-00002-of-00003.safetensors: no such file"],
    ),
    "truncated shard": (
        lambda f: cut(f / "model-00002-of-00003.safetensors"),
        ["model-00002-of-00003.safetensors: not a whole"],
    ),
    "empty shard": (
        lambda f: (f / "model-00003-of-00003.safetensors").write_bytes(b""),
        ["model-00003-of-00003.safetensors: not a whole"],
    ),
    "text for weights": (
        lambda f: (f / "model-00001-of-00003.safetensors").write_text(
            "version https://git-lfs.github.com/spec/v1\n"
        ),
        ["model-00001-of-00003.safetensors: not a whole"],
    ),
    "no weights": (
        lambda f: [p.unlink() for p in f.glob("model*")],
        ["neither model.safetensors nor", "add the weights"],
    ),
    "only pickled weights": (pickled, ["pytorch_model.bin", "never read"]),
    "a parameter is missing": (change(lambda w: w.pop(NORM)), ["1 missing", NORM]),
    "a parameter is unknown": (
        change(lambda w: w.update(novel=torch.ones(2))),
        ["1 unexpected", "novel"],
    ),
    "a shape is wrong": (
        change(lambda w: w.update({NORM: torch.ones(3)})),
        ["1 of another shape", NORM, "[3] for [16]"],
    ),
    "integer weights": (
        change(lambda w: w.update({NORM: torch.ones(16, dtype=torch.int8)})),
        ["I8", "unquantized"],
    ),
}


@pytest.mark.parametrize("case", BREAKS)
def test_a_broken_folder_is_named_with_file_and_remedy_in_one_line(case, tmp_path):
    m.save_model(saved(tmp_path), tmp_path, max_shard_bytes=8000)
    assert (tmp_path / "model-00003-of-00003.safetensors").exists()
    breaks, words = BREAKS[case]
    breaks(tmp_path)
    with pytest.raises(ValueError) as caught:
        m.load_model(tmp_path)
    message = str(caught.value)
    assert all(word in message for word in words), message
    assert str(tmp_path) in message and "\n" not in message and "; " in message


def test_an_untied_config_without_a_head_says_which_key_to_change(tmp_path):
    m.save_model(saved(tmp_path, tie_word_embeddings=True), tmp_path)
    config_of(tmp_path, tie_word_embeddings=False)
    with pytest.raises(ValueError, match="missing.*lm_head.weight.*tie_word_embeddings to true"):
        m.load_model(tmp_path)


def test_sizes_that_the_weights_do_not_have_are_found(tmp_path):
    saved(tmp_path)
    config_of(tmp_path, num_hidden_layers=3)
    with pytest.raises(ValueError, match="9 missing"):
        m.load_model(tmp_path)
    config_of(
        tmp_path, head_dim=..., num_key_value_heads=...
    )  # derived as 4 key heads where there are 2
    with pytest.raises(ValueError, match="k_proj.weight"):
        m.load_model(tmp_path)


def test_a_folder_that_cannot_be_written_still_gathers_every_weight(tmp_path):
    """Gathering is a collective: a rank that stopped early would leave the others waiting."""
    model = saved(tmp_path / "a")
    (tmp_path / "file").write_text("in the way")
    weights = dict(model.named_parameters())
    gathered = []

    def whole(w):
        gathered.append(w)
        return w.detach()

    with pytest.raises(OSError):
        folder.write_folder(
            tmp_path / "file", model.config, weights, torch.float32, 5e9, whole, True
        )
    assert len(gathered) == len(weights)
