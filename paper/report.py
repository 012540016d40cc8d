r"""What a study found: report.md and its figures, from the run directories that study.py left.

    python report.py runs/study             writes report.md, figure2.png, figure3.png and losses.png beside the runs

Every number stands beside the paper's (arXiv 2512.11470, Qwen2.5-7B). Its Llama-3.2-3B and Qwen2.5-14B rows cannot be
reproduced with a tiny model and are marked so. The claims, and when one holds, are in findings.py. The figures need
matplotlib; without it the report is text only and says so."""

from __future__ import annotations

import argparse
import json
import math
import sys

import numpy as np

from paper import figures, findings
from paper.findings import MARGIN_R, MIXED, SETS, Study, loss_and_ceiling, read_run

THEIRS = {
    "small": "S1K",
    "easy": "Easy102K",
    "middle": "Uniform102K",
    "hard": "Hard102K",
    "large": "SFT889K",
}
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
# The paper's Table 4: (SFT step, SFT compute in EFLOP, P_sft, PL_rl); A_post is their sum
TABLE4 = {
    "S1K": [
        (62, 0.6, 68.6, 8.7),
        (124, 1.1, 70.9, 6.0),
        (186, 1.7, 72.9, 4.0),
        (248, 2.3, 74.1, 2.5),
        (310, 2.9, 73.1, 3.3),
    ],
    "Easy102K": [
        (360, 19.8, 70.7, 6.0),
        (720, 39.5, 73.3, 5.3),
        (1080, 59.3, 74.2, 4.6),
        (1440, 79.0, 74.8, 2.0),
        (1800, 98.8, 74.4, 3.4),
    ],
    "Uniform102K": [
        (360, 34.7, 72.2, 4.8),
        (720, 69.3, 74.5, 3.0),
        (1080, 104.0, 74.8, 4.8),
        (1440, 138.7, 75.7, 1.8),
        (1800, 173.4, 75.5, 3.8),
    ],
    "Hard102K": [
        (360, 89.3, 73.2, 4.9),
        (720, 178.5, 74.7, 3.1),
        (1080, 267.8, 76.2, 6.7),
        (1440, 357.0, 76.9, 3.4),
        (1800, 446.3, 76.1, 2.7),
    ],
    "SFT889K": [
        (360, 34.9, 69.2, 13.4),
        (720, 69.8, 71.9, 8.8),
        (1080, 104.8, 73.0, 7.1),
        (1440, 139.7, 73.3, 7.0),
        (1800, 174.6, 74.1, 6.9),
        (3600, 349.2, 76.5, 6.6),
        (5400, 523.8, 77.5, 5.3),
        (7200, 698.4, 77.3, 6.7),
        (9000, 873.0, 76.7, 6.7),
        (10800, 1047.6, 77.7, 5.4),
        (12600, 1222.2, 77.1, 5.9),
        (14080, 1365.8, 76.2, 7.8),
    ],
}
BOUND = {
    ("Easy102K", 720),
    ("Easy102K", 1080),
    ("Easy102K", 1800),
    ("Uniform102K", 1800),
    ("Hard102K", 1800),
    ("SFT889K", 360),
}  # ceilings that are the fit's own bound: the data do not determine them
PARADIGMS = {
    "SFT": 76.9,
    "RL": 74.3,
    "luffy": 72.7,
    "SFT-then-RL": 78.1,
}  # peak or ceiling, its Figure 2
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


# --------------------------------------------------------------------------------------------------------------- tables
def table(head: list[str], rows) -> str:
    """A Markdown table."""
    return (
        "\n".join(
            "| " + " | ".join(map(str, row)) + " |" for row in [head, ["---"] * len(head), *rows]
        )
        + "\n"
    )


def spread(study: Study, names, part="test") -> str:
    """Mean over seeds, and each seed where there are several."""
    values = [study.exams[name][part].mean() for name in names] if names else []
    if not values or not np.isfinite(values).all():
        return "-"
    return f"{np.mean(values):.1f}" + (
        f" ({', '.join(f'{v:.1f}' for v in values)})" if len(values) > 1 else ""
    )


