"""Countdown: what the built-in files promise, and its reward, against arithmetic not our own."""

import ast
import json
import operator
import random
import re
import sys
from collections import Counter
from itertools import permutations
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from core.errors import UserError
from tasks import countdown, countdown_expert
from tasks.countdown import (
    LIMIT,
    SIZES,
    SPECIAL,
    SPLITS,
    Config,
    all_problems,
    expert,
    main,
    pool,
    split_of,
    write,
)

TASKS = Path(countdown.__file__).parent
SMALL = Config(trajectories=600, val=100, rl=200, test=100, base=400)
OPS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul}


def rows(folder, name):
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def problem(prompt):
    """(numbers, target) read back from a prompt."""
    target, numbers = re.fullmatch(r"Make (\d+) from ([\d ]+) ->", prompt).groups()
    return [int(n) for n in numbers.split()], int(target)


def boxed(response):
    return re.search(r"\\boxed\{ (.*) \}$", response).group(1)


def value(node):
    """Value of an expression by Python's own precedence."""
    if isinstance(node, ast.Constant):
        return node.value
    return OPS[type(node.op)](value(node.left), value(node.right))


def reaches(response, numbers, target):
    """True when the boxed expression uses exactly the numbers and equals the target."""
    expression = boxed(response)
    used = [int(n) for n in re.findall(r"\d+", expression)]
    return (
        sorted(used) == sorted(numbers) and value(ast.parse(expression, mode="eval").body) == target
    )


def traces(k, hazard, lines=17, n=500):
    """n tries of the expert at different problems: [(numbers, target, response, right)]."""
    rng = random.Random(f"{k} {hazard} {lines}")
    found = []
    for numbers, target in rng.sample(pool("train", k), n):
        numbers = rng.sample(numbers, k)
        found.append((numbers, target, *expert(numbers, target, hazard, lines, rng)))
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("countdown")
    write(path, SMALL)
    return path


def test_no_problem_is_in_two_splits_whatever_the_order_of_its_numbers(folder):
    def key(prompt):
        numbers, target = problem(prompt)
        return *sorted(numbers), target

    seen = {
        name: {key(row["prompt"]) for row in rows(folder, f"{name}.jsonl")}
        for name in ("train", "val", "rl", "eval", "test", "test_k5")
    }
    base = [re.match(r"Make \d+ from [\d ]+ ->", row["text"]) for row in rows(folder, "base.jsonl")]
    seen["train"] |= {key(match[0]) for match in base if match}
    assert any(base), "base text holds no prompts, so the check above says nothing"
    for name, problems in seen.items():
        for other in set(seen) - {name}:
            assert not problems & seen[other], (name, other)


def test_every_problem_belongs_to_exactly_one_split_and_shares_are_as_stated():
    counts = {k: Counter(split_of(*p) for p in all_problems(k)) for k in SIZES}
    assert {k: sum(c.values()) for k, c in counts.items()} == {3: 2146, 4: 21090}
    assert sum(SPLITS.values()) == 100
    for split, share in SPLITS.items():
        assert abs(counts[4][split] / 21090 - share / 100) < 0.01
    assert counts[3]["eval"] >= 250 and counts[3]["test"] >= 250
    assert all(split_of(order, 24) == split_of((2, 3, 4), 24) for order in permutations((2, 3, 4)))


def test_the_listed_problems_are_those_that_trying_everything_solves():
    def solutions(numbers):
        found = set(numbers) if len(numbers) == 1 else set()
        for i, last in enumerate(numbers if len(numbers) > 1 else ()):
            for before in solutions(numbers[:i] + numbers[i + 1 :]):
                found |= {v for v in (before + last, before - last, before * last) if 0 <= v <= 60}
        return found

    table = all_problems(3)
    for numbers in [(1, 1, 1), (2, 5, 9), (7, 7, 10), (3, 8, 8)]:
        assert {t for n, t in table if n == numbers} == {v for v in solutions(numbers) if v >= 1}


