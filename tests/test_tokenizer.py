"""Text to ids and back in folders of every kind: one BOS, one EOS, the ids of transformers."""

import json

import chat_folders
import jinja2
import pytest
import tokenizers
from chat_folders import FAMILIES, SPECIAL, byte_level, write_family, write_folder

import data
import losses
from core import chat, console, rows
from core.errors import UserError


def write(path, *lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


def prompt_ids(prompt, tokenizer):
    """Ids of a prompt column."""
    return tokenizer.encode([data._prompt(rows.understand({"prompt": prompt}), tokenizer)])[0]


def text_of(ids, tokenizer):
    return tokenizer.backend.decode(list(ids), skip_special_tokens=False)


def trained(row, tokenizer, path):
    """(prompt, response) of an SFT row as text, special tokens and all."""
    (example,), _ = data.sft_examples(write(path / "rows.jsonl", row), tokenizer, 10_000)
    return text_of(example.prompt, tokenizer), text_of(example.response, tokenizer)


@pytest.fixture(scope="session")
def families(tmp_path_factory):
    """{name: tokenizer} of every family of templates."""
    base = tmp_path_factory.mktemp("families")
    return {name: data.Tokenizer(write_family(base / name, name)) for name in FAMILIES}


def with_post_processor(single, bos="<s>", eos="</s>"):
    backend = byte_level()
    pairs = [(token, backend.token_to_id(token)) for token in (bos, eos)]
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        single=single, special_tokens=pairs
    )
    return backend


# ---------------------------------------------------------------------------------- transformers
TOOL = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Adds é",
        "parameters": {"type": "object", "properties": {"a": {"type": "number"}}},
    },
}
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": "zwei ü"}}}


def conversations():
    """Fourteen conversations, as (messages, tools)."""
    user = {"role": "user", "content": "What is 1 + 2?"}
    reply = {"role": "assistant", "content": " It is 3.\n"}
    system = {"role": "system", "content": "Rule 1: be short."}
    odd = {"role": "user", "content": "  é 漢字 🙂 \t<b>&amp;</b> {{ x }} \\frac{1}{2}\n\n"}
    called = {"role": "assistant", "content": "", "tool_calls": [CALL]}
    result = {"role": "tool", "content": "3", "name": "add"}
    null = {"role": "assistant", "content": "3", "tool_calls": None, "name": None}
    thought = {"role": "assistant", "content": "3", "reasoning_content": "1 + 2\nis 3"}
    newer = {"role": "assistant", "content": "3", "reasoning": "1 and 2"}
    return [
        ([user], None),
        ([system, user], None),
        ([user, reply, odd], None),
        ([system, odd, reply, user, reply, user], None),
        ([user, null, user], None),
        ([user, thought, odd], None),
        ([user, newer, user], None),
        ([user], [TOOL]),
        ([system, user, called, result, user], [TOOL]),
        ([{"role": "user", "content": "<think> </think> <s>"}], None),
        ([{"role": "user", "content": ""}], None),
        ([odd], None),
        ([user, reply, user, reply, odd], None),
        ([{"role": "user", "content": "\r\n1 +  2\u2028= ?"}, reply, user], None),
    ]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("number", range(14))
def test_templates_and_ids_equal_those_of_transformers(families, family, number):
    transformers = pytest.importorskip("transformers")
    ours = families[family]
    theirs = transformers.AutoTokenizer.from_pretrained(str(ours.folder))
    messages, tools = conversations()[number]

    def render(tools):
        return theirs.apply_chat_template(
            messages, tools=tools, add_generation_prompt=True, tokenize=False
        )

    try:
        expected = render(tools)
    except (jinja2.TemplateError, TypeError):  # refused, or no text to write
        with pytest.raises(UserError, match="chat template failed"):
            ours.template.render(chat.conversation(messages), tools)
        return
    if tools and expected == render(None):
        with pytest.raises(UserError, match="does not write the tools"):
            ours.template.render(chat.conversation(messages), tools)
        return
    rendered = ours.template.render(chat.conversation(messages), tools)
    (ids,) = ours.encode([(rendered, False)])
    assert rendered == expected
    assert ids == theirs(expected, add_special_tokens=False)["input_ids"]
    assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)


def test_a_hundred_pairs_of_template_and_conversation_are_rendered_not_refused(families):
    n_rendered = 0
    for tokenizer in families.values():
        for messages, tools in conversations():
            try:
                tokenizer.template.render(chat.conversation(messages), tools)
            except UserError:
                continue
            n_rendered += 1
    assert n_rendered >= 100


