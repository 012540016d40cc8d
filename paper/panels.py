"""The figures of a study's report, one per group of claims.

One colour per arm in all of them, labels at the lines, 90% intervals; ours and the paper's numbers
on one axis, as differences. The paper gives no intervals. Verdicts have symbols, as colours are
arms. 8 inches wide, to be read at 800 pixels."""

from __future__ import annotations

import numpy as np

from core import tables
from core.errors import UserError
from paper import figures, findings, published
from paper.results import EXACT, STARTS, Study

COLOURS = {
    "base": "#777777",
    "SFT": "#2e8b57",
    "SFT-then-RL": "#08519c",
    "RL": "#d94801",
    "mixed": "#7b3294",
    "SFT-then-mixed": "#b05fa5",
    "adaptive": "#b8860b",
    "stable": "#08519c",  # the arm SFT-then-RL
    "late": "#a50f15",
    "signal": "#1b9e9e",
    "accuracy": "#d01c8b",
    "paper": "#222222",
}
MARKS = {"holds": "o", "opposite": "X", "cannot tell": "o"}  # of a verdict; hollow: cannot tell
NO_EFFECT = "D"
GREY = "#888888"
LETTERS = {"tiny": "T", "small": "S", "middle": "M", "wide": "W", "large": "L", "dft": "D"}
DPI = 150
SMALL = 9  # points of text


def draw(study: Study, found: list[findings.Finding]) -> list[str]:
    """Write the figures; returns their names, or [] with a line on the terminal, no matplotlib."""
    try:
        pyplot = figures.load_pyplot()
    except UserError as error:
        print(f"no figures: {error}; then python -m paper.report {study.out}")
        return []
    names = []
    for name, make in FIGURES.items():
        figure = make(study, found, pyplot)
        if figure is None:
            continue
        figure.set_dpi(DPI)  # text is as wide when it is laid out as in the file
        figure.tight_layout(rect=(0, 0, 1, 0.95 if figure.legends else 1))
        figure.savefig(study.out / f"{name}.png", dpi=DPI)
        pyplot.close(figure)
        names.append(name)
    return names


def clear(axes) -> None:
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.tick_params(labelsize=SMALL)


def dot(axes, x, y, low, high, name: str, label: str = "", **style) -> None:
    """A value with its interval, upright, and its label beside it."""
    colour = COLOURS[name]
    axes.plot([x, x], [low, high], color=colour, lw=1.5)
    axes.plot(x, y, "o", ms=6, color=colour, **style)
    if label:
        offset = dict(xytext=(6, 0), textcoords="offset points", va="center")
        axes.annotate(label, (x, y), fontsize=SMALL, color=colour, **offset)


def apart(values, least: float) -> list[float]:
    """Heights of labels, in the order of the values, at least so far from each other."""
    order = np.argsort(values)
    placed = list(values)
    for before, i in zip(order, order[1:]):
        placed[i] = max(placed[i], placed[before] + least)
    return placed


# -------------------------------------------------------------------------------------- all claims
def claims_figure(study: Study, found, pyplot):
    """Every claim: its effect and interval, marked by its verdict; below, the correlations."""
    groups = []
    for margin, text in (
        (findings.MARGIN, "effect in points with its 90% interval; grey: below 1 point"),
        (findings.MARGIN_R, "minus Pearson's r with its 90% interval; grey: below 0.5"),
    ):
        shown = [f for f in found if f.margin == margin]
        if shown:
            groups.append((shown, margin, text))
    rows = [len(shown) for shown, *_ in groups]
    height = 0.43 * sum(rows) + 0.8 * len(rows)
    figure, panels = pyplot.subplots(
        len(groups), 1, figsize=(8, height), height_ratios=[n + 0.7 for n in rows], squeeze=False
    )
    for axes, (shown, margin, text) in zip(panels.flat, groups):
        verdicts_panel(axes, shown)
        axes.axvspan(0, margin, color="#e8e8e8", zorder=0)
        axes.set_xlabel(text, fontsize=SMALL)
    return figure