def compute(study: Study, names) -> float:
    """FLOPs from the base model up to the end of an arm, mean over seeds; SFT alone may use as much as SFT-then-RL and
    has at most its whole run."""
    begin = {s.name: s.flops for s in study.starts}

    def one(name):
        if name.startswith("pure"):
            seed = name.rpartition("-")[2]
            budget = (
                begin[f"rl-middle-stable-{seed}"]
                + study.points[f"rl-middle-stable-{seed}"].flops.max()
            )
            return max(
                r["flops"]
                for r in read_run(study.out / f"sft-middle-{seed}", "eval")
                if r["flops"] <= budget
            )
        return study.points[name].flops.max() + begin.get(
            "rl-middle-stable-0" if "then" in name else name, 0.0
        )

    return float(np.mean([one(name) for name in names]))


def paradigm_table(study: Study) -> str:
    rows = [["base model", "0", spread(study, ["base"]), spread(study, ["base"], "ood"), "-"]]
    arms = study.arms | {
        f"SFT, then {algo}": names for algo in MIXED if (names := study.seeds(f"then-{algo}"))
    }
    rows += [
        [
            name,
            f"{compute(study, names):.2e}",
            spread(study, names),
            spread(study, names, "ood"),
            PARADIGMS.get(name, "-"),
        ]
        for name, names in arms.items()
    ]
    return table(
        ["arm", "FLOPs from the base", "test, mean (seeds)", "out of distribution", "paper (peak)"],
        rows,
    )


def theirs_at(name: str, row) -> str:
    """A row of the paper's Table 4 as P_sft + PL_rl = A_post."""
    return f"{row[2]} + {row[3]} = {row[2] + row[3]:.1f}{'*' * ((name, row[0]) in BOUND)}"


def table1(study: Study) -> str:
    rows = []
    for name, theirs in THEIRS.items():
        best = max(TABLE4[theirs], key=lambda row: row[2] + row[3])
        ours = study.seeds(f"rl-{name}-stable")
        rows.append(
            [
                name,
                spread(study, study.seeds(f"sft-{name}")),
                spread(study, ours),
                spread(study, ours, "ood"),
                theirs,
                theirs_at(theirs, best),
                "{} -> {}".format(*LLAMA[theirs]),
            ]
        )
    rows.append(
        [
            "not reproduced",
            *"---",
            "Qwen2.5-14B, Uniform55K: RL from SFT step 0, 172, 1720",
            "74.5, 78.8, 79.8",
            "-",
        ]
    )
    rows.append(
        [
            "not reproduced",
            *"---",
            "without SFT: base, DAPO_d, UPT, LUFFY",
            "-",
            "2.1, 3.0, 12.2, 8.5",
        ]
    )
    return table(
        [
            "set",
            "SFT, Stable",
            "SFT-then-RL",
            "the same, OOD",
            "paper's set",
            "its P_sft + PL_rl = highest A_post",
            "Llama-3.2-3B (not reproduced)",
        ],
        rows,
    )


def table4(study: Study) -> str:
    def fitted(fit):
        return fit.text("plasticity", ".1f"), fit.text("a_post", ".1f") + f" ({fit.status})" * (
            fit.status != "ok"
        )

    rows = []
    for s in study.starts:
        theirs = TABLE4[THEIRS[s.set]]
        p = {
            "adaptive": theirs[0],
            "stable": max(theirs, key=lambda row: row[2]),
            "late": theirs[-1],
        }[s.start]
        rows.append(
            [
                s.set,
                s.start,
                s.seed,
                s.step,
                s.regime,
                f"{s.flops:.2e}",
                f"{s.fit.p_sft:.1f}",
                *fitted(s.fit),
                f"{s.best:.1f}",
                f"{p[0]}: {theirs_at(THEIRS[s.set], p)}",
            ]
        )
    for name in study.seeds("base-dapo"):
        fit, best = study.fits[name], study.points[name].performance.max()
        rows.append(
            [
                "none",
                "base model",
                name.rpartition("-")[2],
                0,
                "-",
                "0",
                f"{fit.p_sft:.1f}",
                *fitted(fit),
                f"{best:.1f}",
                "0: 46.7 + 25.3 = 72.0",
            ]
        )
    return table(
        [
            "set",
            "start",
            "seed",
            "SFT step",
            "regime",
            "SFT FLOPs",
            "P_sft",
            "PL_rl [90%]",
            "A_post [90%]",
            "best on dev",
            "paper (its first, best-SFT, last step)",
        ],
        rows,
    )


def findings_table(found: list[findings.Finding]) -> str:
    def effect(f):
        digits = 2 if f.margin == MARGIN_R else 1
        return (
            "-"
            if math.isnan(f.effect)
            else f"{f.effect:+.{digits}f} [{f.low:+.{digits}f}, {f.high:+.{digits}f}]"
        )

    return table(
        ["claim", "test", "effect [90%]", "verdict"],
        [[f.claim, f.test, effect(f), f"**{f.verdict}**"] for f in found],
    )