# ------------------------------------------------------------------------------------ BOS and EOS
@pytest.mark.parametrize("single", ["<s> $A </s>", "<s> $A", "$A </s>", "$A"])
def test_a_post_processor_gives_one_bos_and_never_an_eos(tmp_path, single):
    backend = with_post_processor(single)
    tokenizer = data.Tokenizer(write_folder(tmp_path / "m", None, "<s>", "</s>", backend))
    bos = "<s>" if single.startswith("<s>") else ""
    assert text_of(prompt_ids("1 + 2", tokenizer), tokenizer) == f"{bos}1 + 2"
    prompt, response = trained({"prompt": "1 + 2", "response": "3"}, tokenizer, tmp_path)
    assert (prompt, response) == (f"{bos}1 + 2", "3</s>")
    (example,), _ = data.sft_examples(write(tmp_path / "t.jsonl", {"text": "1 2"}), tokenizer, 99)
    assert text_of([*example.prompt, *example.response], tokenizer) == f"{bos}1 2</s>"


@pytest.mark.parametrize("text", ["<s>1 + 2", "<s>1 + 2</s>", "1 + 2</s>\n", "1 + 2</s></s>"])
def test_a_text_that_holds_bos_or_eos_gets_no_second_one(tmp_path, text):
    backend = with_post_processor("<s> $A </s>")
    tokenizer = data.Tokenizer(write_folder(tmp_path / "m", None, "<s>", "</s>", backend))
    (example,), _ = data.sft_examples(write(tmp_path / "t.jsonl", {"text": text}), tokenizer, 99)
    assert text_of([*example.prompt, *example.response], tokenizer) == "<s>1 + 2</s>"


@pytest.mark.parametrize("response", ["3", "3<|im_end|>", "3<|im_end|>\n", "3<|im_end|><|im_end|>"])
def test_a_response_ends_with_one_eos_whatever_it_says(families, tmp_path, response):
    _, found = trained({"prompt": "1", "response": response}, families["chatml"], tmp_path)
    assert found == "3<|im_end|>"


def test_the_first_rollout_that_is_printed_ends_with_the_token_that_ended_it(families, capsys):
    tokenizer = families["chatml"]
    prompt = prompt_ids("1 + 2", tokenizer)
    response = [*tokenizer.backend.encode("3").ids, tokenizer.eos]
    row = losses.Row(prompt, response, [0.0] * len(response), 1.0, 1.0, 0)
    console.show_rollout(row, tokenizer)
    assert "3<|im_end|><<  reward 1\n" in capsys.readouterr().out
    console.show_rollout(row._replace(response=response[:-1], finished=False), tokenizer)
    assert "3 [cut]<<  reward 1\n" in capsys.readouterr().out


@pytest.mark.parametrize("family", [name for name, (_, bos, _) in FAMILIES.items() if bos])
def test_a_template_and_a_post_processor_give_one_bos(tmp_path, family):
    template, bos, eos = FAMILIES[family]
    if family == "plain":  # its template writes none, as transformers would have it
        return
    backend = with_post_processor(f"{bos} $A {eos}", bos, eos)
    tokenizer = data.Tokenizer(write_folder(tmp_path / "m", template, bos, eos, backend))
    text = text_of(prompt_ids("1 + 2", tokenizer), tokenizer)
    assert text.startswith(bos) and text.count(bos) == 1 and not text.endswith(eos)


# ---------------------------------------------------------------------------- rendered beforehand
@pytest.mark.parametrize("family", FAMILIES)
def test_a_prompt_that_is_rendered_already_is_left_alone(families, family):
    tokenizer = families[family]
    turns = [{"role": "user", "content": "What is 1 + 2?"}]
    rendered = tokenizer.template.render(turns)
    assert text_of(prompt_ids(rendered, tokenizer), tokenizer) == rendered
    bos = FAMILIES[family][1]
    if bos and rendered.startswith(bos) and family != "json":
        without = rendered.removeprefix(bos)
        assert text_of(prompt_ids(without, tokenizer), tokenizer) == rendered


