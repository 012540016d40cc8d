"""Conversations: messages in any published spelling, and the chat template that writes them.

    conversation([{"from": "human", "value": "1 + 1"}]) -> [{"role": "user", "content": "1 + 1"}]
    Template(sources, specials).render(messages, tools) -> text, opened for the assistant's turn

A message: role, content (text), and for the assistant reasoning_content and tool_calls. Templates
run in a sandbox, with the filters and globals that transformers gives them: a downloaded template
must not reach Python.
"""

import json
import re
from collections import Counter
from datetime import datetime
from functools import cached_property
from pathlib import Path

from core.errors import UserError

ROLES = {
    "human": "user",
    "gpt": "assistant",
    "model": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "observation": "tool",
    "function": "tool",
}
KNOWN_ROLES = ("system", "developer", "user", "assistant", "tool", "ipython")
REASONING = ("reasoning_content", "reasoning", "thinking", "thought")
# What published templates write first, and what they end a text with
OPENS_TURN = re.compile(
    r"\s*(?:<s>|<bos>|<\|begin_of_text\|>)?\s*"
    r"(<\|im_start\|>|<\|start_header_id\|>|<start_of_turn>|\[INST\]|<\|user\|>|<｜User｜>)"
)
ENDS_TEXT = re.compile(
    r"(</s>|<eos>|<\|im_end\|>|<\|eot_id\|>|<\|end\|>|<\|endoftext\|>|<end_of_turn>"
    r"|<｜end▁of▁sentence｜>)\s*$"
)
PROBE = "zqzq"  # stands for a message, to see what a template writes around it


# --------------------------------------------------------------------------------------- messages
def conversation(value) -> list[dict]:
    """The messages of a conversation in one spelling. Raises UserError for what is not text."""
    if not isinstance(value, list) or not all(isinstance(message, dict) for message in value):
        raise UserError(
            f"{str(value)[:60]!r} is neither text nor messages; a prompt is one of them"
        )
    return [_message(message) for message in value]


def _message(raw: dict) -> dict:
    """One message with role and content; null keys are absent keys, as in transformers."""
    message = without_nulls(raw)
    if "from" in message and "role" in message:
        raise UserError("a message with both from and role; keep one of them")
    if "from" in message:
        message = {"role": message.pop("from"), "content": message.pop("value", None), **message}
    role = str(message.get("role", "")).lower()
    message["role"] = ROLES.get(role, role)
    if message["role"] not in KNOWN_ROLES:
        raise UserError(f"a message with role {role!r}; roles are {', '.join(KNOWN_ROLES)}")
    if "function_call" in message:
        raise UserError("a message with function_call; write it as tool_calls")
    calls = message.pop("tool_calls", None)
    if calls:
        message["tool_calls"] = [_call(call) for call in calls]
    message["content"] = text_of(message.get("content"))
    if message["content"] is None:
        del message["content"]
        if not calls and message["role"] != "assistant":
            raise UserError("a message without text as its content; each needs {role, content}")
    thoughts = [message[key] for key in REASONING if message.get(key)]
    if not all(isinstance(thought, str) for thought in thoughts):
        raise UserError(f"a message whose thinking is not text ({str(thoughts[0])[:60]})")
    thoughts = set(thoughts)
    if len(thoughts) > 1:
        raise UserError(f"a message with different thoughts in {REASONING}; keep one of them")
    if thoughts:
        add_thought(message, thoughts.pop())
    return message


def add_thought(message: dict, thought: str) -> None:
    """Give a message its thinking, under the names where templates look for it.

    Raises UserError where the content holds other thinking.
    """
    content = message.get("content", "")
    if "</think>" not in content:
        message["reasoning_content"] = message["thinking"] = thought
        return
    if thought.strip() not in content:
        raise UserError("the response holds other thinking than its own column; keep one of them")
    for key in REASONING:
        message.pop(key, None)


def text_of(content) -> str | None:
    """A message's content as text; of a list of parts, {"type": "text"}, their texts joined."""
    if content is None or isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise UserError(
            f"a message without text as its content ({type(content).__name__}); "
            "each needs {role, content}"
        )
    texts = []
    for part in content:
        text = part.get("text") if isinstance(part, dict) else part
        if not isinstance(text, str):
            raise UserError(
                f"a message without text as its content ({str(part)[:60]}); only text is trained"
            )
        texts.append(text)
    return "".join(texts)


