"""Two processes with uneven rows give the gradient of one: weights come from all rows of the step, and gradients are summed."""
from dataclasses import replace

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import losses

ALGOS = ("grpo", "dapo", "luffy", "srft", "upt", "prefix_rft")


def step_rows(algo: str):
    """An optimizer step of 3 groups of 4 rows with lengths 0..7: (objective, logp, entropy, rows, group ids)."""
    g = torch.Generator().manual_seed(1)
    B, T = 12, 7
    lengths = torch.tensor([7, 1, 3, 0, 5, 2, 7, 4, 6, 1, 2, 3])
    mask = torch.arange(T) < lengths[:, None]
    objective = replace(losses.OBJECTIVES[algo], entropy_coef=0.01)
    groups = torch.arange(3).repeat_interleave(4)
    is_expert = (torch.arange(B) % 4 == 3) & (objective.demo in ("row", "gate"))
    prefix = losses.prefix_tokens(mask, torch.where(torch.arange(B) % 4 == 2, 2, 0) * (objective.demo == "prefix"))
    logp, entropy = -torch.rand(B, T, generator=g).double() - 0.1, torch.rand(B, T, generator=g).double()
    rewards = torch.tensor([1, 0, 1, 1, 0, 0, 1, 1, 0, 0, 0, 1]).double()
    rows = losses.Rows(mask, losses.group_advantages(rewards, groups), logp - 0.1 * torch.rand(B, T, generator=g).double(),
                       is_expert=is_expert, is_prefix=prefix, is_success=rewards > 0.5)
    return objective, logp, entropy, rows, groups


def gradients(algo: str, mine: torch.Tensor, gather) -> torch.Tensor:
    """d loss / d (one scalar that scales all log-probs and entropies), of the rows `mine`; gather makes a column whole."""
    objective, logp, entropy, rows, groups = step_rows(algo)
    whole = [gather(column[mine]) for column in (rows.mask.sum(1), groups, rows.is_expert)]
    order = gather(mine).argsort()                                                  # rows of all ranks, back in one order
    weights = losses.batch_weights(objective, *(column[order] for column in whole))
    scale = torch.ones(3, dtype=torch.float64, requires_grad=True)
    loss = losses.update_loss(objective, logp[mine] * scale[0], entropy[mine] * scale[1], losses.take(rows, mine), weights[:, mine])
    (loss * scale[2]).backward()
    return scale.grad


def worker(rank: int, store: str, out: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    mine = torch.arange(12)[:7] if rank == 0 else torch.arange(12)[7:]

    def gather(column):
        parts = [None, None]
        dist.all_gather_object(parts, column.tolist())
        return torch.tensor(parts[0] + parts[1], dtype=column.dtype)
    sums = {}
    for algo in ALGOS:
        grad = gradients(algo, mine, gather)
        dist.all_reduce(grad)
        sums[algo] = grad
    if rank == 0:
        torch.save(sums, out)
    dist.destroy_process_group()


def test_two_processes_with_uneven_rows_give_the_gradient_of_one(tmp_path):
    mp.spawn(worker, (str(tmp_path / "store"), str(tmp_path / "sums.pt")), nprocs=2)
    sums = torch.load(tmp_path / "sums.pt", weights_only=True)
    for algo in ALGOS:
        alone = gradients(algo, torch.arange(12), lambda column: column)
        assert alone.abs().max() > 1e-3
        assert torch.allclose(sums[algo], alone, rtol=1e-9, atol=1e-12), algo
