"""Model folders without a model: a byte-level tokenizer, special tokens, and chat templates.

The templates are our own, each in the manner of a published family.
"""

import json

import tokenizers

SPECIAL = (
    "<|endoftext|> <|im_start|> <|im_end|> <s> </s> <|begin_of_text|> <|start_header_id|> "
    "<|end_header_id|> <|eot_id|> <start_of_turn> <end_of_turn> <bos> <|user|> <|assistant|> "
    "<|system|> <|end|> <｜begin▁of▁sentence｜> <｜end▁of▁sentence｜> <｜User｜> <｜Assistant｜>"
).split()

CHATML = """\
{% for message in messages %}
{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}
{%- endfor %}
{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""

WITH_SYSTEM = """\
{%- if messages[0]['role'] != 'system' %}
    {{- '<|im_start|>system\nBe helpful.<|im_end|>\n' }}
{%- endif %}
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"""

WITH_TOOLS = """\
{%- if tools %}
    {{- '<|im_start|>system\n' }}
    {%- if messages[0].role == 'system' %}{{- messages[0].content + '\n\n' }}{%- endif %}
    {{- '# Tools\n<tools>' }}
    {%- for tool in tools %}{{- '\n' }}{{- tool | tojson }}{%- endfor %}
    {{- '\n</tools><|im_end|>\n' }}
{%- elif messages[0].role == 'system' %}
    {{- '<|im_start|>system\n' + messages[0].content + '<|im_end|>\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'user' %}
        {{- '<|im_start|>user\n' + message.content + '<|im_end|>\n' }}
    {%- elif message.role == 'assistant' %}
        {{- '<|im_start|>assistant\n' }}
        {%- if message.reasoning_content %}
            {{- '<think>\n' + message.reasoning_content.strip('\n') + '\n</think>\n\n' }}
        {%- endif %}
        {{- message.content if message.content else '' }}
        {%- for call in message.tool_calls or [] %}
            {%- set call = call.function if call.function else call %}
            {{- '\n<tool_call>\n{"name": "' + call.name + '", "arguments": ' }}
            {{- call.arguments | tojson(ensure_ascii=False) }}
            {{- '}\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\n' }}
    {%- elif message.role == 'tool' %}
        {{- '<|im_start|>user\n<tool_response>\n' + message.content }}
        {{- '\n</tool_response><|im_end|>\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"""

HEADERS = """\
{{- bos_token }}
{%- for message in messages %}
    {%- if message.role not in ['user', 'assistant', 'system', 'tool'] %}
        {{- raise_exception('unknown role') }}
    {%- endif %}
    {%- if 'tool_calls' in message %}
        {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}
        {{- message.tool_calls[0].function | tojson }}
        {{- '<|eot_id|>' }}
    {%- else %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}
        {{- message['content'] | trim + '<|eot_id|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}
{%- endif %}"""

INSTRUCT = """\
{%- if messages[0]['role'] == 'system' %}
    {%- set system = '<<SYS>>\n' + messages[0]['content'] + '\n<</SYS>>\n\n' %}
    {%- set turns = messages[1:] %}
{%- else %}
    {%- set system = '' %}
    {%- set turns = messages %}
{%- endif %}
{%- for message in turns %}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('roles must alternate') }}
    {%- endif %}
    {%- if message['role'] == 'user' %}
        {{- bos_token + '[INST] ' + (system if loop.first else '') + message['content'] }}
        {{- ' [/INST]' }}
    {%- else %}
        {{- ' ' + message['content'] + ' ' + eos_token }}
    {%- endif %}
{%- endfor %}"""

TURNS = """\
{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}\
{% endif %}{% for message in messages %}{% set role = 'model' if message['role'] == 'assistant' \
else message['role'] %}{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + \
'<end_of_turn>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}\
{% endif %}"""

BARS = """\
{% for message in messages %}
{% if message['role'] == 'system' %}
{{ '<|system|>\n' + message['content'] + '<|end|>\n' }}
{% elif message['role'] == 'user' %}
{{ '<|user|>\n' + message['content'] + '<|end|>\n' }}
{% else %}
{% generation %}{{ '<|assistant|>\n' + message['content'] + '<|end|>\n' }}{% endgeneration %}
{% endif %}
{% if loop.last and add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}
{% endfor %}"""

THINKING = """\
{{ bos_token }}
{%- set ns = namespace(system='') %}
{%- for message in messages %}
    {%- if message['role'] == 'system' %}{%- set ns.system = message['content'] %}{%- endif %}
{%- endfor %}
{{- ns.system }}
{%- for message in messages %}
    {%- if message['role'] == 'user' %}
        {{- '<｜User｜>' + message['content'] }}
    {%- elif message['role'] == 'assistant' and message['content'] is not none %}
        {{- '<｜Assistant｜>' + message['content'].split('</think>')[-1] }}
        {{- '<｜end▁of▁sentence｜>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<｜Assistant｜><think>\n' }}{%- endif %}"""

PLAIN = """\
{%- for message in messages -%}
{{ message['role'] | capitalize }}: {{ message['content'] }}

{% endfor -%}
{%- if add_generation_prompt -%}Assistant:{%- endif -%}"""

JSON = """\
{{- bos_token -}}
{%- for message in messages -%}
{{ {'role': message.role, 'text': message.content} | tojson(ensure_ascii=False, indent=1) }}
{{- '\n' -}}
{%- if loop.index > 40 -%}{%- break -%}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '{"role": "assistant", "text": ' }}{%- endif -%}"""

# name -> (template, BOS, EOS)
FAMILIES = {
    "chatml": (CHATML, None, "<|im_end|>"),
    "with_system": (WITH_SYSTEM, None, "<|im_end|>"),
    "with_tools": (WITH_TOOLS, None, "<|im_end|>"),
    "headers": (HEADERS, "<|begin_of_text|>", "<|eot_id|>"),
    "instruct": (INSTRUCT, "<s>", "</s>"),
    "turns": (TURNS, "<bos>", "<end_of_turn>"),
    "bars": (BARS, None, "<|end|>"),
    "thinking": (THINKING, "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"),
    "plain": (PLAIN, "<s>", "</s>"),
    "json": (JSON, "<s>", "</s>"),
}


def byte_level(special=SPECIAL, tags=("<think>", "</think>")):
    """A byte-level tokenizer: special tokens first, then tags as ordinary added tokens."""
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400,
        show_progress=False,
        special_tokens=list(special),
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    )
    backend.train_from_iterator(["the answer of this is that 1 + 2 = 3 and so on"], trainer)
    backend.add_tokens([tokenizers.AddedToken(tag, normalized=False) for tag in tags])
    return backend


def write_folder(path, template=None, bos=None, eos="<|endoftext|>", backend=None, **settings):
    """tokenizer.json and tokenizer_config.json in a new folder."""
    path.mkdir(parents=True, exist_ok=True)
    (backend or byte_level()).save(str(path / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": eos, **settings}
    if bos:
        config["bos_token"] = bos
    if template:
        config["chat_template"] = template
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    return path


def write_family(path, name, **settings):
    template, bos, eos = FAMILIES[name]
    return write_folder(path, template, bos, eos, **settings)
