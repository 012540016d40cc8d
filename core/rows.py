"""Rows of a data file, and what is in them: docs/data.md has the table of accepted shapes.

    each_row(path) -> ("file:line", row)
    understand(row) -> Reading(turns, plain, answer, tools, columns) | None

A row is understood whole or refused: what would change its meaning is read or refused, and the
caller says which other columns were not used. Null columns are absent columns.
"""

import ast
import json
import math
import re
import warnings
from collections import Counter
from collections.abc import Collection, Iterator
from decimal import Decimal
from pathlib import Path
from typing import NamedTuple

from core import chat, files, hub
from core.errors import UserError

# Columns by what they mean, the first that a row has counts; a dot goes into a nested object
CONVERSATION = ("messages", "conversations", "conversation")
PROMPT = ("prompt", "question", "problem", "query", "instruction", "input", "extra_info.question")
ABOUT = ("input", "context")  # what an instruction is about
SYSTEM = ("system", "system_prompt")
RESPONSE = (
    "response",
    "completion",
    "solution",
    "output",
    "target",
    "generated_solution",
    "r1_solution_1",
    "extra_info.answer",
)
THOUGHTS = {  # thinking in one column: the column of what was said after it
    "thinking": "final",
    "thinking_trajectories": "attempt",
    "deepseek_thinking_trajectory": "deepseek_attempt",
}
GOLD = (
    "answer",
    "reward_model.ground_truth",
    "ground_truth",
    "gold",
    "final_answer",
    "expected_answer",
    "solution",
)
LONG_TEXT = 20  # words; a longer text that boxes nothing is a solution, not a gold answer
KEYS = {"role", "content", "tool_calls", "tool_call_id", "name", *chat.REASONING}  # of a message
HARMLESS = {"id", "_id", "idx", "index", "uuid", "__index_level_0__"}
# Columns that would change what a row means, and that nothing here can render
UNKNOWN = ("image", "images", "video", "videos", "audio", "audios", "documents", "functions")
CHOICES = ("choices", "options")  # must be written in the question too
SWITCHES = {"on", "off", "yes", "no", "true", "false"}  # in `reasoning`: whether, not what
MESSAGES_AS_TEXT = re.compile(r"""\s*\[\s*\{\s*['"](?:role|content|from|value)['"]\s*:""")
AT_ONCE = 1000  # rows that are read from Parquet, or tokenized, at once


class Reading(NamedTuple):
    """A row as it was understood."""

    turns: list[dict]  # the conversation up to the answer
    plain: bool  # its last turn was a bare string
    answer: dict | None  # the assistant's message behind it: what SFT trains
    tools: list[dict] | None
    columns: set[str]  # the columns that were read

    @property
    def question(self) -> str:
        """The text of the last turn."""
        return self.turns[-1].get("content", "") if self.turns else ""

    @property
    def asks_nothing(self) -> bool:
        """Is the last user turn empty, or is there none?"""
        asked = [turn for turn in self.turns if turn["role"] == "user"]
        return not asked or not asked[-1].get("content", "").strip()

    @property
    def answers_nothing(self) -> bool:
        """Is there no answer, or one without text and calls?"""
        answer = self.answer or {}
        return not answer.get("content", "").strip() and "tool_calls" not in answer


# ------------------------------------------------------------------------------------------ files
def read_rows(path: str | Path) -> list[dict]:
    """Rows of a .jsonl or .parquet file (Parquet needs pyarrow). Errors name file and line."""
    return [row for _, row in each_row(path)]


def each_row(path: str | Path) -> Iterator[tuple[str, dict]]:
    """("file:line", row) of each row; blank lines count as lines, not as rows.

    path: a .jsonl or .parquet file or, where there is no such path, data of the hub by its name.
    """
    for file in files_of(path):
        yield from _rows_of_file(file)


def files_of(path: str | Path) -> list[Path]:
    """The files that each_row() reads."""
    if Path(path).is_file():
        return [Path(path)]
    if hub.DATA_NAME.fullmatch(str(path)) and not Path(path).exists():
        return hub.data_files(path)
    raise UserError(
        f"{path}: no such file; give a .jsonl or .parquet file, or OWNER/NAME:CONFIG/SPLIT "
        "of the hub"
    )


def count_rows(file: Path) -> int:
    """The rows of a file, for a progress bar: blank lines count, as nothing is parsed."""
    if file.suffix == ".parquet":
        return _open_parquet(file).metadata.num_rows
    with open(file, "rb", buffering=0) as lines:
        return sum(block.count(b"\n") for block in iter(lambda: lines.read(2**20), b""))


