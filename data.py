"""From JSONL to token ids, masks and batches.

    row -> (prompt ids, response ids)     the model is trained on the response and its EOS, on nothing else
    rows -> Example (SFT)  |  Problem (RL, evaluation)
    plan: which rows make the batch of optimizer step s, a pure function of (number of rows, seed, step)
    cut:  that batch in micro-batches of like length under a token budget

Choices: 1) Prompt and response are tokenized apart and joined as ids, so the response's ids never depend on the prompt
and the mask is a position, never a token value. What that loses against the joint text is counted by `joint_mismatch`.
2) The response ends with the tokenizer's EOS, which is trained: never learning to stop is the classic silent fault.
3) Over-long examples are dropped and counted, never cut: a cut example teaches not to stop.
4) One permutation of the data follows the other directly, so the last rows of an epoch are never dropped.
5) A prompt that is a string gets INSTRUCTION appended where the model has a chat template and the prompt does not
mention \\boxed; a prompt given as messages stays as it is.

Columns (aliases in brackets; dots go into nested objects):
    SFT       {"messages": [..., {"role": "assistant"}]}
              or {"prompt" [question problem ...], "response" [completion solution output ...]}
              or {"prompt", "thinking", "final"} (R1 style)  or  {"text"} (plain text, trained from its second token on)
    problems  {"prompt" [...], "answer" [reward_model.ground_truth ground_truth gold ...]},
              optional "numbers" (Countdown), "response" (the expert)
Shapes: B rows, T tokens.
"""

import itertools
import json
import math
import os
import re
import shutil
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from core import files, ranks
from core.errors import UserError

os.environ.setdefault(
    "TOKENIZERS_PARALLELISM", "true"
)  # said aloud, or it warns whenever a worker is forked
import tokenizers
import torch

import verify

PROMPT = ("prompt", "question", "problem", "query", "instruction", "extra_info.question")
RESPONSE = ("response", "completion", "solution", "output", "target", "extra_info.answer")
GOLD = ("answer", "reward_model.ground_truth", "ground_truth", "gold", "final_answer", "solution")
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
INSTRUCTION = "Please reason step by step, and put your final answer within \\boxed{}."
ROWS = 1000  # that are read and tokenized at once


class Example(NamedTuple):
    """One training row: the model reads `prompt` and is trained on `response`, whose last id is EOS."""

    prompt: Sequence[int]
    response: Sequence[int]


class Problem(NamedTuple):
    """One problem to sample answers for. `opened` = text of the answer that the prompt already holds ("<think>")."""

    text: str
    prompt: list[int]
    gold: str
    numbers: list[int] | None
    expert: list[int] | None
    opened: str


