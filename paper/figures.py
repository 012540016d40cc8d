"""One picture of a study: SFT regimes along the validation loss, RL curves with their ceilings, and P_sft + PL_rl.

A panel for each SFT run (eq. 5-9), a panel for each RL run (eq. 2 with the 90% band of an evaluation, held-back points
hollow), and a last panel with the two parts of every ceiling (eq. 1, 4). Needs matplotlib, and nothing else does.

    python figures.py --sft runs/sft --rl runs/rl runs/rl2 --out figures.png
    python figures.py --csv points.csv --fit-fraction 0.71      any trainer's points, as ceiling.py reads them"""

from __future__ import annotations

import argparse
import sys

import numpy as np

import ceiling
import phases
from core.errors import UserError

COLOURS = {"adaptive": "#9ecae1", "stable": "#a1d99b", "mild": "#fee391", "severe": "#fc9272"}
PER_ROW = 3


def draw(sft: dict, rl: dict, path) -> None:
    """sft {name: phases.Diagnosis}, rl {name: (ceiling.Points, ceiling.CeilingFit)} -> a picture, format by suffix."""
    try:
        import matplotlib
    except ImportError:
        raise UserError(
            "figures need matplotlib: pip install matplotlib; tables and JSON do without it"
        ) from None
    matplotlib.use("Agg")  # no display needed
    from matplotlib import pyplot

    n_panels = len(sft) + len(rl) + (len(rl) > 1)
    columns = min(PER_ROW, n_panels)
    rows = -(-n_panels // columns)
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
    found = [
        pair for axes in figure.axes[len(sft) :] for pair in zip(*axes.get_legend_handles_labels())
    ]
    handles = {label: handle for handle, label in found}
    inches = 0.3 if handles else 0
    figure.tight_layout(rect=(0, inches / figure.get_figheight(), 1, 1))
    if handles:
        figure.legend(
            handles.values(),
            handles,
            loc="lower center",
            ncol=len(handles),
            frameon=False,
            fontsize=9,
        )
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def regimes_panel(axes, name: str, found: phases.Diagnosis) -> None:
    """The validation loss over the regimes it passes through; a regime ends half way to the next validation."""
    steps = np.array(found.steps, float)
    edges = np.concatenate([steps[:1], (steps[1:] + steps[:-1]) / 2, steps[-1:]])
    for regime in phases.REGIMES:
        at = [i for i, r in enumerate(found.regimes) if r == regime]
        if at:
            axes.axvspan(
                edges[at[0]],
                edges[at[-1] + 1],
                color=COLOURS[regime],
                alpha=0.6,
                lw=0,
                label=regime,
            )
    axes.plot(steps, found.losses, "o-", color="#333333", ms=4, lw=1)
    if found.recommended_step is not None:
        best = found.steps.index(found.recommended_step)
        axes.plot(
            steps[best],
            found.losses[best],
            "*",
            color="#08306b",
            ms=14,
            label=f"start RL: step {steps[best]:g}",
        )
    low, high = np.nanmin(found.losses), np.nanmax(found.losses)
    cut = high > 1.6 * low  # the first losses would press the regimes, 2% and 10% wide, into a line
    axes.set(xlabel="SFT step", ylabel=f"validation loss (nats a token{', cut' if cut else ''})")
    if cut:
        axes.set_ylim(0.93 * low, 1.6 * low)
    axes.set_title(f"{name}: {'saturated' if found.saturated else 'still improving'}", fontsize=9)
    axes.legend(fontsize=8, framealpha=0.7)


def curve_panel(axes, name: str, points: ceiling.Points, result: ceiling.CeilingFit) -> None:
    """Evaluations, eq. (2), the band of an evaluation and the ceiling with its interval (bar at the right edge)."""
    x, y = points.flops, points.performance
    exponent = 3 * int(np.log10(max(x.max(), 1)) // 3)  # EFLOP, TFLOP ... by the run's own size
    unit = 10.0**exponent
    ahead = np.isin(x, [f["flops"] for f in result.forecast])
    axes.plot(x[~ahead] / unit, y[~ahead], "o", ms=4, color="#08519c", label="fitted")
    if ahead.any():
        axes.plot(
            x[ahead] / unit, y[ahead], "o", ms=4, mfc="none", color="#d94801", label="held back"
        )
    if result.posterior is not None:
        at = np.linspace(0, x.max(), 120)
        _, low, high = ceiling.predict(result.posterior, at)
        axes.fill_between(
            at / unit, low, high, color="#9ecae1", alpha=0.45, lw=0, label="90% of evaluations"
        )
        trend = np.median(ceiling.curve(result.posterior, at), 0)
        axes.plot(at / unit, trend, color="#08519c", lw=1.5, label="eq. (2)")
    if result.a_post is not None:
        axes.axhline(result.a_post, color="#238b45", ls="--", lw=1, label="A_post")
    if result.a_post_low is not None:
        axes.plot(
            [x.max() * 1.03 / unit] * 2,
            [result.a_post_low, result.a_post_high],
            color="#238b45",
            lw=5,
            alpha=0.6,
            solid_capstyle="butt",
            label="its 90% interval",
        )
    state = result.status if result.status != "ok" else f"A_post {result.text('a_post', '.1f')}"
    axes.set_title(f"{name}: {state}", fontsize=9)
    axes.set(xlabel=f"RL compute (1e{exponent} FLOPs)", ylabel="performance (points)")


def parts_panel(axes, results: dict) -> None:
    """P_sft + PL_rl = A_post by starting point, with the ceiling's interval; only P_sft where it is not identified."""
    for i, result in enumerate(results.values()):
        known = result.p_sft is not None
        axes.bar(
            i, result.p_sft if known else 0, color="#9ecae1", label="P_sft" if i == 0 else None
        )
        if known and result.plasticity is not None:
            axes.bar(i, result.plasticity, bottom=result.p_sft, color="#3182bd")
        if result.a_post_low is not None:
            axes.plot([i, i], [result.a_post_low, result.a_post_high], color="#238b45", lw=3)
    axes.bar(0, 0, color="#3182bd", label="PL_rl")  # for the legend, whatever the first run has
    floor = min((r.p_sft for r in results.values() if r.p_sft is not None), default=0)
    axes.set_ylim(max(0, floor - 10))  # parts of a few points would vanish from 0
    axes.set_xticks(range(len(results)), list(results), rotation=60, ha="right", fontsize=8)
    axes.set(ylabel="performance (points)")
    axes.set_title(
        "A_post = P_sft + PL_rl" + (" (axis cut below)" if floor > 10 else ""), fontsize=9
    )


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--sft", nargs="+", default=[], metavar="RUN", help="run directories of sft.py"
    )
    parser.add_argument(
        "--rl", nargs="+", default=[], metavar="RUN", help="run directories of rl.py"
    )
    parser.add_argument(
        "--csv", help="RL points instead: columns run, flops, performance[, p_sft, n, fit]"
    )
    parser.add_argument(
        "--fit-fraction",
        type=float,
        default=1.0,
        help="fit this first part of an RL run (default 1)",
    )
    parser.add_argument("--out", default="figures.png", help="the picture (default figures.png)")
    args = parser.parse_args(argv)
    try:
        if not args.sft and not args.rl and not args.csv:
            raise UserError("nothing to draw: give --sft RUN, --rl RUN or --csv FILE")
        curves = {run: phases.read_run(run) for run in args.sft}
        sft = {
            run: phases.diagnose(c.steps, c.losses, c.flops, c.saved) for run, c in curves.items()
        }
        found = [ceiling.read_run(run) for run in args.rl] + (
            ceiling.read_csv(args.csv) if args.csv else []
        )
        draw(sft, {p.run: (p, ceiling.fit_points(p, args.fit_fraction)) for p in found}, args.out)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"wrote {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