@pytest.mark.parametrize(
    "family, prompt",
    [
        ("chatml", "<|im_start|>user\nWhat is 1 + 2?<|im_end|>\n"),
        ("with_tools", "What is 1 + 2?<|im_end|>"),
        ("headers", "<|start_header_id|>user<|end_header_id|>\n\nWhat is 1 + 2?<|eot_id|>"),
        ("turns", "<start_of_turn>user\n1 + 2<end_of_turn>"),
    ],
)
def test_a_prompt_rendered_in_part_is_refused_with_its_marker(families, tmp_path, family, prompt):
    path = write(tmp_path / "a.jsonl", {"prompt": prompt, "response": "3", "answer": "3"})
    for read in (data.sft_examples, data.problems):
        with pytest.raises(UserError, match="a.jsonl:1: .*chat template's own"):
            read(path, families[family], 999)


@pytest.mark.parametrize("more", [{"system": "S"}, {"history": [["Q", "A"]]}])
def test_nothing_is_added_to_a_prompt_that_is_rendered_already(families, tmp_path, more):
    rendered = families["chatml"].template.render([{"role": "user", "content": "1"}])
    path = write(tmp_path / "a.jsonl", {"prompt": rendered, "response": "A", **more})
    with pytest.raises(UserError, match="a.jsonl:1: .*cannot be added"):
        data.sft_examples(path, families["chatml"], 99)


@pytest.mark.parametrize(
    "family, prompt",
    [
        ("headers", "<|im_start|>user\n1 + 2<|im_end|>\n<|im_start|>assistant\n"),
        ("chatml", "<s>[INST] 1 + 2 [/INST]"),
        ("chatml", "<bos><start_of_turn>user\n1 + 2<end_of_turn>\n<start_of_turn>model\n"),
        ("instruct", "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n1<|eot_id|>"),
        ("bars", "<｜User｜>1 + 2<｜Assistant｜>"),
    ],
)
def test_a_prompt_in_another_models_template_is_refused(families, tmp_path, family, prompt):
    path = write(tmp_path / "a.jsonl", {"prompt": prompt, "response": "3", "answer": "3"})
    for read in (data.sft_examples, data.problems):
        with pytest.raises(UserError, match="a.jsonl:1: .*another model's chat template"):
            read(path, families[family], 999)


@pytest.mark.parametrize("end", ["</s>", "<|eot_id|>\n", "<end_of_turn>", "<|endoftext|>"])
def test_a_response_that_ends_as_another_model_does_is_refused(families, tmp_path, end):
    with pytest.raises(UserError, match="rows.jsonl:1: .*another model's"):
        trained({"prompt": "1 + 2", "response": "3" + end}, families["chatml"], tmp_path)


@pytest.mark.parametrize("family", ["chatml", "headers", "instruct", "turns", "thinking"])
def test_a_message_that_is_a_rendered_prompt_is_refused(families, tmp_path, family):
    rendered = families[family].template.render([{"role": "user", "content": "1 + 2"}])
    turns = [{"role": "user", "content": rendered}, {"role": "assistant", "content": "3"}]
    with pytest.raises(UserError, match="rows.jsonl:1: a message is in the chat template already"):
        trained({"messages": turns}, families[family], tmp_path)


@pytest.mark.parametrize("eos", [9999, -1, "</s>", [9999], True])
def test_an_eos_id_that_is_no_token_is_refused(tmp_path, eos):
    folder = write_folder(tmp_path / "m", eos=None)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": eos}))
    with pytest.raises(UserError, match="is no token of tokenizer.json"):
        data.Tokenizer(folder)


def test_the_bos_is_found_where_the_normalizer_removes_words(tmp_path):
    words = {"<s>": 0, "</s>": 1, "\u2003": 2, "one": 3}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="</s>"))
    backend.normalizer = tokenizers.normalizers.Strip()
    backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    tokenizer = data.Tokenizer(write_folder(tmp_path / "m", None, "<s>", "</s>", backend))
    assert tokenizer.encode([("one", True)]) == [[0, 3]]


def test_a_plain_question_that_mentions_the_assistant_is_a_question(families):
    for family in ("plain", "chatml", "instruct"):
        text = text_of(prompt_ids("Who is Assistant: 7?", families[family]), families[family])
        assert data.INSTRUCTION in text


# ----------------------------------------------------------------------------------------- decode
@pytest.mark.parametrize(
    "tags",
    [
        ("<think>", "</think>"),
        ("<answer>", "</answer>"),
        ("[THINK]", "[/THINK]"),
        ("<reasoning>", "</reasoning>"),
    ],
)
def test_tags_that_are_special_tokens_are_decoded_and_others_are_not(tmp_path, tags):
    backend = byte_level(special=(*SPECIAL, *tags), tags=())
    tokenizer = data.Tokenizer(write_folder(tmp_path / "m", backend=backend))
    text = f"<|im_start|>{tags[0]}1 + 2{tags[1]} 3<|im_end|><|endoftext|>"
    (ids,) = tokenizer.encode([(text, False)])
    assert tokenizer.decode(ids) == f"{tags[0]}1 + 2{tags[1]} 3"


