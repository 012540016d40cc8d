"""From rows to token ids, masks and batches.

    row -> (prompt ids, response ids)   the response and its EOS are trained, nothing else
    rows -> Example (SFT) | Problem (RL, evaluation)
    plan: which rows make the batch of step s, from (number of rows, seed, position) alone
    cut:  that batch in micro-batches of like length under a token budget

Choices: 1) Prompt and response are tokenized apart and joined as ids, so the response's ids never
depend on the prompt and the mask is a position. `joint_mismatch` counts what that changes.
2) The response ends with the tokenizer's EOS, which is trained: a model that never learns to stop
is the classic silent fault.
3) Examples over the limit are dropped and counted, never cut: a cut example teaches not to stop.
4) One permutation of the data follows the other, so the last rows of an epoch are never dropped.
5) A prompt that is a string gets INSTRUCTION appended where the model has a chat template and the
prompt does not mention \\boxed; a prompt given as messages stays as it is.

Columns (aliases in PROMPT, RESPONSE, GOLD; dots go into nested objects):
    SFT       {"messages": [..., {"role": "assistant"}]}  or  {"prompt", "response"}
              or {"prompt", "thinking", "final"} (R1 style)  or  {"text"} (trained from token 2 on)
    problems  {"prompt", "answer"}, optional "response" (the expert's demonstration)
Shapes: B rows, T tokens.
"""

import hashlib
import itertools
import math
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import torch

import verify
from core import files, ranks
from core.errors import UserError
from core.tokenizer import Tokenizer

PROMPT = ("prompt", "question", "problem", "query", "instruction", "extra_info.question")
RESPONSE = ("response", "completion", "solution", "output", "target", "extra_info.answer")
GOLD = ("answer", "reward_model.ground_truth", "ground_truth", "gold", "final_answer", "solution")
INSTRUCTION = "Please reason step by step, and put your final answer within \\boxed{}."
ROWS = 1000  # rows that are read and tokenized at once


class Example(NamedTuple):
    """One training row: `prompt` is read, `response` is trained; its last id is EOS."""

    prompt: Sequence[int]
    response: Sequence[int]


class Problem(NamedTuple):
    """One problem to sample responses for."""

    text: str  # the question, for the logs
    prompt: list[int]  # what the model reads
    gold: str  # the right answer
    row: dict  # the data row as read, all of its columns: what a reward function gets
    expert: list[int] | None  # a demonstration; its last id is EOS
    opened: str  # start of the response that the prompt already holds ("<think>")


# ------------------------------------------------------------------------------------------- rows
def read_rows(path: str | Path) -> list[dict]:
    """Rows of a .jsonl or .parquet file (Parquet needs pyarrow). Errors name file and line."""
    return [row for _, row in _each_row(path)]


