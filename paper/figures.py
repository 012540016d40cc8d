"""One picture of a study: SFT regimes along the validation loss, RL curves with their ceilings.

A panel for each SFT run (eq. 5-9), a panel for each RL run (eq. 2 with the 90% band of an
evaluation, held-back points hollow), and a last one with P_sft + PL_rl = A_post (eq. 1, 4).

    python -m paper.figures --sft runs/sft --rl runs/rl runs/rl2 --out figures.png
    python -m paper.figures --csv points.csv --fit-fraction 0.71    as ceiling.py reads them"""

from __future__ import annotations

import argparse
import math
import sys

import numpy as np

import ceiling
import phases
from core.errors import UserError

COLOURS = {"adaptive": "#9ecae1", "stable": "#a1d99b", "mild": "#fee391", "severe": "#fc9272"}
OURS = "#08519c"
CEILING = "#238b45"
PER_ROW = 3
RISE = 1.6


def load_pyplot():
    """matplotlib's pyplot, drawing to files; a UserError where it is not installed."""
    try:
        import matplotlib
    except ImportError:
        raise UserError(
            "figures need matplotlib: pip install matplotlib; tables and JSON do without it"
        ) from None
    matplotlib.use("Agg")  # no display needed
    from matplotlib import pyplot

    return pyplot


