"""What a study found: report.md and its figures, from the run directories that it left.

    python -m paper.report runs/study       writes report.md and one .png per group of claims

First every claim on one line with its verdict and the paper's numbers (arXiv 2512.11470,
Qwen2.5-7B), then a figure and a table for each group. The claims, and when one holds, are in
findings.py. The figures need matplotlib; without it the report is text only."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections import Counter

import numpy as np

from core.errors import UserError
from paper import findings, panels, published, results
from paper.findings import MARGIN_R
from paper.results import Study

REPORT = """# The paper in miniature

{made_by}

The paper asks how worked solutions should be used: imitated (SFT), as a start for reinforcement
learning (SFT-then-RL), or mixed into it. Its answer: SFT until its validation loss stops falling,
then RL; how far RL gets is A_post, the ceiling; P_sft is where it starts, PL_rl = A_post - P_sft
its plasticity. {scope}

{words}

## The claims

{verdicts}. {rules}

{findings}
{seeds}

{claims_figure}
"""
RULES = (
    "Rules fixed before the results (paper/findings.py): a claim holds if its whole 90% interval "
    "lies above 0, is opposite if it lies below 0; if it has both sides of 0 but stays below 1 "
    "point (0.5 for a correlation), no gain of that size is there, though a loss may be; else it "
    "cannot be told. p is one-sided and Holm's over all claims: where it is above 0.05, the "
    "verdict may be chance among so many. Intervals cover problems (bootstrap, paired) and seeds "
    "(pooled). Numbers are pass@1 in points on test unless they say dev: runs are followed on dev, "
    "and their ends are measured on test."
)
WORDS = (
    "Words: Adaptive, Stable, Mild and Severe are the regimes of SFT by its validation loss: "
    "falling, within 2% of its minimum, within 10%, beyond. The minimum is the lowest mean of "
    "three validations where the loss is noisy. A start is the checkpoint of SFT where RL begins: "
    "`adaptive` half way to Stable, `stable` the minimum, `late` the end of SFT, `signal` and "
    "`accuracy` the highest of each on dev. Signal is the share of groups of 8 answers with right "
    "and wrong ones among them, the only ones RL learns from."
)
SETS_OF_STUDY = (
    " Sets: tiny, small, middle, wide, large are 500 to 9,000 trajectories of an expert who gives "
    "up at random; fixed 1,000 of a patient one whose order is fixed; dft is middle trained with "
    "DFT's loss, where the usual one is NLL; chain and sort need an exact answer. Unseen kinds: "
    "pairs of numbers (pair) and targets (band) that no training file has. Mixed methods (LUFFY, "
    "UPT, Prefix-RFT) train on trajectories and rewards at once."
)
NAMES = {  # of what is known at a start
    "signal": "signal",
    "pass_at": "pass@8",
    "accuracy": "accuracy (pass@1)",
    "entropy": "entropy",
    "val_loss": "validation loss",
}
TITLES = {
    "paradigms": "Paradigms at equal compute (the paper's Figure 2)",
    "transfer": "Problems of unseen kinds",
    "starts": "Where to start RL (its Figure 3 and Table 4)",
    "scale": "More data, and the ceilings",
    "losses": "The validation loss and the ceiling",
    "readiness": "What foretells how far RL gets",
    "exact": "Where an answer must be exact",
}


# ----------------------------------------------------------------------------------------- tables
def table(head: list[str], rows) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "".join("| " + " | ".join(map(str, row)) + " |\n" for row in lines)


def spread(study: Study, names, part="test") -> str:
    """Mean over seeds, and each seed where there are several."""
    values = [study.exams[name][part].mean() for name in names if len(study.exams[name][part])]
    if not values:
        return "-"
    mean = f"{np.mean(values):.1f}"
    return mean if len(values) == 1 else f"{mean} ({', '.join(f'{v:.1f}' for v in values)})"


def findings_table(found: list[findings.Finding]) -> str:
    rows = []
    for f, p in zip(found, findings.holm(found)):
        digits = 2 if f.margin == MARGIN_R else 1
        effect, low, high = (f"{value:+.{digits}f}" for value in (f.effect, f.low, f.high))
        shown = "-" if math.isnan(f.effect) else f"{effect} [{low}, {high}]"
        rows.append([f.claim, f"**{f.verdict}**", shown, f"{p:.3f}", f.test, f.paper])
    return table(["claim", "verdict", "effect [90%]", "p (Holm)", "test", "the paper"], rows)


def paradigms_section(study: Study) -> str:
    """Every arm on test and on unseen kinds, and the learning rates that were tried."""
    arms = {"base model": ["base"], "SFT, Stable": study.seeds(f"sft-{study.main}"), **study.arms}
    arms["SFT-then-RL, all of its compute"] = study.seeds(f"rl-{study.main}-stable")
    parts = [part for part, n in study.counts["exam"].items() if n]
    rows = []
    for name, names in arms.items():
        theirs = published.PARADIGMS.get(name, "-")
        rows.append([name, *(spread(study, names, part) for part in parts), theirs])
    text = table(["arm", *(f"{part}, mean (seeds)" for part in parts), "paper (peak)"], rows)
    rates = []
    for kind in ("sft", "base", "then"):
        by_algo = {}
        for screen in results.screens(study.out, kind):
            by_algo.setdefault(screen.algo, []).append(f"{screen.lr:g}: {screen.score:.1f}")
        words = {"sft": "SFT", "base": "RL from the base", "then": "RL after SFT"}[kind]
        rates += [[words, algo, ", ".join(scores)] for algo, scores in by_algo.items()]
    if rates:
        text += "\nLearning rates tried, pass@1 on dev after short runs; each arm has its best.\n\n"
        text += table(["stage", "method", "rate: pass@1"], rates)
    return text


def transfer_section(study: Study) -> str:
    found = findings.transfer(study)
    if found is None:
        return "How much of RL's gain carries over is not known.\n"
    share, low, high = (100 * value for value in found)
    return (
        f"Of each point that RL adds on test, {share:.0f}% [{low:.0f}, {high:.0f}] arrives on the "
        "unseen kinds.\n"
    )


def starts_section(study: Study) -> str:
    """Every starting point: Table 4."""
    head = ["set", "start", "seed", "SFT step", "regime", "RL FLOPs", "P_sft", "PL_rl [90%]"]
    head += ["A_post [90%]", "test after RL", "paper's row: SFT step, P_sft + PL_rl = A_post"]
    rows = []
    for s in study.starts:
        flops = f"{study.points[s.name].flops.max():.2e}"
        where = [s.set, s.start, s.seed, s.step, s.regime, flops]
        end = spread(study, [s.name])
        rows.append([*where, *fitted(s.fit), end, published.beside(s.set, s.start)])
    own = {study.real(s.name): s.fit for s in study.starts}
    n_known = sum(fit.identified for fit in own.values())
    return (
        f"{n_known} of {len(own)} different runs have an identified ceiling; of the others the "
        "interval is given where there is one. All starts of one seed have "
        "the same compute in total. P_sft is dev as measured; the fit smooths it, so columns need "
        "not add up. * the paper's fit ended at its own bound.\n\n" + table(head, rows)
    )


def fitted(fit) -> list[str]:
    """P_sft, PL_rl and A_post of a fit, with its status where it is not ok."""
    status = "" if fit.status == "ok" else f" ({fit.status})"
    return [f"{fit.p_sft:.1f}", fit.text("plasticity", ".1f"), fit.text("a_post", ".1f") + status]


def losses_section(study: Study) -> str:
    rows = []
    for name, (loss, middle, low, high) in findings.loss_and_ceiling(study)[0].items():
        rows.append([name, f"{loss:.4f}", f"{middle:.1f} [{low:.1f}, {high:.1f}]"])
    theirs = [[name, loss, top] for name, (_, loss, top) in published.SCALES.items()]
    head = ["set", "minimum validation loss", "A_post [90%]"]
    return table(head, rows) + "\nThe paper:\n\n" + table(head, theirs)


def readiness_section(study: Study) -> str:
    """Correlations of what a start's samples said with what RL made of it, and the best of them."""
    rows = findings.readiness(study)
    if len(rows) < 3:
        return "Too few starting points with samples.\n"
    blocks = {"all starts": (rows, findings.PREDICTORS[:-1])}
    same = [row for row in rows if row.comparable]
    if len(same) > 2:
        blocks["starts with one validation set"] = (same, findings.PREDICTORS)
    words = {"gained": "RL's gain on dev at one compute", "ended": "the end on test"}
    lines = []
    said = []
    for block, (members, names) in blocks.items():
        for outcome in findings.OUTCOMES:
            found = findings.predictors(members, outcome, names)
            for each in found:
                r = "-" if each.r is None else f"{each.r:+.2f}"
                if not math.isnan(each.low):
                    r += f" [{each.low:+.2f}, {each.high:+.2f}]"
                where = [f"{block} ({len(members)})", words[outcome], NAMES[each.name]]
                lines.append([*where, r, f"{100 * each.best:.0f}%"])
            best = max(found, key=lambda each: each.best)
            said.append(
                f"Of {block}, the best predictor of {words[outcome]} is {NAMES[best.name]} "
                f"(largest |r| in {100 * best.best:.0f}% of draws of SFT runs)."
            )
    head = ["starting points", "outcome", "predictor", "Pearson's r [90%]", "the best in"]
    return " ".join(said) + "\n\n" + table(head, lines)