def _each_row(path: str | Path) -> Iterator[tuple[str, dict]]:
    """("file:line", row) of each row."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file; give a .jsonl or .parquet file")
    rows = _parquet_rows(path) if path.suffix == ".parquet" else files.read_jsonl(path)
    n = 0
    for n, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise UserError(
                f"{path}:{n}: a {type(row).__name__}, not an object; "
                "each line must be one JSON object"
            )
        yield f"{path}:{n}", row
    if n == 0:
        raise UserError(f"{path}: no rows; each line must be one JSON object")


def _parquet_rows(path: Path) -> Iterator[dict]:
    try:
        import pyarrow.parquet
    except ImportError:
        raise UserError(
            f"{path}: reading Parquet needs pyarrow; "
            "pip install pyarrow, or convert the file to JSONL"
        ) from None
    for batch in pyarrow.parquet.ParquetFile(path).iter_batches(ROWS):
        yield from batch.to_pylist()


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
    """What the model is asked: the conversation up to its last answer, or a prompt column."""
    messages = _messages(row.get("messages") or [])
    if messages and messages[-1].get("role") == "assistant":
        messages = messages[:-1]
        return messages or None
    if messages:
        return messages
    prompt = _find(row, PROMPT)
    if isinstance(prompt, str) and "instruction" in row and row.get("input"):
        return f"{prompt}\n{row['input']}"  # Alpaca: what the instruction is about
    return prompt


def _pair(row: dict) -> tuple[str | list[dict], str] | None:
    """(prompt, response) of an SFT row in any of the accepted spellings, or None."""
    messages = _messages(row.get("messages") or [])
    if messages and messages[-1].get("role") == "assistant":
        content = messages[-1].get("content")
        return (messages[:-1], content) if isinstance(content, str) else None
    prompt = _question(row)
    response = _find(row, RESPONSE)
    if response is None and "thinking" in row and "final" in row:  # R1 style, in two columns
        final = str(row["final"])
        if "\\boxed" not in final:
            final = f"\\boxed{{{final}}}"
        response = f"<think>\n{row['thinking']}\n</think>\n\n{final}"
    if response is None:
        response = row.get("answer")
    if isinstance(response, list):  # TRL: a list of messages
        response = response[-1]["content"] if response else None
    if prompt is None or response is None:
        return None
    return prompt, str(response)


def prompt_text(row: dict) -> str | None:
    """The question of a row in any accepted spelling: the last message of a conversation."""
    prompt = _question(row)
    if isinstance(prompt, list) and prompt:
        return prompt[-1]["content"]
    return prompt or None


def gold_of(row: dict) -> str:
    """The right answer of a row; of a worked solution its last box, or what follows ####."""
    gold = str(_find(row, GOLD))
    return verify.boxed(gold) or gold.split("####")[-1].strip()


# ------------------------------------------------------------------------- examples and problems
def _prompt(prompt: str | list[dict], tokenizer: Tokenizer) -> tuple[str, bool]:
    """A prompt as (text, start) for encode: in the chat template, or as it stands without one."""
    turns = [] if isinstance(prompt, str) else _messages(prompt)
    if not all(isinstance(message.get("content"), str) for message in turns):
        raise UserError("a message without text as its content; each needs {role, content}")
    if tokenizer.template_source is None:
        if isinstance(prompt, str):
            return prompt, True
        return "\n".join(message["content"] for message in prompt) + "\n", True
    if isinstance(prompt, str):
        if "\\boxed" not in prompt:
            prompt = f"{prompt}\n{INSTRUCTION}"
        prompt = [{"role": "user", "content": prompt}]
    return tokenizer.render(prompt), False  # the template writes its own BOS


def _opened(prompt: str) -> str:
    """The start of the response that a rendered prompt already holds."""
    return "<think>" if prompt.rstrip().endswith("<think>") else ""


def _texts(pair: tuple[str | list[dict], str], tokenizer: Tokenizer) -> list[tuple[str, bool]]:
    """Prompt and response as the model reads them, each as (text, start) for encode."""
    prompt, response = pair
    text, start = _prompt(prompt, tokenizer)
    if _opened(text) and response.lstrip().startswith("<think>"):  # the prompt opened it already
        response = response.lstrip().removeprefix("<think>")
        if text.endswith("\n"):
            response = response.lstrip("\n")
    return [(text, start), (response, False)]


def _tokenized(
    path: str, tokenizer: Tokenizer, texts_of: Callable
) -> Iterator[tuple[dict, list, list[list[int]]]]:
    """(row, its texts, their ids) of each row, tokenized ROWS rows at a time.

    texts_of(row) -> [(text, start), ...]; what it refuses is raised with file and line.
    """
    rows = _each_row(path)
    while batch := list(itertools.islice(rows, ROWS)):
        texts = []
        for place, row in batch:
            try:
                texts.append(texts_of(row))
            except UserError as error:
                raise UserError(f"{place}: {error}") from None
        ids = iter(tokenizer.encode(list(itertools.chain(*texts))))
        for (_, row), own in zip(batch, texts):
            yield row, own, [next(ids) for _ in own]


