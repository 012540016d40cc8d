"""What a study found: report.md and its figures, from the run directories that it left.

    python -m paper.report runs/study       writes report.md, figure2.png, figure3.png, losses.png

Every number stands beside the paper's (arXiv 2512.11470, Qwen2.5-7B). Its Llama-3.2-3B and
Qwen2.5-14B rows cannot be reproduced with a tiny model and are marked so. The claims, and when one
holds, are in findings.py. The figures need matplotlib; without it the report is text only."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections import Counter
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np

from core import tables
from core.errors import UserError
from paper import figures, findings
from paper.findings import MARGIN_R, MIXED, SETS, Study, loss_and_ceiling

THEIRS = dict(  # the paper's set that each of ours stands for
    small="S1K", easy="Easy102K", middle="Uniform102K", hard="Hard102K", large="SFT889K"
)
COLOURS = {
    "small": "#9e9ac8",
    "easy": "#74c476",
    "middle": "#3182bd",
    "hard": "#e6550d",
    "large": "#252525",
    "SFT": "#31a354",
    "SFT-then-RL": "#08519c",
    "RL": "#d94801",
    "luffy": "#8856a7",
    "upt": "#c994c7",
    "srft": "#a6761d",
    "prefix_rft": "#737373",
}
# the paper's Figure 2: peak or ceiling
PARADIGMS = {"SFT": 76.9, "RL": 74.3, "luffy": 72.7, "SFT-then-RL": 78.1}
# minimum validation loss and highest A_post by data scale; Pearson -0.94, Spearman -1.00
LOSSES = {
    "S1K": (0.51, 77.3),
    "Uniform102K": (0.42, 79.7),
    "Uniform220K": (0.41, 82.6),
    "Uniform440K": (0.39, 82.8),
    "SFT889K": (0.37, 84.0),
}
# Llama-3.2-3B: SFT -> SFT-then-RL, its Table 1
LLAMA = {
    "S1K": (24.2, 25.0),
    "Easy102K": (52.4, 53.9),
    "Uniform102K": (53.6, 55.3),
    "Hard102K": (55.6, 56.4),
    "SFT889K": (67.7, 70.4),
}


class Published(NamedTuple):
    """A row of the paper's Table 4."""

    step: int  # of SFT
    exa: float  # compute of SFT, 1e18 FLOPs
    p_sft: float
    pl_rl: float
    at_bound: bool  # its A_post is the bound of the fit: the data do not determine it

    def text(self) -> str:
        total = f"{self.p_sft} + {self.pl_rl} = {self.p_sft + self.pl_rl:.1f}"
        return total + "*" if self.at_bound else total


@cache
def table4_of_the_paper() -> dict[str, list[Published]]:
    """Its Table 4 by data set, in order of SFT compute."""
    path = Path(__file__).with_name("table4.csv")
    sets = {}
    for row in tables.read_table(path, ("dataset", "sft_step", "sft_exa", "p_sft", "pl_rl")):
        numbers = [float(row[name]) for name in ("sft_exa", "p_sft", "pl_rl")]
        published = Published(int(row["sft_step"]), *numbers, row["at_bound"] == "1")
        sets.setdefault(row["dataset"], []).append(published)
    return sets


# ----------------------------------------------------------------------------------------- tables
def table(head: list[str], rows) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "".join("| " + " | ".join(map(str, row)) + " |\n" for row in lines)


def spread(study: Study, names, part="test") -> str:
    """Mean over seeds, and each seed where there are several."""
    values = [study.exams[name][part].mean() for name in names]
    if not values or not np.isfinite(values).all():
        return "-"
    mean = f"{np.mean(values):.1f}"
    if len(values) == 1:
        return mean
    return f"{mean} ({', '.join(f'{value:.1f}' for value in values)})"


def compute(study: Study, names) -> float:
    """FLOPs from the base model up to the end of an arm, mean over seeds."""
    return float(np.mean([compute_of(study, name) for name in names]))


def compute_of(study: Study, name: str) -> float:
    """FLOPs of one run from the base model; SFT alone may use as much as SFT-then-RL."""
    begin = {s.name: s.flops for s in study.starts}
    if name.startswith("pure"):
        seed = name.rpartition("-")[2]
        rival = f"rl-middle-stable-{seed}"
        budget = begin[rival] + study.points[rival].flops.max()
        rows = tables.read_metrics(study.out / f"sft-middle-{seed}", "eval")
        return max(row["flops"] for row in rows if row["flops"] <= budget)
    started = "rl-middle-stable-0" if name.startswith("then") else name
    return study.points[name].flops.max() + begin.get(started, 0.0)


