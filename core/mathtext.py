r"""Mathematical text -> tokens in one spelling: the first step of reading an answer.

    tokenize(r"\dfrac12 x²")  ->  ["\\frac", "12", "x", "^", "{", "2", "}"]

Tokens: numbers (with their separators), single letters, \commands, brackets, operators, and "words"
in double quotes. LaTeX, plain text and Unicode become one spelling; fonts, sizes, colours and
spaces disappear.
Letters: a run of bare letters is a product of variables where a sign of mathematics stands beside
it. An item that is nothing but letters (three or more, or a short English word) is a word: dog is
not god, xy is yx.
Work is bounded before it is done: MAX_CHARS characters, MAX_TOKENS tokens.
"""

from __future__ import annotations

import re
import unicodedata

from core.mathunits import NUMERALS, measure, scale

MAX_CHARS = 2500
MAX_TOKENS = 1000  # a list of 400 numbers; the longest of 38,463 labelled answers has 126


class Unread(ArithmeticError):
    """The text has no value that can be computed within the bounds."""


def table(text: str) -> dict[str, str]:
    """'value alias alias; value alias' -> {alias: value}, the value being its own alias too."""
    found = {}
    for group in text.split(";"):
        names = group.split()
        found |= dict.fromkeys(names, names[0])
    return found


FUNCTIONS = set(
    "sin cos tan cot sec csc arcsin arccos arctan sinh cosh tanh exp ln log max min gcd lcm".split()
)
ALSO_UNITS = {"sec", "min"}
LETTERS = set(
    "alpha beta gamma delta epsilon varepsilon zeta eta theta kappa lambda mu nu xi rho sigma tau "
    "phi varphi chi psi omega Gamma Delta Theta Lambda Sigma Phi Psi Omega hbar ell pi infty "
    "emptyset".split()
)

# -------------------------------------------------------------------------------- spelling
NOTHING = (
    r"$ ~ \( \) \[ \] \, \; \: \! \/ \left \right \middle \quad \qquad \limits \displaystyle "
    r"\textstyle \scriptstyle \scriptscriptstyle \bf \rm \it \sf \tt \cal \boldmath \tiny \small "
    r"\normalsize \large \Large \LARGE \huge \Huge \big \Big \bigg \Bigg \bigl \bigr \Bigl \Bigr "
    r"\biggl \biggr \Biggl \Biggr \bigm \Bigm"
)
SAME = table(
    r"\frac \dfrac \tfrac \cfrac \sfrac \nicefrac; \binom \dbinom \tbinom; "
    r"* \cdot \times \ast \cdotp; / \div; ^ **; ' \prime; "
    r"<= \le \leq \leqslant; < \lt; > \gt; >= \ge \geq \geqslant; != \ne \neq; = \equiv; "
    r"in \in; ≈ \approx; ± \pm; ∓ \mp; ∪ \cup; ∩ \cap; \setminus \backslash \smallsetminus; "
    r"| \vert \lvert \rvert \mid; ( \langle; ) \rangle; : \colon; \{ \lbrace; \} \rbrace; "
    r"° \degree; \emptyset \varnothing; \arcsin \asin; \arccos \acos; \arctan \atan; "
    r"\mod \pmod \bmod"
)
SPELLING = dict.fromkeys(NOTHING.split(), "") | SAME
SPELLING |= {"\\ ": "", "\\%": '"%"', "%": '"%"', "\\$": "$$", ";": ",", "\\pounds": "££"}

