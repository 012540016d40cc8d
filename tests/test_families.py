"""Families whose networks differ are trained and sampled by the same scripts."""

import json
import shutil

import pytest
import torch

import model
import rl
import sft

FAMILIES = {
    "olmo2": dict(model_type="olmo2"),
    "smollm3": dict(model_type="smollm3", no_rope_layers=[1, 0]),
    "yarn": dict(
        rope_scaling={
            "rope_type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 64,
        }
    ),
    "dynamic": dict(rope_scaling={"rope_type": "dynamic", "factor": 4.0}),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_one_step_of_sft_and_of_rl(name, small_task, tmp_path):
    folder = tmp_path / "init"
    shutil.copytree(small_task, folder)
    raw = json.loads((folder / "config.json").read_text())
    raw.pop("architectures")
    (folder / "config.json").write_text(json.dumps(raw | FAMILIES[name]))
    net = model.init_model(model.read_config(folder), 0)
    for p in net.parameters():
        if p.ndim == 2:
            p.data.mul_(8)  # logits with spread
    model.save_model(net, folder)
    files = dict(init=str(folder), data=f"{folder}/train.jsonl", val=f"{folder}/val.jsonl")
    sft.main(sft.Config(**files, out=str(tmp_path / "sft"), steps=1, batch=8, warmup=0.0))
    trained = model.load_model(tmp_path / "sft" / "checkpoints" / "step_000001")
    for (key, before), after in zip(net.named_parameters(), trained.parameters()):
        assert not torch.equal(before, after), key

    # LUFFY trains on the expert's rows even where no response is right.
    demonstrations = [json.loads(line) for line in (folder / "train.jsonl").open()][:8]
    for row in demonstrations:
        words = row["prompt"].split()
        row["answer"] = words[1]
        row["numbers"] = [int(word) for word in words[3:-1]]
    (folder / "mixed.jsonl").write_text("\n".join(json.dumps(row) for row in demonstrations))
    files = dict(init=str(folder), data=f"{folder}/mixed.jsonl", val=f"{folder}/eval.jsonl")
    small = dict(steps=1, prompts=4, update_prompts=4, group=4, max_new=128, eval_n=1)
    rl.main(rl.Config(**files, out=str(tmp_path / "rl"), algo="luffy", eval_every=1, **small))
    lines = [json.loads(line) for line in (tmp_path / "rl" / "metrics.jsonl").open()]
    step = [line for line in lines if line["kind"] == "train"][-1]
    assert step["updates"] == 1
    assert step["gap"] < 1e-4  # between the log-probs of the sampler and those of the loss
