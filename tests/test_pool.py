"""core/pool.py and tasks/scoring.py: rewards in processes of their own."""

import os
import signal
import subprocess
import sys
import time

import pytest
from processes import run_in
from small_runs import ROOT, lines_of, policy_of, rl_config, sft_config, weights_of

import data
import evaluate
import rl
import sft
import tasks
from core.errors import UserError
from core.pool import DIED, TIMED_OUT, Failed, Lost, Pool
from tasks import scoring

REWARD = r"""
import ctypes, os, re, subprocess, sys, time

def reward(response, row):
    if response == "sleep":
        time.sleep(1)
    if response == "hang":
        re.match(r"(a+)+$", "a" * 60 + "b")
    if response == "hang with a child":
        subprocess.run(["sleep", "1000"])
    if response == "die":
        os.kill(os.getpid(), 11)
    if response == "torch":
        return float("torch" in sys.modules)
    return float(row[response])

def length(response, row):
    return 0.1 * (len(response) % 7)

def long(response, row):
    open(row["answer"], "a").write(f"{os.getpid()}\n")
    time.sleep(1000)
"""


@pytest.fixture()
def own(tmp_path):
    (tmp_path / "own.py").write_text(REWARD)
    return f"{tmp_path}/own.py"


@pytest.fixture()
def pool(own):
    found = Pool(tasks.scorer, f"{own}:reward", workers=2, limit=2.0)
    yield found
    found.close()


def is_running(pid: int) -> bool:
    """Whether there is such a process; a zombie that waits for its parent is none."""
    done = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True)
    return done.stdout.strip()[:1] not in ("", "Z")


# ---- calls ---------------------------------------------------------------------------------------
def test_calls_are_answered_each_with_its_own_result(pool):
    futures = [pool.submit("value", {"value": n}) for n in range(50)]
    assert [future.result()[0] for future in futures] == list(range(50))


def test_calls_run_side_by_side_while_this_process_goes_on(pool):
    pool.submit("torch", {}).result()  # both have started
    began = time.monotonic()
    futures = [pool.submit("sleep", {"sleep": 1}) for _ in range(2)]
    assert time.monotonic() - began < 0.5
    assert [future.result()[0] for future in futures] == [1, 1]
    assert time.monotonic() - began < 1.9


@pytest.mark.parametrize(
    "response, reason",
    [("hang", TIMED_OUT), ("hang with a child", TIMED_OUT), ("die", DIED)],
)
def test_a_call_that_hangs_or_dies_is_lost_and_the_others_are_not(pool, response, reason):
    lost = [pool.submit(response, {}) for _ in range(2)]
    others = [pool.submit("value", {"value": n}) for n in range(4)]
    for future in lost:
        with pytest.raises(Lost, match=reason):
            future.result()
    assert [future.result()[0] for future in others] == [0, 1, 2, 3]


def test_an_exception_of_the_function_keeps_its_traceback_and_costs_no_worker(pool):
    with pytest.raises(Failed, match=r"own.py.*in reward(.|\n)*KeyError: 'absent'"):
        pool.submit("absent", {}).result()
    with pytest.raises(UserError, match="no gold answer"):
        pool_of_math = Pool(tasks.scorer, "math", workers=1, limit=2.0)
        try:
            pool_of_math.submit("\\boxed{1}", {"question": "1 + 1"}).result()
        finally:
            pool_of_math.close()


def test_a_worker_that_cannot_start_is_a_mistake_and_not_a_reward_of_0():
    pool = Pool(tasks.scorer, "nowhere.py:reward", workers=1, limit=2.0)
    with pytest.raises(UserError, match="nowhere.py:reward ended at its start"):
        pool.submit("x", {}).result()
    pool.close()


@pytest.mark.parametrize("name", ["math", "text", "countdown"])
def test_a_worker_with_a_reward_of_the_project_does_not_load_torch(name):
    code = f"import sys, tasks; tasks.scorer({name!r}); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "False\n", done.stderr


# ---- scores --------------------------------------------------------------------------------------
def judged(small_task, reward: str, workers: int) -> list[dict]:
    """Records of 20 sampled responses."""
    policy = policy_of(small_task, reward)
    if workers:
        policy.pool = Pool(tasks.scorer, reward, workers, limit=2.0)
    problems, _ = data.problems(f"{small_task}/eval.jsonl", policy.tokenizer, 64)
    _, records = evaluate.evaluate(policy, problems[:10], 2, policy.sampling(1.0, seed=0))
    policy.close()
    return records


def test_records_do_not_depend_on_the_number_of_workers(small_task, own):
    for reward in ("countdown", f"{own}:length"):
        alone = judged(small_task, reward, workers=0)
        assert judged(small_task, reward, workers=1) == alone
        assert judged(small_task, reward, workers=3) == alone


def save_judged(small_task, reward, out) -> None:
    records = judged(small_task, reward, workers=2)
    (out / f"{os.environ.get('RANK', os.getpid())}.txt").write_text(repr(records))


