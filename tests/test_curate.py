"""Rows go for the reason that holds, are counted under it, and nothing else goes."""

import json
import random

import pytest

from paper import curate
from tasks import countdown

AMY = (
    "Amy has 6 fewer cards than Leo. Leo has 17 cards, and he buys two packs of 5. "
    "How many cards does Amy have in the end?"
)
BEN = (
    "Zoe has 9 fewer cards than Max. Max has 31 cards, and he buys three packs of 8. "
    "How many cards does Zoe have in the end?"
)
OTHER = (
    "A train leaves Rome at 9 and travels at 80 km per hour. Another follows one hour later. "
    "When do they meet near Pisa?"
)
BOILER = (
    " Please reason step by step, and put your final answer within the box at the very end of it."
)


def kept(rows, against, **how):
    return [
        row["prompt"]
        for row in curate.clean([{"prompt": text} for text in rows], against, **how)[0]
    ]


def test_each_reason_is_counted_once_and_the_first_row_of_a_prompt_stays():
    rows = [
        {"prompt": OTHER, "n": 0},
        {"prompt": OTHER.upper() + " ", "n": 1},
        {"prompt": AMY, "n": 2},
        {"prompt": BEN, "n": 3},
    ]
    left, counts = curate.clean(rows, [AMY], ngram=13, near=0.8)
    assert counts == {"rows": 4, "duplicate": 1, "overlap": 1, "near": 1, "kept": 1}
    assert [row["n"] for row in left] == [0]


def test_formulas_that_differ_in_brackets_are_not_duplicates():
    assert len(kept(["Compute (2 + 3) * 4.", "Compute 2 + (3 * 4)."], [])) == 2


def test_changed_numbers_and_names_are_near_but_not_overlapping():
    assert kept([BEN], [AMY], near=0) == [BEN]
    assert kept([BEN], [AMY]) == []
    assert kept([OTHER], [AMY]) == [OTHER]


def test_a_shared_passage_of_n_words_is_an_overlap_and_one_word_less_is_not():
    passage = "the sum of the squares of three consecutive odd integers is one thousand"  # 13 words
    assert (
        kept([f"If {passage}, find them."], [f"Given that {passage}, what is the least?"], near=0)
        == []
    )
    shorter = passage.rpartition(" ")[0]
    assert (
        len(
            kept(
                [f"If {shorter} nine, find them."],
                [f"Given that {shorter} ten, what is the least?"],
                near=0,
            )
        )
        == 1
    )


def test_an_instruction_that_all_evaluation_prompts_end_with_removes_nothing():
    against = [
        f"Problem about thing number {n} and its {word} parts.{BOILER}"
        for n, word in enumerate("red blue green odd even tall".split())
    ]
    assert kept([OTHER + BOILER], against, near=0) == [OTHER + BOILER]


def test_a_short_evaluation_prompt_is_asked_for_whole():
    assert kept(
        ["Ann knows 3 + 4 = ? and asks what 3 + 4 = ? squared is.", "3 + 4 = ?"],
        ["3 + 4 = ?"],
        near=0,
    ) == ["Ann knows 3 + 4 = ? and asks what 3 + 4 = ? squared is."]


def test_names_are_words_with_a_capital_inside_sentences_only():
    names = curate.names_in([AMY, "In the end find all. What can Amy find in triangle ABC?"])
    assert {"leo", "amy", "abc"} <= names and not names & {"in", "find", "what", "how", "the"}


def test_near_agrees_with_comparing_every_pair():
    rng = random.Random(0)
    texts = [" ".join(rng.choices("abcdefg", k=rng.randint(4, 12))) for _ in range(300)]
    evaluation, training = texts[:100], texts[100:]
    for least in (0.2, 0.5, 0.8):
        asked = curate.Near(evaluation, least, set())
        for text in training:
            mine = curate.grams(text.split(), curate.SHINGLE)
            others = [curate.grams(other.split(), curate.SHINGLE) for other in evaluation]
            assert asked(text) == any(
                len(mine & other) / len(mine | other) >= least for other in others
            )


