"""From rows to token ids, masks and batches.

    row -> (prompt ids, response ids)   the response and its EOS are trained, nothing else
    rows -> Example (SFT) | Problem (RL, evaluation)
    plan: which rows make the batch of a step, from (number of rows, seed, position) alone
    deal: that batch in micro-batches of similar length under a token budget (core/packing.py)

Choices: 1) Prompt and response are tokenized separately, joined as ids, so the response's ids never
depend on the prompt and the mask is a position. `joint_mismatch` counts what that changes.
2) The response ends with the tokenizer's EOS, which is trained: a model that never learns to stop
is the classic silent fault.
3) Examples over the limit are dropped and counted, never cut: a cut example teaches not to stop.
4) One permutation of the data follows the other, so the last rows of an epoch are never dropped.
5) A prompt that is a string gets INSTRUCTION appended where the model has a chat template and
nothing mentions \\boxed; a prompt given as messages stays as it is.
6) Of a conversation the last assistant turn is trained; the turns before it are read.
7) Columns that are not used are named at load, rows that teach nothing are dropped and counted.

docs/data.md has a table of the shapes that rows may have (core/rows.py reads them).
Shapes: B rows, T tokens.
"""

import hashlib
import itertools
from array import array
from collections.abc import Callable, Collection, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch

import verify
from core import cache, chat, console, files, rows
from core import tokenizer as tokenizer_file
from core.cache import Example, Rows
from core.errors import UserError
from core.golds import find_golds, prompt_text
from core.packing import cut, deal, hold_out, padding, plan
from core.rows import Reading, read_rows
from core.tokenizer import Tokenizer

# The scripts use these as data.Tokenizer, data.plan ...
__all__ = ["Tokenizer", "cut", "deal", "hold_out", "padding", "plan", "prompt_text", "read_rows"]

INSTRUCTION = "Please reason step by step, and put your final answer within \\boxed{}."
# What decides the ids of a row: a fork that edits one of these files tokenizes its rows again
CODE = (__file__, rows.__file__, chat.__file__, tokenizer_file.__file__, cache.__file__)


class Problem(NamedTuple):
    """One problem to sample responses for."""

    text: str  # the question, for the logs
    prompt: list[int]  # what the model reads
    gold: str  # the right answer, or several with " | " between them; "" if a reward needs none
    row: dict  # the data row as read, all of its columns: what a reward function gets
    expert: list[int] | None  # a demonstration; its last id is EOS
    opened: str  # start of the response that the prompt already holds ("<think>")


# ------------------------------------------------------------------------------------------- rows
def _note_golds(row: dict, golds: list[str], notes: rows.Notes) -> None:
    """Count gold answers that look like a wrong column: long texts, columns that disagree."""
    column = rows.golds(row)[0]
    if any(rows.is_long(gold) for gold in golds):
        notes.count(
            f"rows whose gold answer (column {column}) has over {rows.LONG_TEXT} words, which no "
            "answer will equal: name the column that holds the bare answer `answer`"
        )
    others = {name: value for name, value in row.items() if name != column}
    other, texts = rows.golds(others)
    if other == "solution" and not any("\\boxed" in text or "####" in text for text in texts):
        return
    other_golds = find_golds(others)
    pairs = itertools.product(golds, other_golds)
    if other_golds and not any(a == b or verify.is_equivalent(a, b) for a, b in pairs):
        notes.count(
            f"rows whose gold answers differ: {column} counts, not {other}",
            f"{golds[0][:40]!r} and {other_golds[0][:40]!r}",
        )


