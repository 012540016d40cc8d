"""What every test needs: the project's files on the path, and one thread (two busy OpenMP threads on shared cores run 10-20x slower)."""

import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch  # noqa: E402  after OMP_NUM_THREADS, which torch reads once

torch.set_num_threads(1)

import json  # noqa: E402
import signal  # noqa: E402

import pytest  # noqa: E402

SMALL = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
    "torch_dtype": "float32",
}


@pytest.fixture(autouse=True)
def signals_as_before():
    """A training loop leaves its handlers behind; they would swallow the Ctrl-C of whoever runs the tests."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def write_small_task(folder):
    """Few built-in problems and trajectories, the tokenizer, and a random model of 30,000 parameters."""
    import model
    from tasks import countdown

    countdown.write(folder, countdown.Config(trajectories=200, val=40, rl=100, test=20, base=40))
    words = len(json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"])
    (folder / "config.json").write_text(json.dumps({**SMALL, "vocab_size": words}))
    net = model.init_model(model.read_config(folder), 0)
    with torch.no_grad():
        for p in net.parameters():
            if p.ndim == 2:
                p.mul_(8)  # logits with spread: a wrong position shows
    model.save_model(net, folder)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 0}))
    return folder


@pytest.fixture(scope="session")
def small_task(tmp_path_factory):
    """The folder of write_small_task; nobody writes into it but `task`."""
    return write_small_task(tmp_path_factory.mktemp("task"))


@pytest.fixture()
def small(small_task):
    """(model, tokenizer, folder) of small_task."""
    import data
    import model

    return model.load_model(small_task), data.Tokenizer(small_task), small_task
