"""A row is understood whole or refused: every shape, what is trained, what is the gold answer."""

import json

import published
import pytest
import tokenizers
from chat_folders import FAMILIES, byte_level, write_family, write_folder

import data
import tasks
from core import ranks
from core.errors import UserError
from tasks import countdown, math, text

ASK = data.INSTRUCTION


def write(path, *lines):
    path.write_text(
        "".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines)
    )
    return str(path)


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """{name: tokenizer}: every family of templates, and "none" without a template."""
    base = tmp_path_factory.mktemp("models")
    found = {name: data.Tokenizer(write_family(base / name, name)) for name in FAMILIES}
    found["none"] = data.Tokenizer(write_folder(base / "none"))
    return found


class Read:
    """Reads rows with a model's tokenizer; texts have the special tokens in them."""

    def __init__(self, folder, tokenizer):
        self.folder = folder
        self.tokenizer = tokenizer

    def text(self, ids):
        return self.tokenizer.backend.decode(list(ids), skip_special_tokens=False)

    def trained(self, *lines):
        """[(prompt, response)] of SFT rows."""
        path = write(self.folder / "rows.jsonl", *lines)
        examples, _ = data.sft_examples(path, self.tokenizer, 10_000)
        return [(self.text(e.prompt), self.text(e.response)) for e in examples]

    def problems(self, *lines, **options):
        path = write(self.folder / "rows.jsonl", *lines)
        return data.problems(path, self.tokenizer, 10_000, **options)[0]


@pytest.fixture()
def read(models, tmp_path):
    """Read for one model by name."""
    return lambda name: Read(tmp_path, models[name])


def user(content):
    return {"role": "user", "content": content}


def assistant(content, **more):
    return {"role": "assistant", "content": content, **more}


def chatml(*turns):
    """Turns as the "with_tools" family writes them, opened for the assistant."""
    text = "".join(f"<|im_start|>{role}\n{content}<|im_end|>\n" for role, content in turns)
    return text + "<|im_start|>assistant\n"


# ------------------------------------------------------------------------- what is read and trained
PAIRS = {
    "messages": {"messages": [user("Q"), assistant("A")]},
    "messages and a repeated prompt": {
        "prompt": "Q",
        "messages": [user("Q"), assistant("A")],
    },
    "conversational pair": {"prompt": [user("Q")], "completion": [assistant("A")]},
    "conversational prompt, text completion": {"prompt": [user("Q")], "completion": "A"},
    "ShareGPT": {"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]},
    "conversations in roles": {"conversations": [user("Q"), assistant("A")]},
    "parts": {
        "messages": [
            user([{"type": "text", "text": "Q"}]),
            assistant([{"type": "text", "text": "A"}]),
        ]
    },
    "null keys": {
        "messages": [
            {"role": "user", "content": "Q", "tool_calls": None, "name": None},
            {"role": "assistant", "content": "A", "tool_calls": None, "reasoning_content": None},
        ],
        "tools": None,
        "system": None,
    },
}


@pytest.mark.parametrize("shape", PAIRS)
def test_a_conversation_is_read_in_every_spelling(read, shape, capsys):
    assert read("with_tools").trained(PAIRS[shape]) == [(chatml(("user", "Q")), "A<|im_end|>")]
    assert "not used" not in capsys.readouterr().out


TEXTS = {
    "prompt, completion": {"prompt": "Q", "completion": "A"},
    "question, solution": {"question": "Q", "solution": "A"},
    "question, answer": {"question": "Q", "answer": "A"},
    "query, response": {"query": "Q", "response": "A"},
    "Alpaca without input": {"instruction": "Q", "input": "", "output": "A"},
    "input, output": {"input": "Q", "output": "A"},
    "a text completion as a conversation": {"prompt": "Q", "completion": [assistant("A")]},
    "one solution in a list": {"question": "Q", "solution": ["A"], "final_answer": ["5"]},
}


@pytest.mark.parametrize("shape", TEXTS)
def test_a_prompt_that_is_text_is_asked_with_the_instruction(read, shape):
    expected = [(chatml(("user", f"Q\n{ASK}")), "A<|im_end|>")]
    assert read("with_tools").trained(TEXTS[shape]) == expected
    assert read("none").trained(TEXTS[shape]) == [("Q", "A<|endoftext|>")]


@pytest.mark.parametrize(
    "row, prompt",
    [
        ({"instruction": "Add", "input": "1 2", "output": "A"}, [("user", f"Add\n1 2\n{ASK}")]),
        ({"instruction": "Sum", "context": "1 2", "response": "A"}, [("user", f"Sum\n1 2\n{ASK}")]),
        ({"instruction": "", "input": "1 2", "output": "A"}, [("user", f"1 2\n{ASK}")]),
        (
            {"instruction": "Q2", "output": "A", "history": [["Q1", "A1"]]},
            [("user", "Q1"), ("assistant", "A1"), ("user", f"Q2\n{ASK}")],
        ),
    ],
)
def test_alpaca_rows_are_read_with_input_and_history(read, row, prompt):
    assert read("with_tools").trained(row) == [(chatml(*prompt), "A<|im_end|>")]


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": [user("Q1")], "completion": [assistant("A1"), user("U2"), assistant("A2")]},
        {"messages": [user("Q1"), assistant("A1"), user("U2"), assistant("A2")]},
        {
            "conversations": [
                {"from": "human", "value": "Q1"},
                {"from": "gpt", "value": "A1"},
                {"from": "human", "value": "U2"},
                {"from": "gpt", "value": "A2"},
            ]
        },
        {"prompt": "Q1", "completion": [assistant("A1"), user("U2"), assistant("A2")]},
    ],
)
def test_of_several_assistant_turns_the_last_is_trained_behind_the_others(read, row, capsys):
    prompt = chatml(("user", "Q1"), ("assistant", "A1"), ("user", "U2"))
    assert read("with_tools").trained(row) == [(prompt, "A2<|im_end|>")]
    assert "earlier assistant turns: read, the last one is trained" in capsys.readouterr().out


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": [user("Q1")], "completion": [assistant("A1"), user("U2")]},
        {"prompt": "Q", "completion": [user("U")]},
        {"prompt": [user("Q1"), assistant("A1")], "completion": "more"},
        {"messages": [user("Q1"), assistant("A1"), user("U2")]},
        {"messages": [assistant("A1")]},
        {"messages": [assistant(None)]},
    ],
)
def test_a_conversation_without_an_answer_at_its_end_is_refused(read, row):
    with pytest.raises(UserError, match="rows.jsonl:2: "):
        read("with_tools").trained(PAIRS["messages"], row)