# ------------------------------------------------------------------------------------------------------------ tokenizer
class Tokenizer:
    """A model folder's tokenizer and chat template. `eos` ends what we train on; sampling stops at any of `eos_ids`."""

    def __init__(self, folder: str | Path):
        folder = self.folder = Path(folder)
        if not (folder / "tokenizer.json").exists():
            raise UserError(
                f"{folder}: no tokenizer.json; save the tokenizer beside the model "
                "(transformers: tokenizer.save_pretrained)"
            )
        self.backend = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.backend.no_padding(), self.backend.no_truncation()
        settings = _read(folder / "tokenizer_config.json")
        generation, config = _read(folder / "generation_config.json"), _read(folder / "config.json")
        self.specials = {
            k: v["content"] if isinstance(v, dict) else v
            for k, v in settings.items()
            if k in ("bos_token", "eos_token", "pad_token", "unk_token") and v
        }
        ids = [i for source in (generation, config) for i in _as_list(source.get("eos_token_id"))]
        named = self.backend.token_to_id(self.specials.get("eos_token", ""))
        self.eos = named if named is not None else (ids[0] if ids else None)
        if self.eos is None:
            raise UserError(
                f"{folder}: no end-of-text token; set eos_token in tokenizer_config.json "
                "or eos_token_id in generation_config.json"
            )
        self.eos_ids = sorted({self.eos, *ids})
        self.vocab_size = self.backend.get_vocab_size()
        self.template_source = _template(folder, settings)
        self._template = None

    def save(self, folder: str | Path) -> None:
        """Copy the tokenizer's files, so that a checkpoint loads in transformers and vLLM by itself."""
        for name in FILES:
            if (self.folder / name).exists() and self.folder != Path(folder):
                shutil.copy2(self.folder / name, folder)
        if not (Path(folder) / "generation_config.json").exists():
            files.write_json(
                Path(folder) / "generation_config.json", {"eos_token_id": self.eos_ids}
            )

    def encode(self, texts: list[tuple[str, bool]]) -> list[list[int]]:
        """Ids of many (text, start), on all cores. start: it opens the sequence, so the tokenizer's own BOS (Llama) is
        added where it has one."""
        ids = {}
        for start in (False, True):
            places = [i for i, (_, opens) in enumerate(texts) if opens == start]
            found = self.backend.encode_batch_fast(
                [texts[i][0] for i in places], add_special_tokens=start
            )
            ids |= {i: encoding.ids for i, encoding in zip(places, found)}
        return [ids[i] for i in range(len(texts))]

    def decode(self, ids: list[int]) -> str:
        """Text of ids, special tokens left out; ids beyond the tokenizer (a padded vocabulary) are left out too."""
        return self.backend.decode([i for i in ids if i < self.vocab_size])

    def render(self, messages: list[dict]) -> str:
        """The conversation in the folder's chat template, opened for the assistant's turn."""
        if self._template is None:
            self._template = _compile(self.template_source)
        import jinja2

        try:
            return self._template.render(
                messages=messages, add_generation_prompt=True, **self.specials
            )
        except jinja2.TemplateError as error:
            raise UserError(
                f"chat template failed: {error}; check tokenizer_config.json's chat_template "
                "and the messages' roles"
            ) from None

    def prompt(self, prompt: str | list[dict]) -> tuple[str, bool]:
        """A prompt as (text, start) for encode: through the chat template where there is one, else as it stands."""
        if not isinstance(prompt, str) and not all(
            isinstance(m.get("content"), str) for m in _messages(prompt)
        ):
            raise UserError("a message without text as its content; each needs {role, content}")
        if self.template_source is None:
            return prompt if isinstance(prompt, str) else "\n".join(
                m["content"] for m in prompt
            ) + "\n", True
        if isinstance(prompt, str):
            prompt = [
                {
                    "role": "user",
                    "content": prompt if "\\boxed" in prompt else f"{prompt}\n{INSTRUCTION}",
                }
            ]
        return self.render(prompt), False  # the template writes its own BOS


def _read(path: Path) -> dict:
    try:
        return json.loads(path.read_text()) if path.exists() else {}
    except json.JSONDecodeError as error:
        raise UserError(
            f"{path}: not JSON ({error.msg} at line {error.lineno}); "
            "restore the file from the original model"
        ) from None


def _as_list(value) -> list:
    return [] if value is None else list(value) if isinstance(value, list) else [value]


def _template(folder: Path, settings: dict) -> str | None:
    """The chat template's source: chat_template.jinja, or tokenizer_config.json's (the "default" one of several)."""
    if (folder / "chat_template.jinja").exists():
        return (folder / "chat_template.jinja").read_text()
    source = settings.get("chat_template")
    if isinstance(source, list):
        named = {t["name"]: t["template"] for t in source}
        source = named.get("default", next(iter(named.values()), None))
    return source


def _compile(source: str):
    """Compile a template as transformers does, in a sandbox: a downloaded template must not reach Python."""
    from datetime import datetime

    import jinja2
    import jinja2.sandbox

    def refuse(message):
        raise jinja2.TemplateError(message)

    # {% generation %} only marks the assistant's text for masks, which we make by position
    source = re.sub(
        r"\{%(-?)\s*(end)?generation\s*(-?)%\}",
        lambda m: f"{{%{m[1]} {'endif' if m[2] else 'if true'} {m[3]}%}}",
        source,
    )
    env = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    env.filters["tojson"] = lambda value, indent=None: json.dumps(
        value, ensure_ascii=False, indent=indent
    )
    env.globals |= {
        "raise_exception": refuse,
        "strftime_now": lambda form: datetime.now().strftime(form),
    }
    try:
        return env.from_string(source)
    except jinja2.TemplateError as error:
        raise UserError(
            f"chat template does not compile: {error}; "
            "mend tokenizer_config.json's chat_template or remove it"
        ) from None