def without_nulls(value):
    """The value without keys that are null: Parquet gives every struct every key."""
    if isinstance(value, dict):
        return {key: without_nulls(part) for key, part in value.items() if part is not None}
    if isinstance(value, list):
        return [without_nulls(part) for part in value]
    return value


def _call(call: dict) -> dict:
    """A tool call; arguments that are JSON text (OpenAI) become the object that templates want."""
    function = call.get("function", call) if isinstance(call, dict) else {}
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise UserError(f"a tool call without a name ({str(call)[:60]}); write {{name, arguments}}")
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except json.JSONDecodeError:
            raise UserError(
                f"tool call {function['name']}: arguments are not JSON ({arguments[:60]!r})"
            ) from None
    function = {**function, "arguments": arguments}
    return {**call, "function": function} if "function" in call else function


def call_names(messages: list[dict]) -> list[str]:
    """Names of the functions that these messages call."""
    names = []
    for message in messages:
        for call in message.get("tool_calls", ()):
            names.append(call.get("function", call)["name"])
    return names


def read_tools(value) -> list[dict] | None:
    """The definitions in a `tools` column, which may be JSON text; None where there are none."""
    if isinstance(value, str) and value.strip():
        try:
            value = json.loads(value)
        except json.JSONDecodeError:
            raise UserError(f"tools is not JSON ({value[:60]!r}); write a list") from None
    if not value:
        return None
    if not isinstance(value, list):
        raise UserError(f"tools is a {type(value).__name__}; write a list of objects")
    tools = []
    for tool in value:
        if isinstance(tool, str):
            tools += read_tools(f"[{tool}]") or []
        elif isinstance(tool, dict):
            tools.append(without_nulls(tool))
        else:
            raise UserError(f"a tool that is no object ({str(tool)[:60]})")
    return tools


# ---------------------------------------------------------------------------------------- template
def template_sources(folder: Path, settings: dict) -> dict[str, str]:
    """{name: source} of a folder's chat templates, from every file where transformers looks."""
    sources = {}
    if (folder / "chat_template.jinja").exists():
        sources["default"] = (folder / "chat_template.jinja").read_text(encoding="utf-8")
    for path in sorted(folder.glob("additional_chat_templates/*.jinja")):
        sources[path.stem] = path.read_text(encoding="utf-8")
    if sources:
        return sources
    source = settings.get("chat_template")
    if isinstance(source, list):
        return {template["name"]: template["template"] for template in source}
    return {"default": source} if source else {}