@pytest.mark.parametrize(
    "row",
    [
        {"system": "S", "prompt": "Q", "response": "A"},
        {"system_prompt": "S", "question": "Q", "response": "A"},
        {"system": "S", "instruction": "Q", "input": "", "output": "A"},
    ],
)
def test_a_system_column_is_a_system_turn(read, row):
    expected = [(chatml(("system", "S"), ("user", f"Q\n{ASK}")), "A<|im_end|>")]
    assert read("with_tools").trained(row) == expected
    assert read("none").trained(row) == [("S\nQ\n", "A<|endoftext|>")]
    assert read("with_tools").problems({**row, "gold": "3"})[0].text == "Q"


def test_a_system_column_stands_before_a_conversation(read):
    turns = [{"from": "user", "value": "Q"}, {"from": "assistant", "value": "A"}]  # OpenThoughts
    expected = [(chatml(("system", "S"), ("user", "Q")), "A<|im_end|>")]
    assert read("with_tools").trained({"system": "S", "conversations": turns}) == expected
    own = [{"role": "system", "content": "S"}, user("Q"), assistant("A")]
    assert read("with_tools").trained({"system": "S", "messages": own}) == expected
    with pytest.raises(UserError, match="rows.jsonl:1: .*differ"):
        read("with_tools").trained({"system": "T", "messages": own})
    with pytest.raises(UserError, match="rows.jsonl:1: chat template failed: no system role"):
        read("turns").trained({"system": "S", "prompt": "Q", "response": "A"})


# ----------------------------------------------------------------------------- tools and thinking
ADD = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
CALLED = '\n<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'


@pytest.mark.parametrize("tools", [[ADD], json.dumps([ADD]), [json.dumps(ADD)]])
def test_tools_are_rendered_by_the_template(read, tools):
    row = {"messages": [user("Q"), assistant("A")], "tools": tools}
    ((prompt, response),) = read("with_tools").trained(row)
    assert f"<tools>\n{json.dumps(ADD)}\n</tools>" in prompt and response == "A<|im_end|>"
    (problem,) = read("with_tools").problems({**row, "answer": "3"})
    assert "<tools>" in read("with_tools").text(problem.prompt)


@pytest.mark.parametrize("name", ["chatml", "bars", "plain", "none"])
@pytest.mark.parametrize(
    "row",
    [
        {"messages": [user("Q"), assistant("A")], "tools": [ADD]},
        {"prompt": "Q", "response": "A", "tools": [ADD]},
        {"messages": [user("Q"), assistant("add", tool_calls=[CALL]), user("add"), assistant("A")]},
        {"messages": [user("Q"), assistant("", tool_calls=[CALL])]},
        {
            "messages": [
                user("Q"),
                assistant(
                    "", tool_calls=[CALL, {"function": {"name": "other", "arguments": "{}"}}]
                ),
                {"role": "tool", "content": "3"},
                assistant("A"),
            ]
        },
    ],
)
def test_tools_and_calls_that_the_template_does_not_write_are_refused(read, name, row):
    with pytest.raises(UserError, match="rows.jsonl:1: .*(tool|call)"):
        read(name).trained(row)


def test_a_template_that_writes_one_call_of_two_is_refused(read):
    one = {"messages": [user("Q"), assistant("", tool_calls=[CALL])]}
    assert '"add"' in read("headers").trained(one)[0][1]
    two = {"messages": [user("add"), assistant("", tool_calls=[CALL, CALL])]}
    with pytest.raises(UserError, match="rows.jsonl:2: .*does not write the call of 'add'"):
        read("headers").trained(one, two)


@pytest.mark.parametrize(
    "answer, response",
    [
        (assistant("", tool_calls=[CALL]), CALLED),
        (assistant(None, tool_calls=[CALL]), CALLED),
        (assistant("Let me.", tool_calls=[CALL]), f"Let me.{CALLED}"),
        (assistant("", tool_calls=[{"name": "add", "arguments": {"a": 1}}]), CALLED),
        (
            assistant("", tool_calls=[{"function": {"name": "add", "arguments": '{"a": 1}'}}]),
            CALLED,
        ),
        (
            assistant("", tool_calls=[CALL], reasoning_content="hm"),
            f"<think>\nhm\n</think>\n\n{CALLED}",
        ),
    ],
)
def test_a_call_is_trained_as_the_template_writes_it(read, answer, response):
    ((prompt, found),) = read("with_tools").trained(
        {"messages": [user("Q"), answer], "tools": [ADD]}
    )
    assert prompt.endswith("<|im_start|>assistant\n") and found == response + "<|im_end|>"