UNICODE = {
    ord(character): f" {text} "
    for character, text in zip(
        "π√∛∞∈∅×·⋅∙∗÷∕⁄≤≥≠≈±∓∪∩∖θαβγδελμρστφψωΔΓΣΩ",
        r"\pi \sqrt \sqrt[3] \infty \in \emptyset * * * * * / / / \le \ge \ne \approx \pm \mp \cup "
        r"\cap \setminus \theta \alpha \beta \gamma \delta \epsilon \lambda \mu \rho \sigma \tau "
        r"\phi \psi \omega \Delta \Gamma \Sigma \Omega".split(),
    )
}
UNICODE |= dict.fromkeys(map(ord, "‐‑‒–—−﹣－"), "-")
UNICODE |= dict.fromkeys(map(ord, "’′ʹ"), "'")
UNICODE |= dict.fromkeys(map(ord, "“”″"), '"')
UNICODE |= dict.fromkeys(map(ord, "\u200b\u200c\u200d\u2060\ufeff\u00ad"), "")
UNICODE |= {ord("ℝ"): r"\mathbb{R}", ord("。"): ".", ord("∣"): "|", ord("⟨"): "(", ord("⟩"): ")"}
RAISED = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻⁽⁾ⁿ", "0123456789+-()n")
LOWERED = str.maketrans("₀₁₂₃₄₅₆₇₈₉", "0123456789")
RAISED_RUN = re.compile("[⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻⁽⁾ⁿ]+")
LOWERED_RUN = re.compile("[₀-₉]+")
VULGAR = re.compile("[¼-¾⅐-⅞]")  # one half, two thirds ... as one character


def in_ascii(text: str) -> str:
    """Superscripts, fractions, Greek letters, full-width forms and signs of Unicode -> LaTeX."""
    text = RAISED_RUN.sub(lambda run: "^{" + run[0].translate(RAISED) + "}", text)
    text = LOWERED_RUN.sub(lambda run: "_{" + run[0].translate(LOWERED) + "}", text)
    fraction = lambda found: (
        r"\frac{%s}{%s}" % tuple(unicodedata.normalize("NFKC", found[0]).split("⁄"))
    )
    text = VULGAR.sub(fraction, text).translate(UNICODE)
    text = unicodedata.normalize("NFKC", text)
    if len(text) > 2 * MAX_CHARS:
        raise Unread("too long")
    return text


REWRITES = (
    (
        r"\\begin\s*\{[pbB]?(?:small)?matrix\*?\}|\\begin\s*\{array\}\s*(?:\{[^{}]*\})?",
        r" \begin ",
    ),
    (r"\\end\s*\{(?:[pbB]?(?:small)?matrix\*?|array)\}", r" \end "),
    (r"\\\\\[\w+\]", r" \\ "),
    (r"\^\s*\{?\s*\\circ\s*\}?\s*C\b", '"celsius"'),
    (r"\^\s*\{?\s*\\circ\s*\}?\s*F\b", '"fahrenheit"'),
    (r"\^\s*\{?\s*\\circ\s*\}?", "°"),
    (r"\\[hv]?phantom\s*(?:\{[^{}]*\}|.)", ""),
    (r"\\(?:text)?color\s*\{[^{}]*\}", ""),
    (r"\\mathbb\s*\{?R\}?|\\R(?![A-Za-z])|\\Reals?\b", r"(-\infty,\infty)"),
    (r"(?<=\d)\s*[xX]\s*(?=10\s*\^)", "*"),  # 4.5 x 10^3
)
MODULO = re.compile(r"\(\s*mod\s+(?=[^()]*\))")  # 3 (mod 7)
REWRITE = re.compile(r"(?=[\\^xX ])(?:(%s))" % ")|(".join(pattern for pattern, _ in REWRITES))
PHRASES = (
    (
        re.compile(r"\b(?:the set of )?(?:all|any) reals?(?: (?:numbers?|values?))?\b", re.I),
        r"(-\\infty,\\infty)",
    ),
    (
        re.compile(r"\bno (?:real )?solutions?(?: exists?)?\b|\b(?:the )?empty set\b", re.I),
        r"\\emptyset ",
    ),
    (re.compile(r"\bdne\b", re.I), "does not exist"),
)