def _rows_of_file(path: Path) -> Iterator[tuple[str, dict]]:
    if path.suffix == ".parquet":
        rows = enumerate(_parquet_rows(path), 1)
    else:
        rows = zip(_line_numbers(path), files.read_jsonl(path, make_object=_object))
    n = 0
    for n, row in rows:
        if not isinstance(row, dict):
            raise UserError(
                f"{path}:{n}: a {type(row).__name__}, not an object; "
                "each line must be one JSON object"
            )
        yield f"{path}:{n}", row
    if n == 0:
        raise UserError(f"{path}: no rows; each line must be one JSON object")


def _line_numbers(path: Path) -> Iterator[int]:
    with open(path, "rb") as lines:
        for n, line in enumerate(lines, 1):
            if line.strip():
                yield n


def _object(pairs: list[tuple]) -> dict:
    """A JSON object; a key that is written twice is refused, as one of its values would be lost."""
    row = dict(pairs)
    if len(row) < len(pairs):
        keys = Counter([key for key, _ in pairs])
        twice = [key for key, n in keys.items() if n > 1]
        raise UserError(f"the key {twice[0]!r} is written twice; rename or remove one of them")
    return row


def _open_parquet(path: Path):
    try:
        import pyarrow.parquet
    except ImportError:
        raise UserError(
            f"{path}: reading Parquet needs pyarrow; "
            "pip install pyarrow, or convert the file to JSONL"
        ) from None
    try:
        file = pyarrow.parquet.ParquetFile(path)
    except pyarrow.ArrowInvalid as error:
        raise UserError(f"{path}: not a Parquet file ({str(error)[:80]}); copy it again") from None
    for name, n in Counter(file.schema_arrow.names).items():
        if n > 1:
            raise UserError(f"{path}: {n} columns are named {name!r}; rename or remove one of them")
    return file


def _parquet_rows(path: Path) -> Iterator[dict]:
    for batch in _open_parquet(path).iter_batches(AT_ONCE):
        yield from batch.to_pylist()


# ---------------------------------------------------------------------------------------- columns
def find(row: dict, names: tuple[str, ...]) -> tuple[str, object]:
    """(column, value) of the first of these columns that the row has; ("", None) without one."""
    for name in names:
        value = row
        for part in name.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        if value is not None:
            return name.split(".")[0], value
    return "", None


def text(value, column: str) -> str:
    """The value, if it is text. Raises UserError naming column and type otherwise."""
    if not isinstance(value, str):
        raise UserError(
            f"{column} is a {type(value).__name__} ({str(value)[:40]}), not text; "
            "convert it, or remove the row"
        )
    if MESSAGES_AS_TEXT.match(value):
        raise UserError(f"{column} is a conversation as text; parse it to a list of messages")
    return value


def understand(row: dict, answer_is_gold: bool = False) -> Reading | None:
    """What is asked and what is answered; None for a row that asks nothing.

    answer_is_gold: the column `answer` is the gold answer of a problem, never the response.
    Raises UserError for values that are not text and for columns that cannot be rendered.
    """
    for name in UNKNOWN:
        if row.get(name):
            raise UserError(f"the column {name} cannot be read; only text is trained")
    reading = _understand(row, answer_is_gold)
    if reading is not None:
        _require_choices(row, reading)
    return reading


def _require_choices(row: dict, reading: Reading) -> None:
    """Refuse a question without the choices that stand in a column of their own."""
    column, choices = find(row, CHOICES)
    if isinstance(choices, dict):
        choices = choices.get("text", list(choices.values()))
    if not choices or not reading.turns:
        return
    listed = choices if isinstance(choices, list) else [choices]
    if not all(str(choice).strip() in reading.question for choice in listed):
        raise UserError(f"the question does not hold its {column}; write them into the question")
    reading.columns.add(column)


def _understand(row: dict, answer_is_gold: bool) -> Reading | None:
    column, conversation = find(row, CONVERSATION)
    columns = {column}
    plain = False
    if conversation:
        turns = chat.conversation(conversation)
    else:
        column, prompt = find(row, PROMPT)
        if prompt is None:  # a null prompt is an empty one, which the caller counts
            known = any(name in row for name in (*CONVERSATION, *PROMPT))
            return Reading([], False, None, None, set()) if known else None
        columns = {column}
        plain = isinstance(prompt, str)
        if plain:
            turns = _history(row, text(prompt, column), column, columns)
        else:
            turns = chat.conversation(prompt)
        if turns and turns[-1]["role"] == "assistant":
            raise UserError(f"{column} ends with an assistant's turn; move it to completion")
    answer = None
    if turns and turns[-1]["role"] == "assistant":
        answer = turns.pop()
        if not turns:
            return None
    else:
        more = _response(row, answer_is_gold, columns)
        if more:
            *between, answer = more
            turns += between
            plain = plain and not between
    _add_system(row, turns, columns)
    tools = chat.read_tools(row.get("tools"))
    columns.add("tools")
    return Reading(turns, plain, answer, tools, columns)