def sft_examples(path: str, tokenizer: Tokenizer, max_len: int) -> tuple[list[Example], int]:
    """(examples, number dropped as longer than max_len tokens) of an SFT file."""

    def texts_of(row):
        pair = _pair(row)
        if pair:
            return _texts(pair, tokenizer)
        if isinstance(row.get("text"), str):
            return [(row["text"], True)]
        raise UserError(
            "no prompt and response; a row needs messages, prompt and response, or text "
            f"(found: {sorted(row)})"
        )

    examples = []
    n_long = 0
    for _, _, ids in _tokenized(path, tokenizer, texts_of):
        prompt, response = ids if len(ids) == 2 else (ids[0][:1], ids[0][1:])
        # An array takes a ninth of a list's memory.
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


def joint_mismatch(path: str, tokenizer: Tokenizer, limit: int = 500) -> float:
    """% of the first rows whose ids would differ if prompt and response were tokenized as one."""
    n_rows = 0
    n_differ = 0
    for _, row in itertools.islice(_each_row(path), limit):
        pair = _pair(row)
        if pair is None:
            continue
        (prompt, start), (response, _) = texts = _texts(pair, tokenizer)
        joint, first, second = tokenizer.encode([(prompt + response, start), *texts])
        n_differ += joint != first + second
        n_rows += 1
    return 100 * n_differ / max(1, n_rows)


def problems(path: str, tokenizer: Tokenizer, max_prompt: int) -> tuple[list[Problem], int]:
    """(problems, number dropped as longer than max_prompt tokens) of an RL or evaluation file."""

    def texts_of(row):
        prompt = _question(row)
        if prompt is None or _find(row, GOLD) is None:
            missing = "prompt" if prompt is None else "answer"
            raise UserError(
                f'no "{missing}"; a problem needs prompt and answer (found: {sorted(row)})'
            )
        # The column "answer" is the gold here, never the demonstration.
        pair = _pair({name: value for name, value in row.items() if name != "answer"})
        return _texts(pair, tokenizer) if pair else [_prompt(prompt, tokenizer)]

    found = []
    n_long = 0
    n_empty = 0
    for row, ((text, _), *_), (ids, *expert) in _tokenized(path, tokenizer, texts_of):
        gold = gold_of(row)
        if not gold:
            n_empty += 1  # an empty box would earn the reward
        elif len(ids) > max_prompt:
            n_long += 1
        else:
            demonstration = [*expert[0], tokenizer.eos] if expert else None
            question = prompt_text(row) or ""
            found.append(Problem(question, ids, gold, row, demonstration, _opened(text)))
    if n_empty:
        print(f"{path}: {n_empty} rows with an empty answer dropped")
    if not found:
        raise UserError(
            f"{path}: no problem left, {n_long} prompts are over {max_prompt} tokens; "
            "raise --max-prompt (sft.py: --max-len)"
        )
    return found, n_long


# ---------------------------------------------------------------------------------------- batches
def plan(n: int, seed: int, start: int, count: int) -> list[int]:
    """`count` row numbers from position `start` of the endless stream: permutations of range(n)."""
    picked = []
    while len(picked) < count:
        epoch, offset = divmod(start + len(picked), n)
        missing = count - len(picked)
        picked += _permutation(n, seed, epoch)[offset : offset + missing].tolist()
    return picked


@lru_cache(maxsize=2)  # a million rows take longer to shuffle than a small step to train
def _permutation(n: int, seed: int, epoch: int) -> torch.Tensor:
    return torch.randperm(n, generator=ranks.generator(seed, "epoch", epoch))


