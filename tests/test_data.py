"""Rows to ids, masks and batches: what is trained, what is dropped, in which order."""

import json

import pytest
import torch

import data
from core import rows


def write(path, *rows):
    path.write_text(
        "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)
    )
    return str(path)


def prompt_of(prompt, tokenizer):
    """(text, start) of a prompt column."""
    return data._prompt(rows.understand({"prompt": prompt}), tokenizer)


def test_the_response_and_its_eos_are_trained_and_nothing_else(small):
    tokenizer = small[1]
    examples, _ = data.sft_examples(str(small[2] / "train.jsonl"), tokenizer, 256)
    ids, mask = data.collate(examples[:5])
    for row, example, picked in zip(ids, examples, mask):
        n_prompt, n = len(example.prompt), len(example.prompt) + len(example.response)
        assert (
            row[picked].tolist() == list(example.response) and example.response[-1] == tokenizer.eos
        )
        assert picked.nonzero()[:, 0].tolist() == list(range(n_prompt, n))
        assert "Make" in tokenizer.decode(row[:n_prompt].tolist()) and "boxed" in tokenizer.decode(
            row[picked].tolist()
        )


def test_an_eos_id_inside_prompt_or_padding_does_not_move_the_mask():
    ids, mask = data.collate([data.Example([0, 5, 0], [0, 7, 0]), data.Example([4], [0])])
    assert mask.tolist() == [[False] * 3 + [True] * 3, [False, True] + [False] * 4]


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "Make 3", "response": "1 + 2"},
        {"question": "Make 3", "solution": "1 + 2"},
        {"prompt": "Make 3", "completion": "1 + 2"},
        {"problem": "Make 3", "answer": "1 + 2"},
        {"extra_info": {"question": "Make 3", "answer": "1 + 2"}},
        {
            "messages": [
                {"role": "user", "content": "Make 3"},
                {"role": "assistant", "content": "1 + 2"},
            ]
        },
        {
            "prompt": [{"role": "user", "content": "Make 3"}],
            "completion": [{"role": "assistant", "content": "1 + 2"}],
        },
    ],
)
def test_column_names_of_other_trainers_are_accepted(small, tmp_path, row):
    tokenizer = small[1]
    (example,), _ = data.sft_examples(write(tmp_path / "a.jsonl", row), tokenizer, 100)
    assert (
        tokenizer.decode(example.prompt) == "Make 3"
        and tokenizer.decode(example.response[:-1]) == "1 + 2"
    )


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "Make 3", "answer": "3"},
        {"question": "Make 3", "ground_truth": 3},
        {"prompt": [{"role": "user", "content": "Make 3"}], "reward_model": {"ground_truth": "3"}},
        {"question": "Make 3", "answer": "it is 1 + 2 #### 3"},
    ],
)
def test_problem_columns_of_other_trainers_are_accepted(small, tmp_path, row):
    (problem,), _ = data.problems(write(tmp_path / "a.jsonl", row), small[1], 100)
    assert problem.gold == "3" and problem.text == "Make 3" and problem.expert is None


def test_a_problem_keeps_its_demonstration_with_eos(small, tmp_path):
    (problem,), _ = data.problems(
        write(tmp_path / "a.jsonl", {"prompt": "Make 3", "answer": "3", "response": "1 + 2"}),
        small[1],
        100,
    )
    assert (
        problem.expert == small[1].encode([("1 + 2", False)])[0] + [small[1].eos]
        and problem.gold == "3"
    )


def test_plain_text_is_trained_from_its_second_token(small, tmp_path):
    (example,), _ = data.sft_examples(
        write(tmp_path / "a.jsonl", {"text": "1 + 2 = 3"}), small[1], 100
    )
    assert len(example.prompt) == 1 and len(example.response) == 5


def test_over_long_examples_are_dropped_and_counted(small, tmp_path):
    path = write(
        tmp_path / "a.jsonl",
        {"prompt": "Make 3", "response": "1 + 2"},
        {"prompt": "Make 3", "response": "1 + 2 " * 30},
    )
    examples, n_long = data.sft_examples(path, small[1], 20)
    assert len(examples) == 1 and n_long == 1


@pytest.mark.parametrize(
    "content, message",
    [
        ("", "no rows"),
        ('{"prompt": "a", "response": "b"}\n{"prompt": \n', ":2: not JSON"),
        ("[1]\n", "not an object"),
        ('{"promt": "a", "response": "b"}\n', "a.jsonl:1: no prompt and response"),
        (
            json.dumps({"prompt": "Make 3", "response": "1 + 2 " * 50}) + "\n",
            "longer than 20 tokens",
        ),
    ],
)
def test_bad_files_are_named_with_line_and_remedy(small, tmp_path, content, message):
    (tmp_path / "a.jsonl").write_text(content)
    with pytest.raises(ValueError, match=message):
        data.sft_examples(str(tmp_path / "a.jsonl"), small[1], 20)


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": 5, "response": "1"},
        {"prompt": ["Make 3"], "response": "1"},
        {"prompt": "Make 3", "messages": "Make 3"},
        {"prompt": [{"role": "user", "content": None}], "response": "1"},
    ],
)
def test_a_prompt_of_another_kind_is_refused_with_its_line(small, tmp_path, row):
    path = write(
        tmp_path / "a.jsonl",
        {"prompt": "Make 3", "response": "1", "answer": "1"},
        {**row, "answer": "1"},
    )
    for read in (data.sft_examples, data.problems):
        with pytest.raises(
            ValueError,
            match=r"a.jsonl:2: .*(neither text nor messages|without text as its content)",
        ):
            read(path, small[1], 20)