def _history(row: dict, prompt: str, column: str, columns: set[str]) -> list[dict]:
    """A bare prompt as turns: earlier rounds (`history`), and what the instruction is about."""
    turns = []
    history = row.get("history") or []
    for pair in history if isinstance(history, list) else [history]:
        if not isinstance(pair, (list, tuple)) or len(pair) != 2:
            raise UserError("history is not a list of [question, answer]; write it as messages")
        turns.append({"role": "user", "content": text(pair[0], "history")})
        turns.append({"role": "assistant", "content": text(pair[1], "history")})
    columns.add("history")
    for name in ABOUT:
        if row.get(name) and name != column and "instruction" in row:
            prompt = f"{prompt}\n{text(row[name], name)}".strip("\n")
            columns.add(name)
    return [*turns, {"role": "user", "content": prompt}]


def _add_system(row: dict, turns: list[dict], columns: set[str]) -> None:
    """Put the column `system` before the conversation."""
    column, system = find(row, SYSTEM)
    if not system:
        return
    columns.add(column)
    if not text(system, column).strip():
        return
    if turns and turns[0]["role"] in ("system", "developer"):
        if turns[0]["content"] != system:
            raise UserError(f"{column} and the messages' system turn differ; keep one of them")
        return
    turns.insert(0, {"role": "system", "content": system})


def _response(row: dict, answer_is_gold: bool, columns: set[str]) -> list[dict] | None:
    """The turns behind the prompt; the last is the assistant's. None for a row without them."""
    for thinking, final in THOUGHTS.items():
        if row.get(thinking) is not None and row.get(final) is not None:
            columns |= {thinking, final}
            return [_thought(_single(row[thinking]), _single(row[final]), thinking, final)]
    names = RESPONSE if answer_is_gold else (*RESPONSE, "answer")
    refused = set()
    numbers = row.get("nums") or row.get("numbers")
    if numbers or not isinstance(row.get("target"), str):  # a number to reach, not a text
        refused.add("target")
    if _repeats_gold(row, answer_is_gold):
        refused.add("solution")
    names = tuple(name for name in names if name not in refused)
    column, value = find(row, names)
    columns.add(column)
    if value is None:
        # A null response is an empty one, which the caller counts; no column at all is another row.
        empty = any(name in row for name in names)
        return [{"role": "assistant", "content": ""}] if empty else None
    value = _single(value)
    if isinstance(value, list):
        turns = chat.conversation(value)
        if turns and turns[-1]["role"] != "assistant":
            raise UserError(f"{column} ends with a {turns[-1]['role']}'s turn, not the assistant's")
        return turns or [{"role": "assistant", "content": ""}]
    answer = {"role": "assistant", "content": text(value, column)}
    column, thought = find(row, chat.REASONING)
    thought = _single(thought)
    if isinstance(thought, str) and thought.strip().lower() not in SWITCHES:
        columns.add(column)
        chat.add_thought(answer, thought)
    return [answer]


def _repeats_gold(row: dict, answer_is_gold: bool) -> bool:
    """Is the column `solution` the bare gold answer (DAPO-Math-17k-Processed), not a solution?"""
    solution = row.get("solution")
    if solution is None or isinstance(solution, (list, dict)):
        return False
    if find(row, GOLD[:-1])[0]:
        return plain_text(solution) in golds(row)[1]
    worked = "\\boxed" in str(solution) or "####" in str(solution)
    return answer_is_gold and not worked and not is_long(str(solution))


def _single(value):
    """The item of a list of one text (OlympiadBench, s1K); anything else as it is."""
    single = isinstance(value, list) and len(value) == 1 and isinstance(value[0], str)
    return value[0] if single else value


def _thought(thinking, final, *names: str) -> dict:
    """Thinking and answer in two columns as one message; a bare final answer gets its box."""
    thinking = text(thinking, names[0])
    final = text(final, names[1])
    if names[1] == "final" and "\\boxed" not in final:
        final = f"\\boxed{{{final}}}"
    return {"role": "assistant", "content": chat.tagged(thinking, final)}


