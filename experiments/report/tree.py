"""The picture of docs/architecture.md: `python -m experiments.report.tree` writes docs/tree.svg."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("svg")
from matplotlib import pyplot as plt

OUT = Path(__file__).resolve().parents[2] / "docs" / "tree.svg"
PROMPT = ["<s>", *["img"] * 6, "Describe", "it"]  # slots 0 to 8
PRUNED = {2, 4, 5}
# answer tokens: slot, word, slot of the parent, beam that still sees it (None: a dead end)
NODES = [
    (9, "A", 8, {0, 1}),
    (10, "The", 8, {2}),
    (11, "dog", 9, {0}),
    (12, "small", 9, {1}),
    (13, "cat", 10, set()),
    (14, "table", 10, {2}),
    (15, "sits", 11, {0}),
    (16, "dog", 12, {1}),
    (17, "is", 14, {2}),
]
BEAMS = ["tab:blue", "tab:orange", "tab:green"]


def main() -> None:
    plt.rcParams["svg.hashsalt"] = "tree"  # the same file every time
    figure, (tree, pool) = plt.subplots(2, 1, figsize=(10, 5.2), height_ratios=[3, 2], layout="constrained")
    depth = {8: 0}
    at: dict[int, tuple[float, float]] = {8: (3.2, 1.0)}
    heights = {9: 1.7, 10: 0.2, 11: 2.1, 12: 1.2, 13: 0.6, 14: -0.2, 15: 2.1, 16: 1.2, 17: -0.2}
    for i, word in enumerate(PROMPT):
        x = 0.4 * i
        tree.text(x, 1.0, word, ha="center", va="center", fontsize=8, color="lightgrey" if i in PRUNED else "black")
        edge = "lightgrey" if i in PRUNED else "grey"
        tree.add_patch(plt.Rectangle((x - 0.19, 0.8), 0.38, 0.4, fill=False, ec=edge))
    for slot, word, parent, beams in NODES:
        depth[slot] = depth[parent] + 1
        at[slot] = (3.3 + 0.95 * depth[slot], heights[slot])
        colour = BEAMS[min(beams)] if beams else "lightgrey"
        (x0, y0), (x1, y1) = at[parent], at[slot]
        tree.plot([x0 + 0.2, x1 - 0.22], [y0, y1], color=colour, lw=1.2)
        tree.text(x1, y1, word, ha="center", va="center", fontsize=9, color=colour)
        tree.text(x1, y1 - 0.25, str(slot), ha="center", va="center", fontsize=6, color="grey")
    for k, slot in enumerate((15, 16, 17)):
        tree.text(at[slot][0] + 0.45, at[slot][1], f"beam {k}", va="center", fontsize=9, color=BEAMS[k], weight="bold")
    tree.set(xlim=(-0.4, 7.4), ylim=(-0.6, 2.5))
    tree.set_title("An image's tokens: the prompt, three beams, a dead end; three visual tokens pruned", fontsize=10)
    tree.axis("off")

    words = [*PROMPT, *(word for _, word, _, _ in NODES)]
    for slot in range(20):
        used = slot < len(words)
        pool.text(slot, 3.4, words[slot] if used else "", ha="center", va="center", fontsize=7, rotation=45)
        for k, colour in enumerate(BEAMS):
            sees = used and (slot not in PRUNED if slot < len(PROMPT) else k in NODES[slot - len(PROMPT)][3])
            face = colour if sees else "white"
            pool.add_patch(plt.Rectangle((slot - 0.45, 1.6 - 0.8 * k), 0.9, 0.65, fc=face, ec="lightgrey"))
        pool.text(slot, -0.35, slot, ha="center", fontsize=6, color="grey")
    for k, colour in enumerate(BEAMS):
        pool.text(-0.8, 1.9 - 0.8 * k, f"beam {k}", ha="right", va="center", fontsize=9, color=colour)
    pool.set(xlim=(-3, 19.6), ylim=(-0.5, 4.2))
    pool.set_title("The same as one pool of slots, where keys and values stand once: `visible`", fontsize=10)
    pool.axis("off")
    figure.savefig(OUT, metadata={"Date": None})


if __name__ == "__main__":
    main()