@pytest.mark.parametrize("call", [{"function": {}}, {"name": None}, "add(1)", {"arguments": {}}])
def test_a_call_without_a_name_is_refused(read, call):
    with pytest.raises(UserError, match="rows.jsonl:1: a tool call without a name"):
        read("with_tools").trained({"messages": [user("Q"), assistant("", tool_calls=[call])]})


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking", "thought"])
def test_thinking_is_trained_in_the_templates_own_form(read, key):
    row = {"messages": [user("Q"), assistant("A", **{key: "T"})]}
    expected = "<think>\nT\n</think>\n\nA"
    assert read("with_tools").trained(row) == [(chatml(("user", "Q")), expected + "<|im_end|>")]
    assert read("none").trained(row)[0][1] == expected + "<|endoftext|>"
    assert read("chatml").trained(row)[0][1] == expected + "<|im_end|>", (
        "its template leaves it out"
    )
    prompt, response = read("thinking").trained(row)[0]
    assert prompt.endswith("<think>\n") and response == "T\n</think>\n\nA<｜end▁of▁sentence｜>"


@pytest.mark.parametrize(
    "row, response",
    [
        ({"prompt": "Q", "thinking": "T", "final": "5"}, "<think>\nT\n</think>\n\n\\boxed{5}"),
        ({"prompt": "Q", "reasoning": "T", "answer": "A"}, "<think>\nT\n</think>\n\nA"),
        ({"prompt": "Q", "reasoning_content": "T", "response": "A"}, "<think>\nT\n</think>\n\nA"),
        (
            {"question": "Q", "thinking_trajectories": ["T"], "attempt": "A", "solution": "5"},
            "<think>\nT\n</think>\n\nA",
        ),
        (
            {"question": "Q", "deepseek_thinking_trajectory": "T", "deepseek_attempt": "A"},
            "<think>\nT\n</think>\n\nA",
        ),
    ],
)
def test_thinking_in_a_column_of_its_own_is_trained(read, row, response):
    assert read("none").trained(row) == [("Q", response + "<|endoftext|>")]


def test_two_different_thoughts_are_refused(read):
    answer = assistant("A", reasoning="one", thinking="two")
    with pytest.raises(UserError, match="rows.jsonl:1: .*different thoughts"):
        read("none").trained({"messages": [user("Q"), answer]})


@pytest.mark.parametrize(
    "response, expected",
    [
        ("A", "\n</think>\n\nA"),
        ("\\boxed{5}", "\n</think>\n\n\\boxed{5}"),
        ("<think>\nT\n</think>\nA", "T\n</think>\nA"),
        ("<think> T </think> A", " T </think> A"),
        ("T </think> A", "T </think> A"),
    ],
)
def test_thinking_that_the_template_opens_is_closed(read, response, expected, capsys):
    reader = read("thinking")
    ((prompt, found),) = reader.trained({"prompt": "Q", "response": response})
    assert prompt.endswith("<｜Assistant｜><think>\n")
    assert found == expected + "<｜end▁of▁sentence｜>"
    closed = "1 responses without thinking, behind <think>: closed" in capsys.readouterr().out
    assert closed == ("</think>" not in response)


def test_what_is_trained_behind_an_opened_think_earns_the_reward(read):
    reader = read("thinking")
    row = {"prompt": "Q", "response": "so \\boxed{5}", "answer": "5"}
    (problem,) = reader.problems(row)
    response = problem.opened + reader.tokenizer.decode(problem.expert)
    assert problem.opened == "<think>" and math.reward(response, problem.row).correct


def test_think_tags_that_are_special_tokens_reach_the_verifier(tmp_path):
    special = ("<|endoftext|>", "<think>", "</think>")
    backend = byte_level(special, tags=())
    tokenizer = data.Tokenizer(write_folder(tmp_path / "m", backend=backend))
    for response, right in (("<think>\\boxed{5}", False), ("<think>x</think>\\boxed{5}", True)):
        (ids,) = tokenizer.encode([(response, False)])
        assert math.reward(tokenizer.decode(ids), {"answer": "5"}).correct == right


# --------------------------------------------------------------------------- dropped and refused
@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "Q", "response": ""},
        {"prompt": "Q", "response": " \n"},
        {"prompt": "Q", "response": None},
        {"prompt": "Q", "completion": []},
        {"messages": [user("Q"), assistant("")]},
        {"messages": [user("Q"), assistant(None, tool_calls=None)]},
        {"messages": [user("Q"), assistant("", tool_calls=[])]},
        {"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": ""}]},
    ],
)
def test_an_empty_response_is_dropped_and_counted(read, row, capsys):
    assert len(read("with_tools").trained(PAIRS["messages"], row, row)) == 1
    assert "rows.jsonl: 2 rows with an empty response dropped" in capsys.readouterr().out


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": ""},
        {"prompt": "  \n"},
        {"prompt": None},
        {"prompt": []},
        {"messages": []},
        {"messages": [user(" ")]},
        {"prompt": [{"role": "system", "content": "S"}, user("")]},
        {"system": "S", "prompt": ""},
    ],
)
def test_an_empty_prompt_is_dropped_and_counted(read, row, capsys):
    for name in ("with_tools", "none"):
        good = {"prompt": "Q", "answer": "3", "response": "A"}
        more = {**row, "answer": "3", "response": "A"}
        assert len(read(name).problems(good, more)) == 1
        assert len(read(name).trained(good, more)) == 1
        assert capsys.readouterr().out.count("1 rows with an empty prompt dropped") == 2