def not_used(row: dict, reading: Reading) -> set[str]:
    """Names of the columns that were not read and that do not repeat what was."""
    told = {message.get("content") for message in reading.turns}
    if reading.answer:
        told.add(reading.answer.get("content"))
    names = set()
    for name, value in row.items():
        if name in reading.columns or name in HARMLESS or value in (None, "", [], {}):
            continue
        if not isinstance(value, str) or value not in told:
            names.add(name)
    for message in (*reading.turns, reading.answer or {}):
        names |= {f"{key} of a message" for key in set(message) - KEYS}
    return names


def said(reading: Reading) -> str:
    """The text of the answer."""
    return (reading.answer or {}).get("content", "")


class Notes:
    """What is to be said of a file once it is read: rows dropped, columns not used."""

    def __init__(self, path: str, reads: Collection[str] = ()):
        self.path = path
        self.ignore = {*reads, *(name.split(".")[0] for name in GOLD)}
        self.counts = Counter()
        self.examples = {}  # the first of each, where it says more
        self.columns = set()
        self.n_long = 0  # rows over the limit of tokens

    def of(self, row: dict, reading: Reading) -> None:
        self.columns |= not_used(row, reading) - self.ignore
        if "<think>" in said(reading) and "</think>" not in said(reading):
            self.count("responses that open <think> and never close it: they hold no answer")
        earlier = any(turn["role"] == "assistant" for turn in reading.turns)
        if earlier and reading.answer:
            self.count("rows with earlier assistant turns: read, the last one is trained")

    def count(self, text: str, example: str = "") -> None:
        self.counts[text] += 1
        self.examples.setdefault(text, example)

    def drop(self, why: str) -> None:
        self.count(f"rows with {why} dropped")

    def dropped(self) -> str:
        return ", ".join(f"{n} {text}" for text, n in self.counts.items() if "dropped" in text)

    def told(self) -> dict:
        """All of it as JSON."""
        return {"lines": self.lines(), "n_long": self.n_long}

    def lines(self) -> list[str]:
        told = []
        for text, n in self.counts.items():
            example = f" (the first: {self.examples[text]})" if self.examples[text] else ""
            told.append(f"{self.path}: {n} {text}{example}")
        if self.columns:
            told.append(f"{self.path}: columns not used: {', '.join(sorted(self.columns))}")
        return told

    def print(self) -> None:
        for line in self.lines():
            print(line)


# ------------------------------------------------------------------------------------------- gold
LISTED = re.compile(r"\s*[\[(]\s*\[?\s*['\"]")  # Skywork: a list as text, ["2"]
OBJECT = re.compile(r"\s*\[?\s*\{\s*['\"]\w+['\"]\s*:")  # an object as text, {"target": 98}
CONTROL = re.compile(r"[\x00-\x1f]")


def _listed(value: str):
    """The list that a text writes, as JSON or as Python does; the text where it is none."""
    for read in (json.loads, ast.literal_eval):
        for source in (value, value.replace("\\", "\\\\")):
            try:
                with warnings.catch_warnings(action="ignore"):  # "\s" is no escape of Python's
                    items = read(source)
            except (ValueError, SyntaxError):
                continue
            if not any(CONTROL.search(str(item)) for item in items):
                return list(items)  # else "\frac" was read as a form feed and "rac"
    return value


def is_long(gold: str) -> bool:
    """Is this a worked text rather than an answer?"""
    return len(gold.split()) > LONG_TEXT


def plain_text(value) -> str:
    """A number as it is written: 5.0 (an integer column with nulls, in pandas) is 5."""
    if isinstance(value, float):
        return format(Decimal(repr(value)), "f").removesuffix(".0")
    return str(value)


def golds(row: dict) -> tuple[str, list[str]]:
    """(column, texts of the gold answer, of which any counts); ("", []) without a gold column.

    Null and numbers that are none are left out. Raises UserError for objects.
    """
    column, value = find(row, GOLD)
    if value is None:
        names = [name.split(".")[0] for name in GOLD]
        return next((name for name in names if name in row), ""), []
    if isinstance(value, str) and LISTED.match(value):
        value = _listed(value)
    texts = []
    for item in value if isinstance(value, list) else [value]:
        if item is None or isinstance(item, float) and not math.isfinite(item):
            continue
        text_of_object = isinstance(item, str) and OBJECT.match(item)
        if isinstance(item, bool) or not isinstance(item, (str, int, float)) or text_of_object:
            raise UserError(
                f"the gold answer in {column} is no plain text ({type(item).__name__}: "
                f"{str(item)[:60]}); write it as text, or use a reward function of your own"
            )
        texts.append(plain_text(item))
    return column, texts
