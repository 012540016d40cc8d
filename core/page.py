"""One HTML file that shows a run: what it did, its curves and warnings, its rollouts.

    python -m core.page runs/rl [runs/sft ...]       writes RUN/page.html; also while the run trains

The file needs no server and no network: curves are inline SVG, and one short script shows the
rollouts of a step. sft.py and rl.py write it at their end.

What a model wrote is shown as text, whatever it holds: it is in the page as JSON without a "<", the
script puts it there as text nodes, and no other script may run: the page's policy names the hash of
ours. Marks that turn the direction of writing are spelled out.

core knows nothing of the science. This file alone asks phases.py and ceiling.py, because a page
without their answers does not say where a run stands, and because both scripts above write it.
"""

import argparse
import base64
import hashlib
import json
import math
import sys
import time
from html import escape
from pathlib import Path
from string import Template
from typing import NamedTuple

import numpy as np

import ceiling
import phases
from core import svg
from core.errors import UserError
from core.files import read_jsonl, write_aside

BUDGET = 1_200_000  # bytes of samples in a page; the steps are thinned to it
LONGEST = 6000  # characters of a response in a page
POLICY = "default-src 'none'; style-src 'unsafe-inline'; "
DIRECTIONS = {code: f"[U+{code:X}]" for code in (*range(0x202A, 0x202F), *range(0x2066, 0x206A))}
TEMPLATE = Path(__file__).with_name("page.html")

# (key in the train lines of rl.py, title, what it says)
RL_CHARTS = (
    ("reward", "Reward", "100 x mean reward of the sampled answers; should rise"),
    ("right", "Right", "% of sampled answers that are right"),
    ("signal", "Signal", "% of prompts whose answers got different rewards; only they teach"),
    ("entropy", "Entropy", "nats per token; near 0 the model explores no more"),
    ("length", "Length", "tokens per response"),
    ("truncated", "Cut", "% of responses cut at the length limit; they earn nothing"),
    ("unparsed", "No answer", "% of responses without an answer to judge"),
    ("grad_norm", "Gradient norm", "before clipping, mean of the round's updates"),
    ("gap", "Gap", "nats per token between sampler and trainer; above 0.05 something is wrong"),
)


class Facts(NamedTuple):
    """A run directory as read."""

    folder: Path
    about: dict  # run.json
    metrics: list[dict]
    samples: list[dict]

    def of_kind(self, kind: str) -> list[dict]:
        return [row for row in self.metrics if row["kind"] == kind]

    @property
    def config(self) -> dict:
        return self.about["config"]

    @property
    def is_rl(self) -> bool:
        return "algo" in self.config


def read(run_dir) -> Facts:
    folder = Path(run_dir)
    for name in ("run.json", "metrics.jsonl", "samples.jsonl"):
        if not (folder / name).is_file():
            raise UserError(f"{folder}: no {name} in it; give a run directory of sft.py or rl.py")
    about = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    metrics = list(read_jsonl(folder / "metrics.jsonl", broken_tail=True))
    if not metrics:
        raise UserError(f"{folder}: nothing measured yet; try again after the first step")
    samples = list(read_jsonl(folder / "samples.jsonl", broken_tail=True))
    return Facts(folder, about, metrics, samples)


# ---- in words ------------------------------------------------------------------------------------
def summary(run: Facts, fit) -> list[str]:
    """What the run did and whether it still improves, a sentence or two per line."""
    last = run.metrics[-1]
    planned = f" of {run.config['steps']}" if run.config["steps"] else ""
    what = f"RL ({run.config['algo']})" if run.is_rl else "SFT"
    said = [
        f"{what} from {run.about.get('start', run.config['init'])} on {run.config['data']}: "
        f"{last['step']}{planned} steps, {last['seconds'] / 60:.1f} minutes."
    ]
    points = run.of_kind("eval")
    if points:
        end = points[-1]
        best = max(points, key=lambda row: row["pass1"])
        said.append(
            f"pass@1, the share of unseen problems solved, in points: {points[0]['pass1']:.1f} at "
            f"the start, {end['pass1']:.1f} at step {end['step']} (standard error "
            f"{end['pass1_se']:.1f}); highest {best['pass1']:.1f} at step {best['step']}."
        )
    if run.is_rl:
        rewards = [row["reward"] for row in run.of_kind("train")]
        part = len(rewards) // 5
        if part:
            said.append(
                f"Mean reward of the sampled answers: {np.mean(rewards[:part]):.1f} in the first "
                f"fifth of the rounds, {np.mean(rewards[-part:]):.1f} in the last fifth."
            )
        said.append(f"Does it still improve? {outlook(fit)}")
    elif run.of_kind("val"):
        found = diagnosis(run)
        state = "No" if found.saturated else "Yes"
        said.append(f"Does it still improve? {state}: {found.reason}.")
        if found.recommended_step is not None:
            said.append(f"Start RL from step {found.recommended_step}.")
    return said