def test_of_several_processes_each_scores_its_share_and_all_know_all(small_task, own, tmp_path):
    reward = f"{own}:length"
    run_in(2, tmp_path, save_judged, small_task, reward, tmp_path)
    first, second = (path.read_text() for path in tmp_path.glob("*.txt"))
    assert first == second == repr(judged(small_task, reward, workers=0))


def test_a_lost_call_earns_0_with_its_reason_and_is_counted(small_task, own):
    policy = policy_of(small_task)
    policy.pool = Pool(tasks.scorer, f"{own}:reward", workers=2, limit=1.0)
    problems, _ = data.problems(f"{small_task}/mixed.jsonl", policy.tokenizer, 64)
    for n, text in enumerate(("value", "hang", "die")):
        problem = problems[n]._replace(row={"value": 1})
        asked = scoring.Asked(
            problem,
            scoring.demonstration(problem),
            text,
            policy.pool.submit(text, problem.row).result,
        )
        policy.asked[n] = asked
    records = [asked.record() for asked in policy.asked.values()]
    policy.close()
    assert [record["reward"] for record in records] == [1, 0, 0]
    assert [record["reason"] for record in records] == ["scored", TIMED_OUT, DIED]
    assert [record["correct"] for record in records] == [True, False, False]
    assert scoring.unscored(records) == pytest.approx(200 / 3)


def test_an_exception_of_the_reward_names_the_row_with_and_without_workers(small_task, own):
    policy = policy_of(small_task, f"{own}:reward")
    problem = data.problems(f"{small_task}/eval.jsonl", policy.tokenizer, 64)[0][0]
    pair = (problem._replace(row={"id": 42}), scoring.demonstration(problem._replace(expert=[0])))
    with pytest.raises(KeyError) as alone:
        policy.judge([pair])
    policy.pool = Pool(tasks.scorer, f"{own}:reward", 1, limit=2.0)
    with pytest.raises(Failed) as pooled:
        policy.judge([pair])
    policy.close()
    for error in (alone, pooled):
        assert "for the row {'id': 42}" in error.value.__notes__[0]


# ---- runs ----------------------------------------------------------------------------------------
def test_a_run_with_workers_stopped_and_resumed_is_the_run_without(small_task, own, tmp_path):
    settings = {"reward": f"{own}:length", "steps": 2, "algo": "luffy"}
    rl.main(rl_config(small_task, tmp_path / "alone", **settings))
    cfg = rl_config(small_task, tmp_path / "r", **settings, reward_workers=2, save_every=1)
    rl.main(cfg)
    alone = lines_of(tmp_path / "alone")
    assert lines_of(tmp_path / "r") == alone
    (tmp_path / "r" / "checkpoints" / "step_000002").rename(tmp_path / "r" / "lost")
    rl.main(rl_config(small_task, tmp_path / "r", **settings, reward_workers=1, resume=True))
    assert lines_of(tmp_path / "r") == alone
    for name, weight in weights_of(tmp_path / "alone", 2).items():
        assert (weights_of(tmp_path / "r", 2)[name] == weight).all()


def test_sft_samples_its_problems_with_workers_as_without(small_task, own, tmp_path):
    settings = {"reward": f"{own}:length", "steps": 1, "max_new": 16}
    settings["problems"] = f"{small_task}/eval.jsonl"
    sft.main(sft_config(small_task, tmp_path / "alone", **settings))
    sft.main(sft_config(small_task, tmp_path / "pooled", **settings, reward_workers=2))
    alone = lines_of(tmp_path / "alone", "eval")
    assert lines_of(tmp_path / "pooled", "eval") == alone
    assert len(alone) == 2


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_no_worker_outlives_its_script(small_task, own, tmp_path, number):
    """evaluate.py: Ctrl-C waits for the calls under way, so here it is sent twice."""
    pids = tmp_path / "pids"
    rows = f'{{"prompt": "Make 1 ->", "answer": "{pids}"}}\n'
    (tmp_path / "rows.jsonl").write_text(rows)
    words = f"evaluate.py --init {small_task} --data {tmp_path}/rows.jsonl --max-new 8 --n 2"
    words += f" --reward {own}:long --reward-workers 2 --reward-timeout 500"
    process = subprocess.Popen(
        [sys.executable, *words.split()], cwd=ROOT, stderr=subprocess.DEVNULL
    )
    try:
        end = time.monotonic() + 240
        while not pids.exists() or len(pids.read_text().split()) < 2:
            assert process.poll() is None and time.monotonic() < end
            time.sleep(0.1)
        workers = [int(pid) for pid in pids.read_text().split()]
        assert all(is_running(pid) for pid in workers)
        process.send_signal(number)
        if number == signal.SIGINT:
            time.sleep(1)
            process.send_signal(number)
        process.wait(60)
    finally:
        process.kill()
    end = time.monotonic() + 30
    while any(is_running(pid) for pid in workers):
        assert time.monotonic() < end, "a worker is an orphan"
        time.sleep(0.05)