def test_default_sizes_hold_as_many_different_rows_as_asked(tmp_path):
    counts = write(tmp_path, Config(base=10, trajectories=16000))
    assert counts == {
        "base.jsonl": 10,
        "train.jsonl": 16000,
        "val.jsonl": 1000,
        "rl.jsonl": 6000,
        "eval.jsonl": 500,
        "test.jsonl": 500,
        "test_k5.jsonl": 500,
    }
    for name in set(counts) - {"base.jsonl"}:
        lines = (tmp_path / name).read_text().splitlines()
        assert len(set(lines)) == len(lines), name
    for name in ("eval.jsonl", "test.jsonl"):
        problems = {(*sorted(row["numbers"]), row["answer"]) for row in rows(tmp_path, name)}
        assert len(problems) == 500, (
            "a problem twice in an evaluation makes its standard error too small"
        )
        assert Counter(len(row["numbers"]) for row in rows(tmp_path, name)) == {3: 250, 4: 250}


def test_the_same_config_writes_the_same_bytes(folder, tmp_path):
    write(tmp_path, SMALL)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(p.name for p in folder.iterdir())
    for path in folder.iterdir():
        assert path.read_bytes() == (tmp_path / path.name).read_bytes(), path.name


@pytest.mark.parametrize(
    "change, files",
    [
        ({"trajectories": 300}, {"train.jsonl"}),
        ({"difficulty": "hard"}, {"train.jsonl"}),
        ({"hazard": 0.0}, {"train.jsonl", "val.jsonl"}),
        ({"lines": 9}, {"train.jsonl", "val.jsonl"}),
        ({"verified": True}, {"train.jsonl", "val.jsonl"}),
        ({"rl": 80}, {"rl.jsonl"}),
        ({"seed": 1}, {"base.jsonl", "train.jsonl", "val.jsonl", "rl.jsonl"}),
        ({"base": 30}, {"base.jsonl"}),
    ],
)
def test_a_flag_changes_the_files_it_names_and_no_other(folder, tmp_path, change, files):
    write(tmp_path, Config(**(vars(SMALL) | change)))
    changed = {
        p.name for p in folder.iterdir() if p.read_bytes() != (tmp_path / p.name).read_bytes()
    }
    assert changed == files | {"countdown.json"}
    assert not list(tmp_path.glob("*.tmp"))


def test_fewer_trajectories_are_the_first_of_more(folder, tmp_path):
    write(tmp_path, Config(**(vars(SMALL) | {"trajectories": 301})))
    assert rows(tmp_path, "train.jsonl") == rows(folder, "train.jsonl")[:301]


# Bands are about 3 standard errors of 500 tries around the rates over all training problems.
@pytest.mark.parametrize(
    "k, hazard, rate", [(3, 0.15, 0.42), (4, 0.15, 0.14), (3, 0.0, 0.76), (4, 0.0, 0.235)]
)
def test_the_expert_is_as_weak_as_planted(k, hazard, rate):
    right = [right for *_, right in traces(k, hazard)]
    assert abs(sum(right) / len(right) - rate) < 0.065


def test_an_expert_with_patience_and_room_solves_everything():
    assert all(right for *_, right in traces(3, 0, lines=200, n=200))


@pytest.mark.parametrize("k", [3, 4, 5])
def test_every_line_of_a_trace_is_true_and_every_verdict_fits_it(k):
    for _, target, response, _ in traces(k, 0.05, n=200):
        body = re.fullmatch(r"<think> (.*) </think> \\boxed\{ .* \}", response).group(1)
        steps = re.findall(r"(\d+) ([-+*]) (\d+) = (\d+) (,|no|yes)", body + " ")
        assert " ".join(f"{a} {op} {b} = {c} {end}" for a, op, b, c, end in steps) == body, (
            "text between lines"
        )
        for a, op, b, c, end in steps:
            assert value(ast.parse(f"{a} {op} {b}", mode="eval").body) == int(c) <= LIMIT
            assert end == "," or (end == "yes") == (int(c) == target)
        assert len(steps) <= 17 and steps[-1][-1] != ",", "the last try must be whole"
        assert all(step[-1] != "yes" for step in steps[:-1]), (
            "the search goes on after it has found the target"
        )


@pytest.mark.parametrize("k", [3, 4, 5])
def test_what_the_expert_claims_is_what_both_judges_find(k):
    verdicts = Counter()
    for numbers, target, response, right in traces(k, 0.1, n=300):
        assert (
            right
            == reaches(response, numbers, target)
            == countdown.reward(response, {"target": target, "nums": numbers}).correct
        ), response
        assert right == (" yes </think>" in response)
        verdicts[right] += 1
    assert min(verdicts[True], verdicts[False]) > 10