def verdicts_panel(axes, shown) -> None:
    """A row per claim, its verdict in words on the side that is free."""
    for i, f in enumerate(shown):
        told = f.verdict != "cannot tell"
        colour = "black" if told else GREY
        words = f.verdict if f.known else "cannot tell: nothing measured"
        edge = 0.0
        left = False
        if not np.isnan(f.effect):
            axes.plot([f.low, f.high], [i, i], color=colour, lw=2)
            face = colour if told else "white"
            style = dict(marker=MARKS.get(f.verdict, NO_EFFECT), ms=7, mfc=face)
            axes.plot(f.effect, i, color=colour, **style)
            left = f.high < 0
            edge = f.low if left else f.high
        side = dict(xytext=(-5 if left else 5, 0), ha="right" if left else "left")
        text = dict(textcoords="offset points", va="center", fontsize=SMALL, color=colour)
        axes.annotate(words, (edge, i), **side, **text)
    axes.axvline(0, color="black", lw=0.8)
    axes.set_yticks(range(len(shown)), [wrapped(f.claim) for f in shown])
    axes.set_ylim(len(shown) - 0.4, -0.6)
    axes.margins(x=0.2)
    clear(axes)


def wrapped(text: str, width: int = 44) -> str:
    """A text in lines of at most so many characters."""
    lines = [""]
    for word in text.split():
        if len(lines[-1]) + len(word) > width:
            lines.append("")
        lines[-1] += f"{word} "
    return "\n".join(line.strip() for line in lines)


# --------------------------------------------------------------------------------------- paradigms
def paradigms_figure(study: Study, found, pyplot):
    """Each paradigm along its compute on dev; on test, by how much SFT-then-RL ends above it, with
    intervals, and the paper's margins."""
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(8, 3.8), width_ratios=[1.2, 1])
    curves = paradigm_curves(study)
    last = max(x.max() for runs in curves.values() for x, _ in runs)
    unit, words = figures.unit_of(last)
    ends = {}
    for name, runs in curves.items():
        for x, y in runs:
            left.plot(x / unit, y, color=COLOURS[name], lw=1, alpha=0.7)
        ends[name] = (np.mean([y[-1] for _, y in runs]), max(x.max() for x, _ in runs) / unit)
    height = max(y.max() for runs in curves.values() for _, y in runs)
    placed = apart([end for end, _ in ends.values()], 0.07 * height)
    for (name, (_, x)), y in zip(ends.items(), placed):
        label = name
        if name == "mixed":
            n = len(curves[name])
            label += f"\n({study.mixed['base']}, {n} seed{'s' * (n > 1)})"
        style = dict(color=COLOURS[name], fontsize=SMALL, va="center")
        left.text(x + 0.02 * last / unit, y, label, **style)
    common = min(max(x.max() for x, _ in runs) for runs in curves.values()) / unit
    left.axvline(common, color=GREY, lw=0.8, ls=":", zorder=0)
    style = dict(fontsize=SMALL, color=GREY, va="top", ha="right")
    left.text(common, 1, "compared here ", transform=left.get_xaxis_transform(), **style)
    left.set_ylim(top=1.15 * height)
    left.set_xlim(0, last / unit * 1.45)
    left.set_xlabel(f"compute from the base model ({words})", fontsize=SMALL)
    left.set_ylabel("pass@1 on dev, a line per seed", fontsize=SMALL)
    clear(left)
    margins_panel(right, study, found)
    return figure


def paradigm_curves(study: Study) -> dict:
    """{arm: [(FLOPs from the base, pass@1 on dev) of each seed]}."""
    begin = {s.name: s.flops for s in study.starts}
    curves = {"SFT": [], "SFT-then-RL": []}
    for name in study.seeds(f"sft-{study.main}"):
        rows = tables.read_metrics(study.out / name, "eval")
        flops = np.array([row["flops"] for row in rows])
        curves["SFT"].append((flops, np.array([row["pass1"] for row in rows])))
    for name in study.seeds(f"rl-{study.main}-stable"):
        points = study.points[name]
        curves["SFT-then-RL"].append((begin[name] + points.flops, points.performance))
    for arm in ("RL", "mixed"):
        points = [study.points[name] for name in study.arms.get(arm, ())]
        if points:
            curves[arm] = [(p.flops, p.performance) for p in points]
    return {name: runs for name, runs in curves.items() if runs}