def exact_section(study: Study) -> str:
    """Loss and accuracy at the minimum of the loss and at the end, for every set."""
    rows = []
    for sft in sorted(study.sft):
        found = study.sft[sft]
        ready = study.curves[sft].readiness
        words = sft.split("-")
        if words[2] != "0" or found.recommended_step is None:
            continue
        cells = []
        for step in (found.recommended_step, found.steps[-1]):
            at = found.steps.index(step)
            accuracy = f"{ready[step].accuracy.value:.1f}" if step in ready else "-"
            cells += [step, found.regimes[at], f"{found.losses[at]:.3f}", accuracy]
        rows.append([words[1], *cells])
    head = ["set", "minimum at step", "regime", "loss", "pass@1 on dev", "last step", "regime"]
    text = table([*head, "loss", "pass@1 on dev"], rows)
    return text + "\n" + what_follows(study)


def what_follows(study: Study) -> str:
    """One paragraph: what overfitting did here, by the verdicts on the exact tasks."""
    found = [f for f in findings.exact_tasks(study) if f]
    worse = [f.claim.rpartition(": ")[2] for f in found[:-1] if f.verdict == "holds"]
    better = [f.claim.rpartition(": ")[2] for f in found[:-1] if f.verdict == "opposite"]
    if worse:
        text = f"Overfitting costs accuracy on {', '.join(worse)}: there RL has less to start from."
    elif better:
        text = f"Accuracy goes on rising beyond the minimum of the loss on {', '.join(better)}."
    else:
        text = "At this size no cost of overfitting in accuracy is shown, even where one wrong "
        text += "token makes an answer wrong."
    verdict = found[-1].verdict if found else "cannot tell"
    ends = {
        "holds": "RL from the minimum ends higher, as the paper advises",
        "opposite": "RL from the end of SFT ends higher, against the paper's advice",
        "cannot tell": "whether RL should start at the minimum cannot be told from these tasks",
    }
    end = ends.get(verdict, "starting RL at the minimum gains no point over the end")
    return (
        f"What follows for starting RL at the minimum of the loss: {text} At equal compute {end}.\n"
    )