def test_rows_are_the_same_however_many_are_read_at_once(small, tmp_path, monkeypatch):
    pairs = [{"prompt": f"Make {n}", "response": f"{n} + 0"} for n in range(22)]
    trained = write(
        tmp_path / "a.jsonl",
        *(row if n % 3 else {"text": f"{n} = {n}"} for n, row in enumerate(pairs)),
    )
    asked = write(
        tmp_path / "b.jsonl",
        *(
            {**row, "answer": str(n)} if n % 3 else {"prompt": "1", "answer": str(n)}
            for n, row in enumerate(pairs)
        ),
    )
    found = []
    for batch in (1, 5, 1000):
        monkeypatch.setattr(rows, "AT_ONCE", batch)
        found.append(
            (
                list(data.sft_examples(trained, small[1], 20)[0]),
                data.problems(asked, small[1], 20)[0],
            )
        )
    assert found[0] == found[1] == found[2]
    texts = [small[1].decode([*example.prompt, *example.response]) for example in found[0][0]]
    assert texts == [f"Make {n} {n} + 0" if n % 3 else f"{n} = {n}" for n in range(22)]
    assert [(p.gold, p.expert is None) for p in found[0][1]] == [
        (str(n), n % 3 == 0) for n in range(22)
    ]


def test_a_unicode_line_separator_inside_a_string_does_not_end_the_row(tmp_path):
    (tmp_path / "a.jsonl").write_text(
        json.dumps({"a": "1\u20282"}, ensure_ascii=False) + "\n", encoding="utf-8"
    )
    assert data.read_rows(tmp_path / "a.jsonl") == [{"a": "1\u20282"}]


def test_a_problem_without_gold_is_refused_with_its_columns(small, tmp_path):
    with pytest.raises(ValueError, match=r'a.jsonl:1: no "answer".*found: \[\'prompt\'\]'):
        data.problems(write(tmp_path / "a.jsonl", {"prompt": "x"}), small[1], 20)


def problem(row, small, tmp_path):
    return data.problems(write(tmp_path / "a.jsonl", row), small[1], 90)[0][0]


@pytest.mark.parametrize(
    "written", ["5", r"\boxed{5}", r"We have 2 + 3 = 5, so \boxed{5}.", "2 + 3 = 5\n#### 5"]
)
def test_the_gold_answer_is_found_in_a_worked_solution(small, tmp_path, written):
    assert problem({"prompt": "2 + 3", "solution": written}, small, tmp_path).gold == "5"


def test_a_conversation_is_asked_whole_but_for_the_answer_that_ends_it(small, tmp_path):
    turns = [
        {"role": "user", "content": "1 + 1"},
        {"role": "assistant", "content": "2"},
        {"role": "user", "content": "2 + 1"},
    ]
    end = {"role": "assistant", "content": "3"}
    asked = [
        problem({"messages": messages, "answer": "3"}, small, tmp_path)
        for messages in (turns, turns + [end])
    ]
    trained = data.sft_examples(
        write(tmp_path / "b.jsonl", {"messages": turns + [end]}), small[1], 90
    )[0][0]
    assert asked[0].prompt == asked[1].prompt == list(trained.prompt) and asked[0].text == "2 + 1"
    assert asked[0].expert is None and asked[1].expert == list(trained.response)


def test_the_input_of_an_alpaca_row_is_part_of_its_prompt(small, tmp_path):
    row = {"instruction": "Make 3 from", "input": "1 2", "output": "1 + 2", "answer": "3"}
    assert problem(row, small, tmp_path).text == data.prompt_text(row) == "Make 3 from\n1 2"


def test_a_problem_keeps_its_row_with_every_column_as_read(small, tmp_path):
    row = {"prompt": "1", "answer": "3", "numbers": ["one"], "level": {"of": [5, None]}}
    assert problem(row, small, tmp_path).row == row


def test_every_epoch_of_the_plan_visits_every_row_once_and_does_not_depend_on_the_batch_size():
    stream = data.plan(10, 0, 0, 40)
    assert all(sorted(stream[e : e + 10]) == list(range(10)) for e in (0, 10, 20, 30))
    assert stream[:10] != stream[10:20]
    assert [i for s in range(8) for i in data.plan(10, 0, s * 5, 5)] == stream
    assert data.plan(10, 1, 0, 10) != stream[:10]