def test_the_box_holds_the_closest_try():
    for _, target, response, _ in traces(4, 0.1, n=200):
        results = [int(n) for n in re.findall(r"= (\d+) (?:no|yes)", response)]
        given = value(ast.parse(boxed(response), mode="eval").body)
        assert abs(given - target) == min(abs(result - target) for result in results)


def test_verified_trajectories_are_all_right_and_patience_makes_them_longer(tmp_path):
    length = {}
    for hazard in (0.0, 0.15):
        write(tmp_path, Config(**(vars(SMALL) | {"hazard": hazard, "verified": True})))
        for name in ("train.jsonl", "val.jsonl"):
            assert all(
                reaches(row["response"], *problem(row["prompt"])) for row in rows(tmp_path, name)
            )
        length[hazard] = (
            sum(len(row["response"].split()) for row in rows(tmp_path, "train.jsonl")) / 600
        )
    assert length[0.0] > length[0.15] + 5


def test_easy_problems_are_solved_more_often_than_hard_ones():
    for k in SIZES:
        assert not set(pool("train", k, "easy")) & set(pool("train", k, "hard"))
        assert set(pool("train", k, "easy")) | set(pool("train", k, "hard")) == set(
            pool("train", k)
        )
    config = Config(trajectories=600)
    right = {
        level: sum(
            reaches(row["response"], *problem(row["prompt"]))
            for row in countdown.trajectory_rows("train", 600, config, level)
        )
        for level in ("easy", "hard")
    }
    assert right["easy"] > right["hard"] + 40
    assert {
        len(problem(row["prompt"])[0])
        for row in countdown.trajectory_rows("train", 50, config, "4")
    } == {4}


def test_base_text_has_true_facts_and_noisy_comparisons_and_guesses_that_seldom_hit(tmp_path):
    write(tmp_path, Config(trajectories=0, val=0, rl=0, test=0, base=4000))
    texts = [row["text"] for row in rows(tmp_path, "base.jsonl")]
    facts = [text for text in texts if "Make" not in text]
    assert all(
        value(ast.parse(a, mode="eval").body) == int(b)
        for text in facts
        for fact in text.split(" , ")
        for a, b in [fact.split(" = ")]
    )
    compared = [text for text in texts if re.match(r"Make \d+ -> ", text)]
    goals = [(text.split()[1], re.findall(r"= (\d+) (yes|no)", text)) for text in compared]
    noise = [
        (result == target) != (said == "yes") for target, lines in goals for result, said in lines
    ]
    assert 0.08 < sum(noise) / len(noise) < 0.12
    answers = [text.split(" -> ") for text in texts if " from " in text]
    hits = [reaches(response, *problem(prompt + " ->")) for prompt, response in answers]
    assert 0.01 < sum(hits) / len(hits) < 0.12
    assert 0.37 < len(facts) / 4000 < 0.43 and 0.27 < len(goals) / 4000 < 0.33


def test_every_word_has_a_token_decoding_gives_the_text_back_and_lengths_are_bounded(folder):
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert tokenizer.get_vocab_size() == 160
    assert [tokenizer.token_to_id(word) for word in SPECIAL] == [0, 1, 2]
    for name in ("base", "train", "val", "rl", "eval", "test", "test_k5"):
        for row in rows(folder, f"{name}.jsonl"):
            text = row.get("text") or " ".join(filter(None, (row["prompt"], row.get("response"))))
            ids = tokenizer.encode(text).ids
            assert tokenizer.decode(ids) == text and tokenizer.token_to_id("<unk>") not in ids
            assert len(ids) <= 127, "prompt (at most 10) + response (at most 117)"
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    assert settings["eos_token"] == "<eos>" and "chat_template" not in settings


def test_problem_rows_give_prompt_answer_and_numbers_that_agree(folder):
    for name in ("rl", "eval", "test", "test_k5"):
        for row in rows(folder, f"{name}.jsonl"):
            assert set(row) == {"prompt", "answer", "numbers"}
            assert problem(row["prompt"]) == (row["numbers"], int(row["answer"]))
            assert (tuple(sorted(row["numbers"])), int(row["answer"])) in all_problems(
                len(row["numbers"])
            )


def test_a_folder_without_countdown_json_is_not_whole(folder, tmp_path, monkeypatch):
    write(tmp_path, SMALL)

    def full_disk(*_):
        raise OSError("no space left")

    monkeypatch.setattr(countdown.os, "replace", full_disk)
    with pytest.raises(OSError, match="no space"):
        write(tmp_path, SMALL)
    assert not (tmp_path / "countdown.json").exists()