def test_countdown_has_one_form_so_near_takes_all_and_its_splits_share_nothing(small_task):
    train = curate.data.read_rows(small_task / "train.jsonl")
    against = [
        row["prompt"]
        for name in ("val", "eval", "test")
        for row in curate.data.read_rows(small_task / f"{name}.jsonl")
    ]
    assert curate.clean(train, against)[1]["kept"] == 0
    counts = curate.clean(train, against, near=0)[1]
    assert counts["overlap"] == counts["near"] == 0 and counts["kept"] + counts["duplicate"] == 200


def attempts_of(wins: dict[str, int], n: int = 4) -> list[dict]:
    return [
        {"problem": prompt, "correct": i < won} for prompt, won in wins.items() for i in range(n)
    ]


def test_difficulty_is_cut_as_in_the_paper():
    wins = {f"p{i}": i % 5 for i in range(100)}
    chosen, edges = curate.by_difficulty([{"prompt": p} for p in wins], attempts_of(wins))
    assert edges == {"easy": 1.0, "hard": 0.25} and {len(rows) for rows in chosen.values()} == {20}
    assert {wins[row["prompt"]] for row in chosen["easy"]} == {4} and {
        wins[row["prompt"]] for row in chosen["hard"]
    } <= {0, 1}
    assert {wins[row["prompt"]] for row in chosen["uniform"]} == {0, 1, 2, 3, 4}


def test_an_edge_moves_only_as_far_as_the_size_needs():
    wins = {f"p{i}": min(4, i // 10) for i in range(45)}  # 10 rows each with 0..3 wins, 5 with 4
    chosen, edges = curate.by_difficulty([{"prompt": p} for p in wins], attempts_of(wins), size=12)
    assert edges == {"easy": 0.75, "hard": 0.25} and {len(rows) for rows in chosen.values()} == {12}


def test_selection_does_not_depend_on_the_order_of_the_attempts_and_needs_equally_many():
    wins = {f"p{i}": i % 5 for i in range(50)}
    rows, attempts = [{"prompt": p} for p in wins], attempts_of(wins)
    assert curate.by_difficulty(rows, attempts) == curate.by_difficulty(rows, attempts[::-1])
    with pytest.raises(ValueError, match="3 to 4 a prompt"):
        curate.by_difficulty(rows, attempts[1:])


def test_both_commands_run_as_typed(tmp_path, capsys, small_task):
    rows = curate.data.read_rows(small_task / "train.jsonl")
    out = tmp_path / "clean.jsonl"
    assert (
        curate.main(
            [
                "--in",
                str(small_task / "train.jsonl"),
                "--against",
                str(small_task / "test.jsonl"),
                "--near",
                "0",
                "--out",
                str(out),
            ]
        )
        == 0
    )
    left = curate.data.read_rows(out)
    assert (
        f"{len(left)} kept; against 20 evaluation prompts" in capsys.readouterr().out
        and left[0] == rows[0]
    )
    tried = tmp_path / "attempts.jsonl"
    tried.write_text(
        "".join(
            json.dumps(r) + "\n"
            for r in attempts_of({row["prompt"]: i % 5 for i, row in enumerate(left)})
        )
    )
    assert (
        curate.main(
            [
                "--in",
                str(out),
                "--attempts",
                str(tried),
                "--out",
                str(tmp_path / "sets"),
                "--size",
                "30",
            ]
        )
        == 0
    )
    assert "30 rows each; easy: win rate 1 or more, hard: 0.25 or less" in capsys.readouterr().out
    assert {
        len(curate.data.read_rows(tmp_path / "sets" / f"{name}.jsonl"))
        for name in ("easy", "uniform", "hard")
    } == {30}


def test_a_mistake_is_one_line(tmp_path, capsys):
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"text": "no prompt here"}\n')
    assert curate.main(["--in", str(tmp_path / "none.jsonl"), "--out", "x"]) == 2
    assert curate.main(["--in", str(bad), "--out", str(tmp_path / "x")]) == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 2 and "no such file" in said[0] and "training row 1: no prompt" in said[1]


def test_conversations_are_compared_by_their_last_user_message():
    row = {"messages": [{"role": "user", "content": AMY}, {"role": "assistant", "content": "21"}]}
    assert curate.clean([row], [AMY])[1]["overlap"] == 1
    assert countdown.prompt_of([1, 2, 3], 6) == curate.prompt_of(
        {"prompt": "Make 6 from 1 2 3 ->"}, "row"
    )