def _prompt(reading: Reading, tokenizer: Tokenizer) -> tuple[str, bool]:
    """(prompt text, start), in the chat template if there is one; start: encode() may add a BOS."""
    turns = reading.turns
    template = tokenizer.template
    tokenizer.refuse_rendered(turns, reading.plain, rows.said(reading))
    if template is None:
        if reading.tools or chat.call_names(turns):
            raise UserError("tools need a chat template, and the model's folder has none")
        if reading.plain and len(turns) == 1:
            return reading.question, True
        return "\n".join(turn.get("content", "") for turn in turns) + "\n", True
    if reading.plain and template.is_rendered(reading.question, tokenizer.special_tokens):
        if len(turns) > 1 or reading.tools:
            raise UserError(
                "the prompt is in the chat template already, so that system, history and tools "
                "cannot be added; give the plain question"
            )
        return template.with_bos(reading.question), False
    if reading.plain and not any("\\boxed" in turn.get("content", "") for turn in turns):
        question = {"role": "user", "content": f"{reading.question}\n{INSTRUCTION}"}
        turns = [*turns[:-1], question]
    return template.render(turns, reading.tools), False  # the template writes its own BOS


def _response(reading: Reading, prompt: str, tokenizer: Tokenizer, notes: rows.Notes) -> str:
    """The response after a prompt: thinking and tool calls as the template writes them.

    Where the prompt ends with <think>, the response drops its own <think> and always has </think>.
    """
    answer = reading.answer
    if tokenizer.template:
        response = tokenizer.template.answer(reading.turns, answer, reading.tools)
    elif "tool_calls" in answer:
        raise UserError("tool_calls need a chat template, and the model's folder has none")
    else:
        response = chat.tagged(answer.get("reasoning_content", ""), answer["content"])
    response = tokenizer.without_end(response)
    content = tokenizer.without_end(answer.get("content", ""))
    for marker in tokenizer.markers:
        if marker in content:
            raise UserError(f"the response holds {marker!r}, which ends or opens a turn; remove it")
    if not _opened(prompt):
        return response
    if response.lstrip().startswith("<think>"):
        response = response.lstrip().removeprefix("<think>")
        return response.lstrip("\n") if prompt.endswith("\n") else response
    if "</think>" in response:
        return response
    notes.count("responses without thinking, behind <think>: closed by an empty one")
    return f"\n</think>\n\n{response}"


def _opened(prompt: str) -> str:
    """The start of the response that a rendered prompt already holds."""
    return "<think>" if prompt.rstrip().endswith("<think>") else ""


def _texts(reading: Reading, tokenizer: Tokenizer, notes: rows.Notes) -> list[tuple[str, bool]]:
    """Prompt and response as the model reads them, each as (text, start) for encode."""
    prompt, start = _prompt(reading, tokenizer)
    return [(prompt, start), (_response(reading, prompt, tokenizer, notes), False)]


def _tokenized(
    source: Iterator, tokenizer: Tokenizer, texts_of: Callable
) -> Iterator[tuple[tuple, list, list[list[int]]]]:
    """(facts, texts, their ids) of each row, tokenized many rows at a time.

    source: (place in the file, row) pairs. texts_of(row) -> (facts, [(text, start), ...]), facts
    passed on as they are, [] to drop the row. A UserError of it is raised again with the place.
    """
    while batch := list(itertools.islice(source, rows.AT_ONCE)):
        found = []
        for place, row in batch:
            try:
                found.append(texts_of(row))
                for text, _ in found[-1][1]:
                    text.encode()  # raises where the text is not valid Unicode
            except UserError as error:
                raise UserError(f"{place}: {error}") from None
            except UnicodeEncodeError as error:
                raise UserError(f"{place}: {error.reason} (half of a character)") from None
        together = itertools.chain.from_iterable(texts for _, texts in found)
        ids = iter(tokenizer.encode(list(together)))
        for facts, texts in found:
            if texts:
                yield facts, texts, [next(ids) for _ in texts]


# ------------------------------------------------------------------------- examples and problems
def _example_texts(row: dict, tokenizer: Tokenizer, notes: rows.Notes) -> list[tuple[str, bool]]:
    """The texts of an SFT row: prompt and response, or one plain text; [] where it is dropped."""
    reading = rows.understand(row)
    if reading is None or reading.answer is None:
        if "text" in row:
            notes.of(row, Reading([], False, None, None, {"text"}))
            text = tokenizer.without_end(rows.text(row["text"] or "", "text"))
            if text.strip():
                return [(text, True)]
            notes.drop("an empty text")
            return []
        if reading is None or reading.turns:  # else an empty conversation, dropped below
            raise UserError(
                "no prompt and response; a row needs messages, prompt and response, or text "
                f"(found: {sorted(row)})"
            )
    notes.of(row, reading)
    if reading.asks_nothing:
        notes.drop("an empty prompt")
        return []
    if reading.answers_nothing:
        notes.drop("an empty response")
        return []
    return _texts(reading, tokenizer, notes)