@pytest.mark.parametrize(
    "flags, told",
    [
        (["--hazard", "2"], "hazard is 2.0"),
        (["--lines", "1"], "lines is 1"),
        (["--difficulty", "odd"], "choose uniform"),
        (["--rl", "9000"], "4500 rows of 3 numbers"),
        (["--val", "-1"], "val is -1"),
    ],
)
def test_a_users_mistake_is_one_line_and_exit_code_2(tmp_path, capsys, flags, told):
    assert (
        main(["--out", str(tmp_path / "data"), "--base", "1", "--trajectories", "1", *flags]) == 2
    )
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1 and told in said


def test_the_command_of_the_manual_writes_its_files(tmp_path, capsys):
    assert (
        main(
            [
                "--out",
                str(tmp_path),
                "--trajectories",
                "40",
                "--hazard",
                "0",
                "--verified",
                "--base",
                "5",
            ]
        )
        == 0
    )
    assert "40 train.jsonl" in capsys.readouterr().out
    settings = json.loads((tmp_path / "countdown.json").read_text())["config"]
    assert settings == vars(Config(trajectories=40, hazard=0.0, verified=True, base=5))


def test_search_rates_read_patience_and_success_off_responses():
    def record(checks, closed=True):
        tries = " ".join(f"1 + 2 = 3 {word}" for word in checks.split())
        return {
            "problem": "Make 3 from 1 2 3 ->",
            "response": f"<think> {tries}{' </think>' if closed else ''}",
            "correct": "yes" in checks,
        }

    rates = countdown_expert.search_rates(
        [record("no no yes"), record("no"), record("no no no", closed=False), record("yes")]
    )[3]
    assert rates == {
        "right": 0.5,
        "gave_up": 0.25,
        "tries": 2.0,
        "success": 0.25,
        "quit": pytest.approx(1 / 6),
    }


def test_the_chance_to_find_is_that_of_a_simulated_search():
    rng = random.Random(0)

    def search(success, quit_, most):
        for _ in range(most):
            if rng.random() < success:
                return True
            if rng.random() < quit_:
                return False
        return False

    share = sum(search(0.1, 0.15, 14) for _ in range(20_000)) / 20_000
    assert abs(share - countdown_expert.found(0.1, 0.15, 14)) < 0.012


def scored(answer, target, numbers):
    return countdown.reward(
        f"<think>so</think> \\boxed{{{answer}}}", {"answer": target, "numbers": numbers}
    )


@pytest.mark.parametrize(
    "answer, target, numbers, reason",
    [
        ("(9-8)*9+9", "18", [9, 8, 9, 9], "correct"),
        (r"(9-8) \times 9 + 9 = 18", "18", [9, 9, 9, 8], "correct"),
        (r"\frac{8}{4}\cdot 3", "6", [3, 4, 8], "correct"),
        (r"\dfrac84 + 3.", "5", [3, 4, 8], "correct"),
        (r"\left( 8 - 4 \right) \div 2", "2", [2, 4, 8], "correct"),
        (r"\frac{8}{\frac{4}{2}}", "4", [2, 4, 8], "correct"),
        (r"6/\frac{8}{4}", "3", [6, 4, 8], "correct"),
        ("$[8 - 4] × 2$", "8", [2, 4, 8], "correct"),
        ("8 ÷ 4 − 3", "-1", [3, 4, 8], "correct"),
        ("8/(3-8/3)", "24", [8, 3, 8, 3], "correct"),
        ("2(3+4)", "14", [2, 3, 4], "correct"),
        ("2*(3-7)", "-8", [2, 3, 7], "correct"),
        ("08 + 1", "9", [8, 1], "correct"),
        ("9+8=17=17", "17", [9, 8], "correct"),
        ("9+9", "18", [9, 8], "wrong numbers"),
        ("9+8+1", "18", [9, 8], "wrong numbers"),
        ("18", "18", [9, 9], "wrong numbers"),
        ("2 1/2", "2", [2, 1, 2], "wrong numbers"),
        (r"2\frac{1}{2}", "1", [2, 1, 2], "wrong numbers"),
        ("1.5*2", "3", [15, 2], "wrong numbers"),
        ("9+8", "18", [9, 8], "wrong value"),
        ("9+8=18", "18", [9, 8], "wrong value"),
        ("8/(4-4)", "1", [8, 4, 4], "wrong value"),
        ("1,8+9", "18", [18, 9], "not an expression"),
        ("9 8", "98", [9, 8], "not an expression"),
        ("9^8", "1", [9, 8], "not an expression"),
        ("9**2", "81", [9, 2], "not an expression"),
        ("9//2", "4", [9, 2], "not an expression"),
        ("9_8", "98", [98], "not an expression"),
        ("x+8", "8", [8], "not an expression"),
        ("9+8 or 9-8", "17", [9, 8], "not an expression"),
        ("3!", "6", [3], "not an expression"),
        (r"8 \text{ plus } 9", "17", [8, 9], "not an expression"),
        ("__import__('os')", "1", [1], "not an expression"),
        ("(" * 240 + "1" + ")" * 240, "1", [1], "not an expression"),
        ("1+" * 400 + "1", "401", [1] * 401, "not an expression"),
    ],
)
def test_the_reward_asks_for_each_number_once_and_for_the_target(answer, target, numbers, reason):
    verdict = scored(answer, target, numbers)
    assert (verdict.reason, verdict.correct) == (reason, reason == "correct")