# -------------------------------------------------------------------------------------------------------------- figures
def unit_of(value: float) -> tuple[float, str]:
    """FLOPs as a power of a thousand, for an axis."""
    exponent = 3 * int(math.log10(max(value, 1)) // 3)
    return 10.0**exponent, f"1e{exponent} FLOPs"


def paradigm_figure(study: Study, pyplot):
    """Figure 2: every paradigm along its compute on dev, its end on the test problems, and the paper's."""
    figure, (left, middle, right) = pyplot.subplots(
        1, 3, figsize=(14, 4.4), width_ratios=[1.5, 1, 0.8]
    )
    curves = {"SFT": [], "SFT-then-RL": []}
    for seed in range(study.about["seeds"]):
        rows = read_run(study.out / f"sft-middle-{seed}", "eval")
        curves["SFT"].append(([r["flops"] for r in rows], [r["pass1"] for r in rows]))
        begin = next(
            s for s in study.starts if (s.set, s.start, s.seed) == ("middle", "stable", seed)
        )
        points = study.points[begin.name]
        curves["SFT-then-RL"].append((begin.flops + points.flops, points.performance))
    for name, runs in study.arms.items():
        if name not in curves:
            curves[name] = [
                (study.points[run].flops, study.points[run].performance) for run in runs
            ]
    unit, words = unit_of(max(np.max(x) for runs in curves.values() for x, _ in runs))
    for name, runs in curves.items():
        for i, (x, y) in enumerate(runs):
            left.plot(
                np.array(x) / unit,
                y,
                "-",
                color=COLOURS[name],
                lw=1.6 if i == 0 else 0.8,
                label=name if i == 0 else None,
                zorder=3 if name == "SFT-then-RL" else 2,
            )
    left.set(
        xlabel=f"compute from the base model ({words})",
        ylabel="pass@1 on dev (points)",
        title="along the run, a line a seed",
    )
    left.legend(fontsize=8, frameon=False)
    names = list(study.arms)
    for i, name in enumerate(names):
        mean, *ends = study.level(study.arms[name])
        middle.barh(i, mean, color=COLOURS[name], alpha=0.8)
        middle.plot(np.maximum(ends, 0), [i, i], color="black", lw=1.5)
    middle.axvline(study.rates(["base"]).mean(), color="grey", ls=":", lw=1)
    middle.set_yticks(range(len(names)), names, fontsize=9)
    middle.invert_yaxis()
    middle.set(xlabel="pass@1 on test (points), 90%", title="at equal compute (dotted: base)")
    for i, name in enumerate(names):
        if name in PARADIGMS:
            right.barh(i, PARADIGMS[name], color=COLOURS[name], alpha=0.8)
            right.text(PARADIGMS[name], i, f" {PARADIGMS[name]}", va="center", fontsize=8)
    known = [i for i, name in enumerate(names) if name in PARADIGMS]
    right.set_yticks(known, [names[i] for i in known], fontsize=9)
    right.set_ylim(middle.get_ylim())
    right.set(
        xlim=(65, 81), xlabel="performance (points, cut at 65)", title="the paper, Qwen2.5-7B"
    )
    return figure


def regime_figure(study: Study, pyplot):
    """Figure 3: the regimes of each set, then P_sft, PL_rl and A_post by SFT compute, ours and the paper's."""
    sets = [name for name in SETS if f"sft-{name}-0" in study.sft]
    figure, axes = pyplot.subplot_mosaic(
        [sets, ["ours", "ours", "gain", "theirs", "theirs"]], figsize=(18, 8)
    )
    for name in sets:
        figures.regimes_panel(axes[name], name, study.sft[f"sft-{name}-0"])
    unit, words = unit_of(max(s.flops for s in study.starts))
    for name in sets:
        mine = sorted(
            (s for s in study.starts if s.set == name and s.seed == 0), key=lambda s: s.flops
        )
        x, colour = np.array([s.flops / unit for s in mine]), COLOURS[name]
        axes["ours"].plot(
            x, [s.fit.p_sft for s in mine], "o--", color=colour, ms=4, lw=0.8, label=name
        )
        bars = [(at, s) for at, s in zip(x, mine) if s.fit.a_post_low is not None]
        if not bars:
            continue
        at, bars = np.array([b[0] for b in bars]), [b[1] for b in bars]
        for panel, key in (("ours", "a_post"), ("gain", "plasticity")):
            low, high = (
                np.array([getattr(s.fit, f"{key}_{end}") for s in bars]) for end in ("low", "high")
            )
            vague = np.array(
                [getattr(s.fit, key) is None for s in bars]
            )  # not identified: the interval's middle
            centre = np.array(
                [getattr(s.fit, key) or other for s, other in zip(bars, (low + high) / 2)]
            )
            around = [np.maximum(centre - low, 0), np.maximum(high - centre, 0)]
            axes[panel].errorbar(
                at, centre, around, fmt="s-", color=colour, ms=5, lw=1.4, elinewidth=0.8, capsize=2
            )
            axes[panel].plot(
                at[vague], centre[vague], "s", color=colour, mfc="white", ms=5, zorder=5
            )
    for name, theirs in THEIRS.items():
        x, p, gain = np.array([row[1:] for row in TABLE4[theirs]]).T
        axes["theirs"].plot(x, p, "o--", color=COLOURS[name], ms=4, lw=0.8)
        axes["theirs"].plot(x, p + gain, "s-", color=COLOURS[name], ms=5, lw=1.4, label=theirs)
    axes["ours"].set(
        xlabel=f"SFT compute ({words})",
        ylabel="performance (points)",
        title="P_sft (dashed), A_post (solid, 90%; hollow: not identified)",
    )
    axes["gain"].set(
        xlabel=f"SFT compute ({words})",
        ylabel="PL_rl (points, 90%)",
        title="plasticity, from seed 0",
    )
    axes["theirs"].set(
        xlabel="SFT compute (1e18 FLOPs)",
        ylabel="performance (points)",
        xscale="log",
        title="the paper's Table 4",
    )
    for panel in ("ours", "theirs"):
        axes[panel].legend(fontsize=8, framealpha=0.7)
    return figure


def loss_figure(study: Study, pyplot):
    """The minimum validation loss against the ceiling, ours and the paper's."""
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4))
    rows, found = loss_and_ceiling(study)
    for name, (loss, middle, low, high) in rows.items():
        left.plot([loss, loss], [low, high], color=COLOURS[name], lw=1.5)
        left.plot(loss, middle, "o", color=COLOURS[name], label=name)
    for name, (loss, ceil) in LOSSES.items():
        right.plot(loss, ceil, "o", color="#333333")
        right.annotate(
            name,
            (loss, ceil),
            xytext=(6, -12 if name == "Uniform220K" else 3),
            textcoords="offset points",
            fontsize=8,
        )
    left.set(
        xlabel="minimum validation loss (nats a token)",
        ylabel="A_post from Stable (points, 90%)",
        title=f"ours: Pearson {-found.effect:+.2f}" if found.known else "ours",
    )
    if left.lines:  # none where no run has a ceiling
        left.legend(fontsize=8, frameon=False)
    right.set(
        xlabel="minimum validation loss (nats a token)",
        ylabel="highest A_post (points)",
        xlim=(0.36, 0.55),
        title="the paper: Pearson -0.94",
    )
    return figure