def paradigm_table(study: Study) -> str:
    head = ["arm", "FLOPs from the base", "test, mean (seeds)", "out of distribution"]
    rows = [["base model", "0", spread(study, ["base"]), spread(study, ["base"], "ood"), "-"]]
    arms = dict(study.arms)
    for algo in MIXED:
        if study.seeds(f"then-{algo}"):
            arms[f"SFT, then {algo}"] = study.seeds(f"then-{algo}")
    for name, names in arms.items():
        measured = [spread(study, names), spread(study, names, "ood")]
        flops = f"{compute(study, names):.2e}"
        rows.append([name, flops, *measured, PARADIGMS.get(name, "-")])
    return table([*head, "paper (peak)"], rows)


def table1(study: Study) -> str:
    head = ["set", "SFT, Stable", "SFT-then-RL", "the same, OOD", "paper's set"]
    head += ["its P_sft + PL_rl = highest A_post", "Llama-3.2-3B (not reproduced)"]
    rows = []
    for name, theirs in THEIRS.items():
        best = max(table4_of_the_paper()[theirs], key=lambda row: row.p_sft + row.pl_rl)
        ours = study.seeds(f"rl-{name}-stable")
        measured = [spread(study, study.seeds(f"sft-{name}")), spread(study, ours)]
        measured.append(spread(study, ours, "ood"))
        rows.append([name, *measured, theirs, best.text(), "{} -> {}".format(*LLAMA[theirs])])
    larger = "Qwen2.5-14B, Uniform55K: RL from SFT step 0, 172, 1720"
    rows.append(["not reproduced", *"---", larger, "74.5, 78.8, 79.8", "-"])
    without = "without SFT: base, DAPO_d, UPT, LUFFY"
    rows.append(["not reproduced", *"---", without, "-", "2.1, 3.0, 12.2, 8.5"])
    return table(head, rows)


def table4(study: Study) -> str:
    head = ["set", "start", "seed", "SFT step", "regime", "SFT FLOPs", "P_sft", "PL_rl [90%]"]
    head += ["A_post [90%]", "best on dev", "paper (its first, best-SFT, last step)"]
    rows = []
    for s in study.starts:
        theirs = table4_of_the_paper()[THEIRS[s.set]]
        if s.start == "adaptive":
            row = theirs[0]
        elif s.start == "stable":
            row = max(theirs, key=lambda row: row.p_sft)
        else:
            row = theirs[-1]
        where = [s.set, s.start, s.seed, s.step, s.regime, f"{s.flops:.2e}"]
        rows.append([*where, *fitted(s.fit), f"{s.best:.1f}", f"{row.step}: {row.text()}"])
    for name in study.seeds("base-dapo"):
        where = ["none", "base model", name.rpartition("-")[2], 0, "-", "0"]
        best = f"{study.points[name].performance.max():.1f}"
        rows.append([*where, *fitted(study.fits[name]), best, "0: 46.7 + 25.3 = 72.0"])
    return table(head, rows)


def fitted(fit) -> list[str]:
    """P_sft, PL_rl and A_post of a fit, with its status where it is not ok."""
    status = "" if fit.status == "ok" else f" ({fit.status})"
    return [f"{fit.p_sft:.1f}", fit.text("plasticity", ".1f"), fit.text("a_post", ".1f") + status]


def findings_table(found: list[findings.Finding]) -> str:
    rows = []
    for f in found:
        digits = 2 if f.margin == MARGIN_R else 1
        effect, low, high = (f"{value:+.{digits}f}" for value in (f.effect, f.low, f.high))
        shown = "-" if math.isnan(f.effect) else f"{effect} [{low}, {high}]"
        rows.append([f.claim, f.test, shown, f"**{f.verdict}**"])
    return table(["claim", "test", "effect [90%]", "verdict"], rows)


