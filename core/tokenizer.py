"""A model folder's tokenizer: text to ids, ids to text, and its chat template (core/chat.py).

Shapes: ids are plain lists of int. Nothing here knows what the text is about.
One BOS and one EOS, whatever the folder says: `encode` adds the tokenizer's own BOS where a text
opens the sequence and lacks it, and never an EOS; the EOS behind a response is the caller's.
"""

import hashlib
import json
import os
import re
import shutil
from functools import cached_property
from pathlib import Path

from core import chat, files
from core.chat import Template, template_sources
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
# Special tokens that a verifier reads, so that decode keeps them
TAGS = re.compile(r"[<\[]/?(?:think|thinking|thought|reasoning|answer|solution)[>\]]", re.I)


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
        settings = self._settings()
        self.specials = {}
        for name, token in settings.items():
            if name.endswith("_token") and token and not isinstance(token, bool):
                self.specials[name] = token["content"] if isinstance(token, dict) else token
        self._add_tokens(settings)
        self.vocab_size = max(self.backend.get_vocab().values()) + 1  # ids may have gaps
        self.eos, self.eos_ids = self._end_of_text()
        self.eos_text = self.backend.id_to_token(self.eos)
        self._opening = self._opening_ids()
        self._hidden = set()  # special tokens that decode leaves out
        self.special_tokens = []
        for id, token in self.backend.get_added_tokens_decoder().items():
            if token.special and not TAGS.fullmatch(token.content):
                self.special_tokens.append(token.content)
                self._hidden.add(id)
        sources = template_sources(self.folder, settings)
        self.template = Template(sources, self.specials) if sources else None

    def _settings(self) -> dict:
        """tokenizer_config.json; without added tokens in it, the older files beside it count."""
        settings = read_json(self.folder / "tokenizer_config.json")
        if "added_tokens_decoder" not in settings:
            settings |= read_json(self.folder / "special_tokens_map.json")
        return settings

    def _add_tokens(self, settings: dict) -> None:
        """Tokens that other files than tokenizer.json declare, as transformers adds them."""
        declared = {}
        if "added_tokens_decoder" in settings:
            for id, fields in settings["added_tokens_decoder"].items():
                declared[int(id)] = tokenizers.AddedToken(**fields)
        else:
            for content, id in read_json(self.folder / "added_tokens.json").items():
                special = content in self.specials.values()
                declared[id] = tokenizers.AddedToken(
                    content, special=special, normalized=not special
                )
        known = {token.content for token in self.backend.get_added_tokens_decoder().values()}
        for id, token in sorted(declared.items()):
            if token.content in known and not token.special:
                continue
            self.backend.add_tokens([token])
            found = self.backend.token_to_id(token.content)
            if found != id:
                raise UserError(
                    f"{self.folder}: the token {token.content!r} is declared as id {id}, and "
                    f"tokenizer.json makes it {found}; the files are not of one model"
                )

        for name in ("additional_special_tokens", "extra_special_tokens"):
            for token in settings.get(name) or ():
                content = token["content"] if isinstance(token, dict) else token
                if self.backend.token_to_id(content) is None:
                    self.backend.add_special_tokens([content])

    def _end_of_text(self) -> tuple[int, list[int]]:
        """(the id that ends a trained response, all ids at which sampling stops)."""
        ids = []
        for name in ("generation_config.json", "config.json"):
            config = read_json(self.folder / name)
            for place in (config, config.get("text_config") or {}):
                found = place.get("eos_token_id")
                if found is not None:
                    ids += found if isinstance(found, list) else [found]
        tokens = set(self.backend.get_vocab().values())
        known = [id for id in ids if type(id) is int and id in tokens]
        eos = self.backend.token_to_id(self.specials.get("eos_token", ""))
        if eos is None and known:
            eos = known[0]
        if eos is None:
            found = f" (eos_token_id {ids} is no token of tokenizer.json)" if ids else ""
            raise UserError(
                f"{self.folder}: no end-of-text token{found}; set eos_token in "
                "tokenizer_config.json or eos_token_id in generation_config.json"
            )
        return eos, sorted({eos, *known})

    def _opening_ids(self) -> list[int]:
        """What the tokenizer's post-processor writes before a text: its BOS, or nothing."""
        added = set(self.backend.get_added_tokens_decoder())
        words = (word for word, id in self.backend.get_vocab().items() if id not in added)
        for probe in words:  # a word may be one that the normalizer removes
            found = self.backend.encode(probe)
            if 0 in found.special_tokens_mask:
                return found.ids[: found.special_tokens_mask.index(0)]
        return []

    def save(self, folder: str | Path) -> None:
        """Copy the tokenizer's files, so that a checkpoint loads by itself and stops at `eos`."""
        folder = Path(folder)
        for name in FILES:
            if (self.folder / name).exists() and self.folder != folder:
                shutil.copy2(self.folder / name, folder)
        templates = self.folder / "additional_chat_templates"
        if templates.exists() and self.folder != folder:
            shutil.copytree(templates, folder / templates.name, dirs_exist_ok=True)
        path = folder / "generation_config.json"
        settings = read_json(path)
        stops = settings.get("eos_token_id")
        stops = stops if isinstance(stops, list) else [stops]
        if self.eos not in stops:  # of what was trained, generate() would never stop
            files.write_json(path, {**settings, "eos_token_id": self.eos_ids})

    def encode(self, texts: list[tuple[str, bool]]) -> list[list[int]]:
        """Ids of many (text, start), on all cores.

        start: the text opens the sequence, so the tokenizer's own BOS is added where it has one
        and the text does not begin with it.
        """
        found = self.backend.encode_batch_fast(
            [text for text, _ in texts], add_special_tokens=False
        )
        ids = []
        for (_, start), encoding in zip(texts, found):
            own = encoding.ids
            if start and own[: len(self._opening)] != self._opening:
                own = self._opening + own
            ids.append(own)
        return ids

    def decode(self, ids: list[int]) -> str:
        """Text of ids, without special tokens (but with tags such as <think>) and unknown ids."""
        shown = [i for i in ids if i not in self._hidden]
        return self.backend.decode(shown, skip_special_tokens=False)

    def without_end(self, text: str) -> str:
        """A text without the end-of-text tokens that it ends with."""
        while self.eos_text and text.rstrip().endswith(self.eos_text):
            text = text.rstrip().removesuffix(self.eos_text)
        return text

    def refuse_rendered(self, turns: list[dict], plain: bool, answer: str) -> None:
        """Refuse texts in another model's chat template, and messages that are rendered prompts.

        plain: the last turn was a bare string, which may be in this model's template already.
        """
        asked = turns[-1].get("content", "") if turns else ""
        for marker in (chat.OPENS_TURN.match(asked), chat.ENDS_TEXT.search(answer)):
            if marker and not self.writes(marker[1]):
                raise UserError(
                    f"the text holds {marker[1]!r}, a marker of another model's chat template; "
                    "give the plain question and answer, or messages"
                )
        if self.template is None or plain:
            return
        for turn in turns:
            if self.template.is_rendered(turn.get("content", ""), self.special_tokens):
                raise UserError(
                    "a message is in the chat template already; give its text alone, or the whole "
                    "prompt as text"
                )

    def writes(self, marker: str) -> bool:
        """Is this marker of turns the model's own?"""
        if self.template is None:
            return self.backend.token_to_id(marker) is not None
        around = "".join((*self.template.around, self.template.end_of_turn))
        return marker in around + self.eos_text

    def fingerprint(self) -> str:
        """A hash of all that decides which ids a row gets."""
        sources = self.template.sources if self.template else {}
        parts = [self.backend.to_str(), self.specials, self.eos, sources, tokenizers.__version__]
        return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]

    @cached_property
    def markers(self) -> list[str]:
        """Special tokens that a response must not hold: EOS, and what the template writes."""
        written = self.eos_text + "".join(self.template.around if self.template else ())
        return [token for token in self.special_tokens if token in written]


def read_json(path: Path) -> dict:
    """The object in a JSON file; {} where there is no such file."""
    if not path.exists():
        return {}
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise UserError(
            f"{path}: not JSON ({error.msg} at line {error.lineno}); "
            "restore the file from the original model"
        ) from None