def test_a_file_whose_rows_are_all_dropped_is_refused_with_the_reason(tmp_path):
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<eos>": 0, "Q": 1}, "<none>"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer = data.Tokenizer(write_folder(tmp_path / "m", eos="<eos>", backend=words))
    rows = [{"prompt": prompt, "answer": "1"} for prompt in ("Q", "\u2003Q\u2003")]
    assert len(data.problems(write(tmp_path / "a.jsonl", *rows), tokenizer, 9)[0]) == 2
    with pytest.raises(UserError, match="no problem left: 1 rows with an empty prompt dropped"):
        data.problems(write(tmp_path / "b.jsonl", {"prompt": "", "answer": "1"}), tokenizer, 9)


@pytest.mark.parametrize(
    "value",
    [
        "NaN",
        '{"text": "A"}',
        "true",
        "5",
        "1.5",
        '["A", "B"]',
        "[1]",
        '[{"text": "A"}]',
        "Infinity",
    ],
)
def test_a_response_that_is_not_text_is_refused(read, value):
    good = json.dumps({"prompt": "Q", "response": "A"})
    with pytest.raises(UserError, match="rows.jsonl:2: "):
        read("none").trained(good, f'{{"prompt": "Q", "response": {value}}}')


def test_an_empty_text_is_dropped_and_one_that_is_none_refused(read, capsys):
    texts = [{"text": "A B"}, {"text": ""}, {"text": None}, {"text": " \n"}]
    assert read("none").trained(*texts) == [("A", " B<|endoftext|>")]
    assert "3 rows with an empty text dropped" in capsys.readouterr().out
    for value in (5.5, ["A"], {"a": "b"}):
        with pytest.raises(UserError, match="rows.jsonl:2: text is a"):
            read("none").trained({"text": "A B"}, {"text": value})


@pytest.mark.parametrize("value", ["NaN", "5", "true", '{"text": "Q"}', '["Q"]', '[["Q", "A"]]'])
def test_a_prompt_that_is_not_text_is_refused(read, value):
    with pytest.raises(UserError, match="rows.jsonl:2: .*neither text nor messages"):
        read("none").trained(
            {"prompt": "Q", "response": "A"}, f'{{"prompt": {value}, "response": "A"}}'
        )


@pytest.mark.parametrize(
    "message",
    [
        {"role": "user", "content": 5},
        {"role": "user", "content": {"text": "Q"}},
        {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]},
        {"role": "user"},
        {"role": "narrator", "content": "Q"},
        {"content": "Q"},
        {"role": "user", "content": "Q", "function_call": {"name": "add"}},
    ],
)
def test_a_message_that_is_not_text_is_refused(read, message):
    with pytest.raises(UserError, match="rows.jsonl:1: "):
        read("with_tools").trained({"messages": [message, assistant("A")]})


@pytest.mark.parametrize(
    "more",
    [
        {"system": 5},
        {"tools": "add(a, b)"},
        {"tools": {"add": 1}},
        {"tools": ["add(a, b)"]},
        {"tools": [5]},
        {"history": ["Q1", "A1"]},
        {"image": "x.png"},
        {"images": ["x.png"]},
        {"documents": [{"title": "x"}]},
        {"functions": [{"name": "add"}]},
    ],
)
def test_columns_that_change_the_meaning_and_cannot_be_read_are_refused(read, more):
    with pytest.raises(UserError, match="rows.jsonl:2: "):
        read("with_tools").trained(
            {"prompt": "Q", "response": "A"}, {"prompt": "Q", "response": "A", **more}
        )


def test_blank_lines_count_in_the_number_of_a_line(tmp_path, models):
    path = tmp_path / "a.jsonl"
    path.write_text('\n{"prompt": "Q", "response": "A"}\n\n  \n{"prompt": "Q", "response": 5}\n')
    with pytest.raises(UserError, match="a.jsonl:5: response is a int"):
        data.sft_examples(str(path), models["none"], 99)
    path.write_text('\n\n{"prompt": "Q"\n')
    with pytest.raises(UserError, match="a.jsonl:3: not JSON"):
        data.sft_examples(str(path), models["none"], 99)


@pytest.mark.parametrize(
    "name, response",
    [
        ("none", "A<|endoftext|>B"),
        ("chatml", "<|im_start|>assistant\nA<|im_end|>"),
        ("chatml", "A<|im_end|>\n<|im_start|>user\nQ2<|im_end|>\n<|im_start|>assistant\nA2"),
        ("headers", "<|start_header_id|>assistant<|end_header_id|>\n\nA<|eot_id|>"),
        ("thinking", "<｜Assistant｜>A"),
    ],
)
def test_a_response_that_holds_markers_of_turns_is_refused(read, name, response):
    with pytest.raises(UserError, match="rows.jsonl:1: the response holds '<"):
        read(name).trained({"prompt": "Q", "response": response})
    with pytest.raises(UserError, match="rows.jsonl:1: the response holds '<"):
        read(name).trained({"messages": [user("Q"), assistant(response)]})