def test_micro_batches_hold_every_row_once_within_the_budget():
    lengths = torch.randint(1, 90, (64,), generator=torch.Generator().manual_seed(0)).tolist() + [
        300
    ]
    parts = data.cut(lengths, 256)
    assert sorted(i for part in parts for i in part) == list(range(65))
    for part in parts:
        assert len(part) == 1 or len(part) * max(lengths[i] for i in part) <= 256


@pytest.mark.parametrize(
    "rows, longest, budget",
    [(24, 256, 1024), (32, 256, 2048), (128, 2048, 8192), (512, 2048, 16384)],
)
def test_on_geometric_lengths_under_5_percent_is_padding_and_few_micro_batches_are_small(
    rows, longest, budget
):
    lengths = (
        torch.empty(rows)
        .exponential_(4 / longest, generator=torch.Generator().manual_seed(0))
        .long()
        + 32
    )
    lengths = lengths.clamp(max=longest).tolist()
    sizes = [len(part) * max(lengths[i] for i in part) for part in data.cut(lengths, budget)]
    assert sum(sizes) < 1.05 * sum(lengths) and len(sizes) < 3 * sum(lengths) / budget + 5


def test_the_cut_is_the_cheapest_of_all_in_order_of_length():
    lengths, budget = [9, 9, 5, 4, 4, 2, 1, 1], 20

    def cost(parts):
        return sum(len(part) * part[0] + budget / 64 for part in parts)

    def ways(row):
        if not row:
            return [[]]
        return [
            [row[:n], *rest]
            for n in range(1, len(row) + 1)
            if n * row[0] <= budget
            for rest in ways(row[n:])
        ]

    assert cost([[lengths[i] for i in part] for part in data.cut(lengths, budget)]) == min(
        map(cost, ways(lengths))
    )
    assert data.cut([], 10) == [] and data.cut([50], 10) == [[0]]


TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def chat_folder(small, tmp_path, template):
    for name in ("tokenizer.json", "config.json"):
        (tmp_path / name).write_text((small[2] / name).read_text())
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps(
            {"bos_token": "<unk>", "eos_token": {"content": "<eos>"}, "chat_template": template}
        )
    )
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [0, 1]}))
    return data.Tokenizer(tmp_path)


def test_the_chat_template_is_rendered_with_its_special_tokens_and_the_instruction(small, tmp_path):
    tokenizer = chat_folder(small, tmp_path, TEMPLATE)
    text, _ = prompt_of("Make 3", tokenizer)
    assert text == "<unk><user>Make 3\n" + data.INSTRUCTION + "<assistant>"
    assert prompt_of("in \\boxed{}", tokenizer)[0] == "<unk><user>in \\boxed{}<assistant>"
    assert tokenizer.eos_ids == [0, 1] and tokenizer.eos == 0


def test_a_thinking_tag_that_the_template_opens_is_not_written_twice(small, tmp_path):
    tokenizer = chat_folder(
        small, tmp_path, TEMPLATE.replace("<assistant>", "<assistant> <think>\n")
    )
    path = write(
        tmp_path / "a.jsonl",
        {"prompt": "Make 3", "response": "<think>\n1 + 2 </think>", "answer": "3"},
    )
    (example,), _ = data.sft_examples(path, tokenizer, 100)
    assert tokenizer.decode(example.response[:-1]) == "1 + 2 </think>"
    assert data.problems(path, tokenizer, 100)[0][0].opened == "<think>"


@pytest.mark.parametrize(
    "template, message",
    [
        ("{% for %}", "does not compile"),
        ("{{ raise_exception('no system role') }}", "no system role"),
        ("{{ messages.__class__.__mro__[1].__subclasses__() }}", "chat template failed"),
    ],
)
def test_a_broken_or_hostile_template_is_one_clear_error(small, tmp_path, template, message):
    with pytest.raises(ValueError, match=message):
        prompt_of("Make 3", chat_folder(small, tmp_path, template))


def test_parquet_rows_are_read_as_json_rows_are(small, tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet

    rows = [{"prompt": "Make 3", "response": "1 + 2"}, {"prompt": "Make 4", "response": "2 + 2"}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    write(tmp_path / "a.jsonl", *rows)
    found = []
    for kind in ("parquet", "jsonl"):
        examples, _ = data.sft_examples(str(tmp_path / f"a.{kind}"), small[1], 20)
        found.append(list(examples))
    assert found[0] == found[1]


def test_problems_with_an_empty_answer_are_dropped_and_said(small, tmp_path, capsys):
    path = write(
        tmp_path / "a.jsonl", {"prompt": "Make 3", "answer": " "}, {"prompt": "Make 3", "answer": 0}
    )
    found, _ = data.problems(path, small[1], 20)
    assert [p.gold for p in found] == [
        "0"
    ] and "1 rows with no answer in their gold column" in capsys.readouterr().out