@pytest.mark.parametrize("gap", [1, 50, 250])
def test_ids_above_a_gap_in_the_vocabulary_decode_and_count(tmp_path, gap):
    words = ["<eos>", "one", "two", "three"]
    vocab = {word: i if i < 3 else i + gap for i, word in enumerate(words)}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="<eos>"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer = data.Tokenizer(write_folder(tmp_path / "m", eos="<eos>", backend=backend))
    assert tokenizer.vocab_size == 4 + gap
    assert tokenizer.decode([1, 3 + gap]) == "one three"
    assert tokenizer.decode([1, 3, 9999, 2]) == "one two", "ids of a padded vocabulary"


# ---------------------------------------------------------------------------------- added tokens
def test_eos_and_added_tokens_are_found_in_every_file_where_transformers_looks(tmp_path):
    transformers = pytest.importorskip("transformers")
    backend = byte_level(special=("<|endoftext|>",), tags=())
    n = backend.get_vocab_size()
    entry = {"content": "<|im_end|>", "lstrip": False, "rstrip": False, "single_word": False}
    entry |= {"normalized": False, "special": True}
    decoder = write_folder(
        tmp_path / "decoder", None, None, "<|im_end|>", backend, added_tokens_decoder={n: entry}
    )
    legacy = write_folder(tmp_path / "legacy", None, None, None, backend)
    (legacy / "added_tokens.json").write_text(json.dumps({"<|im_end|>": n}))
    (legacy / "special_tokens_map.json").write_text(json.dumps({"eos_token": "<|im_end|>"}))
    as_object = write_folder(tmp_path / "object", None, None, None, backend)
    (as_object / "added_tokens.json").write_text(json.dumps({"<|im_end|>": n}))
    (as_object / "special_tokens_map.json").write_text(json.dumps({"eos_token": entry}))
    for folder in (decoder, legacy, as_object):
        ours = data.Tokenizer(folder)
        theirs = transformers.AutoTokenizer.from_pretrained(str(folder))
        text = "1<|im_end|> 2 <|endoftext|>"
        assert ours.eos == n == theirs.eos_token_id, folder
        assert ours.encode([(text, False)])[0] == theirs(text, add_special_tokens=False).input_ids
        assert ours.decode([n]) == ""


@pytest.mark.parametrize("name", ["additional_special_tokens", "extra_special_tokens"])
def test_special_tokens_in_a_list_of_their_own_are_added(tmp_path, name):
    transformers = pytest.importorskip("transformers")
    backend = byte_level(special=("<|endoftext|>",), tags=())
    folder = write_folder(tmp_path / "m", backend=backend, **{name: ["<|user|>", "<|end|>"]})
    ours = data.Tokenizer(folder)
    theirs = transformers.AutoTokenizer.from_pretrained(str(folder))
    text = "<|user|>1 + 2<|end|>"
    (ids,) = ours.encode([(text, False)])
    assert ids == theirs(text, add_special_tokens=False).input_ids
    assert ours.vocab_size == len(theirs) and ours.decode(ids) == "1 + 2"


@pytest.mark.parametrize("name", ["generation_config.json", "config.json"])
@pytest.mark.parametrize("stops", [2, [2, 1]])
def test_eos_ids_come_from_both_configs(tmp_path, name, stops):
    folder = write_folder(tmp_path / "m", eos=None)
    for config in ({"eos_token_id": stops}, {"text_config": {"eos_token_id": stops}}):
        (folder / name).write_text(json.dumps(config))
        tokenizer = data.Tokenizer(folder)
        assert tokenizer.eos == 2 and set(tokenizer.eos_ids) == set([2] + [1] * (stops != 2))


def test_an_added_token_of_another_id_is_refused(tmp_path):
    folder = write_folder(tmp_path / "m")
    (folder / "added_tokens.json").write_text(json.dumps({"<new>": 9000}))
    with pytest.raises(UserError, match="declared as id 9000"):
        data.Tokenizer(folder)