SECTIONS = {
    "paradigms": paradigms_section,
    "transfer": transfer_section,
    "starts": starts_section,
    "scale": lambda study: "",
    "losses": losses_section,
    "readiness": readiness_section,
    "exact": exact_section,
}


# ----------------------------------------------------------------------------------------- report
def write(out) -> str:
    """Write report.md and the figures of a finished study; returns a line of where and what."""
    study = Study(out)
    found = findings.all_of(study)
    drawn = panels.draw(study, found)
    counts = Counter(finding.verdict for finding in found)
    verdicts = ", ".join(f"{n} {word}" for word, n in counts.most_common())
    scope = "Here all of it is asked of a model of 0.6 million weights on Countdown."
    if study.own:
        scope = "Asked here of your own task: the handoff's claims only."
    text = REPORT.format(
        made_by=made_by(study),
        scope=scope,
        words=WORDS + ("" if study.own else SETS_OF_STUDY),
        verdicts=verdicts,
        rules=RULES,
        findings=findings_table(found),
        seeds=seeds_line(study),
        claims_figure="![](claims.png)" if "claims" in drawn else "",
    )
    own = ("paradigms", "transfer", "starts", "readiness")
    for name, title in TITLES.items():
        if study.own and name not in own:
            continue
        picture = f"![]({name}.png)\n\n" if name in drawn else ""
        text += f"\n## {title}\n\n{picture}{SECTIONS[name](study)}"
    text += f"\n## How it was made\n\n{about(study)}\n"
    path = study.out / "report.md"
    path.write_text(text)
    return f"{path}: {verdicts}"


def seeds_line(study: Study) -> str:
    texts = []
    for exact, where in ((False, ""), (True, " of the exact tasks")):
        if exact and study.own:
            continue
        sd, df = study.seed_noise[exact]
        known = f"pooled, {df} degrees of freedom" if df else "assumed"
        texts.append(f"{sd:.1f} points{where} ({known})")
    return f"Standard deviation between seeds: {', '.join(texts)}."


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
    sizes = []
    for path in sorted((study.out / "sets").glob("*.jsonl")):
        if "-" not in path.stem:
            sizes.append(f"{path.stem} {panels.len_of(path)}")
    lines = [f"Rows: {', '.join(sizes)}."]
    parts = ", ".join(f"{n} {part}" for part, n in study.counts["exam"].items())
    lines.append(
        f"Final evaluation (set exam): {parts} problems x {study.about['exam_n']} samples."
    )
    for name, counts in study.counts["curated"].items():
        counted = ", ".join(f"{n} {key}" for key, n in counts.items())
        lines.append(f"Curation of {name}: {counted}.")
    lines.append(rl_compute(study))
    for kind, algo in study.mixed.items():
        where = {"base": "from the base", "then": "after SFT"}[kind]
        lines.append(f"Best mixed method on dev, {where}: {algo}.")
    links = [name for name in study.points if study.real(name) != name]
    if links:
        lines.append(f"The same run as another, so not made twice: {', '.join(links)}.")
    return "\n".join(f"- {line}" for line in lines)


def rl_compute(study: Study) -> str:
    flops = study.about["rl_flops"]
    return (
        f"RL from Stable: {f'{flops:.2g} FLOPs' if flops else 'as much compute as SFT to there'}."
    )


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
