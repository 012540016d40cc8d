"""The figures of a study's report, one per group of claims.

One colour per arm in all of them, labels at the lines, 90% intervals; ours and the paper's numbers
on one axis, as differences. 8 inches wide, to be read at 800 pixels."""

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
VERDICTS = {"holds": "#08519c", "opposite": "#a50f15", "cannot tell": "#999999"}
NO_EFFECT = "#b8860b"
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
        figure.tight_layout()
        figure.savefig(study.out / f"{name}.png", dpi=150)
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
    """Every claim in points: its effect and interval, coloured by its verdict."""
    shown = [f for f in found if f.margin == findings.MARGIN]
    figure, axes = pyplot.subplots(figsize=(8, 1 + 0.4 * len(shown)))
    for i, f in enumerate(shown):
        colour = VERDICTS.get(f.verdict, NO_EFFECT)
        if not np.isnan(f.effect):
            axes.plot([f.low, f.high], [i, i], color=colour, lw=2)
            axes.plot(f.effect, i, "o", color=colour, ms=5)
        left = f.effect < 0 and f.verdict != "cannot tell"
        edge = 0 if np.isnan(f.effect) else f.low if left else f.high
        side = dict(xytext=(-5 if left else 5, 0), ha="right" if left else "left")
        text = dict(textcoords="offset points", va="center", fontsize=8, color=colour)
        axes.annotate(f.verdict, (edge, i), **side, **text)
    axes.axvline(0, color="black", lw=0.8)
    axes.axvspan(0, findings.MARGIN, color="#eeeeee", zorder=0)
    axes.set_yticks(range(len(shown)), [wrapped(f.claim) for f in shown])
    axes.invert_yaxis()
    axes.margins(x=0.18)
    clear(axes)
    axes.tick_params(axis="y", labelsize=7.5)
    axes.set_xlabel("effect in points, 90% interval (grey: below 1 point)", fontsize=SMALL)
    return figure


def wrapped(text: str, width: int = 40) -> str:
    """A text in lines of at most so many characters."""
    lines = [""]
    for word in text.split():
        if len(lines[-1]) + len(word) > width:
            lines.append("")
        lines[-1] += f"{word} "
    return "\n".join(line.strip() for line in lines)


# --------------------------------------------------------------------------------------- paradigms
def paradigms_figure(study: Study, found, pyplot):
    """Each paradigm along its compute on dev; its end against SFT-then-RL's, and the paper's."""
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
        label = f"{name} ({study.mixed['base']})" if name == "mixed" else name
        style = dict(color=COLOURS[name], fontsize=SMALL, va="center")
        left.text(x + 0.02 * last / unit, y, label, **style)
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
    axes.set_ylabel("SFT-then-RL ends higher by (points)", fontsize=SMALL)
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
            dot(axes, i, *findings.level(study, names, part), name)
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
    figure, panels = pyplot.subplots(2, len(sets), figsize=(8, 6), squeeze=False)
    for above, below, name in zip(*panels, sets):
        regimes_panel(above, name, study.sft[f"sft-{name}-0"])
        runs = [s for s in study.starts if s.set == name and s.seed == 0]
        distinct = merge_same(study, runs)
        tops = []
        for _, s in distinct:
            mean, low, high = findings.level(study, [s.name])
            start = float(study.points[s.name].performance[0])
            below.plot([s.step, s.step], [start, mean], color=COLOURS[s.start], lw=0.8, ls=":")
            below.plot(s.step, start, "s", ms=4, mfc="white", color=COLOURS[s.start])
            dot(below, s.step, mean, low, high, s.start)
            tops.append(high)
        least = 0.09 * (max(tops) - min(float(study.points[s.name].performance[0]) for s in runs))
        heights = apart(tops, least)
        for (text, s), y in zip(distinct, heights):
            style = dict(color=COLOURS[s.start], fontsize=SMALL, ha="center", va="bottom")
            below.text(s.step, y, text.replace(" = ", "\n= "), **style)
        below.margins(x=0.15, y=0.18)
        below.set_ylim(top=max(heights) + 2 * least)
        below.set_xlabel("SFT step at which RL starts", fontsize=SMALL)
        below.set_ylabel("pass@1 (points)", fontsize=SMALL)
        below.set_title("square: dev at the start; dot: test after RL", fontsize=SMALL)
        clear(below)
    return figure


def regimes_panel(axes, name: str, found) -> None:
    """The validation loss over its regimes, which are named at the top."""
    figures.regimes_panel(axes, name, found)
    axes.get_legend().remove()
    for regime in dict.fromkeys(found.regimes):
        steps = [s for s, r in zip(found.steps, found.regimes) if r == regime]
        place = dict(transform=axes.get_xaxis_transform(), rotation=90, va="top", ha="center")
        behind = dict(facecolor="white", alpha=0.7, lw=0, pad=1)
        axes.text(np.mean(steps), 0.97, regime, fontsize=8, bbox=behind, **place)
    axes.set_title(f"{name}: validation loss along SFT", fontsize=10)
    axes.set_ylabel(axes.get_ylabel().replace("validation ", ""), fontsize=SMALL)
    axes.set_xlabel("SFT step", fontsize=SMALL)
    clear(axes)