# ----------------------------------------------------------------------------------------------------------------- rows
def read_rows(path: str | Path) -> list[dict]:
    """Rows of a .jsonl or .parquet file (Parquet needs pyarrow). Errors name the file and the line."""
    return [row for _, row in _each_row(path)]


def _each_row(path: str | Path) -> Iterator[tuple[str, dict]]:
    """("file:line", row) of each row."""
    path, n = Path(path), 0
    if not path.is_file():
        raise UserError(f"{path}: no such file; give a .jsonl or .parquet file")
    if path.suffix == ".parquet":
        try:
            import pyarrow.parquet
        except ImportError:
            raise UserError(
                f"{path}: reading Parquet needs pyarrow; "
                "pip install pyarrow, or convert the file to JSONL"
            ) from None
        rows = (
            row
            for batch in pyarrow.parquet.ParquetFile(path).iter_batches(ROWS)
            for row in batch.to_pylist()
        )
    else:
        rows = files.read_jsonl(path)
    for n, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise UserError(
                f"{path}:{n}: a {type(row).__name__}, not an object; each line must be one JSON object"
            )
        yield f"{path}:{n}", row
    if not n:
        raise UserError(f"{path}: no rows; each line must be one JSON object")


def _tokenized(
    path: str, tokenizer: Tokenizer, texts_of: Callable
) -> Iterator[tuple[dict, list, list[list[int]]]]:
    """(row, its texts, their ids) of each row, tokenized ROWS rows at a time. texts_of(row) -> [(text, start)]."""
    rows = _each_row(path)
    while batch := list(itertools.islice(rows, ROWS)):
        texts = []
        for place, row in batch:
            try:
                texts.append(texts_of(row))
            except ValueError as error:
                raise UserError(f"{place}: {error}") from None
        ids = iter(tokenizer.encode(list(itertools.chain(*texts))))
        for (_, row), mine in zip(batch, texts):
            yield row, mine, [next(ids) for _ in mine]


def _find(row: dict, names: tuple[str, ...]):
    """The value of the first of these columns that the row has, or None."""
    for name in names:
        value = row
        for part in name.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        if value is not None:
            return value
    return None


def _messages(value) -> list[dict]:
    """The messages of a conversation, if that is what it is."""
    if not isinstance(value, list) or not all(isinstance(message, dict) for message in value):
        raise UserError(
            f"{str(value)[:60]!r} is neither text nor messages; a prompt is one of them"
        )
    return value


def _question(row: dict) -> str | list[dict] | None:
    """What the model is asked: the conversation up to the answer that ends it, or a prompt column."""
    messages = _messages(row.get("messages") or [])
    if messages:
        return (messages[:-1] if messages[-1].get("role") == "assistant" else messages) or None
    prompt = _find(row, PROMPT)
    if (
        isinstance(prompt, str) and "instruction" in row and row.get("input")
    ):  # Alpaca: what the instruction is about
        prompt = f"{prompt}\n{row['input']}"
    return prompt


def _pair(row: dict) -> tuple[str | list[dict], str] | None:
    """(prompt, response) of an SFT row in any of the accepted spellings, or None."""
    messages = _messages(row.get("messages") or [])
    if messages and messages[-1].get("role") == "assistant":
        content = messages[-1].get("content")
        return (messages[:-1], content) if isinstance(content, str) else None
    prompt, response = _question(row), _find(row, RESPONSE)
    if response is None and "thinking" in row and "final" in row:  # R1 style, in two columns
        final = str(row["final"])
        final = final if "\\boxed" in final else f"\\boxed{{{final}}}"
        response = f"<think>\n{row['thinking']}\n</think>\n\n{final}"
    if response is None:
        response = row.get("answer")
    if isinstance(response, list):  # TRL: a list of messages
        response = response[-1]["content"] if response else None
    return None if prompt is None or response is None else (prompt, str(response))