# ------------------------------------------------------------------------------ another's mistakes
@pytest.mark.parametrize("name", ["prompt", "response"])
@pytest.mark.parametrize("form", [json.dumps, str])
def test_a_conversation_written_as_text_is_refused(read, name, form):
    row = {"prompt": "Q", "response": "A"} | {name: form([user("Q")])}
    with pytest.raises(UserError, match=f"rows.jsonl:1: {name} is a conversation as text"):
        read("none").trained(row)
    plain = "[{1, 2}] is a set"
    assert read("none").trained({"prompt": plain, "response": "A"})[0][0] == plain


@pytest.mark.parametrize(
    "line",
    [
        '{"prompt": "Q", "prompt": "R", "response": "A"}',
        '{"prompt": "Q", "response": "A", "extra_info": {"answer": "1", "answer": "2"}}',
        '{"messages": [{"role": "user", "role": "user", "content": "Q"}]}',
    ],
)
def test_a_key_that_is_written_twice_is_refused(read, line):
    with pytest.raises(
        UserError, match="rows.jsonl:2: the key '(prompt|answer|role)' is written t"
    ):
        read("none").trained({"prompt": "Q", "response": "A"}, line)


def test_parquet_that_is_none_or_has_a_column_twice_is_refused(tmp_path, models):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "a.parquet"
    columns = [pyarrow.array([text]) for text in ("Q", "R", "A")]
    parquet.write_table(pyarrow.table(columns, ["prompt", "prompt", "response"]), path)
    with pytest.raises(UserError, match="2 columns are named 'prompt'"):
        data.sft_examples(str(path), models["none"], 99)
    path.write_text('{"prompt": "Q", "response": "A"}')
    with pytest.raises(UserError, match="not a Parquet file"):
        data.sft_examples(str(path), models["none"], 99)


def test_a_byte_order_mark_is_passed_over_and_a_bottomless_row_refused(read, tmp_path):
    row = '{"prompt": "Q", "response": "A"}'
    assert read("none").trained("\ufeff" + row) == [("Q", "A<|endoftext|>")]
    deep = '{"prompt": "Q", "response": "A", "x": ' + 9000 * "[" + 9000 * "]" + "}"
    with pytest.raises(UserError, match="rows.jsonl:2: "):
        read("none").trained(row, deep)


def test_of_two_calls_both_must_be_written(read):
    calls = [{"function": {"name": name, "arguments": {}}} for name in ("f", "g")]
    with pytest.raises(UserError, match="does not write the call of 'g'"):
        read("headers").trained({"messages": [user("Q"), assistant("", tool_calls=calls)]})


@pytest.mark.parametrize("name", ["prompt", "response"])
def test_half_a_character_is_refused(read, name):
    row = {"prompt": "Q", "response": "A", "answer": "3"} | {name: "x \ud83d"}
    for load in (read("chatml").trained, read("chatml").problems):
        with pytest.raises(UserError, match="rows.jsonl:1: .*half of a character"):
            load(row)


@pytest.mark.parametrize("value", ["NaN", "5", '"Q A"', '{"Q": "A"}', '[["Q"]]', '[["Q", null]]'])
def test_a_history_that_is_no_list_of_pairs_is_refused(read, value):
    with pytest.raises(UserError, match="rows.jsonl:1: history is "):
        read("none").trained(f'{{"instruction": "Q", "history": {value}, "output": "A"}}')


@pytest.mark.parametrize("target", [98, 98.0, "98", ["98"], None])
@pytest.mark.parametrize("name", ["nums", "numbers"])
def test_a_target_beside_numbers_is_never_the_response(read, target, name):
    row = {"prompt": "Q", "target": target, name: [44, 19, 35], "answer": "a trace"}
    assert read("none").trained(row) == [("Q", "a trace<|endoftext|>")]


@pytest.mark.parametrize("thought", ["t", "3", "It", "box"])
@pytest.mark.parametrize("name", ["thinking", "with_tools", "chatml", "none"])
def test_a_short_thought_that_the_answer_repeats_is_trained(read, name, thought):
    row = {"question": "Q", "reasoning": thought, "response": "It is \\boxed{3}."}
    message = {"messages": [user("Q"), assistant(row["response"], reasoning=thought)]}
    for shape in (row, message):
        ((_, trained),) = read(name).trained(shape)
        thinking, _, answer = trained.partition("</think>")
        assert thinking.removeprefix("<think>").strip() == thought
        assert answer.lstrip().startswith(row["response"])


@pytest.mark.parametrize("as_column", [True, False])
def test_thinking_that_the_response_holds_already_is_not_written_twice(read, as_column):
    def row(thought):
        response = "<think>\n1 + 2\n</think>\n\n3"
        if as_column:
            return {"prompt": "Q", "response": response, "reasoning_content": thought}
        return {"messages": [user("Q"), assistant(response, reasoning_content=thought)]}

    for name in ("with_tools", "chatml", "none"):
        ((_, trained),) = read(name).trained(row("1 + 2"))
        assert trained.startswith("<think>\n1 + 2\n</think>\n\n3<")
        with pytest.raises(UserError, match="rows.jsonl:1: the response holds other thinking"):
            read(name).trained(row("another thought"))


@pytest.mark.parametrize("switch", ["on", "off", "True", "no"])
def test_a_switch_is_no_thinking(read, switch, capsys):
    row = {"input": [user("Q")], "output": "A", "reasoning": switch}
    assert read("with_tools").trained(row) == [(chatml(("user", "Q")), "A<|im_end|>")]
    assert "columns not used: reasoning" in capsys.readouterr().out