def merge_same(study: Study, runs) -> list[tuple]:
    """[(names of the starting points that are one checkpoint, its run)]."""
    by_real = {}
    for s in sorted(runs, key=lambda s: STARTS.index(s.start)):
        by_real.setdefault(study.real(s.name), []).append(s)
    found = []
    for same in by_real.values():
        names = [s.start for s in same]
        found.append((" = ".join(names), same[0]))
    return found


# --------------------------------------------------------------------------- scale, loss, RL curves
def scale_figure(study: Study, found, pyplot):
    """Ceilings by trajectories, ours and the paper's, above the smallest set's; two RL curves."""
    rows, _ = findings.loss_and_ceiling(study)
    if not rows:
        return None
    figure, (left, middle, right) = pyplot.subplots(
        1, 3, figsize=(8, 3.6), width_ratios=[1.3, 1, 1]
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
            where = dict(xytext=(-5, 3), ha="right")  # ours: to the left of the interval
            if name == "paper":
                where = dict(xytext=(0, 6 if i % 2 else -13), ha="center")
            style = dict(textcoords="offset points", fontsize=7, color=COLOURS[name])
            left.annotate(label, (n, mean - least), **where, **style)
    left.set(xscale="log")
    left.margins(x=0.2, y=0.12)
    left.set_xlabel("SFT trajectories", fontsize=SMALL)
    left.set_ylabel("A_post above the smallest set's (points)", fontsize=SMALL)
    left.set_title("blue: here; black: the paper", fontsize=SMALL)
    clear(left)
    curves = [name for name in ("rl-middle-stable-0", "rl-fixed-stable-0") if name in study.fits]
    for axes, name in zip((middle, right), curves):
        figures.curve_panel(axes, name, study.points[name], study.fits[name])
        axes.set_title(f"RL from Stable, {name.split('-')[1]}", fontsize=SMALL)
        axes.set_xlabel(axes.get_xlabel(), fontsize=8)
        axes.set_ylabel("pass@1 on dev, with fit and ceiling", fontsize=8)
        clear(axes)
    return figure


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
            above = (i % 2 == 1) == (name != "paper")  # so that neighbours stay apart
            where = dict(xytext=(6, 6 if above else -13), textcoords="offset points")
            style = dict(fontsize=SMALL, color=COLOURS[name])
            axes.annotate(label, (loss, mean - least), **where, **style)
    r = f"r = {-finding.effect:+.2f}" if finding.known else "r not known"
    axes.set_title(f"blue: here, {r}; black: the paper, r = -0.94", fontsize=10)
    axes.margins(x=0.1)
    axes.set_xlabel("minimum validation loss (nats per token)", fontsize=SMALL)
    axes.set_ylabel("A_post above the smallest set's (points)", fontsize=SMALL)
    clear(axes)
    return figure


# -------------------------------------------------------------------------------- readiness, exact
def readiness_figure(study: Study, found, pyplot):
    """What was known at a start against where RL ended."""
    rows = [row for row in findings.readiness(study) if row.comparable]
    if len(rows) < 3:
        return None
    words = {
        "signal": "signal of a group of 8 (%)",
        "pass_at": "pass@8 (points)",
        "accuracy": "pass@1 on dev (points)",
        "val_loss": "validation loss (nats per token)",
    }
    figure, panels = pyplot.subplots(1, len(words), figsize=(8, 2.9), sharey=True)
    for axes, (name, text) in zip(panels, words.items()):
        for row in rows:
            axes.plot(getattr(row, name), row.ended, "o", ms=5, color=COLOURS[row.start])
        r = findings.correlate(rows, name, "ended")
        axes.set_title("r not known" if r is None else f"r = {r:+.2f}", fontsize=10)
        axes.set_xlabel(text, fontsize=8)
        clear(axes)
    panels[0].set_ylabel("pass@1 on test after RL", fontsize=SMALL)
    known = {row.start for row in rows}
    starts = [start for start in STARTS if start in known]
    for i, start in enumerate(starts):
        style = dict(color=COLOURS[start], fontsize=SMALL, transform=panels[0].transAxes)
        panels[0].text(0.03, 0.97 - 0.09 * i, start, va="top", **style)
    return figure


def exact_figure(study: Study, found, pyplot):
    """Loss and accuracy along SFT side by side, where an answer must be exact."""
    sets = [name for name in EXACT if f"sft-{name}-0" in study.sft]
    if not sets:
        return None
    figure, panels = pyplot.subplots(len(sets), 2, figsize=(8, 2.7 * len(sets)), squeeze=False)
    for (left, right), name in zip(panels, sets):
        sft = f"sft-{name}-0"
        regimes_panel(left, name, study.sft[sft])
        rows = tables.read_metrics(study.out / sft, "eval")
        steps = [row["step"] for row in rows]
        right.plot(steps, [row["pass1"] for row in rows], "o-", ms=4, color=COLOURS["SFT"])
        best = study.sft[sft].recommended_step
        right.axvline(best, color=COLOURS["stable"], lw=1)
        right.text(best, 2, " minimum of the loss", color=COLOURS["stable"], fontsize=SMALL)
        right.set_ylim(0, 100)
        right.set_xlabel("SFT step", fontsize=SMALL)
        right.set_title(f"{name}: pass@1 on dev", fontsize=10)
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