@pytest.mark.parametrize(
    "generation",
    [
        None,
        {},
        {"eos_token_id": 0, "temperature": 0.6},
        {"eos_token_id": [0, 3]},
        {"eos_token_id": None},
    ],
)
def test_a_checkpoints_generation_config_stops_at_the_trained_eos(tmp_path, generation):
    folder = write_family(tmp_path / "m", "chatml")
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    tokenizer = data.Tokenizer(folder)
    (tmp_path / "step").mkdir()
    tokenizer.save(tmp_path / "step")
    saved = json.loads((tmp_path / "step" / "generation_config.json").read_text())
    assert tokenizer.eos in saved["eos_token_id"]
    assert saved.get("temperature") == (generation or {}).get("temperature")
    assert data.Tokenizer(tmp_path / "step").eos_ids == tokenizer.eos_ids


def test_a_generation_config_that_stops_already_is_copied_as_it_is(tmp_path):
    folder = write_family(tmp_path / "m", "chatml")
    text = '{"eos_token_id":[2,0],  "top_p": 0.8}'
    (folder / "generation_config.json").write_text(text)
    (tmp_path / "step").mkdir()
    data.Tokenizer(folder).save(tmp_path / "step")
    assert (tmp_path / "step" / "generation_config.json").read_text() == text


# --------------------------------------------------------------------------------------- templates
@pytest.mark.parametrize(
    "call",
    [
        "tojson",
        "tojson(ensure_ascii=False)",
        "tojson(indent=2)",
        "tojson(separators=(',', ':'))",
        "tojson(sort_keys=True, ensure_ascii=True)",
    ],
)
def test_tojson_takes_the_arguments_that_transformers_gives_it(tmp_path, call):
    transformers = pytest.importorskip("transformers")
    template = "{{ {'b': messages[0].content, 'a': [1, 2]} | %s }}" % call
    folder = write_folder(tmp_path / "m", template)
    turns = [{"role": "user", "content": "é <b> 'x'"}]
    theirs = transformers.AutoTokenizer.from_pretrained(str(folder))
    expected = theirs.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    assert data.Tokenizer(folder).template.render(turns) == expected


USE = "T {{ tools | tojson }}"


def test_templates_are_found_where_transformers_looks(tmp_path):
    transformers = pytest.importorskip("transformers")
    turns = [{"role": "user", "content": "1"}]
    named = [{"name": "default", "template": "D"}, {"name": "tool_use", "template": USE}]
    listed = write_folder(tmp_path / "listed", named)
    own_file = write_folder(tmp_path / "file", "in the config")
    (own_file / "chat_template.jinja").write_text("in its file é", encoding="utf-8")
    more = write_folder(tmp_path / "more", "in the config")
    (more / "chat_template.jinja").write_text("D")
    (more / "additional_chat_templates").mkdir()
    (more / "additional_chat_templates" / "tool_use.jinja").write_text(USE)
    for folder in (listed, own_file, more):
        ours = data.Tokenizer(folder)
        theirs = transformers.AutoTokenizer.from_pretrained(str(folder))
        for tools in (None, [TOOL]) if folder != own_file else (None,):
            expected = theirs.apply_chat_template(turns, tools=tools, tokenize=False)
            assert ours.template.render(turns, tools) == expected
    (tmp_path / "step").mkdir()
    data.Tokenizer(more).save(tmp_path / "step")
    saved = data.Tokenizer(tmp_path / "step").template.sources
    assert saved == {"default": "D", "tool_use": USE}


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages[0].content + 1 }}",
        "{{ messages[9].content + 'x' }}",
        "{{ messages[0]['tool_calls'][0] }}",
        "{{ 1 / 0 if messages[0].content == '' else messages[0].content.index('zz') }}",
    ],
)
def test_a_template_that_stumbles_is_one_line_with_the_row(tmp_path, template):
    tokenizer = data.Tokenizer(write_folder(tmp_path / "m", template))
    path = write(tmp_path / "a.jsonl", {"prompt": "1", "response": "2"})
    with pytest.raises(UserError, match="a.jsonl:1: chat template failed"):
        data.sft_examples(path, tokenizer, 99)


def test_every_family_is_rendered_with_an_answer_behind_the_prompt(families, tmp_path):
    for name, tokenizer in families.items():
        prompt, response = trained({"prompt": "1 + 2", "response": "3"}, tokenizer, tmp_path)
        assert "1 + 2" in prompt and response.endswith("3" + FAMILIES[name][2]), name
    assert len(chat_folders.FAMILIES) == 10