# 52_8, (52)_{8}, 152A_{11}
BASE = (
    r"(?:\(\s*\d+\s*\)|\d+)\s*_\s*(?:\{\s*\d+\s*\}|\d+)"
    r"|\(?[A-F]*\d[0-9A-F]*\)?\s*_\s*\{?1[1-6]\}?"
)
REPEATING = r"\d*\.\d*\\(?:overline|bar|dot)\s*(?:\{\s*\d+\s*\}|\d)"  # 0.8\overline{3}
# 1{,}000  1,\!000  1\,000
GROUPS = r"(?<![\d.])\d{1,3}(?:(?:\{,\}|,\s*\\!\s*|\\[,;: !]|~%s)\d{3})+(?!\d)(?:\.\d+)?"


def token_pattern(comma: str) -> re.Pattern:
    """comma: what else may stand between the groups of three digits of one number."""
    parts = (
        REPEATING,
        BASE,
        GROUPS % comma,
        r"(?:\d+(?:\.\d+)?|\.\d+)(?:[eE][+-]?\d+)?",
        r'"[^"]*"',
        r"\\[A-Za-z]+|\\.",
        r"\s*[A-Za-z]+",
        r"[<>!]=|!+|\.+|\*\*|&&|\S",
    )
    return re.compile("|".join(parts))


TOKENS_OF_LISTS = token_pattern("")  # in brackets 1,234 is two items
TOKENS = token_pattern(r"|,|\s")  # elsewhere it is one number


# ----------------------------------------------------------------------------------- words
TEXT = re.compile(
    r"\\(text(?:bf|it|rm|tt|sf|sc|up|normal)?|[mh]box|math(?:rm|bf|it|sf|tt|normal)|emph"
    r"|operatorname\*?|boldsymbol|bm|pmb|underline)\s*\{([^{}]*)\}"
)
WORD = re.compile(r"[A-Za-z][A-Za-z./'-]*[A-Za-z/]|[^\s.]")
SPACING = re.compile(r"(?:\s|~|\\[,;:! ])+$")
JOINS = {"and": "&&", "or": ","}


def words(match: re.Match) -> str:
    r"""\text{...} -> its words in quotes, "and" as && and "or" as a comma.

    A known unit after a value is one word; text that holds mathematics stays as it is.
    """
    kind, body = match.groups()
    unit = body.replace("~", " ").strip()
    start = match.start()
    before = SPACING.sub("", match.string[max(0, start - 9) : start])[-1:]
    if before and (before.isdigit() or before in "})") and measure(unit):
        return f' "{unit}" '
    if any(c.isdigit() or c in "\\^_+=<>" for c in body):
        return f" {body} "
    out = []
    for word in WORD.findall(unit):
        lower = word.lower()
        if lower in JOINS:
            out.append(JOINS[lower])
        elif word in LETTERS or (word in FUNCTIONS and word not in ALSO_UNITS):
            out.append("\\" + word)
        elif kind.startswith("operatorname") and "\\" + word in SPELLING:
            out.append("\\" + word)
        elif not word[0].isalpha() or len(word) == 1:
            out.append(word)  # \mathrm{e} is a number
        else:
            out.append(f'"{word}"')
    return f" {' '.join(out)} "


# an item of a list that is nothing but letters and spaces
ITEM = re.compile(
    r"(?:(?<=[,;(\[$])|(?<=\\\{)|(?<=\A))\s*([A-Za-z]+(?: [A-Za-z]+)*)\s*(?=[,;)\]$]|\\\}|\.?\Z)"
)
LETTERS_APART = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{2}|[A-Za-z] [A-Za-z]")
WORDS = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{3}")
SHORT_WORDS = set("no on so in is it to go do up at he me we us am my by be if of".split())
SPLIT = re.compile(r"\b(and|or)\b")