def margins_panel(axes, study: Study, found) -> None:
    """By how much SFT-then-RL ends above each rival, ours with intervals and the paper's."""
    rivals = {"SFT alone": "SFT", "RL alone": "RL", "the best mixed": "mixed"}
    shown = []
    for text, arm in rivals.items():
        mine = [f for f in found if f.figure == "paradigms" and f"above {text}" in f.claim]
        if mine and not np.isnan(mine[0].effect):
            shown.append((arm, mine[0]))
    for i, (arm, f) in enumerate(shown):
        dot(axes, i, f.effect, f.low, f.high, arm, "here")
        theirs = published.PARADIGMS["SFT-then-RL"] - published.PARADIGMS[arm]
        axes.plot(i, theirs, "D", ms=5, color=COLOURS["paper"])
        offset = dict(xytext=(6, 0), textcoords="offset points", va="center", fontsize=SMALL)
        axes.annotate("paper", (i, theirs), **offset)
    axes.axhline(0, color="black", lw=0.8)
    axes.set_xlim(-0.4, len(shown) - 0.2)
    axes.set_xticks(range(len(shown)), [f"over {arm}" for arm, _ in shown])
    axes.set_ylabel("SFT-then-RL ends higher by (points, test)", fontsize=SMALL)
    clear(axes)


def transfer_figure(study: Study, found, pyplot):
    """Test and the unseen kinds: every paradigm at equal compute, with its interval."""
    parts = [part for part in study.counts["exam"] if study.counts["exam"][part]]
    if len(parts) < 2:
        return None
    words = {"test": "test", "pair": "unseen pairs", "band": "unseen targets"}
    figure, panels = pyplot.subplots(1, len(parts), figsize=(8, 3.4), sharey=True)
    arms = {"base": ["base"], "SFT": study.seeds(f"sft-{study.main}"), **study.arms}
    for axes, part in zip(panels, parts):
        for i, (name, names) in enumerate(arms.items()):
            mean, low, high = findings.level(study, names, part)
            dot(axes, i, mean, max(low, 0), high, name)
        axes.set_ylim(0)
        axes.set_xticks(range(len(arms)), arms, rotation=50, ha="right")
        axes.set_title(words.get(part, part), fontsize=10)
        clear(axes)
    panels[0].set_ylabel("pass@1 (points)", fontsize=SMALL)
    return figure


# --------------------------------------------------------------------------------- starting points
def starts_figure(study: Study, found, pyplot):
    """Per set: the validation loss with its regimes; then where RL from each start ends."""
    sets = sorted({s.set for s in study.starts if s.start == "late" and s.set not in EXACT})
    if not sets:
        return None
    figure, panels = pyplot.subplots(
        2, len(sets), figsize=(8, 6.2), squeeze=False, height_ratios=[1, 1.1]
    )
    for above, below, name in zip(*panels, sets):
        regimes_panel(above, name, study.sft[f"sft-{name}-0"])
        above.set_title(f"{above.get_title()}; triangles: starts", fontsize=SMALL)
        runs = [s for s in study.starts if s.set == name]
        for s in runs:
            if s.seed == 0:
                style = dict(transform=above.get_xaxis_transform(), clip_on=False, ms=7)
                above.plot(s.step, 0, "^", color=COLOURS[s.start], **style)
        ends_panel(below, study, runs)
    return figure