# ---------------------------------------------------------------------------------------- figures
def paradigm_figure(study: Study, pyplot):
    """Figure 2: each paradigm along its compute on dev, its end on test, and the paper's."""
    figure, (left, middle, right) = pyplot.subplots(
        1, 3, figsize=(14, 4.4), width_ratios=[1.5, 1, 0.8]
    )
    paradigm_curves(left, study)
    names = list(study.arms)
    for i, name in enumerate(names):
        mean, *ends = study.level(study.arms[name])
        middle.barh(i, mean, color=COLOURS[name], alpha=0.8)
        middle.plot(np.maximum(ends, 0), [i, i], color="black", lw=1.5)
    middle.axvline(study.rates(["base"]).mean(), color="grey", ls=":", lw=1)
    middle.set_yticks(range(len(names)), names, fontsize=9)
    middle.invert_yaxis()
    middle.set(xlabel="pass@1 on test (points), 90%", title="at equal compute (dotted: base)")
    known = [i for i, name in enumerate(names) if name in PARADIGMS]
    for i in known:
        theirs = PARADIGMS[names[i]]
        right.barh(i, theirs, color=COLOURS[names[i]], alpha=0.8)
        right.text(theirs, i, f" {theirs}", va="center", fontsize=8)
    right.set_yticks(known, [names[i] for i in known], fontsize=9)
    right.set_ylim(middle.get_ylim())
    right.set(
        xlim=(65, 81), xlabel="performance (points, cut at 65)", title="the paper, Qwen2.5-7B"
    )
    return figure


def paradigm_curves(axes, study: Study) -> None:
    """pass@1 on dev along the compute from the base model, a line per seed."""
    curves = {"SFT": [], "SFT-then-RL": []}
    for seed in range(study.about["seeds"]):
        rows = tables.read_metrics(study.out / f"sft-middle-{seed}", "eval")
        curves["SFT"].append(([row["flops"] for row in rows], [row["pass1"] for row in rows]))
        name = f"rl-middle-stable-{seed}"
        begin = next(s.flops for s in study.starts if s.name == name)
        points = study.points[name]
        curves["SFT-then-RL"].append((begin + points.flops, points.performance))
    for name, runs in study.arms.items():
        if name not in curves:
            points = [study.points[run] for run in runs]
            curves[name] = [(p.flops, p.performance) for p in points]
    last = [np.max(x) for runs in curves.values() for x, _ in runs]
    unit, words = figures.unit_of(max(last))
    for name, runs in curves.items():
        order = 3 if name == "SFT-then-RL" else 2
        for i, (x, y) in enumerate(runs):
            label = None if i else name
            style = dict(color=COLOURS[name], lw=0.8 if i else 1.6, label=label, zorder=order)
            axes.plot(np.array(x) / unit, y, "-", **style)
    axes.set(
        xlabel=f"compute from the base model ({words})",
        ylabel="pass@1 on dev (points)",
        title="along the run, a line per seed",
    )
    axes.legend(fontsize=8, frameon=False)


def regime_figure(study: Study, pyplot):
    """Figure 3: the regimes of each set; P_sft, PL_rl, A_post by SFT compute; the paper's."""
    sets = [name for name in SETS if f"sft-{name}-0" in study.sft]
    rows = [sets, ["ours", "ours", "gain", "theirs", "theirs"]]
    figure, axes = pyplot.subplot_mosaic(rows, figsize=(18, 8))
    unit, words = figures.unit_of(max(s.flops for s in study.starts))
    for name in sets:
        figures.regimes_panel(axes[name], name, study.sft[f"sft-{name}-0"])
        starts = [s for s in study.starts if s.set == name and s.seed == 0]
        starts.sort(key=lambda s: s.flops)
        x = [s.flops / unit for s in starts]
        p_sft = [s.fit.p_sft for s in starts]
        axes["ours"].plot(x, p_sft, "o--", color=COLOURS[name], ms=4, lw=0.8, label=name)
        ceiling_bars(axes["ours"], starts, unit, "a_post")
        ceiling_bars(axes["gain"], starts, unit, "plasticity")
    for name, theirs in THEIRS.items():
        rows = table4_of_the_paper()[theirs]
        x = [row.exa for row in rows]
        a_post = [row.p_sft + row.pl_rl for row in rows]
        style = dict(color=COLOURS[name])
        axes["theirs"].plot(x, [row.p_sft for row in rows], "o--", ms=4, lw=0.8, **style)
        axes["theirs"].plot(x, a_post, "s-", ms=5, lw=1.4, label=theirs, **style)
    ours = "P_sft (dashed), A_post (solid, 90%; hollow: not identified)"
    compute = f"SFT compute ({words})"
    axes["ours"].set(xlabel=compute, ylabel="performance (points)", title=ours)
    axes["gain"].set(xlabel=compute, ylabel="PL_rl (points, 90%)", title="plasticity, from seed 0")
    axes["theirs"].set(
        xlabel="SFT compute (1e18 FLOPs)",
        ylabel="performance (points)",
        xscale="log",
        title="the paper's Table 4",
    )
    for panel in ("ours", "theirs"):
        axes[panel].legend(fontsize=8, framealpha=0.7)
    return figure