def draw(study: Study) -> list[str]:
    """Write the figures; their names, or [] without matplotlib (said aloud)."""
    try:
        import matplotlib
    except ImportError:
        print(
            "no figures: they need matplotlib (pip install matplotlib, then python report.py "
            f"{study.out})"
        )
        return []
    matplotlib.use("Agg")
    from matplotlib import pyplot

    made = {"figure2.png": paradigm_figure, "figure3.png": regime_figure, "losses.png": loss_figure}
    for name, make in made.items():
        figure = make(study, pyplot)
        figure.tight_layout()
        figure.savefig(study.out / name, dpi=90)
        pyplot.close(figure)
    return list(made)


# --------------------------------------------------------------------------------------------------------------- report
def write(out) -> str:
    """Write report.md and the figures of a finished study; a line that says where and what came out."""
    study = Study(out)
    found, drawn = findings.all_of(study), draw(study)
    marks = [json.loads(f.read_text()) for f in (study.out / "done").glob("*.json")]
    minutes, (sd, df) = sum(mark["cpu_s"] for mark in marks) / 60, study.seed_noise
    losses, _ = loss_and_ceiling(study)
    picture = lambda name: f"![]({name})\n" if name in drawn else ""
    rows = [
        [name, f"{loss:.4f}", f"{middle:.1f} [{low:.1f}, {high:.1f}]"]
        for name, (loss, middle, low, high) in losses.items()
    ]
    count = {
        verdict: sum(f.verdict == verdict for f in found)
        for verdict in ("holds", "does not hold", "cannot tell")
    }
    text = f"""# The paper in miniature

`{(study.out / "command.txt").read_text().strip()}`: {len(marks)} jobs, {minutes:.0f} core minutes{wall(study)}.

{about(study)}

## Findings

{", ".join(f"{n} {verdict}" for verdict, n in count.items())}. {RULES}

{findings_table(found)}
Between seeds: standard deviation {sd:.1f} points ({f"pooled, {df} degrees of freedom" if df else "assumed"}).

## Paradigms against compute (the paper's Figure 2)

RL alone and SFT-then-RL sample the prompts of `problems`; the mixed methods those of `middle`, with its trajectories.
The FLOPs are the paper's count, from the base model on; SFT alone ends with its run where that is shorter than the
others' compute.

{picture("figure2.png")}
{paradigm_table(study)}
## Regimes, P_sft, PL_rl and A_post by SFT compute (Figure 3)

{picture("figure3.png")}
## SFT and SFT-then-RL from the minimum of the validation loss (Table 1)

{table1(study)}
## Every starting point (Table 4)

On dev. P_sft as measured; PL_rl and A_post come from a fit that smooths P_sft too, so the columns need not add up. The
paper's A_post is the sum of its rounded parts; * its fit ended at its own bound, so its data do not determine it.

{table4(study)}
## The validation loss and the ceiling

{picture("losses.png")}
{table(["set", "minimum validation loss", "A_post from Stable [90%]"], rows)}
{table(["the paper's set", "minimum validation loss", "highest A_post"], [[name, *v] for name, v in LOSSES.items()])}
The paper: Pearson -0.94, Spearman -1.00 over its five scales; Pearson -0.92 over S1K, Easy, Uniform, Hard and SFT889K,
for which our five sets stand.
"""
    (study.out / "report.md").write_text(text)
    return f"{study.out / 'report.md'}: " + ", ".join(
        f"{n} {verdict}" for verdict, n in count.items()
    )


