"""Draws pipeline.svg and cache-step.svg: `python docs/images/draw.py`.

Both stand on a light card of their own, so they read the same on light and dark pages.
"""

from __future__ import annotations

from html import escape
from pathlib import Path

INK, MUTED, CARD, LINE = "#1f2933", "#5b6b79", "#fbfcfd", "#9aa8b5"
PLAIN, CACHED, COMPUTED = "#eef2f6", "#bfe5df", "#fbd9b0"
ARROW = (
    '<marker id="end" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
    f'<path d="M0 0 L8 4 L0 8 z" fill="{MUTED}"/></marker>'
)


def text(
    x: float, y: float, words: str, size: int = 14, color: str = INK, weight: int = 400, at: str = "start"
) -> str:
    style = f'font-size="{size}" fill="{color}" font-weight="{weight}" text-anchor="{at}"'
    return f'<text x="{x}" y="{y}" {style}>{escape(words)}</text>'


def box(x: float, y: float, width: float, height: float, fill: str = PLAIN, line: str = LINE) -> str:
    return f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="8" fill="{fill}" stroke="{line}"/>'


def arrow(*points: tuple[float, float]) -> str:
    path = " L".join(f"{x} {y}" for x, y in points)
    return f'<path d="M{path}" fill="none" stroke="{MUTED}" stroke-width="1.8" marker-end="url(#end)"/>'


def picture(width: int, height: int, title: str, parts: list[str]) -> str:
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" role="img">'
    )
    card = f'<rect width="{width}" height="{height}" rx="12" fill="{CARD}"/>'
    return "\n".join([head, f"<title>{escape(title)}</title>", f"<defs>{ARROW}</defs>", card, *parts, "</svg>\n"])


STAGES = {
    "1 capture": ("Dynamo traces the model, with", "marker ops for MoE dispatch"),
    "2 export": ("Dynamo's graph becomes", "functional ATen ops"),
    "3 normalize": ("one spelling for attention,", "views and linear layers"),
    "4 match": ("routers, experts, attentions", "and feed-forwards are found"),
    "5 validate": ("the rewritten step must equal", "the model, region by region"),
    "6 plan": ("which tensors are cached,", "what each kind of step costs"),
    "7 rewrite": ("the recipe's step is traced", "to a graph of its own"),
    "8 lower": ("Inductor compiles it; blocks", "that are alike compile once"),
}


def pipeline() -> str:
    parts = [text(30, 38, "When the model is first called, and for each new input shape", 16, weight=600)]
    for i, (name, lines) in enumerate(STAGES.items()):
        x, y = 30 + 242 * (i % 4), 58 + 122 * (i // 4)
        parts += [box(x, y, 218, 84), text(x + 14, y + 27, name, 16, weight=600)]
        parts += [text(x + 14, y + 49 + 19 * j, line, 14, MUTED) for j, line in enumerate(lines)]
        if i % 4 < 3:
            parts.append(arrow((x + 218, y + 42), (x + 241, y + 42)))
    parts.append(arrow((865, 142), (865, 161), (139, 161), (139, 179)))
    parts.append(text(30, 318, "At every call", 16, weight=600))
    parts.append(
        text(146, 318, "the engine finds generation, stream and step, and runs one compiled graph", 14, MUTED)
    )
    for step in range(10):
        full, x = step % 4 == 0, 30 + 95 * step
        parts.append(box(x, 338, 79, 46, COMPUTED if full else CACHED))
        parts.append(text(x + 39.5, 358, "full" if full else "cache", 14, weight=600, at="middle"))
        parts.append(text(x + 39.5, 375, f"step {step}", 12, MUTED, at="middle"))
        ends = ((x + 39.5, 385), (x + 39.5, 425))
        parts.append(arrow(*(ends if full else ends[::-1])))
    parts += [
        box(30, 428, 934, 44),
        text(497, 455, "caches of this generation and stream", 15, weight=600, at="middle"),
    ]
    parts.append(
        text(30, 500, "A full step runs the model as it is and fills the caches. A cache step reads them", 14, MUTED)
    )
    parts.append(text(30, 518, "and computes little or nothing of attention and experts anew.", 14, MUTED))
    return picture(994, 536, "The stages of compilation, and the steps that run afterwards", parts)


BLOCK = {
    "1 probe": ([("router", COMPUTED), ("attention output", CACHED)], "as if attention had", "not changed"),
    "2 decide": (
        [("match, score, threshold", COMPUTED), ("experts and weights", CACHED)],
        "which branches to",
        "recompute, on which tokens",
    ),
    "3 attention": (
        [("q, k, v of these tokens", COMPUTED), ("k, v, output of all others", CACHED)],
        "for tokens with a",
        "recomputed branch",
    ),
    "4 experts": (
        [("these branches", COMPUTED), ("outputs of all others", CACHED)],
        "sum with the current",
        "router weights",
    ),
}


def cache_step() -> str:
    parts = [text(30, 38, "One block on a cache step of the recipe moeca", 16, weight=600)]
    parts += [box(612, 22, 18, 18, COMPUTED), text(638, 36, "computed now", 14), box(762, 22, 18, 18, CACHED)]
    parts.append(text(788, 36, "read from the cache", 14))
    for i, (name, (strips, *lines)) in enumerate(BLOCK.items()):
        x = 30 + 242 * i
        parts += [box(x, 62, 214, 158), text(x + 14, 88, name, 16, weight=600)]
        parts += [text(x + 14, 108 + 17 * j, line, 14, MUTED) for j, line in enumerate(lines)]
        for j, (words, fill) in enumerate(strips):
            parts += [box(x + 10, 139 + 38 * j, 194, 30, fill), text(x + 20, 159 + 38 * j, words, 14)]
        if i < 3:
            parts.append(arrow((x + 214, 141), (x + 241, 141)))
    parts.append(f'<path d="M30 318 L952 318" stroke="{INK}" stroke-width="3" marker-end="url(#end)"/>')
    parts.append(text(30, 345, "residual stream (batch, tokens, width)", 14, MUTED))
    for x, up, gate in ((137, 0, ""), (560, 674, "attention gate"), (800, 910, "MLP gate")):
        parts.append(arrow((x, 316), (x, 222)))
        if up:
            parts.append(arrow((up, 221), (up, 303)))
            parts.append(f'<circle cx="{up}" cy="318" r="13" fill="{CARD}" stroke="{INK}" stroke-width="2"/>')
            parts.append(text(up, 325, "+", 20, weight=600, at="middle"))
            parts.append(text(up - 10, 268, f"x {gate}", 14, MUTED, at="end"))
    parts.append(
        text(30, 385, "Gates, router weights, embedding and head are always those of the current step.", 14, MUTED)
    )
    words = "moeca-forecast extrapolates cached values along the timestep; only the router is computed."
    parts.append(text(30, 405, words, 14, MUTED))
    return picture(994, 424, "One block of the model on a cache step", parts)


if __name__ == "__main__":
    for name, drawn in (("pipeline", pipeline()), ("cache-step", cache_step())):
        Path(__file__).with_name(f"{name}.svg").write_text(drawn)
