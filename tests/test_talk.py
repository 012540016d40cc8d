"""python rollout.py: prompts of a command line, a file and a terminal; what is said of each."""

import json
import re
import subprocess
import sys

import pytest
from small_runs import ENV, ROOT, write_jsonl

import data
import evaluate
import model as model_file
import rollout
from core.errors import UserError
from paper import talk
from tasks import countdown

PROMPTS = ("Make 9 from 7 2 5 ->", "Make 48 from 4 7 1 10 ->")


def said(*words, small_task, typed: str = "") -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "rollout.py"), "--init", str(small_task)]
    command += ["--max-new", "16", *words]
    return subprocess.run(command, input=typed, capture_output=True, text=True, env=ENV)


def places(printed: str) -> list[str]:
    return sorted(re.findall(r"^\[(\d+\.\d+)\]", printed, re.M))


def test_every_prompt_gets_its_responses_before_and_behind_the_flags(small_task):
    done = said(PROMPTS[0], "--n", "2", PROMPTS[1], small_task=small_task)
    assert done.returncode == 0, done.stderr
    assert places(done.stdout) == ["1.1", "1.2", "2.1", "2.2"]
    for number, prompt in enumerate(PROMPTS, 1):
        assert f"[{number}] {prompt}\n" in done.stdout
    assert "reward" not in done.stdout


def test_prompts_that_are_typed_are_answered_one_by_one(small_task):
    done = said("--n", "1", small_task=small_task, typed="\n".join([*PROMPTS, "", ""]))
    assert done.returncode == 0, done.stderr
    assert places(done.stdout) == ["1.1", "1.1"]


def test_prompts_of_a_file_of_rows_and_of_a_file_of_text(small_task, tmp_path):
    row = {"prompt": PROMPTS[0], "answer": "9", "numbers": [7, 2, 5]}
    rows = write_jsonl(tmp_path / "q.jsonl", [row])
    assert talk.rows_of(talk.Config(file=rows)) == [row]
    (tmp_path / "q.txt").write_text("\n".join(PROMPTS))
    config = talk.Config(prompts=("first",), file=str(tmp_path / "q.txt"))
    assert [row["prompt"] for row in talk.rows_of(config)] == ["first", *PROMPTS]


def test_log_prob_and_entropy_are_those_of_the_model(small_task, capsys):
    net = model_file.load_model(small_task)
    tokenizer = evaluate.open_tokenizer(small_task)
    policy = evaluate.Policy(net, tokenizer, countdown.reward, 16)
    problem = data.problem({"prompt": PROMPTS[0]}, tokenizer)
    sampling = policy.sampling(1.0, seed=0)
    printer = talk.Printer(policy, [problem])
    hooks = rollout.Hooks(on_response=printer)
    ((response,),) = rollout.generate(net, [problem.prompt], 1, sampling, hooks)
    printed = capsys.readouterr().out
    ids, mask = data.collate([data.Example(problem.prompt, response.ids)])
    logp, entropy, _ = model_file.response_logp(net, ids, mask, entropy=True)
    n = len(response.ids)
    found = re.search(r"log-prob (\S+) \((\S+) .* entropy (\S+)", printed).groups()
    expected = [logp.sum().item(), logp.sum().item() / n, entropy.sum().item() / n]
    assert [float(x) for x in found] == pytest.approx(expected, abs=0.006)


def test_the_verdict_is_that_of_the_reward_where_an_answer_is_given(small_task, tmp_path):
    code = "def reward(response, row):\n    return 0.75 if row['answer'] == '9' else 0\n"
    (tmp_path / "mine.py").write_text(code)
    reward = f"{tmp_path}/mine.py:reward"
    for answer in ("9", json.dumps({"answer": "9", "numbers": [7, 2, 5]})):
        done = said(
            PROMPTS[0], "--answer", answer, "--reward", reward, "--n", "1", small_task=small_task
        )
        assert done.returncode == 0, done.stderr
        assert "right (scored), reward 0.75" in done.stdout


def test_greedy_gives_one_response(small_task):
    done = said(PROMPTS[0], "--temperature", "0", small_task=small_task)
    assert places(done.stdout) == ["1.1"]


def test_an_answer_that_is_broken_json_and_an_empty_prompt_are_refused(small_task):
    with pytest.raises(UserError, match="not JSON"):
        talk.columns_of('{"answer": ')
    done = said("", small_task=small_task)
    assert done.returncode == 2
    assert done.stderr.strip() == "error: the prompt is empty; write a question"
