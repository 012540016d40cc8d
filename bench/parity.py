"""Our losses and gradients beside TRL's own code: same weights, rows, lengths and rewards.

    python -m bench parity --peer-python /path/to/python     a table, then one line of JSON

Rows are made up: 6 groups of 4 responses, one of which agrees in its rewards. Ours go through
losses.py and the forward and backward of rl.py and sft.py, theirs through GRPOTrainer and
SFTTrainer (bench/peers/trl_parity.py). Step 1 is the round's first, where all ratios are 1; step 2
comes after the weights have moved, so that clips act.

factor       what ours is multiplied by to come nearest to theirs (least squares)
difference   largest difference of a gradient, over the largest gradient
like_theirs  the same with TRL's constant beside the standard deviation, 1e-4; ours is 1e-6
"""

import json
import random
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file, save_file

import data
import losses
import model as model_file
import rl
import sft
from bench import checks, measure, training
from core import ranks

N_PROMPTS = 6
GROUP = 4
MAX_NEW = 24
TEMPERATURE = 0.7
MICRO_ROWS = 8  # rows per forward of TRL; ours cuts by tokens


@dataclass
class Config:
    peer_python: str = sys.executable  # the interpreter that has trl
    threads: int = 1
    json: bool = False  # print the last line only

    def __post_init__(self):
        measure.require_program(self.peer_python)


class Case(NamedTuple):
    """One objective: our flags, TRL's settings, and why they differ, if they do."""

    ours: dict
    theirs: dict
    why: str = ""


EPSILON = "std + 1e-4, ours 1e-6"
SEQUENCES = dict(agg="seq-mean-token-mean", normalize_std=True)
CASES = {
    "GRPO": Case(SEQUENCES, dict(loss_type="grpo"), EPSILON),
    "DAPO": Case(
        dict(normalize_std=True, clip_high=0.28), dict(loss_type="dapo", epsilon_high=0.28), EPSILON
    ),
    "GSPO": Case(
        SEQUENCES | dict(surrogate="sequence", clip_low=3e-4, clip_high=4e-4),
        dict(
            loss_type="grpo",
            importance_sampling_level="sequence",
            epsilon=3e-4,
            epsilon_high=4e-4,
        ),
        EPSILON,
    ),
    "CISPO": Case(
        dict(surrogate="cispo", clip_low=None, clip_high=4.0, normalize_std=True),
        dict(loss_type="cispo", epsilon_high=5.0),
        EPSILON + "; their bound is the ratio, 1 + ours",
    ),
    "Dr. GRPO": Case(
        dict(agg="const", norm_const=MAX_NEW), dict(loss_type="dr_grpo", scale_rewards="none")
    ),
    "grpo, our default": Case({}, dict(loss_type="dapo", scale_rewards="none")),
    "BNPO": Case({}, dict(loss_type="bnpo", scale_rewards="none"), "a mean per micro-batch"),
    "SFT": Case(dict(loss="nll"), dict(trainer="sft")),
    "DFT": Case(dict(loss="dft"), dict(trainer="sft", loss_type="dft")),
}


class TheirEpsilon(losses.GRPO):
    """GRPO with TRL's constant beside the standard deviation."""

    def advantages(self, batch):
        return losses.group_advantages(batch.rewards, batch.groups, self.normalize_std, eps=1e-4)


# ---- the rows and the weights
def make_work() -> dict:
    """What both sides are given; half of the responses end with EOS."""
    draw = random.Random(0)

    def ids(n: int) -> list[int]:
        return [draw.randrange(10, 160) for _ in range(n)]

    work = {"prompts": [], "responses": [], "rewards": []}
    for number in range(N_PROMPTS):
        work["prompts"].append(ids(draw.randint(3, 12)))
        work["responses"].append(
            [ids(draw.randint(2, MAX_NEW - 1)) + [0] * (i % 2) for i in range(GROUP)]
        )
        rewards = [round(draw.random(), 3) for _ in range(GROUP)]
        work["rewards"].append(rewards if number else [0.1] * GROUP)
    work["cases"] = {name: case.theirs for name, case in CASES.items()}
    return work | dict(micro=MICRO_ROWS, max_new=MAX_NEW, temperature=TEMPERATURE)


def write_weights(folder: Path) -> None:
    """model/, and moved.safetensors: the same weights, each up to a few percent away."""
    model = checks.tiny_model(torch.float32, torch.device("cpu"))
    model_file.save_model(model, folder / "model")
    training.write_tokenizer(folder / "model", model.config.vocab_size)
    g = ranks.generator(0, "bench", "parity")
    moved = {}
    for name, p in model.named_parameters():
        moved[name] = p.detach() * (1 + 0.02 * torch.randn(p.shape, generator=g))
    save_file(moved, folder / "moved.safetensors")


