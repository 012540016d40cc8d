"""A model folder's tokenizer and chat template: text to ids, ids to text, messages to text.

Shapes: ids are plain lists of int. Nothing here knows what the text is about.
Templates run in a sandbox, as transformers runs them: a downloaded template must not reach Python.
"""

import json
import os
import re
import shutil
from datetime import datetime
from pathlib import Path

from core import files
from core.errors import UserError

# The tokenizers package warns in every forked worker unless the variable is set before its import.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
import tokenizers

# What a checkpoint needs beside its weights to load in transformers and vLLM
FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
    "generation_config.json",
)
SPECIAL = ("bos_token", "eos_token", "pad_token", "unk_token")


class Tokenizer:
    """Text to ids and back. A trained response ends with `eos`; sampling stops at any of `eos_ids`.

    Raises UserError for a folder without tokenizer.json, without an end-of-text token or with a
    file that is not JSON.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        path = self.folder / "tokenizer.json"
        if not path.exists():
            raise UserError(
                f"{folder}: no tokenizer.json; save the tokenizer beside the model "
                "(transformers: tokenizer.save_pretrained)"
            )
        self.backend = tokenizers.Tokenizer.from_file(str(path))
        self.backend.no_padding()
        self.backend.no_truncation()
        settings = read_json(self.folder / "tokenizer_config.json")
        self.specials = {}
        for name in SPECIAL:
            token = settings.get(name)
            if token:
                self.specials[name] = token["content"] if isinstance(token, dict) else token
        self.vocab_size = self.backend.get_vocab_size()
        self.eos, self.eos_ids = self._end_of_text()
        self.template_source = template_source(self.folder, settings)
        self._template = None  # compiled at its first use

    def _end_of_text(self) -> tuple[int, list[int]]:
        """(the id that ends a trained response, all ids at which sampling stops)."""
        ids = []
        for name in ("generation_config.json", "config.json"):
            found = read_json(self.folder / name).get("eos_token_id")
            if found is not None:
                ids += found if isinstance(found, list) else [found]
        eos = self.backend.token_to_id(self.specials.get("eos_token", ""))
        if eos is None and ids:
            eos = ids[0]
        if eos is None:
            raise UserError(
                f"{self.folder}: no end-of-text token; set eos_token in tokenizer_config.json "
                "or eos_token_id in generation_config.json"
            )
        return eos, sorted({eos, *ids})

    def save(self, folder: str | Path) -> None:
        """Copy the tokenizer's files, so that a checkpoint loads by itself."""
        folder = Path(folder)
        for name in FILES:
            if (self.folder / name).exists() and self.folder != folder:
                shutil.copy2(self.folder / name, folder)
        if not (folder / "generation_config.json").exists():
            files.write_json(folder / "generation_config.json", {"eos_token_id": self.eos_ids})

    def encode(self, texts: list[tuple[str, bool]]) -> list[list[int]]:
        """Ids of many (text, start), on all cores.

        start: the text opens the sequence, so the tokenizer's own BOS is added where it has one.
        """
        ids = [[] for _ in texts]
        for start in (False, True):
            places = [i for i, (_, opens) in enumerate(texts) if opens == start]
            found = self.backend.encode_batch_fast(
                [texts[i][0] for i in places], add_special_tokens=start
            )
            for i, encoding in zip(places, found):
                ids[i] = encoding.ids
        return ids

    def decode(self, ids: list[int]) -> str:
        """Text of ids, without special tokens and without ids that the tokenizer lacks."""
        return self.backend.decode([i for i in ids if i < self.vocab_size])

    def render(self, messages: list[dict]) -> str:
        """The conversation in the folder's chat template, opened for the assistant's turn."""
        import jinja2

        if self._template is None:
            self._template = compile_template(self.template_source)
        try:
            return self._template.render(
                messages=messages, add_generation_prompt=True, **self.specials
            )
        except jinja2.TemplateError as error:
            raise UserError(
                f"chat template failed: {error}; check tokenizer_config.json's chat_template "
                "and the messages' roles"
            ) from None


def read_json(path: Path) -> dict:
    """The object in a JSON file; {} where there is no such file."""
    if not path.exists():
        return {}
    try:
        return json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise UserError(
            f"{path}: not JSON ({error.msg} at line {error.lineno}); "
            "restore the file from the original model"
        ) from None


def template_source(folder: Path, settings: dict) -> str | None:
    """chat_template.jinja, or tokenizer_config.json's template (of several the "default" one)."""
    if (folder / "chat_template.jinja").exists():
        return (folder / "chat_template.jinja").read_text()
    source = settings.get("chat_template")
    if not isinstance(source, list):
        return source
    named = {template["name"]: template["template"] for template in source}
    return named.get("default", next(iter(named.values()), None))


def compile_template(source: str):
    """Compile a chat template with the filters, globals and tags that transformers gives it."""
    import jinja2
    import jinja2.sandbox

    def raise_exception(message):
        raise jinja2.TemplateError(message)

    def strftime_now(form):
        return datetime.now().strftime(form)

    def tojson(value, indent=None):
        return json.dumps(value, ensure_ascii=False, indent=indent)

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