def item_words(match: re.Match) -> str:
    """Letters alone -> a word in quotes, unless they are the name of a function, a letter or a
    number."""
    out = []
    for part in SPLIT.split(match[1]):
        item = part.strip()
        first = item.split(" ")[0] if item else ""
        letters_alone = len(item.replace(" ", "")) > 2 or item.lower() in SHORT_WORDS
        named = first in FUNCTIONS or first in LETTERS or first in ("sqrt", "infinity", "inf")
        if item in JOINS:
            out.append(JOINS[item])
        elif letters_alone and not named and first.lower() not in NUMERALS:
            out.append(f'"{item}"')
        else:
            out.append(item)
    return f" {' '.join(out)} "


def letters(run: str, before: str) -> list[str]:
    """A run of bare letters -> function, constant, word, or a product of variables: sin, pi,
    apples, xy."""
    word = run.strip()
    lower = word.lower()
    apart = run[0].isspace() or before[-1:] not in set(")}]0123456789")
    if lower in JOINS and len(before) > 0:
        return [JOINS[lower]]
    if word in ("infinity", "inf"):
        return ["\\infty"]
    if word in FUNCTIONS or word == "sqrt" or (word in LETTERS and word not in ("xi", "nu", "mu")):
        return ["\\" + word]
    if word == "mod":
        return ["\\mod"]
    unit = len(word) > 1 and (
        measure(lower) is not None or lower in NUMERALS or scale(lower) is not None
    )
    if apart and (len(word) > 3 or unit) or word in ("cm", "mm", "km", "kg"):
        return [f'"{word}"']
    return list(word)


PLAIN_UNIT = re.compile(r"(?<=\d) ([A-Za-z]+/[A-Za-z]+(?:\^?\{?[23]\}?)?)\.?$")  # 60 m/s
HYPHEN = re.compile(
    r"\b(?:twen|thir|for|fif|six|seven|eigh|nine)ty-(?:%s)\b" % "|".join(list(NUMERALS)[1:10]),
    re.IGNORECASE,
)


def plain_unit(match: re.Match) -> str:
    return f' "{match[1]}"' if measure(match[1]) else match[0]


def tokenize(text: str, thousands: bool = True) -> list[str]:
    """LaTeX or plain text -> tokens in one spelling. thousands: 1,234 outside brackets is one
    number."""
    if len(text) > MAX_CHARS:
        raise Unread("too long")
    if text.isascii() and text.isdigit():
        return [text]
    if not text.isascii():
        text = in_ascii(text)
    text = " ".join(text.split())  # long gaps would slow the patterns
    if not text.isdigit():
        text = without_words(text)
    in_brackets = "(" in text or "[" in text or "\\{" in text
    pattern = TOKENS if thousands and not in_brackets else TOKENS_OF_LISTS
    tokens: list[str] = []
    for raw in pattern.findall(text):
        token = SPELLING.get(raw, raw)
        if token[-1:].isalpha() and token[0] != "\\" and raw != "\\in":
            tokens += letters(token, tokens[-1] if tokens else "")
        elif token:
            tokens.append(token)
    while tokens and tokens[-1] in (".", ",", ":", "\\"):
        tokens.pop()
    if tokens and tokens[0] == "=":
        tokens.pop(0)
    if len(tokens) > MAX_TOKENS:
        raise Unread("too many tokens")
    return tokens


def without_words(text: str) -> str:
    """Words in quotes, phrases as signs, environments and units in one spelling."""
    if WORDS.search(text):
        for pattern, sign in PHRASES:
            text = pattern.sub(sign, text)
        text = HYPHEN.sub(lambda found: str(NUMERALS[found[0].lower()]), text)
    if "\\" in text:
        for _ in range(4):  # \text{\textbf{}} a few levels deep
            text, found = TEXT.subn(words, text)
            if not found:
                break
    text = REWRITE.sub(lambda match: REWRITES[match.lastindex - 1][1], text)
    if "mod " in text:
        text = MODULO.sub(r"\\mod (", text)
    if "/" in text:
        text = PLAIN_UNIT.sub(plain_unit, text)
    return ITEM.sub(item_words, text.strip()) if LETTERS_APART.search(text) else text
