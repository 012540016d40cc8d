"""Ten published data sets' rows on ten model folders' shapes, end to end: SFT, RL, evaluation."""

import json

import published
import pytest
import small_runs
import torch
from chat_folders import FAMILIES, write_family

import data
import evaluate
import model
import rl
import sft
from core.errors import UserError

LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 64}
# name -> (family of templates, what config.json has besides the sizes)
MODELS = {
    "Qwen2.5": ("with_system", {"model_type": "qwen2"}),
    "Qwen2.5 base": ("chatml", {"model_type": "qwen2", "vocab_size": 512}),
    "Qwen3": ("with_tools", {"model_type": "qwen3", "head_dim": 16}),
    "Llama 3": ("headers", {"model_type": "llama", "rope_scaling": LLAMA3}),
    "Mistral": ("instruct", {"model_type": "mistral", "sliding_window": None}),
    "Gemma's template": ("turns", {"model_type": "llama", "tie_word_embeddings": True}),
    "Phi's template": ("bars", {"model_type": "olmo2"}),
    "R1-Distill": ("thinking", {"model_type": "qwen2", "tie_word_embeddings": False}),
    "SmolLM3": ("plain", {"model_type": "smollm3", "no_rope_layers": [1, 0]}),
    "JSON template": ("json", {"model_type": "llama", "num_key_value_heads": 4}),
}
# Data sets in the order of the models; Countdown rows have a reward of their own.
SETS = ["GSM8K", "MATH", "NuminaMath-CoT", "OpenR1-Math", "DeepMath", "DAPO-Math-17k", "s1K"]
SETS += ["OlympiadBench", "Skywork-OR1", "TinyZero"]
RL_ONLY = ("DAPO-Math-17k", "Skywork-OR1", "TinyZero")


def write_model(path, name):
    """A model folder with random weights; its tokenizer has 400 ids, the model perhaps more."""
    family, config = MODELS[name]
    write_family(path, family)
    n_ids = data.Tokenizer(path).vocab_size
    raw = {**small_runs.SMALL, "vocab_size": n_ids, "max_position_embeddings": 512, **config}
    del raw["architectures"]
    (path / "config.json").write_text(json.dumps(raw))
    net = model.init_model(model.read_config(path), 0)
    with torch.no_grad():
        for p in net.parameters():
            if p.ndim == 2:
                p.mul_(8)
    model.save_model(net, path)
    return str(path)


@pytest.mark.parametrize("dataset, name", list(zip(SETS, MODELS)), ids=SETS)
def test_a_published_data_set_on_a_published_model_from_sft_to_evaluation(dataset, name, tmp_path):
    row = published.COUNTDOWN if dataset == "TinyZero" else published.ROWS[dataset][0]
    reward = "countdown" if dataset == "TinyZero" else "math"
    path = small_runs.write_jsonl(tmp_path / "a.jsonl", [row] * 4)
    init = write_model(tmp_path / "model", name)
    files = dict(data=path, val=path, reward=reward)

    trained = sft.Config(init=init, **files, out=str(tmp_path / "sft"), steps=2, batch=2, lr=1e-3)
    if dataset in RL_ONLY:
        with pytest.raises(UserError, match="no prompt and response"):
            sft.main(trained)
    else:
        assert sft.main(trained)
        init = str(tmp_path / "sft")
        losses = [line["loss"] for line in small_runs.lines_of(init, "train")]
        assert len(losses) == 2 and all(loss > 0 for loss in losses)
        n_trained = len(data.sft_examples(path, data.Tokenizer(tmp_path / "model"), 999)[0])
        assert n_trained == 4

    method = "luffy" if dataset in ("MATH", "OpenR1-Math", "DeepMath", "s1K") else "grpo"
    small = dict(steps=1, prompts=2, update_prompts=2, group=2, max_new=64, eval_n=1, eval_every=1)
    rl.main(rl.Config(init=init, **files, out=str(tmp_path / "rl"), algo=method, **small))
    (step,) = small_runs.lines_of(tmp_path / "rl", "train")
    assert step["updates"] == (method == "luffy"), "random weights are never right, experts are"

    samples = tmp_path / "eval.jsonl"
    last = f"{tmp_path / 'rl'}@last"
    evaluate.main(
        evaluate.Config(
            init=(str(last),), data=path, reward=reward, n=1, max_new=4, out=str(samples)
        )
    )
    records = [json.loads(line) for line in samples.open()]
    assert len(records) == 4 and not any(record["correct"] for record in records)
    gold = "" if dataset == "TinyZero" else published.ROWS[dataset][3]
    assert {record["gold"] for record in records} == {gold}

    saved = data.Tokenizer(tmp_path / "rl" / "checkpoints" / "step_000001")
    assert saved.eos_text == FAMILIES[MODELS[name][0]][2] and saved.eos in saved.eos_ids