RULES = (
    "The rules, fixed before the results (but for that of arms below 1 point): a claim holds if its whole 90% "
    "interval lies above 0, does not hold if it lies below 1 point (0.5 for the correlation), else it cannot be "
    "told. The intervals cover problems (bootstrap, paired) and seeds (pooled). Arms that all stay below 1 point "
    "cannot be told apart. About one claim in twenty will hold by chance. Numbers are pass@1 in points on test "
    "unless they say dev."
)


def wall(study: Study) -> str:
    path = study.out / "wall.txt"
    minutes = sum(map(float, path.read_text().split())) / 60 if path.exists() else 0
    return f", {minutes:.0f} minutes of wall time (without what a kill -9 lost)" if minutes else ""


def about(study: Study) -> str:
    """What stood behind the sets, in a few lines."""
    c = study.counts
    lines = [
        f"Sets: small, middle, large = {', '.join(map(str, c['sizes']))} trajectories, nested; easy, middle "
        f"(= Uniform) and hard have equal size. Final evaluation: {c['test']} test and {c['ood']} "
        f"out-of-distribution problems x {study.about['exam_n']} samples."
    ]
    for name in ("data", "problems"):
        lines.append(
            f"Curation of {name}: "
            + ", ".join(f"{n} {key}" for key, n in c["curated"][name].items())
            + "."
        )
    lines.append(f"RL after SFT: {study.about['rl_flops']:.2g} FLOPs a run (0 = its --steps).")
    path = study.out / "logs" / "difficulty.txt"
    if path.exists():
        sets = {
            name: set((study.out / "sets" / f"{name}.jsonl").read_text().split("\n")) - {""}
            for name in ("easy", "middle", "hard")
        }
        shared = ", ".join(
            f"{len(sets[a] & sets[b])} in {a} and {b}"
            for a, b in (("easy", "hard"), ("easy", "middle"), ("middle", "hard"))
        )
        said = path.read_text().strip().splitlines()[-1].partition(": ")[2]
        lines.append(f"Difficulty: {said} (the paper: 1 and 0.25). Rows {shared}.")
    return "\n".join(f"- {line}" for line in lines)


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "out", nargs="?", default="runs/study", help="a finished study (default runs/study)"
    )
    try:
        print(write(parser.parse_args(argv).out))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