def sft_examples(
    path: str,
    tokenizer: Tokenizer,
    max_len: int,
    reads: Collection[str] = (),
    folder: Path | None = None,
) -> tuple[Rows, int]:
    """(examples, number dropped as longer than max_len tokens) of an SFT file.

    reads: columns that a reward reads, so that no note calls them unused. folder: where the ids
    are kept for the next start (core/cache.py); None: in temporary files of this process.
    """
    notes = rows.Notes(path, reads)
    found = _examples(path, tokenizer, max_len, notes)  # nothing is read yet
    facts = {
        "files": [files.identity(file) for file in rows.files_of(path)],
        "tokenizer": tokenizer.fingerprint(),
        "code": files.fingerprint(CODE),
        "max_len": max_len,
        "reads": sorted(reads),
        "typecode": "H" if tokenizer.vocab_size <= 2**16 else "i",
    }
    examples, told = cache.keep(folder, facts, found, notes.told)
    for line in told["lines"]:
        print(line)
    return examples, told["n_long"]


def _examples(
    path: str, tokenizer: Tokenizer, max_len: int, notes: rows.Notes
) -> Iterator[tuple[Example, int]]:
    """Each example with the key of its prompt; what is dropped is counted in notes."""
    n_rows = sum(map(rows.count_rows, rows.files_of(path)))
    source = console.show_rows(rows.each_row(path), n_rows, f"tokenizing {path}")

    def texts_of(row):
        return (), _example_texts(row, tokenizer, notes)

    n_kept = 0
    for _, _, ids in _tokenized(source, tokenizer, texts_of):
        prompt, response = ids if len(ids) == 2 else (ids[0][:1], ids[0][1:])  # else plain text
        example = Example(prompt, [*response, tokenizer.eos])
        if len(example.prompt) + len(example.response) > max_len:
            notes.n_long += 1
        elif not prompt or not response:
            notes.drop("no tokens in prompt or response")
        else:
            n_kept += 1
            yield example, cache.prompt_key(example)
    if not n_kept:
        why = f"{notes.n_long} longer than {max_len} tokens; raise --max-len"
        raise UserError(f"{notes.path}: no example left: {notes.dropped() or why}")


def joint_mismatch(path: str, tokenizer: Tokenizer, limit: int = 500) -> float:
    """% of the first rows whose ids would differ if prompt and response were tokenized together."""
    notes = rows.Notes(path)
    n_rows = 0
    n_differ = 0
    for _, row in itertools.islice(rows.each_row(path), limit):
        texts = _example_texts(row, tokenizer, notes)
        if len(texts) != 2:
            continue
        (prompt, start), (response, _) = texts
        joint, first, second = tokenizer.encode([(prompt + response, start), *texts])
        n_differ += joint != first + second
        n_rows += 1
    return 100 * n_differ / max(1, n_rows)


def _problem_texts(row, tokenizer, notes: rows.Notes, needs_gold: bool) -> tuple[tuple, list]:
    """((row, question, gold), texts) of a problem; texts are its prompt and its demonstration.

    Without a demonstration texts is the prompt alone; [] drops the row.
    """
    reading = rows.understand(row, answer_is_gold=True)
    try:
        golds = find_golds(row)
    except UserError:  # an object, which a reward of one's own may read
        if needs_gold:
            raise
        golds = []
    if reading is None or needs_gold and not golds and not rows.golds(row)[0]:
        missing = "prompt" if reading is None else "answer"
        raise UserError(f'no "{missing}"; a problem needs prompt and answer (found: {sorted(row)})')
    notes.of(row, reading)
    texts = []
    if reading.asks_nothing:
        notes.drop("an empty prompt")
    elif needs_gold and not golds:
        notes.drop("no answer in their gold column (empty, null, proof)")
    elif reading.answers_nothing:
        texts = [_prompt(reading, tokenizer)]
    else:
        texts = _texts(reading, tokenizer, notes)
    if texts and needs_gold:
        _note_golds(row, golds, notes)
    return (row, reading.question, " | ".join(golds)), texts