def outlook(fit) -> str:
    """Whether more RL is likely to help, by the ceiling's fit; intervals are 90%."""
    if fit is None or fit.status == "too few points":
        return f"Not known yet: a forecast needs {ceiling.UNKNOWNS} evaluations."
    if fit.status != "ok":
        return f"No: {fit.status}; its best before that was {fit.a_post:.1f}."
    ahead = fit.forecast[-2]
    word = "Probably, within the noise"
    if ahead["low"] > fit.reached:
        word = "Yes"
    elif not fit.identified:
        word = "Not sure yet"
    elif ahead["mean"] - fit.reached < 1:
        word = "Hardly"
    return (
        f"{word}: the curve has reached {fit.reached:.1f}; at twice the compute an evaluation is "
        f"expected at {ahead['mean']:.1f} [{ahead['low']:.1f}, {ahead['high']:.1f}]; ceiling "
        f"{fit.text('a_post', '.1f')}."
    )


def warnings(run: Facts) -> list[str]:
    found = [f"step {row['step']}: {row['text']}" for row in run.of_kind("hint")]
    idle = [row["step"] for row in run.of_kind("train") if row.get("updates") == 0]
    if idle:
        found.append(f"{len(idle)} rounds without an update, as no prompt had unequal rewards")
    missing = {row["step"] for row in run.of_kind("train") if row.get("grad_norm") is None}
    skipped = sorted(missing - set(idle))
    if skipped:
        found.append(f"{len(skipped)} steps skipped a gradient that was not finite: {skipped[:10]}")
    return found


def diagnosis(run: Facts) -> phases.Diagnosis:
    curve = phases.read_run(run.folder)
    return phases.diagnose(curve.steps, curve.losses, curve.flops, curve.saved)


# ---- charts --------------------------------------------------------------------------------------
def measured(rows: list[dict], key: str) -> list[tuple]:
    """[(step, number)] of the lines that have it."""
    return [(row["step"], row[key]) for row in rows if row.get(key) is not None]


def loss_chart(run: Facts) -> str:
    """Training and validation loss over the regimes of phases.py."""
    train = svg.thin(measured(run.of_kind("train"), "loss"))
    rows = [row for row in run.of_kind("val") if row["val_loss"] is not None]
    if not rows:
        return svg.curve(measured(run.of_kind("train"), "loss"), "Loss", "nats per response token")
    val = measured(rows, "val_loss")
    values = [y for _, y in train + val]
    top = np.quantile(values, 0.95)  # the first losses would press the others into a line
    frame = svg.frame_of([x for x, _ in train + val], [min(y, top) for y in values])
    found = diagnosis(run)
    body = []
    steps = found.steps
    edges = [steps[0], *((a + b) / 2 for a, b in zip(steps, steps[1:])), steps[-1]]
    for regime, start, end in zip(found.regimes, edges, edges[1:]):
        body.append(frame.band([start, end], [frame.y0] * 2, [frame.y1] * 2, regime))
    for points, style in ((train, "line faint"), (val, "line")):
        body.append(frame.line([(x, min(y, frame.y1)) for x, y in points], style))
    body += svg.dots(frame, rows, [x for x, _ in val], "val_loss", "dot")
    legend = [("line faint", "training"), ("line", "validation")]
    legend += [(regime, regime) for regime in phases.REGIMES if regime in found.regimes]
    if found.recommended_step in dict(val):
        x = found.recommended_step
        body.append(frame.dot(x, dict(val)[x], f"start RL here: step {x}", "star"))
        legend.append(("star", f"start RL: step {x}"))
    note = "nats per response token; the first, highest losses are cut"
    return svg.figure(f"Loss {val[-1][1]:.3g}", note, svg.chart(frame, body, "Loss"), legend)