def ends_panel(axes, study: Study, runs) -> None:
    """A row per starting point, a line per seed: dev where RL starts, test where it ends."""
    seeds = sorted({s.seed for s in runs})
    known = {s.start for s in runs}
    order = [start for start in STARTS if start in known]
    order.sort(key=lambda start: np.mean([s.step for s in runs if s.start == start]))
    labels = []
    for i, start in enumerate(order):
        steps = []
        for s in (s for s in runs if s.start == start):
            y = i + 0.24 * (seeds.index(s.seed) - (len(seeds) - 1) / 2)
            mean, low, high = findings.level(study, [s.name])
            before = float(study.points[s.name].performance[0])
            axes.plot([before, mean], [y, y], color=COLOURS[start], lw=0.8, ls=":")
            axes.plot([low, high], [y, y], color=COLOURS[start], lw=1.5)
            axes.plot(mean, y, "o", color=COLOURS[start], ms=5)
            axes.plot(before, y, "s", color=COLOURS[start], ms=5, mfc="white")
            steps.append(f"{s.step}")
        labels.append(f"{start}\n(step {', '.join(dict.fromkeys(steps))})")
    axes.set_yticks(range(len(order)), labels)
    for start, label in zip(order, axes.get_yticklabels()):
        label.set_color(COLOURS[start])
    axes.invert_yaxis()
    axes.set_xlabel("pass@1 (points)", fontsize=SMALL)
    axes.set_title("square: dev at the start; dot: test after RL", fontsize=SMALL)
    clear(axes)


def regimes_panel(axes, name: str, found, rise: float = figures.RISE) -> None:
    """The validation loss of seed 0 over its regimes, each named where the curve is not."""
    figures.regimes_panel(axes, name, found, rise)
    axes.get_legend().remove()
    middle = np.mean(axes.get_ylim())
    for regime in dict.fromkeys(found.regimes):
        at = longest(found.regimes, regime)
        free = "top" if np.median([found.losses[i] for i in at]) < middle else "bottom"
        place = dict(transform=axes.get_xaxis_transform(), rotation=90, ha="center", va=free)
        where = np.mean([found.steps[i] for i in at])
        axes.text(where, 0.97 if free == "top" else 0.03, regime, fontsize=SMALL, **place)
    axes.set_title(f"{name}: validation loss, seed 0\nstar: lowest mean of three", fontsize=SMALL)
    cut = " (higher ones cut)" if "cut" in axes.get_ylabel() else ""
    axes.set_ylabel(f"nats per token{cut}", fontsize=SMALL)
    axes.set_xlabel("SFT step", fontsize=SMALL)
    clear(axes)


def longest(regimes, regime: str) -> list[int]:
    """Places of the longest unbroken stretch of one regime."""
    best = run = []
    for i, name in enumerate(regimes):
        run = [*run, i] if name == regime else []
        best = max(best, run, key=len)
    return best


# --------------------------------------------------------------------------- scale, loss, RL curves
def scale_figure(study: Study, found, pyplot):
    """Ceilings by trajectories, ours and the paper's, above the smallest set's; two RL curves."""
    rows, _ = findings.loss_and_ceiling(study)
    if not rows:
        return None
    figure, (left, middle, right) = pyplot.subplots(
        1, 3, figsize=(8, 3.8), width_ratios=[1.3, 1, 1]
    )
    sizes = {name: len_of(study.out / "sets" / f"{name}.jsonl") for name in rows}
    ours = {name: (sizes[name], *row[1:]) for name, row in rows.items()}
    theirs = {name: (n, top, top, top) for name, (n, _, top) in published.SCALES.items()}
    for name, points in (("SFT-then-RL", ours), ("paper", theirs)):
        least = next(iter(points.values()))[1]
        x = [point[0] for point in points.values()]
        left.plot(x, [p[1] - least for p in points.values()], color=COLOURS[name], lw=0.8)
        for i, (label, (n, mean, low, high)) in enumerate(points.items()):
            dot(left, n, mean - least, low - least, high - least, name)
            at, where = high - least, dict(xytext=(4, 2), ha="right", va="bottom")
            if name == "paper":
                above = i % 2 == 1  # so that neighbours stay apart
                where = dict(xytext=(0, 8 if above else -8), ha="center")
                where["va"] = "bottom" if above else "top"
            style = dict(textcoords="offset points", fontsize=8, color=COLOURS[name])
            left.annotate(label, (n, at), **where, **style)
    left.set(xscale="log")
    left.margins(x=0.3, y=0.12)
    left.set_xlabel("SFT trajectories", fontsize=SMALL)
    left.set_ylabel("A_post above the smallest set's (points)", fontsize=SMALL)
    left.set_title("blue: here; black: the paper", fontsize=SMALL)
    clear(left)
    curves = [name for name in ("rl-middle-stable-0", "rl-fixed-stable-0") if name in study.fits]
    for axes, name in zip((middle, right), curves):
        ceiling_panel(axes, name, study)
    return figure