def problem(row: dict, tokenizer: Tokenizer) -> Problem:
    """The problem of one row in hand; a gold answer may be missing, a demonstration is not read."""
    (_, question, gold), texts = _problem_texts(row, tokenizer, rows.Notes("a row"), False)
    if not texts:
        raise UserError("the prompt is empty; write a question")
    (ids,) = tokenizer.encode(texts[:1])
    return Problem(question, ids, gold, row, None, _opened(texts[0][0]))


def problems(
    path: str,
    tokenizer: Tokenizer,
    max_prompt: int,
    needs_gold: bool = True,
    reads: Collection[str] = (),
    check: Callable | None = None,
    most: int = 0,
) -> tuple[list[Problem], int]:
    """(problems, number dropped as longer than max_prompt tokens) of an RL or evaluation file.

    needs_gold: each row must have a gold answer that is text, which verify.py needs; other rewards
    may read any gold or none. reads: columns that the reward reads, so that no note calls them
    unused. check: raises UserError for a row that the reward cannot read. most: keep only the first
    `most` problems with a demonstration, though all rows are read and counted; 0 = keep all.
    """
    notes = rows.Notes(path, reads)
    found = []
    prompt_keys = array("Q")
    n_long = 0

    def texts_of(row):
        if check:
            check(row)
        return _problem_texts(row, tokenizer, notes, needs_gold)

    for facts, texts, (ids, *expert) in _tokenized(rows.each_row(path), tokenizer, texts_of):
        row, question, gold = facts
        opened = _opened(texts[0][0])
        if len(ids) > max_prompt:
            n_long += 1
        elif not ids:
            notes.drop("no tokens in their prompt")
        else:
            demonstration = [*expert[0], tokenizer.eos] if expert else None
            problem = Problem(question, ids, gold, row, demonstration, opened)
            prompt_keys.append(cache.prompt_key(problem))
            if not most or demonstration and len(found) < most:
                found.append(problem)
    if not prompt_keys:
        why = f"{n_long} prompts over {max_prompt} tokens; raise --max-prompt (sft.py: --max-len)"
        raise UserError(f"{path}: no problem left: {notes.dropped() or why}")
    notes.print()
    n_distinct = len(set(prompt_keys))
    if n_distinct < len(prompt_keys):
        print(f"{path}: {len(prompt_keys)} problems, {n_distinct} distinct prompts")
    return found, n_long


# ---------------------------------------------------------------------------------------- batches
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

    No rows: one row of padding that trains nothing, for a rank that only joins the collectives.
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
    """(indices of rows, ids (b, T), mask (b, T)) of each micro-batch of this rank. All ranks get
    the same number; one with too few rows gets ([], a row that trains nothing) for the rest."""
    lengths = [len(row.prompt) + len(row.response) for row in rows]
    for part in deal(lengths, budget, rank, world):
        ids, mask = collate([rows[i] for i in part])
        yield part, ids, mask


def drop_long_experts(problems: list[Problem], most: int) -> tuple[list[Problem], int]:
    """(the problems, demonstrations of more than `most` tokens removed; how many were removed)."""
    long = [bool(problem.expert) and len(problem.expert) > most for problem in problems]
    kept = [
        problem._replace(expert=None) if cut else problem for problem, cut in zip(problems, long)
    ]
    return kept, sum(long)


def digest(rows: list) -> str:
    """A short hash of the ids of examples or problems: the same rows, the same hash."""
    ids = []
    for row in rows:
        response = row.response if isinstance(row, Example) else row.gold
        ids.append((tuple(row.prompt), tuple(response)))
    return hashlib.sha256(repr(ids).encode()).hexdigest()[:16]
