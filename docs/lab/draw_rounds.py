"""What happens to one request in stage 5? A picture, from the files that rlaif.py leaves.

    python docs/lab/draw_rounds.py --out out                      needs matplotlib
    python docs/lab/draw_rounds.py --out out --request 7

docs/how-5-constitutional-ai.png: on the left a harmful request through the rounds of critique and
revision (the paper's section 3), on the right two answers that the AI compared by a principle, in
both orders, and the label that it gave (section 4). All words are the model's own."""
import argparse
import sys
import textwrap
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import data
from model import natural, writable

COLOURS = {"request": "#e8e8e8", "answer": "#dbe7f5", "principle": "#fbe9c6",
           "critique": "#f6d9d3", "revision": "#d7ecd9", "label": "#e3dcf2"}

def column(axis, title, boxes, width=58):
    """Boxes of (kind, words) below one another, an arrow from each to the next."""
    axis.set_title(title, fontsize=11)
    axis.axis("off")
    wrapped = [(kind, textwrap.wrap(f"{kind}: {words}", width)) for kind, words in boxes]
    lines = sum(len(texts) for _, texts in wrapped) + 1.6 * len(wrapped)
    y = 1.0
    for i, (kind, texts) in enumerate(wrapped):
        height = (len(texts) + 0.6) / lines
        box = dict(boxstyle="round,pad=0.35", facecolor=COLOURS[kind], edgecolor="#888888")
        axis.text(0.02, y - height / 2, "\n".join(texts), va="center", fontsize=8, bbox=box,
                  family="monospace", transform=axis.transAxes)
        y -= height + 1 / lines
        if i + 1 < len(wrapped):
            axis.annotate("", (0.06, y - 0.1 / lines), (0.06, y + 0.75 / lines),
                          xycoords="axes fraction", arrowprops=dict(arrowstyle="->"))

def boxes_of_trace(trace):
    """A line of rlaif_traces.jsonl -> the boxes of one request, round by round."""
    boxes = [("request", trace["question"]), ("answer", trace["answers"][0])]
    for step in trace["steps"]:
        boxes += [("principle", step["principle"]), ("critique", step["critique"])]
        if step["revision"] and not step["dropped"]:
            boxes.append(("revision", step["revision"]))
    return boxes

def boxes_of_label(record):
    """A line of rlaif_labels.jsonl -> the boxes of one comparison."""
    orders = (f"{record['label']:.2f} that the first is better: {record['a_first']:.2f} when it "
              f"stands first, {record['b_first']:.2f} when it stands second")
    return [("request", record["prompt"]), ("answer", record["a"]), ("answer", record["b"]),
            ("principle", record["principle"]), ("label", orders)]

def read(path, boxes_of):
    """The records of one of rlaif.py's files; stops at one of which no boxes can be made."""
    records = []
    for place, record, _ in data.read_records(path):
        try:
            boxes_of(record)
        except (IndexError, KeyError, TypeError, ValueError):      # as other forms have it
            data.unreadable(path, place, record, ["as rlaif.py writes it: run that again"])
        records.append(record)
    if not records:
        raise SystemExit(f"{path} holds no record: run `python rlaif.py` again")
    return records

def main(argv=None):
    p = argparse.ArgumentParser(description="Draw a request's way through stage 5.")
    p.add_argument("--out", default="out", help="folder of rlaif_traces.jsonl, rlaif_labels.jsonl")
    p.add_argument("--to", type=writable, default="docs", help="folder of the picture")
    p.add_argument("--request", type=natural, help="number of the trace; default: the first that "
                   "meets a principle which is silent, and one which is not")
    p.add_argument("--comparison", type=natural, help="number of the label; default: the first of "
                   "a harmful request with a decided label")
    args = p.parse_args(argv)
    try:
        import matplotlib.pyplot as plt
    except ImportError:
        raise SystemExit("the picture needs matplotlib: pip install matplotlib") from None
    traces = read(Path(args.out, "rlaif_traces.jsonl"), boxes_of_trace)
    labels = read(Path(args.out, "rlaif_labels.jsonl"), boxes_of_label)
    asked = args.request
    if asked is None:                                      # silent first, a fault later: both kinds
        mixed = [t for t in traces if not t["steps"][0]["revision"] and t["steps"][-1]["revision"]]
        asked = traces.index((mixed or traces)[0])
    chosen = args.comparison
    if chosen is None:                                     # refusing against helping, by a rule
        decided = [r for r in labels if abs(r["label"] - 0.5) > 0.4
                   and data.is_harmless(r["a"]) != data.is_harmless(r["b"])]
        chosen = labels.index((decided or labels)[0])
    if asked >= len(traces) or chosen >= len(labels):
        raise SystemExit(f"there are {len(traces)} traces and {len(labels)} labels, from number 0")
    figure, axes = plt.subplots(1, 2, figsize=(13, 6.5))
    column(axes[0], "critique and revise", boxes_of_trace(traces[asked]))
    column(axes[1], "compare", boxes_of_label(labels[chosen]))
    figure.savefig(Path(args.to, "how-5-constitutional-ai.png"), dpi=110, bbox_inches="tight")
    print(f"wrote {Path(args.to, 'how-5-constitutional-ai')}.png")

if __name__ == "__main__":
    main()