def prompt_text(row: dict) -> str | None:
    """The problem of a row in any accepted spelling, as Problem.text has it: the last message of a conversation."""
    prompt = _question(row)
    return prompt[-1]["content"] if isinstance(prompt, list) and prompt else prompt or None


def _texts(pair: tuple[str | list[dict], str], tokenizer: Tokenizer) -> list[tuple[str, bool]]:
    """Prompt and response as the model reads them, each as (text, start) for encode."""
    text, start = tokenizer.prompt(pair[0])
    return [(text, start), (_continuation(text, pair[1]), False)]


def _opened(prompt_text: str) -> str:
    """The start of the answer that a prompt already holds: some chat templates end in <think>."""
    return "<think>" if prompt_text.rstrip().endswith("<think>") else ""


def _continuation(prompt_text: str, response: str) -> str:
    """The response without the <think> that the prompt already opened."""
    start = response.lstrip()
    if not _opened(prompt_text) or not start.startswith("<think>"):
        return response
    rest = start.removeprefix("<think>")
    return rest.lstrip("\n") if prompt_text.endswith("\n") else rest


def joint_mismatch(path: str, tokenizer: Tokenizer, limit: int = 500) -> float:
    """% of the first rows whose ids would differ if prompt and response were tokenized as one text."""
    pairs = [pair for _, row in itertools.islice(_each_row(path), limit) if (pair := _pair(row))]
    n_differ = 0
    for prompt, response in pairs:
        text, start = tokenizer.prompt(prompt)
        response = _continuation(text, response)
        joint, *apart = tokenizer.encode(
            [(text + response, start), (text, start), (response, False)]
        )
        n_differ += joint != sum(apart, [])
    return 100 * n_differ / max(1, len(pairs))


def sft_examples(path: str, tokenizer: Tokenizer, max_len: int) -> tuple[list[Example], int]:
    """(examples, number dropped as longer than max_len tokens) of an SFT file."""
    examples, n_long = [], 0

    def texts_of(row):
        pair = _pair(row)
        if pair is None and not isinstance(row.get("text"), str):
            raise UserError(
                "no prompt and response; a row needs messages, prompt and response, or text (found: "
                f"{sorted(row)})"
            )
        return _texts(pair, tokenizer) if pair else [(row["text"], True)]

    for _, _, ids in _tokenized(path, tokenizer, texts_of):
        prompt, response = ids if len(ids) == 2 else (ids[0][:1], ids[0][1:])
        # a list would take nine times the memory
        example = Example(array("i", prompt), array("i", [*response, tokenizer.eos]))
        if len(example.prompt) + len(example.response) > max_len:
            n_long += 1
        else:
            examples.append(example)
    if not examples:
        raise UserError(
            f"{path}: all {n_long} examples are longer than {max_len} tokens; raise --max-len"
        )
    return examples, n_long


def problems(path: str, tokenizer: Tokenizer, max_prompt: int) -> tuple[list[Problem], int]:
    """(problems, number dropped as longer than max_prompt tokens) of an RL or evaluation file."""
    found, n_long, n_empty = [], 0, 0

    def texts_of(row):
        prompt, pair = _question(row), _pair({k: v for k, v in row.items() if k != "answer"})
        if prompt is None or _find(row, GOLD) is None:
            missing = "prompt" if prompt is None else "answer"
            raise UserError(
                f'no "{missing}"; a problem needs prompt and answer (found: {sorted(row)})'
            )
        return _texts(pair, tokenizer) if pair else [tokenizer.prompt(prompt)]

    for row, ((text, _), *_), (ids, *expert) in _tokenized(path, tokenizer, texts_of):
        gold = str(
            _find(row, GOLD)
        )  # a worked solution: its last box, or what GSM8K writes behind ####
        gold = verify.boxed(gold) or gold.split("####")[-1].strip()
        if not gold:
            n_empty += 1  # an empty box would earn the reward
            continue
        if len(ids) > max_prompt:
            n_long += 1
        else:
            numbers = row.get(
                "numbers"
            )  # of Countdown; another data set may mean something else by it
            whole = isinstance(numbers, list) and all(isinstance(number, int) for number in numbers)
            found.append(
                Problem(
                    prompt_text(row) or "",
                    ids,
                    gold,
                    numbers if whole else None,
                    [*expert[0], tokenizer.eos] if expert else None,
                    _opened(text),
                )
            )
    if n_empty:
        print(f"{path}: {n_empty} rows with an empty answer dropped")
    if not found:
        raise UserError(
            f"{path}: no problem left, {n_long} prompts are over {max_prompt} tokens; raise --max-prompt "
            "(sft.py: --max-len)"
        )
    return found, n_long


