"""Fill the numbers of docs/tour.md: `python docs/tour.py`, seconds on a CPU."""

import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import data
import evaluate
import losses
import model
import rl
import sft
from core import optim, run
from tasks import countdown

PAGE = Path(__file__).with_name("tour.md")
TASK = dict(trajectories=8, difficulty="3", hazard=1.0, verified=True, val=0, rl=0, test=0, base=0)
SHAPE = dict(hidden_size=128, intermediate_size=384, num_hidden_layers=3, num_attention_heads=4)


def table(head: str, *columns) -> str:
    lines = ["".join(f"{name:>10}" for name in head.split())]
    for word, *numbers in zip(*columns):
        lines.append(f"{word:>10}" + "".join(f"{number:10.4f}" for number in numbers))
    return "\n".join(lines)


def sft_step(examples: list, policy, optimizers) -> dict[str, str]:
    ((ids, mask),) = sft.make_step(examples, micro_tokens=4096).parts
    N = int(mask.sum())
    logp = model.response_logp(policy.net, ids, mask)[0][0]  # (R,) of the first row
    words = [policy.tokenizer.decode([i]) for i in examples[0].response[:3]]
    rows = zip(ids.tolist(), mask.int().tolist())
    made = {"mask": "\n".join(f"ids   {i}\nmask  {m}" for i, m in rows).replace(", ", " ")}
    loss = sft.batch_loss(policy.net, ids, mask, N)
    made["sft"] = table("token logp -logp/N", words, logp, -logp / N) + f"\nN {N}  loss {loss:.4f}"
    loss.backward()
    made["update"] = f"gradient norm {optim.update(policy.net, optimizers, 1e-3, clip=1.0):.4f}"
    return made


def grpo_round(cfg, pool: list, policy, optimizers) -> dict[str, str]:
    method = losses.GRPO(entropy_coef=0.0)
    got = rl.collect(cfg, method, policy, pool, run.Run(cfg, 1, cfg.out))
    first, second = rl.make_batches(cfg, method, policy.net, None, got.groups)
    A = first.batch.advantages[:, 0].tolist() + second.batch.advantages[:, 0].tolist()
    rows = [f"{r['reward']:6.0f} {a:6.2f}   {r['response']}" for r, a in zip(got.records, A)]
    made = {"rollouts": "\n".join(["reward      A   response", *rows])}
    rl.train_on(cfg, method, policy.net, first)
    optim.update(policy.net, optimizers, 3e-4, clip=1.0)
    ((part, line),) = rl.micro_batches(cfg, second.rows)
    batch = losses.take(second.batch, part)
    logp, entropy = rl.forward(cfg, policy.net, line, batch.mask.shape[1])  # (B, R)
    ratio = losses.log_ratio(logp, batch.old_logp, batch.is_rollout).exp()
    ell = method.token_loss(logp, entropy, batch)
    far = (ratio - 1)[batch.mask].abs().topk(3).indices
    words = [policy.tokenizer.decode([i]) for i in line.ids[0, line.targets][far]]
    numbers = (batch.old_logp, logp, ratio, ratio.clamp(0.8, 1.2), batch.advantages, ell)
    columns = [number[batch.mask][far] for number in numbers]
    made["grpo"] = table("token old_logp logp ratio clipped A loss", words, *columns)
    loss = losses.update_loss(method, logp, entropy, batch)
    made["grpo"] += f"\nN {int(batch.mask.sum())}  loss {loss:.4f}"
    return made


def main(folder: Path) -> str:
    """The page with each ```text NAME block replaced; folder: for the files that are made."""
    countdown.write(folder, countdown.Config(**TASK))
    path = folder / "train.jsonl"
    shape = model.ModelConfig(**SHAPE, num_key_value_heads=2, vocab_size=160)
    # In float64: 60 steps in float32 differ in the second digit from one processor to another
    net = model.init_model(shape, seed=0).double()
    policy = evaluate.Policy(net, data.Tokenizer(folder), countdown.reward, max_new=32)
    optimizers = optim.make_optimizers(net, "adamw", 1e-3)
    examples, _ = data.sft_examples(path, policy.tokenizer, 256)
    blocks = {"row": path.read_text().splitlines()[0].replace(', "resp', ',\n "resp')}
    blocks |= sft_step(examples[:2], policy, optimizers)
    for _ in range(60):
        sft_step(examples, policy, optimizers)
    net.float()
    optimizers = optim.make_optimizers(net, "adamw", 3e-4)  # RL begins with a new one
    cfg = rl.Config(algo="grpo", prompts=2, update_prompts=1, group=4, seed=3, out=folder / "rl")
    pool, _ = data.problems(path, policy.tokenizer, 64)
    page = PAGE.read_text()
    for name, text in (blocks | grpo_round(cfg, pool, policy, optimizers)).items():
        before, _, rest = page.partition(f"```text {name}\n")
        page = f"{before}```text {name}\n{text}\n```{rest.split('```', 1)[1]}"
    return page


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as made_here:
        PAGE.write_text(main(Path(made_here)))