def test_thinking_that_is_never_closed_is_counted(read, capsys):
    read("thinking").trained(
        {"prompt": "Q", "response": "<think>so"}, {"prompt": "Q", "response": "A"}
    )
    assert "1 responses that open <think> and never close it" in capsys.readouterr().out


@pytest.mark.parametrize(
    "choices",
    [["1", "3"], {"text": ["1", "3"], "label": ["A", "B"]}, {"A": "1", "B": "3"}, [1, 3], "A) 3"],
)
@pytest.mark.parametrize("name", ["choices", "options"])
def test_choices_must_stand_in_the_question(read, choices, name, capsys):
    row = {"question": "Which is odd?", name: choices, "answer": "B"}
    with pytest.raises(UserError, match=f"rows.jsonl:1: the question does not hold its {name}"):
        read("none").problems(row)
    assert read("none").problems({**row, "question": "Which is odd? A) 1 B) 3 A) 3"})
    assert "not used" not in capsys.readouterr().out
    assert read("none").problems({**row, name: None})


def test_a_message_with_both_spellings_is_refused(read):
    both = {"from": "human", "value": "Q", "role": "assistant", "content": "A"}
    with pytest.raises(UserError, match="rows.jsonl:1: a message with both from and role"):
        read("none").trained({"messages": [both, assistant("A")]})
    null = {"from": None, "value": None, "role": "user", "content": "Q"}
    assert read("none").trained({"messages": [null, assistant("A")]}) == [("Q\n", "A<|endoftext|>")]


@pytest.mark.parametrize("row", [{"messages": [{"role": "system", "content": "S"}]}])
def test_a_conversation_without_a_users_turn_asks_nothing(read, row, capsys):
    good = {"prompt": "Q", "answer": "3"}
    assert len(read("none").problems(good, {**row, "answer": "3"})) == 1
    assert "1 rows with an empty prompt dropped" in capsys.readouterr().out


# ------------------------------------------------------------------------------ columns not used
@pytest.mark.parametrize(
    "row, told",
    [
        ({"difficulty": 3, "source": "x"}, "columns not used: difficulty, source"),
        ({"nums": [1, 2], "target": 3}, "columns not used: nums, target"),
        ({"question": "another"}, "columns not used: question"),
        ({"solution": "another"}, "columns not used: solution"),
        ({"chosen": "x", "rejected": "y"}, "columns not used: chosen, rejected"),
        ({"id": 5, "uuid": "x", "index": 0, "note": None, "tags": []}, None),
        ({"question": "Q"}, None),
    ],
)
def test_columns_that_are_not_used_are_named_once(read, row, told, capsys):
    base = {"prompt": "Q", "response": "A"}
    read("none").trained({**base, **row}, {**base, **row})
    out = capsys.readouterr().out
    if "solution" in row:
        told = None  # a gold column
    assert ("not used" in out) == bool(told) and (not told or out.count(told) == 1)


def test_keys_of_a_message_that_are_not_used_are_named(read, capsys):
    read("none").trained({"messages": [user("Q"), assistant("A", weight=0)]})
    assert "columns not used: weight of a message" in capsys.readouterr().out


def test_columns_that_a_reward_reads_are_not_named(read, capsys):
    row = {"prompt": "Q", "answer": "3", "nums": [1, 2], "level": 5}
    read("none").problems(row, reads=("nums",))
    assert "columns not used: level\n" in capsys.readouterr().out


# ------------------------------------------------------------------------------------- gold answers
@pytest.mark.parametrize(
    "gold, right, wrong",
    [
        (["$2$"], "2", "3"),
        ('["2"]', "2", "3"),
        ("['1', '2']", "2", "3"),
        ('["\\\\frac{1}{2}", "x"]', "0.5", "2"),
        (["2", "two"], "2", "4"),
        (["1", "2"], "2", "3"),
        ([2, 4], "4", "3"),
        (["$\\frac{1}{2}$", "0.25"], "0.5", "1"),
        (7, "7", "8"),
        (2.5, "\\frac{5}{2}", "2"),
        ("[1, 2]", "[1, 2]", "1"),
    ],
)
def test_any_item_of_a_list_of_gold_answers_counts(read, gold, right, wrong):
    (problem,) = read("none").problems({"question": "Q", "final_answer": gold})
    assert math.reward(f"\\boxed{{{right}}}", problem.row).correct
    assert not math.reward(f"\\boxed{{{wrong}}}", problem.row).correct


NO_GOLD = ["", " ", "proof", "Proof", None, "notfound", "N/A", [], [""], [None, "proof"]]


@pytest.mark.parametrize("gold", [*NO_GOLD, "\\boxed{}", "so ####"])
def test_golds_that_are_no_answers_are_dropped_and_counted(read, gold, capsys):
    good = {"prompt": "Q", "answer": "3"}
    assert len(read("none").problems(good, {"prompt": "Q2", "answer": gold})) == 1
    assert "1 rows with no answer in their gold column" in capsys.readouterr().out


def test_a_gold_that_is_not_a_number_is_dropped(read, capsys):
    found = read("none").problems({"prompt": "Q", "answer": "3"}, '{"prompt": "Q", "answer": NaN}')
    assert len(found) == 1 and "1 rows with no answer" in capsys.readouterr().out


def test_a_proof_without_a_box_gives_no_gold_and_is_dropped(read, capsys):
    proof = "We show that for every prime there is a larger one. " * 4
    good = {"problem": "Q", "solution": "so \\boxed{3}"}
    assert len(read("none").problems(good, {"problem": "Q2", "solution": proof})) == 1
    assert "1 rows with no answer" in capsys.readouterr().out