def ceiling_bars(axes, starts, unit: float, key: str) -> None:
    """A fitted quantity with its interval by SFT compute; hollow where it is not identified."""
    bars = [s for s in starts if getattr(s.fit, f"{key}_low") is not None]
    if not bars:
        return
    x = np.array([s.flops / unit for s in bars])
    low = np.array([getattr(s.fit, f"{key}_low") for s in bars])
    high = np.array([getattr(s.fit, f"{key}_high") for s in bars])
    centre = (low + high) / 2  # where the value is withheld
    vague = np.array([getattr(s.fit, key) is None for s in bars])
    for i in np.flatnonzero(~vague):
        centre[i] = getattr(bars[i].fit, key)
    around = [np.maximum(centre - low, 0), np.maximum(high - centre, 0)]
    style = dict(color=COLOURS[bars[0].set], ms=5)
    axes.errorbar(x, centre, around, fmt="s-", lw=1.4, elinewidth=0.8, capsize=2, **style)
    axes.plot(x[vague], centre[vague], "s", mfc="white", zorder=5, **style)


def loss_figure(study: Study, pyplot):
    """The minimum validation loss against the ceiling, ours and the paper's."""
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4))
    rows, found = loss_and_ceiling(study)
    for name, (loss, middle, low, high) in rows.items():
        left.plot([loss, loss], [low, high], color=COLOURS[name], lw=1.5)
        left.plot(loss, middle, "o", color=COLOURS[name], label=name)
    for name, (loss, ceil) in LOSSES.items():
        right.plot(loss, ceil, "o", color="#333333")
        beside = (6, -12 if name == "Uniform220K" else 3)
        right.annotate(name, (loss, ceil), xytext=beside, textcoords="offset points", fontsize=8)
    axis = "minimum validation loss (nats per token)"
    title = f"ours: Pearson {-found.effect:+.2f}" if found.known else "ours"
    left.set(xlabel=axis, ylabel="A_post from Stable (points, 90%)", title=title)
    if left.lines:  # none where no run has a ceiling
        left.legend(fontsize=8, frameon=False)
    right.set(xlabel=axis, ylabel="highest A_post (points)", title="the paper: Pearson -0.94")
    right.set_xlim(0.36, 0.55)
    return figure


FIGURES = {"figure2.png": paradigm_figure, "figure3.png": regime_figure, "losses.png": loss_figure}


def draw(study: Study) -> list[str]:
    """Write the figures; returns their names, or [] with a line on the terminal, no matplotlib."""
    try:
        pyplot = figures.load_pyplot()
    except UserError as error:
        print(f"no figures: {error}; then python -m paper.report {study.out}")
        return []
    for name, make in FIGURES.items():
        figure = make(study, pyplot)
        figure.tight_layout()
        figure.savefig(study.out / name, dpi=90)
        pyplot.close(figure)
    return list(FIGURES)


# ----------------------------------------------------------------------------------------- report
RULES = (
    "The rules, fixed before the results (but for that of arms below 1 point): a claim holds if "
    "its whole 90% interval lies above 0, does not hold if it lies below 1 point (0.5 for the "
    "correlation), else it cannot be told. The intervals cover problems (bootstrap, paired) and "
    "seeds (pooled). Arms that all stay below 1 point cannot be told apart. About one claim in "
    "twenty will hold by chance. Numbers are pass@1 in points on test unless they say dev."
)
REPORT = """# The paper in miniature

{made_by}

{about}

## Findings

{verdicts}. {rules}

{findings}
{seeds}

## Paradigms against compute (the paper's Figure 2)

RL alone and SFT-then-RL sample the prompts of `problems`; the mixed methods those of `middle`, with
its trajectories. The FLOPs are the paper's count, from the base model on; SFT alone ends with its
run where that is shorter than the others' compute.

{figure2}
{paradigms}
## Regimes, P_sft, PL_rl and A_post by SFT compute (Figure 3)

{figure3}
## SFT and SFT-then-RL from the minimum of the validation loss (Table 1)

{table1}
## Every starting point (Table 4)

On dev. P_sft as measured; PL_rl and A_post come from a fit that smooths P_sft too, so the columns
need not add up. The paper's A_post is the sum of its rounded parts; * its fit ended at its own
bound, so its data do not determine it.

{table4}
## The validation loss and the ceiling

{figure_losses}
{losses}
{their_losses}
The paper: Pearson -0.94, Spearman -1.00 over its five scales; Pearson -0.92 over S1K, Easy,
Uniform, Hard and SFT889K, for which our five sets stand.
"""