def cut(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Cut rows into micro-batches of at most `budget` tokens, padding included.

    Returns lists of indices into `lengths`, the longest rows first; a row over the budget gets a
    micro-batch of its own. Of all ways to cut the rows in order of length this is the cheapest,
    where a micro-batch costs its tokens and a 64th of the budget besides, as many small ones cost
    time too. On geometric lengths 1 to 5% is padding.
    """
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    cost = [0.0] + [math.inf] * len(order)  # of the first n rows
    first = [0] * (len(order) + 1)  # where the last micro-batch of the first n rows begins
    for i, row in enumerate(order):
        width = lengths[row]
        most = min(max(1, budget // width), len(order) - i)
        for n in range(1, most + 1):
            total = cost[i] + n * width + budget / 64
            if total < cost[i + n]:
                cost[i + n] = total
                first[i + n] = i
    batches = []
    end = len(order)
    while end:
        batches.append(order[first[end] : end])
        end = first[end]
    return batches[::-1]


def deal(lengths: list[int], budget: int, rank: int, world: int) -> list[list[int]]:
    """The micro-batches of one of `world` processes, as lists of indices into `lengths`.

    Rows are dealt by length, there and back (0 1 2 2 1 0 ...), so that all get alike. Every
    process gets as many micro-batches, as each is a collective; the missing ones are [].
    """
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    own = []
    most = 0
    for process in range(world):
        turns = (process, 2 * world - 1 - process)
        hand = [i for n, i in enumerate(order) if n % (2 * world) in turns]
        parts = cut([lengths[i] for i in hand], budget)
        most = max(most, len(parts))
        if process == rank:
            for part in parts:
                own.append([hand[i] for i in part])
    return own + [[]] * (most - len(own))


def padding(lengths: list[int], budget: int) -> float:
    """% of the tokens of cut()'s micro-batches that are padding."""
    size = sum(len(part) * lengths[part[0]] for part in cut(lengths, budget))
    return 100 * (1 - sum(lengths) / size)


def prefetch(make: Callable, keys: Iterable) -> Iterator:
    """make(key) for each key, in order; a thread makes the next while the caller uses this one."""
    with ThreadPoolExecutor(1) as thread:
        waiting = None
        for key in keys:
            ready = waiting
            waiting = thread.submit(make, key)
            if ready is not None:
                yield ready.result()
        if waiting is not None:
            yield waiting.result()


def collate(rows: list[Example]) -> tuple[torch.Tensor, torch.Tensor]:
    """ids (B, T), padded with 0 on the right, and mask (B, T): True where a token is trained.

    No rows make one row with nothing to train, for a process that only takes part.
    """
    T = max((len(row.prompt) + len(row.response) for row in rows), default=2)
    B = max(1, len(rows))
    ids = torch.zeros(B, T, dtype=torch.long)
    mask = torch.zeros(B, T, dtype=torch.bool)
    for b, row in enumerate(rows):
        n_prompt = len(row.prompt)
        n = n_prompt + len(row.response)
        ids[b, :n] = torch.tensor([*row.prompt, *row.response])
        mask[b, n_prompt:n] = True
    return ids, mask


def micro_batches(rows: list[Example], budget: int, rank: int, world: int) -> Iterator[tuple]:
    """(indices of rows, ids (b, T), mask (b, T)) of each micro-batch of this rank. Every rank gets
    as many; one that is short of rows takes part with no index and a row that trains nothing."""
    lengths = [len(row.prompt) + len(row.response) for row in rows]
    for part in deal(lengths, budget, rank, world):
        ids, mask = collate([rows[i] for i in part])
        yield part, ids, mask


def hold_out(rows: list, most: int) -> tuple[list, list]:
    """(rows to train on, rows held out: a tenth of them, at most `most`), the same ones whatever
    the seed of the run is."""
    n = min(most, max(1, len(rows) // 10))
    chosen = set(plan(len(rows), ranks.seed_of("held out"), 0, n))
    held_out = [rows[i] for i in sorted(chosen)]
    rest = [row for i, row in enumerate(rows) if i not in chosen]
    return rest or held_out, held_out


def drop_long_experts(problems: list[Problem], most: int) -> tuple[list[Problem], int]:
    """The problems, without demonstrations of more than `most` tokens; and how many those were."""
    kept = []
    n_dropped = 0
    for problem in problems:
        if problem.expert and len(problem.expert) > most:
            problem = problem._replace(expert=None)
            n_dropped += 1
        kept.append(problem)
    return kept, n_dropped


def digest(rows: list) -> str:
    """A short hash of the ids of examples or problems: the same rows, the same hash."""
    ids = []
    for row in rows:
        response = row.response if isinstance(row, Example) else row.gold
        ids.append((tuple(row.prompt), tuple(response)))
    return hashlib.sha256(repr(ids).encode()).hexdigest()[:16]