def ceiling_panel(axes, name: str, study: Study) -> None:
    """An RL curve with its fit, the band of an evaluation, and the ceiling's 90% interval."""
    points = study.points[name]
    fit = study.fits[name]
    figures.curve_panel(axes, name, points, fit, colour=COLOURS["stable"])
    known = "identified" if fit.identified else "not identified"
    axes.set_title(f"RL from Stable, {name.split('-')[1]}:\nceiling {known}", fontsize=SMALL)
    axes.set_xlabel(axes.get_xlabel(), fontsize=SMALL)
    axes.set_ylabel("pass@1 on dev (points)", fontsize=SMALL)
    clear(axes)
    if fit.a_post_high is None:
        return
    x, _ = figures.unit_of(points.flops.max())
    style = dict(fontsize=8, ha="right", color=COLOURS["stable"])
    edge = points.flops.max() / x
    axes.text(edge, fit.a_post_high, "A_post, 90%", va="top", **style)
    y = points.performance
    span = fit.a_post_high - y.min()
    axes.text(edge, y.min(), "line: eq. (2)\nband: evaluations", va="bottom", **style)
    axes.set_ylim(y.min() - 0.06 * span, fit.a_post_high + 0.06 * span)


def len_of(path) -> int:
    with open(path) as lines:
        return sum(1 for _ in lines)


def losses_figure(study: Study, found, pyplot):
    """The minimum validation loss against the ceiling above the smallest set's, both studies."""
    rows, finding = findings.loss_and_ceiling(study)
    if not rows:
        return None
    figure, axes = pyplot.subplots(figsize=(8, 4))
    theirs = {name: (loss, top, top, top) for name, (_, loss, top) in published.SCALES.items()}
    for name, points in (("SFT-then-RL", rows), ("paper", theirs)):
        least = next(iter(points.values()))[1]
        for i, (label, (loss, mean, low, high)) in enumerate(points.items()):
            dot(axes, loss, mean - least, low - least, high - least, name)
            last = i == len(points) - 1  # the leftmost: to its right are the others' intervals
            where = dict(xytext=(-7 if last else 7, 0), ha="right" if last else "left")
            where["va"] = "center"
            if name == "paper":  # its losses lie close
                where = dict(xytext=(0, -9 if i % 2 else 8), ha="center")
                where["va"] = "top" if i % 2 else "bottom"
            style = dict(fontsize=SMALL, color=COLOURS[name], textcoords="offset points")
            axes.annotate(label, (loss, mean - least), **where, **style)
    r = f"r = {-finding.effect:+.2f}" if finding.known else "r not known"
    axes.set_title(f"blue: here, {r}; black: the paper, r = -0.94, without intervals", fontsize=10)
    axes.margins(x=0.1)
    axes.set_xlabel("minimum validation loss (nats per token)", fontsize=SMALL)
    axes.set_ylabel("A_post above the smallest set's (points)", fontsize=SMALL)
    clear(axes)
    return figure