# ---- our side
class Step(NamedTuple):
    """What one optimizer step would do."""

    loss: float
    gradients: dict[str, torch.Tensor]
    clipped: float  # share of the tokens whose ratio is outside the clip's bounds


def rl_rows(work: dict) -> list[list[losses.Row]]:
    groups = []
    for number, prompt in enumerate(work["prompts"]):
        rows = []
        for ids, reward in zip(work["responses"][number], work["rewards"][number], strict=True):
            rows.append(losses.Row(prompt, ids, [0.0] * len(ids), reward, reward, number))
        groups.append(rows)
    return groups


def our_rl(method: losses.GRPO, work: dict, folder: Path) -> list[Step]:
    """The round's first step, and one under the moved weights."""
    cfg = rl.Config(
        temperature=TEMPERATURE, micro_tokens=200, prompts=N_PROMPTS, update_prompts=N_PROMPTS
    )
    model = model_file.load_model(folder / "model")
    (update,) = rl.make_batches(cfg, method, model, None, rl_rows(work))
    old_logp, _ = rl.logp_now(cfg, model, update.rows, update.batch.mask.shape[1])
    later = update._replace(batch=update.batch._replace(old_logp=old_logp))
    steps = []
    for given in (update, later):
        sums = rl.train_on(cfg, method, model, given)
        clipped = sums["clipped"] / sums["tokens"]
        steps.append(Step(sums["loss"], take_gradients(model), clipped))
        model.load_state_dict(load_file(folder / "moved.safetensors"))
    return steps


def our_sft(loss: str, work: dict, folder: Path) -> list[Step]:
    examples = []
    for prompt, responses in zip(work["prompts"], work["responses"], strict=True):
        examples += [data.Example(prompt, ids) for ids in responses]
    model = model_file.load_model(folder / "model")
    alpha = sft.Config(loss=loss).alpha
    step = sft.make_step(examples, micro_tokens=200)
    total = 0.0
    for ids, mask in step.parts:
        part = sft.batch_loss(model, ids, mask, step.n_trained, alpha)
        part.backward()
        total += part.item()
    return [Step(total, take_gradients(model), 0.0)]


def take_gradients(model) -> dict[str, torch.Tensor]:
    found = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    return found


def our_steps(case: Case, work: dict, folder: Path, method: type) -> list[Step]:
    if case.theirs.get("trainer") == "sft":
        return our_sft(case.ours["loss"], work, folder)
    return our_rl(method(**case.ours), work, folder)


# ---- side by side
def difference(ours: dict, theirs: dict) -> tuple[float, float]:
    """(factor, largest difference over the largest of theirs), all parameters as one vector."""
    assert ours.keys() == theirs.keys()
    a = torch.cat([ours[name].flatten() for name in theirs]).double()
    b = torch.cat([theirs[name].flatten() for name in theirs]).double()
    return (a @ b / (a @ a)).item(), ((a - b).abs().max() / b.abs().max()).item()


def compare(name: str, work: dict, folder: Path, their_losses: dict) -> list[dict]:
    """A row of the table per step of a case."""
    case = CASES[name]
    plain = our_steps(case, work, folder, losses.GRPO)
    alike = our_steps(case, work, folder, TheirEpsilon)
    rows = []
    for n, (ours, adapted) in enumerate(zip(plain, alike, strict=True), 1):
        theirs = load_file(folder / f"{name} {n}.safetensors")
        factor, apart = difference(ours.gradients, theirs)
        row = {
            "case": name,
            "step": n,
            "clipped": ours.clipped,
            "loss": ours.loss,
            "their_loss": their_losses[f"{name} {n}"],
            "factor": factor,
            "difference": apart,
            "like_theirs": difference(adapted.gradients, theirs)[1],
            "why": case.why,
        }
        rows.append(row)
    return rows


def main(cfg: Config) -> None:
    torch.set_num_threads(cfg.threads)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        work = make_work()
        (folder / "work.json").write_text(json.dumps(work))
        write_weights(folder)
        command = [cfg.peer_python, str(measure.PEERS / "trl_parity.py"), "--work", name]
        theirs = measure.run_json(command, cfg, "trl_parity.py")
        rows = []
        for case in CASES:
            rows += compare(case, work, folder, theirs["losses"])
    if not cfg.json:
        print(measure.as_table(rows))
    print(json.dumps({"bench": "parity", "trl": theirs["trl"], "rows": rows}))