def test_the_reward_is_what_python_computes_on_random_expressions():
    draw = random.Random(7)
    reasons = Counter()
    for _ in range(500):
        numbers = [draw.randint(1, 12) for _ in range(4)]
        a, b, c, d = numbers
        x, y, z = (draw.choice("+-*/") for _ in range(3))
        text = draw.choice([f"{a}{x}{b}{y}{c}{z}{d}", f"({a}{x}{b}){y}({c}{z}{d})"])
        text = draw.choice([text, f"{a}{x}({b}{y}({c}{z}{d}))"])
        target = draw.randint(1, 30)
        try:
            target = round(eval(text)) if draw.random() < 0.7 else target
            right = abs(eval(text) - target) < 1e-9
        except ZeroDivisionError:
            right = False
        verdict = scored(text, target, draw.sample(numbers, 4))
        assert verdict.correct == right, text
        reasons[verdict.reason] += 1
    assert set(reasons) == {"correct", "wrong value"} and min(reasons.values()) > 100


def test_the_reward_needs_a_box_and_finished_thinking():
    row = {"nums": [9, 9], "target": 18}
    assert countdown.reward("the answer is 9+9", row).reason == "no boxed answer"
    assert countdown.reward("<think> \\boxed{9+9}", row).reason == "unfinished thinking"
    assert countdown.reward("\\boxed{}", row).reason == "empty answer"
    assert countdown.reward("\\boxed{1} so \\boxed{9+9}", row).correct


@pytest.mark.parametrize(
    "row",
    [
        {"numbers": [9, 8], "answer": "17"},
        {"nums": [9, 8], "target": 17},
        {"nums": [9, 8], "target": 17, "answer": "9 + 8 is tried first"},
        {"numbers": None, "answer": None, "nums": [9, 8], "target": 17},
    ],
)
def test_the_reward_reads_both_spellings_of_a_row(row):
    assert countdown.reward("\\boxed{9+8}", row).correct
    assert not countdown.reward("\\boxed{17}", row).correct


@pytest.mark.parametrize(
    "row", [{"answer": "3"}, {"numbers": [1, 2]}, {"numbers": [1, 2], "answer": "one"}]
)
def test_a_row_without_numbers_or_target_is_refused_by_the_reward(row):
    with pytest.raises(UserError, match="needs columns numbers and answer"):
        countdown.reward("\\boxed{1+2}", row)


def test_the_settings_name_files_that_are_written(folder):
    for settings in countdown.SETTINGS.values():
        for name in ("data", "val", "problems"):
            assert not settings.get(name) or (folder / settings[name]).exists()
    assert (folder / countdown.DEMONSTRATIONS).exists()


def test_three_functions_of_the_task_run_per_response_besides_boxed():
    names = set()

    def note(frame, event, _):
        path = frame.f_code.co_filename
        if event == "call" and path.startswith(str(TASKS)) and frame.f_code.co_name[0] != "<":
            names.add(frame.f_code.co_name)

    sys.setprofile(note)
    scored("2(3+4)", "14", [2, 3, 4])
    sys.setprofile(None)
    assert names == {"reward", "read", "value"}