def pass1_chart(run: Facts, fit) -> str:
    """pass@1: over steps or, with a fit, over compute with the fitted curve and its forecast."""
    rows = run.of_kind("eval")
    if not rows:
        return ""
    ys = [row["pass1"] for row in rows]
    above = [row["pass1"] + row["pass1_se"] for row in rows]
    title = f"pass@1 {ys[-1]:.1f}"
    note = "% of unseen problems solved, with standard errors"
    if fit is None or fit.posterior is None:
        xs = [row["step"] for row in rows]
        frame = svg.frame_of(xs, [*ys, *above], floor=0.0)
        body = [frame.line(list(zip(xs, ys)), "line"), *svg.dots(frame, rows, xs, "pass1", "dot")]
        return svg.figure(title, note, svg.chart(frame, body, title))
    last = rows[-1]["flops"]
    exponent = 3 * int(math.log10(max(last, 1)) // 3)
    note += f", over 1e{exponent} FLOPs of RL"
    at = np.linspace(0, 2 * last, 81)
    _, low, high = ceiling.predict(fit.posterior, at)
    trend = np.median(ceiling.curve(fit.posterior, at), 0)
    xs = at / 10**exponent
    ends = [fit.a_post_low, fit.a_post_high] if fit.identified else []
    frame = svg.frame_of(xs, [*above, *low, *high, *ends], floor=0.0)
    curve = list(zip(xs, trend))
    body = [frame.band(xs, low, high, "band")]
    body += [frame.line(curve[:41], "line"), frame.line(curve[40:], "line ahead")]
    legend = [("dot", "evaluation"), ("line", "fitted curve"), ("band", "90% of evaluations")]
    legend.append(("line ahead", "forecast to twice the compute"))
    if fit.identified:
        body.append(frame.line([(xs[0], fit.a_post), (xs[-1], fit.a_post)], "line top"))
        body.append(frame.line([(xs[-1], end) for end in ends], "edge"))
        legend.append(("line top", f"ceiling {fit.text('a_post', '.1f')}"))
    flops = [row["flops"] / 10**exponent for row in rows]
    body += svg.dots(frame, rows, flops, "pass1", "dot")
    return svg.figure(title, note, svg.chart(frame, body, title, ""), legend)


def curves(run: Facts, fit) -> str:
    drawn = [pass1_chart(run, fit)]
    if run.is_rl:
        for key, title, note in RL_CHARTS:
            drawn.append(svg.curve(measured(run.of_kind("train"), key), title, note))
    elif run.of_kind("train"):
        drawn.insert(0, loss_chart(run))
        norms = measured(run.of_kind("train"), "grad_norm")
        drawn.append(svg.curve(norms, "Gradient norm", "before clipping"))
    return "\n".join(drawn)


# ---- rollouts ------------------------------------------------------------------------------------
def clipped(text, longest: int = 1000):
    """A text without its middle, if it is longer, and with the marks that would turn the direction
    of what follows spelled out; anything else as it is."""
    if not isinstance(text, str):
        return text
    if len(text) > longest:
        head = longest * 3 // 4
        left_out = f" [... {len(text) - longest:,} characters left out ...] "
        text = text[:head] + left_out + text[head - longest :]
    return text.translate(DIRECTIONS)


def grouped(rows: list[dict], longest: int) -> list[dict]:
    """The samples of one step as groups: {problem, gold, trained, rows}."""
    groups = {}
    for row in rows:
        key = (row.get("group"), row["problem"])
        if key not in groups:
            about = {name: clipped(row.get(name), longest) for name in ("problem", "gold")}
            groups[key] = about | {"trained": row.get("trained", False), "rows": []}
        shown = {name: clipped(row.get(name), 200) for name in ("answer", "reason")}
        shown["response"] = clipped(row["response"], longest)
        for name in ("reward", "correct", "length", "truncated"):
            shown[name] = row.get(name)
        groups[key]["rows"].append(shown)
    return list(groups.values())


def samples_json(samples: list[dict]) -> str:
    """[{kind, step, groups}] for the script, without a "<"; steps are left out to keep BUDGET."""
    steps = {}
    for row in samples:
        steps.setdefault((row.get("kind", "eval"), row["step"]), []).append(row)
    most = max((len(rows) for rows in steps.values()), default=1)
    longest = min(LONGEST, BUDGET // (12 * most))  # a character takes up to 12 bytes
    texts = []
    for kind, step in sorted(steps):
        shown = {"kind": kind, "step": step, "groups": grouped(steps[kind, step], longest)}
        texts.append(json.dumps(shown).replace("<", "\\u003c"))
    while sum(map(len, texts)) > BUDGET and len(texts) > 2:
        texts = [texts[0], *texts[1:-1][1::2], texts[-1]]
    return f"[{','.join(texts)}]"


# ---- the page ------------------------------------------------------------------------------------
def settings(run: Facts) -> str:
    """Rows of a table: every setting and fact of run.json."""
    facts = {name: value for name, value in run.about.items() if name != "config"}
    rows = []
    for name, value in (run.config | facts).items():
        shown = " ".join(map(str, value)) if isinstance(value, list) else str(value)
        rows.append(f"<tr><th>{escape(name)}</th><td>{escape(clipped(shown))}</td></tr>")
    return "\n".join(rows)


def digest_of(script: str) -> str:
    """The hash by which a page's policy allows a script."""
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


def render(run: Facts) -> str:
    fit = None
    if run.is_rl and run.of_kind("eval"):
        fit = ceiling.fit_points(ceiling.read_run(run.folder))
    template = TEMPLATE.read_text(encoding="utf-8")
    script = template.split("<script>")[1].split("</script>")[0]
    items = [f"<li>{escape(text)}</li>" for text in warnings(run)]
    return Template(template).substitute(
        name=escape(str(run.folder)),
        policy=POLICY + f"script-src 'sha256-{digest_of(script)}'",
        written=time.strftime("%Y-%m-%d %H:%M:%S"),
        summary="\n".join(f"<p>{escape(clipped(text))}</p>" for text in summary(run, fit)),
        warnings="\n".join(items) or "<li>none</li>",
        charts=curves(run, fit),
        settings=settings(run),
        samples=samples_json(run.samples),
    )


def write(run_dir) -> str:
    """Write RUN/page.html and return its path."""
    path = Path(run_dir, "page.html")
    text = render(read(run_dir))
    write_aside(path, text.encode("utf-8", "replace").decode())  # argv may hold other bytes
    return str(path)


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(prog="python -m core.page", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("run", nargs="+", help="run directories of sft.py or rl.py")
    try:
        for run_dir in parser.parse_args(argv).run:
            print(f"wrote {write(run_dir)}")
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