class Template:
    """A folder's chat templates: "default", and perhaps "tool_use" for rows with tools."""

    def __init__(self, sources: dict[str, str], specials: dict[str, str]):
        self.sources = sources
        self.specials = specials
        self._compiled = {}

    def render(self, messages: list[dict], tools: list[dict] | None = None, opened=True) -> str:
        """The conversation as text. opened: the assistant's turn begins at its end.

        Raises UserError where the template fails, leaves out a tool or a call.
        """
        name = "tool_use" if tools and "tool_use" in self.sources else "default"
        if name not in self.sources:
            name = next(iter(self.sources))
        text = self._write(name, messages, tools, opened)
        if tools and text == self._write(name, messages, None, opened):
            raise UserError(
                "the chat template does not write the tools; take a model whose template knows "
                "tools, or rows without them"
            )
        names = Counter(call_names(messages))
        if names:
            bare = [{"content": "", **message} for message in messages]
            for message in bare:
                message.pop("tool_calls", None)
            bare_text = self._write(name, bare, tools, opened)
        for function, n_calls in names.items():
            name_of_call = re.compile(rf"(?<!\w){re.escape(function)}(?!\w)")
            n_written = len(name_of_call.findall(text)) - len(name_of_call.findall(bare_text))
            if n_written < n_calls:
                raise UserError(
                    f"the chat template does not write the call of {function!r}; take a model "
                    "whose template knows tools, or rows without them"
                )
        return text

    def _write(self, name: str, messages: list[dict], tools: list[dict] | None, opened) -> str:
        import jinja2

        if name not in self._compiled:
            self._compiled[name] = compile_template(self.sources[name])
        try:
            return self._compiled[name].render(
                messages=messages,
                tools=tools,
                documents=None,
                add_generation_prompt=opened,
                **self.specials,
            )
        except (jinja2.TemplateError, TypeError, ValueError, LookupError, AttributeError) as error:
            raise UserError(
                f"chat template failed: {str(error)[:200]}; check tokenizer_config.json's "
                "chat_template and the messages' roles"
            ) from None

    def answer(self, messages: list[dict], answer: dict, tools: list[dict] | None = None) -> str:
        """The assistant's turn as the template writes it behind the opened prompt, without its end.

        Raises UserError where the template leaves out a call. Thinking that the template leaves
        out, or writes elsewhere, stands before the content in <think> tags.
        """
        content = answer.get("content", "")
        thought = answer.get("reasoning_content", "")
        if not thought and "tool_calls" not in answer:
            return content
        prompt = self.render(messages, tools)
        whole = self.render([*messages, answer], tools, opened=False)
        for before in (prompt, prompt.rstrip().removesuffix("<think>")):
            turn = whole.removeprefix(before).rstrip().removesuffix(self.end_of_turn)
            start = turn.rfind(content.strip())
            # With calls and no text, the calls are what stands behind the thinking
            head = turn[:start] if content.strip() else turn
            written = start >= 0 and thought.strip() in head
            if whole.startswith(before) and written:
                return turn
        if "tool_calls" in answer:
            raise UserError(
                "the chat template does not write the answer with its tool_calls behind the "
                "prompt; take another template, or rows without tool_calls"
            )
        return tagged(thought, content)

    @cached_property
    def around(self) -> tuple[str, str]:
        """What the template writes before and behind a user's message that opens a conversation."""
        text = self.render([{"role": "user", "content": PROBE}])
        before, _, behind = text.partition(PROBE)
        return before, behind

    @cached_property
    def end_of_turn(self) -> str:
        """What the template writes behind an assistant's message, "<|im_end|>"."""
        turns = [{"role": "user", "content": "1"}, {"role": "assistant", "content": PROBE}]
        return self.render(turns, opened=False).rpartition(PROBE)[2].strip()

    def is_rendered(self, prompt: str, special_tokens: list[str]) -> bool:
        """Is a prompt text already in this template?

        Raises UserError where it holds the template's own markers but no assistant's turn opens.
        """
        before, behind = (text.strip() for text in self.around)
        bos = self.specials.get("bos_token", "")
        start = before.removeprefix(bos).strip()
        begins = start and prompt.removeprefix(bos).strip().startswith(start)
        if begins and behind and behind in prompt:
            return True
        for token in special_tokens:
            if token not in before + behind or token not in prompt:
                continue
            if behind not in prompt:
                raise UserError(
                    f"the prompt holds the chat template's own {token!r} but does not open the "
                    "assistant's turn; give the plain question, or messages"
                )
            return True
        return False

    def with_bos(self, rendered: str) -> str:
        """A prompt that came rendered, with the BOS that the template would have written."""
        bos = self.specials.get("bos_token", "")
        if bos and self.around[0].startswith(bos) and not rendered.startswith(bos):
            return bos + rendered
        return rendered


def tagged(thought: str, content: str) -> str:
    """Thinking and answer in one text, as R1 writes them and verify.py reads them."""
    return f"<think>\n{thought.strip()}\n</think>\n\n{content}" if thought else content


def compile_template(source: str):
    """Compile a chat template with the filters, globals and tags that transformers gives it."""
    import jinja2
    import jinja2.sandbox

    def raise_exception(message):
        raise jinja2.TemplateError(message)

    def strftime_now(form):
        return datetime.now().strftime(form)

    def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        return json.dumps(
            value,
            ensure_ascii=ensure_ascii,
            indent=indent,
            separators=separators,
            sort_keys=sort_keys,
        )

    def as_if(tag: re.Match) -> str:
        return f"{{%{tag[1]} {'endif' if tag[2] else 'if true'} {tag[3]}%}}"

    # {% generation %} only marks the assistant's text for masks, which are made by position here.
    source = re.sub(r"\{%(-?)\s*(end)?generation\s*(-?)%\}", as_if, source)
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = strftime_now
    try:
        return environment.from_string(source)
    except jinja2.TemplateError as error:
        raise UserError(
            f"chat template does not compile: {error}; "
            "mend tokenizer_config.json's chat_template or remove it"
        ) from None