def write(out) -> str:
    """Write report.md and the figures of a finished study; returns a line of where and what."""
    study = Study(out)
    found = findings.all_of(study)
    drawn = draw(study)
    counts = Counter(finding.verdict for finding in found)
    words = ("holds", "does not hold", "cannot tell")
    verdicts = ", ".join(f"{counts[word]} {word}" for word in words)
    sd, df = study.seed_noise
    known = f"pooled, {df} degrees of freedom" if df else "assumed"
    pictures = {name: f"![]({name})\n" if name in drawn else "" for name in FIGURES}
    rows = []
    for name, (loss, middle, low, high) in loss_and_ceiling(study)[0].items():
        rows.append([name, f"{loss:.4f}", f"{middle:.1f} [{low:.1f}, {high:.1f}]"])
    their_head = ["the paper's set", "minimum validation loss", "highest A_post"]
    text = REPORT.format(
        made_by=made_by(study),
        about=about(study),
        verdicts=verdicts,
        rules=RULES,
        findings=findings_table(found),
        seeds=f"Between seeds: standard deviation {sd:.1f} points ({known}).",
        figure2=pictures["figure2.png"],
        figure3=pictures["figure3.png"],
        figure_losses=pictures["losses.png"],
        paradigms=paradigm_table(study),
        table1=table1(study),
        table4=table4(study),
        losses=table(["set", "minimum validation loss", "A_post from Stable [90%]"], rows),
        their_losses=table(their_head, [[name, *pair] for name, pair in LOSSES.items()]),
    )
    path = study.out / "report.md"
    path.write_text(text)
    return f"{path}: {verdicts}"


def made_by(study: Study) -> str:
    """The command, its jobs and their time."""
    command = (study.out / "command.txt").read_text().strip()
    marks = [json.loads(path.read_text()) for path in (study.out / "done").glob("*.json")]
    minutes = sum(mark["cpu_s"] for mark in marks) / 60
    line = f"`{command}`: {len(marks)} jobs, {minutes:.0f} core minutes"
    path = study.out / "wall.txt"
    wall = sum(map(float, path.read_text().split())) / 60 if path.exists() else 0
    if wall:
        line += f", {wall:.0f} minutes of wall time (without what a kill -9 lost)"
    return line + "."


def about(study: Study) -> str:
    """What stood behind the sets, in a few lines."""
    c = study.counts
    lines = [
        f"Sets: small, middle, large = {', '.join(map(str, c['sizes']))} trajectories, nested; "
        f"easy, middle (= Uniform) and hard have equal size. Final evaluation: {c['test']} test "
        f"and {c['ood']} out-of-distribution problems x {study.about['exam_n']} samples."
    ]
    for name in ("data", "problems"):
        counted = ", ".join(f"{n} {key}" for key, n in c["curated"][name].items())
        lines.append(f"Curation of {name}: {counted}.")
    lines.append(f"RL after SFT: {study.about['rl_flops']:.2g} FLOPs a run (0 = its --steps).")
    path = study.out / "logs" / "difficulty.txt"
    if path.exists():
        sets = {}
        for name in ("easy", "middle", "hard"):
            sets[name] = set((study.out / "sets" / f"{name}.jsonl").read_text().split("\n")) - {""}
        pairs = (("easy", "hard"), ("easy", "middle"), ("middle", "hard"))
        shared = ", ".join(f"{len(sets[a] & sets[b])} in {a} and {b}" for a, b in pairs)
        said = path.read_text().strip().splitlines()[-1].partition(": ")[2]
        lines.append(f"Difficulty: {said} (the paper: 1 and 0.25). Rows {shared}.")
    return "\n".join(f"- {line}" for line in lines)


def main(argv=None) -> int:
    flags = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = flags.add_argument
    add("out", nargs="?", default="runs/study", help="a finished study (default runs/study)")
    try:
        print(write(flags.parse_args(argv).out))
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