# -------------------------------------------------------------------------------------------------------------- batches
def plan(n: int, seed: int, start: int, count: int) -> list[int]:
    """Rows number start .. start + count of the endless stream made of one permutation of range(n) after another."""
    picked = []
    while len(picked) < count:
        epoch, offset = divmod(start + len(picked), n)
        picked += _permutation(n, seed, epoch)[offset : offset + count - len(picked)].tolist()
    return picked


@lru_cache(maxsize=2)  # a million rows take longer to shuffle than a small step to train
def _permutation(n: int, seed: int, epoch: int) -> torch.Tensor:
    return torch.randperm(n, generator=ranks.generator(seed, "epoch", epoch))


def cut(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Cut rows into micro-batches of like length with at most `budget` tokens each, padding included; a row longer than
    that gets one of its own. Returns lists of indices into `lengths`, the longest rows first.

    Of all ways to cut the rows in order of length this is the cheapest, where a micro-batch costs its tokens, padding
    included, and a 64th of the budget besides: many small ones cost time too. On geometric lengths 1 to 5% is padding.
    """
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    # of the first n rows: the cost, and where their last micro-batch begins
    cost, first = [0.0] + [math.inf] * len(order), [0] * (len(order) + 1)
    for i, row in enumerate(order):
        width = lengths[row]
        for n in range(1, min(max(1, budget // width), len(order) - i) + 1):
            total = cost[i] + n * width + budget / 64
            if total < cost[i + n]:
                cost[i + n], first[i + n] = total, i
    batches, end = [], len(order)
    while end:
        batches.append(order[first[end] : end])
        end = first[end]
    return batches[::-1]


def deal(lengths: list[int], budget: int, rank: int, world: int) -> list[list[int]]:
    """cut() for one of `world` processes: rows are dealt by length, there and back (0 1 2 2 1 0 ...), so that all get
    alike. Every process has the same number of micro-batches, as each is a collective; those it is short of are []."""
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    hands = [
        [i for n, i in enumerate(order) if n % (2 * world) in (r, 2 * world - 1 - r)]
        for r in range(world)
    ]
    cuts = [
        [[hand[i] for i in part] for part in cut([lengths[i] for i in hand], budget)]
        for hand in hands
    ]
    return cuts[rank] + [[]] * (max(map(len, cuts)) - len(cuts[rank]))


def padding(lengths: list[int], budget: int) -> float:
    """% of the tokens of cut()'s micro-batches that are padding."""
    parts = [[lengths[i] for i in part] for part in cut(lengths, budget)]
    return 100 * (1 - sum(lengths) / sum(len(part) * max(part) for part in parts))


def prefetch(make: Callable, keys: Iterable) -> Iterator:
    """make(key) for each key, in order; the next one is made in a thread while the caller works with this one."""
    with ThreadPoolExecutor(1) as thread:
        waiting = None
        for key in keys:
            ready, waiting = waiting, thread.submit(make, key)
            if ready is not None:
                yield ready.result()
        if waiting is not None:
            yield waiting.result()


def collate(rows: list[Example]) -> tuple[torch.Tensor, torch.Tensor]:
    """ids (B, T), padded with 0 on the right, and mask (B, T): True where the model is trained to choose the token.
    No rows make one row of nothing to train, for a process that only takes part."""
    T = max((len(r.prompt) + len(r.response) for r in rows), default=2)
    ids, mask = (
        torch.zeros(max(1, len(rows)), T, dtype=dtype) for dtype in (torch.long, torch.bool)
    )
    for b, row in enumerate(rows):
        n_prompt, n = len(row.prompt), len(row.prompt) + len(row.response)
        ids[b, :n] = torch.tensor([*row.prompt, *row.response])
        mask[b, n_prompt:n] = True
    return ids, mask