@pytest.mark.parametrize(
    "gold, text",
    [
        ("5.0", "5"),
        ("-3.0", "-3"),
        ("1e-07", "0.0000001"),
        ("2.5", "2.5"),
        ("[2.0, 3]", "2 | 3"),
        ("1e30", "1" + 30 * "0"),
        ("\"('3', '4')\"", "3 | 4"),
        ('"[\\"\\\\frac{1}{2}\\"]"', "\\frac{1}{2}"),
        ('"[\\"\\\\\\\\frac{1}{2}\\"]"', "\\frac{1}{2}"),
        ("\"['\\\\theta']\"", "\\theta"),
        ("\"['\\\\sqrt{2}', '1']\"", "\\sqrt{2} | 1"),
    ],
)
def test_numbers_and_latex_in_lists_are_golds_as_they_are_written(read, gold, text):
    (problem,) = read("none").problems(f'{{"question": "Q", "final_answer": {gold}}}')
    assert problem.gold == text


@pytest.mark.parametrize("gold", ["Infinity", "-Infinity", "[NaN]", '"No answer."', '"$proof$"'])
def test_golds_that_nobody_can_earn_are_dropped(read, gold, capsys):
    good = {"prompt": "Q", "answer": "3"}
    assert len(read("none").problems(good, f'{{"prompt": "Q2", "answer": {gold}}}')) == 1
    assert "1 rows with no answer in their gold column" in capsys.readouterr().out


def test_golds_that_disagree_or_are_worked_texts_are_counted_with_the_first(read, capsys):
    row = {"question": "Q", "answer": "17", "final_answer": "18"}
    agree = {"question": "Q", "answer": "1/2", "solution": "so \\boxed{\\frac{1}{2}}"}
    proof = {"question": "Q", "answer": "3", "solution": "As shown above."}
    read("none").problems(row, agree, proof, {**row, "final_answer": "19"})
    told = "2 rows whose gold answers differ: answer counts, not final_answer (the first: '17' and "
    assert told + "'18')" in capsys.readouterr().out
    read("none").problems({"question": "Q", "answer": "so we add the numbers " * 8})
    assert "1 rows whose gold answer (column answer) has over 20 words" in capsys.readouterr().out


@pytest.mark.parametrize("solution", [5, 5.0, "5", " 5 "])
def test_a_bare_solution_is_the_gold_answer_and_no_demonstration(read, solution):
    for more in ({}, {"answer": solution}):
        (problem,) = read("none").problems({"problem": "Q", "solution": solution, **more})
        assert problem.gold.strip() == "5" and problem.expert is None


def test_a_worked_solution_is_gold_and_demonstration(read):
    (problem,) = read("none").problems({"problem": "Q", "solution": "so \\boxed{3}"})
    assert problem.gold == "3" and read("none").text(problem.expert) == "so \\boxed{3}<|endoftext|>"


def test_a_tasks_reward_checks_its_columns_at_load(read):
    options = tasks.columns("countdown")
    good = {"prompt": "Q", "nums": [1, 2], "target": 3}
    with pytest.raises(UserError, match="rows.jsonl:2: the Countdown reward needs columns"):
        read("none").problems(good, {"prompt": "Q", "target": 3}, **options)


@pytest.mark.parametrize(
    "row",
    [
        {"reward_model": {"ground_truth": {"target": 98, "numbers": [44, 19, 35]}}},
        {"answer": {"value": 98}},
        {"answer": '{"target": 98, "numbers": [44, 19, 35]}'},
        {"ground_truth": "{'target': 98, 'numbers': [44, 19, 35]}"},
        {"answer": True},
        {"answer": '[{"value": 3}]'},
        {"answer": "[['3', '4']]"},
        {"final_answer": [{"value": 98}]},
    ],
)
def test_a_gold_that_is_not_text_is_refused_or_handed_to_a_reward_whole(read, row):
    good = {"prompt": "Q", "answer": "3"}
    with pytest.raises(UserError, match="rows.jsonl:2: the gold answer in"):
        read("none").problems(good, {"prompt": "Q", **row})
    (problem,) = read("none").problems({"prompt": "Q", **row}, needs_gold=False)
    assert problem.row == {"prompt": "Q", **row} and problem.gold == ""


def test_a_reward_that_needs_no_gold_gets_rows_without_one(read):
    assert read("none").problems({"prompt": "Q"}, needs_gold=False)[0].row == {"prompt": "Q"}
    with pytest.raises(UserError, match='no "answer"'):
        read("none").problems({"prompt": "Q"})


@pytest.mark.parametrize(
    "response, right",
    [("Paris", True), (" Paris\n", True), ("paris", False), ("Paris.", False)],
)
def test_the_text_reward_is_exact_after_trimming(response, right):
    assert text.reward(response, {"prompt": "Q", "answer": "Paris"}).correct == right
    assert (
        text.reward(f"<think>x</think>\n{response}", {"answer": ["Rome", "Paris"]}).correct == right
    )
    assert not text.reward(f"<think>{response}", {"answer": "Paris"}).correct


def test_a_trace_beside_a_target_number_is_trained(read, capsys):
    row = {"prompt": "Q", "target": 98, "nums": [44, 19, 35], "answer": "44 + 19 + 35 = 98"}
    assert read("none").trained(row) == [("Q", "44 + 19 + 35 = 98<|endoftext|>")]
    assert "columns not used: nums, target" in capsys.readouterr().out
    (problem,) = read("none").problems({**row, "answer": "98"})
    assert problem.expert is None and problem.gold == "98" and problem.row["nums"] == [44, 19, 35]