def draw(sft: dict, rl: dict, path) -> None:
    """The picture, its format by the suffix of path.

    sft {name: phases.Diagnosis}, rl {name: (ceiling.Points, ceiling.CeilingFit)}."""
    pyplot = load_pyplot()
    n_panels = len(sft) + len(rl) + (len(rl) > 1)
    columns = min(PER_ROW, n_panels)
    rows = math.ceil(n_panels / columns)
    figure, grid = pyplot.subplots(rows, columns, figsize=(5 * columns, 3.6 * rows), squeeze=False)
    panels = iter(grid.flat)
    for name, found in sft.items():
        regimes_panel(next(panels), name, found)
    for name, (points, result) in rl.items():
        curve_panel(next(panels), name, points, result)
    if len(rl) > 1:
        parts_panel(next(panels), {name: result for name, (_, result) in rl.items()})
    for axes in panels:
        axes.set_visible(False)
    # one legend under all RL panels: inside them it would cover the late points, which matter most
    handles = {}
    for axes in figure.axes[len(sft) :]:
        for handle, label in zip(*axes.get_legend_handles_labels()):
            handles[label] = handle
    height = 0.3 if handles else 0  # inches
    figure.tight_layout(rect=(0, height / figure.get_figheight(), 1, 1))
    if handles:
        style = dict(loc="lower center", ncol=len(handles), frameon=False, fontsize=9)
        figure.legend(handles.values(), handles, **style)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def unit_of(flops: float) -> tuple[float, str]:
    """A power of a thousand near this compute, and its label for an axis."""
    exponent = 3 * int(math.log10(max(flops, 1)) // 3)
    return 10.0**exponent, f"1e{exponent} FLOPs"


def regimes_panel(axes, name: str, found: phases.Diagnosis, rise: float = RISE) -> None:
    """The validation loss over its regimes, up to `rise` times the lowest; a regime ends half way
    to the next validation."""
    steps = np.array(found.steps, float)
    edges = np.concatenate([steps[:1], (steps[1:] + steps[:-1]) / 2, steps[-1:]])
    named = set()
    for i, regime in enumerate(found.regimes):
        style = dict(color=COLOURS[regime], alpha=0.6, lw=0)
        axes.axvspan(edges[i], edges[i + 1], label=None if regime in named else regime, **style)
        named.add(regime)
    axes.plot(steps, found.losses, "o-", color="#333333", ms=4, lw=1)
    if found.recommended_step is not None:
        best = found.steps.index(found.recommended_step)
        style = dict(color="#08306b", ms=14, label=f"start RL: step {steps[best]:g}")
        axes.plot(steps[best], found.losses[best], "*", **style)
    low = np.nanmin(found.losses)
    high = np.nanmax(found.losses)
    cut = (
        high > rise * low
    )  # the first losses would press the regimes, 2% and 10% wide, into a line
    label = "validation loss (nats per token, cut)" if cut else "validation loss (nats per token)"
    axes.set(xlabel="SFT step", ylabel=label)
    if cut:
        axes.set_ylim((1 - 0.1 * (rise - 1)) * low, rise * low)
    axes.set_title(f"{name}: {'saturated' if found.saturated else 'still improving'}", fontsize=9)
    axes.legend(fontsize=8, framealpha=0.7)


def curve_panel(axes, name, points: ceiling.Points, result: ceiling.CeilingFit, colour=CEILING):
    """Evaluations, eq. (2), the band of an evaluation, and the ceiling with its interval."""
    x = points.flops
    y = points.performance
    unit, words = unit_of(x.max())
    ahead = np.isin(x, [f["flops"] for f in result.forecast])
    axes.plot(x[~ahead] / unit, y[~ahead], "o", ms=4, color=OURS, label="fitted")
    if ahead.any():
        style = dict(ms=4, mfc="none", color="#d94801", label="held back")
        axes.plot(x[ahead] / unit, y[ahead], "o", **style)
    if result.posterior is not None:
        at = np.linspace(0, x.max(), 120)
        _, low, high = ceiling.predict(result.posterior, at)
        style = dict(color="#9ecae1", alpha=0.45, lw=0, label="90% of evaluations")
        axes.fill_between(at / unit, low, high, **style)
        trend = np.median(ceiling.curve(result.posterior, at), 0)
        axes.plot(at / unit, trend, color=OURS, lw=1.5, label="eq. (2)")
    if result.a_post is not None:
        axes.axhline(result.a_post, color=colour, ls="--", lw=1, label="A_post")
    if result.a_post_low is not None:  # a bar at the right edge
        edge = [x.max() * 1.03 / unit] * 2
        style = dict(color=colour, lw=5, alpha=0.6, solid_capstyle="butt")
        ends = [result.a_post_low, result.a_post_high]
        axes.plot(edge, ends, label="its 90% interval", **style)
    state = result.status if result.status != "ok" else f"A_post {result.text('a_post', '.1f')}"
    axes.set_title(f"{name}: {state}", fontsize=9)
    axes.set(xlabel=f"RL compute ({words})", ylabel="performance (points)")


def parts_panel(axes, results: dict) -> None:
    """P_sft + PL_rl = A_post by starting point; only P_sft where it is not identified."""
    for i, result in enumerate(results.values()):
        p_sft = 0 if result.p_sft is None else result.p_sft
        axes.bar(i, p_sft, color="#9ecae1", label=None if i else "P_sft")
        if result.plasticity is not None:
            axes.bar(i, result.plasticity, bottom=p_sft, color="#3182bd")
        if result.a_post_low is not None:
            axes.plot([i, i], [result.a_post_low, result.a_post_high], color=CEILING, lw=3)
    axes.bar(0, 0, color="#3182bd", label="PL_rl")  # for the legend, whatever the first run has
    floor = min((r.p_sft for r in results.values() if r.p_sft is not None), default=0)
    axes.set_ylim(max(0, floor - 10))  # parts of a few points would vanish from 0
    axes.set_xticks(range(len(results)), list(results), rotation=60, ha="right", fontsize=8)
    axes.set(ylabel="performance (points)")
    title = "A_post = P_sft + PL_rl"
    axes.set_title(f"{title} (axis cut below)" if floor > 10 else title, fontsize=9)


def parser() -> argparse.ArgumentParser:
    flags = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = flags.add_argument
    add("--sft", nargs="+", default=[], metavar="RUN", help="run directories of sft.py")
    add("--rl", nargs="+", default=[], metavar="RUN", help="run directories of rl.py")
    add("--csv", help="RL points: columns run, flops, performance[, p_sft, n, fit]")
    add("--fit-fraction", type=float, default=1.0, help="first part of an RL run to fit (1)")
    add("--out", default="figures.png", help="the picture (default figures.png)")
    return flags


def main(argv=None) -> int:
    args = parser().parse_args(argv)
    try:
        if not args.sft and not args.rl and not args.csv:
            raise UserError("nothing to draw: give --sft RUN, --rl RUN or --csv FILE")
        sft = {}
        for run in args.sft:
            curve = phases.read_run(run)
            sft[run] = phases.diagnose(curve.steps, curve.losses, curve.flops, curve.saved)
        points = [ceiling.read_run(run) for run in args.rl]
        if args.csv:
            points += ceiling.read_csv(args.csv)
        rl = {p.run: (p, ceiling.fit_points(p, args.fit_fraction)) for p in points}
        draw(sft, rl, args.out)
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"wrote {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