# -------------------------------------------------------------------------------- readiness, exact
def readiness_figure(study: Study, found, pyplot):
    """What was known at a start against where RL ended, and against what it gained."""
    rows = [row for row in findings.readiness(study) if row.comparable]
    if len(rows) < 3:
        return None
    words = {
        "signal": "signal of 8 (%)",
        "pass_at": "pass@8 (points)",
        "accuracy": "pass@1 (points)",
        "val_loss": "loss (nats)",
        "entropy": "entropy (nats)",
    }
    outcomes = {"ended": "test after RL (points)", "gained": "RL's gain on dev (points)"}
    figure, panels = pyplot.subplots(2, len(words), figsize=(8, 5), sharey="row")
    for line, (outcome, told) in zip(panels, outcomes.items()):
        for axes, (name, text) in zip(line, words.items()):
            for row in rows:
                at = (getattr(row, name), getattr(row, outcome))
                axes.plot(*at, "o", ms=0)  # for the limits: text has none
                if outcome == "ended":
                    _, low, high = findings.level(study, [row.run])
                    axes.plot([at[0]] * 2, [low, high], color=COLOURS[row.start], lw=0.6)
                letter = dict(ha="center", va="center", fontsize=SMALL, weight="bold")
                axes.text(*at, LETTERS.get(row.set, "o"), color=COLOURS[row.start], **letter)
            r = findings.correlate(rows, name, outcome)
            axes.set_title("r not known" if r is None else f"r = {r:+.2f}", fontsize=10)
            axes.set_xlabel(text, fontsize=SMALL)
            axes.margins(0.15)
            clear(axes)
        line[0].set_ylabel(told, fontsize=SMALL)
    named = {row.set for row in rows}
    sets = [f"{letter} {name}" for name, letter in LETTERS.items() if name in named]
    starts = [start for start in STARTS if any(row.start == start for row in rows)]
    legend = [(", ".join(sets) + ";  starts:" if sets else "starts:", "black")]
    legend += [(start, COLOURS[start]) for start in starts]
    figure.legend(
        handles=[pyplot.Line2D([], [], lw=0, label=text) for text, _ in legend],
        labelcolor=[colour for _, colour in legend],
        loc="upper center",
        ncol=len(legend),
        frameon=False,
        fontsize=SMALL,
        handlelength=0,
        handletextpad=0,
        columnspacing=1,
    )
    return figure


def exact_figure(study: Study, found, pyplot):
    """Loss and accuracy along SFT side by side, where an answer must be exact; where RL ends."""
    sets = [name for name in EXACT if f"sft-{name}-0" in study.sft]
    if not sets:
        return None
    figure, panels = pyplot.subplots(len(sets), 2, figsize=(8, 2.9 * len(sets)), squeeze=False)
    for (left, right), name in zip(panels, sets):
        loss = study.sft[f"sft-{name}-0"]
        later = loss.losses[loss.steps.index(loss.recommended_step) :]
        regimes_panel(left, name, loss, rise=1.1 * max(later) / min(loss.losses))
        for sft in study.seeds(f"sft-{name}"):
            rows = tables.read_metrics(study.out / sft, "eval")
            steps = [row["step"] for row in rows]
            right.plot(steps, [row["pass1"] for row in rows], ".-", lw=0.8, color=COLOURS["SFT"])
        for s in (s for s in study.starts if s.set == name):
            x = s.step + 8 * s.seed  # seeds side by side
            dot(right, x, *findings.level(study, [s.name]), s.start)
        right.set_ylim(0, 105)
        right.set_xlabel("SFT step", fontsize=SMALL)
        right.set_ylabel("pass@1 (points)", fontsize=SMALL)
        right.set_title(
            f"{name}: green SFT on dev; test after RL\nfrom the minimum (blue), from the end (red)",
            fontsize=SMALL,
        )
        clear(right)
    return figure


FIGURES = {
    "claims": claims_figure,
    "paradigms": paradigms_figure,
    "transfer": transfer_figure,
    "starts": starts_figure,
    "scale": scale_figure,
    "losses": losses_figure,
    "readiness": readiness_figure,
    "exact": exact_figure,
}