# ------------------------------------------------------------------------------- held-out prompts
@pytest.mark.parametrize("copies", [1, 2, 100])
@pytest.mark.parametrize("kind", ["problems", "trained"])
def test_held_out_prompts_are_not_trained_however_often_they_are_repeated(
    models, tmp_path, copies, kind
):
    lines = [{"prompt": f"Q{n}", "answer": "3", "response": f"A{n}"} for n in range(30)] * copies
    path = write(tmp_path / "a.jsonl", *lines)
    load = data.problems if kind == "problems" else data.sft_examples
    found, _ = load(path, models["none"], 99)
    kept, held = data.hold_out(found, 199)
    assert len(held) == 3 and len(kept) == 27 * copies
    assert not {tuple(row.prompt) for row in kept} & {tuple(row.prompt) for row in held}
    assert len(data.hold_out(found, 2)[1]) == 2
    single = data.hold_out(found[:1], 199)
    assert single == (found[:1], found[:1])


def test_without_repeated_prompts_the_held_out_rows_are_those_of_the_plan(small):
    found, _ = data.problems(str(small[2] / "rl.jsonl"), small[1], 64)
    kept, held = data.hold_out(found, 200)
    picked = set(data.plan(len(found), ranks.seed_of("held out"), 0, len(found) // 10))
    assert held == [found[i] for i in sorted(picked)]
    assert kept == [row for i, row in enumerate(found) if i not in picked]


def test_plain_texts_are_held_out_by_their_whole_text(models, tmp_path):
    path = write(tmp_path / "a.jsonl", *({"text": f"the text {n // 2}"} for n in range(40)))
    kept, held = data.hold_out(data.sft_examples(path, models["none"], 99)[0], 199)
    assert len(held) == 2 and len(kept) == 36


def test_the_number_of_distinct_prompts_is_said(read, capsys):
    row = {"prompt": "Q", "answer": "3"}
    read("none").problems(row, row, {"prompt": "R", "answer": "3"})
    assert "3 problems, 2 distinct prompts" in capsys.readouterr().out


# ----------------------------------------------------------------------------- published data sets
@pytest.mark.parametrize("name", published.ROWS)
@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_rows_of_published_data_sets_are_read_as_documented(models, tmp_path, capsys, name, kind):
    row, prompt, response, gold, unused = published.ROWS[name]
    path = write(tmp_path / "a.jsonl", row)
    if kind == "parquet":
        pyarrow = pytest.importorskip("pyarrow")
        parquet = pytest.importorskip("pyarrow.parquet")
        path = str(tmp_path / "a.parquet")
        parquet.write_table(pyarrow.Table.from_pylist([row]), path)
    tokenizer = models["none"]
    if response is None:
        with pytest.raises(UserError, match="no prompt and response"):
            data.sft_examples(path, tokenizer, 999)
    else:
        (example,), _ = data.sft_examples(path, tokenizer, 999)
        assert tokenizer.decode(example.prompt) == prompt
        assert tokenizer.decode(example.response) == response
        told = capsys.readouterr().out
        assert unused in told if unused else "not used" not in told
    if gold is None:
        with pytest.raises(UserError, match='no "answer"|no problem left'):
            data.problems(path, tokenizer, 999)
        return
    (problem,), _ = data.problems(path, tokenizer, 999)
    assert tokenizer.decode(problem.prompt) == prompt and problem.gold == gold
    assert math.reward("so \\boxed{3}", problem.row).correct
    assert not math.reward("so \\boxed{98}", problem.row).correct
    if problem.expert is not None:
        assert tokenizer.decode(problem.expert) == response
    else:
        assert response in (None, row.get("answer"), row.get("solution"))


def test_countdown_as_tinyzero_publishes_it_is_scored_by_its_own_reward(read):
    row = published.COUNTDOWN
    (problem,) = read("none").problems(row, **tasks.columns("countdown"))
    assert problem.row == row and problem.expert is None
    assert countdown.reward("\\boxed{44 + 19 + 35}", problem.row).correct
    assert not countdown.reward("\\boxed{98}", problem.row).correct
    with pytest.raises(
        UserError, match="rows.jsonl:1: the gold answer in reward_model is no plain text"
    ):
        read("none").problems(row)


@pytest.mark.parametrize(
    "row, gold",
    [
        ({"nums": [44, 19, 35], "target": 98}, ""),
        ({"numbers": [44, 19, 35], "answer": "98"}, "98"),
        ({"nums": [44, 19, 35], "target": 98, "answer": "First 44 + 19 = 63."}, None),
    ],
)
def test_countdown_rows_need_no_gold_column_and_keep_one_for_the_logs(read, row, gold):
    (problem,) = read("none").problems({"prompt": "Q", **row}, **tasks.columns("countdown"))
    assert problem.row == {"prompt": "Q", **row}
    assert problem.gold == (row["answer"] if gold is None else gold)
    assert countdown.reward("\\boxed{44 + 19 + 35}", problem.row).correct


def test_a_row_of_nums_and_target_alone_is_refused_with_its_columns(read):
    with pytest.raises(UserError, match=r"no \"prompt\".*nums.*target"):
        read("none").problems({"nums": [44, 19, 35], "target": 98})
